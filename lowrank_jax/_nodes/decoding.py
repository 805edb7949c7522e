"""Decoding of quantized leaves: from codes and scales to blocks of floating-point numbers."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from lowrank_jax import _codecs
from lowrank_jax._codecs.packing import get_unpacked_size, unpack, unpack_by_shifts
from lowrank_jax._codecs.scales import SCALE_BLOCK, decode_scales
from lowrank_jax._errors import TreeError
from lowrank_jax._jax.types import Shape
from lowrank_jax._primitives.quantized_dot import PlatformFn


@dataclasses.dataclass(frozen=True)
class Decoding(PlatformFn):
    """Decodes the arrays of a Quantized leaf to blocks, [*leading, blocks, block, *trailing].

    Args:
      format, packing, trailing, strides: as for Quantized.
      casts: dtypes to which the float32 numbers are cast, in order.
      tree: whether scales are looked up by selects instead of a gather.
      gather: whether codes are looked up by a gather instead of selects.
    """

    format: str
    packing: str
    trailing: int
    strides: tuple[int, ...]
    casts: tuple[str, ...]
    tree: bool = False
    gather: bool = False

    @property
    def on_tpu(self) -> Decoding:
        """The decoding without gathers, which are slow on TPU."""
        return dataclasses.replace(self, tree=True)

    @property
    def on_cuda(self) -> Decoding:
        """The decoding that fuses into a sum of products: a select tree is written to memory."""
        return dataclasses.replace(self, gather=True)

    def infer_shape(self, codes_shape: Shape) -> Shape:
        """Return the shape of the blocks that codes of this shape decode to."""
        axis = len(codes_shape) - 1 - self.trailing
        size = codes_shape[axis]
        if _codecs.get_format(self.format).is_packed:
            size = get_unpacked_size(size, self.packing)
        return (*codes_shape[:axis], size, *codes_shape[axis + 1 :])

    def __call__(
        self, codes: jax.Array, scales: jax.Array, table: jax.Array, *second: jax.Array
    ) -> jax.Array:
        # For a leaf [128, 6]: first uint8 scales [2, 6] are decoded to float32 by the second level
        # (nested [1], offset [], map [256]), then packed codes [2, 32, 6] are unpacked to
        # [2, 64, 6], and last each value is multiplied by the scale of its block.
        axis = codes.ndim - 1 - self.trailing
        if second:
            scales = self.scales(scales, *second)
        if _codecs.get_format(self.format).is_packed:
            codes = (unpack_by_shifts if self.gather else unpack)(codes, axis, self.packing)
        out = _codecs.decode_blocks(
            codes, scales, self.format, axis, table=table, gather=self.gather
        )
        for dtype in self.casts:
            out = out.astype(dtype)
        return out

    def scales(
        self, scales: jax.Array, nested: jax.Array, offset: jax.Array, table: jax.Array
    ) -> jax.Array:
        """Decode the scales of each stacked leaf by its second level.

        scales [*stack, ...], nested [*stack, ceil(n / 256)], offset [*stack], table [*stack, 256].
        """
        count = math.prod(scales.shape[nested.ndim - 1 :])
        if -(-count // SCALE_BLOCK) != nested.shape[-1]:
            raise TreeError(
                f"{count} scales with double quantization, but {nested.shape[-1]} blocks of them: "
                "inside shard_map their place in the whole leaf is unknown. Split it along stack "
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


def get_flat_order(strides: tuple[int, ...]) -> list[int]:
    """Return the axes with these strides from the outermost to the innermost of the flat order.

    >>> get_flat_order((1, 2))  # scales [blocks, out], the flat order is out-major
    [1, 0]
    """
    return np.argsort([-stride for stride in strides], stable=True).tolist()
