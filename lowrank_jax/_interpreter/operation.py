"""The rules for one primitive, and an analysis of which results are operands returned unchanged.

Two interpreters share the table of operations: `interpret` evaluates equations on weight operators,
and `Survey` finds how a function uses its parameters without computing anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import Equation, Jaxpr

# A result that is a transposed operand: the index of the operand, and the permutation. Only the
# identity counts as forwarding, but permutations must be tracked to find it: a scan over axis 1
# transposes its stack [4, 3, 8] to [3, 4, 8] before the loop and back after it, (1, 0, 2) twice.
Source = tuple[int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Operation:
    """The rules for one primitive: a row of the table of operations.

    Args:
      kind: the class of the primitive. "structural" rearranges elements; "product" contracts two
        operands or reads rows; "control" has jaxprs as parameters; "arithmetic" adds, scales or
        clips one operand by others; "unary" is a monotone function of one operand, such as tanh;
        "select" takes elements from several operands; "opaque" may do anything, including
        products; "other" is elementwise.
      evaluate: (context, equation, operands) -> results, or None to materialize the weights. At
        least one operand is a weight. Without this rule weights are always materialized.
      survey: (survey, equation, operand values) -> result values.
      sources: (table, equation) -> for each result its Source, or None if it is not an operand.

    >>> Operation("unary").kind
    'unary'
    """

    kind: str = "other"
    evaluate: Callable[[Any, Any, list[Any]], Sequence[Any] | None] | None = None
    survey: Callable[[Any, Any, list[Any]], Sequence[Any]] | None = None
    sources: Callable[[OperationTable, Any], list[Source | None]] | None = None


OperationTable = Mapping[str, Operation]  # primitive name -> rules

OTHER = Operation()


def get_kind(table: OperationTable, eqn: Equation) -> str:
    """Return the kind of an equation's primitive."""
    return table.get(eqn.primitive.name, OTHER).kind


def find_forwarded(table: OperationTable, jaxpr: Jaxpr) -> list[int | None]:
    """Return for each result of a jaxpr the index of the input that it forwards, or None.

    NNX returns its parameters from jit, remat and scan. If they are known to be the inputs, a stack
    of weights is not copied.
    """
    return _drop_transposed(find_sources(table, jaxpr))


def find_forwarded_operands(table: OperationTable, eqn: Equation) -> list[int | None]:
    """Return for each result of an equation the index of the operand that it forwards, or None."""
    return _drop_transposed(_find_eqn_sources(table, eqn))


def find_sources(table: OperationTable, jaxpr: Jaxpr) -> list[Source | None]:
    """Return for each result of a jaxpr the input that it is a transposition of, or None."""
    inner, _ = jaxprs.split_jaxpr(jaxpr)
    whole = lambda var: tuple(range(len(var.aval.shape)))
    source: dict[Any, Source] = {var: (i, whole(var)) for i, var in enumerate(inner.invars)}
    known = lambda atom: None if isinstance(atom, jaxprs.Literal) else source.get(atom)
    for eqn in inner.eqns:
        for var, found in zip(eqn.outvars, _find_eqn_sources(table, eqn), strict=True):
            before = None if found is None else known(eqn.invars[found[0]])
            if found is not None and before is not None:
                # Permutations compose: y = transpose(x, p) and z = transpose(y, q) give
                # z = transpose(x, [p[i] for i in q]).
                source[var] = (before[0], tuple(before[1][axis] for axis in found[1]))
    return [known(atom) for atom in inner.outvars]


def _find_eqn_sources(table: OperationTable, eqn: Equation) -> list[Source | None]:
    """Return for each result of an equation the operand that it is a transposition of, or None."""
    sources = table.get(eqn.primitive.name, OTHER).sources
    return [None] * len(eqn.outvars) if sources is None else sources(table, eqn)


def _drop_transposed(sources: list[Source | None]) -> list[int | None]:
    """Return the operand indices, None for those that are transposed."""
    return [
        found[0] if found is not None and found[1] == tuple(range(len(found[1]))) else None
        for found in sources
    ]
