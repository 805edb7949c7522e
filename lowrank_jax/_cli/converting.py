"""Convert an adapter between a checkpoint of this library and a PEFT folder."""

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
    """Convert the adapter in source, and write it to target; return the kind of the result.

    Args:
      source: the folder to read, a checkpoint or a PEFT adapter.
      target: the folder to write.
      names: leaf -> module, for a checkpoint, see peft.save. The leaves of a converted PEFT adapter
        are named after its modules: `model/layers/0/self_attn/q_proj/kernel`.

    Raises:
      CheckpointError: source is neither, is damaged, or cannot be converted.
    """
    if source.resolve() == target.resolve():
        raise CheckpointError(f"{target} is the folder to read: pass another to write to")
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
            "names is for a checkpoint's leaves; those of a PEFT adapter are named by its modules"
        )
    _, lora, config = peft.load(source, _build_params(source))
    checkpoint.save(target, lora=lora, config=config)
    return "a checkpoint of lowrank_jax"


def _build_params(folder: Path) -> Any:
    """Return the tree that a PEFT adapter is for, with the leaves that its file has tensors for."""
    # lora_A [r, in], lora_B [out, r]              -> kernel [in, out]
    # lora_embedding_A [r, rows], _B [features, r] -> embedding [rows, features]
    # weight [out, in], fully trained              -> kernel [in, out], or an embedding as it is
    # weight [features], of a norm                 -> scale [features]
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
