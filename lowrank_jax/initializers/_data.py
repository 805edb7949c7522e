"""What initializers that look at data share: their checks, and a covariance that has an inverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._errors import ConfigError, list_problems
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import PyTree
from lowrank_jax.initializers._spectral import matmul

# As much as the trace of a covariance of 4096 inputs: doubling ends, whatever came.
MAX_DAMPING = 4096.0


def validate_arrays(name: str, data: PyTree, square: bool) -> dict[str, jax.Array]:
    """Data by path: arrays [*stack, rows, columns], finite where their values are known."""
    if not isinstance(data, Mapping) or not data:
        raise ConfigError(
            f"{name} is a mapping of a leaf's path to its array, with one entry at least, not "
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
        arrays[path] = jnp.asarray(array, jnp.float32)  # in which large numbers are not finite
        if not jaxprs.is_tracer(array) and not bool(jnp.all(jnp.isfinite(arrays[path]))):
            problems.append(f"{path}: values that are not finite in float32")
    if problems:
        raise ConfigError(f"{name} cannot be used:\n{list_problems(problems)}")
    return arrays


def check_fan_in(covariance: jax.Array, weight: jax.Array) -> None:
    """A covariance is of the weight's own inputs."""
    if covariance.shape != (len(weight),) * 2:
        raise ConfigError(
            f"a covariance of shape {covariance.shape} came for a weight of shape {weight.shape} "
            f"(fan-in, fan-out): expected {(len(weight),) * 2}, axes of the fan-in flattened, "
            "stack axes leading"
        )


def normalize_covariance(covariance: jax.Array) -> jax.Array:
    """The covariance with a mean of 1 on its diagonal; one of no data stays 0."""
    mean = jnp.trace(covariance) / len(covariance)
    return covariance / jnp.where(mean > 0, mean, 1)


def damp_covariance(covariance: jax.Array, damping: float) -> tuple[jax.Array, jax.Array]:
    """The unit covariance + damping * I and its inverse; damping doubles till that is good."""
    covariance, identity = (
        normalize_covariance(covariance),
        jnp.eye(len(covariance), dtype=covariance.dtype),
    )

    def with_inverse(damping: Any) -> tuple[Any, jax.Array, jax.Array]:
        safe = covariance + damping * identity
        return damping, safe, jnp.linalg.inv(safe)

    def bad(state: PyTree) -> jax.Array:
        damping, safe, inverse = state
        good = jnp.linalg.norm(matmul(safe, inverse) - identity) < 0.05  # a NaN is not
        return ~good & (damping < MAX_DAMPING)

    state = with_inverse(jnp.asarray(damping, covariance.dtype))
    return jax.lax.while_loop(bad, lambda state: with_inverse(2 * state[0]), state)[1:]
