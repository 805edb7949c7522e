"""Text of the outside world: printable, bounded and unambiguous."""

import re

import pytest

import lowrank_jax as lowrank
from lowrank_jax import CheckpointError
from lowrank_jax._display.text import to_printable

pytestmark = pytest.mark.usefixtures("fast_compile")

HOSTILE = {
    "escape": "a\x1b[2J\x1b]0;title\x07b",
    "line": "a\nodd: EVIL",
    "return": "a\rEVIL",
    "NUL": "a\0b",
    "C1": "a\x9b31mb",
    "DEL": "a\x7fb",
    "bidi": "a\u202eb\u2066c",
    "separator": "a\u2028EVIL",
    "surrogate": "a\ud800b",
    "long": "x" * 100_000,
}

UNFIT = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def fit(text, limit=30_000):
    """Whether a text steers no terminal, makes no line of its own, and is not long."""
    return not UNFIT.search(text) and "\nodd: EVIL" not in text and len(text) < limit


@pytest.mark.parametrize("case", HOSTILE)
def test_printable(case):
    text = to_printable(HOSTILE[case])
    assert fit(text)
    assert "\n" not in text
    assert len(text) < 300
    text.encode()
    assert to_printable(text) == text
    for error in (CheckpointError, lowrank.PlanWarning):
        assert fit(str(error(f"{HOSTILE[case]} is wrong")).replace("\nodd", ""))


@pytest.mark.parametrize(
    "text", ["слой/überß", "层.weight", "👩‍👩‍👧", "क्‍ष", "a b~\\'\"", "לשון", "ﷺ𝔘"]
)
def test_what_is_written_in_the_world_stays(text):
    assert to_printable(text) == text
    assert str(CheckpointError(text)) == text
