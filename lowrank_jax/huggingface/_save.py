"""Save a tree of parameters as a model in Hugging Face's format."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax.numpy as jnp

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.shards import open_folder
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import is_node, strip_norms
from lowrank_jax._targeting.plan import Plan
from lowrank_jax.huggingface._folder import (
    is_prequantized,
    read_model_config,
    read_side_files,
    write_model,
)
from lowrank_jax.huggingface._writing import collect_tensors, split_shards, write_in_turn
from lowrank_jax.names import Names


@check_arguments(CheckpointError)
def save(
    folder: str | os.PathLike,
    params: PyTree,
    *,
    names: Names = None,
    plan: Plan | None = None,
    like_folder: str | os.PathLike | None = None,
    max_shard: int = 5 * 10**9,
    dequantize: bool = False,
) -> None:
    """Save a tree of parameters as a folder that transformers loads; `load` is the inverse.

    Names and orientation are torch's; dtypes are those of the leaves. After an error the old model
    is unchanged. A killed process leaves the old model, the new one, or a folder that does not
    load. A lock, released when its process dies, excludes a second writer. With several processes,
    all of them call save; each tensor is gathered, and process 0 writes.

    Args:
      folder: created if missing; a model in it is replaced.
      params: the tree of dense leaves; for an adapted model, the result of lowrank.merge.
      names: leaf -> module, see lowrank.names.parameter; for example lowrank.names.LLAMA.
      plan: the plan of the function that uses params. It gives the axes of kernels with more than
        two axes, if like_folder does not.
      like_folder: the folder that the model was loaded from. Its tensors must have the same names
        and shapes. Configuration, tokenizer and other side files are copied from it, with the dtype
        in config.json set to that of the leaves. Links among them must point to files within
        like_folder, or, in the cache of huggingface_hub, to the repository's blobs. Without
        like_folder only tensors are written.
      max_shard: maximal bytes of tensors in one file; more are split into shards with an index.
      dequantize: write quantized leaves as dense weights.

    Raises:
      CheckpointError: leaves are adapted, quantized, unnamed, or of a dtype that safetensors does
        not have; or they do not fit like_folder. All are listed, and nothing is written. Or a side
        file of like_folder is a link out of it; another process is saving there; or the file
        system failed.

    Source: transformers 5.23, modeling_utils.py; safetensors.

    >>> import tempfile
    >>> params = {"head": {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.zeros(3)}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(folder, params)
    ...     with open_folder(Path(folder)) as tensors:
    ...         {name: (tensors.entry(name).shape, tensors.entry(name).dtype) for name in tensors}
    {'head.bias': ((3,), dtype('float32')), 'head.weight': ((3, 4), dtype(bfloat16))}
    """
    if max_shard < 1:
        raise CheckpointError(f"max_shard is {max_shard} bytes: pass 1 or more")
    leaves = {path: strip_norms(leaf) for path, leaf in flatten(params, is_leaf=is_node)[0]}
    if not leaves:
        raise CheckpointError("params has no leaves: pass the tree of parameters")
    origin = None if like_folder is None else Path(like_folder)
    if origin is not None and is_prequantized(origin, read_model_config(origin)):
        raise CheckpointError(
            f"like_folder is {origin}, whose weights are in 4 bits, but dense weights are written: "
            "pass the folder of the dense model, or none"
        )
    with contextlib.nullcontext() if origin is None else open_folder(origin) as original:
        tensors = collect_tensors(leaves, names, plan, original, dequantize)
    kinds = {
        tensor.dtype for tensor in tensors.values() if jnp.issubdtype(tensor.dtype, jnp.floating)
    }
    dtype = kinds.pop().name if len(kinds) == 1 else None
    side_files = read_side_files(origin, dtype) if origin else {}
    write_in_turn(
        split_shards(tensors, max_shard),
        lambda files: write_model(Path(folder), files, side_files),
    )
