"""lax.gather of low-rank and quantized weights: only the rows that are read are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._operators.blocks import ELEMENTS
from lowrank_jax._operators.branch import multiply_labeled
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import Options, Weight
from lowrank_jax._primitives.contract import Labels, accumulator_dtype, arrange, contract
from lowrank_jax._primitives.selected_dot import ENTRY, take_entries

if TYPE_CHECKING:
    from lowrank_jax._operators.low_rank import LowRankWeight
    from lowrank_jax._operators.quantized import QuantizedWeight


def gather(w: LowRankWeight, indices: jax.Array, options: Options) -> Any | None:
    """lax.gather of the base and the factors; a weight if only stack axes are indexed."""
    numbers = options["dimension_numbers"]
    indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
    sliced = {d for d in range(w.ndim) if options["slice_sizes"][d] != w.shape[d]}
    if sliced - indexed:
        return None
    base: Any = w.base.gather(indices, options)
    if base is None:
        return None
    # Rows of an embedding: w [vocab, dim], indices [batch, time, 1], slice_sizes (1, dim) gives
    # [batch, time, dim]. Axes of the result are labeled ("n", i) for axis i of indices, else with
    # the weight axis: out = (("n", 0), ("n", 1), 1). a [vocab, r] becomes [batch, time, r] and
    # b [r, dim], which has no indexed axis, stays: their product has the labels of out.
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
        # Only stack axes are indexed: the result is again a base and two factors.
        place = {label: i for i, label in enumerate(out)}
        parts = {"a": a, "b": b, "a_axes": a_labels, "b_axes": b_labels}
        for name in ("key", "gain"):
            array, labels = getattr(w, name), getattr(w, name + "_axes")
            if array is not None:
                array, labels = gather_labeled(array, labels, indices, options, w.shape)
            parts |= {name: array, name + "_axes": labels}
        weight = w.replace(**parts)
        return weight._renumber(place, base if isinstance(base, Weight) else DenseWeight(base))
    if w.entry is not None:
        # Of a table of adapters [n, vocab, r] the rows of all n were read, [n, batch, time, r]: few
        # numbers, of which one entry is kept. The other factor stays a table.
        (a, a_labels), (b, b_labels) = (
            take_entries(array, labels, w.entry) if {*labels} - {*own} else (array, labels)
            for array, labels, own in ((a, a_labels, w.a_axes), (b, b_labels, w.b_axes))
        )
        if ENTRY in a_labels and ENTRY in b_labels:
            b, b_labels = take_entries(b, b_labels, w.entry)
        if ENTRY in a_labels:  # contract wants it second
            a, a_labels, b, b_labels = b, b_labels, a, a_labels
    sizes = {**w.sizes(), **dict(zip(out, base.shape, strict=True))}
    dtype = w.dtype
    scaled = w.apply_scale if w.gain is None else w.replace(multiplier=None).apply_scale
    branch, labels = contract(
        scaled(a.astype(dtype)), a_labels, b.astype(dtype), b_labels, out, index=w.entry
    )
    branch = arrange(branch, labels, out, sizes).astype(base.dtype)
    ids, id_labels = _in_bounds(indices, options, w.shape), tuple(("n", i) for i in batch)
    inside = arrange(ids, id_labels, out, sizes)
    if options["mode"] == _FILL and w.gain is not None:
        # Rows read out of bounds are NaN. Keep them out of the gain's product, whose derivative
        # would be NaN too (0 * NaN).
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
    w: LowRankWeight,
    base: jax.Array,
    branch: jax.Array,
    out: Labels,
    indices: jax.Array,
    options: Options,
) -> jax.Array:
    """Return the rows of base + delta, times the gain of their features, and the multiplier."""
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


def _in_bounds(indices: jax.Array, options: Options, shape: Sequence[int]) -> jax.Array:
    """Return whether each index vector is in bounds, bool [*indices.shape[:-1]]."""
    sizes = options["slice_sizes"]
    mapped = options["dimension_numbers"].start_index_map
    last = jnp.array([shape[axis] - sizes[axis] for axis in mapped], jnp.int32)
    return jnp.all((indices >= 0) & (indices <= last.astype(indices.dtype)), -1)


def _drop_cotangents(rows: jax.Array, kept: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Return the rows unchanged; drop the cotangents of rows not kept, as lax.gather does.

    Args:
      rows: [*kept.shape, ...] once `axes` are moved to the front.
      kept: bool; False for a row that was read out of bounds.
      axes: the axes of rows that kept runs along.
    """
    # With PROMISE_IN_BOUNDS, JAX reads an index past the end as the last entry, and its transpose
    # drops that entry's cotangent. To reuse exactly this rule, each row becomes the only entry of a
    # new axis: rows [batch, dim] -> [batch, 1, dim]. It is read at index 0 if kept, else at 1.
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


def gather_blocks(w: QuantizedWeight, indices: jax.Array, options: Options) -> Any | None:
    """lax.gather of a quantized weight: decode only the rows that are read, or return None."""
    numbers = options["dimension_numbers"]
    indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
    full = w.shape
    cut = {d for d in range(w.ndim) if options["slice_sizes"][d] != full[d]}
    if not w.is_blockwise or cut - indexed or indexed & {*w.layout.blocked, *w.layout.units}:
        return None
    w = w.apply_selections()
    codes, scales, table = w.with_decoded_scales().parts
    axes = w.layout.axes
    # An embedding [vocab, dim] in blocks of 64 along dim: codes [vocab, dim / 64, 64] labeled
    # (0, BLOCKS, ELEMENTS), scales [vocab, dim / 64]. Gathering n rows gives codes
    # [n, dim / 64, 64] and scales [n, dim / 64], which decode to [n, dim / 64, 64] and reshape to
    # [n, dim]. Only an index along an axis that blocks do not run along can be read like this.
    codes, labels = gather_labeled(codes, axes, indices, options, full)
    scale_axes = tuple(axis for axis in axes if axis != ELEMENTS)
    scales, _ = gather_labeled(scales, scale_axes, indices, options, full)
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
    options: Options,
    shape: Sequence[int],
) -> tuple[jax.Array, Labels]:
    """Apply a weight's lax.gather to a labeled array, along the axes that it has.

    Args:
      array: the array.
      labels: for each of its axes, the weight axis, or a string (RANK, ELEMENTS) for an axis that
        is read whole.
      indices: of the weight's lax.gather, [*rows, index vector].
      options: of the weight's lax.gather.
      shape: the weight's shape.

    Returns:
      The slices [*rows, *kept axes] and their labels, ("n", i) for axis i of rows. The array itself
      if it has no indexed axis. Out of bounds, zeros are read, so that such a row has no delta.
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
    if len(mapped) < indices.shape[-1]:
        # Index vectors (layer, row), and an array with the row axis only: of unique vectors (0, 7)
        # and (1, 7) the row 7 repeats, so the promises about indices no longer hold.
        indices = indices[..., jnp.array(mapped, int)]
        mode = {**mode, "unique_indices": False, "indices_are_sorted": False}
    out = _lax_gather(array, indices, mine, sizes, mode)
    return out, (*(("n", i) for i in range(rows)), *kept)


def _sort_axes(array: jax.Array, labels: Labels) -> tuple[jax.Array, Labels]:
    """Sort the axes as in the weight, since lax.gather wants its batching axes in order."""
    mine: list[Any] = [label for label in labels if not isinstance(label, str)]
    if mine == sorted(mine):
        return array, labels
    order = (*sorted(mine), *(label for label in labels if isinstance(label, str)))
    return lax.transpose(array, tuple(labels.index(label) for label in order)), order


def _lax_gather(
    array: jax.Array,
    indices: jax.Array,
    numbers: lax.GatherDimensionNumbers,
    sizes: Sequence[int],
    options: Options,
) -> jax.Array:
    """lax.gather with the mode and promises of options."""
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
