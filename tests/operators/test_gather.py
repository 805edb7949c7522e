"""Look-ups: rows and experts by index, ids out of range, their gradients."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import noisy, normal
from small_weights import assert_agrees, both_bases, node, small_blocks  # noqa: F401

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("ids", [(0, 3, 2), (1, 9, -7)])
def test_experts_chosen_by_index_under_vmap(ids):
    def fn(p, x):
        return jax.vmap(lambda x, i: x @ p["w"][i])(x, jnp.array(ids))

    lora = {"w": node((4, 6, 5), (1,), (2,), (0,))}
    for base in both_bases(normal(4, 6, 5), (1,), (0,)):
        assert_agrees(fn, {"w": base}, lora, normal(3, 6, seed=9))


def test_rows_chosen_by_index_under_vmap():
    fn = lambda p: jax.vmap(lambda i: p["w"][i])(jnp.array([0, 3, 2, 8]))
    lora = {"w": node((5, 6), (0,), (1,), kind="lookup")}
    for base in both_bases(normal(5, 6), (1,)):
        assert_agrees(fn, {"w": base}, lora)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "scaled"])
def test_masked_ids_beyond_the_table_have_no_gradient(method):
    ids, mask = jnp.array([1, 6]), jnp.array([True, False])
    fn = lambda p, s: jnp.where(mask[:, None], jnp.take(p["t"], ids, axis=0), 0.0)
    params = {"t": normal(6, 4)}
    config = lowrank.LoraConfig(
        rank=2, targets="t", method="ia3" if method == "ia3" else "lora", dora=method == "dora"
    )
    plan = lowrank.plan(fn, params, 1.0)
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    lora = noisy(lora)

    def run(f):
        loss = lambda lora, scale: jnp.sum(jnp.sin(f(lora, scale)))
        return jax.grad(loss, (0, 1))(lora, 0.7)

    live = lambda lora, s: lowrank.lift(fn, fallback="raise")(
        lowrank.combine(base, lora, scale=s), 1.0
    )
    merged = lambda lora, s: fn(lowrank.merge(base, lora, scale=s), 1.0)
    got, want = jax.device_get(jax.jit(lambda: (run(live), run(merged)))())
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("mode", [None, "clip", "fill"])
@pytest.mark.parametrize("dora", [False, True])
def test_ids_out_of_range_have_the_gradient_that_jax_gives_them(mode, dora):
    """In default indexing JAX reads a row that is there, and drops its cotangent."""
    fn = lambda p: jnp.nan_to_num(p["t"].at[jnp.array([1, 9, -8, 5])].get(mode=mode))
    lora = {"t": node((6, 4), (0,), (1,), kind="lookup", dora=dora)}
    for base in both_bases(normal(6, 4), (1,)):
        assert_agrees(fn, {"t": base}, lora)


def test_trained_rows_out_of_range_have_the_gradient_that_jax_gives_them():
    params = {"t": normal(6, 4), "w": normal(4, 4)}
    fn = lambda p: p["t"][jnp.array([1, 9, 5])] @ p["w"]
    config = lowrank.LoraConfig(rank=2, targets="w", train_rows={"t": [5, 1]})
    base, lora = lowrank.init(jax.random.key(0), params, config)
    assert_agrees(fn, base, noisy(lora))
