"""Write and parse the formats of quantized factors in the entries of a checkpoint's manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._codecs import get_format
from lowrank_jax._codecs.formats import check_block_size
from lowrank_jax._codecs.packing import PACKINGS
from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import CheckpointError, ConfigError
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes.quantized import Quantized, dequantize_node
from lowrank_jax._trees.fingerprint import list_differences

_TYPES = {
    "format": str,
    "block_size": int,
    "packing": str,
    "blocked": list,
    "trailing": int,
    "order": list | None,
    "strides": list,
    "weight_dtype": str,
}


def write_format(factor: Quantized) -> dict[str, Any]:
    """Return the static fields of a quantized factor as plain values."""
    plain = lambda value: [*map(int, value)] if isinstance(value, tuple) else value
    return {name: plain(getattr(factor, name)) for name in _TYPES}


def collect_formats(tree: PyTree) -> dict[str, dict[str, Any]]:
    """Return path -> static fields of the Quantized nodes of a tree, also those within nodes."""
    leaves = flatten(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))[0]
    return {path: write_format(leaf) for path, leaf in leaves if isinstance(leaf, Quantized)}


def read_formats(body: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the manifest's static fields of quantized arrays outside of lora, by path.

    Raises:
      CheckpointError: a field is unknown, missing, or not of its type.
    """
    found = body.get("formats", {})
    if not isinstance(found, dict) or not all(map(_is_format, found.values())):
        raise CheckpointError(
            f"the manifest has the formats {quote_value(found)}, not all known to this "
            "lowrank_jax: use the release that wrote it, or a newer one"
        )
    return found


def _is_format(values: object) -> bool:
    """Whether a value has the fields of `write_format`, each of its type."""
    return (
        isinstance(values, dict)
        and values.keys() == _TYPES.keys()
        and all(_is_valid(name, values[name], kind) for name, kind in _TYPES.items())
    )


def compare_formats(
    wanted: Mapping[str, Mapping[str, Any]], saved: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """List the differences in static fields of the quantized arrays that both trees have."""
    show = lambda formats: {
        f"{path}.{name}": repr(formats[path][name])
        for path in sorted(wanted.keys() & saved.keys())
        for name in _TYPES
    }
    return list_differences(show(wanted), show(saved))


def read_quantized(path: str, arrays: Mapping[str, Any], values: Mapping[str, Any]) -> Quantized:
    """Make a quantized factor of its arrays and of the values of `write_format`.

    Raises:
      CheckpointError: a value or an array is unknown, missing, or not of its type.
    """
    fields = {field.name for field in dataclasses.fields(Quantized)} - _TYPES.keys()
    if values.keys() != _TYPES.keys() or not {"codes", "scales"} <= arrays.keys() <= fields:
        raise CheckpointError(
            f"{path!r} is quantized, with the fields {sorted({*values, *arrays})}, not all known "
            "to this lowrank_jax: use the release that wrote it, or a newer one"
        )
    wrong = [name for name, kind in _TYPES.items() if not _is_valid(name, values[name], kind)]
    if wrong:
        raise CheckpointError(
            f"{path!r} is quantized, with {wrong[0]} {values[wrong[0]]!r}: restore another copy"
        )
    static: Any = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    factor = Quantized(**arrays, **static)
    if not _are_codes_of(factor) or not _is_decodable(factor):
        raise CheckpointError(
            f"{path!r} has codes {factor.codes.dtype}{factor.codes.shape} and scales "
            f"{factor.scales.dtype}{factor.scales.shape}, which are not those of {factor.format} "
            f"in blocks of {factor.block_size}: restore another copy"
        )
    return factor


def _is_valid(name: str, value: Any, kind: Any) -> bool:
    """Whether a static field has a value of its type."""
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    if isinstance(value, list):
        return all(type(item) is int and item >= 0 for item in value)
    if name == "packing":
        return value in PACKINGS
    if name == "weight_dtype":
        return _is_floating(value)
    try:
        if name == "format":
            get_format(value)
        if name == "block_size":
            check_block_size(value)
    except ConfigError:
        return False
    return True


def _is_floating(name: str) -> bool:
    """Whether a name is that of a floating dtype; quantize takes all of them."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        return False
    return dtype.name == name and bool(jnp.issubdtype(dtype, jnp.floating))


def _are_codes_of(factor: Quantized) -> bool:
    """Whether codes and scales have the dtypes and shapes of the format."""
    form, place = get_format(factor.format), factor.leading + 1
    packed = form.is_packed and factor.packing == "uint8"
    codes = tuple(factor.codes.shape)
    dtype = "int8" if not form.is_packed else "uint8" if packed else "uint4"
    elements = factor.block_size // (2 if packed else 1)
    return (
        0 < place < len(codes)
        and codes[place] == elements
        and codes[:place] + codes[place + 1 :] == tuple(factor.scales.shape)
        and factor.codes.dtype == dtype
        and factor.scales.dtype == ("float32" if factor.nested is None else "uint8")
        and all(
            array is None or array.dtype == "float32" for array in (factor.nested, factor.offset)
        )
    )


def _is_decodable(factor: Quantized) -> bool:
    """Whether the static fields and the arrays fit each other, so that decoding has a shape."""
    try:
        dense = jax.eval_shape(dequantize_node, factor)
    except Exception:  # whatever a field of a damaged file does to decoding
        return False
    is_flat = factor.order is not None
    first = None if is_flat or not factor.blocked else factor.shape[factor.leading]
    return dense.shape == tuple(factor.shape) and (is_flat or factor.blocked[:1] == (first,))
