"""What a plan says: how a function uses each of its parameters."""

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
      fan_in, fan_out, stack: axes of the leaf that are contracted, kept, and that enumerate
        independent weights; empty where op is "other" or "unused".
      shape, dtype: of the leaf.
      uses: number of equations that take it.
      tied: it is used in two ways: two products over different axes, or a product and a look-up.
      final: an unstacked weight one of whose products reaches a result through bias, scale, cast,
        soft-cap, structural operations or the ys of loops alone, while no product with another leaf
        depends on it (by its numbers: that a sampled token is fed back does not count).
      lookup: it is read by rows somewhere.
      router: a choice of the largest (top_k) is made from one of its products.
      shared: fan-out axes that the next product's weight has as stack axes, and that weight's path:
        one a serves all that these axes enumerate; `LoraConfig.stack` gives each its own.
      reason: the equation by which it reaches the weight side of a product, or an opaque call,
        while no rule follows it; else empty.
      equations: one line for each use: the primitive and the user's source line.
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
        """Whether "all-linear" takes it: products only, never read by rows, not the last."""
        matrix = self.op in PRODUCTS and bool(self.fan_in) and bool(self.fan_out)
        return matrix and not self.lookup and not self.final

    @property
    def largest_rank(self) -> int:
        """The largest rank that an adapter can have, the smaller of fan-in and fan-out; else 0."""
        sizes = [math.prod(self.shape[a] for a in axes) for axes in (self.fan_in, self.fan_out)]
        return min(sizes) if self.fan_in and self.fan_out else 0

    @property
    def passed_over(self) -> bool:
        """Whether it reaches a product or an opaque call, but by operations no rule follows."""
        return bool(self.reason) and not (self.linear or self.lookup or self.final)


class Plan(TableMapping):
    """A mapping of path -> Use; `str`, rich and notebooks show it as a table.

    Leaves that differ only in the number of their layer share a row, `layers_{0..29}/w`. Under
    "all-linear" is "yes" where that word in `LoraConfig.targets` adapts the leaf. The notes name
    leaves that reach a product, or an opaque call, by an operation that no rule follows, and the
    largest rank of those that are too narrow for `LoraConfig`'s own default.

    Args:
      leaves: path -> Use.
      note: a line under the table.
    """

    def __init__(self, leaves: Mapping[str, Use], note: str = ""):
        super().__init__(leaves)
        self.note = note

    def _table(self) -> Table:
        """One row for each leaf, or for leaves that differ only in the number of a layer."""
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
