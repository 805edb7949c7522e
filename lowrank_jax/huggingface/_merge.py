"""Merge an adapter's folder into a model's folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lowrank_jax import checkpoint, peft
from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.shards import Tensors, open_folder
from lowrank_jax._targeting.plan import Plan
from lowrank_jax.huggingface._folder import (
    has_tied_embeddings,
    read_model_config,
    read_side_files,
    refuse_quantized,
    write_model,
)
from lowrank_jax.huggingface._merging import flatten_model, merge_tensors
from lowrank_jax.names import Names
from lowrank_jax.peft._load import load_matched
from lowrank_jax.peft._matching import open_matching


@check_arguments(CheckpointError)
def merge(
    base: str | os.PathLike,
    adapter: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    names: Names = None,
) -> list[str]:
    r"""Merge an adapter into a model's folder, tensor by tensor, without the model's code.

    Computes $W' = W + s\,B A$ in float32, cast once to the dtype of W. DoRA, rank and alpha
    patterns, fully trained modules, biases, trained rows of embeddings, and tied weights are
    supported as in peft.load. Memory holds the adapter and one tensor at a time. The files have the
    names, order and dtypes of base. Whether the adapter was trained on base is not checked: PEFT
    does not record it.

    Args:
      base: the model's folder. Its tensor files may be links; a side file must not be a link out of
        the folder, see like_folder of save.
      adapter: a folder written by PEFT, peft.save or checkpoint.save.
      folder: the folder of the merged model, created if missing; a model in it is replaced.
      names: leaf -> module, for a checkpoint, see peft.save.

    Returns:
      The names of the tensors that changed.

    Raises:
      CheckpointError: the adapter does not fit the model, or cannot be merged. All problems are
        listed, and nothing is written.

    Source: LoRA, arXiv 2106.09685, section 4.1; peft 0.21.2, tuners/lora/layer.py.

    >>> import tempfile
    >>> import lowrank_jax as lowrank
    >>> import jax.numpy as jnp
    >>> from lowrank_jax.huggingface import load, save
    >>> params = {"head": {"kernel": jnp.ones((4, 3))}}
    >>> lora = {"head": {"kernel": lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), scale=0.5)}}
    >>> with tempfile.TemporaryDirectory() as root:
    ...     save(f"{root}/base", params)
    ...     lowrank.peft.save(f"{root}/adapter", lora, lowrank.LoraConfig())
    ...     merge(f"{root}/base", f"{root}/adapter", f"{root}/merged")
    ...     load(f"{root}/merged", params)["head"]["kernel"][0].tolist()
    ['head.weight']
    [2.0, 2.0, 2.0]
    """
    base, adapter, folder = Path(base), Path(adapter), Path(folder)
    check_folders(base, adapter, folder, names)
    with open_folder(base) as tensors:  # what is wrong with the base is said before the rest
        return merge_opened(tensors, base, adapter, folder, names)


def check_folders(base: Path, adapter: Path, folder: Path, names: Names) -> None:
    """Raise CheckpointError if a folder would be overwritten, or if names would be ignored."""
    if folder.resolve() in (base.resolve(), adapter.resolve()):
        raise CheckpointError(f"{folder} is base or adapter: pass another folder to write to")
    if names is not None and not checkpoint.exists(adapter):
        raise CheckpointError(
            f"names is for a checkpoint's leaves, but {adapter} is not a checkpoint: leave it out"
        )


def merge_opened(
    tensors: Tensors, base: Path, adapter: Path, folder: Path, names: Names
) -> list[str]:
    """Merge an adapter into a model whose tensor files are open; see merge."""
    if checkpoint.exists(adapter):
        with tempfile.TemporaryDirectory() as place:
            saved = checkpoint.restore(adapter)
            peft.save(place, saved.lora, saved.config, names=names)
            return merge_opened(tensors, base, Path(place), folder, None)
    config = read_model_config(base)
    refuse_quantized(base, config)
    with open_matching(adapter) as matching:
        found = flatten_model(tensors, matching, has_tied_embeddings(config))
        _, nodes, _ = load_matched(matching, found.leaves, Plan(found.uses), found.names)
    nodes = {key: node for key, node in nodes.items() if node is not None}
    write_model(folder, merge_tensors(tensors, nodes, found), read_side_files(base))
    return sorted(nodes)
