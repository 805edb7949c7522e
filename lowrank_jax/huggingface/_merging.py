"""Merge a PEFT adapter into a model's tensors one by one, without the model's code.

Each tensor is a leaf in torch's orientation; its axes are inferred from the adapter's factors.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._files.safetensors import Entry
from lowrank_jax._files.shards import Tensors
from lowrank_jax._nodes.serialization import Node
from lowrank_jax._targeting.plan import Use
from lowrank_jax._trees.adapters import merge
from lowrank_jax.huggingface._folder import LazyTensor
from lowrank_jax.names import Parameter
from lowrank_jax.peft._matching import Matching
from lowrank_jax.peft._parsing import AdapterConfig
from lowrank_jax.peft._tensors import TOKENS

_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "wpe")


@dataclasses.dataclass
class FlatModel:
    """A model's tensors as the leaves of a flat tree, with the arguments of peft.load.

    Args:
      leaves: tensor name -> ShapeDtypeStruct, or values where the adapter keeps part of them.
      names, uses: tensor name -> Parameter and Use, for `names` and `plan` of peft.load.
      copies: projection's tensor -> the tied embedding's tensor.
    """

    leaves: dict[str, Any]
    names: dict[str, Parameter]
    uses: dict[str, Use]
    copies: dict[str, str]


@dataclasses.dataclass
class _Adapter:
    """An adapter's configuration, and the shapes of its tensors: module -> part -> shape."""

    config: AdapterConfig
    parts: dict[str, dict[str, tuple[int, ...]]]


def flatten_model(tensors: Tensors, matching: Matching, tied: bool) -> FlatModel:
    """Return the tensors that an adapter may change; tied: see match_tensors."""
    shapes = {
        module: {part: matching.shape(key) for part, key in parts.items()}
        for module, parts in matching.parts.items()
    }
    adapter = _Adapter(matching.config, shapes)
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
    _tie_embeddings(found, tensors, adapter, tied)
    return found


def _find_prefix(tensors: Tensors, adapter: _Adapter) -> str:
    """Return the prefix that the adapter's module names have and the model's do not, or ""."""
    has = lambda module: f"{module}.weight" in tensors
    for module in adapter.parts:
        head, _, rest = module.partition(".")
        if not has(module) and has(rest):
            return f"{head}."
    return ""


def _infer_use(
    name: Parameter, entry: Entry, parts: Mapping[str, tuple[int, ...]], config: AdapterConfig
) -> tuple[Parameter, Use]:
    """Infer a tensor's name and use from the factors that the adapter has for it."""
    # Torch's weight is fan_out first. lora_A is [r, in, ..] and lora_B [out, r, ..], so that
    # (*a[1:], *b[:1]) is [in, out]:
    #   weight [48, 32], A [8, 32], B [48, 8]   -> nn.Linear: fan_in (1,), fan_out (0,)
    #   weight [32, 48], A [8, 32], B [48, 8]   -> Conv1D [in, out]: fan_in (0,), fan_out (1,)
    #   weight [64, 3, 3, 3]                    -> convolution OIHW: fan_in (1, 2, 3), fan_out (0,)
    #   weight [1000, 32], with an embedding's  -> look-up [rows, features]: fan_in (0,), ..
    # A square weight matches both first forms: fan_in_fan_out of the adapter's config decides.
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


def _tie_embeddings(found: FlatModel, tensors: Tensors, adapter: _Adapter, tied: bool) -> None:
    """Merge an embedding and the output projection that shares its weight into one leaf."""
    # The projection is the one module of the adapter that the model has no tensor for, or else
    # "lm_head". A file may hold the weight twice: the second is written as a copy of the first.
    if not tied:
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
    """Return file name -> tensor name -> LazyTensor in the model's files, merged on demand."""
    files: dict[str, dict[str, LazyTensor]] = {}
    for key in tensors:
        entry, origin = tensors.entry(key), found.copies.get(key, key)
        read = _make_reader(tensors, origin, nodes.get(origin))
        files.setdefault(tensors.file(key), {})[key] = LazyTensor(entry.shape, entry.dtype, read)
    return files


def _make_reader(tensors: Tensors, key: str, node: Node | None) -> Callable[[], np.ndarray]:
    if node is None:
        return functools.partial(tensors.__getitem__, key)
    return lambda: np.asarray(_merge_tensor(tensors[key], node))


@jax.jit
def _merge_tensor(leaf: jax.typing.ArrayLike, node: Node) -> jax.Array:
    """Merge one tensor with its node; tensors of one shape share a compiled program."""
    return merge(leaf, node)
