"""Initializers: the papers' equations in NumPy, PEFT's numbers, and the function kept by init."""

import dataclasses
import functools
import gc
import math
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from initializer_methods import (
    CLOSE,
    METHODS,
    NF4,
    PEFT,
    RANK,
    SCALE,
    SHAPES,
    assert_near,
    base_of,
    case,
    compiled,
    methods,
    norm,
    normal,
    parts,
    product,
    rounded,
    run,
)

import lowrank_jax as lowrank
from lowrank_jax import initializers

pytestmark = pytest.mark.usefixtures("fast_compile")


# ---- PEFT


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
