"""Views: the elements of a leaf, rearranged, and for each axis of the view the axes of the leaf.

A dry run follows views through structural operations, so that it can tell at a product which axes
of a leaf are contracted, kept, or enumerate independent weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax import lax

from lowrank_jax._primitives.contract import reshape_groups

Axes = frozenset[int]
Key = tuple[int, ...]  # an equation, preceded by the equations that enclose it
NO_AXES: Axes = frozenset()

# An axis of the leaf and the size of the part of it that runs along an axis of the view, the slower
# part first. Axis -1 is not of the leaf (a broadcast), size 0 an unknown part.
Part = tuple[int, int]
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Roles:
    """Axes of a leaf that one equation contracts (fan_in), keeps (fan_out), enumerates (stack).

    `provisional` are the roles in a product of parameters alone, which one with data overrules.
    """

    op: str
    fan_in: Axes
    fan_out: Axes
    stack: Axes
    provisional: bool = False


@dataclasses.dataclass(frozen=True)
class View:
    """The elements of one leaf in another arrangement.

    Args:
      path: of the leaf.
      shape: of the array that they stand in.
      dims: for each of its axes, the parts of axes of the leaf that run along it.
      spans: for each of its axes, where the elements of the leaf stand (others are joined to them).
      selected: axes of the leaf of which one index was taken: a loop over stacked weights.
      chosen: those of them whose index depends on data.
      looked_up: axes read by an array of indices: stacked if a product follows, rows if none does.
      summed: axes contracted with another parameter.
      stretched: for each array that the view was multiplied by, the axes that it runs along.
      slices: for each scan that the view is a slice of: its equation, and the axis it runs over.
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[tuple[Part, ...], ...]
    spans: tuple[Span, ...]
    selected: Axes = NO_AXES
    chosen: Axes = NO_AXES
    looked_up: Axes = NO_AXES
    summed: Axes = NO_AXES
    stretched: tuple[Axes, ...] = ()
    slices: tuple[tuple[Key, tuple[Part, ...]], ...] = ()

    @classmethod
    def of(cls, path: str, shape: Sequence[int]) -> View:
        """A whole leaf."""
        dims = tuple(((axis, size),) for axis, size in enumerate(shape))
        return cls(path, tuple(shape), dims, tuple((0, size) for size in shape))

    def arrange(
        self,
        shape: Sequence[int],
        dims: Iterable[Any],
        spans: Iterable[Span] | None = None,
        **changes: Any,
    ) -> View:
        """The view with other axes; without spans its elements may stand anywhere along them."""
        shape = tuple(shape)
        spans = tuple((0, size) for size in shape) if spans is None else tuple(spans)
        pairs = zip(dims, spans, strict=True)
        fitted = tuple(_fit_parts(parts, stop - start) for parts, (start, stop) in pairs)
        return dataclasses.replace(self, shape=shape, dims=fitted, spans=spans, **changes)

    def find_axes(self, places: Iterable[int]) -> Axes:
        """The axes of the leaf that run along these axes of the view."""
        return frozenset(axis for place in places for axis, _ in self.dims[place] if axis >= 0)

    def is_matrix(self) -> bool:
        """Whether two or more axes of the leaf larger than 1 are left."""
        parts = {axis for dims in self.dims for axis, size in dims if axis >= 0 and size != 1}
        return len(parts | self.summed) > 1

    def has_vectors(self) -> bool:
        """Whether the rows that are looked up are vectors, which no product takes as a weight."""
        return len(self.find_axes(range(len(self.shape))) - self.looked_up - self.selected) <= 1

    def scale_axes(self, shape: Sequence[int], axes: Iterable[int]) -> View:
        """The view times an array that runs along these of its axes."""
        view = self.reshape(shape)
        return dataclasses.replace(view, stretched=(*self.stretched, view.find_axes(axes)))

    def is_masked(self, contracted: Iterable[int], free: Iterable[int]) -> bool:
        """Whether an array that multiplied it runs along contracted and kept axes at once."""
        both = self.find_axes(contracted), self.find_axes(free)
        return any(axes & both[0] and axes & both[1] for axes in self.stretched)

    def resize(self, shape: Sequence[int]) -> View:
        """The same axes of other sizes: the part on one device, or the whole of such parts."""
        return self if tuple(shape) == self.shape else self.arrange(shape, self.dims)

    # Structural operations.

    def transpose(self, order: Sequence[int]) -> View:
        """Permute the axes."""
        take = lambda items: [items[axis] for axis in order]
        return self.arrange(take(self.shape), take(self.dims), take(self.spans))

    def reshape(self, shape: Sequence[int]) -> View:
        """Split or merge axes; where parts do not fit the new axes, all of these share them."""
        shape = tuple(shape)
        if 0 in shape:
            parts = tuple((axis, 0) for dims in self.dims for axis, _ in dims)
            return self.arrange(shape, [parts] * len(shape))
        dims: list[Any] = [((-1, size),) for size in shape]
        spans = [(0, size) for size in shape]
        for old, new in reshape_groups(self.shape, shape):
            if len(old) == len(new) == 1:
                dims[new[0]], spans[new[0]] = self.dims[old[0]], self.spans[old[0]]
                continue
            parts = tuple(part for axis in old for part in self.dims[axis])
            for axis, own in zip(new, _distribute(parts, [shape[a] for a in new]), strict=True):
                dims[axis] = own
        return self.arrange(shape, dims, spans)

    def broadcast(
        self, shape: Sequence[int], axes: Sequence[int], fn: Callable | None = None
    ) -> View:
        """lax.broadcast_in_dim, which fn is: axis i becomes axis axes[i] of shape."""
        dims: list[Any] = [((-1, size),) for size in shape]
        spans = [(0, size) for size in shape]
        for old, new in enumerate(axes):
            if self.shape[old] == shape[new]:
                dims[new], spans[new] = self.dims[old], self.spans[old]
        return self.arrange(shape, dims, spans)

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
    ) -> View | None:
        """lax.slice, or None where no element of the leaf is in it."""
        view: View | None = self
        for axis, cut in enumerate(zip(starts, limits, strides, strict=True)):
            if view is not None and cut != (0, view.shape[axis], 1):
                view = view.slice_axis(axis, *cut)
        return view

    def take_index(self, axis: int, number: int) -> View | None:
        """One entry of an axis, which is then gone; None where no element of the leaf is in it."""
        one = self.slice_axis(axis, number, number + 1)
        rest = self.shape[:axis] + self.shape[axis + 1 :]
        return None if one is None else one.reshape(rest)

    def slice_axis(self, axis: int, start: int, stop: int, step: int = 1) -> View | None:
        """Part of one axis, or None where no element of the leaf is in it."""
        size = max(0, -(-(stop - start) // step))
        low, high = self.spans[axis]
        low = max(0, -(-(low - start) // step))
        high = min(size, -(-(high - start) // step))
        return self._cut_axis(axis, size, (low, high)) if low < high else None

    def dynamic_slice(self, axis: int, size: int, data: bool) -> View:
        """Part of one axis from an unknown start; data: whether that depends on data."""
        cut = self._cut_axis(axis, size, (0, size))
        chosen = cut.selected - self.selected if data else NO_AXES
        return dataclasses.replace(cut, chosen=self.chosen | chosen)

    def _cut_axis(self, axis: int, size: int, span: Span) -> View:
        """One axis made shorter; where one index is left, its axes are selected from."""
        one = size == 1 and self.shape[axis] > 1
        replaced = lambda items, item: [*items[:axis], item, *items[axis + 1 :]]
        return self.arrange(
            replaced(self.shape, size),
            replaced(self.dims, () if one else self.dims[axis]),
            replaced(self.spans, span),
            selected=self.selected | (self.find_axes([axis]) if one else NO_AXES),
        )

    def rev(self, axes: Sequence[int]) -> View:
        """lax.rev: flip axes."""
        spans = [
            (size - stop, size - start) if axis in axes else (start, stop)
            for axis, (size, (start, stop)) in enumerate(zip(self.shape, self.spans, strict=True))
        ]
        return self.arrange(self.shape, self.dims, spans)

    def pad(self, config: Sequence[tuple[int, int, int]]) -> View:
        """Other elements around (or, with inner padding, between) those of the leaf."""
        shape, spans = [], []
        for size, (start, stop), (low, high, inner) in zip(
            self.shape, self.spans, config, strict=True
        ):
            shape.append(low + size + max(0, size - 1) * inner + high)
            inside = (max(0, low + start), min(shape[-1], low + stop))
            spans.append((0, shape[-1]) if inner else inside)
        return self.arrange(shape, self.dims, spans)

    def join(self, axis: int, shape: Sequence[int], offset: int) -> View:
        """The view within a concatenation along an axis, from an offset on."""
        spans = [
            (start + offset, stop + offset) if i == axis else (start, stop)
            for i, (start, stop) in enumerate(self.spans)
        ]
        return self.arrange(shape, self.dims, spans)

    def slice_scan(self, scan: Key) -> View:
        """One slice of the leading axis, in the body of a scan."""
        return self.arrange(
            self.shape[1:],
            self.dims[1:],
            self.spans[1:],
            selected=self.selected | self.find_axes([0]),
            slices=((scan, self.dims[0]), *self.slices),
        )

    def stack_scan(self, scan: Key, length: int) -> View:
        """What a scan makes of a view that its body returns: the slices stacked again."""
        dims, spans = ((-1, length),), [(0, length), *self.spans]
        mine = self.slices and self.slices[0][0] == scan
        if not mine:
            return self.arrange((length, *self.shape), (dims, *self.dims), spans)
        (_, dims), *rest = self.slices
        selected = self.selected - frozenset(axis for axis, _ in dims)
        whole = (length, *self.shape), (dims, *self.dims), spans
        return self.arrange(*whole, selected=selected, slices=tuple(rest))

    def gather(
        self,
        numbers: lax.GatherDimensionNumbers,
        sizes: Sequence[int],
        shape: Sequence[int],
        data: bool,
        many: bool,
    ) -> View:
        """lax.gather: an axis whose slice is whole is not indexed.

        data: whether the indices depend on data; many: whether there are more than one.
        """
        batching = numbers.operand_batching_dims
        gone = {*numbers.collapsed_slice_dims, *batching}
        cut = [axis for axis in range(len(sizes)) if sizes[axis] != self.shape[axis]]
        indexed = [axis for axis in numbers.start_index_map if axis in cut]
        rows = self.find_axes(indexed)
        dims: list[Any] = [((-1, size),) for size in shape]
        kept = [axis for axis in range(len(sizes)) if axis not in gone]
        for place, axis in zip(numbers.offset_dims, kept, strict=True):
            # of an indexed axis one row is left, or a window of them
            dims[place] = () if axis in indexed and sizes[axis] == 1 else self.dims[axis]
        batch = [place for place in range(len(shape)) if place not in numbers.offset_dims]
        for axis, place in zip(batching, numbers.start_indices_batching_dims, strict=True):
            dims[batch[place]] = self.dims[axis]
        if many:
            chosen, looked_up = self.chosen, self.looked_up | rows
        else:
            chosen, looked_up = self.chosen | (rows if data else NO_AXES), self.looked_up
        selected = self.selected | self.find_axes(batching) | (NO_AXES if many else rows)
        return self.arrange(
            shape, dims, None, selected=selected, chosen=chosen, looked_up=looked_up
        )

    def contract(
        self, shape: Sequence[int], places: Sequence[int | None], contracted: Sequence[int]
    ) -> View:
        """The view within a product with another parameter: places are its axes in the result."""
        dims = [
            ((-1, size),) if place is None else self.dims[place]
            for place, size in zip(places, shape, strict=True)
        ]
        return self.arrange(shape, dims, None, summed=self.summed | self.find_axes(contracted))

    # What an equation that consumes the view says of the leaf.

    def find_product_roles(
        self,
        op: str,
        contracted: Sequence[int],
        batch: Sequence[int],
        free: Sequence[int],
        provisional: bool = False,
    ) -> Roles:
        """A product: an axis contracted anywhere is fan-in, one kept anywhere fan-out."""
        fan_in, free_axes = self.find_axes(contracted), self.find_axes(free)
        if not fan_in:
            fan_in = self.summed - free_axes
        fan_out = free_axes - fan_in or self.summed - fan_in
        if self.looked_up and not fan_out:
            return self.find_lookup_roles(self.looked_up)
        stack = (self.find_axes(batch) | self.selected | self.looked_up) - fan_in - fan_out
        return Roles(op, fan_in, fan_out, stack, provisional)

    def find_lookup_roles(self, rows: Axes) -> Roles:
        """A look-up of these axes."""
        rest = self.find_axes(range(len(self.shape))) - rows
        stack = self.selected - rows
        return Roles("lookup", rows, rest - stack, stack)

    def find_read_roles(self, by_rows: bool) -> Roles | None:
        """A use other than a product; by_rows: a row that data chose is a look-up."""
        rows = self.looked_up | (self.chosen if by_rows else NO_AXES)
        return self.find_lookup_roles(rows) if rows else None


def _fit_parts(parts: tuple[Part, ...], size: int) -> tuple[Part, ...]:
    """The parts along a span of this size; sizes that no longer multiply to it are unknown."""
    if math.prod(part for _, part in parts) == size:
        return parts
    if len(parts) == 1 and parts[0][1]:
        return ((parts[0][0], size),)
    return tuple((axis, 0) for axis, _ in parts)


def _distribute(parts: tuple[Part, ...], sizes: Sequence[int]) -> list[tuple[Part, ...]]:
    """Parts, the slowest first, along axes of these sizes; where they do not fit, all along each.

    >>> _distribute(((0, 4), (1, 6)), [4, 2, 3])
    [((0, 4),), ((1, 2),), ((1, 3),)]
    >>> _distribute(((0, 4), (1, 6)), [3, 8])
    [((0, 0), (1, 0)), ((0, 0), (1, 0))]
    """
    shared = tuple((axis, 0) for axis, _ in parts)
    if math.prod(size for _, size in parts) != math.prod(sizes):
        return [shared] * len(sizes)
    rest, out = list(parts), []
    for size in sizes:
        own: list[Part] = []
        while size > 1:
            axis, part = rest.pop(0)
            if size % part == 0:
                own.append((axis, part))
                size //= part
            elif part % size == 0:
                own.append((axis, size))
                rest.insert(0, (axis, part // size))
                size = 1
            else:
                return [shared] * len(sizes)
        out.append(tuple(own))
    return out
