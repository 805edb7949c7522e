"""Tables: like rows on one line, units, no rows."""

import pytest

from lowrank_jax._display.table import Table, collapse_rows, format_bytes

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_rows_are_joined_only_where_nothing_is_lost():
    layer = lambda i, j=0, cell="x": (f"layer_{i}/w_{j}", cell)
    joined = lambda rows: [(row[0], count) for row, count in collapse_rows(rows)]
    assert joined([layer(i) for i in range(3)]) == [("layer_{0..2}/w_0", 3)]
    assert joined([layer(i) for i in (0, 2, 5)]) == [("layer_{0,2,5}/w_0", 3)]
    # rows whose other cells differ are shown as they are
    assert len(joined([layer(i, cell=str(i)) for i in range(3)])) == 3
    # every combination, or none: {0..1}/{0..1} would name a leaf that is not there
    grid = [layer(i, j) for i in range(2) for j in range(2)]
    assert joined(grid) == [("layer_{0..1}/w_{0..1}", 4)]
    assert len(joined(grid[:3])) == 3
    assert joined([layer(4)]) == [("layer_4/w_0", 1)]
    assert joined([(f"l_{i:02}", "x") for i in range(2)]) == [("l_{00,01}", 2)]


def test_units():
    assert format_bytes(0) == "0 B"
    assert format_bytes(1023) == "1023 B"
    assert format_bytes(1024) == "1.00 KiB"
    assert format_bytes(5 * 2**40) == "5,120.00 GiB"


def test_table_of_no_rows():
    assert str(Table(("one", "two"), ())) == "one  two\n--------"
