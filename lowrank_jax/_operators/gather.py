"""Look-ups in a low-rank table: rows of the base, and of the factors that have the indexed axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._operators.blocks import ELEMENTS
from lowrank_jax._operators.branch import multiply_labeled
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import Weight
from lowrank_jax._primitives.contract import Labels, accumulator_dtype, arrange, contract


def gather(w: Any, indices: Any, options: dict[str, Any]) -> Any | None:
    """Read rows: gather from the factors too; along stack axes alone it stays a weight."""
    numbers = options["dimension_numbers"]
    indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
    sliced = {d for d in range(w.ndim) if options["slice_sizes"][d] != w.shape[d]}
    if sliced - indexed:
        return None
    base = w.base.gather(indices, options)
    if base is None:
        return None
    offset, batch = numbers.offset_dims, range(indices.ndim - 1)
    kept = [
        d
        for d in range(w.ndim)
        if d not in numbers.collapsed_slice_dims and d not in numbers.operand_batching_dims
    ]
    rows = iter(("n", i) for i in batch)
    at = dict(zip(offset, kept, strict=True))
    out = tuple(at[i] if i in at else next(rows) for i in range(base.ndim))
    a, a_labels = gather_labeled(w.a, w.a_axes, indices, options, w.shape)
    b, b_labels = gather_labeled(w.b, w.b_axes, indices, options, w.shape)
    if indexed <= {*w.a_axes} & {*w.b_axes}:
        place = {label: i for i, label in enumerate(out)}
        parts = {"a": a, "b": b, "a_axes": a_labels, "b_axes": b_labels}
        for name in ("key", "gain"):
            array, labels = getattr(w, name), getattr(w, name + "_axes")
            if array is not None:
                array, labels = gather_labeled(array, labels, indices, options, w.shape)
            parts |= {name: array, name + "_axes": labels}
        moved = w.replace(**parts)
        return moved._renumber(place, base if isinstance(base, Weight) else DenseWeight(base))
    sizes = {**w.sizes(), **dict(zip(out, base.shape, strict=True))}
    dtype = w.dtype
    scaled = w.apply_scale if w.gain is None else w.replace(multiplier=None).apply_scale
    branch, labels = contract(scaled(a.astype(dtype)), a_labels, b.astype(dtype), b_labels, out)
    branch = arrange(branch, labels, out, sizes).astype(base.dtype)
    ids, id_labels = _in_bounds(indices, options, w.shape), tuple(("n", i) for i in batch)
    inside = arrange(ids, id_labels, out, sizes)
    if options["mode"] == _FILL and w.gain is not None:
        # what is read beyond the table is no row of it, and NaN: no derivative may meet it
        changed = _apply_gain(w, jnp.where(inside, base, 0), branch, out, indices, options)
        return jnp.where(inside, changed, base)
    changed = _apply_gain(w, base, branch, out, indices, options)
    if options["mode"] != lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        return changed
    places = [out.index(label) for label in id_labels]
    drop = lambda rows, ids: _drop_cotangents(rows, ids, places)
    return jaxprs.match_sharding(changed, drop, changed, ids)


_FILL = lax.GatherScatterMode.FILL_OR_DROP


def _apply_gain(
    w: Any, base: jax.Array, branch: jax.Array, out: Labels, indices: Any, options: dict[str, Any]
) -> jax.Array:
    """Rows of the base and of the delta, times the gain of the features or rows that have one."""
    changed = base + branch
    if w.gain is None:
        return changed
    changed = multiply_labeled(
        changed, out, *gather_labeled(w.gain, w.gain_axes, indices, options, w.shape)
    )
    if w.multiplier is None:
        return changed
    exact = accumulator_dtype(base.dtype)
    plain = base.astype(exact)
    return w.apply_multiplier(plain, changed.astype(exact), plain).astype(base.dtype)


def _in_bounds(indices: jax.Array, options: dict[str, Any], shape: Sequence[int]) -> jax.Array:
    """Whether each index is of a slice that there is: bool of indices' shape but for the last."""
    sizes = options["slice_sizes"]
    mapped = options["dimension_numbers"].start_index_map
    last = jnp.array([shape[axis] - sizes[axis] for axis in mapped], jnp.int32)
    return jnp.all((indices >= 0) & (indices <= last.astype(indices.dtype)), -1)


def _drop_cotangents(rows: jax.Array, kept: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The rows; the cotangents of those that are not kept are dropped, as lax.gather drops them.

    rows: [*kept.shape, ...] once `axes` are moved to the front. JAX reads an index beyond an axis
    as its last entry, differentiates forward through that entry, and drops its cotangent. So each
    row becomes the only entry of an axis, and is read as entry 0, or by an index beyond the axis.
    """
    count = len(axes)
    front = jnp.expand_dims(jnp.moveaxis(rows, axes, range(count)), count)
    each = tuple(range(count))
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(count, rows.ndim)),
        collapsed_slice_dims=(count,),
        start_index_map=(count,),
        operand_batching_dims=each,
        start_indices_batching_dims=each,
    )
    sizes = (*(1 for _ in each), *front.shape[count:])
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    entry = jnp.where(kept, 0, 1)[..., None]
    read = lax.gather(front, entry, numbers, sizes, unique_indices=True, mode=mode)
    return jnp.moveaxis(read, range(count), axes)


def gather_blocks(w: Any, indices: Any, options: dict[str, Any]) -> Any | None:
    """The rows of a quantized weight, alone decoded."""
    numbers = options["dimension_numbers"]
    indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
    full = w.shape
    cut = {d for d in range(w.ndim) if options["slice_sizes"][d] != full[d]}
    if not w.is_blockwise or cut - indexed or indexed & {*w.layout.blocked, *w.layout.units}:
        return None
    w = w.apply_selections()
    codes, scales, table = w.with_decoded_scales().parts
    axes = w.layout.axes
    codes, labels = gather_labeled(codes, axes, indices, options, full)
    under = tuple(axis for axis in axes if axis != ELEMENTS)
    scales, _ = gather_labeled(scales, under, indices, options, full)
    at = labels.index(ELEMENTS)
    decode = dataclasses.replace(
        w.decoding, trailing=len(labels) - 1 - at, strides=(1,) * scales.ndim
    )
    blocks = decode(codes, scales, table)
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = iter(axis for axis in range(w.ndim) if axis not in gone)
    rows = iter(("n", i) for i in range(indices.ndim - 1))
    ndim = indices.ndim - 1 + w.ndim - len(gone)
    out = [next(kept) if i in numbers.offset_dims else next(rows) for i in range(ndim)]
    extent = dict.fromkeys(w.layout.units, 1) | dict(zip(labels, blocks.shape, strict=True))
    extent |= {axis: full[axis] for axis in w.layout.blocked}
    value = arrange(blocks, labels, w.layout.expand(out), extent)
    value = value.reshape([extent[label] for label in out])
    if options["mode"] != _FILL:
        return value
    fill = jnp.nan if options["fill_value"] is None else options["fill_value"]
    row_labels = tuple(("n", i) for i in range(indices.ndim - 1))
    inside = arrange(_in_bounds(indices, options, full), row_labels, tuple(out), extent)
    return jnp.where(inside, value, fill).astype(value.dtype)


def gather_labeled(
    array: jax.Array,
    labels: Labels,
    indices: jax.Array,
    options: dict[str, Any],
    shape: Sequence[int],
) -> tuple[jax.Array, Labels]:
    """Gather from an array along the axes it has of a weight of this shape; rows come first.

    Other labels than the weight's axes (the rank, the elements of a block) are read whole.
    Beyond the table zeros are read: the delta of no row.
    """
    numbers = options["dimension_numbers"]
    array, labels = _sort_axes(array, labels)
    at = labels.index
    mapped = [i for i, axis in enumerate(numbers.start_index_map) if axis in labels]
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    batching = [(axis, place) for axis, place in pairs if axis in labels]
    if not mapped and not batching:
        return array, labels
    collapsed = [axis for axis in numbers.collapsed_slice_dims if axis in labels]
    gone = {*collapsed, *(axis for axis, _ in batching)}
    kept = [label for label in labels if label not in gone]
    rows = indices.ndim - 1
    mine = type(numbers)(
        offset_dims=tuple(range(rows, rows + len(kept))),
        collapsed_slice_dims=tuple(sorted(at(axis) for axis in collapsed)),
        start_index_map=tuple(at(numbers.start_index_map[i]) for i in mapped),
        operand_batching_dims=tuple(at(axis) for axis, _ in batching),
        start_indices_batching_dims=tuple(place for _, place in batching),
    )
    full = dict(zip(labels, array.shape, strict=True))
    whole = lambda x: isinstance(x, str) or options["slice_sizes"][x] == shape[x]
    sizes = tuple(full[x] if whole(x) else options["slice_sizes"][x] for x in labels)
    mode = {**options, "fill_value": 0}
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        mode = {**mode, "mode": "clip", "fill_value": None}
    if len(mapped) < indices.shape[-1]:  # a part of an index may repeat
        indices = indices[..., jnp.array(mapped, int)]
        mode = {**mode, "unique_indices": False, "indices_are_sorted": False}
    out = _lax_gather(array, indices, mine, sizes, mode)
    return out, (*(("n", i) for i in range(rows)), *kept)


def _sort_axes(array: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
    """The axes of a factor in the order of the weight's, which lax.gather asks of batching axes."""
    mine: list[Any] = [label for label in labels if not isinstance(label, str)]
    if mine == sorted(mine):
        return array, labels
    order = (*sorted(mine), *(label for label in labels if isinstance(label, str)))
    return lax.transpose(array, tuple(labels.index(label) for label in order)), order


def _lax_gather(
    array: jax.Array, indices: jax.Array, numbers: Any, sizes: Any, options: dict[str, Any]
) -> jax.Array:
    """lax.gather with the equation's own mode and promises."""
    return lax.gather(
        array,
        indices,
        dimension_numbers=numbers,
        slice_sizes=sizes,
        unique_indices=options["unique_indices"],
        indices_are_sorted=options["indices_are_sorted"],
        mode=options["mode"],
        fill_value=options["fill_value"],
    )
