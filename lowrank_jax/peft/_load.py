"""load: read an adapter that PEFT saved."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._errors import CheckpointError, LowrankError, list_problems
from lowrank_jax._files.torch_layout import (
    describe_stack_mismatch,
    fill_indices,
    find_stack_axes,
    find_use,
    resolve_names,
)
from lowrank_jax._jax.paths import flatten, unflatten_by_path
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Adapted, Full, LowRank, attach_norms, is_node, strip_norms
from lowrank_jax._nodes.family import Rows
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax._trees.shardings import find_sharding, place_node, place_tree
from lowrank_jax.names import Names, Parameter
from lowrank_jax.peft._config import collect_extras, compute_alpha
from lowrank_jax.peft._factors import match_factors
from lowrank_jax.peft._folder import CONFIG
from lowrank_jax.peft._matching import Matching, Place, make_misfit_error, open_matching
from lowrank_jax.peft._parsing import AdapterConfig
from lowrank_jax.peft._tensors import PREFIX, TOKENS
from lowrank_jax.peft._whole import match_tokens, match_whole

_BATCH_SIZE = 1 << 20  # bytes, which are briefly held both on the host and on the device


@check_arguments(CheckpointError)
def load(
    directory: str | os.PathLike,
    params: PyTree,
    *,
    plan: Plan | None = None,
    names: Names = None,
    shardings: PyTree = None,
) -> tuple[Any, Any, LoraConfig]:
    r"""Load an adapter that `peft` saved.

    The factors are a = A.T and b = B.T. Modules saved whole, trained biases and lora_bias (the bias
    plus s times it) become Full leaves; trained rows of a table (trainable_token_indices) become
    Rows.

    A leaf that stacks layers has one rank and one scale: smaller ranks are padded with zeros, and
    differing scales are folded into b, exact up to the rounding of b. Layers without factors get
    zeros, which have zero gradients.

    Args:
      directory: contains adapter_config.json and adapter_model.safetensors. Pickles are not read.
      params: the parameters the adapter was trained on: arrays, Quantized leaves or
        jax.ShapeDtypeStruct.
      plan: the plan of the function that uses params; required for kernels with more than two axes.
      names: leaf -> module, as for lowrank.names.parameter; for instance the table LLAMA.
      shardings: as for init, which places the adapter likewise.

    Returns:
      (base, lora, config): the first two as from init; config names the leaves by their paths.

    Raises:
      CheckpointError: a field of the configuration is wrong or not supported; tensors are missing,
        unexpected, of a wrong shape or dtype, or not finite (all are listed); or a file is damaged
        or links out of the directory.
      TreeError: shardings do not fit params.

    Source: peft 0.21.2, utils/save_and_load.py and tuners/lora.

    >>> import tempfile
    >>> import lowrank_jax as lowrank
    >>> from lowrank_jax.peft import save
    >>> lora = {"head": {"kernel": lowrank.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), scale=0.5)}}
    >>> params = {"head": {"kernel": jnp.zeros((4, 3))}}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, lora, lowrank.LoraConfig())
    ...     base, again, config = load(directory, params)
    >>> config.rank, config.alpha, lowrank.merge(base, again)["head"]["kernel"][0].tolist()
    (2, 1, [1.0, 1.0, 1.0])
    """
    if shardings is not None:
        params = place_tree(params, shardings)
    with open_matching(Path(directory)) as matching:
        return load_matched(matching, params, plan, names)


def load_matched(
    matching: Matching, params: PyTree, plan: Plan | None, names: Names
) -> tuple[Any, Any, LoraConfig]:
    """Load an adapter that is open; see load."""
    folder, config = matching.folder, matching.config
    leaves = flatten(params, is_leaf=is_node)[0]
    floating = {
        path: strip_norms(leaf)
        for path, leaf in leaves
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    builds = _match(matching, floating, resolve_names(floating, names), plan)
    if problems := [*matching.problems, *matching.list_unused()]:
        raise make_misfit_error(folder, problems)
    if not builds:
        raise CheckpointError(f"the adapter at {folder} holds no tensor")
    nodes = _build_nodes(builds, dict(leaves))
    if matching.not_finite:
        raise CheckpointError(
            f"the adapter at {folder} holds NaN or infinity: save it again from a run that did not "
            "diverge, or in a dtype whose range its values fit in:\n"
            f"{list_problems(sorted(matching.not_finite))}"
        )
    base = {
        path: attach_norms(leaf, nodes[path]) if _needs_norm(leaf, nodes.get(path)) else leaf
        for path, leaf in leaves
    }
    trees = (unflatten_by_path(params, found, is_node) for found in (base, nodes))
    try:
        return *trees, _make_config(config, nodes)
    except LowrankError as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from error


def _build_nodes(
    builds: Mapping[str, Callable[[], Any]], leaves: Mapping[str, Any]
) -> dict[str, Any]:
    """Build the nodes, and move them to the device in batches: each transfer has a fixed cost.

    The node of a sharded leaf is placed as the leaf, each shard where it belongs.
    """
    nodes, batch, size = {}, {}, 0
    for path, build in builds.items():
        node = build()
        if find_sharding(leaves[path]) is not None:
            nodes[path] = place_node(path, node, leaves[path])
            continue
        batch[path] = node
        size += sum(leaf.nbytes for leaf in jax.tree.leaves(node))
        if size >= _BATCH_SIZE:
            nodes |= jax.device_put(batch)
            batch, size = {}, 0
    return nodes | jax.device_put(batch)


def _needs_norm(leaf: object, node: object) -> bool:
    """Whether init would attach squared norms to the leaf; of an adapted one, combine does."""
    dora = isinstance(node, LowRank) and node.magnitude is not None
    return dora and not isinstance(leaf, jax.ShapeDtypeStruct | Adapted)


def _match(
    matching: Matching, leaves: dict[str, Any], named: dict[str, Parameter], plan: Plan | None
) -> dict[str, Callable[[], Any]]:
    """Return a function that builds the node, for each leaf that the file has tensors for."""
    builds = {}
    # weights first: a bias uses the lora_bias that was taken with the factors of its weight
    for path in sorted(named, key=lambda path: named[path].kind != "weight"):
        matching.refuse_many(matching.problems)
        leaf, name = leaves[path], named[path]
        use = find_use(plan, path)
        stack = find_stack_axes(name, use)
        if len(stack) != name.module.count("{}") or max(stack, default=-1) >= leaf.ndim:
            matching.unnamed.append(describe_stack_mismatch(path, len(stack), name))
            continue
        # a stack of 2 layers and 3 experts, "layers.{}.experts.{}.up": modules maps (0, 0) to
        # "layers.0.experts.0.up", ..., (1, 2) to "layers.1.experts.2.up"; no stack: () to the name
        indices = np.ndindex(*(leaf.shape[axis] for axis in stack))
        modules = {index: fill_indices(name.module, index) for index in indices}
        build = _match_leaf(matching, Place(path, leaf, name, use, modules))
        if build is not None:
            builds[path] = build
    return builds


def _match_leaf(matching: Matching, place: Place) -> Callable[[], Any] | None:
    """Return a function that builds the node of a leaf, or None if the file has none for it."""
    modules = place.modules.values()
    if place.name.kind != "weight":
        return match_whole(matching, place)
    adapted = any(map(matching.has_factors, modules))
    if place.leaf.ndim > len(find_stack_axes(place.name, place.use)) + 1:
        matching.problems += [
            f"{PREFIX}{module}: no factors, and target_modules names it ({place.path!r})"
            for module in modules
            if matching.config.is_target(module) and not matching.has_factors(module)
        ]
    tokens = any(TOKENS in matching.parts.get(module, {}) for module in modules)
    if tokens and adapted:
        return matching.reject(
            place, f"{place.path!r}: factors and trainable tokens; a leaf can have only one adapter"
        )
    match = match_tokens if tokens else match_factors if adapted else match_whole
    return match(matching, place)


def _make_config(config: AdapterConfig, nodes: dict[str, Any]) -> LoraConfig:
    """Make the LoraConfig of the loaded nodes, with the paths of leaves as patterns."""
    has_wildcard = lambda path: set(path) & set("*?") or "" in path.split("/")
    exact = lambda path: re.compile(re.escape(path)) if has_wildcard(path) else path
    lowranks = {path: node for path, node in sorted(nodes.items()) if type(node) is LowRank}
    rslora = config["use_rslora"]
    alphas = {path: compute_alpha(node.scale, node.rank, rslora) for path, node in lowranks.items()}
    dtypes = {jnp.dtype(node.dtype).name for node in lowranks.values()}
    return LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=tuple(map(exact, lowranks)),
        rank_pattern={exact(p): n.rank for p, n in lowranks.items() if n.rank != config["r"]},
        alpha_pattern={exact(p): a for p, a in alphas.items() if a != config["lora_alpha"]},
        rslora=rslora,
        dora=config["use_dora"],
        train=tuple(exact(path) for path, node in sorted(nodes.items()) if isinstance(node, Full)),
        train_rows={exact(p): n.rows for p, n in sorted(nodes.items()) if isinstance(n, Rows)},
        factor_dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        extras=collect_extras(config.values),
    )
