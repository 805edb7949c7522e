"""Layouts of decoded blocks, and products with them: the operations of the quantized_dot primitive.

Each axis of the decoded blocks is labeled with the weight axis it corresponds to. Blocks run along
consecutive weight axes, which appear as two axes: BLOCKS and ELEMENTS.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax._jax.types import Shape
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers
from lowrank_jax._primitives.bilinear import Labels, labeled_dot, labeled_flat_dot
from lowrank_jax._primitives.contract import arrange
from lowrank_jax._primitives.few_tokens import Rows, sum_rows
from lowrank_jax._primitives.quantized_dot import PlatformFn, drop_axis

BLOCKS, ELEMENTS = "blocks", "elements"
SELECTED = "selected"  # (SELECTED, n) labels an axis of codes of which one entry is selected


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """Maps the axes of decoded blocks to the axes of the weight.

    Args:
      axes: for each axis of the decoded array, the weight axis, or BLOCKS or ELEMENTS.
      blocked: the weight axes that blocks run along, in order; none for an array without blocks.
      sizes: the sizes of `blocked`.
      units: the weight axes of size 1 that the decoded array lacks.

    A weight [4, 8, 16, 6] with blocks of 64 along its two inner axes decodes to [4, 2, 64, 6]:

    >>> layout = BlockLayout((0, BLOCKS, ELEMENTS, 3), blocked=(1, 2), sizes=(8, 16))
    >>> layout.ndim, layout.expand((3, 1, 2))
    (4, (3, 'blocks', 'elements'))
    """

    axes: Labels
    blocked: tuple[int, ...]
    sizes: tuple[int, ...]
    units: tuple[int, ...] = ()

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.axes) + len(self.units) + (len(self.blocked) - 2 if self.blocked else 0)

    def infer_shape(self, blocks_shape: Shape) -> Shape:
        """Return the weight's shape from that of the decoded array."""
        # Blocks [4, 2, 64, 6] with axes (0, BLOCKS, ELEMENTS, 3) and sizes (8, 16): the weight is
        # [4, 2 * 64 / 16, 16, 6]. The first blocked size is computed from the blocks, since inside
        # shard_map a device has only some of them.
        extent = dict(zip(self.axes, blocks_shape, strict=True)) | dict.fromkeys(self.units, 1)
        if self.blocked:
            first, *rest = self.blocked
            extent |= dict(zip(rest, self.sizes[1:], strict=True))
            extent[first] = extent[BLOCKS] * extent[ELEMENTS] // math.prod(self.sizes[1:])
        return tuple(extent[axis] for axis in range(self.ndim))

    def spec(self, codes: jax.P) -> jax.P:
        """Return the weight's PartitionSpec from that of its codes."""
        entries = dict(zip(self.axes, codes, strict=False))
        entries |= {axis: entries.get(BLOCKS) for axis in self.blocked[:1]}
        return type(codes)(*(entries.get(axis) for axis in range(self.ndim)))

    def expand(self, labels: Sequence[Any]) -> Labels:
        """Replace the blocked axes among labels by BLOCKS, ELEMENTS."""
        out: list[Any] = []
        for label in labels:
            if label not in self.blocked:
                out.append(label)
            elif label == self.blocked[0]:
                out += [BLOCKS, ELEMENTS]
        return tuple(out)

    def with_units(self, blocks: jax.Array) -> tuple[jax.Array, Labels]:
        """Return the decoded array with the axes of `units` appended, and its labels."""
        if not self.units:
            return blocks, self.axes
        return blocks.reshape(*blocks.shape, *(1 for _ in self.units)), (*self.axes, *self.units)

    def to_dense(self, blocks: jax.Array) -> jax.Array:
        """Return the dense weight."""
        # The weight [4, 128, 6] transposed to [6, 4, 128] has blocks [4, 2, 64, 6] with axes
        # (1, BLOCKS, ELEMENTS, 0). order is (0, 1, BLOCKS, ELEMENTS): arrange transposes to
        # [6, 4, 2, 64], and the reshape merges the last two axes into the 128.
        blocks, axes = self.with_units(blocks)
        order = self.expand(range(self.ndim))
        extent = dict(zip(axes, blocks.shape, strict=True))
        extent |= dict(zip(self.blocked, self.sizes, strict=True))
        shape = [extent[axis] for axis in range(self.ndim)]
        return arrange(blocks, axes, order, extent).reshape(shape)


def is_consecutive(axes: Sequence[int]) -> bool:
    """Whether axes are consecutive."""
    return all(b == a + 1 for a, b in itertools.pairwise(axes))


def is_selected(label: Hashable) -> bool:
    """Whether a label is (SELECTED, n): an axis of codes of which one entry is selected."""
    return isinstance(label, tuple) and label[0] == SELECTED


def freeze_options(options: Options) -> tuple[tuple[str, Any], ...]:
    """Return a product's options as a hashable tuple, without out_sharding, set on the whole."""
    return tuple(sorted((k, v) for k, v in options.items() if k != "out_sharding"))


@dataclasses.dataclass(frozen=True)
class BlockDot(PlatformFn):
    """lax.dot_general of an activation and decoded blocks.

    Args:
      layout: of the blocks.
      numbers: dimension numbers of the user's product with the dense weight.
      on_left: whether the weight is the left operand.
      options: other arguments of lax.dot_general.
    """

    layout: BlockLayout
    numbers: DotNumbers
    on_left: bool
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Return the product with the axis order of the user's equation."""
        return self._run(labeled_dot, x, w)

    @property
    def on_cpu(self) -> Callable:
        """The product as one of two matrices."""
        return functools.partial(self._run, labeled_flat_dot)

    def _run(self, product: Callable[..., jax.Array], x: jax.Array, w: jax.Array) -> jax.Array:
        # x [n, 128] @ w [128, 6], with blocks [2, 64, 6] labeled (BLOCKS, ELEMENTS, 1): the
        # contracted axis of x is split like the blocks, x [n, 2, 64] labeled
        # (("x", 0), BLOCKS, ELEMENTS), and the product sums both axes. So the dense weight is
        # never formed, which would need a copy where blocks are not the leading axes.
        own_labels, out = self._label(x.ndim)
        x, labels = self._split_contracted(x, own_labels, w)
        w, axes = self.layout.with_units(w)
        pair = (w, x, axes, labels) if self.on_left else (x, w, labels, axes)
        return self._join_blocks(product(*pair, out, **dict(self.options)), out)

    def _label(self, ndim: int) -> tuple[list[Any], Labels]:
        """Return the labels of an activation of ndim axes, and those of the result in blocks."""
        layout = self.layout
        (lc, rc), (lb, rb) = self.numbers
        mine, theirs = ((lc, lb), (rc, rb)) if self.on_left else ((rc, rb), (lc, lb))
        own_labels: list[Any] = [("x", i) for i in range(ndim)]
        for own, others in zip(mine, theirs, strict=True):
            for axis, other in zip(own, others, strict=True):
                own_labels[other] = axis
        bound = {*mine[0], *mine[1]}
        free = layout.expand([axis for axis in range(layout.ndim) if axis not in bound])
        x_free = [label for label in own_labels if isinstance(label, tuple)]
        rest = (*free, *x_free) if self.on_left else (*x_free, *free)
        return own_labels, (*mine[1], *rest)

    def _join_blocks(self, y: jax.Array, out: Labels) -> jax.Array:
        """Join BLOCKS and ELEMENTS of a result to the axes that they are of."""
        if BLOCKS not in out:
            return y
        at = out.index(BLOCKS)  # [n, blocks, elements] -> [n, *sizes]
        return y.reshape(*y.shape[:at], *self.layout.sizes, *y.shape[at + 2 :])

    def count_rows(self, x: Any, w: Any, back: bool = False) -> Rows | None:
        """Count the rows of x, the axes that the weight lacks."""
        labels, out = self._label(x.ndim)
        rows = math.prod(
            size for size, label in zip(x.shape, labels, strict=True) if isinstance(label, tuple)
        )
        last = (*self.layout.axes, *self.layout.units)[-1]
        return Rows(rows, (last in out) if back else (last not in out))

    def sum_rows(self, xs: Sequence[jax.Array], w: jax.Array) -> list[jax.Array]:
        """Apply the product to each x by sums."""
        own_labels, out = self._label(xs[0].ndim)
        split = [self._split_contracted(x, own_labels, w) for x in xs]
        w, axes = self.layout.with_units(w)
        ys = sum_rows([x for x, _ in split], w, split[0][1], axes, out, **dict(self.options))
        return [self._join_blocks(y, out) for y in ys]

    def sum_rows_back(self, cts: Sequence[jax.Array], w: jax.Array, like: Any) -> list[jax.Array]:
        """Apply the transpose of the product to each cotangent by sums."""
        own_labels, out = self._label(len(like.shape))
        labels: Labels = ()

        def split(x: jax.Array) -> jax.Array:
            nonlocal labels
            x, labels = self._split_contracted(x, own_labels, w)
            return x

        jax.eval_shape(split, like)
        extent = dict(zip(self.layout.axes, w.shape, strict=True))
        if BLOCKS in out:
            at, run = out.index(BLOCKS), len(self.layout.sizes)
            cut = (extent[BLOCKS], extent[ELEMENTS])
            cts = [ct.reshape(*ct.shape[:at], *cut, *ct.shape[at + run :]) for ct in cts]
        w, axes = self.layout.with_units(w)
        xs = sum_rows(cts, w, out, axes, labels)
        return [jax.linear_transpose(split, like)(x.astype(like.dtype))[0] for x in xs]

    def _split_contracted(
        self, x: jax.Array, labels: list[Any], w: jax.Array
    ) -> tuple[jax.Array, Labels]:
        """Split the contracted blocked axes of x into BLOCKS and ELEMENTS, like the weight's."""
        blocked = self.layout.blocked
        if not blocked or blocked[0] not in labels:
            return x, tuple(labels)
        at = [labels.index(axis) for axis in blocked]
        if not is_consecutive(at):  # x [8, n, 16] with blocked axes of sizes (8, 16): -> [n, 8, 16]
            order = [i for i in range(x.ndim) if i not in at] + at
            x, labels = lax.transpose(x, order), [labels[i] for i in order]
            at = list(range(x.ndim - len(at), x.ndim))
        cut = [w.shape[self.layout.axes.index(name)] for name in (BLOCKS, ELEMENTS)]
        x = x.reshape(*x.shape[: at[0]], *cut, *x.shape[at[-1] + 1 :])
        # Without the barrier, XLA on TPU merges the two axes again in the backward product, on the
        # weight's side too, and the decoding is then no longer fused into the product.
        x = lax.optimization_barrier(x)
        return x, (*labels[: at[0]], BLOCKS, ELEMENTS, *labels[at[-1] + 1 :])


@dataclasses.dataclass(frozen=True)
class BlockConv(PlatformFn):
    """lax.conv_general_dilated with a decoded kernel."""

    layout: BlockLayout
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """Return the convolution of x with the dense kernel."""
        return lax.conv_general_dilated(x, self.layout.to_dense(w), **dict(self.options))


@dataclasses.dataclass(frozen=True)
class BlockRaggedDot(PlatformFn):
    """lax.ragged_dot_general of row groups and a decoded stack of weights."""

    layout: BlockLayout
    numbers: RaggedNumbers
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: jax.Array, groups: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Multiply each group of rows by its weight; groups is (decoded blocks, group sizes)."""
        w, sizes = groups
        dense = self.layout.to_dense(w)
        return lax.ragged_dot_general(x, dense, sizes, self.numbers, **dict(self.options))

    @property
    def _row_dot(self) -> BlockDot | None:
        """The product of a row with its own weight; None for other ragged products."""
        (lc, rc), (lb, rb) = self.numbers.dot_dimension_numbers
        (row,), groups = self.numbers.lhs_ragged_dimensions, self.numbers.rhs_group_dimensions
        offset = dict(self.options).get("group_offset")
        if row in lc or lb or offset is not None or groups[0] not in self.layout.axes:
            return None
        layout, group = self.layout, groups[0]
        shift = lambda axes, gone: tuple(axis - (axis > gone) for axis in axes)
        names = [axis for axis in layout.axes if axis != group]
        names = [axis - (axis > group) if isinstance(axis, int) else axis for axis in names]
        blocked, units = shift(layout.blocked, group), shift(layout.units, group)
        one = BlockLayout(tuple(names), blocked, layout.sizes, units)
        numbers = ((shift(lc, row), shift(rc, group)), (lb, rb))
        options = tuple(pair for pair in self.options if pair[0] != "group_offset")
        return BlockDot(one, numbers, on_left=False, options=options)

    def count_rows(self, x: Any, w: Any, back: bool = False) -> Rows | None:
        """Count the rows, each of which reads the codes of its own weight."""
        if (dot := self._row_dot) is None:
            return None
        (row,), at = self.numbers.lhs_ragged_dimensions, self._stack_axis
        one = dot.count_rows(drop_axis(x, row), drop_axis(w[0], at), back)
        assert one is not None
        return one._replace(count=one.count * x.shape[row], weights=w[0].shape[at])

    def sum_rows(self, xs: Sequence[jax.Array], w: Any) -> list[jax.Array]:
        """Multiply each row by its own weight, by sums."""
        dot, (row,) = self._row_dot, self.numbers.lhs_ragged_dimensions
        assert dot is not None
        run = lambda entry, w: dot.sum_rows([entry], w)[0]
        return [self._map_rows(run, x, w, row, self._result_axis) for x in xs]

    def sum_rows_back(self, cts: Sequence[jax.Array], w: Any, like: Any) -> list[jax.Array]:
        """Multiply each row of cotangents by its own weight, transposed, by sums."""
        dot, (row,) = self._row_dot, self.numbers.lhs_ragged_dimensions
        assert dot is not None
        one = drop_axis(like, row)
        run = lambda entry, w: dot.sum_rows_back([entry], w, one)[0]
        return [self._map_rows(run, ct, w, self._result_axis, row) for ct in cts]

    def _map_rows(
        self,
        run: Callable[[jax.Array, jax.Array], jax.Array],
        x: jax.Array,
        groups: tuple[jax.Array, jax.Array],
        axis: int,
        out_axis: int,
    ) -> jax.Array:
        """Apply run to each row along an axis and its weight; rows of no group give zeros."""
        w, sizes = groups
        count = w.shape[self._stack_axis]
        # sizes [2, 0, 3] end before rows [2, 2, 5]; a mask, since XLA makes a loop of a cumsum
        ends = jnp.sum(jnp.where(np.tri(count, dtype=bool), sizes, 0), 1)
        results = []
        for number in range(x.shape[axis]):
            group = jnp.sum(ends <= number)  # rows below ends[0] are of group 0
            own = w.take(jnp.minimum(group, count - 1), self._stack_axis)
            found = run(lax.index_in_dim(x, number, axis, keepdims=False), own)
            results.append(jnp.where(group < count, found, jnp.zeros_like(found)))
        return jnp.stack(results, out_axis)

    @property
    def _stack_axis(self) -> int:
        """The axis of the decoded array that the groups run along."""
        return self.layout.axes.index(self.numbers.rhs_group_dimensions[0])

    @property
    def _result_axis(self) -> int:
        """The axis of the result that the rows run along."""
        (row,), ((lc, _), _) = (
            self.numbers.lhs_ragged_dimensions,
            self.numbers.dot_dimension_numbers,
        )
        return row - sum(axis < row for axis in lc)
