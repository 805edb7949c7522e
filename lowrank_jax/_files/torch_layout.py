"""How the leaves of a tree lie in the parameters of torch modules.

The one place that knows PyTorch's transposed layout: a weight is [out, in], A is a.T, B is b.T.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_jax._display.text import to_printable
from lowrank_jax._errors import CheckpointError
from lowrank_jax._nodes import LowRank
from lowrank_jax._primitives.contract import invert_permutation
from lowrank_jax.names import Names, Parameter, parameter


@dataclasses.dataclass(frozen=True)
class TorchLayout:
    """How a leaf lies in the parameters of a torch module, or of the modules of a stack.

    Args:
      shape: the leaf's.
      stack, fan_in, fan_out: its axes.
      kind: "dot" and "conv" (weights of products), "lookup" (a table, [rows, features]), or
        "vector" (biases, norms and all else without such axes).
      fan_in_fan_out: torch's weight is [in, out].
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    kind: str
    fan_in_fan_out: bool = False

    def get_sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """The leaf's sizes along some axes."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def stack_indices(self) -> list[tuple[int, ...]]:
        """The indices of a stack's layers; one empty index where there is no stack."""
        return list(np.ndindex(*self.get_sizes(self.stack)))

    @property
    def in_out(self) -> tuple[int, int]:
        """[in, out] of a product; rows and features of a table."""
        size, width = (math.prod(self.get_sizes(axes)) for axes in (self.fan_in, self.fan_out))
        return (width, size) if self._is_swapped else (size, width)

    @property
    def _is_swapped(self) -> bool:
        """A table that the adapter takes as a projection: its rows are fan-out."""
        return self.kind == "lookup" and self.fan_out < self.fan_in

    @property
    def _conv_order(self) -> tuple[int, ...]:
        """The order (channel, *spatial) among a convolution's fan-in axes."""
        last = len(self.fan_in) - 1
        first = self.fan_out < self.fan_in  # torch's own order of axes
        return tuple(range(last + 1)) if first else (last, *range(last))

    # Factors of one layer: a [*fan_in, r], b [r, *fan_out]

    def factor_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Part -> shape in torch."""
        size, width = self.in_out
        if self.kind == "lookup":
            return {"lora_embedding_A": (rank, size), "lora_embedding_B": (width, rank)}
        ones = (1,) * (len(self.fan_in) - 1) if self.kind == "conv" else ()
        sizes = self.get_sizes(self.fan_in)
        taps = tuple(sizes[i] for i in self._conv_order) if self.kind == "conv" else (size,)
        return {"lora_A.weight": (rank, *taps), "lora_B.weight": (width, rank, *ones)}

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """DoRA's magnitude in torch."""
        ones = (1,) * (len(self.fan_in) - 1)
        return (1, self.in_out[1], *ones) if self.kind == "conv" else (self.in_out[1],)

    def to_factors(self, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
        """Part -> torch's tensor, where possible a view."""
        rank = a.shape[-1]
        names = self.factor_shapes(rank)
        if self._is_swapped:
            first, second = b.reshape(rank, -1), a.reshape(-1, rank)
        elif self.kind == "conv":
            taps = a.transpose(-1, *self._conv_order)
            first, second = taps, b.reshape(rank, -1).T
        else:
            first, second = a.reshape(-1, rank).T, b.reshape(rank, -1).T
        pairs = zip(names.items(), (first, second), strict=True)
        return {name: x.reshape(shape) for (name, shape), x in pairs}

    def from_factors(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """a and b of torch's tensors, in the order of factor_shapes."""
        rank = first.shape[0]
        fan_in, fan_out = self.get_sizes(self.fan_in), self.get_sizes(self.fan_out)
        second = second.reshape(-1, rank)
        if self._is_swapped:
            return second.reshape(*fan_in, rank), first.reshape(rank, *fan_out)
        if self.kind == "conv":
            back = invert_permutation(self._conv_order)
            a = first.transpose(*(1 + axis for axis in back), 0)
        else:
            a = first.T.reshape(*fan_in, rank)
        return a, second.T.reshape(rank, *fan_out)

    # The whole leaf, of one layer

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Torch's shape of the parameter."""
        rest = self.get_sizes(self._inner_axes)
        if self.kind == "vector":
            return rest
        size, width = self.in_out
        if self.kind == "lookup":
            return size, width
        if self.kind == "conv":
            sizes = self.get_sizes(self.fan_in)
            return width, *(sizes[i] for i in self._conv_order)
        return (size, width) if self.fan_in_fan_out else (width, size)

    @property
    def _inner_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.stack)

    @property
    def _torch_order(self) -> tuple[int, ...]:
        """The leaf's axes, stack first, in torch's order."""
        if self.kind in ("vector", "lookup"):
            return self.stack + self._inner_axes
        fan_in = self.fan_in
        if self.kind == "conv":
            fan_in = tuple(fan_in[i] for i in self._conv_order)
        pair = fan_in + self.fan_out if self.fan_in_fan_out else self.fan_out + fan_in
        return self.stack + pair

    def to_weights(self, leaf: np.ndarray) -> np.ndarray:
        """[*stack, *weight_shape]."""
        shape = (*self.get_sizes(self.stack), *self.weight_shape)
        return leaf.transpose(self._torch_order).reshape(shape)

    def from_weights(self, weights: np.ndarray) -> np.ndarray:
        """The leaf of [*stack, *weight_shape]."""
        return weights.reshape(self.get_sizes(self._torch_order)).transpose(
            invert_permutation(self._torch_order)
        )


def find_use(plan: Mapping[str, Any] | None, path: str) -> Any:
    """What a plan says of a leaf; None where there is no plan."""
    if plan is not None and path not in plan:
        raise CheckpointError(
            f"{path!r} is not in the plan, which was made of another tree: call plan(fn, params, "
            "...) with these params, at the same level of the tree"
        )
    return None if plan is None else plan[path]


def find_stack_axes(name: Parameter, use: Any) -> tuple[int, ...]:
    """The axes that enumerate layers: the plan's, or as many leading ones as the name numbers."""
    if name.kind == "weight" and use is not None and use.fan_in:
        return use.stack
    return tuple(range(name.module.count("{}")))


def describe_stack_mismatch(path: str, count: int, name: Parameter) -> str:
    """The problem of a name that does not number a leaf's stack axes."""
    return (
        f"{path!r} has {count} stack axes, and its module's name {name.module!r} "
        f"{name.module.count('{}')} times '{{}}': names must give one for each, as in "
        "'layers.{}.q_proj'"
    )


def infer_layout(
    path: str, shape: tuple[int, ...], name: Parameter, use: Any, node: Any
) -> TorchLayout:
    """How the leaf at a path lies in its parameter; node: its adapter, which knows the axes."""
    stack = find_stack_axes(name, use)
    table = path.rpartition("/")[2] == "embedding"
    if use is not None:
        table = use.lookup or use.op == "lookup"
    if isinstance(node, LowRank):
        stack, fan_in, fan_out, kind = node.stack, node.fan_in, node.fan_out, node.kind
    elif name.kind != "weight" or len(shape) - len(stack) < 2:
        fan_in, fan_out, kind = (), (), "vector"
    elif use is not None and use.fan_in and use.fan_out:
        fan_in, fan_out, kind = use.fan_in, use.fan_out, use.op
    elif len(shape) - len(stack) == 2:
        fan_in, fan_out, kind = (len(stack),), (len(stack) + 1,), "dot"
    else:
        raise CheckpointError(
            f"{path!r} has shape {shape}: which of its axes are contracted cannot be told from the "
            "shape; pass plan=lowrank.plan(fn, params, *args)"
        )
    if len(stack) != name.module.count("{}"):
        raise CheckpointError(describe_stack_mismatch(path, len(stack), name))
    if table and kind != "vector":
        kind = "lookup"
    if kind == "lookup" and len(shape) - len(stack) != 2:
        raise CheckpointError(f"{path!r} of shape {shape} is no table [rows, features]")
    return TorchLayout(shape, stack, fan_in, fan_out, kind, name.fan_in_fan_out)


def resolve_names(leaves: Mapping[str, Any], names: Names) -> dict[str, Parameter]:
    """The parameters of the leaves that have one; `tied` only where the tree ties the two."""
    named = {path: name for path in leaves if (name := parameter(path, names)) is not None}
    first: dict[str, str] = {}
    if twice := [p for p, name in named.items() if first.setdefault(name.key, p) != p]:
        key = named[twice[0]].key
        raise CheckpointError(f"names calls both {first[key]!r} and {twice[0]!r} {key!r}")
    modules = {name.module for name in named.values()}
    return {
        path: dataclasses.replace(name, tied=None) if name.tied in modules else name
        for path, name in named.items()
    }


def validate_name(path: str, name: Parameter) -> None:
    """Refuse a name that no module of torch has.

    Raises:
      CheckpointError: it has control characters, lone surrogates, "/", or nothing between two dots.
    """
    for key in filter(None, (name.key, name.tied)):
        if "/" in key or not all(key.split(".")) or to_printable(key, len(key)) != key:
            raise CheckpointError(
                f"'{to_printable(path)}' is to be called '{to_printable(key)}': torch's names are parts "
                "with a dot between them, without '/' and control characters; rename the leaf, or "
                "give names"
            )


def fill_indices(name: str, index: tuple[int, ...]) -> str:
    """The name with numbers for its "{}"."""
    return functools.reduce(lambda text, i: text.replace("{}", str(i), 1), index, name)
