"""Labeled products against numpy.einsum, and the groups of axes that a reshape maps."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax._primitives.contract import (
    arrange,
    contract,
    count_multiplies,
    invert_permutation,
    reshape_groups,
)

SIZES = {"i": 2, "j": 3, "k": 4, "r": 2, "s": 3}


def numbers(labels, seed):
    """Small whole numbers: their products and sums are exact in float32."""
    shape = [SIZES[label] for label in labels]
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


@st.composite
def products(draw):
    labels = lambda: tuple(draw(st.permutations(sorted(draw(st.sets(st.sampled_from([*SIZES])))))))
    return labels(), labels(), draw(st.sets(st.sampled_from([*SIZES])))


@settings(max_examples=40, deadline=None)
@given(products())
def test_contract_is_einsum(case):
    x_labels, y_labels, keep = case
    x, y = numbers(x_labels, 1), numbers(y_labels, 2)
    got, labels = contract(x, x_labels, y, y_labels, keep)
    assert {*labels} == keep & {*x_labels, *y_labels}
    assert len({*labels}) == len(labels)
    equation = f"{''.join(x_labels)},{''.join(y_labels)}->{''.join(labels)}"
    np.testing.assert_array_equal(got, np.einsum(equation, x, y))
    count, left = count_multiplies(SIZES, x_labels, y_labels, keep)
    assert count == math.prod(SIZES[label] for label in {*x_labels, *y_labels})
    assert {*left} == {*labels}


@pytest.mark.parametrize("out", [("j", "i"), ("k", "i", "j"), ("i", "k", "j", "r")])
def test_arrange_transposes_and_repeats(out):
    x = numbers(("i", "j"), 3)
    want = np.zeros([SIZES[label] for label in out]) + np.einsum(
        f"ij,{','.join(out)}->{''.join(out)}", x, *(np.ones(SIZES[label]) for label in out)
    )
    np.testing.assert_array_equal(arrange(x, ("i", "j"), out, SIZES), want)


@st.composite
def reshapes(draw):
    """Two shapes of one size, each of them a cut of the same prime factors."""
    primes = draw(st.lists(st.sampled_from([2, 3]), max_size=5))

    def shape():
        out = []
        for prime in primes:
            if out and draw(st.booleans()):
                out[-1] *= prime
            else:
                out.append(prime)
            out += [1] * draw(st.integers(0, 1))
        return tuple(out)

    return shape(), shape()


@given(reshapes())
def test_groups_are_the_smallest_runs_of_equal_size(case):
    old, new = case
    groups = reshape_groups(old, new)
    for shape, runs in ((old, [g[0] for g in groups]), (new, [g[1] for g in groups])):
        assert [axis for run in runs for axis in run] == [i for i, n in enumerate(shape) if n > 1]
    ends = lambda shape, run: {math.prod(shape[a] for a in run[: i + 1]) for i in range(len(run))}
    for left, right in groups:
        common = ends(old, left) & ends(new, right)
        assert common == {math.prod(old[a] for a in left)}  # they meet at their ends alone


@given(st.permutations(range(6)))
def test_a_permutation_is_undone(order):
    values = np.arange(6)[list(order)]
    np.testing.assert_array_equal(values[list(invert_permutation(order))], np.arange(6))
