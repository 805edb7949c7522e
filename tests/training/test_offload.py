"""offload_state: the state in the memory of the host, and nothing else changed."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_jax as lowrank
from lowrank_jax._training import offload

pytestmark = pytest.mark.usefixtures("fast_compile")

ones = lambda *shape: jax.device_put(np.ones(shape, np.float32))
PARAMS = {"a": ones(2, 128, 16), "bias": ones(3), "no": None}
WAVES = lambda x: np.cos(np.arange(x.size).reshape(x.shape) + 1.0).astype(np.float32)
GRADS = jax.device_put(jax.tree.map(WAVES, PARAMS))
ADAM = optax.adam(1e-3)
offloaded = lowrank.offload_state


def kinds(tree):
    """Memory kinds of the arrays that have axes; all others are on the device."""
    leaves = jax.tree.leaves(tree)
    assert {x.sharding.memory_kind for x in leaves if x.ndim == 0} <= {"device"}
    return {x.sharding.memory_kind for x in leaves if x.ndim}


CASES = {
    "adam": ADAM,
    "quantized": lowrank.quantize_state(ADAM),
    "around MultiSteps": optax.MultiSteps(ADAM, 2).gradient_transformation(),
    "around a chain": optax.chain(optax.clip_by_global_norm(1.0), ADAM),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("jit", [True, False])
def test_same_updates_from_the_host(name, jit):
    tx, wrap = CASES[name], jax.jit if jit else lambda fn: fn
    moved = offloaded(tx)
    state, want = wrap(moved.init)(PARAMS), tx.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(want)
    for _ in range(2):
        assert kinds(state) == {"pinned_host"}
        updates, state = wrap(moved.update)(GRADS, state, PARAMS)
        again, want = wrap(tx.update)(GRADS, want, PARAMS)
        assert kinds(updates) == {"device"}
        chex.assert_trees_all_equal(updates, again)
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(want))


def test_keys_and_numbers():
    state = {"key": jax.random.key(0), "keys": jax.random.split(jax.random.key(0)), "number": 0.5}
    keep = optax.GradientTransformation(lambda _: state, lambda updates, s, _: (updates, s))
    tx = offloaded(keep)
    chex.assert_trees_all_equal(
        jax.jit(tx.update)(GRADS, tx.init(PARAMS))[1]["keys"], state["keys"]
    )


def test_in_scan_and_inside_only_adapters():
    params = {"w": ones(64, 64)}
    config = lowrank.LoraConfig(rank=4, alpha=3, targets="w")
    tree = lowrank.combine(*lowrank.init(jax.random.key(0), params, config))
    tx = lowrank.only_adapters(offloaded(ADAM))
    loss = lowrank.lift(lambda p: jnp.sum((jnp.ones((2, 64)) @ p["w"]) ** 2))

    def step(carry, _):
        tree, state = carry
        value, grads = jax.value_and_grad(loss)(tree)
        updates, state = tx.update(grads, state, tree)
        return (optax.apply_updates(tree, updates), state), value

    state = tx.init(tree)
    (_, after), losses = jax.jit(lambda c: jax.lax.scan(step, c, None, length=20))((tree, state))
    assert losses[-1] < losses[0]
    assert kinds(state) == kinds(after) == {"pinned_host"}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shardings_stay(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    sharding = NamedSharding(mesh, P(None, "x"))
    params, grads = jax.device_put(({"a": PARAMS["a"]}, {"a": GRADS["a"]}), sharding)
    tx = offloaded(lowrank.quantize_state(optax.rmsprop(1e-3)))
    state = tx.init(params)
    with jax.set_mesh(mesh):
        updates, after = jax.jit(tx.update, donate_argnums=1)(grads, state, params)
    assert state[0].nu["a"].codes.is_deleted()
    for array in (after[0].nu["a"].codes, after[0].nu["a"].absmax):
        assert array.sharding.is_equivalent_to(sharding.with_memory_kind("pinned_host"), 3)
    assert updates["a"].sharding.is_equivalent_to(sharding, 3)


def test_what_lies_nowhere_joins_the_mesh():
    """An array in host memory is committed: one that is made on a single device would not do."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = jax.device_put({"w": ones(256, 128)}, NamedSharding(mesh, P("x")))
    tx = offloaded(optax.adafactor(1e-3, min_dim_size_to_factor=8))
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert kinds(state) == {"pinned_host"}
    assert np.isfinite(updates["w"]).all()


@pytest.mark.parametrize("init", ["eager", "jit"])
def test_without_host_memory_it_says_so_once_and_goes_on(init, monkeypatch):
    monkeypatch.setattr(offload, "_KIND", "attic")
    tx = offloaded(ADAM)
    with pytest.warns(lowrank.OffloadWarning) as caught:
        state = (jax.jit(tx.init) if init == "jit" else tx.init)(PARAMS)
    (warning,) = caught
    text = str(warning.message)
    assert "stays in device memory: cpu:0 (one of 1 such devices) has no 'attic' memory" in text
    assert "only ['device', 'pinned_host', 'unpinned_host']; leave offload_state away there" in text
    assert init == "jit" or warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    assert kinds(state) == {"device"}
    chex.assert_trees_all_equal(updates, jax.jit(ADAM.update)(GRADS, ADAM.init(PARAMS), PARAMS)[0])


def test_compiled_without_the_arrays():
    """The memory of the arguments is what in_shardings say: what a cross-compiler gets."""
    tx = offloaded(ADAM)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    host = device.with_memory_kind("pinned_host")
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(tx.init, PARAMS)
    )
    memory = jax.tree.map(lambda x: host if x.ndim else device, state)
    update = jax.jit(
        tx.update, in_shardings=(device, memory), out_shardings=(device, memory), donate_argnums=1
    )
    compiled = update.lower(PARAMS, state).compile()
    chex.assert_trees_all_equal(
        compiled(GRADS, tx.init(PARAMS))[0], jax.jit(ADAM.update)(GRADS, ADAM.init(PARAMS))[0]
    )
    assert kinds(compiled(GRADS, tx.init(PARAMS))[1]) == {"pinned_host"}


def test_a_checkpoint_comes_back_to_the_host(tmp_path):
    config = lowrank.LoraConfig(rank=4, alpha=3, targets="w")
    base, lora = lowrank.init(jax.random.key(0), {"w": ones(64, 64)}, config)
    state = offloaded(ADAM).init(lora)
    lowrank.checkpoint.save(tmp_path, lora=lora, config=config, opt_state=state)
    found = lowrank.checkpoint.restore(tmp_path, base=base, like={"opt_state": state})
    assert kinds(found.opt_state) == {"pinned_host"}
    chex.assert_trees_all_equal(jax.device_get(found.opt_state), jax.device_get(state))
