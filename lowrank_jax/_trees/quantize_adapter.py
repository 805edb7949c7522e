"""quantize_adapter: convert an adapter's factors to blocks of small integers, for storage."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from lowrank_jax._checks.arguments import check_arguments
from lowrank_jax._errors import ConfigError, PatternError, TreeError
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import Full, LowRank, explain_combined, is_node
from lowrank_jax._nodes.quantized_factors import (
    get_block_axes,
    has_encodable_factors,
    has_quantized_factors,
)
from lowrank_jax._targeting.configs import ALL_LINEAR, QuantConfig
from lowrank_jax._targeting.targets import choose_paths
from lowrank_jax._trees.quantize import check_quantized, quantize_leaf


@check_arguments()
def quantize_adapter(lora: PyTree, quant: QuantConfig) -> Any:
    r"""Quantize the factors of an adapter to blocks of small integers, for storage and pools.

    $\Delta W = s\,Q(a)\,Q(b)$, with Q as in `quantize`; blocks run along the input features of a
    and along the output features of b. In NF4 with double quantization a factor takes 4.13 bits a
    number. On CPU use `packing="uint8"`, since a uint4 takes a byte there.

    combine, lift and merge decode the factors where they use them. `dequantize` gives an adapter
    with dense factors, which can be trained; a quantized one cannot.

    Args:
      lora: an adapter, or a stack of adapters.
      quant: the format. Its targets and exclude are patterns of leaves; "all-linear" is every leaf.

    Returns:
      The adapter with Quantized factors. DoRA's magnitudes, leaves trained whole, rows of a table,
      VeRA and (IA)^3 stay as they are.

    Raises:
      PatternError: a pattern matches no leaf, or no leaf has factors to quantize.
      TreeError: lora is not an adapter, or a factor has values that are not finite.
      ConfigError: factors are already quantized, or too large for double quantization.

    Source: QLoRA, arXiv 2305.14314, section 3.

    >>> import jax.numpy as jnp, lowrank_jax as lowrank
    >>> lora = {"w": lowrank.LowRank(jnp.ones((128, 4)), jnp.ones((4, 64)))}
    >>> stored = quantize_adapter(lora, QuantConfig(packing="uint8"))
    >>> stored["w"].a.codes.shape, stored["w"].a.codes.dtype.name, stored["w"].shape
    ((2, 32, 4), 'uint8', (128, 64))
    >>> lowrank.dequantize(stored)["w"].a.shape
    (128, 4)
    """
    leaves, treedef = flatten(lora, is_leaf=is_node)
    _refuse_other_trees(leaves)
    nodes = {path: node for path, node in leaves if has_encodable_factors(node)}
    if not nodes:
        raise PatternError("the adapter has no leaf with factors of LoRA or LoHa to quantize")
    targets = ["**" if pattern == ALL_LINEAR else pattern for pattern in quant.targets]
    chosen, _ = choose_paths(nodes, targets, quant.exclude, None)
    if not chosen:
        raise PatternError("no leaf is left to quantize: exclude leaves none")
    factors, bad, out = {}, {}, []
    for path, node in leaves:
        parts = {}
        for name, axes in get_block_axes(node).items() if path in chosen else ():
            factors[f"{path}/{name}"] = array = getattr(node, name)
            parts[name], bad[f"{path}/{name}"] = quantize_leaf(path, array, *axes, quant)
        out.append(dataclasses.replace(node, **parts) if parts else node)
    check_quantized(bad, factors)
    return jax.tree.unflatten(treedef, out)


def _refuse_other_trees(leaves: list[tuple[str, Any]]) -> None:
    """Raise unless the leaves are nodes of an adapter, with dense factors."""
    if problem := explain_combined(leaves, "lora"):
        raise TreeError(problem)
    for path, node in leaves:
        if not isinstance(node, LowRank | Full):
            raise TreeError(
                f"{path!r} is {type(node).__name__}, not LowRank, Full or None: pass the second "
                "result of init; lowrank.quantize is for parameters"
            )
        if has_quantized_factors(node):
            raise ConfigError(
                f"{path!r} has quantized factors: pass lowrank.dequantize(lora) to change their "
                "format"
            )
