"""One safetensors file: its header checked before a byte of a tensor is read, and written back.

Eight bytes hold the header's length, then comes the header, JSON, then the tensors without a gap.
Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.json_text import parse_json

HEADER_LIMIT, CHUNK = 1 << 24, 1 << 22
NAME_LIMIT, AXES_LIMIT, _OFFSET_LIMIT = 1000, 32, 1 << 62
_FIELDS = {"dtype", "shape", "data_offsets"}
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(bool),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies in the file's data, and what it is."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    stop: int


class TensorFile:
    """An open file; `entries` tell of every tensor, and `read` brings one of them."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file: BufferedReader = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path} could not be read ({error})") from error
        try:
            self.entries, self._data = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_header(self) -> tuple[dict[str, Entry], int]:
        """The entries, and where the data begin."""
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, HEADER_LIMIT):
            raise self._make_error(f"it has {size} bytes, too few or too many for its header")
        try:
            header = parse_json(self._file.read(length))
        except ValueError as error:
            raise self._make_error(
                f"its header is not JSON as the format has it: {error}"
            ) from error
        if not isinstance(header, dict):
            kind = type(header).__name__
            raise self._make_error(f"its header is not JSON as the format has it: a {kind}")
        self._check_metadata(header.pop("__metadata__", {}))
        entries = {name: self._parse_entry(name, value) for name, value in header.items()}
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != at:
                raise self._make_error(f"there is a gap or an overlap before {_abbreviate(name)}")
            at = entry.stop
        if at != size - 8 - length:
            raise self._make_error(
                f"it holds {size - 8 - length} bytes of data, its header says {at}"
            )
        return entries, 8 + length

    def _check_metadata(self, values: Any) -> None:
        """Refuse what is not a mapping of texts."""
        if not isinstance(values, dict) or any(type(value) is not str for value in values.values()):
            raise self._make_error("its __metadata__ is not an object of texts")

    def _parse_entry(self, name: str, value: Any) -> Entry:
        """One tensor's entry, checked."""
        if len(name) > NAME_LIMIT or not name.isprintable():
            raise self._make_error(
                f"it names a tensor {_abbreviate(name)}, of {len(name)} characters: expected at most "
                f"{NAME_LIMIT}, all of them printable"
            )
        if type(value) is not dict or value.keys() != _FIELDS:
            raise self._make_error(f"its header says {_abbreviate(value)} of {_abbreviate(name)}")
        dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
        known = DTYPES.get(dtype) if type(dtype) is str else None
        if known is None:
            raise self._make_error(
                f"{_abbreviate(name)} is of dtype {_abbreviate(dtype)}, which is not read"
            )
        lists = type(shape) is list and type(place) is list and len(place) == 2
        if not lists or len(shape) > AXES_LIMIT or not _are_natural((*shape, *place)):
            raise self._make_error(f"shape or place of {_abbreviate(name)} are no natural numbers")
        start, stop = place
        if math.prod(shape) * known.itemsize != stop - start:
            raise self._make_error(
                f"{_abbreviate(name)} has another size than its shape {shape} says"
            )
        if (
            start == stop
            and math.prod(size or 1 for size in shape) * known.itemsize >= _OFFSET_LIMIT
        ):
            raise self._make_error(f"{_abbreviate(name)} has the shape {shape}, which no array has")
        return Entry(tuple(shape), known, start, stop)

    def _make_error(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is no safetensors file, or damaged: {why}")

    def read(self, name: str) -> np.ndarray:
        """The tensor of that name, a copy."""
        entry = self.entries[name]
        data = np.empty(entry.stop - entry.start, np.uint8)
        self._file.seek(self._data + entry.start)
        if self._file.readinto(data.data) != data.size:
            raise self._make_error("it became shorter while it was read")
        return data.view(entry.dtype).reshape(entry.shape)

    def iter_chunks(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, a few at a time."""
        entry = self.entries[name]
        for start in range(entry.start, entry.stop, CHUNK):
            self._file.seek(self._data + start)
            yield self._file.read(min(CHUNK, entry.stop - start))


def _are_natural(values: tuple[Any, ...]) -> bool:
    """Whether all are integers from 0 up that an offset may be."""
    return {*map(type, values)} == {int} and min(values) >= 0 and max(values) < _OFFSET_LIMIT


def _abbreviate(value: Any) -> str:
    """The beginning of a value's text, as Python writes it."""
    return repr(value[:200]) if isinstance(value, str) else repr(str(value)[:80])


def write_tensors(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a file as safetensors does for torch: wide dtypes first, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        tensor = tensors[name]
        place = [at, at + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": place}
        at = place[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        file.write(_to_contiguous(tensors[name]).reshape(-1).view(np.uint8).data)


def _to_contiguous(tensor: ArrayLike) -> np.ndarray:
    """The tensor in C order; a transposed matrix is copied in blocks.

    NumPy copies a whole transpose with one cache miss a number: blocks take a third of the time.
    """
    tensor = np.asarray(tensor)
    if tensor.ndim != 2 or tensor.flags.c_contiguous or not tensor.flags.f_contiguous:
        return np.ascontiguousarray(tensor)
    source, copy = tensor.T, np.empty(tensor.shape, tensor.dtype)
    step = 16 if source.shape[1] > 256 else 256
    for start in range(0, len(source), step):
        copy[:, start : start + step] = source[start : start + step].T
    return copy
