r"""A leaf kept as small integers: how its blocks lie, and the dense weight it stands for.

A kernel's codes keep the kernel's own axes, so that its PartitionSpec carries over and stacked
layers slice; only the contracted axes that hold the blocks are cut in two, [.., blocks, block, ..].
A product then contracts over both, and nothing is ever reshaped on the weight's side. A leaf whose
contracted axes cannot be cut evenly is kept flat, [stack, blocks, block], in bitsandbytes' order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import _codecs
from lowrank_jax._codecs.packing import pack, unpack
from lowrank_jax._codecs.scales import DYNAMIC_MAP, SCALE_BLOCK, decode_scales, encode_scales
from lowrank_jax._errors import AxesError, LowrankError, TreeError
from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes.serialization import Node
from lowrank_jax._primitives.quantized_dot import PlatformFn

Axes = tuple[int, ...]

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Quantized(Node):
    r"""A frozen leaf in blocks: $W = \text{table}[\text{codes}] \cdot \text{scales}$, blockwise.

    With double quantization the scales are themselves 8-bit codes: $\text{scales} =
    \text{map}[\text{scales}] \cdot \text{nested}[\text{index}/256] + \text{offset}$.

    Args:
      codes: uint4, or uint8 with two codes a byte, or int8: [*leading, blocks, block, *trailing].
      scales: float32 (absmax of each block), or uint8 codes of it: codes' shape without the block.
      nested: float32 [*stack, ceil(blocks of one / 256)], or None.
      offset: float32 [*stack], or None.
      nested_map: float32 [*stack, 256], the map of a file that brings its own; None: the usual one.
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
    nested_map: Any = None
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
    def stacked(self) -> int:
        """Number of leading axes that every array has: those that enumerate whole leaves."""
        return self.scales.ndim - len(self.strides)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense leaf; stack axes that a loop or vmap took away are left out."""
        lead, codes = self.leading, self.codes.shape
        if self.order is not None:
            inner = tuple(self.blocked[i] for i in np.argsort(self.order))
            return (*codes[:lead], *inner)
        rest = self.blocked[1:]
        first = codes[lead] * self.block_size // math.prod(rest)  # a part, inside shard_map
        return (*codes[:lead], first, *rest, *codes[lead + 2 :])

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
        table = _codecs.get_format(self.format).table
        table = jnp.zeros(1, jnp.float32) if table is None else jnp.asarray(table)
        if self.nested is None:
            return (self.codes, self.scales, table)
        nested_map = self.nested_map
        if nested_map is None:
            standard = DYNAMIC_MAP
            nested_map = jnp.broadcast_to(standard, (*self.offset.shape, standard.size))
        return (self.codes, self.scales, table, self.nested, self.offset, nested_map)

    @property
    def decoding(self) -> Any:
        """How the parts become codes' axes of floating-point numbers."""
        return Decoding(
            self.format, self.packing, self.trailing, self.strides, (self.weight_dtype,)
        )

    @property
    def labels(self) -> tuple[int | None, ...]:
        """For each axis of codes the axis of the leaf that it runs along, or None."""
        lead, run = self.leading, len(self.blocked)
        if self.order is not None:
            return (*range(lead), None, None)
        return (*range(lead), lead, None, *range(lead + run, self.ndim))

    def map_axes(self, make: Callable[[tuple[Any, ...]], Any]) -> Quantized:
        """The same node with make(axes of the leaf, or None) at each array: a spec, say.

        The axis of blocks is the first axis of the run that was cut; an axis of elements, of a
        second level or of a leaf kept flat is None.
        """
        codes, lead = self.labels, self.leading
        scales = [*codes[: lead + 1], *codes[lead + 2 :]]
        second: dict[str, Any] = {}
        if self.nested is not None:
            stack = tuple(range(self.nested.ndim - 1))
            second = {"nested": make((*stack, None)), "offset": make(stack)}
        if self.nested_map is not None:
            second["nested_map"] = second["nested"]
        return dataclasses.replace(self, codes=make(codes), scales=make(tuple(scales)), **second)

    def __jax_array__(self):
        raise LowrankError(
            "a Quantized leaf was used as if it were an array: the function that uses the "
            "parameters must be lifted; call lowrank.lift(fn)(tree, ...), or pass "
            "lowrank.dequantize(tree)"
        )


@dataclasses.dataclass(frozen=True)
class Decoding(PlatformFn):
    """Decodes parts of a Quantized leaf into its blocks, [*leading, blocks, block, *trailing].

    Args:
      format, packing, trailing, strides: as of Quantized.
      casts: dtypes that the float32 numbers go through, in order.
      tree: whether scales are looked up by selects.
    """

    format: str
    packing: str
    trailing: int
    strides: tuple[int, ...]
    casts: tuple[str, ...]
    tree: bool = False

    @property
    def on_tpu(self) -> Decoding:
        """The same without gathers."""
        return dataclasses.replace(self, tree=True)

    def __call__(self, codes: Any, scales: Any, table: Any, *second: Any) -> jax.Array:
        axis = codes.ndim - 1 - self.trailing
        if second:
            scales = self.scales(scales, *second)
        if _codecs.get_format(self.format).is_packed:
            codes = unpack(codes, axis, self.packing)
        out = _codecs.decode_blocks(codes, scales, self.format, axis, table=table)
        for dtype in self.casts:
            out = out.astype(dtype)
        return out

    def scales(self, scales: Any, nested: Any, offset: Any, table: Any) -> jax.Array:
        """Scales of each stacked leaf from their codes, by its second level."""
        count = math.prod(scales.shape[nested.ndim - 1 :])
        if -(-count // SCALE_BLOCK) != nested.shape[-1]:
            raise TreeError(
                f"{count} doubly quantized scales, but {nested.shape[-1]} scales of those: inside "
                "shard_map they cannot tell their places in the whole leaf. Split it along stack "
                "axes alone, quantize it with double_quant=False, or lift the function that "
                "shard_map returned"
            )
        order = get_flat_order(self.strides)
        one = lambda scales, nested, offset, table: decode_scales(
            scales, nested, offset, order, table, self.tree
        )
        for _ in range(nested.ndim - 1):
            one = jax.vmap(one)
        return one(scales, nested, offset, table)


def dequantize_node(node: Quantized) -> jax.Array:
    """The dense leaf: decoded in float32, cast once to its dtype; split as its type says."""
    sharding = dense_sharding_of(node)
    if sharding is None:
        return _dequantize_node(node)
    with jaxprs.use_mesh_of(node.codes):
        return jaxprs.call_with_auto_axes(_dequantize_node, sharding, node)


@functools.partial(jax.jit, inline=True)
def _dequantize_node(node: Quantized) -> jax.Array:
    """The same; one program, for op by op a look-up takes the memory of eight dense leaves."""
    blocks = node.decoding(*node.parts)
    if node.order is None:
        return blocks.reshape(node.shape)
    return unflatten_blocks(blocks, node.blocked, node.order)


def dense_sharding_of(node: Quantized) -> Any:
    """How the dense leaf lies where the node's types say that it is split, or None."""
    if not any(map(jaxprs.is_split, jax.tree.leaves(node))):
        return None
    sharding = jax.typeof(node.codes).sharding
    entries = dict(zip(node.labels, sharding.spec, strict=False))
    spec = jax.P(*(entries.get(axis) for axis in range(node.ndim)))
    return jax.NamedSharding(sharding.mesh, spec)


def unflatten_blocks(
    blocks: jax.Array, blocked: tuple[int, ...], order: tuple[int, ...]
) -> jax.Array:
    """The dense leaf of blocks that straddle its rows: [stack, blocks, block] of a flat leaf."""
    before = blocks.shape[:-2]
    flat = blocks.reshape(*before, -1)[..., : math.prod(blocked)]
    axes = [len(before) + int(place) for place in np.argsort(order)]
    return jnp.transpose(flat.reshape(*before, *blocked), (*range(len(before)), *axes))


def quantize_array(
    leaf: Any, fan_in: Axes, stack: Axes, *, together: bool = False, **options: Any
) -> Quantized:
    """Quantize a leaf in blocks along its fan-in axes.

    Args:
      leaf: floating-point array.
      fan_in: the axes blocks run along (the feature axes of a look-up table).
      stack: axes that enumerate independent weights. Those that lead have second levels of their
        own.
      together: whether the first of those is mapped at once, as one that is split over devices
        must be; else it is looped over, and temporaries are those of one layer.
      **options: format, block_size, double_quant and packing, as of QuantConfig.
    """
    if not leaf.size:
        raise AxesError(f"a leaf of shape {leaf.shape} has no values to quantize: exclude it")
    lead = 0
    while lead < leaf.ndim and lead in stack:
        lead += 1
    fan_in = tuple(axis - lead for axis in fan_in)
    one = lambda leaf: _quantize_unstacked(leaf, fan_in, **options)
    for depth in reversed(range(lead)):
        one = jax.vmap(one) if depth or together else functools.partial(jax.lax.map, one)
    return one(leaf)


def _quantize_unstacked(
    leaf: Any,
    fan_in: Axes,
    *,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    packing: str = "uint4",
) -> Quantized:
    """A leaf that no stack axis leads."""
    options = {"format": format, "block_size": block_size, "packing": packing}
    shape = leaf.shape
    group = _find_blocked_axes(shape, fan_in, block_size)
    if group is None:
        place = (*(axis for axis in range(len(shape)) if axis not in fan_in), *fan_in)
        row = jnp.transpose(leaf, place).reshape(-1)
        codes, scales = _codecs.encode_flat(row, format, block_size)
        codes = codes.reshape(-1, block_size)
        blocked = tuple(shape[axis] for axis in place)
        trailing, strides = 0, (1,)
    else:
        first, last = group
        blocked = shape[first : last + 1]
        cut = (*shape[:first], -1, block_size, *shape[last + 1 :])
        codes, scales = _codecs.encode_blocks(leaf.reshape(cut), format, first + 1)
        trailing, place = len(shape) - last - 1, None
        strides = _compute_strides(scales.shape, first, [a for a in fan_in if a < first])
    if _codecs.get_format(format).is_packed:
        codes = pack(codes, codes.ndim - 1 - trailing, packing)
    node = Quantized(
        codes, scales, **options, blocked=blocked, trailing=trailing, order=place,
        strides=strides, weight_dtype=jnp.dtype(leaf.dtype).name,
    )  # fmt: skip
    return quantize_scales(node) if double_quant else node


def _find_blocked_axes(
    shape: tuple[int, ...], fan_in: tuple[int, ...], block: int
) -> tuple[int, int] | None:
    """First and last of the adjacent fan-in axes, the last of all, that whole blocks fill."""
    last = max(fan_in)
    first, size = last, shape[last]
    while size % block and first - 1 in fan_in:
        first -= 1
        size *= shape[first]
    return None if size % block or not size else (first, last)


def _compute_strides(
    shape: tuple[int, ...], blocks: int, fan_in_before: list[int]
) -> tuple[int, ...]:
    """Steps of the axes of scales in bitsandbytes' order: fan-out, then fan-in, then blocks."""
    inner = [*fan_in_before, blocks]
    ordered = [axis for axis in range(len(shape)) if axis not in inner] + inner
    step, strides = 1, {}
    for axis in reversed(ordered):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides[axis] for axis in range(len(shape)))


def get_flat_order(strides: tuple[int, ...]) -> list[int]:
    """The axes that have these steps in a flat order, outermost first."""
    return np.argsort([-stride for stride in strides], stable=True).tolist()


def quantize_scales(node: Quantized) -> Quantized:
    """The same leaf, one that nothing stacks, with its scales quantized in their flat order."""
    order = get_flat_order(node.strides)
    flat = jnp.transpose(node.scales, order)
    codes, nested, offset = encode_scales(flat.reshape(-1), node.weight_dtype)
    scales = jnp.transpose(codes.reshape(flat.shape), np.argsort(order).tolist())
    return dataclasses.replace(node, scales=scales, nested=nested, offset=offset)
