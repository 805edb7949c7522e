"""Nodes around a frozen leaf: Adapted adds its adapter, Normed the norms that DoRA needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, TypeAlias

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

Leaf: TypeAlias = "jax.Array | Quantized | Normed"  # a frozen leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Normed(Wrapper):
    r"""A frozen leaf with the squared norm of each output feature, which DoRA needs at every step.

    Args:
      value: the leaf, an array or Quantized.
      squares: $\sum_i W_{io}^2$, float32 [*stack, *fan_out] (float64 for a float64 leaf).
      axes: the axes of the leaf that correspond to those of squares.
      terms: number of weights in each sum.

    Source: DoRA, arXiv 2402.09353, section 4.3; factored in arXiv 2603.22276.

    >>> import lowrank_jax as lowrank
    >>> config = lowrank.LoraConfig(rank=2, targets="w", dora=True)
    >>> base, lora = lowrank.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, config)
    >>> base["w"], base["w"].squares
    (Normed(value=float32[4, 3], squares=float32[3], axes=(1,), terms=4),
     Array([4., 4., 4.], dtype=float32))
    """

    value: Any
    squares: Any
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    terms: int = dataclasses.field(metadata={"static": True})

    @property
    def inner(self) -> jax.Array | Quantized:
        """The leaf."""
        return self.value

    def __jax_array__(self):
        raise make_not_lifted_error("a leaf with DoRA's norms")


def attach_norms(leaf: Leaf, node: LowRank) -> Normed:
    """Compute the squared norms of a leaf along the output features of its adapter."""
    fan_in, fan_out, stack = node.for_shape(leaf.shape).axes(leaf.ndim)
    terms = math.prod(leaf.shape[axis] for axis in fan_in)
    squares = lax.stop_gradient(compute_squared_norm(strip_norms(leaf), stack, fan_out))
    return Normed(strip_norms(leaf), squares, (*stack, *fan_out), terms)


def init_full(leaf: Leaf | Full) -> Full:
    """Make the node that trains a leaf whole; its array is a copy, so that it may be donated."""
    dense = jnp.asarray(as_dense(leaf))
    dtype = jnp.promote_types(dense.dtype, jnp.float32)
    return make_full(jnp.array(dense, dtype, copy=True), dense.dtype)


def strip_norms(leaf: object) -> Any:
    """Return the leaf inside a Normed node, and any other leaf as it is."""
    return leaf.value if isinstance(leaf, Normed) else leaf


def find_frozen(leaf: Any) -> Any:
    """Return the frozen array or Quantized leaf inside of adapters and norms."""
    while isinstance(leaf, Normed | Adapted):
        leaf = leaf.inner
    return leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Adapted(Wrapper):
    r"""A frozen leaf and its adapter: $W_\text{eff} = W + m\,(W' - W)$.

    Args:
      base: the frozen leaf: an array, Quantized, Normed, or Adapted by a frozen adapter.
      delta: LowRank (W' = W + s a b) or Full (W' = its value).
      multiplier: m, a float32 scalar, or None for 1.
      key: typed PRNG keys [*stack] for dropout, or None.
      rate: dropout rate of the input of the adapter branch, static.
      depth: how many times the tree was combined again after this adapter, static. Only adapters of
        depth 0 are trained, and partition takes these off.

    >>> import lowrank_jax as lowrank
    >>> params = {"w": jnp.ones((4, 3))}
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), params, config)
    >>> lowrank.combine(base, lora)["w"]
    Adapted(base=float32[4, 3],
     delta=LowRank(shape=(4, 3), rank=2, scale=2.0, a=float32[4, 2], b=float32[2, 3]))
    """

    base: Any
    delta: LowRank | Full
    multiplier: Any = None
    key: Any = None
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})
    depth: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def inner(self) -> Leaf:
        """The frozen leaf."""
        return self.base

    def __jax_array__(self):
        raise make_not_lifted_error("an adapted weight")


_NODES = LowRank, Full, Adapted, Normed, Quantized


def is_node(value: object) -> bool:
    """Whether a value is a node of this library; the `is_leaf` for trees that hold nodes."""
    return isinstance(value, _NODES)


def is_adapter(value: object) -> bool:
    """Whether a value is an adapter (LowRank or Full) or holds one to train (Adapted).

    has_adapter is also true of a leaf that holds a frozen one.
    """
    return isinstance(value, LowRank | Full) or (isinstance(value, Adapted) and not value.depth)


# what to pass in place of a tree with adapters, for errors
UNADAPTED = (
    "the base from before combine (lowrank.partition(tree) takes off the adapter of the last "
    "combine), or lowrank.merge(base, lora)"
)


def has_adapter(leaf: object) -> bool:
    """Whether a leaf is an adapter, or has one, trained or frozen."""
    return isinstance(strip_norms(leaf), LowRank | Full | Adapted)


def find_adapters(leaves: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the paths of the leaves that are adapters or have one."""
    return [path for path, leaf in leaves if has_adapter(leaf)]


def explain_combined(leaves: Iterable[tuple[str, Any]], what: str) -> str | None:
    """Explain that a tree, which should be an adapter, is a combined tree; None if it is not."""
    if adapted := [path for path, leaf in leaves if isinstance(strip_norms(leaf), Adapted)]:
        return (
            f"{what} is a combined tree (see {adapted[0]!r}): pass its adapter, which is "
            "lowrank.partition(tree)[1]"
        )
    return None


def add_depth(leaf: Any, count: int) -> Any:
    """Return a leaf whose adapters, one inside the other, are count combines deeper."""
    if isinstance(leaf, Normed):
        value = add_depth(leaf.value, count)
        return leaf if value is leaf.value else dataclasses.replace(leaf, value=value)
    if not isinstance(leaf, Adapted):
        return leaf
    return dataclasses.replace(leaf, base=add_depth(leaf.base, count), depth=leaf.depth + count)


def as_dense(leaf: Leaf | Full) -> Any:
    """Return the dense array of a leaf without an adapter: Quantized, Full, or an array."""
    if isinstance(leaf, Quantized):
        return dequantize_node(jaxprs.to_device(leaf))
    if isinstance(leaf, Normed):
        return as_dense(leaf.value)
    return jaxprs.to_device(leaf).weight if isinstance(leaf, Full) else leaf


def collect_adapters(lora: PyTree) -> dict[str, Any]:
    """Return path -> LowRank or Full of an adapter; raises CheckpointError for other trees."""
    nodes = dict(flatten(lora, is_leaf=is_node)[0])
    if problem := explain_combined(nodes.items(), "lora"):
        raise CheckpointError(problem)
    for path, node in nodes.items():
        if not isinstance(node, LowRank | Full):
            raise CheckpointError(
                f"lora holds {type(node).__name__} at {path!r}, where LowRank, Full or None is "
                "expected: pass the adapter, the second result of init"
            )
    if not nodes:
        raise CheckpointError("lora holds no adapter: pass the second result of init")
    return nodes
