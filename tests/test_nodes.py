"""The pytree law: every node goes where an array goes, and every array in it is real."""

import copy
import dataclasses
import functools
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from models import noisy, normal

import lowrank_jax as lowrank
from lowrank_jax._nodes import is_node

pytestmark = pytest.mark.usefixtures("fast_compile")

PARAMS = {"w": normal(3, 64, 8), "table": normal(9, 64), "g": normal(8)}
CONFIGS = {
    "LoRA": {},
    "DoRA": {"dora": True},
    "LoHa": {"method": "loha"},
    "VeRA": {"method": "vera", "projection_seed": 5},
    "(IA)^3": {"method": "ia3"},
    "(IA)^3 on a table": {"method": "ia3", "targets": "table"},
    "rows": {"train_rows": {"table": [7, 1]}},
    "whole": {"train": "g"},
    "whole, bfloat16": {"train": "g"},
}
QUANTS = {
    "nf4": lowrank.QuantConfig(targets="w"),
    "nf4, uint8": lowrank.QuantConfig(packing="uint8", double_quant=False, targets="w"),
    "fp4": lowrank.QuantConfig(format="fp4", targets="w"),
    "int8": lowrank.QuantConfig(format="int8", targets="w"),
    "kept flat": lowrank.QuantConfig(targets="w"),
}


def plan_of(params):
    layer = lambda x, w: (jnp.tanh(x @ w) @ w.T, None)
    fn = lambda p, x: (jax.lax.scan(layer, x, p["w"])[0], p["table"][jnp.array([0])], p["g"] * 2)
    return lowrank.plan(fn, params, np.ones((2, params["w"].shape[1]), params["w"].dtype))


@functools.cache
def adapters():
    """name -> (base, lora, config) of every kind of adapter."""
    made = {}
    for name, options in CONFIGS.items():
        params = PARAMS
        if name.endswith("bfloat16"):
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
        config = lowrank.LoraConfig(**{"rank": 2, "targets": "w", **options})
        base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan_of(params))
        made[name] = base, noisy(lora), config
    base, lora, config = made["DoRA"]
    made["DoRA, folded"] = base, lowrank.fold_norms(base, lora), config
    return made


@functools.cache
def trees():
    """name -> a tree with nodes of every kind."""
    found = {name: lora for name, (_, lora, _) in adapters().items()}
    found["normed"] = adapters()["DoRA"][0]
    for name, quant in QUANTS.items():
        params = {**PARAMS, "w": PARAMS["w"][:, : 63 if name == "kept flat" else 64]}
        found[name] = lowrank.quantize(params, quant, plan=plan_of(params))
    base, lora, _ = adapters()["DoRA"]
    found["combined"] = lowrank.combine(base, lora, scale=0.5, dropout=0.1, key=jax.random.key(1))
    config = lowrank.LoraConfig(rank=2, targets="w")
    coded = lowrank.init(jax.random.key(0), found["nf4"], config, plan=plan_of(PARAMS))
    found["combined, coded"] = lowrank.combine(*coded)
    tx = lowrank.quantize_state(optax.adam(1e-3), min_size=16)
    found["optimizer state in codes"] = tx.init(adapters()["LoRA"][1])
    return found
