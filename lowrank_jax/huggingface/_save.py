"""Write a tree as a model of Hugging Face."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.shards import open_folder
from lowrank_jax._jax.paths import flatten
from lowrank_jax._nodes import is_node, strip_norms
from lowrank_jax._targeting.plan import Plan
from lowrank_jax.huggingface._folder import (
    is_prequantized,
    read_model_config,
    read_side_files,
    write_model,
)
from lowrank_jax.huggingface._writing import collect_tensors, split_shards
from lowrank_jax.names import Names


@check_arguments(CheckpointError)
def save(
    folder: str | os.PathLike,
    params: Any,
    *,
    names: Names = None,
    plan: Plan | None = None,
    like_folder: str | os.PathLike | None = None,
    max_shard: int = 5 * 10**9,
    dequantize: bool = False,
) -> None:
    """Write a tree of parameters as a folder that transformers loads; `load` brings the same back.

    Names and orientation are torch's, dtypes the leaves' own. What fails leaves the old model; what
    is killed the old one, the new one, or a folder that nothing loads. A lock, which dies with its
    process, keeps a second writer out.

    Args:
      folder: made where missing; the model in it is replaced.
      params: dense leaves; of an adapted model, what lowrank.merge returns.
      names: leaf -> module, as of lowrank.names.parameter: LLAMA or another table, say.
      plan: of the function that uses params; tells the axes of kernels of more than two, where
        like_folder does not.
      like_folder: the folder that the model came from. Shapes must be its own, and each of its
        tensors must have a leaf; configuration, tokenizer and the like are copied from it, the
        dtype in config.json set to that of the leaves. A link among them must lead to a file within
        like_folder, or, in the cache of huggingface_hub, to the blobs of the same repository.
        Without like_folder there are tensors alone.
      max_shard: bytes of tensors in one file; above, there are several and an index.
      dequantize: write quantized leaves as the dense weights that they stand for.

    Raises:
      CheckpointError: leaves are adapted, quantized, without a name or of a dtype that the files
        have not; or they do not fit like_folder. All of them are listed, and nothing is written.
        A file beside the tensors of like_folder is a link out of it, another process is saving
        there, or the file system refused.

    Source: transformers 5.23, modeling_utils.py; safetensors.

    >>> import tempfile
    >>> params = {"head": {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.zeros(3)}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params)
    ...     with open_folder(Path(folder)) as tensors:
    ...         {name: (tensors.entry(name).shape, tensors.entry(name).dtype) for name in tensors}
    {'head.bias': ((3,), dtype('float32')), 'head.weight': ((3, 4), dtype(bfloat16))}
    """
    if jax.process_count() > 1:
        raise CheckpointError("save works in a program of one process; this one has several")
    if max_shard < 1:
        raise CheckpointError(f"max_shard is {max_shard} bytes: pass 1 or more")
    leaves = {path: strip_norms(leaf) for path, leaf in flatten(params, is_leaf=is_node)[0]}
    if not leaves:
        raise CheckpointError("params has no leaves: pass the tree of the model's parameters")
    origin = None if like_folder is None else Path(like_folder)
    if origin is not None and is_prequantized(origin, read_model_config(origin)):
        raise CheckpointError(
            f"like_folder is {origin}, whose weights are in 4 bits, and what is written is dense: "
            "name the folder of the dense model, or none"
        )
    with contextlib.nullcontext() if origin is None else open_folder(origin) as original:
        tensors = collect_tensors(leaves, names, plan, original, dequantize)
    kinds = {
        tensor.dtype for tensor in tensors.values() if jnp.issubdtype(tensor.dtype, jnp.floating)
    }
    dtype = kinds.pop().name if len(kinds) == 1 else None
    write_model(
        Path(folder),
        split_shards(tensors, max_shard),
        read_side_files(origin, dtype) if origin else {},
    )
