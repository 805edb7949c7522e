"""quantize, and quantized leaves in the engine: exact, and never dense where it is not asked."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_reference import decoded
from jax import lax
from llama import Llama, LlamaConfig
from models import noisy

import lowrank_jax as lowrank
from lowrank_jax._codecs import host, scales

pytestmark = pytest.mark.usefixtures("fast_compile")

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def adapter(frozen, config, plan):
    """init's adapter, filled by NumPy."""
    shapes = jax.eval_shape(lambda p: lowrank.init(KEY, p, config, plan=plan)[1], frozen)
    return noisy(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


# The layout: whatever the axes, the numbers are bitsandbytes' of the flattened [out, in].

SHAPES = {  # shape, fan-in, stack
    "dense": ((128, 24), (0,), ()),
    "kernel of heads": ((128, 4, 3), (0,), ()),
    "scanned": ((3, 128, 5), (1,), (0,)),
    "scanned, out of heads": ((2, 4, 32, 10), (1, 2), (0,)),
    "transposed": ((24, 128), (1,), ()),
    "heads of whole blocks": ((2, 3, 64, 5), (1, 2), (0,)),
    "convolution": ((3, 3, 64, 8), (0, 1, 2), ()),
    "ragged": ((5, 30), (0,), ()),
    "ragged, scanned": ((2, 5, 30), (1,), (0,)),
    "ragged convolution": ((3, 3, 3, 8), (0, 1, 2), ()),
    "many second-level blocks": ((256, 300), (0,), ()),
}


def reference(weight, fan_in, stack, format, double):
    """Flatten to [out, in], encode in torch's order, decode, and put the axes back; in NumPy."""
    if stack:
        inner = tuple(axis - 1 for axis in fan_in)
        return np.stack([reference(w, inner, (), format, double) for w in weight])
    order = (*(axis for axis in range(weight.ndim) if axis not in fan_in), *fan_in)
    torch = np.transpose(weight, order)
    codes, absmax = host.encode_flat(torch.reshape(-1), format, 64)
    if double:
        eighths, nested, offset = host.encode_scales(absmax)
        absmax = scales.DYNAMIC_MAP[eighths] * np.repeat(nested, 256)[: absmax.size] + offset
    flat = decoded(codes.reshape(-1, 64), absmax, format).reshape(-1)[: weight.size]
    return np.transpose(flat.reshape(torch.shape), np.argsort(order))


# every layout with scales that have an order and bytes that are halves of an axis; the rest where
# blocks fill a row, and where they straddle rows, in a stack
LAYOUTS = [
    *((name, "nf4", True, "uint8") for name in SHAPES),
    *(
        (name, *options)
        for name in ("kernel of heads", "ragged, scanned")
        for options in [
            ("nf4", False, "uint4"), ("fp4", True, "uint4"), ("int8", True, "uint8"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "format", "double", "packing"), LAYOUTS)
def test_any_layout_holds_the_numbers_of_the_flat_order(
    name, format, double, packing, full_compile
):
    from lowrank_jax._nodes.quantized import dequantize_node, quantize_array

    shape, fan_in, stack = SHAPES[name]
    weight = normal(*shape)
    make = lambda w: quantize_array(
        w, fan_in, stack, format=format, double_quant=double, packing=packing
    )
    there_and_back = lambda w: (node := make(w), dequantize_node(node))
    node, got = jax.jit(there_and_back)(weight)
    assert (node.shape, node.dtype) == (shape, jnp.float32)
    np.testing.assert_array_equal(got, reference(weight, fan_in, stack, format, double))
    assert node.codes.dtype == {"int8": "int8"}.get(format, packing)
    assert (node.scales.dtype == jnp.uint8) is double
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(make, weight), node)


@pytest.mark.parametrize(("packing", "bits"), [("uint8", 4.13), ("uint4", 8.13)])
def test_bits_a_parameter_as_this_device_holds_them(packing, bits):
    params = {"w": normal(1024, 512)}
    quant = lowrank.QuantConfig(targets="w", packing=packing)
    frozen = lowrank.quantize(params, quant)
    leaf = lowrank.report(lambda p, x: x @ p["w"], frozen, np.ones((1, 1024)))["w"]
    assert leaf.bits <= bits  # a uint4 takes a byte on CPU
    assert sum(a.nbytes for a in jax.tree.leaves(frozen)) * 8 / params["w"].size == leaf.bits


# The engine


VARIANTS = {
    "unrolled": {"scan_layers": False, "layers": 1},
    "unrolled, remat": {"scan_layers": False, "layers": 1, "remat": True},
    "scan": {},
    "scan, remat": {"remat": True},
    "bfloat16": {"dtype": jnp.bfloat16},
    "untied": {"scan_layers": False, "layers": 1, "tie_embeddings": False, "attention_bias": True},
}
SIZES = {"vocab": 64, "dim": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 8))
QUANT = lowrank.QuantConfig(targets=("all-linear", "**/embedding"))
CONFIG = lowrank.LoraConfig(rank=3, alpha=5)


@functools.cache
def llama(name):
    """Model, the shapes of its variables, and its plan."""
    model = Llama(LlamaConfig(**{**SIZES, "hidden": 192, **VARIANTS[name]}))
    shapes = jax.eval_shape(model.init, KEY, TOKENS)
    return model, shapes, lowrank.plan(model.apply, shapes, TOKENS)


@functools.cache
def quantized_llama(name):
    """Model, frozen base and adapter."""
    model, shapes, plan = llama(name)
    start = lambda path, x: np.full(x.shape, "norm" in jax.tree_util.keystr(path), x.dtype)
    variables = noisy(jax.tree_util.tree_map_with_path(start, shapes))
    base = lowrank.quantize(jax.tree.map(np.asarray, variables), QUANT, plan=plan)
    return model, base, adapter(base, CONFIG, plan)


def mean_square(apply, tree):
    return (apply(tree, TOKENS).astype(jnp.float32) ** 2).mean()


@functools.cache
def dequantized_self(name):
    """Of dense weights: the loss and its gradient, results without an adapter, the merged tree."""
    model, base, lora = quantized_llama(name)

    @jax.jit
    def run(base, lora):
        dense = lowrank.dequantize(base)
        loss = lambda lora: mean_square(model.apply, lowrank.merge(dense, lora))
        slopes = jax.value_and_grad(loss)(lora)
        return slopes, model.apply(dense, TOKENS), lowrank.merge(dense, lora)

    return run(base, lora)


# what is kept for backward is looked at with all; values of these say no more
SLOW = dict.fromkeys(("unrolled, remat", "scan"), (pytest.mark.slow,))


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in VARIANTS])
def test_a_quantized_base_is_its_dequantized_self(name):
    model, base, lora = quantized_llama(name)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if name == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    lifted = lowrank.lift(model.apply, fallback="raise")
    mine = lambda base, lora: mean_square(lifted, lowrank.combine(base, lora))

    @jax.jit
    def run(base, lora):
        slopes = jax.value_and_grad(mine, 1)(base, lora)
        return slopes, lifted(base, TOKENS), lowrank.merge(base, lora)

    got, frozen, merged = run(base, lora)
    want, dense, merged_dense = dequantized_self(name.removesuffix(", remat"))
    chex.assert_trees_all_close(got, want, **tolerance)
    chex.assert_trees_all_close(frozen, dense, **tolerance)
    chex.assert_trees_all_close(merged, merged_dense, rtol=1e-6)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(got[1]))
    if name not in ("scan, remat", "unrolled"):
        return

    @jax.jit
    def others(base, lora, tangents):
        """vmap over adapters, and forward mode."""
        many = jax.tree.map(lambda f: jnp.stack([f, 2 * f]), lora)
        tangent = jax.jvp(lambda l: mine(base, l), (lora,), (tangents,))[1]
        return jax.vmap(mine, (None, 0))(base, many)[0], tangent

    value, tangent = others(base, lora, got[1])
    chex.assert_trees_all_close(value, got[0], **tolerance)
    squares = sum(np.sum(np.square(np.asarray(g))) for g in jax.tree.leaves(got[1]))
    np.testing.assert_allclose(tangent, squares, rtol=1e-3)


def residuals(fn, frozen, *args):
    """Shapes and dtypes of what backward keeps of forward; of args alone."""
    backward = lambda frozen, *args: jax.vjp(functools.partial(fn, frozen), *args)[1]
    kept = jax.eval_shape(backward, frozen, *args)
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(kept)]


def dense_shapes(base):
    """Shapes of whole weights and of layers of stacks of two, decoded or laid out as codes are."""
    shapes = set()
    whole = lambda shape, size: np.prod(shape) in (size, size // 2)
    for leaf in jax.tree.leaves(base, is_leaf=lambda n: isinstance(n, lowrank.Quantized)):
        if isinstance(leaf, lowrank.Quantized):
            found = {leaf.shape, leaf.shape[1:], leaf.codes.shape, leaf.codes.shape[1:]}
            found |= {leaf.shape[:-2] + leaf.shape[:-3:-1]}  # transposed
            shapes |= {shape for shape in found if whole(shape, leaf.size)}
    return shapes


@pytest.mark.parametrize(
    ("batched", "dora"),
    [
        (False, False),
        (True, False),
        (False, True),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["unrolled", "unrolled, remat", "scan", "scan, remat"])
def test_codes_and_scales_are_all_that_is_kept_for_backward(name, batched, dora):
    model, shapes, plan = llama(name)
    config = dataclasses.replace(CONFIG, dora=dora)
    start = lambda v: lowrank.init(KEY, lowrank.quantize(v, QUANT, plan=plan), config, plan=plan)
    base, lora = jax.eval_shape(start, shapes)
    lifted = lowrank.lift(model.apply, fallback="raise")
    one = lambda base, lora: lifted(lowrank.combine(base, lora), TOKENS).sum()
    fn = one
    if batched:
        lora = jax.tree.map(lambda f: jax.ShapeDtypeStruct((2, *f.shape), f.dtype), lora)
        fn = lambda base, lora: jax.vmap(one, (None, 0))(base, lora).sum()
    dense = dense_shapes(base)
    floating = lambda dtype: jnp.issubdtype(dtype, jnp.floating)
    assert not [r for r in residuals(fn, base, lora) if floating(r[1]) and r[0] in dense]
    # the detector sees what a plain dequantization keeps
    if "remat" not in name and not batched:
        plain = lambda base, lora: model.apply(lowrank.merge(base, lora), TOKENS).sum()
        assert [r for r in residuals(plain, base, lora) if floating(r[1]) and r[0] in dense]


def test_a_table_is_decoded_only_where_it_is_read():
    params = {"table": normal(512, 64), "w": normal(64, 64)}
    fn = lambda p, ids: jnp.tanh(p["table"][ids] @ p["w"])
    ids = np.array([[3, 511, 0], [7, 7, 1]])
    plan = lowrank.plan(fn, params, ids)
    lifted = lowrank.lift(fn, fallback="raise")
    for double in (False, True):
        quant = lowrank.QuantConfig(targets="table", double_quant=double)
        frozen = lowrank.quantize(params, quant, plan=plan)
        chex.assert_trees_all_close(*of_codes_and_dense(fn, frozen, ids), rtol=1e-5, atol=1e-6)
        jaxpr = str(jax.make_jaxpr(lifted)(frozen, ids))
        assert "f32[512,64]" not in jaxpr
        assert "f32[512,1,64]" not in jaxpr


def of_codes_and_dense(fn, frozen, *args):
    """fn lifted over quantized leaves, and on the dense leaves they stand for."""
    lifted = lowrank.lift(fn, fallback="raise")
    both = lambda tree, *args: (lifted(tree, *args), fn(lowrank.dequantize(tree), *args))
    return jax.jit(both)(frozen, *args)


@pytest.mark.parametrize("shape", [(3, 3, 64, 8), (3, 3, 4, 8)])
def test_convolutions(shape):
    kernel, x = normal(*shape), normal(2, 6, 6, shape[2], seed=1)
    conv = lambda p, x: lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    plan = lowrank.plan(lambda p, x: jnp.tanh(conv(p, x)), {"k": kernel}, x)
    base = lowrank.quantize({"k": kernel}, lowrank.QuantConfig(targets="k"), plan=plan)
    lora = adapter(base, lowrank.LoraConfig(rank=2, targets="k"), plan)
    lifted = lowrank.lift(conv, fallback="raise")
    mine = lambda base, lora: jnp.sin(lifted(lowrank.combine(base, lora), x)).mean()
    want = lambda base, lora: jnp.sin(conv(lowrank.merge(base, lora), x)).mean()
    both = lambda *args: [jax.value_and_grad(loss, 1)(*args) for loss in (mine, want)]
    chex.assert_trees_all_close(*jax.jit(both)(base, lora), rtol=1e-4, atol=1e-5)
    kept = [dtype for kept, dtype in residuals(mine, base, lora) if kept == shape]
    assert not [dtype for dtype in kept if jnp.issubdtype(dtype, jnp.floating)]


PARTS = {
    "split": lambda p, x: [x @ w for w in jnp.split(p["w"], 3, axis=1)],
    "strided": lambda p, x: x @ p["w"][:, 5::7],
    "backwards": lambda p, x: x @ p["w"][:, ::-1],
    "to heads": lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"].reshape(128, 3, 128)),
    "one head": lambda p, x: x @ p["w"].reshape(128, 3, 128)[:, 1],
    "heads merged": lambda p, x: x @ p["heads"].reshape(128, 384),
    "of a stack": lambda p, x: sum(x @ p["stack"][i, :, 7:] for i in range(2)),
    "a stack merged": lambda p, x: p["stack"].reshape(4, 64, 128)[3].T @ x.T[:64],
}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_weight_has_its_own_scales(name, double_quant):
    """Of leaves with more scales than share a scale of their own: each must know its place."""
    params = {"w": normal(128, 384), "heads": normal(128, 3, 128), "stack": normal(2, 128, 384)}
    if name == "a stack merged":
        params["stack"] = normal(2, 2, 64, 128)
    x, fn = normal(3, 128, seed=1), PARTS[name]
    plan = lowrank.plan(fn, params, x)
    used = [path for path, use in plan.items() if use.op == "dot"]
    quant = lowrank.QuantConfig(targets=tuple(used), double_quant=double_quant)
    frozen = lowrank.quantize(params, quant, plan=plan)
    chex.assert_trees_all_close(*of_codes_and_dense(fn, frozen, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", [64, 10])
def test_experts_in_ragged_products(inner):
    """In blocks and kept flat: as dense, and codes alone are kept for backward."""
    params = {"up": normal(3, 64, inner) / 8, "down": normal(3, inner, 32, seed=1) / 8}
    x, sizes = normal(7, 64, seed=2), np.array([2, 0, 5])
    fn = lambda p, x: lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)
    plan = lowrank.plan(fn, params, x)
    quant = lowrank.QuantConfig(targets="*")
    frozen = lowrank.quantize(params, quant, plan=plan)
    assert (frozen["down"].order is None) is (inner == 64)
    lora = adapter(frozen, lowrank.LoraConfig(rank=2, alpha=3, targets="*"), plan)
    lifted = lowrank.lift(fn, fallback="raise")
    mine = lambda base, lora, x: jnp.sin(lifted(lowrank.combine(base, lora), x)).sum()
    want = lambda base, lora, x: jnp.sin(fn(lowrank.merge(base, lora), x)).sum()
    both = lambda *args: [jax.value_and_grad(loss, (1, 2))(*args) for loss in (mine, want)]
    chex.assert_trees_all_close(*jax.jit(both)(frozen, lora, x), rtol=1e-4, atol=1e-5)
    shapes = {leaf.shape for leaf in params.values()} | {f.codes.shape for f in frozen.values()}
    dense = lambda fn: [
        s for s, dtype in residuals(fn, frozen, lora, x) if s in shapes and dtype == "f4"
    ]
    assert not dense(mine)
    assert dense(want)
    report = lowrank.report(fn, lowrank.combine(frozen, lora), x)
    assert {leaf.how for leaf in report.values()} == {"factored, dequantized 1×"}
    assert {leaf.how for leaf in lowrank.report(fn, frozen, x).values()} == {"dequantized 1×"}


@pytest.mark.parametrize("fill", [None, 7.0])
def test_rows_beyond_the_table_are_the_fill(fill):
    params = {"table": normal(9, 64)}
    fn = lambda p, ids: jnp.take(p["table"], ids, axis=0, fill_value=fill)
    ids = np.array([0, 8, 9])
    plan = lowrank.plan(fn, params, ids)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="table"), plan=plan)
    got, want = of_codes_and_dense(fn, frozen, ids)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.isnan(got[2]).all() if fill is None else (got[2] == fill).all()


def test_a_weight_scaled_by_what_is_trained_is_built():
    """Scales are constants to every derivative, so a number with one of its own is not in them."""
    params = {"w": normal(64, 8)}
    fn = lambda p, x, gain: x @ (p["w"] * gain)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w"))
    lifted, x = lowrank.lift(fn, fallback="silent"), normal(3, 64)
    slope = lambda fn, p: jax.grad(lambda gain: jnp.sin(fn(p, x, gain)).sum())(0.5)
    both = lambda frozen: (slope(lifted, frozen), slope(fn, lowrank.dequantize(frozen)))
    got, want = jax.jit(both)(frozen)
    assert abs(want) > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4)


# What quantize asks for, and refuses


def test_codes_are_the_same_eager_and_jitted(full_compile):
    params = jax.device_put({"w": normal(256, 96), "v": normal(7, 9)})
    quant = lowrank.QuantConfig(targets="*")
    eager = lowrank.quantize(params, quant)
    jitted = jax.jit(lambda p: lowrank.quantize(p, quant))(params)
    chex.assert_trees_all_equal(eager, jitted)
    assert isinstance(eager["w"], lowrank.Quantized)


def two_stacks(width=64, inner=10):
    """Two stacks, one in blocks and one kept flat, and the plan of a model over them."""
    shapes = {"w": (6, 2, width, inner), "v": (6, 2, inner, width)}
    params = {name: normal(*shape) for name, shape in shapes.items()}

    def fn(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w["w"] @ w["v"]), None)
        return lax.scan(lambda x, w: (lax.scan(inner, x, w)[0], None), x, p)[0]

    return params, lowrank.plan(fn, params, np.ones((2, width)))


def test_a_stack_on_the_host_is_encoded_there(monkeypatch):
    from lowrank_jax._trees import quantize

    params, plan = two_stacks()
    quant = lowrank.QuantConfig()
    want = lowrank.quantize(jax.device_put(params), quant, plan=plan)
    seen, encode = [], quantize._quantize_on_device
    spy = lambda leaf, *rest: seen.append(leaf) or encode(leaf, *rest)
    monkeypatch.setattr(quantize, "_quantize_on_device", spy)
    got = lowrank.quantize(params, quant, plan=plan)
    chex.assert_trees_all_equal(got, want)
    assert seen
    assert all(isinstance(leaf, jax.core.Tracer) for leaf in seen), "of them the shape alone"
    params["w"][4, 1, 3, 4:6] = np.inf
    with pytest.raises(lowrank.TreeError, match="w: 2 of 7680 values are not finite"):
        lowrank.quantize(params, quant, plan=plan)


def test_temporaries_of_a_stack_are_those_of_a_layer(full_compile):
    params, plan = two_stacks(width=512, inner=100)
    fn = jax.jit(lambda p: lowrank.quantize(p, lowrank.QuantConfig(), plan=plan))
    memory = fn.lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.5 * params["w"][0].nbytes


def test_nothing_is_deleted_before_every_leaf_is_known_to_be_good():
    params = {"a": normal(64, 2), "z": normal(64, 2)}
    params["z"][3, 1] = np.nan
    params = jax.device_put(params)
    quant = lowrank.QuantConfig(targets="*")
    with pytest.raises(lowrank.TreeError, match="z: 1 of 128 values are not finite"):
        lowrank.quantize(params, quant, donate=True)
    assert not params["a"].is_deleted()


def test_donated_leaves_go_one_by_one():
    params = jax.device_put({"w": normal(128, 64), "b": np.ones(3)})
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w"), donate=True)
    assert params["w"].is_deleted()
    assert not params["b"].is_deleted()
    assert np.isfinite(lowrank.dequantize(frozen)["w"]).all()


MISTAKES = {
    "a NaN": (
        lambda: lowrank.quantize(
            {"w": jnp.full((64, 2), jnp.nan)}, lowrank.QuantConfig(targets="w")
        ),
        lowrank.TreeError,
        r"w: 128 of 128 values are not finite",
    ),
    "all-linear without a plan": (
        lambda: lowrank.quantize({"w": jnp.ones((64, 2))}, lowrank.QuantConfig()),
        lowrank.AxesError,
        r"pass plan=lowrank.plan",
    ),
    "a misspelt target": (
        lambda: lowrank.quantize({"w": jnp.ones((64, 2))}, lowrank.QuantConfig(targets="v")),
        lowrank.PatternError,
        r"targets pattern 'v' matches none",
    ),
    "quantizing twice": (
        lambda: lowrank.quantize(
            lowrank.quantize({"w": jnp.ones((64, 2))}, lowrank.QuantConfig(targets="w")),
            lowrank.QuantConfig(targets="w"),
        ),
        lowrank.TreeError,
        r"already holds quantized leaves \('w'\)",
    ),
    "an odd block": (
        lambda: lowrank.QuantConfig(block_size=48),
        lowrank.ConfigError,
        r"power of two",
    ),
    "an unknown format": (
        lambda: lowrank.QuantConfig(format="nf3"),
        lowrank.ConfigError,
        r"format must be one of .*, not 'nf3'",
    ),
    "the wrong config": (
        lambda: lowrank.quantize({"w": jnp.ones((64, 2))}, lowrank.LoraConfig()),
        lowrank.ConfigError,
        r"quantize takes \(params, quant\): quant is a LoraConfig",
    ),
    "dequantizing an adapted tree": (
        lambda: lowrank.dequantize(
            lowrank.combine(
                *lowrank.init(KEY, {"w": jnp.ones((4, 4))}, lowrank.LoraConfig(rank=1, targets="w"))
            )
        ),
        lowrank.TreeError,
        r"'w' is adapted: lowrank.merge",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    make, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words):
        make()
