"""The parameters of JAX's equations, by what they mean: the only place that knows their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal, Var

from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import Equation, Shape


def _get_params(eqn: Equation, names: Iterable[str]) -> dict[str, Any]:
    """Those of these parameters that are there and not None."""
    return {name: eqn.params[name] for name in names if eqn.params.get(name) is not None}


def get_shape(atom: Var | Literal) -> Shape:
    """Return the shape of an operand or a result."""
    aval: Any = atom.aval
    return tuple(aval.shape)


# Structural operations


def get_new_dtype(eqn: Equation) -> Any:
    """convert_element_type: the dtype of the result."""
    return eqn.params["new_dtype"]


def get_permutation(eqn: Equation) -> tuple[int, ...]:
    """transpose: axis i of the result is axis permutation[i] of the operand."""
    return tuple(eqn.params["permutation"])


def get_reshape_order(eqn: Equation) -> tuple[int, ...] | None:
    """reshape: the order of axes in which elements are taken, or None: that of the operand."""
    return eqn.params.get("dimensions")


def get_result_shape(eqn: Equation) -> tuple[int, ...]:
    """The shape of the first result."""
    return get_shape(eqn.outvars[0])


def get_broadcast_dimensions(eqn: Equation) -> tuple[int, ...]:
    """broadcast_in_dim: axis i of the operand is this axis of the result."""
    return tuple(map(int, eqn.params["broadcast_dimensions"]))  # vmap leaves NumPy's integers


class Slice(NamedTuple):
    """slice: along each axis the entries start, start + stride, ... below limit."""

    starts: tuple[int, ...]
    limits: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, eqn: Equation) -> Slice:
        """The parameters of an equation."""
        starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
        return cls(starts, limits, eqn.params["strides"] or (1,) * len(starts))


def get_slice_sizes(eqn: Equation) -> tuple[int, ...]:
    """dynamic_slice: the shape of the result."""
    return tuple(eqn.params["slice_sizes"])


class Split(NamedTuple):
    """split: an axis, cut into parts of these sizes."""

    axis: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, eqn: Equation) -> Split:
        """The parameters of an equation."""
        return cls(eqn.params["axis"], tuple(eqn.params["sizes"]))


def get_stack_axis(eqn: Equation) -> int:
    """stack and unstack: the axis."""
    return eqn.params["axis"]


def get_concatenate_axis(eqn: Equation) -> int:
    """concatenate: the axis."""
    return eqn.params["dimension"]


def get_padding(eqn: Equation) -> Sequence[tuple[int, int, int]]:
    """pad: for each axis how much comes before, after and between."""
    return eqn.params["padding_config"]


def get_reversed_axes(eqn: Equation) -> list[int]:
    """rev: the axes."""
    return list(eqn.params["dimensions"])


def get_devices(eqn: Equation) -> Sequence[Any]:
    """device_put: for each operand the device, sharding or memory space, or None."""
    return eqn.params["devices"]


def get_new_sharding(eqn: Equation) -> Any:
    """reshard: the sharding of the result."""
    return eqn.params["dst_sharding"]


def bind_reshard(eqn: Equation, array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """The result of a reshard of another array to another sharding."""
    return jaxprs.bind(eqn, [array], dst_sharding=sharding)[0]


# Products


class Dot(NamedTuple):
    """dot_general: dimension numbers, and the other keyword arguments of lax.dot_general."""

    numbers: Any
    options: dict[str, Any]

    @classmethod
    def of(cls, eqn: Equation) -> Dot:
        """The parameters of an equation."""
        return cls(eqn.params["dimension_numbers"], _get_params(eqn, _DOT_OPTIONS))


class RaggedDot(NamedTuple):
    """ragged_dot_general: dimension numbers, keyword arguments, and where the groups begin."""

    numbers: Any
    options: dict[str, Any]
    group_offset: Any

    @classmethod
    def of(cls, eqn: Equation) -> RaggedDot:
        """The parameters of an equation."""
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        return cls(numbers, _get_params(eqn, _DOT_OPTIONS), eqn.params["group_offset"])


_DOT_OPTIONS = ("precision", "preferred_element_type", "out_sharding")


def get_conv_options(eqn: Equation) -> dict[str, Any]:
    """conv_general_dilated: the keyword arguments of lax.conv_general_dilated."""
    names = (
        *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"),
        *("feature_group_count", "batch_group_count", *_DOT_OPTIONS),
    )
    return _get_params(eqn, names)


def get_gather_options(eqn: Equation) -> dict[str, Any]:
    """gather: the keyword arguments of lax.gather."""
    names = ("dimension_numbers", "slice_sizes", "unique_indices", "indices_are_sorted")
    return {name: eqn.params[name] for name in (*names, "mode", "fill_value")}


# Equations that hold jaxprs


def get_body(eqn: Equation) -> Any:
    """jit, remat, shard_map and calls: the jaxpr."""
    return eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]


def find_bodies(eqn: Equation) -> list[Any]:
    """Any equation: the jaxprs that take its operands and return its results."""
    shapes = lambda atoms: [getattr(atom.aval, "shape", None) for atom in atoms]
    found = []
    for value in eqn.params.values():
        inner, _ = jaxprs.split_jaxpr(value)
        if not hasattr(inner, "eqns"):
            continue
        sides = (inner.invars, eqn.invars), (inner.outvars, eqn.outvars)
        if all(shapes(inside) == shapes(outside) for inside, outside in sides):
            found.append(value)
    return found


class Jit(NamedTuple):
    """jit: the jaxpr, the user's name of it, and for each result a sharding or None."""

    jaxpr: Any
    name: str
    out_shardings: list[Any]

    @classmethod
    def of(cls, eqn: Equation) -> Jit:
        """The parameters of an equation."""
        shardings = [jaxprs.drop_unspecified(one) for one in eqn.params["out_shardings"]]
        return cls(eqn.params["jaxpr"], eqn.params["name"], shardings)


def get_remat_options(eqn: Equation) -> dict[str, Any]:
    """remat: the keyword arguments of jax.checkpoint."""
    return {name: eqn.params[name] for name in ("prevent_cse", "policy")}


class ShardMap(NamedTuple):
    """shard_map: the jaxpr of one device's part, and the keyword arguments of jax.shard_map."""

    jaxpr: Any
    mesh: Any
    in_specs: Sequence[Any]
    out_specs: Sequence[Any]
    check_vma: bool
    axis_names: frozenset[str]

    @classmethod
    def of(cls, eqn: Equation) -> ShardMap:
        """The parameters of an equation; JAX 0.10.2 renamed one."""
        params = eqn.params
        manual = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
        names = ("jaxpr", "mesh", "in_specs", "out_specs", "check_vma", manual)
        return cls(*(params[name] for name in names))


class Scan(NamedTuple):
    """scan: body(*consts, *carry, *slices) -> (*carry, *results), and how often."""

    jaxpr: Any
    consts: int
    carries: int
    length: int
    reverse: bool
    unroll: int

    @classmethod
    def of(cls, eqn: Equation) -> Scan:
        """The parameters of an equation."""
        own = (eqn.params[name] for name in ("length", "reverse", "unroll"))
        return cls(eqn.params["jaxpr"], *_count_scan_operands(eqn), *own)

    @property
    def first_slice(self) -> int:
        """The number of the first operand that is scanned over."""
        return self.consts + self.carries


def _count_scan_operands(eqn: Equation) -> tuple[int, int]:
    """Numbers of constants and carries of a scan: sequences have one axis more outside the body."""
    inner, _ = jaxprs.split_jaxpr(eqn.params["jaxpr"])
    ndim = lambda atoms: [len(atom.aval.shape) for atom in atoms]

    def sequences(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        count = 0
        for a, b in zip(reversed(ndim(outside)), reversed(ndim(inside)), strict=True):
            if a != b + 1:
                break
            count += 1
        return count

    carries = len(eqn.outvars) - sequences(eqn.outvars, inner.outvars)
    consts = len(eqn.invars) - sequences(eqn.invars, inner.invars) - carries
    return consts, carries


class While(NamedTuple):
    """while: cond(*cond_consts, *carry), body(*body_consts, *carry) -> carry."""

    cond: Any
    cond_consts: int
    body: Any
    body_consts: int

    @classmethod
    def of(cls, eqn: Equation) -> While:
        """The parameters of an equation."""
        names = ("cond_jaxpr", "cond_nconsts", "body_jaxpr", "body_nconsts")
        return cls(*(eqn.params[name] for name in names))

    @property
    def first_carry(self) -> int:
        """The number of the first operand that is carried."""
        return self.cond_consts + self.body_consts


def get_branches(eqn: Equation) -> Sequence[Any]:
    """cond and switch: the jaxprs, chosen from by the first operand."""
    return eqn.params["branches"]
