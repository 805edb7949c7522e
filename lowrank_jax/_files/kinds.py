"""Tell what a folder holds by the names of its files: a checkpoint, a PEFT adapter, a model."""

from __future__ import annotations

from pathlib import Path

MANIFEST, ADAPTER_CONFIG = "manifest.json", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# file -> what the folder of such a file holds, and what reads it
_READERS = {
    MANIFEST: (
        "a checkpoint of lowrank_jax",
        "lowrank.checkpoint.restore(directory) reads it, and `python -m lowrank_jax convert` makes "
        "a PEFT adapter of it",
    ),
    ADAPTER_CONFIG: ("a PEFT adapter", "lowrank.peft.load(directory, params) reads it"),
    SINGLE: ("a model", "lowrank.huggingface.load(directory, params) reads it"),
    INDEX: ("a model", "lowrank.huggingface.load(directory, params) reads it"),
}


def find_kinds(folder: Path) -> list[str]:
    """List what a folder holds, as far as the names of its files tell.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "manifest.json").touch()
    ...     print(find_kinds(Path(folder)))
    ['a checkpoint of lowrank_jax']
    """
    kinds = [kind for name, (kind, _) in _READERS.items() if (folder / name).is_file()]
    return [*dict.fromkeys(kinds)]


def describe_other_kind(folder: Path, wanted: str) -> str:
    """Say what a folder without `wanted` holds instead, and what reads it; "" if that is unknown.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "adapter_config.json").touch()
    ...     print(describe_other_kind(Path(folder), "a checkpoint"))
    it holds a PEFT adapter, not a checkpoint: lowrank.peft.load(directory, params) reads it
    """
    for name, (kind, reader) in _READERS.items():
        if (folder / name).is_file():
            return f"it holds {kind}, not {wanted}: {reader}"
    return ""
