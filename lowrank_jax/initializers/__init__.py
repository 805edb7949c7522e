"""Initializers of the factors: functions (key, weight, rank, scale) -> (a, b, residual).

`weight` is float32 [i, o] (float64 for a float64 leaf): its fan-in and fan-out axes are flattened,
and `init` vmaps over stack axes. a is [i, r] and b is [r, o]. `residual` [i, o] is the weight that
the base keeps if the method moves part of it into the factors, else None; `init` adds to it what
rounding the factors to their dtype loses. A custom initializer is any pure function; one that
carries arrays is a callable pytree (`jax.tree_util.Partial`) whose arrays have leading stack axes.
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
