"""Adapters and quantized bases of small weights; a lifted call compared with a merged one."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import noisy, normal

import lowrank_jax as lowrank
from lowrank_jax import _codecs

# results differ by a few roundings for each product on the way, in float32
TOLERANCE = 100 * float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of two elements, so that small weights have several."""
    monkeypatch.setattr(_codecs.formats, "BLOCK_SIZES", (2, 32, 64))


def node(shape, fan_in, fan_out, stack=(), *, kind="dot", seed=0, rank=2, dora=False):
    """A random adapter of a leaf of this shape."""
    size = lambda axes: tuple(shape[axis] for axis in axes)
    a = normal(*size(stack), *size(fan_in), rank, seed=seed + 1, scale=0.5)
    b = normal(*size(stack), rank, *size(fan_out), seed=seed + 2, scale=0.5)
    magnitude = 1 + jnp.abs(normal(*size(stack), *size(fan_out), seed=seed + 3)) if dora else None
    return lowrank.LowRank(a, b, magnitude, fan_in, fan_out, stack, 1.5, kind)


def quantized(leaf, fan_in, stack=(), **options):
    """The leaf in blocks of two along these axes."""
    from lowrank_jax._nodes.quantized import quantize_array as encode

    return jax.jit(
        lambda leaf: encode(
            leaf, fan_in, stack, **{"block_size": 2, "double_quant": False, **options}
        )
    )(leaf)


def assert_agrees(fn, base, lora, *args, fallback="raise"):
    """lift(fn)(combine(base, lora)) is fn(merge(base, lora)), with its derivatives."""
    lifted = lowrank.lift(fn, fallback=fallback)
    live = lambda lora, base: lifted(lowrank.combine(base, lora), *args)
    merged = lambda lora, base: fn(lowrank.merge(base, lora), *args)
    tangent = noisy(jax.tree.map(jnp.zeros_like, lora), seed=7)

    def derivatives(f):
        def loss(lora, base):
            out = [y.astype(jnp.float32) for y in jax.tree.leaves(f(lora, base))]
            weigh = lambda y: jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape))
            return sum(map(weigh, out)), out

        def run(lora, base):
            gradient, out = jax.grad(loss, has_aux=True)(lora, base)
            slope = jax.jvp(lambda lora: loss(lora, base)[0], (lora,), (tangent,))[1]
            return out, gradient, slope

        return run

    both = jax.jit(lambda *args: [derivatives(f)(*args) for f in (live, merged)])
    got, want = jax.device_get(both(lora, base))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    sizes = jax.tree.map(lambda leaf: np.abs(leaf).max(initial=0), want)
    # a slope is a sum that may cancel: it is as exact as its largest terms
    terms = jax.tree.map(lambda g, t: np.abs(g * t).sum(), want[1], jax.device_get(tangent))
    sizes = (*sizes[:2], sum(jax.tree.leaves(terms)))
    for one, other, size in zip(*map(jax.tree.leaves, (got, want, sizes)), strict=True):
        largest = max(size, 1e-3)
        np.testing.assert_allclose(one / largest, other / largest, rtol=0, atol=TOLERANCE)
    return got


def both_bases(leaf, fan_in, stack=()):
    """The leaf dense and quantized."""
    return leaf, quantized(leaf, fan_in, stack)
