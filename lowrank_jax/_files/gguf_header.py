"""Parse the header of a GGUF file; each count and offset is validated against the file's size.

Source: ggml, docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowrank_jax._files.safetensors import NAME_LIMIT

# A file is, all little-endian:
#   "GGUF"  version  tensor count  field count
#   per field:   key  type  value           (general.architecture: "llama", ..)
#   per tensor:  name  axis count  sizes  type  offset
#   padding to general.alignment, then the tensors; offsets count from there
# Sizes are fastest axis first: torch's [out, in] is stored as in, out, hence the [::-1] below.
# A row is encoded in blocks: for Q4_0 (32 elements, 18 bytes) a row of 64 takes 36 bytes.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type -> code of struct
_STRING, _ARRAY = 8, 9
_MAX_AXES, _KEY_LIMIT, _TEXT_LIMIT = 4, 1000, 1 << 16
# the minimal bytes of one field and of one tensor's description, which bound their counts
_MIN_FIELD_BYTES, _MIN_TENSOR_BYTES = 13, 24


class TensorInfo(NamedTuple):
    """A tensor's shape (in NumPy's order), ggml type, and byte range [start, stop) in the file."""

    shape: tuple[int, ...]
    type: int
    start: int
    stop: int


class Header(NamedTuple):
    """A file's scalar and string fields (lists are None), tensors, and bytes (memory-mapped)."""

    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray


def read_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> Header:
    """Read the header of a file, and nothing else.

    Args:
      path: the file.
      sizes: ggml type -> elements and bytes of a block.

    Raises:
      ValueError: the file is damaged, or holds a type that is not supported.
      OSError: the file cannot be read.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file")
    data = np.memmap(path, mode="r")
    reader = _Reader(data.data)
    magic, version = bytes(reader.take(4)), reader.read_number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it has no GGUF header of version 2 or 3, little-endian")
    tensor_count = reader.read_count(_MIN_TENSOR_BYTES)
    field_count = reader.read_count(_MIN_FIELD_BYTES)
    fields = {}
    for _ in range(field_count):
        key = reader.read_text(_KEY_LIMIT)
        if key in fields:
            raise ValueError(f"the field {key!r} is repeated")
        fields[key] = reader.read_value(reader.read_number("I"))
    infos = [_read_tensor_info(reader) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}, expected a power of two")
    start = -(-reader.offset // alignment) * alignment
    tensors, end = {}, start
    for name, shape, kind, offset in sorted(infos, key=lambda tensor: tensor[3]):
        if kind not in sizes:
            raise ValueError(f"{name!r} is of type {kind}, which is not supported")
        elements, width = sizes[kind]
        if name in tensors:
            raise ValueError(f"the tensor {name!r} is repeated")
        if shape[-1] % elements:
            raise ValueError(
                f"{name!r} of shape {list(shape)} does not have rows of a whole number of blocks"
            )
        place = TensorInfo(
            shape, kind, start + offset, start + offset + math.prod(shape) // elements * width
        )
        if place.start < end or place.stop > data.size:
            raise ValueError(
                f"{name!r} of shape {list(shape)} overlaps another tensor, or the file's end"
            )
        tensors[name], end = place, place.stop
    return Header(fields, tensors, data)


def _read_tensor_info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Read a tensor's name, shape, ggml type and offset."""
    name, ndim = reader.read_text(NAME_LIMIT), reader.read_number("I")
    if not 1 <= ndim <= _MAX_AXES:
        raise ValueError(f"{name!r} has {ndim} axes, expected 1 to {_MAX_AXES}")
    shape = tuple(reader.read_number("Q") for _ in range(ndim))[::-1]
    if 0 in shape:
        raise ValueError(f"{name!r} of shape {list(shape)} has no elements")
    return name, shape, reader.read_number("I"), reader.read_number("Q")


class _Reader:
    """A cursor in the bytes of a file."""

    def __init__(self, data: memoryview):
        self._data, self.offset = data, 0

    def take(self, count: int) -> memoryview:
        """Return the next bytes and advance."""
        if count > len(self._data) - self.offset:
            raise ValueError(f"it claims {count} bytes at {self.offset}, more than it has")
        self.offset += count
        return self._data[self.offset - count : self.offset]

    def read_number(self, code: str) -> Any:
        """Read a number, given its format character of `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def read_count(self, least: int) -> int:
        """Read a count of items of at least `least` bytes; ValueError if they exceed the file."""
        count = self.read_number("Q")
        if count * least > len(self._data) - self.offset:
            raise ValueError(
                f"it claims {count} items at {self.offset}, more than it has bytes for"
            )
        return count

    def read_text(self, limit: int) -> str:
        """Read a printable string."""
        size = self.read_count(1)
        if size > limit:
            raise ValueError(
                f"it has a name of {size} bytes at {self.offset}, expected at most {limit}"
            )
        text = bytes(self.take(size)).decode()
        if not text.isprintable():
            raise ValueError(f"it has the name {text!r}, which is not printable")
        return text

    def read_value(self, kind: int) -> Any:
        """Read a value; lists and long strings are skipped and returned as None."""
        if kind in _SCALARS:
            return self.read_number(_SCALARS[kind])
        if kind == _STRING:
            text = self.take(self.read_count(1))
            return None if len(text) > _TEXT_LIMIT else bytes(text).decode(errors="replace")
        if kind != _ARRAY:
            raise ValueError(f"it has a field of type {kind}, which is not supported")
        item = self.read_number("I")
        if item == _STRING:
            for _ in range(self.read_count(8)):
                self.take(self.read_count(1))
        elif item in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[item]}")
            self.take(width * self.read_count(width))
        else:
            raise ValueError(f"it has a list of type {item}, which is not supported")
        return None
