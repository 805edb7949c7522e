"""Map a tree's leaves to the tensors of a model's folder, whose values are computed on demand."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._files.safetensors import DTYPES, order_tensors
from lowrank_jax._files.shards import SINGLE, Tensors
from lowrank_jax._files.torch_layout import find_use, resolve_names, validate_name
from lowrank_jax._jax.processes import raise_everywhere
from lowrank_jax._nodes import as_dense, find_adapters
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._targeting.plan import Plan
from lowrank_jax._trees.fingerprint import to_numpy
from lowrank_jax.huggingface._folder import LazyTensor
from lowrank_jax.huggingface._leaves import TensorMapping, map_leaf, name_tensors
from lowrank_jax.huggingface._matching import is_buffer
from lowrank_jax.names import Names


def collect_tensors(
    leaves: Mapping[str, Any],
    names: Names,
    plan: Plan | None,
    original: Tensors | None,
    dequantize: bool,
) -> dict[str, LazyTensor]:
    """Return tensor name -> LazyTensor of all leaves.

    Args:
      leaves: path -> array or Quantized.
      names: see save.
      plan: see save.
      original: the tensors of like_folder, or None.
      dequantize: see save.

    Raises:
      CheckpointError: leaves have no name or cannot be saved, or do not fit the original; all
        problems are listed.
    """
    if adapted := find_adapters(leaves.items()):
        raise CheckpointError(f"{adapted[0]!r} has an adapter: save lowrank.merge(base, lora)")
    named = resolve_names(leaves, names)
    problems = [f"{path!r}: names has no module for it" for path in leaves if path not in named]
    tensors: dict[str, LazyTensor] = {}
    for path, name in named.items():
        leaf, use = leaves[path], find_use(plan, path)
        try:
            validate_name(path, name)
            _check_leaf(path, leaf, dequantize)
            shape = tuple(leaf.shape)
            keys = name_tensors(path, shape, name, use)
            first = keys[min(keys)]
            known = original.entry(first).shape if original and first in original else None
            mapping = map_leaf(path, shape, name, use, known)
        except CheckpointError as error:
            problems.append(f"{name.key}: {error}")
            continue
        for index, key in mapping.keys.items():
            tensors[key] = LazyTensor(
                mapping.shape, leaf.dtype, functools.partial(_read_tensor, leaf, mapping, index)
            )
        if original and name.tied is not None and (copy := f"{name.tied}.weight") in original:
            tensors[copy] = tensors[first]
    if original is not None:
        problems += _compare_with_original(tensors, original)
    if problems:
        raise CheckpointError(f"nothing was written:\n{list_problems(problems)}")
    return tensors


def _check_leaf(path: str, leaf: Any, dequantize: bool) -> None:
    """Raise CheckpointError if a leaf cannot be written to a file."""
    if not hasattr(leaf, "dtype") or isinstance(leaf, jax.ShapeDtypeStruct):
        raise CheckpointError(f"{path!r} is a {type(leaf).__name__}, not an array with values")
    if isinstance(leaf, Quantized) and not dequantize:
        raise CheckpointError(
            f"{path!r} is quantized: pass dequantize=True to write the dense weight it stands for, "
            "or lowrank.bitsandbytes.to_state_dict to keep its codes"
        )
    if leaf.dtype not in DTYPES.values():
        raise CheckpointError(f"{path!r} is {leaf.dtype}, a dtype that safetensors does not have")


def _compare_with_original(tensors: Mapping[str, LazyTensor], original: Tensors) -> list[str]:
    """List the tensors that only one of the tree and the original has."""
    shape = lambda key: original.entry(key).shape
    lost = [key for key in original if key not in tensors and not is_buffer(key, shape(key))]
    return [f"{key}: not in like_folder" for key in tensors if key not in original] + [
        f"{key}: in like_folder, but the tree has no leaf for it" for key in lost
    ]


def _read_tensor(
    leaf: jax.Array | np.ndarray | Quantized, mapping: TensorMapping, index: tuple[int, ...]
) -> np.ndarray:
    """Compute one tensor; of a stacked leaf only the layer at `index` is moved to the host."""
    # A Quantized leaf is dequantized layer by layer if its stack axes are exactly the layers';
    # otherwise (an axis that one side counts as stack, the other not) as a whole.
    if isinstance(leaf, Quantized) and mapping.layout.stack != tuple(range(leaf.stacked)):
        leaf = as_dense(leaf)
    if isinstance(leaf, Quantized):
        layer = as_dense(_take_layer(leaf, index, ()))
    elif isinstance(leaf, jax.Array):
        layer = _take_layer(leaf, index, mapping.layout.stack) if index else leaf
    else:
        layer = mapping.layers_first(np.asarray(leaf))[index]
    return mapping.to_tensor(to_numpy(mapping.path, layer))


@functools.partial(jax.jit, static_argnums=2)
def _take_layer(leaf: jax.Array | Quantized, index: tuple[int, ...], stack: tuple[int, ...]) -> Any:
    """Index an array along its stack axes, or a node whose arrays all start with them."""
    first = lambda x: x.transpose(stack + tuple(a for a in range(x.ndim) if a not in stack))
    return jax.tree.map(lambda x: first(x)[index], leaf)


def split_shards(tensors: Mapping[str, LazyTensor], limit: int) -> dict[str, dict[str, LazyTensor]]:
    """Split tensors into files of at most `limit` bytes, filled in natural order of the names."""
    shards: list[dict[str, LazyTensor]] = [{}]
    size = 0
    for name in sorted(tensors, key=_natural_key):
        if shards[-1] and size + tensors[name].nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += tensors[name].nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def write_in_turn(
    files: Mapping[str, Mapping[str, LazyTensor]],
    write: Callable[[Mapping[str, Mapping[str, LazyTensor]]], None],
) -> None:
    """Call write(files) in process 0, while the others take part in gathering each tensor.

    All processes compute the tensors in the order in which they are written, also those that
    process 0 no longer writes after an error, which is then raised in every process.
    """
    if jax.process_count() == 1:
        write(files)
        return
    queue = [tensors[name] for tensors in files.values() for name in order_tensors(tensors)]
    error, written = None, 0

    def take(tensor: LazyTensor) -> np.ndarray:
        nonlocal written
        written += 1
        return np.asarray(tensor)

    if jax.process_index() == 0:
        counted = {
            file: {
                name: LazyTensor(tensor.shape, tensor.dtype, functools.partial(take, tensor))
                for name, tensor in tensors.items()
            }
            for file, tensors in files.items()
        }
        try:
            write(counted)
        except CheckpointError as found:
            error = found
    for tensor in queue[written:]:
        np.asarray(tensor)
    raise_everywhere(error)


def _natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sort key that compares numbers by value: layers.2 before layers.10."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
