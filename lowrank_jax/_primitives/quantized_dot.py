r"""A product with a quantized weight, decoded where the activation is: a primitive.

$y = \text{op}(x, \text{decode}(\text{codes}, \text{scales}, \ldots))$, linear in x. It is a
primitive for the sake of memory. Its derivative binds itself on the tangent, and its transpose
binds itself, transposed, on the cotangent: the dense weight is in no jaxpr, so no rematerialization
policy can save it, and what is saved for backward is the codes and their scales. And wherever it is
lowered, a barrier ties the decoding to the activation: without one XLA decodes every layer's weight
early and keeps it until backward. A custom_vjp would forbid jvp; jax.checkpoint leaks copies.
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
    """A hashable function, its forms for platforms, and what ties it to an activation.

    Each form is the function itself, unless a subclass has another.

    Attributes:
      anchor: on CPU, the number of the argument that is made to depend on the activation.
    """

    anchor = 0

    @property
    def on_cpu(self) -> Any:
        """The function as XLA on CPU wants it."""
        return self

    @property
    def on_tpu(self) -> Any:
        """The function as XLA on TPU wants it."""
        return self

    def __call__(self, *args: Any) -> Any:
        """The function."""
        raise NotImplementedError


def quantized_dot(
    x: jax.Array, parts: Sequence[jax.Array], op: PlatformFn, decode: PlatformFn
) -> jax.Array:
    """op(x, decode(*parts)), the decoded weight alive only here.

    Args:
      x: the activation.
      parts: the arrays the weight is decoded from; they are constants to every derivative. All
        but the first pass the barrier: the codes are read where they lie, and where they are a
        layer of a stack, not copied out of it.
      op: linear in its first argument: a product, a convolution.
      decode: parts -> the weight.
    """
    if all(map(has_auto_axes, (x, *parts))):
        return quantized_dot_p.bind(x, *parts, op=op, decode=decode)
    # within manual axes, and on explicit meshes, JAX's own rules know the types
    return jax.checkpoint(lambda x, *parts: _quantized_dot(x, *parts, op=op, decode=decode))(
        x, *parts
    )


def _quantized_dot(
    x: jax.Array, *parts: jax.Array, op: PlatformFn, decode: PlatformFn
) -> jax.Array:
    codes, *rest = parts
    x, *rest = lax.optimization_barrier((x, *rest))
    return op(x, decode(codes, *rest))


def _quantized_dot_on_tpu(
    x: jax.Array, *parts: jax.Array, op: PlatformFn, decode: PlatformFn
) -> jax.Array:
    return _quantized_dot(x, *parts, op=op, decode=decode.on_tpu)


def _quantized_dot_on_cpu(
    x: jax.Array, *parts: jax.Array, op: PlatformFn, decode: PlatformFn
) -> jax.Array:
    """XLA on CPU drops barriers and merges the copies: there the codes depend on the activation.

    The least of an unsigned number and 0 is 0, which XLA does not know. Of a stack that is not cut
    up, the number of the layer depends on it in place of all codes.
    """
    own, anchor = [*parts], decode.anchor
    corner = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim) if x.size else jnp.zeros((), x.dtype)
    first = corner.reshape(())
    bits = lax.bitcast_convert_type(first.astype(jnp.float32), jnp.uint32)
    own[anchor] ^= jnp.minimum(bits, jnp.uint32(0)).astype(own[anchor].dtype)
    return op.on_cpu(x, decode(*own))


@dataclasses.dataclass(frozen=True)
class _Transposed(PlatformFn):
    """The transpose of an op in its first argument, which has this shape and dtype."""

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
        """The transpose of the op's own form for CPU."""
        return functools.partial(self._run, self.op.on_cpu)

    def _run(self, op: Callable, ct: jax.Array, w: jax.Array) -> jax.Array:
        aval = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return jax.linear_transpose(lambda x: op(x, w), aval)(ct)[0]


@dataclasses.dataclass(frozen=True)
class _VmappedFn(PlatformFn):
    """A function of arrays along an axis of some of them."""

    fn: PlatformFn
    axes: tuple[int | None, ...]

    @property
    def inner(self) -> PlatformFn:
        """The function of one entry."""
        return self.fn

    @property
    def is_mapped(self) -> bool:
        """Whether all arrays are mapped, so that the axis is one of a batch."""
        return None not in self.axes

    def __call__(self, *args: jax.Array) -> jax.Array:
        return jax.vmap(self.fn, self.axes)(*args)

    @property
    def on_cpu(self) -> Callable:
        """The function's own form for CPU."""
        return jax.vmap(self.fn.on_cpu, self.axes)

    @property
    def anchor(self) -> int:  # type: ignore[override]
        """That of the function."""
        return self.fn.anchor

    @property
    def on_tpu(self) -> _VmappedFn:
        """The function's own form for TPU."""
        return _VmappedFn(self.fn.on_tpu, self.axes)


def _abstract_eval(x: Any, *parts: Any, op: PlatformFn, decode: PlatformFn) -> ShapedArray:
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *parts)]
    out = jax.eval_shape(lambda x, *parts: op(x, decode(*parts)), *shapes)
    return ShapedArray(out.shape, out.dtype)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    """Linear in x; the parts are constants."""
    tangent = ad.instantiate_zeros(tangents[0])
    return quantized_dot_p.bind(*primals, **params), quantized_dot_p.bind(
        tangent, *primals[1:], **params
    )


def _transpose(ct: Any, x: Any, *parts: Any, op: PlatformFn, decode: PlatformFn) -> list[Any]:
    if type(ct) is ad.Zero:
        return [ad.Zero(x.aval)] + [None] * len(parts)
    back = op.op if isinstance(op, _Transposed) else _Transposed(op, x.aval.shape, x.aval.dtype)
    return [quantized_dot_p.bind(ct, *parts, op=back, decode=decode)] + [None] * len(parts)


def _batch(
    args: Sequence[Any], dims: Sequence[Any], *, op: PlatformFn, decode: PlatformFn
) -> tuple:
    """A mapped activation is decoded for once; mapped codes are decoded as a stack."""
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
