"""Adapters extracted from the difference of two models."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import check_arguments, describe_value, tree_of_arrays
from lowrank_jax._checks.fields import check_rank
from lowrank_jax._errors import AxesError, TreeError, list_problems
from lowrank_jax._jax.paths import flatten, unflatten_by_path
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Adapted, Full, LowRank, as_dense, init_full, is_node
from lowrank_jax._targeting.plan import Plan, Use
from lowrank_jax._targeting.targets import resolve_axes
from lowrank_jax._trees.fingerprint import to_numpy


@check_arguments(base=tree_of_arrays, tuned=tree_of_arrays)
def extract(
    base: PyTree, tuned: PyTree, rank: int, *, plan: Plan | None = None
) -> tuple[PyTree, dict[str, float]]:
    r"""Extract an adapter from a model that was trained whole, or by any other method.

    $s = 1$, $a = U \sqrt{S}$, $b = \sqrt{S}\,V^T$ of the r largest singular values of each
    difference $W_\text{tuned} - W_\text{base}$: the product of rank r nearest to it.

    It runs on the host, leaf by leaf, in float32. A leaf that changed and has no matrix product (a
    bias, a norm; stacked ones are told from matrices by the plan) is kept whole, as a Full node, so
    that nothing that changed is lost but by rank.

    Args:
      base: the frozen tree, which may be quantized: the adapter then makes up for that too.
      tuned: the dense tree after training, in the same structure.
      rank: r; a leaf too narrow for it takes the largest rank that it can have, which is exact.
      plan: what `lowrank.plan` returns; required where a changed leaf has more than two axes.

    Returns:
      (the adapter, None where nothing changed; path -> relative Frobenius error of the difference,
      0 for a leaf kept whole).

    Raises:
      TreeError: the trees differ in structure or shapes, no leaf changed, a leaf that is not
        floating did, or a difference is not finite.
      AxesError: a changed leaf has more than two axes, and there is no plan.
      ConfigError: rank is not a positive integer.

    Source: Eckart and Young, Psychometrika 1, 1936.

    >>> base = {"w": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    >>> tuned = {"w": jnp.outer(jnp.arange(4.0), jnp.ones(3)), "bias": jnp.zeros(3)}
    >>> lora, errors = extract(base, tuned, rank=1)
    >>> lora["w"].rank, lora["bias"], errors["w"] < 1e-6
    (1, None, True)
    """
    check_rank("rank", rank)
    old, new = (dict(flatten(tree, is_leaf=is_node)[0]) for tree in (base, tuned))
    _refuse_other_trees(old, new)
    nodes: dict[str, Any] = {}
    errors: dict[str, float] = {}
    problems = []
    for path, leaf in new.items():
        before, after = to_numpy(path, as_dense(old[path])), to_numpy(path, as_dense(leaf))
        if np.array_equal(before, after):
            continue
        if not jnp.issubdtype(after.dtype, jnp.floating):
            raise TreeError(f"{path!r} changed, and is of {after.dtype}: it cannot be adapted")
        wide = jnp.promote_types(after.dtype, jnp.float32)
        difference = (after.astype(wide) - before.astype(wide)).astype(np.float32)
        if not np.isfinite(difference).all():
            raise TreeError(f"{path!r}: the difference has elements that are not finite")
        try:
            nodes[path], errors[path] = _extract_leaf(path, leaf, difference, rank, plan)
        except AxesError as error:
            problems.append(str(error))
    if problems:
        raise AxesError(list_problems(problems) if len(problems) > 1 else problems[0])
    if not nodes:
        raise TreeError("no leaf of tuned differs from base: there is nothing to extract")
    return unflatten_by_path(tuned, nodes, is_node), errors


def _refuse_other_trees(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise TreeError unless both trees have the same paths and shapes."""
    problems = [f"{path}: only in base" for path in old if path not in new]
    problems += [f"{path}: only in tuned" for path in new if path not in old]
    for name, leaves in (("base", old), ("tuned", new)):
        for path, leaf in leaves.items():
            if isinstance(leaf, Adapted):
                problems.append(
                    f"{path}: adapted in {name}; lowrank.merge(base, lora) gives its dense weight"
                )
            elif not hasattr(leaf, "shape") or isinstance(leaf, LowRank | Full):
                problems.append(f"{path}: {describe_value(leaf)} in {name}; expected an array")
    if problems:
        raise TreeError(
            f"base and tuned are not parameters of one model:\n{list_problems(problems)}"
        )
    problems = [
        f"{path}: shape {tuple(old[path].shape)} in base, {tuple(leaf.shape)} in tuned"
        for path, leaf in new.items()
        if path in old and tuple(old[path].shape) != tuple(leaf.shape)
    ]
    if problems:
        raise TreeError(
            f"base and tuned are not parameters of one model:\n{list_problems(problems)}"
        )


def _extract_leaf(
    path: str, leaf: Any, difference: np.ndarray, rank: int, plan: Plan | None
) -> tuple[Any, float]:
    """The node of one leaf, and the relative error."""
    use = _get_use(path, plan)
    no_product = use is not None and not (use.fan_in and use.fan_out)
    if difference.ndim < 2 or no_product:
        return init_full(leaf), 0.0
    fan_in, fan_out, stack, kind = resolve_axes(
        path, difference.shape, use, "extract needs its axes"
    )
    order = (*stack, *fan_in, *fan_out)
    sizes = lambda axes: tuple(difference.shape[axis] for axis in axes)
    rows, columns = math.prod(sizes(fan_in)), math.prod(sizes(fan_out))
    weights = difference.transpose(order).reshape(-1, rows, columns)
    rank = min(rank, rows, columns)
    a = np.empty((len(weights), rows, rank), np.float32)
    b = np.empty((len(weights), rank, columns), np.float32)
    kept = lost = 0.0
    for k, weight in enumerate(weights):  # one stacked weight at a time: the SVD needs most memory
        u, values, vt = np.linalg.svd(weight, full_matrices=False)
        root = np.sqrt(values[:rank])
        a[k], b[k] = u[:, :rank] * root, root[:, None] * vt[:rank]
        squares = values.astype(np.float64) ** 2
        kept, lost = kept + squares[:rank].sum(), lost + squares[rank:].sum()
    node = LowRank(
        jnp.asarray(a.reshape(*sizes(stack), *sizes(fan_in), rank)),
        jnp.asarray(b.reshape(*sizes(stack), rank, *sizes(fan_out))),
        fan_in=fan_in,
        fan_out=fan_out,
        stack=stack,
        kind=kind,
    )
    return node, math.sqrt(lost / (kept + lost))


def _get_use(path: str, plan: Plan | None) -> Use | None:
    """Return the leaf's Use in the plan, or None without a plan."""
    if plan is None:
        return None
    if path not in plan:
        raise TreeError(f"{path!r} is not in the plan: make it of the function of these parameters")
    return plan[path]
