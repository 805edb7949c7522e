"""Application of initializers to leaves: reshapes to matrices, maps over stacks, rounds factors."""

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
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._primitives.contract import (
    RANK,
    accumulator_dtype,
    invert_permutation,
    labeled_spec,
)
from lowrank_jax._targeting.targets import (
    Target,
)
from lowrank_jax._trees.shardings import find_constraint

Initializer = Callable[[jax.Array, jax.Array, int, float], initializers.Factors]


def apply_initializer(
    key: jax.Array,
    path: str,
    leaf: jax.Array | Quantized,
    target: Target,
    initializer: Initializer,
    dtype: str,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return a, b and the residual (or None) of a leaf, sharded as the leaf.

    a: [*stack, *fan_in, r], b: [*stack, r, *fan_out], the residual has the shape of the leaf.
    """
    # An initializer that is a pytree brings arrays, which lead with the stack axes of the leaf. Its
    # structure is static and its arrays are traced, so one program serves all leaves of a shape.
    data, form = jax.tree.flatten(initializer)
    if data == [initializer]:  # a plain function
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
    if sharding is None:  # no explicit mesh axes
        return run(key, leaf, data, target, dtype, find_constraint(leaf))
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
    """Return the jitted `_run_initializer` of a function, or of the structure of a pytree."""
    # Structures that are equal share programs. A function is equal only to itself: its program is
    # stored under a weak reference, so that it is freed with the function.
    if not isinstance(form, types.FunctionType | functools.partial):
        own = Static(form)
        return lambda *args: _run_pytree(own, *args)
    if form not in _compiled_by_function:
        known = weakref.ref(form)
        run = lambda *args: _run_initializer(Static(known()), *args)
        _compiled_by_function[form] = jax.jit(run, static_argnums=(3, 4, 5))
    return _compiled_by_function[form]


def _run_initializer(
    form: Static,
    key: jax.Array,
    leaf: jax.Array,
    data: PyTree,
    target: Target,
    dtype: str,
    sharding: jax.NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return a, b and the residual with the axes of the leaf, whose dense sharding is given."""
    # A leaf [64, 12, 8, 16] with stack (1,), fan_in (0,), fan_out (2, 3) is transposed by order
    # (1, 0, 2, 3) and reshaped to matrices [12, 64, 128], over which the initializer is vmapped.
    # a [12, 64, r] and b [12, r, 128] become a [12, 64, r] and b [12, r, 8, 16]; the residual
    # [12, 64, 128] goes back through [12, 64, 8, 16] to [64, 12, 8, 16].
    order = target.stack + target.fan_in + target.fan_out
    sizes = lambda axes: tuple(leaf.shape[axis] for axis in axes)
    stack, fan_in, fan_out = sizes(target.stack), sizes(target.fan_in), sizes(target.fan_out)
    rows, columns = math.prod(fan_in), math.prod(fan_out)
    weight = jnp.transpose(as_dense(leaf), order).astype(accumulator_dtype(leaf.dtype))
    weight = weight.reshape(-1, rows, columns)
    keys = jax.random.split(key, weight.shape[0]) if stack else key[None]
    data = [array.reshape(-1, *array.shape[len(stack) :]) for array in data]

    def make(key: jax.Array, weight: jax.Array, data: PyTree) -> Any:
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
    if sharding is None:
        return a, b, residual
    like = lambda labels: sharding.update(spec=labeled_spec(sharding.spec, labels))
    constrain = jax.lax.with_sharding_constraint
    a = constrain(a, like((*target.stack, *target.fan_in, RANK)))
    b = constrain(b, like((*target.stack, RANK, *target.fan_out)))
    return a, b, None if residual is None else constrain(residual, sharding)


def _check_result(made: Any, name: str) -> None:
    """Raise LowrankError unless made is two floating arrays, and a third one or None."""
    parts = made if isinstance(made, tuple | list) and len(made) == 3 else ()
    floating = lambda part: jnp.issubdtype(getattr(part, "dtype", object), jnp.floating)
    if not parts or not all(map(floating, parts[: 2 + (parts[2] is not None)])):
        came = [describe_value(part) for part in made] if parts else describe_value(made)
        raise LowrankError(
            f"the initializer {name!r} returned {came}; expected (a, b, residual), floating "
            "arrays, with None for a residual where the base stays as it is"
        )


_run_pytree = jax.jit(_run_initializer, static_argnums=(0, 4, 5, 6))


def _compute_rounding_error(
    a: jax.Array,
    b: jax.Array,
    kept_a: jax.Array,
    kept_b: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Compute a b - a' b' for factors a' and b' rounded from a and b: [.., i, r], [.., r, o]."""
    # As (a - a') b + a' (b - b'), a sum of small products: the difference of the two large ones
    # would lose digits. The sum is one product of [.., i, 2 r] and [.., 2 r, o].
    a, b, kept_a, kept_b = (factor.astype(dtype) for factor in (a, b, kept_a, kept_b))
    left = jnp.concatenate([a - kept_a, kept_a], -1)
    right = jnp.concatenate([b, b - kept_b], -2)
    return jnp.matmul(left, right, precision="highest")
