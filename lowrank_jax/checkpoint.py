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

from lowrank_jax._archive import has_manifest, read_archive, read_manifest, write_archive
from lowrank_jax._configs import LoraConfig
from lowrank_jax._entries import (
    dense_shapes,
    fitted,
    in_structure,
    loaded,
    nested,
    nodes_of,
    parts_of,
    read_entry,
    read_node,
    refuse_misshapen,
    refuse_other_base,
    static_differences,
    write_entry,
    write_node,
)
from lowrank_jax._errors import AxesError, CheckpointError, TreeError
from lowrank_jax._fingerprint import (
    Fingerprint,
    fingerprint,
)
from lowrank_jax._nodes import is_node
from lowrank_jax._paths import flatten


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
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"config is a {type(config).__name__}; pass the LoraConfig of lora")
    if step is not None and (not hasattr(step, "__index__") or isinstance(step, bool)):
        raise CheckpointError(f"step is {step!r}; pass an integer or None")
    if jax.process_count() > 1:
        raise CheckpointError("save works in a program of one process; this one has several")
    arrays: dict[str, np.ndarray] = {}
    with _checkpoint_errors("nothing was written"):
        nodes = nodes_of(lora)
        if base is not None and not isinstance(base, Fingerprint):
            refuse_misshapen(nodes, base)
            base = fingerprint(base)
        body = {
            "step": None if step is None else operator.index(step),
            "config": config.to_dict(),
            "base": None if base is None else base.to_dict(),
            "lora": [write_node(path, node, arrays) for path, node in nodes.items()],
            "opt_state": None,
        }
        if opt_state is not None:
            body["opt_state"] = [
                {"path": path.split("/"), **write_entry(f"opt_state/{path}", leaf, arrays)}
                for path, leaf in flatten(opt_state)[0]
            ]
    with _checkpoint_errors(f"{directory} could not be written; an older checkpoint is as it was"):
        write_archive(directory, body, arrays)


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
            if body == read_manifest(directory):
                raise
            # a save replaced the arrays while they were read: take the new ones


def _restored(directory: Path, body: dict, base: Any, like: Any, check_base: bool) -> Checkpoint:
    """Fit the manifest's entries to base and like; only then read the arrays."""
    with _checkpoint_errors(f"the manifest in {directory} is malformed: not written by save"):
        config = LoraConfig.from_dict(body["config"])
        trained_on = None if body["base"] is None else Fingerprint.from_dict(body["base"])
        step = None if body["step"] is None else operator.index(body["step"])
        nodes = {"/".join(entry["path"]): read_node(entry, body) for entry in body["lora"]}
        states = {"/".join(e["path"]): read_entry(e, body) for e in body["opt_state"] or ()}
        dense_shapes(nodes)
    get = like.get if isinstance(like, Mapping) else lambda name: getattr(like, name, None)
    like_lora, like_state, shardings = get("lora"), get("opt_state"), {}
    with _checkpoint_errors(f"the checkpoint at {directory} does not fit"):
        if base is not None:
            refuse_other_base(nodes, trained_on, base, check_base)
        if like_lora is not None:
            wanted = nodes_of(like_lora)
            shardings |= fitted(
                "lora", parts_of(wanted), parts_of(nodes), static_differences(wanted, nodes)
            )
            lora = in_structure(like_lora, nodes, is_node)
        elif base is not None and not isinstance(base, Fingerprint):
            lora = in_structure(base, nodes, is_node)
        else:
            lora = nested(nodes)
        if like_state is not None:
            shardings |= fitted("opt_state", dict(flatten(like_state)[0]), states)
            state = in_structure(like_state, states)
        else:
            state = None if body["opt_state"] is None else nested(states)
    with _checkpoint_errors(f"the arrays at {directory} could not be read"):
        arrays = read_archive(directory, body)
    load = lambda entry: loaded(entry, arrays[entry.name], shardings.get(entry.name))
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
