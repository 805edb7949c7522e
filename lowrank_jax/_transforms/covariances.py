"""covariances: a calibration pass that measures the input covariance of each target weight."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._checks.functions import function_of_params
from lowrank_jax._errors import AxesError, ConfigError, LowrankError, TreeError, list_problems
from lowrank_jax._interpreter.interpret import Context, Record, interpret
from lowrank_jax._interpreter.table import OPERATIONS
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import Equation, PyTree
from lowrank_jax._nodes import UNADAPTED, find_adapters, is_node
from lowrank_jax._operators.covariance_probe import CovarianceProbe, Event
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import Weight
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._targeting.plan import Plan
from lowrank_jax._targeting.targets import Target, resolve_targets
from lowrank_jax._transforms import lift


@check_arguments(fn=function_of_params)
def covariances(fn: Callable, config: LoraConfig, *, plan: Plan | None = None) -> Callable:
    r"""Return a function that measures $C = \sum x x^\top$ for each target.

    The sum runs over all products with the target and over all tokens. x is the operand contracted
    with the weight, its fan-in axes flattened in the leaf's axis order. The inputs of a convolution
    are its patches; in a grouped convolution, the patches of all groups. C is neither centered nor
    divided by the number of tokens.

    The first product of a leaf decides its axes. Uses that do not contract the whole fan-in (a tied
    table read by rows, a transposed use) contribute nothing.

    C is computed as a derivative, so it works under jit, scan, remat, vmap and cond, but not under
    primitives without a reverse-mode derivative, such as while_loop. When compiled, it costs the
    forward pass plus the products x x^T. Each x is kept until then, or recomputed under remat.

    Args:
      fn: a pure function fn(params, *args, **kwargs).
      config: selects the leaves, as for init.
      plan: the plan of fn, as for init. Required for "all-linear" and for leaves with more than two
        axes.

    Returns:
      measure(params, *args, **kwargs) -> {path: C}, where C is float32 [*stack, i, i] and i is the
      product of the fan-in sizes. It can be jitted, and params may hold Quantized leaves. Sum the
      covariances of several batches with `jax.tree.map(jnp.add, one, other)`.

    Raises:
      ConfigError: fn is not callable, or config is not a LoraConfig; when called, if a target is a
        table that is only read by rows.
      AxesError: when called, if no product contracts the fan-in of a target.
      PatternError, TreeError: when called, as init raises them.
      LowrankError: when called, if the inputs of some product with a target cannot be measured.

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

    def measure(params: PyTree, *args: PyTree, **kwargs: PyTree) -> dict[str, jax.Array]:
        call, dynamic, paths = lift.split_arguments((params, *args), kwargs)
        lift.check_hashable(call)
        return run(call, tuple(paths), dynamic)

    return measure


def _resolve_targets(params: PyTree, config: LoraConfig, plan: Plan | None) -> dict[str, Target]:
    """Resolve the targets and refuse tables that are only read by rows."""
    leaves, _ = flatten(params, is_leaf=is_node)
    if adapted := find_adapters(leaves):
        raise TreeError(f"params already holds adapters ({adapted[0]!r}): pass {UNADAPTED}")
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
    """A context that collects the events of each product and never materializes a target.

    Args:
      products: path -> product -> its record and events.
      current: path -> events of the product that is being evaluated.
    """

    products: dict[str, dict[Any, tuple[Record, set[Event]]]] = dataclasses.field(
        default_factory=dict
    )
    current: dict[str, set[Event]] = dataclasses.field(default_factory=dict)

    def _begin_leaf_use(self, leaf: Weight) -> Weight:
        used = super()._begin_leaf_use(leaf)
        if isinstance(used, CovarianceProbe):
            events = self.current[used.path] = set[Event]()
            used = used.replace(notify=events.add)
        return used

    def record(self, weight: Weight, eqn: Equation, how: str, reason: str = "") -> None:
        super().record(weight, eqn, how, reason)
        events = self.current.pop(weight.path, set())
        if Event.OBSERVED in events:
            # A scan may trace its body more than once. The key is the equation with the frames
            # around it, so the last trace replaces the events of the earlier ones.
            key = (*map(id, self.frame), id(eqn))
            self.products.setdefault(weight.path, {})[key] = self.records[-1], events

    def materialize_operand(self, weight: Weight, eqn: Equation) -> Any:
        if _has_probe(weight):
            return self.materialize(weight, eqn, "it multiplies a weight that is not smaller")
        return super().materialize_operand(weight, eqn)

    def materialize(self, value: jax.Array | Weight, eqn: Equation, reason: str) -> Any:
        if not _has_probe(value):
            return super().materialize(value, eqn, reason)
        line, _ = self.locate(eqn)
        raise LowrankError(
            f"the inputs of {self.format_paths(value)} cannot be measured: it goes into "
            f"{eqn.primitive.name!r} at {line}, where it cannot be followed ({reason}); exclude "
            "the leaf"
        )


def _has_probe(value: object) -> TypeGuard[Weight]:
    """Whether value is a target's weight, or a weight operator composed of one."""
    leaves = value.leaves() if isinstance(value, Weight) else ()
    return any(isinstance(leaf, CovarianceProbe) for leaf in leaves)


def _measure(
    fn: Callable,
    targets: Mapping[str, Target],
    call: lift.CallSignature,
    paths: Sequence[str],
    dynamic: Sequence[Any],
) -> dict[str, jax.Array]:
    """Differentiate a scalar that depends on all results of fn with respect to zero totals."""
    # A probe's product returns the base's product unchanged, but declares C = sum x x^T to be its
    # derivative with respect to `total`, whatever the cotangent. Any scalar that reaches every
    # product will therefore do, and autodiff sums C over uses, loops and branches:
    #   leaf  [4, 8, 16], stack (0,), fan_in (1,)
    #   total [4, 64]      zeros, one row of 8 * 8 entries for each of the 4 stacked weights
    #   C     [4, 8, 8]    the gradient with respect to total, reshaped
    traced = lift.trace(fn, call, dynamic, paths)
    ctx = _ProbeContext(OPERATIONS, inline_jit=True)
    target_at = {paths.index(path): path for path in targets}  # params are the first argument
    shape = {}
    for number, path in target_at.items():
        size = lambda axes, leaf=dynamic[number]: tuple(leaf.shape[axis] for axis in axes)
        rows = math.prod(size(targets[path].fan_in))
        shape[path] = (*size(targets[path].stack), rows, rows)

    def attach_probe(number: int, leaf: PyTree, totals: Mapping[str, jax.Array]) -> Any:
        value = lift.wrap_node(leaf, paths[number]) if is_node(leaf) else leaf
        if number not in target_at:
            return value
        path, base = target_at[number], value if isinstance(value, Weight) else DenseWeight(value)
        return CovarianceProbe.of(base, totals[path], targets[path], path)

    def scalar(totals: Mapping[str, jax.Array]) -> Any:
        values = [attach_probe(number, leaf, totals) for number, leaf in enumerate(dynamic)]
        outs = interpret(ctx, traced.jaxpr, values)[: traced.out_tree.num_leaves]
        outs = [out.materialize() if isinstance(out, Weight) else out for out in outs]
        outs = [out.real for out in outs if jnp.issubdtype(out.dtype, jnp.inexact)]
        return sum((out.astype(jnp.float32).sum() for out in outs), jnp.float32(0))

    zeros = {path: jnp.zeros((*s[:-2], s[-1] ** 2), jnp.float32) for path, s in shape.items()}
    totals = jax.grad(scalar)(zeros)
    _check_observed(targets, ctx)
    return {path: total.reshape(shape[path]) for path, total in totals.items()}


def _check_observed(targets: Mapping[str, Target], ctx: _ProbeContext) -> None:
    """Raise if a target has no observed product, or autodiff did not reach one of its products."""
    if unobserved := [
        f"{path}: no product contracts its axes {target.fan_in}"
        for path, target in targets.items()
        if path not in ctx.products
    ]:
        raise AxesError(
            "targets without an input to measure: pass plan=lowrank.plan(fn, params, *args), which "
            f"knows their axes, or exclude them:\n{list_problems(unobserved)}"
        )
    missed = {  # a dict, as an ordered set
        f"{path}: {record.primitive} at {record.source}": None
        for path, found in ctx.products.items()
        for record, events in found.values()
        if Event.DIFFERENTIATED not in events
    }
    if missed:
        raise LowrankError(
            "no result of fn has a derivative that reaches these products, so their inputs would "
            "not be counted. Return a floating-point value that depends on them (logits, not their "
            "argmax), remove a lax.stop_gradient after them or code whose result is not used, or "
            f"exclude the leaves:\n{list_problems([*missed])}"
        )
