"""Rematerialization policies that treat products of quantized weights as dot products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax import lax

from lowrank_jax._checks.arguments import check_arguments, function
from lowrank_jax._jax import jaxprs
from lowrank_jax._operators.blocks import BlockConv, BlockDot
from lowrank_jax._primitives.quantized_dot import quantized_dot_p


@dataclasses.dataclass(frozen=True)
class QuantizedDotPolicy:
    """A policy that passes products of quantized weights to another policy as plain products.

    Args:
      policy: the other policy, a function of (primitive, *avals, **params).

    >>> import jax
    >>> policy = QuantizedDotPolicy(jax.checkpoint_policies.dots_saveable)
    >>> policy(jax.lax.sin_p, jax.core.ShapedArray((2,), "float32"))
    False
    """

    policy: Callable[..., Any]

    def __call__(
        self, primitive: jaxprs.Primitive, *avals: jaxprs.ShapedArray, **params: Any
    ) -> Any:
        """Return the decision of the other policy."""
        if primitive is not quantized_dot_p:
            return self.policy(primitive, *avals, **params)
        op, mapped = params["op"], False
        while hasattr(op, "inner"):
            mapped, op = mapped or op.is_mapped, op.inner
        if isinstance(op, BlockConv):
            return self.policy(lax.conv_general_dilated_p, *avals[:2], **dict(op.options))
        if not isinstance(
            op, BlockDot
        ):  # a ragged product, which JAX's policies do not treat as a dot either
            return self.policy(primitive, *avals, **params)
        numbers = (((), ()), ((0,), (0,)) if mapped else op.numbers[1])
        plain = {"precision": None, "preferred_element_type": None, "out_sharding": None}
        return self.policy(lax.dot_general_p, *avals[:2], dimension_numbers=numbers, **plain)


@check_arguments(policy=function)
def checkpoint_policy(policy: Callable[..., Any]) -> Callable[..., Any]:
    """Make a jax.checkpoint policy treat products of quantized weights as dot products.

    These products are a separate primitive, unknown to `jax.checkpoint_policies.dots_saveable` and
    similar policies, which would recompute them in the backward pass. For a `jax.checkpoint` or
    `nn.remat` inside a lifted function this is done automatically; use this function for a
    `jax.checkpoint` around a lifted function.

    Args:
      policy: a policy as jax.checkpoint takes it.

    Returns:
      A policy that makes the same decisions and knows products of quantized weights.

    >>> import jax, lowrank_jax as lowrank
    >>> policy = lowrank.checkpoint_policy(jax.checkpoint_policies.dots_saveable)
    >>> step = jax.checkpoint(lowrank.lift(lambda p, x: x @ p["w"]), policy=policy)
    """
    return policy if isinstance(policy, QuantizedDotPolicy) else QuantizedDotPolicy(policy)
