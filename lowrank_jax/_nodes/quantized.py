r"""The Quantized node: a leaf stored as blocks of 4- or 8-bit codes with their scales.

Codes keep the axes of the weight, so its PartitionSpec carries over and stacked layers can be
sliced. Only the contracted axes that hold the blocks are replaced by two, [.., blocks, block, ..]:
a product contracts over both, and the weight is never reshaped. A leaf whose contracted axes do not
divide into whole blocks is stored flat, [stack, blocks, block], in the order of bitsandbytes.
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
from lowrank_jax._codecs.packing import pack
from lowrank_jax._codecs.scales import DYNAMIC_MAP, encode_scales
from lowrank_jax._errors import AxesError, LowrankError
from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes.decoding import Decoding as Decoding
from lowrank_jax._nodes.decoding import get_flat_order as get_flat_order
from lowrank_jax._nodes.serialization import Node, list_array_fields

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
      scales: float32 (absmax of each block) or uint8 codes of it: shape of codes without the block.
      nested: float32 [*stack, ceil(blocks of one leaf / 256)], or None.
      offset: float32 [*stack], or None.
      nested_map: float32 [*stack, 256], the map found in a file; None for the standard map.
      format: "nf4", "fp4" or "int8".
      block_size: number of elements that share a scale.
      packing: "uint4" or "uint8", for 4-bit codes.
      blocked: sizes of the axes of the leaf that the two block axes replace.
      trailing: number of axes after the block axes.
      order: for a leaf stored flat, the axis of the leaf of each entry of `blocked`; else None.
      strides: for each axis of scales that is not a stack axis, its stride in the flat order.
      weight_dtype: name of the dtype of the dense leaf.

    Source: QLoRA, arXiv 2305.14314, section 3.

    >>> import lowrank_jax as lowrank
    >>> quant = lowrank.QuantConfig(targets="w", double_quant=False)
    >>> node = lowrank.quantize({"w": jnp.ones((128, 6))}, quant)["w"]
    >>> node
    Quantized(shape=(128, 6), format='nf4', block_size=64, packing='uint4', weight_dtype='float32',
     codes=uint4[2, 64, 6], scales=float32[2, 6])
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
        """Number of axes before the block axes."""
        return self.codes.ndim - 2 - self.trailing

    @property
    def stacked(self) -> int:
        """Number of stack axes, which lead every array."""
        return self.scales.ndim - len(self.strides)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense leaf, without stack axes that a loop or vmap removed."""
        # Codes [2, 64, 6] with blocked (128,): [2 * 64 / 1, 6]; codes [4, 2, 64, 6] with blocked
        # (16, 8): [4, 2 * 64 / 8, 8, 6]. The first size is computed from the codes, since inside
        # shard_map a device has only some of the blocks. Flat codes [2, 64] with blocked (7, 10)
        # and order (1, 0) are of a leaf [10, 7].
        lead, codes = self.leading, self.codes.shape
        if self.order is not None:
            inner = tuple(self.blocked[i] for i in np.argsort(self.order))
            return (*codes[:lead], *inner)
        rest = self.blocked[1:]
        first = codes[lead] * self.block_size // math.prod(rest)
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
        """Arguments of `decoding`: codes, scales, table, and the second level if there is one."""
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
        """A Decoding: the function from `parts` to floating-point blocks with the axes of codes."""
        return Decoding(
            self.format, self.packing, self.trailing, self.strides, (self.weight_dtype,)
        )

    @property
    def labels(self) -> tuple[int | None, ...]:
        """For each axis of codes, the axis of the leaf it corresponds to, or None."""
        lead, run = self.leading, len(self.blocked)
        if self.order is not None:
            return (*range(lead), None, None)
        return (*range(lead), lead, None, *range(lead + run, self.ndim))

    def map_axes(self, make: Callable[[tuple[Any, ...]], Any]) -> Quantized:
        """Replace each array by make(labels), for example by a PartitionSpec.

        A label is the axis of the leaf that an axis of the array corresponds to. The axis of blocks
        has the first of the axes it replaces; axes of the elements of a block, of the second level
        and of a leaf stored flat have None.
        """
        # Codes [4, 2, 64, 6] of a leaf [4, 16, 8, 6]: labels (0, 1, None, 3), scales (0, 1, 3).
        codes, lead = self.labels, self.leading
        scales = [*codes[: lead + 1], *codes[lead + 2 :]]
        second: dict[str, Any] = {}
        if self.nested is not None:
            stack = tuple(range(self.nested.ndim - 1))
            second = {"nested": make((*stack, None)), "offset": make(stack)}
        if self.nested_map is not None:
            second["nested_map"] = second["nested"]
        return dataclasses.replace(self, codes=make(codes), scales=make(tuple(scales)), **second)

    def _get_shown_fields(self) -> dict[str, Any]:
        """Return shape and format, and the arrays."""
        fields = super()._get_shown_fields()
        arrays = {name: fields[name] for name in list_array_fields(self) if name in fields}
        if not all(hasattr(array, "shape") for array in arrays.values()):
            return fields  # specs, say, in place of the arrays
        names = ("format", "block_size", "packing", "weight_dtype")
        return {"shape": self.shape, **{name: getattr(self, name) for name in names}, **arrays}

    def __jax_array__(self):
        raise LowrankError(
            "a Quantized leaf was used as if it were an array: the function that uses the "
            "parameters must be lifted; call lowrank.lift(fn)(tree, ...), or pass "
            "lowrank.dequantize(tree)"
        )


def dequantize_node(node: Quantized) -> jax.Array:
    """Decode the dense leaf in float32, cast it once to its dtype, and keep its sharding."""
    sharding = dense_sharding_of(node)
    if sharding is None:
        return _dequantize_node(node)
    with jaxprs.use_mesh_of(node.codes):
        return jaxprs.call_with_auto_axes(_dequantize_node, sharding, node)


@functools.partial(jax.jit, inline=True)
def _dequantize_node(node: Quantized) -> jax.Array:
    """Decode the dense leaf in one program; op by op the lookup needs eight times the memory."""
    blocks = node.decoding(*node.parts)
    if node.order is None:
        return blocks.reshape(node.shape)
    return unflatten_blocks(blocks, node.blocked, node.order)


def dense_sharding_of(node: Quantized) -> jax.NamedSharding | None:
    """Get the sharding of the dense leaf if the types of the arrays split them, else None."""
    if not any(map(jaxprs.is_split, jax.tree.leaves(node))):
        return None
    sharding = jax.typeof(node.codes).sharding
    entries = dict(zip(node.labels, sharding.spec, strict=False))
    spec = jax.P(*(entries.get(axis) for axis in range(node.ndim)))
    return jax.NamedSharding(sharding.mesh, spec)


def unflatten_blocks(
    blocks: jax.Array, blocked: tuple[int, ...], order: tuple[int, ...]
) -> jax.Array:
    """Restore the dense leaf from flat blocks, [*stack, blocks, block]."""
    # A leaf [10, 7] with fan-in 0 was transposed to [7, 10] and cut into 2 blocks of 64. The blocks
    # [2, 64] are flattened to [128], cut to 70 = 7 * 10, reshaped to `blocked` (7, 10) and
    # transposed by the inverse of `order` (1, 0) to [10, 7].
    before = blocks.shape[:-2]
    flat = blocks.reshape(*before, -1)[..., : math.prod(blocked)]
    axes = [len(before) + int(place) for place in np.argsort(order)]
    return jnp.transpose(flat.reshape(*before, *blocked), (*range(len(before)), *axes))


def quantize_array(
    leaf: jax.Array, fan_in: Axes, stack: Axes, *, together: bool = False, **options: Any
) -> Quantized:
    """Quantize a leaf in blocks along its fan-in axes.

    Args:
      leaf: floating-point array.
      fan_in: the axes along which blocks run (the feature axes of a lookup table).
      stack: axes that enumerate independent weights. Each weight of the leading ones gets its own
        second level.
      together: whether the first stack axis is vmapped, as needed if it is sharded. Otherwise it is
        looped over, with temporaries of one layer only.
      **options: format, block_size, double_quant and packing, as for QuantConfig.

    Raises:
      AxesError: the leaf has no elements.
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
    leaf: jax.Array,
    fan_in: Axes,
    *,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    packing: str = "uint4",
) -> Quantized:
    """Quantize a leaf without leading stack axes."""
    # [128, 6] with fan-in 0, blocks of 64: cut to [2, 64, 6]; codes [2, 64, 6], scales [2, 6].
    # [10, 7] with fan-in 0: 10 does not divide into blocks, so the leaf is transposed to [7, 10],
    # fan-in last as in a torch weight [out, in], and flattened: codes [2, 64], scales [2].
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
    """Find the first and last of adjacent fan-in axes that divide into whole blocks, or None."""
    # From the last fan-in axis, preceding ones are added until the product of their sizes is a
    # multiple of the block: in [4, 16, 8, 6] with fan-in (1, 2) and blocks of 64, 8 is not, and
    # 16 * 8 = 128 is, so the result is (1, 2).
    last = max(fan_in)
    first, size = last, shape[last]
    while size % block and first - 1 in fan_in:
        first -= 1
        size *= shape[first]
    return None if size % block or not size else (first, last)


def _compute_strides(
    shape: tuple[int, ...], blocks: int, fan_in_before: list[int]
) -> tuple[int, ...]:
    """Compute the strides of the axes of scales in the flat order of bitsandbytes."""
    # bitsandbytes flattens a torch weight [out, in], so the blocks of one output feature are
    # adjacent: fan-out axes are outermost, then other fan-in axes, then the axis of blocks. Scales
    # [3, 2, 5] (fan-in 3, blocks 2, out 5) are in the order out, fan-in, blocks: strides (2, 1, 6).
    # Double quantization groups scales by 256 in this order.
    inner = [*fan_in_before, blocks]
    ordered = [axis for axis in range(len(shape)) if axis not in inner] + inner
    step, strides = 1, {}
    for axis in reversed(ordered):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides[axis] for axis in range(len(shape)))


def quantize_scales(node: Quantized) -> Quantized:
    """Quantize the scales of a leaf without stack axes, in their flat order."""
    # Scales [2, 6] with strides (1, 2) are transposed to [6, 2] and flattened to [12] for the
    # codec; the codes are put back into the axes of the scales, [2, 6].
    order = get_flat_order(node.strides)
    flat = jnp.transpose(node.scales, order)
    codes, nested, offset = encode_scales(flat.reshape(-1), node.weight_dtype)
    scales = jnp.transpose(codes.reshape(flat.shape), np.argsort(order).tolist())
    return dataclasses.replace(node, scales=scales, nested=nested, offset=offset)
