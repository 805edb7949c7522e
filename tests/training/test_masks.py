"""Optax: three kinds of loop train the adapters and hold state for nothing else."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
Y = np.sin(X[:, :3])
CONFIG = lowrank.LoraConfig(rank=2, alpha=3, targets="**/kernel", train="**/norm/scale")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.LayerNorm(name="norm")(nn.Dense(5)(x))))


@functools.cache
def setup():
    model = Net()
    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    base, lora = lowrank.init(jax.random.key(2), params, CONFIG)
    return lowrank.lift(lambda p, x: model.apply({"params": p}, x), fallback="raise"), base, lora


def mse(prediction):
    return jnp.mean((prediction - Y) ** 2)


def sizes(tree):
    return sorted(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)


def factor_sizes(lora):
    return sorted(2 * [leaf.size for leaf in jax.tree.leaves(lora)])  # Adam's mu and nu


@functools.cache
def two_tree(steps=25):
    apply, base, lora = setup()
    tx = optax.adam(3e-2)
    state = tx.init(lora)

    @jax.jit
    def step(lora, state, base):
        loss, grads = jax.value_and_grad(lambda l: mse(apply(lowrank.combine(base, l), X)))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, loss

    losses = []
    for _ in range(steps):
        lora, state, loss = step(lora, state, base)
        losses.append(float(loss))
    assert sizes(state) == factor_sizes(lora)
    return losses, base, lora


def test_two_tree_loop():
    losses, _, lora = two_tree()
    assert losses[-1] < 0.7 * losses[0]
    assert lora["norm"]["scale"].value.any()


def test_train_state_loop_gives_the_same_losses():
    apply, base, lora = setup()
    state = train_state.TrainState.create(
        apply_fn=apply,
        params=lowrank.combine(base, lora),
        tx=lowrank.only_adapters(optax.adam(3e-2)),
    )
    assert sizes(state.opt_state) == factor_sizes(lora)

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: mse(state.apply_fn(p, X)))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(25):
        state, loss = step(state)
        losses.append(float(loss))
    want, _, trained = two_tree()
    chex.assert_trees_all_close(losses, want, rtol=1e-4)
    after, adapter = lowrank.partition(state.params)
    chex.assert_trees_all_equal(after, base)
    chex.assert_trees_all_close(adapter, trained, rtol=1e-3, atol=1e-5)


def test_nnx_optimizer_loop():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.Linear(6, 5, rngs=rngs)
            self.two = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    model = Model(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    config = lowrank.LoraConfig(rank=2, alpha=3, targets="*/kernel")
    base, lora = lowrank.init(jax.random.key(0), params, config)
    nnx.update(model, lowrank.combine(base, lora))
    tx = lowrank.only_adapters(optax.adam(3e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert sizes(optimizer.opt_state) == factor_sizes(lora)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            graphdef, params = nnx.split(model)
            return mse(lowrank.lift(lambda p, x: nnx.merge(graphdef, p)(x))(params, X))

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]
    after, adapter = lowrank.partition(nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal(after, base)
    assert all(leaf.any() for leaf in jax.tree.leaves(adapter))
    assert int(optimizer.step[...]) == 25


def test_integer_leaves_and_float0_gradients():
    tree = {"w": jnp.ones((4, 3)), "codes": jnp.arange(5)}
    base, lora = lowrank.init(jax.random.key(0), tree, lowrank.LoraConfig(rank=1, targets="w"))
    combined = lowrank.combine(base, lora)
    fn = lowrank.lift(lambda p, x: (x @ p["w"]).sum() * p["codes"].sum())
    grads = jax.grad(fn, allow_int=True)(combined, jnp.ones((2, 4)))
    tx = lowrank.only_adapters(optax.adamw(1e-2))
    updates, _ = tx.update(grads, tx.init(combined), combined)
    after = optax.apply_updates(combined, updates)
    chex.assert_trees_all_equal(after["codes"], tree["codes"])
    chex.assert_trees_all_equal(after["w"].base, tree["w"])
    assert (after["w"].delta.b != lora["w"].b).any()
    # nothing of a frozen leaf's size is made
    assert all(leaf.ndim == 0 for leaf in (updates["w"].base, updates["codes"]))


def test_weight_decay_reaches_only_adapters():
    _, base, lora = setup()
    lora = jax.tree.map(lambda v: np.asarray(v) + 1, lora)
    tx = lowrank.only_adapters(optax.adamw(1e-1, weight_decay=1.0))

    @jax.jit
    def decayed(combined):
        zeros = jax.tree.map(jnp.zeros_like, combined)
        updates, _ = tx.update(zeros, tx.init(combined), combined)
        return optax.apply_updates(combined, updates)

    after, adapter = lowrank.partition(decayed(lowrank.combine(base, lora)))
    chex.assert_trees_all_equal(after, base)
    chex.assert_trees_all_close(adapter, jax.tree.map(lambda v: 0.9 * v, lora), rtol=1e-5)


def test_masks_and_labels_for_optax():
    _, base, lora = setup()
    combined = lowrank.combine(base, lora)
    mask = lowrank.trainable_mask(combined)
    chex.assert_trees_all_equal_structs(mask, combined)
    assert sum(jax.tree.leaves(mask)) == len(jax.tree.leaves(lora))
    assert not any(jax.tree.leaves(lowrank.trainable_mask(base)))
    assert all(jax.tree.leaves(lowrank.trainable_mask(lora)))
    labels = lowrank.factor_labels(lora)
    chex.assert_trees_all_equal_structs(labels, lora)
    assert sorted(jax.tree.leaves(labels)) == ["a", "a", "b", "b", "full"]
    frozen = {"a": optax.set_to_zero(), "full": optax.set_to_zero(), "b": optax.sgd(1.0)}
    tx = optax.partition(frozen, lowrank.factor_labels)
    grads = jax.tree.map(jnp.ones_like, lora)
    updates, _ = tx.update(grads, tx.init(lora), lora)
    assert not updates["Dense_0"]["kernel"].a.any()
    assert (updates["Dense_0"]["kernel"].b == -1).all()
    # the mask serves optax.masked on a combined tree: no state for what is frozen
    state = optax.masked(optax.adam(1e-3), lowrank.trainable_mask).init(combined)
    assert sizes(state) == factor_sizes(lora)


@pytest.mark.parametrize("rate", [0.5, optax.constant_schedule(0.5)])
@pytest.mark.parametrize("whole", [False, True])
def test_lora_plus(rate, whole):
    _, base, lora = setup()
    tree, tx = lora, lowrank.lora_plus(optax.sgd, rate, ratio=4.0)
    if whole:
        tree, tx = lowrank.combine(base, lora), lowrank.only_adapters(tx)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
    node = updates["Dense_0"]["kernel"]
    node = node.delta if whole else node
    assert (node.a == -0.5).all()
    assert (node.b == -2.0).all()


def test_a_tree_without_adapters_is_refused():
    _, base, lora = setup()
    with pytest.raises(lowrank.TreeError, match="without adapters"):
        lowrank.only_adapters(optax.sgd(1.0)).init(base)
    with pytest.raises(lowrank.TreeError, match="needs the parameters"):
        tx = lowrank.only_adapters(optax.sgd(1.0))
        tx.update(lora, tx.init(lora))
    with pytest.raises(lowrank.TreeError, match="takes an adapter"):
        lowrank.factor_labels(base)


def test_buffers_are_donated():
    apply, base, lora = setup()
    tx = optax.adam(1e-2)

    def step(lora, state, base):
        grads = jax.grad(lambda l: mse(apply(lowrank.combine(base, l), X)))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    state = tx.init(lora)
    new, _ = jitted(jax.tree.map(jnp.copy, lora), state, base)
    assert jax.tree.leaves(state)[1].is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))
    assert all(leaf.any() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("rate", [0.5, optax.constant_schedule(0.5)])
def test_lora_plus_trains_rows_of_a_table_at_the_base_rate(rate):
    """They are trained themselves, as Full leaves are: no product of theirs is unbalanced."""
    params = {"table": jnp.ones((5, 4)), "w": jnp.ones((4, 3)), "g": jnp.ones(3)}
    config = lowrank.LoraConfig(rank=2, targets="w", train="g", train_rows={"table": [1, 3]})
    _, lora = lowrank.init(jax.random.key(0), params, config)
    labels = lowrank.factor_labels(lora)
    assert jax.tree.structure(labels) == jax.tree.structure(lora)
    assert (labels["table"].b, labels["g"].value, labels["w"].b) == ("full", "full", "b")
    tx = lowrank.lora_plus(optax.sgd, rate, ratio=4.0)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora), lora)
    assert (updates["table"].b == -0.5).all()
    assert (updates["g"].value == -0.5).all()
    assert (updates["w"].b == -2.0).all()


@pytest.mark.parametrize("jit", [False, True])
def test_schedule_free_is_evaluated_in_either_form(jit):
    apply, base, lora = setup()
    tx, wrap = optax.contrib.schedule_free_sgd(0.1), jax.jit if jit else lambda f: f
    averaged = optax.contrib.schedule_free_eval_params
    one = lowrank.only_adapters(tx)
    tree = lowrank.combine(base, lora)

    def two_trees(lora, state):
        gradient = jax.grad(lambda l: mse(apply(lowrank.combine(base, l), X)))(lora)
        updates, state = tx.update(gradient, state, lora)
        return optax.apply_updates(lora, updates), state

    def one_tree(tree, state):
        gradient = jax.grad(lambda t: mse(apply(t, X)))(tree)
        updates, state = one.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state

    states = tx.init(lora), one.init(tree)
    for _ in range(3):
        lora, two = wrap(two_trees)(lora, states[0])
        tree, single = wrap(one_tree)(tree, states[1])
        states = two, single
    want = averaged(states[0], lora)
    got = lowrank.map_adapters(lambda nodes: averaged(states[1], nodes), tree)
    chex.assert_trees_all_close(lowrank.partition(got)[1], want, rtol=1e-5, atol=1e-6)
    assert mse(apply(got, X)) < mse(apply(lowrank.combine(*setup()[1:]), X))


def test_adapters_of_other_paths_are_refused():
    _, base, lora = setup()
    with pytest.raises(lowrank.TreeError, match=r"map_adapters takes .*expected a dict of the"):
        lowrank.map_adapters(lambda nodes: {}, lowrank.combine(base, lora))


def test_labels_of_a_module_for_optax():
    net = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    _, lora = lowrank.init(0, net, lowrank.LoraConfig(rank=2, targets="kernel"))
    assert callable(lora)
    tx = optax.partition({"a": optax.sgd(0.0), "b": optax.sgd(1.0)}, lowrank.factor_labels)
    ones = jax.tree.map(jnp.ones_like, lora)
    updates, _ = tx.update(ones, tx.init(lora), lora)
    (node,) = jax.tree.leaves(updates, is_leaf=lambda leaf: isinstance(leaf, lowrank.LowRank))
    assert not np.any(node.a)
    assert np.all(node.b == -1)
