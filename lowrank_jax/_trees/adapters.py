"""combine, partition, merge and fold_norms: join a base and an adapter, or take them apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import (
    check_arguments,
    describe_value,
    key,
    number_like,
    tree_of_arrays,
)
from lowrank_jax._errors import ConfigError, TreeError, list_problems
from lowrank_jax._jax.paths import flatten, hash_path
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import (
    Adapted,
    Full,
    LowRank,
    Normed,
    add_depth,
    explain_combined,
    is_node,
    strip_norms,
)
from lowrank_jax._nodes.fan_in import check_fan_in
from lowrank_jax._operators.materialize import materialize
from lowrank_jax._operators.wrapping import attach_all_norms, compute_gain
from lowrank_jax._trees.init import to_typed_key


@check_arguments(scale=number_like, key=key)
def combine(
    base: PyTree,
    lora: PyTree,
    *,
    scale: float | jax.Array = 1.0,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Any:
    r"""Combine base and adapter into one tree of nodes, without arithmetic.

    $W_\text{eff} = W + m\,s\,a\,b$ with m the multiplier `scale`.

    The result shares its buffers with base, and base shares them with the parameters, so that
    nothing frozen is stored twice. A jitted step that donates the combined tree therefore consumes
    the parameters.

    Args:
      base: the frozen tree, as returned by init. Raw parameters work too; with DoRA the norms of
        their leaves are then computed at each call. So does a combined tree: its adapter is then
        frozen, and lora acts on the weights that it gives. Two LoRAs add; DoRA normalizes the inner
        weight; `scale` and `dropout` are of the new adapter only.
      lora: the adapter, as returned by init.
      scale: m, a number or a traced scalar; 0 turns the adapter off. It multiplies the whole change
        of a weight, including that of DoRA's magnitude.
      dropout: rate in [0, 1) on the input of the adapter branch of matrix products and
        convolutions, with a mask for each leaf, use and layer. Lookups have no input to drop. A
        weight that a loop uses at every step without slicing has one mask for all steps.
      key: PRNG key of the masks, required with dropout.

    Returns:
      A tree like base with Adapted nodes, for functions made by lift.

    Raises:
      TreeError: lora does not fit base; all paths that do not fit are listed.
      ConfigError: scale is not a scalar, dropout is not in [0, 1), or dropout has no key.

    Source: LoRA, arXiv 2106.09685, section 4.1.

    >>> import lowrank_jax as lowrank
    >>> params = {"w": jnp.ones((4, 3)), "scale": jnp.ones(3)}
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), params, config)
    >>> tree = combine(base, lora)
    >>> type(tree["w"]).__name__, tree["w"].shape, tree["scale"].shape
    ('Adapted', (4, 3), (3,))
    """
    leaves, treedef = flatten(base, is_leaf=is_node)
    nodes = _match_adapters(leaves, lora)
    leaves = [(path, add_depth(leaf, 1)) for path, leaf in leaves]
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ConfigError(f"dropout is a static rate in [0, 1), not {dropout!r}")
    if dropout and key is None:
        raise ConfigError("dropout needs a key: combine(base, lora, dropout=rate, key=key)")
    multiplier = _to_multiplier(scale)
    combined = []
    for path, leaf in leaves:
        node = nodes.get(path)
        if node is None:
            combined.append(leaf)
            continue
        if isinstance(node, LowRank) and node.magnitude is not None and not node.folded:
            _, fan_out, stack = node.for_shape(leaf.shape).axes(leaf.ndim)
            known = isinstance(leaf, Normed) and leaf.axes == (*stack, *fan_out)
            check_fan_in(leaf if known else strip_norms(leaf), node, path)
            leaf = leaf if known else attach_all_norms(leaf, node)
        masks = None
        if dropout and isinstance(node, LowRank):
            masks = _make_mask_keys(key, path, node)
        # a copy for each node: a tree in which one buffer occurs twice cannot be donated
        own = multiplier if multiplier is None else jnp.array(multiplier)
        rate = float(dropout) if masks is not None else 0.0
        combined.append(Adapted(leaf, node, own, masks, rate))
    return jax.tree.unflatten(treedef, combined)


def _to_multiplier(scale: float | jax.Array) -> jax.Array | None:
    """Convert the scale to a float32 scalar, or to None if it is the number 1."""
    if isinstance(scale, int | float) and scale == 1:
        return None
    scale = scale if hasattr(scale, "dtype") else float(scale)
    if jnp.shape(scale):
        raise ConfigError(
            f"scale is one number, not an array of shape {jnp.shape(scale)}; for a sweep, jax.vmap "
            "over a function of the scale"
        )
    return jnp.asarray(scale, jnp.float32)


def _make_mask_keys(key: Any, path: str, node: LowRank) -> jax.Array:
    """Make one dropout key for each weight of a stacked leaf: keys [*stack]."""
    leaf_key = jax.random.fold_in(to_typed_key(key), hash_path(path))
    return jax.random.split(leaf_key, node.stacked) if node.stacked else leaf_key


def _match_adapters(leaves: list[tuple[str, Any]], lora: PyTree) -> dict[str, Any]:
    """Return path -> node of an adapter; raises TreeError if it does not fit the base."""
    nodes = dict(flatten(lora, is_leaf=is_node)[0])
    arrays = dict(leaves)
    if any(isinstance(leaf, LowRank | Full) for leaf in arrays.values()):
        raise TreeError("the first argument is the adapter, not a base: the order is (base, lora)")
    if problem := explain_combined(nodes.items(), "lora"):
        raise TreeError(problem)
    if twice := [path for path in nodes if _holds(arrays.get(path), nodes[path])]:
        raise TreeError(
            f"the first argument is already combined with this adapter (see {twice[0]!r}), which "
            "would act twice: lowrank.partition(tree) takes a combined tree apart"
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
        elif not hasattr(arrays[path], "shape"):
            problems.append(f"{path}: {describe_value(arrays[path])} in the base, not an array")
        elif not node.fits(arrays[path].shape):
            problems.append(
                f"{path}: the adapter is for shape {tuple(node.shape)}, the base has "
                f"{tuple(arrays[path].shape)}"
            )
    if problems:
        raise TreeError(
            "the adapter does not fit the base: it belongs to another model, or to another level "
            f"of the tree (params against variables['params']):\n{list_problems(problems)}"
        )
    if not nodes:
        raise TreeError("the adapter holds no node: pass the second result of init")
    return nodes


def _holds(leaf: Any, node: Any) -> bool:
    """Whether an adapted leaf has the very arrays of an adapter's node."""
    leaf = strip_norms(leaf)
    if not isinstance(leaf, Adapted):
        return False
    one, two = jax.tree.leaves(leaf.delta), jax.tree.leaves(node)
    same = len(one) == len(two) and all(a is b for a, b in zip(one, two, strict=True))
    return same or _holds(leaf.base, node)


@check_arguments(tree=tree_of_arrays)
def partition(tree: PyTree) -> tuple[Any, Any]:
    """Split a combined tree into (base, lora): the inverse of combine.

    Args:
      tree: a tree as returned by combine, possibly updated. Of a tree that was combined again, the
        last adapter is split off, and base is the inner combined tree.

    Returns:
      (base, lora), without scale and dropout, which belong to one call of combine.

    Raises:
      TreeError: the tree holds an adapter without its base.

    >>> import lowrank_jax as lowrank
    >>> params = {"w": jnp.ones((4, 3))}
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), params, config)
    >>> again, same = partition(combine(base, lora))
    >>> same["w"] is lora["w"], again["w"] is base["w"]
    (True, True)
    """
    leaves, treedef = flatten(tree, is_leaf=is_node)
    if bare := [path for path, leaf in leaves if isinstance(leaf, LowRank | Full)]:
        raise TreeError(f"{bare[0]!r} is an adapter without its base: pass a combined tree")
    last = [isinstance(leaf, Adapted) and not leaf.depth for _, leaf in leaves]
    pairs = [(leaf.base, leaf.delta) if own else (leaf, None)
             for own, (_, leaf) in zip(last, leaves, strict=True)]  # fmt: skip
    base, lora = ([_peel(frozen) for frozen, _ in pairs], [delta for _, delta in pairs])
    return jax.tree.unflatten(treedef, base), jax.tree.unflatten(treedef, lora)


def _peel(leaf: Any) -> Any:
    """Return a leaf without the last call of combine; the norms that this computed go with it."""
    inner = strip_norms(leaf)
    return add_depth(inner, -1) if isinstance(inner, Adapted) else leaf


@check_arguments(scale=number_like)
def merge(base: PyTree, lora: PyTree, *, scale: float | jax.Array = 1.0) -> Any:
    r"""Merge the adapter into dense weights: $W + m\,s\,a\,b$, added in float32 and cast once.

    Args:
      base: the frozen tree; it is not changed.
      lora: the adapter.
      scale: m, as in combine.

    Returns:
      A dense tree like the parameters, with their dtypes. It shares the leaves that are not adapted
      with base, and no array with the adapter.

    Raises:
      TreeError: lora does not fit base.

    Source: LoRA, arXiv 2106.09685, section 4.1 ("no additional inference latency").

    >>> import lowrank_jax as lowrank
    >>> params = {"w": jnp.ones((4, 3))}
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), params, config)
    >>> bool((merge(base, lora)["w"] == params["w"]).all())
    True
    """

    def dense(leaf: object) -> Any:
        whole = isinstance(leaf, Adapted) and isinstance(leaf.delta, Full)
        # A copy, since the adapter may be donated later and the merged tree must stay valid.
        return jnp.array(materialize(leaf), copy=True) if whole else materialize(leaf)

    return jax.tree.map(dense, combine(base, lora, scale=scale), is_leaf=is_node)


@check_arguments()
def fold_norms(base: PyTree, lora: PyTree) -> Any:
    r"""Compute DoRA's norms once, which makes inference as cheap as with LoRA.

    $y = c \odot (x W + s\,(x a) b)$ with $c = m / \lVert W + s\,a\,b \rVert$ stored in place of m.

    Args:
      base: the frozen tree.
      lora: the adapter.

    Returns:
      The adapter with c, [*stack, *fan_out], as its magnitude. It computes the same function
      without norms. It is not for training, because c no longer depends on a and b: save the
      adapter first.

    Raises:
      TreeError: lora does not fit base, or has no magnitude.

    Source: DoRA, arXiv 2402.09353, equation 5.

    >>> import lowrank_jax as lowrank
    >>> config = lowrank.LoraConfig(rank=2, targets="w", dora=True)
    >>> base, lora = lowrank.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, config)
    >>> fold_norms(base, lora)["w"].magnitude, lora["w"].magnitude
    (Array([1., 1., 1.], dtype=float32), Array([2., 2., 2.], dtype=float32))
    """
    leaves = dict(flatten(base, is_leaf=is_node)[0])
    nodes = _match_adapters(list(leaves.items()), lora)
    if all(getattr(node, "magnitude", None) is None for node in nodes.values()):
        raise TreeError(
            "the adapter has no magnitude: there is nothing to fold in one without DoRA"
        )

    def fold(path: str, node: LowRank | Full) -> LowRank | Full:
        if not isinstance(node, LowRank) or node.magnitude is None:
            return node
        check_fan_in(leaves[path], node, path)
        return dataclasses.replace(node, magnitude=compute_gain(leaves[path], node), folded=True)

    pairs, treedef = flatten(lora, is_leaf=is_node)
    return jax.tree.unflatten(treedef, [fold(path, node) for path, node in pairs])
