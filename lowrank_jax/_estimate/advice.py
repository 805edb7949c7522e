"""What would make a step smaller, with the bytes that it would save where shapes tell them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax._display.table import format_bytes
from lowrank_jax._estimate.compilation import Compilation
from lowrank_jax._estimate.groups import group_arguments
from lowrank_jax._nodes import Adapted, LowRank, is_node
from lowrank_jax._nodes.sizes import count_device_bytes, sum_leaves

NF4_BITS = 4.127  # for each value, doubly quantized scales of blocks of 64 included
MIN_STATE = 4096  # values of a state that quantize_state leaves as it is, if there are fewer
WORTH = 0.02  # advice that saves a smaller share of the total is left out


def list_advice(found: Compilation, groups: Mapping[str, int]) -> tuple[str, ...]:
    """List what would save memory, the largest saving first.

    A saving of arguments follows from shapes; what rematerialization or a smaller batch saves is
    known only when that step is compiled, so there the whole is named.
    """
    labeled = [*zip(jax.tree.leaves(found.args), group_arguments(found.args), strict=True)]
    trained = groups["adapters"] + groups["optimizer"]
    is_training = groups["optimizer"] > 0
    factors = _count_factors(found.args)
    savings = [
        (
            _count_quantizable(labeled),
            "lowrank.quantize (NF4, double quantization) of what is still dense saves up to {}",
        ),
        (
            _count_states(labeled),
            "lowrank.quantize_state keeps the optimizer in 8 bits: saves up to {}",
        ),
        (
            min(found.outputs, trained - found.aliased) if is_training else 0,
            "donating the adapter and the optimizer's state saves up to {}",
        ),
        (
            factors * trained // max(1, groups["adapters"]) // 2,
            "half the rank saves up to {} of adapters and optimizer",
        ),
        (
            groups["closed over"],
            "arrays that the step closes over take {}: pass the base as an argument, or each "
            "program holds a copy of it",
        ),
        (
            found.temporaries,
            "temporaries are {}: jax.checkpoint around each layer, or fewer tokens in each call "
            "(optax.MultiSteps adds up their gradients), makes them smaller",
        ),
    ]
    total = sum(groups.values()) + found.temporaries + found.outputs
    kept = [(saved, text) for saved, text in savings if saved > WORTH * total]
    return tuple(text.format(format_bytes(saved)) for saved, text in sorted(kept, reverse=True))


def _count_factors(args: Any) -> int:
    """Count the bytes of low-rank factors, whose size is proportional to the rank."""
    nodes = jax.tree.leaves(args, is_leaf=is_node)
    deltas = [node.delta if isinstance(node, Adapted) else node for node in nodes]
    factors = [(delta.a, delta.b) for delta in deltas if type(delta) is LowRank]
    return sum_leaves(count_device_bytes, factors)


def _count_quantizable(labeled: Sequence[tuple[Any, str]]) -> int:
    """Count the bytes that NF4 saves of the base's floating-point matrices."""
    saved = 0
    for leaf, group in labeled:
        if group == "base" and _is_float(leaf) and leaf.ndim >= 2:
            values = count_device_bytes(leaf) // leaf.dtype.itemsize
            saved += max(0, count_device_bytes(leaf) - math.ceil(values * NF4_BITS / 8))
    return saved


def _count_states(labeled: Sequence[tuple[Any, str]]) -> int:
    """Count the bytes that 8-bit states save: a byte for each value in place of the dtype's."""
    states = [leaf for leaf, group in labeled if group == "optimizer" and _is_float(leaf)]
    large = [leaf for leaf in states if math.prod(leaf.shape) >= MIN_STATE]
    sizes = [(count_device_bytes(leaf), leaf.dtype.itemsize) for leaf in large]
    return sum(size - size // itemsize for size, itemsize in sizes)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, np.floating)
