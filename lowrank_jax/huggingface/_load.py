"""Load a model in Hugging Face's format into a tree of parameters."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from numpy.typing import DTypeLike

from lowrank_jax._checks.arguments import check_arguments, floating_dtype
from lowrank_jax._errors import CheckpointError, TreeError
from lowrank_jax._files.gguf import SUFFIX, GgufTensors
from lowrank_jax._files.shards import Tensors, open_folder
from lowrank_jax._jax.paths import flatten, unflatten_by_path
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import is_node
from lowrank_jax._nodes.quantized import Axes
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax._trees.quantize import check_quantized, choose_targets, resolve_block_axes
from lowrank_jax._trees.shardings import place_leaf, resolve_shardings
from lowrank_jax.bitsandbytes._tensors import StateTensors
from lowrank_jax.huggingface._folder import (
    has_tied_embeddings,
    is_prequantized,
    read_model_config,
)
from lowrank_jax.huggingface._leaves import TensorMapping
from lowrank_jax.huggingface._matching import is_floating, match_tensors
from lowrank_jax.huggingface._prequantized import find_prequantized
from lowrank_jax.huggingface._reading import check_sharding, read_leaf, read_quantized
from lowrank_jax.names import Names


@check_arguments(CheckpointError, dtype=floating_dtype)
def load(
    folder: str | os.PathLike,
    like: PyTree,
    *,
    names: Names = None,
    quant: QuantConfig | None = None,
    plan: Plan | None = None,
    dtype: Any = None,
    ignore: str | Sequence[str] = (),
    shardings: PyTree = None,
) -> Any:
    """Load a model's folder into a tree of parameters, optionally quantizing it on the way.

    A kernel is weight.T, [in, out]. Kernels with more axes are reshaped, those of convolutions
    transposed from OIHW to HWIO, and layers are stacked where the leaf stacks them. If config.json
    ties the embeddings, an output projection without a tensor of its own is the embedding. All
    names and shapes are checked before a tensor is read. Then one tensor is read at a time, and
    with quant encoded on the host: peak memory is the quantized model and one tensor. Of a sharded
    model, a process reads the layers, and keeps the shards, of its own devices: peak memory is its
    shards and one tensor.

    Args:
      folder: a folder with model.safetensors, or with shards and their index; or a GGUF file of a
        Llama or Qwen2, whose tensors are dequantized to float32 and have Hugging Face's names.
      like: the tree of arrays or jax.ShapeDtypeStructs, such as jax.eval_shape of a model's init.
        It gives the structure, shapes, dtypes, and shardings if it has some.
      names: leaf -> module, see lowrank.names.parameter; for example lowrank.names.LLAMA.
      quant: which leaves to quantize, and how. The result is that of lowrank.quantize. Weights that
        the folder holds in bitsandbytes' 4 bits are Quantized leaves with or without quant, with
        the codes and scales of the file, in quant's packing.
      plan: the plan of the function that uses the parameters. It is needed for quant with
        "all-linear", and for leaves whose fan-in is not their first axis (weights [out, in]).
      dtype: the dtype of floating leaves, in place of like's.
      ignore: a glob, or several, of tensors that may be left over, such as "vision_tower.*".
        Buffers, such as masks and rotary frequencies, are always ignored.
      shardings: a tree of NamedSharding like `like`, or of PartitionSpec within jax.set_mesh, by
        which the result is placed, in place of like's own; an entry at a branch applies to all
        leaves below it.

    Returns:
      The tree with jax.Arrays, and Quantized leaves. A leaf with a value that is not floating, and
      not in the folder, is kept.

    Raises:
      CheckpointError: tensors are missing, unexpected, or of the wrong shape, all of which are
        listed; a file is damaged; or the model is quantized by another method than bitsandbytes'
        in 4 bits, or not as quant says.
      PatternError: a pattern of quant matches no leaf.
      AxesError: the axes of a leaf to quantize are unknown.
      TreeError: like holds a node or a leaf without a dtype; or shardings do not fit like, or would
        split a block.

    Source: transformers 5.23, modeling_utils.py and quantizer_bnb_4bit.py; safetensors.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from lowrank_jax.huggingface import save
    >>> params = {"embed": {"embedding": jnp.ones((5, 4))}, "head": {"kernel": jnp.ones((4, 3))}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params)
    ...     again = load(folder, jax.eval_shape(lambda: params))
    >>> again["head"]["kernel"].shape
    (4, 3)
    """
    folder = Path(folder)
    own = {path: _get_sharding(leaf) for path, leaf in flatten(like)[0]}
    if shardings is not None:
        own = dict(flatten(resolve_shardings(like, shardings))[0])
    with _open_model(folder) as (tensors, tied):
        leaves = _collect_leaves(like, dtype)
        ignored = (ignore,) if isinstance(ignore, str) else ignore
        found = match_tensors(tensors, leaves, names, plan, ignored, tied)
        found.refuse(folder, names)
        blocks = {} if quant is None else _find_block_axes(leaves, found.leaves, quant, plan)
        coded = find_prequantized(found.leaves, tensors, quant, blocks, folder)
        if quant is not None:  # before a tensor is read
            for path in blocks.keys() - coded.keys():
                check_sharding(
                    found.leaves[path], leaves[path].dtype, blocks[path], quant, own[path]
                )
        out, bad = dict(flatten(like)[0]), {}
        if shardings is not None:
            kept = out.keys() - found.leaves.keys()
            out |= {path: place_leaf(out[path], own[path]) for path in kept}
        for path, mapping in found.leaves.items():
            leaf_dtype, sharding = leaves[path].dtype, own[path]
            if path in coded:
                out[path] = coded[path](leaf_dtype, sharding)
            elif quant is not None and path in blocks:
                args = leaf_dtype, blocks[path], quant, sharding
                out[path], bad[path] = read_quantized(tensors, mapping, *args)
            else:
                out[path] = read_leaf(tensors, mapping, leaf_dtype, sharding)
    check_quantized(bad, leaves)
    return unflatten_by_path(like, out)


@contextlib.contextmanager
def _open_model(folder: Path) -> Iterator[tuple[Tensors, bool]]:
    """Open a folder or a GGUF file; yield its tensors, and whether its embeddings are tied."""
    if folder.suffix == SUFFIX and not folder.is_dir():
        if not folder.is_file():  # opening a pipe would block
            raise CheckpointError(f"{folder} does not exist, or is not a regular file")
        tensors = GgufTensors(folder)
        yield tensors, tensors.is_tied
        return
    config = read_model_config(folder)
    prequantized = is_prequantized(folder, config)
    with open_folder(folder) as tensors:
        yield (
            StateTensors(tensors, folder) if prequantized else tensors,
            has_tied_embeddings(config),
        )


def _collect_leaves(like: PyTree, dtype: DTypeLike | None) -> dict[str, Any]:
    """Return path -> leaf of like; floating leaves as ShapeDtypeStructs of the requested dtype."""
    leaves = {}
    for path, leaf in flatten(like, is_leaf=is_node)[0]:
        if is_node(leaf) or not hasattr(leaf, "dtype"):
            raise TreeError(
                f"like holds {type(leaf).__name__} at {path!r}: pass the dense tree of arrays or "
                "jax.ShapeDtypeStructs (jax.eval_shape of the model's init)"
            )
        if is_floating(leaf):
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype)
        leaves[path] = leaf
    return leaves


def _get_sharding(leaf: object) -> Any:
    """Return the sharding of a leaf of like; None if it has none, or is uncommitted."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _find_block_axes(
    leaves: dict[str, Any], found: dict[str, TensorMapping], quant: QuantConfig, plan: Plan | None
) -> dict[str, tuple[Axes, Axes]]:
    """Return path -> (axes that blocks run along, stack axes) of the leaves to quantize."""
    blocks = {}
    for path in choose_targets(leaves, quant, plan):
        layout = found[path].layout
        if plan is None and layout.kind == "dot":
            blocks[path] = layout.fan_in, layout.stack  # inferred from the folder and the names
        else:
            blocks[path] = resolve_block_axes(path, leaves[path], plan)
    return blocks
