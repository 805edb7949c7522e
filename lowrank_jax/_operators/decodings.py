"""Decoders of quantized weights: one entry of a stack, deferred operations, flat leaves.

A decoder infers the shape of its result from that of the codes by arithmetic, without a trace.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax.types import Shape
from lowrank_jax._nodes.quantized import Decoding, unflatten_blocks
from lowrank_jax._operators.blocks import BlockLayout
from lowrank_jax._primitives.quantized_dot import PlatformFn


@dataclasses.dataclass(frozen=True)
class SelectedDecoding(PlatformFn):
    """Decodes one entry of a stack whose stack axis is not the first axis of its codes.

    The last arguments are the indices of the entries. A loop over such a stack closes over all of
    its codes, and saves one index per step for the backward pass, not a slice of the codes.

    Args:
      decoding: of the whole stack.
      places: for each index, the axis of codes that it selects from, in ascending order.
    """

    decoding: Decoding
    places: tuple[int, ...]

    @property
    def anchor(self) -> int:  # type: ignore[override]
        """The argument that depends on the activation: the last index, not all of the codes."""
        return -1

    @property
    def on_tpu(self) -> SelectedDecoding:
        """The variant for TPU."""
        return dataclasses.replace(self, decoding=self.decoding.on_tpu)

    @property
    def on_cuda(self) -> SelectedDecoding:
        """The variant for CUDA."""
        return dataclasses.replace(self, decoding=self.decoding.on_cuda)

    def select(self, *parts: jax.Array) -> tuple[tuple[jax.Array, ...], Decoding]:
        """Return the parts of the selected entries, and their Decoding."""
        # A weight [4, 128, 6] in blocks of 64 along axis 1, looped over its last axis:
        #     codes [4, 2, 64, 6], trailing 1, places (3,) -> codes [4, 2, 64], trailing 0
        #     scales [4, 2, 6]                             -> scales [4, 2]
        # scales have no ELEMENTS axis, so an axis after it is one lower there (3 -> 2). From the
        # last place to the first, so that removing an axis does not shift those still to come.
        count = len(self.places)
        (codes, scales, table), numbers = parts[:-count], parts[-count:]
        elements = codes.ndim - 1 - self.decoding.trailing
        for place, number in reversed([*zip(self.places, numbers, strict=True)]):
            codes = _take_entry(codes, number, place)
            scales = _take_entry(scales, number, place - (place > elements))
        after = sum(place > elements for place in self.places)
        decoding = dataclasses.replace(
            self.decoding,
            trailing=self.decoding.trailing - after,
            strides=(1,) * scales.ndim,
        )
        return (codes, scales, table), decoding

    def infer_shape(self, codes_shape: Shape) -> Shape:
        """Return the shape of the entry's blocks, from that of the codes of the whole stack."""
        whole = enumerate(self.decoding.infer_shape(codes_shape))
        return tuple(size for axis, size in whole if axis not in self.places)

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Return the decoded blocks of the entry."""
        parts, decoding = self.select(*parts)
        return decoding(*parts)


@dataclasses.dataclass(frozen=True)
class TransformedDecoding(PlatformFn):
    """Decodes a weight, then applies structural operations that blocks do not support.

    Args:
      decoding: of the parts.
      layout: of the decoded array.
      operations: (name, *parameters) of each operation, in order.
    """

    decoding: Decoding | FlatDecoding | SelectedDecoding
    layout: BlockLayout
    operations: tuple[tuple[Any, ...], ...] = ()

    @classmethod
    def of(
        cls,
        decode: Decoding | FlatDecoding | SelectedDecoding | TransformedDecoding,
        layout: BlockLayout,
    ) -> TransformedDecoding:
        """Return a decoding with no operation yet; one that has some keeps them."""
        # Since its last operation the weight may have been transposed, or given axes of size 1, by
        # its labels alone. Append these as operations, so that the array has the weight's axes.
        if not isinstance(decode, TransformedDecoding):
            return cls(decode, layout)
        axes: tuple[Any, ...] = layout.axes
        order = tuple(axes.index(axis) for axis in sorted(axes))
        decode = decode if order == tuple(range(len(order))) else decode.append("transpose", order)
        return decode.append("expand", layout.units) if layout.units else decode

    @property
    def casts(self) -> tuple[str, ...]:
        """Names of the dtypes that the decoded weight is cast to."""
        return tuple(params[0] for name, *params in self.operations if name == "astype")

    @property
    def anchor(self) -> int:  # type: ignore[override]
        """The argument that depends on the activation."""
        return self.decoding.anchor

    @property
    def on_tpu(self) -> TransformedDecoding:
        """The variant for TPU."""
        return dataclasses.replace(self, decoding=self.decoding.on_tpu)

    @property
    def on_cuda(self) -> TransformedDecoding:
        """The variant for CUDA."""
        return dataclasses.replace(self, decoding=self.decoding.on_cuda)

    def append(self, name: str, *params: object) -> TransformedDecoding:
        """Append an operation."""
        return dataclasses.replace(self, operations=(*self.operations, (name, *params)))

    def infer_shape(self, codes_shape: Shape) -> Shape:
        """Return the shape of the dense array after all operations."""
        shape = self.layout.infer_shape(self.decoding.infer_shape(codes_shape))
        for name, *params in self.operations:
            shape = _OPERATION_SHAPES[name](shape, *params)
        return shape

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Return the dense array after all operations."""
        array = self.layout.to_dense(self.decoding(*parts))
        for name, *params in self.operations:
            array = _OPERATIONS[name](array, *params)
        return array


_OPERATIONS = {
    "astype": lambda array, dtype: array.astype(dtype),
    "broadcast": lax.broadcast_in_dim,
    "expand": jnp.expand_dims,
    "reshape": lax.reshape,
    "rev": lax.rev,
    "slice": lax.slice,
    "transpose": lax.transpose,
}
# (shape before the operation, *parameters) -> shape after it
_OPERATION_SHAPES = {
    "astype": lambda shape, _: shape,
    "broadcast": lambda _, new, __: new,
    "expand": lambda shape, axes: _insert_units(shape, axes),
    "reshape": lambda _, new: new,
    "rev": lambda shape, _: shape,
    "slice": lambda _, *cuts: tuple(len(range(*cut)) for cut in zip(*cuts, strict=True)),
    "transpose": lambda shape, order: tuple(shape[axis] for axis in order),
}


def _insert_units(shape: Shape, axes: Shape) -> Shape:
    """Return the shape with axes of size 1 at these places of the result."""
    sizes = iter(shape)
    ndim = len(shape) + len(axes)
    return tuple(1 if axis in axes else next(sizes) for axis in range(ndim))


def _take_entry(array: jax.Array, number: jax.Array, axis: int) -> jax.Array:
    """Return array[..., number, ...], with the index on this axis."""
    starts = [number if i == axis else jnp.zeros_like(number) for i in range(array.ndim)]
    sizes = [1 if i == axis else size for i, size in enumerate(array.shape)]
    return lax.dynamic_slice(array, starts, sizes, allow_negative_indices=False).squeeze(axis)


@dataclasses.dataclass(frozen=True)
class GroupedDecoding(PlatformFn):
    """Decodes all arguments but the last, the group sizes of a ragged product, and returns both."""

    decode: PlatformFn

    def __call__(self, *parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the decoded blocks and the group sizes."""
        *own, sizes = parts
        return self.decode(*own), sizes

    @property
    def anchor(self) -> int:  # type: ignore[override]
        """The argument that depends on the activation."""
        own = self.decode.anchor
        return own - 1 if own < 0 else own  # counted from the end: the sizes come last here

    @property
    def on_tpu(self) -> GroupedDecoding:
        """The variant for TPU."""
        return GroupedDecoding(self.decode.on_tpu)

    @property
    def on_cuda(self) -> Any:
        """The variant for CUDA, which decodes an entry of the stack when it is taken."""
        decode = self.decode.on_cuda
        if not isinstance(decode, Decoding):
            return GroupedDecoding(decode)
        return lambda *parts: (DeferredStack(parts[:-1], decode), parts[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeferredStack:
    """A stack of weights of which entries are decoded as they are taken."""

    parts: tuple[jax.Array, ...]
    decoding: Decoding = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> Shape:
        """Shape of the decoded stack."""
        return self.decoding.infer_shape(self.parts[0].shape)

    def take(self, index: jax.Array, axis: int) -> jax.Array:
        """Slice codes and scales at an entry of an axis and decode them."""
        codes, scales, table, *second = self.parts
        decoding = self.decoding
        if second and axis < second[0].ndim - 1:
            second = [_take_entry(array, index, axis) for array in second]
        elif second:
            scales, second = decoding.scales(scales, *second), []
        elements = codes.ndim - 1 - decoding.trailing
        codes = _take_entry(codes, index, axis)
        scales = _take_entry(scales, index, axis - (axis > elements))
        strides = decoding.strides if second else (1,) * scales.ndim
        trailing = decoding.trailing - (axis > elements)
        return dataclasses.replace(decoding, trailing=trailing, strides=strides)(
            codes, scales, table, *second
        )


@dataclasses.dataclass(frozen=True)
class FlatDecoding(PlatformFn):
    """Decodes a leaf that is stored flat, because its blocks straddle rows, to its dense shape."""

    decoding: Decoding
    blocked: tuple[int, ...]
    order: tuple[int, ...]

    def infer_shape(self, codes_shape: Shape) -> Shape:
        """Return the shape of the dense leaf, from that of its codes [*stack, blocks, block]."""
        inner = dict(zip(self.order, self.blocked, strict=True))
        return (*codes_shape[:-2], *(inner[axis] for axis in sorted(inner)))

    def __call__(self, *parts: jax.Array) -> jax.Array:
        """Return the dense leaf."""
        return unflatten_blocks(self.decoding(*parts), self.blocked, self.order)

    @property
    def on_tpu(self) -> FlatDecoding:
        """The variant for TPU."""
        return dataclasses.replace(self, decoding=self.decoding.on_tpu)

    @property
    def on_cuda(self) -> FlatDecoding:
        """The variant for CUDA."""
        return dataclasses.replace(self, decoding=self.decoding.on_cuda)
