"""Save a checkpoint, now or in a thread."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowrank_jax._checks.arguments import check_arguments, integer_like
from lowrank_jax._errors import CheckpointError
from lowrank_jax._jax.processes import write_on_first_process
from lowrank_jax._nodes import collect_adapters
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._trees.fingerprint import Fingerprint, fingerprint
from lowrank_jax.checkpoint._archive import write_archive
from lowrank_jax.checkpoint._background import Saving, finish_pending_save
from lowrank_jax.checkpoint._entries import (
    write_entries,
    write_node,
)
from lowrank_jax.checkpoint._fitting import (
    refuse_malformed,
    refuse_misshapen,
)
from lowrank_jax.checkpoint._paths import checkpoint_errors, resolve_directory


@check_arguments(CheckpointError, step=integer_like)
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
    >>> from lowrank_jax.checkpoint import restore
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> lora = {"w": lowrank.LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)), scale=2.0), "bias": None}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora=lora, config=config, step=7)
    ...     found = restore(directory)
    >>> found.step, found.config == config, found.lora["w"].shape, found.lora["w"].scale
    (7, True, (4, 3), 2.0)
    """
    directory = resolve_directory(directory)
    finish_pending_save(directory)
    body, arrays = _build_contents(lora, config, base, opt_state, step, extra)
    write_on_first_process(lambda: _write(directory, body, arrays))


@check_arguments(CheckpointError, step=integer_like)
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
    >>> from lowrank_jax.checkpoint import restore
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> lora = {"w": lowrank.LowRank(jnp.ones((4, 2)), jnp.zeros((2, 3)))}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     saving = save_async(directory, lora=lora, config=config, step=7)
    ...     lora["w"].a.delete()
    ...     saving.wait()
    ...     restore(directory).step
    7
    """
    directory = resolve_directory(directory)
    if jax.process_count() > 1:
        raise CheckpointError("save_async works in a program of one process: call save in all")
    finish_pending_save(directory)
    body, arrays = _build_contents(lora, config, base, opt_state, step, extra)
    arrays = {name: array.copy() for name, array in arrays.items()}
    return Saving(directory, lambda: _write(directory, body, arrays))


def _build_contents(
    lora: Any, config: LoraConfig, base: Any, opt_state: Any, step: int | None, extra: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest's body and the arrays of what is to be saved, checked."""
    arrays: dict[str, np.ndarray] = {}
    with checkpoint_errors("nothing was written"):
        nodes = collect_adapters(lora)
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
    with checkpoint_errors(f"{directory} could not be written; an older checkpoint is unchanged"):
        write_archive(directory, body, arrays)
