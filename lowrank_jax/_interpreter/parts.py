"""Parts of axes: how the axes of a leaf are distributed over the axes of a view."""

from __future__ import annotations

import math
from collections.abc import Sequence

# (axis of the leaf, size of the part of it that runs along an axis of the view). A view's axis has
# one or more parts, the slowest-varying first. Axis -1 stands for a broadcast axis, which the
# leaf does not have; size 0 means that the size is unknown.
#
# A leaf [4, 6] reshaped to [24] has the parts ((0, 4), (1, 6)) along its one axis; reshaped to
# [4, 2, 3] it has ((0, 4),), ((1, 2),) and ((1, 3),).
Part = tuple[int, int]


def fit_parts(parts: tuple[Part, ...], size: int) -> tuple[Part, ...]:
    """Fit parts to a span of the given size; sizes whose product differs from it become unknown.

    >>> fit_parts(((0, 4),), 3), fit_parts(((0, 4), (1, 6)), 12)
    (((0, 3),), ((0, 0), (1, 0)))
    """
    if math.prod(part for _, part in parts) == size:
        return parts
    if len(parts) == 1 and parts[0][1]:
        return ((parts[0][0], size),)
    return tuple((axis, 0) for axis, _ in parts)


def distribute_parts(parts: tuple[Part, ...], sizes: Sequence[int]) -> list[tuple[Part, ...]]:
    """Distribute parts over axes of the given sizes; parts that do not fit run along all of them.

    >>> distribute_parts(((0, 4), (1, 6)), [4, 2, 3])
    [((0, 4),), ((1, 2),), ((1, 3),)]
    >>> distribute_parts(((0, 4), (1, 6)), [3, 8])
    [((0, 0), (1, 0)), ((0, 0), (1, 0))]
    """
    shared = tuple((axis, 0) for axis, _ in parts)
    if math.prod(size for _, size in parts) != math.prod(sizes):
        return [shared] * len(sizes)
    rest, out = list(parts), []
    for size in sizes:
        # Fill the axis with whole parts while they divide what is left of it; a larger part is
        # split, and its faster remainder goes on to the next axis. For size 2 and the part (1, 6)
        # the axis gets (1, 2) and (1, 3) remains. Sizes 3 and 4 divide neither way: give up.
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
