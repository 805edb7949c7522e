"""The codes of a file, flat in torch's order, laid out as a Quantized leaf of any axes."""

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
    """The leaf of one weight, of which torch's order is [*fan_out, *fan_in].

    Args:
      state: of the file.
      shape: the leaf's.
      fan_in: the leaf's axes that blocks run along.
      packing: of the codes.
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
    packed: Any,
    scales: Any,
    second: dict[str, Any],
    leaf: Any,
    fan_in: tuple[int, ...],
    quant: QuantConfig,
) -> Quantized:
    """Codes and scales in the flat order of blocks, laid out as `quantize` lays that leaf out."""
    options = {
        key: getattr(quant, key) for key in ("format", "block_size", "double_quant", "packing")
    }
    node = jax.eval_shape(lambda leaf: quantize_array(leaf, fan_in, (), **options), leaf)
    codes = from_bnb_bytes(packed, 2 * packed.size)
    room = scales.size * quant.block_size - codes.size
    codes = jnp.pad(codes, (0, room), constant_values=get_format(quant.format).zero)
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
    """The axes of one leaf's scales, outermost in the flat order first; where codes are cut."""
    return get_flat_order(node.strides), node.codes.ndim - 1 - node.trailing
