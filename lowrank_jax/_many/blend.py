"""Adapters blended into one: weighted sums of their deltas, and merges of their factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import (
    check_arguments,
    describe_value,
    instance_of,
    key,
    number_like,
)
from lowrank_jax._checks.fields import check_rank
from lowrank_jax._errors import ConfigError, LowrankError, list_problems
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import hash_path
from lowrank_jax._jax.types import PyTree
from lowrank_jax._many.align import MaybeNode, align
from lowrank_jax._many.compress import as_lora, truncate
from lowrank_jax._nodes import Full, LowRank
from lowrank_jax._nodes.family import Rows
from lowrank_jax._nodes.methods import get_label

Weight = float | jax.Array
# arrays [n, *shape], density, key -> the arrays, some of their elements zero
Pruning = Callable[[jax.Array, float, Any], jax.Array]


@check_arguments(
    loras=instance_of(list) | instance_of(tuple),
    weights=instance_of(list) | instance_of(tuple) | instance_of(jax.Array),
    density=number_like,
    key=key,
)
def blend(
    loras: Sequence[PyTree],
    weights: Sequence[float] | jax.Array,
    method: str = "concat",
    *,
    rank: int | None = None,
    density: float | None = None,
    key: jax.Array | None = None,
) -> PyTree:
    r"""Blend adapters of one base into one adapter.

    "concat" and "svd" sum the deltas: $\Delta W = \sum_k w_k s_k a_k b_k$, "concat" exactly, with
    the sum of the ranks; "svd" with the least Frobenius error at one rank, equal to
    `compress(blend(loras, weights), rank)`, which returns the error of each leaf too.

    The others merge a's with a's and b's with b's, $a = \sum_k \pm\sqrt{|w_k s_k|}\,a_k$ and
    $b = \sum_k \sqrt{|w_k s_k|}\,b_k$, so their deltas are NOT the sum of the deltas: "linear" as
    they are; "magnitude_prune" with all but the largest elements of each factor zero; "ties" with
    those that disagree with the majority's sign left out as well, and divided by the number kept;
    "dare" with random elements zero and the rest divided by the density; "dare_ties" with both.

    Args:
      loras: adapters of one frozen base.
      weights: w_k, one number for each; negative ones subtract.
      method: "concat", "svd", "linear", "magnitude_prune", "ties", "dare" or "dare_ties".
      rank: of "svd"; None: the largest of the ranks at each leaf.
      density: the share of elements kept, in (0, 1], where elements are pruned.
      key: PRNG key of "dare" and "dare_ties".

    Returns:
      An adapter of scale 1 at each leaf, its factors float32 at least. A leaf trained whole is
      $\sum_k w_k W_k$, for which the weights must sum to 1. A leaf that only some adapters have
      takes theirs.

    Raises:
      ConfigError: an argument is wrong, or a leaf's adapters cannot be blended: DoRA and (IA)^3,
        whose effect is not a sum, and factors of different ranks where elements are merged.
      TreeError: the adapters are of different models.

    Source: PEFT, `add_weighted_adapter`; TIES, arXiv 2306.01708; DARE, arXiv 2311.03099.

    >>> import lowrank_jax as lowrank
    >>> node = lambda x: {"w": lowrank.LowRank(x * jnp.ones((4, 1)), jnp.ones((1, 3)), scale=2.0)}
    >>> blended = blend([node(1.0), node(3.0)], [0.5, 0.5])
    >>> blended["w"].rank, float((blended["w"].a @ blended["w"].b)[0, 0])
    (2, 4.0)
    """
    merge, aligned, unflatten = _check(loras, weights, method, rank, density, key)
    factors = [weights[k] for k in range(len(loras))]
    out, problems = {}, []
    for path, nodes in aligned.items():
        try:
            own = None if key is None else jax.random.fold_in(key, hash_path(path))
            out[path] = _blend_leaf(nodes, factors, merge, method, rank, own)
        except LowrankError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError(f"adapters that cannot be blended:\n{list_problems(problems)}")
    return unflatten(out)


def _check(
    loras: Sequence[PyTree],
    weights: Sequence[float] | jax.Array,
    method: str,
    rank: int | None,
    density: float | None,
    key: jax.Array | None,
) -> tuple[Merge | None, dict[str, list[MaybeNode]], Callable[[dict[str, Any]], PyTree]]:
    """Check the arguments of blend.

    Returns:
      (the merge of factors, or None for sums of deltas; and what align returns).
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    merge = METHODS[method]
    shape = weights.shape if isinstance(weights, jax.Array) else (len(weights),)
    if shape != (len(loras),) or not all(map(_is_number, weights)):
        raise ConfigError(
            f"weights is {describe_value(weights)}; expected one number for each of the "
            f"{len(loras)} adapters"
        )
    if rank is not None:
        check_rank("rank", rank)
        if method != "svd":
            raise ConfigError(f'rank applies only to method "svd", not to {method!r}')
    prunes, draws = merge is not None and merge.prune, merge is not None and merge.is_random
    if (density is not None) != bool(prunes):
        why = "needs" if prunes else "has no"
        raise ConfigError(f"method {method!r} {why} density, the share of elements kept")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density is {density!r}; expected a share of elements in (0, 1]")
    if (key is not None) != bool(draws):
        raise ConfigError(f"method {method!r} {'needs a' if draws else 'has no'} key")
    aligned, unflatten = align(loras)
    return merge and dataclasses.replace(merge, density=density), aligned, unflatten


def _is_number(weight: object) -> bool:
    """Whether a weight is one number, which may be traced."""
    return number_like.holds(weight) and getattr(weight, "shape", ()) == ()


def _blend_leaf(
    nodes: Sequence[MaybeNode],
    weights: Sequence[Weight],
    merge: Merge | None,
    method: str,
    rank: int | None,
    key: jax.Array | None,
) -> LowRank | Full:
    """Blend the nodes of one leaf, of which there is at least one."""
    if any(isinstance(node, Full) for node in nodes):
        return _blend_full(nodes, weights)
    each = zip(nodes, weights, strict=True)
    pairs = [(node, w) for node, w in each if isinstance(node, LowRank)]
    found = [node for node, _ in pairs]
    for node in found:
        if node.magnitude is not None:
            raise ConfigError(
                f"{get_label(node)} scales the whole weight, so that the effects of two adapters "
                "are no sum: merge each into its base, and lowrank.extract the average"
            )
    _refuse_other_leaves(found)
    if rows := [(node, w) for node, w in pairs if isinstance(node, Rows)]:
        return _blend_rows(rows)
    pairs = [(as_lora(node), w) for node, w in pairs]
    if merge is not None:
        return _merge_leaf(pairs, merge, key)
    whole = _concatenate(pairs)
    if method == "concat":
        return whole
    return truncate(whole, rank or max(node.rank for node, _ in pairs))[0]


def _refuse_other_leaves(nodes: Sequence[LowRank]) -> None:
    """Raise ConfigError unless the adapters are changes of one leaf."""
    for name in ("fan_in", "fan_out", "stack", "shape", "base_modified"):
        came = [getattr(node, name) for node in nodes]
        if any(value != came[0] for value in came):
            raise ConfigError(f"adapters with different {name}: {came}")
    if len({isinstance(node, Rows) for node in nodes}) > 1:
        raise ConfigError("rows of a table beside a product of factors: blend those of one kind")


def _concatenate(pairs: Sequence[tuple[LowRank, Weight]]) -> LowRank:
    """The exact sum of deltas: a's side by side, each times its weight and scale, b's likewise."""
    first = pairs[0][0]
    at = len(first.stacked)
    a = jnp.concatenate([_scale_array(node.a, w * node.scale) for node, w in pairs], -1)
    # a copy, so that neither adapter is deleted when the other is donated
    b = jnp.array(jnp.concatenate([node.b for node, _ in pairs], at), a.dtype, copy=True)
    return dataclasses.replace(first, a=a, b=b, scale=1.0)


def _scale_array(array: jax.Array, factor: Weight) -> jax.Array:
    """Multiply an array by a number, in float32 at least: the result might overflow float16."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32)) * factor


def _blend_full(nodes: Sequence[MaybeNode], weights: Sequence[Weight]) -> Full:
    """The weighted mean of leaves trained whole."""
    total = sum(weights)
    if jaxprs.is_tracer(total) or not math.isclose(float(total), 1, abs_tol=1e-6):
        raise ConfigError(
            f"trained whole: without the base only weights whose sum is 1 blend it, not {total}"
        )
    full = [node for node in nodes if isinstance(node, Full)]
    if len(full) < len(nodes):
        raise ConfigError("some adapters train it whole (Full), others do not")
    if len({(tuple(node.shape), node.weight_dtype) for node in full}) > 1:
        raise ConfigError(f"trained whole with different shapes: {[node.shape for node in full]}")
    value = sum((w * node.value for node, w in zip(full, weights, strict=True)), jnp.zeros(()))
    return dataclasses.replace(full[0], value=value.astype(full[0].value.dtype))


def _blend_rows(pairs: Sequence[tuple[Rows, Weight]]) -> Rows:
    """The sum of the changes of rows, over the rows that any of the adapters changes."""
    rows = sorted({row for node, _ in pairs for row in node.rows})
    place = {row: k for k, row in enumerate(rows)}
    first = pairs[0][0]
    dtype = jnp.result_type(jnp.float32, *(node.b.dtype for node, _ in pairs))
    b = jnp.zeros((len(rows), *first.b.shape[1:]), dtype)
    for node, w in pairs:
        own = jnp.array([place[row] for row in node.rows])
        b = b.at[own].add(_scale_array(node.b, w * node.scale).astype(dtype))
    return dataclasses.replace(first, b=b, rows=tuple(rows), scale=1.0)


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge of the factors of several adapters, element by element.

    Args:
      prune: (arrays [n, *shape], density, key) -> the same with elements that are zero, or None.
      elects_signs: whether elements whose sign is not the majority's are left out, and the rest
        divided by their number.
      is_random: whether prune draws numbers.
      density: the share of elements that prune keeps.
    """

    prune: Pruning | None = None
    elects_signs: bool = False
    is_random: bool = False
    density: float | None = None

    def __call__(self, arrays: jax.Array, weights: jax.Array, key: jax.Array | None) -> jax.Array:
        """Merge arrays [n, *shape] with weights [n] into one [*shape]."""
        if self.prune is not None and self.density is not None:
            arrays = self.prune(arrays, self.density, key)
        weighted = arrays * weights.reshape(-1, *(1,) * (arrays.ndim - 1))
        if not self.elects_signs:
            return weighted.sum(0)
        # the majority is of the pruned elements without their weights, as TIES and PEFT have it
        majority = jnp.where(arrays.sum(0) >= 0, 1, -1)
        agrees = (jnp.sign(arrays) == majority) | jnp.isnan(arrays)
        return jnp.where(agrees, weighted, 0).sum(0) / jnp.maximum(agrees.sum(0), 1)


def keep_largest(arrays: jax.Array, density: float, key: object) -> jax.Array:
    """Zero all but the int(density * size) elements of largest magnitude of each array."""
    flat = arrays.reshape(arrays.shape[0], -1)
    magnitude = jnp.where(jnp.isnan(flat), jnp.inf, jnp.abs(flat))  # NaN is not pruned away
    order = jnp.argsort(-magnitude, axis=1)
    place = jnp.argsort(order, axis=1)  # of each element, its place in that order
    return jnp.where(place < int(density * flat.shape[1]), flat, 0).reshape(arrays.shape)


def keep_random(arrays: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Zero elements at random, each kept with probability density, and divide the rest by it."""
    return jnp.where(jax.random.bernoulli(key, density, arrays.shape), arrays / density, 0)


METHODS: dict[str, Merge | None] = {
    "concat": None,
    "svd": None,
    "linear": Merge(),
    "magnitude_prune": Merge(keep_largest),
    "ties": Merge(keep_largest, elects_signs=True),
    "dare": Merge(keep_random, is_random=True),
    "dare_ties": Merge(keep_random, elects_signs=True, is_random=True),
}


def _merge_leaf(
    pairs: Sequence[tuple[LowRank, Weight]], merge: Merge, key: jax.Array | None
) -> LowRank:
    """Merge a's with a's and b's with b's; stacked weights each on their own."""
    first = pairs[0][0]
    if len({node.rank for node, _ in pairs}) > 1:
        ranks = ", ".join(str(node.rank) for node, _ in pairs)
        raise ConfigError(
            f'factors of different ranks ({ranks}) do not correspond: use "concat" or "svd"'
        )
    weights = jnp.stack([jnp.asarray(w * node.scale, jnp.float32) for node, w in pairs])
    # the derivative of a square root at 0 is infinite
    root = jnp.where(weights == 0, 0, jnp.sqrt(jnp.where(weights == 0, 1, jnp.abs(weights))))
    merged = {}
    for name, own in (("a", jnp.where(weights < 0, -root, root)), ("b", root)):
        arrays = jnp.stack([getattr(node, name) for node, _ in pairs])
        wide = arrays.astype(jnp.promote_types(arrays.dtype, jnp.float32))
        # [n, *stacked, *rest] -> [layers, n, *rest]
        stacked = first.stacked
        layers = math.prod(stacked)
        rest = wide.shape[1 + len(stacked) :]
        wide = jnp.moveaxis(wide.reshape(len(pairs), layers, *rest), 0, 1)
        keys = None
        if key is not None:
            keys = jax.random.split(jax.random.fold_in(key, name == "b"), layers)
        out = jax.vmap(merge, (0, None, None if keys is None else 0))(wide, own, keys)
        merged[name] = out.reshape(*stacked, *rest)
    return dataclasses.replace(first, **merged, scale=1.0)
