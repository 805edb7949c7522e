"""A quantized weight in flight: its blocks stay small until the product that they meet.

Each axis of the decoded blocks carries a label, the axis of the weight that it is now, so that a
transpose moves nothing; the axes that hold the blocks are one run of the weight's axes, cut in two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax import _jaxprs
from lowrank_jax._nodes.quantized import Decoding, Quantized
from lowrank_jax._primitives.contract import labelled_spec, reshape_groups
from lowrank_jax._primitives.tied import tied
from lowrank_jax._weights.blocks import (
    BLOCKS,
    ELEMENTS,
    Conv,
    Dot,
    FlatDecoding,
    GroupedDecoding,
    Layout,
    Ragged,
    is_run,
    without_layout,
)
from lowrank_jax._weights.dense import DenseWeight
from lowrank_jax._weights.lookup import gather_blocks
from lowrank_jax._weights.virtual import Virtual

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight(Virtual):
    """Codes, scales, table and the second level of scales, with the layout of their axes."""

    parts: tuple[Any, ...]
    layout: Layout = dataclasses.field(metadata=_STATIC)
    decode: Any = dataclasses.field(metadata=_STATIC)
    path: Any = dataclasses.field(metadata=_STATIC)

    how = "dequantized"

    @classmethod
    def of(cls, node: Quantized, path: str) -> QuantizedWeight:
        """The weight of a node; its scales are frozen here, outside loops."""
        codes, *rest = node.parts
        parts = (codes, *map(lax.stop_gradient, rest))
        if node.order is not None:
            decode = FlatDecoding(node.decoding, node.blocked, node.order)
            return cls(parts, Layout(tuple(range(node.ndim)), (), ()), decode, path)
        lead = node.leading
        run = tuple(range(lead, lead + len(node.blocked)))
        after = range(lead + len(run), node.ndim)
        layout = Layout((*range(lead), BLOCKS, ELEMENTS, *after), run, node.blocked)
        return cls(parts, layout, node.decoding, path)

    @property
    def flat(self) -> bool:
        """Whether the blocks straddle the rows of the weight."""
        return isinstance(self.decode, FlatDecoding)

    @property
    def decoding(self) -> Decoding:
        """How the parts become numbers."""
        return self.decode.decoding if isinstance(self.decode, FlatDecoding) else self.decode

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, on this device where a mesh is manual."""
        parts = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in self.parts]
        blocks = jax.eval_shape(self.decode, *parts).shape
        extent = dict(zip(self.layout.axes, blocks, strict=True))
        if self.layout.blocked:
            first, *rest = self.layout.blocked
            sizes = self.layout.sizes
            extent |= dict(zip(rest, sizes[1:], strict=True))
            extent[first] = extent[BLOCKS] * extent[ELEMENTS] // math.prod(sizes[1:])
        return tuple(extent[axis] for axis in range(self.ndim))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.layout.ndim

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight."""
        return jnp.dtype(self.decoding.casts[-1])

    def materialize(self) -> jax.Array:
        """The dense weight, split as its codes are where their type says how."""
        dense = lambda w: w.layout.dense(w.decode(*w.parts))
        if not any(map(_jaxprs.is_split, self.parts)):
            return dense(self)
        sharding = jax.typeof(self.parts[0]).sharding
        sharding = jax.NamedSharding(sharding.mesh, self.layout.spec(sharding.spec))
        return _jaxprs.by_the_compiler(dense, sharding, self)

    def _with(self, **changes: Any) -> QuantizedWeight:
        return dataclasses.replace(self, **changes)

    def _decoded_by(self, **changes: Any) -> QuantizedWeight:
        decoding = dataclasses.replace(self.decoding, **changes)
        if isinstance(self.decode, FlatDecoding):
            return self._with(decode=dataclasses.replace(self.decode, decoding=decoding))
        return self._with(decode=decoding)

    # Verbs that pass the weight on.

    def each(self, fn: Any, base_only: bool = False) -> QuantizedWeight | None:
        """What is said of the dense array (a name, a layout) is not said of its blocks."""
        return self if base_only else None

    def astype(self, dtype: Any) -> QuantizedWeight | None:
        """One more cast after decoding."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        name = jnp.dtype(dtype).name
        casts = self.decoding.casts
        return self if casts[-1] == name else self._decoded_by(casts=(*casts, name))

    def transpose(self, order: Sequence[int]) -> QuantizedWeight | None:
        """Renumber the labels, as long as the axes of blocks stay a run."""
        place = {old: new for new, old in enumerate(order)}
        return self._renumbered(place)

    def _renumbered(self, place: dict[Any, int], **changes: Any) -> QuantizedWeight | None:
        blocked = tuple(place[axis] for axis in self.layout.blocked)
        if not is_run(blocked):
            return None
        axes = tuple(place.get(axis, axis) for axis in self.layout.axes)
        return self._with(layout=Layout(axes, blocked, self.layout.sizes), **changes)

    def reshape(self, shape: Sequence[int]) -> QuantizedWeight | None:
        """Merge, split or drop runs of axes; those that blocks run along among themselves."""
        if 0 in self.shape:
            return None
        own, blocked, sizes = self.shape, self.layout.blocked, self.layout.sizes
        weight: QuantizedWeight | None = self
        for old, new in reshape_groups(own, shape):
            if not {*old} & {*blocked}:
                weight = weight and weight._recut(old, new, [shape[axis] for axis in new])
            elif {*old} == {axis for axis in blocked if own[axis] != 1}:
                blocked, sizes = tuple(new), tuple(shape[axis] for axis in new)
            else:
                return None
        for axis, size in enumerate(own):
            if size == 1 and axis in self.layout.axes:
                weight = weight and weight._recut([axis], [], [])
        if weight is None or not is_run(blocked):
            return None
        axes = tuple(x[1] if isinstance(x, tuple) else x for x in weight.layout.axes)
        if {*axes, *blocked} - {BLOCKS, ELEMENTS} != {*range(len(shape))}:
            return None  # an axis of size 1 that the blocks do not have
        return weight._with(layout=Layout(axes, blocked, sizes))

    def _recut(
        self, old: Sequence[int], new: Sequence[int], sizes: Sequence[int]
    ) -> QuantizedWeight | None:
        """Adjacent axes of all arrays in other sizes; ("new", axis) is the label of the new."""
        axes, decode = self.layout.axes, self.decode
        at = [axes.index(axis) for axis in old]
        labels = (*axes[: at[0]], *(("new", axis) for axis in new), *axes[at[-1] + 1 :])
        layout = dataclasses.replace(self.layout, axes=labels)
        if len(old) == len(new) == 1:
            return self._with(layout=layout)
        stacked = at[-1] < self._stack
        if not is_run(at) or (not stacked and (self.flat or at[0] < self._stack)):
            return None
        weight = self if stacked else self.with_plain_scales()
        codes, scales, table, *second = weight.parts

        def cut(array: Any, at: Sequence[int]) -> Any:
            return array.reshape(*array.shape[: at[0]], *sizes, *array.shape[at[-1] + 1 :])

        under = [place - (place > self._cut_at) for place in at]
        parts = (cut(codes, at), cut(scales, under), table, *(cut(s, at) for s in second))
        if not stacked:
            more = len(new) - len(old)
            decode = dataclasses.replace(
                self.decoding,
                trailing=self.decoding.trailing + more * (at[0] > self._cut_at),
                strides=(1,) * (len(self.decoding.strides) + more),
            )
        return self._with(parts=parts, layout=layout, decode=decode)

    @property
    def _stack(self) -> int:
        """How many leading axes every array has: the stack axes."""
        codes, _, _, *second = self.parts
        return second[0].ndim - 1 if second else codes.ndim - len(self.decoding.strides) - 1

    def index(self, fn: Any, sizes: dict[int, int], axes: Sequence[int]) -> QuantizedWeight | None:
        """Take a part of any axes that blocks keep; the scales of what is no stack are decoded."""
        if not {*axes} <= {*self.layout.axes}:
            return None
        where = {axis: self.layout.axes.index(axis) for axis in axes}
        weight = self
        if any(place >= self._stack for place in where.values()):
            if self.flat:
                return None
            weight = self.with_plain_scales()
        codes, scales, table, *second = weight.parts
        under = {axis: place - (place > self._cut_at) for axis, place in where.items()}
        parts = (fn(codes, where), fn(scales, under), table, *(fn(s, where) for s in second))
        return weight._with(parts=parts)

    def with_plain_scales(self) -> QuantizedWeight:
        """The same with scales that are numbers: their codes know their places in the whole."""
        codes, scales, table, *second = self.parts
        if not second:
            return self
        decode = self.decoding.scales
        if _jaxprs.is_split(scales):
            sharding = jax.typeof(scales).sharding
            scales = _jaxprs.by_the_compiler(decode, sharding, scales, *second)
        else:
            scales = decode(scales, *second)
        return self._with(parts=(codes, scales, table))

    def multiply(self, scalar: Any, fn: Any) -> QuantizedWeight | None:
        """Scale the scales, by a constant: derivatives do not reach them."""
        if _jaxprs.is_tracer(scalar):
            return None
        codes, scales, table = self.with_plain_scales().parts
        return self._with(parts=(codes, fn(scales, jnp.asarray(scalar, scales.dtype)), table))

    def frozen(self) -> QuantizedWeight:
        """It is constant as it is."""
        return self

    @property
    def _cut_at(self) -> int:
        """Place of the elements of a block among the axes of codes."""
        return self.parts[0].ndim - 1 - self.decoding.trailing

    def unstack(self) -> tuple[Any, Any] | None:
        """Slices along the leading axis of the weight."""
        place = self.layout.axes.index(0) if 0 in self.layout.axes else self._stack
        if place >= self._stack:
            return None
        codes, scales, table, *second = self.parts
        front = lambda array: array if place == 0 else jnp.moveaxis(array, place, 0)
        arrays = tuple(front(array) for array in (codes, scales, *second))
        down = {axis: axis - 1 for axis in range(1, self.ndim)}
        axes = tuple(axis for axis in self.layout.axes if axis != 0)
        layout = Layout(axes, self.layout.blocked, self.layout.sizes)

        def rebuild(slices: tuple[Any, ...]) -> QuantizedWeight | None:
            codes, scales, *second = slices
            return self._with(parts=(codes, scales, table, *second), layout=layout)._renumbered(
                down
            )

        return arrays, rebuild

    def specs(self, spec: Any) -> QuantizedWeight | None:
        """PartitionSpecs of the arrays."""
        stack, split = self.layout.axes[: self._stack], self._split_by(spec)
        if split & {*self.layout.blocked[1:]} or (self.flat and split):
            return None
        first = self.layout.blocked[0] if self.layout.blocked else None
        labels = [first if axis == BLOCKS else axis for axis in self.layout.axes]
        if self.flat:
            labels = [*stack, None, None]
        codes = [None if label == ELEMENTS else label for label in labels]
        scales = [label for i, label in enumerate(codes) if i != self._cut_at]
        whole = labelled_spec(spec, (*stack, None))
        second = [whole, labelled_spec(spec, stack), whole]
        parts = (labelled_spec(spec, codes), labelled_spec(spec, scales), type(spec)())
        return self._with(parts=(*parts, *second[: len(self.parts) - 3]))

    def splittable(self, spec: Any) -> QuantizedWeight:
        """A part of the leaf cannot tell which scales of scales are its own."""
        return self.with_plain_scales() if self._split_by(spec) else self

    def _split_by(self, spec: Any) -> set[int]:
        """The axes, stack axes left out, that a spec splits."""
        split = {axis for axis, entry in enumerate(spec) if entry is not None}
        return split - {*self.layout.axes[: self._stack]}

    def reshard(self, spec: Any, fn: Any) -> QuantizedWeight | None:
        """Lay the arrays out by the weight's spec."""
        whole = self.specs(spec)
        return whole and self._with(parts=tuple(map(fn, self.parts, whole.parts)))

    # Verbs that consume the weight.

    def dot(self, other: Any, numbers: Any, on_left: bool, options: dict[str, Any]) -> Any:
        """lax.dot_general, the blocks decoded where the activation is."""
        (lc, rc), (lb, rb) = numbers
        contracted, batch = (lc, lb) if on_left else (rc, rb)
        blocked = {*self.layout.blocked}
        if blocked & {*batch} or len(blocked & {*contracted}) not in (0, len(blocked)):
            return None
        if not jnp.issubdtype(other.dtype, jnp.floating):
            return None
        op = Dot(self._here, numbers, on_left, without_layout(options))
        like = lambda w, other: w.dot(other, numbers, on_left, options)
        return self._product(like, op, self.decode, other, *self.parts)

    def _product(self, like: Any, op: Any, decode: Any, other: Any, *parts: Any) -> Any:
        """A tied product, on a mesh with explicit axes laid out as like(dense weight, other)."""
        run = lambda other, *parts: tied(other, parts, op, decode)
        if not any(map(_jaxprs.is_explicit, (other, *parts))):
            return run(other, *parts)
        dense = lambda own, other: like(DenseWeight(own.materialize()), other)
        result = jax.eval_shape(dense, self, other)
        if not any(map(_jaxprs.is_split, (result, other, *parts))):
            return run(other, *parts)
        return _jaxprs.by_the_compiler(run, result.sharding, other, *parts)

    @property
    def _here(self) -> Layout:
        """The layout with the sizes that this device has."""
        shape = self.shape
        return dataclasses.replace(
            self.layout, sizes=tuple(shape[axis] for axis in self.layout.blocked)
        )

    def ragged_dot(self, other: Any, sizes: Any, numbers: Any, options: dict[str, Any]) -> Any:
        """lax.ragged_dot_general, the weights decoded where the rows are."""
        if not jnp.issubdtype(other.dtype, jnp.floating):
            return None
        op = Ragged(self._here, numbers, without_layout(options))
        like = lambda w, other: w.ragged_dot(other, sizes, numbers, options)
        return self._product(like, op, GroupedDecoding(self.decode), other, *self.parts, sizes)

    def conv(self, other: Any, params: dict[str, Any]) -> Any:
        """lax.conv_general_dilated, the kernel decoded where the activation is."""
        op = Conv(self._here, without_layout(params))
        like = lambda w, other: w.conv(other, params)
        return self._product(like, op, self.decode, other, *self.parts)

    def gather(self, indices: Any, params: dict[str, Any]) -> Any:
        """Decode only the rows that are read."""
        return gather_blocks(self, indices, params)
