"""Scalars and dtypes: a weight scaled after a cast, complex inputs, float64."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import normal
from small_weights import assert_agrees, both_bases, node, quantized, small_blocks  # noqa: F401

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_a_complex_input_keeps_its_imaginary_part():
    x = lax.complex(normal(3, 6, seed=8), normal(3, 6, seed=9))

    def fn(p, x):
        y = lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())))
        return y.real, y.imag

    for dora in (False, True):
        lora = {"w": node((6, 5), (0,), (1,), dora=dora)}
        for base in both_bases(normal(6, 5), (0,)):
            fallback = "raise" if isinstance(base, jax.Array) else "silent"
            assert_agrees(fn, {"w": base}, lora, x, fallback=fallback)


def test_a_float64_weight_with_float32_factors_is_merged_in_float64():
    with jax.enable_x64(True):
        w = np.random.default_rng(0).standard_normal((6, 5))
        lora = {"w": node((6, 5), (0,), (1,))}
        delta = 1.5 * np.asarray(lora["w"].a, np.float64) @ np.asarray(lora["w"].b, np.float64)
        merged = lowrank.merge({"w": jnp.asarray(w)}, lora)["w"]
        assert merged.dtype == np.float64
        np.testing.assert_allclose(merged, w + delta, rtol=0, atol=1e-14)
        live = lowrank.lift(lambda p, x: x @ p["w"])(
            lowrank.combine({"w": jnp.asarray(w)}, lora), jnp.eye(6)
        )
        np.testing.assert_allclose(live, w + delta, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("number", [1e6, 1e-8, 0.1])
@pytest.mark.parametrize("traced", [False, True])
def test_a_scaled_weight_with_narrow_factors(dtype, number, traced):
    own = node((8, 6), (0,), (1,))
    lora = {"w": dataclasses.replace(own, a=own.a.astype(dtype), b=own.b.astype(dtype))}
    base, x = {"w": normal(8, 6)}, normal(3, 8, seed=9)
    fn = lambda p, x, s: ((x @ (p["w"] * s)) / s, x @ (p["w"] / s) * s)
    wrap = lambda f: jax.jit(lambda lora, s: f(lora, x, s)) if traced else lambda l, s: f(l, x, s)
    live = wrap(lambda lora, x, s: lowrank.lift(fn)(lowrank.combine(base, lora), x, s))
    want = wrap(lambda lora, x, s: fn(lowrank.merge(base, lora), x, s))
    s = jnp.float32(number)
    chex.assert_trees_all_close(live(lora, s), want(lora, s), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [1e6, 1e-8])
@pytest.mark.parametrize("reshaped", [False, True])
def test_codes_that_are_scaled_after_a_narrow_dtype(number, reshaped):
    turn = lambda w: lax.rev(w, (0, 1)) if reshaped else w
    fn = lambda p, x: x @ (turn(p["w"]).astype(jnp.float16).astype(jnp.float32) * number)
    base, x = {"w": quantized(normal(8, 6), (0,))}, normal(3, 8, seed=9)
    want = fn(lowrank.dequantize(base), x)
    assert np.all(np.isfinite(want))
    got = lowrank.lift(fn, fallback="silent")(base, x)
    chex.assert_trees_all_close(got, want, rtol=1e-3)
