r"""A leaf kept as small integers: how its blocks lie, and the dense weight it stands for.

A kernel's codes keep the kernel's own axes, so that its PartitionSpec carries over and stacked
layers slice; only the contracted axes that hold the blocks are cut in two, [.., blocks, block, ..].
A product then contracts over both, and nothing is ever reshaped on the weight's side. A leaf whose
contracted axes cannot be cut evenly is kept flat, [stack, blocks, block], in bitsandbytes' order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import _codecs, _packing, _scales
from lowrank_jax._errors import LowrankError

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    r"""A frozen leaf in blocks: $W = \text{table}[\text{codes}] \cdot \text{scales}$, blockwise.

    With double quantization the scales are themselves 8-bit codes: $\text{scales} =
    \text{map}[\text{scales}] \cdot \text{nested}[\text{index}/256] + \text{offset}$.

    Args:
      codes: uint4, or uint8 with two codes a byte, or int8: [*leading, blocks, block, *trailing].
      scales: float32 (absmax of each block), or uint8 codes of it: codes' shape without the block.
      nested: float32 [*stack, ceil(blocks of one / 256)], or None.
      offset: float32 [*stack], or None.
      format: "nf4", "fp4" or "int8".
      block_size: elements that share a scale.
      packing: "uint4" or "uint8"; of 4-bit codes.
      blocked: sizes of the leaf's axes that the two axes of blocks stand for, in order.
      trailing: number of axes after them.
      order: for a leaf kept flat, the place in the leaf of each of `blocked`'s axes; else None.
      strides: for each axis of scales that is no stack axis, its step in the flat order of blocks.
      weight_dtype: name of the dense leaf's dtype.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """

    codes: Any
    scales: Any
    nested: Any = None
    offset: Any = None
    format: str = dataclasses.field(default="nf4", metadata=_STATIC)
    block_size: int = dataclasses.field(default=64, metadata=_STATIC)
    packing: str = dataclasses.field(default="uint4", metadata=_STATIC)
    blocked: tuple[int, ...] = dataclasses.field(default=(), metadata=_STATIC)
    trailing: int = dataclasses.field(default=0, metadata=_STATIC)
    order: tuple[int, ...] | None = dataclasses.field(default=None, metadata=_STATIC)
    strides: tuple[int, ...] = dataclasses.field(default=(), metadata=_STATIC)
    weight_dtype: str = dataclasses.field(default="float32", metadata=_STATIC)

    @property
    def leading(self) -> int:
        """Number of axes before those of the blocks."""
        return self.codes.ndim - 2 - self.trailing

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense leaf; stack axes that a loop or vmap took away are left out."""
        before = self.codes.shape[: self.leading]
        if self.order is not None:
            inner = tuple(self.blocked[i] for i in np.argsort(self.order))
            return (*before, *inner)
        return (*before, *self.blocked, *self.codes.shape[self.leading + 2 :])

    @property
    def ndim(self) -> int:
        """Number of axes of the dense leaf."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements of the dense leaf."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the dense leaf."""
        return jnp.dtype(self.weight_dtype)

    @property
    def parts(self) -> tuple[Any, ...]:
        """What `decoding` takes: codes, scales, the table, and the second level if there is one."""
        table = _codecs.format_of(self.format).table
        table = jnp.zeros(1, jnp.float32) if table is None else jnp.asarray(table)
        second = () if self.nested is None else (self.nested, self.offset)
        return (self.codes, self.scales, table, *second)

    @property
    def decoding(self) -> Any:
        """How the parts become codes' axes of floating-point numbers."""
        return Decoding(
            self.format, self.packing, self.trailing, self.strides, (self.weight_dtype,)
        )

    def mapped(self, make: Callable[[tuple[Any, ...]], Any]) -> Quantized:
        """The same node with make(axes of the leaf, or None) at each array: a spec, say.

        The axis of blocks is the first axis of the run that was cut; an axis of elements, of a
        second level or of a leaf kept flat is None.
        """
        lead, run = self.leading, len(self.blocked)
        before: list[Any] = list(range(lead))
        if self.order is not None:
            codes = [*before, None, None]
        else:
            codes = [*before, lead, None, *range(lead + run, self.ndim)]
        scales = [*codes[: lead + 1], *codes[lead + 2 :]]
        second: dict[str, Any] = {}
        if self.nested is not None:
            stack = tuple(range(self.nested.ndim - 1))
            second = {"nested": make((*stack, None)), "offset": make(stack)}
        return dataclasses.replace(
            self, codes=make(tuple(codes)), scales=make(tuple(scales)), **second
        )

    def __jax_array__(self):
        raise LowrankError(
            "a Quantized leaf was used as if it were an array: the function that uses the "
            "parameters must be lifted; call lowrank.lift(fn)(tree, ...), or pass "
            "lowrank.dequantize(tree)"
        )


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decodes parts of a Quantized leaf into its blocks, [*leading, blocks, block, *trailing].

    Args:
      format, packing, trailing, strides: as of Quantized.
      casts: dtypes that the float32 numbers go through, in order.
    """

    format: str
    packing: str
    trailing: int
    strides: tuple[int, ...]
    casts: tuple[str, ...]

    def __call__(
        self, codes: Any, scales: Any, table: Any, nested: Any = None, offset: Any = None
    ) -> jax.Array:
        axis = codes.ndim - 1 - self.trailing
        if nested is not None:
            scales = self.scales(scales, nested, offset)
        if self.format != "int8":
            codes = _packing.unpack(codes, axis, self.packing)
        out = _codecs.decode(codes, scales, self.format, axis, table=table)
        for dtype in self.casts:
            out = out.astype(dtype)
        return out

    def scales(self, scales: Any, nested: Any, offset: Any) -> jax.Array:
        """Scales of each stacked leaf from their codes."""
        one = _OneLeafScales(self.strides)
        for _ in range(nested.ndim - 1):
            one = jax.vmap(one)
        return one(scales, nested, offset)


@dataclasses.dataclass(frozen=True)
class _OneLeafScales:
    """decode_scales, each code's flat index told by the strides of its axes."""

    strides: tuple[int, ...]

    def __call__(self, scales: Any, nested: Any, offset: Any) -> jax.Array:
        index = jnp.zeros(scales.shape, jnp.int32)
        for axis, stride in enumerate(self.strides):
            index += jax.lax.broadcasted_iota(jnp.int32, scales.shape, axis) * stride
        return _scales.decode_scales(scales, nested, offset, index // _scales.SCALE_BLOCK)


def dequantized(node: Quantized) -> jax.Array:
    """The dense leaf: decoded in float32, cast once to its dtype."""
    blocks = node.decoding(*node.parts)
    if node.order is None:
        return blocks.reshape(node.shape)
    return unflattened(blocks, node.blocked, node.order)


def unflattened(blocks: jax.Array, blocked: tuple[int, ...], order: tuple[int, ...]) -> jax.Array:
    """The dense leaf of blocks that straddle its rows: [stack, blocks, block] of a flat leaf."""
    before = blocks.shape[:-2]
    flat = blocks.reshape(*before, -1)[..., : math.prod(blocked)]
    axes = [len(before) + int(place) for place in np.argsort(order)]
    return jnp.transpose(flat.reshape(*before, *blocked), (*range(len(before)), *axes))


def quantized(
    leaf: Any,
    fan_in: tuple[int, ...],
    stack: tuple[int, ...],
    *,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    packing: str = "uint4",
) -> Quantized:
    """Quantize a leaf in blocks along its fan-in axes.

    Args:
      leaf: floating-point array.
      fan_in: the axes blocks run along (the feature axes of a look-up table).
      stack: axes that enumerate independent weights.
      format: as of QuantConfig, and the rest too.
      block_size: elements that share a scale.
      double_quant: whether the scales are kept as codes.
      packing: "uint4" or "uint8".
    """
    shape, dtype = leaf.shape, jnp.dtype(leaf.dtype).name
    lead = 0
    while lead < len(shape) and lead in stack:
        lead += 1  # stack axes that lead have second levels of their own
    group = _group(shape, fan_in, block_size)
    options = {"format": format, "block_size": block_size, "packing": packing}
    if group is None:
        inner = [axis for axis in range(lead, len(shape)) if axis not in fan_in]
        order = (*inner, *fan_in)
        rows = jnp.transpose(leaf, (*range(lead), *order)).reshape(*shape[:lead], -1)
        encode = lambda row: _codecs.encode_flat(row, format, block_size)
        for _ in range(lead):
            encode = jax.vmap(encode)
        codes, scales = encode(rows)
        codes = codes.reshape(*shape[:lead], -1, block_size)
        blocked = tuple(shape[axis] for axis in order)
        place = tuple(axis - lead for axis in order)
        trailing, strides = 0, (1,)
    else:
        first, last = group
        blocked = shape[first : last + 1]
        cut = (*shape[:first], -1, block_size, *shape[last + 1 :])
        codes, scales = _codecs.encode(leaf.reshape(cut), format, first + 1)
        trailing, place = len(shape) - last - 1, None
        strides = _strides(scales.shape, lead, first, [a for a in fan_in if a < first], last)
    nested = offset = None
    if double_quant:
        encode_scales = lambda s: _nested(s, strides)
        for _ in range(lead):
            encode_scales = jax.vmap(encode_scales)
        scales, nested, offset = encode_scales(scales)
    if format != "int8":
        codes = _packing.pack(codes, codes.ndim - 1 - trailing, packing)
    return Quantized(
        codes, scales, nested, offset, **options, blocked=tuple(blocked), trailing=trailing,
        order=place, strides=strides, weight_dtype=dtype,
    )  # fmt: skip


def _group(shape: tuple[int, ...], fan_in: tuple[int, ...], block: int) -> tuple[int, int] | None:
    """First and last of the adjacent fan-in axes, the last of all, that whole blocks fill."""
    last = max(fan_in)
    first, size = last, shape[last]
    while size % block and first - 1 in fan_in:
        first -= 1
        size *= shape[first]
    return None if size % block or not size else (first, last)


def _strides(
    shape: tuple[int, ...], lead: int, blocks: int, fan_in_before: list[int], last: int
) -> tuple[int, ...]:
    """Steps of the axes of scales in bitsandbytes' order: fan-out, then fan-in, then blocks."""
    axes = list(range(lead, len(shape)))
    inner = [axis for axis in axes if axis in fan_in_before] + [blocks]
    ordered = [axis for axis in axes if axis not in inner] + inner
    step, strides = 1, {}
    for axis in reversed(ordered):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides[axis] for axis in axes)


def _nested(scales: jax.Array, strides: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Double quantization of one leaf's scales, in their flat order, back in their own shape."""
    order = tuple(np.argsort([-s for s in strides], stable=True))
    flat = jnp.transpose(scales, order)
    codes, nested, offset = _scales.encode_scales(flat.reshape(-1))
    return (
        jnp.transpose(codes.reshape(flat.shape), [int(i) for i in np.argsort(order)]),
        nested,
        offset,
    )
