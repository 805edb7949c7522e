"""covariances: how the inputs of each weight vary together, for what is initialized from data."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import check_arguments, function_of_params
from lowrank_jax._errors import AxesError, ConfigError, LowrankError, TreeError, list_problems
from lowrank_jax._interpreter.interpret import Context, Record, interpret
from lowrank_jax._interpreter.table import OPERATIONS
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import Equation, PyTree
from lowrank_jax._nodes import is_adapter, is_node
from lowrank_jax._operators.covariance_probe import CovarianceProbe, Event
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import Weight
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax._targeting.targets import Target, resolve_targets
from lowrank_jax._transforms import lift


@check_arguments(fn=function_of_params)
def covariances(fn: Callable, config: LoraConfig, *, plan: Plan | None = None) -> Callable:
    r"""Make the function that measures $C = \sum x x^\top$ at every target.

    The sum is over all products with the target and all their tokens; x is what is contracted with
    it, fan-in axes flattened in the leaf's own order. The inputs of a convolution are its patches,
    in a grouped one those of every group. Nothing is centered, nor divided by the number of tokens.

    As everywhere the first product of a leaf decides its axes. Uses that do not contract all of its
    fan-in (a tied table read by rows, a weight used transposed) contribute nothing.

    C is a derivative, so that it goes through jit, scan, remat, vmap and cond; what has no
    reverse-mode derivative, as a while loop, it does not go through. Compiled, it costs the forward
    pass and the products x x^T; x is kept until then, and in a model with remat made again.

    Args:
      fn: a pure function fn(params, *args, **kwargs).
      config: which leaves, as for init.
      plan: of fn, as for init: needed for "all-linear" and for leaves of more than two axes.

    Returns:
      measure(params, *args, **kwargs) -> {path: C}, with C float32 [*stack, i, i], i the product of
      the fan-in sizes. It is jit-able; params may hold Quantized leaves. Covariances of batches add
      up: `jax.tree.map(jnp.add, one, other)`.

    Raises:
      ConfigError: fn or config is none.
      PatternError, AxesError, ConfigError, TreeError: when called, as init does; for a table that
        is only read by rows; for a target without a product that contracts its fan-in.
      LowrankError: when called, if the inputs of some product with a target would go unseen.

    Source: CorDA, arXiv 2406.05223, section 3.2.

    >>> import lowrank_jax as lowrank
    >>> f = lambda params, x: jnp.tanh(x @ params["w"])
    >>> measure = lowrank.covariances(f, lowrank.LoraConfig(rank=1, targets="w"))
    >>> measure({"w": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0], [0.0, 3.0]]))["w"]
    Array([[ 1.,  2.],
           [ 2., 13.]], dtype=float32)
    """

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(
        call: lift.CallSignature, paths: tuple[str, ...], dynamic: list[Any]
    ) -> dict[str, jax.Array]:
        (params, *_), _ = call.unflatten(dynamic)
        targets = _resolve_targets(params, config, plan)
        return _measure(fn, targets, call, paths, dynamic)

    def measure(params: PyTree, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        call, dynamic, paths = lift.split_arguments((params, *args), kwargs)
        lift.check_hashable(call)
        return run(call, tuple(paths), dynamic)

    return measure


def _resolve_targets(params: PyTree, config: LoraConfig, plan: Plan | None) -> dict[str, Target]:
    """The targets, all of which have inputs."""
    leaves, _ = flatten(params, is_leaf=is_node)
    if adapted := [path for path, leaf in leaves if is_adapter(leaf)]:
        raise TreeError(f"params already holds adapters ({adapted[0]!r}): pass the base")
    arrays = {path: leaf for path, leaf in leaves if hasattr(leaf, "dtype")}
    targets = resolve_targets(arrays, config, plan)
    if tables := [path for path, target in targets.items() if target.kind == "lookup"]:
        raise ConfigError(
            f"{tables[0]!r} is a table read by rows, which has no input to measure: leave it out "
            f"with LoraConfig(exclude={tables})"
        )
    return targets


@dataclasses.dataclass
class _ProbeContext(Context):
    """A context that keeps what each product told, and builds no target densely.

    Where a loop traces its body once more, the last time is the one that counts.
    """

    products: dict[str, dict[Any, tuple[Record, set[Event]]]] = dataclasses.field(
        default_factory=dict
    )
    current: dict[str, set[Event]] = dataclasses.field(default_factory=dict)

    def _begin_leaf_use(self, leaf: Weight) -> Weight:
        used = super()._begin_leaf_use(leaf)
        if isinstance(used, CovarianceProbe):
            told = self.current[used.path] = set[Event]()
            used = used.replace(notify=told.add)
        return used

    def record(self, weight: Weight, eqn: Equation, how: str, reason: str = "") -> None:
        super().record(weight, eqn, how, reason)
        told = self.current.pop(weight.path, set())
        if Event.OBSERVED in told:
            here = (*map(id, self.frame), id(eqn))
            self.products.setdefault(weight.path, {})[here] = self.records[-1], told

    def materialize_operand(self, weight: Weight, eqn: Equation) -> Any:
        if _has_probe(weight):
            return self.materialize(weight, eqn, "it meets a weight that is no smaller")
        return super().materialize_operand(weight, eqn)

    def materialize(self, value: Any, eqn: Equation, reason: str) -> Any:
        if not _has_probe(value):
            return super().materialize(value, eqn, reason)
        line, _ = self.locate(eqn)
        raise LowrankError(
            f"the inputs of {self.format_paths(value)} cannot be measured: it goes into "
            f"{eqn.primitive.name!r} at {line}, where it cannot be followed ({reason}); exclude "
            "the leaf"
        )


def _has_probe(value: Any) -> bool:
    """Whether a value is a target, or joins one with others."""
    leaves = value.leaves() if isinstance(value, Weight) else ()
    return any(isinstance(leaf, CovarianceProbe) for leaf in leaves)


def _measure(
    fn: Callable,
    targets: Mapping[str, Target],
    call: lift.CallSignature,
    paths: Sequence[str],
    dynamic: Sequence[Any],
) -> dict[str, jax.Array]:
    """The derivative, by totals of zeros, of a number that depends on all results of fn."""
    traced = lift.trace(fn, call, dynamic, paths)
    watch = _ProbeContext(OPERATIONS, inline_jit=True)
    at = {paths.index(path): path for path in targets}  # params are the first argument
    shape = {}
    for number, path in at.items():
        size = lambda axes, leaf=dynamic[number]: tuple(leaf.shape[axis] for axis in axes)
        rows = math.prod(size(targets[path].fan_in))
        shape[path] = (*size(targets[path].stack), rows, rows)

    def enter(number: int, leaf: Any, totals: Mapping[str, jax.Array]) -> Any:
        value = lift.wrap_node(leaf, paths[number]) if is_node(leaf) else leaf
        if number not in at:
            return value
        path, base = at[number], value if isinstance(value, Weight) else DenseWeight(value)
        return CovarianceProbe.of(base, totals[path], targets[path], path)

    def number_of(totals: Mapping[str, jax.Array]) -> Any:
        values = [enter(number, leaf, totals) for number, leaf in enumerate(dynamic)]
        outs = interpret(watch, traced.jaxpr, values)[: traced.out_tree.num_leaves]
        outs = [out.materialize() if isinstance(out, Weight) else out for out in outs]
        outs = [out.real for out in outs if jnp.issubdtype(out.dtype, jnp.inexact)]
        return sum((out.astype(jnp.float32).sum() for out in outs), jnp.float32(0))

    zeros = {path: jnp.zeros((*s[:-2], s[-1] ** 2), jnp.float32) for path, s in shape.items()}
    totals = jax.grad(number_of)(zeros)
    _check_observed(targets, watch)
    return {path: total.reshape(shape[path]) for path, total in totals.items()}


def _check_observed(targets: Mapping[str, Target], watch: _ProbeContext) -> None:
    """Refuse sums that lack a product."""
    if blind := [
        f"{path}: no product contracts its axes {target.fan_in}"
        for path, target in targets.items()
        if path not in watch.products
    ]:
        raise AxesError(
            "targets without an input to measure: pass plan=lowrank.plan(fn, params, *args), which "
            f"knows their axes, or exclude them:\n{list_problems(blind)}"
        )
    missed = {  # as a set, in order
        f"{path}: {record.primitive} at {record.source}": None
        for path, found in watch.products.items()
        for record, told in found.values()
        if Event.DIFFERENTIATED not in told
    }
    if missed:
        raise LowrankError(
            "no result of fn has a derivative that reaches these products, so their inputs would "
            "not be counted. Return what depends on them and is no integer (logits, not their "
            "argmax), remove a lax.stop_gradient after them or code whose result is not used, or "
            f" exclude the leaves:\n{list_problems([*missed])}"
        )
