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

from lowrank_jax._blocks import BLOCKS, ELEMENTS, Conv, Dot, FlatDecoding, Layout, is_run
from lowrank_jax._contract import arrange, reshape_groups
from lowrank_jax._lookup import gather_labelled
from lowrank_jax._nodes import labelled_spec
from lowrank_jax._quantized import Decoding, Quantized
from lowrank_jax._tied import tied
from lowrank_jax._virtual import Virtual

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
    def _decoding(self) -> Decoding:
        return self.decode.decoding if isinstance(self.decode, FlatDecoding) else self.decode

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, on this device where a mesh is manual."""
        blocks = jax.eval_shape(self.decode, *self.parts).shape
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
        blocked = self.layout.blocked
        return len(self.layout.axes) + (len(blocked) - 2 if blocked else 0)

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight."""
        return jnp.dtype(self._decoding.casts[-1])

    def materialize(self) -> jax.Array:
        """The dense weight."""
        return self.layout.dense(self.decode(*self.parts))

    def _with(self, **changes: Any) -> QuantizedWeight:
        return dataclasses.replace(self, **changes)

    def _decoded_by(self, **changes: Any) -> QuantizedWeight:
        decoding = dataclasses.replace(self._decoding, **changes)
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
        casts = self._decoding.casts
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
        """Drop stack axes of size 1; the run of blocked axes may be merged or split."""
        if self.flat or 0 in self.shape:
            return None
        own, blocked, sizes = self.shape, self.layout.blocked, self.layout.sizes
        place: dict[Any, int] = {}
        for old, new in reshape_groups(own, shape):
            if {*old} & {*blocked}:
                if {*old} != {axis for axis in blocked if own[axis] != 1}:
                    return None
                blocked, sizes = tuple(new), tuple(shape[axis] for axis in new)
            elif len(old) == len(new) == 1:
                place[old[0]] = new[0]
            else:
                return None
        kept = {*place, BLOCKS, ELEMENTS}
        gone = [i for i, axis in enumerate(self.layout.axes) if axis not in kept]
        if len(place) + len(blocked) != len(shape) or not is_run(blocked):
            return None  # an axis of size 1 that the blocks do not have
        slim = self._squeezed(gone)
        if slim is None:
            return None
        axes = tuple(place.get(a, a) for a in self.layout.axes if a in kept)
        return slim._with(layout=Layout(axes, blocked, sizes))

    def _squeezed(self, gone: Sequence[int]) -> QuantizedWeight | None:
        """Without stack axes of size 1, given by their places in the codes."""
        if not gone:
            return self
        if any(place >= self._stack for place in gone):
            return None
        take = lambda array, place: jnp.squeeze(array, place) if place else array
        codes, scales, table, *second = self.parts
        gone = tuple(gone)
        parts = (take(codes, gone), take(scales, gone), table, *(take(s, gone) for s in second))
        return self._with(parts=parts)

    @property
    def _stack(self) -> int:
        """How many leading axes every array has: the stack axes."""
        codes, _, _, *second = self.parts
        return second[0].ndim - 1 if second else codes.ndim - len(self._decoding.strides) - 1

    def index(self, fn: Any, sizes: dict[int, int], axes: Sequence[int]) -> QuantizedWeight | None:
        """Take a part of stack axes, or without a second level of any axis that blocks keep."""
        found = {axis: self._place(axis) for axis in axes}
        places = {axis: place for axis, place in found.items() if place is not None}
        if len(places) < len(found):
            return None
        codes, scales, table, *second = self.parts
        where = dict(places)
        split = self._cut_at
        under = {axis: place - (place > split) for axis, place in places.items()}
        parts = (fn(codes, where), fn(scales, under), table, *(fn(s, where) for s in second))
        return self._with(parts=parts)

    @property
    def _cut_at(self) -> int:
        """Place of the elements of a block among the axes of codes."""
        return self.parts[0].ndim - 1 - self._decoding.trailing

    def _place(self, axis: int) -> int | None:
        """The axis of codes that a weight's axis is, if it can be cut."""
        if axis not in self.layout.axes:
            return None
        place = self.layout.axes.index(axis)
        second = len(self.parts) > 3
        return None if (self.flat or second) and place >= self._stack else place

    def unstack(self) -> tuple[Any, Any] | None:
        """Slices along the leading axis of the weight."""
        place = self._place(0)
        if place is None or place >= self._stack:
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
        entry = lambda axis: spec[axis] if axis < len(spec) else None
        if any(entry(axis) is not None for axis in self.layout.blocked[1:]):
            return None
        first = self.layout.blocked[0] if self.layout.blocked else None
        labels = [first if axis == BLOCKS else axis for axis in self.layout.axes]
        if self.flat:
            labels = [*labels[: self._stack], None, None]
        codes = [None if label == ELEMENTS else label for label in labels]
        scales = [label for i, label in enumerate(codes) if i != self._cut_at]
        stack = codes[: self._stack]
        second = [labelled_spec(spec, (*stack, None)), labelled_spec(spec, stack)]
        parts = (labelled_spec(spec, codes), labelled_spec(spec, scales), type(spec)())
        return self._with(parts=(*parts, *second[: len(self.parts) - 3]))

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
        if not jnp.issubdtype(other.dtype, jnp.floating) or "out_sharding" in options:
            return None
        op = Dot(self._here, numbers, on_left, tuple(sorted(options.items())))
        return tied(other, self.parts, op, self.decode)

    @property
    def _here(self) -> Layout:
        """The layout with the sizes that this device has."""
        shape = self.shape
        return dataclasses.replace(
            self.layout, sizes=tuple(shape[axis] for axis in self.layout.blocked)
        )

    def conv(self, other: Any, params: dict[str, Any]) -> Any:
        """lax.conv_general_dilated, the kernel decoded where the activation is."""
        op = Conv(self._here, tuple(sorted(params.items())))
        return tied(other, self.parts, op, self.decode)

    def gather(self, indices: Any, params: dict[str, Any]) -> Any:
        """Decode only the rows that are read."""
        numbers = params["dimension_numbers"]
        indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
        full = self.shape
        cut = {d for d in range(self.ndim) if params["slice_sizes"][d] != full[d]}
        if self.flat or cut - indexed or indexed & {*self.layout.blocked}:
            return None
        codes, scales, table, *second = self.parts
        if second:
            scales = self._decoding.scales(scales, *second)
        axes = self.layout.axes
        codes, labels = gather_labelled(codes, axes, indices, params, full)
        scales, _ = gather_labelled(
            scales, tuple(a for a in axes if a != ELEMENTS), indices, params, full
        )
        at = labels.index(ELEMENTS)
        decode = dataclasses.replace(
            self._decoding, trailing=len(labels) - 1 - at, strides=(1,) * scales.ndim
        )
        blocks = decode(codes, scales, table)
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = iter(axis for axis in range(self.ndim) if axis not in gone)
        rows = iter(("n", i) for i in range(indices.ndim - 1))
        ndim = indices.ndim - 1 + self.ndim - len(gone)
        out = [next(kept) if i in numbers.offset_dims else next(rows) for i in range(ndim)]
        extent = dict(zip(labels, blocks.shape, strict=True))
        extent |= {axis: full[axis] for axis in self.layout.blocked}
        value = arrange(blocks, labels, self.layout.expand(out), extent)
        return value.reshape([extent[label] for label in out])
