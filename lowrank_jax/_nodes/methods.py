"""The table of adapter methods: LoRA, LoHa, VeRA, (IA)^3 and trained rows of a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from lowrank_jax._nodes.family import (
    IA3,
    LoHa,
    Rows,
    VeRA,
    init_ia3,
    init_loha,
    init_vera,
)
from lowrank_jax._nodes.low_rank import LowRank


@dataclasses.dataclass(frozen=True)
class Method:
    """One kind of adapter.

    Args:
      node: class of its nodes.
      label: display name.
      name: its name in `LoraConfig.method`, or "" if it is selected otherwise.
      start: (key, leaf, target, config) -> initial node, which changes nothing. None if an
        initializer makes a and b, as for LoRA.
      scale: s if alpha is not given; None if alpha then is twice the rank.
      rank_is_bounded: whether the rank is at most fan-in and fan-out.
      is_seeded: whether random matrices are regenerated from `LoraConfig.projection_seed`.
      has_norm: whether DoRA and rank-stabilized scales apply to it.
      is_direct: whether its arrays are weights, not factors of a product.
      in_peft: whether a LoRA file of PEFT can hold it.

    >>> find_method("vera").label, find_method("vera").scale, method_names()
    ('VeRA', 1.0, ('lora', 'loha', 'vera', 'ia3'))
    """

    node: type[LowRank]
    label: str
    name: str = ""
    start: Callable[..., LowRank] | None = None
    scale: float | None = None
    rank_is_bounded: bool = False
    is_seeded: bool = False
    has_norm: bool = True
    is_direct: bool = False
    in_peft: bool = False


ADAPTER_METHODS = [
    Method(LowRank, "LoRA", "lora", rank_is_bounded=True, in_peft=True),
    Method(LoHa, "LoHa", "loha", init_loha, rank_is_bounded=True),
    Method(VeRA, "VeRA", "vera", init_vera, scale=1.0, is_seeded=True),
    Method(IA3, "(IA)^3", "ia3", init_ia3, has_norm=False),
    Method(Rows, "rows", is_direct=True, in_peft=True),
]


def method_names() -> tuple[str, ...]:
    """The values of `LoraConfig.method`."""
    return tuple(row.name for row in ADAPTER_METHODS if row.name)


def find_method(name: str) -> Method:
    """Find a method by its name in `LoraConfig.method`."""
    return next(row for row in ADAPTER_METHODS if row.name == name)


def get_method(node: LowRank) -> Method:
    """Get the method of an adapter node; a LowRank node of rank 0 is an (IA)^3 of old files."""
    kind = (
        IA3 if type(node) is LowRank and getattr(node.a, "shape", ())[-1:] == (0,) else type(node)
    )
    return next(row for row in ADAPTER_METHODS if row.node is kind)


def get_label(node: LowRank) -> str:
    """Get the display name of an adapter node: "LoRA", "DoRA" or "DoRA of LoHa"."""
    method = get_method(node)
    if node.magnitude is None or not method.has_norm:
        return method.label
    return "DoRA" if type(node) is LowRank else f"DoRA of {method.label}"
