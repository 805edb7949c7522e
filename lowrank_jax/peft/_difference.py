"""The factors of what an initializer moved out of a weight: original - base, of low rank."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lowrank_jax._errors import CheckpointError
from lowrank_jax._nodes import LowRank


def factorize_difference(
    path: str, node: LowRank, base: np.ndarray, original: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""a0 and b0 with $\text{base} = \text{original} + s\,a_0\,b_0$, laid out as the adapter's.

    PiSSA, OLoRA and their like moved a product of rank r out of the weight; it is found again
    from its range, up to the rounding of the base's dtype.
    """
    fan_in, fan_out, stack = node.axes(base.ndim)
    order = (*stack, *fan_in, *fan_out)
    sizes = lambda axes: tuple(base.shape[axis] for axis in axes)
    flat = (-1, int(np.prod(sizes(fan_in))), int(np.prod(sizes(fan_out))))
    laid_out = lambda x: np.asarray(x, np.float64).transpose(order).reshape(flat)
    base_, original_ = laid_out(base), laid_out(original)
    pairs = [_factorize(new - old, node.rank) for new, old in zip(base_, original_, strict=True)]
    a, b = (np.stack(factors) for factors in zip(*pairs, strict=True))
    lost = np.abs(original_ + a @ b - base_).max()
    # the residual was rounded to the leaf's dtype, and the factors were rounded to theirs
    room = float(jnp.finfo(base.dtype).eps) * max(np.abs(original_).max(), np.abs(base_).max())
    if not lost <= room + 1e-6 * np.abs(a @ b).max():
        raise CheckpointError(
            f"{path!r}: base differs from original by more than a product of rank {node.rank} "
            f"(by {lost:.3g} somewhere): a quantized or another base. Export onto the base as it "
            "is (original=base), or write merged weights (lowrank.merge)"
        )
    a = a.reshape(*sizes(stack), *sizes(fan_in), node.rank)
    b = b.reshape(*sizes(stack), node.rank, *sizes(fan_out)) / node.scale
    return a.astype(node.a.dtype), b.astype(node.b.dtype)


def _factorize(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Balanced factors of a matrix of that rank."""
    # a few random combinations of columns span the range; one power step clears rounding noise
    probe = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + 8))
    span = np.linalg.qr(matrix @ (matrix.T @ (matrix @ probe)))[0]
    u, s, v = np.linalg.svd(span.T @ matrix, full_matrices=False)
    root = np.sqrt(s[:rank])
    return span @ u[:, :rank] * root, root[:, None] * v[:rank]
