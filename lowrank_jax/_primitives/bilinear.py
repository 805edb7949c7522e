r"""A bilinear product of labeled arrays, $z[\text{out}] = \sum x[\cdot]\,y[\cdot]$: a primitive.

It means lax.dot_general, and lowers to it. It is a primitive for the sake of one backend: XLA on
CPU copies an operand whose tokens are spread over several axes whenever it contracts over them, as
the gradient of every factor does, so there tokens are flattened to one axis first. To flatten in
the traced program instead would gather activations that are sharded by sequence (four all-gathers
in two layers), and a choice made while tracing would be wrong for code compiled for another
backend; a lowering rule does neither. Measured by tests/benchmarks/step_time.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from lowrank_jax._jax.jaxprs import Primitive, has_no_mesh

Labels = tuple[Hashable, ...]


def bilinear(
    x: jax.Array, y: jax.Array, xl: Labels, yl: Labels, out: Labels, **options: Any
) -> Any:
    """Sum x * y over the labels that out lacks; every label is in at least two of xl, yl, out."""
    params: dict[str, Any] = {"xl": xl, "yl": yl, "out": out, **_OPTIONS, **options}
    if has_no_mesh(x) and has_no_mesh(y):
        return bilinear_p.bind(x, y, **params)
    return _dot(x, y, **params)


_OPTIONS: dict[str, Any] = {"precision": None, "preferred_element_type": None}
_BATCH = "vmapped"


def _group_labels(xl: Labels, yl: Labels, out: Labels) -> tuple[list, list, list, list]:
    """Labels that are batched, summed, of x alone, of y alone; the last two in the order of out."""
    batch = [label for label in out if label in xl and label in yl]
    summed = [label for label in xl if label not in out]
    return batch, summed, [n for n in out if n not in yl], [n for n in out if n not in xl]


def _dot(x: jax.Array, y: jax.Array, *, xl: Labels, yl: Labels, out: Labels, **options: Any) -> Any:
    """The product as one lax.dot_general."""
    batch, summed, _, _ = _group_labels(xl, yl, out)
    numbers = (
        (_find_axes(xl, summed), _find_axes(yl, summed)),
        (_find_axes(xl, batch), _find_axes(yl, batch)),
    )
    made = (*batch, *(n for n in xl if n in out and n not in yl), *(n for n in yl if n not in xl))
    return _permute(lax.dot_general(x, y, numbers, **options), made, out)


def _flat_dot(
    x: jax.Array, y: jax.Array, *, xl: Labels, yl: Labels, out: Labels, **options: Any
) -> Any:
    """The product with every group of labels flattened to one axis; only what must be is moved."""
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
    return tuple(labels.index(label) for label in chosen)


def _permute(array: jax.Array, labels: Labels, order: Labels) -> jax.Array:
    return (
        array if tuple(labels) == tuple(order) else lax.transpose(array, _find_axes(labels, order))
    )


def labeled_dot(
    x: jax.Array, y: jax.Array, xl: Labels, yl: Labels, out: Labels, **options: Any
) -> jax.Array:
    """The product as one lax.dot_general, in any program."""
    return _dot(x, y, xl=xl, yl=yl, out=out, **options)


def labeled_flat_dot(
    x: jax.Array, y: jax.Array, xl: Labels, yl: Labels, out: Labels, **options: Any
) -> jax.Array:
    """The product as one of matrices, which is what XLA on CPU wants."""
    return _flat_dot(x, y, xl=xl, yl=yl, out=out, **options)


@functools.cache
def product_dtype(x: Any, y: Any) -> Any:
    """Dtype of lax.dot_general of two dtypes, which need not be equal."""
    one = lambda dtype: jax.ShapeDtypeStruct((1,), dtype)
    product = lambda x, y: lax.dot_general(x, y, (((0,), (0,)), ((), ())))
    return jax.eval_shape(product, one(x), one(y)).dtype


# The primitive


def _abstract_eval(
    x: Any, y: Any, *, xl: Labels, yl: Labels, out: Labels, **options: Any
) -> ShapedArray:
    sizes = {**dict(zip(xl, x.shape, strict=True)), **dict(zip(yl, y.shape, strict=True))}
    dtype = options["preferred_element_type"] or product_dtype(x.dtype, y.dtype)
    return ShapedArray(tuple(sizes[label] for label in out), jnp.dtype(dtype))


def _transpose_x(
    ct: Any, x: Any, y: jax.Array, *, xl: Labels, yl: Labels, out: Labels, **options: Any
) -> Any:
    """The cotangent of x is the product of the cotangent and y, in the layout of x."""
    back = {**options, "preferred_element_type": None}
    return _cast_cotangent(bilinear(ct, y, out, yl, xl, **back), x.aval.dtype)


def _transpose_y(
    ct: Any, x: jax.Array, y: Any, *, xl: Labels, yl: Labels, out: Labels, **options: Any
) -> Any:
    back = {**options, "preferred_element_type": None}
    return _cast_cotangent(bilinear(x, ct, xl, out, yl, **back), y.aval.dtype)


def _cast_cotangent(value: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A cotangent in the dtype of its operand; that of a real one is real."""
    if jnp.issubdtype(value.dtype, jnp.complexfloating) > jnp.issubdtype(
        dtype, jnp.complexfloating
    ):
        value = lax.real(value)
    return value.astype(dtype)


def _batch(args: Sequence[jax.Array], dims: Sequence[Any], **params: Any) -> tuple[jax.Array, int]:
    """A mapped axis is one more label: of the operand that has it, and of the result."""
    name = (_BATCH, params["out"])  # nested vmaps need names of their own
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
