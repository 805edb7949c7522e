"""A dry run of a jaxpr, which finds how a function uses its parameters without computing anything.

One forward pass makes two analyses. It follows views of parameters through structural operations to
the equations that consume them. And it tracks for each variable the products that it depends on,
and those that reach it through bias, scale, cast, soft-cap and structural operations alone. Loops
are iterated to a fixed point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._interpreter.nesting import Nesting
from lowrank_jax._interpreter.operation import OTHER, OperationTable
from lowrank_jax._interpreter.roles import Roles
from lowrank_jax._interpreter.views import Key, View
from lowrank_jax._jax import jaxprs
from lowrank_jax._jax.types import Equation, Jaxpr


@dataclasses.dataclass(frozen=True)
class Value:
    """The abstract value of one variable.

    Args:
      views: views of the leaves whose elements it holds.
      computed: (path, equation) for each leaf that it is computed from, without data, by an
        equation that views cannot follow.
      data: whether it depends on arguments other than the parameters.
      activation: whether it depends on them numerically; masks and indices do not.
      output: whether it is computed from a product of parameters alone, as learned queries are.
      near: the products with leaves that it depends on numerically, with no other one between.
      direct: those that reach it through bias, scale, cast, soft-cap and structural operations.

    >>> Value(data=True, activation=True).data_rank  # the input of a product
    3
    >>> Value(views=(View.of("w", (4, 6)),)).data_rank  # its weight
    0
    """

    views: tuple[View, ...] = ()
    computed: tuple[tuple[str, str], ...] = ()
    data: bool = False
    activation: bool = False
    output: bool = False
    near: frozenset[Key] = frozenset()
    direct: frozenset[Key] = frozenset()

    @property
    def data_rank(self) -> int:
        """How it depends on data, from 0 to 3; the lower operand of a product is the weight."""
        if self.activation:
            return 3
        if self.data and self.has_no_leaves:
            return 2
        return int(self.is_activation_like or (self.data and bool(self.computed)))

    @property
    def has_no_leaves(self) -> bool:
        """Whether it holds no element of a leaf and is computed from none."""
        return not self.views and not self.computed

    @property
    def is_activation_like(self) -> bool:
        """Whether it is an activation, or rows of a table chosen by data."""
        return self.activation or (self.data and any(view.looked_up for view in self.views))

    def replace(self, **changes: Any) -> Value:
        """Return a copy with some fields replaced."""
        return Value(**{**vars(self), **changes})

    def map(self, fn: Callable[[View], View | None], *others: Value) -> Value:
        """Map each view; `others` are operands, such as indices, whose data it then depends on."""
        views = tuple(view for view in map(fn, self.views) if view is not None)
        return self.replace(views=views, data=self.data or any(o.data for o in others))


@dataclasses.dataclass
class Survey(Nesting):
    """The state and the results of a dry run.

    Args:
      operations: the table of operations.
      uses: path -> equation -> the roles of the leaf's axes in it, and its description.
      unfollowed: path -> the equation after which views could not follow the leaf, which then
        reached a product or an opaque call.
      leaves: product -> paths of the leaves that it takes.
      before: product -> the products that its operands depend on, with no other one between.
      routers: the products whose results a top_k selects from.
      silent: whether nothing is recorded, during the iteration of a loop.
      texts: equation -> its description.
      constants_are_data: whether the function closes over its data, as it has no data argument.
    """

    operations: OperationTable
    uses: dict[str, dict[Key, tuple[list[Roles], str]]] = dataclasses.field(default_factory=dict)
    unfollowed: dict[str, str] = dataclasses.field(default_factory=dict)
    leaves: dict[Key, set[str]] = dataclasses.field(default_factory=dict)
    before: dict[Key, frozenset[Key]] = dataclasses.field(default_factory=dict)
    routers: set[Key] = dataclasses.field(default_factory=set)
    silent: bool = False
    texts: dict[Key, str] = dataclasses.field(default_factory=dict)
    constants_are_data: bool = False

    def run(self, jaxpr: Jaxpr, args: Sequence[Value]) -> list[Value]:
        """Return the values of the results of a jaxpr."""
        inner, consts = jaxprs.split_jaxpr(jaxpr)
        variables = jaxprs.get_input_vars(jaxpr)
        constant = lambda var: make_argument_value(var.aval) if self.constants_are_data else Value()
        values = [*map(constant, variables[: len(consts)]), *args]
        env = dict(zip(variables, values, strict=True))
        read = lambda atom: Value() if isinstance(atom, jaxprs.Literal) else env[atom]
        default: Any = self.operations[""].survey
        for eqn in inner.eqns:
            rule = self.operations.get(eqn.primitive.name, OTHER).survey or default
            outs = rule(self, eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in inner.outvars]

    def make_key(self, eqn: Equation) -> Key:
        """Return the key of an equation in its present position."""
        return (*map(id, self.frame), id(eqn))

    def describe(self, eqn: Equation) -> str:
        """Return the primitive and the user's source line as text."""
        key = self.make_key(eqn)
        if key not in self.texts:
            self.texts[key] = f"{eqn.primitive.name} at {self.find_line(eqn)}"
        return self.texts[key]

    def note_use(self, path: str, key: Key, text: str, roles: Roles | None) -> None:
        """Record a use of a leaf."""
        if not self.silent:
            found, _ = self.uses.setdefault(path, {}).setdefault(key, ([], text))
            if roles is not None and roles not in found:
                found.append(roles)

    def note_read(self, eqn: Equation, views: Iterable[View], by_rows: bool = True) -> None:
        """Record that an equation takes views as plain arrays; `by_rows`: it may read rows."""
        for view in () if self.silent else views:
            if not view.summed:  # else the product with another parameter is its use
                self.note_use(
                    view.path, self.make_key(eqn), self.describe(eqn), view.find_read_roles(by_rows)
                )

    def mark_computed(
        self, eqn: Equation, value: Value, which: Callable[[View], bool] = lambda _: True
    ) -> Value:
        """Return a value after an equation that the views selected by `which` cannot follow."""
        taken = tuple(view for view in value.views if which(view))
        self.note_read(eqn, taken, by_rows=False)
        computed = self.find_computed(eqn, [value.replace(views=taken)])
        kept = tuple(view for view in value.views if view not in taken)
        return value.replace(views=kept, computed=computed)

    def find_computed(
        self, eqn: Equation, values: Sequence[Value], views: bool = True
    ) -> tuple[tuple[str, str], ...]:
        """Return (path, equation) for each leaf that a result of the values is computed from."""
        found = dict(pair for value in reversed(values) for pair in reversed(value.computed))
        taken = [v for value in values for v in value.views if v.is_matrix()] if views else []
        if fresh := [view.path for view in taken if view.path not in found]:
            found |= dict.fromkeys(fresh, self.describe(eqn))
        return tuple(sorted(found.items()))

    def note_unfollowed(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Record leaves that reach a product or an opaque call after views could not follow."""
        if not self.silent:
            for path, why in pairs:
                self.unfollowed.setdefault(path, why)

    def note_product(self, eqn: Equation, paths: Iterable[str], operands: Value) -> Key:
        """Record a product that takes leaves; `operands`: the merged value of its operands."""
        key = self.make_key(eqn)
        if not self.silent:
            self.leaves.setdefault(key, set()).update(paths)
            self.before[key] = self.before.get(key, frozenset()) | operands.near
        return key

    def join(self, eqn: Equation, values: Sequence[Value]) -> Value:
        """Return the value of a variable that may be any of `values`; views remain if all agree."""
        views, activation = values[0].views, any(value.is_activation_like for value in values)
        if same := all(value.views == views for value in values):
            computed = self.find_computed(eqn, values, views=False)
        else:
            for value in values:
                self.note_read(eqn, value.views, by_rows=activation)
            computed = () if activation else self.find_computed(eqn, values)
        if same:
            activation = any(value.activation for value in values)
        return merge_values(values).replace(
            views=views if same else (), computed=computed, activation=activation
        )

    def find_fixed_point(
        self, eqn: Equation, carry: Sequence[Value], constant: Sequence[bool], step: Callable
    ) -> tuple[list[Value], list[Value]]:
        """Iterate a loop until its carry no longer changes; return the carry and other results.

        A product reaches a carry directly only if the loop leaves the carry unchanged.
        """
        # In h = tanh(h @ w) with carry h, the first step sees an h that depends on no product, the
        # second one that depends on h @ w. Values only gain dependences or lose views, so that the
        # iteration ends. It is silent; one more step then records what it found.
        rest = lambda value: value.replace(direct=frozenset())
        start = [v if c else rest(v) for v, c in zip(carry, constant, strict=True)]
        now, before, outs = start, None, []
        silent, self.silent = self.silent, True
        try:
            while now != before:
                before = now
                outs = step(now)[: len(now)]
                outs = [v if c else rest(v) for v, c in zip(outs, constant, strict=True)]
                now = [self.join(eqn, pair) for pair in zip(now, outs, strict=True)]
        finally:
            self.silent = silent
        for before, after, merged in zip(start, outs, now, strict=True):
            if not before.views == after.views == merged.views:
                self.note_read(eqn, (*before.views, *after.views), by_rows=merged.activation)
        return now, step(now)[len(now) :]


def is_numeric_dtype(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a dtype is one of numbers; integers above 8 bits are indices and masks.

    >>> is_numeric_dtype("bfloat16"), is_numeric_dtype("int8"), is_numeric_dtype("int32")
    (True, True, False)
    """
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return jnp.iinfo(dtype).bits <= 8
    return jnp.issubdtype(dtype, jnp.inexact)


def make_argument_value(aval: jaxprs.ShapedArray) -> Value:
    """Return the value of a data argument; a scalar (a temperature) is not an activation."""
    return Value(data=True, activation=is_numeric_dtype(aval.dtype) and bool(aval.ndim))


def merge_values(values: Sequence[Value]) -> Value:
    """Return the union of what some values depend on."""
    return Value(
        data=any(value.data for value in values),
        activation=any(value.activation for value in values),
        output=any(value.output for value in values),
        near=_unite([value.near for value in values]),
        direct=_unite([value.direct for value in values]),
    )


def _unite(sets: Sequence[frozenset[Key]]) -> frozenset[Key]:
    """Return the union of sets: one of them, not a copy, where the others are empty or it."""
    # near grows with depth, in a residual stream, so a copy for each equation would be quadratic
    several = {id(one): one for one in sets if one}
    if len(several) < 2:
        return next(iter(several.values()), _NONE)
    return _NONE.union(*several.values())


_NONE: frozenset[Key] = frozenset()


def clear_if_index(eqn: Equation, value: Value, place: int = 0) -> Value:
    """Clear the numerical dependences of a result that is an index or a mask by its dtype."""
    if is_numeric_dtype(getattr(eqn.outvars[place].aval, "dtype", jnp.int32)):
        return value
    return value.replace(activation=False, near=_NONE, direct=_NONE)
