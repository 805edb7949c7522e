"""Weights made of a base and of arrays whose axes are labeled with axes of the weight.

A structural operation renumbers the labels, and changes an array only along the axes that it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._jax import jaxprs
from lowrank_jax._operators.regroup import regroup
from lowrank_jax._operators.weight import Indexer, Weight, make_reverser, make_slicer
from lowrank_jax._primitives.contract import Labels, labeled_spec, reshape_groups
from lowrank_jax._primitives.selected_dot import ENTRY


class LabeledWeight(Weight):
    """A base weight plus labeled arrays; the labels of the array `x` are in the field `x_axes`.

    An operation that the base does not support (it returns None) is not supported here either.

    Attributes:
      base: a weight operator of the same shape and dtype.
      labeled: names of the array fields; a field may be None.
    """

    base: Any
    labeled: ClassVar[tuple[str, ...]]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the dense weight."""
        return self.base.shape

    @property
    def dtype(self) -> Any:  # type: ignore[override]
        """Dtype of the dense weight."""
        return self.base.dtype

    def replace(self, **changes: object) -> Self:
        """Replace fields, as dataclasses.replace."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def with_base(self, base: Weight | None, **changes: object) -> Self | None:
        """Replace the base and other fields; None if the base is None."""
        return None if base is None else self.replace(base=base, **changes)

    def labels(self, name: str) -> Labels:
        """Return the labels of an array."""
        return getattr(self, name + "_axes")

    def get_arrays(self, *names: str) -> dict[str, Any]:
        """Return the named fields that are not None; by default the labeled arrays."""
        arrays = {name: getattr(self, name) for name in names or self.labeled}
        return {name: array for name, array in arrays.items() if array is not None}

    def transfer_base(self, fn: Callable) -> Self | None:
        """Move the base to another memory space; the arrays stay on the device."""
        return self.with_base(self.base.transfer_base(fn))

    def transpose(self, order: Sequence[int]) -> Self | None:
        """Permute the base; renumber the labels."""
        place = {old: new for new, old in enumerate(order)}
        return self._renumber(place, self.base.transpose(order))

    def _renumber(
        self, place: dict[Any, int], base: Weight | None, **arrays: object
    ) -> Self | None:
        """Use a base whose axis place[i] is this weight's axis i, and rename the labels."""
        rename = lambda labels: tuple(place.get(label, label) for label in labels)
        labels = {name + "_axes": rename(self.labels(name)) for name in self.labeled}
        return self.with_base(base, **labels, **arrays)

    def reshape(self, shape: Sequence[int]) -> Self | None:
        """Merge or split axes; None if an array has some but not all of the merged axes."""
        if 0 in self.shape:
            return None
        groups = reshape_groups(self.shape, shape)
        sizes = dict(enumerate(shape))
        parts = {}
        for name, array in self.get_arrays().items():
            found = regroup(array, self.labels(name), groups, sizes)
            if found is None:
                return None
            parts[name], parts[name + "_axes"] = found
        return self.with_base(self.base.reshape(shape), **parts)

    def broadcast(self, shape: Sequence[int], axes: Sequence[int], fn: Callable) -> Self | None:
        """Broadcast the base; the arrays are constant along new and expanded axes."""
        place = dict(enumerate(axes))
        grown = {old for old, new in place.items() if self.shape[old] != shape[new]}
        return self.drop_labels(grown)._renumber(place, self.base.broadcast(shape, axes, fn))

    def drop_labels(self, gone: set[int]) -> Self:
        """Squeeze these axes of size 1 out of the arrays, and drop their labels."""
        parts = {}
        for name, array in self.get_arrays().items():
            labels = self.labels(name)
            at = tuple(i for i, label in enumerate(labels) if label in gone)
            if at:
                parts[name] = jnp.squeeze(array, at)
                parts[name + "_axes"] = tuple(label for label in labels if label not in gone)
        return self.replace(**parts) if parts else self

    def index(self, fn: Indexer, sizes: dict[int, int], axes: Sequence[int]) -> Self | None:
        """Take part of the base, and of each array along the axes that it has."""
        return self._index_arrays(self.base.index(fn, sizes, axes), fn, axes)

    def slice(
        self, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
    ) -> Self | None:
        """lax.slice of the base, and of each array along the axes that it has."""
        take, sizes = make_slicer(self.shape, starts, limits, strides)
        return self._index_arrays(self.base.slice(starts, limits, strides), take, list(sizes))

    def rev(self, axes: Sequence[int]) -> Self | None:
        """lax.rev of the base, and of each array along the axes that it has."""
        return self._index_arrays(self.base.rev(axes), make_reverser(axes), axes)

    def _index_arrays(self, base: Weight | None, fn: Indexer, axes: Sequence[int]) -> Self | None:
        """Use a part of the base, and apply the Indexer to each array along the axes it has."""
        parts = {}
        for name, array in self.get_arrays().items():
            labels = self.labels(name)
            where = {axis: labels.index(axis) for axis in axes if axis in labels}
            if where:
                parts[name] = fn(array, where)
        return self.with_base(base, **parts)

    def unstack(self) -> tuple[Any, Any] | None:
        """Return arrays to scan along axis 0, and a function that rebuilds one layer of them.

        Arrays without axis 0 are the same in each layer, so the scan closes over them.
        """
        # A stacked weight [layers, in, out] with
        #     a [layers, in, r]  labels (0, 1, RANK)
        #     b [r, out]         labels (RANK, 2): one b, shared by all layers
        # is scanned over {"a": a, "base": ...}. rebuild gets a [in, r], labels it (1, RANK), and
        # then renumbers to the axes of the layer's weight [in, out]: a (0, RANK), b (RANK, 1).
        stacked = self.base.unstack()
        if stacked is None:
            return None
        names = [name for name in self.get_arrays() if 0 in self.labels(name)]
        fronts = {name: self.labels(name).index(0) for name in names}
        arrays = {name: _move_to_front(getattr(self, name), at) for name, at in fronts.items()}
        arrays["base"], rebuild_base = stacked
        # The scan axis of a table of adapters [n, layers, in, r] is not its first: a scan over it
        # would copy the whole table to move that axis. So each step slices the table in place, by
        # its number. What is scanned over is for derivatives alone, and XLA removes it elsewhere.
        in_place = jaxprs.KEEPS_RULES_IN_SCANS  # which the tangents of the slices need
        tables = [n for n in names if in_place and ENTRY in self.labels(n) and fronts[n]]
        if tables:
            arrays["number"] = jnp.arange(self.shape[0])
        rest = {
            name + "_axes": tuple(label for label in self.labels(name) if label != 0)
            for name in names
        }
        place = {axis: axis - 1 for axis in range(1, self.ndim)}

        def rebuild(slices: dict[str, Any]) -> Self | None:
            base = rebuild_base(slices.pop("base"))
            number = slices.pop("number", None)
            for name in tables:
                table = lax.stop_gradient(getattr(self, name))
                own = lax.dynamic_index_in_dim(table, number, fronts[name], keepdims=False)
                slices[name] = _take_tangent(own, slices[name])
            return self.replace(**rest)._renumber(place, base, **slices)

        return arrays, rebuild

    def prepare_split(self, spec: jax.P) -> Self:
        """Prepare the base; the arrays are correct in parts as they are."""
        return self.replace(base=self.base.prepare_split(spec))

    def _array_specs(self, spec: jax.P) -> dict[str, Any]:
        """Return a PartitionSpec for each array, from the entries of the axes that it has."""
        return {name: labeled_spec(spec, self.labels(name)) for name in self.get_arrays()}

    def specs(self, spec: jax.P) -> Self | None:
        """Return PartitionSpecs in place of the base's arrays and the labeled arrays."""
        return self.with_base(self.base.specs(spec), **self._array_specs(spec))

    def reshard(self, spec: jax.P, fn: Callable) -> Self | None:
        """Reshard the base by spec, and each array by the entries of the axes that it has."""
        parts = {
            name: fn(getattr(self, name), own) for name, own in self._array_specs(spec).items()
        }
        return self.with_base(self.base.reshard(spec, fn), **parts)


@jax.custom_jvp
def _take_tangent(value: jax.Array, carrier: jax.Array) -> jax.Array:
    """Return value, an equal of carrier, with the derivatives of carrier."""
    return value


@_take_tangent.defjvp
def _take_tangent_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """JVP rule: the primal is again the function, for derivatives of any order."""
    return _take_tangent(*primals), tangents[1]


def _move_to_front(array: jax.Array, axis: int) -> jax.Array:
    """Move one axis to the front."""
    return array if axis == 0 else jnp.moveaxis(array, axis, 0)
