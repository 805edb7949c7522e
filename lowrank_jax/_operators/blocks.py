"""Products with the decoded blocks of a quantized weight: what a tied product computes.

Each axis of the decoded blocks carries a label, the axis of the weight that it is now; the axes
that hold the blocks are one run of the weight's axes, cut in two.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._nodes.quantized import Decoding, unflatten_blocks
from lowrank_jax._operators.weight import Options
from lowrank_jax._primitives.bilinear import Labels, labeled_dot, labeled_flat_dot
from lowrank_jax._primitives.contract import arrange
from lowrank_jax._primitives.quantized_dot import PlatformFn

BLOCKS, ELEMENTS = "blocks", "elements"
SELECTED = "picked"  # labels (SELECTED, n) of axes of codes of which one entry is taken


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """How decoded blocks lie in the weight.

    Args:
      axes: for each axis of the decoded array, the weight's axis, or BLOCKS or ELEMENTS.
      blocked: the weight's axes that those two stand for, in order.
      sizes: their sizes.
      units: the weight's axes of size 1 that the decoded array does not have.
    """

    axes: Labels
    blocked: tuple[int, ...]
    sizes: tuple[int, ...]
    units: tuple[int, ...] = ()

    @property
    def ndim(self) -> int:
        """Number of the weight's axes."""
        return len(self.axes) + len(self.units) + (len(self.blocked) - 2 if self.blocked else 0)

    def spec(self, codes: Any) -> Any:
        """The weight's PartitionSpec, from that of its codes."""
        entries = dict(zip(self.axes, codes, strict=False))
        entries |= {axis: entries.get(BLOCKS) for axis in self.blocked[:1]}
        return type(codes)(*(entries.get(axis) for axis in range(self.ndim)))

    def expand(self, labels: Sequence[Any]) -> Labels:
        """Labels with the two axes of blocks in place of the run of axes they stand for."""
        out: list[Any] = []
        for label in labels:
            if label not in self.blocked:
                out.append(label)
            elif label == self.blocked[0]:
                out += [BLOCKS, ELEMENTS]
        return tuple(out)

    def with_units(self, blocks: jax.Array) -> tuple[jax.Array, Labels]:
        """The decoded array with all the weight's axes of size 1, and the labels of its axes."""
        if not self.units:
            return blocks, self.axes
        return blocks.reshape(*blocks.shape, *(1 for _ in self.units)), (*self.axes, *self.units)

    def to_dense(self, blocks: jax.Array) -> jax.Array:
        """The dense weight, in the order of its axes."""
        blocks, axes = self.with_units(blocks)
        order = self.expand(range(self.ndim))
        extent = dict(zip(axes, blocks.shape, strict=True))
        extent |= dict(zip(self.blocked, self.sizes, strict=True))
        shape = [extent[axis] for axis in range(self.ndim)]
        return arrange(blocks, axes, order, extent).reshape(shape)


def is_consecutive(axes: Sequence[int]) -> bool:
    """Whether axes are consecutive."""
    return all(b == a + 1 for a, b in itertools.pairwise(axes))


def is_selected(label: Any) -> bool:
    """Whether a label is of an axis of which one entry is taken."""
    return isinstance(label, tuple) and label[0] == SELECTED


def freeze_options(options: Options) -> tuple[tuple[str, Any], ...]:
    """Options of a product, hashable; how its result lies is said of the whole."""
    return tuple(sorted((k, v) for k, v in options.items() if k != "out_sharding"))


@dataclasses.dataclass(frozen=True)
class BlockDot(PlatformFn):
    """lax.dot_general of an activation and decoded blocks, linear in the activation."""

    layout: BlockLayout
    numbers: Any
    on_left: bool
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product, in the order of axes that the user's equation has."""
        return self._run(labeled_dot, x, w)

    @property
    def on_cpu(self) -> Callable:
        """As a product of two matrices."""
        return functools.partial(self._run, labeled_flat_dot)

    def _run(self, product: Any, x: jax.Array, w: jax.Array) -> jax.Array:
        layout = self.layout
        (lc, rc), (lb, rb) = self.numbers
        mine, theirs = ((lc, lb), (rc, rb)) if self.on_left else ((rc, rb), (lc, lb))
        own_labels: list[Any] = [("x", i) for i in range(x.ndim)]
        for own, others in zip(mine, theirs, strict=True):
            for axis, other in zip(own, others, strict=True):
                own_labels[other] = axis
        bound = {*mine[0], *mine[1]}
        free = layout.expand([axis for axis in range(layout.ndim) if axis not in bound])
        x_free = [label for label in own_labels if isinstance(label, tuple)]
        x, labels = self._split_contracted(x, own_labels, w)
        out = (*mine[1], *free, *x_free) if self.on_left else (*mine[1], *x_free, *free)
        w, axes = layout.with_units(w)
        pair = (w, x, axes, labels) if self.on_left else (x, w, labels, axes)
        y = product(*pair, out, **dict(self.options))
        if BLOCKS in out:
            at = out.index(BLOCKS)
            y = y.reshape(*y.shape[:at], *layout.sizes, *y.shape[at + 2 :])
        return y

    def _split_contracted(
        self, x: jax.Array, labels: list[Any], w: jax.Array
    ) -> tuple[jax.Array, Labels]:
        """The activation with the contracted axes of blocks cut in two, as the weight's are."""
        blocked = self.layout.blocked
        if not blocked or blocked[0] not in labels:
            return x, tuple(labels)
        at = [labels.index(axis) for axis in blocked]
        if not is_consecutive(at):
            order = [i for i in range(x.ndim) if i not in at] + at
            x, labels = lax.transpose(x, order), [labels[i] for i in order]
            at = list(range(x.ndim - len(at), x.ndim))
        cut = [w.shape[self.layout.axes.index(name)] for name in (BLOCKS, ELEMENTS)]
        x = x.reshape(*x.shape[: at[0]], *cut, *x.shape[at[-1] + 1 :])
        # Else XLA on TPU merges the two axes in backward's product, on the weight's side too, and
        # what decodes it is no longer part of the product.
        x = lax.optimization_barrier(x)
        return x, (*labels[: at[0]], BLOCKS, ELEMENTS, *labels[at[-1] + 1 :])


@dataclasses.dataclass(frozen=True)
class BlockConv(PlatformFn):
    """lax.conv_general_dilated with a decoded kernel."""

    layout: BlockLayout
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The convolution of x with the blocks' dense kernel."""
        return lax.conv_general_dilated(x, self.layout.to_dense(w), **dict(self.options))


@dataclasses.dataclass(frozen=True)
class BlockRaggedDot(PlatformFn):
    """lax.ragged_dot_general with a decoded weight for each group of rows."""

    layout: BlockLayout
    numbers: Any
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array, groups: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The product of each group of rows with its weight; groups: the blocks, and the sizes."""
        w, sizes = groups
        dense = self.layout.to_dense(w)
        return lax.ragged_dot_general(x, dense, sizes, self.numbers, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class SelectedDecoding(PlatformFn):
    """Decodes one entry of a stack whose axis is not the first of its codes.

    The last parts are the numbers of the entries: a loop over such a stack closes over the whole of
    its codes, and what it keeps for backward is a number for each step, not a slice of codes.

    Args:
      decoding: that of the whole stack.
      places: for each number, the axis of codes that it selections from, ascending.
    """

    decoding: Decoding
    places: tuple[int, ...]

    @property
    def anchor(self) -> int:  # type: ignore[override]
        """The part to tie to the activation: a number of the last ones, not all of the codes."""
        return -1

    @property
    def on_tpu(self) -> SelectedDecoding:
        """The same, decoded as TPUs want it."""
        return dataclasses.replace(self, decoding=self.decoding.on_tpu)

    def select(self, *parts: Any) -> tuple[tuple[Any, ...], Decoding]:
        """The parts of the entry, and how they become numbers."""
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

    def __call__(self, *parts: Any) -> jax.Array:
        """The decoded blocks of the entry."""
        parts, decoding = self.select(*parts)
        return decoding(*parts)


@dataclasses.dataclass(frozen=True)
class TransformedDecoding(PlatformFn):
    """Decodes a weight and leads it through structural operations that its blocks cannot follow.

    Args:
      decoding: of the parts.
      layout: of what that decodes.
      operations: (name, *parameters) of each, in order.
    """

    decoding: PlatformFn
    layout: BlockLayout
    operations: tuple[tuple[Any, ...], ...] = ()

    @classmethod
    def of(cls, decode: Any, layout: BlockLayout) -> TransformedDecoding:
        """No operation yet; what has some already goes on from there, in the order of its axes."""
        if not isinstance(decode, cls):
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
        """The part to tie to the activation."""
        return self.decoding.anchor

    @property
    def on_tpu(self) -> TransformedDecoding:
        """The same, decoded as TPUs want it."""
        return dataclasses.replace(self, decoding=self.decoding.on_tpu)

    def append(self, name: str, *params: Any) -> TransformedDecoding:
        """One operation more."""
        return dataclasses.replace(self, operations=(*self.operations, (name, *params)))

    def __call__(self, *parts: Any) -> jax.Array:
        """The dense array after all operations."""
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


def _take_entry(array: jax.Array, number: jax.Array, axis: int) -> jax.Array:
    """array[..., number, ...], number being one of the axis."""
    starts = [number if i == axis else jnp.zeros_like(number) for i in range(array.ndim)]
    sizes = [1 if i == axis else size for i, size in enumerate(array.shape)]
    return lax.dynamic_slice(array, starts, sizes, allow_negative_indices=False).squeeze(axis)


@dataclasses.dataclass(frozen=True)
class GroupedDecoding(PlatformFn):
    """Decodes all parts but the last, the sizes of the groups, which go along."""

    decode: PlatformFn

    def __call__(self, *parts: Any) -> tuple[jax.Array, jax.Array]:
        """The decoded blocks, and the sizes as they came."""
        *own, sizes = parts
        return self.decode(*own), sizes

    @property
    def anchor(self) -> int:  # type: ignore[override]
        """The part to tie to the activation."""
        own = self.decode.anchor
        return own - 1 if own < 0 else own

    @property
    def on_tpu(self) -> GroupedDecoding:
        """The same, decoded as TPUs want it."""
        return GroupedDecoding(self.decode.on_tpu)


@dataclasses.dataclass(frozen=True)
class FlatDecoding(PlatformFn):
    """Decodes a leaf kept flat into its dense shape: blocks that straddle its rows."""

    decoding: Decoding
    blocked: tuple[int, ...]
    order: tuple[int, ...]

    def __call__(self, *parts: Any) -> jax.Array:
        """The dense leaf."""
        return unflatten_blocks(self.decoding(*parts), self.blocked, self.order)

    @property
    def on_tpu(self) -> FlatDecoding:
        """The same, decoded as TPUs want it."""
        return dataclasses.replace(self, decoding=self.decoding.on_tpu)


@functools.lru_cache(maxsize=4096)
def decoded_shape(decode: Any, *parts: tuple[tuple[int, ...], Any]) -> tuple[int, ...]:
    """The shape of what parts of these shapes and dtypes decode to."""
    return jax.eval_shape(decode, *(jax.ShapeDtypeStruct(*part) for part in parts)).shape
