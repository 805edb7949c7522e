"""Read a model of Hugging Face into a tree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from lowrank_jax._checks.arguments import check_arguments, floating_dtype
from lowrank_jax._errors import CheckpointError, TreeError
from lowrank_jax._files.gguf import SUFFIX, GgufTensors
from lowrank_jax._files.shards import Tensors, open_folder
from lowrank_jax._jax.paths import flatten, unflatten_by_path
from lowrank_jax._nodes import is_node
from lowrank_jax._nodes.quantized import Axes
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax._trees.quantize import check_quantized, choose_targets, resolve_block_axes
from lowrank_jax.bitsandbytes._tensors import StateTensors
from lowrank_jax.huggingface._folder import (
    has_tied_embeddings,
    is_prequantized,
    read_model_config,
)
from lowrank_jax.huggingface._leaves import TensorMapping
from lowrank_jax.huggingface._matching import is_floating, match_tensors
from lowrank_jax.huggingface._prequantized import find_prequantized
from lowrank_jax.huggingface._reading import read_leaf, read_quantized
from lowrank_jax.names import Names


@check_arguments(CheckpointError, dtype=floating_dtype)
def load(
    folder: str | os.PathLike,
    like: Any,
    *,
    names: Names = None,
    quant: QuantConfig | None = None,
    plan: Plan | None = None,
    dtype: Any = None,
    ignore: str | Sequence[str] = (),
) -> Any:
    """Read a model's folder into a tree of parameters, quantized as it is read if so wished.

    kernel = weight.T, [in, out]; kernels of more axes are reshaped, those of convolutions OIHW ->
    HWIO; layers that a leaf stacks are stacked; all else is as it is. Where config.json ties the
    two, a projection that the folder has no tensor for is its look-up table. All is checked before
    a tensor is read; then one tensor is read at a time, and with quant encoded on the host, so that
    the peak of memory is the quantized model and that one tensor.

    Args:
      folder: with model.safetensors, or shards and their index; or a GGUF file of a Llama or Qwen2,
        whose tensors are decoded to float32 and named as Hugging Face names them (names.LLAMA).
      like: the tree, of arrays or of jax.ShapeDtypeStruct, as jax.eval_shape of a model's init
        gives it: structure, shapes, dtypes, and shardings where it has them.
      names: leaf -> module, as of lowrank.names.parameter: LLAMA or another table, say.
      quant: the leaves to quantize, and how. The result is that of lowrank.quantize. The weights
        that a folder of bitsandbytes holds in 4 bits come as Quantized leaves with or without it,
        their codes and scales the file's own, in quant's packing.
      plan: of the function that uses the parameters; quant with "all-linear" needs it, and so do
        leaves that are multiplied with from their other side (weights [out, in]).
      dtype: of the floating leaves, in place of like's.
      ignore: a glob, or several, of names of tensors that may be left over, "vision_tower.*" say.
        Buffers, as masks and rotary frequencies are, always may.

    Returns:
      The tree with jax.Arrays, and Quantized leaves. A leaf that is not floating and has a value,
      of which the folder knows nothing, stays as it is.

    Raises:
      CheckpointError: tensors are missing, unexpected, or misshapen: all of them are listed, with
        the leaves' paths. A file is damaged, or the model quantized by another method than
        bitsandbytes' in 4 bits, or otherwise than quant says.
      PatternError, AxesError, TreeError: as of quantize.

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
    leaves = _collect_leaves(like, dtype)
    with _open_model(folder) as (tensors, tied):
        ignored = (ignore,) if isinstance(ignore, str) else ignore
        found = match_tensors(tensors, leaves, names, plan, ignored, tied)
        found.refuse(folder, names)
        blocks = {} if quant is None else _find_block_axes(leaves, found.leaves, quant, plan)
        coded = find_prequantized(found.leaves, tensors, quant, blocks, folder)
        given, bad = dict(flatten(like)[0]), {}
        out = dict(given)
        for path, mapping in found.leaves.items():
            dtype, sharding = leaves[path].dtype, _get_sharding(given[path])
            if path in coded:
                out[path] = coded[path](dtype, sharding)
            elif quant is not None and path in blocks:
                args = dtype, blocks[path], quant, sharding
                out[path], bad[path] = read_quantized(tensors, mapping, *args)
            else:
                out[path] = read_leaf(tensors, mapping, dtype, sharding)
    check_quantized(bad, leaves)
    return unflatten_by_path(like, out)


@contextlib.contextmanager
def _open_model(folder: Path) -> Iterator[tuple[Tensors, bool]]:
    """The tensors of a folder or a GGUF file, and whether a projection may be its look-up table."""
    if folder.suffix == SUFFIX and not folder.is_dir():
        if not folder.is_file():  # opening a pipe would wait for ever
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


def _collect_leaves(like: Any, dtype: Any) -> dict[str, Any]:
    """Path -> leaf of like, the floating ones without values and of the dtype wished for."""
    leaves = {}
    for path, leaf in flatten(like, is_leaf=is_node)[0]:
        if is_node(leaf) or not hasattr(leaf, "dtype"):
            raise TreeError(
                f"like holds {type(leaf).__name__} at {path!r}: give the dense tree, of arrays or "
                "of jax.ShapeDtypeStruct (jax.eval_shape of the model's init)"
            )
        if is_floating(leaf):
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if dtype is None else dtype)
        leaves[path] = leaf
    return leaves


def _get_sharding(leaf: Any) -> Any:
    """Where a leaf of like is to lie, if it says so."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _find_block_axes(
    leaves: dict[str, Any], found: dict[str, TensorMapping], quant: QuantConfig, plan: Plan | None
) -> dict[str, tuple[Axes, Axes]]:
    """Path -> the axes that blocks run along and the stack axes, of the leaves to quantize."""
    blocks = {}
    for path in choose_targets(leaves, quant, plan):
        layout = found[path].layout
        if plan is None and layout.kind == "dot":
            blocks[path] = layout.fan_in, layout.stack  # known from the folder and names
        else:
            blocks[path] = resolve_block_axes(path, leaves[path], plan)
    return blocks
