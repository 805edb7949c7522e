"""Leaves trained whole: in buffers of their own, in float32, of quantized leaves too."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import NamedSharding, P
from models import noisy, normal

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

X = np.asarray(normal(5, 64))
PARAMS = {"w": normal(64, 8), "g": normal(8), "table": normal(7, 64), "other": normal(8)}
CONFIG = lowrank.LoraConfig(rank=2, targets="w", train=["g", "table"])


def fn(p, x):
    x = (x + p["table"][jnp.array([3])].astype(x.dtype)).astype(p["w"].dtype)
    return (x @ p["w"]) * p["g"] + p["other"]


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def buffers(tree):
    """The addresses of a tree's arrays."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return [s.data.unsafe_buffer_pointer() for x in arrays for s in x.addressable_shards]


def assert_apart(one, other):
    assert not {*buffers(one)} & {*buffers(other)}


def init(params, config=CONFIG):
    return lowrank.init(jax.random.key(0), params, config)


KINDS = {
    "LoRA": CONFIG,
    "DoRA": lowrank.LoraConfig(rank=2, targets="w", train=["g"], dora=True),
    "(IA)^3": lowrank.LoraConfig(rank=2, targets="w", train=["g"], method="ia3"),
    "rows": lowrank.LoraConfig(rank=2, targets="w", train=["g"], train_rows={"table": [1]}),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("jitted", [False, True])
def test_an_adapter_shares_no_buffer_with_params_or_base(name, dtype, jitted):
    params = cast(PARAMS, dtype)
    make = jax.jit(init, static_argnums=1) if jitted else init
    base, lora = make(params, KINDS[name])
    assert_apart(lora, params)
    assert_apart(lora, base)
    assert len({*buffers(lora)}) == len(buffers(lora))
    merged = lowrank.merge(base, lora)
    assert_apart(merged, lora)
    assert_apart(jax.jit(lowrank.merge)(base, lora), lora)
    assert_apart(lowrank.peft.servable(base, lora)[0], lora)
    # the loop that donates the adapter leaves all else alone
    step = jax.jit(lambda lora: jax.tree.map(lambda x: x * 2, lora), donate_argnums=0)
    step(lora)
    for leaf in jax.tree.leaves((params, base, merged)):
        assert not leaf.is_deleted()


@pytest.mark.parametrize("scale", [1.0, 0.5, "an array"])
def test_one_tree_loops_donate_the_combined_tree(scale):
    """Of parameters made for it: the base shares theirs, which are consumed, as the docs say."""
    params = jax.tree.map(jnp.copy, PARAMS)
    scale = jnp.float32(0.5) if isinstance(scale, str) else scale
    tree = lowrank.combine(*init(params), scale=scale)
    assert len({*buffers(tree)}) == len(buffers(tree))
    tx = lowrank.only_adapters(optax.sgd(0.1))
    live = lowrank.lift(fn, fallback="raise")

    def step(tree, state):
        grads = jax.grad(lambda tree: jnp.sum(live(tree, X) ** 2))(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    before, state = tree, tx.init(tree)
    for _ in range(2):
        tree, state = step(tree, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before, params)))
    assert not getattr(scale, "is_deleted", bool)()


def test_init_of_leaves_trained_whole_is_traced_mapped_and_sharded_as_ever():
    params = cast(PARAMS, jnp.bfloat16)
    _, lora = init(params)
    abstract = jax.eval_shape(init, params)[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, lora)
    assert jax.tree.structure(abstract) == jax.tree.structure(lora)
    many = jax.vmap(init)(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params))[1]
    np.testing.assert_array_equal(many["g"].value[1], 2 * np.float32(params["g"]))
    assert many["g"].weight_dtype == "bfloat16"
    mesh = jax.make_mesh((2,), ("x",))
    split = {**params, "g": jax.device_put(params["g"], NamedSharding(mesh, P("x")))}
    for make in (init, jax.jit(init)):
        assert make(split)[1]["g"].value.sharding.spec == P("x")
    host = jax.tree.map(np.asarray, params)
    chex.assert_trees_all_equal(init(host)[1], lora)


def test_a_narrow_leaf_is_trained_in_float32_and_used_in_its_own_dtype():
    params = cast(PARAMS, jnp.bfloat16)
    base, lora = init(params)
    node = lora["g"]
    assert (node.dtype, node.value.dtype, node.weight_dtype) == (
        jnp.float32,
        jnp.float32,
        "bfloat16",
    )
    lora = noisy(lora)
    merged = lowrank.merge(base, lora)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    np.testing.assert_array_equal(merged["g"], lora["g"].value.astype(jnp.bfloat16))
    live = lowrank.lift(fn, fallback="raise")
    run = jax.jit(
        lambda lora: (live(lowrank.combine(base, lora), X), fn(lowrank.merge(base, lora), X))
    )
    got, want = run(lora)
    assert got.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=2e-2, atol=0.3)
    # alone where an array stood, a leaf is its own weight too
    alone = {**merged, "g": lora["g"]}
    np.testing.assert_array_equal(live(alone, X), fn(merged, X))
    grads = jax.grad(lambda lora: jnp.sum(live(lowrank.combine(base, lora), X)))(lora)
    assert grads["g"].value.dtype == jnp.float32
    assert jax.tree.structure(grads) == jax.tree.structure(lora)
    half = lowrank.merge(base, lora, scale=0.5)["g"]
    exact = np.float32(base["g"]) + 0.5 * (lora["g"].value - np.float32(base["g"]))
    np.testing.assert_array_equal(half, exact.astype(jnp.bfloat16))


def test_steps_smaller_than_a_bfloat16_move_it_as_they_move_float32():
    """200 steps of Adam at 1e-3: each is below half a unit of 1.0 in bfloat16."""
    target = np.linspace(0.5, 1.5, 8, dtype=np.float32)

    def train(dtype):
        params = cast({**PARAMS, "g": jnp.ones(8)}, dtype)
        base, lora = init(params)
        live, tx = lowrank.lift(lambda p: p["g"].astype(jnp.float32)), optax.adam(1e-3)
        loss = lambda lora: jnp.sum((live(lowrank.combine(base, lora)) - target) ** 2)

        def step(carry, _):
            lora, state = carry
            updates, state = tx.update(jax.grad(loss)(lora), state, lora)
            return (optax.apply_updates(lora, updates), state), None

        run = jax.jit(lambda lora: jax.lax.scan(step, (lora, tx.init(lora)), length=200)[0][0])
        return np.float32(lowrank.merge(base, run(lora))["g"]) - 1

    wanted, moved = train(jnp.float32), train(jnp.bfloat16)
    assert np.abs(wanted).max() > 0.15
    np.testing.assert_allclose(moved, wanted, atol=2**-7)


def test_a_float64_leaf_stays_one_and_a_bare_value_is_its_own_leaf():
    with jax.enable_x64(True):
        params = {"w": jnp.ones((4, 3)), "g": jnp.linspace(0, 1, 3)}
        base, lora = init(params, lowrank.LoraConfig(rank=1, targets="w", train="g"))
        assert lora["g"].value.dtype == lowrank.merge(base, lora)["g"].dtype == jnp.float64
        assert lora["g"].weight_dtype == ""
    full = lowrank.Full(2 * jnp.ones(3))
    assert (full.weight_dtype, full.dtype, full.shape) == ("", jnp.float32, (3,))
    base = {"g": jnp.ones(3, jnp.bfloat16)}
    assert lowrank.merge(base, {"g": full})["g"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("format", "dtype"), [("nf4", "bfloat16"), ("int8", "float32")])
def test_a_quantized_leaf_is_decoded_to_be_trained(format, dtype):
    params = cast(PARAMS, dtype)
    quant = lowrank.QuantConfig(format=format, targets=["w", "table"])
    plan = lowrank.plan(fn, params, X)
    frozen = lowrank.quantize(params, quant, plan=plan)
    base, lora = init(frozen)
    assert isinstance(base["table"], lowrank.Quantized)
    dense = lowrank.dequantize(frozen)
    assert lora["table"].value.dtype == jnp.float32
    assert lora["table"].weight_dtype == ("bfloat16" if dtype == "bfloat16" else "")
    np.testing.assert_array_equal(lora["table"].value, np.float32(dense["table"]))
    config = lowrank.LoraConfig(rank=2, targets="table", train=["w", "g"])
    base, lora = init(frozen, config)
    start = {name: node.value for name, node in lora.items() if isinstance(node, lowrank.Full)}
    live = lowrank.lift(fn, fallback="raise")
    own = lambda values: {**dense, **{n: v.astype(dense[n].dtype) for n, v in values.items()}}
    loss = lambda y: jnp.sum(jnp.sin(y.astype(jnp.float32)))

    @jax.jit
    def run(lora, values):
        one = jax.value_and_grad(lambda l: loss(live(lowrank.combine(base, l), X)))(lora)
        return one, jax.value_and_grad(lambda values: loss(fn(own(values), X)))(values)

    (got, grads), (want, wanted) = run(lora, start)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name, gradient in wanted.items():
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(grads[name].value / largest, gradient / largest, atol=1e-5)
    assert lowrank.merge(base, lora)["w"].dtype == dtype


def test_files_have_the_leafs_dtype_and_checkpoints_the_trained_one(tmp_path):
    params = {
        "q": {"kernel": PARAMS["w"].astype(jnp.bfloat16), "bias": jnp.zeros(8, jnp.bfloat16)},
        "norm": {"scale": jnp.ones(8, jnp.bfloat16)},
    }
    config = lowrank.LoraConfig(rank=2, targets="q/kernel", train=["q/bias", "norm/scale"])
    base, lora = init(params, config)
    lora = noisy(lora)
    lowrank.peft.save(tmp_path / "peft", lora, config)
    _, back, _ = lowrank.peft.load(tmp_path / "peft", params)
    for part in (("q", "bias"), ("norm", "scale")):
        node, found = lora[part[0]][part[1]], back[part[0]][part[1]]
        assert (found.value.dtype, found.weight_dtype) == (jnp.float32, "bfloat16")
        rounded = node.value.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(found.value, rounded)  # the file's dtype is the leaf's
    assert_apart(back, params)
    lowrank.checkpoint.save(tmp_path / "own", lora=lora, config=config, base=base)
    found = lowrank.checkpoint.restore(tmp_path / "own", base=base).lora
    assert jax.tree.structure(found) == jax.tree.structure(lora)
    chex.assert_trees_all_equal(found, lora)


def test_a_file_in_float32_is_loaded_into_a_narrow_model_as_it_is(tmp_path):
    """Its precision is kept to be trained on, and rounded where it is used."""
    make = lambda dtype: {"norm": {"scale": jnp.ones(8, dtype)}}
    value = 1 + np.arange(8, dtype=np.float32) / 1000
    lora = {"norm": {"scale": lowrank.Full(jnp.asarray(value))}}
    lowrank.peft.save(tmp_path, lora, lowrank.LoraConfig(train="norm/scale"))
    base, back, _ = lowrank.peft.load(tmp_path, make(jnp.bfloat16))
    np.testing.assert_array_equal(back["norm"]["scale"].value, value)
    assert lowrank.merge(base, back)["norm"]["scale"].dtype == jnp.bfloat16
