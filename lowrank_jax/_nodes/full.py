"""The node of a leaf that is trained whole."""

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
    r"""A leaf trained whole beside the adapters.

    It is trained in float32 where the leaf is narrower, for bfloat16 has no room for the steps of
    an optimizer; what uses the leaf, merges it or writes it for others has the leaf's own dtype.

    Args:
      value: of the leaf's shape, in promote_types(the leaf's dtype, float32).
      weight_dtype: name of the leaf's dtype where that is another than value's; else "".
    """

    value: Any
    weight_dtype: str = dataclasses.field(default="", metadata={"static": True})

    @property
    def inner(self) -> Any:
        """The leaf as it is trained."""
        return self.value

    @property
    def weight(self) -> Any:
        """The leaf: value in the leaf's dtype."""
        return self.value.astype(self.weight_dtype) if self.weight_dtype else self.value

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is of a leaf of this shape."""
        return tuple(self.shape) == tuple(shape)

    def __jax_array__(self):
        raise make_not_lifted_error("a Full leaf")


def make_full(value: Any, dtype: jax.typing.DTypeLike) -> Full:
    """The node of a leaf of this dtype, which is trained as value is."""
    return Full(value, "" if value.dtype == dtype else jnp.dtype(dtype).name)
