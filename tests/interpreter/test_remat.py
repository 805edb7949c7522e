"""Rematerialization policies take products of quantized weights for products."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import checkpoint_policies as policies
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from models import normal

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")
X = normal(3, 64)
QUANT = lowrank.QuantConfig(targets="*", packing="uint8", double_quant=False)


def decodes(jaxpr):
    """Products with codes in a jaxpr, those of inner jaxprs included."""
    inner = [getattr(v, "jaxpr", v) for eqn in jaxpr.eqns for v in eqn.params.values()]
    own = sum(eqn.primitive.name == "lowrank_quantized_dot" for eqn in jaxpr.eqns)
    return own + sum(decodes(j) for j in inner if hasattr(j, "eqns"))


def layers(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])


def batched(p, x):
    heads = jnp.broadcast_to(x[:, None], (3, 4, 64))
    y = jnp.einsum("bei,ieo->beo", heads, p["w"].reshape(64, 4, 16))
    return jnp.tanh(y).reshape(3, 64) @ p["v"]


def convolved(p, x):
    kernel = p["w"].reshape(4, 16, 64)
    y = lax.conv_general_dilated(
        x.reshape(3, 4, 16), kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(y) @ p["v"]


def counted(fn, policy, where, targets="*"):
    """The decodes of a gradient of fn rematerialized, inside the lifted function or around it."""
    params = {"w": normal(64, 64), "v": normal(64, 64, seed=1)}
    base = lowrank.quantize(params, QUANT)
    base, lora = lowrank.init(0, base, lowrank.LoraConfig(rank=2, targets=targets))

    def loss(lora):
        if where == "inside":
            call = lowrank.lift(lambda p, x: jax.checkpoint(fn, policy=policy)(p, x))
            return call(lowrank.combine(base, lora), X).sum()
        live = lambda lora: lowrank.lift(fn)(lowrank.combine(base, lora), X).sum()
        own = None if policy is None else lowrank.checkpoint_policy(policy)
        return jax.checkpoint(live, policy=own)(lora)

    return decodes(jax.make_jaxpr(jax.grad(loss))(lora).jaxpr)


@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.parametrize(
    ("policy", "count"),
    [
        (None, 5),
        (policies.nothing_saveable, 5),
        (policies.dots_saveable, 3),
        (policies.dots_with_no_batch_dims_saveable, 3),
        (policies.everything_saveable, 3),
        (policies.save_only_these_names("none"), 5),
    ],
)
def test_each_product_that_a_policy_saves_is_decoded_for_once(where, policy, count):
    assert counted(layers, policy, where) == count


def test_a_policy_sees_the_batch_and_the_kind_of_a_product():
    seen = []

    def policy(primitive, *avals, **params):
        numbers = params.get("dimension_numbers")
        if primitive in (lax.dot_general_p, lax.conv_general_dilated_p):
            batched = primitive is lax.dot_general_p and bool(numbers[1][0])
            seen.append((primitive.name, batched, avals[0].shape))
        return False

    for fn, name, batch, shape in (
        (layers, "dot_general", False, (3, 64)),
        (batched, "dot_general", True, (3, 4, 64)),
        (convolved, "conv_general_dilated", False, (3, 4, 16)),
    ):
        seen.clear()
        counted(fn, policy, "around", targets="v")
        assert (name, batch, shape) in seen


@pytest.mark.parametrize(
    ("policy", "count"), [(policies.dots_saveable, 3), (policies.everything_saveable, 2)]
)
def test_ragged_products_are_asked_about_as_they_are(policy, count):
    """No policy of JAX's own saves a plain one as a dot."""
    params = {"w": normal(2, 64, 64)}
    fn = lambda p, x: jnp.sin(lax.ragged_dot(jnp.sin(x), p["w"], jnp.array([1, 2])))
    quant = lowrank.QuantConfig(targets="w", packing="uint8", double_quant=False)
    base = lowrank.quantize(params, quant, plan=lowrank.plan(fn, params, X))
    call = lowrank.lift(lambda p, x: jax.checkpoint(fn, policy=policy)(p, x), fallback="raise")
    slope = jax.make_jaxpr(jax.grad(lambda x: call(base, x).sum()))(X)
    assert decodes(slope.jaxpr) == count


OFFLOAD = policies.save_and_offload_only_these_names(
    names_which_can_be_saved=["saved"],
    names_which_can_be_offloaded=["offloaded"],
    offload_src="device",
    offload_dst="pinned_host",
)


def named_layers(params, x):
    """Layers that name an activation to save, one to offload, and one to compute again."""

    def layer(x, w):
        x = checkpoint_name(jnp.tanh(x), "offloaded")
        y = checkpoint_name(jnp.tanh(x @ w["up"]), "saved")
        return x + checkpoint_name(jnp.sin(y), "neither") @ w["down"], None

    return lax.scan(jax.checkpoint(layer, policy=OFFLOAD), x, params)[0]


def find_moves(jaxpr):
    """(memory, shape) of all that moves between memories, and the names, in a jaxpr's text."""
    names = re.findall(r"name\[name=(\w+)\]", jaxpr)
    pattern = r"\w+:f32(<host>)?\[([\d,]+)\] = device_put\["
    return sorted(re.findall(pattern, jaxpr)), sorted(names)


@pytest.mark.parametrize("quant", [None, QUANT])
def test_a_lifted_function_keeps_names_and_offloads_by_them(quant):
    shapes = {"up": (2, 64, 128), "down": (2, 128, 64)}
    params = {name: normal(*shape) / 8 for name, shape in shapes.items()}
    plan = lowrank.plan(named_layers, params, X)
    frozen = lowrank.quantize(params, quant, plan=plan) if quant else params
    base, lora = lowrank.init(0, frozen, lowrank.LoraConfig(rank=2, targets="*"), plan=plan)
    lifted = lowrank.lift(named_layers, fallback="raise")
    plain = lambda params: named_layers(params, X).sum()
    ours = lambda lora: lifted(lowrank.combine(base, lora), X).sum()
    moves, names = find_moves(str(jax.make_jaxpr(jax.grad(plain))(params)))
    # the input of each layer to the host, and back; up's result stays, the sine is not named there
    assert [shape for _, shape in moves] == ["3,64", "3,64"]
    assert {host for host, _ in moves} == {"", "<host>"}
    assert find_moves(str(jax.make_jaxpr(jax.grad(ours))(lora))) == (moves, names)
    lora = jax.tree.map(lambda leaf: leaf + 0.01, lora)
    merged = lambda lora: plain(lowrank.merge(base, lora))
    chex.assert_trees_all_close(jax.grad(ours)(lora), jax.grad(merged)(lora), rtol=1e-4, atol=1e-5)
