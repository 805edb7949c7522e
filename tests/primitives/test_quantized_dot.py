"""The quantized product against op(x, decode(parts)): values, derivatives, vmap, what is saved."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax._primitives.quantized_dot import PlatformFn, quantized_dot


@dataclasses.dataclass(frozen=True)
class Product(PlatformFn):
    """x @ w."""

    def __call__(self, x, w):
        return x @ w


@dataclasses.dataclass(frozen=True)
class Scaled(PlatformFn):
    """Codes times a scale for each column."""

    def __call__(self, codes, scales):
        return codes.astype(jnp.float32) * scales


def numbers(*shape, seed=0):
    """Small whole numbers: their products and sums are exact in float32."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


X, CODES, SCALES = numbers(3, 8), numbers(8, 6, seed=1).astype(np.int8), numbers(6, seed=2)
quantized = lambda x, codes, scales: quantized_dot(x, (codes, scales), Product(), Scaled())
plain = lambda x, codes, scales: x @ (codes.astype(jnp.float32) * scales)


def assert_same(transform, *args):
    got, want = (jax.jit(transform(fn))(*args) for fn in (quantized, plain))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_value():
    assert_same(lambda fn: fn, X, CODES, SCALES)
    np.testing.assert_array_equal(quantized(X, CODES, SCALES), plain(X, CODES, SCALES))


def test_derivatives_of_the_activation():
    tangent, cotangent = numbers(3, 8, seed=3), numbers(3, 6, seed=4)
    closed = lambda fn: lambda x: fn(x, CODES, SCALES)
    assert_same(lambda fn: lambda x, t: jax.jvp(closed(fn), (x,), (t,)), X, tangent)
    back = lambda fn: lambda x, ct: jax.vjp(closed(fn), x)[1](ct)
    assert_same(back, X, cotangent)
    # the transpose of the transpose is the product again
    twice = lambda fn: lambda x, ct, t: jax.vjp(lambda ct: back(fn)(x, ct), ct)[1]((t,))
    assert_same(twice, X, cotangent, tangent)
    square = lambda fn: jax.hessian(lambda x: jnp.sum(closed(fn)(x) ** 2))
    assert_same(square, X)


def test_the_parts_are_constants():
    loss = lambda scales: quantized(X, CODES, scales).sum()
    np.testing.assert_array_equal(jax.grad(loss)(SCALES), np.zeros_like(SCALES))


STACKS = {
    "activations": (0, None, None),
    "weights": (None, 0, 0),
    "both": (0, 0, 0),
    "scales alone": (None, None, 0),
    "along other axes": (1, 2, 1),
}


@pytest.mark.parametrize("name", STACKS)
def test_vmap(name):
    axes = STACKS[name]
    stack = lambda array, axis: array if axis is None else np.stack([array, 2 * array], axis)
    args = [stack(array, axis) for array, axis in zip((X, CODES, SCALES), axes, strict=True)]
    assert_same(lambda fn: jax.vmap(fn, axes), *args)
    grad = lambda fn: jax.vmap(jax.grad(lambda *args: jnp.sum(fn(*args) ** 2)), axes)
    assert_same(grad, *args)


def test_no_dense_weight_is_saved_for_the_backward_pass():
    def loss(x):
        h = quantized(x, CODES, SCALES)
        return jnp.sum(jnp.tanh(h) ** 2)

    text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss)))(X))
    assert "lowrank_quantized_dot" in text
    assert not re.search(r":f32\[8,6\]", text)
