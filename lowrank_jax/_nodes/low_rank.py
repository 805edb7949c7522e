"""The LowRank node: the factors a and b of one adapted leaf."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax

from lowrank_jax._errors import AxesError, make_not_lifted_error
from lowrank_jax._nodes.quantized import Quantized, dequantize_node
from lowrank_jax._nodes.serialization import Node, list_array_fields
from lowrank_jax._primitives.contract import RANK, Labels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LowRank(Node):
    r"""The factors of one leaf: $\Delta W = s\,a\,b$, transposed to the axes of the weight.

    Args:
      a: [*stack, *fan_in, r], floating; Quantized in an adapter that is stored.
      b: [*stack, r, *fan_out], dtype of a.
      magnitude: DoRA's magnitude m, [*stack, *fan_out], or None. With it
        $W_\text{eff} = m\,(W + s\,a\,b) / \lVert W + s\,a\,b\rVert$, with the norm of each output
        feature, which is held constant in derivatives.
      fan_in, fan_out, stack: axis numbers of the weight, each in ascending order.
      scale: s, static; it is never trained.
      kind: "dot", "conv" or "lookup", the use that determined the axes.
      folded: whether magnitude is already divided by the norm, as by fold_norms.
      base_modified: whether the initializer changed the base, as PiSSA does. The adapter then
        applies to the base that init returned, not to the parameters that were passed to it.

    Source: LoRA, arXiv 2106.09685, equation 3; DoRA, arXiv 2402.09353, equation 5.

    >>> import jax.numpy as jnp
    >>> node = LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), scale=0.5)
    >>> node, node.rank, node.shape
    (LowRank(shape=(4, 3), rank=2, scale=0.5, a=float32[4, 2], b=float32[2, 3]), 2, (4, 3))
    """

    a: Any
    b: Any
    magnitude: Any = None
    fan_in: tuple[int, ...] = dataclasses.field(default=(0,), metadata={"static": True})
    fan_out: tuple[int, ...] = dataclasses.field(default=(1,), metadata={"static": True})
    stack: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    kind: str = dataclasses.field(default="dot", metadata={"static": True})
    folded: bool = dataclasses.field(default=False, metadata={"static": True})
    base_modified: bool = dataclasses.field(default=False, metadata={"static": True})

    required: ClassVar[tuple[str, ...]] = ("a", "b")  # array fields that are never None

    # A Selection, if `select` made the node: where its arrays were taken from. It is no part of the
    # pytree. Every node that a transformation or a map over trees makes lacks it, and is then its
    # arrays alone, as are copies.
    __slots__ = ("selection",)

    @property
    def rank(self) -> int:
        """r, the inner dimension."""
        return self.a.shape[-1]

    @property
    def is_full(self) -> bool:
        """Whether the rank is the largest one possible, the smaller of fan-in and fan-out."""
        if self.a is None or any(RANK not in labels for labels in self.labels):
            return False
        at, columns = len(self.stacked), self.a.shape[-1]
        return self.rank >= min(math.prod(f.shape[at:]) // columns for f in (self.a, self.b))

    def _get_shown_fields(self) -> dict[str, Any]:
        """Return shape, rank and scale, the fields that differ from their default, and arrays."""
        fields = super()._get_shown_fields()
        arrays = {name: fields.pop(name) for name in list_array_fields(self) if name in fields}
        if not all(hasattr(array, "shape") for array in arrays.values()):
            return {**fields, **arrays}  # specs, say, in place of the arrays
        known: dict[str, Any] = {"rank": self.rank} | ({"is_full": True} if self.is_full else {})
        known["scale"] = self.scale
        if not self.adapters:
            fields = {name: fields[name] for name in fields if name not in ("fan_in", "fan_out")}
            known = {"shape": self.shape, **known}
        return {**known, **fields, **arrays}

    @property
    def labels(self) -> tuple[Labels, Labels]:
        """For each axis of a and of b, the axis of the weight it corresponds to, or RANK."""
        return (*self.stack, *self.fan_in, RANK), (*self.stack, RANK, *self.fan_out)

    @property
    def array_labels(self) -> dict[str, Labels]:
        """Field -> labels for each array field that is not None: axes of the weight, or RANK."""
        a, b = self.labels
        labels = {"a": a, "b": b, "magnitude": (*self.stack, *self.fan_out)}
        return {name: own for name, own in labels.items() if getattr(self, name) is not None}

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the axes that lead every array: first of stacked adapters, then of the stack."""
        name, labels = next(iter(self.array_labels.items()))
        shape = getattr(self, name).shape
        return shape[: len(shape) - len(labels) + len(self.stack)]

    @property
    def adapters(self) -> int:
        """Number of leading axes that enumerate adapters stacked into one node."""
        return len(self.stacked) - len(self.stack)

    def factors(self) -> tuple[Any, Any]:
        """Return arrays [*stack, *fan_in, r] and [*stack, r, *fan_out] whose product is ΔW / s."""
        a, b = (x if not isinstance(x, Quantized) else dequantize_node(x) for x in (self.a, self.b))
        return a, b

    def for_shape(self, shape: Sequence[int]) -> LowRank:
        """Return the adapter of a weight of this shape, without stack axes that a loop removed.

        Inside shard_map the shape is that of one device's part.

        Raises:
          AxesError: the shape does not determine which stack axes were removed.
        """
        # A loop or vmap over a stack axis leaves arrays without it, while the static fields still
        # number the axes of the whole weight. The sizes identify the removed axis: an adapter of
        # [3, 4, 2, 5] with stack (0, 2) matches [4, 2, 5] without axis 0, where fan_in (1,) becomes
        # (0,), and [3, 4, 5] without axis 2.
        gone = len(self.fan_in) + len(self.fan_out) + len(self.stack) - len(shape)
        if not 0 < gone <= len(self.stack):
            return self
        left = map(self._drop_stack_axes, itertools.combinations(self.stack, gone))
        found = {(n.fan_in, n.fan_out, n.stack): n for n in left if n.shape == tuple(shape)}
        if len(found) > 1:
            raise AxesError(
                f"an adapter with stack axes {self.stack}, fan_in={self.fan_in} and "
                f"fan_out={self.fan_out} is applied to a weight of shape {tuple(shape)}: its sizes "
                "do not tell which stack axis a loop or vmap took away; put the loop inside the "
                "lifted function"
            )
        return next(iter(found.values()), self)

    def _drop_stack_axes(self, lost: Sequence[int]) -> LowRank:
        """Renumber the axes for arrays from which these stack axes were removed."""
        shift = lambda axes: tuple(
            axis - sum(axis > other for other in lost) for axis in axes if axis not in lost
        )
        axes = {name: shift(getattr(self, name)) for name in ("fan_in", "fan_out", "stack")}
        return dataclasses.replace(self, **axes)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the adapter belongs to a weight of this shape."""
        return tuple(self.for_shape(shape).shape) == tuple(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense ΔW, without stack axes that a loop or vmap removed."""
        # a [5, 8, 2] and b [5, 2, 6] with stack (1,), fan_in (0,), fan_out (2,): axes 1 and 0 get
        # the sizes (5, 8) of a, axis 2 the size 6 of b, so that the shape is (8, 5, 6).
        fan_in, fan_out, stack = self.axes(self.a.ndim - 1 + len(self.fan_out))
        shape = [0] * (len(fan_in) + len(fan_out) + len(stack))
        for axis, size in zip(stack + fan_in, self.a.shape[:-1], strict=True):
            shape[axis] = size
        for axis, size in zip(fan_out, self.b.shape[len(stack) + 1 :], strict=True):
            shape[axis] = size
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of axes of the dense ΔW."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the factors."""
        return self.a.dtype

    def axes(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return fan_in, fan_out and stack for a weight of ndim axes.

        If axes are missing, the first stack axes are taken to be those that a loop removed.

        Raises:
          AxesError: ndim is not possible for this adapter.
        """
        gone = len(self.fan_in) + len(self.fan_out) + len(self.stack) - ndim
        if not 0 <= gone <= len(self.stack):
            raise AxesError(
                f"an adapter with fan_in={self.fan_in}, fan_out={self.fan_out}, "
                f"stack={self.stack} is applied to a weight of {ndim} axes; a vmapped or stacked "
                "adapter is to be used under jax.vmap"
            )
        node = self._drop_stack_axes(sorted(self.stack)[:gone]) if gone else self
        return node.fan_in, node.fan_out, node.stack

    def __jax_array__(self):
        raise make_not_lifted_error("a LowRank adapter")
