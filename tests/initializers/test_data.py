"""Data of initializers: damping of covariances, and data that is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from initializer_methods import CLOSE, NF4, covariance, norm, normal

import lowrank_jax as lowrank
from lowrank_jax import initializers
from lowrank_jax._trees import factors
from lowrank_jax.initializers._data import damp_covariance

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_damping_doubles_till_the_inverse_is_good():
    cov = jnp.ones((64, 64))  # of rank one
    for damping, doubled in ((1e-7, True), (1e-5, True), (0.01, False)):
        safe, inverse = map(np.asarray, damp_covariance(cov, damping))
        doublings = np.log2((safe[0, 0] - 1) / damping)
        assert abs(doublings - round(doublings)) < 0.01
        assert (round(doublings) > 0) == doubled
        assert np.linalg.norm(safe @ inverse - np.eye(64)) < 0.1  # sums in another order than ours
    assert np.isnan(
        np.asarray(damp_covariance(jnp.full((4, 4), jnp.nan), 0.01)[1])
    ).all()  # and it ends


def test_init_takes_a_mapping_and_data_that_is_traced():
    weights = {"w": normal(24, 40), "v": normal(3, 40, 24)}
    fn = lambda p, x: jax.lax.scan(lambda x, v: (x @ v @ p["w"], None), x @ p["w"], p["v"])[0]
    plan = lowrank.plan(fn, weights, normal(5, 24))
    config = lowrank.LoraConfig(rank=4, alpha=6, targets=("w", "v"))
    cov = {"w": covariance(24, 24), "v": covariance(3, 40, 40)}

    def make(key, params, cov):
        return lowrank.init(key, params, config, plan=plan, initializer=initializers.corda(cov))

    eager = make(jax.random.key(0), weights, cov)
    traced = jax.jit(make)(jax.random.key(0), weights, cov)
    merged = [lowrank.merge(*tree) for tree in (eager, traced)]
    chex.assert_trees_all_close(merged[0], weights, rtol=0, atol=CLOSE * norm(weights["w"]))
    chex.assert_trees_all_close(*merged, rtol=0, atol=CLOSE * norm(weights["w"]))
    before = factors._run_pytree._cache_size()
    make(jax.random.key(0), weights, {path: 2 * array for path, array in cov.items()})
    assert factors._run_pytree._cache_size() == before, "data became a constant"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            initializers.corda({"w": covariance(6, 6)})["w"],
            r"shape \(6, 6\) was given for a weight",
        ),
        (initializers.loftq(NF4, 1, {"w": covariance(6, 6)})["w"], r"expected \(8, 8\)"),
        (initializers.lora_ga({"w": normal(6, 8)})["w"], r"gradient of shape \(6, 8\)"),
        (initializers.lora_ga({"w": normal(8, 8)})["w"], "rank 5 must be at most 4"),
        (
            initializers.eva({"w": covariance(8, 8)}, lowrank.LoraConfig(rank=1))[0]["w"],
            "eva has 2 components of 8 inputs",
        ),
    ],
)
def test_data_of_another_weight_is_refused(make, text):
    with pytest.raises(lowrank.ConfigError, match=text):
        make(jax.random.key(0), jnp.ones((8, 8)), 5, 1.0)


def test_data_beyond_float32_is_refused():
    with jax.enable_x64(True), pytest.raises(lowrank.ConfigError, match="values that are not fini"):
        initializers.corda({"w": np.full((3, 3), 1e300)})
