"""How the leaves of a tree lie in the tensors of a model: their names, and how they turn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.torch_layout import (
    TorchLayout,
    describe_stack_mismatch,
    fill_indices,
    find_stack_axes,
    infer_layout,
)
from lowrank_jax._primitives.contract import invert_permutation
from lowrank_jax.names import Parameter

Shape = tuple[int, ...]
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """A leaf and the tensors that hold it, one for each layer that it stacks.

    Args:
      path: the leaf's.
      keys: index within the stack -> the tensor's name; one empty index where nothing is stacked.
      layout: how a tensor lies in the leaf.
      shape: the tensor's.
    """

    path: str
    keys: Mapping[Index, str]
    layout: TorchLayout
    shape: Shape

    @property
    def layer(self) -> TorchLayout:
        """The layout of one layer."""
        stack = self.layout.stack
        left = [axis for axis in range(len(self.layout.shape)) if axis not in stack]
        inner = lambda axes: tuple(left.index(axis) for axis in axes)
        fan_in, fan_out = inner(self.layout.fan_in), inner(self.layout.fan_out)
        shape = self.layout.get_sizes(tuple(left))
        return dataclasses.replace(
            self.layout, shape=shape, stack=(), fan_in=fan_in, fan_out=fan_out
        )

    def to_tensor(self, layer: np.ndarray) -> np.ndarray:
        """The tensor of one layer of the leaf."""
        return self.layer.to_weights(layer).reshape(self.shape)

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """One layer of the leaf; a view."""
        return self.layer.from_weights(tensor.reshape(self.layout.weight_shape))

    def by_layers(self, leaf: np.ndarray) -> np.ndarray:
        """A view of the leaf that the indices of keys index."""
        stack = self.layout.stack
        rest = tuple(axis for axis in range(leaf.ndim) if axis not in stack)
        return leaf.transpose(stack + rest)

    @property
    def place(self) -> Index:
        """The permutation that undoes `by_layers`."""
        stack = self.layout.stack
        axes = range(len(self.layout.shape))
        return invert_permutation(stack + tuple(axis for axis in axes if axis not in stack))


def name_tensors(path: str, shape: Shape, name: Parameter, use: Any) -> dict[Index, str]:
    """Index within the stack -> name of the tensor.

    Raises:
      CheckpointError: the name does not number the stack axes.
    """
    stack = find_stack_axes(name, use)
    if len(stack) != name.module.count("{}") or max(stack, default=-1) >= len(shape):
        raise CheckpointError(describe_stack_mismatch(path, len(stack), name))
    sizes = [shape[axis] for axis in stack]
    if 0 in sizes:
        raise CheckpointError(f"{path!r} of shape {shape} stacks no layers: leave it out")
    return {index: fill_indices(name.key, index) for index in np.ndindex(*sizes)}


def map_leaf(
    path: str, shape: Shape, name: Parameter, use: Any, tensor: Shape | None = None
) -> TensorMapping:
    """How a leaf lies in its tensors, of which one has the shape `tensor`, where that is known.

    Raises:
      CheckpointError: the axes cannot be told, or the shapes do not fit.
    """
    keys = name_tensors(path, shape, name, use)
    layout = None
    if tensor is not None and name.kind == "weight" and (use is None or not use.fan_in):
        layout = _infer_from_tensor(tensor, shape, find_stack_axes(name, use), name)
    layout = layout or infer_layout(path, shape, name, use, None)
    wanted = layout.weight_shape
    if layout.kind == "vector" and (name.kind == "bias" or tensor == (math.prod(wanted),)):
        wanted = (math.prod(wanted),)  # a bias [heads, dim] is flat in torch
    if tensor is not None and tensor != wanted:
        hint = ""
        if use is None and layout.kind == "dot" and tensor == layout.weight_shape[::-1]:
            hint = "; if it is no kernel [in, out], pass plan=lowrank.plan(fn, params, *args)"
        raise CheckpointError(
            f"shape {list(tensor)}, expected {list(wanted)} for {path!r} of shape {shape}{hint}"
        )
    return TensorMapping(path, keys, layout, wanted)


def _infer_from_tensor(
    tensor: Shape, shape: Shape, stack: Index, name: Parameter
) -> TorchLayout | None:
    """The layout of a kernel of more than two axes, [*fan_in, *fan_out], by its tensor's shape.

    Products of leading sizes differ, unless an axis is 1, where it does not matter whose it is.
    """
    rest = tuple(axis for axis in range(len(shape)) if axis not in stack)
    if len(rest) < 3:
        return None
    if len(tensor) == len(rest):
        return TorchLayout(shape, stack, rest[:-1], rest[-1:], "conv")
    for cut in range(1, len(rest)):
        ends = [math.prod(shape[axis] for axis in axes) for axes in (rest[:cut], rest[cut:])]
        if tensor == tuple(ends if name.fan_in_fan_out else ends[::-1]):
            return TorchLayout(shape, stack, rest[:cut], rest[cut:], "dot", name.fan_in_fan_out)
    return None
