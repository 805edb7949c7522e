"""Finds the products of one jaxpr that multiply the same input by different weights.

The queries, keys and values of attention, or the gate and the up projection of an MLP: their
adapters share one product of the input and all of their factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lowrank_jax._interpreter.operation import OperationTable, get_kind
from lowrank_jax._jax import equations, jaxprs
from lowrank_jax._jax.equations import Dot
from lowrank_jax._jax.types import Equation
from lowrank_jax._operators.low_rank import LowRankWeight
from lowrank_jax._operators.shared_input import (
    InputProduct,
    find_first_factor,
    group_factors,
    multiply_input,
)
from lowrank_jax._operators.weight import Weight

# Equations that make equal arrays of equal operands: each Dense casts its input for itself.
_REPEATED = frozenset({"convert_element_type", "reshape", "transpose", "squeeze"})


class _Group(NamedTuple):
    """Products that contract the same axes of one operand.

    Args:
      side: 0 if it is their left operand, 1 if the right.
      numbers: the indices of the equations, ascending.
    """

    side: int
    numbers: list[int]


class SharedInputs:
    """The products of one jaxpr that share an input.

    Args:
      operations: the table of operations.
      eqns: the equations of the jaxpr.

    Attributes:
      groups: index of an equation -> the groups of products that it is one of.
      early: the indices of equations that were evaluated before their turn.
    """

    def __init__(self, operations: OperationTable, eqns: Sequence[Equation]):
        self.operations, self.eqns = operations, eqns
        self.groups = _find_groups(eqns)
        self.early: set[int] = set()
        self._products: dict[int, InputProduct] = {}
        self._makers: dict[Any, int] | None = None

    def attach(
        self,
        number: int,
        values: list[Any],
        env: dict[Any, Any],
        evaluate: Callable[[int], None],
    ) -> list[Any]:
        """Return the operands of a product; a weight has its input's product, if that is shared.

        Args:
          number: the index of the equation.
          values: its operands.
          env: variable -> value.
          evaluate: evaluates the equation of an index.
        """
        for group in self.groups[number]:
            if group.numbers and not isinstance(values[group.side], Weight):
                rest = [other for other in group.numbers if other >= number]
                group.numbers.clear()  # the others find their results, or that there are none
                self._multiply(group.side, rest, values[group.side], env, evaluate)
        found = self._products.pop(number, None)
        if found is None:
            return values
        return [v.replace(shared=found) if isinstance(v, LowRankWeight) else v for v in values]

    def _multiply(
        self,
        side: int,
        numbers: list[int],
        x: Any,
        env: dict[Any, Any],
        evaluate: Callable[[int], None],
    ) -> None:
        """Compute the products of x and the factors of all weights that are known by now."""
        members, factors = [], []
        for number in numbers:
            eqn = self.eqns[number]
            weight = self._find_weight(eqn.invars[1 - side], env, evaluate)
            if weight is not None:
                factor = find_first_factor(weight, x, Dot.of(eqn).numbers, side == 1)
                if factor is not None:
                    members.append(number)
                    factors.append(factor)
        for group in group_factors(x, factors):
            dot = Dot.of(self.eqns[members[group[0]]])
            with jaxprs.use_eqn_context(self.eqns[members[group[0]]]):
                products = multiply_input(
                    x,
                    [factors[i] for i in group],
                    sorted(dot.numbers[0][side]),
                    dot.options.get("precision"),
                )
            self._products.update(zip((members[i] for i in group), products, strict=True))

    def _find_weight(
        self, atom: Any, env: dict[Any, Any], evaluate: Callable[[int], None]
    ) -> LowRankWeight | None:
        """Return the weight of a variable, evaluating the structural operations that make it."""
        # W1 = convert(w1); y1 = dot(x, W1); W2 = convert(w2); y2 = dot(x, W2): the factors of W2
        # are needed at the first product, so its cast is evaluated there.
        if self._makers is None:
            self._makers = dict(self._list_makers())
        steps = []
        while not isinstance(atom, jaxprs.Literal) and atom not in env and atom in self._makers:
            steps.append(self._makers[atom])
            atom = self.eqns[steps[-1]].invars[0]
        if isinstance(atom, jaxprs.Literal) or type(env.get(atom)) is not LowRankWeight:
            return None
        for number in reversed(steps):
            evaluate(number)
            self.early.add(number)
            atom = self.eqns[number].outvars[0]
        weight = env[atom]
        return weight if type(weight) is LowRankWeight else None

    def _list_makers(self) -> Iterator[tuple[Any, int]]:
        """Yield the variables that a structural operation with one operand makes, and its index."""
        for number, eqn in enumerate(self.eqns):
            single = len(eqn.invars) == 1 == len(eqn.outvars)
            if single and get_kind(self.operations, eqn) == "structural":
                yield eqn.outvars[0], number


def _find_groups(eqns: Sequence[Equation]) -> dict[int, list[_Group]]:
    """Return for each product that has an operand in common with another its groups."""
    names: dict[Any, Any] = {}  # variable -> the first variable of the same value
    known: dict[Any, Any] = {}  # (primitive, parameters, operand) -> the first result
    found: dict[Any, _Group] = {}
    for number, eqn in enumerate(eqns):
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, (batch, _)), options = Dot.of(eqn)
            if batch:
                continue
            for side, atom in enumerate(eqn.invars):
                if not isinstance(atom, jaxprs.Literal):
                    atom = names.get(atom, atom)
                    key = side, atom, (*sorted(contracted[side]),), options.get("precision")
                    found.setdefault(key, _Group(side, [])).numbers.append(number)
        elif name in _REPEATED and not isinstance(eqn.invars[0], jaxprs.Literal):
            atom = eqn.invars[0]
            key = names.get(atom, atom), *equations.get_operation_key(eqn)
            names[eqn.outvars[0]] = known.setdefault(key, eqn.outvars[0])
    groups: dict[int, list[_Group]] = {}
    for group in found.values():
        if len(group.numbers) > 1:
            for number in group.numbers:
                groups.setdefault(number, []).append(group)
    return groups
