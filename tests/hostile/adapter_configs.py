"""Hostile adapter_config.json."""

import json

import good

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q_proj"]}
NAME = "q_proj"


def config(**fields):
    return json.dumps({**LORA, **fields}).encode()


BYTES = {
    "nothing": b"",
    "brackets": b"[" * 1_000_000,
    "objects": b'{"a":' * 100_000,
    "deep extras": config(eva_config=None).replace(b"null", b"[" * 900 + b"]" * 900),
    "extras too deep": config(corda_config=None).replace(b"null", b"[" * 200 + b"]" * 200),
    "UTF-16": config().decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + config(),
    "no UTF-8": config().replace(b"q_proj", b"\xff"),
    "NaN": config(lora_alpha=float("nan")),
    "extras of NaN": config(lora_dropout=float("nan")),
    "a long integer": config().replace(b"2,", b"9" * 5000 + b","),
    "an integer of 4000 digits": config().replace(b"2,", b"9" * 4000 + b","),
    "a float beyond floats": config().replace(b"2,", b"1e999,"),
    "a key twice": config().replace(b'"r": 2', b'"r": 2, "r": 3'),
    "optional letters": config(target_modules="a?" * 60 + "a" * 60 + "b"),
    "optional characters": config(target_modules=".?" * 40 + "." * 25 + "!"),
    "alternatives alike": config(target_modules="(a|a)*" * 60 + "b"),
    "ranks of alternatives": config(rank_pattern={"(a|a|a?)*b": 3}),
    "a group too deep": config(target_modules="(" * 5000 + ")" * 5000),
    "ranks of a group too deep": config(rank_pattern={"(" * 5000: 3}),
    "repeats of repeats": config(alpha_pattern={"((a{1000}){1000}){1000}": 3}),
    "many names": config(rank_pattern={f"l.{i}.q": 3 for i in range(40_000)}),
    "many patterns": config(rank_pattern={f"l.{i}.(q|v)": 3 for i in range(20_000)}),
    "many modules": config(target_modules=[f"m{i}" for i in range(60_000)]),
    "many saved": config(modules_to_save=[f"(m{i}|.*)*" for i in range(40_000)]),
    "many layers": config(layers_to_transform=[*range(100_000)], layers_pattern=["(a|a)*"] * 9999),
    "a long pattern": config(target_modules="a" * 900_000),
    "a pattern of many classes": config(target_modules="[a-z]" * 100_000),
    "tokens by names": config(trainable_token_indices={f"m{i}": [i] for i in range(20_000)}),
    "tokens of a huge row": config(trainable_token_indices=[2**61]),
    "unknown fields": config(**{f"field{i}": i + 1 for i in range(30_000)}),
    "an unknown field": config(**{"\x1b[2J\ud800": "\x1b[2J"}),
    "a type": config(peft_type="\x1b[2J" * 100),
    "a name that moves the cursor": config(base_model_name_or_path="a\x1b[2J\ud800b\nodd: c"),
    "a name that is none": config(base_model_name_or_path=[{"a": [None]}]),
    "an initializer": config(init_lora_weights=[[1]]),
    "a bias that is a list": config(bias=["all"]),
    "too large": b" " * (1 << 20) + config(),
    "rank 0": config(r=0),
    "a rank of 2**31": config(r=2**31),
    "a rank that is true": config(r=True),
    "an alpha of 1e-320": config(lora_alpha=1e-320),
    "an alpha of 1e29": config(lora_alpha=1e29),
}
KINDS = {"text": "x", "a number": -1.5, "a list": [[{}]], "an object": {"a": {"b": []}}}
for field in (*LORA, "rank_pattern", "modules_to_save", "layers_pattern", "use_dora"):
    for name, value in {**KINDS, "true": True}.items():
        BYTES[f"{name} for {field}"] = config(**{field: value})
CASES = {
    name: (lambda folder, data=data: (folder / good.CONFIG).write_bytes(data))
    for name, data in BYTES.items()
}
MAKE, DO = good.adapter, [good.load_adapter, good.inspect, good.merge_adapter, good.convert]
