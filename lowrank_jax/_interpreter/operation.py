"""What the library knows of one primitive of JAX, and which results are operands unchanged.

Two readings of a jaxpr share the table of operations: `interpret` evaluates equations on weights,
`Survey` learns without arithmetic how a function uses its parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import Equation, Jaxpr

# An operand by number, and the order of its axes: a scan over another axis than the first
# transposes before and after.
Source = tuple[int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One primitive: one row of the table.

    Args:
      kind: "structural": elements of the operands are rearranged. "product": numbers of two
        operands are multiplied and summed, or rows are read. "control": the equation holds jaxprs.
        "shift": the result is one operand plus, times, or bounded by others. "unary": the same of
        one operand alone. "mix": elements are chosen from several operands. "opaque": it may do
        anything, products too. "other": element by element.
      evaluate: (context, equation, operands, of which at least one is a weight) -> results, or None
        to have the weights built densely. Without it they always are.
      survey: (survey, equation, values of the operands) -> values of the results.
      sources: (table, equation) -> for each result the operand that it is, but for the order of its
        axes, or None.
    """

    kind: str = "other"
    evaluate: Callable[[Any, Any, list[Any]], Sequence[Any] | None] | None = None
    survey: Callable[[Any, Any, list[Any]], Sequence[Any]] | None = None
    sources: Callable[[OperationTable, Any], list[Source | None]] | None = None


OperationTable = Mapping[str, Operation]  # by the primitive's name

OTHER = Operation()


def get_kind(table: OperationTable, eqn: Equation) -> str:
    """The kind of an equation's primitive."""
    return table.get(eqn.primitive.name, OTHER).kind


def find_forwarded(table: OperationTable, jaxpr: Jaxpr) -> list[int | None]:
    """For each result of a jaxpr, the input that it is, unchanged, or None.

    NNX returns its parameters from jit, remat and scan; knowing that they are the ones that came in
    keeps a stack of weights from being written again.
    """
    return _drop_transposed(find_sources(table, jaxpr))


def find_forwarded_operands(table: OperationTable, eqn: Equation) -> list[int | None]:
    """For each result of an equation, the operand that it is, unchanged, or None."""
    return _drop_transposed(_find_eqn_sources(table, eqn))


def find_sources(table: OperationTable, jaxpr: Jaxpr) -> list[Source | None]:
    """For each result of a jaxpr, the input that it is but for a transposition, or None."""
    inner, _ = jaxprs.split_jaxpr(jaxpr)
    whole = lambda var: tuple(range(len(var.aval.shape)))
    source: dict[Any, Source] = {var: (i, whole(var)) for i, var in enumerate(inner.invars)}
    known = lambda atom: None if isinstance(atom, jaxprs.Literal) else source.get(atom)
    for eqn in inner.eqns:
        for var, found in zip(eqn.outvars, _find_eqn_sources(table, eqn), strict=True):
            before = None if found is None else known(eqn.invars[found[0]])
            if found is not None and before is not None:
                source[var] = (before[0], tuple(before[1][axis] for axis in found[1]))
    return [known(atom) for atom in inner.outvars]


def _find_eqn_sources(table: OperationTable, eqn: Equation) -> list[Source | None]:
    """For each result of an equation, the operand that it is but for a transposition, or None."""
    sources = table.get(eqn.primitive.name, OTHER).sources
    return [None] * len(eqn.outvars) if sources is None else sources(table, eqn)


def _drop_transposed(sources: list[Source | None]) -> list[int | None]:
    """The numbers of those that are not transposed."""
    return [
        found[0] if found is not None and found[1] == tuple(range(len(found[1]))) else None
        for found in sources
    ]
