"""init, combine, partition, merge: a frozen tree and its trainable mirror."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import _jaxprs, initializers
from lowrank_jax._configs import LoraConfig
from lowrank_jax._contract import RANK
from lowrank_jax._errors import ConfigError, LowrankError, TreeError, listing
from lowrank_jax._nodes import (
    Adapted,
    Full,
    LowRank,
    inverse,
    is_adapter,
    is_node,
    labelled_spec,
    materialize,
)
from lowrank_jax._paths import flatten, path_hash
from lowrank_jax._plan import Plan
from lowrank_jax._quantized import Quantized, dense_sharding
from lowrank_jax._targets import Target, resolve, train_whole

Initializer = Callable[[jax.Array, jax.Array, int, float], initializers.Factors]


def init(
    key: jax.Array,
    params: Any,
    config: LoraConfig,
    *,
    plan: Plan | None = None,
    initializer: Initializer | Mapping[str, Initializer] | None = None,
) -> tuple[Any, Any]:
    r"""Make the adapter of a parameter tree.

    For each target $W$ of shape [*stack, *i, *o] (in any order of axes): a is [*stack, *i, r], b is
    [*stack, r, *o], and $W_\text{eff} = W + s\,a\,b$.

    Args:
      key: PRNG key; a leaf's own key is fold_in(key, hash of its path), so that adding a target
        changes no other adapter.
      params: any pytree of arrays.
      config: which leaves, of which rank and scale.
      plan: of the function that uses params; needed for "all-linear" and for leaves of more than
        two axes. Without it a matrix is taken as [i, o].
      initializer: (key, weight [i, o] float32, rank, scale) -> (a, b, residual or None), or a
        mapping of path -> initializer; None is kaiming, and `lookup` for tables read by rows.

    Returns:
      (base, lora). base is params itself, save where an initializer moved weight into the factors.
      lora mirrors params: LowRank at the targets, Full at leaves of config.train, None elsewhere.

    Raises:
      PatternError, AxesError, ConfigError, TreeError: naming each leaf, what it is, and the remedy.

    Source: LoRA, arXiv 2106.09685, section 4.1.

    >>> config = LoraConfig(rank=2, targets="dense/kernel")
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> base, lora = init(jax.random.key(0), params, config)
    >>> lora["dense"]["kernel"].a.shape, lora["dense"]["kernel"].scale, lora["dense"]["bias"]
    ((4, 2), 2.0, None)
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"init takes (key, params, config): config is a {type(config).__name__}")
    if config.dora:
        raise ConfigError("dora=True is not available in this version; use dora=False")
    leaves, treedef = flatten(params, is_leaf=is_node)
    if adapted := [path for path, leaf in leaves if is_adapter(leaf)]:
        raise TreeError(
            f"params already holds adapters ({adapted[0]!r} and {len(adapted) - 1} more): pass the "
            "base, or lowrank.merge(base, lora) to start from the merged weights"
        )
    arrays = {path: leaf for path, leaf in leaves if hasattr(leaf, "dtype")}
    targets = resolve(arrays, config, plan)
    whole = train_whole(arrays, config)
    if isinstance(initializer, Mapping) and (unknown := sorted(set(initializer) - set(targets))):
        raise ConfigError(f"initializer names {unknown[0]!r}, which is not among the targets")
    base, lora = [], []
    for path, leaf in leaves:
        node = None
        if path in targets:
            own = initializer.get(path) if isinstance(initializer, Mapping) else initializer
            leaf_key = jax.random.fold_in(_typed(key), path_hash(path))
            leaf, node = _init_leaf(leaf_key, leaf, targets[path], own, config.factor_dtype)
        elif path in whole:
            node = Full(leaf)
        base.append(leaf)
        lora.append(node)
    return jax.tree.unflatten(treedef, base), jax.tree.unflatten(treedef, lora)


def _typed(key: jax.Array) -> jax.Array:
    """A typed key of an old-style uint32 one."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def _init_leaf(
    key: jax.Array, leaf: Any, target: Target, initializer: Initializer | None, dtype: str
) -> tuple[Any, LowRank]:
    """The residual base and the factors of one leaf."""
    if initializer is None:
        initializer = initializers.lookup if target.kind == "lookup" else initializers.kaiming
    a, b, residual = _laid_out_factors(key, leaf, target, initializer, dtype)
    if residual is not None and isinstance(leaf, Quantized):
        raise ConfigError(
            "an initializer that moves weight out of the base needs a dense base: initialize "
            "before lowrank.quantize, or take another initializer"
        )
    node = LowRank(
        a, b, None, target.fan_in, target.fan_out, target.stack, target.scale, target.kind
    )
    return (leaf if residual is None else residual), node


def _laid_out_factors(
    key: jax.Array, leaf: Any, target: Target, initializer: Initializer, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """_factors, split as the leaf is where its type says how (on a mesh with explicit axes)."""
    if isinstance(leaf, Quantized):
        sharding = dense_sharding(leaf)
    else:
        sharding = jax.typeof(leaf).sharding if _jaxprs.is_split(leaf) else None
    if sharding is None:
        return _factors(key, leaf, target, initializer, dtype)
    like = lambda labels: jax.NamedSharding(sharding.mesh, labelled_spec(sharding.spec, labels))
    make = lambda key, leaf: _factors(key, leaf, target, initializer, dtype)
    plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    moves = jax.eval_shape(make, key, plain)[2] is not None
    out = (
        like((*target.stack, *target.fan_in, RANK)),
        like((*target.stack, RANK, *target.fan_out)),
        sharding if moves else None,
    )
    with _jaxprs.mesh_of(jax.tree.leaves(leaf)[0]):
        return _jaxprs.by_the_compiler(make, out, key, leaf)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _factors(
    key: jax.Array, leaf: jax.Array, target: Target, initializer: Initializer, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """a, b and the residual in the leaf's own layout: groups flattened, stacks vmapped."""
    order = target.stack + target.fan_in + target.fan_out
    sizes = lambda axes: tuple(leaf.shape[axis] for axis in axes)
    stack, fan_in, fan_out = sizes(target.stack), sizes(target.fan_in), sizes(target.fan_out)
    rows, columns = math.prod(fan_in), math.prod(fan_out)
    weight = jnp.transpose(materialize(leaf), order).astype(jnp.float32).reshape(-1, rows, columns)
    keys = jax.random.split(key, weight.shape[0]) if stack else key[None]
    make = lambda key, weight: initializer(key, weight, target.rank, target.scale)
    a, b, residual = jax.vmap(make)(keys, weight)
    expected = ((weight.shape[0], rows, target.rank), (weight.shape[0], target.rank, columns))
    if (a.shape, b.shape) != expected:
        raise LowrankError(
            f"the initializer {getattr(initializer, '__name__', initializer)!r} returned a "
            f"{a.shape[1:]} and b {b.shape[1:]}; expected {expected[0][1:]} and {expected[1][1:]}"
        )
    a = a.reshape(*stack, *fan_in, target.rank).astype(dtype)
    b = b.reshape(*stack, target.rank, *fan_out).astype(dtype)
    if residual is not None:
        residual = residual.reshape(stack + fan_in + fan_out).astype(leaf.dtype)
        residual = jnp.transpose(residual, inverse(order))
    return a, b, residual


def combine(
    base: Any, lora: Any, *, scale: Any = 1.0, dropout: float = 0.0, key: jax.Array | None = None
) -> Any:
    r"""Put base and adapter into one tree of nodes, without arithmetic.

    $W_\text{eff} = W + m\,s\,a\,b$ with m the multiplier `scale`.

    Args:
      base: the frozen tree.
      lora: the adapter, as init returns it.
      scale: m, a number or a traced scalar; 0 turns the adapter off.
      dropout: rate in [0, 1) on the input of the adapter branch of matrix products and
        convolutions, a mask for each leaf, use and layer; look-ups have no input to drop.
      key: PRNG key of the masks, needed with dropout.

    Returns:
      A tree like base with Adapted nodes, for functions made by lift.

    Raises:
      TreeError: lora does not fit base; every path that does not is listed.

    Source: LoRA, arXiv 2106.09685, section 4.1.

    >>> params = {"w": jnp.ones((4, 3)), "scale": jnp.ones(3)}
    >>> base, lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets="w"))
    >>> tree = combine(base, lora)
    >>> type(tree["w"]).__name__, tree["w"].shape, tree["scale"].shape
    ('Adapted', (4, 3), (3,))
    """
    leaves, treedef = flatten(base, is_leaf=is_node)
    nodes = _nodes_of(leaves, lora)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(f"dropout is a static rate in [0, 1), not {dropout!r}")
    if dropout and key is None:
        raise ConfigError("dropout needs a key: combine(base, lora, dropout=rate, key=key)")
    multiplier = _multiplier(scale)
    combined = []
    for path, leaf in leaves:
        node = nodes.get(path)
        if node is None:
            combined.append(leaf)
            continue
        masks = None
        if dropout and isinstance(node, LowRank):
            masks = _mask_keys(key, path, node)
        combined.append(
            Adapted(leaf, node, multiplier, masks, float(dropout) if masks is not None else 0.0)
        )
    return jax.tree.unflatten(treedef, combined)


def _multiplier(scale: Any) -> jax.Array | None:
    """The scale as a scalar array, or None for 1."""
    if isinstance(scale, int | float) and scale == 1:
        return None
    if jnp.shape(scale):
        raise ConfigError(
            f"scale is one number, not an array of shape {jnp.shape(scale)}; for a sweep, jax.vmap "
            "over a function of the scale"
        )
    return jnp.asarray(scale, jnp.float32)


def _mask_keys(key: Any, path: str, node: LowRank) -> jax.Array:
    """One dropout key for each stacked weight of a leaf."""
    leaf_key = jax.random.fold_in(_typed(key), path_hash(path))
    sizes = node.a.shape[: node.a.ndim - 1 - len(node.fan_in)]
    return jax.random.split(leaf_key, sizes) if sizes else leaf_key


def _nodes_of(leaves: list[tuple[str, Any]], lora: Any) -> dict[str, Any]:
    """Adapter nodes by path, checked against the base."""
    nodes = dict(flatten(lora, is_leaf=is_node)[0])
    arrays = dict(leaves)
    swapped = any(isinstance(leaf, LowRank | Full) for leaf in arrays.values())
    if swapped or any(isinstance(leaf, Adapted) for leaf in arrays.values()):
        what = "the adapter" if swapped else "a combined tree"
        raise TreeError(
            f"the first argument is {what}, not a base: the order is (base, lora)"
            + ("" if swapped else "; lowrank.partition(tree) takes a combined tree apart")
        )
    problems = []
    for path, node in nodes.items():
        if not isinstance(node, LowRank | Full):
            raise TreeError(
                f"{path!r} of the adapter is {type(node).__name__}, not LowRank, Full or None: "
                "pass the second result of init"
            )
        if path not in arrays:
            problems.append(f"{path}: in the adapter, not in the base")
        elif tuple(node.shape) != tuple(arrays[path].shape):
            problems.append(
                f"{path}: the adapter is for shape {tuple(node.shape)}, the base has "
                f"{tuple(arrays[path].shape)}"
            )
    if problems:
        raise TreeError(
            "the adapter does not fit the base: it belongs to another model, or to another level "
            f"of the tree (params against variables['params']):\n{listing(problems)}"
        )
    if not nodes:
        raise TreeError("the adapter holds no node: pass the second result of init")
    return nodes


def partition(tree: Any) -> tuple[Any, Any]:
    """Take a combined tree apart into (base, lora): the inverse of combine.

    Args:
      tree: what combine returned, or a tree like it (after an update, say).

    Returns:
      (base, lora); scale and dropout, which are of one call, are dropped.

    Source: structural only, no arithmetic.

    >>> params = {"w": jnp.ones((4, 3))}
    >>> base, lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets="w"))
    >>> again, same = partition(combine(base, lora))
    >>> same["w"] is lora["w"], again["w"] is base["w"]
    (True, True)
    """
    leaves, treedef = flatten(tree, is_leaf=is_node)
    if bare := [path for path, leaf in leaves if isinstance(leaf, LowRank | Full)]:
        raise TreeError(f"{bare[0]!r} is an adapter without its base: pass a combined tree")
    base = [leaf.base if isinstance(leaf, Adapted) else leaf for _, leaf in leaves]
    lora = [leaf.delta if isinstance(leaf, Adapted) else None for _, leaf in leaves]
    return jax.tree.unflatten(treedef, base), jax.tree.unflatten(treedef, lora)


def merge(base: Any, lora: Any, *, scale: Any = 1.0) -> Any:
    r"""Fold the adapter into dense weights: $W + m\,s\,a\,b$, added in float32 and cast once.

    Args:
      base: the frozen tree; it is not changed.
      lora: the adapter.
      scale: m, as in combine.

    Returns:
      A dense tree like the parameters, with their dtypes.

    Raises:
      TreeError: lora does not fit base.

    Source: LoRA, arXiv 2106.09685, section 4.1 ("no additional inference latency").

    >>> params = {"w": jnp.ones((4, 3))}
    >>> base, lora = init(jax.random.key(0), params, LoraConfig(rank=2, targets="w"))
    >>> bool((merge(base, lora)["w"] == params["w"]).all())
    True
    """
    return jax.tree.map(materialize, combine(base, lora, scale=scale), is_leaf=is_node)
