"""init, combine, partition, merge."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowrank_jax as lowrank


def params():
    shapes = {"q": (6, 5), "stack": (3, 6, 2, 4), "table": (9, 4), "bias": (5,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    tree = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}
    return {"layer": tree, "count": jnp.array(3)}


def fn(params, x, ids):
    layer = params["layer"]
    y = x @ layer["q"] + layer["bias"]
    for w in layer["stack"]:
        y = y + jnp.einsum("bi,ihd->bhd", x, w).sum()
    return y.sum() + layer["table"][ids].sum() * params["count"]


ARGS = (jnp.ones((2, 6)), jnp.array([0, 3]))
TARGETS = ("layer/q", "layer/stack", "layer/table")


def made(**options):
    config = lowrank.LoraConfig(rank=2, alpha=3, targets=TARGETS, **options)
    plan = lowrank.plan(fn, params(), *ARGS)
    return lowrank.init(jax.random.key(1), params(), config, plan=plan)


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
    assert not table.a.any()
    assert table.b.any()
    assert lora["layer"]["bias"] is None
    assert lora["count"] is None
    assert base["layer"]["q"] is not None


def test_kaiming_bounds_and_independent_stacks():
    _, lora = made()
    a = lora["layer"]["stack"].a
    assert float(jnp.abs(a).max()) <= 1 / np.sqrt(6)
    assert float(jnp.abs(a).max()) > 0.7 / np.sqrt(6)
    assert not jnp.allclose(a[0], a[1])


def test_adding_a_target_changes_no_other():
    config = lowrank.LoraConfig(rank=2, targets="layer/q")
    _, alone = lowrank.init(jax.random.key(1), params(), config)
    _, together = made()
    chex.assert_trees_all_equal(alone["layer"]["q"].a, together["layer"]["q"].a)


def test_eval_shape_jit_and_vmap_of_init():
    config = lowrank.LoraConfig(rank=2, alpha=3, targets=TARGETS)
    plan = lowrank.plan(fn, params(), *ARGS)
    make = lambda key: lowrank.init(key, params(), config, plan=plan)[1]
    real = make(jax.random.key(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(make, jax.random.key(1)), real)
    chex.assert_trees_all_close(jax.jit(make)(jax.random.key(1)), real)
    many = jax.vmap(make)(jax.random.split(jax.random.key(1), 4))
    chex.assert_tree_shape_prefix(many, (4,))


def test_partition_is_the_inverse_of_combine():
    base, lora = made(train=("layer/bias",))
    again, same = lowrank.partition(lowrank.combine(base, lora))
    chex.assert_trees_all_equal(again, base)
    chex.assert_trees_all_equal_structs(same, lora)
    chex.assert_trees_all_equal(same, lora)


def test_merge_by_numpy():
    base, lora = made()
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    merged = lowrank.merge(base, lora)
    node = lora["layer"]["stack"]
    a, b = np.asarray(node.a, np.float64), np.asarray(node.b, np.float64)
    expected = base["layer"]["stack"] + 1.5 * np.einsum("lir,lrhd->lihd", a, b)
    np.testing.assert_allclose(merged["layer"]["stack"], expected, rtol=1e-5, atol=1e-6)
    assert merged["count"] == 3
    assert merged["count"].dtype == jnp.int32


def test_merge_adds_in_float32_and_casts_once():
    w = jnp.full((4, 4), 1.0, jnp.bfloat16)
    config = lowrank.LoraConfig(rank=1, alpha=1, targets="w")
    base, lora = lowrank.init(jax.random.key(0), {"w": w}, config)
    # 2 ** -9 vanishes when added to 1 in bfloat16 once; four of them do not when summed first
    node = lora["w"]
    node = lowrank.LowRank(jnp.ones((4, 1)), jnp.full((1, 4), 3 * 2.0**-9), scale=1.0)
    merged = lowrank.merge(base, {"w": node})["w"]
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
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    lifted = jax.jit(lambda s: lowrank.lift(fn)(lowrank.combine(base, lora, scale=s), *ARGS))
    off, on, double = (lifted(jnp.float32(s)) for s in (0, 1, 2))
    chex.assert_trees_all_close(off, fn(base, *ARGS), rtol=1e-5)
    chex.assert_trees_all_close(on, fn(lowrank.merge(base, lora), *ARGS), rtol=1e-5)
    chex.assert_trees_all_close(double, fn(lowrank.merge(base, lora, scale=2.0), *ARGS), rtol=1e-5)
    assert lifted._cache_size() == 1


def test_full_leaves_are_trained_whole():
    base, lora = made(train=("layer/bias",))
    assert isinstance(lora["layer"]["bias"], lowrank.Full)
    moved = jax.tree.map(lambda x: x + 1, lora)
    y = lowrank.lift(fn)(lowrank.combine(base, moved), *ARGS)
    chex.assert_trees_all_close(y, fn(lowrank.merge(base, moved), *ARGS), rtol=1e-5)
    grads = jax.grad(lambda l: lowrank.lift(fn)(lowrank.combine(base, l), *ARGS))(moved)
    assert grads["layer"]["bias"].value.any()
    half = lowrank.merge(base, moved, scale=0.5)["layer"]["bias"]
    chex.assert_trees_all_close(half, base["layer"]["bias"] + 0.5)


def test_an_initializer_of_the_users_own():
    def split(key, weight, rank, scale):
        u, s, v = jnp.linalg.svd(weight, full_matrices=False)
        a, b = u[:, :rank] * s[:rank], v[:rank] / scale
        return a, b, weight - scale * a @ b

    config = lowrank.LoraConfig(rank=2, alpha=3, targets=("layer/q", "layer/stack"))
    plan = lowrank.plan(fn, params(), *ARGS)
    base, lora = lowrank.init(jax.random.key(0), params(), config, plan=plan, initializer=split)
    assert not jnp.allclose(base["layer"]["stack"], params()["layer"]["stack"])
    merged = lowrank.merge(base, lora)
    chex.assert_trees_all_close(merged, params(), rtol=1e-5, atol=1e-5)
    y = lowrank.lift(fn, fallback="raise")(lowrank.combine(base, lora), *ARGS)
    chex.assert_trees_all_close(y, fn(params(), *ARGS), rtol=1e-4)


def test_dropout_masks_differ_by_leaf_use_and_layer():
    weights = {"one": jnp.eye(64), "two": jnp.eye(64), "stack": jnp.stack([jnp.eye(64)] * 2)}
    config = lowrank.LoraConfig(rank=64, alpha=64, targets="*", stack={"stack": 0})

    def branches(p, x):
        _, ys = jax.lax.scan(lambda c, w: (c, x @ w), 0.0, p["stack"])
        return jnp.stack([x @ p["one"], x @ p["one"], x @ p["two"], *ys])

    x = jnp.ones((3, 64))
    plan = lowrank.plan(branches, weights, x)
    base, lora = lowrank.init(jax.random.key(0), weights, config, plan=plan)
    eyes = lambda n: jnp.broadcast_to(jnp.eye(64), n.shape)
    lora = jax.tree.map(eyes, lora)
    lifted = lowrank.lift(branches, fallback="raise")
    run = lambda key: lifted(lowrank.combine(base, lora, dropout=0.5, key=key), x) - x
    masks = run(jax.random.key(7))
    # inverted dropout: every entry is dropped or doubled
    assert set(np.unique(masks)) == {0.0, 2.0}
    assert 0.4 < float((masks > 0).mean()) < 0.6
    flat = masks.reshape(5, -1)
    assert all((flat[i] != flat[j]).any() for i in range(5) for j in range(i))
    chex.assert_trees_all_equal(masks, run(jax.random.key(7)))
    assert (masks != run(jax.random.key(8))).any()
    still = lifted(lowrank.combine(base, lora), x)
    chex.assert_trees_all_close(still, jnp.broadcast_to(2 * x, still.shape))


def test_nnx_state_keeps_its_type():
    state = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    config = lowrank.LoraConfig(rank=2, targets="kernel")
    base, lora = lowrank.init(jax.random.key(0), state, config)
    assert isinstance(lora, nnx.State)
    assert isinstance(lowrank.combine(base, lora)["kernel"], nnx.Param)
    assert isinstance(lowrank.merge(base, lora), nnx.State)


def test_old_style_keys():
    config = lowrank.LoraConfig(rank=2, targets="layer/q")
    _, typed = lowrank.init(jax.random.key(0), params(), config)
    _, raw = lowrank.init(jax.random.PRNGKey(0), params(), config)
    chex.assert_trees_all_equal(typed, raw)
