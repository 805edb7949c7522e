"""The seam to JAX's jaxprs: everything that drifts between releases is in this file."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.core import ShapedArray as ShapedArray
from jax.core import Tracer
from jax.extend import core, source_info_util
from jax.extend.random import threefry2x32_p
from jax.typing import ArrayLike

from lowrank_jax._jax.types import Equation, Jaxpr, PyTree

AxisType = jax.sharding.AxisType
Literal = core.Literal
Primitive = core.Primitive


def threefry2x32(*words: jax.Array) -> Sequence[jax.Array]:
    """The cipher of two key words and two counter words, uint32 of one shape, on each element."""
    return threefry2x32_p.bind(*words)


def split_jaxpr(jaxpr: Jaxpr) -> tuple[Any, Sequence[Any]]:
    """A jaxpr with its constants: a ClosedJaxpr up to JAX 0.11, one Jaxpr since."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    consts = getattr(jaxpr, "consts", ())
    return inner, list(consts or ())


def get_input_vars(jaxpr: Jaxpr) -> list[Any]:
    """The variables of constants and inputs, in the order their values are given."""
    inner, _ = split_jaxpr(jaxpr)
    return [*getattr(inner, "constvars", ()), *inner.invars]


def find_consumers(jaxpr: Jaxpr, number: int) -> list[Any]:
    """The equations that take an input, given by number."""
    inner, _ = split_jaxpr(jaxpr)
    var = inner.invars[number]
    return [eqn for eqn in inner.eqns if any(atom is var for atom in eqn.invars)]


def bind(eqn: Equation, args: Sequence[Any], **changes: Any) -> Sequence[Any]:
    """Bind one equation, in its own context; always a sequence of results."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    params = {**eqn.primitive.get_bind_params(eqn.params), **changes}
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        out = eqn.primitive.bind(*args, **params)
    return out if eqn.primitive.multiple_results else [out]


def use_eqn_context(eqn: Equation):
    """A context manager in which new operations carry the equation's names and context."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    return _ContextPair(
        source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager
    )


class _ContextPair:
    """Two context managers as one, cheaper than an ExitStack."""

    __slots__ = ("first", "second")

    def __init__(self, first: AbstractContextManager, second: AbstractContextManager):
        self.first, self.second = first, second

    def __enter__(self):
        self.first.__enter__()
        self.second.__enter__()

    def __exit__(self, *exc: Any):
        self.second.__exit__(*exc)
        return self.first.__exit__(*exc)


def drop_unspecified(sharding: object) -> jax.sharding.Sharding | None:
    """A sharding or layout that a user gave, or None."""
    return sharding if isinstance(sharding, jax.sharding.Sharding) else None


_INTERNAL = tuple(
    os.path.dirname(sys.modules[name].__file__ or "") + os.sep
    for name in ("jax", "lowrank_jax")
    if name in sys.modules
)


def find_user_line(eqn: Equation) -> str:
    """Where an equation is in the user's own code, or "": file.py:12 (function)."""
    info: Any = eqn.source_info
    try:
        frames = info.traceback.frames
    except AttributeError:
        return ""
    outside = [f for f in frames if not f.file_name.startswith(_INTERNAL)]
    own = [f for f in outside if f"{os.sep}flax{os.sep}" not in f.file_name] or outside
    if not own:
        return ""
    frame = own[0]
    return f"{os.path.basename(frame.file_name)}:{frame.line_num} ({frame.function_name})"


def get_user_layer(eqn: Equation) -> str:
    """The name stack of the equation: the user's modules and named scopes, or ""."""
    return str(eqn.source_info.name_stack)


def is_tracer(value: object) -> bool:
    """Whether a value is being traced."""
    return isinstance(value, Tracer)


def has_no_mesh(value: ArrayLike) -> bool:
    """Whether a value is of no mesh, nor varying over a manual one."""
    kind = jax.typeof(value)
    return not getattr(kind, "vma", None) and kind.sharding.mesh.empty


def has_auto_axes(value: ArrayLike) -> bool:
    """Whether a value is of no mesh, or of one whose axes are all the compiler's to use."""
    kind = jax.typeof(value)
    axes = kind.sharding.mesh.axis_types
    return not getattr(kind, "vma", None) and all(axis == AxisType.Auto for axis in axes)


def is_manual() -> bool:
    """Whether this is traced for one device of a mesh: inside shard_map."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def has_explicit_axes(value: ArrayLike) -> bool:
    """Whether a value is of a mesh whose types say how arrays lie."""
    return AxisType.Explicit in jax.typeof(value).sharding.mesh.axis_types


def match_sharding(result: jax.Array, branch: Callable, *operands: PyTree) -> Any:
    """branch(*operands), lying on the mesh as `result` does; how it gets there XLA decides.

    On a mesh with explicit axes every product must say how its result lies, and what the user said
    of theirs is said of the whole, not of the two thin products that go beside it.
    """
    sharding = jax.typeof(result).sharding
    if not any(map(is_split, (result, *jax.tree.leaves(operands)))):
        return branch(*operands)
    return call_with_auto_axes(branch, sharding, *operands)


def is_split(array: ArrayLike, axis: int | None = None) -> bool:
    """Whether an array's type says that it (or one axis) is split along an explicit mesh axis."""
    spec = tuple(getattr(jax.typeof(array).sharding, "spec", ()))
    entries = spec if axis is None else spec[axis : axis + 1]
    return any(entry is not None for entry in entries)


def count_shards(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, entry: str | Sequence[str] | None
) -> int:
    """Into how many parts an entry of a PartitionSpec splits an axis."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)


def is_eager() -> bool:
    """Whether operations run as they are called, under grad or vmap too: no jit traces them."""
    return not is_tracer(jax.numpy.zeros(()))


def use_mesh_of(array: jax.Array) -> Any:
    """A context: the mesh that a concrete array lies on; where a tracer lies is known already."""
    if is_tracer(array):
        return contextlib.nullcontext()
    sharding: Any = array.sharding
    try:
        return jax.set_mesh(sharding.mesh)
    except ValueError:  # inside a trace that closes over the array
        return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)


_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def is_on_host(array: object) -> bool:
    """Whether an array is known to lie in the memory of the host, where nothing computes."""
    return isinstance(array, jax.Array) and jax.typeof(array).memory_space == _HOST


def to_device(tree: PyTree) -> Any:
    """The tree with all its arrays in the memory of the device."""
    move = lambda leaf: jax.device_put(leaf, _DEVICE) if is_on_host(leaf) else leaf
    return jax.tree.map(move, tree)


def to_host(array: jax.Array) -> jax.Array:
    """An array in the memory of the host."""
    return array if is_on_host(array) else jax.device_put(array, _HOST)


def is_host(target: object) -> bool:
    """Whether what device_put takes (a memory space, a sharding) is in the memory of the host."""
    if isinstance(target, jax.memory.Space):
        return target == _HOST
    return getattr(target, "memory_kind", None) not in (None, "device")


def call_with_auto_axes(fn: Callable, out_sharding: PyTree, *operands: PyTree) -> Any:
    """fn(*operands), explicit axes of the mesh left to the compiler inside it."""
    mesh = jax.tree.leaves(out_sharding)[0].mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    return jax.sharding.auto_axes(fn, axes=axes, out_sharding=out_sharding)(*operands)
