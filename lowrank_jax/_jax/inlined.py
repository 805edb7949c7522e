"""Operations that JAX differentiates once for all equal ones, as the layers of a model have them.

JAX derives the linear part of each equation anew: it traces the equation's jvp, and evaluates the
result. The derivative of a jit it derives once for each function and types of operands. So an
operation under grad, jvp or vmap is called here as a jit that JAX inlines: the traced program is
the same, and a product of the second layer takes a third of the first one's time.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.interpreters.partial_eval import DynamicJaxprTracer

from lowrank_jax._jax.statics import Static


def is_transformed(*operands: object) -> bool:
    """Whether an operation on these operands is differentiated or mapped, not only traced."""
    leaves = jax.tree.leaves(operands)
    return any(isinstance(x, Tracer) and not isinstance(x, DynamicJaxprTracer) for x in leaves)


def bind_inlined(primitive: Any, operands: Sequence[Any], params: Mapping[str, Any]) -> Any:
    """Bind a primitive; under grad or vmap, as a jit that is inlined, if its params are plain."""
    if is_transformed(*operands) and all(map(_is_plain, params.values())):
        return _bind(primitive, Static({**params}), *operands)
    return primitive.bind(*operands, **params)


def call_inlined(fn: Callable, static: tuple[Any, ...], *operands: Any) -> Any:
    """Return fn(*static, *operands); under grad or vmap, as a jit that is inlined.

    Args:
      fn: a function of the module level, pure; it is not called again for equal arguments.
      static: hashable values.
      operands: pytrees of arrays.
    """
    leaves, structure = jax.tree.flatten(operands)
    if is_transformed(*leaves):
        return _call(fn, Static(static), Static(structure), *leaves)
    return fn(*static, *operands)


def call_abstract(fn: Callable, static: tuple[Any, ...], *operands: Any) -> Any:
    """Return traced arrays of the types that fn(*static, *operands) has, in a dry run.

    The arguments are those of call_inlined. The function is a call in the program, not inlined.
    """
    leaves, structure = jax.tree.flatten(operands)
    return _call_whole(fn, Static(static), Static(structure), *leaves)


def _bind_params(primitive: Any, params: Static, *operands: Any) -> Any:
    return primitive.bind(*operands, **params.value)


def _call_unflattened(fn: Callable, static: Static, structure: Static, *leaves: Any) -> Any:
    return fn(*static.value, *jax.tree.unflatten(structure.value, leaves))


# Since JAX 0.12, True inlines when lowered, and leaves the jit in the traced program.
_EARLY: Any = getattr(getattr(jax, "Inline", None), "JAX_EARLY", True)
_bind = jax.jit(_bind_params, static_argnums=(0, 1), inline=_EARLY)
_call = jax.jit(_call_unflattened, static_argnums=(0, 1, 2), inline=_EARLY)
_call_whole = jax.jit(_call_unflattened, static_argnums=(0, 1, 2))


def _is_plain(value: object) -> bool:
    """Whether a parameter is of built-in types: a jaxpr, function or mesh has its own identity."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | enum.Enum | np.dtype)
