"""Quantized leaves made on the host, in pieces, of NumPy arrays.

What it takes beside the codes is some megabytes for each core, whatever the leaf's size.
"""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from lowrank_jax._codecs import get_format, host
from lowrank_jax._nodes.quantized import Quantized, get_flat_order

PIECE = 1 << 18  # values that a thread works on
_ALIGNED = 64  # bytes; what JAX asks of a buffer that it takes over without a copy


def quantize_on_host(leaf: Any, shapes: Quantized) -> tuple[Quantized, tuple[int, int]]:
    """Quantize a leaf; the same as `quantized` makes on a device.

    Args:
      leaf: NumPy array; where the leaf is a stack, an iterable of its layers will do.
      shapes: what is to be made, without values.

    Returns:
      The leaf with NumPy arrays, and how many values are not finite, and how many blocks of scales
      are too large to be quantized in their turn.
    """
    node = jax.tree.map(lambda part: allocate_aligned(part.shape, part.dtype), shapes)
    bad = _fill(node, np.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf)
    return node, (bad, 0 if node.nested is None else _count_nonfinite_in(node.nested))


def count_nonfinite(array: np.ndarray) -> int:
    """How many values are not finite."""
    return _sum_over(
        _cut_into_pieces(array, ()), lambda cut: _count_nonfinite_in(_to_float32(array[cut]))
    )


def _to_float32(piece: np.ndarray) -> np.ndarray:
    """A piece as it is computed with, in an order of its own; beyond float32 it is infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(piece, np.float32)


def _count_nonfinite_in(piece: np.ndarray) -> int:
    return int(np.sum(~np.isfinite(piece)))


def _fill(node: Quantized, leaf: Any) -> int:
    """Write codes and scales into a node's arrays."""
    if node.stacked:
        layers = enumerate(leaf)
        return sum(_fill(_get_layer(node, number), layer) for number, layer in layers)
    scales = np.empty(node.scales.shape, np.float32) if node.nested is not None else node.scales
    fill = _fill_blocked if node.order is None else _fill_flat
    bad = fill(node, leaf, scales)
    if node.nested is not None:
        order = get_flat_order(node.strides)
        flat = scales.transpose(order)
        codes, node.nested[...], node.offset[...] = host.encode_scales(flat.reshape(-1), node.dtype)
        node.scales.transpose(order)[...] = codes.reshape(flat.shape)
    return bad


def _get_layer(node: Quantized, number: int) -> Quantized:
    """The node of one layer; views."""
    return jax.tree.map(lambda array: array[(number, ...)], node)


def _fill_blocked(node: Quantized, leaf: np.ndarray, scales: np.ndarray) -> int:
    """A leaf whose axes whole blocks fill; in pieces, between blocks."""
    at = node.leading + 1
    shape = (*node.codes.shape[:at], node.block_size, *node.codes.shape[at + 1 :])
    blocks = leaf.reshape(shape)

    def one(cut: tuple[slice, ...]) -> int:
        piece = _to_float32(blocks[cut])
        codes, absmax = host.encode_blocks(piece, node.format, at)
        _store_codes(node, cut, codes, at)
        scales[cut[:at] + cut[at + 1 :]] = absmax
        return 0 if np.isfinite(absmax).all() else _count_nonfinite_in(piece)

    return _sum_over(_cut_into_pieces(blocks, (at,)), one)


def _fill_flat(node: Quantized, leaf: np.ndarray, scales: np.ndarray) -> int:
    """A leaf in torch's order, in pieces of whole blocks; the last one may be short."""
    rows, size = leaf.transpose(node.order), node.block_size
    width, per_piece = math.prod(rows.shape[1:]), max(1, PIECE // size)

    def one(cut: tuple[slice, ...]) -> int:
        start, stop = cut[0].start * size, min(cut[0].stop * size, leaf.size)
        first = start // width
        near = _to_float32(rows[first : -(-stop // width)]).reshape(-1)
        piece = near[start - first * width : stop - first * width]
        codes, absmax = host.encode_flat(piece, node.format, size)
        _store_codes(node, cut, codes.reshape(-1, size), 1)
        scales[cut] = absmax
        return 0 if np.isfinite(absmax).all() else _count_nonfinite_in(piece)

    starts = range(0, len(scales), per_piece)
    return _sum_over([(slice(i, i + per_piece),) for i in starts], one)


def _store_codes(node: Quantized, cut: tuple[slice, ...], codes: np.ndarray, axis: int) -> None:
    """Write codes into their place; an integer of 4 bits has a byte of its own."""
    if get_format(node.format).is_packed:
        codes = host.pack(codes, axis, node.packing)
    node.codes.view(codes.dtype)[cut] = codes


def _cut_into_pieces(array: np.ndarray, whole: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Where to cut an array: along its longest axis, but for those to leave whole."""
    cuttable = [axis for axis in range(array.ndim) if axis not in whole]
    axis = max(cuttable, key=array.shape.__getitem__, default=None)
    if axis is None or not array.size:
        return [(slice(None),) * array.ndim]
    length = array.shape[axis]
    count = min(length, -(-array.size // PIECE))
    edges = [length * i // count for i in range(count + 1)]
    every = [slice(None)] * array.ndim
    return [
        (*every[:axis], slice(start, stop), *every[axis + 1 :])
        for start, stop in itertools.pairwise(edges)
    ]


def _sum_over(cuts: list[Any], one: Any) -> int:
    """The sum of a function over pieces, by as many threads as there are cores."""
    if len(cuts) == 1:
        return int(one(cuts[0]))
    with ThreadPoolExecutor(min(len(cuts), _count_cores())) as pool:
        return int(sum(pool.map(one, cuts)))


def _count_cores() -> int:
    """How many cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def allocate_aligned(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> np.ndarray:
    """An array that JAX can take over; a uint4 takes a byte."""
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    room = np.empty(size + _ALIGNED, np.uint8)
    start = -room.ctypes.data % _ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)
