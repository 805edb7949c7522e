"""Views of a leaf: its elements rearranged, with the axes of the leaf along each axis of the view.

The dry run follows views through structural operations, so that it knows at a product which axes of
a leaf are contracted (fan-in), kept (fan-out), or enumerate independent weights (stack).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax import lax

from lowrank_jax._interpreter.parts import Part, distribute_parts, fit_parts
from lowrank_jax._interpreter.roles import NO_AXES, Axes, Roles
from lowrank_jax._primitives.contract import reshape_groups

Key = tuple[int, ...]  # an equation, preceded by the equations that enclose it
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class View:
    """The elements of a leaf, rearranged.

    Args:
      path: path of the leaf.
      shape: shape of the array that holds the elements.
      dims: for each axis of the array, the parts of the leaf's axes that run along it.
      spans: for each axis of the array, the (start, stop) of the elements of the leaf. Other
        elements, concatenated or padded, are outside.
      selected: axes of the leaf of which one index was taken, as by a loop over stacked weights.
      chosen: those of them whose index depends on data.
      looked_up: axes read by an array of indices: stack axes if a product follows, else rows.
      summed: axes contracted with another parameter.
      multiplied: for each array that the view was multiplied by, the leaf's axes that it spans.
      slices: for each scan that the view is a slice of, its equation and the parts scanned over.

    >>> View.of("w", (4, 6)).transpose((1, 0)).reshape((6, 2, 2)).dims
    (((1, 6),), ((0, 2),), ((0, 2),))
    """

    # How q = x @ w.reshape(16, 4, 8), a head projection of w [16, 32], is followed:
    #   leaf w          shape (16, 32)    dims ((0, 16)), ((1, 32))
    #   reshape         shape (16, 4, 8)  dims ((0, 16)), ((1, 4)), ((1, 8))
    #   dot_general     contracts view axis 0, keeps 1 and 2: fan_in {0}, fan_out {1} of the leaf.
    # A concatenation of k [16, 8] and v [16, 8] along axis 1, [16, 16], has the view of v at spans
    # ((0, 16), (8, 16)). Its slice [:, :8] holds no element of v, and the view of v ends there.

    path: str
    shape: tuple[int, ...]
    dims: tuple[tuple[Part, ...], ...]
    spans: tuple[Span, ...]
    selected: Axes = NO_AXES
    chosen: Axes = NO_AXES
    looked_up: Axes = NO_AXES
    summed: Axes = NO_AXES
    multiplied: tuple[Axes, ...] = ()
    slices: tuple[tuple[Key, tuple[Part, ...]], ...] = ()

    @classmethod
    def of(cls, path: str, shape: Sequence[int]) -> View:
        """Return the view of a whole leaf."""
        dims = tuple(((axis, size),) for axis, size in enumerate(shape))
        return cls(path, tuple(shape), dims, tuple((0, size) for size in shape))

    def arrange(
        self,
        shape: Sequence[int],
        dims: Iterable[Any],
        spans: Iterable[Span] | None = None,
        **changes: Any,
    ) -> View:
        """Return the view with other axes; without spans, its elements are anywhere along them."""
        shape = tuple(shape)
        spans = tuple((0, size) for size in shape) if spans is None else tuple(spans)
        pairs = zip(dims, spans, strict=True)
        fitted = tuple(fit_parts(parts, stop - start) for parts, (start, stop) in pairs)
        return dataclasses.replace(self, shape=shape, dims=fitted, spans=spans, **changes)

    def find_axes(self, places: Iterable[int]) -> Axes:
        """Return the axes of the leaf that run along the given axes of the view."""
        return frozenset(axis for place in places for axis, _ in self.dims[place] if axis >= 0)

    def is_matrix(self) -> bool:
        """Whether at least two axes of the leaf of a size other than 1 are left."""
        parts = {axis for dims in self.dims for axis, size in dims if axis >= 0 and size != 1}
        return len(parts | self.summed) > 1

    def has_vectors(self) -> bool:
        """Whether the rows that were looked up are vectors, which are not weights of a product."""
        return len(self.find_axes(range(len(self.shape))) - self.looked_up - self.selected) <= 1

    def scale_axes(self, shape: Sequence[int], axes: Iterable[int]) -> View:
        """Return the view times an array that spans the given axes of it."""
        view = self.reshape(shape)
        return dataclasses.replace(view, multiplied=(*self.multiplied, view.find_axes(axes)))

    def is_masked(self, contracted: Iterable[int], free: Iterable[int]) -> bool:
        """Whether an array along both contracted and kept axes (a mask) multiplied the view."""
        both = self.find_axes(contracted), self.find_axes(free)
        return any(axes & both[0] and axes & both[1] for axes in self.multiplied)

    def resize(self, shape: Sequence[int]) -> View:
        """Return the view with other axis sizes: one device's shard, or the whole of all shards."""
        return self if tuple(shape) == self.shape else self.arrange(shape, self.dims)

    # Structural operations.

    def transpose(self, order: Sequence[int]) -> View:
        """lax.transpose."""
        take = lambda items: [items[axis] for axis in order]
        return self.arrange(take(self.shape), take(self.dims), take(self.spans))

    def reshape(self, shape: Sequence[int]) -> View:
        """lax.reshape; parts that do not fit the new axes run along all of them."""
        shape = tuple(shape)
        if 0 in shape:
            parts = tuple((axis, 0) for dims in self.dims for axis, _ in dims)
            return self.arrange(shape, [parts] * len(shape))
        dims: list[Any] = [((-1, size),) for size in shape]
        spans = [(0, size) for size in shape]
        # (4, 6, 5) -> (24, 5) has the groups of axes ([0, 1], [0]) and ([2], [1]). An axis that is
        # kept keeps its span; the parts of a group are distributed over its new axes.
        for old, new in reshape_groups(self.shape, shape):
            if len(old) == len(new) == 1:
                dims[new[0]], spans[new[0]] = self.dims[old[0]], self.spans[old[0]]
                continue
            parts = tuple(part for axis in old for part in self.dims[axis])
            for axis, own in zip(
                new, distribute_parts(parts, [shape[a] for a in new]), strict=True
            ):
                dims[axis] = own
        return self.arrange(shape, dims, spans)

    def broadcast(
        self, shape: Sequence[int], axes: Sequence[int], fn: Callable | None = None
    ) -> View:
        """lax.broadcast_in_dim: axis i becomes axis axes[i] of the result; `fn` is not called."""
        dims: list[Any] = [((-1, size),) for size in shape]
        spans = [(0, size) for size in shape]
        for old, new in enumerate(axes):
            if self.shape[old] == shape[new]:
                dims[new], spans[new] = self.dims[old], self.spans[old]
        return self.arrange(shape, dims, spans)

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
    ) -> View | None:
        """lax.slice, or None if it contains no element of the leaf."""
        view: View | None = self
        for axis, cut in enumerate(zip(starts, limits, strides, strict=True)):
            if view is not None and cut != (0, view.shape[axis], 1):
                view = view.slice_axis(axis, *cut)
        return view

    def take_index(self, axis: int, number: int) -> View | None:
        """Take one index of an axis, which is removed; None if it holds no element of the leaf."""
        one = self.slice_axis(axis, number, number + 1)
        rest = self.shape[:axis] + self.shape[axis + 1 :]
        return None if one is None else one.reshape(rest)

    def slice_axis(self, axis: int, start: int, stop: int, step: int = 1) -> View | None:
        """Slice one axis, or return None if the slice contains no element of the leaf."""
        # Old index i becomes (i - start) / step, rounded up at both ends of the span: the elements
        # [8, 16) of an axis of 16, sliced [2:16:3] to the indices 2, 5, 8, 11, 14, are at [2, 5).
        size = max(0, -(-(stop - start) // step))
        low, high = self.spans[axis]
        low = max(0, -(-(low - start) // step))
        high = min(size, -(-(high - start) // step))
        return self._cut_axis(axis, size, (low, high)) if low < high else None

    def dynamic_slice(self, axis: int, size: int, data: bool) -> View:
        """Slice one axis from an unknown start; `data`: whether the start depends on data."""
        cut = self._cut_axis(axis, size, (0, size))
        chosen = cut.selected - self.selected if data else NO_AXES
        return dataclasses.replace(cut, chosen=self.chosen | chosen)

    def _cut_axis(self, axis: int, size: int, span: Span) -> View:
        """Shorten one axis; if one index of it is left, its parts of the leaf become selected."""
        one = size == 1 and self.shape[axis] > 1
        replaced = lambda items, item: [*items[:axis], item, *items[axis + 1 :]]
        return self.arrange(
            replaced(self.shape, size),
            replaced(self.dims, () if one else self.dims[axis]),
            replaced(self.spans, span),
            selected=self.selected | (self.find_axes([axis]) if one else NO_AXES),
        )

    def rev(self, axes: Sequence[int]) -> View:
        """lax.rev."""
        spans = [
            (size - stop, size - start) if axis in axes else (start, stop)
            for axis, (size, (start, stop)) in enumerate(zip(self.shape, self.spans, strict=True))
        ]
        return self.arrange(self.shape, self.dims, spans)

    def pad(self, config: Sequence[tuple[int, int, int]]) -> View:
        """lax.pad: other elements around, or with interior padding between, those of the leaf."""
        shape, spans = [], []
        for size, (start, stop), (low, high, inner) in zip(
            self.shape, self.spans, config, strict=True
        ):
            shape.append(low + size + max(0, size - 1) * inner + high)
            inside = (max(0, low + start), min(shape[-1], low + stop))
            spans.append((0, shape[-1]) if inner else inside)
        return self.arrange(shape, self.dims, spans)

    def join(self, axis: int, shape: Sequence[int], offset: int) -> View:
        """Return the view within a concatenation along an axis, at an offset."""
        spans = [
            (start + offset, stop + offset) if i == axis else (start, stop)
            for i, (start, stop) in enumerate(self.spans)
        ]
        return self.arrange(shape, self.dims, spans)

    def slice_scan(self, scan: Key) -> View:
        """Return a slice of the leading axis, in the body of a scan."""
        return self.arrange(
            self.shape[1:],
            self.dims[1:],
            self.spans[1:],
            selected=self.selected | self.find_axes([0]),
            slices=((scan, self.dims[0]), *self.slices),
        )

    def stack_scan(self, scan: Key, length: int) -> View:
        """Return the stack that a scan makes of a view that its body returns."""
        # A slice of this very scan becomes the stack that it was taken from: its axis is the leaf's
        # again, and no longer selected. Any other view is repeated along a new axis.
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
        """lax.gather.

        Args:
          numbers: its dimension numbers.
          sizes: its slice sizes.
          shape: shape of the result.
          data: whether the indices depend on data.
          many: whether there is more than one index.
        """
        # Three cases, by example of table [V, D], stack [E, D, F] and tokens [B, T]:
        #   table[tokens] -> [B, T, D]: axis 0 is looked_up; D, the offset axis, keeps its part.
        #   stack[e] -> [D, F]: one index, so axis 0 is selected, and chosen if e depends on data.
        #   stack[experts] with experts [K] -> [K, D, F]: axis 0 is looked_up, and a product that
        #     follows makes it a stack axis (a mixture of experts).
        # An axis whose slice is whole (size D of D) is not indexed, even if start_index_map has it.
        batching = numbers.operand_batching_dims
        gone = {*numbers.collapsed_slice_dims, *batching}
        cut = [axis for axis in range(len(sizes)) if sizes[axis] != self.shape[axis]]
        indexed = [axis for axis in numbers.start_index_map if axis in cut]
        rows = self.find_axes(indexed)
        dims: list[Any] = [((-1, size),) for size in shape]
        kept = [axis for axis in range(len(sizes)) if axis not in gone]
        for place, axis in zip(numbers.offset_dims, kept, strict=True):
            # an indexed axis leaves no part if one row is taken, and itself if a window is
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
        """Return the view within a product with another parameter.

        `places` has for each axis of the result the axis of the view, or None.
        """
        dims = [
            ((-1, size),) if place is None else self.dims[place]
            for place, size in zip(places, shape, strict=True)
        ]
        return self.arrange(shape, dims, None, summed=self.summed | self.find_axes(contracted))

    # Roles of the leaf's axes in an equation that consumes the view.

    def find_product_roles(
        self,
        op: str,
        contracted: Sequence[int],
        batch: Sequence[int],
        free: Sequence[int],
        provisional: bool = False,
    ) -> Roles:
        """Return the roles in a product: contracted axes are fan-in, kept ones fan-out."""
        # Of x @ (a @ b) with a [4, 2], b [2, 6], the product with x contracts axis 0 of a @ b. For
        # a, fan_in is {0} and fan_out the summed axis {1}. For b, of which it contracts no axis,
        # fan_in is the summed axis {0} and fan_out {1}.
        fan_in, free_axes = self.find_axes(contracted), self.find_axes(free)
        if not fan_in:
            fan_in = self.summed - free_axes
        fan_out = free_axes - fan_in or self.summed - fan_in
        if self.looked_up and not fan_out:
            return self.find_lookup_roles(self.looked_up)
        stack = (self.find_axes(batch) | self.selected | self.looked_up) - fan_in - fan_out
        return Roles(op, fan_in, fan_out, stack, provisional)

    def find_lookup_roles(self, rows: Axes) -> Roles:
        """Return the roles in a lookup of the given axes."""
        rest = self.find_axes(range(len(self.shape))) - rows
        stack = self.selected - rows
        return Roles("lookup", rows, rest - stack, stack)

    def find_read_roles(self, by_rows: bool) -> Roles | None:
        """Return the roles in another use; `by_rows`: a row that data chose is a lookup."""
        rows = self.looked_up | (self.chosen if by_rows else NO_AXES)
        return self.find_lookup_roles(rows) if rows else None
