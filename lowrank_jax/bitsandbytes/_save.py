"""Convert Quantized leaves to the tensors that bitsandbytes writes."""

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
    """Convert a Quantized leaf to tensors, byte for byte as bitsandbytes writes them.

    It is the inverse of `from_state_dict`. A leaf made by `quantize` is written as bitsandbytes
    would write the same codes.

    Args:
      node: a leaf in "nf4" or "fp4". A stacked leaf, [L, in, out], is written layer by layer.
      name: the weight tensor's full key, with one "{}" for each stack axis.
      shape: torch's shape. The default is [out, in], the products of the leaf's fan-out and fan-in
        sizes: a kernel [in, heads, dim] is written as [heads * dim, in].
      quant_storage: the dtype in which the bytes of codes are stored: "uint8", "bfloat16",
        "float16" or "float32".

    Returns:
      A dict of NumPy arrays: `name` holds the codes, [(n + 1) // 2, 1] in uint8; others are
      name.absmax, name.quant_map, and so on.

    Raises:
      TreeError: node is not a Quantized leaf.
      ConfigError: the format, dtype or shape is not one that bitsandbytes has.
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
            f"{name} is in format {node.format!r}, which bitsandbytes does not have: quantize the "
            'dense weight with format="nf4" or "fp4"'
        )
    stack = node.scales.shape[: node.stacked]
    if name.count("{}") != len(stack):
        raise AxesError(
            f"the leaf has stack axes of sizes {list(stack)}, and each layer is written as one "
            f"weight: {name!r} needs one '{{}}' for each axis, as in 'layers.{{}}.weight'"
        )
    tensors: dict[str, np.ndarray] = {}
    for index in np.ndindex(*stack):
        one = jax.tree.map(lambda array, index=index: array[index], node)
        key = fill_indices(name, index)
        tensors |= write_state(_build_state(one, key, shape), key, quant_storage)
    return tensors


def _build_state(node: Quantized, name: str, shape: tuple[int, ...] | None) -> QuantState:
    """Convert one leaf, without stack axes, to its QuantState."""
    shape = _infer_torch_shape(node) if shape is None else tuple(shape)
    if math.prod(shape) != node.size:
        raise ConfigError(
            f"{name}: shape {list(shape)} does not have the leaf's {node.size} elements"
        )
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
    """Return codes as packed bytes, and scales, both flat in torch's order; inverse of _arrange."""
    # codes [2, 64, 48], order (1, 0), at = 1: `place + (place >= at)` turns axes of the scales into
    # axes of the codes, (2, 0), so that the transpose is (2, 0, 1): [48, 2, 64], then [6144]
    order, at = find_block_order(node)
    codes = unpack(node.codes, at, node.packing)
    codes = jnp.transpose(codes, (*(place + (place >= at) for place in order), at)).reshape(-1)
    packed = to_bnb_bytes(codes[: node.size + node.size % 2], node.format)
    return packed, jnp.transpose(node.scales, order).reshape(-1)


def _infer_torch_shape(node: Quantized) -> tuple[int, int]:
    """Infer torch's shape, (fan-out size, fan-in size), from the order of blocks."""
    if node.order is not None:
        # A leaf that is stored flat has its axes in torch's order: fan-out, then fan-in, each
        # ascending. order (1, 2, 0) descends at index 2: fan-out (1, 2), fan-in (0,). Without a
        # descent the last axis is fan-in.
        falls = [i for i in range(1, len(node.order)) if node.order[i] < node.order[i - 1]]
        cut = falls[0] if falls else len(node.order) - 1
        return math.prod(node.blocked[:cut]), math.prod(node.blocked[cut:])
    # The last axis is fan-out, and its stride is the number of blocks in one row of torch's weight:
    # 2 for [128, 48], so that fan-in is 2 * 64 = 128, and fan-out 6144 / 128 = 48.
    fan_in = node.strides[-1] * node.block_size if node.trailing else math.prod(node.blocked)
    return node.size // fan_in, fan_in
