"""The short form of benchmarks/flops.py: no more FLOPs than by hand, no dense gradient."""

import flops
import pytest


@pytest.fixture(scope="module")
def table():
    # dims such that only a weight gradient can have a weight's shape
    return flops.steps(layers=1, dim=64, hidden=192, vocab=100, batch=2, tokens=40, rank=16)


def test_at_most_1_01_of_the_step_written_by_hand(table):
    compiled, _ = table
    assert flops.flops(compiled["lifted"]) <= 1.01 * flops.flops(compiled["by hand"])


def test_no_dense_weight_gradient_in_the_hlo(table):
    compiled, base = table
    # the detector sees those of full fine-tuning: seven weights
    assert len(flops.dense_gradients(compiled["full"].as_text(), base)) == 7
    assert not flops.dense_gradients(compiled["lifted"].as_text(), base)
