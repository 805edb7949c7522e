"""Read and write one safetensors file; the header is validated before any tensor is read.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

# Why not the `safetensors` package (0.8). It is not faster: both read 300 MB in about 0.1 s, and
# write them in 1 to 3 s. Its reader accepts a header with duplicate keys, with unknown fields, or
# with control characters in names, which would reach a terminal. Its errors are of four classes
# (AttributeError for float8), and most do not name the file. What it maps stays resident, 286 of
# 300 MB, where `read` here holds one tensor. Its writer for NumPy silently stores wrong numbers for
# an array that is not in C order; a copy beforehand would hold 300 MB of transposed kernels in
# memory twice, where `write_tensors` needs 9 MB.

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

# Layout of a file with one tensor "w", float32 [2, 3]:
#   bytes 0..7     the header's length n, little-endian uint64
#   bytes 8..8+n   {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, JSON
#   the rest       the tensors, contiguous, without gaps; offsets count from 8 + n
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
    """A tensor's shape, dtype, and byte range [start, stop) in the file's data section."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    stop: int


class TensorFile:
    """An open file: `entries` describes all tensors, `read` returns one."""

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
        """Return the entries, validated, and the offset of the data section."""
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, HEADER_LIMIT):
            raise self._make_error(f"it has {size} bytes, too few or too many for its header")
        try:
            header = parse_json(self._file.read(length))
        except ValueError as error:
            raise self._make_error(f"its header is not JSON: {error}") from error
        if not isinstance(header, dict):
            kind = type(header).__name__
            raise self._make_error(f"its header is not a JSON object: a {kind}")
        self._check_metadata(header.pop("__metadata__", {}))
        entries = {name: self._parse_entry(name, value) for name, value in header.items()}
        # Sorted by offset, each tensor must start where the last one stopped. This rules out
        # overlaps, so that the arrays together are never larger than the file.
        at = 0
        for start, stop, name in sorted((e.start, e.stop, name) for name, e in entries.items()):
            if start != at:
                raise self._make_error(f"there is a gap or an overlap before {_abbreviate(name)}")
            at = stop
        if at != size - 8 - length:
            raise self._make_error(
                f"it holds {size - 8 - length} bytes of data, its header says {at}"
            )
        return entries, 8 + length

    def _check_metadata(self, values: object) -> None:
        """Raise unless the metadata is an object of strings."""
        if not isinstance(values, dict) or any(type(value) is not str for value in values.values()):
            raise self._make_error("its __metadata__ is not an object of strings")

    def _parse_entry(self, name: str, value: Any) -> Entry:
        """Validate one tensor's description; a header may have hundreds of thousands of them."""
        if len(name) > NAME_LIMIT or not name.isprintable():
            raise self._make_error(
                f"it names a tensor {_abbreviate(name)}, of {len(name)} characters: expected at "
                f"most {NAME_LIMIT}, all of them printable"
            )
        if type(value) is not dict or value.keys() != _FIELDS:
            raise self._make_error(f"its header has {_abbreviate(value)} for {_abbreviate(name)}")
        dtype, shape, place = value["dtype"], value["shape"], value["data_offsets"]
        known = DTYPES.get(dtype) if type(dtype) is str else None
        if known is None:
            raise self._make_error(
                f"{_abbreviate(name)} is of dtype {_abbreviate(dtype)}, which is not supported"
            )
        lists = type(shape) is list and type(place) is list and len(place) == 2
        if not lists or len(shape) > AXES_LIMIT or not _are_natural(shape + place):
            raise self._make_error(
                f"shape or data_offsets of {_abbreviate(name)} are not lists of natural numbers"
            )
        start, stop = place
        if math.prod(shape) * known.itemsize != stop - start:
            raise self._make_error(
                f"the size of {_abbreviate(name)} does not match its shape {shape}"
            )
        # [2**62, 0] has no bytes in the file, but NumPy refuses it: zeros count as 1 here
        if start == stop and math.prod(filter(None, shape)) * known.itemsize >= _OFFSET_LIMIT:
            raise self._make_error(f"{_abbreviate(name)} has the shape {shape}, too large an array")
        return Entry(tuple(shape), known, start, stop)

    def _make_error(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a safetensors file, or is damaged: {why}")

    def read(self, name: str) -> np.ndarray:
        """Read a tensor into a new array."""
        entry = self.entries[name]
        data = np.empty(entry.stop - entry.start, np.uint8)
        self._file.seek(self._data + entry.start)
        if self._file.readinto(data.data) != data.size:
            raise self._make_error("it became shorter while it was read")
        return data.view(entry.dtype).reshape(entry.shape)

    def iter_chunks(self, name: str) -> Iterator[bytes]:
        """Yield a tensor's bytes in chunks."""
        entry = self.entries[name]
        for start in range(entry.start, entry.stop, CHUNK):
            self._file.seek(self._data + start)
            yield self._file.read(min(CHUNK, entry.stop - start))


def _are_natural(values: list[Any]) -> bool:
    """Whether all values are integers in [0, _OFFSET_LIMIT); bool is rejected."""
    kinds = {*map(type, values)}
    return kinds == {int} and min(values) >= 0 and max(values) < _OFFSET_LIMIT


def _abbreviate(value: object) -> str:
    """Return the beginning of a value's repr."""
    return repr(value[:200]) if isinstance(value, str) else repr(str(value)[:80])


def order_tensors(tensors: Mapping[str, Any]) -> list[str]:
    """Return names in the order of safetensors.torch: by descending item size, then by name.

    Item sizes are powers of two, so that each tensor is aligned to its own item size.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write_tensors(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors in the order of `order_tensors`; each is computed, if it is lazy, once."""
    order = order_tensors(tensors)
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
    """Return the tensor in C order; the transpose of a matrix is copied in blocks.

    NumPy copies a whole transpose with one cache miss per element. Blocks take a third of the time.
    """
    tensor = np.asarray(tensor)
    if tensor.ndim != 2 or tensor.flags.c_contiguous or not tensor.flags.f_contiguous:
        return np.ascontiguousarray(tensor)
    source, copy = tensor.T, np.empty(tensor.shape, tensor.dtype)
    step = 16 if source.shape[1] > 256 else 256
    for start in range(0, len(source), step):
        copy[:, start : start + step] = source[start : start + step].T
    return copy
