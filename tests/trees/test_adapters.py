"""init, combine, partition, merge."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")


@functools.cache
def params():
    draw = np.random.default_rng(0).normal
    shapes = {"q": (6, 5), "stack": (3, 6, 2, 4), "table": (9, 4), "bias": (5,)}
    tree = {name: jnp.asarray(draw(size=s), jnp.float32) for name, s in shapes.items()}
    return {"layer": tree, "count": jnp.asarray(np.int32(3))}


def fn(params, x, ids):
    layer = params["layer"]
    y = x @ layer["q"] + layer["bias"]
    for w in layer["stack"]:
        y = y + jnp.einsum("bi,ihd->bhd", x, w).sum()
    return y.sum() + layer["table"][ids].sum() * params["count"]


ARGS = (np.ones((2, 6), np.float32), np.array([0, 3]))
TARGETS = ("layer/q", "layer/stack", "layer/table")


@functools.cache
def made(**options):
    config = lowrank.LoraConfig(rank=2, alpha=3, targets=TARGETS, **options)
    plan = lowrank.plan(fn, params(), *ARGS)
    return lowrank.init(jax.random.key(1), params(), config, plan=plan)


def moved(lora, by):
    """An adapter like this, every number of it moved."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + np.float32(by)), lora)


def test_shapes_follow_the_axes():
    base, lora = made()
    stack = lora["layer"]["stack"]
    assert (stack.stack, stack.fan_in, stack.fan_out) == ((0,), (1,), (2, 3))
    chex.assert_shape(stack.a, (3, 6, 2))
    chex.assert_shape(stack.b, (3, 2, 2, 4))
    assert stack.shape == (3, 6, 2, 4)
    assert stack.scale == 1.5
    table = lora["layer"]["table"]
    assert table.kind == "lookup"
    assert not np.any(table.a)
    assert np.any(table.b)
    assert lora["layer"]["bias"] is None
    assert lora["count"] is None
    assert base["layer"]["q"] is not None


def test_kaiming_bounds_and_independent_stacks():
    _, lora = made()
    a = np.asarray(lora["layer"]["stack"].a)
    assert np.abs(a).max() <= 1 / np.sqrt(6)
    assert np.abs(a).max() > 0.7 / np.sqrt(6)
    assert not np.allclose(a[0], a[1])


def test_adding_a_target_changes_no_other():
    # equal targets are one compiled program, so the numbers are equal bit for bit
    config = lowrank.LoraConfig(rank=2, alpha=3, targets="layer/q")
    _, alone = lowrank.init(jax.random.key(1), params(), config)
    _, together = made()
    chex.assert_trees_all_equal(alone["layer"]["q"].a, together["layer"]["q"].a)


def test_eval_shape_jit_and_vmap_of_init():
    config = lowrank.LoraConfig(rank=2, alpha=3, targets=TARGETS)
    plan = lowrank.plan(fn, params(), *ARGS)
    make = lambda key: lowrank.init(key, params(), config, plan=plan)[1]
    _, real = made()
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(make, jax.random.key(1)), real)
    keys = lambda: jax.vmap(jax.random.key)(np.arange(4))
    one, many = jax.jit(lambda: (make(keys()[1]), jax.vmap(make)(keys())))()
    chex.assert_trees_all_close(one, real)
    chex.assert_tree_shape_prefix(many, (4,))
    chex.assert_trees_all_close(jax.tree.map(lambda x: np.asarray(x)[1], many), real)


def test_partition_is_the_inverse_of_combine():
    base, lora = made(train=("layer/bias",))
    again, same = lowrank.partition(lowrank.combine(base, lora))
    chex.assert_trees_all_equal(again, base)
    chex.assert_trees_all_equal_structs(same, lora)
    chex.assert_trees_all_equal(same, lora)


def test_merge_by_numpy():
    base, lora = made()
    lora = moved(lora, 0.1)
    merged = jax.jit(lowrank.merge)(base, lora)
    node = lora["layer"]["stack"]
    a, b = np.asarray(node.a, np.float64), np.asarray(node.b, np.float64)
    expected = base["layer"]["stack"] + 1.5 * np.einsum("lir,lrhd->lihd", a, b)
    np.testing.assert_allclose(merged["layer"]["stack"], expected, rtol=1e-5, atol=1e-6)
    assert merged["count"] == 3
    assert merged["count"].dtype == jnp.int32


def test_merge_adds_in_float32_and_casts_once():
    w = jnp.asarray(np.ones((4, 4), jnp.bfloat16))
    # 2 ** -9 vanishes when added to 1 in bfloat16 once; three of them do not when summed first
    a, b = np.ones((4, 1), np.float32), np.full((1, 4), 3 * 2.0**-9, np.float32)
    node = lowrank.LowRank(jnp.asarray(a), jnp.asarray(b), scale=1.0)
    merged = np.asarray(lowrank.merge({"w": w}, {"w": node})["w"])
    assert merged.dtype == jnp.bfloat16
    assert float(merged[0, 0]) == float(jnp.bfloat16(1 + 3 * 2.0**-9))
    assert float(merged[0, 0]) > 1


def test_base_is_untouched_and_shared():
    tree = params()
    config = lowrank.LoraConfig(rank=2, targets="layer/q")
    base, lora = lowrank.init(jax.random.key(0), tree, config)
    assert base["layer"]["q"] is tree["layer"]["q"]
    combined = lowrank.combine(base, lora)
    assert combined["layer"]["q"].base is tree["layer"]["q"]
    lowrank.merge(base, lora)
    assert not tree["layer"]["q"].is_deleted()


def test_multiplier_scales_the_change():
    base, lora = made()
    lora = moved(lora, 0.1)
    lifted = jax.jit(lambda s: lowrank.lift(fn)(lowrank.combine(base, lora, scale=s), *ARGS))
    merges = lambda: (base, lowrank.merge(base, lora), lowrank.merge(base, lora, scale=2.0))
    expected = jax.jit(lambda: [fn(tree, *ARGS) for tree in merges()])()
    for scale, value in enumerate(expected):
        chex.assert_trees_all_close(lifted(np.float32(scale)), value, rtol=1e-5)
    assert lifted._cache_size() == 1


def test_full_leaves_are_trained_whole():
    base, lora = made(train=("layer/bias",))
    assert isinstance(lora["layer"]["bias"], lowrank.Full)
    loss = lambda lora: lowrank.lift(fn)(lowrank.combine(base, lora), *ARGS)

    @jax.jit
    def found(lora):
        half = lowrank.merge(base, lora, scale=0.5)["layer"]["bias"]
        return jax.value_and_grad(loss)(lora), fn(lowrank.merge(base, lora), *ARGS), half

    (y, grads), expected, half = found(moved(lora, 1))
    chex.assert_trees_all_close(y, expected, rtol=1e-5)
    assert np.any(grads["layer"]["bias"].value)
    chex.assert_trees_all_close(half, np.asarray(base["layer"]["bias"]) + 0.5)


def test_an_initializer_of_the_users_own():
    def split(key, weight, rank, scale):
        u, s, v = jnp.linalg.svd(weight, full_matrices=False)
        a, b = u[:, :rank] * s[:rank], v[:rank] / scale
        return a, b, weight - scale * a @ b

    config = lowrank.LoraConfig(rank=2, alpha=3, targets=("layer/q", "layer/stack"))
    plan = lowrank.plan(fn, params(), *ARGS)
    base, lora = lowrank.init(jax.random.key(0), params(), config, plan=plan, initializer=split)
    assert not np.allclose(base["layer"]["stack"], params()["layer"]["stack"])

    @jax.jit
    def found(base, lora):
        y = lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), *ARGS)
        return lowrank.merge(base, lora), y, fn(params(), *ARGS)

    merged, y, expected = found(base, lora)
    chex.assert_trees_all_close(merged, params(), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(y, expected, rtol=1e-4)


def test_dropout_masks_differ_by_leaf_use_and_layer():
    eye = np.eye(64, dtype=np.float32)
    weights = {"one": eye, "two": eye, "stack": np.stack([eye] * 2)}
    config = lowrank.LoraConfig(rank=64, alpha=64, targets="*", stack={"stack": 0})

    def branches(p, x):
        _, ys = jax.lax.scan(lambda c, w: (c, x @ w), 0.0, p["stack"])
        return jnp.stack([x @ p["one"], x @ p["one"], x @ p["two"], *ys])

    x = np.ones((3, 64), np.float32)
    plan = lowrank.plan(branches, weights, x)
    lora = jax.eval_shape(
        lambda key: lowrank.init(key, weights, config, plan=plan)[1], jax.random.key(0)
    )
    lora = jax.tree.map(lambda n: np.broadcast_to(eye, n.shape), lora)
    lifted = lowrank.lift(branches, fallback="raise")
    dropped = jax.jit(
        lambda seed: lifted(
            lowrank.combine(weights, lora, dropout=0.5, key=jax.random.key(seed)), x
        )
    )
    run = lambda seed: np.asarray(dropped(seed)) - x
    masks = run(7)
    # inverted dropout: every entry is dropped or doubled
    assert set(np.unique(masks)) == {0.0, 2.0}
    assert 0.4 < float((masks > 0).mean()) < 0.6
    flat = masks.reshape(5, -1)
    assert all((flat[i] != flat[j]).any() for i in range(5) for j in range(i))
    chex.assert_trees_all_equal(masks, run(7))
    assert (masks != run(8)).any()
    still = jax.jit(lambda: lifted(lowrank.combine(weights, lora), x))()
    chex.assert_trees_all_close(still, np.broadcast_to(2 * x, still.shape))


def test_nnx_state_keeps_its_type():
    state = nnx.state(nnx.eval_shape(lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), state)
    config = lowrank.LoraConfig(rank=2, targets="kernel")
    base, lora = lowrank.init(
        jax.random.key(0), state, config,
        initializer=lambda key, w, rank, scale: (w[:, :rank], w[:rank], None),
    )  # fmt: skip
    assert isinstance(lora, nnx.State)
    assert isinstance(lowrank.combine(base, lora)["kernel"], nnx.Param)
    assert isinstance(lowrank.merge(base, lora), nnx.State)


def test_old_style_keys():
    config = lowrank.LoraConfig(rank=2, targets="layer/q")
    _, typed = lowrank.init(jax.random.key(0), params(), config)
    _, raw = lowrank.init(jax.random.PRNGKey(0), params(), config)
    chex.assert_trees_all_equal(typed, raw)
