"""Paths and patterns."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import lowrank_jax as lowrank
from lowrank_jax._paths import flatten, matches, path_hash, select


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
    assert path_hash("params/layers_0/q_proj/kernel") == 0x14B80BA6


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
