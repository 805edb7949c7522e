"""LoftQ: initialize factors to compensate for the quantization error of the base."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import anything, check_arguments, rank
from lowrank_jax._codecs.rounding import round_to
from lowrank_jax._nodes.quantized import dequantize_node, quantize_array
from lowrank_jax._targeting.configs import QuantConfig
from lowrank_jax.initializers._data import check_fan_in, normalize_covariance, validate_arrays
from lowrank_jax.initializers._random import Factors, Initializer
from lowrank_jax.initializers._spectral import balance_factors, compute_residual, gram_svd, matmul

# The damping of GPTQ (arXiv 2210.17323, section 3.3, step 3) for the same matrix.
DAMPING = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoftQ:
    """LoftQ for one leaf; covariance is float32 [*stack, i, i], or None for the identity."""

    covariance: jax.Array | None
    quant: QuantConfig = dataclasses.field(metadata={"static": True})
    iterations: int = dataclasses.field(metadata={"static": True})
    factor_dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    def with_factor_dtype(self, dtype: str) -> LoftQ:
        """Return the initializer for factors stored in this dtype; called by `init`."""
        return dataclasses.replace(self, factor_dtype=dtype)

    def __call__(self, key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
        del key
        # Alternate two minimizations of |C^1/2 (W - Q - s a b)|, with Q the quantized residual:
        #   kept [i, o] = W - s a b                    Q = dequantize(quantize(kept))
        #   lost [i, o] = W - Q                        root(lost) = C^1/2 lost, [i, o]
        #   u [i, r], sigma [r], vt [r, o] = leading triples of root(lost)
        #   a [i, r] = C^-1/2 u sqrt(sigma / s), b [r, o] = sqrt(sigma / s) vt
        # The third result is the `kept` whose quantization the factors were fitted to, not
        # W - s a b of the final factors: `init` quantizes it and so gets the same Q.
        root, inverse = self._find_roots(weight)

        def step(_: object, state: Factors) -> Factors:
            a, b, _ = state
            kept = compute_residual(weight, a, b, scale)
            lost = weight - self._quantize(kept).astype(weight.dtype)
            u, sigma, vt = gram_svd(root(lost), rank)
            a, b = balance_factors(inverse(u), sigma, vt, scale)
            return round_to(a, self.factor_dtype), round_to(b, self.factor_dtype), kept

        zeros = functools.partial(jnp.zeros, dtype=weight.dtype)
        start = zeros((len(weight), rank)), zeros((rank, weight.shape[1])), weight
        return jax.lax.fori_loop(0, self.iterations, step, start)

    def _quantize(self, weight: jax.Array) -> jax.Array:
        """Quantize and dequantize a weight [i, o]."""
        quant = self.quant
        node = quantize_array(
            weight, (0,), (), format=quant.format, block_size=quant.block_size,
            double_quant=quant.double_quant, packing=quant.packing,
        )  # fmt: skip
        return dequantize_node(node)

    def _find_roots(self, weight: jax.Array) -> tuple[Any, Any]:
        """Return multiplication by a root of the covariance, and by the inverse of that root.

        Any R with R^T R = C serves: the norm |R E| depends on C alone. Here R is the transposed
        Cholesky factor, upper triangular [i, i].
        """
        if self.covariance is None:
            return (lambda matrix: matrix), (lambda matrix: matrix)
        check_fan_in(self.covariance, weight)
        covariance = normalize_covariance(self.covariance.astype(weight.dtype))
        regular = covariance + DAMPING * jnp.eye(len(weight), dtype=weight.dtype)
        root = jnp.linalg.cholesky(regular).T
        solve = functools.partial(jax.scipy.linalg.solve_triangular, root, lower=False)
        return functools.partial(matmul, root), solve


@check_arguments(iterations=rank, covariances=anything)
def loftq(
    quant: QuantConfig, iterations: int = 5, covariances: Mapping[str, Any] | None = None
) -> Initializer | dict[str, Initializer]:
    r"""Quantize the base, and fit the factors to the quantization error.

    $\min_{q, a, b} \lVert C^{1/2}(W - q - s\,a\,b) \rVert_F$ by alternating minimization: $q$ is
    $W - s\,a\,b$ quantized, and $C^{1/2}(W - q) = U S V^\top$ gives
    $a = C^{-1/2} U_r \sqrt{S_r / s}$, $b = \sqrt{S_r / s}\,V_r^\top$. C is the identity, or the
    covariance of the leaf's inputs, scaled to a mean of 1 on its diagonal, plus 0.01 I; its root is
    a Cholesky factor. The factors are rounded to `factor_dtype` in each iteration, so q, which
    `init` stores as the base, fits the factors as they are stored.

    Args:
      quant: how the base is quantized. Its targets are ignored: each leaf that this initializes is
        quantized.
      iterations: number of alternations, at least 1.
      covariances: path -> sum or mean of x x^T over inputs x of the leaf, [*stack, i, i].

    Returns:
      An initializer, or path -> initializer with covariances, for `init(..., initializer=...)`.

    Raises:
      ConfigError: quant is not a QuantConfig, iterations is not an integer of at least 1, or
        covariances have a wrong shape or values that are not finite.

    Source: LoftQ, arXiv 2310.08659, algorithm 1, with a scale s; with covariances QERA,
      arXiv 2410.06040, theorem 1.

    >>> weight = jnp.sin(jnp.arange(64.0 * 8).reshape(64, 8) ** 2)
    >>> a, b, kept = loftq(QuantConfig())(jax.random.key(0), weight, 2, 0.5)
    >>> a.shape, b.shape, kept.shape  # the base is `kept`, quantized
    ((64, 2), (2, 8), (64, 8))
    """
    if covariances is None:
        return LoftQ(None, quant, iterations)
    data = validate_arrays("covariances", covariances, square=True)
    return {path: LoftQ(array, quant, iterations) for path, array in data.items()}
