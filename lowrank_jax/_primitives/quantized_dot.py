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

from lowrank_jax._jax.jaxprs import Primitive, ShapedArray, has_auto_axes


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

    def __call__(self, *args: Any) -> Any:
        """Apply the function."""
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
        return quantized_dot_p.bind(x, *parts, op=op, decode=decode)
    # With manual or explicit mesh axes, avals carry more than shape and dtype, which this
    # primitive's rules do not handle; JAX's own operations do.
    return jax.checkpoint(lambda x, *parts: _quantized_dot(x, *parts, op=op, decode=decode))(
        x, *parts
    )


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
for name, form in {"cpu": _quantized_dot_on_cpu, "tpu": _quantized_dot_on_tpu}.items():
    mlir.register_lowering(
        quantized_dot_p, mlir.lower_fun(form, multiple_results=False), platform=name
    )
