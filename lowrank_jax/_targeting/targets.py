"""Resolution of a configuration and a plan to targets: leaves with axes, rank and scale."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._errors import (
    AxesError,
    ConfigError,
    LowrankError,
    PatternError,
    PlanWarning,
    TreeError,
    list_problems,
)
from lowrank_jax._jax.paths import ALL_LINEAR, Pattern, make_no_match_error, matches, select
from lowrank_jax._nodes.methods import find_method
from lowrank_jax._targeting.configs import LoraConfig
from lowrank_jax._targeting.plan import PRODUCTS, Plan, Use

KINDS = (*PRODUCTS, "lookup")


@dataclasses.dataclass(frozen=True)
class Target:
    """A leaf to adapt: its axes (as in LowRank), rank, scale and kind.

    >>> config = LoraConfig(rank=2, targets="w")
    >>> resolve_targets({"w": jnp.ones((4, 3))}, config, None)["w"]
    Target(fan_in=(0,), fan_out=(1,), stack=(), rank=2, scale=2.0, kind='dot')
    """

    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]
    stack: tuple[int, ...]
    rank: int
    scale: float
    kind: str


def resolve_targets(
    leaves: Mapping[str, Any], config: LoraConfig, plan: Plan | None
) -> dict[str, Target]:
    """Map the path of each leaf to adapt to its Target; one error lists all leaves that cannot be.

    Raises:
      PatternError: a pattern matches no leaf, or no leaf is selected.
      ConfigError: a leaf is selected twice (targets, train, train_rows), or is too narrow.
      AxesError: the axes of a leaf are not known or not possible.
      TreeError: the plan belongs to another tree.
    """
    chosen, linear = choose_paths(leaves, config.targets, config.exclude, plan, [*config.axes])
    ways = [{*chosen}, select_full(leaves, config), {*select_rows(leaves, config)}]
    if clash := sorted(path for path in set().union(*ways) if sum(path in way for way in ways) > 1):
        raise ConfigError(
            f"{clash[0]!r} is to be trained in two ways, of targets, train and train_rows: exclude "
            "it from all but one"
        )
    for name in ("rank_pattern", "alpha_pattern", "stack", "axes"):
        for pattern in getattr(config, name):
            if not any(matches(pattern, path) for path in chosen):
                raise make_no_match_error(
                    pattern, list(chosen), f"{name} (over the adapted leaves)"
                )
    named = [pattern for pattern in (*config.targets, *config.axes) if pattern != ALL_LINEAR]
    targets, problems = {}, []
    for path in chosen:
        by_name = any(matches(pattern, path) for pattern in named)
        try:
            targets[path] = _make_target(path, leaves[path], config, plan, by_name)
        except LowrankError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        text = list_problems([str(problem) for problem in problems])
        raise type(problems[0])(f"{len(problems)} leaves cannot be adapted:\n{text}")
    if not targets:
        raise PatternError(f"no leaf is left to adapt: {explain_no_target(plan, linear)}")
    return targets


def _check_plan(leaves: Mapping[str, Any], plan: Plan) -> None:
    """Raise TreeError if the plan was made for another tree."""
    problems = [f"{path}: in the plan, not in params" for path in plan if path not in leaves]
    problems += [f"{path}: in params, not in the plan" for path in leaves if path not in plan]
    problems += [
        f"{path}: shape {tuple(leaf.shape)}, but {plan[path].shape} in the plan"
        for path, leaf in leaves.items()
        if path in plan and tuple(leaf.shape) != plan[path].shape
    ]
    if problems:
        raise TreeError(
            "the plan was made of another tree than params; call plan(fn, params, ...) with these "
            f"params, at the same level of the tree:\n{list_problems(problems)}"
        )


def choose_paths(
    leaves: Mapping[str, Any],
    targets: Sequence[Pattern],
    exclude: Sequence[Pattern],
    plan: Plan | None,
    axes: Sequence[Pattern] = (),
) -> tuple[list[str], bool]:
    """Return the selected paths, in the order of the tree, and whether targets has "all-linear".

    Leaves that match a pattern of `axes` are selected in addition to those of targets.
    """
    if plan is not None:
        _check_plan(leaves, plan)
    floating = [path for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    named = [pattern for pattern in targets if pattern != ALL_LINEAR]
    linear = len(named) < len(targets)
    chosen = set(_select(named, floating, leaves, "targets"))
    chosen |= set(_select(axes, floating, leaves, "axes"))
    if linear:
        if plan is None:
            raise AxesError(
                'targets="all-linear" needs to know how the function uses its parameters: pass '
                "plan=lowrank.plan(fn, params, *args)"
            )
        chosen |= {path for path in floating if plan[path].linear}
    chosen -= set(_select(exclude, floating, leaves, "exclude"))
    return [path for path in leaves if path in chosen], linear


def warn_skipped(
    plan: Plan | None, targets: Sequence[Pattern], chosen: Collection[str], known: Sequence[Pattern]
) -> None:
    """Warn of leaves that "all-linear" skips although they reach a product or an opaque call.

    Leaves that match a pattern of `known` are not reported.
    """
    names = [
        f"{path!r} ({use.reason})"
        for path, use in (plan or {}).items()
        if ALL_LINEAR in targets
        and use.passed_over
        and path not in chosen
        and not any(matches(pattern, path) for pattern in known)
    ]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(
            '"all-linear" passes over leaves that reach a product, or an opaque call, by operations'
            f" that no rule follows: {', '.join(names[:5])}{more}. Name a matrix in targets to have"
            " it adapted (and materialized at each use); exclude the leaves to end this warning",
            PlanWarning,
            stacklevel=4,  # the caller of init, beyond the wrapper that checks its arguments
        )


def _select(
    patterns: Sequence[Pattern], floating: Sequence[str], leaves: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """Select floating leaves by patterns; a pattern that matches only other leaves is an error."""
    known = {*floating}
    for pattern in patterns:
        hits = [path for path in leaves if matches(pattern, path)]
        if hits and known.isdisjoint(hits):
            leaf = leaves[hits[0]]
            raise PatternError(
                f"{what} pattern {pattern!r} matches only leaves that are not floating, like "
                f"{hits[0]!r} ({leaf.dtype}): integers, booleans and PRNG keys are never adapted"
            )
    return select(patterns, floating, what)


def select_full(leaves: Mapping[str, Any], config: LoraConfig) -> set[str]:
    """Select the paths of leaves that are trained whole, by `LoraConfig.train`."""
    floating = [path for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return set(_select(config.train, floating, leaves, "train"))


def select_rows(leaves: Mapping[str, Any], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Return path -> rows of the tables with trained rows, by `LoraConfig.train_rows`."""
    # The first pattern that matches a path wins, so patterns are applied in reverse order.
    floating = [path for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return {
        path: tuple(sorted({*rows}))
        for pattern, rows in reversed([*config.train_rows.items()])
        for path in _select([pattern], floating, leaves, "train_rows")
    }


def explain_no_target(plan: Plan | None, linear: bool) -> str:
    """Explain why no target was found, for an error message."""
    if not linear:
        return "exclude removes every leaf that targets names"
    finals = [path for path, use in (plan or {}).items() if use.final]
    if finals:
        return (
            f'"all-linear" leaves out the final projection, here {finals[0]!r}, and found no other '
            "matrix product; name the leaf in targets to adapt it"
        )
    return '"all-linear" found no leaf that a matrix product or convolution consumes:\n' + str(plan)


def _find_first(patterns: Mapping, path: str, default: object) -> Any:
    """Return the value of the first pattern that matches the path, else the default."""
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def _make_target(
    path: str, leaf: jax.Array, config: LoraConfig, plan: Plan | None, by_name: bool
) -> Target:
    """Make the Target of a leaf: axes from the plan (or [i, o] for a matrix), the rest from config.

    A leaf selected by "all-linear" only gets at most its largest possible rank, with the scale of
    the configured rank.
    """
    # Precedence of the axes: config.axes, then the plan, then (0,) and (1,) for a matrix.
    # config.stack is applied last: fan_in (1,), fan_out (0, 2, 3) with the stack override (0,)
    # become fan_in (1,), fan_out (2, 3). Axes of the plan's stack that the override omits
    # join fan_out.
    use = plan[path] if plan is not None else None
    if jnp.finfo(leaf.dtype).bits < 16:
        raise AxesError(
            f"{path!r} has dtype {leaf.dtype}: factors cast to 8 bits would lose the adapter; cast "
            "the leaf to bfloat16 first"
        )
    if (pair := _find_first(config.axes, path, None)) is not None:
        fan_in, fan_out, stack = _normalize_axes(path, leaf.ndim, *pair)
        kind = use.op if use is not None and use.op in KINDS else "dot"
    else:
        why = "a low-rank product needs fan-in and fan-out axes"
        remedy = f"say which by LoraConfig(axes={{{path!r}: (fan_in, fan_out)}}), "
        fan_in, fan_out, stack, kind = resolve_axes(path, tuple(leaf.shape), use, why, remedy)
        if by_name and leaf.ndim == 2 and not (fan_in and fan_out):
            fan_in, fan_out, stack = (0,), (1,), ()  # no product follows: materialized at each use
    if (override := _find_first(config.stack, path, None)) is not None:
        stack = _normalize_stack(path, leaf.ndim, override)
        fan_in = tuple(axis for axis in fan_in if axis not in stack)
        fan_out = tuple(axis for axis in fan_out if axis not in stack)
        freed = set(range(leaf.ndim)) - {*stack, *fan_in, *fan_out}
        fan_out = tuple(sorted({*fan_out, *freed}))
    if not fan_in or not fan_out:
        raise AxesError(
            f"{path!r} of shape {tuple(leaf.shape)} has no {'fan-in' if not fan_in else 'fan-out'} "
            "axes to put a low-rank product between; exclude it, or train it whole (train=...)"
        )
    own = _find_first(config.rank_pattern, path, None)
    rank = config.rank if own is None else own
    alpha = _find_first(config.alpha_pattern, path, config.alpha)
    scale = config.scale_of(rank, alpha)
    sizes = [math.prod(leaf.shape[axis] for axis in axes) for axes in (fan_in, fan_out)]
    narrow = rank > min(sizes) and find_method(config.method).rank_is_bounded
    if narrow and min(sizes) and own is None and not by_name:
        rank = min(sizes)
    elif narrow:
        raise ConfigError(
            f"rank {rank} is larger than {path!r} can have: its fan-in is {sizes[0]} and its "
            f"fan-out {sizes[1]}; set rank_pattern={{{path!r}: {min(sizes)}}} or less, exclude it, "
            "or train it whole (train=...)"
        )
    return Target(fan_in, fan_out, stack, rank, scale, kind)


def _normalize_axes(
    path: str, ndim: int, fan_in: Sequence[int], fan_out: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Normalize fan_in and fan_out of `LoraConfig.axes`; the remaining axes are the stack."""
    both = [*fan_in, *fan_out]
    inside = [axis % ndim for axis in both if -ndim <= axis < ndim]
    if len({*inside}) < len(both) or not fan_in or not fan_out:
        raise AxesError(
            f"axes of {path!r} are fan_in={tuple(fan_in)}, fan_out={tuple(fan_out)}: the leaf has "
            f"{ndim} axes; give one or more to each, none of them twice"
        )
    order = lambda axes: tuple(sorted(axis % ndim for axis in axes))
    return order(fan_in), order(fan_out), order({*range(ndim)} - {*inside})


def resolve_axes(
    path: str, shape: tuple[int, ...], use: Use | None, why: str, remedy: str = ""
) -> tuple[Any, Any, Any, str]:
    """Return fan_in, fan_out, stack and kind of a leaf, from its use or, for a matrix, its shape.

    why and remedy are parts of the error message: why axes are needed, and how to name them.
    """
    if use is not None and (use.fan_in or use.fan_out):
        return use.fan_in, use.fan_out, use.stack, use.op
    if len(shape) == 2:
        return (0,), (1,), (), "dot"
    if use is None and len(shape) > 2:
        raise AxesError(
            f"{path!r} has shape {shape}: which of its axes are contracted cannot be told from the "
            "shape; pass plan=lowrank.plan(fn, params, *args)"
        )
    found = "" if use is None else f", and the plan found no product that takes it (op {use.op!r})"
    raise AxesError(
        f"{path!r} has shape {shape}{found}: {why}; {remedy if len(shape) > 2 else ''}exclude it, "
        "or train it whole (train=...)"
    )


def _normalize_stack(path: str, ndim: int, axes: Sequence[int]) -> tuple[int, ...]:
    """Normalize the stack axes of `LoraConfig.stack`: non-negative, sorted."""
    if any(not -ndim <= axis < ndim for axis in axes):
        raise AxesError(f"stack={tuple(axes)} for {path!r}: the leaf has {ndim} axes")
    return tuple(sorted({axis % ndim for axis in axes}))
