"""Make nodes of one leaf compatible: pad ranks, equalize scales and dtypes, keep each function."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax._errors import ConfigError
from lowrank_jax._many.align import MaybeNode
from lowrank_jax._nodes import Full, LowRank
from lowrank_jax._nodes.family import LoHa
from lowrank_jax._nodes.methods import get_label
from lowrank_jax._nodes.padding import pad_rank
from lowrank_jax._nodes.serialization import list_array_fields


def equalize(nodes: Sequence[MaybeNode]) -> list[LowRank | Full]:
    """Equalize the static fields and shapes of one leaf's nodes; each stays the same function.

    Raises:
      ConfigError: the nodes cannot be made compatible.
    """
    if any(isinstance(node, Full) for node in nodes):
        return _equalize_full(nodes)
    found = [node for node in nodes if isinstance(node, LowRank)]
    first = found[0]
    for node in found[1:]:
        _refuse_other_kind(first, node)
    same = _with_gains([n if isinstance(n, LowRank) else _zeros_like(first) for n in nodes])
    rank = max(node.rank for node in same)
    same = [pad_rank(node, rank) for node in same]
    for node in same[1:]:
        _refuse_other_shapes(same[0], node)
    scale = max((node.scale for node in same), key=abs)
    if scale and not all(node.scale for node in same):
        raise ConfigError(
            f"scales of 0 and of {scale}: with the scale of the other, the adapter of scale 0 "
            "would be trained"
        )
    dtypes = {name: _common_dtype(name, same, scale) for name in list_array_fields(same[0])}
    return [_rescale(node, scale, dtypes) for node in same]


def _rescale(node: LowRank, scale: float, dtypes: dict[str, Any]) -> LowRank:
    """The same adapter with another scale, and arrays of these dtypes."""
    node = _cast(node, dtypes)
    if node.scale == scale:
        return node
    if node.b is not None:
        node = multiply_delta(node, node.scale / scale)
    return dataclasses.replace(node, scale=scale)


def _cast(node: LowRank, dtypes: dict[str, Any]) -> LowRank:
    """The node with arrays of these dtypes, those of None left alone."""
    known = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
    cast = {name: getattr(node, name).astype(dtype) for name, dtype in known.items()}
    return dataclasses.replace(node, **cast)


def _common_dtype(name: str, nodes: Sequence[LowRank], scale: float) -> Any:
    """The dtype of a field of all nodes; rescaling would round factors narrower than float32."""
    arrays = [getattr(node, name) for node in nodes]
    if arrays[0] is None:
        return None
    dtype = jnp.result_type(*(array.dtype for array in arrays))
    rescaled = any(node.scale != scale for node in nodes)
    return jnp.promote_types(dtype, jnp.float32) if rescaled and name == "b" else dtype


def _equalize_full(nodes: Sequence[MaybeNode]) -> list[LowRank | Full]:
    """Leaves that are trained whole, by all adapters or by none."""
    if not all(isinstance(node, Full) for node in nodes):
        raise ConfigError(
            "some adapters train it whole (Full), others do not: a stack needs its value in each; "
            "train it in all or in none"
        )
    full = [node for node in nodes if isinstance(node, Full)]
    if len({(node.shape, node.dtype, node.weight_dtype) for node in full}) > 1:
        came = sorted({f"{node.value.dtype}{[*node.shape]}" for node in full})
        raise ConfigError(f"trained whole with different shapes or dtypes: {', '.join(came)}")
    return list(full)


def _refuse_other_kind(first: LowRank, other: LowRank) -> None:
    """Raise ConfigError unless two nodes are of one method, at one kind of leaf."""
    if not isinstance(other, LowRank) or type(other) is not type(first):
        raise ConfigError(
            f"adapters of different methods: {get_label(first)} and {get_label(other)}; stack "
            "those of each method apart"
        )
    # what padding cannot make equal
    fixed = [
        field.name
        for field in dataclasses.fields(first)
        if field.metadata.get("static") and field.name not in ("scale", "folded")
    ]
    for name in fixed:
        one, two = getattr(first, name), getattr(other, name)
        if one != two:
            reason = {
                "rows": "; the rows that one of them does not have would be trained too",
                "seed": "; their fixed random matrices differ",
            }.get(name, "")
            raise ConfigError(f"adapters with different {name}: {one} and {two}{reason}")


def _refuse_other_shapes(first: LowRank, other: LowRank) -> None:
    """Raise ConfigError unless the arrays of two padded nodes have equal shapes."""
    for name in list_array_fields(first):
        one, two = (getattr(getattr(node, name), "shape", None) for node in (first, other))
        if one != two:
            raise ConfigError(
                f"{name} of shape {one} and of shape {two} at one rank: the adapters are of leaves "
                "of different shapes, or one of them is a stack"
            )


def _zeros_like(node: LowRank) -> LowRank:
    """An adapter of the same leaf that changes nothing, and whose zeros stay zeros in training."""
    if type(node) is not LowRank or (node.magnitude is not None and not node.folded):
        raise ConfigError(
            f"only some adapters adapt it, by {get_label(node)}: without the base there is no "
            f"{get_label(node)} that changes nothing, and stays so in training; adapt it in all"
        )
    zeros = {name: jnp.zeros_like(getattr(node, name)) for name in ("a", "b")}
    if node.magnitude is not None:
        zeros["magnitude"] = jnp.ones_like(node.magnitude)
    return dataclasses.replace(node, **zeros)


def _with_gains(nodes: list[LowRank]) -> list[LowRank]:
    """All nodes with a magnitude, or none: LoRA is folded DoRA whose gain is 1."""
    have = [node for node in nodes if node.magnitude is not None]
    if len({node.folded for node in have}) > 1 or (
        0 < len(have) < len(nodes) and not have[0].folded
    ):
        raise ConfigError(
            "LoRA or folded DoRA beside DoRA that is still trained: fold its norms first, "
            "lowrank.fold_norms(base, lora); the stack is then for inference"
        )
    if not have:
        return nodes
    like = have[0].magnitude
    ones = {"magnitude": jnp.ones_like(like), "folded": True}
    return [
        node if node.magnitude is not None else dataclasses.replace(node, **ones) for node in nodes
    ]


def fit_into(node: LowRank, like: LowRank) -> LowRank:
    """Give an adapter the rank, scale and dtypes of `like`, and a gain if `like` has one.

    Raises:
      ConfigError: the two are of different methods or leaves, the rank of node is larger, or node
        needs a gain and `like` has none.
    """
    _refuse_other_kind(like, node)
    if node.rank > like.rank:
        raise ConfigError(f"rank {node.rank} is larger than the {like.rank} of its slots")
    if node.magnitude is not None and like.magnitude is None:
        raise ConfigError(f"it is {get_label(node)}, and the slots have no magnitude")
    (node, like) = _with_gains([node, like])
    node = pad_rank(node, like.rank)
    _refuse_other_shapes(like, node)
    if not like.scale and node.scale:
        raise ConfigError(f"its scale is {node.scale}, but the slots have scale 0")
    dtypes = {n: getattr(getattr(like, n), "dtype", None) for n in list_array_fields(like)}
    # a narrow b is scaled in float32
    wide = dtypes | {"b": dtypes["b"] and jnp.promote_types(dtypes["b"], jnp.float32)}
    scaled = _rescale(node, like.scale, wide)
    cast = _cast(scaled, dtypes)
    if scaled.b is not None and bool((jnp.isinf(cast.b) & ~jnp.isinf(scaled.b)).any()):
        raise ConfigError(
            f"its scale is {node.scale} and that of the slots {like.scale}: b times the quotient "
            f"overflows {dtypes['b']}; make the pool of float32 factors"
        )
    return cast


def make_neutral(node: LowRank) -> LowRank:
    """Make an adapter of the same shapes that changes nothing.

    Raises:
      ConfigError: a neutral adapter would depend on the base.
    """
    if node.magnitude is not None and not node.folded:
        raise ConfigError(
            f"it is {get_label(node)}, and which magnitude changes nothing depends on the base: "
            "fold its norms, lowrank.fold_norms(base, lora)"
        )
    arrays = {"a": jnp.zeros_like, "b": jnp.zeros_like, "magnitude": jnp.ones_like}
    held = {n: fn(getattr(node, n)) for n, fn in arrays.items() if getattr(node, n) is not None}
    return dataclasses.replace(node, **held)


def multiply_delta(node: LowRank, factor: float | jax.Array) -> LowRank:
    """The adapter whose delta is `factor` times that of node; its scale stays."""
    if isinstance(node, LoHa):  # its delta has two factors b: one of them takes it
        at = node.b.ndim - 1 - len(node.fan_out)
        first, second = jnp.split(node.b, 2, at)
        return dataclasses.replace(node, b=jnp.concatenate([first * factor, second], at))
    return dataclasses.replace(node, b=node.b * factor)
