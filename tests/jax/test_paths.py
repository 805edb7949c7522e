"""Paths and patterns."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, struct

import lowrank_jax as lowrank
from lowrank_jax._jax.paths import flatten, hash_path, matches, select
from lowrank_jax._nodes import is_node
from lowrank_jax._transforms.lift import split_arguments


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "x/a/b", False),
        ("*", "a", True),
        ("*", "a/b", False),
        ("a/*", "a/b", True),
        ("a/*", "a/b/c", False),
        ("a*/b", "abc/b", True),
        ("a*/b", "a/b", True),
        ("**", "a/b/c", True),
        ("**/c", "c", True),
        ("**/c", "a/b/c", True),
        ("**/c", "a/bc", False),
        ("a/**", "a", True),
        ("a/**", "a/b/c", True),
        ("a/**", "ab", False),
        ("a/**/d", "a/d", True),
        ("a/**/d", "a/b/c/d", True),
        ("a/**/d", "a/bd", False),
        ("**/q_proj/**", "x/q_proj/kernel", True),
        ("**/q_proj/**", "x/q_proj", True),
        ("layers_?/w", "layers_1/w", True),
        ("layers_?/w", "layers_12/w", False),
        ("a.b/w", "axb/w", False),  # a dot is a dot
        ("a[0]/w", "a[0]/w", True),  # and a bracket a bracket
        (re.compile(r"a/.*"), "a/b/c", True),
        (re.compile(r"a"), "a/b", False),  # the whole path
    ],
)
def test_glob(pattern, path, expected):
    assert matches(pattern, path) is expected


@pytest.mark.parametrize("bad", ["", "/a", "a//b", "a/", 3, None, re.compile(b"a")])
def test_malformed_patterns_are_refused(bad):
    with pytest.raises(lowrank.PatternError, match=r"pattern"):
        matches(bad, "a")


def test_no_match_names_the_nearest():
    with pytest.raises(lowrank.PatternError) as error:
        select(["**/q_porj/kernel"], ["m/q_proj/kernel", "m/norm/scale"], "targets")
    text = str(error.value)
    assert "matches none of the 2 leaves" in text
    assert "'m/q_proj/kernel'" in text


def test_every_pattern_without_a_match_is_named_and_the_nearest_is_of_the_same_module():
    paths = ["m/up_proj/kernel", "m/self_attn/q_proj/kernel", "m/self_attn/v_proj/kernel"]
    with pytest.raises(lowrank.PatternError) as error:
        select(["**/q_porj/kernel", "m/**", "**/vv_proj/kernel"], paths, "targets")
    first, second = str(error.value).splitlines()[1:]
    assert "q_porj" in first
    assert "nearest paths are 'm/self_attn/q_proj/kernel'" in first
    assert "vv_proj" in second
    assert "nearest paths are 'm/self_attn/v_proj/kernel'" in second


def test_paths_of_every_container():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Point:
        x: jax.Array

    tree = {"a": [jnp.ones(1), {"b": jnp.ones(2)}], "c": (Point(jnp.ones(3)),), 7: jnp.ones(4)}
    tree = {"t": tree["a"], "u": tree["c"], "v": {7: tree[7]}}
    assert [path for path, _ in flatten(tree)[0]] == ["t/0", "t/1/b", "u/0/x", "v/7"]


def test_wrappers_add_no_key():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert [path for path, _ in flatten(state)[0]] == ["bias", "kernel"]
    boxed = {"kernel": nn.Partitioned(jnp.ones((2, 3)), (None, "model"))}
    assert [path for path, _ in flatten(boxed)[0]] == ["kernel"]


def test_paths_that_print_alike_are_refused():
    with pytest.raises(lowrank.TreeError, match="a/b"):
        flatten({"a": {"b": 1}, "a/b": 2})


def test_hash_is_the_same_everywhere():
    # a constant: were it another tomorrow, every adapter would start elsewhere
    assert hash_path("params/layers_0/q_proj/kernel") == 0x14B80BA6


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("q_proj", r"\(try '\*\*/q_proj/kernel'\)"),
        ("**/q_proj", r"\(try '\*\*/q_proj/kernel'\)"),
        ("*_proj", r"\(try '\*\*/\*_proj/kernel'\)"),
        ("attn/q_proj/kernel", r"\(try '\*\*/attn/q_proj/kernel'\)"),
        ("attn", r"\(try '\*\*/attn/\*\*'\)"),
        ("attn/q_porj/kernel", r"'\*\*' spans segments$"),  # nothing that would adapt everything
        ("**/hed/*", r"'\*\*' spans segments$"),
    ],
)
def test_a_pattern_that_misses_suggests_what_was_meant(pattern, words):
    paths = ["params/l_0/attn/q_proj/kernel", "params/l_0/attn/v_proj/kernel", "params/head/bias"]
    with pytest.raises(lowrank.PatternError, match=words):
        select([pattern], paths, "targets")


class QKV(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    value: jax.Array
    other: jax.Array


@struct.dataclass
class FlaxPair:
    value: jax.Array
    other: jax.Array


class MyParam(nnx.Param):
    pass


class Box(nn.meta.AxisMetadata, struct.PyTreeNode):
    value: jax.Array

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


def leaf(*shape):
    return np.ones(shape or (2, 2), np.float32)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.value = nnx.Linear(2, 2, rngs=rngs)
        self.query = nnx.Linear(2, 2, use_bias=False, rngs=rngs)


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"attn": QKV(leaf(), leaf(), leaf())}, ["attn/query", "attn/key", "attn/value"]),
        ({"a": Pair(leaf(), leaf())}, ["a/value", "a/other"]),
        ({"a": FlaxPair(leaf(), leaf())}, ["a/value", "a/other"]),
        (QKV(leaf(), leaf(), Pair(leaf(), leaf())), ["query", "key", "value/value", "value/other"]),
        ({"value": {"value": leaf()}}, ["value/value"]),
        ({"value": nnx.Param(leaf())}, ["value"]),
        ({"a": MyParam(leaf()), "b": nnx.BatchStat(leaf())}, ["a", "b"]),
        ({"a": nnx.Param({"value": leaf(), "b": leaf()})}, ["a/b", "a/value"]),
        ({"a": nnx.Param(QKV(leaf(), leaf(), leaf()))}, ["a/query", "a/key", "a/value"]),
        ({"a": nnx.Param(nn.Partitioned(leaf(), ("x", None)))}, ["a"]),
        ({"a": nn.LogicallyPartitioned(leaf(), ("x", None)), "b": Box(leaf())}, ["a", "b"]),
        ({"a": nn.Partitioned(Pair(leaf(), leaf()), ("x",))}, ["a/value", "a/other"]),
        (QKV(nnx.Param(leaf()), Box(leaf()), Pair(nnx.Param(leaf()), leaf())),
         ["query", "key", "value/value", "value/other"]),
        (nnx.state(Attention(nnx.Rngs(0))), ["query/kernel", "value/bias", "value/kernel"]),
        (Attention(nnx.Rngs(0)), ["query/kernel", "value/bias", "value/kernel"]),
    ],
)  # fmt: skip
def test_only_the_value_of_a_wrapper_adds_no_key(tree, paths):
    found, treedef = flatten(tree)
    assert [path for path, _ in found] == paths
    leaves, expected = jax.tree.flatten(tree)
    assert treedef == expected
    assert all(one is other for (_, one), other in zip(found, leaves, strict=True))
    _, dynamic, named = split_arguments((tree,), {"other": tree})
    assert [p for p in named if not p.startswith("other")] == paths
    assert [p.removeprefix("other/") for p in named if p.startswith("other")] == paths
    assert len(dynamic) == 2 * len(leaves)


def test_every_field_of_a_named_tuple_is_adapted():
    fn = lambda p, x: (x @ p["attn"].query, x @ p["attn"].key, x @ p["attn"].value)
    params = {"attn": QKV(leaf(), leaf(), leaf())}
    config = lowrank.LoraConfig(rank=1, targets="attn/*")
    base, lora = lowrank.init(jax.random.key(0), params, config)
    assert all(isinstance(node, lowrank.LowRank) for node in lora["attn"])
    plan = lowrank.plan(fn, params, leaf())
    assert [*plan] == ["attn/query", "attn/key", "attn/value"]
    report = lowrank.report(fn, lowrank.combine(base, lora), leaf())
    assert [*report] == ["attn/query", "attn/key", "attn/value"]


def test_a_leaf_stays_whole_within_and_without_a_wrapper():
    full = lowrank.Full(leaf())
    tree = {"a": nnx.Param(full), "b": full}
    assert [(p, x is full) for p, x in flatten(tree, is_leaf=is_node)[0]] == [
        ("a", True),
        ("b", True),
    ]
    found = flatten(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    assert [(p, type(x)) for p, x in found] == [("a", nnx.Param), ("b/value", np.ndarray)]


def test_flattening_is_linear_in_the_number_of_leaves():
    """Wrappers in wrappers are walked once: the number of calls of is_leaf says so."""
    calls = 0

    def is_leaf(_):
        nonlocal calls
        calls += 1
        return False

    counts = []
    for count in (50, 100):
        calls = 0
        flatten({i: nnx.Param(nn.Partitioned(leaf(), ())) for i in range(count)}, is_leaf)
        counts.append(calls)
    assert counts[1] < 2.1 * counts[0]
