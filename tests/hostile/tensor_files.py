"""Hostile safetensors files, as an adapter's and as a model's."""

import json
import struct

import good

KEY = f"base_model.model.{good.LAYER}.lora_A.weight"


def packed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(1,), start=0, stop=4, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def factors(a, b, name=good.LAYER):
    """An adapter's two factors, of zeros."""
    size = lambda shape: 4 * max(0, shape[0] * shape[-1] if len(shape) > 1 else sum(shape) or 1)
    one, two = size(a), size(b)
    header = {
        f"base_model.model.{name}.lora_A.weight": entry(a, 0, one),
        f"base_model.model.{name}.lora_B.weight": entry(b, one, one + two),
    }
    return packed(header, bytes(one + two))


def many(count, name=lambda i: f"base_model.model.l.{i}.q.lora_A.weight"):
    return packed({name(i): entry((0,), 0, 0) for i in range(count)})


HUGE = 4611686018427387903
BYTES = {
    "nothing": b"",
    "one byte": b"\x01",
    "a length alone": struct.pack("<Q", 1 << 63),
    "an empty object": packed(b"{}"),
    "UTF-16": packed(json.dumps({KEY: entry()}).encode("utf-16"), bytes(4)),
    "a byte order mark": packed(b"\xef\xbb\xbf" + json.dumps({KEY: entry()}).encode(), bytes(4)),
    "no UTF-8": packed(b'{"\xff\xfe":1}'),
    "brackets": packed(b"[" * 500_000),
    "objects": packed(b'{"a":' * 100_000),
    "lists of lists": packed(b"[" + b"[]," * 300_000 + b"[]]"),
    "a long integer": packed(b'{"a":' + b"9" * 100_000 + b"}"),
    "NaN": packed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'),
    "infinite": packed(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'),
    "negative": packed({KEY: entry((1,), -4, 0)}),
    "backwards": packed({KEY: entry((1,), 4, 0)}, bytes(4)),
    "an overlap": packed({KEY: entry((2,), 0, 8), "b": entry((2,), 4, 12)}, bytes(12)),
    "a product that overflows": packed({KEY: entry((HUGE, HUGE), 0, 4)}, bytes(4)),
    "a product that is 0 after it overflows": packed({KEY: entry((1 << 32, 1 << 32), 0, 0)}),
    "no elements of a huge shape": packed({KEY: entry((0, HUGE), 0, 0)}),
    "33 axes": packed({KEY: entry((1,) * 33, 0, 4)}, bytes(4)),
    "32 axes": packed({KEY: entry((1,) * 32, 0, 4)}, bytes(4)),
    "a key twice": packed(b'{"a":1,"a":2}'),
    "metadata that is none": packed({"__metadata__": [1], KEY: entry()}, bytes(4)),
    "a name with an escape": packed({"base_model.model.\x1b[2J.lora_A.weight": entry()}, bytes(4)),
    "a name with a line break": packed({"base_model.model.a\nb.lora_A.weight": entry()}, bytes(4)),
    "a name with NUL": packed({"base_model.model.a\0b.lora_A.weight": entry()}, bytes(4)),
    "a lone surrogate": packed({"base_model.model.\ud800.lora_A.weight": entry()}, bytes(4)),
    "a name turned around": packed({"base_model.model.\u202ex.lora_A.weight": entry()}, bytes(4)),
    "an empty name": packed({"": entry()}, bytes(4)),
    "a prefix alone": packed({"base_model.model.": entry()}, bytes(4)),
    "names of 300": factors((2, 4), (3, 2), "m" * 300),
    "names of 900 in parts": factors((2, 4), (3, 2), ".".join("m" * 420)),
    "names of 5000": factors((2, 4), (3, 2), "m" * 5000),
    "a name of slashes": factors((2, 4), (3, 2), "/".join("abc")),
    "a name of only slashes": factors((2, 4), (3, 2), "//"),
    "a name of dots": factors((2, 4), (3, 2), "..a.."),
    "a name up and out": factors((2, 4), (3, 2), "../../x"),
    "a name with braces": factors((2, 4), (3, 2), "l.{}.q"),
    "a leaf and a branch": packed(
        {
            "base_model.model.a.weight": entry((1,), 0, 4),
            "base_model.model.a.weight.scale": entry((1,), 4, 8),
            "base_model.model.a.scale.b.weight": entry((1,), 8, 12),
        },
        bytes(12),
    ),
    "factors without axes": factors((), ()),
    "factors of one axis": factors((2,), (2,)),
    "factors of rank 0": factors((0, 4), (3, 0)),
    "factors of other ranks": factors((2, 4), (3, 5)),
    "factors of no features": factors((2, 0), (0, 2)),
    "factors of integers": packed({KEY: entry((2, 4), 0, 8, "U8")}, bytes(8)),
    "one factor": packed({KEY: entry((2, 4), 0, 32)}, bytes(32)),
    "a number of a billion": factors((2, 4), (3, 2), "l.1000000000.q"),
    "a number of digits": factors((2, 4), (3, 2), "model.layers." + "9" * 900 + ".q"),
    "many tensors": many(3000),
    "many that are none": many(3000, lambda i: f"x{i}"),
    "many alike": many(3000, lambda i: "base_model.model." + "a" * 150 + f"{i}.lora_A.weight"),
    "many states": many(2000, lambda i: f"l.{i}.weight.quant_state.bitsandbytes__nf4"),
}
CASES = {
    name: (lambda folder, data=data: (folder / good.ADAPTER).write_bytes(data))
    for name, data in BYTES.items()
}
MAKE, DO = good.adapter, [good.load_adapter, good.inspect, good.merge_adapter, good.convert]
