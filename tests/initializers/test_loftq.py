"""LoftQ: nearer than quantization alone, with the scale, after the rounding of the factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from initializer_methods import (
    CLOSE,
    NF4,
    RANK,
    SHAPES,
    assert_near,
    base_of,
    case,
    covariance,
    norm,
    normal,
    product,
    rounded,
    run,
    svd,
)

import lowrank_jax as lowrank
from lowrank_jax import initializers

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("path", ["down", "up"])
def test_loftq_is_right_where_peft_forgets_the_scale(path):
    a, b, base, weight, rank, scale = case("loftq_5_scaled", path)
    make = initializers.loftq(NF4, 5)
    our_a, our_b, residual = run(make, weight, rank, scale)
    assert_near(product(our_a, our_b, scale), product(a, b, 1), norm(weight))  # theirs without s
    assert_near(base_of(make, weight, residual), base, norm(weight))
    lost = lambda base, a, b: np.linalg.norm(weight - base - product(a, b, scale))
    assert lost(base_of(make, weight, residual), our_a, our_b) < 0.9 * lost(base, a, b)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_loftq_is_nearer_than_quantization_alone(shape, iterations, weighted):
    weight, cov = normal(*shape), covariance(shape[0], shape[0])
    data = {"w": cov} if weighted else None
    made = initializers.loftq(NF4, iterations, data)
    make = made["w"] if weighted else made
    root = np.eye(shape[0])
    if weighted:
        values, vectors = np.linalg.eigh(cov / np.mean(np.diag(cov)) + 0.01 * np.eye(len(cov)))
        root = vectors * np.sqrt(values) @ vectors.T
    a, b, residual = run(make, weight)
    base = base_of(make, weight, residual)
    lost = np.linalg.norm(root @ (weight - base - product(a, b)))
    best = svd(root @ (weight - base))[1]  # Eckart and Young
    assert lost < np.sqrt(np.sum(best[RANK:] ** 2)) * (1 + CLOSE)
    assert lost < np.linalg.norm(root @ (weight - rounded(weight)))
    if iterations == 1:
        np.testing.assert_array_equal(residual, weight)


def test_loftq_uses_the_format_it_is_given():
    weight, lost = normal(64, 24), {}
    for quant in (
        lowrank.QuantConfig(format="int8", packing="uint8"),
        lowrank.QuantConfig(block_size=32, packing="uint8"),
        NF4,
    ):
        make = initializers.loftq(quant, 2)
        a, b, residual = run(make, weight)
        base = base_of(make, weight, residual)
        lost[quant] = np.linalg.norm(weight - base - product(a, b))
        u, s, vt = svd(weight - base)
        assert_near(product(a, b), u[:, :RANK] * s[:RANK] @ vt[:RANK], norm(weight))
    assert len({round(float(value), 4) for value in lost.values()}) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loftq_quantizes_what_the_rounded_factors_leave(dtype):
    weight = normal(64, 24)
    a, b, _ = run(initializers.loftq(NF4, 1), weight)  # the first turn, of which the second is made
    kept = run(initializers.loftq(NF4, 2).with_factor_dtype(dtype), weight)[2]
    cast = lambda x: np.asarray(jnp.asarray(x, dtype), np.float32)
    away = lambda a, b: np.linalg.norm(kept - (weight - product(a, b)))
    assert away(cast(a), cast(b)) < 0.1 * away(a, b)  # but for a few ties
    made = run(initializers.loftq(NF4, 2).with_factor_dtype(dtype), weight)
    for factor in made[:2]:
        np.testing.assert_array_equal(factor, cast(factor))
    # through init, with the factors as they are kept
    config = lowrank.LoraConfig(rank=RANK, alpha=9, targets="w", factor_dtype=dtype)
    _, lora = lowrank.init(
        jax.random.key(0), {"w": weight}, config, initializer=initializers.loftq(NF4, 2)
    )
    assert norm(product(*map(np.float32, (lora["w"].a, lora["w"].b))) - product(*made[:2])) < (
        2e-3 * norm(product(*made[:2]))
    )
