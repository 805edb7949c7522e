"""lift: transform a function of arrays into a function that also takes adapted weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax._checks.arguments import (
    check_arguments,
    refuse_unsupported_dtypes,
)
from lowrank_jax._checks.functions import function_of_params
from lowrank_jax._errors import (
    ConfigError,
    LowrankError,
    MaterializeWarning,
    StateError,
    list_problems,
)
from lowrank_jax._interpreter.interpret import Context, Record, interpret
from lowrank_jax._interpreter.operation import find_forwarded
from lowrank_jax._interpreter.table import OPERATIONS
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.paths import flatten_checked, flatten_with_keys, join_keys, list_keys
from lowrank_jax._jax.statics import Static, has_plain_keys
from lowrank_jax._jax.types import Jaxpr, PyTree
from lowrank_jax._nodes import Adapted, Full, is_node, strip_norms
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._nodes.selection import get_selection, restore_selections
from lowrank_jax._nodes.serialization import Node
from lowrank_jax._nodes.validation import check_node
from lowrank_jax._operators.materialize import materialize
from lowrank_jax._operators.weight import Weight
from lowrank_jax._operators.wrapping import as_weight, wrap_adapted

FALLBACKS = ("warn", "raise", "silent")


@dataclasses.dataclass(frozen=True)
class CallSignature:
    """The structure of a call's arguments without their arrays; a cache key for jax.jit.

    Args:
      treedef: the structure of (args, kwargs).
      is_dynamic: for each leaf, whether it is dynamic: an array or a node.
      static: the leaves that are not dynamic.
      owners: for each dynamic leaf, the number of the argument that contains it.
    """

    # f({"w": w, "n": 2}, x, flag=True) has the leaves 2, w, x, True: dynamic = w, x;
    # is_dynamic = (False, True, True, False); static = (2, True); owners = (0, 1).
    treedef: Static
    is_dynamic: tuple[bool, ...]
    static: tuple[Static, ...]
    owners: tuple[int, ...]

    def unflatten(self, dynamic: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) with the dynamic leaves put back in their places."""
        arrays, others = iter(dynamic), iter(self.static)
        leaves = [next(arrays) if traced else next(others).value for traced in self.is_dynamic]
        return jax.tree.unflatten(self.treedef.value, leaves)


def is_array(value: object) -> bool:
    """Whether an argument is dynamic, that is traced; all others are static."""
    return (
        isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
        or is_node(value)
        or hasattr(value, "aval")
    )


def split_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[CallSignature, list[Any], tuple[str, ...]]:
    """Flatten arguments into a CallSignature, the arrays and nodes, and their paths."""
    leaves, treedef = flatten_checked(jax.tree.flatten, (args, kwargs), is_node)
    if has_plain_keys(treedef):
        named = _name_treedef_leaves(treedef)
    else:
        keyed, treedef = flatten_with_keys((args, kwargs), is_node)
        leaves, named = [leaf for _, leaf in keyed], _name_leaves([keys for keys, _ in keyed])
    is_dynamic = tuple(map(is_array, leaves))
    dynamic = list(itertools.compress(leaves, is_dynamic))
    static = tuple(Static(x) for x, traced in zip(leaves, is_dynamic, strict=True) if not traced)
    paths, owners = named
    owners = tuple(itertools.compress(owners, is_dynamic))
    call = CallSignature(Static(treedef), is_dynamic, static, owners)
    return call, dynamic, tuple(itertools.compress(paths, is_dynamic))


def _name_leaves(keyed: Sequence[Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the path of each leaf of (args, kwargs), and the number of its argument."""
    numbers: dict[Any, int] = {}
    owners = [numbers.setdefault(tuple(keys[:2]), len(numbers)) for keys in keyed]
    return tuple(map(_format_path, keyed)), tuple(owners)


@functools.lru_cache(maxsize=1024)
def _name_treedef_leaves(treedef: Hashable) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return what _name_leaves returns, cached by a structure that has plain keys."""
    return _name_leaves(list_keys(treedef))


def _format_path(keys: Sequence[Any]) -> str:
    """The path of a leaf; in arguments but the first it starts with the argument's name."""
    group, which, *rest = keys
    path = join_keys(rest)
    if group.idx == 0 and which.idx == 0:
        return path
    name = f"args[{which.idx}]" if group.idx == 0 else which.key
    return f"{name}/{path}" if path else name


@dataclasses.dataclass(frozen=True)
class TracedFunction:
    """A function traced on dense leaves.

    Args:
      jaxpr: returns the results of the function, then the new values of `reassigned`.
      out_tree: the structure of the results.
      reassigned: numbers of the dynamic arguments in whose place the function put another array.
    """

    jaxpr: Jaxpr
    out_tree: Any
    reassigned: tuple[int, ...]

    @property
    def mutated(self) -> list[int]:
        """Numbers of the dynamic arguments changed in place, as an nnx.Module changes itself."""
        # nnx.jit, nnx.remat and nnx.scan reassign every variable, changed or not. With reassigned =
        # (0, 2), and new values that forward the inputs [0, None], argument 2 alone was changed.
        through = find_forwarded(OPERATIONS, self.jaxpr)[self.out_tree.num_leaves :]
        return [i for i, source in zip(self.reassigned, through, strict=True) if source != i]


def trace(
    fn: Callable, call: CallSignature, dynamic: Sequence[Any], paths: Sequence[str]
) -> TracedFunction:
    """Trace fn with the dense weight, as an abstract value, in place of each node."""
    reassigned: tuple[int, ...] = ()

    def flat(*leaves: jax.Array) -> tuple[PyTree, list[jax.Array]]:
        nonlocal reassigned
        pairs = zip(leaves, hosted, strict=True)
        leaves = tuple(jaxprs.to_host(leaf) if on_host else leaf for leaf, on_host in pairs)
        args, kwargs = call.unflatten(leaves)
        out = fn(*args, **kwargs)
        # mutation shows as another object in the place of a leaf that fn was given
        after = [leaf for leaf in jax.tree.leaves((args, kwargs)) if is_array(leaf)]
        if len(after) != len(leaves):
            raise StateError(
                f"the function adds arrays to its arguments, or removes some ({len(leaves)} before "
                f"the call, {len(after)} after it): {_IN_PLACE}"
            )
        pairs = enumerate(zip(leaves, after, strict=True))
        reassigned = tuple(i for i, (one, other) in pairs if one is not other)
        return out, [after[i] for i in reassigned]

    refuse_unsupported_dtypes(dynamic, paths)
    for leaf, path in zip(dynamic, paths, strict=True):
        if is_node(leaf):
            check_node(leaf, path)
    hosted = [is_node(x) and any(map(jaxprs.is_on_host, _frozen_arrays(x))) for x in dynamic]
    jaxpr, (out, _) = jax.make_jaxpr(flat, return_shape=True)(*_infer_dense(dynamic))
    return TracedFunction(jaxpr, jax.tree.structure(out), reassigned)


def _infer_dense(dynamic: Sequence[Any]) -> list[Any]:
    """Return the arguments with an abstract dense weight in place of each node."""
    known: dict[Any, Any] = {}  # equal layers have equal weights
    avals = []
    for leaf in dynamic:
        if is_node(leaf):
            arrays, structure = jax.tree.flatten(leaf)
            key = structure, *map(jax.typeof, arrays)
            if key not in known:
                known[key] = jax.eval_shape(materialize, leaf)
            leaf = known[key]
        avals.append(leaf)
    return avals


def _frozen_arrays(node: Node) -> list[jax.Array]:
    """The arrays of a node's frozen leaf."""
    node = strip_norms(node)
    return _frozen_arrays(node.base) if isinstance(node, Adapted) else jax.tree.leaves(node)


_IN_PLACE = (
    "a lifted function is pure, so the change would be lost. For an nnx.Module, call model.eval() "
    "first to turn off dropout and updates of batch statistics, or use "
    "lowrank.functional_with_state(model), whose function returns the new state; create an "
    "nnx.Rngs from a key inside the jitted step"
)


class ClosesOverTracers(Exception):
    """The function closes over tracers, so its trace cannot be cached."""


def evaluate(
    fn: Callable,
    call: CallSignature,
    dynamic: Sequence[Any],
    paths: Sequence[str],
    ctx: Context,
    known: Sequence[bool] | None = None,
) -> Any:
    """Trace fn on dense weights, then evaluate its jaxpr with weight operators in their place.

    known: under a cached jit, whether the caller has a value for each of `dynamic`; else None.

    Raises:
      ClosesOverTracers: known is given, and fn closes over tracers.
      StateError: fn changes an argument in place.
    """
    traced = trace(fn, call, dynamic, paths)
    if known is not None and any(map(jaxprs.is_tracer, jaxprs.split_jaxpr(traced.jaxpr)[1])):
        raise ClosesOverTracers
    # an argument that the caller made in its own trace, such as an nnx.Rngs, may change
    adapted = {call.owners[i] for i, leaf in enumerate(dynamic) if is_node(leaf)}
    has_value = known or [not jaxprs.is_tracer(leaf) for leaf in dynamic]
    outlives = lambda i: call.owners[i] in adapted or has_value[i]
    if changed := [paths[i] for i in traced.mutated if outlives(i)]:
        raise StateError(
            f"the function changes its arguments: {_IN_PLACE}:\n{list_problems(changed)}"
        )
    for i, (leaf, path) in enumerate(zip(dynamic, paths, strict=True)):
        if is_node(leaf) and isinstance(getattr(leaf, "delta", leaf), Full):
            for eqn in jaxprs.find_consumers(traced.jaxpr, i):
                ctx.records.append(Record(path, eqn.primitive.name, "dense", *ctx.locate(eqn)))
    values = [
        wrap_node(leaf, path) if is_node(leaf) else leaf
        for leaf, path in zip(dynamic, paths, strict=True)
    ]
    outs = interpret(ctx, traced.jaxpr, values)[: traced.out_tree.num_leaves]
    dense = [ctx.materialize_result(out) if isinstance(out, Weight) else out for out in outs]
    return jax.tree.unflatten(traced.out_tree, dense)


def wrap_node(node: Node, path: str) -> jax.Array | Weight:
    """Return the weight operator of a node, or the array of a leaf trained whole."""
    if isinstance(node, Adapted):
        return materialize(node) if isinstance(node.delta, Full) else wrap_adapted(node, path)
    if isinstance(strip_norms(node), Adapted | Quantized):
        return as_weight(node, path)
    return materialize(node)


@check_arguments(fn=function_of_params)
def lift(fn: Callable, *, fallback: str = "warn") -> Callable:
    r"""Return a function with the same signature whose array arguments may be adapted weights.

    `lift(fn)(combine(base, lora), x)` equals `fn(merge(base, lora), x)` up to rounding, without
    materializing $W + s\,a\,b$: fn is traced once, and its jaxpr is evaluated with
    $x W + s (x a) b$ for each product. With dense arguments, the lifted function calls fn.

    Args:
      fn: a pure function fn(params, *args, **kwargs), pure in the sense of jax.jit. Arguments that
        are not arrays are static, and must be hashable in eager calls; True, 1 and 1.0 differ.
      fallback: what to do if no rule keeps a weight factored: "warn" (materialize it and warn once
        per path and primitive), "raise" (raise MaterializeError) or "silent" (materialize it).

    Returns:
      The lifted function. It composes with jit, grad, jvp, vmap, checkpoint, scan, pmap and
      shard_map, inside and outside. Outside of jit its calls are jitted and cached, also under grad
      and vmap, unless fn closes over tracers.

    Raises:
      ConfigError: fn is not callable, or fallback is not one of the three.
      MaterializeError: when called with fallback="raise", if a weight would be materialized.
      StateError: when called, if fn changes an argument that holds adapted weights in place, as an
        nnx.Module in training mode does: the change would be lost.

    Source: LoRA, arXiv 2106.09685, equation 3.

    >>> import jax, jax.numpy as jnp, lowrank_jax as lowrank
    >>> f = lambda params, x: x @ params["w"]
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, config)
    >>> lowrank.lift(f)(lowrank.combine(base, lora), jnp.ones((1, 4)))
    Array([[4., 4., 4.]], dtype=float32)
    """
    if fallback not in FALLBACKS:
        raise ConfigError(f"fallback must be one of {FALLBACKS}, not {fallback!r}")
    warned: set[tuple[Any, str]] = set()
    closes_over_tracers = False

    def run(
        call: CallSignature,
        paths: tuple[str, ...],
        known: tuple[bool, ...] | None,
        dynamic: Sequence[Any],
        selections: Sequence[Any],
    ) -> Any:
        dynamic = restore_selections(dynamic, selections)
        ctx = Context(OPERATIONS, refuse=fallback == "raise")
        out = evaluate(fn, call, dynamic, paths, ctx, known)
        if fallback == "warn":
            _warn_materialized(ctx.records, warned)
        return out

    jitted = jax.jit(run, static_argnums=(0, 1, 2))

    @functools.wraps(fn, updated=())
    def lifted(*args: PyTree, **kwargs: PyTree) -> PyTree:
        nonlocal closes_over_tracers
        call, dynamic, paths = split_arguments(args, kwargs)
        if not any(map(is_node, dynamic)):
            return fn(*args, **kwargs)
        selections = [get_selection(leaf) for leaf in dynamic]
        traced = any(map(jaxprs.is_tracer, jax.tree.leaves((dynamic, selections))))
        # Under an outer jit that trace is the cache, and fn is traced in it. Else, also in eager
        # grad or vmap, the inner jit is the cache; not where a trace of fn captures tracers, which
        # the next call does not have, nor, where it is optional, with unhashable static arguments.
        if traced and (closes_over_tracers or _find_unhashable(call) or not jaxprs.is_eager()):
            return run(call, paths, None, dynamic, selections)
        check_hashable(call)
        known = tuple(not jaxprs.is_tracer(leaf) for leaf in dynamic)
        try:
            return jitted(call, paths, known, dynamic, selections)
        except ClosesOverTracers:
            closes_over_tracers = True
        return run(call, paths, None, dynamic, selections)

    return lifted


def _find_unhashable(call: CallSignature) -> list[Any]:
    """List the static arguments that are not hashable."""
    found = []
    for item in call.static:
        try:
            hash(item.value)
        except TypeError:
            found.append(item.value)
    return found


def check_hashable(call: CallSignature) -> None:
    """Raise if a static argument, part of the cache key of a compiled call, is not hashable."""
    if found := _find_unhashable(call):
        raise LowrankError(
            f"the argument {found[0]!r} is neither an array nor hashable, so the lifted function "
            "cannot be compiled for it: pass an array, or close over it"
        )


def _warn_materialized(records: Sequence[Record], warned: set[tuple[Any, str]]) -> None:
    """Warn once per path and primitive in the lifetime of the lifted function."""
    for record in records:
        if record.how == "materialized" and (record.path, record.primitive) not in warned:
            warned.add((record.path, record.primitive))
            warnings.warn(
                f"{record}. The result is right, but the weight is materialized; exclude the leaf, "
                "or lift with fallback='silent'",
                MaterializeWarning,
                stacklevel=4,
            )
