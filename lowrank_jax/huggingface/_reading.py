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


def read_leaf(tensors: Tensors, lying: TensorMapping, dtype: Any, sharding: Any) -> jax.Array:
    """A dense leaf."""
    return place_leaf(_host(tensors, lying, dtype), lying.path, sharding)


def read_quantized(
    tensors: Tensors,
    lying: TensorMapping,
    dtype: Any,
    axes: tuple[Axes, Axes],
    quant: QuantConfig,
    sharding: Any,
) -> tuple[Any, Any]:
    """A quantized leaf, and what `check_quantized` takes of it; a stack by its layers."""
    fan_in, stack = axes
    shape = jax.ShapeDtypeStruct(lying.layout.shape, dtype)
    by_layers = lying.layout.stack[:1] == stack[:1] == (0,)
    leaf = (_layers if by_layers else _host)(tensors, lying, dtype)
    node, bad = quantize_on_host(leaf, eval_quantized_shapes(shape, fan_in, stack, quant))
    del leaf
    _trim()
    return place_leaf(node, lying.path, sharding), bad


def _trim() -> None:
    """Give back to the system what glibc keeps of freed buffers, which else grows by the leaf."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _host(tensors: Tensors, lying: TensorMapping, dtype: Any) -> np.ndarray:
    """The values of a leaf, in a buffer of their own."""
    if not lying.layout.stack:
        return _cast(lying.from_tensor(tensors[lying.keys[()]]), dtype)
    leaf = np.empty(lying.layout.shape, dtype)
    _fill(lying.by_layers(leaf), (), tensors, lying)
    return leaf


def _layers(tensors: Tensors, lying: TensorMapping, dtype: Any) -> Iterator[np.ndarray]:
    """The parts of a leaf along its first axis, a stack axis."""
    shape, inner = lying.layout.shape[1:], tuple(axis - 1 for axis in lying.layout.stack[1:])
    rest = tuple(axis for axis in range(len(shape)) if axis not in inner)
    for number in range(lying.layout.shape[0]):
        if not inner:
            yield _cast(lying.from_tensor(tensors[lying.keys[number,]]), dtype)
            continue
        part = np.empty(shape, dtype)
        _fill(part.transpose(inner + rest), (number,), tensors, lying)
        yield part


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
    return array.astype(dtype, copy=False)


def _fill(view: np.ndarray, first: tuple[int, ...], tensors: Tensors, lying: TensorMapping) -> None:
    """Write the layers whose index begins so into their places, each cast on its way."""
    for index, key in lying.keys.items():
        if index[: len(first)] == first:
            view[index[len(first) :]] = lying.from_tensor(tensors[key])


def place_leaf(leaf: Any, path: str, sharding: Any) -> Any:
    """A leaf of NumPy arrays on the device, or as `like` has its own."""
    if sharding is None:
        return jax.device_put(leaf)  # CPUs take the buffers over
    if isinstance(sharding, jax.NamedSharding):
        sharding = specs({path: leaf}, {path: sharding})[path]
    else:
        sharding = jax.tree.map(lambda _: sharding, leaf)
    return jax.tree.map(place_array, leaf, sharding)
