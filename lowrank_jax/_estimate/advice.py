"""What would make a step smaller, with the bytes that it would save where shapes tell them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax._display.table import format_bytes
from lowrank_jax._estimate.groups import group_arguments
from lowrank_jax._nodes.sizes import count_device_bytes

NF4_BITS = 4.127  # for each value, doubly quantized scales of blocks of 64 included
WORTH = 0.02  # advice that saves a smaller share of the total is left out


def list_advice(
    args: Sequence[Any], groups: Mapping[str, int], temporaries: int, outputs: int
) -> tuple[str, ...]:
    """List what would save memory, the largest saving first.

    A saving of arguments follows from shapes; what rematerialization or a smaller batch saves is
    known only when that step is compiled, so there the whole is named.
    """
    found = [
        (
            _count_quantizable(args),
            "lowrank.quantize (NF4, double quantization) of the matrices still dense saves {}",
        ),
        (_count_states(args), "lowrank.quantize_state keeps the optimizer in 8 bits: saves {}"),
        (
            min(outputs, groups["adapters"] + groups["optimizer"]),
            "donating the adapter and the optimizer's state saves {}",
        ),
        (
            (groups["adapters"] + groups["optimizer"]) // 2,
            "half the rank saves {} of adapters and optimizer",
        ),
        (
            temporaries,
            "temporaries are {}: jax.checkpoint around each layer, or fewer tokens in each call "
            "(optax.MultiSteps adds up their gradients), makes them smaller",
        ),
    ]
    total = sum(groups.values()) + temporaries + outputs
    kept = [(saved, text) for saved, text in found if saved > WORTH * total]
    return tuple(text.format(format_bytes(saved)) for saved, text in sorted(kept, reverse=True))


def _count_quantizable(args: Sequence[Any]) -> int:
    """Count the bytes that NF4 saves of the base's floating-point matrices."""
    saved = 0
    for leaf, group in zip(jax.tree.leaves(args), group_arguments(args), strict=True):
        if group == "base" and _is_float(leaf) and leaf.ndim >= 2:
            values = count_device_bytes(leaf) // leaf.dtype.itemsize
            saved += max(0, count_device_bytes(leaf) - math.ceil(values * NF4_BITS / 8))
    return saved


def _count_states(args: Sequence[Any]) -> int:
    """Count the bytes that 8-bit states save: a byte for each value in place of the dtype's."""
    pairs = zip(jax.tree.leaves(args), group_arguments(args), strict=True)
    states = [leaf for leaf, group in pairs if group == "optimizer" and _is_float(leaf)]
    sizes = [(count_device_bytes(leaf), leaf.dtype.itemsize) for leaf in states if leaf.ndim]
    return sum(size - size // itemsize for size, itemsize in sizes)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, np.floating)
