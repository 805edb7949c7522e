"""Read the two files of an adapter's directory, and write them atomically."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.atomic import replace_files
from lowrank_jax._files.kinds import ADAPTER_CONFIG, describe_other_kind
from lowrank_jax._files.safetensors import write_tensors
from lowrank_jax._files.within import file_within, read_within

CONFIG, TENSORS, PICKLE = (
    ADAPTER_CONFIG,
    "adapter_model.safetensors",
    "adapter_model.bin",
)
CONFIG_LIMIT = 1 << 20


def read_config_bytes(folder: Path) -> bytes:
    """Read the configuration file."""
    _check_exists(folder, CONFIG)
    return read_within(folder, CONFIG, CONFIG_LIMIT)


def find_tensors(folder: Path) -> Path:
    """Return the path of the tensor file."""
    _check_exists(folder, TENSORS)
    return file_within(folder, TENSORS)


def _check_exists(folder: Path, name: str) -> None:
    """Raise an error that explains a missing file."""
    try:
        (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        if name == CONFIG and (other := describe_other_kind(folder, "a PEFT adapter")):
            raise CheckpointError(f"{folder} holds no {CONFIG}: {other}") from error
        pickled = (folder / PICKLE).exists() and name == TENSORS
        raise CheckpointError(
            f"{folder} holds no {name}"
            + (f"; {PICKLE} is a pickle, which is not read for safety" if pickled else "")
            + ": save the adapter again, with peft's save_pretrained or lowrank.peft.save"
        ) from error


def write_folder(folder: Path, config: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Replace both files, or leave them as they were.

    If the process is killed between the two renames, the directory has no configuration, and
    nothing loads it; tensors and configuration of different adapters are never mixed. If the
    configuration does not change, a single rename replaces the adapter.
    """
    text = config.encode()
    writes = {
        TENSORS: lambda file: write_tensors(file, tensors),
        CONFIG: lambda file: file.write(text),
    }
    replace_files(folder, writes, "adapter", entry_points=(CONFIG,))
