"""LoRA-GA: the paper's algorithm in NumPy, PEFT's numbers, gradients as jax.grad gives them."""

import numpy as np
import pytest
from initializer_methods import (
    CLOSE,
    INPUTS,
    RANK,
    SHAPES,
    assert_near,
    case,
    norm,
    normal,
    product,
    run,
    svd,
)

from lowrank_jax import initializers

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("path", ["down", "up"])
def test_lora_ga_is_pefts_up_to_signs(path):
    a, b, base, weight, rank, scale = case("lora_ga", path)
    make = initializers.lora_ga({path: INPUTS[f"G/{path}"].T})[path]
    our_a, our_b, residual = run(make, weight, rank, scale)
    of_a, of_b = np.sign(np.sum(our_a * a, 0)), np.sign(np.sum(our_b * b, 1))
    assert_near(our_a * of_a, a, norm(a))
    assert_near(our_b * of_b[:, None], b, norm(b))
    assert_near(residual + product(our_a, our_b, scale), weight, norm(weight))
    assert_near(weight - product(our_a * of_a, our_b * of_b[:, None], scale), base, norm(weight))


@pytest.mark.parametrize("form", ["peft", "paper"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga_takes_neighboring_directions_of_the_gradient(shape, form):
    weight, gradient = normal(*shape), normal(*shape, seed=3)
    a, b, _ = run(initializers.lora_ga({"w": gradient}, 4.0, form)["w"], weight)
    u, s, vt = svd(gradient)
    zeta, second = shape[1] ** 0.25 / 4.0**0.5, slice(RANK, 2 * RANK)
    of_a, of_b = (1, zeta * s[second, None]) if form == "peft" else (zeta, zeta)
    # vectors one by one: over the gaps between neighbors, a hundredth
    np.testing.assert_allclose(abs(a), abs(of_a * u[:, :RANK]), rtol=0, atol=10 * CLOSE * norm(a))
    np.testing.assert_allclose(abs(b), abs(of_b * vt[second]), rtol=0, atol=10 * CLOSE * norm(b))
