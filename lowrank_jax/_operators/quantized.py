r"""The quantized weight operator: codes and scales, decoded inside the product that uses them.

Each axis of the decoded blocks is labeled with the weight axis it corresponds to, so a transpose
renumbers labels and moves no data. Blocks run along consecutive weight axes, split into two axes,
BLOCKS and ELEMENTS. A weight [4, 128, 6] in blocks of 64 along axis 1, transposed to [6, 4, 128]:

    codes [4, 2, 64, 6]    labels (1, BLOCKS, ELEMENTS, 0)    blocked (2,)

Operations that blocks do not support (a slice across blocks, a reshape that mixes axes) are applied
to the decoded weight, also inside the product, so no dense array is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes.quantized import Decoding, Quantized
from lowrank_jax._operators import decoded, restructure
from lowrank_jax._operators.blocks import BLOCKS, ELEMENTS, BlockLayout, is_consecutive, is_selected
from lowrank_jax._operators.decodings import FlatDecoding, SelectedDecoding, TransformedDecoding
from lowrank_jax._operators.gather import gather_blocks
from lowrank_jax._operators.scaled import scale_weight
from lowrank_jax._operators.scaling import has_float32_range
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers, Weight

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight(Weight):
    """Codes, scales, table and the second level of scales, with the layout of their axes.

    Args:
      parts: codes [*leading, blocks, elements, *trailing], integers, two per byte along elements
        if packed as uint8; scales, the same shape without elements, float32 or 8-bit codes; the
        table of the format, float32; and with double quantization the second level of scales, its
        offset and its table, one row for each entry of the stack axes.
      layout: labels of the decoded array's axes.
      decode: a function of parts that returns the decoded array.
      path: of the leaf; None for the base of an adapted weight, which has the path.
      selections: for each axis of codes labeled (SELECTED, n), the index of the selected entry.
    """

    parts: tuple[Any, ...]
    layout: BlockLayout = dataclasses.field(metadata=_STATIC)
    decode: Any = dataclasses.field(metadata=_STATIC)
    path: Any = dataclasses.field(metadata=_STATIC)
    selections: tuple[Any, ...] = ()

    product_kind = "dequantized"

    @classmethod
    def of(cls, node: Quantized, path: Hashable) -> QuantizedWeight:
        """Return the operator of a node, with stop_gradient on its scales, outside loops."""
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
        """Whether `decode` returns blocks; otherwise it returns a dense array."""
        return isinstance(self.decode, Decoding)

    @property
    def decoding(self) -> Decoding:
        """The Decoding of the parts, without the operations after it."""
        decode = self.decode
        while not isinstance(decode, Decoding):
            decode = decode.decoding
        return decode

    @property
    def decoder(self) -> tuple[Any, tuple[Any, ...], BlockLayout]:
        """The function that decodes the selected entries, its arguments and its layout."""
        if not self.selections:
            return self.decode, self.parts, self.layout
        axes: tuple[Any, ...] = self.layout.axes
        places = [i for i, label in enumerate(axes) if is_selected(label)]
        selections = [self.selections[axes[place][1]] for place in places]
        rest = tuple(label for label in axes if not is_selected(label))
        decode = SelectedDecoding(self.decoding, tuple(places))
        return decode, (*self.parts, *selections), dataclasses.replace(self.layout, axes=rest)

    def apply_selections(self) -> QuantizedWeight:
        """Slice the selected entries out of the arrays."""
        if not self.selections:
            return self
        decode, parts, layout = self.decoder
        parts, decoding = decode.select(*parts)
        return QuantizedWeight(parts, layout, decoding, self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, on this device where a mesh is manual."""
        decode, (codes, *_), layout = self.decoder
        return layout.infer_shape(decode.infer_shape(codes.shape))

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
        """Return the dense weight, sharded like its codes if their type has a sharding."""

        def dense(weight: QuantizedWeight) -> jax.Array:
            decode, parts, layout = weight.decoder
            sizes = tuple(weight.shape[axis] for axis in layout.blocked)  # on this device
            return dataclasses.replace(layout, sizes=sizes).to_dense(decode(*parts))

        if not any(map(jaxprs.is_split, self.parts)):
            return dense(self)
        sharding, spec = jax.typeof(self.parts[0]).sharding, jax.P()
        if self.is_blockwise:
            spec = self.layout.spec(sharding.spec)
        return jaxprs.call_with_auto_axes(dense, jax.NamedSharding(sharding.mesh, spec), self)

    def replace(self, **changes: object) -> QuantizedWeight:
        """Replace fields, as dataclasses.replace."""
        return dataclasses.replace(self, **changes)

    def _transform_decoded(self, name: str, *params: object) -> QuantizedWeight:
        """Append an operation that is applied to the decoded weight."""
        weight = self.apply_selections()
        decode = TransformedDecoding.of(weight.decode, weight.layout).append(name, *params)
        ndim = len(decode.infer_shape(weight.parts[0].shape))
        return weight.replace(decode=decode, layout=BlockLayout(tuple(range(ndim)), (), ()))

    # Structural operations

    def map_arrays(self, fn: Callable, base_only: bool = False) -> QuantizedWeight | None:
        """Return None: a name or layout of the dense array does not apply to its blocks."""
        return self if base_only else None

    def transfer_base(self, fn: Callable) -> QuantizedWeight:
        """Move all parts to another memory space."""
        return self.replace(parts=tuple(map(fn, self.parts)))

    def astype(self, dtype: jax.typing.DTypeLike) -> QuantizedWeight | None:
        """Append a cast to the decoding; None if dtype is not floating-point."""
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
        """Renumber the labels; if blocked axes are torn apart, transpose the decoded weight."""
        place = {old: new for new, old in enumerate(order)}
        return self.renumber(place) or self._transform_decoded("transpose", tuple(order))

    def renumber(self, place: dict[Any, int], **changes: object) -> QuantizedWeight | None:
        """Rename axis i to place[i]; None if the blocked axes would not stay consecutive."""
        layout = self.layout
        blocked, units = (
            tuple(place[axis] for axis in old) for old in (layout.blocked, layout.units)
        )
        if not is_consecutive(blocked):
            return None
        axes = tuple(place.get(axis, axis) for axis in layout.axes)
        return self.replace(layout=BlockLayout(axes, blocked, layout.sizes, units), **changes)

    def reshape(self, shape: Sequence[int]) -> QuantizedWeight | None:
        """Reshape the arrays if blocks stay whole; else reshape the decoded weight."""
        if 0 in self.shape:
            return None
        return restructure.reshape(self, shape) or self._transform_decoded("reshape", tuple(shape))

    def broadcast(self, shape: Sequence[int], axes: Sequence[int], fn: Callable) -> QuantizedWeight:
        """Record new axes of size 1 in the layout; else broadcast the decoded weight."""
        grown = any(self.shape[old] != shape[new] for old, new in enumerate(axes))
        new = [axis for axis in range(len(shape)) if axis not in axes]
        if grown or any(shape[axis] != 1 for axis in new):
            return self._transform_decoded("broadcast", tuple(shape), tuple(axes))
        renumbered = self.renumber(dict(enumerate(axes)))
        if renumbered is None:
            return self._transform_decoded("broadcast", tuple(shape), tuple(axes))
        units = (*renumbered.layout.units, *new)
        return renumbered.replace(layout=dataclasses.replace(renumbered.layout, units=units))

    @property
    def num_stack_axes(self) -> int:
        """Number of stack axes: the leading axes that every array has."""
        codes, _, _, *second = self.parts
        if isinstance(self.decode, TransformedDecoding):
            return 0
        return second[0].ndim - 1 if second else codes.ndim - len(self.decoding.strides) - 1

    def index(
        self, fn: Callable, sizes: dict[int, int], axes: Sequence[int]
    ) -> QuantizedWeight | None:
        """Take part of axes that blocks do not run along; None for other axes."""
        # Scales of the second level are per entry of the stack axes: along those, all arrays are
        # indexed. Along another axis their rows would no longer match, so scales are decoded first.
        if not {*axes} <= {*self.layout.axes}:
            return None
        where = {axis: self.layout.axes.index(axis) for axis in axes}
        weight = self
        if any(place >= self.num_stack_axes for place in where.values()):
            if not self.is_blockwise:
                return None
            weight = self.with_decoded_scales()
        codes, scales, table, *second = weight.parts
        scale_where = {axis: place - (place > self.elements_axis) for axis, place in where.items()}
        parts = (fn(codes, where), fn(scales, scale_where), table, *(fn(s, where) for s in second))
        return weight.replace(parts=parts)

    def slice(self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> Weight:
        """lax.slice of the arrays; of the decoded weight if it cuts blocks."""
        own = super().slice(starts, limits, strides)
        return own or self._transform_decoded("slice", tuple(starts), tuple(limits), tuple(strides))

    def rev(self, axes: Sequence[int]) -> Weight:
        """lax.rev of the arrays; of the decoded weight along blocked axes."""
        return super().rev(axes) or self._transform_decoded("rev", tuple(axes))

    def with_decoded_scales(self) -> QuantizedWeight:
        """Return the weight with scales decoded to numbers, without a second level."""
        # A scale's group of the second level follows from its position in the whole stack entry,
        # so a part of the 8-bit scales cannot be decoded: decode all of them before a cut.
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
        """Multiply the scales by a constant; None for a tracer, whose gradient would be lost."""
        if not has_float32_range(*self._casts) or jaxprs.is_tracer(scalar):
            return None
        codes, scales, table = self.with_decoded_scales().parts
        return self.replace(parts=(codes, fn(scales, jnp.asarray(scalar, scales.dtype)), table))

    def scale_axes(self, by: jax.Array, axes: Sequence[int], fn: Callable) -> Weight | None:
        """Return a ScaledWeight, so that the codes stay unchanged and gradients reach `by`."""
        return scale_weight(self, by, axes, fn) if has_float32_range(*self._casts) else None

    def stop_gradient(self) -> QuantizedWeight:
        """Return the weight; its arrays have no gradient."""
        return self

    @property
    def elements_axis(self) -> int:
        """The axis of codes that runs along the elements of a block."""
        return self.parts[0].ndim - 1 - self.decoding.trailing

    def unstack(self) -> tuple[Any, Any] | None:
        """Return arrays to scan along axis 0 of the weight, and rebuild(one slice) -> weight.

        The scan runs over the arrays if axis 0 is a stack axis. Otherwise it runs over indices,
        since moving the axis to the front would copy all codes.
        """
        return restructure.unstack(self)

    def specs(self, spec: jax.P) -> QuantizedWeight | None:
        """Return PartitionSpecs in place of the arrays, or None if blocks cannot be split so."""
        return restructure.specs(self, spec)

    def prepare_split(self, spec: jax.P) -> QuantizedWeight:
        """Decode the scales if they are split; a part of them cannot be decoded."""
        return self.with_decoded_scales() if self.find_split_axes(spec) else self

    def find_split_axes(self, spec: jax.P) -> set[int]:
        """Return the axes that spec splits, without stack axes."""
        split = {axis for axis, entry in enumerate(spec) if entry is not None}
        return split - {*self.layout.axes[: self.num_stack_axes]}

    def reshard(self, spec: jax.P, fn: Callable) -> QuantizedWeight | None:
        """Reshard the arrays by the weight's spec."""
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
        """lax.gather; decode only the rows that are read."""
        return gather_blocks(self, indices, options)
