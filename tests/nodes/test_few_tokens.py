"""The form for CUDA of a product of few tokens, run on CPU: the numbers of the dot, and no dot."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

import lowrank_jax as lowrank
from lowrank_jax._primitives import few_tokens

N, G = 3, 5  # tokens; groups of a ragged product


def run_cuda_form(fn, *args):
    """Number of dots in what fn lowers to for CUDA, and what that computes here."""
    allow = [export.DisabledSafetyCheck.platform()]
    exported = export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=allow)(*args)
    dots = len(re.findall(r"stablehlo\.dot|ragged_dot", exported.mlir_module()))
    return dots, exported.call(*args)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def quantize(fn, w, *args, **options):
    plan = lowrank.plan(fn, {"w": w}, *args)
    return lowrank.quantize({"w": w}, lowrank.QuantConfig(targets="w", **options), plan=plan)


def assert_same(fn, *args, dots=0, rtol=2e-5):
    found_dots, found = run_cuda_form(fn, *args)
    assert found_dots == dots
    expected = jax.jit(fn)(*args)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    scale = jnp.max(jnp.abs(expected))
    assert scale > 0
    assert jnp.max(jnp.abs(found - expected).astype(jnp.float32)) <= rtol * scale


def backward(fn):
    return lambda p, x: jax.grad(lambda x: jnp.sum(fn(p, x).astype(jnp.float32) ** 2))(x)


SLOW = pytest.mark.slow
PLAIN = {"double_quant": False}
# a linear layer, the table of a tied output, heads, a block over two axes, a leaf stored flat
CASES = [
    pytest.param("ni,io->no", (128, 6), PLAIN, marks=SLOW),
    ("ni,io->no", (128, 6), {"packing": "uint8"}),
    ("ni,oi->no", (6, 128), {"format": "fp4"}),
    ("ni,hio->nho", (2, 64, 6), {"format": "int8"}),
    pytest.param("nhi,hio->no", (8, 16, 6), PLAIN, marks=SLOW),
    ("ni,io->no", (10, 14), PLAIN),
    pytest.param("ni,io->no", (10, 14), {"packing": "uint8"} | PLAIN, marks=SLOW),
]


@pytest.mark.parametrize(("equation", "shape", "options"), CASES, ids=str)
def test_numbers_are_those_of_the_dot(equation, shape, options, fast_compile):
    activation, weight = equation.split("->")[0].split(",")
    sizes = dict(zip(weight, shape, strict=True), n=N)
    x = normal(*(sizes[name] for name in activation), seed=1)
    fn = lowrank.lift(lambda p, x: jnp.einsum(equation, x, p["w"]), fallback="raise")
    tree = quantize(fn, normal(*shape), x, **options)
    assert_same(fn, tree, x)
    assert_same(backward(fn), tree, x)


TRANSFORMS = ["vmap of grad", "codes", "scan"]
SLOW_TRANSFORMS = [pytest.param(name, marks=SLOW) for name in ("vmap", "jvp of grad")]


@pytest.mark.parametrize("transform", TRANSFORMS + SLOW_TRANSFORMS)
def test_transformations(transform, fast_compile):
    fn = lowrank.lift(lambda p, x: x @ p["w"], fallback="raise")
    w, x = normal(64, 64), normal(N, 64, seed=1)
    tree = quantize(fn, w, x)
    if transform == "vmap":
        assert_same(lambda p, x: jax.vmap(lambda x: fn(p, x))(x[:, None]), tree, x)
    elif transform == "vmap of grad":
        one = lambda p, x: jax.vmap(lambda x: backward(fn)(p, x))(x[:, None])
        assert_same(one, tree, x)
    elif transform == "jvp of grad":
        cubed = lambda p, x: jax.grad(lambda x: jnp.sum(fn(p, x) ** 3))(x)
        assert_same(lambda p, x: jax.jvp(lambda x: cubed(p, x), (x,), (x,))[1], tree, x)
    else:
        stacked = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
        tree = quantize(stacked, normal(G, 64, 64), x)
        if transform == "codes":
            every = lambda p, x: jax.vmap(fn, (0, None))(p, x)
        else:
            step = lambda x, w: (fn({"w": w}, x), None)
            every = lambda p, x: jax.lax.scan(step, x, p["w"])[0]
        assert_same(every, tree, x)
        assert_same(backward(every), tree, x)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("sizes", [(1, 0, 2, 0, 0), (0, 0, 0, 0, 1)])  # the second leaves rows
def test_rows_of_a_ragged_product_read_their_own_codes(sizes, double_quant, fast_compile):
    fn = lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array(sizes, jnp.int32))
    fn = lowrank.lift(fn, fallback="raise")
    x = normal(N, 64, seed=1)
    tree = quantize(fn, normal(G, 64, 64), x, double_quant=double_quant)
    assert_same(fn, tree, x)
    assert_same(backward(fn), tree, x)


@pytest.mark.parametrize("mapped", ["codes", "sizes"])
def test_ragged_products_are_mapped(mapped, fast_compile):
    """With the activation, as JAX wants it."""
    fn = lowrank.lift(lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"], sizes), fallback="raise")
    x, sizes = normal(2, 1, 64, seed=1), jnp.array([[0, 1], [1, 0]], jnp.int32)
    tree = quantize(fn, normal(2, 64, 64), x[0], sizes[0])
    if mapped == "codes":
        trees = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree)
        every = lambda p, x: jax.vmap(lambda p, x: fn(p, x, sizes[0]))(p, x)
        assert_same(every, trees, x)
    else:
        every = lambda p, x: jax.vmap(lambda x, sizes: fn(p, x, sizes))(x, sizes)
        assert_same(every, tree, x)
    assert_same(backward(every), trees if mapped == "codes" else tree, x)


def test_bfloat16_is_rounded_once(fast_compile):
    fn = lowrank.lift(lambda p, x: x @ p["w"], fallback="raise")
    x = normal(N, 128, seed=1).astype(jnp.bfloat16)
    tree = quantize(fn, normal(128, 6).astype(jnp.bfloat16), x)
    dense = lowrank.dequantize(tree)["w"].astype(jnp.float32)
    _, found = run_cuda_form(fn, tree, x)
    exact = x.astype(jnp.float32) @ dense
    assert found.dtype == jnp.bfloat16
    assert jnp.max(jnp.abs(found.astype(jnp.float32) - exact)) <= 2**-8 * jnp.max(jnp.abs(exact))


@pytest.mark.parametrize(("tokens", "limit", "dots"), [(1, "0", 1), (3, "2", 1), (64, "", 1)])
def test_the_dot_for_many_tokens_and_where_it_is_asked_for(tokens, limit, dots, monkeypatch):
    if limit:
        monkeypatch.setenv("LOWRANK_JAX_FEW_TOKENS", limit)
    fn = lowrank.lift(lambda p, x: x @ p["w"], fallback="raise")
    x = normal(tokens, 64, seed=1)
    assert_same(fn, quantize(fn, normal(64, 64), x), x, dots=dots)


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("LOWRANK_JAX_FEW_TOKENS", "few")
    with pytest.raises(lowrank.ConfigError, match="LOWRANK_JAX_FEW_TOKENS is 'few'; it must be a"):
        few_tokens.get_limit()


def test_sums_are_cut_for_enough_threads():
    assert few_tokens._count_parts((64, 64, 14336), (0, 1)) == 4
    assert few_tokens._count_parts((64, 64, 16), (0, 1)) == 64
    assert few_tokens._count_parts((7, 64, 16384), (0, 1)) == 7
