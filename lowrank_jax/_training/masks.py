"""Optax over adapters: masks and labels of what is trained, and no updates for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import (
    check_arguments,
    describe_value,
    factor_scale,
    function,
    rate,
    transformation,
    tree_of_arrays,
)
from lowrank_jax._errors import ConfigError, TreeError
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Adapted, Full, LowRank, explain_combined, is_adapter, is_node
from lowrank_jax._nodes.methods import get_method
from lowrank_jax._nodes.quantized_factors import has_quantized_factors

if TYPE_CHECKING:  # imported in functions: importing the library should only cost importing jax
    import optax

T = TypeVar("T")


@check_arguments(tree=tree_of_arrays)
def trainable_mask(tree: PyTree) -> Any:
    """Mark what is trained: True at factors, magnitudes and Full leaves, False elsewhere.

    Args:
      tree: a combined tree, an adapter, or a parameter tree (all False).

    Returns:
      A tree of the same structure with a bool at each leaf: a mask for optax.masked, or labels
      for optax.partition.

    Raises:
      TreeError: factors are quantized, which cannot be trained.

    Source: optax.masked. It passes gradients of frozen leaves through; only_adapters zeroes them.

    >>> import lowrank_jax as lowrank
    >>> config = lowrank.LoraConfig(rank=1, targets="w")
    >>> params = {"w": jnp.ones((2, 2)), "c": jnp.ones(2)}
    >>> base, lora = lowrank.init(jax.random.key(0), params, config)
    >>> mask = trainable_mask(lowrank.combine(base, lora))
    >>> mask["w"].base, mask["w"].delta.a, mask["c"]
    (False, True, False)
    """

    def mark(node: object) -> Any:
        if isinstance(node, Adapted) and is_adapter(node):
            frozen = jax.tree.map(lambda _: False, node)
            return dataclasses.replace(frozen, delta=jax.tree.map(lambda _: True, node.delta))
        return jax.tree.map(lambda _: is_adapter(node), node)

    leaves, treedef = flatten(tree, is_leaf=is_node)
    _refuse_quantized(leaves)
    return jax.tree.unflatten(treedef, [mark(leaf) for _, leaf in leaves])


@check_arguments()
def factor_labels(lora: PyTree) -> Any:
    """Label what is trained: "a", "b", "magnitude" or "full", for optax.partition.

    Pass this function itself to optax.partition: if labels were an nnx.Module, which is callable,
    optax would call them. "full" labels arrays that are trained directly and not as factors: Full
    leaves and rows of a table.

    Args:
      lora: an adapter.

    Returns:
      A tree of the same structure with a label at each leaf.

    Raises:
      TreeError: a leaf is not LowRank or Full, or its factors are quantized.

    Source: LoRA+, arXiv 2402.12354, which gives a and b their own learning rates.

    >>> import lowrank_jax as lowrank
    >>> config = lowrank.LoraConfig(rank=1, targets="w")
    >>> _, lora = lowrank.init(jax.random.key(0), {"w": jnp.ones((2, 2))}, config)
    >>> factor_labels(lora)["w"].a, factor_labels(lora)["w"].b
    ('a', 'b')
    """

    def label(node: object) -> LowRank | Full:
        if isinstance(node, LowRank):
            whole = get_method(node).is_direct
            return dataclasses.replace(
                node, **{name: "full" if whole else name for name in node.array_labels}
            )
        if isinstance(node, Full):
            return dataclasses.replace(node, value="full")
        raise TreeError(
            "factor_labels takes an adapter (the second result of init); it got "
            f"{type(node).__name__}"
        )

    leaves, treedef = flatten(lora, is_leaf=is_node)
    if problem := explain_combined(leaves, "lora"):
        raise TreeError(problem)
    _refuse_quantized(leaves)
    return jax.tree.unflatten(treedef, [label(leaf) for _, leaf in leaves])


def _refuse_quantized(leaves: Sequence[tuple[str, Any]]) -> None:
    """Raise TreeError if the factors of an adapter are quantized."""
    for path, leaf in leaves:
        if isinstance(leaf, Adapted) and leaf.depth:
            continue  # a frozen adapter
        if has_quantized_factors(leaf.delta if isinstance(leaf, Adapted) else leaf):
            raise TreeError(
                f"{path!r} is an adapter with quantized factors, which has no gradient: train "
                "lowrank.dequantize(lora), and quantize the result"
            )


@check_arguments(tx=transformation)
def only_adapters(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Train only the adapters of a combined tree.

    Use it as the outermost transformation, around optax.MultiSteps and clipping, so that these see
    the adapters only. Donate the old parameters to a jitted step; otherwise each step copies the
    base.

    Args:
      tx: any optax transformation; it sees the trainable leaves only.

    Returns:
      A transformation for combined trees (in a TrainState or an nnx.Optimizer). Frozen leaves have
      no state, and their updates are zero for any gradient (also float0).

    Raises:
      TreeError: init is called with a tree without adapters, or update without parameters or with
        gradients of another tree.

    Source: optax.masked passes the raw gradients of masked leaves through; here they are dropped.

    >>> import lowrank_jax as lowrank, optax
    >>> config = lowrank.LoraConfig(rank=1, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), {"w": jnp.ones((2, 2))}, config)
    >>> state = only_adapters(optax.adam(1e-3)).init(lowrank.combine(base, lora))
    >>> sorted(leaf.size for leaf in jax.tree.leaves(state))  # count, and mu, nu of a and b
    [1, 2, 2, 2, 2]
    """
    import optax

    inner: Any = optax.with_extra_args_support(tx)

    def start(params: PyTree) -> Any:
        nodes = _collect_nodes(params)
        if not nodes:
            raise TreeError(
                "only_adapters was initialized on a tree without adapters: pass "
                "lowrank.combine(base, lora)"
            )
        return inner.init(nodes)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: object
    ) -> tuple[Any, Any]:
        if params is None:
            raise TreeError("only_adapters needs the parameters: tx.update(grads, state, params)")
        gradients, nodes = _collect_nodes(updates), _collect_nodes(params)
        if set(gradients) != set(nodes):
            raise TreeError(
                "the gradients and the parameters hold adapters at different paths "
                f"({sorted(set(gradients) ^ set(nodes))[:3]}): differentiate with respect to the "
                "combined tree"
            )
        updated, state = inner.update(gradients, state, nodes, **extra)
        small: Any = updated
        leaves, treedef = flatten(params, is_leaf=is_node)
        full = [_make_update(leaf, small.get(path)) for path, leaf in leaves]
        return jax.tree.unflatten(treedef, full), state

    return optax.GradientTransformationExtraArgs(start, update)


@check_arguments(fn=function, tree=tree_of_arrays)
def map_adapters(fn: Callable[[dict[str, Any]], dict[str, Any]], tree: PyTree) -> Any:
    """Apply a function to the adapters of a combined tree: $a_p \\to fn(a)_p$ for each path p.

    fn gets the adapters in the form in which the transformation inside `only_adapters` sees them.
    So functions of optax that take a state and parameters apply to them, for example
    schedule_free_eval_params.

    Args:
      fn: takes a dict of path -> adapter and returns such a dict with the same paths.
      tree: a combined tree.

    Returns:
      The tree with the returned adapters.

    Raises:
      TreeError: the tree holds no adapters, or fn returns other paths.

    Source: schedule-free learning, arXiv 2405.15682.

    >>> import lowrank_jax as lowrank, optax
    >>> config = lowrank.LoraConfig(rank=1, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), {"w": jnp.ones((2, 2))}, config)
    >>> tree = lowrank.combine(base, lora)
    >>> state = only_adapters(optax.contrib.schedule_free_sgd(0.1)).init(tree)
    >>> averaged = lambda nodes: optax.contrib.schedule_free_eval_params(state, nodes)
    >>> map_adapters(averaged, tree)["w"].delta.a.shape
    (2, 1)
    """
    nodes = _collect_nodes(tree)
    if not nodes:
        raise TreeError("map_adapters takes (fn, tree): tree holds no adapters; pass combine(...)")
    changed = fn(nodes)
    if not isinstance(changed, dict) or set(changed) != set(nodes):
        raise TreeError(
            f"map_adapters takes (fn, tree): fn returned {describe_value(changed)}; expected a "
            f"dict of the {len(nodes)} paths of adapters it was given"
        )
    leaves, treedef = flatten(tree, is_leaf=is_node)

    def put(leaf: object, node: LowRank | Full) -> object:
        return dataclasses.replace(leaf, delta=node) if isinstance(leaf, Adapted) else node

    return jax.tree.unflatten(
        treedef, [put(leaf, changed[path]) if path in changed else leaf for path, leaf in leaves]
    )


def _collect_nodes(tree: PyTree) -> dict[str, Any]:
    """Return path -> LowRank or Full, a flat dict for any kind of container of parameters."""
    found, leaves = {}, flatten(tree, is_leaf=is_node)[0]
    _refuse_quantized(leaves)
    for path, leaf in leaves:
        if is_adapter(leaf):
            found[path] = leaf.delta if isinstance(leaf, Adapted) else leaf
    return found


def _make_update(leaf: object, update: LowRank | Full | None) -> Any:
    """Make the update of one leaf: that of its adapter, and zero for what is frozen."""
    if update is None:
        return jax.tree.map(_make_zero, leaf)
    if not isinstance(leaf, Adapted):
        return update
    still = jax.tree.map(_make_zero, leaf)
    return dataclasses.replace(still, delta=update)


@jax.tree_util.register_static
class ZeroUpdate:
    """The zero update of a PRNG key, whose dtype has no zero: key + ZeroUpdate() is key.

    >>> key = jax.random.key(0)
    >>> key + ZeroUpdate() is key
    True
    """

    def __radd__(self, key: T) -> T:
        return key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZeroUpdate)

    def __hash__(self) -> int:
        return hash(ZeroUpdate)


def _make_zero(leaf: jax.Array) -> jax.Array | ZeroUpdate:
    """Make a scalar zero of the leaf's dtype, which broadcasts: no array of its size is needed."""
    dtype = jnp.result_type(leaf)
    return ZeroUpdate() if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.zeros((), dtype)


@check_arguments(make_tx=function, learning_rate=rate, ratio=factor_scale)
def lora_plus(
    make_tx: Callable[[Any], optax.GradientTransformation], learning_rate: Any, ratio: float = 16.0
) -> optax.GradientTransformation:
    r"""LoRA+: b and magnitudes have the learning rate $\lambda\eta$, all other arrays $\eta$.

    Args:
      make_tx: learning rate -> optax transformation, for example optax.adamw.
      learning_rate: eta, a number or a schedule.
      ratio: lambda.

    Returns:
      A transformation for adapters (the second result of init).

    Source: LoRA+, arXiv 2402.12354, section 4.

    >>> import lowrank_jax as lowrank, optax
    >>> config = lowrank.LoraConfig(rank=1, targets="w")
    >>> _, lora = lowrank.init(jax.random.key(0), {"w": jnp.ones((2, 2))}, config)
    >>> tx = lora_plus(optax.sgd, 0.5)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora), lora)
    >>> float(updates["w"].a[0, 0]), float(updates["w"].b[0, 0])
    (-0.5, -8.0)
    """
    import optax

    faster: Any = lambda count: ratio * learning_rate(count)
    if not callable(learning_rate):
        faster = ratio * learning_rate
    slow, fast = make_tx(learning_rate), make_tx(faster)
    if not transformation.holds(slow):
        raise ConfigError(
            f"make_tx returned {describe_value(slow)}; expected {transformation.expected}: pass "
            "optax.adamw"
        )
    return optax.partition({"a": slow, "full": slow, "b": fast, "magnitude": fast}, factor_labels)
