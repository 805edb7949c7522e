"""Hostile state dicts of bitsandbytes, as from_state_dict takes them: names, numbers of layers."""

import numpy as np

import lowrank_jax as lowrank

ONE = np.zeros(1, np.uint8)
STACKED = {
    "a layer of a billion": ["l.1000000000.w"],
    "layers of 10**17": ["l.100000000000000000.w"],
    "a layer of 5000 digits": ["l." + "9" * 5000 + ".w"],
    "a layer of other digits": ["l.٣.w"],
    "a layer of leading zeros": ["l.007.w"],
    "a layer of 0 and of a million": ["l.0.w", "l.1000000.w"],
}
CASES = {name: (dict.fromkeys(keys, ONE), "l.{}.w") for name, keys in STACKED.items()} | {
    "two axes of a million": ({"l.1000000.e.1000000.w": ONE}, "l.{}.e.{}.w"),
    "twenty axes": ({".".join(["9"] * 20): ONE}, ".".join(["{}"] * 20)),
    "a name of braces": ({"{}": ONE}, "{}"),
    "many names alike": (
        {"model.layers." * 20 + f"{i}.weight": ONE for i in range(20_000)},
        "model.layers." * 20 + "x.weight",
    ),
    "names of 5000": ({"ab" * 2500 + str(i): ONE for i in range(300)}, "ba" * 2500),
    "many states of one weight": (
        {"w": ONE, **{f"w.quant_state.{i}": ONE for i in range(20_000)}},
        "w",
    ),
    "a name with an escape": ({"\x1b[2J": ONE}, "\x1b[2K"),
}


def make(case):
    """The leaf of one case."""
    return type(lowrank.bitsandbytes.from_state_dict(*case)).__name__
