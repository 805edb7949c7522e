"""init: the adapter of a parameter tree, and the base that is left."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import _jaxprs, initializers
from lowrank_jax._checks import anything, checked, is_seed, key_or_seed, shown
from lowrank_jax._configs import LoraConfig
from lowrank_jax._errors import ConfigError, LowrankError, TreeError
from lowrank_jax._nodes import (
    LowRank,
    as_dense,
    is_adapter,
    is_node,
    normed,
    trained_whole,
    unnormed,
)
from lowrank_jax._nodes.family import start_rows
from lowrank_jax._nodes.methods import find_method
from lowrank_jax._nodes.norms import sharding_of
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._paths import Pattern, flatten, matches, no_match, path_hash
from lowrank_jax._plan import Plan
from lowrank_jax._primitives.contract import RANK, accumulator, inverse, labeled_spec
from lowrank_jax._quantize import quantize_leaf, refuse_bad
from lowrank_jax._rounding import is_narrower, round_to
from lowrank_jax._statics import Static
from lowrank_jax._targets import Target, resolve, train_rows, train_whole, warn_of_passed_over
from lowrank_jax._types import PyTree
from lowrank_jax._weights.magnitude import norms_of

Initializer = Callable[[jax.Array, jax.Array, int, float], initializers.Factors]


@checked(key=key_or_seed, initializer=anything)
def init(
    key: jax.Array | int,
    params: PyTree,
    config: LoraConfig,
    *,
    plan: Plan | None = None,
    initializer: Initializer | str | Mapping[Pattern, Initializer | str] | None = None,
) -> tuple[Any, Any]:
    r"""Make the adapter of a parameter tree.

    For each target $W$ of shape [*stack, *i, *o] (in any order of axes): a is [*stack, *i, r], b is
    [*stack, r, *o], and $W_\text{eff} = W + s\,a\,b$; with `config.dora`
    $W_\text{eff} = m\,(W + s\,a\,b) / \lVert W + s\,a\,b \rVert$ for each output feature, m
    being that norm at first.

    Args:
      key: PRNG key, or an integer seed of one; a leaf's own key is fold_in(key, hash of its path),
        so that adding a target changes no other adapter.
      params: any pytree of arrays.
      config: which leaves, of which rank and scale.
      plan: of the function that uses params; needed for "all-linear" and for leaves of more than
        two axes. Without it a matrix is taken as [i, o].
      initializer: (key, weight [i, o] float32, rank, scale) -> (a, b, residual or None), the name
        of one ("pissa"), or a mapping of pattern -> either, in which a leaf's own path goes before
        patterns; None is kaiming, and `lookup` for tables read by rows. A function that brings data
        is a callable pytree, whose arrays have the leaf's stack axes first. A float64 leaf's weight
        arrives as float64. What rounding the factors to `factor_dtype` takes from a b is added to
        the residual, so that the function is kept.

    Returns:
      (base, lora). base is params itself, save where an initializer moved weight into the factors,
      and where config.dora has leaves carry their squared norm (Normed nodes). lora mirrors params:
      LowRank at the targets, Full at leaves of config.train, None elsewhere. It shares no array
      with params or base, so it may be donated; base shares those of params.

    Raises:
      PatternError, AxesError, ConfigError, TreeError: naming each leaf, what it is, and the remedy.

    Warns:
      PlanWarning: naming the leaves that "all-linear" passes over though they reach a product, by
        operations that no rule follows.

    Source: LoRA, arXiv 2106.09685, section 4.1; DoRA, arXiv 2402.09353, section 4.

    >>> config = LoraConfig(rank=2, targets="dense/kernel")
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> base, lora = init(jax.random.key(0), params, config)
    >>> lora["dense"]["kernel"].a.shape, lora["dense"]["kernel"].scale, lora["dense"]["bias"]
    ((4, 2), 2.0, None)
    """
    given: Any = key
    root = jax.random.key(operator.index(given)) if is_seed(given) else typed_key(given)
    leaves, treedef = flatten(params, is_leaf=is_node)
    if adapted := [path for path, leaf in leaves if is_adapter(leaf)]:
        raise TreeError(
            f"params already holds adapters ({adapted[0]!r} and {len(adapted) - 1} more): pass the "
            "base, or lowrank.merge(base, lora) to start from the merged weights"
        )
    arrays = {path: leaf for path, leaf in leaves if hasattr(leaf, "dtype")}
    targets = resolve(arrays, config, plan)
    whole, rows = train_whole(arrays, config), train_rows(arrays, config)
    warn_of_passed_over(plan, config.targets, targets, (*config.exclude, *whole, *rows))
    if find_method(config.method).start and initializer is not None:
        raise ConfigError(f"an initializer is of LoRA's a and b; {config.method!r} has its own")
    chosen = _initializers(initializer, targets)
    base, lora = [], []
    for path, leaf in leaves:
        node, leaf = None, unnormed(leaf)
        if path in targets:
            leaf_key = jax.random.fold_in(root, path_hash(path))
            leaf, node = _init_leaf(leaf_key, path, leaf, targets[path], chosen[path], config)
        elif path in whole:
            node = trained_whole(leaf)
        elif path in rows:
            node = start_rows(path, leaf, rows[path], config.factor_dtype)
        base.append(leaf)
        lora.append(node)
    return jax.tree.unflatten(treedef, base), jax.tree.unflatten(treedef, lora)


def _initializers(given: Any, targets: Mapping[str, Target]) -> dict[str, Any]:
    """The initializer of each target, None where it is the default.

    A target's own path goes before patterns, of which the first that matches wins: what is made
    from data names each leaf, and a path may hold a "*".
    """
    if not isinstance(given, Mapping):
        return dict.fromkeys(targets, _initializer("initializer", given))
    found: dict[str, Any] = {}
    for pattern, value in given.items():
        own = _initializer(f"initializer[{pattern!r}]", value)
        if isinstance(pattern, str) and pattern in targets:
            hits = [pattern]
        else:
            hits = [path for path in targets if matches(pattern, path) and path not in given]
            if not any(matches(pattern, path) for path in targets):
                raise no_match(pattern, list(targets), "initializer (over the adapted leaves)")
        for path in hits:
            found.setdefault(path, own)
    return {path: found.get(path) for path in targets}


def _initializer(name: str, value: Any) -> Any:
    """The function of an initializer, which may be given by name."""
    if value is None or (callable(value) and not isinstance(value, type)):
        return value
    if isinstance(value, str) and value in initializers.BY_NAME:
        return initializers.BY_NAME[value]
    raise ConfigError(
        f"{name} is {shown(value)}; expected a function (key, weight, rank, scale) -> "
        f"(a, b, residual), one of the names {sorted(initializers.BY_NAME)}, or a mapping of "
        "pattern to either"
    )


def typed_key(key: jax.Array) -> jax.Array:
    """A typed key of an old-style uint32 one, whose words tell what made it.

    A key of Threefry is one in a process with another default too: a checkpoint may bring it there.
    """
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    settings: Any = jax.config  # JAX 0.10 does not declare the names of its settings
    words, default = key.shape[-1], settings.jax_default_prng_impl
    if _KEY_WORDS.get(default, words) == words:
        return jax.random.wrap_key_data(key)
    made_by = next((impl for impl, size in _KEY_WORDS.items() if size == words), default)
    return jax.random.wrap_key_data(key, impl=made_by)


_KEY_WORDS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}


def _init_leaf(
    key: jax.Array, path: str, leaf: Any, target: Target, initializer: Any, config: LoraConfig
) -> tuple[Any, LowRank]:
    """The base that is left of one leaf, and its adapter."""
    if start := find_method(config.method).start:
        return _normed(leaf, start(key, leaf, target, config), config)
    if initializer is None:
        initializer = initializers.lookup if target.kind == "lookup" else initializers.kaiming
    quant = getattr(initializer, "quant", None)
    try:
        made = _laid_out_factors(key, path, leaf, target, initializer, config.factor_dtype)
    except ConfigError as error:
        raise ConfigError(f"{path!r}: {error}") from error
    a, b, residual = made
    if residual is not None:
        if isinstance(leaf, Quantized):
            raise ConfigError(
                f"{path!r} is quantized, and its initializer moves weight out of the base: pass "
                "dense parameters and quantize after, or take another initializer"
            )
        if quant is None:
            leaf = residual.astype(leaf.dtype)
        else:
            leaf = _quantized(path, residual, leaf, target, quant)
    axes = target.fan_in, target.fan_out, target.stack
    node = LowRank(a, b, None, *axes, target.scale, target.kind, moved=residual is not None)
    return _normed(leaf, node, config)


def _normed(leaf: Any, node: LowRank, config: LoraConfig) -> tuple[Any, LowRank]:
    """With DoRA the leaf carries its squared norms, and the adapter a magnitude."""
    if not config.dora:
        return leaf, node
    leaf = normed(leaf, node)
    return leaf, dataclasses.replace(node, magnitude=_norms(leaf, node))


_norms = jax.jit(norms_of)


def _quantized(path: str, residual: Any, leaf: Any, target: Target, quant: Any) -> Quantized:
    """The base of an initializer that quantizes it, of the leaf's own dtype."""
    if target.kind == "lookup":
        raise ConfigError(
            f"{path!r} is read by rows: an initializer that quantizes the base is for products; "
            "exclude the leaf, or give it another initializer"
        )
    node, bad = quantize_leaf(path, residual, target.fan_in, target.stack, quant)
    refuse_bad({path: bad}, {path: residual})
    return dataclasses.replace(node, weight_dtype=jnp.dtype(leaf.dtype).name)


def _laid_out_factors(
    key: jax.Array, path: str, leaf: Any, target: Target, initializer: Any, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """_factors, split as the leaf is where its type says how (on a mesh with explicit axes)."""
    data, form = jax.tree.flatten(initializer)
    if data == [initializer]:  # a plain function; else a callable tree of arrays
        data, form = [], initializer
    stack = tuple(leaf.shape[axis] for axis in target.stack)
    if wrong := [x.shape for x in data if x.shape[: len(stack)] != stack]:
        raise ConfigError(
            f"its initializer holds an array of shape {wrong[0]}, but the leaf's stack "
            f"axes, which are to lead it, have sizes {stack}"
        )
    run = _compiled(form)
    make = lambda key, leaf, data: run(key, leaf, data, target, dtype)
    sharding = sharding_of(leaf)
    if sharding is None:
        return make(key, leaf, data)
    like = lambda labels: jax.NamedSharding(sharding.mesh, labeled_spec(sharding.spec, labels))
    plain = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    moves = jax.eval_shape(make, key, plain, data)[2] is not None
    out = (
        like((*target.stack, *target.fan_in, RANK)),
        like((*target.stack, RANK, *target.fan_out)),
        sharding if moves else None,
    )
    with _jaxprs.mesh_of(jax.tree.leaves(leaf)[0]):
        return _jaxprs.by_the_compiler(make, out, key, leaf, data)


_by_function: weakref.WeakKeyDictionary[Any, Callable] = weakref.WeakKeyDictionary()


def _compiled(form: Any) -> Callable:
    """`_factors` of an initializer; what is compiled for a function is freed with it."""
    if not isinstance(form, types.FunctionType | functools.partial):  # these are equal to no other
        own = Static(form)
        return lambda *args: _of_structure(own, *args)
    if form not in _by_function:
        known = weakref.ref(form)
        run = lambda *args: _factors(Static(known()), *args)
        _by_function[form] = jax.jit(run, static_argnums=(3, 4))
    return _by_function[form]


def _factors(
    form: Static, key: jax.Array, leaf: jax.Array, data: PyTree, target: Target, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """a, b and the residual in the leaf's own layout: groups flattened, stacks vmapped."""
    order = target.stack + target.fan_in + target.fan_out
    sizes = lambda axes: tuple(leaf.shape[axis] for axis in axes)
    stack, fan_in, fan_out = sizes(target.stack), sizes(target.fan_in), sizes(target.fan_out)
    rows, columns = math.prod(fan_in), math.prod(fan_out)
    weight = jnp.transpose(as_dense(leaf), order).astype(accumulator(leaf.dtype))
    weight = weight.reshape(-1, rows, columns)
    keys = jax.random.split(key, weight.shape[0]) if stack else key[None]
    data = [array.reshape(-1, *array.shape[len(stack) :]) for array in data]

    def make(key: Any, weight: Any, data: PyTree) -> Any:
        own = form.value if callable(form.value) else jax.tree.unflatten(form.value, data)
        if hasattr(own, "rounded_to"):
            own = own.rounded_to(dtype)
        made = own(key, weight, target.rank, target.scale)
        _refuse_other_results(made, name)
        return made

    name = getattr(form.value, "__name__", type(form.value).__name__)
    a, b, residual = jax.vmap(make)(keys, weight, data)
    expected = ((weight.shape[0], rows, target.rank), (weight.shape[0], target.rank, columns))
    if (a.shape, b.shape) != expected:
        raise LowrankError(
            f"the initializer {name!r} returned a {a.shape[1:]} and b {b.shape[1:]}; expected "
            f"{expected[0][1:]} and {expected[1][1:]}"
        )
    if residual is not None and residual.shape != weight.shape:
        raise LowrankError(
            f"the initializer {name!r} returned a residual {residual.shape[1:]}; expected that of "
            f"the weight, {weight.shape[1:]}, or None"
        )
    kept_a, kept_b = round_to(a, dtype), round_to(b, dtype)
    if residual is not None and (is_narrower(dtype, a.dtype) or is_narrower(dtype, b.dtype)):
        lost = _lost(a, b, kept_a, kept_b, weight.dtype)
        residual = residual.astype(weight.dtype) + target.scale * lost
    a = kept_a.reshape(*stack, *fan_in, target.rank).astype(dtype)
    b = kept_b.reshape(*stack, target.rank, *fan_out).astype(dtype)
    if residual is not None:
        residual = residual.reshape(stack + fan_in + fan_out)
        residual = jnp.transpose(residual, inverse(order))
    return a, b, residual


def _refuse_other_results(made: Any, name: str) -> None:
    """An initializer returns two arrays of floats, and a third or None."""
    parts = made if isinstance(made, tuple | list) and len(made) == 3 else ()
    floating = lambda part: jnp.issubdtype(getattr(part, "dtype", object), jnp.floating)
    if not parts or not all(map(floating, parts[: 2 + (parts[2] is not None)])):
        came = [shown(part) for part in made] if parts else shown(made)
        raise LowrankError(
            f"the initializer {name!r} returned {came}; expected (a, b, residual), floating "
            "arrays, with None for a residual where the base stays as it is"
        )


_of_structure = jax.jit(_factors, static_argnums=(0, 4, 5))


def _lost(a: Any, b: Any, kept_a: Any, kept_b: Any, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What a @ b loses where its factors are rounded: (a - a') b + a' (b - b'), small products."""
    a, b, kept_a, kept_b = (factor.astype(dtype) for factor in (a, b, kept_a, kept_b))
    left = jnp.concatenate([a - kept_a, kept_a], -1)
    right = jnp.concatenate([b, b - kept_b], -2)
    return jnp.matmul(left, right, precision="highest")
