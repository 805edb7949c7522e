"""Save an adapter, its config and optimizer state; restore them onto the base they belong to.

On disk: `manifest.json` and one Orbax directory of arrays, `arrays-<id>`, which the manifest names,
with the SHA-256 of each of its files and arrays. The arrays are addressed by the paths of leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._configs import LoraConfig
from lowrank_jax._errors import AxesError, CheckpointError, TreeError, listing
from lowrank_jax._fingerprint import (
    Fingerprint,
    differences,
    fingerprint,
    read_archive,
    read_manifest,
    to_host,
    write_archive,
)
from lowrank_jax._nodes import Adapted, Full, LowRank, is_node
from lowrank_jax._paths import flatten

_NODES = {"LowRank": LowRank, "Full": Full}
_SCALARS = {"bool": bool, "int": int, "float": float}
_KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """What restore returns.

    Args:
      lora: the adapter.
      config: its LoraConfig.
      opt_state: the optimizer's state, or None where none was saved.
      step: the step, or None.
      fingerprint: of the base it was trained on, or None: pass it to the next save as `base`.
    """

    lora: Any
    config: LoraConfig
    opt_state: Any = None
    step: int | None = None
    fingerprint: Fingerprint | None = None


@dataclasses.dataclass(frozen=True)
class _Array:
    """A saved array, not yet read: its name in the archive, and what it is to become."""

    name: str
    form: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        """Number of axes: a node that holds entries knows its dense shape."""
        return len(self.shape)


def save(
    directory: str | os.PathLike,
    *,
    lora: Any,
    config: LoraConfig,
    base: Any = None,
    opt_state: Any = None,
    step: int | None = None,
) -> None:
    """Save adapters (not the base) by Orbax, replacing an older checkpoint atomically.

    Killed at any instant, one whole checkpoint, the old or the new, is at the path, because one
    rename decides: (1) the arrays are written into a new directory, beside those in use; (2) they
    are hashed and flushed to disk; (3) a new manifest, which names that directory, is written
    under another name and flushed; (4) `os.replace` puts it in the old manifest's place; (5) the
    arrays that no manifest names are removed. What a killed save leaves, no manifest names: the
    next save removes it. A failed save leaves the old checkpoint as it was. A lock, which dies with
    its process, keeps a second writer out; a reader that meets a save reads the new one.

    Args:
      directory: a path on a local or mounted file system; made where missing. Files in it that are
        not a checkpoint's are left alone.
      lora: the adapter: LowRank and Full nodes, None elsewhere, in any containers.
      config: its LoraConfig.
      base: the frozen tree, or `lowrank.fingerprint(base)` computed once; restore then refuses
        another base. None: restore can check shapes only.
      opt_state: the optimizer's state, any pytree of arrays, typed PRNG keys and numbers.
      step: a number to find again.

    Raises:
      CheckpointError: lora is no adapter or not one of this base, a leaf has no values, another
        process is saving there, or the file system refused.

    Source: the layout is this library's own; the arrays are Orbax's (PyTreeCheckpointHandler).

    >>> import tempfile
    >>> config = LoraConfig(rank=2, targets="w")
    >>> lora = {"w": LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), scale=2.0), "bias": None}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora=lora, config=config, step=7)
    ...     found = restore(directory)
    >>> found.step, found.config == config, found.lora["w"].shape, found.lora["w"].scale
    (7, True, (4, 3), 2.0)
    """
    directory = _path(directory)
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"config is a {type(config).__name__}; pass the LoraConfig of lora")
    if step is not None and (not hasattr(step, "__index__") or isinstance(step, bool)):
        raise CheckpointError(f"step is {step!r}; pass an integer or None")
    if jax.process_count() > 1:
        raise CheckpointError("save works in a program of one process; this one has several")
    arrays: dict[str, np.ndarray] = {}
    with _checkpoint_errors("nothing was written"):
        nodes = _nodes(lora)
        if base is not None and not isinstance(base, Fingerprint):
            _check_shapes(nodes, base)
            base = fingerprint(base)
        body = {
            "step": None if step is None else operator.index(step),
            "config": config.to_dict(),
            "base": None if base is None else base.to_dict(),
            "lora": [_write_node(path, node, arrays) for path, node in nodes.items()],
            "opt_state": None,
        }
        if opt_state is not None:
            body["opt_state"] = [
                {"path": path.split("/"), **_write(f"opt_state/{path}", leaf, arrays)}
                for path, leaf in flatten(opt_state)[0]
            ]
    with _checkpoint_errors(f"{directory} could not be written; an older checkpoint is as it was"):
        write_archive(directory, body, arrays)


def restore(
    directory: str | os.PathLike, *, base: Any = None, like: Any = None, check_base: bool = True
) -> Checkpoint:
    """Restore what save wrote, every byte verified before it is used; nothing is unpickled.

    Args:
      directory: the path given to save.
      base: the frozen tree: lora comes in its structure, None where untouched, and another base
        than the one trained on is refused. Its fingerprint is enough for the check alone.
      like: a mapping or object with `lora` and/or `opt_state`: arrays or ShapeDtypeStructs, whose
        structure, and sharding where they have one, the result takes; shapes, dtypes, axes and
        scales must be those saved.
      check_base: False takes another base, as long as the shapes fit.

    Returns:
      A Checkpoint. Without base and like.lora, lora is nested dicts by path with nodes at the
      adapted leaves; without like.opt_state, opt_state is nested dicts of arrays.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged or of an unknown version, or it does
        not fit base or like; all that is wrong is listed.

    Source: the layout is this library's own; the arrays are Orbax's (PyTreeCheckpointHandler).

    >>> import tempfile
    >>> params = {"w": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    >>> lora = {"w": LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3))), "bias": None}
    >>> config = LoraConfig(rank=2, targets="w")
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora=lora, config=config, base=params)
    ...     print(restore(directory, base=params).lora["bias"])
    ...     try:
    ...         restore(directory, base={**params, "bias": jnp.ones(3)})
    ...     except CheckpointError as error:
    ...         print(str(error).split(":")[0])
    None
    this base is not the one the adapter was trained on
    """
    directory = _path(directory)
    while True:
        body = read_manifest(directory)
        try:
            return _restored(directory, body, base, like, check_base)
        except CheckpointError:
            if body == read_manifest(directory):
                raise
            # a save replaced the arrays while they were read: take the new ones


def _restored(directory: Path, body: dict, base: Any, like: Any, check_base: bool) -> Checkpoint:
    """Fit the manifest's entries to base and like; only then read the arrays."""
    with _checkpoint_errors(f"the manifest in {directory} is malformed: not written by save"):
        config = LoraConfig.from_dict(body["config"])
        trained_on = None if body["base"] is None else Fingerprint.from_dict(body["base"])
        step = None if body["step"] is None else operator.index(body["step"])
        nodes = {"/".join(entry["path"]): _read_node(entry, body) for entry in body["lora"]}
        states = {"/".join(e["path"]): _read(e, body) for e in body["opt_state"] or ()}
        _dense_shapes(nodes)
    get = like.get if isinstance(like, Mapping) else lambda name: getattr(like, name, None)
    like_lora, like_state, shardings = get("lora"), get("opt_state"), {}
    with _checkpoint_errors(f"the checkpoint at {directory} does not fit"):
        if base is not None:
            _check_base(nodes, trained_on, base, check_base)
        if like_lora is not None:
            wanted = _nodes(like_lora)
            shardings |= _fit("lora", _parts(wanted), _parts(nodes), _statics(wanted, nodes))
            lora = _in_structure(like_lora, nodes, is_node)
        elif base is not None and not isinstance(base, Fingerprint):
            lora = _in_structure(base, nodes, is_node)
        else:
            lora = _nested(nodes)
        if like_state is not None:
            shardings |= _fit("opt_state", dict(flatten(like_state)[0]), states)
            state = _in_structure(like_state, states)
        else:
            state = None if body["opt_state"] is None else _nested(states)
    with _checkpoint_errors(f"the arrays at {directory} could not be read"):
        arrays = read_archive(directory, body)
    load = lambda entry: _loaded(entry, arrays[entry.name], shardings.get(entry.name))
    return Checkpoint(jax.tree.map(load, lora), config, jax.tree.map(load, state), step, trained_on)


@contextlib.contextmanager
def _checkpoint_errors(what: str) -> Iterator[None]:
    """Every error as a CheckpointError; the library's own keep their words."""
    try:
        yield
    except CheckpointError:
        raise
    except (TreeError, AxesError) as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:
        raise CheckpointError(f"{what} ({type(error).__name__}: {error})") from error


def _path(directory: str | os.PathLike) -> Path:
    """The directory as an absolute path, which Orbax asks for."""
    text = os.fspath(directory)
    if not isinstance(text, str) or "://" in text:
        raise CheckpointError(f"{text!r} is no path on a local or mounted file system")
    return Path(os.path.abspath(text))


# What a tree holds, by path


def _nodes(lora: Any) -> dict[str, Any]:
    """The nodes of an adapter by path."""
    nodes = dict(flatten(lora, is_leaf=is_node)[0])
    for path, node in nodes.items():
        if not isinstance(node, LowRank | Full):
            hint = "lowrank.partition(tree)[1]" if isinstance(node, Adapted) else "init's second"
            raise CheckpointError(
                f"lora holds {type(node).__name__} at {path!r}, where LowRank, Full or None is "
                f"expected: pass the adapter ({hint})"
            )
    if not nodes:
        raise CheckpointError("lora holds no adapter: pass the second result of init")
    return nodes


def _parts(nodes: dict[str, Any]) -> dict[str, Any]:
    """The arrays of nodes, by path and field."""
    return {
        f"{path}/{field.name}": getattr(node, field.name)
        for path, node in nodes.items()
        for field in dataclasses.fields(node)
        if not field.metadata.get("static") and getattr(node, field.name) is not None
    }


def _in_structure(tree: Any, leaves: dict[str, Any], is_leaf: Any = None) -> Any:
    """A tree's structure with these at its leaves, None where there is none."""
    own, treedef = flatten(tree, is_leaf=is_leaf)
    return jax.tree.unflatten(treedef, [leaves.get(path) for path, _ in own])


def _nested(leaves: dict[str, Any]) -> Any:
    """Nested dicts by path; the leaf itself where the tree was one leaf."""
    if set(leaves) == {""}:
        return leaves[""]
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        inner = tree
        for key in parents:
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last in inner:
            raise CheckpointError(f"{path!r} is a leaf and a branch (a '/' in a key): rename it")
        inner[last] = leaf
    return tree


def _dense_shapes(nodes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves that nodes are for, without the axis of a stack of adapters."""
    extra = [
        node.a.ndim - 1 - len(node.stack) - len(node.fan_in)
        for node in nodes.values()
        if isinstance(node, LowRank)
    ]
    cut = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[max(extra, default=0) :], jnp.float32)
    return {path: jax.tree.map(cut, node).shape for path, node in nodes.items()}


# Entries of the manifest


def _write(name: str, leaf: Any, arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Put a leaf's values among the arrays; return its entry."""
    name = quote(name, errors="surrogatepass")
    arrays[name] = to_host(name, leaf)
    return {"name": name, "form": _form(leaf)}


def _form(leaf: Any) -> str:
    """What an array is to become again: a JAX array (weakly typed or not), a PRNG key, a number."""
    dtype = getattr(leaf, "dtype", None)
    if type(leaf).__name__ in _SCALARS:
        return type(leaf).__name__
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return str(dtype)
    return "weak" if getattr(leaf, "weak_type", False) and not leaf.shape else "array"


def _read(entry: Mapping, body: Mapping) -> _Array:
    """The array of an entry."""
    if entry["form"] not in {"array", "weak", *_SCALARS, *_KEYS}:
        raise CheckpointError(
            f"{entry['name']!r} is a {entry['form']!r}, unknown to this lowrank_jax"
        )
    shape, dtype, _ = body["arrays"][entry["name"]]
    if entry["form"] in _KEYS:  # what it will be, not the words it is stored as
        shape, dtype = shape[:-1], entry["form"]
    return _Array(entry["name"], entry["form"], tuple(shape), dtype)


def _write_node(path: str, node: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The entry of a node: its path, type, static fields and arrays."""
    parts = _parts({"": node}).items()
    return {
        "path": path.split("/"),
        "type": type(node).__name__,
        "static": _static(type(node), vars(node)),
        "arrays": {name[1:]: _write(f"lora/{path}{name}", leaf, arrays) for name, leaf in parts},
    }


def _read_node(entry: Mapping, body: Mapping) -> Any:
    """The node of an entry, holding arrays not yet read."""
    kind = _NODES[entry["type"]]
    arrays = {name: _read(part, body) for name, part in entry["arrays"].items()}
    return kind(**arrays, **_static(kind, entry["static"]))


def _static(kind: type, values: Mapping) -> dict[str, Any]:
    """The static fields of a node, as plain values of the fields' own types."""
    plain = {}
    for field in dataclasses.fields(kind):
        if field.metadata.get("static"):
            value, default = values[field.name], field.default
            axes = isinstance(default, tuple)
            plain[field.name] = (
                tuple(operator.index(axis) for axis in value) if axes else type(default)(value)
            )
    return plain


def _loaded(entry: _Array, array: np.ndarray, sharding: Any) -> Any:
    """The leaf of an array: placed by a sharding if there is one."""
    if entry.form in _SCALARS:
        return _SCALARS[entry.form](array)
    if entry.form in _KEYS:
        leaf = jax.random.wrap_key_data(jnp.array(array), impl=_KEYS[entry.form])
    elif jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array  # 64-bit numbers, of NumPy, in a program of 32-bit ones
    else:
        leaf = jnp.asarray(array.item()) if entry.form == "weak" else jnp.array(array)
        leaf = leaf if leaf.dtype == array.dtype else jnp.array(array)
    return leaf if sharding is None else jax.device_put(leaf, sharding)


# Checks: all that is wrong, in one error


def _refuse(why: str, problems: list[str]) -> None:
    """Raise one error with all problems, if there are any."""
    if problems:
        raise CheckpointError(f"{why}:\n{listing(problems)}")


def _check_shapes(nodes: dict[str, Any], base: Any) -> None:
    """The adapter's leaves are the base's, and of their shapes."""
    leaves = dict(flatten(base, is_leaf=is_node)[0])
    if adapted := [p for p, leaf in leaves.items() if isinstance(leaf, LowRank | Full | Adapted)]:
        raise CheckpointError(
            f"base holds an adapter at {adapted[0]!r}: pass the frozen tree (lowrank.partition "
            "takes a combined one apart)"
        )
    _refuse(
        "the adapter does not fit the base: pass the base it was trained on, at the same level",
        differences(
            {path: str(np.shape(leaves[path])) for path in nodes if path in leaves},
            {path: str(shape) for path, shape in _dense_shapes(nodes).items()},
        ),
    )


def _check_base(nodes: dict[str, Any], trained_on: Any, base: Any, check: bool) -> None:
    """The base is the one trained on, as far as that is known."""
    if check and trained_on is not None:
        own = base if isinstance(base, Fingerprint) else fingerprint(base)
        _refuse(
            "this base is not the one the adapter was trained on: pass that one, or "
            "check_base=False to take this one all the same",
            trained_on.differences(own),
        )
    if not isinstance(base, Fingerprint):
        _check_shapes(nodes, base)


def _statics(wanted: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Differences in axes, kind and scale of the nodes that both have."""
    both = {path for path in wanted if type(saved.get(path)) is type(wanted[path])}
    show = lambda nodes: {
        f"{path}.{name}": repr(value)
        for path in both
        for name, value in _static(type(nodes[path]), vars(nodes[path])).items()
    }
    return differences(show(wanted), show(saved))


def _fit(what: str, wanted: dict[str, Any], saved: dict[str, Any], more: Any = ()) -> dict:
    """Refuse saved leaves that are not those wanted; return the shardings wanted, by name."""
    wanted = {p: np.asarray(v) if _form(v) in _SCALARS else v for p, v in wanted.items()}
    show = lambda leaves: {p: f"{leaf.dtype}{list(leaf.shape)}" for p, leaf in leaves.items()}
    _refuse(
        f"the saved {what} is not that of like.{what}: restore without it and convert, or make it "
        "by the config and optimizer of the checkpoint",
        differences(show(wanted), show(saved)) + list(more),
    )
    # an uncommitted array is where it is by default only
    placed = {
        p: getattr(v, "sharding", None) for p, v in wanted.items() if getattr(v, "committed", True)
    }
    return {saved[path].name: sharding for path, sharding in placed.items()}
