"""The two files of an adapter's directory: read from within it alone, written atomically."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.tensor_file import write_tensors
from lowrank_jax._files.whole_files import flushed, sync

CONFIG, TENSORS, PICKLE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
CONFIG_LIMIT = 1 << 20
_OURS = ".lowrank-"


def read_config(folder: Path) -> bytes:
    """The bytes of the configuration."""
    path = _inside(folder, CONFIG)
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes: no configuration")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} could not be read ({error})") from error


def tensors_path(folder: Path) -> Path:
    """Where the tensors are."""
    return _inside(folder, TENSORS)


def _inside(folder: Path, name: str) -> Path:
    """A regular file of the folder, or of the cache that the folder is a snapshot of."""
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        pickled = (folder / PICKLE).exists() and name == TENSORS
        raise CheckpointError(
            f"{folder} holds no {name}"
            + (f"; {PICKLE} is a pickle, and nothing here unpickles" if pickled else "")
            + ": save the adapter again, with peft's save_pretrained or lowrank.peft.save"
        ) from error
    # the cache of huggingface_hub: models--x/snapshots/REVISION/name -> models--x/blobs/HASH
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if real.parent not in (home, blobs):
        raise CheckpointError(f"{path} is a link out of its directory, to {real}")
    if not real.is_file():
        raise CheckpointError(f"{path} is no regular file")
    return real


def write_folder(folder: Path, config: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Write both files under other names, flush them, and put them in place.

    Between the tensors' coming and the configuration's there is none: a kill leaves an adapter
    that nothing loads, never the tensors of one and the configuration of another. Where the
    configuration stays as it was, one rename decides.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{_OURS}*"):
            stale.unlink()
        text = config.encode()
        with contextlib.ExitStack() as stack:
            model = flushed(folder, _OURS, lambda file: write_tensors(file, tensors), stack)
            about = flushed(folder, _OURS, lambda file: file.write(text), stack)
            same = (folder / CONFIG).is_file() and (folder / CONFIG).read_bytes() == text
            if not same:
                (folder / CONFIG).unlink(missing_ok=True)
                sync(folder)
            os.replace(model, folder / TENSORS)
            sync(folder)
            os.replace(about, folder / CONFIG)
            sync(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written ({error})") from error
