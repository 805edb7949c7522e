"""A program of several processes: one writes for all, and each has all values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lowrank_jax._errors import CheckpointError


def gather_shards(leaf: object) -> Any:
    """An array whose shards lie in several processes, whole in each; a key's data; others as is."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    from jax.experimental import multihost_utils

    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def place_array(leaf: jax.Array | np.ndarray, sharding: Any) -> jax.Array:
    """An array that each process has whole, by a sharding that may be over all of them."""
    if not getattr(sharding, "is_fully_addressable", True):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    return jax.device_put(leaf, sharding)


def write_on_first_process(write: Callable[[], None]) -> None:
    """Let process 0 write while the others wait; where it fails, it fails in all.

    Raises:
      CheckpointError: it could not be written.
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
    failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
    if error is not None:
        raise error
    if failed:
        raise CheckpointError("process 0 could not write the checkpoint: its own error says why")
