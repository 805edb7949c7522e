"""The node of a leaf that is trained whole, without a low-rank adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._errors import make_not_lifted_error
from lowrank_jax._nodes.serialization import Wrapper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Full(Wrapper):
    r"""A leaf that is trained whole, beside the low-rank adapters.

    A leaf narrower than float32 is trained in float32, because bfloat16 would round small updates
    away. The leaf is used, merged and saved in its original dtype.

    Args:
      value: shape of the leaf, dtype promote_types(dtype of the leaf, float32).
      weight_dtype: name of the dtype of the leaf if it differs from that of value, else "".

    >>> import lowrank_jax as lowrank
    >>> params = {"w": jnp.ones((4, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}
    >>> config = lowrank.LoraConfig(rank=2, targets="w", train="bias")
    >>> _, lora = lowrank.init(jax.random.key(0), params, config)
    >>> lora["bias"]
    Full(value=float32[3], weight_dtype='bfloat16')
    """

    value: Any
    weight_dtype: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def inner(self) -> Any:
        """The leaf in the dtype it is trained in."""
        return self.value

    @property
    def weight(self) -> Any:
        """The leaf in its original dtype."""
        return self.value.astype(self.weight_dtype) if self.weight_dtype else self.value

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the node belongs to a leaf of this shape."""
        return tuple(self.shape) == tuple(shape)

    def __jax_array__(self):
        raise make_not_lifted_error("a Full leaf")


def make_full(value: jax.Array, dtype: jax.typing.DTypeLike) -> Full:
    """Make the node of a leaf of the given dtype whose trained copy is value."""
    return Full(value, "" if value.dtype == dtype else jnp.dtype(dtype).name)
