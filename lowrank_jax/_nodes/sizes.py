"""Counts of elements and bytes of arrays and nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from lowrank_jax._jax.types import PyTree

if TYPE_CHECKING:
    from lowrank_jax._nodes.quantized import Quantized


def count_bits(leaf: jax.Array | Quantized) -> float:
    """Average bits per value of an array or a quantized leaf, scales included."""
    return 8 * sum_leaves(count_bytes, leaf) / max(1, math.prod(leaf.shape))


def sum_leaves(size: Callable[[Any], int], tree: PyTree) -> int:
    """Sum size(leaf) over the arrays of a tree."""
    return sum(size(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def count_elements(leaf: jax.Array) -> int:
    """Count the elements of an array."""
    return math.prod(leaf.shape)


def count_bytes(leaf: jax.Array) -> int:
    """Count bytes in memory: accelerators pack two 4-bit integers into one, a CPU does not."""
    return _count_bytes_of_shape(leaf, leaf.shape)


def count_device_bytes(leaf: jax.Array) -> int:
    """Count bytes of the largest shard; an array without a sharding is one shard."""
    return _count_bytes_of_shape(leaf, _get_shard_shape(leaf))


def count_packed_bytes(leaf: jax.Array) -> int:
    """Count bytes of the largest shard as XLA's figures do, which pack all 4-bit integers."""
    count = math.prod(_get_shard_shape(leaf))
    return (count + 1) // 2 if _is_of_4_bits(leaf) else count * leaf.dtype.itemsize


def _get_shard_shape(leaf: jax.Array) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def _count_bytes_of_shape(leaf: jax.Array, shape: tuple[int, ...]) -> int:
    """Count bytes of an array of this shape with the dtype and devices of leaf."""
    count = math.prod(shape)
    return (count + 1) // 2 if _is_packed(leaf) else count * leaf.dtype.itemsize


def _is_of_4_bits(leaf: jax.Array) -> bool:
    return leaf.dtype.name in ("uint4", "int4")


def _is_packed(leaf: jax.Array) -> bool:
    """Whether the array is of 4-bit integers, on devices (or the default one) that pack them."""
    if not _is_of_4_bits(leaf):
        return False
    devices = getattr(getattr(leaf, "sharding", None), "device_set", None)
    platforms = {device.platform for device in devices} if devices else {jax.default_backend()}
    return "cpu" not in platforms
