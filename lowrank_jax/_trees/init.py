"""init: creates the adapter of a parameter tree, and the frozen base that goes with it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax import initializers
from lowrank_jax._checks.arguments import (
    anything,
    check_arguments,
    describe_value,
    is_seed,
    key_or_seed,
)
from lowrank_jax._errors import ConfigError, TreeError
from lowrank_jax._jax.paths import Pattern, flatten, hash_path, make_no_match_error, matches
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import (
    UNADAPTED,
    LowRank,
    attach_norms,
    find_adapters,
    init_full,
    is_node,
    strip_norms,
)
from lowrank_jax._nodes.adapted import Leaf
from lowrank_jax._nodes.family import init_rows
from lowrank_jax._nodes.fan_in import check_is_whole
from lowrank_jax._nodes.methods import find_method
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._operators.wrapping import compute_norms
from lowrank_jax._targeting.configs import LoraConfig, QuantConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax._targeting.targets import (
    Target,
    resolve_targets,
    select_full,
    select_rows,
    warn_skipped,
)
from lowrank_jax._trees.factors import apply_initializer
from lowrank_jax._trees.quantize import check_quantized, quantize_leaf
from lowrank_jax._trees.shardings import (
    find_dense_shardings,
    place_leaf,
    place_like,
    place_node,
    place_norms,
    resolve_shardings,
)

Initializer = Callable[[jax.Array, jax.Array, int, float], initializers.Factors]


@check_arguments(key=key_or_seed, initializer=anything)
def init(
    key: jax.Array | int,
    params: PyTree,
    config: LoraConfig,
    *,
    plan: Plan | None = None,
    initializer: Initializer | str | Mapping[Pattern, Initializer | str] | None = None,
    shardings: PyTree = None,
) -> tuple[Any, Any]:
    r"""Create the adapter of a parameter tree.

    For each target $W$ with axes [*stack, *i, *o] in any order, a is [*stack, *i, r], b is
    [*stack, r, *o], and $W_\text{eff} = W + s\,a\,b$. With `config.dora`,
    $W_\text{eff} = m\,(W + s\,a\,b) / \lVert W + s\,a\,b \rVert$ for each output feature, where m
    is initialized to that norm.

    Args:
      key: PRNG key, or an integer seed. The key of a leaf is fold_in(key, hash of its path), so
        that adding a target does not change the other adapters.
      params: any pytree of arrays.
      config: selects the leaves, their rank and scale.
      plan: plan of the function that uses params; required for "all-linear" and for leaves of more
        than two axes. Without it a matrix is taken as [i, o].
      initializer: (key, weight [i, o] float32, rank, scale) -> (a, b, residual or None), the name
        of an initializer ("pissa"), or a mapping of pattern -> either, in which the exact path of a
        leaf precedes patterns. None means kaiming, and `lookup` for tables read by rows. A function
        with data is a callable pytree whose arrays lead with the stack axes of the leaf. The weight
        of a float64 leaf is passed as float64. The error of rounding the factors to `factor_dtype`
        is added to the residual, so that the function is preserved.
      shardings: a tree of NamedSharding like the dense params, or of PartitionSpec within
        jax.set_mesh, by which base and lora are placed, as `lowrank.specs` says; an entry at a
        branch applies to all leaves below it. Without it the adapter of a leaf that is sharded, is
        sharded like it.

    Returns:
      (base, lora). base is params itself, except for leaves whose initializer returned a residual,
      which replaces them, and with config.dora for targets, which get their squared norms (Normed
      nodes). lora mirrors params: LowRank at targets, Full at leaves of config.train, None
      elsewhere. It shares no array with params or base, so it may be donated; base shares its
      arrays with params.

    Raises:
      PatternError: a pattern matches no leaf, or no leaf is selected.
      AxesError: the axes of a leaf are not known or not possible.
      ConfigError: a leaf is selected twice or too narrow for its rank, or the initializer does not
        apply to it.
      TreeError: params holds adapters, the plan belongs to another tree, or shardings do not fit
        params.

    Warns:
      PlanWarning: "all-linear" skips leaves that reach a product through operations that no rule
        follows.

    Source: LoRA, arXiv 2106.09685, section 4.1; DoRA, arXiv 2402.09353, section 4.

    >>> config = LoraConfig(rank=2, targets="dense/kernel")
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> base, lora = init(jax.random.key(0), params, config)
    >>> lora["dense"]["kernel"].a.shape, lora["dense"]["kernel"].scale, lora["dense"]["bias"]
    ((4, 2), 2.0, None)
    """
    given: Any = key
    root = jax.random.key(operator.index(given)) if is_seed(given) else to_typed_key(given)
    leaves, treedef = flatten(params, is_leaf=is_node)
    if adapted := find_adapters(leaves):
        raise TreeError(
            f"params already holds adapters ({adapted[0]!r} and {len(adapted) - 1} more): pass "
            f"{UNADAPTED} to start from the merged weights; lowrank.combine(tree, lora) puts the "
            "new adapter over those of a combined tree"
        )
    at: dict[str, Any] = {}
    if shardings is not None:
        resolved = resolve_shardings(params, shardings)
        at = find_dense_shardings(params, resolved)
        params = jax.tree.map(place_leaf, params, resolved)
        leaves, treedef = flatten(params, is_leaf=is_node)
    arrays = {path: leaf for path, leaf in leaves if hasattr(leaf, "dtype")}
    targets = resolve_targets(arrays, config, plan)
    whole, rows = select_full(arrays, config), select_rows(arrays, config)
    warn_skipped(plan, config.targets, targets, (*config.exclude, *whole, *rows))
    if find_method(config.method).start and initializer is not None:
        raise ConfigError(f"initializer applies to LoRA only; method {config.method!r} has its own")
    chosen = _resolve_initializers(initializer, targets)
    base, lora = [], []
    for path, leaf in leaves:
        node, leaf = None, strip_norms(leaf)
        if path in targets:
            leaf_key = _fold_in(root, np.uint32(hash_path(path)))
            leaf, node = _init_leaf(
                leaf_key, path, leaf, targets[path], chosen[path], config, at.get(path)
            )
        elif path in whole:
            node = init_full(leaf)
        elif path in rows:
            node = init_rows(path, leaf, rows[path], config.factor_dtype)
        base.append(place_norms(path, leaf, at.get(path)))
        lora.append(place_node(path, node, leaf, at.get(path)))
    return jax.tree.unflatten(treedef, base), jax.tree.unflatten(treedef, lora)


def _resolve_initializers(given: object, targets: Mapping[str, Target]) -> dict[str, Any]:
    """Return path -> initializer of each target, None for the default.

    The exact path of a target precedes patterns, of which the first match wins: initializers made
    from data name each leaf, and a path may contain a "*".
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(targets, _resolve_initializer("initializer", given))
    found: dict[str, Any] = {}
    for pattern, value in given.items():
        own = _resolve_initializer(f"initializer[{pattern!r}]", value)
        if isinstance(pattern, str) and pattern in targets:
            hits = [pattern]
        else:
            hits = [path for path in targets if matches(pattern, path) and path not in given]
            if not any(matches(pattern, path) for path in targets):
                raise make_no_match_error(
                    pattern, list(targets), "initializer (over the adapted leaves)"
                )
        for path in hits:
            found.setdefault(path, own)
    return {path: found.get(path) for path in targets}


def _resolve_initializer(name: str, value: object) -> Any:
    """Return the function of an initializer that may be given by name."""
    if value is None or (callable(value) and not isinstance(value, type)):
        return value
    if isinstance(value, str) and value in initializers.BY_NAME:
        return initializers.BY_NAME[value]
    raise ConfigError(
        f"{name} is {describe_value(value)}; expected a function (key, weight, rank, scale) -> "
        f"(a, b, residual), one of the names {sorted(initializers.BY_NAME)}, or a mapping of "
        "pattern to either"
    )


def to_typed_key(key: jax.Array) -> jax.Array:
    """Convert an old-style uint32 key to a typed key; its number of words determines the PRNG.

    The default PRNG of the process is used if its keys have as many words. Otherwise the key, for
    example a Threefry key restored from a checkpoint, gets the PRNG with that number of words.
    """
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    settings: Any = jax.config  # JAX 0.10 does not declare the names of its settings
    words, default = key.shape[-1], settings.jax_default_prng_impl
    if _KEY_WORDS.get(default, words) == words:
        return jax.random.wrap_key_data(key)
    made_by = next((impl for impl, size in _KEY_WORDS.items() if size == words), default)
    return jax.random.wrap_key_data(key, impl=made_by)


_fold_in = jax.jit(jax.random.fold_in)  # eagerly it takes eight times as long, for each leaf

_KEY_WORDS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}


def _init_leaf(
    key: jax.Array,
    path: str,
    leaf: jax.Array | Quantized,
    target: Target,
    initializer: Initializer | None,
    config: LoraConfig,
    sharding: jax.NamedSharding | None,
) -> tuple[Leaf, LowRank]:
    """Return the base and the adapter of one leaf; sharding is that of the leaf, if given."""
    if start := find_method(config.method).start:
        return _add_magnitude(path, leaf, start(key, leaf, target, config), config)
    if initializer is None:
        initializer = initializers.lookup if target.kind == "lookup" else initializers.kaiming
    quant = getattr(initializer, "quant", None)
    try:
        made = apply_initializer(key, path, leaf, target, initializer, config.factor_dtype)
    except ConfigError as error:
        raise ConfigError(f"{path!r}: {error}") from error
    a, b, residual = made
    if residual is not None:
        if isinstance(leaf, Quantized):
            raise ConfigError(
                f"{path!r} is quantized, and its initializer moves weight out of the base: pass "
                "dense parameters and quantize after, or take another initializer"
            )
        if quant is None:
            leaf = place_like(residual.astype(leaf.dtype), leaf, sharding)
        else:
            leaf = _quantize_residual(path, residual, leaf, target, quant)
    axes = target.fan_in, target.fan_out, target.stack
    node = LowRank(a, b, None, *axes, target.scale, target.kind, base_modified=residual is not None)
    return _add_magnitude(path, leaf, node, config)


def _add_magnitude(
    path: str, leaf: jax.Array | Quantized, node: LowRank, config: LoraConfig
) -> tuple[Leaf, LowRank]:
    """With DoRA, attach squared norms to the leaf and the magnitude to its adapter."""
    if not config.dora:
        return leaf, node
    check_is_whole(leaf, path)
    normed = attach_norms(leaf, node)
    return normed, dataclasses.replace(node, magnitude=_compute_norms(normed, node))


_compute_norms = jax.jit(compute_norms)


def _quantize_residual(
    path: str, residual: jax.Array, leaf: jax.Array, target: Target, quant: QuantConfig
) -> Quantized:
    """Quantize the residual of an initializer that asks for it (LoftQ), with the leaf's dtype."""
    if target.kind == "lookup":
        raise ConfigError(
            f"{path!r} is read by rows: an initializer that quantizes the base is for products; "
            "exclude the leaf, or give it another initializer"
        )
    node, bad = quantize_leaf(path, residual, target.fan_in, target.stack, quant)
    check_quantized({path: bad}, {path: residual})
    return dataclasses.replace(node, weight_dtype=jnp.dtype(leaf.dtype).name)
