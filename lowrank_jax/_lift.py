"""lift: the user's own function, taking adapted weights where it took arrays."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax import _codecs, _jaxprs
from lowrank_jax._checks import checked, function_of_params, refuse_other_dtypes
from lowrank_jax._errors import (
    ConfigError,
    LowrankError,
    MaterializeWarning,
    StateError,
    TreeError,
    listing,
)
from lowrank_jax._interpreter.interpret import Context, Record, forwarded, interpret
from lowrank_jax._interpreter.rules import RULES
from lowrank_jax._nodes import Adapted, Full, LowRank, Normed, is_node, materialize, unnormed
from lowrank_jax._nodes.family import Rows
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._paths import flatten_with_keys, path_of
from lowrank_jax._primitives.contract import RANK
from lowrank_jax._statics import Static
from lowrank_jax._weights.low_rank import LowRankWeight
from lowrank_jax._weights.magnitude import weight_of
from lowrank_jax._weights.virtual import Virtual

FALLBACKS = ("warn", "raise", "silent")


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, flattened: arrays and nodes in `dynamic`, the rest in `static`.

    `owners` names, for each of the dynamic ones, the argument that it is in. As part of a cache key
    calls are told apart by the types and bits of what is static, in `treedef` too.
    """

    treedef: Static
    places: tuple[bool, ...]
    static: tuple[Static, ...]
    owners: tuple[Any, ...]

    def arguments(self, dynamic: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, list[Any], list[str]]:
    """Flatten arguments into a Call, its arrays and nodes, and the path of each."""
    keyed, treedef = flatten_with_keys((args, kwargs), is_node)
    dynamic = [leaf for _, leaf in keyed if is_array(leaf)]
    paths = [_argument_path(keys) for keys, leaf in keyed if is_array(leaf)]
    static = tuple(Static(leaf) for _, leaf in keyed if not is_array(leaf))
    owners = tuple(tuple(keys[:2]) for keys, leaf in keyed if is_array(leaf))
    places = tuple(is_array(leaf) for _, leaf in keyed)
    return Call(Static(treedef), places, static, owners), dynamic, paths


def _argument_path(keys: Sequence[Any]) -> str:
    """The path within the first argument; other arguments are named before theirs."""
    group, which, *rest = keys
    path = path_of(rest)
    if group.idx == 0 and which.idx == 0:
        return path
    name = f"args[{which.idx}]" if group.idx == 0 else which.key
    return f"{name}/{path}" if path else name


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function traced on dense leaves.

    Args:
      jaxpr: its results, then what has become of the arguments that it put other arrays into.
      out_tree: the structure of its results.
      moved: those arguments, by number.
    """

    jaxpr: Any
    out_tree: Any
    moved: tuple[int, ...]

    @property
    def changed(self) -> list[int]:
        """Arguments that the function changed in place: an nnx.Module is such an argument.

        nnx.jit, nnx.remat and nnx.scan hand every variable on as another array, the same or not:
        the jaxpr tells.
        """
        through = forwarded(self.jaxpr)[self.out_tree.num_leaves :]
        return [i for i, source in zip(self.moved, through, strict=True) if source != i]


def trace(fn: Callable, call: Call, dynamic: Sequence[Any], paths: Sequence[str]) -> Traced:
    """Trace fn on dense leaves."""
    moved: tuple[int, ...] = ()

    def flat(*leaves: Any) -> Any:
        nonlocal moved
        args, kwargs = call.arguments(leaves)
        out = fn(*args, **kwargs)
        after = [leaf for leaf in jax.tree.leaves((args, kwargs)) if is_array(leaf)]
        if len(after) != len(leaves):
            raise StateError(
                f"the function adds arrays to its arguments, or removes some ({len(leaves)} before "
                f"the call, {len(after)} after it): {_IN_PLACE}"
            )
        pairs = enumerate(zip(leaves, after, strict=True))
        moved = tuple(i for i, (one, other) in pairs if one is not other)
        return out, [after[i] for i in moved]

    refuse_other_dtypes(dynamic, paths)
    for leaf, path in zip(dynamic, paths, strict=True):
        if is_node(leaf):
            check(leaf, path)
    avals = [jax.eval_shape(materialize, leaf) if is_node(leaf) else leaf for leaf in dynamic]
    jaxpr, (out, _) = jax.make_jaxpr(flat, return_shape=True)(*avals)
    return Traced(jaxpr, jax.tree.structure(out), moved)


_IN_PLACE = (
    "a lifted function is pure, and would forget that. For an nnx.Module call model.eval() before, "
    "where dropout and batch statistics are to rest, or take lowrank.functional_with_state(model), "
    "whose function returns the new state; an nnx.Rngs is to be made of a key in the jitted step"
)


def evaluate(
    fn: Callable,
    call: Call,
    dynamic: Sequence[Any],
    paths: Sequence[str],
    ctx: Context,
    eager: bool = False,
) -> Any:
    """Trace fn once and evaluate what was traced with the nodes in place of their dense weights."""
    traced = trace(fn, call, dynamic, paths)
    # an argument without nodes that was made in the caller's own trace is the caller's business: an
    # nnx.Rngs of a key for this call, say
    adapted = {call.owners[i] for i, leaf in enumerate(dynamic) if is_node(leaf)}
    kept = lambda i: call.owners[i] in adapted or eager or not _jaxprs.is_tracer(dynamic[i])
    if changed := [paths[i] for i in traced.changed if kept(i)]:
        raise StateError(f"the function changes its arguments: {_IN_PLACE}:\n{listing(changed)}")
    for i, (leaf, path) in enumerate(zip(dynamic, paths, strict=True)):
        if is_node(leaf) and isinstance(getattr(leaf, "delta", leaf), Full):
            for eqn in _jaxprs.users(traced.jaxpr, i):
                ctx.records.append(Record(path, eqn.primitive.name, "dense", *ctx.where(eqn)))
    values = [
        _enter(leaf, path) if is_node(leaf) else leaf
        for leaf, path in zip(dynamic, paths, strict=True)
    ]
    outs = interpret(ctx, traced.jaxpr, values)[: traced.out_tree.num_leaves]
    dense = [ctx.returned(out) if isinstance(out, Virtual) else out for out in outs]
    return jax.tree.unflatten(traced.out_tree, dense)


def check(node: Any, path: str) -> None:
    """A node is whole: it has a base, and factors that fit it and each other."""
    if isinstance(node, LowRank):
        raise TreeError(
            f"{path!r} is a LowRank adapter without its base: pass lowrank.combine(base, lora) to "
            "the lifted function"
        )
    leaf = unnormed(node.base if isinstance(node, Adapted) else node)
    if isinstance(leaf, Quantized):
        _check_codes(leaf, path)
    if not isinstance(node, Adapted):
        return
    delta = node.delta
    if not isinstance(delta, LowRank | Full):
        raise TreeError(f"{path!r} holds an Adapted node whose delta is {type(delta).__name__}")
    if not delta.fits(node.base.shape):
        raise TreeError(
            f"{path!r}: the adapter is for shape {tuple(delta.shape)}, the base has "
            f"{tuple(node.base.shape)}; it belongs to another model"
        )
    if isinstance(delta, LowRank):
        _check_ranks(delta, path)
        if delta.magnitude is not None:
            _check_magnitude(node, delta, path)


def _check_codes(leaf: Quantized, path: str) -> None:
    """The blocks are where the leaf says: no axis but leading ones was taken from its codes."""
    halved = _codecs.format_of(leaf.format).bits == 4 and leaf.packing == "uint8"
    place, elements = leaf.leading + 1, leaf.block_size // (2 if halved else 1)
    codes, blocks = tuple(leaf.codes.shape), -(-math.prod(leaf.blocked) // leaf.block_size)
    fits = place > 0 and codes[place] == elements
    if fits and not _jaxprs.is_manual():  # else a device has a part of the blocks
        fits = codes[place - 1] == blocks
    if not fits or tuple(leaf.scales.shape) != codes[:place] + codes[place + 1 :]:
        raise TreeError(
            f"{path!r}: codes of shape {codes} with {leaf.trailing} axes after those of blocks of "
            f"{leaf.block_size} have no such blocks: a loop or vmap took away an axis of the "
            "weight that is not its first; put the loop inside the lifted function"
        )


def _check_ranks(delta: LowRank, path: str) -> None:
    """a and b are of one adapter, and of a table's rows each has its change."""
    if isinstance(delta, Rows) and delta.b.shape[0] != delta.rank:
        raise TreeError(
            f"{path!r}: changes of shape {delta.b.shape} for {delta.rank} rows of a table; they "
            "belong to different adapters"
        )
    axes = delta.labeled
    if RANK not in axes.get("a", ()) or RANK not in axes.get("b", ()):
        return
    size = lambda array, labels: array.shape[labels.index(RANK) - len(labels)]
    outer, inner = size(delta.a, axes["a"]), size(delta.b, axes["b"])
    if inner != outer:
        raise TreeError(
            f"{path!r}: a of shape {delta.a.shape} has rank {outer}, but b of shape "
            f"{delta.b.shape} has rank {inner}; they belong to different adapters"
        )


def _check_magnitude(node: Adapted, delta: LowRank, path: str) -> None:
    """The magnitude is one number for each output feature, and the norm is of whole features."""
    fan_in, fan_out, stack = delta.for_shape(node.base.shape).axes(node.base.ndim)
    sizes = lambda axes: tuple(node.base.shape[axis] for axis in axes)
    if tuple(delta.magnitude.shape) != sizes((*stack, *fan_out)):
        raise TreeError(
            f"{path!r}: DoRA's magnitude has shape {tuple(delta.magnitude.shape)}, but the output "
            f"features of the base have {sizes((*stack, *fan_out))}; it belongs to another model"
        )
    if isinstance(node.base, Normed) and math.prod(sizes(fan_in)) != node.base.terms:
        raise TreeError(
            f"{path!r}: here are {math.prod(sizes(fan_in))} of the {node.base.terms} weights of "
            "each output feature, and DoRA's norm is of all of them; inside shard_map split other "
            "axes, or lift the function that shard_map returned"
        )


def _enter(node: Any, path: str) -> Any:
    """The value that stands for a node inside: a weight, or an array for a leaf trained whole."""
    if isinstance(node, Adapted):
        return materialize(node) if isinstance(node.delta, Full) else LowRankWeight.of(node, path)
    if isinstance(unnormed(node), Quantized):
        return weight_of(node, path)
    return materialize(node)


@checked(fn=function_of_params)
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
      shard_map, inside and outside. Eager calls run through one jax.jit that it holds.

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

    def run(call: Call, paths: tuple[str, ...], eager: bool, dynamic: Sequence[Any]) -> Any:
        ctx = Context(RULES, refuse=fallback == "raise")
        out = evaluate(fn, call, dynamic, paths, ctx, eager)
        if fallback == "warn":
            _warn(ctx.records, warned)
        return out

    jitted = jax.jit(run, static_argnums=(0, 1, 2))

    @functools.wraps(fn, updated=())
    def lifted(*args: Any, **kwargs: Any) -> Any:
        call, dynamic, paths = split(args, kwargs)
        if not any(is_node(leaf) for leaf in dynamic):
            return fn(*args, **kwargs)
        if any(_jaxprs.is_tracer(leaf) for leaf in jax.tree.leaves(dynamic)):
            return run(call, tuple(paths), False, dynamic)
        _check_hashable(call)
        return jitted(call, tuple(paths), True, dynamic)

    return lifted


def _check_hashable(call: Call) -> None:
    """Static arguments of an eager call are part of a cache key."""
    for item in call.static:
        try:
            hash(item.value)
        except TypeError:
            raise LowrankError(
                f"the argument {item.value!r} is neither an array nor hashable, so the lifted "
                "function cannot be compiled for it: pass an array, or close over it"
            ) from None


def _warn(records: Sequence[Record], warned: set[tuple[Any, str]]) -> None:
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
