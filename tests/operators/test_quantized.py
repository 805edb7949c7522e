"""Quantized weights in products: decoded in part, never kept dense for the backward pass."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import noisy

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def adapter(frozen, config, plan):
    """init's adapter, filled by NumPy."""
    shapes = jax.eval_shape(lambda p: lowrank.init(KEY, p, config, plan=plan)[1], frozen)
    return noisy(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


def residuals(fn, frozen, *args):
    """Shapes and dtypes of what backward keeps of forward; of args alone."""
    backward = lambda frozen, *args: jax.vjp(functools.partial(fn, frozen), *args)[1]
    kept = jax.eval_shape(backward, frozen, *args)
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(kept)]


def test_a_table_is_decoded_only_where_it_is_read():
    params = {"table": normal(512, 64), "w": normal(64, 64)}
    fn = lambda p, ids: jnp.tanh(p["table"][ids] @ p["w"])
    ids = np.array([[3, 511, 0], [7, 7, 1]])
    plan = lowrank.plan(fn, params, ids)
    lifted = lowrank.lift(fn, fallback="raise")
    for double in (False, True):
        quant = lowrank.QuantConfig(targets="table", double_quant=double)
        frozen = lowrank.quantize(params, quant, plan=plan)
        chex.assert_trees_all_close(*of_codes_and_dense(fn, frozen, ids), rtol=1e-5, atol=1e-6)
        jaxpr = str(jax.make_jaxpr(lifted)(frozen, ids))
        assert "f32[512,64]" not in jaxpr
        assert "f32[512,1,64]" not in jaxpr


def of_codes_and_dense(fn, frozen, *args):
    """fn lifted over quantized leaves, and on the dense leaves they stand for."""
    lifted = lowrank.lift(fn, fallback="raise")
    both = lambda tree, *args: (lifted(tree, *args), fn(lowrank.dequantize(tree), *args))
    return jax.jit(both)(frozen, *args)


@pytest.mark.parametrize("shape", [(3, 3, 64, 8), (3, 3, 4, 8)])
def test_convolutions(shape):
    kernel, x = normal(*shape), normal(2, 6, 6, shape[2], seed=1)
    conv = lambda p, x: lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    plan = lowrank.plan(lambda p, x: jnp.tanh(conv(p, x)), {"k": kernel}, x)
    base = lowrank.quantize({"k": kernel}, lowrank.QuantConfig(targets="k"), plan=plan)
    lora = adapter(base, lowrank.LoraConfig(rank=2, targets="k"), plan)
    lifted = lowrank.lift(conv, fallback="raise")
    mine = lambda base, lora: jnp.sin(lifted(lowrank.combine(base, lora), x)).mean()
    want = lambda base, lora: jnp.sin(conv(lowrank.merge(base, lora), x)).mean()
    both = lambda *args: [jax.value_and_grad(loss, 1)(*args) for loss in (mine, want)]
    chex.assert_trees_all_close(*jax.jit(both)(base, lora), rtol=1e-4, atol=1e-5)
    kept = [dtype for kept, dtype in residuals(mine, base, lora) if kept == shape]
    assert not [dtype for dtype in kept if jnp.issubdtype(dtype, jnp.floating)]


PARTS = {
    "split": lambda p, x: [x @ w for w in jnp.split(p["w"], 3, axis=1)],
    "strided": lambda p, x: x @ p["w"][:, 5::7],
    "backwards": lambda p, x: x @ p["w"][:, ::-1],
    "to heads": lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"].reshape(128, 3, 128)),
    "one head": lambda p, x: x @ p["w"].reshape(128, 3, 128)[:, 1],
    "heads merged": lambda p, x: x @ p["heads"].reshape(128, 384),
    "of a stack": lambda p, x: sum(x @ p["stack"][i, :, 7:] for i in range(2)),
    "a stack merged": lambda p, x: p["stack"].reshape(4, 64, 128)[3].T @ x.T[:64],
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_weight_has_its_own_scales(name, double_quant):
    """Of leaves with more scales than share a scale of their own: each must know its place."""
    params = {"w": normal(128, 384), "heads": normal(128, 3, 128), "stack": normal(2, 128, 384)}
    if name == "a stack merged":
        params["stack"] = normal(2, 2, 64, 128)
    x, fn = normal(3, 128, seed=1), PARTS[name]
    plan = lowrank.plan(fn, params, x)
    used = [path for path, use in plan.items() if use.op == "dot"]
    quant = lowrank.QuantConfig(targets=tuple(used), double_quant=double_quant)
    frozen = lowrank.quantize(params, quant, plan=plan)
    chex.assert_trees_all_close(*of_codes_and_dense(fn, frozen, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", [64, 10])
def test_experts_in_ragged_products(inner):
    """In blocks and kept flat: as dense, and codes alone are kept for backward."""
    params = {"up": normal(3, 64, inner) / 8, "down": normal(3, inner, 32, seed=1) / 8}
    x, sizes = normal(7, 64, seed=2), np.array([2, 0, 5])
    fn = lambda p, x: lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)
    plan = lowrank.plan(fn, params, x)
    quant = lowrank.QuantConfig(targets="*")
    frozen = lowrank.quantize(params, quant, plan=plan)
    assert (frozen["down"].order is None) is (inner == 64)
    lora = adapter(frozen, lowrank.LoraConfig(rank=2, alpha=3, targets="*"), plan)
    lifted = lowrank.lift(fn, fallback="raise")
    mine = lambda base, lora, x: jnp.sin(lifted(lowrank.combine(base, lora), x)).sum()
    want = lambda base, lora, x: jnp.sin(fn(lowrank.merge(base, lora), x)).sum()
    both = lambda *args: [jax.value_and_grad(loss, (1, 2))(*args) for loss in (mine, want)]
    chex.assert_trees_all_close(*jax.jit(both)(frozen, lora, x), rtol=1e-4, atol=1e-5)
    shapes = {leaf.shape for leaf in params.values()} | {f.codes.shape for f in frozen.values()}
    dense = lambda fn: [
        s for s, dtype in residuals(fn, frozen, lora, x) if s in shapes and dtype == "f4"
    ]
    assert not dense(mine)
    assert dense(want)
    report = lowrank.report(fn, lowrank.combine(frozen, lora), x)
    assert {leaf.how for leaf in report.values()} == {"factored, dequantized 1×"}
    assert {leaf.how for leaf in lowrank.report(fn, frozen, x).values()} == {"dequantized 1×"}


@pytest.mark.parametrize("fill", [None, 7.0])
def test_rows_beyond_the_table_are_the_fill(fill):
    params = {"table": normal(9, 64)}
    fn = lambda p, ids: jnp.take(p["table"], ids, axis=0, fill_value=fill)
    ids = np.array([0, 8, 9])
    plan = lowrank.plan(fn, params, ids)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="table"), plan=plan)
    got, want = of_codes_and_dense(fn, frozen, ids)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.isnan(got[2]).all() if fill is None else (got[2] == fill).all()


def test_a_weight_scaled_by_what_is_trained_is_built():
    """Scales are constants to every derivative, so a number with one of its own is not in them."""
    params = {"w": normal(64, 8)}
    fn = lambda p, x, gain: x @ (p["w"] * gain)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w"))
    lifted, x = lowrank.lift(fn, fallback="silent"), normal(3, 64)
    slope = lambda fn, p: jax.grad(lambda gain: jnp.sin(fn(p, x, gain)).sum())(0.5)
    both = lambda frozen: (slope(lifted, frozen), slope(fn, lowrank.dequantize(frozen)))
    got, want = jax.jit(both)(frozen)
    assert abs(want) > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4)
