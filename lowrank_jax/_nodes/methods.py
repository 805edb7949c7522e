"""The table of methods: what a kind of adapter is called, how it starts, who can take it."""

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
      node: the class of its nodes.
      label: what people call it.
      name: in `LoraConfig.method`; "" where that does not choose it.
      start: (key, leaf, target, config) -> node that changes nothing; None: LoRA's a and b, by an
        initializer.
      scale: s where alpha is not given; None: alpha is twice the rank.
      rank_is_bounded: whether fan-in and fan-out bound the rank.
      is_seeded: whether random matrices are remade from `LoraConfig.projection_seed`.
      has_norm: whether DoRA's magnitude and rank-stabilized scales are for it.
      is_direct: whether its arrays are weights themselves, and not factors of a product.
      in_peft: whether a LoRA file of PEFT holds it.
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
    """What `LoraConfig.method` may be."""
    return tuple(row.name for row in ADAPTER_METHODS if row.name)


def find_method(name: str) -> Method:
    """The method of a name."""
    return next(row for row in ADAPTER_METHODS if row.name == name)


def get_method(node: LowRank) -> Method:
    """The method of an adapter; factors of rank 0 are how (IA)^3 was once written."""
    kind = (
        IA3 if type(node) is LowRank and getattr(node.a, "shape", ())[-1:] == (0,) else type(node)
    )
    return next(row for row in ADAPTER_METHODS if row.node is kind)


def get_label(node: LowRank) -> str:
    """What people call an adapter: "LoRA", "DoRA", "DoRA of LoHa", ..."""
    method = get_method(node)
    if node.magnitude is None or not method.has_norm:
        return method.label
    return "DoRA" if type(node) is LowRank else f"DoRA of {method.label}"
