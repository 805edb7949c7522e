"""The leaves of a model read from its folder: one tensor at a time, quantized as they come."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lowrank_jax._files.shards import Tensors
from lowrank_jax._jax.processes import place_array
from lowrank_jax._nodes.host import quantize_on_host
from lowrank_jax._nodes.quantized import Axes
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax._trees.quantize import eval_quantized_shapes
from lowrank_jax._trees.specs import specs
from lowrank_jax.huggingface._leaves import TensorMapping


def read_leaf(tensors: Tensors, mapping: TensorMapping, dtype: Any, sharding: Any) -> jax.Array:
    """A dense leaf."""
    return place_leaf(_read_host(tensors, mapping, dtype), mapping.path, sharding)


def read_quantized(
    tensors: Tensors,
    mapping: TensorMapping,
    dtype: Any,
    axes: tuple[Axes, Axes],
    quant: QuantConfig,
    sharding: Any,
) -> tuple[Any, Any]:
    """A quantized leaf, and what `check_quantized` takes of it; a stack by its layers."""
    fan_in, stack = axes
    shape = jax.ShapeDtypeStruct(mapping.layout.shape, dtype)
    by_layers = mapping.layout.stack[:1] == stack[:1] == (0,)
    leaf = (_iter_layers if by_layers else _read_host)(tensors, mapping, dtype)
    node, bad = quantize_on_host(leaf, eval_quantized_shapes(shape, fan_in, stack, quant))
    del leaf
    _trim_heap()
    return place_leaf(node, mapping.path, sharding), bad


def _trim_heap() -> None:
    """Give back to the system what glibc keeps of freed buffers, which else grows by the leaf."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _read_host(tensors: Tensors, mapping: TensorMapping, dtype: Any) -> np.ndarray:
    """The values of a leaf, in a buffer of their own."""
    if not mapping.layout.stack:
        return _cast(mapping.from_tensor(tensors[mapping.keys[()]]), dtype)
    leaf = np.empty(mapping.layout.shape, dtype)
    _fill_layers(mapping.by_layers(leaf), (), tensors, mapping)
    return leaf


def _iter_layers(tensors: Tensors, mapping: TensorMapping, dtype: Any) -> Iterator[np.ndarray]:
    """The parts of a leaf along its first axis, a stack axis."""
    shape, inner = mapping.layout.shape[1:], tuple(axis - 1 for axis in mapping.layout.stack[1:])
    rest = tuple(axis for axis in range(len(shape)) if axis not in inner)
    for number in range(mapping.layout.shape[0]):
        if not inner:
            yield _cast(mapping.from_tensor(tensors[mapping.keys[number,]]), dtype)
            continue
        part = np.empty(shape, dtype)
        _fill_layers(part.transpose(inner + rest), (number,), tensors, mapping)
        yield part


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    return array.astype(dtype, copy=False)


def _fill_layers(
    view: np.ndarray, first: tuple[int, ...], tensors: Tensors, mapping: TensorMapping
) -> None:
    """Write the layers whose index begins so into their places, each cast on its way."""
    for index, key in mapping.keys.items():
        if index[: len(first)] == first:
            view[index[len(first) :]] = mapping.from_tensor(tensors[key])


def place_leaf(leaf: Any, path: str, sharding: Any) -> Any:
    """A leaf of NumPy arrays on the device, or as `like` has its own."""
    if sharding is None:
        return jax.device_put(leaf)  # CPUs take the buffers over
    if isinstance(sharding, jax.NamedSharding):
        sharding = specs({path: leaf}, {path: sharding})[path]
    else:
        sharding = jax.tree.map(lambda _: sharding, leaf)
    return jax.tree.map(place_array, leaf, sharding)
