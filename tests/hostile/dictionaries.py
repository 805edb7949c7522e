"""Hostile dictionaries of configurations: what from_dict is given."""

import lowrank_jax as lowrank

DEEP: list = [0]
for _ in range(100_000):
    DEEP = [DEEP]
MAPS = {"a": 1}
for _ in range(100_000):
    MAPS = {"a": MAPS}
VALUES = {
    "none": None, "text": "x", "an escape": "\x1b[2J", "a surrogate": "\ud800", "NUL": "\0",
    "empty": "", "true": True, "NaN": float("nan"), "infinity": float("inf"), "-1": -1, "0": 0,
    "2**31": 2**31, "digits": 10**5000, "a float": 1e308, "a list": [], "a nested list": [[[]]],
    "an object": {}, "a deep list": DEEP, "a deep object": MAPS, "a regex": {"re": "("},
    "a regex of no flags": {"re": "a", "flags": "x"},
    "a regex that prints": {"re": "a", "flags": 128},
    "a regex that is a number": {"re": 5}, "a deep regex": {"re": "(" * 10_000},
    "a long regex": {"re": "a" * 900_000},
    "a regex of any case": {"re": "(?i)" + "[\0-\U0010ffff]" * 5000},
    "a flag of any case": {"re": r"[\0-\uffff]" * 50_000, "flags": 2},
    "classes of any character": {"re": "[\u0100\u0300\u0500]" * 100_000},
    "many regexes": [{"re": f"a{i}"} for i in range(60_000)],
    "a key that is a regex": {"**": {"re": "a"}}, "pairs": [[{"re": "a"}, 1]],
    "pairs of objects": [[{"a": 1}, 1]], "pairs of deep lists": [["a", DEEP]],
    "many": {f"a{i}": i + 1 for i in range(20_000)}, "many texts": [f"a{i}" for i in range(20_000)],
    "long": "a" * 1_000_000, "a set": {1}, "bytes": b"a", "an object of itself": object(),
}  # fmt: skip
FIELDS = {
    lowrank.LoraConfig: [*lowrank.LoraConfig().to_dict(), "unknown\x1b[2J"],
    lowrank.QuantConfig: [*lowrank.QuantConfig().to_dict(), "unknown"],
}
CASES = {
    f"{kind.__name__}.{field}: {name}": (kind, {field: value})
    for kind, fields in FIELDS.items()
    for field in fields
    for name, value in VALUES.items()
}
for kind in FIELDS:
    CASES |= {f"{kind.__name__}: {name}": (kind, value) for name, value in VALUES.items()}


def make(case):
    """Read one dictionary, and write and read again what came of it."""
    kind, values = case
    config = kind.from_dict(values)
    assert kind.from_dict(config.to_dict()) == config
    assert hash(config) == hash(kind.from_dict(values))
    return kind.__name__
