"""Paths of leaves, patterns that select paths, and conversions between trees and {path: leaf}."""

from __future__ import annotations

import difflib
import functools
import hashlib
import heapq
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import CheckpointError, PatternError, TreeError, list_first_problems
from lowrank_jax._jax.statics import has_plain_keys
from lowrank_jax._jax.types import PyTree, TreeDef

ALL_LINEAR = "all-linear"

MAX_KEYS = 300  # in a path that to_nested_dict accepts
_COMPARED_CHARS = 100  # of a name, when similar names are searched for

Pattern = str | re.Pattern


def join_keys(keys: Sequence[Any]) -> str:
    """Join a key path with "/": (DictKey("layers"), SequenceKey(0)) is "layers/0"."""
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def flatten_with_keys(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
    """Flatten a tree into [(keys, leaf)] and its treedef; a Flax wrapper adds no "value" key.

    Wrappers are the boxes that Flax puts around arrays: nnx.Variable, nn.Partitioned and other
    nn.meta.AxisMetadata. In any other class a field named "value" is an ordinary key.
    """
    leaves, treedef = flatten_checked(jax.tree.flatten, tree, is_leaf)
    if has_plain_keys(treedef):
        return [*zip(list_keys(treedef), leaves, strict=True)], treedef
    keyed, treedef = flatten_checked(jax.tree_util.tree_flatten_with_path, tree, is_leaf)
    wrappers = find_wrappers()
    if wrappers and any(_is_value(key) for keys, _ in keyed for key in keys):
        keyed = list(_iterate_unwrapped((), tree, is_leaf or (lambda _: False), wrappers))
    return keyed, treedef


def _refuse_unsorted(
    keys: tuple[Any, ...], tree: PyTree, is_leaf: Callable[[Any], bool], error: Exception
) -> None:
    """Raise TreeError for a dict whose keys cannot be sorted, which JAX does to flatten it."""
    if is_leaf(tree):
        return
    if isinstance(tree, dict):
        try:
            sorted(tree)
        except TypeError:
            at = f"at {join_keys(keys)!r}" if keys else "at its root"
            kinds = " and ".join(sorted({type(key).__name__ for key in tree}))
            raise TreeError(
                f"a tree has a dict {at} whose keys are of types that cannot be sorted ({kinds}): "
                "JAX flattens a dict by its sorted keys; make them of one type, text say"
            ) from error
        children = [((jax.tree_util.DictKey(key),), child) for key, child in tree.items()]
    else:
        below = lambda other: other is not tree
        children = jax.tree_util.tree_leaves_with_path(tree, is_leaf=below)
    for key, child in children:
        if child is not tree:
            _refuse_unsorted((*keys, *key), child, is_leaf, error)


def flatten_checked(flatten: Callable, tree: PyTree, is_leaf: Callable[[Any], bool] | None) -> Any:
    """Call a flatten function of JAX; raise TreeError with the path of keys that it cannot sort."""
    try:
        return flatten(tree, is_leaf=is_leaf)
    except (TypeError, ValueError) as error:
        _refuse_unsorted((), tree, is_leaf or (lambda _: False), error)
        raise


@functools.lru_cache(maxsize=1024)
def list_keys(treedef: TreeDef) -> tuple[tuple[Any, ...], ...]:
    """Return the key path of each leaf of a structure without wrappers."""
    numbers = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    return tuple(keys for keys, _ in jax.tree_util.tree_leaves_with_path(numbers))


@functools.lru_cache(maxsize=1024)
def _list_paths(treedef: TreeDef) -> tuple[str, ...]:
    """Return the path of each leaf of a structure without wrappers."""
    return _check_unique([join_keys(keys) for keys in list_keys(treedef)])


def _check_unique(paths: Sequence[str]) -> tuple[str, ...]:
    """Return the paths; raise TreeError if two are equal."""
    if len({*paths}) != len(paths):
        twice = sorted(path for path, count in Counter(paths).items() if count > 1)
        raise TreeError(
            f"two leaves share the path {twice[0]!r}: keys with the same text, or keys with '/' in "
            "them, cannot be told apart by path; rename one of them"
        )
    return tuple(paths)


def find_wrappers() -> tuple[type, ...]:
    """Return the wrapper classes of Flax, or () if it is not imported."""
    of = lambda module, name: vars(sys.modules.get(module) or object).get(name)
    named = [
        ("flax.core.meta", "AxisMetadata"),
        ("flax.nnx", "Variable"),
        ("flax.nnx", "VariableState"),  # until Flax 0.12
    ]
    return tuple(kind for names in named if isinstance(kind := of(*names), type))


def _is_value(key: Any) -> bool:
    """Whether a key is the attribute "value"."""
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"


def _iterate_unwrapped(
    before: tuple[Any, ...],
    tree: PyTree,
    is_leaf: Callable[[Any], bool],
    wrappers: tuple[type, ...],
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield (keys, leaf) for each leaf of a tree, without the "value" keys of wrappers."""
    # {"w": nnx.Param(x)} has the leaf x at (w, value). Wrappers are leaves of the first traversal,
    # at (w,), and are then opened one level: the attribute "value" is dropped, so x is at (w,),
    # and any other child keeps its key. A wrapper within a wrapper is opened by recursion.
    closed = lambda node: isinstance(node, wrappers) or is_leaf(node)
    for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=closed):
        keys = (*before, *keys)
        if not isinstance(node, wrappers) or is_leaf(node):
            yield keys, node
            continue
        below = lambda other, node=node: other is not node  # one level: the wrapper's own children
        for (first, *rest), child in jax.tree_util.tree_leaves_with_path(node, is_leaf=below):
            own = (*keys, *rest) if _is_value(first) else (*keys, first, *rest)
            if isinstance(child, jax.Array):  # most are
                yield own, child
            else:
                yield from _iterate_unwrapped(own, child, is_leaf, wrappers)


def flatten(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """Flatten a tree into [(path, leaf)] and its treedef.

    Raises:
      TreeError: two leaves have the same path, or the keys of a dict cannot be sorted.
    """
    leaves, treedef = flatten_checked(jax.tree.flatten, tree, is_leaf)
    if has_plain_keys(treedef):
        return [*zip(_list_paths(treedef), leaves, strict=True)], treedef
    keyed, treedef = flatten_with_keys(tree, is_leaf)
    paths = _check_unique([join_keys(keys) for keys, _ in keyed])
    return [(path, leaf) for path, (_, leaf) in zip(paths, keyed, strict=True)], treedef


def rename_legacy_paths(saved: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """Rename saved leaves to the wanted paths if they differ only in keys named "value".

    Files of older releases lack such a key at the end of a path, and have that of a wrapper in
    the middle.
    """
    bare = lambda path: tuple(key for key in path.split("/") if key != "value")
    wanted = set(wanted)
    lost = [path for path in saved if path not in wanted]
    new = [path for path in wanted if path not in saved]
    old = {bare(path): path for path in lost}
    names = {bare(path): path for path in new}
    if len(old) < len(lost) or len(names) < len(new):
        return dict(saved)
    place = {old[key]: path for key, path in names.items() if key in old}
    return {place.get(path, path): leaf for path, leaf in saved.items()}


def hash_path(path: str) -> int:
    """Return a 32-bit hash of a path that is the same in every process and on every host."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=4).digest(), "big")


def check_pattern(pattern: object) -> None:
    """Raise PatternError if a value is not a pattern."""
    if isinstance(pattern, re.Pattern):
        if not isinstance(pattern.pattern, str):
            raise PatternError(f"pattern {pattern!r} is a bytes regex; compile it from a str")
    elif not isinstance(pattern, str) or not pattern:
        raise PatternError(
            "a pattern is a non-empty glob string or a compiled re.Pattern, not "
            f"{quote_value(pattern)}"
        )
    elif "" in pattern.split("/"):
        raise PatternError(
            f"pattern {quote_value(pattern)} has an empty segment: paths have no leading, trailing "
            "or doubled '/'"
        )


def compile_pattern(pattern: Pattern) -> re.Pattern:
    """Compile a glob on the whole path: `*` stays within a segment, `**` spans zero or more."""
    check_pattern(pattern)
    return pattern if isinstance(pattern, re.Pattern) else _compile_glob(pattern)


@functools.lru_cache(maxsize=1024)
def _compile_glob(pattern: str) -> re.Pattern:
    # "a/**/b" becomes "a/(?:[^/]+/)*b": `**` includes the slash that follows it, so that it also
    # matches zero segments, "a/b". A final `**` has no such slash and is handled below.
    segments = pattern.split("/")
    regex = ""
    for index, segment in enumerate(segments):
        last = index == len(segments) - 1
        if segment == "**":
            regex += (
                ".*" if last and index == 0 else "(?:[^/]+(?:/[^/]+)*)?" if last else "(?:[^/]+/)*"
            )
        else:
            body = re.escape(segment).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
            regex += body if last else body + "/"
    # "x/**" also matches "x" itself: zero segments
    if len(segments) > 1 and segments[-1] == "**":
        regex = regex.replace("/(?:[^/]+(?:/[^/]+)*)?", "(?:/[^/]+)*")
    return re.compile(regex)


def matches(pattern: Pattern, path: str) -> bool:
    """Whether a pattern matches the whole path.

    >>> matches("layers_*/**/kernel", "layers_0/mlp/up/kernel")
    True
    >>> matches("*/kernel", "layers_0/mlp/kernel")
    False
    """
    return compile_pattern(pattern).fullmatch(path) is not None


def find_nearest_paths(pattern: Pattern, paths: Iterable[str], count: int = 3) -> list[str]:
    """Return the paths most similar to a pattern, for error messages."""
    text = str(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)[:_COMPARED_CHARS]
    names = [name for name in text.split("/") if name.strip("*.?")] or [text]
    similarity = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
    score = lambda path: sum(
        max(similarity(n, part) for part in path[:_COMPARED_CHARS].split("/")) for n in names
    )
    return sorted(_preselect(text, paths), key=score, reverse=True)[:count]


def find_nearest_names(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Return the names most similar to a name, for error messages."""
    name = name[:_COMPARED_CHARS]
    score = lambda other: difflib.SequenceMatcher(None, other[:_COMPARED_CHARS], name).ratio()
    return sorted(_preselect(name, names), key=score, reverse=True)[:count]


def _preselect(text: str, names: Iterable[str], count: int = 100) -> list[str]:
    """Return the names that share the most character trigrams with a text: a cheap first filter."""
    names = [*names]
    if len(names) <= count:
        return names
    triples = {text[i : i + 3] for i in range(len(text) - 2)}
    shared = lambda name: sum(triple in name[:_COMPARED_CHARS] for triple in triples)
    return heapq.nlargest(count, names, key=shared)


def make_no_match_error(pattern: Pattern, paths: Sequence[str], what: str) -> PatternError:
    """Make the error for a pattern that matches no leaf."""
    shown = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    if not paths:
        return PatternError(f"{what} pattern {shown!r} matches nothing: the tree has no leaves")
    near = ", ".join(repr(path) for path in find_nearest_paths(pattern, paths))
    return PatternError(
        f"{what} pattern {shown!r} matches none of the {len(paths)} leaves; the nearest paths are "
        f"{near}. A pattern is matched against the whole path: '*' stays within one segment, "
        f"'**' spans segments{_suggest_glob(pattern, paths)}"
    )


def _suggest_glob(pattern: Pattern, paths: Sequence[str]) -> str:
    """Return a hint with the glob that was probably meant: the same words at another depth."""
    if isinstance(pattern, re.Pattern):
        return ""
    words = pattern.removeprefix("**/").removesuffix("/**")
    for glob in (f"**/{words}", f"**/{words}/kernel", f"**/{words}/**"):
        if words.strip("*/") and any(map(compile_pattern(glob).fullmatch, paths)):
            return f" (try {glob!r})"
    return ""


def select(patterns: Iterable[Pattern], paths: Sequence[str], what: str) -> dict[str, Pattern]:
    """Map each path that a pattern matches to the first such pattern.

    Raises:
      PatternError: a pattern matches no path; the message lists the most similar paths.
    """
    chosen: dict[str, Pattern] = {}
    missed = []
    for pattern in patterns:
        regex = compile_pattern(pattern)
        hits = [path for path in paths if regex.fullmatch(path)]
        if not hits:
            missed.append(pattern)
        for path in hits:
            chosen.setdefault(path, pattern)
    if len(missed) == 1:
        raise make_no_match_error(missed[0], paths, what)
    if missed:
        text = list_first_problems(
            (str(make_no_match_error(p, paths, what)) for p in missed), len(missed)
        )
        raise PatternError(f"{len(missed)} patterns match nothing:\n{text}")
    return chosen


def unflatten_by_path(
    tree: PyTree, leaves: dict[str, Any], is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Rebuild the structure of a tree from {path: leaf}; a missing leaf becomes None."""
    own, treedef = flatten(tree, is_leaf=is_leaf)
    return jax.tree.unflatten(treedef, [leaves.get(path) for path, _ in own])


def to_nested_dict(leaves: dict[str, Any]) -> Any:
    """Convert {path: leaf} to nested dicts; {"": leaf} is the leaf itself.

    >>> to_nested_dict({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}

    Raises:
      CheckpointError: a path has more than MAX_KEYS keys, or is both a leaf and a branch.
    """
    if set(leaves) == {""}:
        return leaves[""]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        if len(parents) > MAX_KEYS:
            raise CheckpointError(f"{path[:80]!r}... has more than {MAX_KEYS} keys")
        inner = tree
        for key in parents:
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last in inner:
            raise CheckpointError(f"{path!r} is a leaf and a branch (a '/' in a key): rename it")
        inner[last] = leaf
    return tree
