"""Initializers of the factors: functions (key, weight, rank, scale) -> (a, b, residual).

`weight` is float32 [i, o] (float64 of a float64 leaf), axes grouped, stacks vmapped; a is [i, r]
and b [r, o]; `residual` is the weight that the base keeps where a method moves part of it into the
factors, else None. What rounding the factors to their dtype takes from a b, `init` adds to it. One
of your own needs no registration: any pure function will do, and one that brings arrays is a
callable pytree (`jax.tree_util.Partial`) whose arrays have the leaf's stack axes leading.
"""

from lowrank_jax.initializers._by_name import BY_NAME as BY_NAME
from lowrank_jax.initializers._corda import corda
from lowrank_jax.initializers._eva import eva
from lowrank_jax.initializers._loftq import loftq
from lowrank_jax.initializers._lora_ga import lora_ga
from lowrank_jax.initializers._random import Factors as Factors
from lowrank_jax.initializers._random import gaussian, kaiming, lookup, orthogonal
from lowrank_jax.initializers._spectral import olora, pissa, randomized_pissa

__all__ = [
    "corda",
    "eva",
    "gaussian",
    "kaiming",
    "loftq",
    "lookup",
    "lora_ga",
    "olora",
    "orthogonal",
    "pissa",
    "randomized_pissa",
]
