"""The validator of a function of parameters, which tells it from a module that has its own."""

from __future__ import annotations

import sys
from typing import Any

import jax

from lowrank_jax._checks.arguments import Validator


def is_function_of_params(value: object) -> bool:
    """Whether a value can be called as fn(params, *args): callable, and not a Flax module.

    An NNX module without variables may be such a function, and so may a method of any module.
    """
    if not callable(value):
        return False
    module: Any = value
    if getattr(value, "__name__", None) == "__call__":  # model.__call__ is called as model is
        module = getattr(value, "__self__", value)
    return not _has_variables(module) and not _is_unbound_linen(module)


def _has_variables(value: Any) -> bool:
    """Whether a value is an NNX module that holds variables."""
    nnx = sys.modules.get("flax.nnx")  # there is no module of Flax before Flax is imported
    if nnx is None or not isinstance(value, getattr(nnx, "Module", ())):
        return False
    return bool(jax.tree.leaves(nnx.state(value)))


def _is_unbound_linen(value: Any) -> bool:
    """Whether a value is a Linen module that only its apply method can call."""
    linen = sys.modules.get("flax.linen")
    if linen is None or not isinstance(value, getattr(linen, "Module", ())):
        return False
    return value.scope is None and getattr(type(value).__call__, "compact", False)


function_of_params = Validator(
    is_function_of_params,
    "a function of (params, *args): model.apply of a Linen module, or the fn that `fn, params = "
    "lowrank.functional(model)` makes of an NNX module",
)
