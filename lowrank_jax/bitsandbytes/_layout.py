"""Convert bitsandbytes' codes, which are flat in torch's order, to a Quantized leaf of any axes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._codecs import get_format
from lowrank_jax._codecs.packing import from_bnb_bytes, pack
from lowrank_jax._codecs.scales import DYNAMIC_MAP
from lowrank_jax._nodes.quantized import Quantized, get_flat_order, quantize_array
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax.bitsandbytes._quant_state import QuantState


def to_quantized(
    state: QuantState, shape: tuple[int, ...], fan_in: tuple[int, ...], packing: str
) -> Quantized:
    """Convert one weight, in torch's order [*fan_out, *fan_in], to a Quantized leaf.

    Args:
      state: the weight's codes and scales.
      shape: the leaf's shape.
      fan_in: the leaf's axes that blocks run along.
      packing: the packing of the codes, see QuantConfig.
    """
    quant = QuantConfig(
        format=state.format,
        block_size=state.block_size,
        double_quant=state.second is not None,
        packing=packing,
    )
    leaf = jax.ShapeDtypeStruct(shape, jnp.dtype(state.dtype))
    second: dict[str, Any] = {}
    if state.second is not None:
        nested, offset, own = state.second
        second = {"nested": nested, "offset": offset}
        if own.tobytes() != DYNAMIC_MAP.tobytes():
            second["nested_map"] = own
    return _arrange(state.packed, state.absmax, second, leaf, fan_in, quant)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _arrange(
    packed: jax.Array,
    scales: jax.Array,
    second: dict[str, Any],
    leaf: jax.ShapeDtypeStruct,
    fan_in: tuple[int, ...],
    quant: QuantConfig,
) -> Quantized:
    """Arrange flat codes and scales as `quantize` does for the leaf.

    Args:
      packed: uint8 [(n + 1) // 2], two codes a byte, of n elements.
      scales: float32 or uint8 [blocks].
      second: fields of the second level of quantization.
      leaf: shape and dtype of the dense leaf.
      fan_in: the leaf's axes that blocks run along.
      quant: the format.
    """
    # Leaf [128, 48] (in, out), blocks of 64, flat in torch's order [48, 128]: 96 blocks, of which
    # number 2 * o + i covers out o, in 64 * i to 64 * i + 63. The scales of the leaf are [2, 48]
    # with strides (1, 2): the order, outermost first, is (1, 0), sizes (48, 2), and at = 1.
    #   codes   packed [3072] -> [6144] -> [48, 2, 64] -> transpose (1, 2, 0) -> [2, 64, 48]
    #   scales  [96]          -> [48, 2]               -> transpose (1, 0)    -> [2, 48]
    # If n is not a multiple of 64 the last block is padded with the code of 0.
    options = {
        key: getattr(quant, key) for key in ("format", "block_size", "double_quant", "packing")
    }
    node = jax.eval_shape(lambda leaf: quantize_array(leaf, fan_in, (), **options), leaf)
    codes = from_bnb_bytes(packed, 2 * packed.size)
    padding = scales.size * quant.block_size - codes.size
    codes = jnp.pad(codes, (0, padding), constant_values=get_format(quant.format).zero)
    order, at = find_block_order(node)
    sizes = [node.scales.shape[place] for place in order]
    codes = codes.reshape(*sizes, quant.block_size)
    back = np.argsort(order).tolist()
    codes = jnp.transpose(codes, (*back[:at], len(order), *back[at:]))
    return dataclasses.replace(
        node,
        codes=pack(codes, at, quant.packing),
        scales=jnp.transpose(scales.reshape(sizes), back),
        **second,
    )


def find_block_order(node: Quantized) -> tuple[list[int], int]:
    """Return the axes of the scales, outermost in the flat order first, and codes' element axis."""
    return get_flat_order(node.strides), node.codes.ndim - 1 - node.trailing
