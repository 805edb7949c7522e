"""The header of a GGUF file: its fields and tensors, each claim checked against the file's size.

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

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # type -> code of struct
_STRING, _ARRAY = 8, 9
_MAX_AXES, _KEY_LIMIT, _TEXT_LIMIT = 4, 1000, 1 << 16
# the fewest bytes of a field and of a tensor's description
_MIN_FIELD_BYTES, _MIN_TENSOR_BYTES = 13, 24


class TensorInfo(NamedTuple):
    """Where a tensor lies in the file, and what it is; the shape is NumPy's, rows first."""

    shape: tuple[int, ...]
    type: int
    start: int
    stop: int


class Header(NamedTuple):
    """What a file says: fields that are numbers or texts (None for lists), tensors, all bytes."""

    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray


def read_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> Header:
    """The header of a file, of which only that is read.

    Args:
      path: the file.
      sizes: type of a tensor -> elements and bytes of a block.

    Raises:
      ValueError, OSError: the file is damaged, or of a kind that is not read.
    """
    if not path.is_file():
        raise ValueError("it is not a regular file")
    data = np.memmap(path, mode="r")
    at = _Reader(data.data)
    magic, version = bytes(at.take(4)), at.number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("it does not begin as one, of version 2 or 3, little-endian")
    tensor_count, field_count = at.count(_MIN_TENSOR_BYTES), at.count(_MIN_FIELD_BYTES)
    fields = {}
    for _ in range(field_count):
        key = at.text(_KEY_LIMIT)
        if key in fields:
            raise ValueError(f"the field {key!r} stands twice")
        fields[key] = at.value(at.number("I"))
    infos = [_read_tensor_info(at) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment!r}, expected a power of two")
    start = -(-at.at // alignment) * alignment
    tensors, end = {}, start
    for name, shape, kind, offset in sorted(infos, key=lambda tensor: tensor[3]):
        if kind not in sizes:
            raise ValueError(f"{name!r} is of type {kind}, which is not read")
        elements, width = sizes[kind]
        if name in tensors:
            raise ValueError(f"the tensor {name!r} stands twice")
        if shape[-1] % elements:
            raise ValueError(f"{name!r} of shape {list(shape)} is no whole number of blocks")
        place = TensorInfo(
            shape, kind, start + offset, start + offset + math.prod(shape) // elements * width
        )
        if place.start < end or place.stop > data.size:
            raise ValueError(
                f"{name!r} of shape {list(shape)} does not fit in what the file has for it"
            )
        tensors[name], end = place, place.stop
    return Header(fields, tensors, data)


def _read_tensor_info(at: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of the tensor described at this place."""
    name, ndim = at.text(NAME_LIMIT), at.number("I")
    if not 1 <= ndim <= _MAX_AXES:
        raise ValueError(f"{name!r} has {ndim} axes, expected 1 to {_MAX_AXES}")
    shape = tuple(at.number("Q") for _ in range(ndim))[::-1]
    if 0 in shape:
        raise ValueError(f"{name!r} of shape {list(shape)} has no elements")
    return name, shape, at.number("I"), at.number("Q")


class _Reader:
    """A place in the bytes of a file."""

    def __init__(self, data: memoryview):
        self._data, self.at = data, 0

    def take(self, count: int) -> memoryview:
        """The next bytes, passed over."""
        if count > len(self._data) - self.at:
            raise ValueError(f"it claims {count} bytes at {self.at}, more than it has")
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        """The next number, of a code of `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, least: int) -> int:
        """The next number, which counts things of at least so many bytes."""
        count = self.number("Q")
        if count * least > len(self._data) - self.at:
            raise ValueError(f"it claims {count} items at {self.at}, more than it has bytes for")
        return count

    def text(self, limit: int) -> str:
        """The next text, of printable characters."""
        size = self.count(1)
        if size > limit:
            raise ValueError(
                f"it has a name of {size} bytes at {self.at}, expected at most {limit}"
            )
        text = bytes(self.take(size)).decode()
        if not text.isprintable():
            raise ValueError(f"it has the name {text!r}, which is not printable")
        return text

    def value(self, kind: int) -> Any:
        """The next value; None for a list, or a text that is long, both passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            text = self.take(self.count(1))
            return None if len(text) > _TEXT_LIMIT else bytes(text).decode(errors="replace")
        if kind != _ARRAY:
            raise ValueError(f"it has a field of type {kind}, which is not read")
        item = self.number("I")
        if item == _STRING:
            for _ in range(self.count(8)):
                self.take(self.count(1))
        elif item in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[item]}")
            self.take(width * self.count(width))
        else:
            raise ValueError(f"it has a list of type {item}, which is not read")
        return None
