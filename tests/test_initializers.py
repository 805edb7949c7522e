"""Initializers: the papers' equations in NumPy, PEFT's numbers, and the function kept by init."""

import dataclasses
import functools
import gc
import json
import math
import re
import weakref
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax import initializers
from lowrank_jax._nodes.quantized import dequantize_node, quantize_array
from lowrank_jax._trees import factors
from lowrank_jax.initializers._data import damp_covariance

GOLDEN = Path(__file__).parent / "golden" / "peft_initializers"
EPS = float(np.finfo(np.float32).eps)
# Errors of float32 decompositions, relative to the spectral norm: an eps for each of some 10 steps,
# over the gaps between singular values, of a tenth or so in random matrices.
CLOSE = 100 * EPS
NF4 = lowrank.QuantConfig(double_quant=False)
RANK, SCALE = 6, 1.5
pytestmark = pytest.mark.usefixtures("fast_compile")


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def covariance(*shape, seed=7):
    """Of inputs whose directions differ in size: [*stack, i, i]."""
    x = normal(*shape[:-2], 4 * shape[-1], shape[-1], seed=seed) * np.linspace(2, 0.2, shape[-1])
    return np.swapaxes(x, -1, -2) @ x


def plain_methods():
    """Name -> initializer that looks at no data."""
    return {
        "kaiming": initializers.kaiming,
        "gaussian": initializers.gaussian,
        "lookup": initializers.lookup,
        "orthogonal": initializers.orthogonal,
        "pissa": initializers.pissa,
        "randomized_pissa": initializers.randomized_pissa(4),
        "olora": initializers.olora,
        "loftq": initializers.loftq(NF4),
    }


def data_methods(stack, fan_in, fan_out):
    """Name -> initializer of a leaf "w" that looks at data."""
    cov = {"w": covariance(*stack, fan_in, fan_in)}
    config = lowrank.LoraConfig(rank=RANK, targets="w")
    return {
        "corda_ipm": initializers.corda(cov)["w"],
        "corda_kpm": initializers.corda(cov, "kpm")["w"],
        "lora_ga": initializers.lora_ga({"w": normal(*stack, fan_in, fan_out, seed=8)})["w"],
        "lora_ga_paper": initializers.lora_ga(
            {"w": normal(*stack, fan_in, fan_out, seed=8)}, form="paper"
        )["w"],
        "eva": initializers.eva(cov, config, rho=1.0)[0]["w"],
        "loftq_weighted": initializers.loftq(NF4, 5, cov)["w"],
    }


@functools.cache
def methods(stack=(), fan_in=64, fan_out=24):
    return plain_methods() | data_methods(stack, fan_in, fan_out)


METHODS = sorted(methods())


def parts(make):
    """An initializer's arrays, and what is static in it."""
    data, form = jax.tree.flatten(make)
    return ([], make) if data == [make] else (data, form)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def compiled(form, data, key, weight, rank, scale):
    make = form if callable(form) else jax.tree.unflatten(form, data)
    return make(key, weight, rank, scale)


def run(make, weight, rank=RANK, scale=SCALE, seed=0):
    """a, b and the base (None: untouched) in NumPy."""
    data, form = parts(make)
    out = compiled(form, data, jax.random.key(seed), weight, rank, scale)
    return jax.tree.map(np.asarray, out)


def rounded(weight, quant=NF4):
    """Quantized and back."""
    options = {"format": quant.format, "block_size": quant.block_size, "packing": quant.packing}
    return np.asarray(
        dequantize_node(
            quantize_array(weight, (0,), (), double_quant=quant.double_quant, **options)
        )
    )


def base_of(make, weight, residual):
    """What init puts into the base."""
    if residual is None:
        return weight
    return rounded(residual, make.quant) if hasattr(make, "quant") else residual


def product(a, b, scale=SCALE):
    return scale * a.astype(np.float64) @ b.astype(np.float64)


def assert_near(ours, theirs, norm):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE * norm)


def norm(matrix):
    return np.linalg.norm(matrix, 2)


# ---- PEFT


def golden(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


ABOUT = json.loads((GOLDEN / "about.json").read_text())["cases"]
INPUTS = golden("inputs")
PEFT = {
    "pissa": lambda path: initializers.pissa,
    "olora": lambda path: initializers.olora,
    "corda_ipm": lambda path: initializers.corda({path: INPUTS[f"C/{path}"]})[path],
    "corda_kpm": lambda path: initializers.corda({path: INPUTS[f"C/{path}"]}, "kpm")[path],
    "loftq_1": lambda path: initializers.loftq(NF4, 1),
    "loftq_5": lambda path: initializers.loftq(NF4, 5),
}


def case(name, path):
    """PEFT's a, b, base in Flax orientation; the weight, rank and scale."""
    file, about = golden(name), ABOUT[name]
    a, b, base = (file[f"{kind}/{path}"].T for kind in ("A", "B", "base"))
    return a, b, base, INPUTS[f"W/{path}"].T, about["rank"], about["scaling"]


@pytest.mark.parametrize("path", ["down", "up"])
@pytest.mark.parametrize("name", PEFT)
def test_product_and_base_are_pefts(name, path):
    a, b, base, weight, rank, scale = case(name, path)
    make = PEFT[name](path)
    our_a, our_b, residual = run(make, weight, rank, scale)
    assert rank != scale * rank or "loftq" in name
    assert norm(product(a, b, scale)) > 0.01 * norm(weight), "nothing to compare"
    assert_near(product(our_a, our_b, scale), product(a, b, scale), norm(weight))
    assert_near(base_of(make, weight, residual), base, norm(weight))


@pytest.mark.parametrize("path", ["down", "up"])
def test_lora_ga_is_pefts_up_to_signs(path):
    a, b, base, weight, rank, scale = case("lora_ga", path)
    make = initializers.lora_ga({path: INPUTS[f"G/{path}"].T})[path]
    our_a, our_b, residual = run(make, weight, rank, scale)
    of_a, of_b = np.sign(np.sum(our_a * a, 0)), np.sign(np.sum(our_b * b, 1))
    assert_near(our_a * of_a, a, norm(a))
    assert_near(our_b * of_b[:, None], b, norm(b))
    assert_near(residual + product(our_a, our_b, scale), weight, norm(weight))
    assert_near(weight - product(our_a * of_a, our_b * of_b[:, None], scale), base, norm(weight))


@pytest.mark.parametrize("path", ["down", "up"])
def test_randomized_pissa_is_nearer_to_the_exact_than_pefts(path):
    a, b, _, weight, rank, scale = case("pissa_niter_4", path)
    sigma = np.linalg.svd(weight, compute_uv=False)
    best = np.sqrt(np.sum(sigma[rank:] ** 2))
    lost = lambda a, b: np.linalg.norm(weight - product(a, b, scale)) / best
    our_a, our_b, _ = run(initializers.randomized_pissa(4), weight, rank, scale)
    assert 1 - CLOSE < lost(our_a, our_b) < min(1.001, lost(a, b))


@pytest.mark.parametrize("path", ["down", "up"])
def test_loftq_is_right_where_peft_forgets_the_scale(path):
    a, b, base, weight, rank, scale = case("loftq_5_scaled", path)
    make = initializers.loftq(NF4, 5)
    our_a, our_b, residual = run(make, weight, rank, scale)
    assert_near(product(our_a, our_b, scale), product(a, b, 1), norm(weight))  # theirs without s
    assert_near(base_of(make, weight, residual), base, norm(weight))
    lost = lambda base, a, b: np.linalg.norm(weight - base - product(a, b, scale))
    assert lost(base_of(make, weight, residual), our_a, our_b) < 0.9 * lost(base, a, b)


# ---- the papers, in NumPy and float64

SHAPES = [(64, 24), (24, 40)]


def svd(matrix):
    return np.linalg.svd(matrix.astype(np.float64), full_matrices=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_pissa_takes_the_best_part_of_the_rank(shape):
    weight = normal(*shape)
    a, b, _ = run(initializers.pissa, weight)
    u, s, vt = svd(weight)
    assert_near(product(a, b), u[:, :RANK] * s[:RANK] @ vt[:RANK], norm(weight))
    assert_near(SCALE * a.T @ a, np.diag(s[:RANK]), norm(weight))  # shared evenly
    assert_near(SCALE * b @ b.T, np.diag(s[:RANK]), norm(weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_leading_part_of_qr(shape):
    weight = normal(*shape)
    a, b, _ = run(initializers.olora, weight)
    q, r = np.linalg.qr(weight.T.astype(np.float64))
    assert_near(product(a, b), SCALE * (q[:, :RANK] @ r[:RANK]).T, norm(weight))
    assert_near(b @ b.T, np.eye(RANK), 1)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_corda_decomposes_the_weight_in_view_of_inputs(shape, mode):
    weight, cov = normal(*shape), covariance(shape[0], shape[0])
    a, b, _ = run(initializers.corda({"w": cov}, mode)["w"], weight)
    safe = cov.astype(np.float64) + 0.01 * np.mean(np.diag(cov)) * np.eye(len(cov))
    u, s, vt = svd(safe @ weight)
    kept = np.argsort(-s)[:RANK] if mode == "ipm" else np.argsort(s)[:RANK]
    expected = np.linalg.inv(safe) @ (u[:, kept] * s[kept]) @ vt[kept]
    # the inverse multiplies errors by up to the condition number, which damping keeps below 300
    assert np.linalg.cond(safe) < 300
    np.testing.assert_allclose(product(a, b), expected, rtol=0, atol=10 * CLOSE * norm(weight))


def test_corda_and_loftq_do_not_depend_on_the_scale_of_covariances():
    weight, cov = normal(64, 24), covariance(64, 64)
    for make in (initializers.corda, lambda data: initializers.loftq(NF4, 2, data)):
        one, other = (run(make({"w": c * cov})["w"], weight) for c in (1.0, 2.0**-60))
        chex.assert_trees_all_equal(one, other)


def test_corda_without_data_is_pissa():
    weight = normal(24, 40)
    a, b, _ = run(initializers.corda({"w": np.zeros((24, 24))})["w"], weight)
    assert_near(product(a, b), product(*run(initializers.pissa, weight)[:2]), norm(weight))


def test_damping_doubles_till_the_inverse_is_good():
    cov = jnp.ones((64, 64))  # of rank one
    for damping, doubled in ((1e-7, True), (1e-5, True), (0.01, False)):
        safe, inverse = map(np.asarray, damp_covariance(cov, damping))
        doublings = np.log2((safe[0, 0] - 1) / damping)
        assert abs(doublings - round(doublings)) < 0.01
        assert (round(doublings) > 0) == doubled
        assert np.linalg.norm(safe @ inverse - np.eye(64)) < 0.1  # sums in another order than ours
    assert np.isnan(
        np.asarray(damp_covariance(jnp.full((4, 4), jnp.nan), 0.01)[1])
    ).all()  # and it ends


@pytest.mark.parametrize("form", ["peft", "paper"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga_takes_neighboring_directions_of_the_gradient(shape, form):
    weight, gradient = normal(*shape), normal(*shape, seed=3)
    a, b, _ = run(initializers.lora_ga({"w": gradient}, 4.0, form)["w"], weight)
    u, s, vt = svd(gradient)
    zeta, second = shape[1] ** 0.25 / 4.0**0.5, slice(RANK, 2 * RANK)
    of_a, of_b = (1, zeta * s[second, None]) if form == "peft" else (zeta, zeta)
    # vectors one by one: over the gaps between neighbors, a hundredth
    np.testing.assert_allclose(abs(a), abs(of_a * u[:, :RANK]), rtol=0, atol=10 * CLOSE * norm(a))
    np.testing.assert_allclose(abs(b), abs(of_b * vt[second]), rtol=0, atol=10 * CLOSE * norm(b))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_loftq_is_nearer_than_quantization_alone(shape, iterations, weighted):
    weight, cov = normal(*shape), covariance(shape[0], shape[0])
    data = {"w": cov} if weighted else None
    made = initializers.loftq(NF4, iterations, data)
    make = made["w"] if weighted else made
    root = np.eye(shape[0])
    if weighted:
        values, vectors = np.linalg.eigh(cov / np.mean(np.diag(cov)) + 0.01 * np.eye(len(cov)))
        root = vectors * np.sqrt(values) @ vectors.T
    a, b, residual = run(make, weight)
    base = base_of(make, weight, residual)
    lost = np.linalg.norm(root @ (weight - base - product(a, b)))
    best = svd(root @ (weight - base))[1]  # Eckart and Young
    assert lost < np.sqrt(np.sum(best[RANK:] ** 2)) * (1 + CLOSE)
    assert lost < np.linalg.norm(root @ (weight - rounded(weight)))
    if iterations == 1:
        np.testing.assert_array_equal(residual, weight)


def test_loftq_uses_the_format_it_is_given():
    weight, lost = normal(64, 24), {}
    for quant in (
        lowrank.QuantConfig(format="int8", packing="uint8"),
        lowrank.QuantConfig(block_size=32, packing="uint8"),
        NF4,
    ):
        make = initializers.loftq(quant, 2)
        a, b, residual = run(make, weight)
        base = base_of(make, weight, residual)
        lost[quant] = np.linalg.norm(weight - base - product(a, b))
        u, s, vt = svd(weight - base)
        assert_near(product(a, b), u[:, :RANK] * s[:RANK] @ vt[:RANK], norm(weight))
    assert len({round(float(value), 4) for value in lost.values()}) == 3


def test_orthogonal_has_a_zero_product_of_factors_that_are_not():
    for rank in (2, 6):
        a, b, residual = run(initializers.orthogonal, normal(64, 24), rank)
        assert residual is None
        assert min(norm(a), norm(b)) > 0.1
        assert norm(product(a, b)) < 10 * EPS * norm(a) * norm(b)
        for factor in (a, b):  # each in its half of the rank
            assert np.linalg.matrix_rank(factor, tol=10 * EPS * norm(factor)) == rank // 2


def test_orthogonal_says_that_the_rank_must_be_even():
    with pytest.raises(lowrank.ConfigError, match=r"rank 3 is odd: use an even rank"):
        initializers.orthogonal(jax.random.key(0), jnp.ones((8, 8)), 3, 1.0)


# ---- every initializer


@pytest.mark.parametrize("name", METHODS)
def test_the_weight_is_kept(name):
    for shape in SHAPES:
        weight = normal(*shape)
        make = methods((), *shape)[name]
        a, b, residual = run(make, weight)
        assert (a.shape, b.shape) == ((shape[0], RANK), (RANK, shape[1]))
        assert a.dtype == b.dtype == np.float32
        whole = base_of(make, weight, residual) + product(a, b)
        if name.startswith("loftq"):
            assert np.linalg.norm(whole - weight) < np.linalg.norm(rounded(weight) - weight)
        else:
            assert_near(whole, weight, norm(weight))


@pytest.mark.parametrize("name", METHODS)
def test_vmap_over_a_stack_is_one_by_one(name):
    weights = normal(3, 64, 24)
    data, form = parts(methods((3,))[name])
    keys = jax.random.split(jax.random.key(5), 3)
    one = lambda data, key, weight: compiled(form, data, key, weight, RANK, SCALE)
    stacked = jax.device_get(jax.jit(jax.vmap(one))(data, keys, weights))
    for number in range(3):
        of_one = [np.asarray(array)[number] for array in data]
        a, b, residual = jax.tree.map(np.asarray, one(of_one, keys[number], weights[number]))
        whole = product(stacked[0][number], stacked[1][number])
        assert_near(whole, product(a, b), norm(weights[number]))
        if residual is not None:
            assert_near(stacked[2][number], residual, norm(weights[number]))


@pytest.mark.parametrize("name", METHODS)
def test_jit_is_eager(name):
    weight = normal(64, 24)
    make = methods()[name]
    a, b, residual = make(jax.random.key(0), jnp.asarray(weight), RANK, SCALE)
    of_jit = run(make, weight)
    assert_near(product(*of_jit[:2]), product(np.asarray(a), np.asarray(b)), norm(weight))
    chex.assert_trees_all_close(of_jit[2], residual, rtol=0, atol=CLOSE * norm(weight))


# ---- through init


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


MODELS = {
    "matrix": (lambda p, x: jnp.tanh(x @ p["w"]), (64, 24), (), 64, 24),
    "stacked": (scanned, (3, 64, 64), (3,), 64, 64),
    "experts": (lambda p, x: jnp.einsum("bi,iea->bea", x, p["w"]), (64, 3, 24), (), 64, 72),
    "heads in": (
        lambda p, x: jnp.einsum("bhk,hkd->bd", jnp.stack([x, -x], 1), p["w"]),
        (2, 64, 24), (), 128, 24,
    ),
    "heads first": (lambda p, x: jnp.einsum("bi,hik->bhk", x, p["w"]), (3, 64, 8), (), 64, 24),
    "each its input": (
        lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x, -x, 2 * x]), p["w"]),
        (3, 64, 24), (3,), 64, 24,
    ),
}  # fmt: skip


@functools.cache
def planned(model):
    """params, x, the plan, the result and the lifted function of a model."""
    fn, shape, _, fan_in, _ = MODELS[model]
    params, x = {"w": normal(*shape, seed=1) / fan_in**0.5}, normal(5, 64, seed=2)
    lifted = lowrank.lift(fn, fallback="raise")
    return params, x, lowrank.plan(fn, params, x), np.asarray(jax.jit(fn)(params, x)), lifted


@functools.cache
def quantized_alone(model):
    """The weight of a model quantized and back, and the result that it gives."""
    params, x, plan, *_ = planned(model)
    frozen = lowrank.quantize(params, dataclasses.replace(NF4, targets="w"), plan=plan)
    coarse = jax.jit(lowrank.dequantize)(frozen)
    return np.asarray(coarse["w"]), np.asarray(jax.jit(MODELS[model][0])(coarse, x))


MOVING = ["pissa", "randomized_pissa", "olora", "corda_ipm", "lora_ga", "loftq", "loftq_weighted"]
CASES = [(name, "matrix") for name in METHODS]
CASES += [(name, model) for name in MOVING for model in ("stacked", "heads in")]
CASES += [
    (name, model)
    for name in ("corda_ipm", "lora_ga", "loftq")  # which tell when axes are taken for others
    for model in ("experts", "heads first", "each its input")
]


@pytest.mark.parametrize(("name", "model"), CASES)
def test_init_keeps_the_function(name, model):
    _, _, stack, fan_in, fan_out = MODELS[model]
    params, x, plan, expected, lifted = planned(model)
    config = lowrank.LoraConfig(rank=RANK, alpha=9, targets="w")
    make = methods(stack, fan_in, fan_out)[name]
    base, lora = lowrank.init(jax.random.key(0), params, config, plan=plan, initializer=make)
    got = lifted(lowrank.combine(base, lora), x)
    if name == "lookup":
        assert not np.any(lora["w"].a)
    if not name.startswith("loftq"):
        chex.assert_trees_all_close(got, expected, rtol=0, atol=CLOSE * 10)
        return
    coarse, result = quantized_alone(model)
    lost = lambda weight: np.linalg.norm(np.asarray(weight) - params["w"])
    assert isinstance(base["w"], lowrank.Quantized)
    assert base["w"].dtype == params["w"].dtype
    if name == "loftq":
        assert lost(jax.jit(lowrank.merge)(base, lora)["w"]) < lost(coarse)
    error = lambda out: np.linalg.norm(np.asarray(out) - expected)
    assert error(got) < error(result)


# ---- step 0, in every dtype

U = 2.0**-24  # of float32
# of the roundings of float32 sums over the rank, made at init and at merge, and of their parts
SUMS = 2 * (RANK + 4) * U


def error_of(params, base, lora, merged):
    """The largest error of a merged leaf "w" at step 0, over what its dtype's rounding allows."""
    wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)
    node, leaf = lora["w"], getattr(base["w"], "value", base["w"])
    axes, count = node.stack + node.fan_in + node.fan_out, len(node.stack)
    a = abs(wide(node.a)).reshape(*node.a.shape[:count], -1, RANK)
    b = abs(wide(node.b)).reshape(*node.b.shape[:count], RANK, -1)
    size = (node.scale * (a @ b)).reshape([leaf.shape[axis] for axis in axes])
    size = np.transpose(size, np.argsort(axes))
    kept, want = abs(wide(leaf)), abs(wide(params["w"]))
    # the base is rounded once and so is the sum, each by half an eps of its own size
    bound = float(jnp.finfo(leaf.dtype).eps) / 2 * (kept + want) + SUMS * (kept + want + size)
    if node.magnitude is not None:  # and the gain is one to the rounding of two norms
        bound = bound + 8 * U * want
    assert merged["w"].dtype == leaf.dtype == params["w"].dtype
    return float(np.max(abs(wide(merged["w"]) - wide(params["w"])) / bound))


@functools.cache
def outcome(name):
    """A weight of bfloat16 numbers, and what an initializer makes of it."""
    weight = np.asarray(jnp.asarray(normal(64, 24) / 8, jnp.bfloat16), np.float32)
    return weight, run(methods()[name], weight)


def replay(a, b, residual, key, weight, rank, scale):
    """The initializer of an outcome."""
    return a, b, residual


merge = jax.jit(lowrank.merge)
FACTORS = ["bfloat16", "float16", "float32"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("factor_dtype", FACTORS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_0_is_exact_in_every_dtype(dtype, factor_dtype, dora):
    config = lowrank.LoraConfig(
        rank=RANK, alpha=9, targets="w", factor_dtype=factor_dtype, dora=dora
    )
    assert config.alpha / RANK == SCALE
    errors = {}
    for name in METHODS:
        if name.startswith("loftq"):  # which is not exact
            continue
        weight, made = outcome(name)
        params, make = {"w": jnp.asarray(weight, dtype)}, jax.tree_util.Partial(replay, *made)
        base, lora = lowrank.init(jax.random.key(0), params, config, initializer=make)
        assert lora["w"].a.dtype == lora["w"].b.dtype == jnp.dtype(factor_dtype)
        errors[name] = error_of(params, base, lora, merge(base, lora))
        if made[2] is None and not dora:
            assert base["w"] is params["w"]
    assert {name: error for name, error in errors.items() if not error <= 1} == {}


def own_initializer(key, weight, rank, scale):
    """One of a user's: random factors, and the residual that keeps the weight."""
    one, two = jax.random.split(key)
    a = jax.random.normal(one, (weight.shape[0], rank), weight.dtype)
    b = jax.random.normal(two, (rank, weight.shape[1]), weight.dtype) / 8
    return a, b, weight - scale * jnp.matmul(a, b, precision="highest")


@pytest.mark.parametrize("factor_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", MODELS)
def test_step_0_is_exact_for_ones_own_initializer_and_every_kind_of_leaf(model, factor_dtype):
    plan = planned(model)[2]
    params = {"w": jnp.asarray(normal(*MODELS[model][1], seed=1))}
    config = lowrank.LoraConfig(rank=RANK, alpha=9, targets="w", factor_dtype=factor_dtype)
    start = lambda params: lowrank.init(
        jax.random.key(0), params, config, plan=plan, initializer=own_initializer
    )
    for make in (start, jax.jit(start)):
        base, lora = make(params)
        assert error_of(params, base, lora, merge(base, lora)) <= 1


@pytest.mark.parametrize("name", ["pissa", "corda_ipm"])
def test_step_0_is_exact_through_init(name):
    weight, _ = outcome(name)
    config = lowrank.LoraConfig(rank=RANK, alpha=9, targets="w", factor_dtype="bfloat16")
    params = {"w": jnp.asarray(weight)}
    base, lora = lowrank.init(jax.random.key(0), params, config, initializer=methods()[name])
    assert error_of(params, base, lora, merge(base, lora)) <= 1


def test_a_float64_leaf_is_kept_in_float64():
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(normal(64, 24), jnp.float64) / 3}
        start = lambda make, factor_dtype: lowrank.init(
            jax.random.key(0),
            params,
            lowrank.LoraConfig(rank=RANK, alpha=9, targets="w", factor_dtype=factor_dtype),
            initializer=make,
        )
        cases = [(own_initializer, dtype) for dtype in ("bfloat16", "float32", "float64")]
        for make, factor_dtype in (*cases, (methods()["lora_ga"], "float32")):
            base, lora = start(make, factor_dtype)
            a, b = (np.asarray(x.astype(jnp.float64)) for x in (lora["w"].a, lora["w"].b))
            weight, kept = map(np.asarray, (params["w"], base["w"]))
            assert kept.dtype == np.float64
            size = np.max(SCALE * abs(a) @ abs(b) + abs(weight))
            assert np.max(abs(kept + SCALE * a @ b - weight)) < 1e-13 * size
        start(initializers.loftq(NF4, 1), "float32")


def test_equal_static_fields_of_initializers_are_told_apart():
    @dataclasses.dataclass(frozen=True)
    class Mine:
        first: object

        def __call__(self, key, weight, rank, scale):
            value = math.copysign(2 if self.first is True else 1, self.first)
            return jnp.full((len(weight), rank), value), jnp.zeros((rank, weight.shape[1])), None

    config = lowrank.LoraConfig(rank=1, targets="w")
    params = {"w": jnp.ones((3, 2))}
    for first, want in ((True, 2), (1, 1), (1.0, 1), (0.0, 1), (-0.0, -1)):
        for make in (Mine(first), jax.tree_util.Partial(Mine(first))):
            _, lora = lowrank.init(jax.random.key(0), params, config, initializer=make)
            np.testing.assert_array_equal(lora["w"].a, np.full((3, 1), want))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loftq_quantizes_what_the_rounded_factors_leave(dtype):
    weight = normal(64, 24)
    a, b, _ = run(initializers.loftq(NF4, 1), weight)  # the first turn, of which the second is made
    kept = run(initializers.loftq(NF4, 2).with_factor_dtype(dtype), weight)[2]
    cast = lambda x: np.asarray(jnp.asarray(x, dtype), np.float32)
    away = lambda a, b: np.linalg.norm(kept - (weight - product(a, b)))
    assert away(cast(a), cast(b)) < 0.1 * away(a, b)  # but for a few ties
    made = run(initializers.loftq(NF4, 2).with_factor_dtype(dtype), weight)
    for factor in made[:2]:
        np.testing.assert_array_equal(factor, cast(factor))
    # through init, with the factors as they are kept
    config = lowrank.LoraConfig(rank=RANK, alpha=9, targets="w", factor_dtype=dtype)
    _, lora = lowrank.init(
        jax.random.key(0), {"w": weight}, config, initializer=initializers.loftq(NF4, 2)
    )
    assert norm(product(*map(np.float32, (lora["w"].a, lora["w"].b))) - product(*made[:2])) < (
        2e-3 * norm(product(*made[:2]))
    )


def test_orthogonal_has_a_product_of_exactly_zero_in_every_dtype():
    for rank in (2, 6, 16):
        a, b, _ = run(initializers.orthogonal, normal(64, 24), rank)
        for dtype in FACTORS:
            one, other = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (a, b))
            assert np.any(one)
            assert not np.any(one @ other)


def test_init_takes_a_mapping_and_data_that_is_traced():
    weights = {"w": normal(24, 40), "v": normal(3, 40, 24)}
    fn = lambda p, x: jax.lax.scan(lambda x, v: (x @ v @ p["w"], None), x @ p["w"], p["v"])[0]
    plan = lowrank.plan(fn, weights, normal(5, 24))
    config = lowrank.LoraConfig(rank=4, alpha=6, targets=("w", "v"))
    cov = {"w": covariance(24, 24), "v": covariance(3, 40, 40)}

    def make(key, params, cov):
        return lowrank.init(key, params, config, plan=plan, initializer=initializers.corda(cov))

    eager = make(jax.random.key(0), weights, cov)
    traced = jax.jit(make)(jax.random.key(0), weights, cov)
    merged = [lowrank.merge(*tree) for tree in (eager, traced)]
    chex.assert_trees_all_close(merged[0], weights, rtol=0, atol=CLOSE * norm(weights["w"]))
    chex.assert_trees_all_close(*merged, rtol=0, atol=CLOSE * norm(weights["w"]))
    before = factors._run_pytree._cache_size()
    make(jax.random.key(0), weights, {path: 2 * array for path, array in cov.items()})
    assert factors._run_pytree._cache_size() == before, "data became a constant"


def test_lora_ga_takes_gradients_as_jax_grad_gives_them():
    fn, shape, *_ = MODELS["heads first"]
    params, x = {"w": normal(*shape, seed=1)}, normal(5, 64, seed=2)
    plan = lowrank.plan(fn, params, x)
    gradients = jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, x))))(params)
    grouped = {"w": jnp.transpose(gradients["w"], (1, 0, 2)).reshape(64, 24)}
    config = lowrank.LoraConfig(rank=2, alpha=3, targets="w")
    trees = [
        lowrank.init(jax.random.key(0), params, config, plan=plan, initializer=initializer)
        for initializer in (
            initializers.lora_ga(gradients, plan=plan),
            initializers.lora_ga(grouped),
        )
    ]
    chex.assert_trees_all_equal(*trees)
    assert np.any(np.asarray(trees[0][1]["w"].b))


# ---- EVA


def spectrum(*shares, size=8, seed=0):
    """A covariance [size, size] whose components explain these shares."""
    values = np.zeros(size)
    values[: len(shares)] = shares
    q, _ = np.linalg.qr(normal(size, size, seed=seed).astype(np.float64))
    return (q * values @ q.T).astype(np.float32)


def test_eva_spends_the_ranks_where_variance_is():
    cov = {
        "a/w": 5 * spectrum(0.5, 0.3, 0.2),
        "b/w": spectrum(0.41, 0.29, 0.19, 0.11, seed=1),
        "c/w": spectrum(*[0.125] * 8, seed=2),
    }
    config = lowrank.LoraConfig(
        rank=2, alpha=3, targets="**/w", exclude="d/*",
        rank_pattern={"b/*": 3}, alpha_pattern={"b/*": 5},
    )  # fmt: skip
    makes, new = initializers.eva(cov, config)
    # a budget of 7: .5 .41 .3 .29 .2 .19, then .125 of c before .11 of b
    assert sorted(makes) == ["a/w", "b/w", "c/w"]
    assert dict(new.rank_pattern) == {"a/w": 3, "c/w": 1, "b/*": 3}
    assert dict(new.alpha_pattern) == {"a/w": 4.5, "c/w": 1.5, "b/*": 5}
    params = {key: {"w": normal(8, 12)} for key in "abcd"}
    _, lora = lowrank.init(jax.random.key(0), params, new, initializer=makes)
    assert lora["d"]["w"] is None
    assert {key: lora[key]["w"].a.shape[-1] for key in "abc"} == {"a": 3, "b": 3, "c": 1}
    assert {key: lora[key]["w"].scale for key in "abc"} == {"a": 1.5, "b": 5 / 3, "c": 1.5}
    for key in "ab":
        a = np.asarray(lora[key]["w"].a, np.float64)
        values, vectors = np.linalg.eigh(cov[f"{key}/w"].astype(np.float64))
        top = vectors[:, np.argsort(-values)[:3]]
        np.testing.assert_allclose(a @ a.T, top @ top.T, rtol=0, atol=CLOSE * 10)
        assert not np.any(lora[key]["w"].b)


def test_eva_caps_a_rank_and_excludes_what_is_left_with_none():
    cov = {"a": spectrum(0.4, 0.3, 0.2, 0.1), "b?": spectrum(*[0.125] * 8), "c": spectrum(1.0)}
    config = lowrank.LoraConfig(rank=1, targets="*")
    makes, new = initializers.eva(cov, config, rho=2.0)  # a budget of 3: 1. of c, .4 .3 of a
    assert sorted(makes) == ["a", "c"]
    assert dict(new.rank_pattern) == {"a": 2}
    assert not new.alpha_pattern  # None follows the rank by itself
    assert [pattern.pattern for pattern in new.exclude] == [re.escape("b?")]
    params = {key: normal(8, 8) for key in ("a", "b?", "bx", "c")}
    only = {**makes, re.compile(re.escape("b?")): makes["a"]}
    with pytest.raises(lowrank.PatternError):  # "bx" is still a target: only "b?" is excluded
        lowrank.init(jax.random.key(0), params, new, initializer=only)
    _, lora = lowrank.init(jax.random.key(0), params, new, initializer=makes)
    assert [key for key in sorted(lora) if lora[key] is None] == ["b?"]
    assert lowrank.LoraConfig.from_dict(new.to_dict()) == new


def test_eva_keeps_ranks_at_rho_one_and_shares_them_in_a_stack():
    cov = {"w": np.stack([spectrum(0.9, 0.1), spectrum(0.5, 0.5)]), "v": spectrum(0.55, 0.45)}
    config = lowrank.LoraConfig(rank=1, targets=("w", "v"))
    assert initializers.eva(cov, config, rho=1.0)[1] == config
    # means of w are .7 and .3; a budget of 2 * 1 + 1 buys w once, then v once
    assert not initializers.eva(cov, config)[1].rank_pattern
    flat = {**cov, "v": spectrum(0.8, 0.2)}
    ranks = initializers.eva(flat, lowrank.LoraConfig(rank=2, targets=("w", "v")), rho=1.5)[1]
    assert not ranks.rank_pattern  # .8, .7, .3: 1 + 2 + 2 of 6, and a last .2 of v


# ---- what is refused


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: initializers.randomized_pissa(-1),
            "iterations is an int, -1; expected an",
        ),
        (lambda: initializers.loftq("nf4"), "quant is a str, 'nf4'; expected a QuantConfig"),
        (
            lambda: initializers.loftq(NF4, 0),
            "iterations is an int, 0; expected an",
        ),
        (lambda: initializers.corda({"w": normal(3, 3)}, "kmp"), "mode must be one of"),
        (
            lambda: initializers.corda({"w": normal(3, 3)}, damping=0),
            "damping is an int, 0; expected a",
        ),
        (
            lambda: initializers.corda(normal(3, 3)),
            "a non-empty mapping from a leaf",
        ),
        (lambda: initializers.corda({}), "non-empty mapping"),
        (lambda: initializers.corda({"w": normal(3, 4)}), r"w: of shape \(3, 4\), expected"),
        (lambda: initializers.corda({"w": {"x": 1}}), "w: dict, expected an array"),
        (
            lambda: initializers.corda({"w": np.full((3, 3), np.nan)}),
            "w: values that are not finite",
        ),
        (lambda: initializers.lora_ga({"w": normal(3)}), r"w: of shape \(3,\), expected"),
        (
            lambda: initializers.lora_ga({"w": normal(3, 3)}, 0),
            "gamma is an int, 0; expected a",
        ),
        (lambda: initializers.lora_ga({"w": normal(3, 3)}, form="x"), "form must be one of"),
        (lambda: initializers.lora_ga({"w": normal(3, 3)}, plan={}), "the plan has no such leaf"),
        (
            lambda: initializers.eva({"w": normal(3, 3)}, 16),
            "config is an int, 16; expected a",
        ),
        (lambda: initializers.eva({"w": normal(3, 3)}, lowrank.LoraConfig(), 0.5), "rho must be"),
    ],
)
def test_wrong_arguments_are_refused(call, text):
    with pytest.raises(lowrank.ConfigError, match=text):
        call()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (initializers.corda({"w": covariance(6, 6)})["w"], r"shape \(6, 6\) came for a weight"),
        (initializers.loftq(NF4, 1, {"w": covariance(6, 6)})["w"], r"expected \(8, 8\)"),
        (initializers.lora_ga({"w": normal(6, 8)})["w"], r"gradient of shape \(6, 8\)"),
        (initializers.lora_ga({"w": normal(8, 8)})["w"], "rank 5 must be at most 4"),
        (
            initializers.eva({"w": covariance(8, 8)}, lowrank.LoraConfig(rank=1))[0]["w"],
            "eva has 2 components of 8 inputs",
        ),
    ],
)
def test_data_of_another_weight_is_refused(make, text):
    with pytest.raises(lowrank.ConfigError, match=text):
        make(jax.random.key(0), jnp.ones((8, 8)), 5, 1.0)


def test_data_beyond_float32_is_refused():
    with jax.enable_x64(True), pytest.raises(lowrank.ConfigError, match="values that are not fini"):
        initializers.corda({"w": np.full((3, 3), 1e300)})


def test_eva_is_refused_under_jit():
    config = lowrank.LoraConfig(rank=1)
    with pytest.raises(lowrank.ConfigError, match="ranks are static, so call eva outside of jit"):
        jax.jit(lambda c: initializers.eva({"w": c}, config)[0]["w"].components)(covariance(8, 8))


def test_what_is_compiled_for_an_initializer_is_freed_with_it():
    class Big:
        def __call__(self, x):
            return x

    def start(big):
        own = lambda key, w, rank, scale: (big(w[:, :rank]), jnp.zeros((rank, w.shape[1])), None)
        config = lowrank.LoraConfig(rank=2, targets="w")
        for part in (own, functools.partial(own)):
            lowrank.init(0, {"w": jnp.ones((4, 3))}, config, initializer=part)
        return weakref.ref(big)

    ref = start(Big())
    gc.collect()
    assert ref() is None
