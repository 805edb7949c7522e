"""Write and parse the entries of a checkpoint's manifest: one for each leaf, and the whole body."""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import CheckpointError, list_problems
from lowrank_jax._jax.paths import MAX_KEYS, flatten
from lowrank_jax._jax.processes import place_array
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Full, LowRank
from lowrank_jax._nodes.family import IA3
from lowrank_jax._nodes.methods import ADAPTER_METHODS
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._nodes.serialization import list_array_fields, with_current_names
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._trees.fingerprint import Fingerprint, to_numpy
from lowrank_jax.checkpoint._formats import read_quantized, write_format

_SCALARS = {"bool": bool, "int": int, "float": float}
_KINDS = {"bool": "b", "int": "iu", "float": "f"}
_PRNGS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}
# keys of the body that `_save` writes, and those that `_archive` adds
_KEYS = {"step", "config", "base", "lora", "opt_state", "extra", "formats"}
_ARCHIVE = {"format", "version", "arrays", "folder", "files"}


@dataclasses.dataclass(frozen=True)
class _SavedArray:
    """A saved array that is not read yet: its name in the archive, form, shape and dtype."""

    name: str
    form: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        """Number of axes; nodes need it to compute their dense shape."""
        return len(self.shape)


def collect_arrays(nodes: dict[str, Any]) -> dict[str, Any]:
    """Return "path/field" -> array of nodes, without static and absent fields.

    The arrays of a quantized factor are "path/field/codes" and so on.
    """
    found = {}
    for path, node in nodes.items():
        for name in list_array_fields(node):
            value = getattr(node, name)
            if isinstance(value, Quantized):
                found |= collect_arrays({f"{path}/{name}": value})
            elif value is not None:
                found[f"{path}/{name}"] = value
    return found


def write_entry(
    name: str, leaf: jax.typing.ArrayLike, arrays: dict[str, np.ndarray]
) -> dict[str, str]:
    """Add a leaf's values to `arrays`; return its entry."""
    name = quote(name, errors="surrogatepass")
    form = classify_leaf(leaf)
    arrays[name] = to_numpy(name, leaf)
    return {"name": name, "form": form}


def write_entries(what: str, tree: PyTree, arrays: dict[str, np.ndarray]) -> list[dict] | None:
    """Return the entries of a tree's leaves, with their paths; None if there is no tree."""
    if tree is None:
        return None
    return [
        {"path": path.split("/"), **write_entry(f"{what}/{path}", leaf, arrays)}
        for path, leaf in flatten(tree)[0]
    ]


def classify_leaf(leaf: Any) -> str:
    """Return a leaf's form: "array", "weak" (typed), a PRNG key's dtype, "bool", "int", "float"."""
    dtype = getattr(leaf, "dtype", None)
    if type(leaf).__name__ in _SCALARS:
        return type(leaf).__name__
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return str(dtype)
    return "weak" if getattr(leaf, "weak_type", False) and not leaf.shape else "array"


def read_body(body: Mapping) -> tuple[LoraConfig, Fingerprint | None, int | None, dict, dict]:
    """Parse a body into config, fingerprint, step, nodes by path, and other trees' leaves by path.

    Raises:
      CheckpointError: an entry is unknown, repeated, or does not match the arrays.
    """
    if unknown := sorted(body.keys() - _KEYS - _ARCHIVE):
        raise CheckpointError(
            f"the manifest has {unknown}, unknown to this lowrank_jax: use the release that wrote "
            "it, or a newer one"
        )
    config, base, step = LoraConfig.from_dict(body["config"]), body["base"], body["step"]
    if step is not None and type(step) is not int:
        raise CheckpointError(f"the manifest has the step {step!r}, expected an integer or null")
    nodes = _read_entries(body["lora"], body, read_node)
    # files of older releases have no "extra"
    trees = {
        what: None if body.get(what) is None else _read_entries(body[what], body, read_entry)
        for what in ("opt_state", "extra")
    }
    used = collections.Counter(leaf.name for leaf in jax.tree.leaves([nodes, trees]))
    raise_problems(
        "the manifest's entries and arrays are not one to one: restore another copy",
        [f"{name}: used {used[name]} times" for name in body["arrays"] if used[name] != 1],
    )
    nodes = {path: _upgrade_node(node) for path, node in nodes.items()}
    return config, None if base is None else Fingerprint.from_dict(base), step, nodes, trees


def read_entry(entry: Mapping, body: Mapping) -> _SavedArray:
    """Parse the entry of an array."""
    if entry["form"] not in {"array", "weak", *_SCALARS, *_PRNGS}:
        raise CheckpointError(
            f"{entry['name']!r} is a {entry['form']!r}, unknown to this lowrank_jax"
        )
    shape, dtype, _ = body["arrays"][entry["name"]]
    if entry["form"] in _SCALARS and (shape or jnp.dtype(dtype).kind not in _KINDS[entry["form"]]):
        raise CheckpointError(f"{entry['name']!r} is {dtype}{shape}, expected {entry['form']}")
    if entry["form"] in _PRNGS:  # the shape of the keys, not of their uint32 words
        shape, dtype = shape[:-1], entry["form"]
    return _SavedArray(entry["name"], entry["form"], tuple(shape), dtype)


def _read_entries(entries: list[Mapping], body: Mapping, read: Callable) -> dict[str, Any]:
    """Return path -> read(entry, body); CheckpointError if a path is invalid or repeated."""
    found = {}
    for entry in entries:
        keys = entry["path"]
        if type(keys) is not list or not 1 <= len(keys) <= MAX_KEYS:
            wanted = f"expected a list of keys, of which there are at most {MAX_KEYS}"
            raise CheckpointError(f"the manifest has the path {quote_value(keys)}, {wanted}")
        if (path := "/".join(keys)) in found:
            raise CheckpointError(f"the manifest has {path!r} twice: restore another copy")
        found[path] = read(entry, body)
    return found


def write_node(path: str, node: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Add a node's arrays to `arrays`; return its entry: path, type, static fields, arrays."""
    parts = collect_arrays({"": node}).items()
    quantized = {
        name: write_format(getattr(node, name))
        for name in list_array_fields(node)
        if isinstance(getattr(node, name), Quantized)
    }
    return {
        "path": path.split("/"),
        "type": type(node).__name__,
        "static": get_static_fields(type(node), vars(node)),
        "arrays": {
            name[1:]: write_entry(f"lora/{path}{name}", leaf, arrays) for name, leaf in parts
        },
        **({"quantized": quantized} if quantized else {}),
    }


def get_node_types() -> dict[str, Any]:
    """Return the node classes that are saved, by their names in the manifest."""
    return {kind.__name__: kind for kind in (*(row.node for row in ADAPTER_METHODS), Full)}


def read_node(entry: Mapping, body: Mapping) -> Any:
    """Parse the entry of a node; its fields are _SavedArrays, which are not read yet."""
    path, kind = "/".join(entry["path"]), get_node_types()[entry["type"]]
    known = {f.name: f.default for f in dataclasses.fields(kind) if f.metadata.get("static")}
    # a field that older releases did not write takes its default
    static: dict[str, Any] = {
        n: tuple(v) if type(v) is list else v
        for n, v in with_current_names(entry["static"]).items()
    }
    if unknown := sorted(static.keys() - known.keys()):
        raise CheckpointError(
            f"{path!r} is a {entry['type']} with {unknown}, unknown to this lowrank_jax: use the "
            "release that wrote it, or a newer one"
        )
    raise_problems(
        f"static fields of {path!r} are of the wrong type: restore another copy",
        [
            f"{name}: {value!r}, expected a {type(known[name]).__name__}"
            for name, value in static.items()
            if type(value) is not type(known[name])
            or not _are_axes(value)
            or (name == "weight_dtype" and value and not _is_floating_dtype(value))
        ],
    )
    arrays: dict[str, Any] = {
        name: read_entry(part, body) for name, part in entry["arrays"].items()
    }
    for name, values in entry.get("quantized", {}).items():
        own = [key for key in arrays if key.startswith(f"{name}/")]
        parts = {key.split("/", 1)[1]: arrays.pop(key) for key in own}
        arrays[name] = read_quantized(f"{path}/{name}", parts, values)
    return kind(**arrays, **static)


def _upgrade_node(node: LowRank | Full) -> Any:
    """Convert a node of older releases, where (IA)^3 was a LowRank with factors of rank 0."""
    if type(node) is not LowRank or not node.folded or node.magnitude is None:
        return node
    if node.a.ndim <= len(node.fan_in) or node.a.shape[-1]:
        return node
    inputs = node.a.shape[-1 - len(node.fan_in) : -1]
    static: Any = get_static_fields(LowRank, vars(node))
    return IA3(magnitude=node.magnitude, **static, inputs=inputs)


def _is_floating_dtype(name: str) -> bool:
    """Whether a name is that of a floating dtype."""
    try:
        return jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False


def _are_axes(value: object) -> bool:
    """Whether a value is a tuple of ints, or not a tuple."""
    return not isinstance(value, tuple) or all(type(axis) is int for axis in value)


def get_static_fields(kind: type, values: Mapping) -> dict[str, Any]:
    """Return a node's static fields as plain values, of the types of the fields' defaults."""
    plain = {}
    for field in dataclasses.fields(kind):
        if field.metadata.get("static"):
            value, default = values[field.name], field.default
            axes = isinstance(default, tuple)
            plain[field.name] = (
                tuple(operator.index(axis) for axis in value) if axes else type(default)(value)
            )
    return plain


def build_leaf(
    entry: _SavedArray, array: np.ndarray, sharding: jax.sharding.Sharding | None
) -> Any:
    """Make the leaf of an array: a number, PRNG key or array, placed by a sharding if given."""
    if entry.form in _SCALARS:
        return _SCALARS[entry.form](array)
    if entry.form in _PRNGS:
        leaf = jax.random.wrap_key_data(jnp.array(array), impl=_PRNGS[entry.form])
    elif jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array  # 64-bit values stay in NumPy unless jax_enable_x64
    else:
        leaf = (
            jnp.asarray(array.item()) if entry.form == "weak" else jnp.array(_copy_aligned(array))
        )
        leaf = leaf if leaf.dtype == array.dtype else jnp.array(_copy_aligned(array))
    return leaf if sharding is None else place_array(leaf, sharding)


def _copy_aligned(array: np.ndarray) -> np.ndarray:
    """Copy an array to an address that is a multiple of 64 bytes.

    On CPU, JAX copies any other array twice, and the first copy leaves a hole in the heap. For an
    adapter of 1 MiB leaves, these holes are an eighth of the heap.
    """
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def raise_problems(why: str, problems: list[str]) -> None:
    """Raise one error with all problems, if there are any."""
    if problems:
        raise CheckpointError(f"{why}:\n{list_problems(problems)}")
