"""regroup: a labeled array, spread over the weight, is reshaped as the weight is."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax._operators.regroup import regroup
from lowrank_jax._primitives.contract import RANK, reshape_groups


def spread(array, labels, shape):
    """The array broadcast to [*shape, rank]: constant along the axes that it has no label of."""
    place = {**{axis: axis for axis in range(len(shape))}, RANK: len(shape)}
    array = np.asarray(array).transpose(np.argsort([place[label] for label in labels]))
    sizes = iter(array.shape)
    present = {place[label] for label in labels}
    one = [next(sizes) if i in present else 1 for i in range(len(shape) + 1)]
    return np.broadcast_to(array.reshape(one), (*shape, one[-1]))


@st.composite
def cuts(draw, atoms):
    """A shape: the sizes of consecutive atoms multiplied, with axes of size 1 among them."""
    ends = draw(st.sets(st.integers(1, len(atoms) - 1))) if len(atoms) > 1 else set()
    runs = itertools.pairwise([0, *sorted(ends), len(atoms)])
    shape = [math.prod(atoms[start:stop]) for start, stop in runs]
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


@st.composite
def reshapes(draw):
    """Two shapes of equal size, and labels of whole groups of the first in any order."""
    atoms = draw(st.lists(st.integers(2, 3), min_size=1, max_size=4))
    old, new = draw(cuts(atoms)), draw(cuts(atoms))
    groups = reshape_groups(old, new)
    held = [axis for group, _ in groups if draw(st.booleans()) for axis in group]
    held += [axis for axis, size in enumerate(old) if size == 1 and draw(st.booleans())]
    held += [RANK] * draw(st.booleans())
    return old, new, tuple(draw(st.permutations(held)))


@settings(max_examples=60, deadline=None)
@given(reshapes())
def test_the_spread_array_is_reshaped(case):
    old, new, labels = case
    shape = [5 if label == RANK else old[label] for label in labels]
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    groups = reshape_groups(old, new)
    got, names = regroup(array, labels, groups, dict(enumerate(new)))
    want = spread(array, labels, old).reshape(*new, -1)
    np.testing.assert_array_equal(spread(got, names, new), want)


@pytest.mark.parametrize("labels", [(0,), (1, RANK)])
def test_part_of_a_merged_group_has_no_reshape(labels):
    """A factor [2, r] of a weight [2, 3]: merged to [6] its numbers would have to repeat."""
    array = np.ones([4 if label == RANK else (2, 3)[label] for label in labels])
    assert regroup(array, labels, reshape_groups((2, 3), (6,)), {0: 6}) is None
