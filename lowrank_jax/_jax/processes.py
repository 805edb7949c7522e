"""Multi-process programs: gather sharded arrays, place them, and write on process 0 only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lowrank_jax._errors import CheckpointError


def gather_shards(leaf: object) -> Any:
    """Gather an array sharded over several processes into each; other leaves are returned as is.

    A typed PRNG key that is gathered is returned as its key data.
    """
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    from jax.experimental import multihost_utils

    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def place_array(leaf: jax.Array | np.ndarray, sharding: Any) -> jax.Array:
    """Place an array on a sharding that may span all processes.

    The array is one that each process holds whole, of which only its own shards are copied, or one
    that spans all processes already.
    """
    spans = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if spans or (isinstance(leaf, jax.Array) and getattr(sharding, "is_fully_addressable", True)):
        return jax.device_put(leaf, sharding)
    # device_put would first copy a memory-mapped array whole
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def write_on_first_process(write: Callable[[], None]) -> None:
    """Call `write` in process 0 while the others wait; a failure is raised in every process.

    Raises:
      CheckpointError: `write` raised one in process 0.
    """
    if jax.process_count() == 1:
        write()
        return
    error = None
    if jax.process_index() == 0:
        try:
            write()
        except CheckpointError as found:
            error = found
    raise_everywhere(error)


def raise_everywhere(error: BaseException | None) -> None:
    """Raise the error of process 0, if it has one, in every process; all of them call this.

    Raises:
      CheckpointError: process 0 has an error; there it is the error itself.
    """
    failed = error is not None
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # The broadcast is also the barrier: nobody goes on before process 0 is here.
        failed = bool(multihost_utils.broadcast_one_to_all(np.array(failed)))
    if error is not None:
        raise error
    if failed:
        raise CheckpointError("process 0 could not write: its own error says why")
