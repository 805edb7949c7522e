"""The position of an interpreter within nested equations."""

from __future__ import annotations

import contextlib
import dataclasses

from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import Equation


@dataclasses.dataclass
class Nesting:
    """The equations whose bodies are being interpreted.

    Args:
      frame: these equations, outermost first.
    """

    frame: tuple[Equation, ...] = dataclasses.field(default=(), kw_only=True)

    @contextlib.contextmanager
    def enter(self, eqn: Equation):
        """Return a context manager in which the body of an equation is interpreted."""
        before = self.frame
        self.frame = (*before, eqn)
        try:
            yield
        finally:
            self.frame = before

    def list_enclosing(self, eqn: Equation) -> list[Equation]:
        """Return an equation and those that enclose it, innermost first."""
        return [eqn, *reversed(self.frame)]

    def find_line(self, eqn: Equation) -> str:
        """Return the user's line of an equation, or of the nearest enclosing one that has it."""
        return next(
            filter(None, map(jaxprs.find_user_line, self.list_enclosing(eqn))), "an unknown line"
        )
