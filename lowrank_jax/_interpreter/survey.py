"""A dry run: what each variable of a jaxpr holds of the parameters, and what it depends on.

Two analyses in one forward pass, in which nothing is traced or computed. Views of parameters are
followed through structural operations to the equations that consume them. And for each variable it
is known on which products it depends by its numbers, and which reach it by bias, scale, cast,
soft-cap and structural operations alone. Loops are repeated until nothing changes.
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
    """What is known of one variable.

    Args:
      views: the leaves whose elements it holds, rearranged.
      computed: (path, equation) for each leaf it is computed from, with parameters alone, by an
        equation that no rule follows.
      data: it depends on arguments other than the parameters.
      activation: it does by its numbers; masks and indices made of integers are no activations.
      output: it is computed from a product of parameters alone, as learned queries are.
      products: products with leaves that it depends on by its numbers.
      direct: those that reach it by bias, scale, cast, soft-cap and structural operations.
      near: those that reach it by any operations but products.
    """

    views: tuple[View, ...] = ()
    computed: tuple[tuple[str, str], ...] = ()
    data: bool = False
    activation: bool = False
    output: bool = False
    products: frozenset[Key] = frozenset()
    direct: frozenset[Key] = frozenset()
    near: frozenset[Key] = frozenset()

    @property
    def data_rank(self) -> int:
        """Of two operands of a product, that of the lower rank is the weight; 0 is of no data."""
        if self.activation:
            return 3
        if self.data and self.has_no_leaves:
            return 2
        return int(self.is_activation_like or (self.data and bool(self.computed)))

    @property
    def has_no_leaves(self) -> bool:
        """Whether it holds nothing of any leaf."""
        return not self.views and not self.computed

    @property
    def is_activation_like(self) -> bool:
        """Whether it is an activation, or rows that data chose."""
        return self.activation or (self.data and any(view.looked_up for view in self.views))

    def replace(self, **changes: Any) -> Value:
        """With other fields."""
        return dataclasses.replace(self, **changes)

    def map(self, fn: Callable[[View], View | None], *others: Value) -> Value:
        """With each view mapped; others are indices, which say where the elements come from."""
        views = tuple(view for view in map(fn, self.views) if view is not None)
        return self.replace(views=views, data=self.data or any(o.data for o in others))


@dataclasses.dataclass
class Survey(Nesting):
    """What a dry run found.

    Args:
      operations: the table.
      uses: path -> equation -> the roles of the leaf's axes in it, and the equation in words.
      unfollowed: path -> the equation by which the leaf reaches a product or an opaque call while
        no rule follows it.
      leaves: product -> paths of the leaves that it takes.
      inputs: product -> the products that its operands depend on.
      before: product -> those of them with no other product between.
      routers: products that a choice of the largest (top_k) is made from.
      silent: nothing is noted: a loop is repeated until nothing changes.
      texts: equation -> the equation in words.
      constants_are_data: no argument is, so the function closes over its data.
    """

    operations: OperationTable
    uses: dict[str, dict[Key, tuple[list[Roles], str]]] = dataclasses.field(default_factory=dict)
    unfollowed: dict[str, str] = dataclasses.field(default_factory=dict)
    leaves: dict[Key, set[str]] = dataclasses.field(default_factory=dict)
    inputs: dict[Key, frozenset[Key]] = dataclasses.field(default_factory=dict)
    before: dict[Key, frozenset[Key]] = dataclasses.field(default_factory=dict)
    routers: set[Key] = dataclasses.field(default_factory=set)
    silent: bool = False
    texts: dict[Key, str] = dataclasses.field(default_factory=dict)
    constants_are_data: bool = False

    def run(self, jaxpr: Jaxpr, args: Sequence[Value]) -> list[Value]:
        """The values of the results of a jaxpr."""
        inner, consts = jaxprs.split_jaxpr(jaxpr)
        binders = jaxprs.get_input_vars(jaxpr)
        constant = lambda var: make_argument_value(var.aval) if self.constants_are_data else Value()
        values = [*map(constant, binders[: len(consts)]), *args]
        env = dict(zip(binders, values, strict=True))
        read = lambda atom: Value() if isinstance(atom, jaxprs.Literal) else env[atom]
        otherwise: Any = self.operations[""].survey
        for eqn in inner.eqns:
            rule = self.operations.get(eqn.primitive.name, OTHER).survey or otherwise
            outs = rule(self, eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in inner.outvars]

    def make_key(self, eqn: Equation) -> Key:
        """The name of an equation where it stands."""
        return (*map(id, self.frame), id(eqn))

    def describe(self, eqn: Equation) -> str:
        """The primitive and the user's source line."""
        key = self.make_key(eqn)
        if key not in self.texts:
            self.texts[key] = f"{eqn.primitive.name} at {self.find_line(eqn)}"
        return self.texts[key]

    def note_use(self, path: str, key: Key, text: str, roles: Roles | None) -> None:
        """Note a use of a leaf."""
        if not self.silent:
            found, _ = self.uses.setdefault(path, {}).setdefault(key, ([], text))
            if roles is not None and roles not in found:
                found.append(roles)

    def note_read(self, eqn: Equation, views: Iterable[View], by_rows: bool = True) -> None:
        """Note that an equation takes views as plain arrays; by_rows: rows may be read by it."""
        for view in () if self.silent else views:
            if not view.summed:  # else a product with another parameter has been noted
                self.note_use(
                    view.path, self.make_key(eqn), self.describe(eqn), view.find_read_roles(by_rows)
                )

    def mark_computed(
        self, eqn: Equation, value: Value, which: Callable[[View], bool] = lambda _: True
    ) -> Value:
        """The value as an equation takes it that no rule follows; which: of its views."""
        taken = tuple(view for view in value.views if which(view))
        self.note_read(eqn, taken, by_rows=False)
        computed = self.find_computed(eqn, [value.replace(views=taken)])
        kept = tuple(view for view in value.views if view not in taken)
        return value.replace(views=kept, computed=computed)

    def find_computed(
        self, eqn: Equation, values: Sequence[Value], views: bool = True
    ) -> tuple[tuple[str, str], ...]:
        """Each leaf that a result of these values is computed from, and by which equation."""
        found = dict(pair for value in reversed(values) for pair in reversed(value.computed))
        taken = [v for value in values for v in value.views if v.is_matrix()] if views else []
        if fresh := [view.path for view in taken if view.path not in found]:
            found |= dict.fromkeys(fresh, self.describe(eqn))
        return tuple(sorted(found.items()))

    def note_unfollowed(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Note leaves that reach a product, or an opaque call, while no rule follows them."""
        if not self.silent:
            for path, why in pairs:
                self.unfollowed.setdefault(path, why)

    def note_product(self, eqn: Equation, paths: Iterable[str], operands: Value) -> Key:
        """Note a product that takes leaves; operands: what is common to them."""
        key = self.make_key(eqn)
        if not self.silent:
            self.leaves.setdefault(key, set()).update(paths)
            self.inputs[key] = self.inputs.get(key, frozenset()) | operands.products
            self.before[key] = self.before.get(key, frozenset()) | operands.near
        return key

    def join(self, eqn: Equation, values: Sequence[Value]) -> Value:
        """What may be any of some values: a weight only where all are the same."""
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
        """A loop: (its carry, what its last step returns beside), until nothing changes.

        A product reaches a carry directly only where the loop leaves that as it is.
        """
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
        for one, other, joined in zip(start, outs, now, strict=True):
            if not one.views == other.views == joined.views:
                self.note_read(eqn, (*one.views, *other.views), by_rows=joined.activation)
        return now, step(now)[len(now) :]


def is_numeric_dtype(dtype: jax.typing.DTypeLike) -> bool:
    """Whether values of a dtype are computed with: integers of more than 8 bits index and mask."""
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return jnp.iinfo(dtype).bits <= 8
    return jnp.issubdtype(dtype, jnp.inexact)


def make_argument_value(aval: jaxprs.ShapedArray) -> Value:
    """An array other than a parameter: data. A scalar is a temperature or a step, no activation."""
    return Value(data=True, activation=is_numeric_dtype(aval.dtype) and bool(aval.ndim))


def merge_values(values: Sequence[Value]) -> Value:
    """What is common to the results of any equation: the union of what its operands depend on."""
    union = lambda name: frozenset().union(*(getattr(value, name) for value in values))
    has = lambda name: any(getattr(value, name) for value in values)
    return Value(
        data=has("data"),
        activation=has("activation"),
        output=has("output"),
        products=union("products"),
        direct=union("direct"),
        near=union("near"),
    )


def clear_if_index(eqn: Equation, value: Value, place: int = 0) -> Value:
    """A result by its dtype: to depend on an index or a mask is to depend on no number."""
    if is_numeric_dtype(getattr(eqn.outvars[place].aval, "dtype", jnp.int32)):
        return value
    none: frozenset[Key] = frozenset()
    return value.replace(activation=False, products=none, direct=none, near=none)
