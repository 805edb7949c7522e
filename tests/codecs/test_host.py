"""What is encoded on the host, of NumPy arrays, equals what a device makes, bit for bit."""

import itertools
import threading
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_reference import FORMATS, adversarial, equal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import lowrank_jax as lowrank
from lowrank_jax import _codecs
from lowrank_jax._codecs import host, scales
from lowrank_jax._nodes import host as leaves
from lowrank_jax._nodes.host import quantize_on_host
from lowrank_jax._nodes.quantized import quantize_array

F32 = np.float32


def every_magnitude(blocks, block, seed=0):
    """Blocks of every magnitude that float32 has, subnormal ones too, elements likewise."""
    rng = np.random.default_rng(seed)
    power = lambda low, high, shape: np.exp2(rng.integers(low, high, shape).astype(np.float64))
    x = rng.standard_normal((blocks, block)) * power(-149, 126, (blocks, 1))
    x *= power(-40, 1, x.shape) ** rng.integers(0, 2, (blocks, 1))
    x[rng.random(x.shape) < 0.05] = 0
    return np.clip(x, -3e38, 3e38).astype(F32)


WEIGHTS = {"every magnitude": lambda _: every_magnitude(4096, 64), "near ties": adversarial}
on_device = jax.jit(_codecs.encode_blocks, static_argnums=(1, 2))


@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("format", FORMATS)
def test_codes(format, what):
    x = WEIGHTS[what](format)
    for axis, array in ((1, x), (0, x.T)):
        for mine, wanted in zip(
            host.encode_blocks(array, format, axis), on_device(array, format, axis), strict=True
        ):
            equal(mine, wanted)


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(F32, 32, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_codes_of_any_block(x):
    for format in FORMATS:
        for mine, wanted in zip(
            host.encode_blocks(x, format), on_device(x, format, -1), strict=True
        ):
            equal(mine, wanted)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [1, 63, 64, 200])
def test_codes_of_a_flat_array(format, n):
    for row in (every_magnitude(20, n), adversarial(format, 20, n, seed=n)):
        for x in row:
            wanted = _codecs.encode_flat(x, format, 64)
            for mine, other in zip(host.encode_flat(x, format, 64), wanted, strict=True):
                equal(mine, other)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_scales_of_scales(n):
    rng = np.random.default_rng(n)
    equal_ones = np.full(n, F32(0.3))
    some = rng.uniform(0.01, 0.2, n).astype(F32)
    wide = np.exp2(rng.uniform(-140, 120, n)).astype(F32)
    for absmax in (equal_ones, some, wide, np.zeros(n, F32)):
        wanted = scales.encode_scales(np.where(absmax < 2.0**-126, F32(0), absmax))
        for mine, other in zip(host.encode_scales(absmax.copy()), wanted, strict=True):
            equal(mine, other)


def test_the_midpoint_at_0_is_why_small_numbers_are_flushed():
    """Unflushed, FP4 would take them for its second zero; and NF4 those of a block as small."""
    x = np.full(64, F32(2.0**-140))
    x[0] = 1
    assert set(host.encode_blocks(x, "fp4")[0][1:]) == {0}
    assert x[1] > 0
    x[0], x[1] = 2.0**-126, 2.0**-127
    assert host.encode_blocks(x, "nf4")[0][1] == on_device(x, "nf4", -1)[0][1] == 7


# Leaves

LEAVES = {  # shape, fan-in, stack
    "matrix": ((128, 6), (0,), ()),
    "rows": ((6, 128), (1,), ()),
    "heads": ((3, 128, 2, 5), (1,), (0,)),
    "fan-in of two axes": ((4, 16, 3, 2), (0, 1), ()),
    "fan-in apart": ((4, 6, 64), (0, 2), ()),
    "straddling": ((10, 13), (0,), ()),
    "straddling, axes in another order": ((5, 7, 9), (1,), ()),
    "two stacks": ((3, 2, 64, 4), (2,), (0, 1)),
    "stack, straddling": ((3, 10, 7), (1,), (0,)),
    "stack within": ((64, 3, 4), (0,), (1,)),
    "many scales": ((2, 128, 300), (1,), (0,)),
}
OPTIONS = {
    "nf4, twice": {},
    "fp4": {"format": "fp4", "double_quant": False, "packing": "uint8"},
    "int8": {"format": "int8", "block_size": 32},
    "nf4, twice, bytes": {"packing": "uint8"},
}


# bytes that are halves of an axis in every case, and one of the others
CASES = [(case, "nf4, twice, bytes") for case in LEAVES]
CASES += zip(LEAVES, itertools.cycle(list(OPTIONS)[:-1]))


def both(leaf, fan_in, stack, options):
    """The leaf from the host, and from the device."""
    make = jax.jit(lambda leaf: quantize_array(leaf, fan_in, stack, **options))
    node, bad = quantize_on_host(leaf, jax.eval_shape(make, leaf))
    return node, make(leaf), bad


@pytest.mark.parametrize(("case", "options"), CASES)
def test_leaves(case, options, monkeypatch, fast_compile):
    monkeypatch.setattr(leaves, "PIECE", 200)  # many pieces, of unequal sizes
    shape, fan_in, stack = LEAVES[case]
    leaf = np.random.default_rng(0).standard_normal(shape, F32)
    got, wanted, bad = both(leaf, fan_in, stack, OPTIONS[options])
    chex.assert_trees_all_equal(got, jax.device_get(wanted))
    chex.assert_trees_all_equal_dtypes(got, wanted)
    assert bad == (0, 0)
    leaf.flat[[0, 5, -1]] = np.nan, np.inf, -np.inf
    assert quantize_on_host(leaf, jax.eval_shape(lambda: wanted))[1][0] == 3
    assert leaves.count_nonfinite(leaf) == 3


def test_dtypes_views_and_layers():
    leaf = np.random.default_rng(0).standard_normal((3, 64, 20), F32)
    for dtype in (np.float16, jnp.bfloat16, np.float64):
        got, wanted, _ = both(leaf.astype(dtype), (1,), (0,), {})
        chex.assert_trees_all_equal(got, wanted)
    turned = np.ascontiguousarray(leaf.transpose(0, 2, 1)).transpose(0, 2, 1)
    got, wanted, _ = both(turned, (1,), (0,), {})
    chex.assert_trees_all_equal(got, wanted)
    shapes = jax.eval_shape(lambda x: quantize_array(x, (1,), (0,)), leaf)
    got, _ = quantize_on_host(lambda index: turned[index], shapes, depth=1)
    chex.assert_trees_all_equal(got, wanted)


@pytest.mark.parametrize(("rows", "flat"), [(1024, False), (1000, True)])
def test_memory_beside_the_codes_is_that_of_pieces(rows, flat, monkeypatch):
    monkeypatch.setattr(leaves, "_count_cores", lambda: 2)
    leaf = np.random.default_rng(0).standard_normal((rows, 4096), F32)
    shapes = jax.eval_shape(lambda x: quantize_array(x, (0,), (), packing="uint8"), leaf)
    assert (shapes.order is not None) == flat
    tracemalloc.start()
    node, _ = quantize_on_host(leaf, shapes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    result = sum(part.nbytes for part in jax.tree.leaves(node))
    room = leaf.nbytes / 2 if flat else 2 * 12 * 4 * leaves.PIECE
    assert result < peak < result + room


def test_threads_are_gone_and_their_errors_are_not(monkeypatch):
    leaf = np.ones((64, 2**14), F32)
    shapes = jax.eval_shape(lambda x: quantize_array(x, (0,), ()), leaf)
    before = threading.active_count()
    quantize_on_host(leaf, shapes)
    assert threading.active_count() == before

    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(leaves.host, "encode_blocks", broken)
    with pytest.raises(MemoryError, match="no room"):
        quantize_on_host(leaf, shapes)


def test_the_device_takes_the_buffers_over():
    leaf = np.ones((64, 2**14), F32)
    shapes = jax.eval_shape(lambda x: quantize_array(x, (0,), (), packing="uint8"), leaf)
    node, _ = quantize_on_host(leaf, shapes)
    taken = jax.device_put(node.codes)
    assert taken.unsafe_buffer_pointer() == node.codes.ctypes.data


def test_what_is_no_float32_is_counted_as_such():
    leaf = np.random.default_rng(0).standard_normal((64, 4))
    leaf[0, 0] = 1e300  # finite, and not in float32
    quant = lowrank.QuantConfig(targets="w")
    for donate in (False, True):
        with pytest.raises(lowrank.TreeError, match="w: 1 of 256 values are not finite"):
            lowrank.quantize({"w": leaf}, quant, donate=donate)


def test_scales_beyond_float32_are_refused():
    leaf = np.full((64, 4096), F32(3e38))
    with pytest.raises(lowrank.ConfigError, match="pass double_quant=False"):
        lowrank.quantize({"w": leaf}, lowrank.QuantConfig(targets="w"))


def test_a_mean_that_xla_takes_for_0():
    leaf = np.zeros((256, 8), F32)
    leaf[0, 0] = 2.0**-126
    got, wanted, _ = both(leaf, (0,), (), {})
    chex.assert_trees_all_equal(got, wanted)


@pytest.mark.parametrize("shape", [(0, 4), (64, 0), (3, 0, 4)])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_empty_leaves_are_refused(shape, kind):
    quant = lowrank.QuantConfig(targets="w")
    plan = None
    if len(shape) == 3:
        fn = lambda p, x: jax.lax.scan(lambda x, w: (x[:, :0] @ w, None), x, p["w"])[0]
        plan = lowrank.plan(fn, {"w": jax.ShapeDtypeStruct(shape, F32)}, np.ones((1, 4), F32))
    with pytest.raises(lowrank.AxesError, match="has no values to quantize: exclude it"):
        lowrank.quantize({"w": kind(np.zeros(shape, F32))}, quant, plan=plan)


def test_quantize_of_numpy_arrays_is_that_of_jax_arrays():
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((128, 96), F32), "t": rng.standard_normal((50, 64), F32)}
    plan = lowrank.plan(lambda p, i: p["t"][i] @ p["w"][:64], params, jnp.arange(3))
    quant = lowrank.QuantConfig(targets=("w", "t"))
    wanted = lowrank.quantize(jax.tree.map(jnp.asarray, params), quant, plan=plan)
    chex.assert_trees_all_equal(lowrank.quantize(params, quant, plan=plan), wanted)
