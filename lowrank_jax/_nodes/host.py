"""Quantization of NumPy arrays on the host, in pieces and by several threads.

Besides the codes it needs a few megabytes of memory for each core, whatever the size of the leaf.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from lowrank_jax._codecs import get_format, host
from lowrank_jax._jax.host_arrays import HostArray, allocate_aligned
from lowrank_jax._nodes.decoding import get_flat_order
from lowrank_jax._nodes.quantized import Quantized

PIECE = 1 << 18  # number of values that a thread encodes at a time


def quantize_on_host(
    read: np.ndarray | Callable[[tuple[int, ...]], np.ndarray],
    shapes: Quantized,
    depth: int | None = None,
    shardings: Quantized | None = None,
) -> tuple[Quantized, tuple[int, int]]:
    """Quantize a leaf on the host, with the result of `quantize_array` on a device.

    Args:
      read: a NumPy array, or for a stack a function from the index of a layer to the layer. Layers
        of which no device of this process has a part are not read.
      shapes: the node to make, with shapes in place of arrays.
      depth: the number of stack axes that the index has, all of them for an array.
      shardings: the node with shardings in place of arrays; of each array only the shards of this
        process are held in memory.

    Returns:
      The node with NumPy arrays, or with shardings with arrays on their devices; and two counts,
      over the layers that were read: of values that are not finite, and of blocks of scales that
      are too large for double quantization.
    """
    if isinstance(read, np.ndarray):
        read, depth = read.__getitem__, shapes.stacked
    depth = depth or 0
    axes, parts = range(depth), jax.tree.leaves(shapes)
    places = [None] * len(parts) if shardings is None else jax.tree.leaves(shardings)
    arrays = [
        HostArray(part.shape, part.dtype, place) for part, place in zip(parts, places, strict=True)
    ]
    make = functools.partial(jax.tree.unflatten, jax.tree.structure(shapes))
    scratch, counts = None, [0, 0]
    for index in np.ndindex(*shapes.shape[:depth]):
        if not any(array.holds(axes, index) for array in arrays):
            continue
        own: Any = [array.view(axes, index) for array in arrays]
        in_place = all(part is not None for part in own)
        if not in_place:
            scratch = scratch or [allocate_aligned(p.shape[depth:], p.dtype) for p in parts]
            own = scratch
        node = make(own)
        counts[0] += _fill(node, np.asarray(read(index)))
        counts[1] += 0 if node.nested is None else _count_nonfinite_in(node.nested)
        if not in_place:
            for array, part in zip(arrays, own, strict=True):
                array.write(axes, index, part)
    if shardings is None:
        return make([array.to_numpy() for array in arrays]), (counts[0], counts[1])
    return make([array.place() for array in arrays]), (counts[0], counts[1])


def count_nonfinite(array: np.ndarray) -> int:
    """Count the values that are not finite, piece by piece."""
    return _sum_over(
        _cut_into_pieces(array, ()), lambda cut: _count_nonfinite_in(_to_float32(array[cut]))
    )


def _to_float32(piece: np.ndarray) -> np.ndarray:
    """Convert a piece to contiguous float32; values that overflow become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(piece, np.float32)


def _count_nonfinite_in(piece: np.ndarray) -> int:
    """Count the values of one piece that are not finite."""
    return int(np.sum(~np.isfinite(piece)))


def _fill(node: Quantized, leaf: Any) -> int:
    """Write codes and scales into the arrays of a node; return the count of nonfinite values."""
    # A stack is filled layer by layer: the arrays of `_get_layer` are views. With double
    # quantization, the float32 scales of a layer go to a temporary array. Once all are known, they
    # are encoded in their flat order and the codes are written through the transposed view: scales
    # [2, 6] with strides (1, 2) have the order (1, 0), so that flat is [6, 2].
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
    """Get the node of one layer of a stack; its arrays are views."""
    return jax.tree.map(lambda array: array[(number, ...)], node)


def _fill_blocked(node: Quantized, leaf: np.ndarray, scales: np.ndarray) -> int:
    """Fill a node whose codes keep the axes of the leaf, cutting pieces along axes of blocks."""
    # A leaf [128, 6] in blocks of 64: blocks is the view [2, 64, 6], axis at = 1 is never cut. A
    # piece is, say, [2, 64, 0:3], its scales [2, 0:3]: the same cut without that axis.
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
    """Fill a node kept flat, in torch's order, in pieces of whole blocks; the last may be short."""
    # The flat order is that of the transposed leaf `rows`, which is not contiguous. A piece is a
    # range start:stop of it, so the rows that cover the range are copied, and the range is cut out
    # of the copy. For rows of width 10 and the range 32:64: rows 3:7 are copied, and of these 40
    # values 2:34 are the piece.
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
    """Write codes into the node; a NumPy uint4 takes a byte, so bytes are written as such."""
    if get_format(node.format).is_packed:
        codes = host.pack(codes, axis, node.packing)
    node.codes.view(codes.dtype)[cut] = codes


def _cut_into_pieces(array: np.ndarray, whole: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Cut an array into pieces of about PIECE values along its longest axis not in `whole`."""
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


def _sum_over(cuts: list[tuple[slice, ...]], one: Callable[[tuple[slice, ...]], int]) -> int:
    """Sum the results of a function over pieces, with one thread for each core."""
    if len(cuts) == 1:
        return int(one(cuts[0]))
    with ThreadPoolExecutor(min(len(cuts), _count_cores())) as pool:
        return int(sum(pool.map(one, cuts)))


def _count_cores() -> int:
    """Count the cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # only on some systems
    return len(allowed(0)) if allowed else os.cpu_count() or 1
