"""A table for rich that fits the width of its terminal, and breaks no path inside a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from lowrank_jax._display.text import break_text

Row = tuple[str, ...]

_GAP, _EDGES = 3, 2  # widths between the columns of rich's table, and beside the outer ones
_PATH_WIDTH = 24  # a column of paths is at least as wide as this, or as its longest path


@dataclasses.dataclass(frozen=True)
class WidthTable:
    """What rich renders as a table; only rich calls its methods, so that it can be imported.

    The first column, of paths, and the last, of notes, are broken after slashes and spaces. Where
    they leave too little room, each path has a line of its own, above the other cells.

    Args:
      columns: the column names.
      rows: the rows, each with one cell for each column.
      right: names of the columns that are aligned right.
      note: lines below the table.

    >>> table = WidthTable(("path", "notes"), [("params/mlp/kernel", "tied, final")])
    >>> table.find_widths(33), table.find_widths(28), table.find_widths(26)
    ([17, 11], [17, 6], None)
    """

    columns: Row
    rows: Sequence[Row]
    right: frozenset[str] = frozenset()
    note: str = ""

    def find_widths(self, width: int) -> list[int] | None:
        """Return the widths of the columns in a terminal, or None if the paths have no room."""
        cells = list(zip(self.columns, *self.rows, strict=True))
        widths = [max(map(len, column)) for column in cells]
        room = width - sum(widths[1:-1]) - _GAP * (len(widths) - 1) - _EDGES
        if len(widths) == 1 or widths[0] + widths[-1] <= room:
            return widths
        longest = lambda column: max(len(part) for cell in column for part in break_text(cell, 1))
        least = max(longest(cells[0]), min(widths[0], _PATH_WIDTH))
        if room - least < longest(cells[-1]):
            return None
        last = min(widths[-1], room - least)
        return [min(widths[0], room - last), *widths[1:-1], last]

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Render in the width of the console."""
        widths = self.find_widths(options.max_width)
        if widths is None:
            yield from self._render_in_pairs(options.max_width)
        else:
            yield self._render(widths)

    def _render(self, widths: list[int]) -> Any:
        """Render with all cells of a row side by side."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE, pad_edge=False, caption=self.note or None)
        for name, width in zip(self.columns, widths, strict=True):
            side = "right" if name in self.right else "left"
            table.add_column(name, justify=side, width=width, overflow="fold")
        for row in self.rows:
            pairs = zip(row, widths, strict=True)
            table.add_row(*(Text("\n".join(break_text(cell, width))) for cell, width in pairs))
        return table

    def _render_in_pairs(self, width: int) -> Iterator[Any]:
        """Render each row in two lines, the path and below it the other cells."""
        from rich.text import Text

        cells = zip(self.columns[1:], *(row[1:] for row in self.rows), strict=True)
        widths = [max(map(len, column)) for column in cells]
        lines = []
        for row in (self.columns, *self.rows):
            rest = [
                cell.rjust(size) if name in self.right else cell.ljust(size)
                for cell, size, name in zip(row[1:], widths, self.columns[1:], strict=True)
            ]
            lines.append([*break_text(row[0], width), f"  {'  '.join(rest)}".rstrip()])
        yield Text("\n".join(lines[0]), style="bold")
        yield Text("-" * min(width, max(len(text) for line in lines for text in line)))
        yield from (Text("\n".join(line), overflow="fold") for line in lines[1:])
        if self.note:
            yield Text(self.note, style="italic")
