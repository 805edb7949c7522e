"""Map a leaf to the tensors that hold its layers: their names, shapes and axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._files.torch_layout import (
    TorchLayout,
    describe_stack_mismatch,
    fill_indices,
    find_stack_axes,
    infer_layout,
)
from lowrank_jax._targeting.plan import Use
from lowrank_jax.names import Parameter

Shape = tuple[int, ...]
Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """The correspondence between a leaf and its tensors, one for each layer that it stacks.

    Args:
      path: the leaf's path.
      keys: index along the stack axes -> tensor name; one empty index without stack axes.
      layout: the axes of the leaf.
      shape: the shape of each tensor.
    """

    # With path "layers/attn/q/kernel", shape [24, in, heads, dim] and stack (0,):
    #   keys                 {(0,): "layers.0.q.weight", .., (23,): "layers.23.q.weight"}
    #   shape                [heads * dim, in], of each tensor
    #   layers_first(leaf)   [24, in, heads, dim], a view; its index (3,) is layer 3
    #   layer_layout         the same axes without the stack: shape [in, heads, dim]
    #   to_tensor(layer)     [in, heads, dim] -> [heads * dim, in]; from_tensor is the inverse

    path: str
    keys: Mapping[Index, str]
    layout: TorchLayout
    shape: Shape

    @property
    def layer_layout(self) -> TorchLayout:
        """The layout of one layer: the leaf's without its stack axes."""
        # shape [in, 24, out] with stack (1,), fan_in (0,), fan_out (2,): the axes left are 0 and 2,
        # which become 0 and 1: shape [in, out], fan_in (0,), fan_out (1,)
        stack = self.layout.stack
        left = [axis for axis in range(len(self.layout.shape)) if axis not in stack]
        inner = lambda axes: tuple(left.index(axis) for axis in axes)
        fan_in, fan_out = inner(self.layout.fan_in), inner(self.layout.fan_out)
        shape = self.layout.get_sizes(tuple(left))
        return dataclasses.replace(
            self.layout, shape=shape, stack=(), fan_in=fan_in, fan_out=fan_out
        )

    def to_tensor(self, layer: np.ndarray) -> np.ndarray:
        """Convert one layer of the leaf to its tensor."""
        return self.layer_layout.to_weights(layer).reshape(self.shape)

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """Convert a tensor to one layer of the leaf, as a view."""
        return self.layer_layout.from_weights(tensor.reshape(self.layout.weight_shape))

    def layers_first(self, leaf: np.ndarray) -> np.ndarray:
        """Return a view of the leaf with the stack axes first, for the indices of `keys`."""
        stack = self.layout.stack
        rest = tuple(axis for axis in range(leaf.ndim) if axis not in stack)
        return leaf.transpose(stack + rest)


def name_tensors(path: str, shape: Shape, name: Parameter, use: Use | None) -> dict[Index, str]:
    """Return index along the stack axes -> tensor name.

    Raises:
      CheckpointError: the name does not have one "{}" for each stack axis, or one has size 0.
    """
    stack = find_stack_axes(name, use)
    if len(stack) != name.module.count("{}") or max(stack, default=-1) >= len(shape):
        raise CheckpointError(describe_stack_mismatch(path, len(stack), name))
    sizes = [shape[axis] for axis in stack]
    if 0 in sizes:
        raise CheckpointError(f"{path!r} of shape {shape} stacks 0 layers: leave it out")
    return {index: fill_indices(name.key, index) for index in np.ndindex(*sizes)}


def map_leaf(
    path: str, shape: Shape, name: Parameter, use: Use | None, tensor: Shape | None = None
) -> TensorMapping:
    """Map a leaf to its tensors.

    Args:
      path: the leaf's path.
      shape: the leaf's shape.
      name: the parameter's name.
      use: the leaf's use in the plan, or None.
      tensor: the shape of one of the tensors, if known. It is checked, and decides the axes of
        kernels with more than two axes for which the plan has none.

    Raises:
      CheckpointError: the axes are ambiguous, or the shapes do not match.
    """
    keys = name_tensors(path, shape, name, use)
    layout = None
    if tensor is not None and name.kind == "weight" and (use is None or not use.fan_in):
        layout = _infer_from_tensor(tensor, shape, find_stack_axes(name, use), name)
    layout = layout or infer_layout(path, shape, name, use, None)
    wanted = layout.weight_shape
    if layout.kind == "vector" and (name.kind == "bias" or tensor == (math.prod(wanted),)):
        wanted = (math.prod(wanted),)  # a bias [heads, dim] is [heads * dim] in torch
    if tensor is not None and tensor != wanted:
        hint = ""
        if use is None and layout.kind == "dot" and tensor == layout.weight_shape[::-1]:
            hint = "; if it is not a kernel [in, out], pass plan=lowrank.plan(fn, params, *args)"
        raise CheckpointError(
            f"shape {list(tensor)}, expected {list(wanted)} for {path!r} of shape {shape}{hint}"
        )
    return TensorMapping(path, keys, layout, wanted)


def _infer_from_tensor(
    tensor: Shape, shape: Shape, stack: Index, name: Parameter
) -> TorchLayout | None:
    """Infer the layout of a kernel [*fan_in, *fan_out] with three axes or more; None if unknown."""
    # A tensor with as many axes is a convolution's: HWIO -> OIHW. Otherwise it is [out, in], and
    # the kernel is cut where the two products of sizes match. For kernel [12, 4, 3]:
    #   tensor [12, 12]   cut 1: fan_in [12], fan_out [4, 3]  -> [out, in] = [12, 12], matches
    #   tensor [3, 48]    cut 2: fan_in [12, 4], fan_out [3]  -> [out, in] = [3, 48], matches
    # Cuts give different products unless an axis has size 1, whose group does not matter.
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
