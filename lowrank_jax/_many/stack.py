"""Adapters stacked along a leading axis, and selected from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import check_arguments, describe_value, instance_of
from lowrank_jax._errors import ConfigError, LowrankError, TreeError, list_problems
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import PyTree
from lowrank_jax._many.align import align
from lowrank_jax._many.equalize import equalize
from lowrank_jax._nodes import Full, LowRank
from lowrank_jax._nodes.methods import get_label
from lowrank_jax._nodes.quantized_factors import dequantize_factors, has_quantized_factors
from lowrank_jax._nodes.selection import Selection, attach_selection
from lowrank_jax._nodes.serialization import list_array_fields


@check_arguments(loras=instance_of(list) | instance_of(tuple))
def stack(loras: Sequence[PyTree]) -> PyTree:
    r"""Stack n adapters of one model along a new leading axis, exact as a function.

    Adapter k of the stack gives the same function as loras[k]. What differs is made equal:

    - Ranks: factors of a smaller rank are padded with zeros to the largest. Both factors of a
      padded column are zero, so their gradients $\partial a = G b^T$ and $\partial b = a^T G$ are
      zero, and they stay zero under training and weight decay.
    - Scales: $s_k\,b_k = s\,(s_k / s)\,b_k$, with s the largest of the scales. For a sweep over
      alpha keep one scale and map `combine(scale=)` instead.
    - A leaf that only some adapters have: the others get factors of zeros.
    - LoRA beside DoRA whose norms are folded (`fold_norms`): LoRA gets gains of 1.
    - Quantized factors (`quantize_adapter`): they are decoded, unless all adapters have the same
      rank, scale and format.

    Under `jax.vmap` the stack is one adapter; `jax.vmap(init)` over keys gives the same shapes.

    Args:
      loras: adapters as init returns them, of one frozen base.

    Returns:
      An adapter each of whose arrays has a leading axis of size n.

    Raises:
      TreeError: the adapters are of different models.
      ConfigError: a leaf's adapters cannot be stacked: they are of different methods, have
        different axes, or their padding would be trained (VeRA's ranks, rows of a table).

    >>> import lowrank_jax as lowrank
    >>> params = {"w": jnp.ones((4, 3))}
    >>> make = lambda r: lowrank.init(0, params, lowrank.LoraConfig(rank=r, targets="w"))[1]
    >>> many = stack([make(1), make(2)])
    >>> many["w"].a.shape, many["w"].b.shape
    ((2, 4, 2), (2, 2, 3))
    """
    aligned, unflatten = align(loras, decode=False)
    out, problems = {}, []
    for path, nodes in aligned.items():
        try:
            same: list[Any] = nodes
            if not are_quantized_alike(nodes):
                same = equalize([dequantize_factors(node) for node in nodes])
            out[path] = stack_nodes(same)
        except LowrankError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError(f"adapters that cannot be stacked:\n{list_problems(problems)}")
    return unflatten(out)


@check_arguments()
def select(many: PyTree, index: Any) -> PyTree:
    """Select one adapter of a stack, or one for each example.

    Args:
      many: what stack, or `jax.vmap(init)`, returned: n adapters.
      index: an integer in [0, n), which may be traced, or integers [B]: the adapters of B examples,
        to be used under `jax.vmap`.

    Returns:
      The adapter; for integers [B] each of its arrays has a leading axis of size B. A traced index
      outside of [0, n) gives NaN, so that it cannot pass unseen.

      Select by one traced integer inside the function that jax.vmap maps, as below. A lifted
      function then knows the stack that the factors are from, and where that is cheaper it
      multiplies by the factors of all adapters and keeps each example's own, instead of copying
      factors for each example. The values are the same to rounding.

    Raises:
      TreeError: many is not a stack.
      ConfigError: index is not an integer or integers, or is not in [0, n).

    >>> import lowrank_jax as lowrank
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((5, 4))
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> many = jax.vmap(lambda key: lowrank.init(key, params, config)[1])(
    ...     jax.random.split(jax.random.key(0), 8)
    ... )
    >>> select(many, 3)["w"].a.shape, select(many, jnp.array([3, 0, 3]))["w"].a.shape
    ((4, 2), (3, 4, 2))
    >>> fn = lowrank.lift(lambda p, x: x @ p["w"])
    >>> one = lambda index, x: fn(lowrank.combine(params, select(many, index)), x)
    >>> jax.vmap(one)(jnp.array([0, 7, 7, 1, 0]), x).shape
    (5, 3)
    """
    (aligned, unflatten), count = align([many], decode=False), count_adapters(many)
    index = _check_index(index, count)
    take = lambda array: _take(array, index, count)
    nodes: dict[str, Any] = {}
    for path, (node,) in aligned.items():
        nodes[path] = jax.tree.map(take, node)
        if type(node) is LowRank and _may_be_lazy(node, index):
            nodes[path] = attach_selection(nodes[path], Selection(node, index))
    return unflatten(nodes)


def _may_be_lazy(node: LowRank, index: Any) -> bool:
    """Whether products may read the stack itself: one traced index, dense factors, no mesh."""
    if not jaxprs.is_tracer(index) or index.ndim or has_quantized_factors(node):
        return False
    return all(map(jaxprs.has_no_mesh, (index, *jax.tree.leaves(node))))


def count_adapters(many: PyTree) -> int:
    """Return the number of adapters in a stack.

    Raises:
      TreeError: it is one adapter, or its leaves hold different numbers of them.
    """
    aligned, _ = align([many], decode=False)
    counts = {}
    nodes = ((path, node) for path, (node,) in aligned.items() if node is not None)
    for path, node in nodes:
        # the ndim of a Full leaf alone does not tell whether it is stacked
        if isinstance(node, LowRank) and not node.adapters:
            raise TreeError(
                f"{path!r} holds one {get_label(node)} adapter, not a stack: pass what "
                "lowrank.stack returns"
            )
        if not (shape := _first_array(node).shape):
            raise TreeError(f"{path!r} is one number, not a stack: pass what lowrank.stack returns")
        counts[path] = shape[0]
    if len({*counts.values()}) > 1:
        sizes = [f"{path}: {count}" for path, count in counts.items()]
        raise TreeError(f"the leaves hold different numbers of adapters:\n{list_problems(sizes)}")
    return next(iter(counts.values()))


def _first_array(node: LowRank | Full) -> Any:
    """Return one of the arrays of a node."""
    return next(x for name in list_array_fields(node) if (x := getattr(node, name)) is not None)


def stack_nodes(nodes: Sequence[LowRank | Full]) -> LowRank | Full:
    """Stack nodes with equal static fields into one node."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *nodes)


def are_quantized_alike(nodes: Sequence[Any]) -> bool:
    """Whether all nodes have quantized factors, of the same format, scale and shapes."""
    if not all(map(has_quantized_factors, nodes)):
        return False
    describe = lambda node: (
        jax.tree.structure(node),
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(node)],
    )
    return all(describe(node) == describe(nodes[0]) for node in nodes)


def _check_index(index: Any, count: int) -> Any:
    """The index as an int or an array of integers, in range where its value is known."""
    dtype = getattr(index, "dtype", None) or np.asarray(index).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ConfigError(
            f"index is {describe_value(index)}; expected an integer or integers in [0, {count})"
        )
    if jaxprs.is_tracer(index):
        return index
    known = np.asarray(index)
    if (wrong := known[(known < 0) | (known >= count)]).size:
        raise ConfigError(
            f"index {int(wrong.flat[0])} is not in [0, {count}): the stack holds {count} adapters"
        )
    return int(known) if not known.ndim else jnp.asarray(index)


def _take(array: jax.Array, index: Any, count: int) -> jax.Array:
    """array[index]; NaN for an index outside of [0, count)."""
    if isinstance(index, int):
        return array[index]
    index = jnp.asarray(index)
    index = index.astype(jnp.promote_types(index.dtype, jnp.int32))  # int8 cannot hold count
    # JAX counts a negative index from the end: make it one beyond the end
    index = jnp.where(index < 0, count, index)
    fill = jnp.nan if jnp.issubdtype(array.dtype, jnp.inexact) else None  # codes have scales of NaN
    return jnp.asarray(array).at[index].get(mode="fill", fill_value=fill)
