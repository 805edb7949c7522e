"""Hostile GGUF files."""

import struct

import good
from good import gguf_bytes, gguf_text

ARCHITECTURE, HEADS, ALIGNMENT = (
    b"general.architecture", b"llama.attention.head_count", b"general.alignment",
)  # fmt: skip
QUERY = "blk.0.attn_q.weight"


def number(code, value):
    return struct.pack(f"<{code}", value)


def array(kind, count, items=b""):
    return number("I", kind) + number("Q", count) + items


def heads(kind, value):
    return gguf_bytes([(HEADS, kind, value)])


def tensor(name=QUERY, shape=(4, 4), kind=0, offset=0):
    return gguf_bytes(tensors=[(name, shape, kind, offset)])


BYTES = {
    "nothing": b"",
    "four bytes": b"GGUF",
    "another magic": b"GGML" + gguf_bytes()[4:],
    "version 1": b"GGUF" + number("I", 1) + gguf_bytes()[8:],
    "big-endian": b"GGUF" + struct.pack(">I", 3) + gguf_bytes()[8:],
    "2**60 elements": tensor(shape=(1 << 30, 1 << 30)),
    "2**63 elements of one axis": tensor(shape=(1 << 63,)),
    "an overflow to 0": tensor(shape=(1 << 32, 1 << 32)),
    "2**60 tensors": gguf_bytes(counts=(1 << 60, 3)),
    "2**60 fields": gguf_bytes(counts=(2, 1 << 60)),
    "2**63 of both": gguf_bytes(counts=((1 << 64) - 1, (1 << 64) - 1)),
    "a list of 2**60": gguf_bytes([(b"a", 9, array(4, 1 << 60))]),
    "a list of 2**60 texts": gguf_bytes([(b"a", 9, array(8, 1 << 60))]),
    "a list of a million texts": gguf_bytes([(b"a", 9, array(8, 1_000_000))]),
    "a list of a million bytes": gguf_bytes([(b"a", 9, array(0, 1_000_000, bytes(1_000_000)))]),
    "lists in lists": gguf_bytes([(b"a", 9, array(9, 1) * 5000 + array(4, 0))]),
    "a text of 2**60": gguf_bytes([(b"a", 8, number("Q", 1 << 60))]),
    "a key of 2**60": gguf_bytes(counts=(2, 4)),
    "an unknown type": gguf_bytes([(b"a", 77, b"")]),
    "a key that is no UTF-8": gguf_bytes([(b"\xff\xfe", 4, number("I", 1))]),
    "a key with an escape": gguf_bytes([(b"\x1b[2J", 4, number("I", 1))]),
    "no architecture": gguf_bytes().replace(b"general.architecture", b"general.architectura"),
    "an architecture with an escape": gguf_bytes([(ARCHITECTURE, 8, gguf_text(b"\x1b[2J"))]),
    "an architecture of megabytes": gguf_bytes([(ARCHITECTURE, 8, gguf_text(b"x" * 900_000))]),
    "an architecture that is a list": gguf_bytes([(ARCHITECTURE, 9, array(8, 1, gguf_text(b"a")))]),
    "an architecture that is a number": gguf_bytes([(ARCHITECTURE, 4, number("I", 7))]),
    "heads as text": heads(8, gguf_text(b"two")),
    "heads of NaN": heads(6, number("f", float("nan"))),
    "heads of 0": heads(4, number("I", 0)),
    "heads of 2**31": heads(4, number("I", 1 << 31)),
    "heads of -1": heads(5, number("i", -1)),
    "heads of 2**63": heads(10, number("Q", 1 << 63)),
    "heads of a list": heads(9, array(4, 2, bytes(8))),
    "heads of true": heads(7, b"\x01"),
    "heads that do not divide": heads(4, number("I", 3)),
    "an alignment of 0": gguf_bytes([(ALIGNMENT, 4, number("I", 0))]),
    "an alignment of 3": gguf_bytes([(ALIGNMENT, 4, number("I", 3))]),
    "an alignment of 2**31": gguf_bytes([(ALIGNMENT, 4, number("I", 1 << 31))]),
    "an alignment of text": gguf_bytes([(ALIGNMENT, 8, gguf_text(b"32"))]),
    "no axes": tensor(shape=()),
    "five axes": tensor(shape=(1,) * 5),
    "an axis of 0": tensor(shape=(0, 4)),
    "a tensor beyond the end": tensor(offset=1 << 40),
    "an offset that wraps": tensor(offset=(1 << 64) - 32),
    "tensors that overlap": gguf_bytes(tensors=[("a", (4,), 0, 0), ("b", (4,), 0, 8)]),
    "a tensor twice": gguf_bytes(tensors=[("a", (4,), 0, 0), ("a", (4,), 0, 16)]),
    "a type that is none": tensor(kind=200),
    "a type that is not decoded": tensor(shape=(4, 4), kind=26),
    "half a block": tensor(shape=(4, 4), kind=2),
    "an escape in a name": tensor(name="\x1b[2J.weight"),
    "no UTF-8 in a name": tensor(name=b"\xff\xfe"),
    "a name of 5000": tensor(name="m" * 5000),
    "a name without parts": tensor(name="x"),
    "a layer of digits": tensor(name="blk." + "9" * 900 + ".attn_q.weight"),
    "one row": tensor(shape=(16,)),
}
CASES = {
    name: (lambda folder, data=data: (folder / "model.gguf").write_bytes(data))
    for name, data in BYTES.items()
}
MAKE, DO = good.gguf, [good.load_gguf]
