"""Compressed adapters are the nearest ones of their rank, by a dense SVD in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank

RNG = np.random.default_rng(0)


def random_node(rank, **options):
    """An adapter of three stacked weights [8, 5 x 2], whose stack axis is not the first."""
    draw = lambda *shape: jnp.asarray(RNG.standard_normal(shape, np.float32))
    axes = {"fan_in": (0,), "fan_out": (2, 3), "stack": (1,)}
    return lowrank.LowRank(draw(3, 8, rank), draw(3, rank, 5, 2), scale=0.7, **axes | options)


def to_matrices(node):
    """The deltas [3, 8, 10] of random_node, in float64, by NumPy."""
    a, b = np.asarray(node.a, np.float64), np.asarray(node.b, np.float64)
    return node.scale * a @ b.reshape(*b.shape[:2], 10)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_the_least_there_is(rank):
    node = random_node(6)
    small, errors = lowrank.compress({"w": node, "bias": None}, rank)
    whole = to_matrices(node)
    values = np.linalg.svd(whole, compute_uv=False)
    least = np.sqrt((values[:, rank:] ** 2).sum() / (values**2).sum())
    assert small["bias"] is None
    assert small["w"].rank == rank
    assert small["w"].scale == node.scale
    found = np.linalg.norm(whole - to_matrices(small["w"])) / np.linalg.norm(whole)
    np.testing.assert_allclose([errors["w"], found], least, rtol=1e-5)


def test_the_true_rank_is_exact():
    thin = random_node(2)
    zeros = lambda x, axis: jnp.concatenate([x, jnp.zeros_like(x)], axis)
    doubled = lowrank.LowRank(
        zeros(thin.a, -1), zeros(thin.b, 1), None, thin.fan_in, thin.fan_out, thin.stack, 0.7
    )
    small, errors = lowrank.compress({"w": doubled}, 2)
    np.testing.assert_allclose(to_matrices(small["w"]), to_matrices(thin), rtol=1e-5, atol=1e-5)
    assert float(errors["w"]) < 1e-6
    same, errors = lowrank.compress({"w": thin}, 4)
    assert same["w"] is thin
    assert float(errors["w"]) == 0


@pytest.mark.parametrize("method", ["loha", "vera"])
def test_other_methods_become_lora(method):
    params = {"w": jnp.zeros((8, 6))}
    seed = 1 if method == "vera" else None
    config = lowrank.LoraConfig(rank=2, targets="w", method=method, projection_seed=seed)
    _, lora = lowrank.init(0, params, config)
    lora = jax.tree.map(lambda x: x + 0.5, lora)
    small, errors = lowrank.compress(lora, 4)  # LoHa's rank is 2 * 2; VeRA's is at most 2
    assert type(small["w"]) is lowrank.LowRank
    assert float(errors["w"]) < 1e-6
    merged = [lowrank.merge(params, one) for one in (lora, small)]
    chex.assert_trees_all_close(*merged, rtol=1e-5, atol=1e-5)


def test_a_stack_compresses_as_its_adapters_do_and_under_jit():
    loras = [{"w": random_node(4)} for _ in range(3)]
    small, _ = jax.jit(lambda many: lowrank.compress(many, 2))(lowrank.stack(loras))
    for k, lora in enumerate(loras):
        one, _ = lowrank.compress(lora, 2)
        got = to_matrices(lowrank.select(small, k)["w"])
        np.testing.assert_allclose(got, to_matrices(one["w"]), rtol=1e-4, atol=1e-5)


def test_svd_blends_are_compressed_sums():
    loras = [{"w": random_node(r)} for r in (2, 3)]
    blended = lowrank.blend(loras, [0.5, -1.0], "svd", rank=3)
    small, _ = lowrank.compress(lowrank.blend(loras, [0.5, -1.0]), 3)
    chex.assert_trees_all_close(blended, small)


def test_what_is_no_product_stays_and_folded_norms_are_refused():
    rows = lowrank.Rows(b=jnp.ones((2, 4)), kind="lookup", rows=(0, 3), size=5)
    whole = lowrank.Full(jnp.ones(3))
    small, errors = lowrank.compress({"t": rows, "bias": whole}, 1)
    assert small == {"t": rows, "bias": whole}
    assert errors == {}
    params = {"w": jnp.eye(6)}
    base, dora = lowrank.init(0, params, lowrank.LoraConfig(rank=3, targets="w", dora=True))
    assert lowrank.compress(dora, 1)[0]["w"].magnitude is dora["w"].magnitude
    with pytest.raises(lowrank.ConfigError, match="'w' has folded norms"):
        lowrank.compress(lowrank.fold_norms(base, dora), 1)
    with pytest.raises(lowrank.ConfigError, match="rank must be"):
        lowrank.compress(dora, 0)
