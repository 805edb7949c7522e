"""Convert an adapter between a checkpoint of this library and a PEFT folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lowrank_jax import checkpoint, peft
from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._checks.arguments import path as path_like
from lowrank_jax._cli.naming import TABLES, choose_names
from lowrank_jax._errors import CheckpointError, LowrankError
from lowrank_jax._files.kinds import find_kinds
from lowrank_jax._files.safetensors import TensorFile
from lowrank_jax._jax.paths import to_nested_dict
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax.peft._folder import CONFIG, find_tensors
from lowrank_jax.peft._load import load_matched
from lowrank_jax.peft._matching import Matching, open_matching
from lowrank_jax.peft._tensors import split_key


@check_arguments(CheckpointError, source=path_like, target=path_like)
def convert(
    source: Path, target: Path, names: str | None = None, base_model: str | None = None
) -> list[str]:
    """Convert the adapter in source, write it to target, and return lines that say what was done.

    Args:
      source: the folder to read, a checkpoint or a PEFT adapter.
      target: the folder to write.
      names: how the modules of a checkpoint are named, see choose_names. The leaves of a converted
        PEFT adapter are named after its modules: `model/layers/0/self_attn/q_proj/kernel`.
      base_model: name or folder of the model that the adapter is for, which PEFT's configuration
        records.

    Raises:
      CheckpointError: source is neither, is damaged, or cannot be converted, or target holds
        something else.
    """
    if source.resolve() == target.resolve():
        raise CheckpointError(f"{target} is the folder to read: pass another to write to")
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a folder: pass a checkpoint or a PEFT adapter")
    if checkpoint.exists(source):
        return _convert_checkpoint(source, target, names, base_model)
    if not (source / CONFIG).exists():
        raise CheckpointError(f"{source} holds neither a checkpoint nor {CONFIG}")
    if names is not None:
        raise CheckpointError(
            "names is for a checkpoint's leaves; those of a PEFT adapter are named by its modules"
        )
    refuse_other_kinds(target, "a checkpoint of lowrank_jax")
    with open_matching(source) as matching:
        _, lora, config = load_matched(matching, _build_params(matching), None, None)
    checkpoint.save(target, lora=lora, config=_with_base_model(config, base_model))
    return [f"{target}: a checkpoint of lowrank_jax, made of {source}"]


def _convert_checkpoint(
    source: Path, target: Path, names: str | None, base_model: str | None
) -> list[str]:
    """Write the checkpoint in source as a PEFT adapter."""
    refuse_other_kinds(target, "a PEFT adapter")
    saved = checkpoint.restore(source)
    config = _with_base_model(saved.config, base_model)
    folder = Path(base_model) if base_model and Path(base_model).is_dir() else None
    try:
        names = choose_names(saved.lora, names, folder)
        peft.save(target, saved.lora, config, names=TABLES.get(names))
    except LowrankError as error:
        raise CheckpointError(f"{source} could not be converted: {error}") from error
    model = config.extras.get("base_model_name_or_path")
    return [
        f"{target}: a PEFT adapter, made of {source}",
        f"modules named by --names {names}, such as {_read_first_module(target)}",
        f"base model: {model or 'not named (--base-model NAME, which AutoPeftModel needs)'}",
    ]


def _with_base_model(config: LoraConfig, name: str | None) -> LoraConfig:
    """Return a configuration that records the name of the base model, if there is one."""
    if name is None:
        return config
    extras = {**config.extras, "base_model_name_or_path": name}
    return dataclasses.replace(config, extras=extras)


def _read_first_module(folder: Path) -> str:
    """Return the name of the first module of a PEFT adapter."""
    with TensorFile(find_tensors(folder)) as file:
        found = next(filter(None, map(split_key, file.entries)), ("", ""))
    return found[0]


def refuse_other_kinds(folder: Path, kind: str) -> None:
    """Raise CheckpointError if a folder to write to holds something else than `kind`."""
    if others := [other for other in find_kinds(folder) if other != kind]:
        raise CheckpointError(
            f"{folder} holds {others[0]}, and {kind} beside it would be a mixture: pass another "
            "folder to write to"
        )


def _build_params(matching: Matching) -> Any:
    """Return the tree that a PEFT adapter is for, with the leaves that its file has tensors for."""
    # lora_A [r, in], lora_B [out, r]              -> kernel [in, out]
    # lora_embedding_A [r, rows], _B [features, r] -> embedding [rows, features]
    # weight [out, in], fully trained              -> kernel [in, out], or an embedding as it is
    # weight [features], of a norm                 -> scale [features]
    leaves: dict[str, Any] = {}
    folder, found = matching.folder, matching.file.entries
    entries = {
        (m, p): found[key] for m, parts in matching.parts.items() for p, key in parts.items()
    }
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
        raise CheckpointError(f"the tensors in {folder} do not form a tree: {error}") from error


def _find_in_out(
    folder: Path, entries: Mapping[tuple[str, str], Any], module: str, a: str, b: str
) -> tuple[int, ...]:
    """Return the (in, out) sizes of a pair of factors."""
    first, second = (getattr(entries.get((module, part)), "shape", ()) for part in (a, b))
    if len(first) > 2:
        raise CheckpointError(
            f"{folder} holds factors of a convolution for {module!r}, whose axes are not in the "
            "file: load them with lowrank.peft.load(directory, params, plan=plan)"
        )
    return (*first[1:], *second[:1])
