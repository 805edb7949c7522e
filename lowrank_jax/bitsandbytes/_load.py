"""Load 4-bit weights that bitsandbytes wrote, from a state dict or a folder."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import check_arguments, name_text, texts_mapping
from lowrank_jax._errors import AxesError, CheckpointError, list_first_problems
from lowrank_jax._files.shards import open_folder
from lowrank_jax._files.torch_layout import fill_indices
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax.bitsandbytes._layout import to_quantized
from lowrank_jax.bitsandbytes._quant_state import QuantState, read_state
from lowrank_jax.bitsandbytes._tensors import StateTensors, refuse_other_models


@check_arguments(CheckpointError, tensors=texts_mapping, name=name_text)
def from_state_dict(
    tensors: Mapping[str, Any], name: str, *, transpose: bool = True, packing: str = "uint4"
) -> Quantized:
    """Convert a weight in a bitsandbytes state dict to a Quantized leaf.

    Args:
      tensors: name -> NumPy or JAX array: the weight, its quantization state, and any others.
      name: the weight tensor's full key, "model.layers.0.self_attn.q_proj.weight". With "{}" in
        place of the layer's number, all layers become one stacked leaf [L, in, out]; each "{}" is
        one stack axis.
      transpose: swap the last two axes, [out, in] -> [in, out]; False for embeddings, which stay
        [rows, features].
      packing: the packing of the codes, see QuantConfig.

    Returns:
      The leaf as `quantize` would make it, with the codes and scales of the file.

    Raises:
      CheckpointError: a tensor is missing, left over, or not as bitsandbytes writes it.
      AxesError: the weight has one axis.
      ConfigError: the packing is unknown.

    Source: bitsandbytes 0.50.2, nn.Linear4bit and functional.QuantState.

    >>> import lowrank_jax as lowrank
    >>> from lowrank_jax.bitsandbytes import to_state_dict
    >>> params = {"kernel": jnp.linspace(-1, 1, 64 * 3).reshape(64, 3)}
    >>> node = lowrank.quantize(params, lowrank.QuantConfig(targets="kernel"))["kernel"]
    >>> tensors = to_state_dict(node, "layer.weight")
    >>> again = from_state_dict(tensors, "layer.weight")
    >>> again.shape, bool((lowrank.dequantize(again) == lowrank.dequantize(node)).all())
    ((64, 3), True)
    """
    if "{}" not in name:
        return _build_node(read_state(tensors, name), name, transpose, packing)
    pattern = re.compile(re.escape(name).replace(r"\{\}", "(0|[1-9][0-9]{0,17})"))
    found = {tuple(map(int, m.groups())) for key in tensors if (m := pattern.fullmatch(key))}
    if not found:
        raise CheckpointError(f"no tensor matches {name!r} with numbers for '{{}}'")
    sizes = [1 + max(index) for index in zip(*found, strict=True)]
    if count := math.prod(sizes) - len(found):
        missing = (fill_indices(name, i) for i in _iter_indices(sizes) if i not in found)
        raise CheckpointError(
            f"{name!r} cannot be stacked; missing are\n{list_first_problems(missing, count)}"
        )
    names = [fill_indices(name, index) for index in _iter_indices(sizes)]
    nodes = {
        key: from_state_dict(tensors, key, transpose=transpose, packing=packing) for key in names
    }
    kind = lambda node: (jax.tree.structure(node), node.shape)
    if other := [key for key in names if kind(nodes[key]) != kind(nodes[names[0]])]:
        raise CheckpointError(
            f"{name!r} cannot be stacked: {other[0]!r} differs from {names[0]!r} in shape, format "
            "or nested_quant_map; load the layers one by one"
        )
    stacked = lambda *leaves: jnp.stack(leaves).reshape(*sizes, *leaves[0].shape)
    return jax.tree.map(stacked, *nodes.values())


def _iter_indices(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the indices of an array in C order, lazily: np.ndindex fails for huge sizes."""
    if not sizes:
        yield ()
        return
    *outer, last = sizes
    for index in _iter_indices(outer):
        for number in range(last):
            yield (*index, number)


def _build_node(state: QuantState, name: str, transpose: bool, packing: str) -> Quantized:
    """Convert one weight to a leaf."""
    shape, axis = state.shape, len(state.shape) - 1
    if transpose:
        if axis < 1:
            raise AxesError(f"{name} is of shape {list(shape)}: pass transpose=False")
        shape, axis = (*shape[:-2], shape[-1], shape[-2]), axis - 1
    return to_quantized(state, shape, (axis,), packing)


@check_arguments(CheckpointError)
def load(directory: str | os.PathLike, *, packing: str = "uint4") -> dict[str, Any]:
    """Load all tensors of a prequantized model, written by transformers' save_pretrained.

    One tensor is read at a time, so that memory holds the result and that tensor. If the model does
    not fit on a device, load it under `jax.default_device` of a CPU, then place each leaf.

    Args:
      directory: a folder with config.json, and model.safetensors or shards and their index.
      packing: the packing of the codes, see QuantConfig.

    Returns:
      A dict of torch's names: Quantized leaves [in, out] for 4-bit weights, which include their
      quantization state; unchanged NumPy arrays, [out, in], for all others.

    Raises:
      CheckpointError: the folder does not hold a 4-bit bitsandbytes model, or a file, shard or
        tensor is missing, left over or damaged. Nothing is unpickled.
      ConfigError: the packing is unknown.

    Source: transformers 5.23, quantizers/quantizer_bnb_4bit.py; safetensors.

    >>> import json, tempfile
    >>> import lowrank_jax as lowrank
    >>> from safetensors.numpy import save_file
    >>> import numpy as np
    >>> from lowrank_jax.bitsandbytes import to_state_dict
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
                    node = _build_node(tensors.state(name), name, True, packing)
                except AxesError as error:
                    raise CheckpointError(f"{folder} is damaged: {error}") from error
                leaves[name] = jax.block_until_ready(node)  # or the files' arrays pile up
            else:
                leaves[name] = tensors[name]
        return leaves
