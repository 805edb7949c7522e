"""4-bit files of bitsandbytes, both ways and byte for byte.

A torch weight [out, in] comes as a Quantized leaf [in, out], Flax's orientation of a kernel; what
moves is codes, so that nothing is rounded. `load` reads a folder that transformers saved, as it is;
lowrank.huggingface.load reads it into a tree.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import anything, checked, name_text, texts_mapping
from lowrank_jax._codecs import FORMATS
from lowrank_jax._codecs.packing import to_bnb_bytes, unpack
from lowrank_jax._codecs.scales import DYNAMIC_MAP
from lowrank_jax._errors import AxesError, CheckpointError, ConfigError, TreeError, listing_of
from lowrank_jax._files.safetensors import open_folder
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax.bitsandbytes._layout import laid_out, order_of_blocks
from lowrank_jax.bitsandbytes._quant_state import QuantState, read, write
from lowrank_jax.bitsandbytes._tensors import StateTensors, refuse_other_models


@checked(CheckpointError, tensors=texts_mapping, name=name_text)
def from_state_dict(
    tensors: Mapping[str, Any], name: str, *, transpose: bool = True, packing: str = "uint4"
) -> Quantized:
    """The quantized leaf that a state dict of bitsandbytes holds.

    Args:
      tensors: name -> NumPy or JAX array, the weight and the tensors beside it, and any others.
      name: the weight tensor's full key, "model.layers.0.self_attn.q_proj.weight". With "{}" for
        the layer's number, all layers as one stacked leaf [L, in, out]; one "{}" a stack axis.
      transpose: swap the last two axes, [out, in] -> [in, out]; False for look-up tables, which
        stay [rows, features].
      packing: of the codes, as of QuantConfig.

    Returns:
      The leaf that `quantize` would make, with the file's own codes and scales.

    Raises:
      CheckpointError: a tensor is missing, left over, or not as bitsandbytes writes it.
      AxesError: the weight has one axis.
      ConfigError: the packing is unknown.

    Source: bitsandbytes 0.50.2, nn.Linear4bit and functional.QuantState.

    >>> import lowrank_jax as lowrank
    >>> params = {"kernel": jnp.linspace(-1, 1, 64 * 3).reshape(64, 3)}
    >>> node = lowrank.quantize(params, lowrank.QuantConfig(targets="kernel"))["kernel"]
    >>> tensors = to_state_dict(node, "layer.weight")
    >>> again = from_state_dict(tensors, "layer.weight")
    >>> again.shape, bool((lowrank.dequantize(again) == lowrank.dequantize(node)).all())
    ((64, 3), True)
    """
    if "{}" not in name:
        return _node(read(tensors, name), name, transpose, packing)
    pattern = re.compile(re.escape(name).replace(r"\{\}", "(0|[1-9][0-9]{0,17})"))
    found = {tuple(map(int, m.groups())) for key in tensors if (m := pattern.fullmatch(key))}
    if not found:
        raise CheckpointError(f"no tensor is called {name!r} with numbers for '{{}}'")
    sizes = [1 + max(index) for index in zip(*found, strict=True)]
    if count := math.prod(sizes) - len(found):
        missing = (_numbered(name, i) for i in _indices(sizes) if i not in found)
        raise CheckpointError(
            f"{name!r} cannot be stacked; missing are\n{listing_of(missing, count)}"
        )
    names = [_numbered(name, index) for index in _indices(sizes)]
    nodes = {
        key: from_state_dict(tensors, key, transpose=transpose, packing=packing) for key in names
    }
    kind = lambda node: (jax.tree.structure(node), node.shape)
    if other := [key for key in names if kind(nodes[key]) != kind(nodes[names[0]])]:
        raise CheckpointError(
            f"{name!r} cannot be stacked: {other[0]!r} differs from {names[0]!r} in shape, format "
            "or nested_quant_map; load them one by one"
        )
    stacked = lambda *leaves: jnp.stack(leaves).reshape(*sizes, *leaves[0].shape)
    return jax.tree.map(stacked, *nodes.values())


def _numbered(name: str, index: tuple[int, ...]) -> str:
    """The name with numbers for its "{}"."""
    return functools.reduce(lambda text, i: text.replace("{}", str(i), 1), index, name)


def _indices(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The indices of an array in C order, one at a time however many there are."""
    if not sizes:
        yield ()
        return
    *outer, last = sizes
    for index in _indices(outer):
        for number in range(last):
            yield (*index, number)


def _node(state: QuantState, name: str, transpose: bool, packing: str) -> Quantized:
    """The leaf of one weight."""
    shape, axis = state.shape, len(state.shape) - 1
    if transpose:
        if axis < 1:
            raise AxesError(f"{name} is of shape {list(shape)}: pass transpose=False")
        shape, axis = (*shape[:-2], shape[-1], shape[-2]), axis - 1
    return laid_out(state, shape, (axis,), packing)


@checked(node=anything, name=name_text)
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
        key = _numbered(name, index)
        tensors |= write(_state(one, key, shape), key, quant_storage)
    return tensors


def _state(node: Quantized, name: str, shape: tuple[int, ...] | None) -> QuantState:
    """What a file says of one leaf."""
    shape = _torch_shape(node) if shape is None else tuple(shape)
    if math.prod(shape) != node.size:
        raise ConfigError(f"{name}: shape {list(shape)} is not of the leaf's {node.size} elements")
    packed, absmax = map(np.asarray, _flattened(node))
    second = None
    if node.nested is not None:
        own = DYNAMIC_MAP.copy() if node.nested_map is None else node.nested_map
        second = np.asarray(node.nested), np.asarray(node.offset), np.asarray(own)
    return QuantState(
        packed, absmax, node.format, node.block_size, node.weight_dtype, shape, second
    )


@jax.jit
def _flattened(node: Quantized) -> tuple[jax.Array, jax.Array]:
    """bitsandbytes' bytes of the codes, and scales, both in the flat order of blocks."""
    order, at = order_of_blocks(node)
    codes = unpack(node.codes, at, node.packing)
    codes = jnp.transpose(codes, (*(place + (place >= at) for place in order), at)).reshape(-1)
    packed = to_bnb_bytes(codes[: node.size + node.size % 2], node.format)
    return packed, jnp.transpose(node.scales, order).reshape(-1)


def _torch_shape(node: Quantized) -> tuple[int, int]:
    """[fan-out, fan-in], as the flat order has them."""
    if node.order is not None:
        # each of the two groups of axes ascends; where nothing tells, the last axis is fan-in
        falls = [i for i in range(1, len(node.order)) if node.order[i] < node.order[i - 1]]
        cut = falls[0] if falls else len(node.order) - 1
        return math.prod(node.blocked[:cut]), math.prod(node.blocked[cut:])
    # the last axis is fan-out, and its step in the order of blocks is a row of blocks
    fan_in = node.strides[-1] * node.block_size if node.trailing else math.prod(node.blocked)
    return node.size // fan_in, fan_in


@checked(CheckpointError)
def load(directory: str | os.PathLike, *, packing: str = "uint4") -> dict[str, Any]:
    """Every tensor of a prequantized model's folder, as transformers' save_pretrained writes it.

    Each tensor is read on its own, so that beside the result there is one at a time. Where a device
    cannot hold the model, load under `jax.default_device` of a CPU and put each leaf in its place.

    Args:
      directory: with config.json, and model.safetensors or shards and their index.
      packing: of the codes, as of QuantConfig.

    Returns:
      torch's names -> Quantized [in, out] for the weights in 4 bits; NumPy arrays as they are,
      [out, in], for the others. The tensors beside a weight are part of it.

    Raises:
      CheckpointError: the folder is not of a 4-bit bitsandbytes model, or a file, a shard, or a
        tensor is missing, left over or damaged. Nothing is unpickled.
      ConfigError: the packing is unknown.

    Source: transformers 5.23, quantizers/quantizer_bnb_4bit.py; safetensors.

    >>> import json, tempfile
    >>> import lowrank_jax as lowrank
    >>> from safetensors.numpy import save_file
    >>> params = {"kernel": jnp.ones((64, 3))}
    >>> node = lowrank.quantize(params, lowrank.QuantConfig(targets="kernel"))["kernel"]
    >>> config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = Path(directory, "config.json").write_text(json.dumps(config))
    ...     tensors = {**to_state_dict(node, "q_proj.weight"), "q_proj.bias": np.zeros(3)}
    ...     save_file(tensors, Path(directory, "model.safetensors"))
    ...     {name: leaf.shape for name, leaf in load(directory).items()}
    {'q_proj.bias': (3,), 'q_proj.weight': (64, 3)}
    """
    folder = Path(directory)
    refuse_other_models(folder)
    with open_folder(folder) as files:
        tensors = StateTensors(files, folder)
        leaves: dict[str, Any] = {}
        for name in tensors:
            if name in tensors.weights:
                try:
                    node = _node(tensors.state(name), name, True, packing)
                except AxesError as error:
                    raise CheckpointError(f"{folder} is damaged: {error}") from error
                leaves[name] = jax.block_until_ready(node)  # else the files' arrays pile up
            else:
                leaves[name] = tensors[name]
        return leaves
