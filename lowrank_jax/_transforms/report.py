"""report: count trained and frozen values and their bytes, and list the uses of each adapter."""

from __future__ import annotations

import dataclasses
import html
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lowrank_jax._checks.arguments import (
    check_arguments,
    refuse_unsupported_dtypes,
    tree_of_arrays,
)
from lowrank_jax._checks.functions import function_of_params
from lowrank_jax._display.table import (
    Table,
    TableMapping,
    collapse_rows,
    format_bytes,
    format_shape,
)
from lowrank_jax._display.text import to_printable
from lowrank_jax._interpreter.interpret import Context, Record
from lowrank_jax._interpreter.table import OPERATIONS
from lowrank_jax._jax.paths import flatten
from lowrank_jax._jax.types import PyTree
from lowrank_jax._nodes import (
    Adapted,
    Full,
    LowRank,
    find_frozen,
    is_adapter,
    is_node,
    strip_norms,
)
from lowrank_jax._nodes.methods import get_label
from lowrank_jax._nodes.quantized import Quantized
from lowrank_jax._nodes.sizes import (
    count_bits,
    count_bytes,
    count_device_bytes,
    count_elements,
    sum_leaves,
)
from lowrank_jax._operators.wrapping import count_dead_features
from lowrank_jax._transforms.lift import evaluate, split_arguments


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of the frozen base, of the adapters, and of the scales of quantized leaves.

    >>> Memory(base=1024, adapters=64, scales=32).total
    1120
    """

    base: int = 0
    adapters: int = 0
    scales: int = 0

    @property
    def total(self) -> int:
        """The sum of the three."""
        return self.base + self.adapters + self.scales


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """The report on one adapted or quantized leaf.

    Args:
      kind: "LoRA", "DoRA", "LoHa", "VeRA", "(IA)^3" or "rows" (of a table); "whole" for a leaf
        trained whole, "frozen" for a quantized leaf without an adapter, "frozen LoRA" and so on for
        one that only a frozen adapter changes.
      shape: the leaf's shape.
      rank, scale: the adapter's, or None.
      trainable: number of trained values.
      format: the format of a quantized base, such as "nf4"; else None.
      bits: bits per value of the base, including scales.
      uses: one Record per equation that uses the leaf, in order.
      still: number of all-zero output features under a DoRA magnitude, which never learn; 0 if
        values are not available.
      full: whether rank is the largest that the leaf can have.

    >>> LeafReport("LoRA", (64, 32), rank=2, scale=2.0, trainable=192, format=None, bits=32.0).how
    'unused'
    """

    kind: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float | None
    trainable: int
    format: str | None
    bits: float
    uses: tuple[Record, ...] = ()
    still: int = 0
    full: bool = False

    @property
    def how(self) -> str:
        """Counts of the uses by kind: "factored 2×", "materialized 1×", "dense 1×" or "unused"."""
        counts = Counter(use.how for use in self.uses)
        return ", ".join(f"{how} {count}×" for how, count in counts.items()) or "unused"


class Report(TableMapping):
    """A mapping from path to LeafReport over the adapted leaves, with totals; prints as tables.

    Args:
      leaves: path -> LeafReport.
      trainable: number of trained values.
      frozen: number of frozen values.
      memory: bytes of the arrays, each counted once, no matter how many devices hold it.
      device_memory: bytes on one device, which differs from `memory` for sharded arrays.

    >>> memory = Memory(base=8192, adapters=768)
    >>> print(Report({}, trainable=192, frozen=2048, memory=memory, device_memory=memory))
             values   share    memory
    ---------------------------------
    frozen    2,048  91.43%  8.00 KiB
    trained     192   8.57%     768 B
    """

    def __init__(
        self,
        leaves: Mapping[str, LeafReport],
        trainable: int,
        frozen: int,
        memory: Memory,
        device_memory: Memory,
    ):
        super().__init__(leaves)
        self.trainable, self.frozen = trainable, frozen
        self.memory, self.device_memory = memory, device_memory

    @property
    def total(self) -> int:
        """Number of values, frozen plus trained."""
        return self.frozen + self.trainable

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on weights that are materialized, unused or cannot learn; like layers share one."""
        found = [
            (path, f"is materialized at {use.primitive}, {use.source}: {use.reason}")
            for path, leaf in self.items()
            for use in leaf.uses
            if use.how in ("materialized", "built")
        ]
        found += [
            (path, "is adapted but unused: its gradient is zero")
            for path, leaf in self.items()
            if leaf.how == "unused"
        ]
        found += [
            (
                path,
                f"has {leaf.still} all-zero output features: under DoRA they have no direction and "
                "never learn; adapt the leaf without DoRA, or train it whole",
            )
            for path, leaf in self.items()
            if leaf.still
        ]
        return tuple(
            to_printable(" ".join(row), 2000) for row, _ in collapse_rows(dict.fromkeys(found))
        )

    def _summary(self) -> Table:
        """The table of counts and bytes, over all devices and, if that differs, on one device."""
        places = [self.memory]
        columns = ["", "values", "share", "memory"]
        if self.device_memory != self.memory:
            places.append(self.device_memory)
            columns.append("on one device")
        rows = []
        for name, part, count in (
            ("frozen", "base", self.frozen),
            ("trained", "adapters", self.trainable),
        ):
            share = f"{100 * count / max(1, self.total):.2f}%"
            sizes = [format_bytes(getattr(memory, part)) for memory in places]
            rows.append((name, f"{count:,}", share, *sizes))
        if self.memory.scales:
            sizes = [format_bytes(memory.scales) for memory in places]
            rows.append(("scales of quantized leaves", "", "", *sizes))
        return Table(tuple(columns), tuple(rows), frozenset(columns[1:]))

    def _table(self) -> Table:
        """The table of adapted leaves; leaves that differ only in layer number share a row."""
        # Rows that agree in all but the layer number become one, and `trained` is their sum:
        #   layers_0/w       64×32  LoRA r=2 s=2  192  factored 1×
        #   layers_1/w       64×32  LoRA r=2 s=2  192  factored 1×
        #   layers_{0..1}/w  64×32  LoRA r=2 s=2  384  factored 1×    their common row
        rows = [
            (path, format_shape(leaf.shape), _format_adapter(leaf), str(leaf.trainable), leaf.how)
            for path, leaf in self.items()
        ]
        summed = [
            (path, shape, adapter, f"{count * int(trainable):,}", how)
            for (path, shape, adapter, trainable, how), count in collapse_rows(rows)
        ]
        columns = (
            "leaf",
            "shape",
            "kept as" if self.memory.scales else "adapter",
            "trained",
            "use",
        )
        return Table(columns, tuple(summed), frozenset({"trained"}))

    def __str__(self) -> str:
        parts = [str(self._summary()), *([str(self._table())] if self else [])]
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        """HTML for a notebook: the tables, and a collapsed list of all equations."""
        lines = [
            f"<li><code>{html.escape(to_printable(path))}</code>: "
            f"{html.escape(_format_use(use))}</li>"
            for path, leaf in self.items()
            for use in leaf.uses
        ]
        notes = [f"<li>{html.escape(note)}</li>" for note in self.notes]
        return (
            "<div>"
            + self._summary().html()
            + (self._table().html() if self else "")
            + (f"<ul>{''.join(notes)}</ul>" if notes else "")
            + f"<details><summary>{len(lines)} equations</summary>"
            + f"<ul>{''.join(lines)}</ul></details></div>"
        )

    def __rich__(self) -> Any:
        """The renderable that rich prints."""
        from rich.console import Group
        from rich.text import Text

        parts = [self._summary().rich()] + ([self._table().rich()] if self else [])
        return Group(*parts, *(Text(f"- {note}") for note in self.notes))


def _format_adapter(leaf: LeafReport) -> str:
    if leaf.kind == "whole":
        return "trained whole"
    over = "" if leaf.format is None else f"{leaf.format}, {leaf.bits:.2f} bits"
    if leaf.rank is None:
        return over
    rank = f"{leaf.rank} (full)" if leaf.full else f"{leaf.rank}"
    return f"{leaf.kind} r={rank} s={leaf.scale:.4g}" + (f" on {over}" if over else "")


def _format_use(use: Record) -> str:
    layer = f", {use.layer}" if use.layer else ""
    return f"{use.how} at {use.primitive}, {use.source}{layer}"


@check_arguments(fn=function_of_params, tree=tree_of_arrays)
def report(fn: Callable, tree: PyTree, *args: PyTree, **kwargs: PyTree) -> Report:
    """Count trained and frozen values and their bytes, and list how fn uses each adapted weight.

    This is a dry run on shapes: nothing is computed, except which of DoRA's norms are 0 if values
    are available. A use of an adapted weight is "factored", $x W + s (x a) b$; "materialized" if no
    rule covers the equation; or "built" if two weights are multiplied and this one, the smaller, is
    materialized. A leaf trained whole is "dense".

    Args:
      fn: a function, as for lift; it may also be a lifted function.
      tree: its first argument: a combined tree, or parameters without adapters, of arrays or
        jax.ShapeDtypeStruct.
      *args: the other arguments of fn: arrays, jax.ShapeDtypeStruct or static values.
      **kwargs: the same, by keyword.

    Returns:
      A Report: a mapping from path to LeafReport over the adapted leaves, with counts and bytes of
      the whole tree. str(), rich and notebooks show it as tables.

    Raises:
      ConfigError: fn is not callable.
      TreeError: tree is an adapter without its base.

    Source: the counts are those of LoRA, arXiv 2106.09685, section 4.2.

    >>> import jax.numpy as jnp, lowrank_jax as lowrank
    >>> config = lowrank.LoraConfig(rank=2, targets="w")
    >>> base, lora = lowrank.init(jax.random.key(0), {"w": jnp.ones((64, 32))}, config)
    >>> fn = lambda params, x: x @ params["w"]
    >>> print(report(fn, lowrank.combine(base, lora), jnp.ones((1, 64))))
             values   share    memory
    ---------------------------------
    frozen    2,048  91.43%  8.00 KiB
    trained     192   8.57%     768 B
    <BLANKLINE>
    leaf  shape  adapter       trained  use
    -----------------------------------------------
    w     64×32  LoRA r=2 s=2      192  factored 1×
    """
    call, dynamic, paths = split_arguments((tree, *args), kwargs)
    refuse_unsupported_dtypes(dynamic, paths)
    ctx = Context(OPERATIONS, inline_jit=True, abstract=True)
    jax.eval_shape(lambda dynamic: evaluate(fn, call, dynamic, paths, ctx), dynamic)
    leaves = [(path, strip_norms(leaf)) for path, leaf in flatten(tree, is_leaf=is_node)[0]]
    nodes = {path: leaf for path, leaf in leaves if is_node(leaf)}
    uses: dict[str, list[Record]] = {}
    for record in ctx.records:
        uses.setdefault(record.path, []).append(record)
    leaves = {path: _report_leaf(node, tuple(uses.get(path, ()))) for path, node in nodes.items()}
    # An Adapted leaf counts twice, its base as frozen and its delta as trained: for float32
    # [64, 32] and LoRA of rank 2, 2048 values (8192 bytes) are frozen, 2 * (64 + 32) are trained.
    # The bytes of a Quantized base are split into packed values and scales.
    # Of an adapter under another one, the base and the factors are frozen.
    base_of = lambda leaf: leaf.base if isinstance(leaf, Adapted) and is_adapter(leaf) else leaf
    frozen = jax.tree.map(base_of, tree, is_leaf=is_node)
    deltas = [
        node.delta if isinstance(node, Adapted) else node
        for node in nodes.values()
        if is_adapter(node)
    ]
    scales = [
        (leaf.scales, leaf.nested, leaf.offset, leaf.nested_map)
        for leaf in jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, Quantized))
        if isinstance(leaf, Quantized)
    ]

    def memory(size: Callable[[Any], int]) -> Memory:
        base = sum_leaves(size, frozen) - sum_leaves(size, scales)
        return Memory(base, sum_leaves(size, deltas), sum_leaves(size, scales))

    counted = [leaf for leaf in jax.tree.leaves(frozen, is_leaf=is_node) if hasattr(leaf, "shape")]
    return Report(
        leaves,
        sum(map(_count_values, deltas)),
        sum(map(_count_frozen, counted)),
        memory(count_bytes),
        memory(count_device_bytes),
    )


def _report_leaf(
    node: Adapted | Quantized | Full | LowRank, uses: tuple[Record, ...]
) -> LeafReport:
    """Make the report on one node."""
    shape, base = tuple(node.shape), find_frozen(node)
    format = base.format if isinstance(base, Quantized) else None
    bits = count_bits(base)
    if isinstance(node, Quantized):
        return LeafReport("frozen", shape, None, None, 0, format, bits, uses)
    delta = node.delta if isinstance(node, Adapted) else node
    if not is_adapter(node):
        label = "whole" if isinstance(delta, Full) else get_label(delta)
        return LeafReport(f"frozen {label}", shape, None, None, 0, format, bits, uses)
    count = _count_values(delta)
    if isinstance(delta, Full):
        return LeafReport("whole", shape, None, None, count, format, bits, uses)
    still = count_dead_features(node.base, delta) if isinstance(node, Adapted) else 0
    numbers = delta.rank, delta.scale, count
    return LeafReport(get_label(delta), shape, *numbers, format, bits, uses, still, delta.is_full)


def _count_frozen(leaf: Any) -> int:
    """Count the values of a frozen leaf, with those of frozen adapters on it."""
    leaf = strip_norms(leaf)
    if isinstance(leaf, Adapted):
        return _count_frozen(leaf.base) + _count_values(leaf.delta)
    return count_elements(leaf)


def _count_values(delta: Any) -> int:
    """Count the values of an adapter, of quantized factors those that their codes stand for."""
    is_quantized = lambda leaf: isinstance(leaf, Quantized)
    leaves = jax.tree.leaves(delta, is_leaf=is_quantized)
    return sum(math.prod(leaf.shape) for leaf in leaves if hasattr(leaf, "shape"))
