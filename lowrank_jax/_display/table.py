"""Tables rendered as text, as HTML for notebooks, and by rich if it is installed."""

from __future__ import annotations

import abc
import dataclasses
import html
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lowrank_jax._display.terminal import WidthTable
from lowrank_jax._display.text import to_printable, to_printable_lines

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text cells; control characters in cells and note are escaped.

    Args:
      columns: the column names.
      rows: the rows, each with one cell for each column.
      right: names of the columns that are aligned right.
      note: lines below the table.

    >>> print(Table(("path", "rank"), (("mlp/kernel", "8"),), right=frozenset({"rank"})))
    path        rank
    ----------------
    mlp/kernel     8
    """

    columns: Row
    rows: tuple[Row, ...]
    right: frozenset[str] = frozenset()
    note: str = ""

    def __post_init__(self) -> None:
        rows = tuple(tuple(to_printable(cell, 1000) for cell in row) for row in self.rows)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "note", to_printable_lines(self.note))

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = [
            "  ".join(
                cell.rjust(width) if name in self.right else cell.ljust(width)
                for cell, width, name in zip(line, widths, self.columns, strict=True)
            ).rstrip()
            for line in lines
        ]
        lines = [text[0], "-" * max(map(len, text)), *text[1:]]
        return "\n".join([*lines, self.note] if self.note else lines)

    def html(self) -> str:
        """Render as an HTML table."""
        sides = ["right" if name in self.right else "left" for name in self.columns]
        line = lambda tag, cells: (
            "<tr>"
            + "".join(
                f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            )
            + "</tr>"
        )
        body = "".join(line("td", row) for row in self.rows)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        head = line("th", self.columns)
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>{note}"

    def rich(self) -> Any:
        """Render by rich, in the width that its console has."""
        kept = [i for i in range(len(self.columns)) if self._has_content(i) or not self.rows]
        pick = lambda row: tuple(row[i] for i in kept)
        return WidthTable(pick(self.columns), [*map(pick, self.rows)], self.right, self.note)

    def _has_content(self, column: int) -> bool:
        """Whether a column has a cell other than "" and "-"."""
        return any(row[column] not in ("", "-") for row in self.rows)


class TableMapping(Mapping):
    """A mapping from path to information on the leaf, displayed as a table by subclasses."""

    def __init__(self, leaves: Mapping[str, Any]):
        self._leaves = dict(leaves)

    def __getitem__(self, path: str) -> Any:
        return self._leaves[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    @abc.abstractmethod
    def _table(self) -> Table:
        """Return the table that displays the mapping."""

    def __str__(self) -> str:
        return str(self._table())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Render for a notebook."""
        return self._table().html()

    def __rich__(self) -> Any:
        """Render for rich.print."""
        return self._table().rich()


def collapse_rows(rows: Iterable[Row], at_least: int = 2) -> list[tuple[Row, int]]:
    """Merge rows that differ only in numbers in their path, the first cell; return their counts.

    >>> rows = [("layer_0/w", "8×8"), ("layer_1/w", "8×8"), ("layer_2/w", "8×8"), ("head", "8×2")]
    >>> collapse_rows(rows)
    [(('layer_{0..2}/w', '8×8'), 3), (('head', '8×2'), 1)]
    """
    # "layer_0/w" is keyed by ("layer_", "/w"). A group becomes one row only if its numbers form a
    # full grid: experts 0..7 of layers 0..3 do, but a grid with a hole stays as single rows.
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = (*re.split(r"\d+", row[0]), *row[1:])
        groups.setdefault(key, []).append(row)
    out: list[tuple[Row, int]] = []
    for members in groups.values():
        pattern = _merge_paths([row[0] for row in members]) if len(members) >= at_least else None
        if pattern is None:
            out += [(row, 1) for row in members]
        else:
            out.append(((pattern, *members[0][1:]), len(members)))
    return out


def _merge_paths(paths: Sequence[str]) -> str | None:
    """Merge paths whose numbers take every combination of values into one text, or return None."""
    parts = [re.split(r"(\d+)", path) for path in paths]
    cells = [list(dict.fromkeys(values)) for values in zip(*parts, strict=True)]
    if math.prod(map(len, cells)) != len(paths):
        return None
    return "".join(values[0] if len(values) == 1 else _format_numbers(values) for values in cells)


def _format_numbers(numbers: Sequence[str]) -> str:
    """Format numbers as {0..3} if they are consecutive, else as {0,2,3}."""
    values = sorted(map(int, numbers))
    if {*map(str, values)} == {*numbers} and values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return "{" + ",".join(sorted(numbers, key=int)) + "}"


def format_shape(shape: Sequence[int]) -> str:
    """Format a shape as 4×3, or as "scalar"."""
    return "×".join(map(str, shape)) or "scalar"


def format_bytes(count: float) -> str:
    """Format a number of bytes with a unit.

    >>> format_bytes(512), format_bytes(4.5 * 2**20)
    ('512 B', '4.50 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
