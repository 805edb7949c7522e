"""Meshes of eight devices: sequences and experts split too, DoRA, and stages by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import NamedSharding, P, lax
from jax.sharding import AxisType
from models import noisy

import lowrank_jax as lowrank

pytestmark = [
    pytest.mark.skipif(jax.device_count() < 8, reason="conftest asks for eight devices"),
    pytest.mark.usefixtures("fast_compile"),
]

MESHES = {
    "8x1": {"data": 8, "model": 1},
    "4x2": {"data": 4, "model": 2},
    "2x4": {"data": 2, "model": 4},
    "sequence": {"data": 2, "sequence": 2, "model": 2},
    "experts": {"data": 2, "expert": 2, "model": 2},
}
COLUMN, ROW = ("data", "model"), ("model", "data")
LAYERS = {  # two layers: an attention of four heads, an MLP, and four experts in two forms
    "q": ((2, 256, 4, 16), (None, *COLUMN, None)),
    "k": ((2, 256, 4, 16), (None, *COLUMN, None)),
    "o": ((2, 4, 32, 256), (None, "model", None, "data")),
    "v": ((2, 256, 4, 32), (None, *COLUMN, None)),
    "up": ((2, 256, 256), (None, *COLUMN)),
    "down": ((2, 256, 256), (None, *ROW)),
    "router": ((2, 256, 4), ()),
    "experts_up": ((2, 4, 256, 128), (None, "expert", *COLUMN)),
    "experts_down": ((2, 4, 128, 256), (None, "expert", *ROW)),
    "ragged_up": ((2, 4, 256, 128), (None, "expert", *COLUMN)),
    "ragged_down": ((2, 4, 128, 256), (None, "expert", *ROW)),
}
X = np.random.default_rng(0).standard_normal((8, 8, 256)).astype(np.float32)


def attend(x, w, split):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, w[name]) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 4)
    return x + jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", scores, v), w["o"])


def feed_forward(x, w, split):
    return x + jax.nn.silu(x @ w["up"]) @ w["down"]


def mix_experts(x, w, split):
    """Each token by all experts, weighted."""
    h = split(jnp.einsum("btd,edf->ebtf", x, w["experts_up"]), "expert", "data", "sequence", None)
    y = jnp.einsum("ebtf,efd->ebtd", h, w["experts_down"])
    return x + jnp.einsum("ebtd,bte->btd", y, jax.nn.softmax(x @ w["router"]))


def choose_experts(x, w, split):
    """Each token by one expert: rows sorted by expert."""
    rows, chosen = x.reshape(-1, x.shape[-1]), jnp.argmax(x @ w["router"], -1).reshape(-1)
    order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=4).astype(np.int32)
    h = jnp.tanh(lax.ragged_dot(rows[order], w["ragged_up"], sizes))
    y = jnp.zeros_like(rows).at[order].set(lax.ragged_dot(h, w["ragged_down"], sizes))
    return x + y.reshape(x.shape)


PARTS = {
    attend: ("q", "k", "v", "o"),
    feed_forward: ("up", "down"),
    mix_experts: ("router", "experts_up", "experts_down"),
    choose_experts: ("router", "ragged_up", "ragged_down"),
}


def decoder(params, x, *, scanned=True, split=lambda x, *axes: x):
    """Two layers of the parts that there are weights for; `split` says how activations lie."""

    def layer(x, w):
        for part, names in PARTS.items():
            if w.keys() >= {*names}:
                x = split(part(x, w, split), "data", "sequence", None)
        return x, None

    if scanned:
        return lax.scan(jax.checkpoint(layer), x, params)[0]
    for i in range(2):
        x, _ = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], params))
    return x


def mean(out):
    return jnp.square(jax.nn.log_softmax(out)).mean()


def assert_close(got, want):
    """Each leaf within rounding of its largest entry: sums are in another order."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(jax.device_get(want)))
    scale = lambda x, y: np.asarray(x) / max(np.abs(np.asarray(y)).max(), 1e-3 * largest)
    got, want = jax.tree.map(scale, got, want), jax.tree.map(scale, want, want)
    chex.assert_trees_all_close(got, want, rtol=0, atol=3e-5)


def make_params(parts):
    draw = lambda shape: np.random.default_rng(shape).standard_normal(shape).astype(np.float32)
    names = [name for part in parts for name in PARTS[part]]
    return {name: draw(LAYERS[name][0]) / 16 for name in names}


@functools.cache
def one_device(packing, dora, scanned, parts):
    """Base, adapter, and on one device the loss and the adapter's gradient, merged."""
    fn, params = functools.partial(decoder, scanned=scanned), make_params(parts)
    plan = lowrank.plan(fn, params, X)
    if packing:
        quant = lowrank.QuantConfig(block_size=32, packing=packing, targets="*", exclude="router")
        params = lowrank.quantize(params, quant, plan=plan)
    stack = {name: (0, 1) for name in params if name.startswith("experts")}
    config = lowrank.LoraConfig(rank=3, alpha=5, dora=dora, targets="*", stack=stack)
    base, lora = jax.jit(lambda p: lowrank.init(0, p, config, plan=plan))(params)
    lora = noisy(lora)
    merged = lambda lora: mean(fn(lowrank.merge(base, lora), X))
    return base, lora, jax.jit(jax.value_and_grad(merged))(lora)


def split_eight_ways(leaf):
    shards = leaf.addressable_shards
    return len({str(s.index) for s in shards}) == 8 and shards[0].data.size * 8 == leaf.size


SHORT = [
    ("experts", "uint8", False, True, (mix_experts,)),
    ("sequence", None, True, True, (attend,)),
]
BASES = [(None, False), (None, True), ("uint4", False), ("uint8", True)]
GRID = [(mesh, *base, True, tuple(PARTS)) for mesh in MESHES for base in BASES]
GRID += [("4x2", *base, False, tuple(PARTS)) for base in BASES]


@pytest.mark.parametrize(
    ("name", "packing", "dora", "scanned", "parts"),
    [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in GRID)],
)
def test_values_and_gradients_are_those_of_one_device(name, packing, dora, scanned, parts):
    base, lora, want = one_device(packing, dora, scanned, parts)
    sizes = MESHES[name]
    kinds = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
    at = lambda *axes: NamedSharding(
        mesh, P(*(axis if {axis} <= sizes.keys() or type(axis) is tuple else None for axis in axes))
    )
    # weights are split along all axes of the mesh
    rows = {"data": ("data", "sequence") if "sequence" in sizes else "data"}
    where = {leaf: at(*(rows.get(axis, axis) for axis in LAYERS[leaf][1])) for leaf in base}
    put = lambda tree: jax.device_put(jax.device_get(tree), lowrank.specs(tree, where))
    base, lora = put(base), put(lora)
    largest = max(leaf.size for leaf in jax.tree.leaves(base))
    leaves = [leaf for leaf in jax.tree.leaves(base) if leaf.size == largest]
    assert all(map(split_eight_ways, leaves))
    split = lambda x, *axes: lax.with_sharding_constraint(x, at(*axes))
    fn = lowrank.lift(functools.partial(decoder, scanned=scanned, split=split), fallback="raise")
    loss = lambda lora, base, x: mean(fn(lowrank.combine(base, lora), x))
    x = jax.device_put(X, at("data", "sequence"))
    out = at(), jax.tree.map(lambda leaf: leaf.sharding, lora)
    assert_close(jax.jit(jax.value_and_grad(loss), out_shardings=out)(lora, base, x), want)


STAGES = {"up": (8, 64, 128), "down": (8, 128, 64)}  # eight layers, two on each of four stages
BATCH = np.random.default_rng(1).standard_normal((4, 4, 64)).astype(np.float32)  # four at a time


def run_layers(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(feed_forward(x, w, None)), None), x, params)[0]


def run_stages(params, batches):
    """GPipe: in each turn a stage runs its layers and passes the result on to the next."""
    stage, last = lax.axis_index("stage"), 3

    def turn(moving, batch):
        done = run_layers(params, jnp.where(stage == 0, batch, moving))
        return lax.ppermute(done, "stage", [(i, i + 1) for i in range(last)]), done

    fed = jnp.concatenate([batches, batches[:last] * 0])
    _, done = lax.scan(turn, lax.pcast(fed[0] * 0, "stage", to="varying"), fed)
    return lax.psum(jnp.where(stage == last, done[last:], 0), "stage")


@functools.cache
def staged(packing):
    draw = lambda shape: np.random.default_rng(shape).standard_normal(shape).astype(np.float32)
    base = {name: draw(shape) / 8 for name, shape in STAGES.items()}
    plan = lowrank.plan(run_layers, base, BATCH[0])
    if packing:
        quant = lowrank.QuantConfig(block_size=32, packing=packing, double_quant=False, targets="*")
        base = lowrank.quantize(base, quant, plan=plan)
    config = lowrank.LoraConfig(rank=3, alpha=5, targets="*", dora=not packing)
    base, lora = jax.jit(lambda p: lowrank.init(0, p, config, plan=plan))(base)
    lora = noisy(lora)
    loss = lambda lora: mean(run_layers(lowrank.merge(base, lora), BATCH.reshape(16, 64)))
    return base, lora, jax.jit(jax.value_and_grad(loss))(lora)


@pytest.mark.parametrize(
    ("packing", "inside"),
    [("uint8", True)]
    + [pytest.param(packing, False, marks=pytest.mark.slow) for packing in (None, "uint8")],
)
def test_stages_by_hand(packing, inside):
    """Each device has its layers, their adapters and their gradients, and no others."""
    base, lora, want = staged(packing)
    mesh = jax.make_mesh((2, 4), ("data", "stage"), axis_types=(AxisType.Auto,) * 2)
    specs, tokens = dict.fromkeys(STAGES, P("stage")), P(None, "data")
    put = lambda tree: jax.device_put(
        tree, lowrank.specs(tree, dict.fromkeys(STAGES, NamedSharding(mesh, P("stage"))))
    )
    base, lora = put(base), put(lora)
    mapped = lambda fn, *trees: jax.shard_map(
        fn, mesh=mesh, in_specs=(*trees, tokens), out_specs=tokens
    )
    lift = functools.partial(lowrank.lift, fallback="raise")
    if inside:
        run = mapped(
            lambda base, lora, x: lift(run_stages)(lowrank.combine(base, lora), x),
            lowrank.specs(base, specs),
            lowrank.specs(lora, specs),
        )
    else:
        run = lambda base, lora, x: lift(mapped(run_stages, specs))(lowrank.combine(base, lora), x)
    got = jax.jit(jax.value_and_grad(lambda lora: mean(run(base, lora, BATCH))))(lora)
    assert_close(got, want)
    same = lambda one, other: one.sharding.is_equivalent_to(other.sharding, one.ndim)
    assert jax.tree.all(jax.tree.map(same, got[1], lora))
