"""Jaxprs, shardings and memory spaces, behind functions that hide changes between JAX releases."""

from __future__ import annotations

import contextlib
import functools
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

from lowrank_jax._jax.inlined import bind_inlined
from lowrank_jax._jax.types import Equation, Jaxpr, PyTree

AxisType = jax.sharding.AxisType
Literal = core.Literal
Primitive = core.Primitive


def threefry2x32(*words: jax.typing.ArrayLike) -> Sequence[jax.Array]:
    """Encrypt two counter words with two key words elementwise; four uint32 arrays of one shape."""
    return threefry2x32_p.bind(*words)


def split_jaxpr(jaxpr: Jaxpr) -> tuple[Any, Sequence[Any]]:
    """Return the bare jaxpr and its constants: a ClosedJaxpr up to JAX 0.11, one Jaxpr since."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    consts = getattr(jaxpr, "consts", ())
    return inner, list(consts or ())


def get_input_vars(jaxpr: Jaxpr) -> list[Any]:
    """Return the variables of the constants and of the inputs, in the order of their values."""
    inner, _ = split_jaxpr(jaxpr)
    return [*getattr(inner, "constvars", ()), *inner.invars]


def find_consumers(jaxpr: Jaxpr, number: int) -> list[Any]:
    """Return the equations that consume an input, given by index."""
    inner, _ = split_jaxpr(jaxpr)
    var = inner.invars[number]
    return [eqn for eqn in inner.eqns if any(atom is var for atom in eqn.invars)]


def bind(eqn: Equation, args: Sequence[Any], **changes: Any) -> Sequence[Any]:
    """Bind an equation in its own context, with some parameters changed; return its results."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    params = {**eqn.primitive.get_bind_params(eqn.params), **changes}
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        out = bind_inlined(eqn.primitive, args, params)
    return out if eqn.primitive.multiple_results else [out]


def makes_arrays(eqn: Equation) -> bool:
    """Whether all results of an equation are arrays, and none a mutable reference."""
    return all(isinstance(var.aval, ShapedArray) for var in eqn.outvars)


def make_placeholder(aval: ShapedArray) -> jax.Array:
    """Return a traced array of a type, for a dry run; its values are undefined."""
    return placeholder_p.bind(aval=aval)


placeholder_p = Primitive("lowrank_placeholder")
placeholder_p.def_abstract_eval(lambda *, aval: aval)


def use_eqn_context(eqn: Equation):
    """Return a context manager in which new operations get an equation's name stack and context."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    return _ContextPair(
        source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager
    )


class _ContextPair:
    """Two nested context managers, cheaper than an ExitStack."""

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
    """Return a sharding that the user specified, or None."""
    return sharding if isinstance(sharding, jax.sharding.Sharding) else None


_INTERNAL = tuple(
    os.path.dirname(sys.modules[name].__file__ or "") + os.sep
    for name in ("jax", "lowrank_jax")
    if name in sys.modules
)


def find_user_line(eqn: Equation) -> str:
    """Return the line of user code that made an equation, as "file.py:12 (function)", or ""."""
    info: Any = eqn.source_info
    try:
        frames = info.traceback.frames
    except AttributeError:
        return ""
    # Frames are innermost first. The user's is the first outside JAX, this package and Flax; if
    # Flax has them all (a model made of its modules alone), its innermost frame is shown.
    outside = [f for f in frames if not f.file_name.startswith(_INTERNAL)]
    own = [f for f in outside if f"{os.sep}flax{os.sep}" not in f.file_name] or outside
    if not own:
        return ""
    frame = own[0]
    return f"{os.path.basename(frame.file_name)}:{frame.line_num} ({frame.function_name})"


def get_user_layer(eqn: Equation) -> str:
    """Return the name stack of an equation: modules and named scopes, or ""."""
    return str(eqn.source_info.name_stack)


# In JAX 0.10 a scan that is differentiated in reverse twice loses the rules of custom_jvp in it.
KEEPS_RULES_IN_SCANS = jax.__version_info__ >= (0, 12)


def is_tracer(value: object) -> bool:
    """Whether a value is being traced."""
    return isinstance(value, Tracer)


def has_no_mesh(value: jax.typing.ArrayLike) -> bool:
    """Whether a value's type has no mesh."""
    return jax.typeof(value).sharding.mesh.empty


def has_auto_axes(value: jax.typing.ArrayLike) -> bool:
    """Whether a value's type has no mesh, or one whose axes all have AxisType.Auto."""
    axes = jax.typeof(value).sharding.mesh.axis_types
    return all(axis == AxisType.Auto for axis in axes)


def is_manual() -> bool:
    """Whether this code is traced inside shard_map, for one device of a mesh."""
    return bool(get_manual_axes())


def get_manual_axes() -> dict[str, int]:
    """Return name -> size of the mesh axes of the shard_map (or pmap) that traces this code."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.shape.items(), mesh.axis_types, strict=True)
    return {name: size for (name, size), kind in kinds if kind == AxisType.Manual}


def find_varying_axes(value: jax.typing.ArrayLike) -> frozenset[str] | None:
    """Return the manual mesh axes along which devices may hold different values of an array.

    None if types do not tell: inside shard_map with check_vma=False, or pmap.
    """
    kind = jax.typeof(value)
    if AxisType.Manual not in kind.sharding.mesh.axis_types:
        return frozenset()  # a constant, which all devices share
    index = jax.eval_shape(functools.partial(jax.lax.axis_index, next(iter(get_manual_axes()))))
    if not _get_varying_axes(index):  # each device's own number varies wherever types tell
        return None
    return _get_varying_axes(kind)


def list_varying_axes(value: jax.typing.ArrayLike) -> frozenset[str]:
    """Return the manual mesh axes that a value's type says it varies along; () without types."""
    return _get_varying_axes(jax.typeof(value))


def _get_varying_axes(kind: Any) -> frozenset[str]:
    return frozenset(getattr(kind.manual_axis_type, "varying", ()))


def has_explicit_axes(value: jax.typing.ArrayLike) -> bool:
    """Whether a value's type has a mesh with an explicit axis."""
    return AxisType.Explicit in jax.typeof(value).sharding.mesh.axis_types


def match_sharding(result: jax.Array, branch: Callable, *operands: PyTree) -> Any:
    """Return branch(*operands) with the sharding of `result`.

    On a mesh with explicit axes every product needs an out_sharding. The user's is that of the
    whole product, not of the two thin ones x @ a and (x @ a) @ b, so these are left to XLA.
    """
    sharding = jax.typeof(result).sharding
    if not any(map(is_split, (result, *jax.tree.leaves(operands)))):
        return branch(*operands)
    return call_with_auto_axes(branch, sharding, *operands)


def is_split(array: jax.typing.ArrayLike, axis: int | None = None) -> bool:
    """Whether an array, or one of its axes, is sharded along an explicit mesh axis."""
    spec = tuple(getattr(jax.typeof(array).sharding, "spec", ()))
    entries = spec if axis is None else spec[axis : axis + 1]
    return any(entry is not None for entry in entries)


def is_first_axis_split(array: Any) -> bool:
    """Whether the first axis of an array is known to be sharded."""
    if is_tracer(array):
        return is_split(array, 0)
    concrete = isinstance(array, jax.Array)
    return concrete and array.sharding.shard_shape(array.shape)[0] < array.shape[0]


def count_shards(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, entry: str | Sequence[str] | None
) -> int:
    """Return the number of shards that an entry of a PartitionSpec makes of an axis."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)


def is_eager() -> bool:
    """Whether operations run as they are called (under grad or vmap too), because no jit traces."""
    # inside jit a new constant is a tracer; inside grad or vmap alone it is a concrete array
    return not is_tracer(jax.numpy.zeros(()))


def use_mesh_of(array: jax.Array) -> Any:
    """Return a context manager that sets the mesh of a concrete array; none for a tracer."""
    if is_tracer(array):
        return contextlib.nullcontext()
    sharding: Any = array.sharding
    try:
        return jax.set_mesh(sharding.mesh)
    except ValueError:  # inside a trace that closes over the array
        return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)


_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def is_on_host(array: object) -> bool:
    """Whether an array is known to be in host memory, where nothing can be computed."""
    return isinstance(array, jax.Array) and jax.typeof(array).memory_space == _HOST


def to_device(tree: PyTree) -> Any:
    """Move all arrays of a tree to device memory."""
    move = lambda leaf: jax.device_put(leaf, _DEVICE) if is_on_host(leaf) else leaf
    return jax.tree.map(move, tree)


def to_host(array: jax.Array) -> jax.Array:
    """Move an array to host memory."""
    return array if is_on_host(array) else jax.device_put(array, _HOST)


def is_host(target: object) -> bool:
    """Whether a target of device_put (a memory space or a sharding) is in host memory."""
    if isinstance(target, jax.memory.Space):
        return target == _HOST
    return getattr(target, "memory_kind", None) not in (None, "device")


def call_with_auto_axes(fn: Callable, out_sharding: PyTree, *operands: PyTree) -> Any:
    """Return fn(*operands), in which the explicit axes of the mesh have AxisType.Auto."""
    mesh = jax.tree.leaves(out_sharding)[0].mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    return jax.sharding.auto_axes(fn, axes=axes, out_sharding=out_sharding)(*operands)
