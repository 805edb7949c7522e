"""Open an adapter's folder: its configuration, and the tensor file that belongs to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.safetensors import TensorFile
from lowrank_jax.peft._folder import CONFIG, find_tensors, read_config_bytes
from lowrank_jax.peft._parsing import AdapterConfig, parse_config


class OpenAdapter(NamedTuple):
    """An adapter's folder, its checked configuration, and its open tensor file."""

    folder: Path
    config: AdapterConfig
    file: TensorFile


@contextlib.contextmanager
def open_adapter(folder: Path) -> Iterator[OpenAdapter]:
    """Open an adapter's folder, so that each of its files is parsed once.

    Raises:
      CheckpointError: a file is missing or damaged, links out of the folder, or was replaced
        meanwhile.
    """
    text = read_config_bytes(folder)
    config = parse_config(text, str(folder / CONFIG))
    with TensorFile(find_tensors(folder)) as file:
        if read_config_bytes(folder) != text:
            raise CheckpointError(f"{folder} was saved again while it was read: load it again")
        yield OpenAdapter(folder, config, file)
