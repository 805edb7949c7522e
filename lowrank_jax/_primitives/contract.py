"""Contractions of arrays with labeled axes: the einsum of the adapter branch."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax._primitives.bilinear import DotOptions, Labels, bilinear
from lowrank_jax._primitives.selected_dot import ENTRY, selected_dot

RANK = "r"  # labels the inner axis of the factors


def contract(
    x: jax.Array,
    x_labels: Labels,
    y: jax.Array,
    y_labels: Labels,
    keep: Collection[Hashable],
    *,
    index: jax.Array | None = None,
    **options: Unpack[DotOptions],
) -> tuple[jax.Array, Labels]:
    """Multiply x and y and sum each label that is not in keep.

    Args:
      x: array.
      x_labels: labels of the axes of x.
      y: array.
      y_labels: labels of the axes of y.
      keep: labels that later factors or the result still need.
      index: if y has the axis ENTRY, the number of the entry that x is multiplied by.
      options: precision and preferred_element_type of lax.dot_general.

    Returns:
      The product and its labels: shared kept ones first, then those of x, then those of y.

    >>> x, a = jnp.ones((2, 6)), jnp.ones((6, 4))
    >>> y, labels = contract(x, ("n", 0), a, (0, RANK), keep={"n", RANK})
    >>> y.shape, labels
    ((2, 4), ('n', 'r'))
    """
    x, x_labels = _sum_out(x, x_labels, {*y_labels, *keep})
    y, y_labels = _sum_out(y, y_labels, {*x_labels, *keep, ENTRY})
    shared = [label for label in x_labels if label in y_labels]
    batch = [label for label in shared if label in keep]
    rest = [label for label in (*x_labels, *y_labels) if label not in (*shared, ENTRY)]
    out = (*batch, *rest)
    if ENTRY in y_labels:
        assert index is not None
        return selected_dot(x, y, index, x_labels, y_labels, out, **options), out
    return bilinear(x, y, x_labels, y_labels, out, **options), out


def _sum_out(
    x: jax.Array, labels: Labels, wanted: Collection[Hashable]
) -> tuple[jax.Array, Labels]:
    """Sum the axes of x whose labels are not wanted."""
    axes = tuple(i for i, label in enumerate(labels) if label not in wanted)
    if not axes:
        return x, labels
    return x.sum(axes, dtype=x.dtype), tuple(label for label in labels if label in wanted)


def arrange(x: jax.Array, labels: Labels, out: Labels, sizes: Mapping[Hashable, int]) -> jax.Array:
    """Transpose x to the labels of out; broadcast along those it lacks, of these sizes."""
    present = [label for label in out if label in labels]
    order = tuple(labels.index(label) for label in present)
    if order != tuple(range(len(order))):
        x = lax.transpose(x, order)
    if len(present) < len(out):
        shape = tuple(sizes[label] for label in out)
        x = lax.broadcast_in_dim(x, shape, tuple(out.index(label) for label in present))
    return x


def count_multiplies(
    sizes: Mapping[Hashable, int], x: Labels, y: Labels, keep: Collection[Hashable]
) -> tuple[int, Labels]:
    """Return the number of multiplications of contract(x, y), and the labels of its result."""
    left = tuple(dict.fromkeys(label for label in (*x, *y) if label in keep))
    return math.prod(sizes[label] for label in {*x, *y}), left


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest groups of (old axes, new axes) that a reshape maps on each other.

    Axes of size 1 are in no group.

    >>> reshape_groups((2, 3, 4), (6, 2, 2))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    # Walk both shapes from the left. A group ends where the products of its sizes are equal; until
    # then the side with the smaller product takes its next axis: (2, 3, 4) and (6, 2, 2) compare
    # 2 < 6, then 2 * 3 = 6, group ([0, 1], [0]); then 4 > 2, 4 = 2 * 2, group ([2], [1, 2]).
    old_axes = [i for i, size in enumerate(old) if size != 1]
    new_axes = [i for i, size in enumerate(new) if size != 1]
    groups, i, j = [], 0, 0
    while i < len(old_axes):
        left, right = [old_axes[i]], [new_axes[j]]
        i, j = i + 1, j + 1
        a, b = old[left[0]], new[right[0]]
        while a != b:
            if a < b:
                left.append(old_axes[i])
                a, i = a * old[old_axes[i]], i + 1
            else:
                right.append(new_axes[j])
                b, j = b * new[new_axes[j]], j + 1
        groups.append((left, right))
    return groups


def labeled_spec(spec: jax.P, labels: Sequence[Hashable]) -> jax.P:
    """Return the PartitionSpec of an array with labeled axes, from that of its weight.

    Axes with other labels (RANK, None) are not split.

    >>> labeled_spec(jax.P("data", "model"), (1, RANK))
    P('model', None)
    """
    entry = lambda label: spec[label] if isinstance(label, int) and label < len(spec) else None
    return type(spec)(*map(entry, labels))


def accumulator_dtype(*dtypes: jax.typing.DTypeLike) -> np.dtype:
    """Return the dtype to accumulate sums in: 64 bits per real number if a dtype has, else 32.

    >>> accumulator_dtype(jnp.bfloat16), accumulator_dtype(jnp.complex64, jnp.float16)
    (dtype('float32'), dtype('complex64'))
    """
    wide = any(jnp.dtype(dtype) in (jnp.float64, jnp.complex128) for dtype in dtypes)
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return jnp.dtype(jnp.complex128 if wide else jnp.complex64)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def invert_permutation(permutation: Sequence[int]) -> tuple[int, ...]:
    """Return the inverse of a permutation."""
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))
