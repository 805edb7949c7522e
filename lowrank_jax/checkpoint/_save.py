"""Save a checkpoint, in the calling thread or in the background."""

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
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import collect_adapters
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._trees.fingerprint import Fingerprint, fingerprint
from lowrank_jax.checkpoint._archive import QUANTIZED_VERSION, write_archive
from lowrank_jax.checkpoint._background import Saving, finish_pending_save
from lowrank_jax.checkpoint._entries import write_entries, write_node
from lowrank_jax.checkpoint._fitting import (
    refuse_malformed,
    refuse_misshapen,
)
from lowrank_jax.checkpoint._formats import collect_formats
from lowrank_jax.checkpoint._paths import checkpoint_errors, resolve_directory


@check_arguments(CheckpointError, step=integer_like)
def save(
    directory: str | os.PathLike,
    *,
    lora: PyTree,
    config: LoraConfig,
    base: PyTree = None,
    opt_state: PyTree = None,
    step: int | None = None,
    extra: PyTree = None,
) -> None:
    """Save an adapter (not the base) with Orbax, replacing an older checkpoint atomically.

    If the process is killed, the directory holds one complete checkpoint, the old or the new:
    (1) the arrays are written to a new directory beside those in use; (2) they are hashed, and
    flushed to disk; (3) a new manifest that names this directory is written to a temporary file,
    and flushed; (4) one rename replaces the old manifest; (5) arrays that the manifest does not
    name are removed. The next save removes what a killed save left. A failed save leaves the old
    checkpoint unchanged. A lock, released when its process dies, excludes a second writer. A reader
    concurrent with a save reads the new checkpoint. With several processes, all of them call save,
    and process 0 writes.

    Args:
      directory: a path on a local or mounted file system; created if missing. Other files in it are
        left alone.
      lora: the adapter: LowRank and Full nodes, None elsewhere, in any containers.
      config: its LoraConfig.
      base: the frozen tree, or `lowrank.fingerprint(base)` computed once; restore then rejects any
        other base. None: restore can check shapes only.
      opt_state: the optimizer's state, any pytree of arrays, typed PRNG keys and numbers.
      step: the training step, returned by restore.
      extra: other state needed to continue, such as the data iterator's position and PRNG keys: any
        pytree of arrays, typed PRNG keys and numbers.

    Raises:
      CheckpointError: lora is not an adapter, or does not fit base; a leaf has no values; another
        process is saving there; the file system failed; or an earlier save_async there failed.

    Source: Orbax, PyTreeCheckpointHandler, for the arrays.

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
    lora: PyTree,
    config: LoraConfig,
    base: PyTree = None,
    opt_state: PyTree = None,
    step: int | None = None,
    extra: PyTree = None,
) -> Saving:
    """Like `save`, but write in a background thread while training continues.

    All values are copied to the host before it returns, so that the arrays may be donated, deleted
    or changed afterwards. An earlier save_async to the same path is waited for first. At exit the
    program waits for its saves. With several processes, all of them call save_async and then
    `wait`: the shards are gathered before save_async returns, and process 0 writes.

    Args:
      directory: a path on a local or mounted file system.
      lora: the adapter.
      config: its LoraConfig.
      base: the frozen tree, or `lowrank.fingerprint(base)`: the tree is hashed before this returns.
      opt_state: the optimizer's state.
      step: the training step.
      extra: other state needed to continue.

    Returns:
      A Saving: `wait()` returns once the checkpoint is complete. It raises the error of a failed
      save, as does the next save to the same path.

    Raises:
      CheckpointError: an argument is invalid, as in `save`, or an earlier save_async failed.

    Source: Orbax, PyTreeCheckpointHandler, for the arrays.

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
    finish_pending_save(directory)
    body, arrays = _build_contents(lora, config, base, opt_state, step, extra)
    if jax.process_index():
        return Saving(directory, None)
    arrays = {name: array.copy() for name, array in arrays.items()}
    return Saving(directory, lambda: _write(directory, body, arrays))


def _build_contents(
    lora: PyTree,
    config: LoraConfig,
    base: PyTree,
    opt_state: PyTree,
    step: int | None,
    extra: PyTree,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Validate what is saved; return the manifest's body, and the arrays on the host."""
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
        formats = {
            f"{what}/{path}": values
            for what, tree in (("opt_state", opt_state), ("extra", extra))
            for path, values in collect_formats(tree).items()
        }
        body |= {"formats": formats} if formats else {}
        if formats or any("quantized" in entry for entry in body["lora"]):
            body["version"] = QUANTIZED_VERSION
    return body, arrays


def _write(directory: Path, body: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Replace the checkpoint in a directory."""
    with checkpoint_errors(f"{directory} could not be written; an older checkpoint is unchanged"):
        write_archive(directory, body, arrays)
