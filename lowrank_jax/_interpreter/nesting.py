"""Where in nested equations an interpretation stands."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import Equation


@dataclasses.dataclass
class Nesting:
    """The equations that were entered.

    Args:
      frame: these equations, outermost first.
    """

    frame: tuple[Any, ...] = dataclasses.field(default=(), kw_only=True)

    @contextlib.contextmanager
    def enter(self, eqn: Equation):
        """Interpret the body of an equation: messages and uses know where they are."""
        before = self.frame
        self.frame = (*before, eqn)
        try:
            yield
        finally:
            self.frame = before

    def list_enclosing(self, eqn: Equation) -> list[Any]:
        """An equation and those around it, innermost first."""
        return [eqn, *reversed(self.frame)]

    def find_line(self, eqn: Equation) -> str:
        """The user's source line of an equation; one inside a jit knows only that around it."""
        return next(
            filter(None, map(jaxprs.find_user_line, self.list_enclosing(eqn))), "an unknown line"
        )
