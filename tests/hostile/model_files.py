"""Hostile safetensors files and config.json of a model."""

import good
import tensor_files

CONFIGS = {
    "not JSON": b"{",
    "no UTF-8": b'{"a": "\xff"}',
    "a list": b"[1]",
    "brackets": b"[" * 1_000_000,
    "a byte order mark": b"\xef\xbb\xbf{}",
    "sections that are none": b'{"text_config": 3, "quantization_config": [1], "architectures": 5}',
    "a method that is none": b'{"quantization_config": {"quant_method": {"a": [1]}}}',
    "names that move the cursor": b'{"architectures": ["a\\u001b[2Jb"], "model_type": "\\ud800"}',
    "names that are none": b'{"architectures": [[[]], {}, null, 1e999]}',
    "a long integer": b'{"dtype": ' + b"9" * 100_000 + b"}",
    "a type that is none": b'{"dtype": ["x"], "tie_word_embeddings": "no"}',
}
CASES = {
    name: (lambda folder, data=data: (folder / good.SINGLE).write_bytes(data))
    for name, data in tensor_files.BYTES.items()
} | {
    f"a configuration: {name}": (
        lambda folder, data=data: (folder / "config.json").write_bytes(data)
    )
    for name, data in CONFIGS.items()
}
MAKE, DO = good.model, [good.load_model, good.inspect, good.merge_model]
