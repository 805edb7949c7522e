"""A Llama layer's adapters of one input share a product on chips: `pytest -m slow tests/estimate`.

The short form of benchmarks/shared_inputs.py; benchmarks/aot.py prints the commands that make an
environment with these compilers.
"""

import argparse

import aot
import pytest
import shared_inputs

import lowrank_jax as lowrank
from lowrank_jax._estimate.chips import CHIPS, make_devices

RANK = 12
# XLA for GPUs merges smaller products still further, x [W_q W_k W_v a a a]
OPTIONS = argparse.Namespace(
    dim=4096, hidden=8192, batch=1, tokens=1024, rank=RANK, dtype="bfloat16", codes=None
)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_one_product_forward_and_two_backward(target):
    try:
        make_devices(CHIPS[target], 1)
    except lowrank.ConfigError as error:
        pytest.skip(str(error))
    fn, shapes = shared_inputs.step_of(OPTIONS)
    text = aot.compiled(fn, *shapes, target=target).program.as_text()
    products = shared_inputs.list_products(text)
    # x [a a a], the gradient of [a a a], and its part of the gradient of x
    assert shared_inputs.count_columns(products, 3 * RANK) == 3
    assert shared_inputs.count_columns(products, 2 * RANK) == 3
