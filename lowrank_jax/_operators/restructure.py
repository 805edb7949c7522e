"""Reshapes of a quantized weight, slices of its stack for a scan, and its PartitionSpecs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lowrank_jax._operators.blocks import BLOCKS, ELEMENTS, SELECTED, BlockLayout, is_consecutive
from lowrank_jax._operators.decodings import TransformedDecoding
from lowrank_jax._primitives.contract import labeled_spec, reshape_groups

if TYPE_CHECKING:
    from lowrank_jax._operators.quantized import QuantizedWeight

_NEW = "new"  # (_NEW, axis) labels an axis of the new shape while old axes are still labeled


def reshape(weight: QuantizedWeight, shape: Sequence[int]) -> QuantizedWeight | None:
    """Return the reshaped weight, or None if the reshape does not keep each block whole.

    A weight [4, 128, 6] in blocks of 64 along axis 1 has codes [4, 2, 64, 6]. Reshaped to
    [2, 2, 128, 6], its axes map in groups: 0 -> (0, 1), 1 -> 2, 2 -> 3. The first group splits an
    axis of the codes, [2, 2, 2, 64, 6]; the second, of the blocked axis, and the third change only
    labels. Reshaped to [4, 8, 16, 6], blocked becomes (1, 2) and the codes stay [4, 2, 64, 6].
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
) -> QuantizedWeight | None:
    """Reshape adjacent axes, labeled old, of all arrays to sizes, labeled (_NEW, axis)."""
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

    def cut(array: jax.Array, at: Sequence[int]) -> jax.Array:
        return array.reshape(*array.shape[: at[0]], *sizes, *array.shape[at[-1] + 1 :])

    # scales have no ELEMENTS axis: a place after it is one lower there
    scale_places = [place - (place > weight.elements_axis) for place in at]
    parts = (cut(codes, at), cut(scales, scale_places), table, *(cut(s, at) for s in second))
    if not stacked:
        # Axes after the elements are the decoding's trailing ones, so their number changes. strides
        # locate a scale of the second level in the whole; scales are decoded by now, so all are 1.
        more = len(new) - len(old)
        decode = dataclasses.replace(
            decode,
            trailing=decode.trailing + more * (at[0] > weight.elements_axis),
            strides=(1,) * (len(decode.strides) + more),
        )
    return weight.replace(parts=parts, layout=layout, decode=decode)


def unstack(weight: QuantizedWeight) -> tuple[Any, Any] | None:
    """Return (arrays to scan along axis 0, rebuild(one slice of them) -> weight), or None."""
    if 0 not in weight.layout.axes:
        return None
    place = weight.layout.axes.index(0)
    down = {axis: axis - 1 for axis in range(1, weight.ndim)}
    if place and weight.is_blockwise:
        # Axis 0 is not the first of codes: codes [4, 2, 64, 6] labeled (1, BLOCKS, ELEMENTS, 0).
        # Scan over indices 0..5; a step labels the last axis (SELECTED, 0) and holds its index.
        # The layer's weight is [4, 128], labeled (0, BLOCKS, ELEMENTS, (SELECTED, 0)).
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

    def rebuild(slices: tuple[Any, ...]) -> QuantizedWeight | None:
        codes, scales, *second = slices
        parts = (codes, scales, table, *second)
        return weight.replace(parts=parts, layout=layout).renumber(down)

    return arrays, rebuild


def specs(weight: QuantizedWeight, spec: jax.P) -> QuantizedWeight | None:
    """Return the weight with PartitionSpecs in place of its arrays, or None."""
    empty, selections = type(spec)(), tuple(type(spec)() for _ in weight.selections)
    if isinstance(weight.decode, TransformedDecoding):
        whole = all(entry is None for entry in spec)
        return weight.replace(parts=(empty,) * len(weight.parts)) if whole else None
    # A weight [128, 4, 64] in blocks of 64 along axis 0, split along axis 1 by P(None, "a", None):
    # codes [4, 2, 64, 64] with axes (1, BLOCKS, ELEMENTS, 2) get P("a", None, None, None), and
    # scales P("a", None, None). A split of axis 0 splits the axis BLOCKS, never inside a block.
    stack, split = weight.layout.axes[: weight.num_stack_axes], weight.find_split_axes(spec)
    if split & {*weight.layout.blocked[1:]} or (split and not weight.is_blockwise):
        return None
    first = weight.layout.blocked[0] if weight.layout.blocked else None
    labels = [first if axis == BLOCKS else axis for axis in weight.layout.axes]
    if not weight.is_blockwise:
        labels = [*stack, None, None]
    codes = [None if label == ELEMENTS else label for label in labels]
    scales = [label for i, label in enumerate(codes) if i != weight.elements_axis]
    whole = labeled_spec(spec, (*stack, None))
    second = [whole, labeled_spec(spec, stack), whole]
    parts = (labeled_spec(spec, codes), labeled_spec(spec, scales), empty)
    return weight.replace(parts=(*parts, *second[: len(weight.parts) - 3]), selections=selections)
