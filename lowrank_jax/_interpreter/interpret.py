"""Evaluation of a jaxpr in which some values are weight operators instead of arrays."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from lowrank_jax._errors import MaterializeError
from lowrank_jax._interpreter.nesting import Nesting
from lowrank_jax._interpreter.operation import OTHER, OperationTable
from lowrank_jax._interpreter.shared_inputs import SharedInputs
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import Equation, Jaxpr
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import Weight, expand_path


@dataclasses.dataclass(frozen=True)
class Record:
    """One use of a weight by an equation.

    Args:
      path: path of the leaf.
      primitive: name of the equation's primitive, such as "dot_general".
      how: the weight's product_kind, such as "factored"; "materialized" if no rule applies; "built"
        if it is the smaller of two weights in a product; "dense" if the leaf is trained in full.
      source: file, line and function of the user's code.
      layer: the modules and named scopes that contain the equation.
      reason: why it was not factored, or "".

    >>> print(Record("mlp/kernel", "dot_general", "factored", "model.py:12 (mlp)", layer="mlp"))
    mlp/kernel: factored at dot_general in mlp, model.py:12 (mlp)
    """

    path: Any
    primitive: str
    how: str
    source: str
    layer: str = ""
    reason: str = ""

    def __str__(self) -> str:
        layer = f" in {self.layer}" if self.layer else ""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.path}: {self.how} at {self.primitive}{layer}, {self.source}{why}"


@dataclasses.dataclass
class Context(Nesting):
    """The state of one evaluation.

    Args:
      operations: the table of operations.
      refuse: whether to raise an error if a weight would be materialized.
      records: the uses so far, in order.
      uses: path -> number of products so far, so that each use gets its own dropout mask.
      memo: (id of a jaxpr, structure of its weights) -> the jit that evaluates it.
      slot_paths: slot -> path, in a memoized jit, whose weights have slots for paths.
      inline_jit: whether to evaluate inner jits in place, without a memo, as a dry run does.
      abstract: whether only types and records count, in a dry run that computes nothing.
    """

    operations: OperationTable
    refuse: bool = False
    records: list[Record] = dataclasses.field(default_factory=list)
    uses: dict[Any, int] = dataclasses.field(default_factory=dict)
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)
    slot_paths: dict[Any, Any] = dataclasses.field(default_factory=dict)
    inline_jit: bool = False
    abstract: bool = False

    def record(self, weight: Weight, eqn: Equation, how: str, reason: str = "") -> None:
        """Record a use of a leaf by an equation."""
        for path in expand_path(weight.path):
            where = self.locate(eqn)
            self.records.append(Record(path, eqn.primitive.name, how, *where, reason))

    def locate(self, eqn: Equation) -> tuple[str, str]:
        """Return the user's line and the layer of an equation."""
        # The name stack of an equation inside a jit starts at the jit, so the stacks of the
        # enclosing equations are put before it, outermost first.
        layers = filter(None, map(jaxprs.get_user_layer, reversed(self.list_enclosing(eqn))))
        return self.find_line(eqn), "/".join(layers)

    def materialize_operand(self, weight: Weight, eqn: Equation) -> Any:
        """Materialize the smaller weight of a product of two; this does not count as a fallback."""
        for leaf in weight.leaves():
            reason = "a product of two weights builds the smaller"
            self.record(leaf, eqn, "built", reason + leaf.materialize_note)
        return weight.materialize()

    def resolve_path(self, path: Any) -> Any:
        """Return the path for a slot of a memoized jit; any other path is returned as is."""
        return self.slot_paths.get(path, path)

    def format_paths(self, weight: Weight) -> str:
        """Return the paths of a weight's leaves as text."""
        paths = [self.resolve_path(leaf.path) for leaf in weight.leaves()]
        return ", ".join(repr(name) for path in paths for name in expand_path(path))

    def begin_use(self, weight: Weight) -> Weight:
        """Return the weight for its next use, and count this use."""
        return weight.map_leaves(self._begin_leaf_use)

    def _begin_leaf_use(self, leaf: Weight) -> Weight:
        used = self.number_use(leaf)
        self.count_uses([leaf.path])
        return used

    def number_use(self, leaf: Weight) -> Weight:
        """Return a leaf with the number of its next use, which seeds its dropout mask."""
        # layers stacked by the model are one leaf with a JointPath: a number unused by any of them
        return leaf.for_use(max(self.uses.get(path, 0) for path in expand_path(leaf.path)))

    def count_uses(self, paths: Iterable[Any]) -> None:
        """Count one more use of each path."""
        for path in paths:
            each = expand_path(path)
            number = max(self.uses.get(one, 0) for one in each)
            self.uses |= dict.fromkeys(each, number + 1)

    def materialize(self, value: Any, eqn: Equation, reason: str) -> Any:
        """Materialize a weight to which no rule applies, and record why; arrays are returned as is.

        Raises:
          MaterializeError: `refuse` is set.
        """
        if not isinstance(value, Weight):
            return value
        if not value.leaves():  # a concatenation of which only plain arrays are left
            return value.materialize()
        if self.refuse:
            line, layer = self.locate(eqn)
            where = f" (in {layer})" if layer else ""
            raise MaterializeError(
                f"the weight {self.format_paths(value)} would have to be materialized at "
                f"{eqn.primitive.name!r}, {line}{where}: {reason}. Exclude the "
                "leaf from the targets, or lift with fallback='warn' to allow it"
            )
        for leaf in value.leaves():
            self.record(leaf, eqn, "materialized", reason + leaf.materialize_note)
        return value.materialize()

    def materialize_result(self, weight: Weight) -> Any:
        """Materialize a weight that is a result of the whole function.

        Raises:
          MaterializeError: `refuse` is set.
        """
        if self.refuse and weight.leaves():
            raise MaterializeError(
                f"the function returns the weight {self.format_paths(weight)} itself, which would "
                "be materialized; return what you need of it, or lift with fallback='warn'"
            )
        for leaf in weight.leaves():
            for path in expand_path(leaf.path):
                self.records.append(
                    Record(path, "return", "materialized", "the results", "", "it is returned")
                )
        return weight.materialize()


def interpret(ctx: Context, jaxpr: Jaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr on arrays and weights; results may be weights."""
    inner, consts = jaxprs.split_jaxpr(jaxpr)
    env = dict(zip(jaxprs.get_input_vars(jaxpr), [*consts, *args], strict=True))
    # As in jax.core.eval_jaxpr, but an equation with a weight among its operands goes to the rule
    # of its primitive, which may return a weight: for x @ W.T with x [2, 8] and W [4, 8], the
    # transpose returns an operator [8, 4], and its product with x is an array [2, 4].
    last = _find_last_uses(inner)
    shared = SharedInputs(ctx.operations, inner.eqns)

    def read(atom: Any) -> Any:
        if isinstance(atom, jaxprs.Literal):
            return atom.val
        known = atom in env or not ctx.abstract
        return env[atom] if known else jaxprs.make_placeholder(atom.aval)

    def holds_weight(atom: Any) -> bool:
        return not isinstance(atom, jaxprs.Literal) and isinstance(env.get(atom), Weight)

    def evaluate(number: int) -> None:
        eqn = inner.eqns[number]
        if any(map(holds_weight, eqn.invars)):
            values = [read(atom) for atom in eqn.invars]
            if number in shared.groups and not ctx.abstract:
                values = shared.attach(number, values, env, evaluate)
            outs = _apply_rule(ctx, eqn, values)
        elif ctx.abstract and jaxprs.makes_arrays(eqn):
            return  # of its results a dry run needs the types alone, where a weight meets them
        else:
            outs = jaxprs.bind(eqn, [read(atom) for atom in eqn.invars])
        for var, out in zip(eqn.outvars, outs, strict=True):
            env[var] = out

    for number in range(len(inner.eqns)):
        if number not in shared.early:
            evaluate(number)
        for var in last.get(number, ()):
            env.pop(var, None)
    return [read(atom) for atom in inner.outvars]


def _apply_rule(ctx: Context, eqn: Equation, values: list[Any]) -> Sequence[Any]:
    """Apply the rule for an equation that has weights among its operands, or materialize them."""
    rule = ctx.operations.get(eqn.primitive.name, OTHER).evaluate
    try:
        if rule is not None:
            with jaxprs.use_eqn_context(eqn):
                outs = rule(ctx, eqn, values)
            if outs is not None:
                # a slice of a concatenation may be one of its plain arrays
                return [out.value if isinstance(out, DenseWeight) else out for out in outs]
        reason = (
            "no rule for this primitive" if rule is None else "its rule does not cover this form"
        )
        return jaxprs.bind(eqn, [ctx.materialize(value, eqn, reason) for value in values])
    except MaterializeError:
        raise
    except Exception as error:
        _annotate_error(ctx, eqn, values, error)
        raise


def _annotate_error(ctx: Context, eqn: Equation, values: list[Any], error: Exception) -> None:
    """Add a note to an error: where in the user's model it was raised."""
    if getattr(error, "_lowrank_noted", False):
        return
    names = sorted({ctx.format_paths(v) for v in values if isinstance(v, Weight)})
    line, layer = ctx.locate(eqn)
    where = f" in layer {layer!r}" if layer else ""
    error.add_note(
        f"lowrank: while evaluating {eqn.primitive.name!r} at {line}{where} with "
        f"the adapted weights {', '.join(names)}"
    )
    with contextlib.suppress(AttributeError):
        error._lowrank_noted = True  # type: ignore[attr-defined]


def _find_last_uses(jaxpr: Jaxpr) -> dict[int, list[Any]]:
    """Map the index of each equation to the variables it uses last, whose values can be freed."""
    seen = {atom for atom in jaxpr.outvars if not isinstance(atom, jaxprs.Literal)}
    last: dict[int, list[Any]] = {}
    for number in range(len(jaxpr.eqns) - 1, -1, -1):
        for atom in jaxpr.eqns[number].invars:
            if not isinstance(atom, jaxprs.Literal) and atom not in seen:
                seen.add(atom)
                last.setdefault(number, []).append(atom)
    return last
