"""The collectives of a compiled program: what moves between devices, by kind and dtype."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
    "all-to-all",
)

# "  %name = f32[8,4]{1,0} all-gather(%operand), ..." and "  ROOT %name = (u8[4], u8[32]) ..."
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


def count_collectives(text: str) -> dict[str, int]:
    """Count the bytes that collectives bring to one device, from the text of a compiled program.

    Returns:
      "all-gather u8" -> bytes of the results, the largest first. What a loop does is counted as
      often as the loop is known to run, else once.

    >>> count_collectives('''
    ... ENTRY %main (x: u8[4]) -> u8[32] {
    ...   ROOT %gathered = u8[32]{0} all-gather(u8[4]{0} %x), dimensions={0}
    ... }''')
    {'all-gather u8': 32}
    """
    bodies, entry = _split_computations(text)
    totals: dict[str, int] = {}
    seen: set[str] = set()
    for times, channel, kind, arrays in _walk(bodies, entry, 1):
        # a TPU's program has a collective in each of the fusions that run while it does
        if channel in seen:
            continue
        seen |= {channel} - {""}
        for dtype, size in arrays:
            name = f"{kind} {dtype}"
            totals[name] = totals.get(name, 0) + times * size
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _split_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation by its name, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line[:1].isspace():
            lines.append(line)
        elif match := _COMPUTATION.match(line):
            lines = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
    return bodies, entry


def _walk(
    bodies: Mapping[str, list[str]], name: str, times: int
) -> Iterator[tuple[int, str, str, list[tuple[str, int]]]]:
    """Yield (number of times, channel, kind, [(dtype, bytes) of a result]) of each collective."""
    for line in bodies.get(name, ()):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        result, op, rest = match.groups()
        # what "-start" returns holds its operands too, and "-done" of a generic async op calls the
        # computation that "-start" has called
        kind = op.removesuffix("-done")
        if kind in KINDS:
            channel = _CHANNEL.search(rest)
            arrays = [
                (dtype, _count_bytes(dtype, shape)) for dtype, shape in _ARRAY.findall(result)
            ]
            yield times, channel[1] if channel else "", kind, arrays
        elif op not in ("async-update", "async-done") and not op.startswith(KINDS):
            own = times * _count_trips(bodies, rest) if op == "while" else times
            for called in _list_called(rest):
                yield from _walk(bodies, called, own)


def _count_trips(bodies: Mapping[str, list[str]], rest: str) -> int:
    """Return how often a loop runs: as XLA says it, or the limit that its condition compares to."""
    if known := _TRIPS.search(rest):
        return int(known[1])
    condition = _CONDITION.search(rest)
    lines = bodies.get(condition[1], []) if condition else []
    limits = [int(found[1]) for line in lines if (found := _LIMIT.search(line))]
    is_counter = any("direction=LT" in line for line in lines)
    return limits[0] if is_counter and len(limits) == 1 else 1


def _list_called(rest: str) -> list[str]:
    branches = _BRANCHES.search(rest)
    names = branches[1].split(",") if branches else []
    return [*_CALLED.findall(rest), *(name.strip().lstrip("%") for name in names)]


def _count_bytes(dtype: str, shape: str) -> int:
    """Count the bytes of an array of XLA's dtype: "f8e4m3fn" and "s8" are of 8 bits, "pred" too."""
    digits = re.match(r"[a-z]+(\d+)", dtype)
    bits = int(digits[1]) if digits else 8
    return math.ceil(math.prod(int(size) for size in shape.split(",") if size) * bits / 8)
