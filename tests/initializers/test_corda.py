"""CorDA: the paper's equations in NumPy."""

import chex
import numpy as np
import pytest
from initializer_methods import (
    CLOSE,
    NF4,
    RANK,
    SHAPES,
    assert_near,
    covariance,
    norm,
    normal,
    product,
    run,
    svd,
)

from lowrank_jax import initializers

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_corda_decomposes_the_weight_in_view_of_inputs(shape, mode):
    weight, cov = normal(*shape), covariance(shape[0], shape[0])
    a, b, _ = run(initializers.corda({"w": cov}, mode)["w"], weight)
    safe = cov.astype(np.float64) + 0.01 * np.mean(np.diag(cov)) * np.eye(len(cov))
    u, s, vt = svd(safe @ weight)
    kept = np.argsort(-s)[:RANK] if mode == "ipm" else np.argsort(s)[:RANK]
    expected = np.linalg.inv(safe) @ (u[:, kept] * s[kept]) @ vt[kept]
    # the inverse multiplies errors by up to the condition number, which damping keeps below 300
    assert np.linalg.cond(safe) < 300
    np.testing.assert_allclose(product(a, b), expected, rtol=0, atol=10 * CLOSE * norm(weight))


def test_corda_and_loftq_do_not_depend_on_the_scale_of_covariances():
    weight, cov = normal(64, 24), covariance(64, 64)
    for make in (initializers.corda, lambda data: initializers.loftq(NF4, 2, data)):
        one, other = (run(make({"w": c * cov})["w"], weight) for c in (1.0, 2.0**-60))
        chex.assert_trees_all_equal(one, other)


def test_corda_without_data_is_pissa():
    weight = normal(24, 40)
    a, b, _ = run(initializers.corda({"w": np.zeros((24, 24))})["w"], weight)
    assert_near(product(a, b), product(*run(initializers.pissa, weight)[:2]), norm(weight))
