r"""A quantized weight operator: its blocks stay small until the product that they meet.

Each axis of the decoded blocks carries a label, the axis of the weight that it is now, so that a
transpose moves nothing; the axes that hold the blocks are one run of the weight's axes, cut in two.
A weight [4, 128, 6] with blocks of 64 along its second axis, transposed to [6, 4, 128]:

    codes [4, 2, 64, 6]    labels (1, BLOCKS, ELEMENTS, 0)    blocked (2,)

What blocks cannot follow (a slice across them, a reshape that mixes axes) is done to the decoded
weight, where it meets the activation: nothing dense is kept for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes.quantized import Decoding, Quantized
from lowrank_jax._operators import decoded, restructure
from lowrank_jax._operators.blocks import (
    BLOCKS,
    ELEMENTS,
    BlockLayout,
    FlatDecoding,
    SelectedDecoding,
    TransformedDecoding,
    decoded_shape,
    is_consecutive,
    is_selected,
)
from lowrank_jax._operators.gather import gather_blocks
from lowrank_jax._operators.scaled import scale_weight
from lowrank_jax._operators.scaling import has_float32_range
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers, Weight
from lowrank_jax._primitives.contract import labeled_spec

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight(Weight):
    """Codes, scales, table and the second level of scales, with the layout of their axes.

    Args:
      parts: what `decode` takes.
      layout: the weight's axis that each axis of the decoded array is, or a label.
      decode: of parts, to an array whose axes `layout` labels.
      path: of the leaf; None where an adapter's weight, which has it, stands around this one.
      selections: the entry, a number, of each axis of codes that is labeled (SELECTED, n).
    """

    parts: tuple[Any, ...]
    layout: BlockLayout = dataclasses.field(metadata=_STATIC)
    decode: Any = dataclasses.field(metadata=_STATIC)
    path: Any = dataclasses.field(metadata=_STATIC)
    selections: tuple[Any, ...] = ()

    product_kind = "dequantized"

    @classmethod
    def of(cls, node: Quantized, path: Any) -> QuantizedWeight:
        """The weight of a node; its scales are frozen here, outside loops."""
        codes, *rest = node.parts
        parts = (codes, *map(lax.stop_gradient, rest))
        if node.order is not None:
            decode = FlatDecoding(node.decoding, node.blocked, node.order)
            return cls(parts, BlockLayout(tuple(range(node.ndim)), (), ()), decode, path)
        lead = node.leading
        run = tuple(range(lead, lead + len(node.blocked)))
        after = range(lead + len(run), node.ndim)
        layout = BlockLayout((*range(lead), BLOCKS, ELEMENTS, *after), run, node.blocked)
        return cls(parts, layout, node.decoding, path)

    @property
    def is_blockwise(self) -> bool:
        """Whether the decoded array is one of blocks; else it is dense."""
        return isinstance(self.decode, Decoding)

    @property
    def decoding(self) -> Decoding:
        """How the parts become numbers."""
        decode = self.decode
        while not isinstance(decode, Decoding):
            decode = decode.decoding
        return decode

    @property
    def decoder(self) -> tuple[Any, tuple[Any, ...], BlockLayout]:
        """What decodes the entries picked, what it takes, and the layout of its result."""
        if not self.selections:
            return self.decode, self.parts, self.layout
        axes: tuple[Any, ...] = self.layout.axes
        places = [i for i, label in enumerate(axes) if is_selected(label)]
        selections = [self.selections[axes[place][1]] for place in places]
        rest = tuple(label for label in axes if not is_selected(label))
        decode = SelectedDecoding(self.decoding, tuple(places))
        return decode, (*self.parts, *selections), dataclasses.replace(self.layout, axes=rest)

    def apply_selections(self) -> QuantizedWeight:
        """The weight whose arrays are those of the entries picked."""
        if not self.selections:
            return self
        decode, parts, layout = self.decoder
        parts, decoding = decode.select(*parts)
        return QuantizedWeight(parts, layout, decoding, self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, on this device where a mesh is manual."""
        decode, parts, layout = self.decoder
        blocks = decoded_shape(decode, *((part.shape, part.dtype) for part in parts))
        extent = dict(zip(layout.axes, blocks, strict=True)) | dict.fromkeys(layout.units, 1)
        if layout.blocked:
            first, *rest = layout.blocked
            extent |= dict(zip(rest, layout.sizes[1:], strict=True))
            extent[first] = extent[BLOCKS] * extent[ELEMENTS] // math.prod(layout.sizes[1:])
        return tuple(extent[axis] for axis in range(layout.ndim))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.layout.ndim - len(self.selections)

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight."""
        return jnp.dtype(self._casts[-1])

    @property
    def _casts(self) -> tuple[str, ...]:
        """Names of the dtypes that the decoded weight is cast to, in order."""
        then = self.decode.casts if isinstance(self.decode, TransformedDecoding) else ()
        return (*self.decoding.casts, *then)

    def materialize(self) -> jax.Array:
        """The dense weight, split as its codes are where their type says how."""

        def dense(weight: QuantizedWeight) -> jax.Array:
            decode, parts, layout = weight.decoder
            sizes = tuple(weight.shape[axis] for axis in layout.blocked)  # of this device
            return dataclasses.replace(layout, sizes=sizes).to_dense(decode(*parts))

        if not any(map(jaxprs.is_split, self.parts)):
            return dense(self)
        sharding, spec = jax.typeof(self.parts[0]).sharding, jax.P()
        if self.is_blockwise:
            spec = self.layout.spec(sharding.spec)
        return jaxprs.call_with_auto_axes(dense, jax.NamedSharding(sharding.mesh, spec), self)

    def replace(self, **changes: Any) -> QuantizedWeight:
        return dataclasses.replace(self, **changes)

    def _transform_decoded(self, name: str, *params: Any) -> QuantizedWeight:
        """The weight led through one more operation once it is decoded."""
        weight = self.apply_selections()
        decode = TransformedDecoding.of(weight.decode, weight.layout).append(name, *params)
        ndim = len(decoded_shape(decode, *((part.shape, part.dtype) for part in weight.parts)))
        return weight.replace(decode=decode, layout=BlockLayout(tuple(range(ndim)), (), ()))

    # Structural operations

    def map_arrays(self, fn: Callable, base_only: bool = False) -> QuantizedWeight | None:
        """What is said of the dense array (a name, a layout) is not said of its blocks."""
        return self if base_only else None

    def transfer_base(self, fn: Callable) -> QuantizedWeight:
        """Move all parts."""
        return self.replace(parts=tuple(map(fn, self.parts)))

    def astype(self, dtype: jax.typing.DTypeLike) -> QuantizedWeight | None:
        """One more cast after decoding."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        name = jnp.dtype(dtype).name
        if self.dtype == dtype:
            return self
        if isinstance(self.decode, TransformedDecoding):
            return self.replace(decode=self.decode.append("astype", name))
        decoding = dataclasses.replace(self.decoding, casts=(*self.decoding.casts, name))
        if isinstance(self.decode, FlatDecoding):
            decoding = dataclasses.replace(self.decode, decoding=decoding)
        return self.replace(decode=decoding)

    def transpose(self, order: Sequence[int]) -> QuantizedWeight:
        """Renumber the labels, as long as the axes of blocks stay a run."""
        place = {old: new for new, old in enumerate(order)}
        return self.renumber(place) or self._transform_decoded("transpose", tuple(order))

    def renumber(self, place: dict[Any, int], **changes: Any) -> QuantizedWeight | None:
        layout = self.layout
        blocked, units = (
            tuple(place[axis] for axis in old) for old in (layout.blocked, layout.units)
        )
        if not is_consecutive(blocked):
            return None
        axes = tuple(place.get(axis, axis) for axis in layout.axes)
        return self.replace(layout=BlockLayout(axes, blocked, layout.sizes, units), **changes)

    def reshape(self, shape: Sequence[int]) -> QuantizedWeight | None:
        """Merge, split or drop runs of axes; those that blocks run along among themselves."""
        if 0 in self.shape:
            return None
        return restructure.reshape(self, shape) or self._transform_decoded("reshape", tuple(shape))

    def broadcast(self, shape: Sequence[int], axes: Sequence[int], fn: Callable) -> QuantizedWeight:
        """New axes of size 1 are the layout's alone."""
        grown = any(self.shape[old] != shape[new] for old, new in enumerate(axes))
        new = [axis for axis in range(len(shape)) if axis not in axes]
        if grown or any(shape[axis] != 1 for axis in new):
            return self._transform_decoded("broadcast", tuple(shape), tuple(axes))
        moved = self.renumber(dict(enumerate(axes)))
        if moved is None:
            return self._transform_decoded("broadcast", tuple(shape), tuple(axes))
        units = (*moved.layout.units, *new)
        return moved.replace(layout=dataclasses.replace(moved.layout, units=units))

    @property
    def num_stack_axes(self) -> int:
        """How many leading axes every array has: the stack axes."""
        codes, _, _, *second = self.parts
        if isinstance(self.decode, TransformedDecoding):
            return 0
        return second[0].ndim - 1 if second else codes.ndim - len(self.decoding.strides) - 1

    def index(
        self, fn: Callable, sizes: dict[int, int], axes: Sequence[int]
    ) -> QuantizedWeight | None:
        """Take a part of any axes that blocks keep; the scales of what is no stack are decoded."""
        if not {*axes} <= {*self.layout.axes}:
            return None
        where = {axis: self.layout.axes.index(axis) for axis in axes}
        weight = self
        if any(place >= self.num_stack_axes for place in where.values()):
            if not self.is_blockwise:
                return None
            weight = self.with_decoded_scales()
        codes, scales, table, *second = weight.parts
        under = {axis: place - (place > self.elements_axis) for axis, place in where.items()}
        parts = (fn(codes, where), fn(scales, under), table, *(fn(s, where) for s in second))
        return weight.replace(parts=parts)

    def slice(self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> Weight:
        """lax.slice; across blocks, of the decoded weight."""
        own = super().slice(starts, limits, strides)
        return own or self._transform_decoded("slice", tuple(starts), tuple(limits), tuple(strides))

    def rev(self, axes: Sequence[int]) -> Weight:
        """lax.rev; across blocks, of the decoded weight."""
        return super().rev(axes) or self._transform_decoded("rev", tuple(axes))

    def with_decoded_scales(self) -> QuantizedWeight:
        """The same with scales that are numbers: their codes know their places in the whole."""
        codes, scales, table, *second = self.parts
        if not second:
            return self
        decode = self.decoding.scales
        if jaxprs.is_split(scales):
            sharding = jax.typeof(scales).sharding
            scales = jaxprs.call_with_auto_axes(decode, sharding, scales, *second)
        else:
            scales = decode(scales, *second)
        return self.replace(parts=(codes, scales, table))

    def multiply(self, scalar: jax.typing.ArrayLike, fn: Callable) -> QuantizedWeight | None:
        """Scale the scales, before any cast, by a constant: derivatives do not reach them."""
        if not has_float32_range(*self._casts) or jaxprs.is_tracer(scalar):
            return None
        codes, scales, table = self.with_decoded_scales().parts
        return self.replace(parts=(codes, fn(scales, jnp.asarray(scalar, scales.dtype)), table))

    def scale_axes(self, by: jax.Array, axes: Sequence[int], fn: Callable) -> Weight | None:
        """Of what meets the codes."""
        return scale_weight(self, by, axes, fn) if has_float32_range(*self._casts) else None

    def stop_gradient(self) -> QuantizedWeight:
        """It is constant as it is."""
        return self

    @property
    def elements_axis(self) -> int:
        """Place of the elements of a block among the axes of codes."""
        return self.parts[0].ndim - 1 - self.decoding.trailing

    def unstack(self) -> tuple[Any, Any] | None:
        """Slices along the leading axis of the weight.

        Where that is the first axis of all arrays they are scanned over. Else the loop is over the
        numbers of the entries: to move the axis to the front would copy all codes.
        """
        return restructure.unstack(self)

    def specs(self, spec: jax.P) -> QuantizedWeight | None:
        """PartitionSpecs of the arrays."""
        empty, selections = type(spec)(), tuple(type(spec)() for _ in self.selections)
        if isinstance(self.decode, TransformedDecoding):
            whole = all(entry is None for entry in spec)
            return self.replace(parts=(empty,) * len(self.parts)) if whole else None
        stack, split = self.layout.axes[: self.num_stack_axes], self._find_split_axes(spec)
        if split & {*self.layout.blocked[1:]} or (split and not self.is_blockwise):
            return None
        first = self.layout.blocked[0] if self.layout.blocked else None
        labels = [first if axis == BLOCKS else axis for axis in self.layout.axes]
        if not self.is_blockwise:
            labels = [*stack, None, None]
        codes = [None if label == ELEMENTS else label for label in labels]
        scales = [label for i, label in enumerate(codes) if i != self.elements_axis]
        whole = labeled_spec(spec, (*stack, None))
        second = [whole, labeled_spec(spec, stack), whole]
        parts = (labeled_spec(spec, codes), labeled_spec(spec, scales), empty)
        return self.replace(parts=(*parts, *second[: len(self.parts) - 3]), selections=selections)

    def prepare_split(self, spec: jax.P) -> QuantizedWeight:
        """A part of the leaf cannot tell which scales of scales are its own."""
        return self.with_decoded_scales() if self._find_split_axes(spec) else self

    def _find_split_axes(self, spec: jax.P) -> set[int]:
        """The axes, stack axes left out, that a spec splits."""
        split = {axis for axis, entry in enumerate(spec) if entry is not None}
        return split - {*self.layout.axes[: self.num_stack_axes]}

    def reshard(self, spec: jax.P, fn: Callable) -> QuantizedWeight | None:
        """Lay the arrays out by the weight's spec."""
        whole = self.specs(spec)
        return whole and self.replace(parts=tuple(map(fn, self.parts, whole.parts)))

    # Products

    def dot(self, other: jax.Array, numbers: DotNumbers, on_left: bool, options: Options) -> Any:
        """lax.dot_general."""
        return decoded.dot(self, other, numbers, on_left, options)

    def ragged_dot(
        self, other: jax.Array, sizes: jax.Array, numbers: RaggedNumbers, options: Options
    ) -> Any:
        """lax.ragged_dot_general."""
        return decoded.ragged_dot(self, other, sizes, numbers, options)

    def conv(self, other: jax.Array, options: Options) -> Any:
        """lax.conv_general_dilated."""
        return decoded.conv(self, other, options)

    def gather(self, indices: jax.Array, options: Options) -> Any:
        """Decode only the rows that are read."""
        return gather_blocks(self, indices, options)
