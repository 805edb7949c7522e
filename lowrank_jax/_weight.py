r"""A low-rank weight in flight: a dense base and two factors whose axes carry labels.

$W[d] = \text{base}[d] + s \sum_r a[\cdot, r]\, b[\cdot, r]$. Each axis of a and b is labelled with the
axis of the weight that it runs along, so a transpose renumbers labels and moves nothing. An axis that
only a has is fan-in, one that only b has is fan-out, one that both have enumerates stacked weights, and
one that neither has is constant along the delta. Products take whichever of (x·a)·b and (x·b)·a costs
less, so a weight used transposed or from the left needs no rule of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._contract import Labels, arrange, contract, cost, reshape_groups
from lowrank_jax._nodes import Adapted, accumulator
from lowrank_jax._virtual import Virtual

RANK = "r"


def _static(**kwargs: Any) -> Any:
    return dataclasses.field(metadata={"static": True}, **kwargs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LowRankWeight(Virtual):
    """Base, factors, multiplier and dropout key of one weight, with the labels of their axes."""

    base: Any
    a: Any
    b: Any
    multiplier: Any
    key: Any
    a_axes: Labels = _static()
    b_axes: Labels = _static()
    key_axes: Labels = _static()
    scale: float = _static()
    rate: float = _static()
    path: Any = _static()

    @classmethod
    def of(cls, node: Adapted, path: str) -> LowRankWeight:
        """The weight of a node with LowRank factors; the base is frozen here, outside every loop."""
        fan_in, fan_out, stack = node.delta.axes(node.base.ndim)
        return cls(
            base=lax.stop_gradient(node.base),
            a=node.delta.a,
            b=node.delta.b,
            multiplier=node.multiplier,
            key=node.key,
            a_axes=(*stack, *fan_in, RANK),
            b_axes=(*stack, RANK, *fan_out),
            key_axes=stack,
            scale=node.delta.scale,
            rate=node.rate,
            path=path,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the dense weight, which is that of the product's operand."""
        return self.base.dtype

    def _with(self, **changes: Any) -> LowRankWeight:
        return dataclasses.replace(self, **changes)

    def _sizes(self) -> dict[Any, int]:
        return {**dict(enumerate(self.shape)), RANK: self.a.shape[self.a_axes.index(RANK)]}

    def _factor(self, value: jax.Array) -> jax.Array:
        """value times scale and multiplier, in its own dtype."""
        if self.multiplier is not None:
            factor = jnp.asarray(self.multiplier, accumulator(value.dtype)) * self.scale
            return value * factor.astype(value.dtype)
        return value if self.scale == 1 else value * self.scale

    def materialize(self) -> jax.Array:
        """The dense weight, summed in float32 and cast once."""
        dtype = accumulator(self.dtype)
        axes = tuple(range(self.ndim))
        change, labels = contract(
            self.a.astype(dtype),
            self.a_axes,
            self.b.astype(dtype),
            self.b_axes,
            axes,
            precision=lax.Precision.HIGHEST,
        )
        change = arrange(self._factor(change), labels, axes, self._sizes())
        return (self.base.astype(dtype) + change).astype(self.dtype)

    def for_use(self, number: int) -> LowRankWeight:
        """The same weight with a dropout key of its own for this use."""
        return self if self.key is None else self._with(key=_fold(self.key, number))

    # Verbs that pass the weight on.

    def each(self, fn: Any, base_only: bool = False) -> LowRankWeight:
        """Apply an identity of values to the base, and to the factors unless base_only."""
        if base_only:
            return self._with(base=fn(self.base))
        return self._with(base=fn(self.base), a=fn(self.a), b=fn(self.b))

    def astype(self, dtype: Any) -> LowRankWeight | None:
        """Convert the base; the factors are cast to its dtype in the product."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self._with(base=lax.convert_element_type(self.base, dtype))

    def transpose(self, order: Sequence[int]) -> LowRankWeight:
        """Permute the base; renumber the labels."""
        place = {old: new for new, old in enumerate(order)}
        return self._renumbered(place, base=lax.transpose(self.base, order))

    def _renumbered(self, place: dict[int, int], **changes: Any) -> LowRankWeight:
        rename = lambda labels: tuple(place.get(label, label) for label in labels)
        return self._with(
            a_axes=rename(self.a_axes),
            b_axes=rename(self.b_axes),
            key_axes=rename(self.key_axes),
            **changes,
        )

    def reshape(self, shape: Sequence[int]) -> LowRankWeight | None:
        """Merge or split axes that belong together (all fan-in, all fan-out, or all stack)."""
        if 0 in self.shape:
            return None
        groups = reshape_groups(self.shape, shape)
        sizes = dict(enumerate(shape))
        parts = {}
        for name in ("a", "b", "key"):
            array, labels = getattr(self, name), getattr(self, name + "_axes")
            if array is None:
                continue
            found = _regroup(array, labels, groups, sizes)
            if found is None:
                return None
            parts[name], parts[name + "_axes"] = found
        return self._with(base=lax.reshape(self.base, tuple(shape)), **parts)

    def broadcast(self, shape: Sequence[int], axes: Sequence[int]) -> LowRankWeight:
        """New axes, and axes of size 1 made longer, are constant along the delta."""
        place = dict(enumerate(axes))
        grown = {old for old, new in place.items() if self.shape[old] != shape[new]}
        return self._dropped(grown)._renumbered(
            place, base=lax.broadcast_in_dim(self.base, shape, tuple(axes))
        )

    def _dropped(self, gone: set[int]) -> LowRankWeight:
        """Forget labels of axes of size 1."""
        parts = {}
        for name in ("a", "b", "key"):
            array, labels = getattr(self, name), getattr(self, name + "_axes")
            at = [i for i, label in enumerate(labels) if label in gone]
            if array is None or not at:
                continue
            parts[name] = jnp.squeeze(array, tuple(at))
            parts[name + "_axes"] = tuple(label for label in labels if label not in gone)
        return self._with(**parts) if parts else self

    def index(self, fn: Any, sizes: dict[int, int], axes: Sequence[int]) -> LowRankWeight:
        """Take the part fn takes from each array along the axes that it has."""
        parts = {}
        for name in ("a", "b", "key"):
            array, labels = getattr(self, name), getattr(self, name + "_axes")
            where = {axis: labels.index(axis) for axis in axes if axis in labels}
            if array is not None and where:
                parts[name] = fn(array, where)
        return self._with(base=fn(self.base, {axis: axis for axis in axes}), **parts)

    def multiply(self, scalar: Any, fn: Any) -> LowRankWeight:
        """Scale the base and b."""
        scaled = fn(self.b, jnp.asarray(scalar).astype(self.b.dtype))
        return self._with(base=fn(self.base, scalar), b=scaled)

    def unstack(self) -> tuple[Any, Any]:
        """Slices along the leading axis; what does not vary along it is closed over."""
        names = [n for n in ("a", "b", "key") if 0 in getattr(self, n + "_axes")]
        names = [n for n in names if getattr(self, n) is not None]
        arrays = {n: _front(getattr(self, n), getattr(self, n + "_axes").index(0)) for n in names}
        arrays["base"] = self.base
        place = {axis: axis - 1 for axis in range(1, self.ndim)}
        labels = {}
        for name in names:
            labels[name + "_axes"] = tuple(x for x in getattr(self, name + "_axes") if x != 0)
        if self.key is None:
            labels["key_axes"] = tuple(x for x in self.key_axes if x != 0)

        def rebuild(slices: dict[str, Any]) -> LowRankWeight:
            return self._with(**labels)._renumbered(place, **slices)

        return arrays, rebuild

    def specs(self, spec: Any) -> LowRankWeight:
        """PartitionSpecs of the arrays: each axis is split as the weight's axis of its label."""
        entry = lambda label: None if label == RANK or label >= len(spec) else spec[label]
        make = lambda labels: type(spec)(*(entry(label) for label in labels))
        return self._with(
            base=spec,
            a=make(self.a_axes),
            b=make(self.b_axes),
            multiplier=None if self.multiplier is None else type(spec)(),
            key=None if self.key is None else make(self.key_axes),
        )

    # Verbs that consume the weight.

    def dot(self, other: Any, numbers: Any, on_left: bool, options: dict[str, Any]) -> jax.Array:
        """The base's product as the user wrote it, plus the factors' products."""
        (lc, rc), (lb, rb) = numbers
        if on_left:
            base = lax.dot_general(self.base, other, numbers, **options)
            mine, theirs = (lc, lb), (rc, rb)
        else:
            base = lax.dot_general(other, self.base, numbers, **options)
            mine, theirs = (rc, rb), (lc, lb)
        x_labels = _operand_labels(other.ndim, mine, theirs)
        bound = {*mine[0], *mine[1]}
        free = [axis for axis in range(self.ndim) if axis not in bound]
        x_free = [label for label in x_labels if isinstance(label, tuple)]
        out = (*mine[1], *free, *x_free) if on_left else (*mine[1], *x_free, *free)
        sizes = {**self._sizes(), **dict(zip(x_labels, other.shape, strict=True))}
        last = {"preferred_element_type": options.get("preferred_element_type")}
        branch, labels = self._branch(other, x_labels, out, sizes, on_left, options, last)
        return base + arrange(branch, labels, out, sizes).astype(base.dtype)

    def _branch(
        self,
        x: jax.Array,
        x_labels: Labels,
        out: Labels,
        sizes: dict[Any, int],
        on_left: bool,
        options: dict[str, Any],
        last: dict[str, Any],
    ) -> tuple[jax.Array, Labels]:
        """x·a·b, or x·b·a where that takes fewer multiplications."""
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else self.dtype
        x = self._dropout(x.astype(dtype))
        factors = [
            (self.a.astype(self.dtype), self.a_axes),
            (self.b.astype(self.dtype), self.b_axes),
        ]
        totals = []
        for (_, first), (_, second) in (factors, factors[::-1]):
            one, left = cost(sizes, x_labels, first, {*second, *out})
            two, _ = cost(sizes, left, second, out)
            totals.append(one + two)
        if totals[1] < totals[0]:
            factors.reverse()
        (first, first_axes), (second, second_axes) = factors
        precision = {"precision": options.get("precision")}
        pair = lambda x, xl, y, yl, keep, **kw: (
            contract(y, yl, x, xl, keep, **kw) if on_left else contract(x, xl, y, yl, keep, **kw)
        )
        inner, labels = pair(x, x_labels, first, first_axes, {*second_axes, *out}, **precision)
        inner = self._factor(inner).astype(dtype)
        return pair(inner, labels, second, second_axes, {*out}, **precision, **last)

    def _dropout(self, x: jax.Array) -> jax.Array:
        """Inverted dropout on the branch's input."""
        if self.key is None or self.rate == 0:
            return x
        key = self.key if self.key.ndim == 0 else self.key.reshape(-1)[0]
        kept = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)

    def ragged_dot(
        self, other: Any, sizes: Any, numbers: Any, options: dict[str, Any]
    ) -> Any | None:
        """Groups of rows times a weight each: ragged products with each factor that has the groups."""
        (contracting, batching) = numbers.dot_dimension_numbers
        (lc, rc), (lb, rb) = contracting, batching
        groups = tuple(numbers.rhs_group_dimensions)
        ragged = tuple(numbers.lhs_ragged_dimensions)
        if lb or rb or len(groups) != 1 or len(ragged) != 1 or ragged[0] in lc:
            return None
        base = lax.ragged_dot_general(other, self.base, sizes, numbers, **options)
        x_labels = _operand_labels(other.ndim, (rc, rb), (lc, lb))
        rows = ("x", ragged[0])
        x_free = [label for label in x_labels if isinstance(label, tuple)]
        free = [axis for axis in range(self.ndim) if axis not in rc and axis != groups[0]]
        out = (*x_free, *free)
        extents = {**self._sizes(), **dict(zip(x_labels, other.shape, strict=True))}
        options = {"precision": options.get("precision")}
        step = lambda x, xl, y, yl, keep: _ragged(
            x, xl, y, yl, keep, groups[0], rows, sizes, options
        )
        value = self._dropout(other)
        value, labels = step(
            value, x_labels, self.a.astype(self.dtype), self.a_axes, {*self.b_axes, *out}
        )
        value = self._factor(value).astype(other.dtype)
        value, labels = step(value, labels, self.b.astype(self.dtype), self.b_axes, {*out})
        return base + arrange(value, labels, out, extents).astype(base.dtype)

    def conv(self, other: Any, params: dict[str, Any]) -> jax.Array | None:
        """Convolve with a to r channels, then mix channels with b; grouped kernels group a too."""
        numbers = params["dimension_numbers"]
        out_axis, in_axis, *window = numbers.rhs_spec
        groups = params["feature_group_count"]
        if params["batch_group_count"] != 1:
            return None
        a, a_axes, b, b_axes = self.a, self.a_axes, self.b, self.b_axes
        if out_axis in a_axes:
            a, a_axes, b, b_axes = b, b_axes, a, a_axes
        narrow = {axis for axis in range(self.ndim) if self.shape[axis] == 1}
        if {*a_axes} & {out_axis} or {*b_axes} & {in_axis, *window} - narrow:
            return None
        squeezed = self._with(a=a, a_axes=a_axes, b=b, b_axes=b_axes)._dropped(narrow - {out_axis})
        return _conv(squeezed, other, params, narrow, groups)

    def gather(self, indices: Any, params: dict[str, Any]) -> Any | None:
        """Read rows: gather from the factors too; along stack axes alone it stays a weight."""
        numbers = params["dimension_numbers"]
        indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
        sliced = {d for d in range(self.ndim) if params["slice_sizes"][d] != self.shape[d]}
        if sliced - indexed:
            return None
        base = _gather(self.base, tuple(range(self.ndim)), indices, params, as_is=True)[0]
        offset, batch = numbers.offset_dims, range(indices.ndim - 1)
        kept = [
            d
            for d in range(self.ndim)
            if d not in numbers.collapsed_slice_dims and d not in numbers.operand_batching_dims
        ]
        rows = iter(("n", i) for i in batch)
        at = dict(zip(offset, kept, strict=True))
        out = tuple(at[i] if i in at else next(rows) for i in range(base.ndim))
        a, a_labels = _gather(self.a, self.a_axes, indices, params)
        b, b_labels = _gather(self.b, self.b_axes, indices, params)
        if indexed <= {*self.a_axes} & {*self.b_axes}:
            place = {label: i for i, label in enumerate(out)}
            key, key_axes = (None, ())
            if self.key is not None:
                key, key_axes = _gather(self.key, self.key_axes, indices, params)
            moved = self._with(
                a=a, b=b, key=key, a_axes=a_labels, b_axes=b_labels, key_axes=key_axes
            )
            return moved._renumbered(place, base=base)
        sizes = {**self._sizes(), **dict(zip(out, base.shape, strict=True))}
        dtype = self.dtype
        branch, labels = contract(
            self._factor(a.astype(dtype)), a_labels, b.astype(dtype), b_labels, out
        )
        return base + arrange(branch, labels, out, sizes).astype(base.dtype)


def _fold(key: jax.Array, number: int) -> jax.Array:
    """fold_in over keys of any shape."""
    fold = lambda k: jax.random.fold_in(k, number)
    for _ in range(key.ndim):
        fold = jax.vmap(fold)
    return fold(key)


def _front(array: jax.Array, axis: int) -> jax.Array:
    """Move one axis to the front."""
    return array if axis == 0 else jnp.moveaxis(array, axis, 0)


def _operand_labels(ndim: int, mine: Any, theirs: Any) -> Labels:
    """Labels of the other operand: the weight's axis where they meet, ("x", i) elsewhere."""
    labels: list[Any] = [("x", i) for i in range(ndim)]
    for weight_axes, operand_axes in zip(mine, theirs, strict=True):
        for weight_axis, axis in zip(weight_axes, operand_axes, strict=True):
            labels[axis] = weight_axis
    return tuple(labels)


def _regroup(
    array: jax.Array, labels: Labels, groups: Any, sizes: dict[int, int]
) -> tuple[jax.Array, Labels] | None:
    """Reshape one factor along with the weight, or None where a group is not wholly its own."""
    mine = []
    for old, new in groups:
        held = [axis for axis in old if axis in labels]
        if held and len(held) < len(old):
            return None
        if held:
            mine.append((old, new))
    known = {axis for old, _ in mine for axis in old}
    rank_first = RANK in labels and labels.index(RANK) == 0
    order = [axis for old, _ in mine for axis in old]
    named = [axis for _, new in mine for axis in new]
    tail = [RANK] if RANK in labels else []
    order, named = (tail + order, tail + named) if rank_first else (order + tail, named + tail)
    unit = tuple(i for i, x in enumerate(labels) if x not in known and x != RANK)
    array = jnp.squeeze(array, unit) if unit else array
    labels = tuple(x for x in labels if x in known or x == RANK)
    if all(len(old) == len(new) == 1 for old, new in mine):
        place = {old[0]: new[0] for old, new in mine}
        return array, tuple(place.get(label, label) for label in labels)
    array = lax.transpose(array, tuple(labels.index(label) for label in order))
    rank = array.shape[order.index(RANK)] if tail else 1
    shape = tuple(rank if label == RANK else sizes[label] for label in named)
    return array.reshape(shape), tuple(named)


def _ragged(
    x: jax.Array,
    xl: Labels,
    y: jax.Array,
    yl: Labels,
    keep: Any,
    group: int,
    rows: Any,
    sizes: jax.Array,
    options: dict[str, Any],
) -> tuple[jax.Array, Labels]:
    """contract(x, y), row groups of x meeting group g of y where y has groups."""
    if group not in yl:
        return contract(x, xl, y, yl, keep, **options)
    summed = [label for label in xl if label in yl and label not in keep]
    at = lambda labels, chosen: tuple(labels.index(label) for label in chosen)
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=((at(xl, summed), at(yl, summed)), ((), ())),
        lhs_ragged_dimensions=(xl.index(rows),),
        rhs_group_dimensions=(yl.index(group),),
    )
    out = lax.ragged_dot_general(x, y, sizes, numbers, **options)
    rest = [label for label in (*xl, *yl) if label not in summed and label != group]
    return out, tuple(rest)


def _conv(
    w: LowRankWeight, x: jax.Array, params: dict[str, Any], narrow: set[int], groups: int
) -> jax.Array:
    """The convolution of a kernel whose a has the window and in axes and whose b has the out axis."""
    numbers = params["dimension_numbers"]
    out_axis, *taps = numbers.rhs_spec
    rank = w.a.shape[w.a_axes.index(RANK)]
    fan_in = math.prod(w.shape[axis] for axis in taps)
    outputs = w.shape[out_axis]
    if groups > 1 and fan_in * outputs <= rank * (fan_in * groups + outputs):
        # a grouped kernel this small is cheaper to add to than to convolve beside
        return lax.conv_general_dilated(x, w.materialize(), **_conv_options(params))
    dtype = w.dtype
    base = lax.conv_general_dilated(x, w.base, **_conv_options(params))
    sizes = {**dict(enumerate(w.shape)), RANK: rank}
    kernel = arrange(w.a.astype(dtype), w.a_axes, (RANK, *taps), sizes)
    kernel = jnp.tile(kernel, (groups,) + (1,) * len(taps))
    spec = type(numbers)(numbers.lhs_spec, tuple(range(w.ndim)), numbers.out_spec)
    options = {**_conv_options(params), "dimension_numbers": spec, "preferred_element_type": None}
    inner = lax.conv_general_dilated(w._dropout(x), kernel, **options)
    feature = numbers.out_spec[1]
    inner = _front(w._factor(inner).astype(x.dtype), feature)
    b = arrange(w.b.astype(dtype), w.b_axes, (RANK, out_axis), sizes)
    inner = inner.reshape(groups, rank, *inner.shape[1:])
    b = b.reshape(rank, groups, outputs // groups)
    last = {
        "precision": params["precision"],
        "preferred_element_type": params["preferred_element_type"],
    }
    mixed = lax.dot_general(inner, b, (((1,), (0,)), ((0,), (1,))), **last)  # [g, *rest, o / g]
    mixed = jnp.moveaxis(mixed, -1, 1)
    mixed = mixed.reshape(outputs, *mixed.shape[2:])
    return base + jnp.moveaxis(mixed, 0, feature).astype(base.dtype)


def _conv_options(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the equation that lax.conv_general_dilated takes."""
    names = (
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "dimension_numbers",
        "feature_group_count",
        "batch_group_count",
        "precision",
        "preferred_element_type",
    )
    return {name: params[name] for name in names}


def _gather(
    array: jax.Array,
    labels: Labels,
    indices: jax.Array,
    params: dict[str, Any],
    as_is: bool = False,
) -> tuple[jax.Array, Labels]:
    """Gather from an array along the labelled axes it has; rows come first unless as_is."""
    numbers = params["dimension_numbers"]
    if as_is:
        return _lax_gather(array, indices, numbers, params["slice_sizes"], params), labels
    at = labels.index
    mapped = [i for i, axis in enumerate(numbers.start_index_map) if axis in labels]
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    batching = [(axis, place) for axis, place in pairs if axis in labels]
    if not mapped and not batching:
        return array, labels
    collapsed = [axis for axis in numbers.collapsed_slice_dims if axis in labels]
    gone = {*collapsed, *(axis for axis, _ in batching)}
    kept = [label for label in labels if label not in gone]
    rows = indices.ndim - 1
    mine = type(numbers)(
        offset_dims=tuple(range(rows, rows + len(kept))),
        collapsed_slice_dims=tuple(sorted(at(axis) for axis in collapsed)),
        start_index_map=tuple(at(numbers.start_index_map[i]) for i in mapped),
        operand_batching_dims=tuple(at(axis) for axis, _ in batching),
        start_indices_batching_dims=tuple(place for _, place in batching),
    )
    full = dict(zip(labels, array.shape, strict=True))
    sizes = tuple(full[x] if x == RANK else params["slice_sizes"][x] for x in labels)
    chosen = indices if len(mapped) == indices.shape[-1] else indices[..., jnp.array(mapped, int)]
    out = _lax_gather(array, chosen, mine, sizes, params)
    return out, (*(("n", i) for i in range(rows)), *kept)


def _lax_gather(
    array: jax.Array, indices: jax.Array, numbers: Any, sizes: Any, params: dict[str, Any]
) -> jax.Array:
    """lax.gather with the equation's own mode and promises."""
    return lax.gather(
        array,
        indices,
        dimension_numbers=numbers,
        slice_sizes=sizes,
        unique_indices=params["unique_indices"],
        indices_are_sorted=params["indices_are_sorted"],
        mode=params["mode"],
        fill_value=params["fill_value"],
    )
