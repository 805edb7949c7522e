"""Headers of GGUF files written by hand: read as written, and never beyond the file."""

import struct

import numpy as np
import pytest

from lowrank_jax._files.gguf_header import TensorInfo, read_header

SIZES = {0: (1, 4), 8: (32, 34)}  # type -> elements and bytes of a block: F32, Q8_0


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def number(key, kind, code, value):
    return text(key) + struct.pack(f"<I{code}", kind, value)


def described(name, shape, kind, offset):
    """The description of a tensor; GGUF lists the fastest axis first."""
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + axes + struct.pack("<IQ", kind, offset)


FIELDS = [
    number("general.alignment", 4, "I", 64),
    number("a.float", 6, "f", 0.5),
    number("a.flag", 7, "?", True),
    text("a.name") + struct.pack("<I", 8) + text("tiny"),
    text("a.list") + struct.pack("<IIQ", 9, 5, 3) + struct.pack("<3i", 1, 2, 3),
    text("a.words") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yz"),
]
TENSORS = [described("w", (2, 3), 0, 0), described("q", (2, 32), 8, 64)]
VALUES = np.arange(6, dtype="<f4").tobytes()


def file_of(fields=FIELDS, tensors=TENSORS, version=3, magic=b"GGUF", data=None):
    head = magic + struct.pack("<IQQ", version, len(tensors), len(fields))
    head += b"".join(fields) + b"".join(tensors)
    head += bytes(-len(head) % 64)
    return head + (VALUES.ljust(64, b"\0") + bytes(range(68)) if data is None else data)


def read(tmp_path, data):
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    return read_header(path, SIZES)


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_is_read_as_it_was_written(version, tmp_path):
    header = read(tmp_path, file_of(version=version))
    assert header.fields == {
        "general.alignment": 64, "a.float": 0.5, "a.flag": True, "a.name": "tiny",
        "a.list": None, "a.words": None,
    }  # fmt: skip
    start = len(file_of(data=b""))
    assert header.tensors == {
        "w": TensorInfo((2, 3), 0, start, start + 24),
        "q": TensorInfo((2, 32), 8, start + 64, start + 132),
    }
    info = header.tensors["w"]
    assert header.data[info.start : info.stop].tobytes() == VALUES


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = file_of()
    for end in range(4, len(whole)):
        with pytest.raises(ValueError):
            read(tmp_path, whole[:end])


HUGE = 1 << 60
WRONG = {
    "another magic": (file_of(magic=b"GGML"), "no GGUF header of version 2 or 3"),
    "version 1": (file_of(version=1), "no GGUF header of version 2 or 3"),
    "a field twice": (file_of(fields=FIELDS + FIELDS[1:2]), "field .* is repeated"),
    "a tensor twice": (file_of(tensors=TENSORS[:1] * 2), "tensor 'w' is repeated"),
    "another type": (file_of(tensors=[described("w", (2, 3), 7, 0)]), "of type 7"),
    "part of a block": (file_of(tensors=[described("q", (2, 33), 8, 0)]), "number of blocks"),
    "no elements": (file_of(tensors=[described("w", (0, 3), 0, 0)]), "no elements"),
    "five axes": (file_of(tensors=[described("w", (1,) * 5, 0, 0)]), "5 axes"),
    "beyond the file": (
        file_of(tensors=[described("w", (HUGE, 1), 0, 0)]),
        "overlaps another tensor, or the file's end",
    ),
    "overlapping": (
        file_of(tensors=[described("w", (2, 3), 0, 0), described("v", (2, 3), 0, 8)]),
        "overlaps another tensor, or the file's end",
    ),
    "alignment 0": (file_of(fields=[number("general.alignment", 4, "I", 0)]), "alignment"),
    "alignment 48": (file_of(fields=[number("general.alignment", 4, "I", 48)]), "alignment"),
    "a name that does not print": (file_of(tensors=[described("a\x07", (1,), 0, 0)]), "printable"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_describe_the_file_is_refused(name, tmp_path):
    data, said = WRONG[name]
    with pytest.raises(ValueError, match=said):
        read(tmp_path, data)


@pytest.mark.parametrize("at", [8, 16])
def test_counts_beyond_the_file_are_refused_at_once(at, tmp_path):
    data = bytearray(file_of())
    data[at : at + 8] = struct.pack("<Q", HUGE)
    with pytest.raises(ValueError, match="more than it has bytes for"):
        read(tmp_path, bytes(data))
