"""Plan: a table of how a function uses each of its parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lowrank_jax._display.table import Table, TableMapping, collapse_rows, format_shape
from lowrank_jax._targeting.configs import LoraConfig

PRODUCTS = ("dot", "conv")


_COLUMNS = ("path", "shape", "op", "fan_in", "fan_out", "stack", "uses", "all-linear", "notes")


@dataclasses.dataclass(frozen=True)
class Use:
    """How a function uses one leaf.

    Args:
      op: "dot", "conv", "lookup", "other" or "unused": the first product, else the first use.
      fan_in, fan_out, stack: axes of the leaf that are contracted, that are kept, and that
        enumerate independent weights; empty if op is "other" or "unused".
      shape, dtype: shape and dtype of the leaf.
      uses: number of equations that take the leaf as an operand.
      tied: whether its weights are tied: it is used in two products over different axes, or in a
        product and a lookup.
      final: whether it is a final projection: an unstacked weight with a product that reaches a
        result through bias, scale, cast, soft-cap, structural operations or the ys of loops only,
        while no product with another leaf depends on it numerically (feeding back a sampled token
        does not count).
      lookup: whether it is read by rows somewhere.
      router: whether one of its products selects experts, by top_k.
      shared: pairs of a fan-out axis and a path: the weight of the next product, at this path, has
        the axis as a stack axis. One factor a serves all members of the axis, unless
        `LoraConfig.stack` gives each its own.
      reason: the equation through which it reaches the weight side of a product, or an opaque call,
        if no rule follows that equation; else empty.
      equations: one line for each use: the primitive and the line of the user's source.

    >>> import jax.numpy as jnp, lowrank_jax as lowrank
    >>> params = {"w": jnp.ones((4, 3)), "v": jnp.ones((3, 2))}
    >>> plan = lowrank.plan(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, jnp.ones((5, 4)))
    >>> plan["w"].op, plan["w"].fan_in, plan["w"].fan_out, plan["w"].linear, plan["v"].final
    ('dot', (0,), (1,), True, True)
    """

    op: str
    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    uses: int
    tied: bool = False
    final: bool = False
    lookup: bool = False
    router: bool = False
    shared: tuple[tuple[int, str], ...] = ()
    reason: str = ""
    equations: tuple[str, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether "all-linear" selects the leaf: used in products, not read by rows, not final."""
        matrix = self.op in PRODUCTS and bool(self.fan_in) and bool(self.fan_out)
        return matrix and not self.lookup and not self.final

    @property
    def largest_rank(self) -> int:
        """The largest rank of an adapter, the smaller of fan-in and fan-out; 0 without either."""
        sizes = [math.prod(self.shape[a] for a in axes) for axes in (self.fan_in, self.fan_out)]
        return min(sizes) if self.fan_in and self.fan_out else 0

    @property
    def passed_over(self) -> bool:
        """Whether "all-linear" skips the leaf because no rule follows how it reaches a product."""
        return bool(self.reason) and not (self.linear or self.lookup or self.final)


class Plan(TableMapping):
    """A mapping of path -> Use; `str`, rich and notebooks show it as a table.

    Leaves that differ only in the number of their layer share a row, `layers_{0..29}/w`. The column
    "all-linear" says "yes" for leaves that this value of `LoraConfig.targets` selects. Notes report
    leaves that reach a product or an opaque call through an operation that no rule follows, and the
    largest rank of leaves too narrow for the default rank of `LoraConfig`.

    Args:
      leaves: path -> Use.
      note: a line printed under the table.

    >>> use = Use("dot", (0,), (1,), (), (64, 32), "float32", 1)
    >>> print(Plan({"w": use}))
    path  shape  op   fan_in  fan_out  stack  uses  all-linear  notes
    -----------------------------------------------------------------
    w     64×32  dot  64      32       -         1  yes
    """

    def __init__(self, leaves: Mapping[str, Use], note: str = ""):
        super().__init__(leaves)
        self.note = note

    def _table(self) -> Table:
        """Build the table, with one row for leaves that differ only in the number of a layer."""
        rows = []
        for path, use in self.items():
            names = ("tied", "final", "lookup", "router")
            notes = [name for name in names if getattr(use, name) and name != use.op]
            if use.op in PRODUCTS and not (use.fan_in and use.fan_out):
                notes.append("no fan-out" if use.fan_in else "no fan-in")
            if use.linear and use.largest_rank < LoraConfig().rank:
                notes.append(f"rank {use.largest_rank} at most")
            notes += [f"axis {axis} is a stack axis of {other}" for axis, other in use.shared]
            if use.reason:
                notes.append(f"not followed: {use.reason}")
            sizes = [
                "·".join(str(use.shape[axis]) for axis in axes) or "-"
                for axes in (use.fan_in, use.fan_out, use.stack)
            ]
            linear = "yes" if use.linear else ""
            shape, notes = format_shape(use.shape), ", ".join(notes)
            rows.append((path, shape, use.op, *sizes, str(use.uses), linear, notes))
        return Table(
            _COLUMNS, tuple(row for row, _ in collapse_rows(rows)), frozenset({"uses"}), self.note
        )
