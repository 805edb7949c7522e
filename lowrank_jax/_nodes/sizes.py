"""Numbers of elements, and bytes, of arrays and nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from lowrank_jax._jax.types import PyTree


def count_bits(leaf: Any) -> float:
    """Bits of each value of an array or a quantized leaf, scales included."""
    return 8 * sum_leaves(count_bytes, leaf) / max(1, math.prod(leaf.shape))


def sum_leaves(size: Callable[[Any], int], tree: PyTree) -> int:
    return sum(size(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))


def count_elements(leaf: Any) -> int:
    return math.prod(leaf.shape)


def count_bytes(leaf: Any) -> int:
    """Bytes as devices hold them: accelerators pack two 4-bit integers, a CPU gives each a byte."""
    return _count_bytes_of_shape(leaf, leaf.shape)


def count_device_bytes(leaf: Any) -> int:
    """Bytes on the device that holds most; an array without a sharding is whole on one."""
    sharding = getattr(leaf, "sharding", None)
    return _count_bytes_of_shape(
        leaf, leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    )


def _count_bytes_of_shape(leaf: Any, shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    return (count + 1) // 2 if _is_packed(leaf) else count * leaf.dtype.itemsize


def _is_packed(leaf: Any) -> bool:
    """Whether an array of 4-bit integers is, or would be, on something that packs them."""
    if leaf.dtype.name not in ("uint4", "int4"):
        return False
    devices = getattr(getattr(leaf, "sharding", None), "device_set", None)
    platforms = {device.platform for device in devices} if devices else {jax.default_backend()}
    return "cpu" not in platforms
