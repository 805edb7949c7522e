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

import jax
import numpy as np

from lowrank_jax._checks.arguments import checked, integer_like
from lowrank_jax._errors import AxesError, CheckpointError, TreeError
from lowrank_jax._jax.paths import flatten, in_structure, nested, renamed
from lowrank_jax._jax.processes import by_the_first
from lowrank_jax._nodes import is_node, nodes_of
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._trees.fingerprint import Fingerprint, fingerprint
from lowrank_jax.checkpoint._archive import has_manifest, read_archive, read_manifest, write_archive
from lowrank_jax.checkpoint._background import Saving, settle
from lowrank_jax.checkpoint._entries import (
    loaded,
    parts_of,
    read_body,
    write_entries,
    write_node,
)
from lowrank_jax.checkpoint._fitting import (
    dense_shapes,
    fitted,
    refuse_malformed,
    refuse_misshapen,
    refuse_other_base,
    static_differences,
)

__all__ = ["Checkpoint", "Saving", "exists", "restore", "save", "save_async"]


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """What restore returns.

    Args:
      lora: the adapter.
      config: its LoraConfig.
      opt_state: the optimizer's state, or None where none was saved.
      step: the step, or None.
      fingerprint: of the base it was trained on, or None: pass it to the next save as `base`.
      extra: what else was saved, or None.
    """

    lora: Any
    config: LoraConfig
    opt_state: Any = None
    step: int | None = None
    fingerprint: Fingerprint | None = None
    extra: Any = None


@checked(CheckpointError, step=integer_like)
def save(
    directory: str | os.PathLike,
    *,
    lora: Any,
    config: LoraConfig,
    base: Any = None,
    opt_state: Any = None,
    step: int | None = None,
    extra: Any = None,
) -> None:
    """Save adapters (not the base) by Orbax, replacing an older checkpoint atomically.

    Killed at any instant, one whole checkpoint, the old or the new, is at the path, because one
    rename decides: (1) the arrays are written into a new directory, beside those in use; (2) they
    are hashed and flushed to disk; (3) a new manifest, which names that directory, is written
    under another name and flushed; (4) one rename puts it in the old manifest's place; (5) the
    arrays that no manifest names are removed. What a killed save leaves, no manifest names: the
    next save removes it. A failed save leaves the old checkpoint as it was. A lock, which dies with
    its process, keeps a second writer out; a reader that meets a save reads the new one. In a
    program of several processes all call save, and process 0 writes.

    Args:
      directory: a path on a local or mounted file system; made where missing. Files in it that are
        not a checkpoint's are left alone.
      lora: the adapter: LowRank and Full nodes, None elsewhere, in any containers.
      config: its LoraConfig.
      base: the frozen tree, or `lowrank.fingerprint(base)` computed once; restore then refuses
        another base. None: restore can check shapes only.
      opt_state: the optimizer's state, any pytree of arrays, typed PRNG keys and numbers.
      step: a number to find again.
      extra: what else a run goes on from, as the place in its data and its PRNG keys: any pytree
        as of opt_state.

    Raises:
      CheckpointError: lora is no adapter or not one of this base, a leaf has no values, another
        process is saving there, the file system refused, or an earlier save_async there failed.

    Source: the layout is this library's own; the arrays are Orbax's (PyTreeCheckpointHandler).

    >>> import tempfile
    >>> import jax.numpy as jnp, lowrank_jax as lowrank
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> lora = {"w": lowrank.LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), scale=2.0), "bias": None}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora=lora, config=config, step=7)
    ...     found = restore(directory)
    >>> found.step, found.config == config, found.lora["w"].shape, found.lora["w"].scale
    (7, True, (4, 3), 2.0)
    """
    directory = _path(directory)
    settle(directory)
    body, arrays = _contents(lora, config, base, opt_state, step, extra)
    by_the_first(lambda: _write(directory, body, arrays))


@checked(CheckpointError, step=integer_like)
def save_async(
    directory: str | os.PathLike,
    *,
    lora: Any,
    config: LoraConfig,
    base: Any = None,
    opt_state: Any = None,
    step: int | None = None,
    extra: Any = None,
) -> Saving:
    """Save as `save` does, but write in a thread while training goes on.

    The values are copied to the host before it returns: what is done to the arrays afterwards
    (donated, deleted, changed) does not matter. An earlier save_async to the same path comes to
    its end first. A program that ends finishes its saves.

    Args:
      directory: a path on a local or mounted file system.
      lora: the adapter.
      config: its LoraConfig.
      base: the frozen tree, or `lowrank.fingerprint(base)`: the tree is hashed before this returns.
      opt_state: the optimizer's state.
      step: a number to find again.
      extra: what else a run goes on from.

    Returns:
      A handle: `wait()` returns once the checkpoint is whole, and raises the error if there was
      one, as does the next save to the same path.

    Raises:
      CheckpointError: what save finds wrong before it writes, or an earlier save_async failed.

    Source: the layout is this library's own; the arrays are Orbax's (PyTreeCheckpointHandler).

    >>> import tempfile
    >>> import jax.numpy as jnp, lowrank_jax as lowrank
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> lora = {"w": lowrank.LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)))}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     saving = save_async(directory, lora=lora, config=config, step=7)
    ...     lora["w"].a.delete()
    ...     saving.wait()
    ...     restore(directory).step
    7
    """
    directory = _path(directory)
    if jax.process_count() > 1:
        raise CheckpointError("save_async works in a program of one process: call save in all")
    settle(directory)
    body, arrays = _contents(lora, config, base, opt_state, step, extra)
    arrays = {name: array.copy() for name, array in arrays.items()}
    return Saving(directory, lambda: _write(directory, body, arrays))


def _contents(
    lora: Any, config: LoraConfig, base: Any, opt_state: Any, step: int | None, extra: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest's body and the arrays of what is to be saved, checked."""
    arrays: dict[str, np.ndarray] = {}
    with _checkpoint_errors("nothing was written"):
        nodes = nodes_of(lora)
        refuse_malformed(nodes)
        if base is not None and not isinstance(base, Fingerprint):
            refuse_misshapen(nodes, base)
            base = fingerprint(base)
        body = {
            "step": None if step is None else operator.index(step),
            "config": config.to_dict(),
            "base": None if base is None else base.to_dict(),
            "lora": [write_node(path, node, arrays) for path, node in nodes.items()],
            "opt_state": write_entries("opt_state", opt_state, arrays),
            "extra": write_entries("extra", extra, arrays),
        }
    return body, arrays


def _write(directory: Path, body: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Replace the checkpoint at a directory."""
    with _checkpoint_errors(f"{directory} could not be written; an older checkpoint is as it was"):
        write_archive(directory, body, arrays)


@checked(CheckpointError)
def exists(directory: str | os.PathLike) -> bool:
    """Whether there is a checkpoint: False until the first save there has come to its end.

    Args:
      directory: the path given to save.

    Returns:
      True where restore finds a checkpoint, though it may find it damaged.

    Source: a checkpoint is there when its manifest is, the last file that save writes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     exists(directory)
    False
    """
    return has_manifest(_path(directory))


@checked(CheckpointError)
def restore(
    directory: str | os.PathLike, *, base: Any = None, like: Any = None, check_base: bool = True
) -> Checkpoint:
    """Restore what save wrote, every byte verified before it is used; nothing is unpickled.

    Args:
      directory: the path given to save.
      base: the frozen tree: lora comes in its structure, None where untouched, and another base
        than the one trained on is refused. Its fingerprint is enough for the check alone.
      like: a mapping or object with any of `lora`, `opt_state` and `extra`: arrays or
        ShapeDtypeStructs, whose structure, and sharding where they have one, the result takes;
        shapes, dtypes, axes and scales must be those saved.
      check_base: False takes another base, as long as the shapes fit.

    Returns:
      A Checkpoint. Without base and like.lora, lora is nested dicts by path with nodes at the
      adapted leaves; without like.opt_state, opt_state is nested dicts of arrays; so is extra.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged or of an unknown version, or it does
        not fit base or like; all that is wrong is listed.

    Source: the layout is this library's own; the arrays are Orbax's (PyTreeCheckpointHandler).

    >>> import tempfile
    >>> import jax.numpy as jnp, lowrank_jax as lowrank
    >>> params = {"w": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
    >>> lora = {"w": lowrank.LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3))), "bias": None}
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora=lora, config=config, base=params)
    ...     print(restore(directory, base=params).lora["bias"])
    ...     try:
    ...         restore(directory, base={**params, "bias": jnp.ones(3)})
    ...     except lowrank.CheckpointError as error:
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
            if body["folder"] == read_manifest(directory)["folder"]:
                raise
            # a save replaced the arrays while they were read: take the new ones


def _restored(directory: Path, body: dict, base: Any, like: Any, check_base: bool) -> Checkpoint:
    """Fit the manifest's entries to base and like; only then read the arrays."""
    where = f"the manifest in {directory}"
    with _checkpoint_errors(f"{where} is malformed: not written by save", where):
        config, trained_on, step, nodes, saved = read_body(body)
        refuse_malformed(nodes)
        dense_shapes(nodes)
    get = like.get if isinstance(like, Mapping) else lambda name: getattr(like, name, None)
    likes = {what: get(what) for what in ("lora", *saved)}
    if like is not None and all(part is None for part in likes.values()):
        raise CheckpointError(
            f"like is a {type(like).__name__} that holds none of {', '.join(likes)}: pass, for "
            'example, {"lora": lora}'
        )
    shardings: dict[str, Any] = {}
    with _checkpoint_errors(f"the checkpoint at {directory} does not fit"):
        if base is not None:
            if not isinstance(base, Fingerprint):
                nodes = renamed(nodes, [path for path, _ in flatten(base, is_leaf=is_node)[0]])
            refuse_other_base(nodes, trained_on, base, check_base)
        if likes["lora"] is not None:
            wanted = nodes_of(likes["lora"])
            nodes = renamed(nodes, wanted)
            shardings |= fitted(
                "lora", parts_of(wanted), parts_of(nodes), static_differences(wanted, nodes)
            )
            trees = {"lora": in_structure(likes["lora"], nodes, is_node)}
        elif base is not None and not isinstance(base, Fingerprint):
            trees = {"lora": in_structure(base, nodes, is_node)}
        else:
            trees = {"lora": nested(nodes)}
        for what, leaves in saved.items():
            if likes[what] is not None:
                wanted = dict(flatten(likes[what])[0])
                leaves = renamed(leaves or {}, wanted)
                shardings |= fitted(what, wanted, leaves)
                trees[what] = in_structure(likes[what], leaves)
            else:
                trees[what] = None if leaves is None else nested(leaves)
    with _checkpoint_errors(f"the arrays at {directory} could not be read"):
        entries = {entry.name: entry for entry in jax.tree.leaves(trees)}

        def make(name: str, array: np.ndarray) -> Any:
            if name in entries:
                # once it is ready, nothing holds the array that it was made of
                return jax.block_until_ready(loaded(entries[name], array, shardings.get(name)))

        leaves = read_archive(directory, body, make)
        trees = jax.tree.map(lambda entry: leaves[entry.name], trees)
    return Checkpoint(**trees, config=config, step=step, fingerprint=trained_on)


@contextlib.contextmanager
def _checkpoint_errors(what: str, where: str = "") -> Iterator[None]:
    """Every error as a CheckpointError; the library's own keep their words, after where it is."""
    try:
        yield
    except (CheckpointError, TreeError, AxesError) as error:
        if not where and isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: {error}" if where else str(error)) from error
    except Exception as error:
        raise CheckpointError(f"{what} ({type(error).__name__}: {error})") from error


def _path(directory: str | os.PathLike) -> Path:
    """The directory as an absolute path, which Orbax asks for."""
    text = os.fspath(directory)
    if not isinstance(text, str) or "://" in text:
        raise CheckpointError(f"{text!r} is no path on a local or mounted file system")
    return Path(os.path.abspath(text))
