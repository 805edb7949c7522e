"""Read a model's leaves from its tensors one at a time, and quantize them on the host."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import jax
import numpy as np

from lowrank_jax._files.shards import Tensors
from lowrank_jax._jax.host_arrays import HostArray
from lowrank_jax._nodes.host import quantize_on_host
from lowrank_jax._nodes.quantized import Axes
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax._trees.quantize import eval_quantized_shapes
from lowrank_jax._trees.shardings import shard_leaf
from lowrank_jax.huggingface._leaves import TensorMapping


def read_leaf(
    tensors: Tensors,
    mapping: TensorMapping,
    dtype: jax.typing.DTypeLike,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """Read a dense leaf; of a sharded one, the shards of this process only."""
    if not mapping.layout.stack and sharding is None:
        # without a buffer to fill, the tensor itself is cast and turned
        return jax.device_put(_cast(mapping.from_tensor(tensors[mapping.keys[()]]), dtype))
    leaf, stack = HostArray(mapping.layout.shape, dtype, sharding), mapping.layout.stack
    for index, key in mapping.keys.items():
        if leaf.holds(stack, index):
            leaf.write(stack, index, mapping.from_tensor(tensors[key]))
    return leaf.place()


def check_sharding(
    mapping: TensorMapping,
    dtype: jax.typing.DTypeLike,
    axes: tuple[Axes, Axes],
    quant: QuantConfig,
    sharding: jax.sharding.Sharding | None,
) -> None:
    """Raise TreeError if a sharding would split a block of a leaf."""
    if sharding is not None:
        shape = jax.ShapeDtypeStruct(mapping.layout.shape, dtype)
        shard_leaf(mapping.path, eval_quantized_shapes(shape, *axes, quant), sharding)


def read_quantized(
    tensors: Tensors,
    mapping: TensorMapping,
    dtype: jax.typing.DTypeLike,
    axes: tuple[Axes, Axes],
    quant: QuantConfig,
    sharding: jax.sharding.Sharding | None,
) -> tuple[Any, Any]:
    """Read and quantize a leaf; return it, and the counts for `check_quantized`."""
    # If the first axes are stack axes of the tensors and of the blocks, layers are encoded one by
    # one, so that no dense copy of the whole leaf exists.
    fan_in, stack = axes
    shape = jax.ShapeDtypeStruct(mapping.layout.shape, dtype)
    shapes = eval_quantized_shapes(shape, fan_in, stack, quant)
    depth, own = 0, mapping.layout.stack
    while own[: depth + 1] == stack[: depth + 1] == (*range(depth + 1),):
        depth += 1
    read = lambda index: _read_layer(tensors, mapping, index, dtype)
    shardings = shard_leaf(mapping.path, shapes, sharding)
    node, bad = quantize_on_host(read, shapes, depth, shardings)
    _trim_heap()
    return (jax.device_put(node) if shardings is None else node), bad


def _trim_heap() -> None:
    """Return freed memory to the system: glibc would keep it, and grow with each leaf."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _read_layer(
    tensors: Tensors, mapping: TensorMapping, first: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> np.ndarray:
    """Read the part of a leaf at an index of its leading stack axes, perhaps ()."""
    # With shape [24, 8, in, out] and stack (0, 1), `first` (3, 5) is one tensor, and (3,) a part
    # [8, in, out] of the eight tensors (3, 0) to (3, 7); `inner` is then (0,).
    depth, layout = len(first), mapping.layout
    inner = tuple(axis - depth for axis in layout.stack[depth:])
    if not inner:
        return _cast(mapping.from_tensor(tensors[mapping.keys[first]]), dtype)
    part = HostArray(layout.shape[depth:], dtype, None)
    for index, key in mapping.keys.items():
        if index[:depth] == first:
            part.write(inner, index[depth:], mapping.from_tensor(tensors[key]))
    return part.to_numpy()


def _cast(array: np.ndarray, dtype: jax.typing.DTypeLike) -> np.ndarray:
    return array.astype(dtype, copy=False)
