"""quantize, and quantized leaves in the engine: exact, and never dense where it is not asked."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from llama import Llama, LlamaConfig
from models import noisy

import lowrank_jax as lowrank

pytestmark = pytest.mark.usefixtures("fast_compile")

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def adapter(frozen, config, plan):
    """init's adapter, filled by NumPy."""
    shapes = jax.eval_shape(lambda p: lowrank.init(KEY, p, config, plan=plan)[1], frozen)
    return noisy(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))


# The layout: whatever the axes, the numbers are bitsandbytes' of the flattened [out, in].


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
SLOW = dict.fromkeys(("unrolled, remat", "unrolled", "untied", "scan"), (pytest.mark.slow,))


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
