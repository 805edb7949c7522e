"""An adapter of PEFT's folded into a model's folder, tensor by tensor, without the model's code.

Each tensor stands for a leaf of torch's own orientation; what the file of the adapter says of it is
what the axes are told from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._files.safetensors import TensorFile
from lowrank_jax._files.shards import Tensors
from lowrank_jax._targeting.plan import Use
from lowrank_jax._trees.adapters import merge
from lowrank_jax.huggingface._folder import LazyTensor
from lowrank_jax.names import Parameter
from lowrank_jax.peft._folder import CONFIG, find_tensors, read_config_bytes
from lowrank_jax.peft._parsing import AdapterConfig, parse_config
from lowrank_jax.peft._tensors import TOKENS, split_key

_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "wpe")


@dataclasses.dataclass
class FlatModel:
    """A model's tensors as the leaves of a tree, and what PEFT needs to be told of them.

    Args:
      leaves: name -> shape and dtype; values where a part of them is kept.
      names, uses: as of peft.load.
      copies: projection -> the look-up table whose weight it shares.
    """

    leaves: dict[str, Any]
    names: dict[str, Parameter]
    uses: dict[str, Use]
    copies: dict[str, str]


@dataclasses.dataclass
class _Adapter:
    """What a file says: module -> part -> shape."""

    config: AdapterConfig
    parts: dict[str, dict[str, tuple[int, ...]]]


def _read_adapter(folder: Path) -> _Adapter:
    """The header of an adapter's file."""
    config = parse_config(read_config_bytes(folder), str(folder / CONFIG))
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    with TensorFile(find_tensors(folder)) as file:
        for key, entry in file.entries.items():
            module, part = split_key(key) or ("", key)
            parts.setdefault(module, {})[part] = entry.shape
    return _Adapter(config, parts)


def flatten_model(tensors: Tensors, adapter_folder: Path, ties: bool) -> FlatModel:
    """The leaves that an adapter may change; ties: as of `matched`."""
    adapter = _read_adapter(adapter_folder)
    prefix = _find_prefix(tensors, adapter)
    found = FlatModel({}, {}, {}, {})
    for key in tensors:
        entry = tensors.entry(key)
        if not jnp.issubdtype(entry.dtype, jnp.floating):
            continue
        module, _, kind = key.rpartition(".")
        name = Parameter(prefix + module if prefix + module in adapter.parts else module, kind)
        parts = adapter.parts.get(name.module, {})
        found.names[key], found.uses[key] = _infer_use(name, entry, parts, adapter.config)
        whole = TOKENS in parts or len(entry.shape) < 2
        leaf = jax.ShapeDtypeStruct(entry.shape, entry.dtype)
        found.leaves[key] = tensors[key] if whole else leaf
    _tie_embeddings(found, tensors, adapter, ties)
    return found


def _find_prefix(tensors: Tensors, adapter: _Adapter) -> str:
    """What the names of a whole model's modules begin with, and those of its base model do not."""
    has = lambda module: f"{module}.weight" in tensors
    for module in adapter.parts:
        head, _, rest = module.partition(".")
        if not has(module) and has(rest):
            return f"{head}."
    return ""


def _infer_use(
    name: Parameter, entry: Any, parts: Mapping[str, tuple[int, ...]], config: AdapterConfig
) -> tuple[Parameter, Use]:
    """How PEFT's modules use a tensor, by what the adapter has for it."""
    shape, ndim = entry.shape, len(entry.shape)
    op, fan_in, fan_out = "other", (), ()
    if name.kind == "weight" and ndim > 1:
        op, fan_in, fan_out = "conv" if ndim > 2 else "dot", tuple(range(1, ndim)), (0,)
        if "lora_embedding_A" in parts or TOKENS in parts:
            op, fan_in, fan_out = "lookup", (0,), (1,)
        a, b = parts.get("lora_A.weight", ()), parts.get("lora_B.weight", ())
        if config["fan_in_fan_out"] and ndim == 2 and (*a[1:], *b[:1]) == shape:
            name = dataclasses.replace(name, fan_in_fan_out=True)  # Conv1D of GPT-2
            fan_in, fan_out = (0,), (1,)
    use = Use(op, fan_in, fan_out, (), shape, entry.dtype, uses=1, lookup=op == "lookup")
    return name, use


def _tie_embeddings(found: FlatModel, tensors: Tensors, adapter: _Adapter, ties: bool) -> None:
    """Make one leaf of a look-up table and the projection that shares its weight."""
    if not ties:
        return
    unknown = sorted(adapter.parts.keys() - {name.module for name in found.names.values()})
    head = unknown[0] if len(unknown) == 1 else "lm_head"
    for key, name in found.names.items():
        if name.kind != "weight" or name.module.rpartition(".")[2] not in _TABLES[:-1]:
            continue
        own = f"{head}.weight"
        if own in tensors and not tensors.are_equal(own, key):
            continue
        if not {name.module, head} & adapter.parts.keys():
            continue
        found.names[key] = dataclasses.replace(name, tied=head)
        found.uses[key] = dataclasses.replace(
            found.uses[key], op="lookup", fan_in=(0,), fan_out=(1,), lookup=True, tied=True
        )
        for part in (found.leaves, found.names, found.uses):
            part.pop(own, None)
        if own in tensors:
            found.copies[own] = key
        return


def merge_tensors(
    tensors: Tensors, nodes: Mapping[str, Any], found: FlatModel
) -> dict[str, dict[str, LazyTensor]]:
    """File -> name -> tensor, in the files that the model has, each merged when it is asked for."""
    files: dict[str, dict[str, LazyTensor]] = {}
    for key in tensors:
        entry, origin = tensors.entry(key), found.copies.get(key, key)
        read = _make_reader(tensors, origin, nodes.get(origin))
        files.setdefault(tensors.file(key), {})[key] = LazyTensor(entry.shape, entry.dtype, read)
    return files


def _make_reader(tensors: Tensors, key: str, node: Any) -> Callable[[], np.ndarray]:
    if node is None:
        return functools.partial(tensors.__getitem__, key)
    return lambda: np.asarray(_merge_tensor(tensors[key], node))


@jax.jit
def _merge_tensor(leaf: Any, node: Any) -> jax.Array:
    """One tensor with its adapter folded in: one program for all of its shape."""
    return merge(leaf, node)
