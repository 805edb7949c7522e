r"""One product for several low-rank weights that multiply the same input.

$[h_1 \dots h_m] = x\,[a_1 \dots a_m]$: the factors are concatenated along the rank, so that x is
read once, and a matrix unit that pads a rank of 16 to 128 columns pads once. The results are split,
and the transpose of a split is a concatenation: the backward pass computes the gradients of all
factors by one product, $x^\top [dh_1 \dots dh_m]$, and their part of the gradient of x by another,
$[dh_1 \dots dh_m]\,[a_1 \dots a_m]^\top$.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._operators.dot import label_product, order_factors
from lowrank_jax._operators.weight import DotNumbers
from lowrank_jax._primitives.bilinear import bilinear
from lowrank_jax._primitives.contract import RANK

if TYPE_CHECKING:
    from lowrank_jax._operators.low_rank import LowRankWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class InputProduct:
    """The product of an input and the factor of a weight that multiplies it first.

    Args:
      value: [*free axes of the input, r], without the scale.
      factor: "a" or "b".
    """

    value: Any
    factor: str = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class FirstFactor:
    """The factor of a weight that multiplies an input first.

    Args:
      name: "a" or "b".
      value: the factor.
      order: its axes that are contracted, in the order of the input's axes, then its rank axis.
      dtype: of the product.
    """

    name: str
    value: jax.Array
    order: tuple[int, ...]
    dtype: Any

    @property
    def rank(self) -> int:
        """The size of the rank axis."""
        return self.value.shape[self.order[-1]]

    def arrange(self) -> jax.Array:
        """Return the factor [*contracted axes of the input, r], in the dtype of the product."""
        value = self.value.astype(self.dtype)
        return value if self.order == (*range(value.ndim),) else lax.transpose(value, self.order)


def find_first_factor(
    w: LowRankWeight, x: jax.Array, numbers: DotNumbers, on_left: bool
) -> FirstFactor | None:
    """Return the factor that multiplies x first, or None if that product cannot be shared.

    Args:
      w: the weight.
      x: the other operand of its product.
      numbers: of lax.dot_general.
      on_left: whether the weight is its left operand.
    """
    # Dropout gives each weight an input of its own; so does a gain along contracted axes.
    if w.key is not None and w.rate:
        return None
    x_labels, out, mine, _ = label_product(w, x.ndim, numbers, on_left)
    if mine[1] or not {*w.gain_axes} <= {*out}:
        return None
    sizes = {**w.sizes(), **dict(zip(x_labels, x.shape, strict=True))}
    name, _ = order_factors(w, sizes, x_labels, out)
    value, labels = getattr(w, name), w.labels(name)
    # else x is not summed out by the factor alone, or the factor is a table of several adapters'
    wanted = (*(label for label in x_labels if not isinstance(label, tuple)), RANK)
    if len(wanted) != len(labels) or {*wanted} != {*labels} or jaxprs.is_split(value):
        return None
    return FirstFactor(name, value, tuple(map(labels.index, wanted)), w.dtype)


def group_factors(x: jax.Array, factors: Sequence[FirstFactor]) -> list[list[int]]:
    """Return the indices of the factors that share a product with x, one list for each product.

    They have one dtype, and their ranks together are at most the contracted size, so that the
    result of their product is no larger than x. A factor that shares with no other is in no list.
    """
    if jaxprs.is_split(x) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return []
    groups: list[list[int]] = []
    last: dict[Any, tuple[list[int], int]] = {}  # kind of factor -> its last group, ranks left
    for index, factor in enumerate(factors):
        # inside shard_map, factors that vary along other mesh axes would need a collective each
        kind = jnp.dtype(factor.dtype), jaxprs.list_varying_axes(factor.value)
        group, left = last.get(kind, ([], 0))
        if factor.rank > left:
            group, left = [], math.prod(factor.value.shape[i] for i in factor.order[:-1])
            groups.append(group)
        group.append(index)
        last[kind] = group, left - factor.rank
    return [group for group in groups if is_worth(x, [factors[i] for i in group])]


def is_worth(x: jax.Array, factors: Sequence[FirstFactor]) -> bool:
    """Whether one product moves fewer bytes than one for each factor.

    Each product reads x; to concatenate the factors, they are written and read once more.
    """
    copied = 2 * sum(f.value.size * jnp.dtype(f.dtype).itemsize for f in factors)
    return (len(factors) - 1) * x.size * x.dtype.itemsize > copied


def multiply_input(
    x: jax.Array,
    factors: Sequence[FirstFactor],
    contracted: Sequence[int],
    precision: lax.PrecisionLike = None,
) -> list[InputProduct]:
    """Return the product of x and each factor, computed as one product.

    Args:
      x: the input.
      factors: of one dtype.
      contracted: the axes of x that are contracted, ascending.
      precision: of lax.dot_general.
    """
    whole = lax.concatenate([factor.arrange() for factor in factors], len(contracted))
    axes = tuple(range(x.ndim))
    out = (*(axis for axis in axes if axis not in contracted), RANK)
    value = bilinear(x, whole, axes, (*contracted, RANK), out, precision=precision)
    parts = lax.split(value, [factor.rank for factor in factors], axis=value.ndim - 1)
    return [InputProduct(part, f.name) for part, f in zip(parts, factors, strict=True)]
