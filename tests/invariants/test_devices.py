"""Many devices: pmap, shard_map inside and out, automatic and explicit sharding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import noisy, normal

import lowrank_jax as lowrank

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices"),
    pytest.mark.usefixtures("fast_compile"),
]

W = {"w": normal(8, 16), "v": normal(16, 8)}
X = np.asarray(normal(16, 8, seed=1))


def fn(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])


@functools.cache
def adapted():
    config = lowrank.LoraConfig(rank=2, alpha=3, targets="*")
    base, lora = lowrank.init(jax.random.key(3), W, config)
    return base, noisy(lora, scale=0.3)


def mesh(shape=(8,), names=("d",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def differentiated(run):
    """adapter -> (gradient of the sum, result), compiled."""

    def total(lora):
        y = run(lora)
        return y.sum(), y

    return jax.jit(jax.grad(total, has_aux=True))


@functools.cache
def expected():
    base, lora = adapted()
    return differentiated(lambda l: fn(lowrank.merge(base, l), X))(lora)


def assert_expected(found):
    (gradient, value), (mine, y) = expected(), found
    chex.assert_trees_all_close(y, value, atol=1e-5)
    chex.assert_trees_all_close(mine, gradient, rtol=1e-4, atol=1e-5)


def test_pmap():
    base, lora = adapted()
    lifted = lowrank.lift(fn, fallback="raise")
    x = X.reshape(8, 2, 8)

    def each(lora, base, x):
        run = lambda l: lifted(lowrank.combine(base, l), x)
        y = run(lora)
        return y, lax.psum(jax.grad(lambda l: run(l).sum())(lora), "i")

    y, grads = jax.pmap(each, axis_name="i", in_axes=(None, None, 0))(lora, base, x)
    assert_expected((jax.tree.map(lambda g: np.asarray(g)[0], grads), y.reshape(16, 8)))


@pytest.mark.parametrize(
    ("quantized", "dora", "count"),
    [
        pytest.param(False, False, 8, marks=pytest.mark.slow),
        pytest.param(True, False, 4, marks=pytest.mark.slow),
        (True, True, 4),
    ],
)
def test_training_under_pmap(quantized, dora, count):
    """Three steps of Adam, the gradients averaged over devices: adapters and losses of one."""
    params = {"w": normal(32, 64) / 8, "v": normal(64, 32) / 8}
    if quantized:
        params = lowrank.quantize(params, lowrank.QuantConfig(block_size=32, targets="*"))
    config = lowrank.LoraConfig(rank=2, alpha=3, targets="*", dora=dora)
    base, lora = lowrank.init(jax.random.key(3), params, config)
    lora, tx = noisy(lora), optax.adam(1e-2)
    x = np.asarray(normal(3, 16, 32, seed=1))

    def step(fn, mean, lora, state, base, x):
        loss = lambda lora: jnp.square(fn(base, lora, x) - 1).mean()
        value, grads = mean(jax.value_and_grad(loss)(lora))
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    def train(step, lora, state, base, batches):
        values = []
        for batch in batches:
            lora, state, value = step(lora, state, base, batch)
            values.append(value)
        return lora, values

    lifted = lowrank.lift(fn, fallback="raise")
    live = lambda base, lora, x: lifted(lowrank.combine(base, lora), x)
    mapped = jax.pmap(
        functools.partial(step, live, functools.partial(lax.pmean, axis_name="i")),
        axis_name="i",
        devices=jax.devices()[:count],
    )
    copies = jax.tree.map(lambda leaf: np.stack([leaf] * count), (lora, tx.init(lora), base))
    got = train(mapped, *copies, x.reshape(3, count, -1, 32))
    merged = lambda base, lora, x: fn(lowrank.merge(base, lora), x)
    alone = jax.jit(functools.partial(step, merged, lambda tree: tree))
    want = train(alone, lora, tx.init(lora), base, x)
    for device in range(count):
        mine = jax.tree.map(lambda leaf, device=device: np.asarray(leaf)[device], got)
        chex.assert_trees_all_close(mine, want, rtol=1e-4, atol=1e-5)


def column_row(p, x):
    """Tensor parallel by hand: w split on its outputs, v on its inputs."""
    return jnp.tanh(lax.psum(jnp.tanh(x @ p["w"]) @ p["v"], "d"))


CASES = {
    "data": (fn, {"w": P(), "v": P()}, P("d"), P("d")),
    "tensor": (column_row, {"w": P(None, "d"), "v": P("d")}, P(), P()),
}


@pytest.mark.parametrize("case", CASES)
def test_lift_of_a_shard_mapped_function(case):
    body, specs, x_spec, out = CASES[case]
    mapped = jax.shard_map(body, mesh=mesh(), in_specs=(specs, x_spec), out_specs=out)
    base, lora = adapted()
    lifted = lowrank.lift(mapped, fallback="raise")
    assert_expected(differentiated(lambda l: lifted(lowrank.combine(base, l), X))(lora))


def test_shard_map_of_a_lifted_function():
    base, lora = adapted()
    lifted = lowrank.lift(fn, fallback="raise")

    def run(l, base, x):
        return lifted(lowrank.combine(base, l), x)

    mapped = jax.shard_map(run, mesh=mesh(), in_specs=(P(), P(), P("d")), out_specs=P("d"))
    assert_expected(differentiated(lambda l: mapped(l, base, X))(lora))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4)])
def test_jit_with_named_shardings(shape, kind):
    grid = mesh(shape, ("data", "model"), kind)
    base, lora = adapted()
    specs = {"w": P(None, "model"), "v": P("model", None)}
    with jax.set_mesh(grid):
        put = lambda x, spec: jax.device_put(x, NamedSharding(grid, spec))
        base = {name: put(leaf, specs[name]) for name, leaf in base.items()}
        lora = jax.tree.map(lambda x: put(x, P()), lora)
        x = put(X, P("data"))
        lifted = lowrank.lift(tensor_parallel(kind), fallback="raise")
        found = differentiated(lambda l: lifted(lowrank.combine(base, l), x))(lora)
    assert_expected(found)


def tensor_parallel(kind):
    """fn as a user writes it for an explicit mesh: the contracted sharded axis says its result."""
    if kind == AxisType.Auto:
        return fn

    def explicit(p, x):
        h = jnp.tanh(x @ p["w"])
        return jnp.tanh(jnp.einsum("bi,io->bo", h, p["v"], out_sharding=P("data", None)))

    return explicit
