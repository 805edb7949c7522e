"""Load leaves that a model's folder holds in bitsandbytes' 4 bits, without requantizing them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._files.shards import Tensors
from lowrank_jax._jax.host_arrays import HostArray
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax._trees.shardings import shard_leaf
from lowrank_jax.bitsandbytes._layout import to_quantized
from lowrank_jax.bitsandbytes._tensors import StateTensors
from lowrank_jax.huggingface._leaves import TensorMapping


def find_prequantized(
    leaves: dict[str, TensorMapping],
    tensors: Tensors,
    quant: QuantConfig | None,
    chosen: Collection[str],
    folder: Path,
) -> dict[str, Callable[[Any, Any], Quantized]]:
    """Return path -> reader(dtype, sharding) of the leaves that are 4-bit in the folder.

    Args:
      leaves: path -> TensorMapping.
      tensors: the folder's tensors.
      quant: see load; gives the packing of the codes.
      chosen: paths that quant selects; the file's format must be quant's there.
      folder: the folder, for error messages.

    Raises:
      CheckpointError: a leaf is an embedding, or stacks layers that are not all 4-bit or differ in
        format; or the file's format is not quant's.
    """
    if not isinstance(tensors, StateTensors):
        return {}
    readers, problems = {}, []
    packing = "uint4" if quant is None else quant.packing
    for path, mapping in leaves.items():
        if tensors.weights.keys() & {*mapping.keys.values()}:
            readers[path] = functools.partial(_read_leaf, tensors, mapping, packing)
            if problem := _describe_misfit(mapping, tensors, quant if path in chosen else None):
                problems.append(f"{path!r}: {problem}")
    if problems:
        raise CheckpointError(
            f"{folder} holds weights in 4 bits that do not fit the tree:\n{list_problems(problems)}"
        )
    return readers


def _describe_misfit(
    mapping: TensorMapping, tensors: StateTensors, quant: QuantConfig | None
) -> str:
    """Return why a leaf cannot be loaded, or ""."""
    keys = list(mapping.keys.values())
    if dense := [key for key in keys if key not in tensors.weights]:
        return f"{dense[0]} is dense, and other layers are not; load it with unrolled layers"
    kinds = {_get_settings(tensors.weights[key]) for key in keys}
    if len(kinds) > 1:
        return f"its layers are of several kinds, {sorted(kinds)}; load it with unrolled layers"
    if mapping.layout.stack != tuple(range(len(mapping.layout.stack))):
        return f"its layers are stacked along axes {mapping.layout.stack}; in 4 bits they must lead"
    if mapping.layout.kind != "dot":
        return f"{keys[0]} is in 4 bits, and the leaf is not the weight of a product"
    if quant is not None and kinds != {(quant.format, quant.block_size, quant.double_quant)}:
        format, block_size, double_quant = kinds.pop()
        return (
            f"the file has format={format!r}, block_size={block_size}, double_quant={double_quant}"
            "; pass the same in quant, or leave quant out"
        )
    return ""


def _get_settings(header: dict[str, Any]) -> tuple[str, int, bool]:
    """Return format, block_size and double_quant of a 4-bit weight."""
    return header["quant_type"], header["blocksize"], "nested_offset" in header


def _read_leaf(
    tensors: StateTensors,
    mapping: TensorMapping,
    packing: str,
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
) -> Quantized:
    """Read a Quantized leaf layer by layer."""
    # Each layer is converted alone, and copied into preallocated arrays: 24 layers [128, 48] have
    # codes [2, 64, 48] and scales [2, 48] each, and the leaf [24, 2, 64, 48] and [24, 2, 48].
    # At any time only one layer's arrays are in memory beside the leaf's own shards.
    layer, layout, arrays, structure = mapping.layer_layout, mapping.layout, [], None
    stack = tuple(layout.shape[axis] for axis in layout.stack)
    for index, key in mapping.keys.items():
        if arrays and not any(array.holds(layout.stack, index) for array in arrays):
            continue
        state = tensors.state(key)
        node = to_quantized(state, layer.shape, layer.fan_in, packing)
        node = dataclasses.replace(node, weight_dtype=jnp.dtype(dtype).name)
        parts, own = jax.tree.flatten(node)
        if not arrays:
            structure = own
            whole = [jax.ShapeDtypeStruct((*stack, *part.shape), part.dtype) for part in parts]
            places = jax.tree.leaves(
                shard_leaf(mapping.path, jax.tree.unflatten(own, whole), sharding)
            ) or [None] * len(parts)
            arrays = [
                HostArray(part.shape, part.dtype, place)
                for part, place in zip(whole, places, strict=True)
            ]
        if own != structure:
            raise CheckpointError(
                f"{key} has another nested_quant_map than other layers of {mapping.path!r}: load "
                "it with unrolled layers"
            )
        for array, part in zip(arrays, parts, strict=True):
            array.write(layout.stack, index, np.asarray(part))
    made = jax.tree.unflatten(structure, [array.place() for array in arrays])
    assert made.shape == layout.shape
    return made
