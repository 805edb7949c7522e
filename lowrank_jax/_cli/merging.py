"""Merge an adapter into a model's folder, with names that are found where none are given."""

from __future__ import annotations

from pathlib import Path

from lowrank_jax import checkpoint
from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._checks.arguments import path as path_like
from lowrank_jax._cli.converting import refuse_other_kinds
from lowrank_jax._cli.naming import TABLES, choose_names
from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.shards import open_folder
from lowrank_jax.huggingface._merge import check_folders, merge_opened
from lowrank_jax.names import parameter


@check_arguments(CheckpointError, base=path_like, adapter=path_like, out=path_like)
def merge(base: Path, adapter: Path, out: Path, names: str | None = None) -> list[str]:
    """Merge the adapter into the base, write it to out, and return lines that say what was done.

    Args:
      base: folder of a model.
      adapter: folder of a checkpoint or a PEFT adapter.
      out: folder to write to; a model in it is replaced.
      names: how the modules of a checkpoint are named, see choose_names.

    Raises:
      CheckpointError: see huggingface.merge; or out holds something else than a model.
    """
    with open_folder(base) as tensors:  # what is wrong with the base is said before the rest
        refuse_other_kinds(out, "a model")
        if names is None and checkpoint.exists(adapter):
            names = choose_names(checkpoint.restore(adapter).lora, None, base)
        table = None if names is None else TABLES.get(names, lambda path: parameter(path))
        check_folders(base, adapter, out, table)
        changed = merge_opened(tensors, base, adapter, out, table)
    lines = [f"{out}: {len(changed)} tensors of {base} changed by {adapter}"]
    return lines + ([f"modules named by --names {names}"] if names else [])
