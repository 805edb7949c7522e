"""An adapter in its other form: a checkpoint of this library's <-> a folder of PEFT's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lowrank_jax import checkpoint, peft
from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._checks.arguments import path as path_like
from lowrank_jax._errors import CheckpointError, LowrankError
from lowrank_jax._files.safetensors import TensorFile
from lowrank_jax._jax.paths import to_nested_dict
from lowrank_jax.names import Names
from lowrank_jax.peft._folder import CONFIG, find_tensors
from lowrank_jax.peft._tensors import split_key


@check_arguments(CheckpointError, source=path_like, target=path_like)
def convert(source: Path, target: Path, names: Names = None) -> str:
    """Write the adapter at source in its other form at target; returns what that form is.

    Args:
      source: a folder.
      target: a folder.
      names: leaf -> module, of a checkpoint, as of peft.save. An adapter of PEFT's becomes one of
        leaves called after the modules: `model/layers/0/self_attn/q_proj/kernel`.
    """
    if source.resolve() == target.resolve():
        raise CheckpointError(f"{target} is the folder to read: name another to write to")
    if checkpoint.exists(source):
        saved = checkpoint.restore(source)
        try:
            peft.save(target, saved.lora, saved.config, names=names)
        except LowrankError as error:
            raise CheckpointError(f"{source} could not be converted: {error}") from error
        return "a PEFT adapter"
    if not (source / CONFIG).exists():
        raise CheckpointError(f"{source} holds neither a checkpoint nor {CONFIG}")
    if names is not None:
        raise CheckpointError(
            "names is for a checkpoint's leaves: those of a PEFT adapter are called as its modules"
        )
    _, lora, config = peft.load(source, _build_params(source))
    checkpoint.save(target, lora=lora, config=config)
    return "a checkpoint of lowrank_jax"


def _build_params(folder: Path) -> Any:
    """The tree that an adapter is for, as far as its file tells."""
    leaves: dict[str, Any] = {}
    with TensorFile(find_tensors(folder)) as file:
        entries = {split: e for key, e in file.entries.items() if (split := split_key(key))}
    for (module, part), entry in entries.items():
        last, shape = "bias", entry.shape
        if part == "lora_A.weight":
            last, shape = "kernel", _find_in_out(folder, entries, module, part, "lora_B.weight")
        elif part == "lora_embedding_A":
            last, shape = (
                "embedding",
                _find_in_out(folder, entries, module, part, "lora_embedding_B"),
            )
        elif part == "weight" and len(shape) == 2:
            table = "embed" in module.rpartition(".")[2]
            last, shape = ("embedding", shape) if table else ("kernel", shape[::-1])
        elif part == "weight":
            last = "scale"
        elif part not in ("bias", "base_layer.bias"):
            continue
        path = f"{module.replace('.', '/')}/{last}"
        leaves[path] = jax.ShapeDtypeStruct(shape, entry.dtype)
    try:
        return to_nested_dict(leaves)
    except CheckpointError as error:
        raise CheckpointError(f"the tensors at {folder} make no tree: {error}") from error


def _find_in_out(
    folder: Path, entries: Mapping[tuple[str, str], Any], module: str, a: str, b: str
) -> tuple[int, ...]:
    """[in, out] of a pair of factors."""
    first, second = (getattr(entries.get((module, part)), "shape", ()) for part in (a, b))
    if len(first) > 2:
        raise CheckpointError(
            f"{folder} holds factors of a convolution for {module!r}, whose axes the file does not "
            "tell: load them by lowrank.peft.load(directory, params, plan=plan)"
        )
    return (*first[1:], *second[:1])
