"""A value that is not a number makes its own block NaN and no other, compiled as users compile.

XLA's vectorized maximum on CPU drops NaN, so nothing here may use `fast_compile`, and shapes are
large enough to be vectorized.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_jax as lowrank
from lowrank_jax._codecs import dynamic, host, scales
from lowrank_jax._nodes.host import quantize_on_host
from lowrank_jax._nodes.norms import compute_norm, compute_squared_norm_change, divide_by_norms
from lowrank_jax._nodes.quantized import dequantize_node, quantize_array

F32 = np.float32
LARGEST = np.finfo(F32).max
BAD = (np.nan, -np.nan, np.inf, -np.inf)

LEAVES = {  # shape, fan-in, stack, options
    "nf4, twice": ((64, 64), (0,), (), {}),
    "nf4": ((128, 96), (0,), (), {"double_quant": False, "packing": "uint8"}),
    "fp4, twice": ((128, 96), (1,), (), {"format": "fp4", "block_size": 32, "packing": "uint8"}),
    "int8, twice": ((64, 64), (0,), (), {"format": "int8"}),
    "flat, twice": ((150, 130), (0,), (), {"packing": "uint8"}),
    "flat int8": ((37, 50), (0,), (), {"format": "int8", "double_quant": False}),
    "stack, twice": ((3, 128, 96), (1,), (0,), {}),
    "flat stack": ((3, 10, 70), (1,), (0,), {"format": "fp4", "double_quant": False}),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def compiled(name):
    """A leaf's node and its values, in one program."""
    _, fan_in, stack, options = LEAVES[name]

    @jax.jit
    def there_and_back(weight):
        node = quantize_array(weight, fan_in, stack, **options)
        return node, dequantize_node(node)

    return there_and_back


def blocks_of(shape, fan_in, stack, size):
    """For each element the number of its block, in the flat order of one layer."""
    if stack:
        return np.stack([blocks_of(shape[1:], (fan_in[0] - 1,), (), size)] * shape[0])
    order = (*(axis for axis in range(len(shape)) if axis not in fan_in), *fan_in)
    sizes = [shape[axis] for axis in order]
    flat = np.arange(np.prod(shape)).reshape(sizes) // size
    return np.transpose(flat, np.argsort(order))


def spread(bad, stack, *numbers):
    """For each of some numberings of one layer's elements: who shares a number with a bad one."""
    if stack:
        layers = [spread(one, (), *(n[i] for n in numbers)) for i, one in enumerate(bad)]
        return [np.stack(masks) for masks in zip(*layers, strict=True)]
    return [np.isin(number, number[bad]) for number in numbers]


def placements(shape, count, seed=0):
    """Where to put values that are not finite, and what they are."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        n = int(rng.integers(1, 5)) if i else 1
        values = rng.choice(BAD, n) if i > 3 else [BAD[i]] * n
        yield np.unravel_index(rng.choice(np.prod(shape), n, replace=False), shape), values


@pytest.mark.parametrize("name", LEAVES)
def test_the_blocks_of_what_is_not_finite_are_nan_and_no_others(name):
    """With double quantization, those that share their scale's scale; others have their codes."""
    shape, fan_in, stack, options = LEAVES[name]
    blocks = blocks_of(shape, fan_in, stack, options.get("block_size", 64))
    double = options.get("double_quant", True)
    weight = normal(*shape)
    for at, values in placements(shape, 8):
        bad = weight.copy()
        bad[at] = values
        own, shared = spread(~np.isfinite(bad), stack, blocks, blocks // scales.SCALE_BLOCK)
        node, got = compiled(name)(bad)
        np.testing.assert_array_equal(np.isnan(got), shared if double else own)
        _, clean = compiled(name)(np.where(own, F32(0), weight))
        np.testing.assert_array_equal(np.where(np.isnan(got), clean, got), clean)
        if not double:  # beside a mean of all scales nothing depends on another block
            _, whole = compiled(name)(weight)
            np.testing.assert_array_equal(np.where(own, whole, got), whole)
        chex.assert_trees_all_equal(quantize_on_host(bad, jax.eval_shape(lambda n=node: n))[0],
                                    jax.device_get(node))  # fmt: skip
    _, good = compiled(name)(weight)
    assert np.isfinite(good).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nan_of_half_precision(dtype):
    quant = lowrank.QuantConfig(targets="w", double_quant=False)
    weight = normal(128, 96).astype(dtype)
    weight[70, 5] = np.nan
    fn = jax.jit(lambda p: lowrank.dequantize(lowrank.quantize(p, quant)))
    got = np.isnan(fn({"w": weight})["w"].astype(F32))
    assert got[64:, 5].all()
    assert got.sum() == 64


def test_nan_in_a_lifted_product():
    """From the weight through jit to the result: the outputs that read the block, and no others."""
    quant = lowrank.QuantConfig(targets="w", double_quant=False)
    params, fn = {"w": normal(128, 96)}, lambda p, x: x @ p["w"]
    params["w"][3, 17] = np.nan
    run = jax.jit(lambda p, x: lowrank.lift(fn)(lowrank.quantize(p, quant), x))
    got = np.isnan(run(params, normal(5, 128)))
    assert got[:, 17].all()
    assert got.sum() == 5


def test_a_nan_row_is_not_taken_for_a_row_that_is_not_there():
    params = {"t": normal(64, 128)}
    fn = lambda p, ids: jnp.take(p["t"], ids, axis=0, fill_value=7.0)
    ids = np.array([0, 5, 64, 63])
    plan = lowrank.plan(fn, params, ids)
    params["t"][5, 3] = np.nan
    quant = lowrank.QuantConfig(targets="t", double_quant=False)
    got = jax.jit(lambda p: lowrank.lift(fn)(lowrank.quantize(p, quant, plan=plan), ids))(params)
    got = np.asarray(got)
    assert np.isnan(got[1, :64]).all()
    assert np.isfinite(got[[0, 3]]).all()
    assert (got[2] == 7).all()


# What is finite and has no scale


DOUBLY = lowrank.QuantConfig(targets="**")


def large_halves(most):
    """A weight whose scales are most of the way to the largest float16, some of them 0."""
    leaf = np.float32(65504) * np.random.default_rng(0).uniform(0.9, 1, (64, 300)).astype(F32)
    leaf[:, ::12] = 0
    return (leaf * F32(most)).astype(np.float16)


@pytest.mark.parametrize("name", ["mean", "half"])
def test_scales_that_cannot_be_quantized_are_refused_or_nan(name):
    """Their mean, or a scale that is decoded again, is beyond the leaf's dtype."""
    leaf = {"mean": np.full((64, 64), F32(3e38)), "half": large_halves(1)}[name]
    words = rf"pass double_quant=False.*:\n  - {name}: .* are beyond the range of {leaf.dtype}"
    for kind in (np.asarray, jnp.asarray):
        for donate in (False, True):
            params = {"first": jnp.ones((64, 64)), name: kind(leaf)}
            with pytest.raises(lowrank.ConfigError, match=words):
                lowrank.quantize(params, DOUBLY, donate=donate)
            assert not params["first"].is_deleted()
            assert kind is np.asarray or not params[name].is_deleted()
    there_and_back = jax.jit(lambda p: lowrank.dequantize(lowrank.quantize(p, DOUBLY)))
    got, exact = (np.asarray(x, F32) for x in (there_and_back({name: leaf})[name], leaf))
    assert np.isnan(got).any()
    assert (np.isnan(got) | (np.abs(got - exact) < 0.15 * np.abs(exact).max())).all()


def test_scales_near_the_largest_that_can_be_kept_are_kept():
    leaf = large_halves(0.98)  # above half of the largest, where it is encoded to know
    want = lowrank.quantize({"half": leaf}, DOUBLY)
    got = lowrank.quantize({"half": jnp.asarray(leaf)}, DOUBLY, donate=True)
    chex.assert_trees_all_equal(got, want)
    assert np.isfinite(lowrank.dequantize(got)["half"]).all()


# Scales of scales


def test_a_scale_that_is_nan_makes_those_beside_it_nan():
    n = 700
    absmax = np.random.default_rng(n).uniform(0.01, 0.2, n).astype(F32)
    there_and_back = jax.jit(lambda x: (s := scales.encode_scales(x), scales.decode_scales(*s)))
    for at in ([0], [n - 1], [7, 255]):
        bad = absmax.copy()
        bad[at] = np.nan
        kept, got = there_and_back(bad)
        mask = np.isin(np.arange(n) // 256, np.array(at) // 256)
        np.testing.assert_array_equal(np.isnan(got), mask)
        clean = there_and_back(np.where(np.isnan(bad), F32(0), bad))[1]
        np.testing.assert_array_equal(np.where(mask, clean, got), clean)
        for mine, other in zip(host.encode_scales(bad), kept, strict=True):
            np.testing.assert_array_equal(mine, other)


# States


STATES = {(64, 64): 4, (128, 96): 4, (5, 300): 2, (4100,): 6}


@functools.cache
def state_codec(shape):
    tiling = dynamic.choose_blocks(shape, 256)
    encode = jax.jit(lambda x: dynamic.encode_dynamic(x, *tiling))
    return encode, jax.jit(lambda codes, absmax: dynamic.decode_dynamic(codes, absmax, *tiling))


def state_blocks(shape):
    """For each element the number of its block."""
    axis, size = dynamic.choose_blocks(shape, 256)
    at = len(shape) + axis
    along = (np.arange(shape[at]) // size).reshape(-1, *[1] * (len(shape) - at - 1))
    rows = np.arange(np.prod(shape[:at], dtype=int)).reshape(*shape[:at], *[1] * (len(shape) - at))
    return np.broadcast_to(rows * 1000 + along, shape)


@pytest.mark.parametrize("sign", ["signed", "unsigned"])
@pytest.mark.parametrize("shape", STATES)
def test_blocks_of_a_state(shape, sign):
    encode, decode = state_codec(shape)
    x = normal(*shape)
    x = x if sign == "signed" else x**2
    blocks, clean = state_blocks(shape), encode(x)
    for at, values in placements(shape, 8):
        bad = x.copy()
        bad[at] = values
        mask = np.isin(blocks, blocks[~np.isfinite(bad)])
        codes, absmax = encode(bad)
        got = decode(codes, absmax)
        np.testing.assert_array_equal(np.isnan(got), mask)
        np.testing.assert_array_equal(np.where(mask, clean[0], codes), clean[0])
        np.testing.assert_array_equal(np.where(np.isnan(absmax), clean[1], absmax), clean[1])
        again = encode(got)  # as at the next step
        np.testing.assert_array_equal(np.isnan(decode(*again)), mask)


@pytest.mark.parametrize("sign", ["signed", "unsigned"])
def test_states_as_large_as_float32_are_kept(sign):
    encode, decode = state_codec((64, 64))
    x = normal(64, 64) if sign == "signed" else normal(64, 64) ** 2
    blocks = state_blocks((64, 64))
    tops = (1e37, 4e37, 8e37, 9e37, 1.8e38, LARGEST, np.nextafter(LARGEST, F32(0)))
    want = np.asarray(decode(*encode(x)))
    of_block = lambda x: np.array([np.abs(x[blocks == n]).max() for n in blocks.flat]).reshape(
        x.shape
    )
    most = of_block(x)
    for top in map(F32, tops):
        big = (x.astype(np.float64) / most * np.float64(top)).astype(F32)
        codes, absmax = encode(big)
        np.testing.assert_array_equal(np.abs(absmax).ravel(), top)
        got = np.asarray(decode(codes, absmax), np.float64)
        # as of a block of ordinary size; a ratio that is rounded may change its code by one
        assert (np.abs(got / np.float64(top) - want / most) <= 0.015).all()
        assert (np.abs(got / np.float64(top) - want / most) > 1e-6).mean() < 0.01


def test_a_nan_gradient_stays_in_the_moments_of_its_block():
    params = jnp.zeros((128, 96))
    tx = lowrank.quantize_state(optax.adam(1e-3))
    update = jax.jit(tx.update)
    blocks, at = state_blocks(params.shape), (77, 5)
    hit, only = blocks == blocks[at], np.zeros(blocks.shape, bool)
    only[at] = True

    def run(what):
        state = tx.init(params)
        for step in range(4):
            grads = normal(*params.shape, seed=step)
            if step == 1:
                grads[at] = what
            updates, state = update(grads, state, params)
            moments = [state[0].mu, state[0].nu]
            yield (
                updates,
                [dynamic.decode_dynamic(m.codes, m.absmax, m.axis, m.size) for m in moments],
            )

    clean = list(run(normal(*params.shape, seed=1)[at]))
    for what in (np.nan, np.inf):
        for step, (got, want) in enumerate(zip(run(what), clean, strict=True)):
            nan = [hit & False, only, hit, hit][step]
            np.testing.assert_array_equal(np.isnan(got[0]), nan)
            for moment in got[1]:
                np.testing.assert_array_equal(np.isnan(moment), hit & (step > 0))
            rest = jax.tree.map(lambda x: np.where(hit, 0, x), (got, want))
            chex.assert_trees_all_equal(*rest)


# Other maxima over data


def test_the_largest_error_of_a_leaf_with_nan_is_nan():
    weight = normal(128, 96)
    frozen = lowrank.quantize({"w": weight}, lowrank.QuantConfig(targets="w"))
    weight[3, 5] = np.nan
    found = lowrank.quantization_error({"w": weight}, frozen)["w"]
    assert np.isnan([found.relative, found.mean, found.largest]).all()


def test_norms_of_columns_with_nan_are_nan():
    weight, a, b = normal(64, 96), normal(64, 4), normal(4, 96)
    weight[3, 5] = np.nan
    weight[:, 9], b[:, 9] = 0, 0
    squares = (weight**2).sum(0)

    @jax.jit
    def run(squares, weight, a, b):
        product = lambda a: a.T @ weight
        change = compute_squared_norm_change(product, a, b, 0.5, 0, jnp.float32)
        norms = compute_norm(squares, change)
        return norms, divide_by_norms(jnp.ones(96), norms)

    for got in run(squares, weight, a, b):
        assert np.flatnonzero(np.isnan(got)).tolist() == [5]
        assert np.flatnonzero(np.asarray(got) == 0).tolist() == [9]
