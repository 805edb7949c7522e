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
from jax import lax

from lowrank_jax._jax.types import Shape
from lowrank_jax._operators.weight import DotNumbers, Options, RaggedNumbers
from lowrank_jax._primitives.bilinear import Labels, labeled_dot, labeled_flat_dot
from lowrank_jax._primitives.contract import arrange
from lowrank_jax._primitives.quantized_dot import PlatformFn

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
        if BLOCKS in out:  # a kept blocked axis: [n, blocks, elements] -> [n, *sizes]
            at = out.index(BLOCKS)
            y = y.reshape(*y.shape[:at], *layout.sizes, *y.shape[at + 2 :])
        return y

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
