"""Double quantization of scales equals bitsandbytes', however it is called."""

from functools import partial

import jax
import numpy as np
import pytest
from codec_reference import (
    F32,
    bits,
    equal,
    load,
)

from lowrank_jax import _codecs as codecs
from lowrank_jax._codecs import host, scales

pytestmark = pytest.mark.usefixtures("strict_promotion")

CASES = ("scales/64", "scales/32", "normal/32", "ragged/64")


@pytest.mark.parametrize("case", CASES)
def test_golden_scales(case):
    golden = load("scales")
    get = lambda key: golden[f"{case}/{key}"]
    absmax, offset, nested = get("absmax"), get("offset"), get("nested_absmax")
    codes, mine, mean = jax.jit(scales.encode_scales)(absmax)
    assert abs(int(bits(mean)) - int(bits(offset))) <= 3  # torch sums in an order of its own
    np.testing.assert_allclose(mine, nested, rtol=1e-6)
    equal(codes, get("exact/codes"))
    # CPU's kernel rounds its input to 2 / 65535 first
    error = scales.DYNAMIC_MAP[get("cpu/codes")] - scales.DYNAMIC_MAP[codes]
    assert np.abs(error).max() <= 2 / 65535
    assert np.sum(get("cpu/codes") != codes) <= 1

    # given their offset, everything is equal
    ratios, theirs = jax.jit(codecs.normalize_flat, static_argnums=1)(absmax - offset, 256)
    equal(theirs, nested)
    middles = (scales.DYNAMIC_MAP[:-1] + scales.DYNAMIC_MAP[1:]) / F32(2)
    equal(np.searchsorted(middles, ratios).astype(np.uint8), get("exact/codes"))
    decode = jax.jit(scales.decode_scales)
    for kernel in ("cpu", "exact"):
        equal(decode(get(f"{kernel}/codes"), nested, offset), get(f"{kernel}/absmax"))


@pytest.mark.parametrize("n", [1, 257, 512])
def test_scales_do_not_depend_on_the_call(n):
    absmax = np.random.default_rng(3).uniform(0.01, 0.2, n).astype(F32)
    first = scales.encode_scales(absmax)
    exact = F32(absmax.astype(np.float64).mean())
    assert abs(int(bits(first[2])) - int(bits(exact))) <= 2
    tree = partial(scales.decode_scales, tree=True)
    decoders = [jax.jit(scales.decode_scales), jax.jit(tree)]
    if n == 257:  # a whole block and a short one
        decoders.append(scales.decode_scales)
    mapped = [x[0] for x in jax.device_get(jax.vmap(scales.encode_scales)(absmax[None]))]
    for got in (host.encode_scales(absmax), mapped):  # NumPy rounds operation by operation
        for mine, wanted in zip(got, first, strict=True):
            equal(mine, wanted)
    codes, nested, offset = map(np.asarray, first)
    rounded = scales.DYNAMIC_MAP[codes] * nested[np.arange(n) // 256]
    wanted = rounded + offset  # rounded twice: no fused multiply-add
    for decode in decoders:
        equal(decode(*first), wanted)


def test_a_tie_of_scales_goes_to_the_lower_one():
    middles = (scales.DYNAMIC_MAP[:-1] + scales.DYNAMIC_MAP[1:]) / F32(2)
    exact = middles[np.isin(middles, middles.astype(np.float16).astype(F32))]
    exact = exact[np.abs(exact) > 0.05]
    assert len(exact) >= 4
    # 1 +- m and 1 +- 1: the mean is 1, the largest difference 1, and m a midpoint
    absmax = np.concatenate([[0, 2], 1 + exact, 1 - exact]).astype(F32)
    codes, nested, offset = scales.encode_scales(absmax)
    assert (float(nested[0]), float(offset)) == (1, 1)
    equal(codes[2 : 2 + len(exact)], np.flatnonzero(np.isin(middles, exact)).astype(np.uint8))


def test_the_mean_of_many_is_exact_to_2_ulps():
    # a running sum would be off by hundreds
    absmax = np.random.default_rng(8).uniform(0.01, 0.2, 1_000_003).astype(F32)
    offset = scales.encode_scales(absmax)[2]
    assert abs(int(bits(offset)) - int(bits(F32(absmax.astype(np.float64).mean())))) <= 2


def test_scales_in_another_order():
    # held as [blocks of a row, out] where the flat index is out-major
    rng = np.random.default_rng(4)
    out, count = 70, 6
    absmax = rng.uniform(0.01, 0.2, out * count).astype(F32)
    codes, nested, offset = map(np.asarray, scales.encode_scales(absmax))
    decode = jax.jit(scales.decode_scales, static_argnums=3)
    wanted = np.asarray(decode(codes, nested, offset)).reshape(out, count).T
    got = decode(codes.reshape(out, count).T, nested, offset, (1, 0))
    equal(got, wanted)
    rough = np.abs(absmax.reshape(out, count).T - got).max()
    assert rough <= float(nested.max()) * 0.0071  # half the coarsest step of the map
