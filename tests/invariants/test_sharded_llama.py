"""A Llama on eight devices, data x model: FSDP and tensor parallel together, as one device's."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from explicit_llama import EXPLICIT_SPECS, explicit_model
from jax import NamedSharding, P, lax
from jax.sharding import AxisType
from llama import Llama, LlamaConfig
from models import noisy

import lowrank_jax as lowrank

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices"),
    pytest.mark.usefixtures("fast_compile"),
]

MESHES = [(8, 1), (4, 2), (2, 4)]
# For what the invariants below, or test_devices.py, already test on each mesh.
ONE_MESH = [pytest.param(m, marks=() if m == (4, 2) else (pytest.mark.slow,)) for m in MESHES]
SIZES = {"vocab": 32, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
MODEL = Llama(LlamaConfig(**SIZES, hidden=48, remat=True))
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 6))
COLUMN, ROW = P(None, "data", "model"), P(None, "model", "data")
SPECS = {
    "embed_tokens": {"embedding": P("model", "data")},
    "layers": {
        "self_attn": {f"{n}_proj": {"kernel": ROW if n == "o" else COLUMN} for n in "qkvo"},
        "mlp": {
            f"{n}_proj": {"kernel": ROW if n == "down" else COLUMN} for n in ("gate", "up", "down")
        },
        "input_layernorm": P(),
        "post_attention_layernorm": P(),
    },
    "norm": P(),
}
CONFIG = lowrank.LoraConfig(rank=3, alpha=5, targets=("all-linear", "**/embedding"))


def loss(apply, params, tokens):
    logits = apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def shifted(lora, by):
    """An adapter none of whose factors is zero."""
    return jax.tree.map(lambda f: np.asarray(f) + np.float32(by), lora)


def first(tree):
    """What the first device has of a pmapped result."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], tree)


def make(key, params):
    return lowrank.init(key, params, CONFIG, plan=one_plan())[1]


@functools.cache
def one_plan():
    call = lambda params, tokens: MODEL.apply({"params": params}, tokens)
    return lowrank.plan(call, one_base(), TOKENS)


@functools.cache
def one_base():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]
    return noisy(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), scale=0.3)


@functools.cache
def one_adapter():
    return jax.jit(make)(jax.random.key(1), one_base())


@functools.cache
def one_device():
    """Base, adapter, and on one device the loss, the adapter's gradient and the merged weights."""
    base, lora = one_base(), shifted(one_adapter(), 0.05)

    @jax.jit
    def run(lora, base):
        of = lambda lora: loss(MODEL.apply, lowrank.merge(base, lora), TOKENS)
        return *jax.value_and_grad(of)(lora), lowrank.merge(base, lora)

    return base, lora, *run(lora, base)


def mesh_of(shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))


def named(mesh, specs):
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))


def placed(mesh, base, lora, specs=SPECS):
    where = named(mesh, specs)
    put = lambda tree: jax.device_put(tree, lowrank.specs(tree, where))
    return put(base), put(lora)


def assert_placed_alike(left, right):
    same = lambda l, r: l.sharding.is_equivalent_to(r.sharding, l.ndim)
    assert jax.tree.all(jax.tree.map(same, left, right))


def split_eight_ways(leaf):
    shards = leaf.addressable_shards
    return len({str(s.index) for s in shards}) == 8 and shards[0].data.size * 8 == leaf.size


def lifted(tree, tokens):
    return loss(lowrank.lift(MODEL.apply, fallback="raise"), tree, tokens)


@pytest.mark.parametrize("shape", ONE_MESH)
def test_values_and_gradients_are_those_of_one_device(shape):
    base, lora, value, grads, want = one_device()
    mesh = mesh_of(shape)
    largest = max(jax.tree.leaves(base), key=lambda leaf: leaf.size)
    base, lora = placed(mesh, base, lora)
    sharded = [leaf for leaf in jax.tree.leaves(base) if leaf.size == largest.size]
    assert all(map(split_eight_ways, sharded))
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
    step = jax.jit(jax.value_and_grad(lambda l, b, t: lifted(lowrank.combine(b, l), t)))
    mine, gradient = step(lora, base, tokens)
    chex.assert_trees_all_close(mine, value, rtol=1e-6)
    chex.assert_trees_all_close(gradient, grads, rtol=1e-4, atol=1e-6)
    tree = lowrank.combine(base, lora)
    report = lowrank.report(lambda tree, t: MODEL.apply({"params": tree}, t), tree, tokens)
    assert report.memory.base / 8 <= report.device_memory.base < report.memory.base / 7
    merged = jax.jit(lowrank.merge, out_shardings=named(mesh, lowrank.specs(base, SPECS)))
    chex.assert_trees_all_close(merged(base, lora), want, rtol=1e-5, atol=1e-6)


TX = optax.adam(1e-2)


def train(base, lora, opt_state, tokens, **jit):
    @functools.partial(jax.jit, **jit)
    def step(lora, opt_state, base, tokens):
        value, grads = jax.value_and_grad(lambda l: lifted(lowrank.combine(base, l), tokens))(lora)
        updates, opt_state = TX.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, value

    values = []
    for _ in range(3):
        lora, opt_state, value = step(lora, opt_state, base, tokens)
        values.append(float(value))
    assert step._cache_size() == 1
    return lora, values


@functools.cache
def trained_alone():
    lora = one_adapter()
    return train(one_base(), lora, jax.jit(TX.init)(lora), TOKENS)


@pytest.mark.parametrize("shape", ONE_MESH)
def test_training_sharded_from_the_start(shape):
    alone, values = trained_alone()
    base, key = one_base(), jax.random.key(1)
    mesh = mesh_of(shape)
    where = named(mesh, SPECS)
    base = jax.device_put(base, lowrank.specs(base, where))
    lora_at = lowrank.specs(jax.eval_shape(make, key, base), where)
    lora = jax.jit(make, out_shardings=lora_at)(key, base)
    everywhere = NamedSharding(mesh, P())
    state_at = optax.tree.map_params(
        TX,
        lambda _, sharding: sharding,
        jax.eval_shape(TX.init, lora),
        lora_at,
        transform_non_params=lambda _: everywhere,
    )
    opt_state = jax.jit(TX.init, out_shardings=state_at)(lora)
    assert_placed_alike(opt_state[0].mu, lora)
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
    after, mine = train(
        base, lora, opt_state, tokens, out_shardings=(lora_at, state_at, everywhere)
    )
    np.testing.assert_allclose(mine, values, rtol=1e-5)
    assert values[2] < values[0]
    chex.assert_trees_all_close(after, alone, rtol=2e-3, atol=2e-5)
    assert_placed_alike(after, lora)


def test_pmap():
    base, lora, value, grads, _ = one_device()

    def each(lora, base, tokens):
        mine = lambda l: lifted(lowrank.combine(base, l), tokens)
        return lax.pmean(jax.value_and_grad(mine)(lora), "d")

    mapped = jax.pmap(each, axis_name="d", in_axes=(None, None, 0))
    mine, gradient = first(mapped(lora, base, TOKENS.reshape(8, 1, 6)))
    chex.assert_trees_all_close(mine, value, rtol=1e-6)
    chex.assert_trees_all_close(gradient, grads, rtol=1e-4, atol=1e-6)


def test_shard_map():
    """Data parallel by hand; each device gathers the part of the base that it lacks."""
    base, lora, value, grads, _ = one_device()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    only_data = jax.tree.map(
        lambda s: P(*(entry if entry == "data" else None for entry in s)),
        SPECS,
        is_leaf=lambda s: isinstance(s, P),
    )
    base_at = lowrank.specs(base, only_data)
    base, lora = placed(mesh, base, jax.device_put(lora, NamedSharding(mesh, P())), only_data)
    lora_at = lowrank.specs(lora, P())
    lora = jax.device_put(lora, named(mesh, lora_at))

    def gathered(leaf, spec):
        axis = [i for i, entry in enumerate(spec) if entry == "data"]
        return lax.all_gather(leaf, "data", axis=axis[0], tiled=True) if axis else leaf

    def each(lora, base, tokens):
        whole = jax.tree.map(gathered, base, base_at)
        return lax.pmean(lifted(lowrank.combine(whole, lora), tokens), "data")

    mapped = jax.shard_map(
        each, mesh=mesh, in_specs=(lora_at, base_at, P("data")), out_specs=P(), check_vma=False
    )
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
    mine, gradient = jax.jit(jax.value_and_grad(mapped))(lora, base, tokens)
    chex.assert_trees_all_close(mine, value, rtol=1e-6)
    chex.assert_trees_all_close(gradient, grads, rtol=1e-4, atol=1e-6)


# Explicit axes: the model says how its own results lie, and knows nothing of adapters.


def normal(i, *shape):
    drawn = np.random.default_rng(i).standard_normal(shape) * shape[-2] ** -0.5
    return jax.device_put(drawn.astype(np.float32))


EXPLICIT_PARAMS = {
    "embed": normal(0, 64, 16),
    "layers": {
        "q": normal(1, 3, 16, 4, 8),
        "o": normal(2, 3, 4, 8, 16),
        "up": normal(3, 3, 16, 32),
        "down": normal(4, 3, 32, 16),
    },
    "mix": normal(5, 3, 16, 16),
}


EXPLICIT_CONFIG = lowrank.LoraConfig(rank=2, alpha=3, targets=("all-linear", "embed"))
IDS = np.random.default_rng(1).integers(0, 64, (16, 4))


@functools.cache
def explicit_on_one_device():
    """The plan, the adapter at first, and then: the loss, its gradient and the masked results."""
    plain = functools.partial(explicit_model, False)
    plan = lowrank.plan(plain, EXPLICIT_PARAMS, IDS)
    start = jax.jit(explicit_init(plan))(EXPLICIT_PARAMS)

    @jax.jit
    def run(lora, base):
        want = lambda l: jnp.sin(plain(lowrank.merge(base, l), IDS)).mean()
        masked = lowrank.lift(plain)(lowrank.combine(base, lora, **masks()), IDS)
        return jax.value_and_grad(want)(lora), masked

    return plan, start, *run(shifted(start, 0.1), EXPLICIT_PARAMS)


def explicit_init(plan):
    key = jax.random.key(6)
    return lambda base: lowrank.init(key, base, EXPLICIT_CONFIG, plan=plan)[1]


def masks():
    return {"scale": 0.5, "dropout": 0.5, "key": jax.random.key(0)}


@pytest.mark.parametrize("shape", ONE_MESH)
def test_explicit_axes(shape):
    plan, start, want, alone = explicit_on_one_device()
    mesh = mesh_of(shape, AxisType.Explicit)
    with jax.set_mesh(mesh):
        fn = functools.partial(explicit_model, True)
        base, lora = placed(mesh, EXPLICIT_PARAMS, shifted(start, 0.1), EXPLICIT_SPECS)
        assert split_eight_ways(base["layers"]["up"])
        ids = jax.device_put(IDS, NamedSharding(mesh, P("data")))
        assert set(lowrank.plan(fn, base, ids)) == set(plan)
        run = lowrank.lift(fn, fallback="raise")

        @jax.jit
        def everything(lora, base, ids):
            def mean(lora):
                out = run(lowrank.combine(base, lora), ids)
                return jnp.sin(out).mean(), out

            # scale and dropout: the masks are of the key alone, however things lie
            masked = run(lowrank.combine(base, lora, **masks()), ids)
            merged = lowrank.merge(base, lora)
            return jax.value_and_grad(mean, has_aux=True)(lora), merged, masked

        ((value, out), gradient), merged, masked = everything(lora, base, ids)
        assert out.sharding.spec == P("data", None, "model")
        chex.assert_trees_all_close((value, gradient), want, rtol=1e-4, atol=1e-6)
        assert_placed_alike(gradient, lora)
        assert_placed_alike(merged, base)
        # init, eager and jitted, makes the factors lie as the weights do
        make = explicit_init(plan)
        for made in (make(base), jax.jit(make)(base)):
            assert_placed_alike(made, lora)
            chex.assert_trees_all_close(made, jax.device_get(start), rtol=1e-6)
    chex.assert_trees_all_close(jax.device_get(masked), jax.device_get(alone), rtol=1e-3, atol=1e-5)


def test_convolutions_and_ragged_products_keep_the_users_layout():
    """out_sharding is said of the whole: kernels stay split where they meet the activation."""
    mesh = mesh_of((4, 2), AxisType.Explicit)
    kernel, experts = normal(0, 3, 8, 6), normal(1, 2, 8, 6)
    x, sizes = normal(2, 8, 5, 8), np.array([20, 20])

    def fn(explicit, p, x):
        lay = lambda *spec: {"out_sharding": P(*spec)} if explicit else {}
        h = lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
            **lay("data", None, "model"),
        )  # fmt: skip
        rows = jnp.ones((40, 8)) * jnp.arange(8.0)
        numbers = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
        ragged = lax.ragged_dot_general(rows, p["experts"], sizes, numbers, **lay(None, "model"))
        return h, ragged

    params = {"kernel": kernel, "experts": experts}
    config = lowrank.LoraConfig(rank=2, alpha=3, targets="*")
    plan = lowrank.plan(functools.partial(fn, False), params, x)
    init = lambda params: lowrank.init(jax.random.key(3), params, config, plan=plan)
    base, lora = jax.jit(init)(params)
    lora = shifted(lora, 0.2)
    want = jax.jit(lambda l, b: fn(False, lowrank.merge(b, l), x))(lora, base)
    with jax.set_mesh(mesh):
        specs = {"kernel": P(None, None, "model"), "experts": P(None, None, "model")}
        base, lora = placed(mesh, base, lora, specs)
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        explicit = functools.partial(fn, True)
        assert str(lowrank.plan(explicit, base, x)) == str(plan)
        run = jax.jit(lambda l, b, x: lowrank.lift(explicit, fallback="raise")(
            lowrank.combine(b, l), x))  # fmt: skip
        got = run(lora, base, x)
        assert [y.sharding.spec for y in got] == [P("data", None, "model"), P(None, "model")]
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_partly_manual_mesh_of_explicit_axes():
    mesh = mesh_of((4, 2), AxisType.Explicit)
    params = {"w": normal(0, 16, 32), "v": normal(1, 32, 16)}
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"])
    base, lora = lowrank.init(jax.random.key(2), params, lowrank.LoraConfig(rank=2, targets="*"))
    lora = shifted(lora, 0.1)
    x = normal(3, 8, 16)

    def both(run):
        """(sum, results) and the gradient."""
        loss = lambda *args: (lambda y: (y.sum(), y))(run(*args))
        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (_, want), wanted = both(lambda l, b, x: fn(lowrank.merge(b, l), x))(lora, base, x)
    lifted = lowrank.lift(fn, fallback="raise")
    with jax.set_mesh(mesh):
        each = lambda l, b, x: lifted(lowrank.combine(b, l), x)
        mapped = jax.shard_map(
            each, in_specs=(P(), P(), P("data")), out_specs=P("data"), axis_names={"data"}
        )
        put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
        (_, got), grads = both(mapped)(put(lora, P()), put(base, P()), put(x, P("data")))
        chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(grads), jax.device_get(wanted), rtol=1e-3, atol=1e-5)
