"""Evaluate a jaxpr in which some values are weights that know how to multiply themselves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lowrank_jax import _jaxprs
from lowrank_jax._errors import MaterializeError
from lowrank_jax._interpreter.nesting import Nesting
from lowrank_jax._weights.dense import DenseWeight
from lowrank_jax._weights.virtual import Virtual, single_paths

Rule = Callable[["Context", Any, list[Any]], Sequence[Any] | None]


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
    """What one interpretation shares: rules, policy, what was recorded, the re-entered jits.

    Args:
      rules: primitive name -> rule.
      refuse: raise where a weight would be materialized.
      records: what happened, in order.
      uses: path -> number of products so far, so that each use has its own dropout mask.
      inline_jit: evaluate inner jits in place (a dry run needs no memo).
    """

    rules: dict[str, Rule]
    refuse: bool = False
    records: list[Record] = dataclasses.field(default_factory=list)
    uses: dict[Any, int] = dataclasses.field(default_factory=dict)
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)
    names: dict[Any, Any] = dataclasses.field(default_factory=dict)
    inline_jit: bool = False

    def record(self, weight: Virtual, eqn: Any, how: str, reason: str = "") -> None:
        """Note a meeting of one leaf and an equation."""
        for path in single_paths(weight.path):
            where = self.where(eqn)
            self.records.append(Record(path, eqn.primitive.name, how, *where, reason))

    def where(self, eqn: Any) -> tuple[str, str]:
        """The user's line and layer of an equation; those inside a jit know only part of it."""
        layers = filter(None, map(_jaxprs.user_layer, reversed(self.chain(eqn))))
        return self.line(eqn), "/".join(layers)

    def built(self, weight: Virtual, eqn: Any) -> Any:
        """The dense array of a weight that meets a larger one: the cheapest there is."""
        for leaf in weight.leaves():
            reason = "a product of two weights builds the smaller"
            self.record(leaf, eqn, "built", reason + leaf.lost)
        return weight.materialize()

    def name_of(self, path: Any) -> Any:
        """The path of a weight; inside a memoized jit weights carry slots."""
        return self.names.get(path, path)

    def names_of(self, weight: Virtual) -> str:
        """The paths of a weight's leaves, for messages."""
        paths = [self.name_of(leaf.path) for leaf in weight.leaves()]
        return ", ".join(repr(name) for path in paths for name in single_paths(path))

    def use(self, weight: Virtual) -> Virtual:
        """The weight for its next use."""
        return weight.map_leaves(self._use_leaf)

    def _use_leaf(self, leaf: Virtual) -> Virtual:
        used = self.number(leaf)
        self.count([leaf.path])
        return used

    def number(self, leaf: Virtual) -> Virtual:
        """One leaf for its next use; of one made of several the number is above all of theirs."""
        return leaf.for_use(max(self.uses.get(path, 0) for path in single_paths(leaf.path)))

    def count(self, paths: Iterable[Any]) -> None:
        """One more use of each path."""
        for path in paths:
            each = single_paths(path)
            number = max(self.uses.get(one, 0) for one in each)
            self.uses |= dict.fromkeys(each, number + 1)

    def dense(self, value: Any, eqn: Any, reason: str) -> Any:
        """The dense array of a weight that no rule serves here, said aloud."""
        if not isinstance(value, Virtual):
            return value
        if not value.leaves():  # of joined weights nothing but plain arrays is left
            return value.materialize()
        if self.refuse:
            line, layer = self.where(eqn)
            where = f" (in {layer})" if layer else ""
            raise MaterializeError(
                f"the weight {self.names_of(value)} would have to be built densely at "
                f"{eqn.primitive.name!r}, {line}{where}: {reason}. Exclude the "
                "leaf from the targets, or lift with fallback='warn' to let it be built"
            )
        for leaf in value.leaves():
            self.record(leaf, eqn, "materialized", reason + leaf.lost)
        return value.materialize()

    def returned(self, weight: Virtual) -> Any:
        """The dense array of a weight that is a result of the whole function."""
        if self.refuse and weight.leaves():
            raise MaterializeError(
                f"the function returns the weight {self.names_of(weight)} itself, which would be "
                "built densely; return what you need of it, or lift with fallback='warn'"
            )
        for leaf in weight.leaves():
            for path in single_paths(leaf.path):
                self.records.append(
                    Record(path, "return", "materialized", "the results", "", "it is returned")
                )
        return weight.materialize()


def interpret(ctx: Context, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluate a (closed) jaxpr on arrays and weights; results may be weights too."""
    inner, consts = _jaxprs.opened(jaxpr)
    env = dict(zip(_jaxprs.binders(jaxpr), [*consts, *args], strict=True))
    last = _last_uses(inner)
    read = lambda atom: atom.val if isinstance(atom, _jaxprs.Literal) else env[atom]
    for number, eqn in enumerate(inner.eqns):
        values = [read(atom) for atom in eqn.invars]
        if any(isinstance(value, Virtual) for value in values):
            outs = _apply(ctx, eqn, values)
        else:
            outs = _jaxprs.bind(eqn, values)
        for var, out in zip(eqn.outvars, outs, strict=True):
            env[var] = out
        for var in last.get(number, ()):
            env.pop(var, None)
    return [read(atom) for atom in inner.outvars]


def _apply(ctx: Context, eqn: Any, values: list[Any]) -> Sequence[Any]:
    """Apply the rule of an equation that meets weights, or bind it on their dense arrays."""
    rule = ctx.rules.get(eqn.primitive.name)
    try:
        if rule is not None:
            with _jaxprs.in_context(eqn):
                outs = rule(ctx, eqn, values)
            if outs is not None:
                # the part of joined weights that is a plain array is one again
                return [out.value if isinstance(out, DenseWeight) else out for out in outs]
        reason = (
            "no rule for this primitive" if rule is None else "its rule does not cover this form"
        )
        return _jaxprs.bind(eqn, [ctx.dense(value, eqn, reason) for value in values])
    except MaterializeError:
        raise
    except Exception as error:
        _annotate(ctx, eqn, values, error)
        raise


def _annotate(ctx: Context, eqn: Any, values: list[Any], error: Exception) -> None:
    """Say in the error where in the user's model it arose."""
    if getattr(error, "_lowrank_noted", False):
        return
    names = sorted({ctx.names_of(v) for v in values if isinstance(v, Virtual)})
    line, layer = ctx.where(eqn)
    where = f" in layer {layer!r}" if layer else ""
    error.add_note(
        f"lowrank: while evaluating {eqn.primitive.name!r} at {line}{where} with "
        f"the adapted weights {', '.join(names)}"
    )
    with contextlib.suppress(AttributeError):
        error._lowrank_noted = True  # type: ignore[attr-defined]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Equation number -> variables not needed after it, so that eager values are freed."""
    seen = {atom for atom in jaxpr.outvars if not isinstance(atom, _jaxprs.Literal)}
    last: dict[int, list[Any]] = {}
    for number in range(len(jaxpr.eqns) - 1, -1, -1):
        for atom in jaxpr.eqns[number].invars:
            if not isinstance(atom, _jaxprs.Literal) and atom not in seen:
                seen.add(atom)
                last.setdefault(number, []).append(atom)
    return last


def forwarded(jaxpr: Any) -> list[int | None]:
    """For each result of a jaxpr, the input that it is, unchanged, or None.

    NNX returns its parameters from jit, remat and scan; knowing that they are the ones that came in
    keeps a stack of weights from being written again.
    """
    return _unmoved(_sources(jaxpr))


def forwarded_by(eqn: Any) -> list[int | None]:
    """For each result of an equation, the operand that it is, unchanged, or None."""
    return _unmoved(_source_of(eqn))


def _unmoved(sources: list[_Source | None]) -> list[int | None]:
    """The numbers of those that are not transposed."""
    return [
        found[0] if found is not None and found[1] == tuple(range(len(found[1]))) else None
        for found in sources
    ]


# An input by number and the order of its axes: a scan over another axis than the first transposes
# before and after.
_Source = tuple[int, tuple[int, ...]]


def _sources(jaxpr: Any) -> list[_Source | None]:
    """For each result of a jaxpr, the input that it is but for a transposition, or None."""
    inner, _ = _jaxprs.opened(jaxpr)
    whole = lambda var: tuple(range(len(var.aval.shape)))
    source: dict[Any, _Source] = {var: (i, whole(var)) for i, var in enumerate(inner.invars)}
    known = lambda atom: None if isinstance(atom, _jaxprs.Literal) else source.get(atom)
    for eqn in inner.eqns:
        for var, found in zip(eqn.outvars, _source_of(eqn), strict=True):
            before = None if found is None else known(eqn.invars[found[0]])
            if found is not None and before is not None:
                source[var] = (before[0], tuple(before[1][axis] for axis in found[1]))
    return [known(atom) for atom in inner.outvars]


def _source_of(eqn: Any) -> list[_Source | None]:
    """For each result of an equation, the operand that it is but for a transposition, or None."""
    name = eqn.primitive.name
    if name == "transpose":
        return [(0, tuple(eqn.params["permutation"]))]
    if name in ("jit", "remat2", "checkpoint", "closed_call", "core_call"):
        body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if body is not None:
            return _sources(body)
    if name == "shard_map":
        return _sources_of_shard_map(eqn.params)
    if name == "scan":
        consts, carries = _jaxprs.scan_split(eqn)
        some = eqn.params["length"] > 0  # no step puts a constant into a carry
        carried: list[_Source | None] = [
            (consts + i if index == consts + i else index, tuple(range(len(var.aval.shape))))
            if index is not None and ((some and index < consts) or index == consts + i)
            else None
            for i, (index, var) in enumerate(
                zip(forwarded(eqn.params["jaxpr"])[:carries], eqn.outvars, strict=False)
            )
        ]
        slices = [
            (found[0], (0, *(axis + 1 for axis in found[1])))
            if found is not None and found[0] >= consts + carries
            else None
            for found in _sources(eqn.params["jaxpr"])[carries:]
        ]
        return carried + slices
    return [None] * len(eqn.outvars)


def _sources_of_shard_map(params: Any) -> list[_Source | None]:
    """Those of its body; what is put together otherwise than it was split is another array."""
    found = []
    for source, spec in zip(_sources(params["jaxpr"]), params["out_specs"], strict=True):
        if source is not None:
            number, order = source
            entries = dict(enumerate(params["in_specs"][number]))
            if [entries.get(axis) for axis in order] != _entries(spec, len(order)):
                source = None
        found.append(source)
    return found


def _entries(spec: Any, ndim: int) -> list[Any]:
    """The entries of a PartitionSpec, one for each axis."""
    return [*spec, *(None for _ in range(ndim - len(spec)))]
