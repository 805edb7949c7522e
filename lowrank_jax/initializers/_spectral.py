"""Initializers that move the leading part of the weight into the factors: PiSSA, OLoRA."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import (
    check_arguments,
    count,
    factor_scale,
    key,
    matrix,
    nothing,
    rank,
)
from lowrank_jax.initializers._random import Factors, Initializer

# Full float32 products on all backends: their rounding errors would remain in the base.
matmul = functools.partial(jnp.matmul, precision="highest")
svd = functools.partial(jnp.linalg.svd, full_matrices=False)

# checks the arguments of an initializer without randomness
of_weight = check_arguments(key=key | nothing, weight=matrix, rank=rank, scale=factor_scale)

# Columns beyond the rank; arXiv 0909.4061, section 4.2, recommends 5 to 10.
OVERSAMPLING = 8


def balance_factors(
    u: jax.Array, sigma: jax.Array, vt: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Return a [i, r] and b [r, o] with scale * a @ b = u diag(sigma) vt, of balanced norms."""
    root = jnp.sqrt(sigma / scale)
    return u * root, root[:, None] * vt


def gram_svd(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the leading singular triples u [i, r], sigma [r], vt [r, o] from the Gram matrix.

    Takes a third of an SVD's time on CPU. Inaccurate only for singular values whose squares are
    below 1e-7 of the largest one's, which are not leading.
    """
    # The smaller of the two Gram matrices is decomposed. For [4, 100]: M M^T [4, 4] has the left
    # singular vectors as eigenvectors, in ascending order, hence the reversal; u^T M [r, 100] is
    # diag(sigma) vt. For [100, 4] the same is done to the transpose, and u and vt change places.
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.T
    u = jnp.linalg.eigh(matmul(matrix, matrix.T))[1][:, ::-1][:, :rank]
    v = matmul(u.T, matrix)
    sigma = jnp.linalg.norm(v, axis=1)
    v = v / jnp.where(sigma > 0, sigma, 1)[:, None]
    return (u, sigma, v) if wide else (v.T, sigma, u.T)


def compute_residual(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Return weight - scale * a @ b, the base that keeps the function unchanged."""
    return weight - scale * matmul(a.astype(weight.dtype), b.astype(weight.dtype))


@of_weight
def pissa(key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
    r"""PiSSA: the factors take the largest singular directions, and the base keeps the rest.

    $W = U S V^\top$: $a = U_r \sqrt{S_r / s}$, $b = \sqrt{S_r / s}\,V_r^\top$, and the base becomes
    $W - s\,a\,b$.

    Args:
      key: unused.
      weight: [i, o], float32.
      rank: r.
      scale: s.

    Returns:
      a [i, r], b [r, o] and the base [i, o], in float32.

    Source: PiSSA, arXiv 2404.02948, equations 2 to 4.

    >>> weight = jnp.arange(12.0).reshape(4, 3)
    >>> a, b, base = pissa(jax.random.key(0), weight, 2, 0.5)
    >>> bool(jnp.abs(base + 0.5 * a @ b - weight).max() < 1e-5), bool(jnp.abs(base).max() < 1e-4)
    (True, True)
    """
    del key
    u, sigma, vt = svd(weight)
    a, b = balance_factors(u[:, :rank], sigma[:rank], vt[:rank], scale)
    return a, b, compute_residual(weight, a, b, scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomizedPissa:
    """PiSSA with a randomized SVD."""

    iterations: int = dataclasses.field(metadata={"static": True})

    def __call__(self, key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
        width = min(rank + OVERSAMPLING, *weight.shape)
        u, sigma, vt = randomized_svd(key, weight, width, self.iterations)
        a, b = balance_factors(u[:, :rank], sigma[:rank], vt[:rank], scale)
        return a, b, compute_residual(weight, a, b, scale)


def randomized_svd(
    key: jax.Array, weight: jax.Array, width: int, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Approximate the `width` leading singular triples by subspace iteration."""
    basis = lambda matrix: jnp.linalg.qr(matrix)[0]
    # q [i, width] spans an approximation of the leading left singular vectors; each step multiplies
    # it by W W^T and orthonormalizes, after each of the two products for accuracy. At the end
    # q^T W [width, o] has a small SVD, and q turns its u [width, width] into [i, width].
    step = lambda _, q: basis(matmul(weight, basis(matmul(weight.T, q))))
    start = jax.random.normal(key, (weight.shape[1], width), weight.dtype)
    q = jax.lax.fori_loop(0, iterations, step, basis(matmul(weight, start)))
    u, sigma, vt = svd(matmul(q.T, weight))
    return matmul(q, u), sigma, vt


@check_arguments(iterations=count)
def randomized_pissa(iterations: int = 4) -> Initializer:
    r"""PiSSA with a randomized SVD, which computes only r + 8 singular vectors.

    The range of $(W W^\top)^n W\,\Omega$, with $\Omega$ normal [o, r + 8], orthonormalized in each
    step, approximates the span of the leading singular vectors. $W = W_\text{base} + s\,a\,b$ is as
    exact as for pissa.

    Args:
      iterations: n; each one damps smaller singular values by the square of their ratio.

    Returns:
      An initializer: (key, weight, rank, scale) -> a [i, r], b [r, o] and the base [i, o].

    Raises:
      ConfigError: iterations is not an integer of at least 0.

    Source: PiSSA, arXiv 2404.02948, section 3 ("fast SVD"); Halko et al., arXiv 0909.4061,
      algorithm 4.4.

    >>> weight = jnp.arange(12.0).reshape(4, 3)
    >>> a, b, base = randomized_pissa(2)(jax.random.key(0), weight, 2, 0.5)
    >>> bool(jnp.abs(base).max() < 1e-4)  # the weight is of rank 2
    True
    """
    return RandomizedPissa(iterations)


@of_weight
def olora(key: jax.Array, weight: jax.Array, rank: int, scale: float) -> Factors:
    r"""OLoRA: the factors are the leading part of a QR decomposition; b has orthonormal rows.

    $W^\top = Q R$: $a = R_{:r}^\top$, $b = Q_{:,:r}^\top$, and the base becomes $W - s\,a\,b$.

    Args:
      key: unused.
      weight: [i, o], float32.
      rank: r.
      scale: s; as in the paper, the factors do not depend on it.

    Returns:
      a [i, r], b [r, o] and the base [i, o], in float32.

    Source: OLoRA, arXiv 2406.01775, section 3, algorithm 1.

    >>> weight = jnp.arange(12.0).reshape(4, 3)
    >>> a, b, base = olora(jax.random.key(0), weight, 2, 0.5)
    >>> bool(jnp.abs(b @ b.T - jnp.eye(2)).max() < 1e-6)
    True
    """
    del key
    q, r = jnp.linalg.qr(weight.T)
    a, b = r[:rank].T, q[:, :rank].T
    return a, b, compute_residual(weight, a, b, scale)
