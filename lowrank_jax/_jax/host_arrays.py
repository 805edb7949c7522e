"""Arrays that are filled on the host, layer by layer, with only the shards of this process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_ALIGNED = 64  # alignment in bytes that JAX requires of a NumPy buffer to use it without a copy
Bounds = tuple[tuple[int, int], ...]  # start and stop along each axis


def allocate_aligned(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> np.ndarray:
    """Allocate an array whose alignment lets JAX use it without a copy; a uint4 takes a byte."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNED, np.uint8)
    start = -buffer.ctypes.data % _ALIGNED
    return buffer[start : start + size].view(dtype).reshape(shape)


class HostArray:
    """An array to be filled: one buffer for each distinct shard of this process's devices.

    Args:
      shape, dtype: of the whole array.
      sharding: where it will be placed; None: whole, on the default device.

    >>> array = HostArray((2, 3), np.float32, None)
    >>> for layer in range(2):
    ...     array.write((0,), (layer,), np.full(3, layer, np.float32))
    >>> array.place().tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: jax.typing.DTypeLike,
        sharding: jax.sharding.Sharding | None,
    ):
        self.shape, self.dtype, self._sharding = tuple(shape), np.dtype(dtype), sharding
        indices: Any = [(slice(None),) * len(self.shape)]
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(self.shape).values()
        self._parts = {
            bounds: allocate_aligned([stop - start for start, stop in bounds], self.dtype)
            for bounds in {self._get_bounds(index) for index in indices}
        }

    def _get_bounds(self, index: Sequence[slice] | None) -> Bounds:
        """Return the bounds of a shard; JAX has None for the index of an array without axes."""
        slices = index or (slice(None),) * len(self.shape)
        pairs = zip(slices, self.shape, strict=True)
        return tuple(part.indices(size)[:2] for part, size in pairs)

    def holds(self, axes: Sequence[int], index: Sequence[int]) -> bool:
        """Whether a shard of this process has a part of the layer of this index along axes."""
        return any(_contains(bounds, axes, index) for bounds in self._parts)

    def view(self, axes: Sequence[int], index: Sequence[int]) -> np.ndarray | None:
        """Return the layer as a view of the only buffer that has it, if it is whole there."""
        found = [bounds for bounds in self._parts if _contains(bounds, axes, index)]
        if len(found) != 1:
            return None
        bounds = found[0]
        rest = [axis for axis in range(len(bounds)) if axis not in axes]
        if any(bounds[axis] != (0, self.shape[axis]) for axis in rest):
            return None
        return self._parts[bounds][_at(bounds, axes, index)]

    def write(self, axes: Sequence[int], index: Sequence[int], layer: np.ndarray) -> None:
        """Write a layer, without the axes of its index, cast to the dtype of the array."""
        for bounds, part in self._parts.items():
            if _contains(bounds, axes, index):
                rest = [pair for axis, pair in enumerate(bounds) if axis not in axes]
                own = layer[tuple(slice(start, stop) for start, stop in rest)]
                part[_at(bounds, axes, index)] = own

    def to_numpy(self) -> np.ndarray:
        """Return the array itself, which has no sharding."""
        assert self._sharding is None
        return self._parts[tuple((0, size) for size in self.shape)]

    def place(self) -> jax.Array:
        """Return the array on the devices of its sharding."""
        if self._sharding is None:
            return jax.device_put(self.to_numpy())  # on CPU without a copy
        return jax.make_array_from_callback(
            self.shape, self._sharding, lambda index: self._parts[self._get_bounds(index)]
        )


def _contains(bounds: Bounds, axes: Sequence[int], index: Sequence[int]) -> bool:
    """Whether a shard has a part of a layer."""
    pairs = zip(axes, index, strict=True)
    return all(bounds[axis][0] <= at < bounds[axis][1] for axis, at in pairs)


def _at(bounds: Bounds, axes: Sequence[int], index: Sequence[int]) -> tuple[Any, ...]:
    """Return the index of a layer in the buffer of a shard."""
    # a shard of layers 4 to 8, bounds ((4, 8), (0, 16)): layer 6 is buffer[2, ...]
    at: list[Any] = [slice(None)] * len(bounds)
    for axis, number in zip(axes, index, strict=True):
        at[axis] = number - bounds[axis][0]
    return (*at, ...)
