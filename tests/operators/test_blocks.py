"""Products with decoded blocks: those of the dense weight that the layout describes."""

import jax
import numpy as np
import pytest
from jax import lax

from lowrank_jax._operators.blocks import (
    BLOCKS,
    ELEMENTS,
    BlockDot,
    BlockLayout,
    is_consecutive,
)
from lowrank_jax._operators.decodings import TransformedDecoding

# name -> (layout, shape of the decoded array, shape of the weight)
LAYOUTS = {
    "blocks along axis 0": (BlockLayout((BLOCKS, ELEMENTS, 1), (0,), (8,)), (2, 4, 5), (8, 5)),
    "transposed": (BlockLayout((1, BLOCKS, ELEMENTS, 0), (2,), (8,)), (3, 2, 4, 5), (5, 3, 8)),
    "two axes in one run": (
        BlockLayout((0, BLOCKS, ELEMENTS), (1, 2), (6, 4)), (3, 3, 8), (3, 6, 4),
    ),
    "a unit axis": (BlockLayout((2, BLOCKS, ELEMENTS), (1,), (8,), (0,)), (5, 2, 4), (1, 8, 5)),
    "no blocks": (BlockLayout((1, 0), (), ()), (3, 8), (8, 3)),
}  # fmt: skip


def dense_of(layout, decoded, shape):
    """The weight by NumPy: blocks joined, then each axis put where its label says."""
    axes = list(layout.axes)
    if layout.blocked:
        at = axes.index(BLOCKS)
        assert axes[at + 1] == ELEMENTS
        decoded = decoded.reshape(*decoded.shape[:at], *layout.sizes, *decoded.shape[at + 2 :])
        axes[at : at + 2] = layout.blocked
    return decoded.transpose(np.argsort(axes)).reshape(shape)


def numbers(shape, seed=0):
    """Small whole numbers: sums of their products are exact in any order."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_the_dense_weight(name):
    layout, blocks, shape = LAYOUTS[name]
    assert layout.ndim == len(shape)
    got = layout.to_dense(numbers(blocks))
    np.testing.assert_array_equal(got, dense_of(layout, numbers(blocks), shape))


PRODUCTS = {  # of "two axes in one run", [3, 6, 4]: shape of x, numbers for x on the left
    "the run contracted": ((2, 6, 4), (((1, 2), (1, 2)), ((), ()))),
    "the run contracted, its axes apart in x": ((4, 2, 6), (((2, 0), (1, 2)), ((), ()))),
    "the run kept": ((2, 3), (((1,), (0,)), ((), ()))),
    "a batch axis": ((2, 3, 6, 4), (((2, 3), (1, 2)), ((1,), (0,)))),
}


@pytest.mark.parametrize("on_left", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_dot_is_that_of_the_dense_weight(name, on_left):
    layout, blocks, shape = LAYOUTS["two axes in one run"]
    x_shape, pair = PRODUCTS[name]
    x, decoded = numbers(x_shape, seed=1), numbers(blocks)
    dense = dense_of(layout, decoded, shape)
    if on_left:
        pair = tuple(sides[::-1] for sides in pair)
        want = lax.dot_general(dense, x, pair)
    else:
        want = lax.dot_general(x, dense, pair)
    product = BlockDot(layout, pair, on_left, ())
    for call in (product, product.on_cpu):
        np.testing.assert_array_equal(jax.jit(call)(x, decoded), want)


def test_operations_on_the_decoded_weight_are_applied_in_order():
    layout, blocks, shape = LAYOUTS["blocks along axis 0"]
    decoding = TransformedDecoding(lambda codes: codes, layout, ())
    for operation in (("transpose", (1, 0)), ("slice", (1, 2), (4, 8)), ("rev", (0,))):
        decoding = decoding.append(*operation)
    want = dense_of(layout, numbers(blocks), shape).T[1:4, 2:8][::-1]
    np.testing.assert_array_equal(decoding(numbers(blocks)), want)


def test_consecutive_axes():
    assert [is_consecutive(axes) for axes in ((), (3,), (1, 2, 3), (1, 3), (2, 1))] == [
        *(True, True, True, False, False)
    ]
