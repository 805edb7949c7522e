r"""Weights joined along one axis by lax.concatenate: q, k and v before one product, say.

The parts stay what they are, low-rank or quantized. With W = [W_1 W_2] along an axis, a product

    contracts the axis:   x W = x_1 W_1 + x_2 W_2,   x = [x_1 x_2] along it,
    keeps it:             x W = [x W_1  x W_2],
    enumerates it:        both, x cut and the results joined.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._operators import concatenated_products
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import (
    DotNumbers,
    JointPath,
    Options,
    RaggedNumbers,
    Weight,
    expand_path,
)
from lowrank_jax._primitives.contract import reshape_groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ConcatenatedWeight(Weight):
    """Weights of one dtype, alike in every axis but the one they are joined along.

    Args:
      parts: two or more weights; a plain array among them is a DenseWeight.
      axis: the axis they are joined along.
    """

    parts: tuple[Weight, ...]
    axis: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, operands: Sequence[Any], axis: int) -> Weight:
        """The concatenation of weights and arrays along an axis."""
        weights = [one if isinstance(one, Weight) else DenseWeight(one) for one in operands]
        parts = [weight for weight in weights if weight.shape[axis]] or weights[:1]
        return parts[0] if len(parts) == 1 else cls(tuple(parts), axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        own = self.parts[0].shape
        return (*own[: self.axis], sum(self._sizes), *own[self.axis + 1 :])

    @property
    def dtype(self) -> Any:
        """Dtype of each part."""
        return self.parts[0].dtype

    @property
    def _sizes(self) -> list[int]:
        """The size of each part along the axis."""
        return [part.shape[self.axis] for part in self.parts]

    def _part_bounds(self) -> list[tuple[int, int]]:
        """Where along the axis each part begins and ends."""
        return [*itertools.pairwise(itertools.accumulate(self._sizes, initial=0))]

    def leaves(self) -> tuple[Weight, ...]:
        """The leaves of all parts that are not plain arrays."""
        return tuple(x for p in self.parts if not isinstance(p, DenseWeight) for x in p.leaves())

    def map_leaves(self, fn: Callable[[Any], Weight]) -> ConcatenatedWeight:
        """The same, with fn of each leaf."""
        one = lambda part: part if isinstance(part, DenseWeight) else part.map_leaves(fn)
        return ConcatenatedWeight(tuple(map(one, self.parts)), self.axis)

    def materialize(self) -> jax.Array:
        """The dense concatenation."""
        return lax.concatenate([part.materialize() for part in self.parts], self.axis)

    def _rebuild(self, parts: Sequence[Any], axis: int | None = None) -> ConcatenatedWeight | None:
        """These parts in place of its own, or None where one of them is."""
        axis = self.axis if axis is None else axis
        return (
            None if any(part is None for part in parts) else ConcatenatedWeight(tuple(parts), axis)
        )

    # Structural operations

    def map_arrays(self, fn: Callable, base_only: bool = False) -> ConcatenatedWeight | None:
        """Apply an identity of values to each part."""
        return self._rebuild([part.map_arrays(fn, base_only) for part in self.parts])

    def transfer_base(self, fn: Callable) -> ConcatenatedWeight | None:
        """Move each part."""
        return self._rebuild([part.transfer_base(fn) for part in self.parts])

    def stop_gradient(self) -> ConcatenatedWeight | None:
        """lax.stop_gradient of each part."""
        return self._rebuild([part.stop_gradient() for part in self.parts])

    def astype(self, dtype: jax.typing.DTypeLike) -> ConcatenatedWeight | None:
        """Convert each part."""
        return self._rebuild([part.astype(dtype) for part in self.parts])

    def multiply(self, scalar: jax.typing.ArrayLike, fn: Callable) -> ConcatenatedWeight | None:
        """Scale each part."""
        return self._rebuild([part.multiply(scalar, fn) for part in self.parts])

    def scale_axes(
        self, by: jax.Array, axes: Sequence[int], fn: Callable
    ) -> ConcatenatedWeight | None:
        """Each part by its own numbers."""
        where = [i for i, axis in enumerate(axes) if axis == self.axis]
        pieces = self.split_operand(by, *where) if where else [by] * len(self.parts)
        return self._rebuild(
            [p.scale_axes(b, axes, fn) for p, b in zip(self.parts, pieces, strict=True)]
        )

    def transpose(self, order: Sequence[int]) -> ConcatenatedWeight | None:
        """Permute the axes of each part."""
        parts = [part.transpose(order) for part in self.parts]
        return self._rebuild(parts, list(order).index(self.axis))

    def reshape(self, shape: Sequence[int]) -> ConcatenatedWeight | None:
        """Reshape each part, where every part has whole steps of the axis that they then join.

        [2 + 1, 4] -> [8 + 4]: the axis is the slowest of those it is merged with.
        [8 + 4] -> [2 + 1, 4]: the parts are cut into rows of 4, none of which is in two parts.
        """
        if 0 in self.shape:
            return None
        groups = reshape_groups(self.shape, shape)
        old, new = next(group for group in groups if self.axis in group[0])
        if old[0] != self.axis:
            return None
        merged = math.prod(self.shape[axis] for axis in old[1:])
        row = math.prod(shape[axis] for axis in new[1:])
        sizes = [size * merged for size in self._sizes]
        if any(size % row for size in sizes):
            return None
        resized = [[*shape[: new[0]], size // row, *shape[new[0] + 1 :]] for size in sizes]
        parts = [part.reshape(own) for part, own in zip(self.parts, resized, strict=True)]
        return self._rebuild(parts, new[0])

    def broadcast(
        self, shape: Sequence[int], axes: Sequence[int], fn: Callable
    ) -> ConcatenatedWeight | None:
        """lax.broadcast_in_dim of each part."""
        axis, parts = axes[self.axis], []
        for part, size in zip(self.parts, self._sizes, strict=True):
            own = (*shape[:axis], size, *shape[axis + 1 :])
            fn = lambda array, own=own: lax.broadcast_in_dim(array, own, tuple(axes))
            parts.append(part.broadcast(own, axes, fn))
        return self._rebuild(parts, axis)

    def index(
        self, fn: Callable, sizes: dict[int, int], axes: Sequence[int]
    ) -> ConcatenatedWeight | None:
        """Take a part of other axes than the one joined along."""
        if self.axis in axes:
            return None
        return self._rebuild([part.index(fn, sizes, axes) for part in self.parts])

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
    ) -> Weight | None:
        """lax.slice: along the axis, what each part has of it."""
        step, parts = strides[self.axis], []
        for part, (first, last) in zip(self.parts, self._part_bounds(), strict=True):
            start = starts[self.axis] - first
            start = start if start >= 0 else start % step  # the first in this part that is taken
            stop = min(limits[self.axis], last) - first
            if start < stop:
                place = lambda own, other: (*other[: self.axis], own, *other[self.axis + 1 :])
                parts.append(part.slice(place(start, starts), place(stop, limits), strides))
        if not parts or any(part is None for part in parts):
            return None
        return ConcatenatedWeight.of(parts, self.axis)

    def rev(self, axes: Sequence[int]) -> ConcatenatedWeight | None:
        """lax.rev: the parts in reverse order too, along the axis."""
        parts = [part.rev(axes) for part in self.parts]
        return self._rebuild(parts[::-1] if self.axis in axes else parts)

    def unstack(self) -> tuple[Any, Any] | None:
        """Slices along the leading axis; of weights that are joined along it, each its own arrays.

        Those are stacked, as the model itself would stack dense weights, where the parts are of one
        kind: nothing but their paths differs.
        """
        if self.axis:
            pairs = [part.unstack() for part in self.parts]
            if any(pair is None for pair in pairs):
                return None
            arrays, rebuild = zip(*pairs, strict=True)
            join = lambda slices: self._rebuild(
                [make(own) for make, own in zip(rebuild, slices, strict=True)], self.axis - 1
            )
            return arrays, join
        found = [
            part.take_index(0, number) for part in self.parts for number in range(part.shape[0])
        ]
        layers = [one for one in found if one is not None and not isinstance(one, DenseWeight)]
        if len(layers) < len(found):
            return None
        paths = [path for leaf in self.leaves() for path in expand_path(leaf.path)]
        joint = JointPath(tuple(dict.fromkeys(paths)))
        named = lambda leaf: dataclasses.replace(leaf, path=joint)
        layers = [layer.map_leaves(named) for layer in layers]
        if len({jax.tree.structure(layer) for layer in layers}) > 1:
            return None
        if len({tuple((x.shape, x.dtype) for x in jax.tree.leaves(layer)) for layer in layers}) > 1:
            return None
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers), lambda layer: layer

    def prepare_split(self, spec: jax.P) -> ConcatenatedWeight:
        """Each part prepared."""
        return ConcatenatedWeight(tuple(part.prepare_split(spec) for part in self.parts), self.axis)

    def specs(self, spec: jax.P) -> ConcatenatedWeight | None:
        """Those of the parts, where a device has a piece of each."""
        if self.axis < len(spec) and spec[self.axis] is not None:
            return None
        return self._rebuild([part.specs(spec) for part in self.parts])

    # Products

    def dot(self, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options) -> Any:
        """lax.dot_general."""
        return concatenated_products.dot(self, other, numbers, on_left, options)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
    ) -> Any:
        """lax.ragged_dot_general; weights of different groups are not joined."""
        return concatenated_products.ragged_dot(self, other, sizes, numbers, options)

    def conv(self, other: jax.Array, options: Options) -> Any:
        """lax.conv_general_dilated of kernels joined along output or input features."""
        return concatenated_products.conv(self, other, options)

    def gather(self, indices: jax.Array, options: Options) -> Any:
        """lax.gather that reads the axis joined along whole."""
        numbers, sizes = options["dimension_numbers"], options["slice_sizes"]
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        if self.axis in (*numbers.start_index_map, *gone) or sizes[self.axis] != sum(self._sizes):
            return None
        kept = [axis for axis in range(self.ndim) if axis not in gone]
        at, parts = numbers.offset_dims[kept.index(self.axis)], []
        for part, size in zip(self.parts, self._sizes, strict=True):
            own = (*sizes[: self.axis], size, *sizes[self.axis + 1 :])
            parts.append(part.gather(indices, {**options, "slice_sizes": own}))
        if any(part is None for part in parts):
            return None
        if any(isinstance(part, Weight) for part in parts):
            return ConcatenatedWeight.of(parts, at)
        return lax.concatenate(parts, at)

    def split_operand(self, other: jax.Array, axis: int) -> list[jax.Array]:
        """The other operand, along the axis that meets the one joined along."""
        return [lax.slice_in_dim(other, *cut, axis=axis) for cut in self._part_bounds()]
