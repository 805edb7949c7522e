"""Every combination of weight, factor and input dtype is computed as documented, or refused."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import noisy, normal

import lowrank_jax as lowrank

FLOATS = ("float32", "bfloat16", "float16")
INPUTS = (*FLOATS, "int32")

# Both sides round their operands (W + s a b once; a, b, x a and the sum each once) to the product's
# operand dtype: six roundings of at most eps / 2 of numbers no larger than the sum of magnitudes.
ROUNDINGS = 6


def adapted(fn, params, x, *, factor_dtype="float32", targets="w", alpha=3.0):
    """(base, perturbed adapter) of rank 2."""
    config = lowrank.LoraConfig(rank=2, alpha=alpha, targets=targets, factor_dtype=factor_dtype)
    plan = lowrank.plan(fn, params, x)
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan, initializer=ramp)
    return base, noisy(lora, scale=0.5)


def ramp(key, weight, rank, scale):
    """An initializer that draws nothing, and so compiles in no time."""
    del key, scale
    return jnp.zeros((len(weight), rank)), jnp.zeros((rank, weight.shape[1])), None


def inputs(dtype: str) -> jax.Array:
    if dtype == "int32":
        return jax.device_put(np.int32(np.arange(28).reshape(4, 7) % 5 - 2))
    return normal(4, 7, dtype=jnp.dtype(dtype))


def bound(x, base, node, dtype) -> np.ndarray:
    """Rounding of |x| (|W| + |s| |a| |b|)."""
    size = lambda v: np.abs(np.asarray(v, np.float64))
    total = size(x) @ (size(base) + abs(node.scale) * size(node.a) @ size(node.b))
    return ROUNDINGS * float(jnp.finfo(dtype).eps) * total


DOTS = {
    "promoting": lambda p, x: x @ p["w"],
    "float32 accumulation": lambda p, x: jnp.dot(x, p["w"], preferred_element_type=jnp.float32),
    "cast": lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
}


@functools.cache
def results_of_pair(weight_dtype, factor_dtype):
    """Base, adapter, merged weights, and for every (input dtype, product) live and merged results.

    One program: each of them apart would take longer to compile.
    """
    params = {"w": normal(7, 5, dtype=jnp.dtype(weight_dtype))}
    base, lora = adapted(DOTS["promoting"], params, inputs("float32"), factor_dtype=factor_dtype)

    @jax.jit
    def run(base, lora, xs):
        merged = lax.optimization_barrier(lowrank.merge(base, lora))  # rounded before the product
        tree, out = lowrank.combine(base, lora), {}
        for (dtype, x), (name, fn) in itertools.product(xs.items(), DOTS.items()):
            out[dtype, name] = lowrank.lift(fn, fallback="raise")(tree, x), fn(merged, x)
        return merged, out

    return base, lora, *run(base, lora, {dtype: inputs(dtype) for dtype in INPUTS})


@pytest.mark.parametrize("name", DOTS)
@pytest.mark.parametrize("factor_dtype", FLOATS)
@pytest.mark.parametrize(("weight_dtype", "input_dtype"), [*itertools.product(FLOATS, INPUTS)])
def test_law(weight_dtype, input_dtype, factor_dtype, name, fast_compile):
    base, lora, merged, results = results_of_pair(weight_dtype, factor_dtype)
    node, x = lora["w"], inputs(input_dtype)
    assert node.a.dtype == node.b.dtype == jnp.dtype(factor_dtype)
    got, want = results[input_dtype, name]
    assert merged["w"].dtype == weight_dtype
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    coarsest = [weight_dtype, factor_dtype, got.dtype, "bfloat16" if name == "cast" else got.dtype]
    dtype = max(coarsest, key=lambda d: float(jnp.finfo(d).eps))
    error = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    assert np.all(error <= bound(x, base["w"], node, dtype))


@pytest.mark.parametrize("factor_dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
def test_gradients_have_the_dtype_of_the_factors(weight_dtype, factor_dtype, fast_compile):
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": normal(7, 5, dtype=jnp.dtype(weight_dtype))}, inputs(weight_dtype)
    base, lora = adapted(fn, params, x, factor_dtype=factor_dtype)
    live = lambda lora: jnp.sum(lowrank.lift(fn)(lowrank.combine(base, lora), x), dtype=jnp.float32)
    grad = jax.jit(jax.grad(live))(lora)["w"]
    assert grad.a.dtype == grad.b.dtype == jnp.dtype(factor_dtype)
    size = lambda v: np.asarray(v, np.float64)
    dw = np.broadcast_to(size(x).sum(0)[:, None], (7, 5))
    rounding = ROUNDINGS * max(float(jnp.finfo(d).eps) for d in (weight_dtype, factor_dtype))
    node = lora["w"]
    for got, left, right in ((grad.a, dw, size(node.b).T), (grad.b, size(node.a).T, dw)):
        want = node.scale * left @ right
        magnitude = node.scale * np.abs(left) @ np.abs(right) + np.abs(size(x)).sum()
        assert np.all(np.abs(size(got) - want) <= rounding * magnitude)


def start(key, weight, rank, scale):
    """Factors whose product is zero, as a new adapter's is."""
    del key, scale
    a = np.cos(np.arange(len(weight) * rank, dtype=np.float32)).reshape(-1, rank)
    return a, np.zeros((rank, weight.shape[1]), np.float32), None


def test_step_0_is_exact_in_every_dtype():
    for dtype in FLOATS:
        params, x = {"w": normal(7, 5, dtype=jnp.dtype(dtype))}, inputs(dtype)
        for fn in DOTS.values():
            config = lowrank.LoraConfig(rank=2, targets="w")
            base, lora = lowrank.init(jax.random.key(0), params, config, initializer=start)
            got = lowrank.lift(fn)(lowrank.combine(base, lora), x)
            np.testing.assert_array_equal(got, jax.jit(fn)(params, x))


def test_products_accumulate_in_float32():
    """4,096 ones: a bfloat16 sum stops at 256."""
    params = {"w": jnp.zeros((4096, 2), jnp.bfloat16)}
    node = lowrank.LowRank(jnp.ones((4096, 1)), jnp.ones((1, 2)), None, (0,), (1,), (), 0.5)
    tree = lowrank.combine(params, {"w": node})
    got = lowrank.lift(lambda p, x: x @ p["w"])(tree, jnp.ones((1, 4096), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(got, np.float32), [[2048.0, 2048.0]])
    many = lowrank.LowRank(jnp.ones((1, 4096)), jnp.ones((4096, 2)), None, (0,), (1,), (), 0.5)
    tree = lowrank.combine({"w": jnp.zeros((1, 2), jnp.bfloat16)}, {"w": many})
    got = lowrank.lift(lambda p, x: x @ p["w"])(tree, jnp.ones((1, 1), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(got, np.float32), [[2048.0, 2048.0]])


def test_merge_adds_in_float32_and_casts_once():
    """1 + 2^-9 (twice) rounds to 1 + 2^-8 only if nothing rounded on the way."""
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    factors = jnp.full((2, 2), 2.0**-4), jnp.full((2, 2), 2.0**-5)
    node = lowrank.LowRank(*factors, None, (0,), (1,), (), 2.0)
    merged = lowrank.merge(params, {"w": node})["w"]
    want = jnp.asarray(1 + 2 * (2 * 2.0**-9), jnp.bfloat16)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(merged, np.float32), np.float32(want))
    small = lowrank.LowRank(factors[0] * 2.0**-3, factors[1], None, (0,), (1,), (), 1.0)
    tiny = lowrank.merge({"w": jnp.ones((2, 2), jnp.float16)}, {"w": small})["w"]
    np.testing.assert_array_equal(
        np.asarray(tiny, np.float32), np.float32(np.float16(1 + 2.0**-11))
    )


def test_lookups_of_every_dtype():
    tokens = np.array([0, 3, 3])
    for dtype, cast in itertools.product(FLOATS, FLOATS):
        fn = lambda p, t: jnp.take(p["w"].astype(cast), t, axis=0)
        params = {"w": normal(5, 4, dtype=jnp.dtype(dtype))}
        base, lora = adapted(fn, params, tokens)
        lifted = lowrank.lift(fn, fallback="raise")
        live = lambda lora: lifted(lowrank.combine(base, lora), tokens)
        merged = lambda lora: lax.optimization_barrier(lowrank.merge(base, lora))
        got, want = jax.jit(lambda lora: (live(lora), fn(merged(lora), tokens)))(lora)
        assert got.dtype == want.dtype == cast
        eps = max(float(jnp.finfo(d).eps) for d in (dtype, cast))
        size = (
            np.abs(np.asarray(params["w"], np.float64)).max()
            + np.abs(np.asarray(lora["w"].a)).max() * 4
        )
        assert np.abs(np.float64(got) - np.float64(want)).max() <= ROUNDINGS * eps * size


@pytest.mark.parametrize("factor_dtype", ["float32", "float64"])
def test_float64(factor_dtype):
    with jax.enable_x64(True):
        fn = lambda p, x: jnp.sin(x @ p["w"])
        params = {"w": normal(7, 5, dtype=jnp.float64)}
        x = normal(4, 7, dtype=jnp.float64)
        base, lora = adapted(fn, params, x, factor_dtype=factor_dtype)
        assert lora["w"].a.dtype == factor_dtype
        got = lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), x)
        want = fn(lowrank.merge(base, lora), x)
        assert got.dtype == want.dtype == jnp.float64
        error = np.abs(np.asarray(got) - np.asarray(want))
        assert np.all(error <= bound(x, params["w"], lora["w"], factor_dtype))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"])
def test_float8_weights_are_refused(dtype):
    params = {"w": jnp.ones((4, 3), dtype), "v": jnp.ones((4, 3))}
    with pytest.raises(lowrank.LowrankError, match=rf"'w'.*{dtype}.*bfloat16"):
        lowrank.init(jax.random.key(0), params, lowrank.LoraConfig(rank=1, targets="w"))
    base, lora = lowrank.init(jax.random.key(0), params, lowrank.LoraConfig(rank=1, targets="v"))
    assert base["w"].dtype == dtype
    assert lora["w"] is None


def test_leaves_that_are_not_floating_pass_through():
    params = {
        "w": normal(4, 3),
        "steps": jnp.int32(7),
        "codes": jnp.ones((4, 4), jnp.int8),
        "mask": jnp.ones((4, 4), bool),
        "key": jax.random.key(0),
    }

    def fn(p, x):
        y = jnp.where(p["mask"], x @ p["codes"].astype(x.dtype), 0) @ p["w"]
        return y + p["steps"], p["key"]

    x = normal(4, 4)
    plan = lowrank.plan(fn, params, x)
    config = lowrank.LoraConfig(rank=1, alpha=3.0, targets="w")
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    assert [name for name, node in lora.items() if node is not None] == ["w"]
    lora = noisy(lora)
    got, key = lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), x)
    want, _ = fn(lowrank.merge(base, lora), x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert key == params["key"]
    for name in ("steps", "codes", "mask", "key"):
        with pytest.raises(lowrank.PatternError, match=f"not floating.*{name}"):
            lowrank.init(jax.random.key(0), params, lowrank.LoraConfig(rank=1, targets=name))


def test_lax_dot_general_of_mixed_dtypes_and_low_precision():
    numbers = (((1,), (0,)), ((), ()))
    fn = lambda p, x: lax.dot_general(
        x, p["w"], numbers, precision="default", preferred_element_type=jnp.float32
    )
    params, x = {"w": normal(7, 5, dtype=jnp.bfloat16)}, inputs("bfloat16")
    base, lora = adapted(fn, params, x)
    got = lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), x)
    want = fn(lowrank.merge(base, lora), x)
    assert got.dtype == want.dtype == jnp.float32
    error = np.abs(np.asarray(got - want, np.float64))
    assert np.all(error <= bound(x, params["w"], lora["w"], jnp.bfloat16))
