"""CorDA: initialize factors along the directions that given inputs use most, or least."""

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
    """CorDA for one leaf; covariance is float32 [*stack, i, i]."""

    covariance: jax.Array
    mode: str = dataclasses.field(metadata={"static": True})
    damping: float = dataclasses.field(metadata={"static": True})

    def __call__(self, key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
        del key
        check_fan_in(self.covariance, weight)
        # C [i, i] @ W [i, o] = U S V^T. Both modes cut r of the min(i, o) triples, the singular
        # values in descending order: u[:, kept] is [i, r], vt[kept] is [r, o]. C^-1 undoes C, so
        # that C^-1 U S V^T over all triples is W itself.
        covariance, inverse = damp_covariance(self.covariance, self.damping)
        u, sigma, vt = svd(matmul(covariance, weight))
        kept = slice(rank) if self.mode == "ipm" else slice(len(sigma) - rank, None)
        a, b = balance_factors(matmul(inverse, u[:, kept]), sigma[kept], vt[kept], scale)
        return a, b, compute_residual(weight, a, b, scale)


@check_arguments(covariances=anything, damping=positive)
def corda(
    covariances: Mapping[str, Any], mode: str = "ipm", damping: float = 0.01
) -> dict[str, Initializer]:
    r"""Initialize factors from an SVD of the weight that is oriented by its inputs.

    $C W = U S V^\top$, where $C = \sum_x x x^\top$ is scaled to a mean of 1 on its diagonal, plus
    $\lambda I$: $a = C^{-1} U_r \sqrt{S_r / s}$, $b = \sqrt{S_r / s}\,V_r^\top$, and the base
    becomes $W - s\,a\,b$. $\lambda$ is doubled until C has an inverse in float32.

    Args:
      covariances: path -> sum or mean of x x^T over inputs x of the leaf, [*stack, i, i].
      mode: "ipm" trains the r directions that these inputs use most (collect inputs of the task);
        "kpm" trains those they use least (collect inputs of the knowledge to preserve).
      damping: the first lambda.

    Returns:
      path -> initializer, for `init(..., initializer=...)`.

    Raises:
      ConfigError: mode is unknown, or covariances have a wrong shape or values that are not finite.

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
