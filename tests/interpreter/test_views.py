"""Views against coordinates: which axes of the leaf really vary along each axis of a view.

The reference is an array with the coordinates of each element in the leaf, [*shape, axes of the
leaf], on which NumPy does the same operations. An element of another array has coordinate -1.
"""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lowrank_jax._interpreter.views import View

FILL = -1


def coordinates(shape):
    return np.stack(np.indices(shape), -1) if shape else np.zeros((0,), int)


def varying(array, axis):
    """The axes of the leaf whose coordinate changes along an axis, elements of others apart."""
    own = np.moveaxis(array, axis, 0)
    real = np.all(own != FILL, -1)
    found = set()
    for one in range(own.shape[0]):
        for other in range(one):
            both = real[one] & real[other]
            found |= set(np.flatnonzero((own[one][both] != own[other][both]).any(0)))
    return found


@st.composite
def programs(draw):
    """A leaf's shape, and operations as (name, arguments) that its view can take in turn."""
    shape = leaf = tuple(draw(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=3)))
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        axis = draw(st.integers(0, len(shape) - 1)) if shape else None
        name = draw(st.sampled_from(["transpose", "reshape", "slice", "rev", "pad", "take"]))
        if name == "transpose":
            order = tuple(draw(st.permutations(range(len(shape)))))
            steps.append((name, order))
            shape = tuple(shape[i] for i in order)
        elif name == "reshape":
            size = math.prod(shape)
            cut = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
            shape = draw(st.sampled_from([(size,), (cut, size // cut), (cut, 1, size // cut)]))
            steps.append((name, shape))
        elif axis is None or shape[axis] == 1:
            continue
        elif name == "slice":
            start = draw(st.integers(0, shape[axis] - 1))
            stop = draw(st.integers(start + 1, shape[axis]))
            step = draw(st.integers(1, 2))
            steps.append((name, (axis, start, stop, step)))
            shape = (*shape[:axis], len(range(start, stop, step)), *shape[axis + 1 :])
        elif name == "take":
            number = draw(st.integers(0, shape[axis] - 1))
            steps.append((name, (axis, number)))
            shape = shape[:axis] + shape[axis + 1 :]
        elif name == "rev":
            steps.append((name, (axis,)))
        elif name == "pad":
            low, high = draw(st.integers(0, 1)), draw(st.integers(0, 1))
            steps.append((name, (axis, low, high)))
            shape = (*shape[:axis], low + shape[axis] + high, *shape[axis + 1 :])
    return leaf, steps


def apply(view, array, name, args):
    """One operation on a view and on coordinates; (None, None) where no element is left."""
    if name == "transpose":
        return view.transpose(args), array.transpose(*args, array.ndim - 1)
    if name == "reshape":
        return view.reshape(args), array.reshape(*args, array.shape[-1])
    axis, *rest = args
    front = (slice(None),) * axis
    if name == "slice":
        array = array[(*front, slice(*rest))]
        view = view.slice_axis(axis, *rest)
    elif name == "take":
        array = array[(*front, rest[0])]
        view = view.take_index(axis, rest[0])
    elif name == "rev":
        array, view = np.flip(array, axis), view.rev([axis])
    else:
        widths = [(0, 0)] * array.ndim
        widths[axis] = tuple(rest)
        array = np.pad(array, widths, constant_values=FILL)
        view = view.pad([(*rest, 0) if i == axis else (0, 0, 0) for i in range(len(view.shape))])
    if not np.any(np.all(array != FILL, -1)):
        return None, None  # a strided slice may keep a span without an element
    return view, array


@settings(max_examples=300, deadline=None)
@given(programs())
def test_a_view_names_the_axes_that_vary(program):
    leaf, steps = program
    view, array = View.of("w", leaf), coordinates(leaf)
    for name, args in steps:
        view, array = apply(view, array, name, args)
        if view is None:
            return
        assert view.shape == array.shape[:-1]
        for axis, (parts, (start, stop)) in enumerate(zip(view.dims, view.spans, strict=True)):
            told, real = view.find_axes([axis]), varying(array, axis)
            assert real <= told, (axis, told, real)
            if all(size for _, size in parts):  # every part is known: none is named in vain
                assert real == {a for a, size in parts if a >= 0 and size > 1}
            inside = np.moveaxis(np.all(array != FILL, -1), axis, 0)
            present = np.flatnonzero(inside.reshape(inside.shape[0], -1).any(1))
            assert start <= present.min()
            assert present.max() < stop


@pytest.mark.parametrize("data", [False, True])
def test_one_index_of_a_stack_is_selected(data):
    view = View.of("w", (4, 6, 5)).dynamic_slice(0, 1, data).reshape((6, 5))
    assert view.selected == {0}
    assert view.chosen == ({0} if data else set())
    roles = view.find_product_roles("dot", [0], [], [1])
    assert (roles.fan_in, roles.fan_out, roles.stack) == ({1}, {2}, {0})


def test_a_slice_of_a_scan_is_put_back_by_the_scan_alone():
    whole, scan = View.of("w", (4, 6, 5)), object()
    one = whole.slice_scan(scan)
    assert (one.shape, one.selected) == ((6, 5), {0})
    assert one.stack_scan(scan, 4) == whole
    other = one.stack_scan(object(), 4)
    assert (other.shape, other.selected, other.find_axes([0])) == ((4, 6, 5), {0}, set())


def test_a_mask_runs_along_contracted_and_kept_axes():
    view = View.of("w", (6, 5))
    assert view.scale_axes((6, 5), [0, 1]).is_masked([0], [1])
    assert not view.scale_axes((6, 5), [0]).scale_axes((6, 5), [1]).is_masked([0], [1])


def test_what_is_cut_away_leaves_no_view():
    joined = View.of("w", (3, 5)).join(0, (8, 5), 2)  # rows 2, 3 and 4 of eight
    assert joined.slice_axis(0, 0, 2) is None
    assert joined.slice_axis(0, 5, 8) is None
    assert joined.slice_axis(0, 1, 3).spans == ((1, 2), (0, 5))
