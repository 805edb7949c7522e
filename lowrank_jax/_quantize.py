"""quantize and dequantize: leaves of a tree as small integers, and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax import _jaxprs
from lowrank_jax._configs import QuantConfig
from lowrank_jax._errors import ConfigError, PatternError, TreeError, listing
from lowrank_jax._nodes import is_adapter, is_node, materialize
from lowrank_jax._paths import flatten
from lowrank_jax._plan import Plan
from lowrank_jax._quantized import Quantized, quantized
from lowrank_jax._targets import axes_of, choose, why_none


def quantize(
    params: Any, quant: QuantConfig, *, plan: Plan | None = None, donate: bool = False
) -> Any:
    r"""Keep leaves of a parameter tree as blocks of small integers with a scale each.

    $c_i = \operatorname{nearest}(w_i / m)$, $m = \max_i |w_i|$ over a block; blocks run along the
    axes that products contract (along the features of a table that is read by rows).

    It works leaf by leaf: beside the result at most one dense leaf's worth of memory is used.

    Args:
      params: any pytree of arrays, NumPy arrays too (memory-mapped ones are read one by one).
      quant: which leaves, and how.
      plan: of the function that uses params; needed for "all-linear" and for leaves of more than
        two axes. Without it a matrix is taken as [i, o].
      donate: delete each dense leaf as soon as its codes are there.

    Returns:
      The tree with Quantized leaves: for lift, init, plan, dequantize.

    Raises:
      PatternError, AxesError, ConfigError, TreeError: naming each leaf, what it is, and the remedy;
        where values are known, leaves with values that are not finite.

    Source: QLoRA, arXiv 2305.14314, section 3.

    >>> params = {"w": jnp.linspace(-1, 1, 128 * 4).reshape(128, 4)}
    >>> frozen = quantize(params, QuantConfig(targets="w"))
    >>> frozen["w"].codes.shape, frozen["w"].codes.dtype.name, frozen["w"].shape
    ((2, 64, 4), 'uint4', (128, 4))
    """
    if not isinstance(quant, QuantConfig):
        raise ConfigError(f"quantize takes (params, quant): quant is a {type(quant).__name__}")
    leaves, treedef = flatten(params, is_leaf=is_node)
    if wrong := [path for path, leaf in leaves if is_node(leaf)]:
        kind = "adapters" if is_adapter(dict(leaves)[wrong[0]]) else "quantized leaves"
        raise TreeError(f"params already holds {kind} ({wrong[0]!r}): pass dense parameters")
    arrays = {path: leaf for path, leaf in leaves if hasattr(leaf, "dtype")}
    chosen, linear = choose(arrays, quant.targets, quant.exclude, plan)
    if not chosen:
        raise PatternError(f"no leaf is left to quantize: {why_none(plan, linear)}")
    axes = {path: _axes(path, arrays[path], plan) for path in chosen}
    _refuse_non_finite({path: arrays[path] for path in chosen})
    out = []
    for path, leaf in leaves:
        if path in axes:
            leaf = _one(leaf, *axes[path], quant)
            if donate and isinstance(arrays[path], jax.Array):
                jax.block_until_ready(leaf)
                arrays[path].delete()
        out.append(leaf)
    return jax.tree.unflatten(treedef, out)


def _axes(path: str, leaf: Any, plan: Plan | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that blocks run along, and the stack axes."""
    use = plan[path] if plan is not None else None
    fan_in, fan_out, stack, kind = axes_of(path, tuple(leaf.shape), use)
    if kind != "lookup" and use is not None and use.lookup:
        kind = "lookup"  # rows are read somewhere: a row must hold whole blocks
        rows = min({*range(leaf.ndim)} - {*stack})
        return tuple(a for a in range(leaf.ndim) if a not in stack and a != rows), stack
    return (fan_out if kind == "lookup" else fan_in), stack


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _one(leaf: Any, fan_in: tuple[int, ...], stack: tuple[int, ...], quant: QuantConfig) -> Any:
    """One leaf."""
    return quantized(
        leaf,
        fan_in,
        stack,
        format=quant.format,
        block_size=quant.block_size,
        double_quant=quant.double_quant,
        packing=quant.packing,
    )


def _refuse_non_finite(leaves: dict[str, Any]) -> None:
    """Raise where values are known and not finite."""
    known = {
        path: leaf
        for path, leaf in leaves.items()
        if not _jaxprs.is_tracer(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)
    }
    count = lambda leaf: int(leaf.size - jnp.isfinite(leaf).sum())
    problems = [
        f"{path}: {bad} of {leaf.size} values are not finite"
        for path, leaf in known.items()
        if (bad := count(leaf))
    ]
    if problems:
        raise TreeError(
            "a block with a NaN or an infinity has no scale: mend the weights, or exclude the "
            f"leaf:\n{listing(problems)}"
        )


def dequantize(frozen: Any) -> Any:
    """The dense tree again: each quantized leaf decoded in float32 and cast once to its dtype.

    Args:
      frozen: a tree that quantize returned.

    Returns:
      The tree with arrays, rounded to what their codes hold.

    Raises:
      TreeError: the tree holds adapters: merge folds those.

    Source: QLoRA, arXiv 2305.14314, equation 6.

    >>> frozen = quantize({"w": jnp.ones((64, 4))}, QuantConfig(targets="w", double_quant=False))
    >>> bool((dequantize(frozen)["w"] == 1).all())
    True
    """
    leaves, treedef = flatten(frozen, is_leaf=is_node)
    if adapted := [path for path, leaf in leaves if is_adapter(leaf)]:
        raise TreeError(
            f"{adapted[0]!r} is adapted: lowrank.merge(base, lora) gives dense weights, adapters "
            "folded in"
        )
    dense = [materialize(leaf) if isinstance(leaf, Quantized) else leaf for _, leaf in leaves]
    return jax.tree.unflatten(treedef, dense)
