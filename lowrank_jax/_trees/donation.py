"""Donation of a tree's leaves: which can be deleted when, where leaves may share buffers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._jax import jaxprs


class Donation:
    """Leaves that are given for good: each is deleted when no other needs its buffer any more.

    Args:
      leaves: path -> leaf, of a whole tree; those that are not donated keep their buffers.
      paths: of the leaves that are donated; NumPy arrays among them are nobody's to delete.
    """

    def __init__(self, leaves: Mapping[str, Any], paths: Iterable[str]):
        self._buffers = {path: _find_buffers(leaf) for path, leaf in leaves.items()}
        self._users = Counter(itertools.chain.from_iterable(self._buffers.values()))
        self._arrays = {p: leaves[p] for p in paths if isinstance(leaves[p], jax.Array)}
        self._waiting: list[str] = []

    def release(self, path: str) -> None:
        """A leaf was read for the last time: delete it and those that waited for it, or wait."""
        if path not in self._arrays:
            return
        self._users.subtract(self._buffers[path])
        self._waiting.append(path)
        unused = lambda path: not any(self._users[buffer] for buffer in self._buffers[path])
        for path in filter(unused, tuple(self._waiting)):
            self._waiting.remove(path)
            self._arrays[path].delete()


def _find_buffers(leaf: Any) -> set[Any]:
    """What tells which buffers an array has on the devices of this process."""
    if not isinstance(leaf, jax.Array) or jaxprs.is_tracer(leaf) or leaf.is_deleted():
        return set()
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return set()
    try:
        parts = [(shard.device, shard.data) for shard in leaf.addressable_shards]
        return {(device, part.unsafe_buffer_pointer()) for device, part in parts}
    except RuntimeError:  # a runtime that does not say where its buffers are
        return {id(leaf)}
