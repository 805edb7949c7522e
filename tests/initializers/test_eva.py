"""EVA: ranks go where the variance of the inputs is, within their limits."""

import re

import jax
import numpy as np
import pytest
from initializer_methods import CLOSE, covariance, normal

import lowrank_jax as lowrank
from lowrank_jax import initializers

pytestmark = pytest.mark.usefixtures("fast_compile")


def spectrum(*shares, size=8, seed=0):
    """A covariance [size, size] whose components explain these shares."""
    values = np.zeros(size)
    values[: len(shares)] = shares
    q, _ = np.linalg.qr(normal(size, size, seed=seed).astype(np.float64))
    return (q * values @ q.T).astype(np.float32)


def test_eva_spends_the_ranks_where_variance_is():
    cov = {
        "a/w": 5 * spectrum(0.5, 0.3, 0.2),
        "b/w": spectrum(0.41, 0.29, 0.19, 0.11, seed=1),
        "c/w": spectrum(*[0.125] * 8, seed=2),
    }
    config = lowrank.LoraConfig(
        rank=2, alpha=3, targets="**/w", exclude="d/*",
        rank_pattern={"b/*": 3}, alpha_pattern={"b/*": 5},
    )  # fmt: skip
    makes, new = initializers.eva(cov, config)
    # a budget of 7: .5 .41 .3 .29 .2 .19, then .125 of c before .11 of b
    assert sorted(makes) == ["a/w", "b/w", "c/w"]
    assert dict(new.rank_pattern) == {"a/w": 3, "c/w": 1, "b/*": 3}
    assert dict(new.alpha_pattern) == {"a/w": 4.5, "c/w": 1.5, "b/*": 5}
    params = {key: {"w": normal(8, 12)} for key in "abcd"}
    _, lora = lowrank.init(jax.random.key(0), params, new, initializer=makes)
    assert lora["d"]["w"] is None
    assert {key: lora[key]["w"].a.shape[-1] for key in "abc"} == {"a": 3, "b": 3, "c": 1}
    assert {key: lora[key]["w"].scale for key in "abc"} == {"a": 1.5, "b": 5 / 3, "c": 1.5}
    for key in "ab":
        a = np.asarray(lora[key]["w"].a, np.float64)
        values, vectors = np.linalg.eigh(cov[f"{key}/w"].astype(np.float64))
        top = vectors[:, np.argsort(-values)[:3]]
        np.testing.assert_allclose(a @ a.T, top @ top.T, rtol=0, atol=CLOSE * 10)
        assert not np.any(lora[key]["w"].b)


def test_eva_caps_a_rank_and_excludes_what_is_left_with_none():
    cov = {"a": spectrum(0.4, 0.3, 0.2, 0.1), "b?": spectrum(*[0.125] * 8), "c": spectrum(1.0)}
    config = lowrank.LoraConfig(rank=1, targets="*")
    makes, new = initializers.eva(cov, config, rho=2.0)  # a budget of 3: 1. of c, .4 .3 of a
    assert sorted(makes) == ["a", "c"]
    assert dict(new.rank_pattern) == {"a": 2}
    assert not new.alpha_pattern  # None follows the rank by itself
    assert [pattern.pattern for pattern in new.exclude] == [re.escape("b?")]
    params = {key: normal(8, 8) for key in ("a", "b?", "bx", "c")}
    only = {**makes, re.compile(re.escape("b?")): makes["a"]}
    with pytest.raises(lowrank.PatternError):  # "bx" is still a target: only "b?" is excluded
        lowrank.init(jax.random.key(0), params, new, initializer=only)
    _, lora = lowrank.init(jax.random.key(0), params, new, initializer=makes)
    assert [key for key in sorted(lora) if lora[key] is None] == ["b?"]
    assert lowrank.LoraConfig.from_dict(new.to_dict()) == new


def test_eva_keeps_ranks_at_rho_one_and_shares_them_in_a_stack():
    cov = {"w": np.stack([spectrum(0.9, 0.1), spectrum(0.5, 0.5)]), "v": spectrum(0.55, 0.45)}
    config = lowrank.LoraConfig(rank=1, targets=("w", "v"))
    assert initializers.eva(cov, config, rho=1.0)[1] == config
    # means of w are .7 and .3; a budget of 2 * 1 + 1 buys w once, then v once
    assert not initializers.eva(cov, config)[1].rank_pattern
    flat = {**cov, "v": spectrum(0.8, 0.2)}
    ranks = initializers.eva(flat, lowrank.LoraConfig(rank=2, targets=("w", "v")), rho=1.5)[1]
    assert not ranks.rank_pattern  # .8, .7, .3: 1 + 2 + 2 of 6, and a last .2 of v


def test_eva_is_refused_under_jit():
    config = lowrank.LoraConfig(rank=1)
    with pytest.raises(lowrank.ConfigError, match="ranks are static, so call eva outside of jit"):
        jax.jit(lambda c: initializers.eva({"w": c}, config)[0]["w"].components)(covariance(8, 8))
