"""The nodes that hold a frozen leaf: with its adapter, or with the norms that DoRA needs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._errors import CheckpointError, make_not_lifted_error
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes.full import Full, make_full
from lowrank_jax._nodes.low_rank import LowRank
from lowrank_jax._nodes.norms import compute_squared_norm
from lowrank_jax._nodes.quantized import Quantized, dequantize_node
from lowrank_jax._nodes.serialization import Wrapper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Normed(Wrapper):
    r"""A frozen leaf and the squared norm of each output feature, which DoRA needs at every step.

    Args:
      value: the leaf, an array or Quantized.
      squares: $\sum_i W_{io}^2$, float32 [*stack, *fan_out].
      axes: the leaf's axes that squares runs along.
      terms: number of weights in each sum.

    Source: DoRA, arXiv 2402.09353, section 4.3; factored in arXiv 2603.22276.
    """

    value: Any
    squares: Any
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    terms: int = dataclasses.field(metadata={"static": True})

    @property
    def inner(self) -> Any:
        """The leaf."""
        return self.value

    def __jax_array__(self):
        raise make_not_lifted_error("a leaf with DoRA's norms")


def attach_norms(leaf: Any, node: LowRank) -> Normed:
    """The leaf with its squared norms, along the axes of an adapter."""
    fan_in, fan_out, stack = node.for_shape(leaf.shape).axes(leaf.ndim)
    terms = math.prod(leaf.shape[axis] for axis in fan_in)
    squares = lax.stop_gradient(compute_squared_norm(strip_norms(leaf), stack, fan_out))
    return Normed(strip_norms(leaf), squares, (*stack, *fan_out), terms)


def init_full(leaf: Any) -> Full:
    """The node that trains a leaf whole, in arrays of its own: it may be donated."""
    dense = jnp.asarray(as_dense(leaf))
    dtype = jnp.promote_types(dense.dtype, jnp.float32)
    return make_full(jnp.array(dense, dtype, copy=True), dense.dtype)


def strip_norms(leaf: Any) -> Any:
    """The leaf itself."""
    return leaf.value if isinstance(leaf, Normed) else leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapted(Wrapper):
    r"""A frozen leaf and its adapter: $W_\text{eff} = W + m\,(W' - W)$.

    Args:
      base: the frozen leaf.
      delta: LowRank (W' = W + s a b) or Full (W' = its value).
      multiplier: m, a scalar array, or None for 1.
      key: dropout key (data of shape [*stack]), or None.
      rate: dropout rate on the adapter branch's input, static.
    """

    base: Any
    delta: LowRank | Full
    multiplier: Any = None
    key: Any = None
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def inner(self) -> Any:
        """The frozen leaf."""
        return self.base

    def __jax_array__(self):
        raise make_not_lifted_error("an adapted weight")


def is_node(value: Any) -> bool:
    """Whether a value is one of the library's nodes: the `is_leaf` for trees that hold them."""
    return isinstance(value, _NODES)


_NODES = LowRank, Full, Adapted, Normed, Quantized


def is_adapter(value: Any) -> bool:
    """Whether a value is a node that has to do with an adapter."""
    return isinstance(value, LowRank | Full | Adapted)


def as_dense(leaf: Any) -> Any:
    """The dense array of a leaf that has no adapter: quantized, trained whole, or an array."""
    if isinstance(leaf, Quantized):
        return dequantize_node(jaxprs.to_device(leaf))
    if isinstance(leaf, Normed):
        return as_dense(leaf.value)
    return jaxprs.to_device(leaf).weight if isinstance(leaf, Full) else leaf


def collect_adapters(lora: PyTree) -> dict[str, Any]:
    """The nodes of an adapter by path."""
    nodes = dict(flatten(lora, is_leaf=is_node)[0])
    for path, node in nodes.items():
        if not isinstance(node, LowRank | Full):
            hint = "lowrank.partition(tree)[1]" if isinstance(node, Adapted) else "init's second"
            raise CheckpointError(
                f"lora holds {type(node).__name__} at {path!r}, where LowRank, Full or None is "
                f"expected: pass the adapter ({hint})"
            )
    if not nodes:
        raise CheckpointError("lora holds no adapter: pass the second result of init")
    return nodes
