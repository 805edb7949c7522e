"""Products of concatenated dense weights: one product of the whole, along each kind of axis."""

import jax
import numpy as np
import pytest
from jax import lax

from lowrank_jax._operators import concatenated_products
from lowrank_jax._operators.concatenated import ConcatenatedWeight
from lowrank_jax._operators.concatenated_products import CachedProductWeight
from lowrank_jax._operators.dense import DenseWeight


def numbers(*shape, seed=0):
    """Small whole numbers: their products and sums are exact in float32."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def concatenate(axis, *shapes):
    arrays = [numbers(*shape, seed=i) for i, shape in enumerate(shapes)]
    return ConcatenatedWeight.of([DenseWeight(array) for array in arrays], axis), arrays


# axis, shapes of the parts, shape of x, numbers of dot_general with x on the left
DOTS = {
    "kept": (1, [(4, 3), (4, 5)], (2, 4), (((1,), (0,)), ((), ()))),
    "contracted": (0, [(3, 6), (5, 6)], (2, 8), (((1,), (0,)), ((), ()))),
    "batch": (0, [(2, 4, 3), (1, 4, 3)], (3, 5, 4), (((2,), (1,)), ((0,), (0,)))),
    "kept, after a batch axis": (
        2, [(3, 4, 2), (3, 4, 5)], (3, 6, 4), (((2,), (1,)), ((0,), (0,))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("on_left", [False, True])
@pytest.mark.parametrize("name", DOTS)
def test_dot(name, on_left):
    axis, shapes, x_shape, pair = DOTS[name]
    weight, arrays = concatenate(axis, *shapes)
    whole, x = np.concatenate(arrays, axis), numbers(*x_shape, seed=9)
    pair = tuple(sides[::-1] for sides in pair) if on_left else pair
    want = lax.dot_general(*((whole, x) if on_left else (x, whole)), pair)
    call = lambda x: concatenated_products.dot(weight, x, pair, on_left, {})
    np.testing.assert_array_equal(call(x), want)
    text = str(jax.make_jaxpr(call)(x))
    assert sum("dot_general[" in line for line in text.splitlines()) == 1


@pytest.mark.parametrize(("axis", "channels"), [(2, (3, 4)), (1, (7,))])
def test_conv(axis, channels):
    shapes = [(2, 7, n) for n in channels] if axis == 2 else [(2, 3, 5), (2, 4, 5)]
    weight, arrays = concatenate(axis, *shapes)
    x = numbers(2, 6, 7, seed=9)
    numbers_of = lax.conv_dimension_numbers(x.shape, weight.shape, ("NHC", "HIO", "NHC"))
    options = {"window_strides": (1,), "padding": ((0, 0),), "dimension_numbers": numbers_of}
    want = lax.conv_general_dilated(x, np.concatenate(arrays, axis), **options)
    np.testing.assert_array_equal(concatenated_products.conv(weight, x, options), want)


def test_grouped_convolutions_are_left_to_the_dense_weight():
    weight, _ = concatenate(2, (2, 7, 3), (2, 7, 4))
    numbers_of = lax.conv_dimension_numbers((2, 6, 7), weight.shape, ("NHC", "HIO", "NHC"))
    options = {"dimension_numbers": numbers_of, "feature_group_count": 7}
    assert concatenated_products.conv(weight, numbers(2, 6, 7), options) is None


def test_a_known_product_is_of_its_own_operand_alone():
    value, x, known = numbers(4, 3), numbers(2, 4, seed=1), numbers(2, 3, seed=2)
    weight = CachedProductWeight(value, x, known)
    pair = (((1,), (0,)), ((), ()))
    assert weight.dot(x, pair, False, {}) is known
    np.testing.assert_array_equal(weight.dot(x.copy(), pair, False, {}), x @ value)
