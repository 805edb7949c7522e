"""Read a model's leaves from its tensors one at a time, and quantize them on the host."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import DTypeLike

from lowrank_jax._files.shards import Tensors
from lowrank_jax._jax.processes import place_array
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes.host import quantize_on_host
from lowrank_jax._nodes.quantized import Axes
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax._trees.quantize import eval_quantized_shapes
from lowrank_jax._trees.specs import specs
from lowrank_jax.huggingface._leaves import TensorMapping


def read_leaf(
    tensors: Tensors,
    mapping: TensorMapping,
    dtype: DTypeLike,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """Read a dense leaf."""
    return place_leaf(_read_host(tensors, mapping, dtype), mapping.path, sharding)


def read_quantized(
    tensors: Tensors,
    mapping: TensorMapping,
    dtype: DTypeLike,
    axes: tuple[Axes, Axes],
    quant: QuantConfig,
    sharding: jax.sharding.Sharding | None,
) -> tuple[Any, Any]:
    """Read and quantize a leaf; return it, and the flag for `check_quantized`."""
    # If the first axis is a stack axis of the tensors and of the blocks, layers are encoded one by
    # one, so that no dense copy of the whole leaf exists.
    fan_in, stack = axes
    shape = jax.ShapeDtypeStruct(mapping.layout.shape, dtype)
    reads_layers = mapping.layout.stack[:1] == stack[:1] == (0,)
    leaf = (_iter_layers if reads_layers else _read_host)(tensors, mapping, dtype)
    node, bad = quantize_on_host(leaf, eval_quantized_shapes(shape, fan_in, stack, quant))
    del leaf
    _trim_heap()
    return place_leaf(node, mapping.path, sharding), bad


def _trim_heap() -> None:
    """Return freed memory to the system: glibc would keep it, and grow with each leaf."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _read_host(tensors: Tensors, mapping: TensorMapping, dtype: DTypeLike) -> np.ndarray:
    """Read a whole leaf into a new array."""
    if not mapping.layout.stack:
        return _cast(mapping.from_tensor(tensors[mapping.keys[()]]), dtype)
    leaf = np.empty(mapping.layout.shape, dtype)
    _fill_layers(mapping.layers_first(leaf), (), tensors, mapping)
    return leaf


def _iter_layers(
    tensors: Tensors, mapping: TensorMapping, dtype: DTypeLike
) -> Iterator[np.ndarray]:
    """Yield a leaf's slices along its first axis, which is a stack axis."""
    # With shape [24, 8, in, out] and stack (0, 1), each part is [8, in, out] and holds the eight
    # tensors (number, 0) to (number, 7); `inner` is (0,), the part's own stack axis.
    shape, inner = mapping.layout.shape[1:], tuple(axis - 1 for axis in mapping.layout.stack[1:])
    rest = tuple(axis for axis in range(len(shape)) if axis not in inner)
    for number in range(mapping.layout.shape[0]):
        if not inner:
            yield _cast(mapping.from_tensor(tensors[mapping.keys[number,]]), dtype)
            continue
        part = np.empty(shape, dtype)
        _fill_layers(part.transpose(inner + rest), (number,), tensors, mapping)
        yield part


def _cast(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    return array.astype(dtype, copy=False)


def _fill_layers(
    view: np.ndarray, first: tuple[int, ...], tensors: Tensors, mapping: TensorMapping
) -> None:
    """Write the layers whose index starts with `first` into the view, cast to its dtype."""
    for index, key in mapping.keys.items():
        if index[: len(first)] == first:
            view[index[len(first) :]] = mapping.from_tensor(tensors[key])


def place_leaf(leaf: PyTree, path: str, sharding: jax.sharding.Sharding | None) -> Any:
    """Put a leaf of NumPy arrays on the default device, or place it by like's sharding."""
    if sharding is None:
        return jax.device_put(leaf)  # on CPU without a copy
    if isinstance(sharding, jax.NamedSharding):
        sharding = specs({path: leaf}, {path: sharding})[path]
    else:
        sharding = jax.tree.map(lambda _: sharding, leaf)
    return jax.tree.map(place_array, leaf, sharding)
