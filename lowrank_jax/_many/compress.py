"""Adapters of a lower rank: the best ones, by QR and SVD of the factors."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._checks.fields import check_rank
from lowrank_jax._errors import ConfigError
from lowrank_jax._jax.types import PyTree
from lowrank_jax._many.align import align
from lowrank_jax._nodes import LowRank
from lowrank_jax._nodes.methods import get_method


@check_arguments()
def compress(lora: PyTree, rank: int) -> tuple[PyTree, dict[str, jax.Array]]:
    r"""Compress an adapter to a lower rank with the least Frobenius error of each delta.

    With $a = Q_a R_a$ and $b^T = Q_b R_b$, the singular values of $a b$ are those of the small
    $R_a R_b^T$, so no dense matrix is formed. The r' largest are kept:
    $a' = Q_a U \sqrt{S}$, $b' = \sqrt{S}\,V^T Q_b^T$.

    Args:
      lora: an adapter, or a stack of them.
      rank: r'. A leaf of at most this rank stays as it is.

    Returns:
      (the adapter, path -> $\lVert ab - a'b'\rVert_F / \lVert ab\rVert_F$ over the whole leaf, a
      scalar, for each leaf that is a product of factors). LoHa and VeRA become LoRA. DoRA's
      magnitude stays: the error is of the product alone.

    Raises:
      ConfigError: rank is not a positive integer, or a leaf's norms are folded (they are of the
        factors as they were).
      TreeError: lora is not an adapter.

    Source: Eckart and Young, Psychometrika 1, 1936.

    >>> import lowrank_jax as lowrank
    >>> node = lowrank.LowRank(jnp.eye(4)[:, :2], jnp.diag(jnp.array([4.0, 3.0, 0.0]))[:2])
    >>> small, errors = compress({"w": node}, rank=1)
    >>> small["w"].a.shape, round(float(errors["w"]), 3)
    ((4, 1), 0.6)
    """
    check_rank("rank", rank)
    aligned, unflatten = align([lora])
    out, errors = {}, {}
    for path, (node,) in aligned.items():
        out[path] = node
        if not isinstance(node, LowRank) or not has_product(node):
            continue
        if node.magnitude is not None and node.folded:
            raise ConfigError(
                f"{path!r} has folded norms, which belong to its factors as they are: compress the "
                "adapter before lowrank.fold_norms"
            )
        out[path], errors[path] = truncate(as_lora(node), rank)
    return unflatten(out), errors


def has_product(node: LowRank) -> bool:
    """Whether an adapter is a product of factors: not rows of a table, nor (IA)^3."""
    return not get_method(node).is_direct and node.a is not None


def as_lora(node: LowRank) -> LowRank:
    """LoHa and VeRA as the LowRank node of the factors that they stand for."""
    if type(node) is LowRank:
        return node
    a, b = node.factors()
    own = {field.name: getattr(node, field.name) for field in dataclasses.fields(LowRank)}
    return LowRank(**own | {"a": a, "b": b})


def truncate(node: LowRank, rank: int) -> tuple[LowRank, jax.Array]:
    """The node of the largest singular values, and the relative error."""
    at = len(node.stacked)
    fan_in, fan_out = node.a.shape[at:-1], node.b.shape[at + 1 :]
    if node.rank <= rank:
        return node, jnp.zeros(())
    wide = jnp.promote_types(node.dtype, jnp.float32)
    # [*stacked, i, r] and [*stacked, o, r]
    a = node.a.astype(wide).reshape(*node.stacked, math.prod(fan_in), node.rank)
    b = node.b.astype(wide).reshape(*node.stacked, node.rank, math.prod(fan_out))
    a, b, values = balance(a, b)
    kept, lost = jnp.sum(values[..., :rank] ** 2), jnp.sum(values[..., rank:] ** 2)
    error = jnp.sqrt(lost / jnp.where(lost > 0, kept + lost, 1))
    a, b = a[..., :rank], b[..., :rank, :]
    a = a.reshape(*node.stacked, *fan_in, a.shape[-1]).astype(node.a.dtype)
    b = b.reshape(*node.stacked, b.shape[-2], *fan_out).astype(node.b.dtype)
    return dataclasses.replace(node, a=a, b=b), error


def balance(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Balance factors a [..., i, r] and b [..., r, o]; return a, b and singular values [..., k].

    The product stays, the values descend, and k = min(i, r, o). Column j of a and row j of b have
    the norm of the root of value j each.
    """
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, values, vt = jnp.linalg.svd(r_a @ jnp.swapaxes(r_b, -1, -2), full_matrices=False)
    root = jnp.sqrt(values)
    return (
        (q_a @ u) * root[..., None, :],
        root[..., None] * (vt @ jnp.swapaxes(q_b, -1, -2)),
        values,
    )
