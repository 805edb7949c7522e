r"""Products of a few tokens with a decoded weight, as sums that a GPU's compiler fuses whole.

$y[\text{out}] = \sum x[\cdot]\,w[\cdot]$ of a row of x is written as an elementwise product and a
sum, not as a dot. XLA for CUDA then makes fusions in which each code is read, decoded, multiplied
and summed, for two rows or more at a time. For a dot it writes the decoded weight to memory first
and reads it again, eight times the bytes of 4-bit codes, which is most of the time of a product
with one token. With more tokens the dot wins: it decodes once, and multiplies on tensor cores.

No GPU was at hand when the constants of `is_cheaper` were chosen, by counting bytes and
instructions. The environment variable LOWRANK_JAX_FEW_TOKENS, the most tokens that a product may
have to be written as sums, limits this; 0 restores the dot everywhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import ConfigError
from lowrank_jax._primitives.bilinear import DotOptions, Labels, product_dtype
from lowrank_jax._primitives.contract import accumulator_dtype, arrange

_VARIABLE = "LOWRANK_JAX_FEW_TOKENS"
_THREADS = 32768  # sums at once with which XLA for CUDA fuses the products into a sum
_BYTES_A_DECODE = 1.4  # an H100 moves so many bytes in the time of the dozen instructions of one


def sum_rows(
    xs: Sequence[jax.Array],
    w: jax.Array,
    xl: Labels,
    wl: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> list[jax.Array]:
    """Multiply each x by w and sum the labels that are not in out, row by row of x.

    Args:
      xs: arrays of the same labels and shape.
      w: array.
      xl: labels of the axes of each x.
      wl: labels of the axes of w.
      out: labels of a result. Each label is in at least two of xl, wl and out.
      options: of lax.dot_general; sums are of the accumulator's precision whatever they say.

    >>> x, w = jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 4))
    >>> sum_rows([x], w, ("n", "in"), ("in", "out"), ("n", "out"))[0][:, 0]
    Array([ 3., 12.], dtype=float32)
    """
    dtype = options.get("preferred_element_type") or product_dtype(xs[0].dtype, w.dtype)
    exact = accumulator_dtype(xs[0].dtype, w.dtype)
    free = [label for label in xl if label not in wl]
    bound = tuple(label for label in xl if label in wl)
    axes = tuple(i for i, label in enumerate(wl) if label not in out)
    kept = tuple(label for label in wl if label in out)
    sizes = {**dict(zip(xl, xs[0].shape, strict=True)), **dict(zip(wl, w.shape, strict=True))}
    wide = w.astype(exact)
    parts = 1 if not axes or len(wl) - 1 in axes else _count_parts(w.shape, axes)

    def multiply(row: jax.Array) -> jax.Array:
        """Of a row [*bound], its product with w, [*kept]."""
        products = arrange(row, bound, wl, sizes).astype(exact) * wide
        if parts == 1:
            return jnp.sum(products, axes).astype(dtype)
        # [blocks, block, out] -> [parts, blocks / parts, block, out] -> [parts, out] -> [out]. The
        # barrier keeps XLA from making one sum of the two.
        first, shape = axes[0], products.shape
        cut = (parts, shape[first] // parts)
        products = products.reshape(*shape[:first], *cut, *shape[first + 1 :])
        sums = jnp.sum(products, [axis + 1 for axis in axes])
        return jnp.sum(lax.optimization_barrier(sums), first).astype(dtype)

    results = []
    for x in xs:
        rows = arrange(x, xl, (*free, *bound), sizes)
        rows = rows.reshape(-1, *rows.shape[len(free) :])
        made = jnp.stack([multiply(row) for row in rows])
        made = made.reshape([sizes[label] for label in (*free, *kept)])
        results.append(arrange(made, (*free, *kept), out, sizes))
    return results


def _count_parts(shape: Sequence[int], axes: Sequence[int]) -> int:
    """Return in how many sums the first of the summed axes is cut, for a GPU to be busy."""
    # Of a sum of fewer threads XLA writes the products to memory first.
    kept = math.prod(size for axis, size in enumerate(shape) if axis not in axes)
    size = shape[axes[0]]
    divisors = (n for n in range(1, size + 1) if size % n == 0)
    return next((n for n in divisors if n * kept >= _THREADS), size)


class Rows(NamedTuple):
    """What the sums of a product read.

    Args:
      count: number of rows of the activation.
      sums_last: whether the last axis of the weight is summed.
      weights: number of weights of which each row is multiplied by one.
    """

    count: int
    sums_last: bool
    weights: int = 1

    @property
    def passes(self) -> float:
        """How often the fusions of `sum_rows` read all codes."""
        # XLA fuses the sums over the last axis for all rows, sums over other axes two by two.
        if self.weights > 1:
            return self.count / self.weights
        return 1 if self.sums_last else (self.count + 1) // 2


def is_cheaper(rows: Rows, elements: int, code_bytes: int, dtype: jax.typing.DTypeLike) -> bool:
    r"""Whether sums of rows need less of a GPU's time than a dot with the decoded weight.

    $p \max(c, 1.4\,n) < \max(c, 1.4\,n) + 2 s n$ for n elements of s bytes, c bytes of codes and
    scales, and p passes of the sums: a dot decodes too, and its weight is written and read again.

    Args:
      rows: what the sums read.
      elements: number of elements of the decoded weight.
      code_bytes: size of its codes and scales, bytes.
      dtype: of the decoded weight.
    """
    if not 0 < rows.count <= get_limit():
        return False
    one = max(code_bytes, _BYTES_A_DECODE * elements)
    return rows.passes * one < one + 2 * jnp.dtype(dtype).itemsize * elements


def get_limit() -> int:
    """Return the most rows of a product written as sums: LOWRANK_JAX_FEW_TOKENS, 8 by default.

    Raises:
      ConfigError: the variable is not a number, or below 0.
    """
    text = os.environ.get(_VARIABLE, "8")
    if not text.isdecimal():
        raise ConfigError(
            f"the environment variable {_VARIABLE} is {quote_value(text)}; it must be a number of "
            "tokens, and 0 for none"
        )
    return int(text)
