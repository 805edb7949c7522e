"""An adapter for each example of a batch: equal to one at a time, without copies of factors."""

import copy
import functools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowrank_jax as lowrank
from lowrank_jax._jax import jaxprs
from lowrank_jax._nodes.selection import get_selection

pytestmark = pytest.mark.usefixtures("fast_compile")

KEY = jax.random.key(0)
EXAMPLES, COUNT = 24, 3
INDEX = jnp.arange(EXAMPLES) % COUNT


def model(params, tokens):
    """A table read by rows and used transposed, heads with two output axes, a scan with remat."""
    x = params["table"][tokens]  # [t, 32]
    heads = jnp.einsum("ti,iho->tho", x, params["heads"])  # [t, 2, 8]
    x = x + jnp.einsum("tho,iho->ti", jnp.tanh(heads), params["heads"])
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    x, _ = jax.lax.scan(step, x, params["layers"])
    return x @ params["table"].T


def own(k):
    """Whether each example is of adapter k."""
    return jnp.equal(INDEX, k)


def draw(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape) / 3


SHAPES = {"table": (11, 32), "heads": (32, 2, 8), "layers": (2, 32, 32)}
PARAMS = {name: draw(seed, shape) for seed, (name, shape) in enumerate(SHAPES.items())}
TOKENS = jax.random.randint(KEY, (EXAMPLES, 2), 0, 11)
PLAN = lowrank.plan(model, PARAMS, TOKENS[0])
LIFTED = lowrank.lift(model, fallback="raise")


def make(seed, base, **options):
    config = lowrank.LoraConfig(targets=[*SHAPES], **options)
    base, lora = lowrank.init(seed, base, config, plan=PLAN)
    noise = lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(seed), leaf.shape)
    return base, jax.tree.map(noise, lora)


def answer(base, many, index, tokens):
    """One example, with an adapter of its own."""
    return LIFTED(lowrank.combine(base, lowrank.select(many, index)), tokens)


@functools.cache
def make_stack(kind):
    base = PARAMS
    if kind == "quantized":
        quant = lowrank.QuantConfig(targets=["layers", "heads"], block_size=32)
        base = lowrank.quantize(PARAMS, quant, plan=PLAN)
    dora = kind in ("dora", "folded")
    pairs = [make(k, base, rank=1 + k, alpha=1.0 + k, dora=dora) for k in range(COUNT)]
    base = pairs[0][0]
    fold = (lambda lora: lowrank.fold_norms(base, lora)) if kind == "folded" else lambda lora: lora
    loras = [fold(lora) for _, lora in pairs]
    return base, loras, lowrank.stack(loras)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", [slow("lora"), "quantized", "folded", slow("dora")])
def test_a_mixed_batch_is_each_adapter_alone(kind):
    base, loras, many = make_stack(kind)
    got = jax.jit(jax.vmap(answer, (None, None, 0, 0)))(base, many, INDEX, TOKENS)
    alone = jax.vmap(lambda lora, t: LIFTED(lowrank.combine(base, lora), t), (None, 0))
    alone = jax.jit(alone)
    for k in range(COUNT):
        expected = alone(lowrank.select(many, k), TOKENS)[own(k)]
        chex.assert_trees_all_close(got[own(k)], expected, rtol=2e-5, atol=2e-5)
    exact = jax.vmap(lambda t: model(lowrank.merge(base, loras[1]), t))(TOKENS)[own(1)]
    chex.assert_trees_all_close(got[own(1)], exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", slow("dora")])
def test_a_mixed_batch_trains_each_adapter_by_its_own_examples(kind):
    base, _, many = make_stack(kind)

    def loss(many):
        out = jax.vmap(answer, (None, None, 0, 0))(base, many, INDEX, TOKENS)
        return (out**2).sum()

    def alone(lora, tokens):
        out = jax.vmap(lambda t: LIFTED(lowrank.combine(base, lora), t))(tokens)
        return (out**2).sum()

    got = jax.jit(jax.grad(loss))(many)
    single = jax.jit(jax.grad(alone))
    each = [single(lowrank.select(many, k), TOKENS[own(k)]) for k in range(COUNT)]
    chex.assert_trees_all_close(got, lowrank.stack(each), rtol=1e-3, atol=1e-4)
    assert all(bool((leaf != 0).any()) for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_are_summed_over_examples_in_float32(dtype):
    """A sum in bfloat16 of equal terms stops to grow after 256 of them."""
    params, x = {"w": jnp.zeros((32, 16), dtype)}, jnp.ones((4096, 32), dtype)
    config = lowrank.LoraConfig(rank=4, alpha=4, targets="w")
    base, lora = lowrank.init(0, params, config)
    lora = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.25), lora)
    fn = lowrank.lift(lambda params, x: x @ params["w"])
    index = jnp.arange(4096) % 2

    def compute_loss(many):
        one = lambda k, x: fn(lowrank.combine(base, lowrank.select(many, k)), x)
        return jax.vmap(one)(index, x).astype(jnp.float32).sum()

    got = jax.jit(jax.grad(compute_loss))(lowrank.stack([lora, lora]))["w"]
    np.testing.assert_array_equal(got.a, jnp.full_like(got.a, 2048 * 16 * 0.25))
    np.testing.assert_array_equal(got.b, jnp.full_like(got.b, 2048 * 32 * 0.25))


def test_hessians_of_a_mixed_batch_with_a_scan():
    """Reverse over reverse, through a scan over the layers of a stack."""
    base = {"l": draw(1, (3, 4, 4)) / 2}
    model = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["l"])[0]
    x, fn = draw(2, (2, 4)), lowrank.lift(model)
    plan = lowrank.plan(model, base, x[0])
    config = lowrank.LoraConfig(rank=1, targets="l")
    noisy = lambda seed: jax.tree.map(
        lambda leaf: draw(seed, leaf.shape), lowrank.init(seed, base, config, plan=plan)[1]
    )
    many, index = lowrank.stack([noisy(0), noisy(1)]), jnp.array([0, 1])
    mixed = lambda m: jax.vmap(lambda k, x: fn(lowrank.combine(base, lowrank.select(m, k)), x))(
        index, x
    ).sum()
    merged = lambda m: sum(
        model(lowrank.merge(base, lowrank.select(m, k)), x[k]).sum() for k in range(2)
    )
    for derive in (jax.hessian, lambda fn: jax.jacrev(jax.jacrev(fn))):
        got, expected = (jax.tree.leaves(derive(fn)(many)) for fn in (mixed, merged))
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_second_derivatives_of_a_mixed_batch():
    base, _, many = make_stack("lora")
    index, tokens = INDEX[:6], TOKENS[:6]
    tangent = jax.tree.map(jnp.ones_like, many)

    def mixed(many):
        return (jax.vmap(answer, (None, None, 0, 0))(base, many, index, tokens) ** 2).sum()

    def gathered(many):
        one = lambda lora, t: LIFTED(lowrank.combine(base, lora), t)
        return (jax.vmap(one)(lowrank.select(many, index), tokens) ** 2).sum()

    twice = lambda fn: jax.jit(lambda m: jax.jvp(jax.grad(fn), (m,), (tangent,))[1])(many)
    chex.assert_trees_all_close(twice(mixed), twice(gathered), rtol=2e-3, atol=2e-2)
    both = lambda fn: jax.jit(lambda m: jax.grad(lambda m: sum(
        (g**2).sum() for g in jax.tree.leaves(jax.grad(fn)(m))
    ))(m))(many)  # fmt: skip
    got, expected = both(mixed), both(gathered)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(one - other) <= 1e-4 * jnp.linalg.norm(other)


@pytest.mark.skipif(not jaxprs.KEEPS_RULES_IN_SCANS, reason="this JAX would derive it wrongly")
def test_a_scan_over_layers_does_not_copy_the_stack(full_compile):
    """A step holds no array of the size of all adapters' factors of all layers."""
    shape = (3, 6, 32, 4)
    node = lowrank.LowRank(
        jnp.ones(shape), jnp.ones((3, 6, 4, 32)), fan_in=(1,), fan_out=(2,), stack=(0,)
    )
    params = {"layers": draw(0, (6, 32, 32))}
    step = lambda x, w: (jnp.tanh(x @ w), None)
    fn = lowrank.lift(lambda p, x: jax.lax.scan(step, x, p["layers"])[0])
    run = jax.jit(jax.vmap(
        lambda many, k, x: fn(lowrank.combine(params, lowrank.select(many, k)), x),
        in_axes=(None, 0, 0),
    ))  # fmt: skip
    arguments = {"layers": node}, jnp.arange(20) % 3, draw(1, (20, 32))
    compiled = run.lower(*arguments).compile()
    whole = node.a.nbytes + node.b.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < whole
    moved = re.findall(r"= f32\[6,3,(?:32,4|4,32)\]\S* (?!parameter|get-tuple)", compiled.as_text())
    assert not moved


def test_no_factor_is_copied_for_each_example(full_compile):
    params = {"w": draw(0, (96, 80))}
    fn = lowrank.lift(lambda p, x: x @ p["w"])
    config = lowrank.LoraConfig(rank=4, targets="w")
    many = jax.vmap(lambda key: lowrank.init(key, params, config)[1])(jax.random.split(KEY, 3))
    x, index = draw(1, (40, 96)), jnp.arange(40) % 3

    def serve(many, index, x):
        one = lambda k, x: fn(lowrank.combine(params, lowrank.select(many, k)), x)
        return jax.vmap(one)(index, x)

    def gathered(many, index, x):
        one = lambda lora, x: fn(lowrank.combine(params, lora), x)
        return jax.vmap(one)(lowrank.select(many, index), x)

    copies = r"f32\[40,(?:96,4|4,96|4,80|80,4)\]"
    compiled = {run: jax.jit(run).lower(many, index, x).compile() for run in (serve, gathered)}
    assert not re.findall(copies, compiled[serve].as_text())
    assert re.findall(copies, compiled[gathered].as_text())
    expected = gathered(many, index, x)
    chex.assert_trees_all_close(serve(many, index, x), expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(compiled[serve](many, index, x), expected, rtol=1e-5, atol=1e-5)


def test_transformations_and_copies_keep_the_adapter_alone():
    _, _, many = make_stack("lora")
    seen = []

    def look(index):
        one = lowrank.select(many, index)["layers"]
        seen.append(get_selection(one))
        for other in (copy.copy(one), jax.tree.map(lambda x: x, one), copy.deepcopy(one)):
            seen.append(get_selection(other))
        return one

    out = jax.jit(look)(1)
    assert seen[0] is not None
    assert seen[1:] == [None] * 3
    chex.assert_trees_all_equal(out, lowrank.select(many, 1)["layers"])
    assert out.a.shape == (2, 32, 3)
    assert pickle.loads(pickle.dumps(out)).scale == out.scale


def test_changed_factors_of_a_selected_adapter_are_what_counts():
    """What a step of training made of a selected adapter is used, not the stack it came from."""
    base, _, many = make_stack("lora")
    zero = lambda lora: jax.tree.map(jnp.zeros_like, lora)

    def off(index, tokens):
        return LIFTED(lowrank.combine(base, zero(lowrank.select(many, index))), tokens)

    got = jax.jit(jax.vmap(off))(INDEX, TOKENS)
    expected = jax.jit(jax.vmap(lambda t: model(PARAMS, t)))(TOKENS)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)

    def tuned(index, tokens):
        one = lowrank.select(many, index)
        gradient = jax.grad(lambda lora: LIFTED(lowrank.combine(base, lora), tokens).sum())(one)
        return gradient["layers"].a

    got = jax.jit(jax.vmap(tuned))(INDEX[:3], TOKENS[:3])
    single = jax.grad(lambda lora: LIFTED(lowrank.combine(base, lora), TOKENS[0]).sum())
    expected = single(lowrank.select(many, 0))["layers"].a
    chex.assert_trees_all_close(got[0], expected, rtol=1e-4, atol=1e-5)


def test_one_adapter_that_is_not_finite_leaves_the_others_alone():
    base, _, many = make_stack("lora")
    broken = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), many)
    run = jax.jit(jax.vmap(answer, (None, None, 0, 0)))
    got, expected = (run(base, tree, INDEX, TOKENS) for tree in (broken, many))
    chex.assert_trees_all_equal(got[~own(1)], expected[~own(1)])
    assert jnp.isnan(got[own(1)]).all()
