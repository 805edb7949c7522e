r"""The bilinear primitive: a product of labeled arrays, $z[\text{out}] = \sum x[\cdot]\,y[\cdot]$.

It lowers to lax.dot_general. It is a primitive only because of CPU: XLA on CPU copies an operand
that is contracted over several axes, as in the gradient of every factor, which sums over batch and
sequence. The lowering rule for CPU flattens these axes to one first. Flattening in the traced
program instead would all-gather activations that are sharded by sequence (four all-gathers in two
layers), and a choice made while tracing would be wrong for code compiled for another backend.
Measured by benchmarks/step_time.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from lowrank_jax._jax.inlined import bind_inlined
from lowrank_jax._jax.jaxprs import Primitive, has_no_mesh

Labels = tuple[Hashable, ...]


class DotOptions(TypedDict, total=False):
    """Arguments of lax.dot_general beside the operands and dimension numbers."""

    precision: lax.PrecisionLike
    preferred_element_type: jax.typing.DTypeLike | None


def bilinear(
    x: jax.Array, y: jax.Array, xl: Labels, yl: Labels, out: Labels, **options: Unpack[DotOptions]
) -> Any:
    """Multiply x and y and sum the labels that are not in out.

    Args:
      x: array.
      y: array.
      xl: labels of the axes of x.
      yl: labels of the axes of y.
      out: labels of the result. Each label is in at least two of xl, yl and out.
      options: of lax.dot_general.

    >>> x, a = jnp.ones((2, 3, 4)), jnp.ones((4, 8))
    >>> bilinear(x, a, ("batch", "time", "in"), ("in", "r"), ("batch", "time", "r")).shape
    (2, 3, 8)
    """
    params: dict[str, Any] = {"xl": xl, "yl": yl, "out": out, **_OPTIONS, **options}
    if has_no_mesh(x) and has_no_mesh(y):
        return bind_inlined(bilinear_p, (x, y), params)
    return _dot(x, y, **params)


_OPTIONS: dict[str, Any] = {"precision": None, "preferred_element_type": None}
_BATCH = "vmapped"  # (_BATCH, labels of the result) labels an axis of jax.vmap


def _group_labels(xl: Labels, yl: Labels, out: Labels) -> tuple[list, list, list, list]:
    """Return the labels that are batch, summed, free in x, and free in y; free ones as in out."""
    batch = [label for label in out if label in xl and label in yl]
    summed = [label for label in xl if label not in out]
    return batch, summed, [n for n in out if n not in yl], [n for n in out if n not in xl]


def _dot(
    x: jax.Array,
    y: jax.Array,
    *,
    xl: Labels,
    yl: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> Any:
    """Compute the product as one lax.dot_general."""
    batch, summed, _, _ = _group_labels(xl, yl, out)
    numbers = (
        (_find_axes(xl, summed), _find_axes(yl, summed)),
        (_find_axes(xl, batch), _find_axes(yl, batch)),
    )
    made = (*batch, *(n for n in xl if n in out and n not in yl), *(n for n in yl if n not in xl))
    return _permute(lax.dot_general(x, y, numbers, **options), made, out)


def _flat_dot(
    x: jax.Array,
    y: jax.Array,
    *,
    xl: Labels,
    yl: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> Any:
    """Compute the product with each group of labels flattened to one axis."""
    # The gradient of a factor: x [batch, time, in], y [batch, time, r], out (in, r). batch and time
    # are summed, so x becomes [batch * time, in] and y [batch * time, r], without a transpose, and
    # the product is that of two matrices. A kept group goes last or first, whichever needs none.
    batch, summed, free, mixed = _group_labels(xl, yl, out)
    sizes = {**dict(zip(xl, x.shape, strict=True)), **dict(zip(yl, y.shape, strict=True))}

    def flattened(array: jax.Array, labels: Labels, kept: list) -> tuple[jax.Array, int]:
        """[*batch, summed, kept] or [*batch, kept, summed], and the axis of summed."""
        groups = (summed, kept) if labels == (*batch, *summed, *kept) else (kept, summed)
        array = _permute(array, labels, (*batch, *groups[0], *groups[1]))
        shape = [math.prod(sizes[name] for name in group) for group in groups]
        axis = len(batch) + (groups[0] is kept)
        return array.reshape(*array.shape[: len(batch)], *shape), axis

    left, lc = flattened(x, xl, free)
    right, rc = flattened(y, yl, mixed)
    lead = tuple(range(len(batch)))
    z = lax.dot_general(left, right, (((lc,), (rc,)), (lead, lead)), **options)
    made = (*batch, *free, *mixed)
    return _permute(z.reshape([sizes[name] for name in made]), made, out)


def _find_axes(labels: Labels, chosen: Sequence[Hashable]) -> tuple[int, ...]:
    """Return the axes that have the chosen labels."""
    return tuple(labels.index(label) for label in chosen)


def _permute(array: jax.Array, labels: Labels, order: Labels) -> jax.Array:
    """Transpose an array of these labels to the order of labels."""
    return (
        array if tuple(labels) == tuple(order) else lax.transpose(array, _find_axes(labels, order))
    )


def labeled_dot(
    x: jax.Array, y: jax.Array, xl: Labels, yl: Labels, out: Labels, **options: Unpack[DotOptions]
) -> jax.Array:
    """bilinear as one lax.dot_general, on every backend."""
    return _dot(x, y, xl=xl, yl=yl, out=out, **options)


def labeled_flat_dot(
    x: jax.Array, y: jax.Array, xl: Labels, yl: Labels, out: Labels, **options: Unpack[DotOptions]
) -> jax.Array:
    """bilinear as one product of matrices, the fast form for XLA on CPU."""
    return _flat_dot(x, y, xl=xl, yl=yl, out=out, **options)


@functools.cache
def product_dtype(x: jax.typing.DTypeLike, y: jax.typing.DTypeLike) -> np.dtype:
    """Return the dtype of lax.dot_general of two dtypes, which may differ."""
    one = lambda dtype: jax.ShapeDtypeStruct((1,), dtype)
    product = lambda x, y: lax.dot_general(x, y, (((0,), (0,)), ((), ())))
    return jax.eval_shape(product, one(x), one(y)).dtype


# The primitive


def _abstract_eval(
    x: ShapedArray,
    y: ShapedArray,
    *,
    xl: Labels,
    yl: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> ShapedArray:
    """Abstract evaluation: the shape and dtype of the product."""
    sizes = {**dict(zip(xl, x.shape, strict=True)), **dict(zip(yl, y.shape, strict=True))}
    dtype = options.get("preferred_element_type") or product_dtype(x.dtype, y.dtype)
    return ShapedArray(tuple(sizes[label] for label in out), jnp.dtype(dtype))


def _transpose_x(
    ct: jax.Array,
    x: ad.UndefinedPrimal,
    y: jax.Array,
    *,
    xl: Labels,
    yl: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> Any:
    """Return the cotangent of x: the product of the result's cotangent and y, labeled as x."""
    # z[n, r] = sum_i x[n, i] a[i, r] has xl (n, i), yl (i, r), out (n, r). The cotangent ct[n, r]
    # times a[i, r] summed over r is dx[n, i]: bilinear with labels out, yl -> xl. It is the
    # primitive again, so it is differentiable to any order and flattened on CPU too.
    back = {**options, "preferred_element_type": None}
    return _cast_cotangent(bilinear(ct, y, out, yl, xl, **back), x.aval.dtype)


def _transpose_y(
    ct: jax.Array,
    x: jax.Array,
    y: ad.UndefinedPrimal,
    *,
    xl: Labels,
    yl: Labels,
    out: Labels,
    **options: Unpack[DotOptions],
) -> Any:
    back = {**options, "preferred_element_type": None}
    return _cast_cotangent(bilinear(x, ct, xl, out, yl, **back), y.aval.dtype)


def _cast_cotangent(value: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Cast a cotangent to the dtype of its operand; take the real part if that is real."""
    if jnp.issubdtype(value.dtype, jnp.complexfloating) > jnp.issubdtype(
        dtype, jnp.complexfloating
    ):
        value = lax.real(value)
    return value.astype(dtype)


def _batch(args: Sequence[jax.Array], dims: Sequence[Any], **params: Any) -> tuple[jax.Array, int]:
    """Batching rule: the mapped axis becomes one more label."""
    # A product with xl (n, i), yl (i, r), out (n, r), mapped over axis 0 of x [b, n, i] only, has
    # the new label v: xl (v, n, i), yl (i, r), out (v, n, r). Nested vmaps need different labels,
    # so v holds the labels of the result, which grow with each vmap.
    name = (_BATCH, params["out"])
    for side, dim in zip(("xl", "yl"), dims, strict=True):
        if dim is not None:
            params[side] = (*params[side][:dim], name, *params[side][dim:])
    params["out"] = (name, *params["out"])
    return bilinear_p.bind(*args, **params), 0


bilinear_p = Primitive("lowrank_bilinear")
bilinear_p.def_abstract_eval(_abstract_eval)
bilinear_p.def_impl(jax.jit(_dot, static_argnames=("xl", "yl", "out", *_OPTIONS)))
ad.defbilinear(bilinear_p, _transpose_x, _transpose_y)
batching.primitive_batchers[bilinear_p] = _batch
mlir.register_lowering(bilinear_p, mlir.lower_fun(_dot, multiple_results=False))
mlir.register_lowering(
    bilinear_p, mlir.lower_fun(_flat_dot, multiple_results=False), platform="cpu"
)
