"""Keys of static values: equal exactly where the values are, by type and by bits."""

import dataclasses
import enum
import itertools

import jax
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax._jax.statics import Static, has_plain_keys, make_key

SCALARS = st.sampled_from([True, False, 1, 0, 1.0, 0.0, -0.0, 1j, 0j, -0j, "", "1", None, b"1"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["a", "b", 1, True]), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(VALUES, VALUES)
def test_keys_are_equal_where_python_writes_both_values_alike(one, other):
    """repr tells True from 1 from 1.0, and 0.0 from -0.0, at any depth."""
    assert (make_key(one) == make_key(other)) == (repr(one) == repr(other))
    assert hash(make_key(one)) == hash(make_key(one))


@dataclasses.dataclass(frozen=True)
class Option:
    """Compares by its fields."""

    value: object
    note: str = dataclasses.field(default="", compare=False)


class Level(enum.IntEnum):
    """Equal to an integer."""

    ONE = 1


ALIKE = [1, True, 1.0, Level.ONE, Option(1), Option(True), Option(1.0), (1,), (True,), [1]]


def test_values_that_compare_equal_have_keys_of_their_own():
    assert Option(1) == Option(True)
    for one, other in itertools.combinations(map(Static, ALIKE), 2):
        assert one != other
    assert len({*map(Static, ALIKE)}) == len(ALIKE)


def test_equal_values_have_one_key():
    assert Static(Option(2, note="a")) == Static(Option(2, note="b"))
    assert Static(float("nan")) == Static(float("nan"))
    assert Static({1, 2}) == Static({2, 1})
    assert Static(frozenset([1])) != Static(frozenset([True]))
    assert Static(1) != 1


def test_pytree_structures_are_told_apart_by_their_keys():
    of = lambda tree: jax.tree.structure(tree)
    assert of({1: 0}) == of({True: 0})
    assert Static(of({1: 0})) != Static(of({True: 0}))
    assert Static(of({"a": (0, None)})) == Static(of({"a": (1, None)}))
    assert [has_plain_keys(of(tree)) for tree in ({"a": [0]}, {1: 0}, (0, {0.0: 0}))] == [
        *(True, False, False)
    ]
