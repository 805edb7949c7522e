"""Restore a checkpoint and verify every byte of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._errors import CheckpointError
from lowrank_jax._jax.paths import flatten, rename_legacy_paths, to_nested_dict, unflatten_by_path
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import collect_adapters, is_node
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._trees.fingerprint import Fingerprint
from lowrank_jax.checkpoint._archive import has_manifest, read_archive, read_manifest
from lowrank_jax.checkpoint._entries import (
    build_leaf,
    collect_arrays,
    read_body,
)
from lowrank_jax.checkpoint._fitting import (
    compare_static_fields,
    compute_dense_shapes,
    match_leaves,
    refuse_malformed,
    refuse_other_base,
)
from lowrank_jax.checkpoint._formats import collect_formats, compare_formats, read_formats
from lowrank_jax.checkpoint._paths import checkpoint_errors, resolve_directory


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """The contents of a checkpoint, returned by `restore`.

    Args:
      lora: the adapter, a tree of nodes.
      config: its LoraConfig.
      opt_state: the optimizer's state, or None if none was saved.
      step: the step, or None.
      fingerprint: the Fingerprint of the base that the adapter was trained on, or None; pass it to
        the next save as `base`.
      extra: other state that was saved, or None.

    >>> import lowrank_jax as lowrank
    >>> Checkpoint(lora={"w": None}, config=lowrank.LoraConfig(rank=2), step=7).step
    7
    """

    lora: PyTree
    config: LoraConfig
    opt_state: PyTree = None
    step: int | None = None
    fingerprint: Fingerprint | None = None
    extra: PyTree = None


@check_arguments(CheckpointError)
def exists(directory: str | os.PathLike) -> bool:
    """Whether there is a checkpoint: False until the first save to the directory has finished.

    Args:
      directory: the path given to save.

    Returns:
      True if there is a checkpoint, although restore may find it damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     exists(directory)
    False
    """
    return has_manifest(resolve_directory(directory))


@check_arguments(CheckpointError)
def restore(
    directory: str | os.PathLike,
    *,
    base: PyTree = None,
    like: object = None,
    check_base: bool = True,
) -> Checkpoint:
    """Restore a checkpoint; every byte is verified before it is used, and nothing is unpickled.

    Args:
      directory: the path given to save.
      base: the frozen tree. The restored lora has its structure, with None at leaves without an
        adapter. A base other than the one trained on is an error. A Fingerprint in place of the
        tree gives the check without the structure.
      like: a mapping or object with any of `lora`, `opt_state` and `extra`: trees of arrays or
        ShapeDtypeStructs. The result has their structure, and their shardings if they have some.
        Shapes, dtypes, axes and scales must equal the saved ones.
      check_base: False accepts any base whose shapes fit.

    Returns:
      A Checkpoint. Without base and like.lora, lora is nested dicts by path with nodes at the
      adapted leaves. Without like.opt_state, opt_state is nested dicts of arrays; so is extra.

    Raises:
      CheckpointError: there is no checkpoint; it is damaged, or of an unknown version; or it does
        not fit base or like. All problems are listed.

    Source: Orbax, PyTreeCheckpointHandler, for the arrays.

    >>> import tempfile
    >>> import jax.numpy as jnp, lowrank_jax as lowrank
    >>> from lowrank_jax.checkpoint import save
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
    directory = resolve_directory(directory)
    while True:
        body = read_manifest(directory)
        try:
            return _restore_body(directory, body, base, like, check_base)
        except CheckpointError:
            if body["folder"] == read_manifest(directory)["folder"]:
                raise


def _restore_body(
    directory: Path, body: dict, base: PyTree, like: object, check_base: bool
) -> Checkpoint:
    """Match the manifest's entries with base and like, then read the arrays."""
    where = f"the manifest in {directory}"
    with checkpoint_errors(f"{where} is malformed: not written by save", where):
        config, trained_on, step, nodes, saved = read_body(body)
        formats = read_formats(body)
        refuse_malformed(nodes)
        compute_dense_shapes(nodes)
    get = like.get if isinstance(like, Mapping) else lambda name: getattr(like, name, None)
    likes = {what: get(what) for what in ("lora", *saved)}
    if like is not None and all(part is None for part in likes.values()):
        raise CheckpointError(
            f"like is a {type(like).__name__} that holds none of {', '.join(likes)}: pass, for "
            'example, {"lora": lora}'
        )
    shardings: dict[str, Any] = {}
    with checkpoint_errors(f"the checkpoint at {directory} does not fit"):
        if base is not None:
            if not isinstance(base, Fingerprint):
                nodes = rename_legacy_paths(
                    nodes, [path for path, _ in flatten(base, is_leaf=is_node)[0]]
                )
            refuse_other_base(nodes, trained_on, base, check_base)
        if likes["lora"] is not None:
            wanted = collect_adapters(likes["lora"])
            nodes = rename_legacy_paths(nodes, wanted)
            others = compare_formats(collect_formats(wanted), collect_formats(nodes))
            shardings |= match_leaves(
                "lora",
                collect_arrays(wanted),
                collect_arrays(nodes),
                [*compare_static_fields(wanted, nodes), *others],
            )
            trees = {"lora": unflatten_by_path(likes["lora"], nodes, is_node)}
        elif base is not None and not isinstance(base, Fingerprint):
            trees = {"lora": unflatten_by_path(base, nodes, is_node)}
        else:
            trees = {"lora": to_nested_dict(nodes)}
        for what, leaves in saved.items():
            if likes[what] is not None:
                wanted = dict(flatten(likes[what])[0])
                leaves = rename_legacy_paths(leaves or {}, wanted)
                own = {f"{what}/{path}": v for path, v in collect_formats(likes[what]).items()}
                shardings |= match_leaves(what, wanted, leaves, compare_formats(own, formats))
                trees[what] = unflatten_by_path(likes[what], leaves)
            else:
                trees[what] = None if leaves is None else to_nested_dict(leaves)
    with checkpoint_errors(f"the arrays at {directory} could not be read"):
        entries = {entry.name: entry for entry in jax.tree.leaves(trees)}

        def make(name: str, array: np.ndarray) -> Any:
            if name in entries:
                # once the leaf is ready, nothing references the NumPy array that it was made from
                return jax.block_until_ready(build_leaf(entries[name], array, shardings.get(name)))

        leaves = read_archive(directory, body, make)
        trees = jax.tree.map(lambda entry: leaves[entry.name], trees)
    return Checkpoint(**trees, config=config, step=step, fingerprint=trained_on)
