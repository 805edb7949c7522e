"""functional: turn an NNX module into a pure function of its parameters and state."""

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

if TYPE_CHECKING:  # imported in the functions that use it: Flax is optional
    from flax import nnx

Method = Callable[..., Any] | str


@check_arguments(TreeError, model=anything)
def functional(
    model: nnx.Module, *, wrt: Any = None, method: Method | None = None
) -> tuple[Callable, Any]:
    """Split an NNX module into a pure function and its parameters.

    `fn(params, *args, **kwargs)` equals `model(*args, **kwargs)` with these parameters. The model
    is never changed, and later changes to it do not affect fn: call `model.eval()` or
    `model.train()` first.

    Other state (batch statistics, counters of dropout, caches) keeps the value it has in the model
    now. fn reads it. A call that would change it raises an error, since the change would be lost;
    `functional_with_state` returns the new state instead.

    Args:
      model: an instance of nnx.Module.
      wrt: an NNX filter that selects the parameters; None means nnx.Param and its subclasses.
      method: called instead of `model(...)`: the name of a method, or a function
        (model, *args, **kwargs).

    Returns:
      (fn, params): params is a dict of arrays, nested like the model's attributes, for `plan`,
      `init` and `lift`. A variable shared by several modules is one leaf. fn finds each leaf by its
      path, so other containers, and keys that print the same (0 and "0"), are accepted.

    Raises:
      TreeError: model is not an nnx.Module, or has no parameters; when fn is called, if its
        parameters are not those of the model.
      StateError: when fn is called, if the call would change a variable of the model.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    >>> fn, params = functional(model)
    >>> sorted(params), bool((fn(params, jnp.ones((2, 4))) == model(jnp.ones((2, 4)))).all())
    (['bias', 'kernel'], True)
    """
    split, params, state = _SplitModule.of(model, wrt, method)

    def fn(params: PyTree, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        out, after = split.apply(params, state, args, kwargs)
        if changed := split.find_changed(params, state, after, args, kwargs):
            raise StateError(
                "the call changes variables of the model, and a function of the parameters alone "
                "would lose the change. Call model.eval() before lowrank.functional(model) to turn "
                "off dropout and updates of batch statistics, pass dropout's rngs as an argument "
                "(a new nnx.Rngs(dropout=key) in each call), or use "
                "lowrank.functional_with_state(model), whose function returns the new state:\n"
                f"{split.format_variables(changed)}"
            )
        return out

    return fn, params


@check_arguments(TreeError, model=anything)
def functional_with_state(
    model: nnx.Module, *, wrt: Any = None, method: Method | None = None
) -> tuple[Callable, Any, Any]:
    """Split an NNX module into a pure function, its parameters and its other state.

    `out, state = fn(params, state, *args, **kwargs)` is `out = model(*args, **kwargs)`, and returns
    the changes of the model's state: moving batch statistics, counters of dropout keys, caches.

    Args:
      model: an instance of nnx.Module.
      wrt: as in functional.
      method: as in functional.

    Returns:
      (fn, params, state): params and state are dicts of arrays, nested like the model's
      attributes; fn finds each leaf by its path, as in functional. The returned state has the
      structure of the state passed in, including keys and containers.

    Raises:
      TreeError: model is not an nnx.Module, or has no parameters; when fn is called, if its
        parameters or state are not those of the model.
      StateError: when fn is called, if the call would change a parameter, add or remove variables
        (`sow`), or change the structure of a variable.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> fn, params, state = functional_with_state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> out, new = fn(params, state, jnp.ones((2, 3)))
    >>> float(state["mean"][0]), round(float(new["mean"][0]), 4)
    (0.0, 0.01)
    """
    split, params, state = _SplitModule.of(model, wrt, method)

    def fn(
        params: PyTree, state: PyTree = None, /, *args: PyTree, **kwargs: PyTree
    ) -> tuple[PyTree, PyTree]:
        out, after = split.apply(params, state, args, kwargs)
        changed = split.find_changed(params, state, after, args, kwargs)
        if lost := [path for path in changed if path in split.params]:
            raise StateError(
                "the call changes parameters of the model; only other state can be returned. Store "
                "the changing values in a variable of another type than nnx.Param (nnx.BatchStat, "
                f"nnx.Variable), or exclude them by wrt:\n{split.format_variables(lost)}"
            )
        return out, split.restore_structure(state, after[1])

    return fn, params, state


class _SplitModule:
    """The static parts of a split module, to merge it with arrays, call it, and split it again.

    Args:
      graphdef: from nnx.split.
      wrt: the filter of the parameters.
      method: the function (model, *args, **kwargs) to call.
      params, state: nnx.State of the parameters and of all else.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        wrt: nnx.filterlib.Filter,
        method: Callable,
        params: nnx.State,
        state: nnx.State,
    ):
        self.graphdef, self.wrt, self.method = graphdef, wrt, method
        self.params, self.state = _find_variable_types(params), _find_variable_types(state)
        # kept to rebuild a State: nnx.merge does not accept a dict where a variable holds a tree
        self.structures = jax.tree.structure(params), jax.tree.structure(state)

    @classmethod
    def of(
        cls, model: object, wrt: nnx.filterlib.Filter | None, method: Method | None
    ) -> tuple[_SplitModule, PyTree, PyTree]:
        """Split a module into its static parts, its parameters and its other state."""
        from flax import nnx

        if not isinstance(model, nnx.Module):
            raise _make_module_error(model)
        wrt = nnx.Param if wrt is None else wrt
        try:
            nnx.filterlib.to_predicate(wrt)
        except (TypeError, ValueError) as error:
            raise TreeError(
                f"wrt is {describe_value(wrt)}; expected an NNX filter, such as nnx.Param or a "
                "tuple of types"
            ) from error
        graphdef, params, state = nnx.split(model, wrt, ...)
        if not jax.tree.leaves(params):
            raise TreeError(
                f"{type(model).__name__} has no parameters of {wrt!r}: pass wrt, a filter of the "
                "variables to adapt"
            )
        split = cls(graphdef, wrt, _resolve_method(model, method), params, state)
        return split, nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def apply(
        self, params: PyTree, state: PyTree, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
    ) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        """Call the module; return its result, and (params, state) after the call."""
        from flax import nnx

        # by path, not by order: layer numbers may have become strings, which sort "10" before "2"
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
        """Raise an error that names the variables that a call added or removed."""
        now, known = (
            {**_find_variable_types(params), **_find_variable_types(state)},
            {**self.params, **self.state},
        )
        added = [f"{path} ({now[path]}): added" for path in now if path not in known]
        gone = [f"{path} ({known[path]}): removed" for path in known if path not in now]
        if not added + gone:
            raise StateError(
                "the call changes an attribute of the model that is not an nnx.Variable, which a "
                "pure function cannot keep: store it in a variable, or set it (for instance by "
                "model.eval()) before lowrank.functional(model)"
            )
        raise StateError(
            "the call adds variables to the model or removes some; a pure function cannot keep "
            "the change. Return sown values from method: method=lambda model, *args: "
            f"(model(*args), nnx.pop(model, nnx.Intermediate)):\n{list_problems(added + gone)}"
        )

    def restore_structure(self, state: PyTree, after: PyTree) -> PyTree:
        """Return the state after a call with the containers and keys of the state before it."""
        leaves = dict(flatten(after)[0])
        if lost := sorted(leaves.keys() ^ self.state.keys()):
            raise StateError(
                "the call changes the structure of variables of the model, and the returned state "
                "must have the structure of the state passed in. Give these variables values of "
                f"their final structure before the call:\n{self.format_variables(lost)}"
            )
        return unflatten_by_path(state, leaves)

    def find_changed(
        self,
        params: PyTree,
        state: PyTree,
        after: tuple[PyTree, PyTree],
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
    ) -> list[str]:
        """Return the paths of the variables that a call changed."""
        before, now = _flatten_both(params, state), _flatten_both(*after)
        both = [path for path in before if is_array(before[path]) and is_array(now.get(path))]
        others = [path for path in {**before, **now} if path not in both]
        found = [path for path in others if not _is_same(before.get(path), now.get(path))]
        both = [path for path in both if before[path] is not now[path]]
        # A variable that holds the same array object was not changed. nnx.jit, nnx.remat and
        # nnx.scan replace every variable by a new array, changed or not: compare the values of
        # those. Under a trace there are none; trace the call once more and ask its jaxpr which
        # input each result forwards. A variable that forwards its own input was not changed.
        if not any(is_tracer(tree[path]) for path in both for tree in (before, now)):
            return found + [path for path in both if not _is_equal(before[path], now[path])]
        run = lambda params, state: list(
            map(_flatten_both(*self.apply(params, state, args, kwargs)[1]).get, both)
        )
        call, dynamic, paths = split_arguments((params, state), {})
        through = find_forwarded(OPERATIONS, trace(run, call, dynamic, paths).jaxpr)
        inputs = [path for path, leaf in before.items() if is_array(leaf)]
        pairs = zip(both, through[: len(both)], strict=True)
        return found + [path for path, i in pairs if i is None or inputs[i] != path]

    def format_variables(self, paths: list[str]) -> str:
        """Format variables with their types, one per line."""
        kinds = {**self.params, **self.state}
        return list_problems([f"{path} ({kinds.get(path, 'new')})" for path in paths])


def _flatten_both(params: PyTree, state: PyTree) -> dict[str, Any]:
    """Return the leaves of both trees by path."""
    return {path: leaf for tree in (params, state) for path, leaf in flatten(tree)[0]}


def _is_equal(one: jax.Array, other: jax.Array) -> bool:
    """Whether two arrays are equal in dtype and in every value; NaN equals NaN."""
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    floating = jnp.issubdtype(one.dtype, jnp.floating)
    return one.dtype == other.dtype and bool(jnp.array_equal(one, other, equal_nan=floating))


def _is_same(one: object, other: object) -> bool:
    """Whether two values that are not arrays are of one type and equal."""
    return one is other or (type(one) is type(other) and not is_array(one) and bool(one == other))


def _make_module_error(value: object) -> TreeError:
    """Make the error for a value that is not a module, with a remedy for its type."""
    if isinstance(value, type):
        name, remedy = f"the class {value.__name__}", "make an instance of it, with its rngs"
    else:
        name, remedy = type(value).__name__, "lift a function of (params, *args) directly"
        if hasattr(value, "apply") and hasattr(value, "init"):
            remedy = "for a Linen module, lift its apply method: lowrank.lift(model.apply)"
    return TreeError(f"functional takes an instance of nnx.Module, not {name}: {remedy}")


def _resolve_method(model: nnx.Module, method: Method | None) -> Callable:
    """Return the function (model, *args, **kwargs) that a call runs."""
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
    """Map the path of each leaf of a State to the type name of its variable."""
    from flax import nnx

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    found = {}
    for path, variable in flatten(state, is_leaf=is_variable)[0]:
        value = variable.get_value() if is_variable(variable) else variable
        for below, _ in flatten(value)[0]:
            found["/".join(filter(None, (path, below)))] = type(variable).__name__
    return found


def _match_leaves(expected: dict[str, str], tree: PyTree, what: str) -> list[Any]:
    """Return the leaves of a tree in the model's order; raise unless the paths are the model's."""
    leaves = flatten(tree, is_leaf=is_node)[0]
    if any(is_node(leaf) for _, leaf in leaves):
        raise make_not_lifted_error("an adapted weight")
    came = dict(flatten(tree)[0])
    problems = [f"{path} ({kind}): missing" for path, kind in expected.items() if path not in came]
    problems += [
        f"{path or 'an array instead of a tree'}: unexpected"
        for path in sorted(came.keys() - expected.keys())
    ]
    if problems:
        raise TreeError(f"{_REMEDIES[what]}:\n{list_problems(problems)}")
    return [came[path] for path in expected]


_REMEDIES = {
    "params": (
        "the params given are not those of the model: pass a tree with the structure that "
        "functional returned"
    ),
    "state": (
        "the state given is not that of the model: the function of functional_with_state takes "
        "it after params, out, state = fn(params, state, *args); pass the state that "
        "functional_with_state returned, or that the last call did"
    ),
}
