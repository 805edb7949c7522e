"""Convert leaves and LoRA factors between JAX's layout and that of torch modules.

Torch's weight is [out, in] where the leaf is [in, out]; PEFT's A is a.T and its B is b.T.
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
    """The axes of a leaf that decide its layout in one torch module, or in a stack of modules.

    Args:
      shape: the leaf's shape.
      stack, fan_in, fan_out: the leaf's axes.
      kind: "dot" or "conv" (the weight of a product), "lookup" (an embedding [rows, features]), or
        "vector" (a bias, a norm's scale, and other leaves without fan-in and fan-out axes).
      fan_in_fan_out: whether torch's weight is [in, out], as in GPT-2's Conv1D.

    >>> layout = TorchLayout((4, 2, 3), (), (0,), (1, 2), "dot")  # [in, heads, dim]
    >>> layout.weight_shape, layout.factor_shapes(8)
    ((6, 4), {'lora_A.weight': (8, 4), 'lora_B.weight': (6, 8)})
    >>> layout.to_weights(np.ones((4, 2, 3))).shape
    (6, 4)
    >>> TorchLayout((3, 3, 4, 5), (), (0, 1, 2), (3,), "conv").weight_shape  # HWIO -> OIHW
    (5, 4, 3, 3)
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    kind: str
    fan_in_fan_out: bool = False

    def get_sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the leaf's sizes along the given axes."""
        return tuple(self.shape[axis] for axis in axes)

    @property
    def stack_indices(self) -> list[tuple[int, ...]]:
        """Indices of the layers along the stack axes; one empty index without stack axes."""
        return list(np.ndindex(*self.get_sizes(self.stack)))

    @functools.cached_property
    def in_out(self) -> tuple[int, int]:
        """Fan-in and fan-out sizes of a product; rows and features of an embedding."""
        size, width = (math.prod(self.get_sizes(axes)) for axes in (self.fan_in, self.fan_out))
        return (width, size) if self._is_swapped else (size, width)

    @property
    def _is_swapped(self) -> bool:
        """Whether this is an embedding adapted as a projection, x @ table.T: rows are fan-out."""
        return self.kind == "lookup" and self.fan_out < self.fan_in

    @property
    def _conv_order(self) -> tuple[int, ...]:
        """Positions in fan_in, in torch's order (channel, *spatial)."""
        # The kernel is HWIO (fan-in H, W, I -> positions 2, 0, 1) or torch's own OIHW (fan-in
        # I, H, W -> 0, 1, 2), where the fan-out axis comes first.
        last = len(self.fan_in) - 1
        first = self.fan_out < self.fan_in
        return tuple(range(last + 1)) if first else (last, *range(last))

    # Factors of one layer, a [*fan_in, r] and b [r, *fan_out], in torch:
    #   dot     kernel [4, 2, 3]: a [4, r]          -> lora_A [r, 4]
    #                             b [r, 2, 3]       -> lora_B [6, r]
    #   conv    HWIO [3, 3, 4, 5]: a [3, 3, 4, r]   -> lora_A [r, 4, 3, 3]
    #                              b [r, 5]         -> lora_B [5, r, 1, 1]
    #   lookup  [rows, features]: a [rows, r]       -> lora_embedding_A [r, rows]
    #                             b [r, features]   -> lora_embedding_B [features, r]
    #   lookup, adapted as a projection: a [features, r] is embedding_B and b [r, rows] is
    #   embedding_A, without a transpose: PEFT's adapter is the embedding's either way

    def factor_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the names of the two factors in torch, and their shapes."""
        size, width = self.in_out
        if self.kind == "lookup":
            return {"lora_embedding_A": (rank, size), "lora_embedding_B": (width, rank)}
        ones = (1,) * (len(self.fan_in) - 1) if self.kind == "conv" else ()
        sizes = self.get_sizes(self.fan_in)
        inputs = tuple(sizes[i] for i in self._conv_order) if self.kind == "conv" else (size,)
        return {"lora_A.weight": (rank, *inputs), "lora_B.weight": (width, rank, *ones)}

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """Shape of DoRA's magnitude in torch."""
        ones = (1,) * (len(self.fan_in) - 1)
        return (1, self.in_out[1], *ones) if self.kind == "conv" else (self.in_out[1],)

    def to_factors(self, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
        """Convert a [*fan_in, r] and b [r, *fan_out] to torch's tensors, views where possible."""
        rank = a.shape[-1]
        names = self.factor_shapes(rank)
        if self._is_swapped:
            first, second = b.reshape(rank, -1), a.reshape(-1, rank)
        elif self.kind == "conv":
            kernel = a.transpose(-1, *self._conv_order)
            first, second = kernel, b.reshape(rank, -1).T
        else:
            first, second = a.reshape(-1, rank).T, b.reshape(rank, -1).T
        pairs = zip(names.items(), (first, second), strict=True)
        return {name: x.reshape(shape) for (name, shape), x in pairs}

    def from_factors(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Convert torch's tensors, in the order of factor_shapes, to a [*fan_in, r], b [r, ..]."""
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

    # The dense weight of one layer

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the parameter in torch."""
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
        """The leaf's axes in torch's order, stack axes first."""
        # A "dot" kernel [layers, in, heads, dim] of stack (0,), fan_in (1,), fan_out (2, 3) has
        # the order (0, 2, 3, 1): [layers, heads, dim, in], then reshaped to [layers, out, in].
        if self.kind in ("vector", "lookup"):
            return self.stack + self._inner_axes
        fan_in = self.fan_in
        if self.kind == "conv":
            fan_in = tuple(fan_in[i] for i in self._conv_order)
        pair = fan_in + self.fan_out if self.fan_in_fan_out else self.fan_out + fan_in
        return self.stack + pair

    def to_weights(self, leaf: np.ndarray) -> np.ndarray:
        """Convert the leaf to torch's weights, [*stack, *weight_shape]."""
        shape = (*self.get_sizes(self.stack), *self.weight_shape)
        return leaf.transpose(self._torch_order).reshape(shape)

    def from_weights(self, weights: np.ndarray) -> np.ndarray:
        """Convert torch's weights, [*stack, *weight_shape], to the leaf; inverse of to_weights."""
        return weights.reshape(self.get_sizes(self._torch_order)).transpose(
            invert_permutation(self._torch_order)
        )


def find_use(plan: Mapping[str, Any] | None, path: str) -> Any:
    """Return a leaf's Use in the plan; None without a plan."""
    if plan is not None and path not in plan:
        raise CheckpointError(
            f"{path!r} is not in the plan, which is of another tree: call plan(fn, params, ...) "
            "with these params, at the same level of the tree"
        )
    return None if plan is None else plan[path]


def find_stack_axes(name: Parameter, use: Any) -> tuple[int, ...]:
    """Return the stack axes: the plan's, or one leading axis for each "{}" of the name."""
    if name.kind == "weight" and use is not None and use.fan_in:
        return use.stack
    return tuple(range(name.module.count("{}")))


def describe_stack_mismatch(path: str, count: int, name: Parameter) -> str:
    """Return the error text for a name whose "{}" do not match a leaf's stack axes."""
    return (
        f"{path!r} has {count} stack axes, and its module's name {name.module!r} has "
        f"{name.module.count('{}')} times '{{}}': names must have one for each, as in "
        "'layers.{}.q_proj'"
    )


def infer_layout(
    path: str, shape: tuple[int, ...], name: Parameter, use: Any, node: Any
) -> TorchLayout:
    """Infer a leaf's layout from its adapter `node`, else from its use, else from its shape.

    Raises:
      CheckpointError: the axes are ambiguous, or do not match the name.
    """
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
            f"{path!r} has shape {shape}: which of its axes are contracted is ambiguous; pass "
            "plan=lowrank.plan(fn, params, *args)"
        )
    if len(stack) != name.module.count("{}"):
        raise CheckpointError(describe_stack_mismatch(path, len(stack), name))
    if table and kind != "vector":
        kind = "lookup"
    if kind == "lookup" and len(shape) - len(stack) != 2:
        raise CheckpointError(f"{path!r} of shape {shape} is not an embedding [rows, features]")
    return TorchLayout(shape, stack, fan_in, fan_out, kind, name.fan_in_fan_out)


def resolve_names(leaves: Mapping[str, Any], names: Names) -> dict[str, Parameter]:
    """Return path -> Parameter; `tied` is None where the tied module has a leaf of its own.

    Raises:
      CheckpointError: two leaves have the same name.
    """
    named = {path: name for path in leaves if (name := parameter(path, names)) is not None}
    first: dict[str, str] = {}
    if twice := [p for p, name in named.items() if first.setdefault(name.key, p) != p]:
        key = named[twice[0]].key
        raise CheckpointError(f"names gives both {first[key]!r} and {twice[0]!r} the name {key!r}")
    modules = {name.module for name in named.values()}
    return {
        path: dataclasses.replace(name, tied=None) if name.tied in modules else name
        for path, name in named.items()
    }


def validate_name(path: str, name: Parameter) -> None:
    """Check that a name is valid in torch.

    Raises:
      CheckpointError: it has control characters, lone surrogates, "/", or an empty part.
    """
    for key in filter(None, (name.key, name.tied)):
        if "/" in key or not all(key.split(".")) or to_printable(key, len(key)) != key:
            raise CheckpointError(
                f"'{to_printable(path)}' would be named '{to_printable(key)}': torch's names are "
                "parts joined by dots, without '/' and control characters; rename the leaf, or "
                "pass names"
            )


def fill_indices(name: str, index: tuple[int, ...]) -> str:
    """Replace the "{}" of a name by indices: ("layers.{}.w", (3,)) -> "layers.3.w"."""
    return functools.reduce(lambda text, i: text.replace("{}", str(i), 1), index, name)
