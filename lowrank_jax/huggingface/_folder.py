"""The folder of a model: its configuration, the files beside the tensors, and how it is replaced.

The files are written whole under other names and flushed; then the entry points of the old model
go, and the new files take their places, the new entry points last. A kill leaves the old model, the
new one, or a folder that nothing loads: never a mixture.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.json_text import read_object
from lowrank_jax._files.safetensors import INDEX, SINGLE
from lowrank_jax._files.tensor_file import write_tensors
from lowrank_jax._files.whole_files import flushed, sync

CONFIG, CONFIG_LIMIT = "config.json", 1 << 24
_BESIDE = {".json", ".jinja", ".model", ".txt"}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_NEW = ".lowrank-"


class Lazy:
    """A tensor to be written: its shape and dtype, and how to come by its values."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._read = shape, np.dtype(dtype), read

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """The values."""
        return self._read()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; empty where there is none."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    return read_object(path, CONFIG_LIMIT)


def ties(config: Mapping[str, Any]) -> bool:
    """Whether a configuration lets look-up table and projection share a weight, said or not."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return bool(config) and bool(
        config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True))
    )


def is_prequantized(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether linear weights are in 4 bits, by bitsandbytes; what others quantized is refused."""
    quantization = config.get("quantization_config")
    if not quantization:
        return False
    settings = quantization if isinstance(quantization, dict) else {}
    method = settings.get("quant_method")
    if method == "bitsandbytes" and settings.get("load_in_4bit"):
        return True
    raise CheckpointError(
        f"{folder / CONFIG} says that the model is quantized, by {method!r}"
        + (", and not in 4 bits" if method == "bitsandbytes" else "")
        + ": fetch the model in its dense form"
    )


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model whose tensors are codes."""
    if is_prequantized(folder, config):
        raise CheckpointError(
            f"{folder / CONFIG} says that the model is quantized, by 'bitsandbytes': an adapter is "
            "merged into dense weights; fetch the model in its dense form, or load it "
            "(lowrank.huggingface.load), lowrank.merge, and save"
        )


def beside(folder: Path, dtype: Any = None) -> dict[str, bytes]:
    """Name -> bytes of the files beside the tensors: configuration, tokenizer.

    Args:
      folder: the model's.
      dtype: of the tensors that are to be written, for the configuration to name; None: as it is.
    """
    files = {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in _BESIDE and path.is_file() and not _is_of_tensors(path.name)
    }
    config = read_config(folder)
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and config.get(key, dtype) != dtype:
            config[key] = dtype
            files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    return files


def _is_of_tensors(name: str) -> bool:
    return name.endswith(".index.json") or name.startswith(("adapter_", "."))


def write_model(
    folder: Path, files: Mapping[str, Mapping[str, Any]], beside: Mapping[str, bytes]
) -> None:
    """Write files of tensors, the index if there are several, and what stands beside them.

    Args:
      folder: made where missing; other files in it are left alone.
      files: the file's name -> name -> array, or Lazy.
      beside: the file's name -> its bytes.
    """
    texts = dict(beside)
    config = texts.pop(CONFIG, None)
    if set(files) != {SINGLE}:
        texts[INDEX] = _index(files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{_NEW}*"):
            stale.unlink()
        with contextlib.ExitStack() as stack:
            new = {
                name: flushed(folder, _NEW, lambda file, t=tensors: write_tensors(file, t), stack)
                for name, tensors in files.items()
            }
            new |= {
                name: flushed(folder, _NEW, lambda file, t=text: file.write(t), stack)
                for name, text in texts.items()
            }
            if config is not None:
                new[CONFIG] = flushed(folder, _NEW, lambda file: file.write(config), stack)
            old = [p.name for p in folder.iterdir() if _SHARD.fullmatch(p.name)]
            for name in (CONFIG, SINGLE, INDEX):
                if name != CONFIG or config is not None:
                    (folder / name).unlink(missing_ok=True)
            sync(folder)
            for name in sorted(new, key=lambda name: ({INDEX: 1, CONFIG: 2}.get(name, 0), name)):
                os.replace(new[name], folder / name)
                if name == INDEX:
                    sync(folder)
            for name in set(old) - set(files):
                (folder / name).unlink()
            sync(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written ({error})") from error


def _index(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The index of shards."""
    where = {key: name for name, tensors in files.items() for key in tensors}
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()
