"""Save an adapter, its config and optimizer state; restore them onto the base they belong to.

On disk: `manifest.json` and one Orbax directory of arrays, `arrays-<id>`, which the manifest names,
with the SHA-256 of each of its files and arrays. The arrays are addressed by the paths of leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import operator
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._configs import LoraConfig
from lowrank_jax._errors import CheckpointError, LowrankError, TreeError, listing
from lowrank_jax._fingerprint import Fingerprint, fingerprint, sha256, to_host
from lowrank_jax._nodes import Adapted, Full, LowRank, is_node
from lowrank_jax._paths import flatten

_FORMAT, _VERSION = "lowrank_jax.checkpoint", 1
_MANIFEST = "manifest.json"
_FOLDER = re.compile(r"arrays-[0-9a-f]{32}")
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
    """A saved array: its name in the Orbax tree, its host form, and what it is to become."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    form: str
    sha256: str

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
        raise CheckpointError("save runs in one process; this program has several")
    arrays: dict[str, np.ndarray] = {}
    with _as_checkpoint_error():
        nodes = _nodes(lora)
        if base is not None and not isinstance(base, Fingerprint):
            _check_shapes(nodes, _shapes(base), "base")
            base = fingerprint(base)
        body = {
            "step": None if step is None else operator.index(step),
            "config": config.to_dict(),
            "base": None if base is None else base.to_dict(),
            "lora": [_node_entry(path, node, arrays) for path, node in nodes.items()],
            "opt_state": None,
        }
        if opt_state is not None:
            body["opt_state"] = [
                {"path": path.split("/"), **_entry(f"opt_state/{path}", leaf, arrays)}
                for path, leaf in flatten(opt_state)[0]
            ]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _sync(directory.parent)
        with _locked(directory):
            _clean(directory)
            try:
                _commit(directory, body, arrays)
            finally:
                _clean(directory)
    except LowrankError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{directory} could not be written, and an older checkpoint there is as it was "
            f"({type(error).__name__}): {error}"
        ) from error


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
    ...         print(str(error).splitlines()[-1])
    None
      - bias: other values
    """
    directory = _path(directory)
    body = _read_manifest(directory)
    with _as_checkpoint_error():
        while True:
            try:
                return _restored(directory, body, base, like, check_base)
            except CheckpointError:
                body, old = _read_manifest(directory), body
                if body == old:  # else a save replaced the arrays meanwhile
                    raise


def _restored(directory: Path, body: dict, base: Any, like: Any, check_base: bool) -> Checkpoint:
    """Fit the manifest's entries to base and like; only then read the arrays."""
    try:
        config = LoraConfig.from_dict(body["config"])
        trained_on = None if body["base"] is None else Fingerprint.from_dict(body["base"])
        nodes = {"/".join(entry["path"]): _entry_node(entry) for entry in body["lora"]}
        states = {"/".join(e["path"]): _entry_array(e) for e in body["opt_state"] or ()}
        step = None if body["step"] is None else operator.index(body["step"])
        files = {name: (int(size), str(sha)) for name, (size, sha) in body["files"].items()}
        folder = _FOLDER.fullmatch(body["arrays"]).group()
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, re.error) as error:
        raise CheckpointError(
            f"{directory / _MANIFEST} is malformed ({type(error).__name__}: {error}): it was not "
            "written by lowrank_jax.checkpoint.save; restore another copy"
        ) from error
    if base is not None:
        _check_base(nodes, trained_on, base, check_base)
    like_lora, like_state = (
        like.get(name) if isinstance(like, Mapping) else getattr(like, name, None)
        for name in ("lora", "opt_state")
    )
    shardings: dict[str, Any] = {}
    if like_lora is not None:
        wanted = _nodes(like_lora)
        _check_like("lora", _parts(wanted), _parts(nodes), shardings)
        _check_static(wanted, nodes)
        lora = _in_structure(like_lora, nodes)
    elif base is not None and not isinstance(base, Fingerprint):
        lora = _in_structure(base, nodes)
    else:
        lora = _nested(nodes)
    state = None if body["opt_state"] is None else _nested(states)
    if like_state is not None:
        _check_like("opt_state", dict(flatten(like_state)[0]), states, shardings)
        state = _in_structure(like_state, states)
    entries = [*_parts(nodes).values(), *states.values()]
    arrays = _read_arrays(directory / folder, files, {entry.name: entry for entry in entries})
    load = lambda entry: _loaded(entry, arrays[entry.name], shardings.get(entry.name))
    return Checkpoint(
        jax.tree.map(load, lora), config, jax.tree.map(load, state), step, trained_on
    )


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


def _shapes(base: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a base's leaves by path; a tree that holds adapters is refused."""
    leaves = flatten(base, is_leaf=is_node)[0]
    if adapted := [path for path, leaf in leaves if isinstance(leaf, LowRank | Full | Adapted)]:
        raise TreeError(
            f"base holds an adapter at {adapted[0]!r}: pass the frozen tree (lowrank.partition "
            "takes a combined one apart)"
        )
    return {path: tuple(np.shape(leaf)) for path, leaf in leaves}


def _in_structure(tree: Any, leaves: dict[str, Any]) -> Any:
    """A tree's structure with these at its leaves, None where there is none."""
    own, treedef = flatten(tree, is_leaf=is_node)
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
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return tree
