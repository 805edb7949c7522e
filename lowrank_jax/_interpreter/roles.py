"""The roles that the axes of a leaf have in an equation: fan-in, fan-out, stack."""

from __future__ import annotations

import dataclasses

Axes = frozenset[int]
NO_AXES: Axes = frozenset()


@dataclasses.dataclass(frozen=True)
class Roles:
    """The roles of a leaf's axes in one equation.

    Args:
      op: "dot", "conv" or "lookup".
      fan_in: the contracted axes; for a lookup, the indexed ones.
      fan_out: the axes kept in the result.
      stack: the axes that enumerate independent weights.
      provisional: the product is of parameters alone; a product with data overrides it.

    >>> Roles("dot", fan_in=frozenset({0}), fan_out=frozenset({1}), stack=NO_AXES).provisional
    False
    """

    op: str
    fan_in: Axes
    fan_out: Axes
    stack: Axes
    provisional: bool = False
