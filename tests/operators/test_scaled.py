"""A weight times numbers along its axes stays factored and quantized; a mask is built, and said."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from models import normal
from small_weights import node, quantized, small_blocks  # noqa: F401

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")
SIZES = jnp.array([2, 0, 1], jnp.int32)


def scanned(p, x):
    layer = lambda x, w: (jnp.tanh(x @ (w[0] * w[1])), None)
    return lax.scan(layer, x, (p["w"], p["v"]))[0]


def with_two_kernels(p, x):
    joined = jnp.concatenate([p["w"], p["w"][:, ::-1]], 1)
    return x @ (joined * jnp.concatenate([p["v"], 2 * p["v"]]))


# shape and fan-in, fan-out and stack axes of the weight; shape of the numbers; shape of x; program
PROGRAMS = {
    "fan-out": ((8, 6), (0,), (1,), (), (6,), (3, 8), lambda p, x: x @ (p["w"] * p["v"])),
    "fan-in": ((8, 6), (0,), (1,), (), (8,), (3, 8), lambda p, x: x @ (p["v"][:, None] * p["w"])),
    "divided": ((8, 6), (0,), (1,), (), (6,), (3, 8), lambda p, x: x @ (p["w"] / p["v"])),
    "both, one after the other": (
        *((8, 8), (0,), (1,), (), (8,), (3, 8)),
        lambda p, x: x @ (p["w"] * p["v"] * p["v"][:, None]),
    ),
    "by a number": ((8, 6), (0,), (1,), (), (), (3, 8), lambda p, x: x @ (p["w"] * p["v"])),
    "transposed": ((6, 8), (1,), (0,), (), (6,), (3, 8), lambda p, x: x @ (p["w"].T * p["v"])),
    "then transposed": (
        *((6, 8), (1,), (0,), (), (8,), (3, 8)),
        lambda p, x: x @ (p["w"] * p["v"]).T,
    ),
    "sliced": (
        *((8, 6), (0,), (1,), (), (6,), (3, 4)),
        lambda p, x: x @ (p["w"] * p["v"])[2:6, ::-1],
    ),
    "heads": (
        *((8, 2, 4), (0,), (1, 2), (), (4,), (3, 8)),
        lambda p, x: x @ (p["w"] * p["v"]).reshape(8, 8),
    ),
    "layers": ((3, 8, 8), (1,), (2,), (0,), (3, 8), (3, 8), scanned),
    "experts": (
        *((3, 8, 6), (1,), (2,), (0,), (3, 6), (3, 8)),
        lambda p, x: lax.ragged_dot(x, p["w"] * p["v"][:, None], SIZES),
    ),
    "a batch": (
        *((3, 8, 6), (1,), (2,), (0,), (3, 8), (3, 5, 8)),
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"] * p["v"][:, :, None]),
    ),
    "convolution, output": (
        *((3, 2, 5), (0, 1), (2,), (), (5,), (1, 7, 2)),
        lambda p, x: lax.conv_general_dilated(
            x, p["w"] * p["v"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
    ),
    "convolution, input": (
        *((3, 2, 5), (0, 1), (2,), (), (2,), (1, 7, 2)),
        lambda p, x: lax.conv_general_dilated(
            x, p["w"] * p["v"][:, None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
    ),
    "joined": ((8, 6), (0,), (1,), (), (6,), (3, 8), with_two_kernels),
}
KINDS = ("LoRA", "DoRA", "on codes", "DoRA on int8", "codes")
OFTEN = ("fan-in", "layers", "experts")  # tried with dense bases and bare codes by default


def cases():
    for name in PROGRAMS:
        for kind in KINDS:
            default = kind == "DoRA on int8" or (name in OFTEN and kind in ("LoRA", "codes"))
            yield pytest.param(name, kind, marks=() if default else pytest.mark.slow)


@pytest.mark.parametrize(("name", "kind"), [*cases()])
def test_value_and_derivatives(name, kind):
    shape, fan_in, fan_out, stack, by, x, fn = PROGRAMS[name]
    params = {"w": normal(*shape), "v": 1 + jnp.abs(normal(*by, seed=4))}
    use = lowrank.plan(
        lambda p, x: jnp.tanh(fn(p, x)) @ jnp.ones((fn(p, x).shape[-1], 1)), params, normal(*x)
    )["w"]
    assert (use.op, use.fan_in, use.fan_out, use.stack)[1:] == (fan_in, fan_out, stack)
    base = dict(params)
    if "codes" in kind or "int8" in kind:
        base["w"] = quantized(params["w"], fan_in, stack, format="int8" if "8" in kind else "nf4")
    lora = {"w": node(shape, fan_in, fan_out, stack, dora="DoRA" in kind), "v": None}
    lora = {"w": None, "v": None} if kind == "codes" else lora
    x = normal(*x, seed=9)
    live, plain = lowrank.lift(fn, fallback="raise"), fn

    def losses(f, dense):
        def loss(lora, v, x):
            tree = {**base, "v": v}
            tree = lowrank.combine(tree, lora) if any(lora.values()) else tree
            y = f(dense(tree), x)
            return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)

    merged = lambda tree: (
        lowrank.merge(*lowrank.partition(tree)) if any(lora.values()) else lowrank.dequantize(tree)
    )
    both = jax.jit(lambda *args: (losses(live, lambda t: t)(*args), losses(plain, merged)(*args)))
    got, want = both(lora, params["v"], x)
    chex.assert_trees_all_close(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("on_codes", [False, True])
def test_a_mask_is_built_and_said(on_codes):
    leaf = normal(8, 6)
    mask = normal(8, 6, seed=3) > 0
    base = {"w": quantized(leaf, (0,)) if on_codes else leaf}
    fn = lambda p, x: jnp.tanh(x @ (p["w"] * mask)) @ jnp.ones((6, 2))
    assert "not followed: mul" in str(lowrank.plan(fn, {"w": leaf}, normal(3, 8)))
    tree = lowrank.combine(base, {"w": node((8, 6), (0,), (1,))})
    with pytest.warns(lowrank.MaterializeWarning, match="w: materialized at mul"):
        got = lowrank.lift(fn)(tree, normal(3, 8))
    chex.assert_trees_all_close(
        got, fn(lowrank.merge(*lowrank.partition(tree)), normal(3, 8)), rtol=1e-5
    )


def test_no_dense_weight_is_kept_or_decoded_beside_the_product():
    """The numbers act on the activation: no product of the weight's own size is in the gradient."""
    base = {"w": quantized(normal(8, 6), (0,)), "v": normal(6)}
    lora = {"w": node((8, 6), (0,), (1,)), "v": None}
    fn = lambda p, x: (x @ (p["w"] * p["v"])).sum()
    loss = lambda lora, x: lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), x)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(lora, normal(3, 8))
    shapes = {
        var.aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "mul" for var in eqn.outvars
    }
    assert (8, 6) not in shapes
