"""Type aliases for equations, jaxprs and pytrees."""

from __future__ import annotations

from typing import Any, TypeAlias

from jax.extend import core

Equation: TypeAlias = core.JaxprEqn
Jaxpr: TypeAlias = core.Jaxpr | core.ClosedJaxpr
PyTree: TypeAlias = Any  # containers registered with jax.tree, whose leaves are arrays or nodes
TreeDef: TypeAlias = Any  # jax.tree_util.PyTreeDef, which type checkers take for a variable
Shape: TypeAlias = tuple[int, ...]
