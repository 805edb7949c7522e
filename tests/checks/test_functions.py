"""Which callables are functions of parameters, and which are modules with their own."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import lowrank_jax as lowrank
from lowrank_jax._checks.functions import is_function_of_params

PARAMS, X = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class Loss(nn.Module):
    """A Linen module that has no parameters, and takes them as an argument."""

    def __call__(self, params, x):
        return (x @ params["w"]).sum()


class Product(nnx.Module):
    """An NNX module without variables."""

    def __call__(self, params, x):
        return x @ params["w"]


class Trainer(nnx.Module):
    """An NNX module with a variable, and a method that takes parameters."""

    def __init__(self):
        self.steps = nnx.Variable(jnp.zeros(()))

    def apply(self, params, x):
        return x @ params["w"]

    def __call__(self, x):
        return x + self.steps[...]


FUNCTIONS = {
    "a function": lambda params, x: x @ params["w"],
    "jitted": jax.jit(lambda params, x: x @ params["w"]),
    "a partial": functools.partial(lambda y, params, x: x @ params["w"], 0),
    "a Partial, which is a tree": jax.tree_util.Partial(
        lambda y, params, x: x @ params["w"], jnp.ones(3)
    ),
    "an NNX module without variables": Product(),
    "a method of an NNX module": Trainer().apply,
    "a Linen module without parameters": Loss(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_accepted(name):
    fn = FUNCTIONS[name]
    plan = lowrank.plan(fn, PARAMS, X)
    assert plan["w"].op == "dot"
    base, lora = lowrank.init(0, PARAMS, lowrank.LoraConfig(rank=2, targets="w"), plan=plan)
    assert lowrank.lift(fn)(lowrank.combine(base, lora), X).shape in ((), (2, 3))


@pytest.mark.parametrize(
    "value",
    [Compact(), Trainer(), Trainer().__call__, nnx.Linear(4, 3, rngs=nnx.Rngs(0)), None, "fn"],
    ids=lambda value: type(value).__name__,
)
def test_modules_and_other_values_are_refused(value):
    assert not is_function_of_params(value)
    with pytest.raises(lowrank.ConfigError, match="expected a function of"):
        lowrank.lift(value)


def test_a_module_that_is_combined_is_refused_too():
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    config = lowrank.LoraConfig(rank=2, targets="kernel")
    plan = lowrank.plan(nnx.Linear.__call__, module, X)
    combined = lowrank.combine(*lowrank.init(0, module, config, plan=plan))
    assert not is_function_of_params(combined)
    assert lowrank.lift(nnx.Linear.__call__)(combined, X).shape == (2, 3)
