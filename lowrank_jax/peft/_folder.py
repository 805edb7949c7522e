"""The two files of an adapter's directory: read from within it alone, written atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.atomic import replace_files
from lowrank_jax._files.safetensors import write_tensors
from lowrank_jax._files.within import file_within, read_within

CONFIG, TENSORS, PICKLE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
CONFIG_LIMIT = 1 << 20


def read_config_bytes(folder: Path) -> bytes:
    """The bytes of the configuration."""
    _check_exists(folder, CONFIG)
    return read_within(folder, CONFIG, CONFIG_LIMIT)


def find_tensors(folder: Path) -> Path:
    """Where the tensors are."""
    _check_exists(folder, TENSORS)
    return file_within(folder, TENSORS)


def _check_exists(folder: Path, name: str) -> None:
    """Say what is the matter where the folder has no such file."""
    try:
        (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        pickled = (folder / PICKLE).exists() and name == TENSORS
        raise CheckpointError(
            f"{folder} holds no {name}"
            + (f"; {PICKLE} is a pickle, and nothing here unpickles" if pickled else "")
            + ": save the adapter again, with peft's save_pretrained or lowrank.peft.save"
        ) from error


def write_folder(folder: Path, config: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Replace both files, or leave them as they were.

    Between the tensors' coming and the configuration's there is none: a kill leaves an adapter
    that nothing loads, never the tensors of one and the configuration of another. Where the
    configuration stays as it was, one rename decides.
    """
    text = config.encode()
    writes = {
        TENSORS: lambda file: write_tensors(file, tensors),
        CONFIG: lambda file: file.write(text),
    }
    replace_files(folder, writes, "adapter", entry_points=(CONFIG,))
