"""Tables that people read: as text, as HTML in a notebook, and by rich where it is installed."""

from __future__ import annotations

import abc
import dataclasses
import html
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lowrank_jax._display.text import to_printable, to_printable_lines

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under the names of their columns; `right` names the columns of numbers.

    A note is a line under the table. Cells are names of the user's, and of files': they are made
    fit to print.
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
        """An HTML table."""
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
        """A rich.table.Table; called by rich itself, so that it is there to be imported."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        kept = [i for i in range(len(self.columns)) if self._has_content(i) or not self.rows]
        table = RichTable(box=box.SIMPLE, pad_edge=False, caption=self.note or None)
        for i in kept:  # a narrow terminal folds the paths and the notes
            name, outer = self.columns[i], i in (0, len(self.columns) - 1)
            side = "right" if name in self.right else "left"
            table.add_column(name, justify=side, overflow="fold", no_wrap=not outer)
        for row in self.rows:
            table.add_row(*(Text(row[i]) for i in kept))
        return table

    def _has_content(self, column: int) -> bool:
        """Whether a column says anything."""
        return any(row[column] not in ("", "-") for row in self.rows)


class TableMapping(Mapping):
    """A mapping of path -> what is known of the leaf there, shown as the table of a subclass."""

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
        """The whole of it."""

    def __str__(self) -> str:
        return str(self._table())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self._table().html()

    def __rich__(self) -> Any:
        """What rich.print shows."""
        return self._table().rich()


def collapse_rows(rows: Iterable[Row], at_least: int = 2) -> list[tuple[Row, int]]:
    """Rows that differ only in numbers within their first cell, a path, made one, and how many.

    >>> rows = [("layer_0/w", "8×8"), ("layer_1/w", "8×8"), ("layer_2/w", "8×8"), ("head", "8×2")]
    >>> collapsed(rows)
    [(('layer_{0..2}/w', '8×8'), 3), (('head', '8×2'), 1)]
    """
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
    """One text for paths whose numbers run through every combination, or None."""
    parts = [re.split(r"(\d+)", path) for path in paths]
    cells = [list(dict.fromkeys(values)) for values in zip(*parts, strict=True)]
    if math.prod(map(len, cells)) != len(paths):
        return None
    return "".join(values[0] if len(values) == 1 else _format_numbers(values) for values in cells)


def _format_numbers(numbers: Sequence[str]) -> str:
    """{0..3} for consecutive numbers, else {0,2,3}."""
    values = sorted(map(int, numbers))
    if {*map(str, values)} == {*numbers} and values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return "{" + ",".join(sorted(numbers, key=int)) + "}"


def format_shape(shape: Sequence[int]) -> str:
    """4×3, or "scalar"."""
    return "×".join(map(str, shape)) or "scalar"


def format_bytes(count: float) -> str:
    """A number of bytes in the unit that suits it.

    >>> bytes_text(512), bytes_text(4.5 * 2**20)
    ('512 B', '4.50 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
