"""Read the configuration and side files of a model's folder, and replace a model's files.

config.json, the index and model.safetensors are a model's entry points: they are removed first and
written last, so that a killed process never leaves a mixture of two models that would load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from lowrank_jax._display.text import to_printable
from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.atomic import Write, replace_files
from lowrank_jax._files.hub_config import CONFIG, CONFIG_LIMIT, parse_quantization
from lowrank_jax._files.json_text import read_json_object
from lowrank_jax._files.safetensors import write_tensors
from lowrank_jax._files.shards import INDEX, SINGLE
from lowrank_jax._files.within import read_within

_SIDE_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
_SIDE_LIMIT = 1 << 28
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class LazyTensor:
    """A tensor to be written: shape and dtype are known, values are computed on demand."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._read = shape, np.dtype(dtype), read

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """Compute the values."""
        return self._read()


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read config.json; {} if there is none."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    return read_json_object(path, CONFIG_LIMIT)


def has_tied_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether embedding and output projection share a weight; the default of the key is True."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return bool(config) and bool(
        config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True))
    )


def is_prequantized(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether weights are in bitsandbytes' 4 bits; CheckpointError if quantized otherwise."""
    quantization = parse_quantization(config)
    if quantization is None:
        return False
    if quantization.is_bitsandbytes and quantization.is_4bit:
        return True
    raise CheckpointError(
        f"{folder / CONFIG} says that the model is quantized, by {quantization.method!r}"
        + (", and not in 4 bits" if quantization.is_bitsandbytes else "")
        + ": fetch the model in its dense form"
    )


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a model is quantized."""
    if is_prequantized(folder, config):
        raise CheckpointError(
            f"{folder / CONFIG} says that the model is quantized, by 'bitsandbytes': an adapter is "
            "merged into dense weights; fetch the model in its dense form, or load it "
            "(lowrank.huggingface.load), lowrank.merge, and save"
        )


def read_side_files(folder: Path, dtype: str | None = None) -> dict[str, bytes]:
    """Return name -> bytes of the files beside the tensors: configuration, tokenizer.

    Folders are skipped. A link out of the folder is an error, since its target would be copied.

    Args:
      folder: the model's folder.
      dtype: the dtype to write to the configuration, or None to leave it unchanged.
    """
    files = {
        path.name: read_within(folder, path.name, _SIDE_LIMIT)
        for path in sorted(folder.iterdir())
        if path.suffix in _SIDE_SUFFIXES and not path.is_dir() and not _is_tensor_file(path.name)
    }
    config = read_model_config(folder)
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and config.get(key, dtype) != dtype:
            config[key] = dtype
            files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def _is_tensor_file(name: str) -> bool:
    """Whether a side file belongs to the tensors, or to an adapter, and is not copied."""
    return name.endswith(".index.json") or name.startswith(("adapter_", "."))


def write_model(
    folder: Path, files: Mapping[str, Mapping[str, Any]], side_files: Mapping[str, bytes]
) -> None:
    """Write tensor files, their index if there are several, and side files.

    Args:
      folder: created if missing; other files in it are left alone.
      files: file name -> tensor name -> array or LazyTensor.
      side_files: file name -> bytes.
    """
    texts = dict(side_files)
    if set(files) != {SINGLE}:
        texts[INDEX] = _build_index(files)
    if taken := sorted(name for name in files if not _is_shard_name(name)):
        raise CheckpointError(
            f"a tensor file would be named '{to_printable(taken[0])}': an index must name files "
            "that end in .safetensors"
        )
    writes: dict[str, Write] = {
        name: lambda file, t=tensors: write_tensors(file, t) for name, tensors in files.items()
    }
    writes |= {name: lambda file, t=text: file.write(t) for name, text in texts.items()}
    replace_files(
        folder,
        writes,
        "model",
        entry_points=(CONFIG, INDEX, SINGLE),
        obsolete=lambda name: name in (SINGLE, INDEX) or bool(_SHARD.fullmatch(name)),
    )


def _is_shard_name(name: str) -> bool:
    """Whether a name is valid for a tensor file, and cannot be that of an adapter's file."""
    return name.endswith(".safetensors") and not name.startswith((".", "adapter_"))


def _build_index(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the text of the index: tensor name -> file name."""
    where = {key: name for name, tensors in files.items() for key in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
