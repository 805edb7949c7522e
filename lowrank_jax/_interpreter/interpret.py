"""Evaluate a jaxpr in which some values are weights that know how to multiply themselves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from lowrank_jax._errors import MaterializeError
from lowrank_jax._interpreter.nesting import Nesting
from lowrank_jax._interpreter.operation import OTHER, OperationTable
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import Equation, Jaxpr
from lowrank_jax._operators.dense import DenseWeight
from lowrank_jax._operators.weight import Weight, expand_path


@dataclasses.dataclass(frozen=True)
class Record:
    """One meeting of a weight and an equation.

    Args:
      path: of the leaf.
      primitive: name of the equation's primitive, "dot_general" say.
      how: "factored"; "materialized", where no rule serves and the dense weight is built; "built",
        where two weights meet and the smaller is built.
      source: file, line and function of the user's own code.
      layer: the modules and named scopes the equation is in.
      reason: why it was not factored.
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
    """What one interpretation shares: operations, policy, what was recorded, the re-entered jits.

    Args:
      operations: the table.
      refuse: raise where a weight would be materialized.
      records: what happened, in order.
      uses: path -> number of products so far, so that each use has its own dropout mask.
      inline_jit: evaluate inner jits in place (a dry run needs no memo).
    """

    operations: OperationTable
    refuse: bool = False
    records: list[Record] = dataclasses.field(default_factory=list)
    uses: dict[Any, int] = dataclasses.field(default_factory=dict)
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)
    slot_paths: dict[Any, Any] = dataclasses.field(default_factory=dict)
    inline_jit: bool = False

    def record(self, weight: Weight, eqn: Equation, how: str, reason: str = "") -> None:
        """Note a meeting of one leaf and an equation."""
        for path in expand_path(weight.path):
            where = self.locate(eqn)
            self.records.append(Record(path, eqn.primitive.name, how, *where, reason))

    def locate(self, eqn: Equation) -> tuple[str, str]:
        """The user's line and layer of an equation; those inside a jit know only part of it."""
        layers = filter(None, map(jaxprs.get_user_layer, reversed(self.list_enclosing(eqn))))
        return self.find_line(eqn), "/".join(layers)

    def materialize_operand(self, weight: Weight, eqn: Equation) -> Any:
        """The dense array of a weight that meets a larger one: the cheapest there is."""
        for leaf in weight.leaves():
            reason = "a product of two weights builds the smaller"
            self.record(leaf, eqn, "built", reason + leaf.materialize_note)
        return weight.materialize()

    def resolve_path(self, path: Any) -> Any:
        """The path of a weight; inside a memoized jit weights carry slots."""
        return self.slot_paths.get(path, path)

    def format_paths(self, weight: Weight) -> str:
        """The paths of a weight's leaves, for messages."""
        paths = [self.resolve_path(leaf.path) for leaf in weight.leaves()]
        return ", ".join(repr(name) for path in paths for name in expand_path(path))

    def begin_use(self, weight: Weight) -> Weight:
        """The weight for its next use."""
        return weight.map_leaves(self._begin_leaf_use)

    def _begin_leaf_use(self, leaf: Weight) -> Weight:
        used = self.number_use(leaf)
        self.count_uses([leaf.path])
        return used

    def number_use(self, leaf: Weight) -> Weight:
        """One leaf for its next use; of one made of several the number is above all of theirs."""
        return leaf.for_use(max(self.uses.get(path, 0) for path in expand_path(leaf.path)))

    def count_uses(self, paths: Iterable[Any]) -> None:
        """One more use of each path."""
        for path in paths:
            each = expand_path(path)
            number = max(self.uses.get(one, 0) for one in each)
            self.uses |= dict.fromkeys(each, number + 1)

    def materialize(self, value: Any, eqn: Equation, reason: str) -> Any:
        """The dense array of a weight that no rule serves here, said aloud."""
        if not isinstance(value, Weight):
            return value
        if not value.leaves():  # of joined weights nothing but plain arrays is left
            return value.materialize()
        if self.refuse:
            line, layer = self.locate(eqn)
            where = f" (in {layer})" if layer else ""
            raise MaterializeError(
                f"the weight {self.format_paths(value)} would have to be built densely at "
                f"{eqn.primitive.name!r}, {line}{where}: {reason}. Exclude the "
                "leaf from the targets, or lift with fallback='warn' to let it be built"
            )
        for leaf in value.leaves():
            self.record(leaf, eqn, "materialized", reason + leaf.materialize_note)
        return value.materialize()

    def materialize_result(self, weight: Weight) -> Any:
        """The dense array of a weight that is a result of the whole function."""
        if self.refuse and weight.leaves():
            raise MaterializeError(
                f"the function returns the weight {self.format_paths(weight)} itself, which would "
                "be built densely; return what you need of it, or lift with fallback='warn'"
            )
        for leaf in weight.leaves():
            for path in expand_path(leaf.path):
                self.records.append(
                    Record(path, "return", "materialized", "the results", "", "it is returned")
                )
        return weight.materialize()


def interpret(ctx: Context, jaxpr: Jaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluate a (closed) jaxpr on arrays and weights; results may be weights too."""
    inner, consts = jaxprs.split_jaxpr(jaxpr)
    env = dict(zip(jaxprs.get_input_vars(jaxpr), [*consts, *args], strict=True))
    last = _find_last_uses(inner)
    read = lambda atom: atom.val if isinstance(atom, jaxprs.Literal) else env[atom]
    for number, eqn in enumerate(inner.eqns):
        values = [read(atom) for atom in eqn.invars]
        if any(isinstance(value, Weight) for value in values):
            outs = _apply_rule(ctx, eqn, values)
        else:
            outs = jaxprs.bind(eqn, values)
        for var, out in zip(eqn.outvars, outs, strict=True):
            env[var] = out
        for var in last.get(number, ()):
            env.pop(var, None)
    return [read(atom) for atom in inner.outvars]


def _apply_rule(ctx: Context, eqn: Equation, values: list[Any]) -> Sequence[Any]:
    """Apply the rule of an equation that meets weights, or bind it on their dense arrays."""
    rule = ctx.operations.get(eqn.primitive.name, OTHER).evaluate
    try:
        if rule is not None:
            with jaxprs.use_eqn_context(eqn):
                outs = rule(ctx, eqn, values)
            if outs is not None:
                # the part of joined weights that is a plain array is one again
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
    """Say in the error where in the user's model it arose."""
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
    """Equation number -> variables not needed after it, so that eager values are freed."""
    seen = {atom for atom in jaxpr.outvars if not isinstance(atom, jaxprs.Literal)}
    last: dict[int, list[Any]] = {}
    for number in range(len(jaxpr.eqns) - 1, -1, -1):
        for atom in jaxpr.eqns[number].invars:
            if not isinstance(atom, jaxprs.Literal) and atom not in seen:
                seen.add(atom)
                last.setdefault(number, []).append(atom)
    return last
