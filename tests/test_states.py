"""quantize_state: eight bits a number, around any optimizer, with nothing else changed."""

import contextlib
import functools
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowrank_jax as lowrank
from lowrank_jax._codecs import dynamic
from lowrank_jax._training import states
from lowrank_jax._training.states import Coded

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from llama import Llama, LlamaConfig

pytestmark = pytest.mark.usefixtures("fast_compile")

PARAMS = {"a": jnp.ones((2, 128, 16)), "b": jnp.ones((2, 16, 256)), "bias": jnp.ones(3), "no": None}
quantized = lowrank.quantize_state


def gradients(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)


def nodes(state):
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, Coded))
    return [leaf for leaf in leaves if isinstance(leaf, Coded)]


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def assert_states_close(one, other):
    """Alike to an ulp, which may move a code by one."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    integers = lambda x: x.astype(int) if x.dtype == jnp.uint8 else x
    for x, y in zip(*(jax.tree.leaves(jax.device_get(tree)) for tree in (one, other)), strict=True):
        np.testing.assert_allclose(integers(x), integers(y), rtol=1e-5, atol=x.dtype == jnp.uint8)


RMS = optax.rmsprop(1e-3)  # one moment: half as much to compile


# One row a way in which transformations are put together: the number of leaves it quantizes, of
# two that are large enough.
MASK = {"a": True, "b": False, "bias": True, "no": False}
LABELS = {"a": "x", "b": "y", "bias": "x", "no": "x"}
ADAM = optax.adam(1e-3)
ROWS = {
    "adam": (quantized(ADAM), 4),
    "adam in bfloat16": (quantized(optax.adam(1e-3, mu_dtype=jnp.bfloat16)), 4),
    "lion": (quantized(optax.lion(1e-3)), 2),
    "adafactor": (quantized(optax.adafactor(1e-3)), 2),
    "muon": (quantized(optax.contrib.muon(1e-3)), 4),
    "lbfgs": (quantized(optax.lbfgs(linesearch=None)), 8),
    "a part of a chain": (
        optax.chain(optax.clip_by_global_norm(1.0), quantized(optax.scale_by_adam())),
        4,
    ),
    "masked": (optax.masked(quantized(ADAM), MASK), 2),
    "around masked": (quantized(optax.masked(ADAM, MASK)), 2),
    "partition": (optax.partition({"x": quantized(ADAM), "y": optax.sgd(1.0)}, LABELS), 2),
    "in inject_hyperparams": (
        optax.inject_hyperparams(lambda rate: quantized(optax.adam(rate)))(rate=1e-3),
        4,
    ),
    "around inject_hyperparams": (quantized(optax.inject_hyperparams(optax.adam)(1e-3)), 4),
    "in MultiSteps": (optax.MultiSteps(quantized(ADAM), 2).gradient_transformation(), 4),
    "around MultiSteps": (quantized(optax.MultiSteps(ADAM, 2).gradient_transformation()), 6),
    "in schedule_free": (
        optax.contrib.schedule_free(quantized(optax.sgd(1e-3, momentum=0.9)), 1e-3),
        2,
    ),
    "in apply_if_finite": (optax.apply_if_finite(quantized(ADAM), 3), 4),
}


@pytest.mark.parametrize("name", ROWS)
def test_any_transformation(name):
    tx, count = ROWS[name]
    state = jax.eval_shape(tx.init, PARAMS)
    assert len(nodes(state)) == count
    updates, after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)


def test_the_state_is_what_init_says_in_every_step():
    tx = quantized(ADAM)
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, PARAMS))
    step = lambda state, grads: tx.update(grads, state, PARAMS)[::-1]
    many = jax.tree.map(lambda *x: np.stack(x), *(gradients(PARAMS, i) for i in range(3)))
    scanned, updates = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(state, many)
    for i in range(3):
        each, state = jax.jit(tx.update)(gradients(PARAMS, i), state, PARAMS)
        mine = jax.tree.map(lambda x: np.asarray(x)[i], updates)
        chex.assert_trees_all_close(mine, each, rtol=1e-5)
    assert jax.tree.structure(scanned) == jax.tree.structure(state)
    assert_states_close(scanned, state)


def test_a_state_has_a_quarter_of_the_bytes():
    big = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    plain, small = (jax.eval_shape(tx.init, big) for tx in (ADAM, quantized(ADAM)))
    assert nbytes(small) < 0.255 * nbytes(plain)
    bits = lambda n: jax.eval_shape(quantized(ADAM, block_size=n).init, big)
    assert nbytes(bits(64)) - nbytes(small) == 2 * 3 * 4 * 4096**2 / 256


def test_leaves_that_stay():
    state = {
        "small": jnp.ones(4095),
        "integers": jnp.arange(5000),
        "eight": jnp.ones(5000, jnp.float8_e4m3fn),
        "key": jax.random.key(0),
        "keys": jax.random.split(jax.random.key(0), 5000),
        "complex": jnp.ones(5000, jnp.complex64),
        "scalar": jnp.float32(2),
        "number": 0.5,
        "none": None,
        "masked": optax.MaskedNode(),
    }
    keep = optax.GradientTransformation(lambda _: state, lambda updates, s, _: (updates, s))
    tx = quantized(keep)
    assert tx.init({}) == state
    after = tx.update(PARAMS, tx.init({}))[1]
    assert isinstance(after["number"], float)
    chex.assert_trees_all_equal(after["keys"], state["keys"])
    chex.assert_trees_all_equal(jax.jit(tx.update)(PARAMS, tx.init({}))[1]["keys"], state["keys"])
    assert len(nodes(quantized(keep, min_size=0).init({}))) == 1


def test_moments_are_those_of_a_state_that_is_rounded():
    tx = quantized(ADAM)
    state, want = tx.init(PARAMS), ADAM.init(PARAMS)
    update = jax.jit(tx.update)

    @jax.jit
    def rounding(grads, state):
        updates, state = ADAM.update(grads, state, PARAMS)
        rounded = lambda x: dynamic.decode_dynamic(
            *dynamic.encode_dynamic(x, *_tiling(x)), *_tiling(x)
        )
        return updates, jax.tree.map(lambda x: rounded(x) if x.size >= 4096 else x, state)

    for i in range(5):
        grads = gradients(PARAMS, i)
        updates, state = update(grads, state, PARAMS)
        again, want = rounding(grads, want)
        chex.assert_trees_all_close(updates, again, atol=3e-5)  # of 1e-3: an ulp may move a code
    assert (np.asarray(state[0].nu["a"].absmax) < 0).all()
    assert (np.asarray(state[0].mu["a"].absmax) > 0).all()


def _tiling(x):
    return dynamic.choose_blocks(x.shape, 256)


@pytest.mark.parametrize("rule", ["ours", "nearest"])
def test_second_moments_must_not_become_zero(rule, monkeypatch):
    """Curvatures of 1 to 1e-5 in a block, each step sees half: m / eps where v became 0."""
    if rule == "nearest":
        original = dynamic._find_nearest
        nearest = lambda ratios, positive, unsigned: original(ratios, positive & False, unsigned)
        monkeypatch.setattr(dynamic, "_find_nearest", nearest)
        monkeypatch.setattr(states, "encode_dynamic", dynamic.encode_dynamic.__wrapped__)
    scale = np.float32(10) ** np.random.default_rng(0).uniform(-5, 0, 4096).astype(np.float32)
    loss = lambda x, seen: 0.5 * jnp.sum(scale * seen * (x - 1) ** 2)
    tx = quantized(optax.adam(1e-2))

    @jax.jit
    def run(x):
        def step(carry, key):
            x, state = carry
            seen = jax.random.bernoulli(key, 0.5, x.shape)
            updates, state = tx.update(jax.grad(loss)(x, seen), state, x)
            return (optax.apply_updates(x, updates), state), jnp.abs(updates).max()

        keys = jax.random.split(jax.random.key(1), 200)
        (x, _), largest = jax.lax.scan(step, (x, tx.init(x)), keys)
        return loss(x, 1.0) / loss(jnp.zeros(4096), 1.0), largest.max()

    ratio, largest = run(np.zeros(4096, np.float32))
    assert (ratio < 0.05) == (rule == "ours")
    assert (largest < 0.05) == (rule == "ours")
    if rule == "nearest":
        assert ratio > 10


LLAMA = LlamaConfig(
    vocab=32, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, hidden=128, scan_layers=True
)


def test_a_llama_learns_as_with_float32_states():
    model = Llama(LLAMA)
    start = np.random.default_rng(0).integers(0, 32, (8, 1))
    tokens = (start * 3 ** np.arange(17) + 5 * np.arange(17)) % 32
    params = jax.jit(model.init)(jax.random.key(1), tokens)
    plan = lowrank.plan(model.apply, params, tokens)
    targets = ("**/q_proj/kernel", "**/up_proj/kernel", "**/down_proj/kernel")
    config = lowrank.LoraConfig(rank=4, alpha=8, targets=targets)
    base, lora = jax.jit(lambda p: lowrank.init(jax.random.key(2), p, config, plan=plan))(params)
    apply = lowrank.lift(model.apply, fallback="raise")

    def loss_of(lora):
        logits = apply(lowrank.combine(base, lora), tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def losses(tx):
        def step(carry, _):
            lora, state = carry
            loss, grads = jax.value_and_grad(loss_of)(lora)
            updates, state = tx.update(grads, state, lora)
            return (optax.apply_updates(lora, updates), state), loss

        run = jax.jit(lambda lora: jax.lax.scan(step, (lora, tx.init(lora)), None, length=251))
        (_, state), losses = run(lora)
        return np.asarray(losses), state

    want, _ = losses(optax.adamw(3e-3))
    found, state = losses(quantized(optax.adamw(3e-3), min_size=256))
    assert len(nodes(state)) == len(jax.tree.leaves(lora)) * 2
    assert want[-1] < 0.05 * want[0]
    # in the middle of each fifth of the run: single steps jump, and not in both runs at once
    ratios = np.median((found / want)[1:].reshape(5, 50), axis=1)
    np.testing.assert_allclose(ratios, 1, atol=0.05)


CONFIG = lowrank.LoraConfig(rank=8, alpha=3, targets="**/kernel")
X = np.random.default_rng(0).standard_normal((16, 64), np.float32)


class Net(nnx.Module):
    def __init__(self):
        self.one = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
        self.two = nnx.Linear(96, 64, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x)))


@functools.cache
def setup():
    apply, params = lowrank.functional(Net())
    base, lora = lowrank.init(jax.random.key(2), params, CONFIG)
    apply = lowrank.lift(apply, fallback="raise")
    return apply, base, lora, lambda tree: jnp.mean((apply(tree, X) - jnp.sin(X)) ** 2)


def small(tx):
    return quantized(tx, min_size=256)


@pytest.mark.parametrize("inside", [True, False])
def test_train_state_loop(inside):
    _, base, lora, loss_of = setup()
    make = lambda rate: optax.adam(rate)
    tx = lowrank.lora_plus(lambda rate: small(make(rate)), 3e-3, ratio=4.0)
    if not inside:
        tx = small(lowrank.lora_plus(make, 3e-3, ratio=4.0))
    state = train_state.TrainState.create(
        apply_fn=None, params=lowrank.combine(base, lora), tx=lowrank.only_adapters(tx)
    )
    assert len(nodes(state.opt_state)) == 8

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    chex.assert_trees_all_equal(lowrank.partition(state.params)[0], base)


def test_nnx_optimizer_loop():
    model = Net()
    base, lora = lowrank.init(jax.random.key(2), nnx.state(model, nnx.Param), CONFIG)
    nnx.update(model, lowrank.combine(base, lora))
    tx = lowrank.only_adapters(small(optax.adam(3e-3)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert sum(x.dtype == jnp.uint8 for x in jax.tree.leaves(optimizer.opt_state)) == 8

    @nnx.jit
    def step(model, optimizer):
        def loss_of(model):
            graphdef, params = nnx.split(model)
            return jnp.mean((lowrank.lift(lambda p: nnx.merge(graphdef, p)(X))(params)) ** 2)

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_leaf_keeps_the_dtype_that_it_had_at_first():
    half = lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    forgets = optax.GradientTransformation(half, lambda updates, state, params: (updates, params))
    tx, params = quantized(forgets), {"a": PARAMS["a"]}
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert state["a"].dtype == "bfloat16"


def test_float0_gradients_pass():
    tree = {"w": jnp.ones((64, 64)), "codes": jnp.arange(5)}
    tx = quantized(optax.masked(optax.sgd(1e-2, momentum=0.9), {"w": True, "codes": False}))
    grads = jax.grad(lambda p: p["w"].sum(), allow_int=True)(tree)
    updates, state = tx.update(grads, tx.init(tree), tree)
    assert updates["codes"].dtype == jax.dtypes.float0
    assert len(nodes(state)) == 1


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    _, base, lora, loss_of = setup()
    tx = small(optax.adam(1e-2, mu_dtype=jnp.bfloat16))

    @jax.jit
    def step(lora, state):
        grads = jax.grad(lambda l: loss_of(lowrank.combine(base, l)))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state

    lora, state = step(*step(lora, tx.init(lora)))
    lowrank.checkpoint.save(tmp_path, lora=lora, config=CONFIG, opt_state=state)
    like = {"opt_state": jax.eval_shape(tx.init, lora)}
    found = lowrank.checkpoint.restore(tmp_path, base=base, like=like)
    assert jax.tree.structure(found.opt_state) == jax.tree.structure(state)
    chex.assert_trees_all_equal(step(found.lora, found.opt_state), step(lora, state))
    plain = lowrank.checkpoint.restore(tmp_path).opt_state["0"]["mu"]["one"]["kernel"]["a"]
    node = state[0].mu["one"]["kernel"].a
    chex.assert_trees_all_equal(plain, {"codes": node.codes, "absmax": node.absmax})


def test_adapters_are_stacked_by_vmap():
    params = {"a": np.ones((3, 12, 8)), "b": np.ones((3, 8, 600))}  # blocks smaller than 256
    tx = quantized(RMS, min_size=64)
    one = lambda tree, i: jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)
    grads = gradients(params)
    start = jax.jit(tx.init)
    state = jax.jit(jax.vmap(tx.init))(params)
    assert state[0].nu["a"].codes.shape == (3, 12, 8)
    assert state[0].nu["a"].absmax.shape == (3, 1, 1)
    updates, after = jax.jit(jax.vmap(tx.update))(grads, state, params)
    update = jax.jit(tx.update)
    for i in range(3):
        each, alone = update(one(grads, i), start(one(params, i)), one(params, i))
        chex.assert_trees_all_close(one(updates, i), each, rtol=1e-5)
        assert_states_close(one(after, i), alone)
    # and a state that was made under vmap serves outside of it, with the blocks that it has
    outside, again = update(grads, state, params)
    chex.assert_trees_all_close(outside, updates, rtol=1e-5)
    assert_states_close(again, after)


SPECS = {
    "ends": {"a": P(None, "x", None), "b": P(None, None, "x")},
    "layers": {"a": P("y"), "b": P("y")},
    "both": {"a": P("y", "x"), "b": P("y", None, "x")},
}


@functools.cache
def on_one_device():
    """Parameters, gradients, a transformation, and its update and state."""
    params = {"a": np.ones((2, 128, 16), np.float32), "b": np.ones((2, 16, 1024), np.float32)}
    grads, tx = gradients(params), quantized(RMS)
    step = lambda grads, params: tx.update(grads, tx.init(params), params)
    return params, grads, tx, *jax.jit(step)(grads, params)


@pytest.mark.parametrize(
    ("split", "kind"),
    [*((split, AxisType.Auto) for split in SPECS), ("both", AxisType.Explicit)],
)
def test_states_lie_as_their_leaves(split, kind):
    mesh = jax.make_mesh((2, 4), ("y", "x"), axis_types=(kind,) * 2)
    place = lambda tree: {
        name: jax.device_put(leaf, NamedSharding(mesh, SPECS[split][name]))
        for name, leaf in tree.items()
    }
    params, grads, tx, want, alone = on_one_device()
    params, grads = place(params), place(grads)
    state = tx.init(params)
    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        update = jax.jit(tx.update).lower(grads, state, params).compile()
        updates, after = update(grads, state, params)
    chex.assert_trees_all_close(jax.device_get(updates), jax.device_get(want), rtol=1e-5)
    assert_states_close(after, alone)
    for moment in (state[0].nu, after[0].nu):
        for name, node in moment.items():
            for array in (node.codes, node.absmax):
                sharding = NamedSharding(mesh, SPECS[split][name])
                assert array.sharding.is_equivalent_to(sharding, array.ndim), (name, array.shape)
    text = update.as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "permute"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_blocks_may_straddle_shards(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    params = {"b": np.ones((16, 512), np.float32)}
    grads, tx = gradients(params), quantized(RMS)
    step = lambda grads, params: tx.update(grads, tx.init(params), params)
    want, alone = jax.jit(step)(grads, params)
    params, grads = jax.device_put((params, grads), NamedSharding(mesh, P(None, "x")))
    state = tx.init(params)
    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        updates, after = jax.jit(tx.update)(grads, state, params)
    assert state[0].nu["b"].codes.sharding.spec == P(None, "x")
    chex.assert_trees_all_close(jax.device_get(updates), jax.device_get(want), rtol=1e-5)
    assert_states_close(after, alone)


def test_in_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params, tx = {"a": np.ones((8, 64, 16), np.float32)}, quantized(RMS, min_size=256)
    local = lambda p, g: tx.update(g, tx.init(p), p)[0]
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    grads = gradients(params)
    both = jax.jit(lambda *args: (mapped(*args), local(*args)))
    chex.assert_trees_all_close(*both(params, grads), rtol=1e-5)


def test_buffers_are_donated():
    tx = quantized(ADAM)
    state = tx.init(PARAMS)
    update = jax.jit(lambda s, g: tx.update(g, s)[1], donate_argnums=0)
    memory = update.lower(state, PARAMS).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= nbytes([(n.codes, n.absmax) for n in nodes(state)])
    update(state, PARAMS)
    assert all(node.codes.is_deleted() for node in nodes(state))


def test_nothing_is_decoded_before_the_gradients_are_there():
    tx = quantized(ADAM)
    jaxpr = jax.make_jaxpr(tx.update)(PARAMS, jax.eval_shape(tx.init, PARAMS)).jaxpr
    first = jaxpr.eqns[0]
    assert first.primitive.name == "optimization_barrier"
    inputs = {id(var) for var in jaxpr.invars}
    assert {id(var) for var in first.invars} == inputs
    assert not any(id(var) in inputs for eqn in jaxpr.eqns[1:] for var in eqn.invars)


def test_what_is_wrong_is_said():
    with pytest.raises(lowrank.ConfigError, match="a block is of 100 elements"):
        quantized(ADAM, block_size=100)
    with pytest.raises(lowrank.TreeError, match="quantized already: apply quantize_state once"):
        quantized(optax.chain(quantized(ADAM))).init(PARAMS)
