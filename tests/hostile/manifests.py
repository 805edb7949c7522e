"""Hostile manifests of checkpoints, sealed as save seals its own."""

import copy
import json

import good

from lowrank_jax.checkpoint._archive import serialize_manifest

DEEP = [0]
for _ in range(300):
    DEEP = [DEEP]
LONG = 10**4000


def changed(place, value):
    """Write the manifest with a value at a place, sealed anew."""

    def write(folder):
        path = folder / "manifest.json"
        body = json.loads(path.read_bytes())
        body.pop("sha256")
        inner = body
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = (
            value(
                copy.deepcopy(inner.get(place[-1]) if isinstance(inner, dict) else inner[place[-1]])
            )
            if callable(value)
            else value
        )
        path.write_bytes(serialize_manifest(body))

    return write


def bytes_of(data):
    return lambda folder: (folder / "manifest.json").write_bytes(data)


patterns = lambda count, value: {f"a{i}": value(i) for i in range(count)}
node = ("lora", 0)
CASES = {
    "nothing": bytes_of(b""),
    "brackets": bytes_of(b"[" * 1_000_000),
    "objects": bytes_of(b'{"a":' * 100_000),
    "UTF-16": bytes_of('{"format": 1}'.encode("utf-16")),
    "no UTF-8": bytes_of(b"\xff\xfe\xfd"),
    "a long integer": bytes_of(b'{"format":' + b"9" * 100_000 + b"}"),
    "a step of text": changed(("step",), "\x1b[2J"),
    "a step of 4000 digits": changed(("step",), LONG),
    "an unknown field": changed(("\x1b[2J",), 1),
    "a folder out": changed(("folder",), "../x"),
    "a folder with NUL": changed(("folder",), "arrays-\0"),
    "a folder that is a list": changed(("folder",), ["x"]),
    "files that are none": changed(("files",), 3),
    "files of nothing": changed(("files",), {}),
    "arrays that are none": changed(("arrays",), 3),
    "arrays that are texts": changed(("arrays",), lambda arrays: dict.fromkeys(arrays, "abc")),
    "arrays of a huge shape": changed(
        ("arrays",), lambda arrays: {k: [[1 << 62] * 4, d, s] for k, (_, d, s) in arrays.items()}
    ),
    "arrays of a negative shape": changed(
        ("arrays",), lambda arrays: {k: [[-1], d, s] for k, (_, d, s) in arrays.items()}
    ),
    "arrays of no dtype": changed(
        ("arrays",),
        lambda arrays: {k: [shape, "\x1b[2J", s] for k, (shape, _, s) in arrays.items()},
    ),
    "arrays of objects": changed(
        ("arrays",), lambda arrays: {k: [shape, "O", s] for k, (shape, _, s) in arrays.items()}
    ),
    "many arrays": changed(
        ("arrays",),
        lambda arrays: arrays | {f"lora/{i}": [[1], "float32", "0"] for i in range(9999)},
    ),
    "no nodes": changed(("lora",), None),
    "nodes that are texts": changed(("lora",), "abc"),
    "a node of no kind": changed((*node, "type"), "Fullest"),
    "a path of numbers": changed((*node, "path"), [1, 2]),
    "a path of a thousand keys": changed((*node, "path"), ["a"] * 1000),
    "a path of long keys": changed((*node, "path"), ["a" * 5000]),
    "a path with an escape": changed((*node, "path"), ["\x1b[2J", "\ud800"]),
    "an empty path": changed((*node, "path"), []),
    "axes of 4000 digits": changed((*node, "static", "fan_in"), [LONG]),
    "axes of a million": changed((*node, "static", "fan_in"), [0] * 100_000),
    "a scale of 1e308": changed((*node, "static", "scale"), 1e308),
    "a configuration that is none": changed(("config",), [1]),
    "a configuration too deep": changed(("config", "targets"), DEEP),
    "extras too deep": changed(("config", "extras"), {"a": DEEP}),
    "a rank of 4000 digits": changed(("config", "rank"), LONG),
    "many ranks and alphas": lambda folder: [
        changed(("config", "rank_pattern"), patterns(10_000, lambda i: i + 1))(folder),
        changed(("config", "alpha_pattern"), patterns(10_000, lambda i: i + 1.0))(folder),
    ],
    "many targets": changed(("config", "targets"), [f"**/a{i}" for i in range(30_000)]),
    "a regex too deep": changed(("config", "targets"), [{"re": "(" * 5000}]),
    "a regex of no flags": changed(("config", "targets"), [{"re": "a", "flags": 128}]),
    "a base that is none": changed(("base",), {"algorithm": "sha256", "leaves": {"a": [3]}}),
    "a base of a huge shape": changed(
        ("base",), {"algorithm": "sha256", "leaves": {"a": [[LONG], "\x1b[2J", "x"]}}
    ),
    "a base by another hash": changed(("base", "algorithm"), "\x1b[2J"),
}
MAKE, DO = good.saved, [good.restore, good.inspect, good.convert]
