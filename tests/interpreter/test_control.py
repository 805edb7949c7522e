"""Control flow over weights: scans over any stack axis, weights in a carry, shard_map."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from models import normal
from small_weights import assert_agrees, both_bases, node, quantized, small_blocks  # noqa: F401

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("on_codes", [False, True])
def test_a_scan_in_a_scan_over_a_stack_split_in_two(on_codes):
    base = both_bases(normal(4, 8, 8, scale=0.3), (1,), (0,))[on_codes]

    def fn(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w), None)
        outer = lambda x, ws: lax.scan(inner, x, ws)
        return lax.scan(outer, x, p["w"].reshape(2, 2, 8, 8))[0]

    assert_agrees(fn, {"w": base}, {"w": node((4, 8, 8), (1,), (2,), (0,))}, normal(3, 8, seed=9))


def kinds_with_and_without_remat():
    default = {("dense", False), ("DoRA", False), ("nf4", True), ("int8", False), ("double", False)}
    for kind in ("dense", "DoRA", "nf4", "int8", "uint8", "double"):
        for remat in (False, True):
            slow = () if (kind, remat) in default else (pytest.mark.slow,)
            yield pytest.param(kind, remat, marks=slow)


@pytest.mark.parametrize(("kind", "remat"), [*kinds_with_and_without_remat()])
def test_a_scan_over_the_middle_axis(kind, remat):
    leaf = normal(8, 3, 8, scale=0.4)
    options = {
        "nf4": {}, "int8": {"format": "int8"}, "uint8": {"packing": "uint8"},
        "double": {"double_quant": True},
    }  # fmt: skip
    base = quantized(leaf, (0,), (1,), **options[kind]) if kind in options else leaf

    def fn(p, x):
        layer = lambda x, w: (jnp.tanh(x @ w) @ w.T, None)
        return lax.scan(jax.checkpoint(layer) if remat else layer, x, jnp.moveaxis(p["w"], 1, 0))[0]

    lora = {"w": node((8, 3, 8), (0,), (2,), (1,), dora=kind == "DoRA")}
    assert_agrees(fn, {"w": base}, lora, normal(3, 8, seed=9))
    if kind in options:
        quiet = lambda p, x: lowrank.lift(fn, fallback="raise")(p, x)
        got, want = jax.jit(lambda p, x: (quiet(p, x), fn(lowrank.dequantize(p), x)))(
            {"w": base}, normal(3, 8, seed=9)
        )
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", ["split", "heads", "inner scan", "index"])
def test_a_scan_over_the_middle_axis_of_codes_and_what_a_layer_does_then(last):
    base = quantized(normal(8, 2, 3, 8, scale=0.4), (0,), (1, 2))
    steps = {
        "split": lambda x, w: x @ jnp.split(w[:, 0], 2, 1)[1] @ jnp.full((4, 8), 0.1),
        "heads": lambda x, w: (
            0.3 * jnp.einsum("bi,inho->bnho", x, w.reshape(8, 3, 2, 4)).sum(1).reshape(-1, 8)
        ),
        "inner scan": lambda x, w: lax.scan(
            lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(w, 1, 0)
        )[0],
        "index": lambda x, w: x @ lax.dynamic_index_in_dim(w, 2, 1, keepdims=False),
    }
    fn = lambda p, x: lax.scan(
        lambda x, w: (jnp.tanh(steps[last](x, w)), None), x, jnp.moveaxis(p["w"], 1, 0)
    )[0]
    lora = {"w": node((8, 2, 3, 8), (0,), (3,), (1, 2))}
    assert_agrees(fn, {"w": base}, lora, normal(3, 8, seed=9))


def test_a_scan_over_the_middle_axis_takes_the_memory_of_the_leading_one(full_compile):
    def temporaries(base, fn):
        lora = {"w": node(base.shape, *axes)}
        loss = lambda lora, base, x: lowrank.lift(fn, fallback="raise")(
            lowrank.combine(base, lora), x
        ).sum()
        step = jax.jit(jax.grad(loss)).lower(lora, {"w": base}, normal(8, 256))
        return step.compile().memory_analysis().temp_size_in_bytes

    step = lambda h, w: (jnp.tanh(h @ w), None)
    shape, found = (4, 256, 256), {}
    for name, at in {"leading": 0, "middle": 1, "last": 2}.items():
        axes = [(1,), (2,), (0,)] if at == 0 else [(0,), (2 if at == 1 else 1,), (at,)]
        leaf = jnp.moveaxis(normal(*shape, scale=0.1), 0, at)
        base = quantized(leaf, axes[0], axes[2], block_size=64, packing="uint8")
        fn = lambda p, x, at=at: lax.scan(step, x, jnp.moveaxis(p["w"], at, 0))[0]
        found[name] = temporaries(base, fn)
    # plain scales of the whole stack, 4 bytes for each 64 weights, are decoded outside of the loop
    slack = 1.05 * found["leading"] + 4 * np.prod(shape) / 64
    assert max(found.values()) <= slack, found


def test_a_weight_that_a_shard_map_lays_out_otherwise():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    mapped = lambda w, i, o: jax.shard_map(lambda w: w, mesh=mesh, in_specs=i, out_specs=o)(w)
    base, lora = {"w": normal(8, 6)}, {"w": node((8, 6), (0,), (1,))}
    fn = lambda p, x: x @ mapped(p["w"], P("a", "b"), P("b", "a"))
    assert_agrees(fn, base, lora, normal(3, 8, seed=9), fallback="silent")
    kept = lambda p, x: x @ mapped(p["w"], P("a"), P("a", None))
    assert_agrees(kept, base, lora, normal(3, 8, seed=9))


@pytest.mark.parametrize("length", [0, 1])
def test_a_loop_that_puts_a_weight_into_its_carry(length):
    leaf = normal(8, 6)
    loop = lambda w, c: lax.scan(lambda _, __: (w, None), c, None, length=length)[0]
    fn = lambda p, x: x @ jax.jit(loop)(p["w"], jnp.ones((8, 6)))
    got = assert_agrees(
        fn, {"w": leaf}, {"w": node((8, 6), (0,), (1,))}, normal(3, 8), fallback="silent"
    )
    assert np.any(np.asarray(got[1]["w"].a)) == bool(length)
