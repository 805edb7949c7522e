"""Names for what functions take: equations, jaxprs, trees."""

from __future__ import annotations

from typing import Any, TypeAlias

from jax.extend import core

Equation: TypeAlias = core.JaxprEqn
Jaxpr: TypeAlias = core.Jaxpr | core.ClosedJaxpr
PyTree: TypeAlias = Any  # containers that jax.tree knows, of arrays and of this library's nodes
