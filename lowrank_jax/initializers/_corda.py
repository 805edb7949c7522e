"""CorDA: the factors take the directions that matter most, or least, to inputs that were seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from lowrank_jax._checks.arguments import anything, check_arguments, positive
from lowrank_jax._errors import ConfigError
from lowrank_jax.initializers._data import check_fan_in, damp_covariance, validate_arrays
from lowrank_jax.initializers._random import Factors, Initializer
from lowrank_jax.initializers._spectral import balance_factors, compute_residual, matmul, svd

MODES = ("ipm", "kpm")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Corda:
    """CorDA of one leaf."""

    covariance: jax.Array
    mode: str = dataclasses.field(metadata={"static": True})
    damping: float = dataclasses.field(metadata={"static": True})

    def __call__(self, key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
        del key
        check_fan_in(self.covariance, weight)
        covariance, inverse = damp_covariance(self.covariance, self.damping)
        u, sigma, vt = svd(matmul(covariance, weight))
        kept = slice(rank) if self.mode == "ipm" else slice(len(sigma) - rank, None)
        a, b = balance_factors(matmul(inverse, u[:, kept]), sigma[kept], vt[kept], scale)
        return a, b, compute_residual(weight, a, b, scale)


@check_arguments(covariances=anything, damping=positive)
def corda(
    covariances: Mapping[str, Any], mode: str = "ipm", damping: float = 0.01
) -> dict[str, Initializer]:
    r"""Factors from the weight's decomposition in view of its inputs.

    $C W = U S V^\top$ with $C = \sum_x x x^\top$, scaled to a mean of 1 on its diagonal, plus
    $\lambda I$: $a = C^{-1} U_r \sqrt{S_r / s}$, $b = \sqrt{S_r / s}\,V_r^\top$, and the base
    becomes $W - s\,a\,b$. $\lambda$ is doubled till C has an inverse in float32.

    Args:
      covariances: path -> sum or mean of x x^T over inputs x of the leaf, [*stack, i, i].
      mode: "ipm" trains the r directions that these inputs use most (collect inputs of the task);
        "kpm" those they use least (collect inputs of the knowledge to be preserved).
      damping: lambda to begin with.

    Returns:
      path -> initializer, for `init(..., initializer=...)`.

    Raises:
      ConfigError: an unknown mode, or covariances of the wrong shape or with values that are not
        finite.

    Source: CorDA, arXiv 2406.05223, section 3.

    >>> import jax.numpy as jnp
    >>> weight, inputs = jnp.arange(12.0).reshape(4, 3), jnp.arange(20.0).reshape(5, 4) % 7
    >>> initializers = corda({"w": inputs.T @ inputs})
    >>> a, b, base = initializers["w"](jax.random.key(0), weight, 2, 0.5)
    >>> bool(jnp.abs(base + 0.5 * a @ b - weight).max() < 1e-5)
    True
    """
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {MODES}, not {mode!r}")
    data = validate_arrays("covariances", covariances, square=True)
    return {path: Corda(array, mode, float(damping)) for path, array in data.items()}
