"""lift: the user's own function, taking adapted weights where it took arrays."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax._checks.arguments import (
    check_arguments,
    function_of_params,
    refuse_unsupported_dtypes,
)
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
from lowrank_jax._nodes import Adapted, Full, is_node, strip_norms
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._nodes.whole import check_node
from lowrank_jax._operators.dora import as_weight
from lowrank_jax._operators.low_rank import LowRankWeight
from lowrank_jax._operators.materialize import materialize
from lowrank_jax._operators.weight import Weight

FALLBACKS = ("warn", "raise", "silent")


@dataclasses.dataclass(frozen=True)
class CallSignature:
    """The arguments of one call, flattened: arrays and nodes in `dynamic`, the rest in `static`.

    `owners` has, for each of the dynamic ones, the number of the argument that it is in. As part of
    a cache key calls are told apart by the types and bits of what is static, in `treedef` too.
    """

    treedef: Static
    places: tuple[bool, ...]
    static: tuple[Static, ...]
    owners: tuple[int, ...]

    def unflatten(self, dynamic: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs with these values for the arrays."""
        moving, fixed = iter(dynamic), iter(self.static)
        leaves = [next(moving) if place else next(fixed).value for place in self.places]
        return jax.tree.unflatten(self.treedef.value, leaves)


def is_array(value: Any) -> bool:
    """Whether an argument is traced; everything else is static."""
    return (
        isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
        or is_node(value)
        or hasattr(value, "aval")
    )


def split_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[CallSignature, list[Any], tuple[str, ...]]:
    """Flatten arguments into a Call, its arrays and nodes, and the path of each."""
    leaves, treedef = flatten_checked(jax.tree.flatten, (args, kwargs), is_node)
    if has_plain_keys(treedef):
        named = _name_treedef_leaves(treedef)
    else:
        keyed, treedef = flatten_with_keys((args, kwargs), is_node)
        leaves, named = [leaf for _, leaf in keyed], _name_leaves([keys for keys, _ in keyed])
    places = tuple(map(is_array, leaves))
    dynamic = list(itertools.compress(leaves, places))
    static = tuple(Static(leaf) for leaf, place in zip(leaves, places, strict=True) if not place)
    paths, owners = named
    owners = tuple(itertools.compress(owners, places))
    call = CallSignature(Static(treedef), places, static, owners)
    return call, dynamic, tuple(itertools.compress(paths, places))


def _name_leaves(keyed: Sequence[Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The path of each leaf of (args, kwargs), and the number of the argument that it is in."""
    numbers: dict[Any, int] = {}
    owners = [numbers.setdefault(tuple(keys[:2]), len(numbers)) for keys in keyed]
    return tuple(map(_format_path, keyed)), tuple(owners)


@functools.lru_cache(maxsize=1024)
def _name_treedef_leaves(treedef: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The same of a plain structure."""
    return _name_leaves(list_keys(treedef))


def _format_path(keys: Sequence[Any]) -> str:
    """The path within the first argument; other arguments are named before theirs."""
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
      jaxpr: its results, then what has become of the arguments that it put other arrays into.
      out_tree: the structure of its results.
      reassigned: those arguments, by number.
    """

    jaxpr: Any
    out_tree: Any
    reassigned: tuple[int, ...]

    @property
    def mutated(self) -> list[int]:
        """Arguments that the function changed in place: an nnx.Module is such an argument.

        nnx.jit, nnx.remat and nnx.scan hand every variable on as another array, the same or not:
        the jaxpr tells.
        """
        through = find_forwarded(OPERATIONS, self.jaxpr)[self.out_tree.num_leaves :]
        return [i for i, source in zip(self.reassigned, through, strict=True) if source != i]


def trace(
    fn: Callable, call: CallSignature, dynamic: Sequence[Any], paths: Sequence[str]
) -> TracedFunction:
    """Trace fn on dense leaves."""
    reassigned: tuple[int, ...] = ()

    def flat(*leaves: Any) -> Any:
        nonlocal reassigned
        pairs = zip(leaves, hosted, strict=True)
        leaves = tuple(jaxprs.to_host(leaf) if on_host else leaf for leaf, on_host in pairs)
        args, kwargs = call.unflatten(leaves)
        out = fn(*args, **kwargs)
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
    hosted = [
        is_node(leaf) and any(map(jaxprs.is_on_host, _frozen_arrays(leaf))) for leaf in dynamic
    ]
    avals = [jax.eval_shape(materialize, leaf) if is_node(leaf) else leaf for leaf in dynamic]
    jaxpr, (out, _) = jax.make_jaxpr(flat, return_shape=True)(*avals)
    return TracedFunction(jaxpr, jax.tree.structure(out), reassigned)


def _frozen_arrays(node: Any) -> list[Any]:
    """The arrays of the frozen leaf of a node."""
    return jax.tree.leaves(strip_norms(node.base if isinstance(node, Adapted) else node))


_IN_PLACE = (
    "a lifted function is pure, and would forget that. For an nnx.Module call model.eval() before, "
    "where dropout and batch statistics are to rest, or take lowrank.functional_with_state(model), "
    "whose function returns the new state; an nnx.Rngs is to be made of a key in the jitted step"
)


class ClosesOverTracers(Exception):
    """A function closes over tracers: what is traced of it is of no use later."""


def evaluate(
    fn: Callable,
    call: CallSignature,
    dynamic: Sequence[Any],
    paths: Sequence[str],
    ctx: Context,
    known: Sequence[bool] | None = None,
) -> Any:
    """Trace fn once and evaluate what was traced with the nodes in place of their dense weights.

    known: for each of `dynamic`, whether the caller has its value, where this is itself traced to
    be kept.

    Raises:
      ClosesOverTracers: it is to be kept, and fn closes over tracers, of another trace next time.
    """
    traced = trace(fn, call, dynamic, paths)
    if known is not None and any(map(jaxprs.is_tracer, jaxprs.split_jaxpr(traced.jaxpr)[1])):
        raise ClosesOverTracers
    # an argument without nodes that was made in the caller's own trace is the caller's business: an
    # nnx.Rngs of a key for this call, say
    adapted = {call.owners[i] for i, leaf in enumerate(dynamic) if is_node(leaf)}
    has_value = known or [not jaxprs.is_tracer(leaf) for leaf in dynamic]
    kept = lambda i: call.owners[i] in adapted or has_value[i]
    if changed := [paths[i] for i in traced.mutated if kept(i)]:
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


def wrap_node(node: Any, path: str) -> Any:
    """The value that stands for a node inside: a weight, or an array for a leaf trained whole."""
    if isinstance(node, Adapted):
        return materialize(node) if isinstance(node.delta, Full) else LowRankWeight.of(node, path)
    if isinstance(strip_norms(node), Quantized):
        return as_weight(node, path)
    return materialize(node)


@check_arguments(fn=function_of_params)
def lift(fn: Callable, *, fallback: str = "warn") -> Callable:
    r"""A function of the same signature whose array arguments may be adapted weights.

    `lift(fn)(combine(base, lora), x)` equals `fn(merge(base, lora), x)` to rounding, without
    building $W + s\,a\,b$: fn is traced once, and what was traced is evaluated with
    $x W + s (x a) b$ at every product. With dense arguments it is fn itself.

    Args:
      fn: any pure function fn(params, *args, **kwargs), pure as for jax.jit. Arguments that are not
        arrays are static, and hashable in eager calls; True, 1 and 1.0 are three values.
      fallback: what to do where no rule keeps a weight factored: "warn" (build it, say so once for
        each path and primitive), "raise" (MaterializeError), "silent".

    Returns:
      The lifted function. It composes with jit, grad, jvp, vmap, checkpoint, scan, pmap and
      shard_map, inside and outside. Calls outside of any jit, under grad and vmap too, run through
      one jax.jit that it holds, unless fn closes over tracers.

    Raises:
      ConfigError: fallback is none of the three.
      MaterializeError: when called, with fallback="raise".
      StateError: when called, if fn changes an argument that holds adapted weights in place, as an
        nnx.Module in training mode changes itself: the changes would be lost.

    Source: LoRA, arXiv 2106.09685, equation 3.

    >>> import jax, jax.numpy as jnp, lowrank_jax as lowrank
    >>> f = lambda params, x: x @ params["w"]
    >>> params = {"w": jnp.ones((4, 3))}
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), params, config)
    >>> lowrank.lift(f)(lowrank.combine(base, lora), jnp.ones((1, 4)))
    Array([[4., 4., 4.]], dtype=float32)
    """
    if fallback not in FALLBACKS:
        raise ConfigError(f"fallback is one of {FALLBACKS}, not {fallback!r}")
    warned: set[tuple[Any, str]] = set()
    opens: list[bool] = []  # whether fn was seen to close over tracers

    def run(
        call: CallSignature,
        paths: tuple[str, ...],
        known: tuple[bool, ...] | None,
        dynamic: Sequence[Any],
    ) -> Any:
        ctx = Context(OPERATIONS, refuse=fallback == "raise")
        out = evaluate(fn, call, dynamic, paths, ctx, known)
        if fallback == "warn":
            _warn_materialized(ctx.records, warned)
        return out

    jitted = jax.jit(run, static_argnums=(0, 1, 2))

    @functools.wraps(fn, updated=())
    def lifted(*args: Any, **kwargs: Any) -> Any:
        call, dynamic, paths = split_arguments(args, kwargs)
        if not any(map(is_node, dynamic)):
            return fn(*args, **kwargs)
        traced = any(map(jaxprs.is_tracer, jax.tree.leaves(dynamic)))
        if traced and (opens or _find_unhashable(call) or not jaxprs.is_eager()):
            return run(call, paths, None, dynamic)
        check_hashable(call)
        known = tuple(not jaxprs.is_tracer(leaf) for leaf in dynamic)
        try:
            return jitted(call, paths, known, dynamic)
        except ClosesOverTracers:
            opens.append(True)
        return run(call, paths, None, dynamic)

    return lifted


def _find_unhashable(call: CallSignature) -> list[Any]:
    """Static arguments that cannot be part of a cache key."""
    found = []
    for item in call.static:
        try:
            hash(item.value)
        except TypeError:
            found.append(item.value)
    return found


def check_hashable(call: CallSignature) -> None:
    """Static arguments of a call that is compiled are part of a cache key."""
    if found := _find_unhashable(call):
        raise LowrankError(
            f"the argument {found[0]!r} is neither an array nor hashable, so the lifted function "
            "cannot be compiled for it: pass an array, or close over it"
        )


def _warn_materialized(records: Sequence[Record], warned: set[tuple[Any, str]]) -> None:
    """One warning for each path and primitive, in the life of the lifted function."""
    for record in records:
        if record.how == "materialized" and (record.path, record.primitive) not in warned:
            warned.add((record.path, record.primitive))
            warnings.warn(
                f"{record}. The result is right, but the dense weight is built; exclude the leaf, "
                "or lift with fallback='silent'",
                MaterializeWarning,
                stacklevel=4,
            )
