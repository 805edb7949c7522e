"""Computes the dense weight of a node."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lowrank_jax._errors import LowrankError
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Adapted, LowRank, as_dense
from lowrank_jax._operators.low_rank import LowRankWeight
from lowrank_jax._primitives.contract import accumulator_dtype


def materialize(node: PyTree) -> jax.Array:
    """Return the dense weight of a node or array: summed in float32, cast once to the base's dtype.

    Raises:
      LowrankError: node is a LowRank adapter without its base.
    """
    if isinstance(node, LowRank):
        raise LowrankError("a LowRank adapter without its base has no weight: pass combine(...)")
    if not isinstance(node, Adapted):
        return as_dense(node)
    node = jaxprs.to_device(node)
    if isinstance(node.delta, LowRank):
        return LowRankWeight.of(node, None).materialize()
    if node.multiplier is None:
        return node.delta.value.astype(node.base.dtype)  # the base does not matter
    base = as_dense(node.base)
    whole = base.astype(accumulator_dtype(base.dtype))
    change = node.delta.value.astype(whole.dtype) - whole
    return (whole + change * jnp.asarray(node.multiplier, whole.dtype)).astype(base.dtype)
