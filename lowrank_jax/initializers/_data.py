"""Shared code of initializers that use calibration data: checks, and damping of covariances."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lowrank_jax._errors import ConfigError, list_problems
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import PyTree
from lowrank_jax.initializers._spectral import matmul

# The trace of a normalized covariance of 4096 inputs; ends the doubling for any input.
MAX_DAMPING = 4096.0


def validate_arrays(name: str, data: PyTree, square: bool) -> dict[str, jax.Array]:
    """Validate arrays [*stack, rows, columns] by path, and return them as float32."""
    if not isinstance(data, Mapping) or not data:
        raise ConfigError(
            f"{name} must be a non-empty mapping from a leaf's path to its array, not "
            f"{data if isinstance(data, Mapping) else type(data).__name__}"
        )
    shape = "[*stack, i, i]" if square else "[*stack, i, o]"
    problems, arrays = [], {}
    for path, array in data.items():
        if not isinstance(path, str):
            problems.append(f"{path!r}: a key that is not the path of a leaf")
            continue
        found = getattr(array, "shape", None)
        if found is None or len(found) < 2 or (square and found[-1] != found[-2]):
            what = type(array).__name__ if found is None else f"of shape {tuple(found)}"
            problems.append(f"{path}: {what}, expected an array {shape}")
            continue
        dtype = getattr(array, "dtype", object)
        if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)):
            problems.append(f"{path}: of dtype {dtype}, expected real numbers")
            continue
        if isinstance(array, jax.ShapeDtypeStruct):
            problems.append(f"{path}: a shape without values")
            continue
        arrays[path] = jnp.asarray(array, jnp.float32)  # large values become infinite
        if not jaxprs.is_tracer(array) and not bool(jnp.all(jnp.isfinite(arrays[path]))):
            problems.append(f"{path}: values that are not finite in float32")
    if problems:
        raise ConfigError(f"{name} cannot be used:\n{list_problems(problems)}")
    return arrays


def check_fan_in(covariance: jax.Array, weight: jax.Array) -> None:
    """Raise unless a covariance is [i, i] for a weight [i, o]."""
    if covariance.shape != (len(weight),) * 2:
        raise ConfigError(
            f"a covariance of shape {covariance.shape} was given for a weight of shape "
            f"{weight.shape} (fan-in, fan-out): expected {(len(weight),) * 2}, fan-in axes "
            "flattened, after the stack axes"
        )


def normalize_covariance(covariance: jax.Array) -> jax.Array:
    """Scale a covariance [i, i] to a mean of 1 on its diagonal; a zero one stays zero."""
    mean = jnp.trace(covariance) / len(covariance)
    return covariance / jnp.where(mean > 0, mean, 1)


def damp_covariance(covariance: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """Return the normalized covariance [i, i] plus damping * I, and the inverse of that."""
    # Few inputs, or correlated ones, give a covariance of low rank, whose inverse in float32 is
    # noise. Damping doubles until |C C^-1 - I| (Frobenius) is below 0.05: from 0.01, one doubling
    # is 0.02, and at most 19 lead to MAX_DAMPING. A while_loop, so that this works under vmap.
    covariance, identity = (
        normalize_covariance(covariance),
        jnp.eye(len(covariance), dtype=covariance.dtype),
    )

    def invert(damping: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        safe = covariance + damping * identity
        return damping, safe, jnp.linalg.inv(safe)

    def bad(state: PyTree) -> jax.Array:
        damping, safe, inverse = state
        good = jnp.linalg.norm(matmul(safe, inverse) - identity) < 0.05  # False for NaN
        return ~good & (damping < MAX_DAMPING)

    state = invert(jnp.asarray(damping, covariance.dtype))
    return jax.lax.while_loop(bad, lambda state: invert(2 * state[0]), state)[1:]
