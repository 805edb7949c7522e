"""LoftQ: factors that make up for what quantizing the base loses."""

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

# As GPTQ (arXiv 2210.17323, section 3.3, step 3) damps the same matrix.
DAMPING = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoftQ:
    """LoftQ of one leaf; its third result is the weight whose quantization is the base."""

    covariance: jax.Array | None
    quant: QuantConfig = dataclasses.field(metadata={"static": True})
    iterations: int = dataclasses.field(metadata={"static": True})
    factor_dtype: str = dataclasses.field(default="float32", metadata={"static": True})

    def with_factor_dtype(self, dtype: str) -> LoftQ:
        """The same for factors that are kept in this dtype, for `init` to ask for."""
        return dataclasses.replace(self, factor_dtype=dtype)

    def __call__(self, key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
        del key
        root, inverse = self._find_roots(weight)

        def step(_: Any, state: Factors) -> Factors:
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
        """The weight after quantization."""
        quant = self.quant
        node = quantize_array(
            weight, (0,), (), format=quant.format, block_size=quant.block_size,
            double_quant=quant.double_quant, packing=quant.packing,
        )  # fmt: skip
        return dequantize_node(node)

    def _find_roots(self, weight: jax.Array) -> tuple[Any, Any]:
        """Multiplication by a root of the covariance, and by its inverse; any root will do."""
        if self.covariance is None:
            return (lambda matrix: matrix), (lambda matrix: matrix)
        check_fan_in(self.covariance, weight)
        covariance = normalize_covariance(self.covariance.astype(weight.dtype))
        damped = covariance + DAMPING * jnp.eye(len(weight), dtype=weight.dtype)
        root = jnp.linalg.cholesky(damped).T
        solve = functools.partial(jax.scipy.linalg.solve_triangular, root, lower=False)
        return functools.partial(matmul, root), solve


@check_arguments(iterations=rank, covariances=anything)
def loftq(
    quant: QuantConfig, iterations: int = 5, covariances: Mapping[str, Any] | None = None
) -> Initializer | dict[str, Initializer]:
    r"""Quantize the base, and let the factors make up for what that loses.

    $\min_{q, a, b} \lVert C^{1/2}(W - q - s\,a\,b) \rVert_F$, by turns: $q$ is $W - s\,a\,b$
    quantized, and $C^{1/2}(W - q) = U S V^\top$ gives $a = C^{-1/2} U_r \sqrt{S_r / s}$,
    $b = \sqrt{S_r / s}\,V_r^\top$. C is the identity, or the covariance of the leaf's inputs,
    scaled to a mean of 1 on its diagonal, plus 0.01 I; its Cholesky factor is the root. `init` puts
    q into the base, made for factors as they are kept: rounded to `factor_dtype` at every turn.

    Args:
      quant: how the base is quantized; its targets are not looked at, for every leaf that this
        initializes is.
      iterations: turns, at least 1.
      covariances: path -> sum or mean of x x^T over inputs x of the leaf, [*stack, i, i].

    Returns:
      An initializer, or path -> initializer with covariances, for `init(..., initializer=...)`.

    Raises:
      ConfigError: a wrong quant or iterations, or covariances of the wrong shape or with values
        that are not finite.

    Source: LoftQ, arXiv 2310.08659, algorithm 1, with s in it; with covariances QERA,
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
