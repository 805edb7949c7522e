"""Codes and scales follow a reshape and a loop: they decode to the same part of the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_weights import quantized, small_blocks  # noqa: F401

from lowrank_jax._operators.blocks import BLOCKS
from lowrank_jax._operators.quantized import QuantizedWeight

pytestmark = pytest.mark.usefixtures("fast_compile")

OPTIONS = {
    "nf4": {},
    "int8": {"format": "int8"},
    "bytes": {"packing": "uint8"},
    "double": {"double_quant": True},
}


def weight_of(shape, fan_in, stack=(), order=None, **options):
    """A quantized weight operator, its axes in another order, and its dense value."""
    leaf = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    weight = QuantizedWeight.of(quantized(leaf, fan_in, stack, **options), "w")
    weight = weight if order is None else weight.transpose(order)
    return weight, np.asarray(weight.materialize())


# shape, fan-in, stack, order of a transpose before, new shape, whether blocks are kept whole
RESHAPES = {
    "a stack axis split": ((4, 8, 6), (1,), (0,), None, (2, 2, 8, 6), True),
    "stack axes merged": ((2, 2, 8, 6), (2,), (0, 1), None, (4, 8, 6), True),
    "heads split off": ((8, 6), (0,), (), None, (8, 3, 2), True),
    "fan-in split, its blocks whole": ((8, 6), (0,), (), None, (2, 4, 6), True),
    "fan-in merged, of which one axis has the blocks": (
        (4, 4, 6), (0, 1), (), None, (16, 6), False,
    ),
    "transposed, then split": ((4, 8, 6), (1,), (0,), (2, 0, 1), (3, 2, 4, 8), True),
    "a unit axis": ((4, 8, 6), (1,), (0,), None, (4, 1, 8, 6), True),
    "fan-in and fan-out merged": ((8, 6), (0,), (), None, (48,), False),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", RESHAPES)
def test_reshape(name, kind):
    shape, fan_in, stack, order, new, whole = RESHAPES[name]
    weight, dense = weight_of(shape, fan_in, stack, order, **OPTIONS[kind])
    got = weight.reshape(new)
    assert got.shape == new
    assert (BLOCKS in got.layout.axes) == whole
    np.testing.assert_array_equal(got.materialize(), dense.reshape(new))


UNSTACKED = {
    "leading": ((3, 8, 6), (1,), (0,), None),
    "after fan-in": ((8, 3, 6), (0,), (1,), (1, 0, 2)),
    "last": ((8, 6, 3), (0,), (2,), (2, 0, 1)),
    "two": ((2, 3, 8, 6), (2,), (0, 1), (1, 0, 2, 3)),
    "two, kept flat": ((2, 3, 5, 7), (2,), (0, 1), (1, 0, 2, 3)),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", UNSTACKED)
def test_unstack(name, kind):
    weight, dense = weight_of(*UNSTACKED[name], **OPTIONS[kind])
    arrays, rebuild = weight.unstack()
    for number in range(weight.shape[0]):
        one = rebuild(jax.tree.map(lambda array, n=number: array[n], arrays))
        assert one.shape == dense.shape[1:]
        np.testing.assert_array_equal(one.materialize(), dense[number])


def test_blocks_are_not_scanned_over():
    weight, _ = weight_of((8, 6), (0,))
    assert weight.unstack() is None


def test_a_loop_over_a_later_stack_axis_carries_numbers_alone():
    """What is kept for each step is the number of the layer, not a slice of codes."""
    weight, _ = weight_of(*UNSTACKED["after fan-in"])
    arrays, _ = weight.unstack()
    np.testing.assert_array_equal(arrays, jnp.arange(3))
