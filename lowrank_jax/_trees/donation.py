"""Donation of the leaves of a tree: deletes each as soon as no other leaf needs its buffer."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._jax import jaxprs


class Donation:
    """Donated leaves, each deleted once no other leaf needs its buffer.

    Args:
      leaves: path -> leaf of the whole tree; leaves that are not donated keep their buffers.
      paths: paths of the donated leaves; NumPy arrays among them are not deleted.

    >>> import jax.numpy as jnp
    >>> leaves = {"a": jnp.ones(3), "b": jnp.ones(3)}
    >>> Donation(leaves, ["a"]).release("a")
    >>> leaves["a"].is_deleted(), leaves["b"].is_deleted()
    (True, False)
    """

    def __init__(self, leaves: Mapping[str, Any], paths: Iterable[str]):
        self._buffers = {path: _find_buffers(leaf) for path, leaf in leaves.items()}
        self._users = Counter(itertools.chain.from_iterable(self._buffers.values()))
        self._arrays = {p: leaves[p] for p in paths if isinstance(leaves[p], jax.Array)}
        self._waiting: list[str] = []

    def release(self, path: str) -> None:
        """Delete a leaf that was read for the last time, or wait for the leaves that share it."""
        # Two leaves that share a buffer are its two users. After the release of the first there is
        # one user left, so it waits; the release of the second deletes both.
        if path not in self._arrays:
            return
        self._users.subtract(self._buffers[path])
        self._waiting.append(path)
        unused = lambda path: not any(self._users[buffer] for buffer in self._buffers[path])
        for path in filter(unused, tuple(self._waiting)):
            self._waiting.remove(path)
            self._arrays[path].delete()


def _find_buffers(leaf: object) -> set[Any]:
    """Identify the buffers of an array on the devices of this process."""
    if not isinstance(leaf, jax.Array) or jaxprs.is_tracer(leaf) or leaf.is_deleted():
        return set()
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return set()
    try:
        parts = [(shard.device, shard.data) for shard in leaf.addressable_shards]
        return {(device, part.unsafe_buffer_pointer()) for device, part in parts}
    except RuntimeError:  # the runtime does not expose buffer pointers
        return {id(leaf)}
