"""Random initializers: orthogonal factors, whose product is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from initializer_methods import EPS, norm, normal, product, run

import lowrank_jax as lowrank
from lowrank_jax import initializers

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_orthogonal_has_a_zero_product_of_factors_that_are_not():
    for rank in (2, 6):
        a, b, residual = run(initializers.orthogonal, normal(64, 24), rank)
        assert residual is None
        assert min(norm(a), norm(b)) > 0.1
        assert norm(product(a, b)) < 10 * EPS * norm(a) * norm(b)
        for factor in (a, b):  # each in its half of the rank
            assert np.linalg.matrix_rank(factor, tol=10 * EPS * norm(factor)) == rank // 2


def test_orthogonal_says_that_the_rank_must_be_even():
    with pytest.raises(lowrank.ConfigError, match=r"rank 3 is odd: use an even rank"):
        initializers.orthogonal(jax.random.key(0), jnp.ones((8, 8)), 3, 1.0)


FACTORS = ["bfloat16", "float16", "float32"]


def test_orthogonal_has_a_product_of_exactly_zero_in_every_dtype():
    for rank in (2, 6, 16):
        a, b, _ = run(initializers.orthogonal, normal(64, 24), rank)
        for dtype in FACTORS:
            one, other = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (a, b))
            assert np.any(one)
            assert not np.any(one @ other)
