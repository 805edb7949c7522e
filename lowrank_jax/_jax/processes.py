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
    """Place an array that each process holds whole on a sharding that may span all processes."""
    if not getattr(sharding, "is_fully_addressable", True):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    return jax.device_put(leaf, sharding)


def write_on_first_process(write: Callable[[], None]) -> None:
    """Call `write` in process 0 while the others wait; a failure is raised in every process.

    Raises:
      CheckpointError: `write` raised one in process 0.
    """
    if jax.process_count() == 1:
        write()
        return
    from jax.experimental import multihost_utils

    error = None
    if jax.process_index() == 0:
        try:
            write()
        except CheckpointError as found:
            error = found
    # The broadcast is also the barrier: nobody goes on before process 0 has written.
    failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
    if error is not None:
        raise error
    if failed:
        raise CheckpointError("process 0 could not write the checkpoint: its own error says why")
