"""LowRank nodes whose factors are Quantized: encoded for storage, decoded where they are used."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from lowrank_jax._nodes.family import LoHa
from lowrank_jax._nodes.low_rank import LowRank
from lowrank_jax._nodes.quantized import Axes, Quantized, dequantize_node, quantize_array

FACTORS = ("a", "b")


def has_quantized_factors(node: object) -> bool:
    """Whether a node is an adapter with quantized factors."""
    return isinstance(node, LowRank) and any(
        isinstance(getattr(node, name), Quantized) for name in FACTORS
    )


def has_encodable_factors(node: object) -> bool:
    """Whether a node's factors are matrices of floating-point numbers: those of LoRA and LoHa."""
    return type(node) in (LowRank, LoHa) and not has_quantized_factors(node)


def get_block_axes(node: LowRank) -> dict[str, tuple[Axes, Axes]]:
    """Return for each factor the axes along which blocks run, and those of stacks.

    Blocks run along the input features of a and along the output features of b. The rank is too
    small for a block.
    """
    lead = len(node.stacked)
    stack = tuple(range(lead))
    fan_in = tuple(range(lead, lead + len(node.fan_in)))
    fan_out = tuple(range(lead + 1, lead + 1 + len(node.fan_out)))
    return {"a": (fan_in, stack), "b": (fan_out, stack)}


def dequantize_factors(node: Any) -> Any:
    """Decode the quantized factors of a node; any other node is returned as it is."""
    if not has_quantized_factors(node):
        return node
    a, b = (_decode(getattr(node, name)) for name in FACTORS)
    return dataclasses.replace(node, a=a, b=b)


def encode_as(node: LowRank, like: LowRank) -> LowRank:
    """Quantize the factors of a node in the formats of those of `like`; its shapes are the same."""
    axes = get_block_axes(node)
    return dataclasses.replace(
        node,
        **{
            name: _encode_as(getattr(node, name), getattr(like, name), *axes[name])
            for name in FACTORS
        },
    )


def _encode_as(factor: jax.Array, like: Any, fan_in: Axes, stack: Axes) -> Any:
    """Quantize a factor in the format of another, if that is quantized."""
    if not isinstance(like, Quantized):
        return factor
    return quantize_array(
        factor.astype(like.dtype),
        fan_in,
        stack,
        together=True,
        format=like.format,
        block_size=like.block_size,
        double_quant=like.nested is not None,
        packing=like.packing,
    )


def _decode(factor: Any) -> Any:
    """Return the dense array of a factor."""
    return dequantize_node(factor) if isinstance(factor, Quantized) else factor
