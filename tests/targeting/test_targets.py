"""Leaves whose axes no plan can tell: LoraConfig(axes=...) names them, or a twin is planned."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")
SIZES = jnp.array([3, 0, 2], jnp.int32)
ROWS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


@jax.custom_vjp
def grouped(x, w):
    """Each group of rows times its own weight, as hand-written kernels do it: opaque."""
    return lax.ragged_dot(x, w, SIZES)


def _forward(x, w):
    return grouped(x, w), (x, w)


def _backward(kept, dy):
    return jax.vjp(lambda x, w: lax.ragged_dot(x, w, SIZES), *kept)[1](dy)


grouped.defvjp(_forward, _backward)


def experts(params, x):
    return jnp.tanh(grouped(x, params["w"]))


def twin(params, x):
    """The same by plain products."""
    return jnp.tanh(lax.ragged_dot(x, params["w"], SIZES))


def random_like(tree):
    draw = np.random.default_rng(1).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), leaf.dtype), tree)


EXPERTS = {"w": random_like(jnp.zeros((3, 4, 6)))}


def check(fn, params, lora, *args):
    """The lifted function is the function of the merged weights, and says that it builds them."""
    lora = random_like(lora)
    loss = lambda f: lambda lora: (f(lora) ** 2).sum()
    live = lowrank.lift(fn)
    with pytest.warns(lowrank.MaterializeWarning):
        got = jax.value_and_grad(loss(lambda l: live(lowrank.combine(params, l), *args)))(lora)
    want = jax.value_and_grad(loss(lambda l: fn(lowrank.merge(params, l), *args)))(lora)
    chex.assert_trees_all_close(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("pair", [(1, 2), ((1,), (2,)), ([-2], -1)])
@pytest.mark.parametrize("targets", ["all-linear", ()])
def test_experts_behind_an_opaque_call(pair, targets):
    plan = lowrank.plan(experts, EXPERTS, ROWS)
    assert plan["w"].op == "other"
    config = lowrank.LoraConfig(rank=2, targets=targets, axes={"w": pair}, exclude=())
    assert lowrank.LoraConfig.from_dict(config.to_dict()) == config
    base, lora = lowrank.init(jax.random.key(0), EXPERTS, config, plan=plan)
    node = lora["w"]
    assert (node.fan_in, node.fan_out, node.stack, node.kind) == ((1,), (2,), (0,), "dot")
    chex.assert_shape((node.a, node.b), [(3, 4, 2), (3, 2, 6)])
    check(experts, base, lora, ROWS)


def test_the_plan_of_a_twin():
    plan = lowrank.plan(twin, EXPERTS, ROWS)
    base, lora = lowrank.init(jax.random.key(0), EXPERTS, lowrank.LoraConfig(rank=2), plan=plan)
    assert (lora["w"].fan_in, lora["w"].fan_out, lora["w"].stack) == ((1,), (2,), (0,))
    check(experts, base, lora, ROWS)


def test_without_a_plan():
    config = lowrank.LoraConfig(rank=2, targets=(), axes={"w": (1, 2)})
    _, lora = lowrank.init(jax.random.key(0), EXPERTS, config)
    assert lora["w"].stack == (0,)


def test_a_masked_convolution():
    mask = np.tri(3)[:, :, None, None] * np.ones((3, 3, 2, 5))
    model, x = nn.Conv(5, (3, 3), mask=mask), jnp.ones((1, 6, 6, 2))
    params = random_like(model.init(jax.random.key(0), x))
    plan = lowrank.plan(model.apply, params, x)
    with pytest.raises(lowrank.AxesError, match=r"axes=\{'params/kernel': \(fan_in, fan_out\)"):
        config = lowrank.LoraConfig(rank=2, targets="params/kernel")
        lowrank.init(jax.random.key(0), params, config, plan=plan)
    config = lowrank.LoraConfig(rank=2, axes={"**/kernel": ((0, 1, 2), 3)})
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    check(model.apply, base, lora, x)


def test_a_weight_normed_kernel():
    model = nn.WeightNorm(nn.DenseGeneral((3, 4)))
    x = jnp.ones((2, 5))
    params = random_like(model.init(jax.random.key(0), x))
    path = next(path for path in lowrank.plan(model.apply, params, x) if path.endswith("kernel"))
    config = lowrank.LoraConfig(rank=2, targets=(), axes={path: (0, (1, 2))})
    base, lora = lowrank.init(jax.random.key(0), params, config)
    check(model.apply, base, lora, x)


def test_axes_stand_before_the_plan_and_stack_after_them():
    plan = lowrank.plan(twin, EXPERTS, ROWS)
    config = lowrank.LoraConfig(rank=2, axes={"w": ((0, 1), 2)})
    _, lora = lowrank.init(jax.random.key(0), EXPERTS, config, plan=plan)
    assert (lora["w"].fan_in, lora["w"].stack) == ((0, 1), ())
    config = lowrank.LoraConfig(rank=2, axes={"w": ((0, 1), 2)}, stack={"w": 0})
    _, lora = lowrank.init(jax.random.key(0), EXPERTS, config, plan=plan)
    assert (lora["w"].fan_in, lora["w"].stack) == ((1,), (0,))


@pytest.mark.parametrize(
    ("axes", "error"),
    [
        ({"w": 1}, r"axes\['w'\] takes \(fan_in, fan_out\), not 1"),
        ({"w": (1, "o")}, r"axes\['w'\]\['fan_out'\] takes axes \(integers\), not 'o'"),
        ({"w": (1, 1)}, r"axes of 'w' are fan_in=\(1,\), fan_out=\(1,\): the leaf has 3 axes"),
        ({"w": (1, 3)}, "the leaf has 3 axes"),
        ({"w": (1, ())}, "the leaf has 3 axes"),
        ({"v": (1, 2)}, "axes pattern 'v' matches none"),
    ],
)
def test_axes_that_are_not_the_leafs_are_refused(axes, error):
    with pytest.raises(lowrank.LowrankError, match=error):
        config = lowrank.LoraConfig(rank=2, targets=(), axes=axes)
        lowrank.init(jax.random.key(0), EXPERTS, config)


def mixture(p, x):
    """Experts by one dense product over all of them, and a router."""
    weights, chosen = lax.top_k(nn.softmax(x @ p["router"] + p["bias"]), 2)
    gate = jnp.zeros((len(x), 4)).at[jnp.arange(len(x))[:, None], chosen].set(weights)
    h = nn.silu(jnp.einsum("bm,emh->beh", x, p["up"]))
    return x + jnp.einsum("be,bem->bm", gate, jnp.einsum("beh,ehm->bem", h, p["down"]))


def unrolled(p, x):
    return jnp.tanh(mixture(p["moe"], jnp.tanh(x @ p["in"]))) @ p["out"]


def scanned(p, x):
    layer = lambda x, p: (mixture(p, jnp.tanh(x @ p["in"])), None)
    return lax.scan(layer, x, {**p["moe"], "in": p["in"]})[0] @ p["out"]


def parameters(*layers):
    """As many layers as experts: nothing can be told by sizes alone."""
    sizes = {"router": (6, 4), "bias": (4,), "up": (4, 6, 5), "down": (4, 5, 6)}
    moe = {name: jnp.zeros((*layers, *size)) for name, size in sizes.items()}
    return random_like({"in": jnp.zeros((*layers, 6, 6)), "moe": moe, "out": jnp.zeros((6, 3))})


@pytest.mark.parametrize(("fn", "layers"), [(unrolled, ()), (scanned, (4,))])
def test_routers_and_experts_that_share_their_input_factor_are_noted(fn, layers):
    params, x, at = parameters(*layers), ROWS[:, [0, 1, 2, 3, 0, 1]], len(layers)
    plan = lowrank.plan(fn, params, x)
    assert [path for path, use in plan.items() if use.router] == ["moe/router"]
    assert {path: use.shared for path, use in plan.items() if use.shared} == {
        "moe/up": ((at, "moe/down"),)
    }
    rows = {line.split()[0]: line for line in str(plan).splitlines() if "×" in line}
    assert "router" in rows["moe/router"].removeprefix("moe/router")
    assert f"axis {at} is a stack axis of moe/down" in rows["moe/up"]
    config = lowrank.LoraConfig(rank=2, stack={"moe/up": (*range(at), at)})
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    assert lora["moe"]["up"].a.shape == (*layers, 4, 6, 2)  # one a for each expert
    lora = random_like(lora)
    got = lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), x)
    np.testing.assert_allclose(got, fn(lowrank.merge(base, lora), x), rtol=1e-4, atol=1e-4)


def test_a_named_matrix_whose_reshape_mixes_its_axes_is_built():
    fn = lambda p, x: jnp.tanh(x @ p["w"].reshape(8, 3))
    params, x = random_like({"w": jnp.zeros((6, 4))}), random_like(jnp.zeros((2, 8)))
    plan = lowrank.plan(fn, params, x)
    config = lowrank.LoraConfig(rank=2, targets="w")
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan)
    assert (lora["w"].fan_in, lora["w"].fan_out) == ((0,), (1,))
    check(fn, base, lora, x)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("on_codes", [False, True])
def test_vmapped_kernels_of_convolutions(shared, on_codes):
    def fn(p, x):
        own = lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME")
        return jnp.tanh(jax.vmap(own, (0, None if shared else 0))(p["w"], x))

    params = random_like({"w": jnp.zeros((3, 5, 8, 2, 2))})
    x = random_like(jnp.zeros((1, 8, 4, 4) if shared else (3, 1, 8, 4, 4)))
    plan = lowrank.plan(fn, params, x)
    assert (plan["w"].op, plan["w"].fan_in) == ("conv", (2, 3, 4))
    base = params
    if on_codes:
        quant = lowrank.QuantConfig(targets="w", block_size=32, packing="uint8")
        base = lowrank.quantize(params, quant, plan=plan)
    config = lowrank.LoraConfig(rank=2, targets="w")
    base, lora = lowrank.init(jax.random.key(0), base, config, plan=plan)
    lora = random_like(lora)
    got = lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), x)
    np.testing.assert_allclose(got, fn(lowrank.merge(base, lora), x), rtol=1e-4, atol=1e-5)
