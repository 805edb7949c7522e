"""Factor the low-rank difference between a base that an initializer changed and the original."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._nodes import LowRank


def factorize_difference(
    path: str, node: LowRank, base: np.ndarray, original: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Return a0, b0 with $\text{base} = \text{original} + s\,a_0\,b_0$, in the adapter's shapes.

    PiSSA, OLoRA and similar initializers subtract a product of rank r from the weight. The product
    is recovered from its range, up to the rounding of the base's dtype.
    """
    # base [d, layers, heads, dim] with stack (1,), fan_in (0,), fan_out (2, 3):
    #   order     (1, 0, 2, 3)
    #   matrices  [layers, d, heads * dim]      one factorization per layer
    #   a         [layers, d, r]                as node.a
    #   b         [layers, r, heads * dim]      reshaped to [layers, r, heads, dim], as node.b
    fan_in, fan_out, stack = node.axes(base.ndim)
    order = (*stack, *fan_in, *fan_out)
    sizes = lambda axes: tuple(base.shape[axis] for axis in axes)
    flat = (-1, int(np.prod(sizes(fan_in))), int(np.prod(sizes(fan_out))))
    to_matrices = lambda x: np.asarray(x, np.float64).transpose(order).reshape(flat)
    base_, original_ = to_matrices(base), to_matrices(original)
    pairs = [_factorize(new - old, node.rank) for new, old in zip(base_, original_, strict=True)]
    a, b = (np.stack(factors) for factors in zip(*pairs, strict=True))
    lost = np.abs(original_ + a @ b - base_).max()
    # tolerate the rounding of the residual to the leaf's dtype, and of the factors to theirs
    tolerance = float(jnp.finfo(base.dtype).eps) * max(np.abs(original_).max(), np.abs(base_).max())
    if not lost <= tolerance + 1e-6 * np.abs(a @ b).max():
        raise CheckpointError(
            f"{path!r}: base differs from original by more than a product of rank {node.rank} "
            f"(by up to {lost:.3g}): base is quantized, or belongs to other params. Export for the "
            "base itself (original=base), or save the merged weights (lowrank.merge)"
        )
    a = a.reshape(*sizes(stack), *sizes(fan_in), node.rank)
    b = b.reshape(*sizes(stack), node.rank, *sizes(fan_out)) / node.scale
    return a.astype(node.a.dtype), b.astype(node.b.dtype)


def _factorize(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return balanced factors [i, r] and [r, o] of a matrix [i, o] of rank r."""
    # r + 8 random combinations of the columns span the range [i, r + 8], after one power iteration
    # that damps rounding noise; an SVD of the small span^T M [r + 8, o] then gives the factors
    probe = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + 8))
    span = np.linalg.qr(matrix @ (matrix.T @ (matrix @ probe)))[0]
    u, s, v = np.linalg.svd(span.T @ matrix, full_matrices=False)
    root = np.sqrt(s[:rank])
    return span @ u[:, :rank] * root, root[:, None] * v[:rank]
