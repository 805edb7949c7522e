"""The short form of benchmarks/dora.py: LoRA's FLOPs but for the norms, nothing dense."""

import dora
import jax
import numpy as np
import pytest
from flops import dense_gradients, flops, model

import lowrank_jax as lowrank


@pytest.fixture(scope="module")
def problem():
    functions = {}

    def make():
        # dims such that only a dense product of a and b can have a weight's shape
        sizes = {"layers": 1, "dim": 64, "hidden": 192, "vocab": 100, "batch": 2, "tokens": 160}
        params, data, forwards = dora.problem(**sizes, rank=8)
        functions.update({name: fn for name, (fn, *_) in forwards.items()})
        return params, data, {name: trees for name, (_, *trees) in forwards.items()}

    params, data, trees = jax.eval_shape(make)  # the values do not matter
    data = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype)), data)
    return params, data, {name: (fn, *trees[name]) for name, fn in functions.items()}


@pytest.fixture(scope="module")
def steps(problem):
    _, data, forwards = problem
    return {name: step for name, (step, _) in dora.compiled_steps(data, forwards).items()}


def test_at_most_1_06_of_the_lora_step(steps):
    assert flops(steps["dora"]) <= 1.06 * flops(steps["lora"])


def test_no_product_of_a_weights_shape_in_the_hlo(problem, steps):
    params, _, _ = problem
    # the detector sees those of the norm by hand: seven weights
    assert len(dense_gradients(steps["dora, dense"].as_text(), params)) >= 7
    assert not dense_gradients(steps["dora"].as_text(), params)


def test_nothing_of_a_weights_shape_is_kept_for_backward(problem):
    params, data, forwards = problem
    lifted, base, lora = forwards["dora"]
    merged = lambda lora, base, x: model(lowrank.merge(base, lora), x)
    # the detector sees those of a step that merges first
    assert len(dora.kept_for_backward(merged, base, lora, data, params)) >= 7
    assert not dora.kept_for_backward(lifted, base, lora, data, params)


def test_folded_norms_cost_a_forward_nothing(problem):
    _, data, forwards = problem
    table = dora.compiled_forwards(data, forwards)
    assert flops(table["dora, folded"][0]) <= 1.01 * flops(table["lora"][0])
