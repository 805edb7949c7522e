r"""The quantized_dot primitive: a product that decodes its quantized weight where it is used.

$y = \text{op}(x, \text{decode}(\text{codes}, \text{scales}, \ldots))$, linear in x. It is a
primitive to save memory. Its JVP binds the primitive on the tangent, and its transpose binds it,
transposed, on the cotangent. So the dense weight appears in no jaxpr, no rematerialization policy
can save it, and only codes and scales are saved for the backward pass. When lowered, a barrier
makes the decoding depend on the activation; without it, XLA decodes the weights of all layers early
and keeps them until the backward pass. A custom_vjp would not support jvp, and jax.checkpoint
leaves copies behind.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from lowrank_jax._jax.inlined import call_inlined
from lowrank_jax._jax.jaxprs import Primitive, ShapedArray, has_auto_axes
from lowrank_jax._primitives.few_tokens import Rows, is_cheaper


class PlatformFn:
    """A hashable function with variants for platforms; by default they are the function itself.

    Attributes:
      anchor: the index of the argument that is made to depend on the activation on CPU.
    """

    anchor = 0

    @property
    def on_cpu(self) -> Any:
        """The variant for CPU."""
        return self

    @property
    def on_tpu(self) -> Any:
        """The variant for TPU."""
        return self

    @property
    def on_cuda(self) -> Any:
        """The variant of a decoding that a GPU's compiler fuses into a sum of products."""
        return self

    def __call__(self, *args: Any) -> Any:
        """Apply the function."""
        raise NotImplementedError

    # Of a product: as sums of the products of rows (see `few_tokens`).

    def count_rows(self, x: Any, w: Any, back: bool = False) -> Rows | None:
        """Count the rows of x, or with back those of a cotangent; None if sums are not written.

        x and the decoded weight w have shapes and dtypes.
        """
        return None

    def sum_rows(self, xs: Sequence[jax.Array], w: Any) -> list[jax.Array]:
        """Apply the op to each x by sums."""
        raise NotImplementedError

    def sum_rows_back(self, cts: Sequence[jax.Array], w: Any, like: Any) -> list[jax.Array]:
        """Apply the transpose to each cotangent by sums; like has the shape and dtype of x."""
        raise NotImplementedError


def quantized_dot(
    x: jax.Array, parts: Sequence[jax.Array], op: PlatformFn, decode: PlatformFn
) -> jax.Array:
    """Return op(x, decode(*parts)); the decoded weight is a temporary of this operation.

    Args:
      x: the activation.
      parts: the arrays that the weight is decoded from, codes first; they have no gradient. All but
        the codes pass the barrier, so that codes are read in place, also from a stack of layers.
      op: (x, weight) -> result, linear in x: a product or a convolution.
      decode: parts -> weight.
    """
    if all(map(has_auto_axes, (x, *parts))):
        return call_inlined(_bind, (op, decode), x, *parts)
    # With manual or explicit mesh axes, avals carry more than shape and dtype, which this
    # primitive's rules do not handle; JAX's own operations do.
    return jax.checkpoint(lambda x, *parts: _quantized_dot(x, *parts, op=op, decode=decode))(
        x, *parts
    )


def _bind(op: PlatformFn, decode: PlatformFn, x: jax.Array, *parts: jax.Array) -> jax.Array:
    return quantized_dot_p.bind(x, *parts, op=op, decode=decode)


def _quantized_dot(
    x: jax.Array, *parts: jax.Array, op: PlatformFn, decode: PlatformFn
) -> jax.Array:
    """Lower for any platform: the barrier ties scales and table to the activation."""
    codes, *rest = parts
    x, *rest = lax.optimization_barrier((x, *rest))
    return op(x, decode(codes, *rest))


def _quantized_dot_on_tpu(
    x: jax.Array, *parts: jax.Array, op: PlatformFn, decode: PlatformFn
) -> jax.Array:
    """Lowering for TPU."""
    return _quantized_dot(x, *parts, op=op, decode=decode.on_tpu)


def _quantized_dot_on_cuda(
    x: jax.Array, *parts: jax.Array, op: PlatformFn, decode: PlatformFn
) -> jax.Array:
    """Lowering for CUDA: few rows are summed in fusions that decode each code as they read it."""
    w = jax.eval_shape(decode, *parts)
    rows = op.count_rows(x, w)
    weight, *_ = jax.tree.leaves(w)
    if rows is None or not is_cheaper(rows, weight.size, _count_bytes(parts), weight.dtype):
        return _quantized_dot(x, *parts, op=op, decode=decode)
    codes, *rest = parts
    x, *rest = lax.optimization_barrier((x, *rest))
    return op.sum_rows([x], decode.on_cuda(codes, *rest))[0]


def _quantized_dot_on_cpu(
    x: jax.Array, *parts: jax.Array, op: PlatformFn, decode: PlatformFn
) -> jax.Array:
    """Lowering for CPU, where XLA drops barriers: the codes depend on the activation's values."""
    # min(u, 0) of an unsigned u is 0, but XLA does not simplify it. u is made of the bits of x[0,
    # ..., 0], and codes ^ 0 are the codes, now computed from x. If one entry of a stack is selected
    # by an index, the index (the anchor) is changed so instead, which saves a pass over all codes.
    own, anchor = [*parts], decode.anchor
    corner = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim) if x.size else jnp.zeros((), x.dtype)
    first = corner.reshape(())
    bits = lax.bitcast_convert_type(first.astype(jnp.float32), jnp.uint32)
    own[anchor] ^= jnp.minimum(bits, jnp.uint32(0)).astype(own[anchor].dtype)
    return op.on_cpu(x, decode(*own))


@dataclasses.dataclass(frozen=True)
class _Transposed(PlatformFn):
    """The transpose of an op with respect to its first argument, of this shape and dtype.

    For op(x, w) = x @ w with x [n, in], w [in, out]: maps ct [n, out], w to ct @ w.T [n, in].
    """

    op: PlatformFn
    shape: tuple[int, ...]
    dtype: Any

    is_mapped = False

    @property
    def inner(self) -> PlatformFn:
        """The op."""
        return self.op

    def __call__(self, ct: jax.Array, w: jax.Array) -> jax.Array:
        return self._run(self.op, ct, w)

    @property
    def on_cpu(self) -> Callable:
        """The transpose of the op's variant for CPU."""
        return functools.partial(self._run, self.op.on_cpu)

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of x."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def count_rows(self, x: Any, w: Any, back: bool = False) -> Rows | None:
        """Count the rows of a cotangent; with back, those of the op."""
        return self.op.count_rows(self.like, w, not back)

    def sum_rows(self, xs: Sequence[jax.Array], w: Any) -> list[jax.Array]:
        """Apply the op's transpose by sums."""
        return self.op.sum_rows_back(xs, w, self.like)

    def sum_rows_back(self, cts: Sequence[jax.Array], w: Any, like: Any) -> list[jax.Array]:
        """Apply the op by sums."""
        return [y.astype(like.dtype) for y in self.op.sum_rows(cts, w)]

    def _run(self, op: Callable, ct: jax.Array, w: jax.Array) -> jax.Array:
        aval = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return jax.linear_transpose(lambda x: op(x, w), aval)(ct)[0]


@dataclasses.dataclass(frozen=True)
class _VmappedFn(PlatformFn):
    """jax.vmap of a function; axes are its in_axes."""

    fn: PlatformFn
    axes: tuple[int | None, ...]

    @property
    def inner(self) -> PlatformFn:
        """The function that is mapped."""
        return self.fn

    @property
    def is_mapped(self) -> bool:
        """Whether all arguments are mapped, so that the axis is a batch axis of the product."""
        return None not in self.axes

    def __call__(self, *args: jax.Array) -> jax.Array:
        return jax.vmap(self.fn, self.axes)(*args)

    @property
    def on_cpu(self) -> Callable:
        """jax.vmap of the function's variant for CPU."""
        return jax.vmap(self.fn.on_cpu, self.axes)

    @property
    def anchor(self) -> int:  # type: ignore[override]
        """The anchor of the function."""
        return self.fn.anchor

    @property
    def on_tpu(self) -> _VmappedFn:
        """jax.vmap of the function's variant for TPU."""
        return _VmappedFn(self.fn.on_tpu, self.axes)

    @property
    def on_cuda(self) -> _VmappedFn:
        """jax.vmap of the function's variant for CUDA."""
        return _VmappedFn(self.fn.on_cuda, self.axes)

    def count_rows(self, x: Any, w: Any, back: bool = False) -> Rows | None:
        """Count the rows of one entry; of all entries if one weight is for all."""
        x_dim, w_dim = self.axes
        rows = self.fn.count_rows(drop_axis(x, x_dim), drop_axis(w, w_dim), back)
        if rows is None or w_dim is not None:
            return rows
        return rows._replace(count=rows.count * x.shape[x_dim])

    def sum_rows(self, xs: Sequence[jax.Array], w: Any) -> list[jax.Array]:
        """Sum the rows of all entries if one weight is for all, else map the inner sums."""
        fn, (x_dim, w_dim) = self.fn, self.axes
        if w_dim is not None or x_dim is None:
            return jax.vmap(fn.sum_rows, (x_dim, w_dim))([*xs], w)
        entries = [entry for x in xs for entry in jnp.moveaxis(x, x_dim, 0)]
        return _stack_groups(fn.sum_rows(entries, w), len(xs), 0)

    def sum_rows_back(self, cts: Sequence[jax.Array], w: Any, like: Any) -> list[jax.Array]:
        """The same for the transpose; the cotangents of an x that all entries share are added."""
        fn, (x_dim, w_dim) = self.fn, self.axes
        like = drop_axis(like, x_dim)
        if w_dim is not None or x_dim is None:
            back = jax.vmap(lambda cts, w: fn.sum_rows_back(cts, w, like), (0, w_dim))
            found = back([*cts], w)
            if x_dim is None:
                return [x.sum(0, dtype=x.dtype) for x in found]
            return [jnp.moveaxis(x, 0, x_dim) for x in found]
        entries = [entry for ct in cts for entry in ct]
        return _stack_groups(fn.sum_rows_back(entries, w, like), len(cts), x_dim)


def drop_axis(tree: Any, axis: int | None) -> Any:
    """Return the shapes and dtypes of arrays without an axis."""
    if axis is None:
        return tree
    one = lambda z: jax.ShapeDtypeStruct((*z.shape[:axis], *z.shape[axis + 1 :]), z.dtype)
    return jax.tree.map(one, tree)


def _stack_groups(arrays: Sequence[jax.Array], count: int, axis: int) -> list[jax.Array]:
    """Stack each of `count` groups of as many arrays."""
    size = len(arrays) // count
    return [jnp.stack(arrays[i * size : (i + 1) * size], axis) for i in range(count)]


def _count_bytes(arrays: Sequence[Any]) -> int:
    """Return the size of arrays, two 4-bit numbers a byte."""
    bits = lambda dtype: 4 if dtype == jnp.uint4 else 8 * jnp.dtype(dtype).itemsize
    return sum(array.size * bits(array.dtype) for array in arrays) // 8


def _abstract_eval(
    x: ShapedArray, *parts: ShapedArray, op: PlatformFn, decode: PlatformFn
) -> ShapedArray:
    """Abstract evaluation: the shape and dtype of the product."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *parts)]
    out = jax.eval_shape(lambda x, *parts: op(x, decode(*parts)), *shapes)
    return ShapedArray(out.shape, out.dtype)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    """JVP rule: linear in x; the parts are constants."""
    tangent = ad.instantiate_zeros(tangents[0])
    return quantized_dot_p.bind(*primals, **params), quantized_dot_p.bind(
        tangent, *primals[1:], **params
    )


def _transpose(
    ct: Any, x: ad.UndefinedPrimal, *parts: jax.Array, op: PlatformFn, decode: PlatformFn
) -> list[Any]:
    """Transpose rule: the primitive again, with the transposed op."""
    # The transpose of _Transposed(op), as in second derivatives, is op: wrappers do not nest.
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval)] + [None] * len(parts)
    back = op.op if isinstance(op, _Transposed) else _Transposed(op, x.aval.shape, x.aval.dtype)
    return [quantized_dot_p.bind(ct, *parts, op=back, decode=decode)] + [None] * len(parts)


def _batch(
    args: Sequence[Any], dims: Sequence[Any], *, op: PlatformFn, decode: PlatformFn
) -> tuple:
    """Batching rule: decode once for a mapped activation; decode a stack for mapped codes."""
    # x [b, n, in], codes unmapped: op is mapped over (0, None), and the weight is decoded once.
    # codes [b, ...] mapped: decode is mapped too, to a stack [b, in, out], and op over (0, 0).
    x_dim, *part_dims = dims
    mapped = any(dim is not None for dim in part_dims)
    if mapped:
        decode = _VmappedFn(decode, tuple(part_dims))
    op = _VmappedFn(op, (x_dim, 0 if mapped else None))
    return quantized_dot_p.bind(*args, op=op, decode=decode), 0


quantized_dot_p = Primitive("lowrank_quantized_dot")
quantized_dot_p.def_abstract_eval(_abstract_eval)
quantized_dot_p.def_impl(jax.jit(_quantized_dot, static_argnames=("op", "decode")))
ad.primitive_jvps[quantized_dot_p] = _jvp
ad.primitive_transposes[quantized_dot_p] = _transpose
batching.primitive_batchers[quantized_dot_p] = _batch
mlir.register_lowering(quantized_dot_p, mlir.lower_fun(_quantized_dot, multiple_results=False))
_FORMS = {
    "cpu": _quantized_dot_on_cpu,
    "cuda": _quantized_dot_on_cuda,
    "tpu": _quantized_dot_on_tpu,
}
for name, form in _FORMS.items():
    mlir.register_lowering(
        quantized_dot_p, mlir.lower_fun(form, multiple_results=False), platform=name
    )
