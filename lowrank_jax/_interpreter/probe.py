"""A leaf whose axes are followed through the user's function: how a dry run learns their roles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowrank_jax._primitives.contract import reshape_groups
from lowrank_jax._weights.virtual import Virtual

Axes = frozenset[int]


@dataclasses.dataclass(frozen=True)
class Roles:
    """Axes of a leaf that one equation contracts (fan_in), keeps (fan_out), enumerates (stack)."""

    op: str
    fan_in: Axes
    fan_out: Axes
    stack: Axes


class Log:
    """Holds the roles of the latest product until its equation is recorded."""

    def __init__(self) -> None:
        self.roles: Roles | None = None

    def take(self) -> Roles | None:
        """The roles noted last, once."""
        roles, self.roles = self.roles, None
        return roles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Probe(Virtual):
    """An abstract value, and for each of its axes the axes of the leaf it came from.

    Args:
      value: the traced array.
      dims: for each axis of value, axes of the leaf.
      selected: axes of the leaf of which one index was taken: a loop over stacked weights.
      looked_up: axes read by an array of indices: stacked if a product follows, rows if none does.
    """

    value: Any
    dims: tuple[Axes, ...] = dataclasses.field(metadata={"static": True})
    selected: Axes = dataclasses.field(metadata={"static": True})
    looked_up: Axes = dataclasses.field(metadata={"static": True})
    path: Any = dataclasses.field(metadata={"static": True})
    log: Log = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, value: Any, path: str, log: Log) -> Probe:
        """A probe of a whole leaf."""
        dims = tuple(frozenset({axis}) for axis in range(len(value.shape)))
        return cls(value, dims, frozenset(), frozenset(), path, log)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the value."""
        return self.value.dtype

    def _with(self, **changes: Any) -> Probe:
        return dataclasses.replace(self, **changes)

    def _axes(self, axes: Sequence[int]) -> Axes:
        return frozenset().union(*(self.dims[axis] for axis in axes))

    def materialize(self) -> Any:
        """The traced array; a table that was read by rows is a look-up after all."""
        if self.looked_up:
            rest = self._axes(range(self.ndim))
            self.log.roles = Roles("lookup", self.looked_up, rest - self.looked_up, frozenset())
        return self.value

    def each(self, fn: Any, base_only: bool = False) -> Probe:
        """Identities keep the axes."""
        return self._with(value=fn(self.value))

    def reshard(self, spec: Any, fn: Any) -> Probe:
        """The axes stay what they are."""
        return self._with(value=fn(self.value, spec))

    def astype(self, dtype: Any) -> Probe | None:
        """Only casts among floating dtypes leave a weight a weight."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        return self._with(value=lax.convert_element_type(self.value, dtype))

    def transpose(self, order: Sequence[int]) -> Probe:
        """Permute."""
        dims = tuple(self.dims[axis] for axis in order)
        return self._with(value=lax.transpose(self.value, order), dims=dims)

    def reshape(self, shape: Sequence[int]) -> Probe | None:
        """Axes merged or split share their origins."""
        if 0 in self.shape:
            return None
        dims = [frozenset()] * len(shape)
        for old, new in reshape_groups(self.shape, shape):
            for axis in new:
                dims[axis] = self._axes(old)
        return self._with(value=lax.reshape(self.value, tuple(shape)), dims=tuple(dims))

    def broadcast(self, shape: Sequence[int], axes: Sequence[int], fn: Any) -> Probe:
        """New axes come from nowhere."""
        dims = [frozenset()] * len(shape)
        for old, new in enumerate(axes):
            dims[new] = self.dims[old]
        return self._with(value=fn(self.value), dims=tuple(dims))

    def index(self, fn: Any, sizes: dict[int, int], axes: Sequence[int]) -> Probe:
        """An axis cut to one index is selected from."""
        one = [axis for axis in axes if sizes[axis] == 1 and self.shape[axis] > 1]
        value = fn(self.value, {axis: axis for axis in axes})
        return self._with(value=value, selected=self.selected | self._axes(one))

    def multiply(self, scalar: Any, fn: Any) -> Probe:
        """Scaling keeps the axes."""
        return self._with(value=fn(self.value, scalar))

    def unstack(self) -> tuple[Any, Any]:
        """A loop over the leading axis selects from it."""
        rest = self._with(dims=self.dims[1:], selected=self.selected | self.dims[0])
        return self.value, lambda value: rest._with(value=value)

    def specs(self, spec: Any) -> Probe:
        """The leaf's own spec."""
        return self._with(value=spec)

    def _note(
        self, op: str, contracted: Sequence[int], batch: Sequence[int], free: Sequence[int]
    ) -> None:
        """Note a product: an axis contracted anywhere is fan-in, one kept anywhere fan-out."""
        fan_in = self._axes(contracted)
        fan_out = self._axes(free) - fan_in
        stack = (self._axes(batch) | self.selected | self.looked_up) - fan_in - fan_out
        self.log.roles = Roles(op, fan_in, fan_out, stack)

    def dot(self, other: Any, numbers: Any, on_left: bool, options: dict[str, Any]) -> Any:
        """Contracting, batch and free axes."""
        (lc, rc), (lb, rb) = numbers
        contracted, batch = (lc, lb) if on_left else (rc, rb)
        free = [axis for axis in range(self.ndim) if axis not in (*contracted, *batch)]
        self._note("dot", contracted, batch, free)
        operands = (self.value, other) if on_left else (other, self.value)
        return lax.dot_general(*operands, numbers, **options)

    def ragged_dot(self, other: Any, sizes: Any, numbers: Any, options: dict[str, Any]) -> Any:
        """The group axis enumerates."""
        (_, contracted), (_, batch) = numbers.dot_dimension_numbers
        batch = (*batch, *numbers.rhs_group_dimensions)
        free = [axis for axis in range(self.ndim) if axis not in (*contracted, *batch)]
        self._note("dot", contracted, batch, free)
        return lax.ragged_dot_general(other, self.value, sizes, numbers, **options)

    def conv(self, other: Any, params: dict[str, Any]) -> Any:
        """The window and the input features are contracted."""
        out, *taps = params["dimension_numbers"].rhs_spec
        self._note("conv", taps, (), (out,))
        options = {k: v for k, v in params.items() if v is not None}
        return lax.conv_general_dilated(other, self.value, **options)

    def gather(self, indices: Any, params: dict[str, Any]) -> Any:
        """Rows of a table, one index of a stack, or many of them."""
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        indexed = [*numbers.start_index_map, *numbers.operand_batching_dims]
        if any(size != self.shape[d] for d, size in enumerate(sizes) if d not in indexed):
            return None
        out = lax.gather(
            self.value,
            indices,
            numbers,
            sizes,
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=params["fill_value"],
        )
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = [axis for axis in range(self.ndim) if axis not in gone]
        rest = self._axes([axis for axis in kept if axis not in indexed])
        rows = self._axes(numbers.start_index_map)
        stacked = self.selected | self._axes(numbers.operand_batching_dims)
        if indices.ndim > 1 and len(rest - rows) <= 1:
            self.log.roles = Roles("lookup", rows, rest - rows, stacked - rows - rest)
            return out
        dims = [frozenset()] * out.ndim
        for place, axis in zip(numbers.offset_dims, kept, strict=True):
            dims[place] = self.dims[axis] if axis not in indexed else frozenset()
        if indices.ndim > 1:
            return self._with(
                value=out, dims=tuple(dims), looked_up=self.looked_up | rows, selected=stacked
            )
        return self._with(value=out, dims=tuple(dims), selected=stacked | rows)
