"""Hostile index.json of a model in several files."""

import json

import good


def index(where):
    return json.dumps({"weight_map": where}).encode()


BYTES = {
    "nothing": b"",
    "brackets": b"[" * 100_000,
    "objects": b'{"weight_map":' * 50_000,
    "a list": b"[]",
    "no map": b"{}",
    "a map that is a list": b'{"weight_map": [["a", "b"]]}',
    "a map that is a text": b'{"weight_map": "ab"}',
    "numbers for names": b'{"weight_map": {"a": 1}}',
    "lists for names": b'{"weight_map": {"a": ["b"]}}',
    "UTF-16": index({"a": "b"}).decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + index({}),
    "no UTF-8": b'{"weight_map": {"\xff": "a"}}',
    "a key twice": b'{"weight_map": {"a": "b", "a": "c"}}',
    "nothing in it": index({}),
    "a path with NUL": index({"a": "mod\0el.safetensors"}),
    "a lone surrogate": index({"a": "\ud800.safetensors"}),
    "a path out": index({"a": "../model.safetensors"}),
    "the folder above": index({"a": ".."}),
    "the folder": index({"a": "."}),
    "an empty path": index({"a": ""}),
    "the root": index({"a": "/"}),
    "a device": index({"a": "/dev/zero"}),
    "the index itself": index({"a": good.INDEX}),
    "the configuration": index({"a": "config.json"}),
    "a long name": index({"a": "m" * 5000}),
    "a name of 300": index({"a": "m" * 300 + ".safetensors"}),
    "an escape": index({"a": "\x1b[2J.safetensors"}),
    "many files": index({f"a{i}": f"model-{i}.safetensors" for i in range(20_000)}),
    "many names": index({f"a{i}": "model-00001-of-00002.safetensors" for i in range(20_000)}),
    "names that move the cursor": index({"\x1b[2J": "model-00001-of-00002.safetensors"}),
}
CASES = {
    name: (lambda folder, data=data: (folder / good.INDEX).write_bytes(data))
    for name, data in BYTES.items()
}
MAKE, DO = good.shards, [good.load_model, good.inspect, good.merge_model]
