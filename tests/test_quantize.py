"""quantize, and quantized leaves in the engine: exact, and never dense where it is not asked."""

import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lowrank_jax as lowrank
from lowrank_jax import _codecs
from lowrank_jax._codecs.scales import decode_scales, encode_scales

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from llama import Llama, LlamaConfig

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


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
    """Flatten to [out, in], encode in torch's order, decode, and put the axes back."""
    if stack:
        inner = tuple(axis - 1 for axis in fan_in)
        return jnp.stack([reference(w, inner, (), format, double) for w in weight])
    order = (*(axis for axis in range(weight.ndim) if axis not in fan_in), *fan_in)
    torch = jnp.transpose(weight, order)
    codes, scales = _codecs.encode_flat(torch.reshape(-1), format, 64)
    if double:
        scales = decode_scales(*encode_scales(scales))
    blocks = _codecs.decode(codes.reshape(-1, 64), scales, format, 1)
    flat = blocks.reshape(-1)[: weight.size].reshape(torch.shape)
    return jnp.transpose(flat, np.argsort(order))


@pytest.mark.parametrize(
    ("format", "double", "packing"),
    [
        ("nf4", True, "uint8"),
        ("nf4", False, "uint4"),
        ("fp4", True, "uint4"),
        ("int8", True, "uint8"),
    ],
)
@pytest.mark.parametrize("name", SHAPES)
def test_any_layout_holds_the_numbers_of_the_flat_order(name, format, double, packing):
    from lowrank_jax._nodes.quantized import dequantized, quantized

    shape, fan_in, stack = SHAPES[name]
    weight = normal(*shape)
    options = {"format": format, "double_quant": double, "packing": packing}
    node = jax.jit(lambda w: quantized(w, fan_in, stack, **options))(weight)
    assert (node.shape, node.dtype) == (shape, jnp.float32)
    wanted = jax.jit(lambda w: reference(w, fan_in, stack, format, double))(weight)
    np.testing.assert_array_equal(jax.jit(dequantized)(node), wanted)
    assert node.codes.dtype == {"int8": "int8"}.get(format, packing)
    assert (node.scales.dtype == jnp.uint8) is double
    shapes = jax.eval_shape(lambda w: quantized(w, fan_in, stack, **options), weight)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, node)


@pytest.mark.parametrize(("packing", "bits"), [("uint8", 4.13), ("uint4", 8.13)])
def test_bits_a_parameter_as_this_device_holds_them(packing, bits):
    params = {"w": normal(1024, 512)}
    quant = lowrank.QuantConfig(targets="w", packing=packing)
    frozen = lowrank.quantize(params, quant)
    leaf = lowrank.report(lambda p, x: x @ p["w"], frozen, jnp.ones((1, 1024)))["w"]
    assert leaf.bits <= bits  # a uint4 takes a byte on CPU
    assert sum(a.nbytes for a in jax.tree.leaves(frozen)) * 8 / params["w"].size == leaf.bits


# The engine


def llama(**options):
    sizes = {"vocab": 64, "dim": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32}
    model = Llama(LlamaConfig(**{**sizes, "hidden": 192, **options}))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 8)))
    variables = jax.jit(model.init)(KEY, tokens)
    return model, variables, tokens, lowrank.plan(model.apply, variables, tokens)


VARIANTS = {
    "unrolled": {"scan_layers": False},
    "unrolled, remat": {"scan_layers": False, "remat": True},
    "scan": {},
    "scan, remat": {"remat": True},
    "bfloat16": {"dtype": jnp.bfloat16},
    "untied": {"tie_embeddings": False, "attention_bias": True},
}
QUANT = lowrank.QuantConfig(targets=("all-linear", "**/embedding"))


def quantized_llama(name, dora=False):
    model, variables, tokens, plan = llama(**VARIANTS[name])
    frozen = jax.jit(lambda v: lowrank.quantize(v, QUANT, plan=plan))(variables)
    config = lowrank.LoraConfig(rank=3, alpha=5, dora=dora)
    base, lora = lowrank.init(KEY, frozen, config, plan=plan)
    lora = jax.tree.map(lambda f: f + 0.05, lora)
    return model, base, lora, tokens


@pytest.mark.parametrize("name", VARIANTS)
def test_a_quantized_base_is_its_dequantized_self(name, fast_compile):
    model, base, lora, tokens = quantized_llama(name)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if name == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    lifted = lowrank.lift(model.apply, fallback="raise")
    dense = jax.jit(lowrank.dequantize)(base)
    chex.assert_trees_all_close(lifted(base, tokens), model.apply(dense, tokens), **tolerance)
    merge = jax.jit(lowrank.merge)
    chex.assert_trees_all_close(merge(base, lora), merge(dense, lora), rtol=1e-6)
    mean = lambda apply, tree: (apply(tree, tokens).astype(jnp.float32) ** 2).mean()
    mine = lambda l: mean(lifted, lowrank.combine(base, l))
    got = jax.jit(jax.value_and_grad(mine))(lora)
    want = jax.jit(jax.value_and_grad(lambda l: mean(model.apply, lowrank.merge(dense, l))))(lora)
    chex.assert_trees_all_close(got, want, **tolerance)
    assert all(leaf.any() for leaf in jax.tree.leaves(got[1]))
    if name not in ("scan, remat", "unrolled"):
        return
    # vmap over adapters, and forward mode
    many = jax.tree.map(lambda f: jnp.stack([f, 2 * f]), lora)
    chex.assert_trees_all_close(jax.vmap(mine)(many)[0], got[0], **tolerance)
    tangent = jax.jvp(mine, (lora,), (got[1],))[1]
    squares = sum(jnp.vdot(g, g) for g in jax.tree.leaves(got[1]))
    np.testing.assert_allclose(tangent, squares, rtol=1e-3)


def residuals(fn, *args):
    """Shapes and dtypes of what backward keeps of forward."""
    kept = jax.eval_shape(lambda *args: jax.vjp(fn, *args)[1], *args)
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
    model, base, lora, tokens = quantized_llama(name, dora)
    lifted = lowrank.lift(model.apply, fallback="raise")
    fn = lambda l: lifted(lowrank.combine(base, l), tokens).sum()
    one = fn
    if batched:
        lora = jax.tree.map(lambda f: jnp.stack([f, f]), lora)
        fn = lambda l: jax.vmap(one)(l).sum()
    shapes = dense_shapes(base)
    floating = lambda dtype: jnp.issubdtype(dtype, jnp.floating)
    assert not [r for r in residuals(fn, lora) if floating(r[1]) and r[0] in shapes]
    # the detector sees what a plain dequantization keeps
    if "remat" not in name and not batched:
        plain = lambda l: model.apply(lowrank.merge(base, l), tokens).sum()
        assert [r for r in residuals(plain, lora) if floating(r[1]) and r[0] in shapes]


def test_a_table_is_decoded_only_where_it_is_read():
    params = {"table": normal(512, 64), "w": normal(64, 64)}
    fn = lambda p, ids: jnp.tanh(p["table"][ids] @ p["w"])
    ids = jnp.array([[3, 511, 0], [7, 7, 1]])
    plan = lowrank.plan(fn, params, ids)
    for double in (False, True):
        quant = lowrank.QuantConfig(targets="table", double_quant=double)
        frozen = lowrank.quantize(params, quant, plan=plan)
        lifted = lowrank.lift(fn, fallback="raise")
        dense = lowrank.dequantize(frozen)
        chex.assert_trees_all_close(lifted(frozen, ids), fn(dense, ids), rtol=1e-5, atol=1e-6)
        jaxpr = str(jax.make_jaxpr(lifted)(frozen, ids))
        assert "f32[512,64]" not in jaxpr
        assert "f32[512,1,64]" not in jaxpr


@pytest.mark.parametrize("shape", [(3, 3, 64, 8), (3, 3, 4, 8)])
def test_convolutions(shape):
    kernel, x = normal(*shape), normal(2, 6, 6, shape[2], seed=1)
    conv = lambda p, x: lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    plan = lowrank.plan(lambda p, x: jnp.tanh(conv(p, x)), {"k": kernel}, x)
    frozen = lowrank.quantize({"k": kernel}, lowrank.QuantConfig(targets="k"), plan=plan)
    base, lora = lowrank.init(KEY, frozen, lowrank.LoraConfig(rank=2, targets="k"), plan=plan)
    lora = jax.tree.map(lambda f: f + 0.1, lora)
    lifted = lowrank.lift(conv, fallback="raise")
    mine = lambda l: jnp.sin(lifted(lowrank.combine(base, l), x)).mean()
    want = lambda l: jnp.sin(conv(lowrank.merge(base, l), x)).mean()
    got, wanted = jax.value_and_grad(mine)(lora), jax.value_and_grad(want)(lora)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)
    inner = lambda l: jax.vjp(mine, l)[1]
    kept = [leaf for leaf in jax.tree.leaves(jax.eval_shape(inner, lora)) if leaf.shape == shape]
    assert not [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]


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
    got = jax.jit(lowrank.lift(fn, fallback="raise"))(frozen, x)
    chex.assert_trees_all_close(got, fn(lowrank.dequantize(frozen), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", [64, 10])
def test_experts_in_ragged_products(inner):
    """In blocks and kept flat: as dense, and codes alone are kept for backward."""
    params = {"up": normal(3, 64, inner) / 8, "down": normal(3, inner, 32, seed=1) / 8}
    x, sizes = normal(7, 64, seed=2), jnp.array([2, 0, 5])
    fn = lambda p, x: lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)
    plan = lowrank.plan(fn, params, x)
    quant = lowrank.QuantConfig(targets="*")
    frozen = lowrank.quantize(params, quant, plan=plan)
    assert (frozen["down"].order is None) is (inner == 64)
    config = lowrank.LoraConfig(rank=2, alpha=3, targets="*")
    base, lora = lowrank.init(KEY, frozen, config, plan=plan)
    lora = jax.tree.map(lambda f: f + 0.1, lora)
    lifted = lowrank.lift(fn, fallback="raise")
    mine = lambda l, x: lifted(lowrank.combine(base, l), x)
    want = lambda l, x: fn(lowrank.merge(base, l), x)
    loss = lambda f: jax.jit(jax.value_and_grad(lambda l, x: jnp.sin(f(l, x)).sum(), (0, 1)))
    chex.assert_trees_all_close(loss(mine)(lora, x), loss(want)(lora, x), rtol=1e-4, atol=1e-5)
    shapes = {leaf.shape for leaf in params.values()} | {f.codes.shape for f in frozen.values()}
    dense = lambda fn: [s for s, dtype in residuals(fn, lora, x) if s in shapes and dtype == "f4"]
    assert not dense(mine)
    assert dense(want)
    report = lowrank.report(fn, lowrank.combine(base, lora), x)
    assert {leaf.how for leaf in report.values()} == {"factored, dequantized 1×"}
    assert {leaf.how for leaf in lowrank.report(fn, frozen, x).values()} == {"dequantized 1×"}


@pytest.mark.parametrize("fill", [None, 7.0])
def test_rows_beyond_the_table_are_the_fill(fill):
    params = {"table": normal(9, 64)}
    fn = lambda p, ids: jnp.take(p["table"], ids, axis=0, fill_value=fill)
    ids = jnp.array([0, 8, 9])
    plan = lowrank.plan(fn, params, ids)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="table"), plan=plan)
    got = lowrank.lift(fn, fallback="raise")(frozen, ids)
    chex.assert_trees_all_close(got, fn(lowrank.dequantize(frozen), ids), rtol=1e-6)
    assert jnp.isnan(got[2]).all() if fill is None else (got[2] == fill).all()


def test_a_weight_scaled_by_what_is_trained_is_built():
    """Scales are constants to every derivative, so a number with one of its own is not in them."""
    params = {"w": normal(64, 8)}
    fn = lambda p, x, gain: x @ (p["w"] * gain)
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w"))
    lifted, x = lowrank.lift(fn, fallback="silent"), normal(3, 64)
    loss = lambda fn, p: jax.grad(lambda gain: jnp.sin(fn(p, x, gain)).sum())(0.5)
    want = loss(fn, lowrank.dequantize(frozen))
    assert abs(want) > 0.1
    np.testing.assert_allclose(loss(lifted, frozen), want, rtol=1e-4)


# What quantize asks for, and refuses


def test_codes_are_the_same_eager_and_jitted():
    params = {"w": normal(256, 96), "v": normal(7, 9)}
    quant = lowrank.QuantConfig(targets="*")
    eager = lowrank.quantize(params, quant)
    jitted = jax.jit(lambda p: lowrank.quantize(p, quant))(params)
    chex.assert_trees_all_equal(eager, jitted)
    assert isinstance(eager["w"], lowrank.Quantized)


def two_stacks(width=64, inner=10):
    """Two stacks, one in blocks and one kept flat, and the plan of a model over them."""
    shapes = {"w": (6, 2, width, inner), "v": (6, 2, inner, width)}
    params = {name: np.array(normal(*shape)) for name, shape in shapes.items()}

    def fn(p, x):
        inner = lambda x, w: (jnp.tanh(x @ w["w"] @ w["v"]), None)
        return lax.scan(lambda x, w: (lax.scan(inner, x, w)[0], None), x, p)[0]

    return params, lowrank.plan(fn, params, jnp.ones((2, width)))


def test_a_stack_on_the_host_goes_to_the_device_layer_by_layer(monkeypatch):
    from lowrank_jax import _quantize

    params, plan = two_stacks()
    quant = lowrank.QuantConfig()
    want = lowrank.quantize(jax.tree.map(jnp.asarray, params), quant, plan=plan)
    seen, encode = [], _quantize._encode
    spy = lambda leaf, *rest: seen.append(leaf.shape) or encode(leaf, *rest)
    monkeypatch.setattr(_quantize, "_encode", spy)
    got = lowrank.quantize(params, quant, plan=plan)
    chex.assert_trees_all_equal(got, want)
    assert sum(len(shape) == 2 for shape in seen) == 24  # of the others the shape alone
    params["w"][4, 1, 3, 4:6] = jnp.inf
    with pytest.raises(lowrank.TreeError, match="w: 2 of 7680 values are not finite"):
        lowrank.quantize(params, quant, plan=plan)


def test_temporaries_of_a_stack_are_those_of_a_layer():
    params, plan = two_stacks(width=512, inner=100)
    fn = jax.jit(lambda p: lowrank.quantize(p, lowrank.QuantConfig(), plan=plan))
    memory = fn.lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.5 * params["w"][0].nbytes


def test_nothing_is_deleted_before_every_leaf_is_known_to_be_good():
    params = {"a": normal(64, 2) + 0, "z": normal(64, 2).at[3, 1].set(jnp.nan)}
    quant = lowrank.QuantConfig(targets="*")
    with pytest.raises(lowrank.TreeError, match="z: 1 of 128 values are not finite"):
        lowrank.quantize(params, quant, donate=True)
    assert not params["a"].is_deleted()


def test_donated_leaves_go_one_by_one():
    params = {"w": normal(128, 64) + 0, "b": jnp.ones(3)}
    frozen = lowrank.quantize(params, lowrank.QuantConfig(targets="w"), donate=True)
    assert params["w"].is_deleted()
    assert not params["b"].is_deleted()
    assert jnp.isfinite(lowrank.dequantize(frozen)["w"]).all()


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
