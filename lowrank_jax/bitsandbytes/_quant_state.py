"""Read, validate and write the tensors in which bitsandbytes stores one 4-bit weight.

Source: bitsandbytes 0.50.2, functional.QuantState.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowrank_jax._checks.arguments import is_finite
from lowrank_jax._codecs import FORMATS
from lowrank_jax._codecs.formats import BLOCK_SIZES
from lowrank_jax._codecs.scales import DYNAMIC_MAP, SCALE_BLOCK
from lowrank_jax._display.text import shorten
from lowrank_jax._errors import CheckpointError, ConfigError, list_problems
from lowrank_jax._files.json_text import parse_json
from lowrank_jax._files.safetensors import AXES_LIMIT
from lowrank_jax._jax.paths import find_nearest_names

# The tensors of a weight [48, 128] in blocks of 64 (n = 6144 elements, 96 blocks):
#   NAME                     uint8 [3072, 1]   two codes a byte; the first is in the high four bits
#   NAME.absmax              float32 [96]      with double quantization uint8 [96], codes of it
#   NAME.quant_map           float32 [16]      the values that the codes stand for
#   NAME.nested_absmax       float32 [1]       double quantization: absmax of 256 blocks each
#   NAME.nested_quant_map    float32 [256]     double quantization: what absmax's codes stand for
#   NAME.quant_state.bitsandbytes__nf4         uint8, JSON: quant_type, blocksize, dtype, shape,
#                                              and nested_offset with double quantization
DTYPES = ("bfloat16", "float16", "float32")
STORAGES = ("uint8", *DTYPES)
_TEXT_LIMIT = 1 << 16
_TABLES = {row.name: np.array(row.table) for row in FORMATS.values() if row.bitsandbytes}
_SINGLE = ("absmax", "quant_map")
_DOUBLE = ("nested_absmax", "nested_quant_map")
SIDES = (*_SINGLE, *_DOUBLE)
STATES = tuple(f"quant_state.bitsandbytes__{format}" for format in _TABLES)


@dataclasses.dataclass(frozen=True)
class QuantState:
    """The codes and scales of a 4-bit weight in bitsandbytes' layout.

    Args:
      packed: uint8 [(n + 1) // 2], two codes a byte, of n elements in torch's order.
      absmax: float32 [blocks], or uint8 [blocks] with double quantization.
      format: "nf4" or "fp4".
      block_size: elements that share a scale.
      dtype: name of the weight's dtype.
      shape: torch's shape of the weight.
      second: None, or the second level of double quantization: nested_absmax, float32
        [ceil(blocks / 256)]; the offset, a float32 scalar; nested_quant_map, float32 [256].
    """

    packed: np.ndarray
    absmax: np.ndarray
    format: str
    block_size: int
    dtype: str
    shape: tuple[int, ...]
    second: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


def check_tensors(tensors: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Check which tensors of a weight exist; return the header (the JSON of its state), validated.

    Raises:
      CheckpointError: a tensor is missing or left over, or the header is invalid.
    """
    if name not in tensors:
        near = find_nearest_names(name, tensors)
        raise CheckpointError(
            f"there is no tensor {name!r}: pass the weight's full key; the nearest are {near}"
        )
    keys = {format: f"{name}.quant_state.bitsandbytes__{format}" for format in _TABLES}
    found = [format for format, key in keys.items() if key in tensors]
    if len(found) != 1:
        start = f"{name}.quant_state."
        others = [keys[format] for format in found]
        raise make_state_error(name, others or [key for key in tensors if key.startswith(start)])
    header = _parse_header(tensors, keys[found[0]], found[0])
    wanted = {*_SINGLE, *(_DOUBLE if "nested_offset" in header else ())}
    there = {side for side in SIDES if f"{name}.{side}" in tensors}
    problems = [f"{name}.{side} is missing" for side in SIDES if side in wanted - there]
    problems += [
        f"{name}.{side} is left over: the weight is not quantized doubly"
        for side in SIDES
        if side in there - wanted
    ]
    _raise_problems(name, problems)
    return header


def make_state_error(name: str, others: Sequence[str]) -> CheckpointError:
    """Return the error of a weight without exactly one quant state; others: the keys it has."""
    return CheckpointError(
        f"{name!r} needs one of {[f'{name}.{state}' for state in STATES]}; there is "
        f"{list(others[:3]) or 'none'}"
        + ("" if others else ": it is not a 4-bit weight of bitsandbytes")
    )


def check_sizes(header: Mapping[str, Any], name: str, there: Mapping[str, Any]) -> None:
    """Check that the sizes of a weight's tensors match its header, without reading them.

    Args:
      header: the result of `check_tensors`.
      name: the weight's key.
      there: key -> object with shape and dtype, of the weight's tensors.

    Raises:
      CheckpointError: the size of a tensor is wrong.
    """
    n = math.prod(header["shape"])
    blocks = -(-n // header["blocksize"])
    wanted = {name: (n + 1) // 2}  # bytes
    if "nested_offset" in header:
        wanted[f"{name}.absmax"] = blocks
        wanted[f"{name}.nested_absmax"] = 4 * -(-blocks // SCALE_BLOCK)
        wanted[f"{name}.nested_quant_map"] = 4 * DYNAMIC_MAP.size
    else:
        wanted[f"{name}.absmax"] = 4 * blocks
    found = {key: math.prod(there[key].shape) * there[key].dtype.itemsize for key in wanted}
    _raise_problems(
        name,
        [
            f"{key} has {found[key]} bytes; {list(header['shape'])} needs {size}"
            for key, size in wanted.items()
            if found[key] != size
        ],
    )


def _parse_header(tensors: Mapping[str, Any], key: str, format: str) -> dict[str, Any]:
    """Parse the JSON of a quant state, and validate its values."""
    try:
        text = _to_numpy(tensors, key)
        if text.nbytes > _TEXT_LIMIT:
            raise ValueError(f"it has {text.nbytes} bytes")
        header = parse_json(text.tobytes())
        if not isinstance(header, dict):
            raise TypeError(f"it is a {type(header).__name__}")
        shape = tuple(header["shape"])
        right = isinstance(header["shape"], list) and len(shape) <= AXES_LIMIT
        if not right or any(type(size) is not int for size in shape):
            raise TypeError(f"shape is {shorten(repr(header['shape']), 100)}")
        known = {
            "quant_type": (header["quant_type"], (format,)),
            "blocksize": (header["blocksize"], BLOCK_SIZES),
            "dtype": (header["dtype"], DTYPES),
        }
        if "nested_offset" in header:
            if not is_finite(header["nested_offset"]):
                raise ValueError(f"nested_offset is {shorten(repr(header['nested_offset']), 100)}")
            known["nested_blocksize"] = header["nested_blocksize"], (SCALE_BLOCK,)
            known["nested_dtype"] = header["nested_dtype"], ("float32",)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        why = shorten(repr(error), 300)
        raise CheckpointError(f"{key} is not a quant state of bitsandbytes ({why})") from error
    problems = [
        f"{field} is {shorten(repr(value), 100)}; expected {' or '.join(map(repr, allowed))}"
        for field, (value, allowed) in known.items()
        if value not in allowed or type(value) is not type(allowed[0])
    ]
    if min(shape, default=0) < 1:
        problems.append(f"shape is {list(shape)}; expected sizes of 1 or more")
    _raise_problems(key, problems)
    return {**header, "shape": shape}


def _to_numpy(tensors: Mapping[str, Any], key: str) -> np.ndarray:
    """Convert a tensor to a NumPy array."""
    try:
        return np.asarray(tensors[key])
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{key}, a {type(tensors[key]).__name__}, is not a NumPy array ({error}): pass NumPy "
            "or JAX arrays; torch's bfloat16 may be passed as .view(torch.uint8)"
        ) from error


def read_state(tensors: Mapping[str, Any], name: str) -> QuantState:
    """Read the state of one weight.

    Raises:
      CheckpointError: tensors differ from what bitsandbytes writes; all differences are listed.
    """
    header, problems = check_tensors(tensors, name), []

    def get(side: str, dtype: Any, size: int) -> np.ndarray:
        array = _to_numpy(tensors, f"{name}.{side}")
        if array.dtype != dtype or array.size != size:
            problems.append(
                f"{name}.{side} is {array.dtype} {list(array.shape)}; expected "
                f"{np.dtype(dtype)} [{size}]"
            )
        return array.reshape(-1)

    n, double = math.prod(header["shape"]), "nested_offset" in header
    blocks = -(-n // header["blocksize"])
    packed = np.ascontiguousarray(_to_numpy(tensors, name)).reshape(-1).view(np.uint8)
    if packed.size != (n + 1) // 2:
        problems.append(
            f"{name} has {packed.size} bytes; {list(header['shape'])} needs {(n + 1) // 2}"
        )
    absmax = get("absmax", np.uint8 if double else np.float32, blocks)
    if not np.array_equal(get("quant_map", np.float32, 16), _TABLES[header["quant_type"]]):
        problems.append(f"{name}.quant_map is not the table of {header['quant_type']}")
    second = None
    if double:
        nested = get("nested_absmax", np.float32, -(-blocks // SCALE_BLOCK))
        nested_map = get("nested_quant_map", np.float32, DYNAMIC_MAP.size)
        second = nested, np.asarray(header["nested_offset"], np.float32), nested_map
        if not np.all(np.abs(nested_map) <= 1):
            problems.append(f"{name}.nested_quant_map has entries that are not in [-1, 1]")
    _raise_problems(name, problems)
    return QuantState(
        packed, absmax, header["quant_type"], header["blocksize"], header["dtype"],
        header["shape"], second,
    )  # fmt: skip


def _raise_problems(name: str, problems: list[str]) -> None:
    """Raise CheckpointError if there are problems."""
    if problems:
        raise CheckpointError(
            f"{name} is not as bitsandbytes writes it:\n{list_problems(problems)}"
        )


def write_state(state: QuantState, name: str, quant_storage: str) -> dict[str, np.ndarray]:
    """Return the tensors of one weight, byte for byte as bitsandbytes writes them.

    Raises:
      ConfigError: a dtype is unknown to bitsandbytes, or its item size does not divide the bytes.
    """
    for dtype, allowed in ((quant_storage, STORAGES), (state.dtype, DTYPES)):
        if dtype not in allowed:
            raise ConfigError(f"{name}: bitsandbytes writes {' or '.join(allowed)}, not {dtype}")
    storage = jnp.dtype(quant_storage)
    if state.packed.size % storage.itemsize:
        raise ConfigError(f"{name}: {state.packed.size} bytes are not a multiple of {storage}")
    header: dict[str, Any] = {
        "quant_type": state.format,
        "blocksize": state.block_size,
        "dtype": state.dtype,
        "shape": list(state.shape),
    }
    sides = {"absmax": state.absmax, "quant_map": _TABLES[state.format].copy()}
    if state.second is not None:
        nested, offset, nested_map = state.second
        sides |= {"nested_absmax": nested, "nested_quant_map": nested_map}
        header |= {
            "nested_blocksize": SCALE_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(offset),
        }
    text = json.dumps(header).encode()
    sides[f"quant_state.bitsandbytes__{state.format}"] = np.frombuffer(text, np.uint8).copy()
    packed = state.packed.view(storage).reshape(-1, 1)
    return {name: packed, **{f"{name}.{side}": array for side, array in sides.items()}}
