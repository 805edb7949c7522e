"""How the codes and scales of a quantized weight follow a reshape, and a loop over a stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from lowrank_jax._operators.blocks import SELECTED, BlockLayout, is_consecutive
from lowrank_jax._primitives.contract import reshape_groups

if TYPE_CHECKING:
    from lowrank_jax._operators.quantized import QuantizedWeight

_NEW = "new"  # labels (_NEW, axis) of axes that the reshape is about to number


def reshape(weight: QuantizedWeight, shape: Sequence[int]) -> Any | None:
    """The reshape that leaves each block whole, or None.

    A weight [4, 128, 6] with blocks along its second axis has codes [4, 2, 64, 6]. Reshaped to
    [2, 2, 128, 6] its axes are mapped in runs, 0 -> 0 1, 1 -> 2, 2 -> 3. The first run cuts codes
    to [2, 2, 2, 64, 6]; the second, that of the blocks, and the third change labels alone.
    """
    own, layout, sizes = weight.shape, weight.layout, weight.layout.sizes
    blocked, out = layout.blocked, weight
    for old, new in reshape_groups(own, shape):
        if not {*old} & {*layout.blocked}:
            out = out and _reshape_axes(out, old, new, [shape[axis] for axis in new])
        elif {*old} == {axis for axis in layout.blocked if own[axis] != 1}:
            blocked, sizes = tuple(new), tuple(shape[axis] for axis in new)
        else:
            return None
    for axis, size in enumerate(own):
        if size == 1 and axis in layout.axes:
            out = out and _reshape_axes(out, [axis], [], [])
    if out is None or not is_consecutive(blocked):
        return None
    number = lambda label: label[1] if isinstance(label, tuple) and label[0] == _NEW else label
    axes = tuple(map(number, out.layout.axes))
    units = tuple(axis for axis in range(len(shape)) if axis not in (*axes, *blocked))
    return out.replace(layout=BlockLayout(axes, blocked, sizes, units))


def _reshape_axes(
    weight: QuantizedWeight, old: Sequence[int], new: Sequence[int], sizes: Sequence[int]
) -> Any | None:
    """Adjacent axes of all arrays in other sizes; (_NEW, axis) is the label of the new."""
    axes, decode = weight.layout.axes, weight.decode
    at = [axes.index(axis) for axis in old]
    labels = (*axes[: at[0]], *((_NEW, axis) for axis in new), *axes[at[-1] + 1 :])
    layout = dataclasses.replace(weight.layout, axes=labels)
    if len(old) == len(new) == 1:
        return weight.replace(layout=layout)
    stacked = at[-1] < weight.num_stack_axes
    if not is_consecutive(at) or (
        not stacked and (not weight.is_blockwise or at[0] < weight.num_stack_axes)
    ):
        return None
    weight = weight if stacked else weight.with_decoded_scales()
    codes, scales, table, *second = weight.parts

    def cut(array: Any, at: Sequence[int]) -> Any:
        return array.reshape(*array.shape[: at[0]], *sizes, *array.shape[at[-1] + 1 :])

    under = [place - (place > weight.elements_axis) for place in at]
    parts = (cut(codes, at), cut(scales, under), table, *(cut(s, at) for s in second))
    if not stacked:
        more = len(new) - len(old)
        decode = dataclasses.replace(
            decode,
            trailing=decode.trailing + more * (at[0] > weight.elements_axis),
            strides=(1,) * (len(decode.strides) + more),
        )
    return weight.replace(parts=parts, layout=layout, decode=decode)


def unstack(weight: QuantizedWeight) -> tuple[Any, Any] | None:
    """(arrays to be scanned over, rebuild(one slice of them) -> weight), or None."""
    if 0 not in weight.layout.axes:
        return None
    place = weight.layout.axes.index(0)
    down = {axis: axis - 1 for axis in range(1, weight.ndim)}
    if place and weight.is_blockwise:
        plain, label = weight.with_decoded_scales(), (SELECTED, len(weight.selections))
        axes = tuple(label if axis == 0 else axis for axis in plain.layout.axes)
        layout = dataclasses.replace(plain.layout, axes=axes)
        pick = lambda number: plain.replace(layout=layout, selections=(*plain.selections, number))
        return jnp.arange(weight.shape[0]), lambda number: pick(number).renumber(down)
    if place >= weight.num_stack_axes:
        return None
    codes, scales, table, *second = weight.parts
    arrays = tuple(jnp.moveaxis(array, place, 0) for array in (codes, scales, *second))
    axes = tuple(axis for axis in weight.layout.axes if axis != 0)
    layout = dataclasses.replace(weight.layout, axes=axes)

    def rebuild(slices: tuple[Any, ...]) -> Any:
        codes, scales, *second = slices
        parts = (codes, scales, table, *second)
        return weight.replace(parts=parts, layout=layout).renumber(down)

    return arrays, rebuild
