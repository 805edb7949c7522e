"""Rematerialization policies that know products of quantized weights for products."""

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
    """A policy that asks another about products of quantized weights as about plain ones."""

    policy: Callable[..., Any]

    def __call__(
        self, primitive: jaxprs.Primitive, *avals: jaxprs.ShapedArray, **params: Any
    ) -> Any:
        """What the other says."""
        if primitive is not quantized_dot_p:
            return self.policy(primitive, *avals, **params)
        op, mapped = params["op"], False
        while hasattr(op, "inner"):
            mapped, op = mapped or op.is_mapped, op.inner
        if isinstance(op, BlockConv):
            return self.policy(lax.conv_general_dilated_p, *avals[:2], **dict(op.options))
        if not isinstance(
            op, BlockDot
        ):  # a ragged product, which JAX does not take for a dot either
            return self.policy(primitive, *avals, **params)
        numbers = (((), ()), ((0,), (0,)) if mapped else op.numbers[1])
        plain = {"precision": None, "preferred_element_type": None, "out_sharding": None}
        return self.policy(lax.dot_general_p, *avals[:2], dimension_numbers=numbers, **plain)


@check_arguments(policy=function)
def checkpoint_policy(policy: Callable[..., Any]) -> Callable[..., Any]:
    """Make a policy of jax.checkpoint take products of quantized weights for products.

    They are a primitive of their own, which `jax.checkpoint_policies.dots_saveable` and its like do
    not know: each would be decoded for once more in backward. Where the function that is lifted has
    a `jax.checkpoint` or `nn.remat` inside, its policy is made such without asking; this is for one
    around a lifted function.

    Args:
      policy: as jax.checkpoint takes it.

    Returns:
      The policy.

    Source: jax.checkpoint_policies, whose policies know primitives by name.

    >>> import jax, lowrank_jax as lowrank
    >>> policy = lowrank.checkpoint_policy(jax.checkpoint_policies.dots_saveable)
    >>> step = jax.checkpoint(lowrank.lift(lambda p, x: x @ p["w"]), policy=policy)
    """
    return policy if isinstance(policy, QuantizedDotPolicy) else QuantizedDotPolicy(policy)
