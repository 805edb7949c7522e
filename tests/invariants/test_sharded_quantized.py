"""A quantized base on eight devices: as on one, its codes split, and never dense where they are."""

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

SIZES = {"vocab": 64, "dim": 256, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 64}
MODES = {"scan, remat": {"remat": True}, "unrolled": {"scan_layers": False, "layers": 1}}
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 6))
TARGETS = ("all-linear", "**/embedding")
# 16 blocks of 32 in the longest fan-in, 8 in the others; over 256 in all, so that scales of scales
# count
QUANT = lowrank.QuantConfig(block_size=32, targets=TARGETS)
KEY = jax.random.key(0)


def assert_close(got, want):
    """Each leaf within rounding of its largest entry: sums are in another order."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(jax.device_get(want)))
    scale = lambda x, y: np.asarray(x) / max(np.abs(np.asarray(y)).max(), 1e-3 * largest)
    got, want = jax.tree.map(scale, got, want), jax.tree.map(scale, want, want)
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-4)


def adapter(frozen, config, plan=None, scale=0.1):
    """init's adapter, filled by NumPy."""
    shapes = jax.eval_shape(lambda p: lowrank.init(KEY, p, config, plan=plan)[1], frozen)
    return noisy(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), scale=scale)


def loss(apply, params, tokens):
    logits = apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@functools.cache
def one_device(mode):
    """Model, frozen base, adapter, and on one device the loss and the adapter's gradient."""
    model = Llama(LlamaConfig(**{**SIZES, **MODES[mode]}, hidden=512))
    shapes = jax.eval_shape(model.init, KEY, TOKENS)["params"]
    start = lambda path, x: np.full(x.shape, "norm" in jax.tree_util.keystr(path), x.dtype)
    params = noisy(jax.tree_util.tree_map_with_path(start, shapes), scale=0.06)
    params = jax.tree.map(np.asarray, params)
    call = lambda params, tokens: model.apply({"params": params}, tokens)
    plan = lowrank.plan(call, params, TOKENS)
    base = lowrank.quantize(params, QUANT, plan=plan)
    config = lowrank.LoraConfig(rank=3, alpha=5, targets=TARGETS)
    lora = adapter(base, config, plan, scale=0.05)
    dense = lambda lora: loss(model.apply, lowrank.merge(lowrank.dequantize(base), lora), TOKENS)
    return model, base, lora, jax.jit(jax.value_and_grad(dense))(lora)


def step_of(model):
    lifted = lowrank.lift(model.apply, fallback="raise")
    mine = lambda l, b, t: loss(lifted, lowrank.combine(b, l), t)
    return jax.value_and_grad(mine)


def run(fn, *args):
    """The results, and the traced program."""
    jitted = jax.jit(fn)
    return jitted(*args), str(jitted.trace(*args).jaxpr)


def specs_of(tree, column, row, table):
    """By the leaf's path: o and down are rows; a scanned leaf has a layer's axis in front."""

    def spec(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        own = row if "o_proj" in path or "down_proj" in path else column
        own = table if "embedding" in path else own if "kernel" in path else P()
        return P(None, *own) if leaf.ndim == 3 else own

    is_leaf = lambda n: isinstance(n, lowrank.Quantized)
    return jax.tree_util.tree_map_with_path(spec, tree, is_leaf=is_leaf)


def split_eight_ways(leaf):
    shards = leaf.addressable_shards
    return len({str(s.index) for s in shards}) == 8 and shards[0].data.size * 8 == leaf.size


def mesh_of(shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))


def named(mesh, specs):
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))


def placed(tree, where):
    """A tree split over devices; from the host, which compiles nothing."""
    return jax.device_put(jax.device_get(tree), lowrank.specs(tree, where))


def assert_placed_alike(left, right):
    same = lambda l, r: l.sharding.is_equivalent_to(r.sharding, l.ndim)
    assert jax.tree.all(jax.tree.map(same, left, right))


def largest(base):
    nodes = jax.tree.leaves(base, is_leaf=lambda n: isinstance(n, lowrank.Quantized))
    nodes = [n for n in nodes if isinstance(n, lowrank.Quantized)]
    return [n.codes for n in nodes if n.size == max(n.size for n in nodes)]


BOTH = P("data", "model"), P("model", "data"), P("model", "data")
CASES = {  # mode, mesh, specs of columns, rows and the table
    "scanned": ("scan, remat", (2, 4), *BOTH),
    "unrolled": ("unrolled", (4, 2), *BOTH),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_one_device(case):
    mode, shape, *split = CASES[case]
    model, base, lora, want = one_device(mode)
    mesh = mesh_of(shape)
    where = named(mesh, specs_of(base, *split))
    base, lora = placed(base, where), placed(lora, where)
    assert all(map(split_eight_ways, largest(base)))
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
    got, text = run(step_of(model), lora, base, tokens)
    assert_close(got, want)
    # in the traced program no weight is dense, nor kept for backward
    assert "lowrank_quantized_dot" in text
    assert not [shape for shape in ("f32[512,256]", "f32[16,32,256]") if shape in text]
    apply = lambda tree, tokens: model.apply({"params": tree}, tokens)
    report = lowrank.report(apply, lowrank.combine(base, lora), tokens)
    assert report.memory.base / 8 <= report.device_memory.base < report.memory.base / 7.5


def test_pmap():
    model, base, lora, want = one_device("unrolled")
    each = lambda l, b, t: lax.pmean(step_of(model)(l, b, t), "d")
    mapped = jax.pmap(each, axis_name="d", in_axes=(None, None, 0))
    got = jax.device_get(mapped(lora, base, TOKENS.reshape(8, 1, 6)))
    got = jax.tree.map(lambda leaf: leaf[0], got)
    assert_close(got, want)


def test_shard_map_over_data():
    """Data parallel by hand: the codes are gathered, not what they stand for."""
    model, base, lora, want = one_device("scan, remat")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    base_at = lowrank.specs(base, specs_of(base, *[P("data")] * 3))

    def gathered(leaf, spec):
        axis = [i for i, entry in enumerate(spec) if entry == "data"]
        return lax.all_gather(leaf, "data", axis=axis[0], tiled=True) if axis else leaf

    def each(lora, base, tokens):
        whole = jax.tree.map(gathered, base, base_at)
        lifted = lowrank.lift(model.apply, fallback="raise")
        return lax.pmean(loss(lifted, lowrank.combine(whole, lora), tokens), "data")

    specs = {"in_specs": (P(), base_at, P("data")), "out_specs": P()}
    mapped = jax.shard_map(each, mesh=mesh, **specs, check_vma=False)
    got = jax.jit(jax.value_and_grad(mapped))(lora, base, TOKENS)
    assert_close(got, want)


# Two layers, in every way a weight can lie.


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def two_layers(p, x, **out):
    return jnp.tanh(jnp.einsum("bi,io->bo", jnp.tanh(x @ p["w"]), p["v"], **out))


X = normal(16, 256)
LAYOUTS = {
    "not split": {"w": P(), "v": P()},
    "fan-out": {"w": P(None, "model"), "v": P(None, "model")},
    "fan-in": {"w": P("model"), "v": P("model")},
    "column, row": {"w": P(None, "model"), "v": P("model", None)},
}


@functools.cache
def layers(double_quant, inner=512):
    """Base, adapter, and on one device the loss and the gradients of adapter and input."""
    params = {"w": normal(256, inner) / 16, "v": normal(inner, 256) / 16}
    quant = lowrank.QuantConfig(block_size=32, targets="*", double_quant=double_quant)
    frozen = lowrank.quantize(params, quant)
    lora = adapter(frozen, lowrank.LoraConfig(rank=2, alpha=3, targets="*"))

    def loss(lora, x, base):
        return jnp.sin(two_layers(lowrank.merge(lowrank.dequantize(base), lora), x)).sum()

    return frozen, lora, jax.jit(jax.value_and_grad(loss, (0, 1)))(lora, X, frozen)


@pytest.mark.parametrize(
    ("kind", "double_quant", "layout"),
    [(AxisType.Explicit, True, layout) for layout in LAYOUTS]
    + [(AxisType.Explicit, False, "column, row"), (AxisType.Auto, True, "fan-in")]
    + [(AxisType.Auto, True, "fan-out")],
)
def test_every_layout(kind, double_quant, layout):
    """An out_sharding that the user said of the product is its own, with or without split codes."""
    base, lora, want = layers(double_quant)
    mesh = mesh_of((2, 4), kind)
    out = {"out_sharding": P("data", None)} if kind == AxisType.Explicit else {}
    with jax.set_mesh(mesh):
        where = named(mesh, LAYOUTS[layout])
        base, lora = placed(base, where), placed(lora, where)
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        lifted = lowrank.lift(two_layers, fallback="raise")
        live = lambda l, b, x: lifted(lowrank.combine(b, l), x, **out)
        loss = lambda l, b, x: jnp.sin(live(l, b, x)).sum()
        got, text = run(jax.value_and_grad(loss, (0, 2)), lora, base, x)
        assert_close(got, want)
        assert "lowrank_quantized_dot" in text
        if kind == AxisType.Explicit:
            assert_placed_alike(got[1], (lora, x))
            y = jax.eval_shape(live, lora, base, x)
            assert y.sharding.spec == P("data", None)
        if (kind, double_quant) == (AxisType.Explicit, False):
            many = jax.tree.map(lambda f: jnp.stack([f, f]), lora)
            both = jax.jit(jax.vmap(loss, (0, None, None)))(many, base, x)
            assert_close(both[1], want[0])


def column_row(p, x):
    return jnp.tanh(lax.psum(jnp.tanh(x @ p["w"]) @ p["v"], "model"))


BY_HAND = {"w": P(None, "model"), "v": P("model")}


def by_hand(fn, *in_specs):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=(*in_specs, P()), out_specs=P())


@pytest.mark.parametrize("double_quant", [False, True])
def test_lift_of_a_shard_mapped_function(double_quant):
    """A part of a leaf does not know its place among the scales of scales: they are decoded."""
    base, lora, want = layers(double_quant)
    lifted = lowrank.lift(by_hand(column_row, BY_HAND), fallback="raise")
    loss = lambda l, x: jnp.sin(lifted(lowrank.combine(base, l), x)).sum()
    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(lora, X)
    assert_close(got, want)


def test_a_leaf_that_cannot_be_shared_out_is_built_and_said():
    base, lora, want = layers(True, inner=80)  # v, kept flat; w has 80 columns
    lifted = lowrank.lift(by_hand(column_row, BY_HAND))
    loss = lambda l, x: jnp.sin(lifted(lowrank.combine(base, l), x)).sum()
    with pytest.warns(
        lowrank.MaterializeWarning, match="v: .*cannot be sharded by this spec"
    ) as caught:
        got = jax.jit(jax.value_and_grad(loss, (0, 1)))(lora, X)
    assert len(caught) == 1
    assert_close(got, want)


def test_shard_map_of_a_lifted_function():
    lifted = lowrank.lift(column_row, fallback="raise")
    run = lambda l, b, x: lifted(lowrank.combine(b, l), x)
    for double_quant in (False, True):
        base, lora, want = layers(double_quant)
        mapped = by_hand(run, lowrank.specs(lora, BY_HAND), lowrank.specs(base, BY_HAND))
        loss = lambda l, x, base=base: jnp.sin(mapped(l, base, x)).sum()
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        if double_quant:
            with pytest.raises(lowrank.TreeError, match="(?s)512 .* but 16 .*lift the function"):
                step(lora, X)
        else:
            assert_close(step(lora, X), want)


def test_a_partly_manual_mesh_of_explicit_axes():
    base, lora, want = layers(True)
    mesh = mesh_of((4, 2), AxisType.Explicit)
    lifted = lowrank.lift(two_layers, fallback="raise")
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            lambda l, b, x: lifted(lowrank.combine(b, l), x),
            in_specs=(P(), P(), P("data")),
            out_specs=P("data"),
            axis_names={"data"},
        )
        put = lambda tree, spec: jax.device_put(jax.device_get(tree), NamedSharding(mesh, spec))
        loss = lambda l, b, x: jnp.sin(mapped(l, b, x)).sum()
        args = put(lora, P()), put(base, P()), put(X, P("data"))
        assert_close(jax.jit(jax.value_and_grad(loss, (0, 2)))(*args), want)


# Explicit axes: the model says how its own results lie.

WIDE = {
    "embed": normal(64, 256) / 8,
    "layers": {
        "q": normal(3, 256, 4, 128) / 32,
        "o": normal(3, 4, 128, 256) / 32,
        "up": normal(3, 256, 128) / 16,
        "down": normal(3, 128, 256) / 16,
    },
    "mix": normal(3, 256, 256) / 32,
}
IDS = np.random.default_rng(1).integers(0, 64, (16, 4))


@functools.cache
def wide():
    plain = functools.partial(explicit_model, False)
    targets = ("all-linear", "embed")
    plan = lowrank.plan(plain, WIDE, IDS)
    quant = lowrank.QuantConfig(block_size=32, targets=targets)
    base = lowrank.quantize(WIDE, quant, plan=plan)
    config = lowrank.LoraConfig(rank=2, alpha=3, targets=targets)
    make = lambda base: lowrank.init(KEY, base, config, plan=plan)[1]
    dense = jax.jit(lowrank.dequantize)(base)
    loss = lambda lora: jnp.sin(plain(lowrank.merge(dense, lora), IDS)).mean()
    lora = adapter(base, config, plan, scale=0.05)
    return base, lora, make, plan, dense, quant, jax.jit(jax.value_and_grad(loss))(lora)


def placed_wide(mesh):
    """Base, adapter and dense weights, split."""
    where = named(mesh, EXPLICIT_SPECS)
    return [placed(tree, where) for tree in (*wide()[:2], WIDE)]


def test_explicit_axes():
    """Look-up, n-D products, scan and remat, a convolution, the tied head, reshard of weights."""
    *_, plan, _, _, want = wide()
    mesh = mesh_of((2, 4), AxisType.Explicit)
    fn = functools.partial(explicit_model, True)
    with jax.set_mesh(mesh):
        base, lora, _ = placed_wide(mesh)
        assert split_eight_ways(base["layers"]["up"].codes)
        ids = jax.device_put(IDS, NamedSharding(mesh, P("data")))
        assert set(lowrank.plan(fn, base, ids)) == set(plan)
        lifted = lowrank.lift(fn, fallback="raise")
        loss = lambda l, b, i: jnp.sin(lifted(lowrank.combine(b, l), i)).mean()
        got = jax.jit(jax.value_and_grad(loss))(lora, base, ids)
        assert_close(got, want)
        assert_placed_alike(got[1], lora)


EAGER = pytest.param(lambda fn: fn, marks=pytest.mark.slow, id="eager")


@pytest.mark.parametrize("maybe", [pytest.param(jax.jit, id="jit"), EAGER])
def test_what_is_made_of_a_base_or_a_base_of_weights_lies_as_they_do(maybe):
    base, _, make, plan, dense, quant, _ = wide()
    mesh = mesh_of((8, 1), AxisType.Explicit)
    with jax.set_mesh(mesh):
        split, lora, weights = placed_wide(mesh)
        assert_placed_alike(maybe(make)(split), lora)
        again = maybe(lowrank.dequantize)(split)
        chex.assert_trees_all_equal(again, dense)
        assert_placed_alike(again, weights)
        again = maybe(lambda w: lowrank.quantize(w, quant, plan=plan))(weights)
        chex.assert_trees_all_equal(again, base)
        assert_placed_alike(again, split)


def test_convolutions_and_ragged_products_keep_the_users_layout():
    mesh = mesh_of((4, 2), AxisType.Explicit)
    params = {"kernel": normal(3, 64, 6) / 16, "experts": normal(2, 64, 6) / 8}
    x, sizes = normal(8, 5, 64), np.array([12, 28])

    def fn(explicit, p, x):
        lay = lambda *spec: {"out_sharding": P(*spec)} if explicit else {}
        h = lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
            **lay("data", None, "model"),
        )  # fmt: skip
        rows = np.ones((40, 64), np.float32) * np.arange(64, dtype=np.float32) / 64
        numbers = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
        ragged = lax.ragged_dot_general(rows, p["experts"], sizes, numbers, **lay(None, "model"))
        return h, ragged

    plain = functools.partial(fn, False)
    plan = lowrank.plan(plain, params, x)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="*"), plan=plan)
    base, lora = frozen, adapter(frozen, lowrank.LoraConfig(rank=2, alpha=3, targets="*"), plan)

    def of(fn, tree):
        results = fn(tree, x)
        return sum(jnp.sin(y).sum() for y in results), results

    merged = lambda lora: of(plain, lowrank.merge(base, lora))
    slopes, want = jax.jit(jax.grad(merged, has_aux=True))(lora)
    with jax.set_mesh(mesh):
        specs = {"kernel": P(None, None, "model"), "experts": P(None, None, "model")}
        where = named(mesh, specs)
        base, lora = placed(base, where), placed(lora, where)
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        lifted = lowrank.lift(functools.partial(fn, True), fallback="raise")
        live = lambda lora, base: of(lifted, lowrank.combine(base, lora))
        mine, got = jax.jit(jax.grad(live, has_aux=True))(lora, base)
        assert [y.sharding.spec for y in got] == [P("data", None, "model"), P(None, "model")]
        assert_close(got, want)
        assert_close(mine, slopes)
