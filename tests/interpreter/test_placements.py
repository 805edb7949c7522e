"""Weights that a function lays out or moves: shardings of inner jits, the memory of the host."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from models import normal

import lowrank_jax as lowrank

pytestmark = [
    pytest.mark.usefixtures("fast_compile"),
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices"),
]
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
X = normal(3, 64)
QUANT = lowrank.QuantConfig(block_size=32, packing="uint8", targets="w")
KINDS = ("dense", "nf4", "DoRA", "DoRA on nf4")


def made(kind, *stack):
    """A base and a random adapter of a weight [*stack, 64, 32]."""
    params = {"w": normal(*stack, 64, 32, scale=0.1)}
    fan_in, fan_out = len(stack), len(stack) + 1
    options = {"targets": (), "axes": {"w": (fan_in, fan_out)}, "dora": "DoRA" in kind}
    base = params
    if "nf4" in kind:
        layers = lambda p, x: lax.map(lambda w: x @ w, p["w"]) if stack else x @ p["w"]
        plan = lowrank.plan(layers, params, X)
        base = lowrank.quantize(params, QUANT, plan=plan)
    base, lora = lowrank.init(jax.random.key(0), base, lowrank.LoraConfig(rank=2, **options))
    return base, jax.tree.map(lambda leaf: leaf + normal(*leaf.shape, seed=5), lora)


def check(fn, base, lora, dense, *args, jit=True):
    """The lifted function of base is fn of the merged weights of dense, with its gradient."""
    live = lowrank.lift(fn, fallback="raise")
    wrap = jax.jit if jit else lambda f: f
    loss = lambda out: (out**2).sum()
    got = wrap(jax.value_and_grad(lambda l: loss(live(lowrank.combine(base, l), *args))))(lora)
    want = jax.jit(jax.value_and_grad(lambda l: loss(fn(lowrank.merge(dense, l), *args))))(lora)
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-3)


def laid_out(fn, *spec):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(fn, out_shardings=NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("move", "back", "spec"),
    [
        (lambda w: w, lambda w: w, (None, "d")),
        (lambda w: w.T, lambda w: w.T, ("d", None)),
        (lambda w: w.T, lambda w: w.T, (None, "d")),
        (lambda w: w.reshape(8, 8, 32), lambda w: w.reshape(64, 32), ("d",)),
        (lambda w: w * 2, lambda w: w, ("d",)),
    ],
)
def test_an_inner_jit_with_out_shardings_that_returns_a_weight(move, back, spec, kind):
    base, lora = made(kind)
    check(lambda p, x: x @ back(laid_out(move, *spec)(p["w"])), base, lora, base, X)


def test_out_shardings_are_of_each_call_and_hold_for_arrays():
    base, lora = made("dense")
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = lowrank.combine(base, lora)
    double = lambda w, x: (w * 2, x @ w)

    def fn(p, x):
        specs = P("d"), P(None, "d")
        outs = [jax.jit(double, out_shardings=NamedSharding(mesh, s))(p["w"], x) for s in specs]
        return [x @ w for w, _ in outs], [y for _, y in outs]

    x = normal(8, 64)
    _, (one, other) = jax.jit(lowrank.lift(fn, fallback="raise"))(tree, x)
    assert one.sharding.spec == P("d")
    assert other.sharding.spec == P(None, "d")
    want = fn(lowrank.merge(base, lora), x)
    chex.assert_trees_all_close(lowrank.lift(fn)(tree, x), want, rtol=1e-4, atol=1e-3)


def on_host(tree):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return jax.device_put(tree, place)


TARGETS = {
    "space": DEVICE,
    "sharding": jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="device"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("jit", [True, False])
def test_a_base_in_the_memory_of_the_host(kind, target, jit):
    base, lora = made(kind)
    fn = lambda p, x: x @ jax.device_put(p["w"], TARGETS[target])
    check(fn, on_host(base), lora, base, X, jit=jit)
    merged = lowrank.merge(on_host(base), lora)
    chex.assert_trees_all_close(merged, lowrank.merge(base, lora), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_fetched_from_the_host_one_by_one(kind):
    base, lora = made(kind, 3)

    def fn(p, x):
        layer = lambda x, w: (
            jnp.tanh(x @ jax.device_put(w, DEVICE)) @ jnp.ones((32, 64)) / 9,
            None,
        )
        return lax.scan(layer, x, p["w"])[0]

    check(fn, on_host(base), lora, base, X)


def test_there_and_back():
    base, lora = made("nf4")
    fn = lambda p, x: x @ jax.device_put(jax.device_put(p["w"], HOST), DEVICE)
    got = jax.jit(lowrank.lift(fn, fallback="raise"))(lowrank.combine(base, lora), X)
    chex.assert_trees_all_close(got, X @ lowrank.merge(base, lora)["w"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_that_closes_over_a_base_on_an_explicit_mesh(kind):
    base, lora = made(kind)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    fn = lambda p, x: x @ p["w"]
    want = jax.tree.map(np.asarray, (fn(lowrank.merge(base, lora), X), lowrank.merge(base, lora)))
    specs = lowrank.specs(base, {"w": P(None, "y")})
    with jax.set_mesh(mesh):
        placed = jax.device_put(base, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
        x, lora = jnp.asarray(X), jax.device_put(lora, NamedSharding(mesh, P()))
        whole = lambda lora: (
            lowrank.lift(fn)(lowrank.combine(placed, lora), x),
            lowrank.merge(placed, lora),
        )
        got = jax.jit(whole)(lora)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, got), want, rtol=1e-5, atol=1e-5)


def test_keys_among_the_parameters_are_left_alone_by_an_optimizer():
    import optax

    params = {"w": normal(4, 3), "key": jax.random.key(1), "count": jnp.int32(3)}
    base, lora = lowrank.init(jax.random.key(0), params, lowrank.LoraConfig(rank=2, targets="w"))
    tree = lowrank.combine(base, lora, dropout=0.5, key=jax.random.key(2))
    tx = lowrank.only_adapters(optax.adam(1e-2))
    loss = lambda tree, x: (lowrank.lift(lambda p, x: x @ p["w"])(tree, x) ** 2).sum()

    @jax.jit
    def step(tree, state, x):
        gradient = jax.grad(loss, allow_int=True)(tree, x)
        updates, state = tx.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state

    after, _ = step(tree, tx.init(tree), normal(2, 4))
    chex.assert_trees_all_equal_structs(after, tree)
    for name in ("key", "count"):
        assert after[name] == tree[name]
    assert after["w"].key == tree["w"].key
    assert np.any(after["w"].delta.b != tree["w"].delta.b)
