"""Hostile 4-bit weights of bitsandbytes."""

import json

import good
import numpy as np

WEIGHT = f"{good.LAYER}.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
GOOD = good.state_tensors()
HEADER = json.loads(GOOD[STATE].tobytes())


def letters(text):
    return np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8)


def state(**fields):
    """The tensors with some fields of the JSON changed."""
    return {**GOOD, STATE: letters(json.dumps({**HEADER, **fields}))}


def text(text):
    return {**GOOD, STATE: letters(text)}


def filled(side, value):
    return {**GOOD, f"{WEIGHT}.{side}": np.full_like(GOOD[f"{WEIGHT}.{side}"], value)}


def orphans(count, name):
    one = np.zeros(1, np.uint8)
    return {name(i): one for i in range(count)}


TENSORS = {
    "nothing": text(b""),
    "brackets": text("[" * 60_000),
    "a text of megabytes": text(" " * 2_000_000 + "{}"),
    "a list": text("[]"),
    "UTF-16": text(json.dumps(HEADER).encode("utf-16")),
    "no UTF-8": text(b"\xff\xfe"),
    "a key twice": text('{"shape":[1],"shape":[2]}'),
    "shape of nothing": state(shape=[]),
    "a negative shape": state(shape=[-4, -64]),
    "a huge shape": state(shape=[1 << 40, 1 << 40]),
    "a shape of many axes": state(shape=[4, 64, *[1] * 5000]),
    "a shape of 32 axes": state(shape=[4, 64, *[1] * 30]),
    "a shape of 6 axes": state(shape=[1, 1, 1, 1, 4, 64]),
    "a shape of one axis": state(shape=[256]),
    "a shape of text": state(shape="48"),
    "a shape of floats": state(shape=[4.0, 64.0]),
    "a shape of true": state(shape=[True, 256]),
    "a shape of NaN": state(shape=[float("nan"), 64]),
    "a long integer": text(json.dumps(HEADER).replace("64", "9" * 4000)),
    "a block of 0": state(blocksize=0),
    "a block of -64": state(blocksize=-64),
    "a block of text": state(blocksize="64"),
    "a block of a list": state(blocksize=[64]),
    "a dtype that is none": state(dtype="\x1b[2J"),
    "a dtype that is a list": state(dtype=["float32"]),
    "an offset of NaN": state(nested_offset=float("nan")),
    "an offset of 1e300": state(nested_offset=1e300),
    "an offset of text": state(nested_offset="0"),
    "an offset of an integer of 4000 digits": text(
        json.dumps(HEADER | {"nested_offset": 0}).replace('offset": 0', 'offset": ' + "9" * 4000)
    ),
    "scales of NaN": filled("nested_absmax", np.nan),
    "scales of infinity": filled("nested_absmax", np.inf),
    "a map of NaN": filled("nested_quant_map", np.nan),
    "a table of NaN": filled("quant_map", np.nan),
    "a weight without scales": {k: v for k, v in GOOD.items() if not k.endswith(".absmax")},
    "a weight of no bytes": {**GOOD, WEIGHT: np.zeros((0, 1), np.uint8)},
    "states of both formats": {**GOOD, STATE.replace("nf4", "fp4"): GOOD[STATE]},
    "a state of no weight": {k: v for k, v in GOOD.items() if k != WEIGHT},
    "many states of no weight": orphans(2000, lambda i: f"l.{i}.w.quant_state.bitsandbytes__nf4"),
    "many scales of no weight": orphans(3000, lambda i: f"l.{i}.w.absmax"),
    "many states of no format": {
        **orphans(1500, lambda i: f"l.{i}.w.quant_state.bitsandbytes__nf3"),
        **orphans(1500, lambda i: f"l.{i}.w"),
    },
    "many states of a weight": orphans(3000, lambda i: f"w.quant_state.{i}"),
}
CASES = {
    name: (lambda folder, tensors=tensors: good.quantized(folder, tensors))
    for name, tensors in TENSORS.items()
}
MAKE, DO = good.quantized, [good.load_states, good.load_quantized, good.inspect]
