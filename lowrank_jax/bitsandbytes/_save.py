"""Write 4-bit weights as bitsandbytes does."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import anything, check_arguments, name_text
from lowrank_jax._codecs import FORMATS
from lowrank_jax._codecs.packing import to_bnb_bytes, unpack
from lowrank_jax._codecs.scales import DYNAMIC_MAP
from lowrank_jax._errors import AxesError, ConfigError, TreeError
from lowrank_jax._files.torch_layout import fill_indices
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax.bitsandbytes._layout import find_block_order
from lowrank_jax.bitsandbytes._quant_state import QuantState, write_state


@check_arguments(node=anything, name=name_text)
def to_state_dict(
    node: Quantized,
    name: str,
    *,
    shape: tuple[int, ...] | None = None,
    quant_storage: str = "uint8",
) -> dict[str, Any]:
    """The tensors of a quantized leaf, byte for byte as bitsandbytes writes them.

    What `from_state_dict` read is written as it was; what `quantize` made, as bitsandbytes would
    write the same codes.

    Args:
      node: a leaf in "nf4" or "fp4". A stacked one, [L, in, out], is written layer by layer.
      name: the weight tensor's full key, with one "{}" for each stack axis.
      shape: torch's, if it is not [out, in], the products of the leaf's fan-out and fan-in axes in
        their order: a kernel [in, heads, dim] is written as [heads * dim, in].
      quant_storage: the dtype the bytes of codes are kept in: "uint8", "bfloat16", "float16" or
        "float32".

    Returns:
      NumPy arrays: name -> the codes, [(n + 1) // 2, 1] in uint8, and name.absmax, name.quant_map,
      and so on.

    Raises:
      TreeError: node is no Quantized leaf.
      ConfigError: bitsandbytes has no such format, dtype or shape.
      AxesError: name does not have one "{}" for each stack axis.

    Source: bitsandbytes 0.50.2, nn.Linear4bit and functional.QuantState.

    >>> import lowrank_jax as lowrank
    >>> params = {"kernel": jnp.ones((64, 3))}
    >>> node = lowrank.quantize(params, lowrank.QuantConfig(targets="kernel"))["kernel"]
    >>> tensors = to_state_dict(node, "weight")
    >>> tensors["weight"].shape, tensors["weight.absmax"].shape
    ((96, 1), (3,))
    >>> list(tensors)[2:]
    ['weight.quant_map', 'weight.nested_absmax', 'weight.nested_quant_map',
     'weight.quant_state.bitsandbytes__nf4']
    """
    if not isinstance(node, Quantized):
        raise TreeError(f"{name}: to_state_dict takes a Quantized leaf, not {type(node).__name__}")
    if not FORMATS[node.format].bitsandbytes:
        raise ConfigError(
            f"{name} is in {node.format} blocks, which bitsandbytes has no file for: quantize the "
            'dense weight with format="nf4" or "fp4"'
        )
    stack = node.scales.shape[: node.stacked]
    if name.count("{}") != len(stack):
        raise AxesError(
            f"the leaf has stack axes of sizes {list(stack)}, a file one weight a layer: {name!r} "
            f"needs one '{{}}' for each, as in 'layers.{{}}.weight'"
        )
    tensors: dict[str, np.ndarray] = {}
    for index in np.ndindex(*stack):
        one = jax.tree.map(lambda array, index=index: array[index], node)
        key = fill_indices(name, index)
        tensors |= write_state(_build_state(one, key, shape), key, quant_storage)
    return tensors


def _build_state(node: Quantized, name: str, shape: tuple[int, ...] | None) -> QuantState:
    """What a file says of one leaf."""
    shape = _infer_torch_shape(node) if shape is None else tuple(shape)
    if math.prod(shape) != node.size:
        raise ConfigError(f"{name}: shape {list(shape)} is not of the leaf's {node.size} elements")
    packed, absmax = map(np.asarray, _flatten(node))
    second = None
    if node.nested is not None:
        own = DYNAMIC_MAP.copy() if node.nested_map is None else node.nested_map
        second = np.asarray(node.nested), np.asarray(node.offset), np.asarray(own)
    return QuantState(
        packed, absmax, node.format, node.block_size, node.weight_dtype, shape, second
    )


@jax.jit
def _flatten(node: Quantized) -> tuple[jax.Array, jax.Array]:
    """bitsandbytes' bytes of the codes, and scales, both in the flat order of blocks."""
    order, at = find_block_order(node)
    codes = unpack(node.codes, at, node.packing)
    codes = jnp.transpose(codes, (*(place + (place >= at) for place in order), at)).reshape(-1)
    packed = to_bnb_bytes(codes[: node.size + node.size % 2], node.format)
    return packed, jnp.transpose(node.scales, order).reshape(-1)


def _infer_torch_shape(node: Quantized) -> tuple[int, int]:
    """[fan-out, fan-in], as the flat order has them."""
    if node.order is not None:
        # each of the two groups of axes ascends; where nothing tells, the last axis is fan-in
        falls = [i for i in range(1, len(node.order)) if node.order[i] < node.order[i - 1]]
        cut = falls[0] if falls else len(node.order) - 1
        return math.prod(node.blocked[:cut]), math.prod(node.blocked[cut:])
    # the last axis is fan-out, and its step in the order of blocks is a row of blocks
    fan_in = node.strides[-1] * node.block_size if node.trailing else math.prod(node.blocked)
    return node.size // fan_in, fan_in
