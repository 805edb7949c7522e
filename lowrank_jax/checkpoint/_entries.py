"""What a checkpoint's manifest says: of the whole, and of each leaf."""

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
from lowrank_jax._jax.processes import gather_shards, place_array
from lowrank_jax._nodes import Full, LowRank
from lowrank_jax._nodes.family import IA3
from lowrank_jax._nodes.methods import ADAPTER_METHODS
from lowrank_jax._nodes.serialization import with_current_names
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._trees.fingerprint import Fingerprint, to_numpy

_SCALARS = {"bool": bool, "int": int, "float": float}
_KINDS = {"bool": "b", "int": "iu", "float": "f"}
_PRNGS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}
# the manifest's own, and what the archive adds
_KEYS = {"step", "config", "base", "lora", "opt_state", "extra"}
_ARCHIVE = {"format", "version", "arrays", "folder", "files"}


@dataclasses.dataclass(frozen=True)
class _SavedArray:
    """A saved array, not yet read: its name in the archive, and what it is to become."""

    name: str
    form: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        """Number of axes: a node that holds entries knows its dense shape."""
        return len(self.shape)


def collect_arrays(nodes: dict[str, Any]) -> dict[str, Any]:
    """The arrays of nodes, by path and field."""
    return {
        f"{path}/{field.name}": getattr(node, field.name)
        for path, node in nodes.items()
        for field in dataclasses.fields(node)
        if not field.metadata.get("static") and getattr(node, field.name) is not None
    }


def write_entry(name: str, leaf: Any, arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Put a leaf's values among the arrays; return its entry."""
    name = quote(name, errors="surrogatepass")
    form = classify_leaf(leaf)
    arrays[name] = to_numpy(name, gather_shards(leaf))
    return {"name": name, "form": form}


def write_entries(what: str, tree: Any, arrays: dict[str, np.ndarray]) -> list[dict] | None:
    """The entries of a tree's leaves, each with its path; None where there is no tree."""
    if tree is None:
        return None
    return [
        {"path": path.split("/"), **write_entry(f"{what}/{path}", leaf, arrays)}
        for path, leaf in flatten(tree)[0]
    ]


def classify_leaf(leaf: Any) -> str:
    """What an array is to become again: a JAX array (weakly typed or not), a PRNG key, a number."""
    dtype = getattr(leaf, "dtype", None)
    if type(leaf).__name__ in _SCALARS:
        return type(leaf).__name__
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return str(dtype)
    return "weak" if getattr(leaf, "weak_type", False) and not leaf.shape else "array"


def read_body(body: Mapping) -> tuple[LoraConfig, Fingerprint | None, int | None, dict, dict]:
    """Config, fingerprint, step, nodes by path, and the leaves by path of the other trees."""
    if unknown := sorted(body.keys() - _KEYS - _ARCHIVE):
        raise CheckpointError(
            f"the manifest has {unknown}, unknown to this lowrank_jax: use the release that wrote "
            "it, or a newer one"
        )
    config, base, step = LoraConfig.from_dict(body["config"]), body["base"], body["step"]
    if step is not None and type(step) is not int:
        raise CheckpointError(f"the manifest has the step {step!r}, expected an integer or null")
    nodes = _read_entries(body["lora"], body, read_node)
    # a file of before there was an extra has none
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
    """The array of an entry."""
    if entry["form"] not in {"array", "weak", *_SCALARS, *_PRNGS}:
        raise CheckpointError(
            f"{entry['name']!r} is a {entry['form']!r}, unknown to this lowrank_jax"
        )
    shape, dtype, _ = body["arrays"][entry["name"]]
    if entry["form"] in _SCALARS and (shape or jnp.dtype(dtype).kind not in _KINDS[entry["form"]]):
        raise CheckpointError(f"{entry['name']!r} is {dtype}{shape}, expected {entry['form']}")
    if entry["form"] in _PRNGS:  # what it will be, not the words it is stored as
        shape, dtype = shape[:-1], entry["form"]
    return _SavedArray(entry["name"], entry["form"], tuple(shape), dtype)


def _read_entries(entries: list[Mapping], body: Mapping, read: Callable) -> dict[str, Any]:
    """What `read` makes of each entry, by path; no path stands twice."""
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
    """The entry of a node: its path, type, static fields and arrays."""
    parts = collect_arrays({"": node}).items()
    return {
        "path": path.split("/"),
        "type": type(node).__name__,
        "static": get_static_fields(type(node), vars(node)),
        "arrays": {
            name[1:]: write_entry(f"lora/{path}{name}", leaf, arrays) for name, leaf in parts
        },
    }


def get_node_types() -> dict[str, Any]:
    """The classes of nodes that are saved, by their names in the manifest."""
    return {kind.__name__: kind for kind in (*(row.node for row in ADAPTER_METHODS), Full)}


def read_node(entry: Mapping, body: Mapping) -> Any:
    """The node of an entry, holding arrays not yet read."""
    path, kind = "/".join(entry["path"]), get_node_types()[entry["type"]]
    known = {f.name: f.default for f in dataclasses.fields(kind) if f.metadata.get("static")}
    # a field that a file of before does not have takes its default
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
    arrays = {name: read_entry(part, body) for name, part in entry["arrays"].items()}
    return kind(**arrays, **static)


def _upgrade_node(node: Any) -> Any:
    """The node that init makes today: (IA)^3 was a LowRank with factors of rank 0."""
    if type(node) is not LowRank or not node.folded or node.magnitude is None:
        return node
    if node.a.ndim <= len(node.fan_in) or node.a.shape[-1]:
        return node
    inputs = node.a.shape[-1 - len(node.fan_in) : -1]
    static: Any = get_static_fields(LowRank, vars(node))
    return IA3(magnitude=node.magnitude, **static, inputs=inputs)


def _is_floating_dtype(name: str) -> bool:
    """Whether it is the name of a floating dtype."""
    try:
        return jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False


def _are_axes(value: Any) -> bool:
    """Whether a value, if a tuple, is one of axes."""
    return not isinstance(value, tuple) or all(type(axis) is int for axis in value)


def get_static_fields(kind: type, values: Mapping) -> dict[str, Any]:
    """The static fields of a node, as plain values of the fields' own types."""
    plain = {}
    for field in dataclasses.fields(kind):
        if field.metadata.get("static"):
            value, default = values[field.name], field.default
            axes = isinstance(default, tuple)
            plain[field.name] = (
                tuple(operator.index(axis) for axis in value) if axes else type(default)(value)
            )
    return plain


def build_leaf(entry: _SavedArray, array: np.ndarray, sharding: Any) -> Any:
    """The leaf of an array: placed by a sharding if there is one."""
    if entry.form in _SCALARS:
        return _SCALARS[entry.form](array)
    if entry.form in _PRNGS:
        leaf = jax.random.wrap_key_data(jnp.array(array), impl=_PRNGS[entry.form])
    elif jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array  # 64-bit numbers, of NumPy, in a program of 32-bit ones
    else:
        leaf = (
            jnp.asarray(array.item()) if entry.form == "weak" else jnp.array(_copy_aligned(array))
        )
        leaf = leaf if leaf.dtype == array.dtype else jnp.array(_copy_aligned(array))
    return leaf if sharding is None else place_array(leaf, sharding)


def _copy_aligned(array: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes.

    On CPU, JAX copies any other array twice, and the first copy leaves a hole in the heap: of a
    restored adapter of 1 MiB leaves, those are an eighth.
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
