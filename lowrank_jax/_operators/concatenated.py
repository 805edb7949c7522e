r"""Weights concatenated along one axis, as a model does with q, k and v before one product.

The parts stay low-rank or quantized. For W = [W_1 W_2] along an axis, a product that

    contracts the axis    is a sum:            x W = x_1 W_1 + x_2 W_2,  with x = [x_1 x_2];
    keeps the axis        is a concatenation:  x W = [x W_1  x W_2];
    batches over it       splits x, and concatenates the results.
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
    Indexer,
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
    """A concatenation of weights.

    Args:
      parts: two or more weights of one dtype, whose shapes differ only in `axis`. A plain array is
        a DenseWeight.
      axis: the axis of concatenation.
    """

    parts: tuple[Weight, ...]
    axis: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, operands: Sequence[Any], axis: int) -> Weight:
        """Concatenate weights and arrays along an axis; empty ones are left out."""
        weights = [one if isinstance(one, Weight) else DenseWeight(one) for one in operands]
        parts = [weight for weight in weights if weight.shape[axis]] or weights[:1]
        return parts[0] if len(parts) == 1 else cls(tuple(parts), axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the concatenation."""
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
        """Return (start, stop) of each part along the axis."""
        return [*itertools.pairwise(itertools.accumulate(self._sizes, initial=0))]

    def leaves(self) -> tuple[Weight, ...]:
        """Return the leaves of all parts that are not plain arrays."""
        return tuple(x for p in self.parts if not isinstance(p, DenseWeight) for x in p.leaves())

    def map_leaves(self, fn: Callable[[Any], Weight]) -> ConcatenatedWeight:
        """Apply fn to each leaf."""
        one = lambda part: part if isinstance(part, DenseWeight) else part.map_leaves(fn)
        return ConcatenatedWeight(tuple(map(one, self.parts)), self.axis)

    def materialize(self) -> jax.Array:
        """Return the dense concatenation."""
        return lax.concatenate([part.materialize() for part in self.parts], self.axis)

    def _rebuild(self, parts: Sequence[Any], axis: int | None = None) -> ConcatenatedWeight | None:
        """Return a concatenation of these parts, or None if one of them is None."""
        axis = self.axis if axis is None else axis
        return (
            None if any(part is None for part in parts) else ConcatenatedWeight(tuple(parts), axis)
        )

    # Structural operations

    def map_arrays(self, fn: Callable, base_only: bool = False) -> ConcatenatedWeight | None:
        """Apply fn, which keeps values, to each part."""
        return self._rebuild([part.map_arrays(fn, base_only) for part in self.parts])

    def transfer_base(self, fn: Callable) -> ConcatenatedWeight | None:
        """Move each part to another memory space."""
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
        """Scale each part; numbers along the concatenated axis are split."""
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
        """Reshape each part, or return None if an entry of the new axis would span two parts.

        [2 + 1, 4] -> [8 + 4]: supported; the axis is the slowest of the merged axes.
        [8 + 4] -> [2 + 1, 4]: supported; each row of 4 is within one part.
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
        self, fn: Indexer, sizes: dict[int, int], axes: Sequence[int]
    ) -> ConcatenatedWeight | None:
        """Take part of the other axes; None for the concatenated axis."""
        if self.axis in axes:
            return None
        return self._rebuild([part.index(fn, sizes, axes) for part in self.parts])

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
    ) -> Weight | None:
        """lax.slice; along the axis, slice each part that the window covers."""
        # Parts of sizes 4 and 6, sliced 1:9:2, which takes entries 1, 3, 5, 7. Part 0 gives its
        # entries 1, 3. Part 1 begins at 4: start = 1 - 4 = -3, and -3 % 2 = 1, so it gives its
        # entries 1, 3, which are 5, 7 of the whole.
        step, parts = strides[self.axis], []
        for part, (first, last) in zip(self.parts, self._part_bounds(), strict=True):
            start = starts[self.axis] - first
            start = start if start >= 0 else start % step
            stop = min(limits[self.axis], last) - first
            if start < stop:
                place = lambda own, other: (*other[: self.axis], own, *other[self.axis + 1 :])
                parts.append(part.slice(place(start, starts), place(stop, limits), strides))
        if not parts or any(part is None for part in parts):
            return None
        return ConcatenatedWeight.of(parts, self.axis)

    def rev(self, axes: Sequence[int]) -> ConcatenatedWeight | None:
        """lax.rev; along the concatenated axis the order of the parts is reversed too."""
        parts = [part.rev(axes) for part in self.parts]
        return self._rebuild(parts[::-1] if self.axis in axes else parts)

    def unstack(self) -> tuple[Any, Any] | None:
        """Return arrays to scan along axis 0, and rebuild(one slice of them) -> weight.

        Layers that the model concatenated along axis 0 are stacked array by array, if they differ
        only in their paths; None if they differ otherwise.
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
        # jnp.stack of layers [in, out] is a concatenation of [1, in, out] along axis 0. Take the
        # layers out again, with a [in, r] and b [r, out] each; give them one joint path, so that
        # their tree structures are equal; and stack: a [layers, in, r], b [layers, r, out].
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
        """Prepare each part."""
        return ConcatenatedWeight(tuple(part.prepare_split(spec) for part in self.parts), self.axis)

    def specs(self, spec: jax.P) -> ConcatenatedWeight | None:
        """Return the parts' specs; None if the concatenated axis is split."""
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
        """lax.ragged_dot_general; None if the concatenated axis is the group axis."""
        return concatenated_products.ragged_dot(self, other, sizes, numbers, options)

    def conv(self, other: jax.Array, options: Options) -> Any:
        """lax.conv_general_dilated of kernels concatenated along output or input features."""
        return concatenated_products.conv(self, other, options)

    def gather(self, indices: jax.Array, options: Options) -> jax.Array | Weight | None:
        """lax.gather; None unless it reads the concatenated axis whole."""
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
        """Split the other operand along the axis that is matched with the concatenated axis."""
        return [lax.slice_in_dim(other, *cut, axis=axis) for cut in self._part_bounds()]
