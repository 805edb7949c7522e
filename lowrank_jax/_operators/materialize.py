"""Computes the dense weight of a node."""

from __future__ import annotations

import jax

from lowrank_jax._errors import LowrankError
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Adapted, LowRank, as_dense, strip_norms
from lowrank_jax._operators.wrapping import wrap_adapted


def materialize(node: PyTree) -> jax.Array:
    """Return the dense weight of a node or array: summed in float32, cast once to the base's dtype.

    Raises:
      LowrankError: node is a LowRank adapter without its base.
    """
    if isinstance(node, LowRank):
        raise LowrankError("a LowRank adapter without its base has no weight: pass combine(...)")
    node = strip_norms(node)
    if not isinstance(node, Adapted):
        return as_dense(node)
    return wrap_adapted(jaxprs.to_device(node), None).materialize()
