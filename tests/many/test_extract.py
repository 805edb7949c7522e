"""Adapters extracted from the difference of two models."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


def model(params, x):
    y = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x + params["bias"], params["layers"])[0]
    return jnp.einsum("ti,eio->teo", y, params["experts"]).sum(1) @ params["head"]


KEYS = iter(jax.random.split(jax.random.key(0), 20))
PARAMS = {
    "layers": jax.random.normal(next(KEYS), (2, 8, 8)),
    "experts": jax.random.normal(next(KEYS), (3, 8, 6)),
    "head": jax.random.normal(next(KEYS), (6, 1)),
    "bias": jnp.zeros(8),
    "steps": jnp.arange(3),
}
PLAN = lowrank.plan(model, PARAMS, jnp.ones((4, 8)))


def test_an_adapter_is_found_again():
    config = lowrank.LoraConfig(rank=2, targets=["layers", "experts"], train="bias")
    base, lora = lowrank.init(0, PARAMS, config, plan=PLAN)
    lora = jax.tree.map(lambda x: jax.random.normal(next(KEYS), x.shape), lora)
    tuned = lowrank.merge(base, lora)
    found, errors = lowrank.extract(PARAMS, tuned, 2, plan=PLAN)
    assert {path: type(node).__name__ for path, node in found.items()} == {
        "layers": "LowRank",
        "experts": "LowRank",
        "bias": "Full",
        "head": "NoneType",
        "steps": "NoneType",
    }
    assert errors == {
        "layers": pytest.approx(0, abs=1e-6),
        "experts": pytest.approx(0, abs=1e-6),
        "bias": 0.0,
    }
    chex.assert_trees_all_close(lowrank.merge(PARAMS, found), tuned, rtol=1e-5, atol=1e-5)
    x = jax.random.normal(next(KEYS), (4, 8))
    got = lowrank.lift(model, fallback="raise")(lowrank.combine(PARAMS, found), x)
    chex.assert_trees_all_close(got, model(tuned, x), rtol=1e-4, atol=1e-4)


def test_the_error_is_that_of_a_dense_svd():
    noise = lambda x: x + jax.random.normal(next(KEYS), x.shape) if x.ndim == 3 else x
    tuned = jax.tree.map(noise, PARAMS)
    lora, errors = lowrank.extract(PARAMS, tuned, 3, plan=PLAN)
    # layers are two matrices; the experts share their input, and are one matrix [8, 3 * 6]
    to_matrices = {"layers": np.asarray, "experts": lambda x: np.asarray(x).swapaxes(0, 1)}
    for name, convert in to_matrices.items():
        difference = np.asarray(tuned[name] - PARAMS[name])
        matrices = convert(difference)
        matrices = matrices.reshape(-1, 8, matrices.size // (8 * (2 if name == "layers" else 1)))
        values = np.linalg.svd(matrices, compute_uv=False) ** 2
        assert errors[name] == pytest.approx(np.sqrt(values[:, 3:].sum() / values.sum()), rel=1e-5)
        got = lowrank.merge(PARAMS, lora)[name] - PARAMS[name]
        found = np.linalg.norm(difference - got) / np.linalg.norm(difference)
        assert errors[name] == pytest.approx(found, rel=1e-4)


def test_a_quantized_base_is_made_up_for():
    base = lowrank.quantize(PARAMS, lowrank.QuantConfig(targets="layers", block_size=32), plan=PLAN)
    lora, errors = lowrank.extract(base, PARAMS, 8, plan=PLAN)
    assert errors["layers"] < 1e-6
    merged = lowrank.merge(base, lora)
    chex.assert_trees_all_close(merged["layers"], PARAMS["layers"], rtol=1e-5, atol=1e-5)


def test_narrow_leaves_take_the_rank_they_can_have():
    tuned = PARAMS | {"head": PARAMS["head"] + 1}
    lora, errors = lowrank.extract(PARAMS, tuned, 4)
    assert lora["head"].rank == 1
    assert errors == {"head": 0.0}


def test_stacked_biases_are_kept_whole():
    fn = lambda p, x: jax.lax.scan(lambda x, l: (x @ l["w"] + l["b"], None), x, p)[0]
    params = {"w": jnp.ones((3, 5, 5)), "b": jnp.zeros((3, 5))}
    plan = lowrank.plan(fn, params, jnp.ones((2, 5)))
    lora, errors = lowrank.extract(params, params | {"b": jnp.eye(3, 5)}, 1, plan=plan)
    assert errors == {"b": 0.0}
    assert type(lora["b"]) is lowrank.Full


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, lowrank.TreeError, "nothing to extract"),
        ({"layers": PARAMS["layers"] + 1}, lowrank.AxesError, "'layers' has shape .*pass plan="),
        ({"steps": jnp.ones(3, int)}, lowrank.TreeError, "'steps' changed, and is of int32"),
        ({"head": PARAMS["head"] * jnp.nan}, lowrank.TreeError, "'head': .* not finite"),
        ({"head": jnp.ones((6, 2))}, lowrank.TreeError, "head: shape"),
        ({"more": jnp.ones(3)}, lowrank.TreeError, "more: only in tuned"),
    ],
)
def test_what_has_no_adapter_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        lowrank.extract(PARAMS, PARAMS | changes, 2)
