"""Concatenated weights: one product of the base, and each part keeps its factors and masks."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import normal
from small_weights import TOLERANCE, assert_agrees, node, quantized, small_blocks  # noqa: F401

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

JOINED = {
    "along fan-out": lambda p, x: jnp.split(
        x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1), 3, -1
    ),
    "along fan-in": lambda p, x: jnp.tile(x, 3) @ jnp.concatenate([p["q"], p["k"], p["v"]], 0),
    "on the left": lambda p, x: jnp.concatenate([p["q"].T, p["k"].T], 0) @ x.T,
    "stacked, one input": lambda p, x: jnp.einsum("bi,nio->bno", x, jnp.stack([p["q"], p["v"]])),
    "stacked, an input each": lambda p, x: jnp.einsum(
        "nbi,nio->nbo", jnp.stack([x, 2 * x]), jnp.stack([p["q"], p["v"]])
    ),
    "with an array": lambda p, x: x @ jnp.concatenate([p["q"], jnp.ones((8, 2)), p["k"]], 1),
    "and cut elsewhere": lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1)[:, 3:11:2],
    "and an index": lambda p, x: x @ jnp.stack([p["q"], p["k"], p["v"]])[1],
    "and padded": lambda p, x: x @ jnp.pad(jnp.hstack([p["q"], p["k"]]), ((0, 0), (2, 1))),
    "and reversed": lambda p, x: x @ lax.rev(jnp.vstack([p["q"][:5], p["k"][5:]]), (0, 1)),
    "in an inner jit": lambda p, x: jax.jit(lambda w, x: x @ w)(jnp.hstack([p["q"], p["k"]]), x),
    "in a cond": lambda p, x: lax.cond(
        x[0, 0] > 0, lambda w: x @ w, lambda w: -x @ w, jnp.hstack([p["q"], p["k"]])
    ),
    "in a loop": lambda p, x: lax.scan(
        lambda h, _: (jnp.tanh(h @ jnp.hstack([p["q"][:, :4], p["k"][:, 4:]])), None), x, None, 2
    )[0],
    "joined, then scanned over": lambda p, x: lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack([p["q"], p["k"], p["v"]])
    )[0],
}

# With DoRA and on codes, one for each way in which a product can take the axis joined along, and
# one loop; the rest is tried by `pytest -m slow`.
WAYS = {"along fan-out", "along fan-in", "stacked, an input each", "joined, then scanned over"}


def joined():
    for kind in ("dense", "DoRA", "codes"):
        for name in JOINED:
            slow = () if kind == "dense" or name in WAYS else (pytest.mark.slow,)
            yield pytest.param(name, kind, marks=slow, id=f"{kind}, {name}")


@pytest.mark.parametrize(("name", "kind"), [*joined()])
def test_joined_weights_stay_factored(name, kind):
    leaves = {k: normal(8, 8, seed=i, scale=0.4) for i, k in enumerate("qkv")}
    lora = {k: node((8, 8), (0,), (1,), seed=i, dora=kind == "DoRA") for i, k in enumerate("qkv")}
    base = {k: quantized(leaf, (0,)) for k, leaf in leaves.items()} if kind == "codes" else leaves
    assert_agrees(JOINED[name], base, lora, normal(4, 8, seed=9))


@pytest.mark.parametrize("dora", [False, True])
def test_joined_experts_and_kernels(dora):
    options = {"dora": dora}
    experts = {k: normal(3, 4, 6, seed=i) for i, k in enumerate("gu")}
    lora = {k: node((3, 4, 6), (1,), (2,), (0,), seed=i, **options) for i, k in enumerate("gu")}
    sizes = jnp.array([2, 0, 3], jnp.int32)
    fn = lambda p, x: lax.ragged_dot(x, jnp.concatenate([p["g"], p["u"]], 2), sizes)
    assert_agrees(fn, experts, lora, normal(5, 4, seed=9))
    kernels = {k: normal(3, 4, 6, seed=i) for i, k in enumerate("gu")}
    options["kind"] = "conv"
    lora = {k: node((3, 4, 6), (0, 1), (2,), seed=i, **options) for i, k in enumerate("gu")}

    def conv(p, x):
        kernel = jnp.concatenate([p["g"], p["u"]], 2)
        return lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )

    assert_agrees(conv, kernels, lora, normal(2, 5, 4, seed=9))


def test_of_joined_weights_the_base_is_one_product_with_dora_too():
    """[4, 8] times [8, 24], and for each part two thin ones."""
    leaves = {k: normal(8, 8, seed=i, scale=0.4) for i, k in enumerate("qkv")}
    lora = {k: node((8, 8), (0,), (1,), seed=i, dora=True) for i, k in enumerate("qkv")}
    tree, x = lowrank.combine(leaves, lora), normal(4, 8, seed=9)
    text = jax.jit(lowrank.lift(JOINED["along fan-out"])).lower(tree, x).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert sum("-> tensor<4x24xf32>" in line for line in dots) == 1
    assert not any("tensor<4x8xf32>, tensor<8x8xf32>" in line for line in dots)


@pytest.mark.parametrize("dora", [False, True])
def test_joined_weights_have_the_masks_of_each(dora):
    leaves = {k: normal(8, 8, seed=i, scale=0.4) for i, k in enumerate("qk")}
    lora = {k: node((8, 8), (0,), (1,), seed=i, dora=dora) for i, k in enumerate("qk")}
    key, x = jax.random.key(5), normal(4, 8, seed=9)
    apart = lambda p, x: jnp.concatenate([x @ p["q"], x @ p["k"]], 1)
    joined = lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1)
    summed = lambda p, x: x @ p["q"] + x @ p["k"]
    along_fan_in = lambda p, x: jnp.tile(x, 2) @ jnp.concatenate([p["q"], p["k"]], 0)

    def run(fn, lora):
        tree = lowrank.combine(leaves, lora, scale=0.7, dropout=0.5, key=key)
        return lowrank.lift(fn, fallback="raise")(tree, x)

    both = jax.jit(lambda lora: [run(fn, lora) for fn in (joined, apart, along_fan_in, summed)])
    joined, apart, along_fan_in, summed = both(lora)
    chex.assert_trees_all_close(joined, apart, atol=TOLERANCE)
    chex.assert_trees_all_close(along_fan_in, summed, atol=TOLERANCE)
    assert np.abs(joined - x @ jnp.hstack([*leaves.values()])).max() > 0.1


def test_joined_weights_in_a_ragged_product_over_the_contracted_axis():
    numbers = lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), (1,), ())
    sizes = jnp.array([3, 7, 6], jnp.int32)
    for axis, width in ((0, 16), (1, 8)):
        fn = lambda p, x, axis=axis: lax.ragged_dot_general(
            x, jnp.concatenate([p["w"], p["v"]], axis), sizes, numbers
        )
        base = {name: quantized(normal(8, 8, seed=i), (0,)) for i, name in enumerate("wv")}
        x = normal(3, width, seed=9)
        live = lowrank.lift(fn, fallback="silent")
        want = fn(lowrank.dequantize(base), x)
        chex.assert_trees_all_close(live(base, x), want, rtol=1e-5, atol=1e-5)
