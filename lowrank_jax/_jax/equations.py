"""Accessors for the parameters of jaxpr equations: the only module that knows their JAX names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal, Var

from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import Equation, Jaxpr, Shape


def _get_params(eqn: Equation, names: Iterable[str]) -> dict[str, Any]:
    """Return those of the named parameters that are present and not None."""
    return {name: eqn.params[name] for name in names if eqn.params.get(name) is not None}


def get_shape(atom: Var | Literal) -> Shape:
    """Return the shape of an operand or a result."""
    aval: Any = atom.aval
    return tuple(aval.shape)


def get_operation_key(eqn: Equation) -> tuple[Any, ...]:
    """Return a hashable key of an equation's primitive and parameters, for plain parameters."""
    return eqn.primitive.name, *eqn.params.items()


# Structural operations


def get_new_dtype(eqn: Equation) -> Any:
    """Return the target dtype of a convert_element_type."""
    return eqn.params["new_dtype"]


def get_permutation(eqn: Equation) -> tuple[int, ...]:
    """Return the permutation of a transpose: axis i of the result is operand axis perm[i]."""
    return tuple(eqn.params["permutation"])


def get_reshape_order(eqn: Equation) -> tuple[int, ...] | None:
    """Return the order in which a reshape reads the operand's axes; None is their natural order."""
    return eqn.params.get("dimensions")


def get_result_shape(eqn: Equation) -> tuple[int, ...]:
    """Return the shape of the first result."""
    return get_shape(eqn.outvars[0])


def get_broadcast_dimensions(eqn: Equation) -> tuple[int, ...]:
    """Return for each operand axis of a broadcast_in_dim its axis in the result."""
    return tuple(map(int, eqn.params["broadcast_dimensions"]))  # vmap produces NumPy integers


class Slice(NamedTuple):
    """The parameters of slice: start, limit and stride of each axis.

    >>> Slice(starts=(0, 2), limits=(4, 8), strides=(1, 3))  # x[0:4, 2:8:3]
    Slice(starts=(0, 2), limits=(4, 8), strides=(1, 3))
    """

    starts: tuple[int, ...]
    limits: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, eqn: Equation) -> Slice:
        """Read the parameters of an equation."""
        starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
        return cls(starts, limits, eqn.params["strides"] or (1,) * len(starts))


def get_slice_sizes(eqn: Equation) -> tuple[int, ...]:
    """Return the result shape of a dynamic_slice."""
    return tuple(eqn.params["slice_sizes"])


class Split(NamedTuple):
    """The parameters of split: the axis, and the sizes of the parts along it."""

    axis: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, eqn: Equation) -> Split:
        """Read the parameters of an equation."""
        return cls(eqn.params["axis"], tuple(eqn.params["sizes"]))


def get_stack_axis(eqn: Equation) -> int:
    """Return the axis of a stack or unstack."""
    return eqn.params["axis"]


def get_concatenate_axis(eqn: Equation) -> int:
    """Return the axis of a concatenate."""
    return eqn.params["dimension"]


def get_padding(eqn: Equation) -> Sequence[tuple[int, int, int]]:
    """Return the (low, high, interior) padding of each axis of a pad."""
    return eqn.params["padding_config"]


def get_reversed_axes(eqn: Equation) -> list[int]:
    """Return the axes that a rev flips."""
    return list(eqn.params["dimensions"])


def get_devices(eqn: Equation) -> Sequence[Any]:
    """Return for each operand of a device_put its device, sharding or memory space, or None."""
    return eqn.params["devices"]


def get_constraint(eqn: Equation) -> Any:
    """Return the sharding of a sharding_constraint."""
    return eqn.params["sharding"]


def get_new_sharding(eqn: Equation) -> Any:
    """Return the target sharding of a reshard."""
    return eqn.params["dst_sharding"]


def bind_reshard(eqn: Equation, array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Bind a reshard equation to another array and another sharding."""
    return jaxprs.bind(eqn, [array], dst_sharding=sharding)[0]


# Products


class Dot(NamedTuple):
    """The parameters of dot_general: dimension numbers, and other keywords of lax.dot_general."""

    numbers: Any
    options: dict[str, Any]

    @classmethod
    def of(cls, eqn: Equation) -> Dot:
        """Read the parameters of an equation."""
        return cls(eqn.params["dimension_numbers"], _get_params(eqn, _DOT_OPTIONS))


class RaggedDot(NamedTuple):
    """The parameters of ragged_dot_general: dimension numbers, keywords, and the group offset."""

    numbers: Any
    options: dict[str, Any]
    group_offset: Any

    @classmethod
    def of(cls, eqn: Equation) -> RaggedDot:
        """Read the parameters of an equation."""
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        return cls(numbers, _get_params(eqn, _DOT_OPTIONS), eqn.params["group_offset"])


_DOT_OPTIONS = ("precision", "preferred_element_type", "out_sharding")


def get_conv_options(eqn: Equation) -> dict[str, Any]:
    """Return the keyword arguments of lax.conv_general_dilated for an equation."""
    names = (
        *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"),
        *("feature_group_count", "batch_group_count", *_DOT_OPTIONS),
    )
    return _get_params(eqn, names)


def get_gather_options(eqn: Equation) -> dict[str, Any]:
    """Return the keyword arguments of lax.gather for an equation."""
    names = ("dimension_numbers", "slice_sizes", "unique_indices", "indices_are_sorted")
    return {name: eqn.params[name] for name in (*names, "mode", "fill_value")}


# Equations that hold jaxprs


def get_body(eqn: Equation) -> Any:
    """Return the one jaxpr of a jit, remat, shard_map or call, by its known parameter."""
    return eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]


def find_bodies(eqn: Equation) -> list[Any]:
    """Return the jaxprs of any equation, in any parameter, that map its operands to its results."""
    # A custom_jvp_call, say, holds its function as a jaxpr parameter. Its name differs between
    # primitives, but the function's inputs and outputs have the shapes of operands and results.
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
    """The parameters of jit: the jaxpr, the function's name, and each result's sharding or None."""

    jaxpr: Any
    name: str
    out_shardings: list[Any]

    @classmethod
    def of(cls, eqn: Equation) -> Jit:
        """Read the parameters of an equation."""
        shardings = [jaxprs.drop_unspecified(one) for one in eqn.params["out_shardings"]]
        return cls(eqn.params["jaxpr"], eqn.params["name"], shardings)


def collect_constants(jaxpr: Jaxpr) -> list[Any]:
    """Collect the arrays that a traced function, or a body inside of it, closes over, each once."""
    found: dict[int, Any] = {}

    def collect(jaxpr: Any) -> None:
        inner, consts = jaxprs.split_jaxpr(jaxpr)
        found.update({id(const): const for const in consts if hasattr(const, "dtype")})
        for eqn in inner.eqns:
            for value in eqn.params.values():
                bodies = value if isinstance(value, tuple | list) else (value,)
                for body in bodies:
                    if hasattr(jaxprs.split_jaxpr(body)[0], "eqns"):
                        collect(body)

    collect(jaxpr)
    return [*found.values()]


def get_remat_options(eqn: Equation) -> dict[str, Any]:
    """Return the keyword arguments of jax.checkpoint for a remat."""
    return {name: eqn.params[name] for name in ("prevent_cse", "policy")}


class ShardMap(NamedTuple):
    """The parameters of shard_map: the per-device jaxpr, and the keywords of jax.shard_map."""

    jaxpr: Any
    mesh: Any
    in_specs: Sequence[Any]
    out_specs: Sequence[Any]
    check_vma: bool
    axis_names: frozenset[str]

    @classmethod
    def of(cls, eqn: Equation) -> ShardMap:
        """Read the parameters of an equation; JAX 0.10.2 renamed one of them."""
        params = eqn.params
        manual = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
        names = ("jaxpr", "mesh", "in_specs", "out_specs", "check_vma", manual)
        return cls(*(params[name] for name in names))


class Scan(NamedTuple):
    """The parameters of scan: body(*consts, *carry, *xs) -> (*carry, *ys), and its operand counts.

    Args:
      jaxpr: the body.
      consts: the number of loop-invariant operands.
      carries: the number of carried operands.
      length: the number of steps.
      reverse: whether the last slice comes first.
      unroll: how many steps are unrolled.
    """

    jaxpr: Any
    consts: int
    carries: int
    length: int
    reverse: bool
    unroll: int

    @classmethod
    def of(cls, eqn: Equation) -> Scan:
        """Read the parameters of an equation."""
        own = (eqn.params[name] for name in ("length", "reverse", "unroll"))
        return cls(eqn.params["jaxpr"], *_count_scan_operands(eqn), *own)

    @property
    def first_slice(self) -> int:
        """Index of the first scanned operand."""
        return self.consts + self.carries


def _count_scan_operands(eqn: Equation) -> tuple[int, int]:
    """Return the numbers of constants and of carries of a scan."""
    # The counts are parameters, whose names drift between releases, so they are inferred: a scanned
    # array has one axis more outside the body than inside. For a body (w [4, 8], h [2, 4], x [3])
    # -> (h [2, 4], y [5]) scanned over x [6, 3] into y [6, 5], the trailing operands and results
    # with ndim + 1 are one each, which leaves one carry, and one constant.
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
    """The parameters of while: cond(*cond_consts, *carry), body(*body_consts, *carry) -> carry."""

    cond: Any
    cond_consts: int
    body: Any
    body_consts: int

    @classmethod
    def of(cls, eqn: Equation) -> While:
        """Read the parameters of an equation."""
        names = ("cond_jaxpr", "cond_nconsts", "body_jaxpr", "body_nconsts")
        return cls(*(eqn.params[name] for name in names))

    @property
    def first_carry(self) -> int:
        """Index of the first carried operand."""
        return self.cond_consts + self.body_consts


def get_branches(eqn: Equation) -> Sequence[Any]:
    """Return the branches of a cond or switch, which the first operand selects from."""
    return eqn.params["branches"]
