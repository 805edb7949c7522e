"""An NNX module as a pure function of its parameters, its other state threaded or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lowrank_jax._checks.arguments import anything, check_arguments, describe_value
from lowrank_jax._errors import StateError, TreeError, list_problems, make_not_lifted_error
from lowrank_jax._interpreter.operation import find_forwarded
from lowrank_jax._interpreter.table import OPERATIONS
from lowrank_jax._jax.jaxprs import is_tracer
from lowrank_jax._jax.paths import flatten, unflatten_by_path
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import is_node
from lowrank_jax._transforms.lift import is_array, split_arguments, trace

if TYPE_CHECKING:  # imported where it is used: the core does not depend on Flax
    from flax import nnx

Method = Callable[..., Any] | str


@check_arguments(TreeError, model=anything)
def functional(
    model: nnx.Module, *, wrt: Any = None, method: Method | None = None
) -> tuple[Callable, Any]:
    """Make a pure function and its parameters of an NNX module.

    `fn(params, *args, **kwargs)` equals `model(*args, **kwargs)` with these parameters. The model
    is not changed, now or later, and later changes to it do not reach fn: call `model.eval()` or
    `model.train()` before.

    Other state (batch statistics, dropout's counters, caches) is as it is in the model now. fn
    reads it; a call that would change it is refused when traced, for fn could only forget the
    change: `functional_with_state` returns the new state instead.

    Args:
      model: an instance of nnx.Module.
      wrt: a filter of the variables that are parameters; None is nnx.Param and its subclasses.
      method: what to call in place of `model(...)`: the name of a method, or a function
        (model, *args, **kwargs).

    Returns:
      (fn, params): params is a dict of arrays, nested like the model's attributes, for `plan`,
      `init` and `lift`. A variable shared by several modules is one leaf. fn finds each leaf by its
      path: other containers, and keys that print alike (0 and "0"), will do.

    Raises:
      TreeError: model is no NNX module, or has no parameters; or fn is called with other
        parameters than the model's, each of which is listed.
      StateError: when fn is called, and the call would change the model: each variable is listed.

    Source: nnx.split and nnx.merge, of which fn is made.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> fn, params = functional(model)
    >>> sorted(params), bool((fn(params, jnp.ones((2, 4))) == model(jnp.ones((2, 4)))).all())
    (['bias', 'kernel'], True)
    """
    pure, params, state = _SplitModule.of(model, wrt, method)

    def fn(params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        out, after = pure.apply(params, state, args, kwargs)
        if changed := pure.find_changed(params, state, after, args, kwargs):
            raise StateError(
                "the call changes variables of the model, and a function of the parameters alone "
                "would forget that. Call model.eval() before lowrank.functional(model) where batch "
                "statistics and dropout are to rest, pass dropout's rngs as an argument (a new "
                "nnx.Rngs(dropout=key) in each call), or take "
                "lowrank.functional_with_state(model), whose function returns the new state:\n"
                f"{pure.format_variables(changed)}"
            )
        return out

    return fn, params


@check_arguments(TreeError, model=anything)
def functional_with_state(
    model: nnx.Module, *, wrt: Any = None, method: Method | None = None
) -> tuple[Callable, Any, Any]:
    """Make a pure function, its parameters and its other state of an NNX module.

    `out, state = fn(params, state, *args, **kwargs)` is `out = model(*args, **kwargs)` with the
    model's changes to itself returned: moving batch statistics, counters of dropout keys, caches.

    Args:
      model: an instance of nnx.Module.
      wrt: as in functional.
      method: as in functional.

    Returns:
      (fn, params, state): params and state are dicts of arrays, nested like the model's
      attributes; fn finds each leaf by its path, as in functional. The state that fn returns has
      the structure of the one it takes, keys and containers.

    Raises:
      TreeError: model is no NNX module, or has no parameters; or fn is called with other
        parameters or state than the model's.
      StateError: when fn is called, and the call would change a parameter, or add variables
        (`sow`) or leaves of them, which neither params nor state has room for.

    Source: nnx.split and nnx.merge, of which fn is made.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> fn, params, state = functional_with_state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> out, new = fn(params, state, jnp.ones((2, 3)))
    >>> float(state["mean"][0]), round(float(new["mean"][0]), 4)
    (0.0, 0.01)
    """
    pure, params, state = _SplitModule.of(model, wrt, method)

    def fn(params: PyTree, state: PyTree, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        out, after = pure.apply(params, state, args, kwargs)
        changed = pure.find_changed(params, state, after, args, kwargs)
        if lost := [path for path in changed if path in pure.params]:
            raise StateError(
                "the call changes parameters of the model; only other state can be returned. Hold "
                "what the call changes in a variable of another type than nnx.Param "
                f"(nnx.BatchStat, nnx.Variable), or leave it out by wrt:\n{pure.format_variables(lost)}"
            )
        return out, pure.restore_structure(state, after[1])

    return fn, params, state


class _SplitModule:
    """A module taken apart: what merges it, calls it, and takes it apart again."""

    def __init__(self, graphdef: Any, wrt: Any, method: Callable, params: PyTree, state: PyTree):
        self.graphdef, self.wrt, self.method = graphdef, wrt, method
        self.params, self.state = _find_variable_types(params), _find_variable_types(state)
        # a State made of its structure: nnx.merge takes no dict where a variable holds a tree
        self.structures = jax.tree.structure(params), jax.tree.structure(state)

    @classmethod
    def of(cls, model: Any, wrt: Any, method: Method | None) -> tuple[_SplitModule, Any, Any]:
        """The parts of a module, its parameters and its other state."""
        from flax import nnx

        if not isinstance(model, nnx.Module):
            raise _make_module_error(model)
        wrt = nnx.Param if wrt is None else wrt
        try:
            nnx.filterlib.to_predicate(wrt)
        except (TypeError, ValueError) as error:
            raise TreeError(
                f"wrt is {describe_value(wrt)}; expected a filter of NNX, as nnx.Param or a tuple of types"
            ) from error
        graphdef, params, state = nnx.split(model, wrt, ...)
        if not jax.tree.leaves(params):
            raise TreeError(
                f"{type(model).__name__} has no parameters of {wrt!r}: pass wrt, a filter of the "
                "variables to be adapted"
            )
        pure = cls(graphdef, wrt, _resolve_method(model, method), params, state)
        return pure, nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(
        self, params: PyTree, state: PyTree, args: Any, kwargs: Any
    ) -> tuple[Any, tuple[Any, Any]]:
        """The result of a call, and (params, state) after it."""
        from flax import nnx

        # by path, not by order: numbers of layers may have become text, which has "10" before "2"
        leaves = (
            _match_leaves(self.params, params, "params"),
            _match_leaves(self.state, state, "state"),
        )
        states = map(jax.tree.unflatten, self.structures, leaves)
        model = nnx.merge(self.graphdef, *states)
        out = self.method(model, *args, **kwargs)
        graphdef, *after = nnx.split(model, self.wrt, ...)
        if graphdef != self.graphdef:
            self._refuse_other_graph(*after)
        return out, (nnx.to_pure_dict(after[0]), nnx.to_pure_dict(after[1]))

    def _refuse_other_graph(self, params: PyTree, state: PyTree) -> None:
        """Raise, naming what a call added to the model or took from it."""
        now, known = (
            {**_find_variable_types(params), **_find_variable_types(state)},
            {**self.params, **self.state},
        )
        added = [f"{path} ({now[path]}): added" for path in now if path not in known]
        gone = [f"{path} ({known[path]}): removed" for path in known if path not in now]
        if not added + gone:
            raise StateError(
                "the call changes an attribute of the model that is no nnx.Variable, which a pure "
                "function cannot keep: hold it in one, or set it (model.eval(), say) before "
                "lowrank.functional(model)"
            )
        raise StateError(
            "the call adds variables to the model or removes some; a pure function cannot keep "
            "that. Return what was sown from method: method=lambda model, *args: (model(*args), "
            f"nnx.pop(model, nnx.Intermediate)):\n{list_problems(added + gone)}"
        )

    def restore_structure(self, state: PyTree, after: Any) -> Any:
        """The state after a call in the containers and with the keys of the one before it."""
        leaves = dict(flatten(after)[0])
        if lost := sorted(leaves.keys() ^ self.state.keys()):
            raise StateError(
                "the call gives variables of the model other leaves than they had, and the state "
                "that is returned has the structure of the one that came. Give these variables "
                f"values of their final structure before the call:\n{self.format_variables(lost)}"
            )
        return unflatten_by_path(state, leaves)

    def find_changed(
        self, params: PyTree, state: PyTree, after: Any, args: Any, kwargs: Any
    ) -> list[str]:
        """Paths of the variables that a call does not leave as they came."""
        before, now = _flatten_both(params, state), _flatten_both(*after)
        both = [path for path in before if is_array(before[path]) and is_array(now.get(path))]
        others = [path for path in {**before, **now} if path not in both]
        found = [path for path in others if not _is_same(before.get(path), now.get(path))]
        both = [path for path in both if before[path] is not now[path]]
        # nnx.jit, nnx.remat and nnx.scan hand every variable on, as another array: of those the
        # values tell which are the ones that came, or a trace where there are none
        if not any(is_tracer(tree[path]) for path in both for tree in (before, now)):
            return found + [path for path in both if not _is_equal(before[path], now[path])]
        run = lambda params, state: list(
            map(_flatten_both(*self.apply(params, state, args, kwargs)[1]).get, both)
        )
        call, dynamic, paths = split_arguments((params, state), {})
        through = find_forwarded(OPERATIONS, trace(run, call, dynamic, paths).jaxpr)
        entered = [path for path, leaf in before.items() if is_array(leaf)]
        pairs = zip(both, through[: len(both)], strict=True)
        return found + [path for path, i in pairs if i is None or entered[i] != path]

    def format_variables(self, paths: list[str]) -> str:
        """Variables, one to a line, with their types."""
        kinds = {**self.params, **self.state}
        return list_problems([f"{path} ({kinds.get(path, 'new')})" for path in paths])


def _flatten_both(params: PyTree, state: PyTree) -> dict[str, Any]:
    """Leaves of both by path."""
    return {path: leaf for tree in (params, state) for path, leaf in flatten(tree)[0]}


def _is_equal(one: Any, other: Any) -> bool:
    """Whether two arrays are equal in every value, NaNs too."""
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    floating = jnp.issubdtype(one.dtype, jnp.floating)
    return one.dtype == other.dtype and bool(jnp.array_equal(one, other, equal_nan=floating))


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values that are no arrays are equal."""
    return one is other or (type(one) is type(other) and not is_array(one) and bool(one == other))


def _make_module_error(value: Any) -> TreeError:
    """The error for what is no module, with the remedy for what it is."""
    if isinstance(value, type):
        came, remedy = f"the class {value.__name__}", "make an instance of it, with its rngs"
    else:
        came, remedy = type(value).__name__, "any function of (params, *args) is lifted as it is"
        if hasattr(value, "apply") and hasattr(value, "init"):
            remedy = "a Linen module's apply is a function already: lowrank.lift(model.apply)"
    return TreeError(f"functional takes an instance of nnx.Module, not {came}: {remedy}")


def _resolve_method(model: Any, method: Method | None) -> Callable:
    """The function (model, *args, **kwargs) that a call runs."""
    if callable(method):
        return method
    name = "__call__" if method is None else method
    if not isinstance(name, str) or not callable(getattr(type(model), name, None)):
        raise TreeError(
            f"{type(model).__name__} has no method {name!r}: pass method, the name of one or a "
            "function (model, *args)"
        )
    return lambda model, /, *args, **kwargs: getattr(model, name)(*args, **kwargs)


def _find_variable_types(state: PyTree) -> dict[str, str]:
    """Path of each leaf of a State -> type name of the variable that it is, or is part of."""
    from flax import nnx

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    found = {}
    for path, variable in flatten(state, is_leaf=is_variable)[0]:
        value = variable.get_value() if is_variable(variable) else variable
        for below, _ in flatten(value)[0]:
            found["/".join(filter(None, (path, below)))] = type(variable).__name__
    return found


def _match_leaves(expected: dict[str, str], tree: PyTree, what: str) -> list[Any]:
    """The leaves of a tree that has the model's variables and no others, in the model's order."""
    leaves = flatten(tree, is_leaf=is_node)[0]
    if any(is_node(leaf) for _, leaf in leaves):
        raise make_not_lifted_error("an adapted weight")
    came = dict(flatten(tree)[0])
    problems = [f"{path} ({kind}): missing" for path, kind in expected.items() if path not in came]
    problems += [f"{path}: unexpected" for path in sorted(came.keys() - expected.keys())]
    if problems:
        raise TreeError(
            f"the {what} given are not those of the model: pass a tree like the one that "
            f"functional returned, at the same level:\n{list_problems(problems)}"
        )
    return [came[path] for path in expected]
