"""Initializers applied to leaves: axes grouped, stacks mapped over, factors rounded."""

from __future__ import annotations

import functools
import math
import types
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import initializers
from lowrank_jax._checks.arguments import describe_value
from lowrank_jax._codecs.rounding import is_narrower, round_to
from lowrank_jax._errors import ConfigError, LowrankError
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.statics import Static
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import (
    as_dense,
)
from lowrank_jax._nodes.norms import get_dense_sharding
from lowrank_jax._primitives.contract import (
    RANK,
    accumulator_dtype,
    invert_permutation,
    labeled_spec,
)
from lowrank_jax._targeting.targets import (
    Target,
)

Initializer = Callable[[jax.Array, jax.Array, int, float], initializers.Factors]


def apply_initializer(
    key: jax.Array, path: str, leaf: Any, target: Target, initializer: Any, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """a, b and the residual (or None) of a leaf, split as its type says on a mesh of explicit axes.

    a: [*stack, *fan_in, r], b: [*stack, r, *fan_out], the residual as the leaf.
    """
    data, form = jax.tree.flatten(initializer)
    if data == [initializer]:  # a plain function; else a callable tree of arrays
        data, form = [], initializer
    stack = tuple(leaf.shape[axis] for axis in target.stack)
    if wrong := [x.shape for x in data if x.shape[: len(stack)] != stack]:
        raise ConfigError(
            f"its initializer holds an array of shape {wrong[0]}, but the leaf's stack "
            f"axes, which are to lead it, have sizes {stack}"
        )
    run = _compile_initializer(form)
    make = lambda key, leaf, data: run(key, leaf, data, target, dtype)
    sharding = get_dense_sharding(leaf)
    if sharding is None:
        return make(key, leaf, data)
    like = lambda labels: jax.NamedSharding(sharding.mesh, labeled_spec(sharding.spec, labels))
    plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    moves = jax.eval_shape(make, key, plain, data)[2] is not None
    out = (
        like((*target.stack, *target.fan_in, RANK)),
        like((*target.stack, RANK, *target.fan_out)),
        sharding if moves else None,
    )
    with jaxprs.use_mesh_of(jax.tree.leaves(leaf)[0]):
        return jaxprs.call_with_auto_axes(make, out, key, leaf, data)


_compiled_by_function: weakref.WeakKeyDictionary[Any, Callable] = weakref.WeakKeyDictionary()


def _compile_initializer(form: Any) -> Callable:
    """`_run_initializer` of an initializer; what is compiled for a function is freed with it."""
    if not isinstance(form, types.FunctionType | functools.partial):  # these are equal to no other
        own = Static(form)
        return lambda *args: _run_pytree(own, *args)
    if form not in _compiled_by_function:
        known = weakref.ref(form)
        run = lambda *args: _run_initializer(Static(known()), *args)
        _compiled_by_function[form] = jax.jit(run, static_argnums=(3, 4))
    return _compiled_by_function[form]


def _run_initializer(
    form: Static, key: jax.Array, leaf: jax.Array, data: PyTree, target: Target, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """a, b and the residual in the leaf's own layout: groups flattened, stacks vmapped."""
    order = target.stack + target.fan_in + target.fan_out
    sizes = lambda axes: tuple(leaf.shape[axis] for axis in axes)
    stack, fan_in, fan_out = sizes(target.stack), sizes(target.fan_in), sizes(target.fan_out)
    rows, columns = math.prod(fan_in), math.prod(fan_out)
    weight = jnp.transpose(as_dense(leaf), order).astype(accumulator_dtype(leaf.dtype))
    weight = weight.reshape(-1, rows, columns)
    keys = jax.random.split(key, weight.shape[0]) if stack else key[None]
    data = [array.reshape(-1, *array.shape[len(stack) :]) for array in data]

    def make(key: Any, weight: Any, data: PyTree) -> Any:
        own = form.value if callable(form.value) else jax.tree.unflatten(form.value, data)
        if hasattr(own, "with_factor_dtype"):
            own = own.with_factor_dtype(dtype)
        made = own(key, weight, target.rank, target.scale)
        _check_result(made, name)
        return made

    name = getattr(form.value, "__name__", type(form.value).__name__)
    a, b, residual = jax.vmap(make)(keys, weight, data)
    expected = ((weight.shape[0], rows, target.rank), (weight.shape[0], target.rank, columns))
    if (a.shape, b.shape) != expected:
        raise LowrankError(
            f"the initializer {name!r} returned a {a.shape[1:]} and b {b.shape[1:]}; expected "
            f"{expected[0][1:]} and {expected[1][1:]}"
        )
    if residual is not None and residual.shape != weight.shape:
        raise LowrankError(
            f"the initializer {name!r} returned a residual {residual.shape[1:]}; expected that of "
            f"the weight, {weight.shape[1:]}, or None"
        )
    kept_a, kept_b = round_to(a, dtype), round_to(b, dtype)
    if residual is not None and (is_narrower(dtype, a.dtype) or is_narrower(dtype, b.dtype)):
        lost = _compute_rounding_error(a, b, kept_a, kept_b, weight.dtype)
        residual = residual.astype(weight.dtype) + target.scale * lost
    a = kept_a.reshape(*stack, *fan_in, target.rank).astype(dtype)
    b = kept_b.reshape(*stack, target.rank, *fan_out).astype(dtype)
    if residual is not None:
        residual = residual.reshape(stack + fan_in + fan_out)
        residual = jnp.transpose(residual, invert_permutation(order))
    return a, b, residual


def _check_result(made: Any, name: str) -> None:
    """An initializer returns two arrays of floats, and a third or None."""
    parts = made if isinstance(made, tuple | list) and len(made) == 3 else ()
    floating = lambda part: jnp.issubdtype(getattr(part, "dtype", object), jnp.floating)
    if not parts or not all(map(floating, parts[: 2 + (parts[2] is not None)])):
        came = [describe_value(part) for part in made] if parts else describe_value(made)
        raise LowrankError(
            f"the initializer {name!r} returned {came}; expected (a, b, residual), floating "
            "arrays, with None for a residual where the base stays as it is"
        )


_run_pytree = jax.jit(_run_initializer, static_argnums=(0, 4, 5))


def _compute_rounding_error(
    a: Any, b: Any, kept_a: Any, kept_b: Any, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """What a @ b loses where its factors are rounded: (a - a') b + a' (b - b'), small products."""
    a, b, kept_a, kept_b = (factor.astype(dtype) for factor in (a, b, kept_a, kept_b))
    left = jnp.concatenate([a - kept_a, kept_a], -1)
    right = jnp.concatenate([b, b - kept_b], -2)
    return jnp.matmul(left, right, precision="highest")
