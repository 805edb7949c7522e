"""Limit the cost of compiling the regexes of a configuration, which may come from anyone.

Python's `re` visits every character of a range that ignores case, and makes a table of 65536
characters for a class with characters beyond Latin-1: a regex of a megabyte takes it minutes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lowrank_jax._display.text import quote_value
from lowrank_jax._errors import ConfigError

# The cost of one character of plain text is 1; compiling it takes about a microsecond.
MAX_COST = 1 << 16
_FLAGS = re.ASCII | re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE | re.UNICODE
_REGEX_COST, _CLASS_COST, _WIDE_CLASS_COST, _TABLE_SIZE = 12, 5, 200, 1 << 16
_IGNORES_CASE = re.compile(r"\(\?[aLmsux]*i")
_IS_WIDE = re.compile(r"[^\x00-\xff]|\\[uUN]")
_CHAR = r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\N\{[^}]*\}|\\[0-7]{1,3}|\\?."
# The end of a range is only looked at, because a scan cannot tell where a class starts: in
# "a-b-z" either "-" may be that of a range.
_RANGE = re.compile(rf"({_CHAR})-(?=({_CHAR}))", re.DOTALL)


def estimate_cost(text: str, flags: int) -> int:
    """Estimate the cost of compiling a regex, from above: whatever may be a class counts as one.

    >>> estimate_cost("layers_[0-9]+/kernel", 0)
    37
    >>> estimate_cost("[a-\U0010ffff]" * 10, re.IGNORECASE) > MAX_COST
    True
    """
    if len(text) > MAX_COST:
        return len(text)
    ignores_case = bool(flags & re.IGNORECASE or _IGNORES_CASE.search(text))
    each = _WIDE_CLASS_COST if ignores_case or _IS_WIDE.search(text) else _CLASS_COST
    cost = _REGEX_COST + len(text) + each * text.count("[")
    if ignores_case:
        cost += sum(_count_range(*found.groups()) for found in _RANGE.finditer(text)) // 8
    return cost


def _count_range(low: str, high: str) -> int:
    """Count the characters of a range, at most those of the table."""
    return min(max(0, _parse_char(high, _TABLE_SIZE) - _parse_char(low, 0)), _TABLE_SIZE)


def _parse_char(char: str, unknown: int) -> int:
    r"""Parse a character, or its escape, to its code point; unknown for "\N{...}"."""
    if len(char) == 1:
        return ord(char)
    if char[1] in "xuU" and len(char) > 2:
        return int(char[2:], 16)
    if char[1] == "N":
        return unknown
    return int(char[1:], 8) if char[1] in "01234567" else ord(char[1])


class RegexBudget:
    """The cost that the regexes of one configuration may have together.

    Args:
      config: the configuration, or its class.
    """

    def __init__(self, config: object):
        self._config, self._left = config, MAX_COST
        self._name = (config if isinstance(config, type) else type(config)).__name__

    def spend(self, text: str, flags: int) -> None:
        """Count a regex.

        Raises:
          ConfigError: the regexes counted so far cost too much.
        """
        self._left -= estimate_cost(text, flags)
        if self._left < 0:
            raise ConfigError(
                f"the regexes of a {self._name} are too large to compile, at {quote_value(text)}: "
                f"expected at most {MAX_COST} characters in all, where a class counts for up to "
                f"{_WIDE_CLASS_COST} and a wide range that ignores case for {_TABLE_SIZE // 8}; "
                "write globs, or shorter regexes"
            )

    def spend_fields(self, *fields: str) -> None:
        """Count the regexes among the patterns of fields of the configuration."""
        for name in fields:
            for pattern in getattr(self._config, name):
                if isinstance(pattern, re.Pattern):
                    self.spend(pattern.pattern, pattern.flags)

    def compile(self, value: Mapping[str, Any]) -> re.Pattern:
        """Count and compile the regex of {"re": "...", "flags": 2}.

        Raises:
          ConfigError: it is malformed, has flags that patterns do not have, or costs too much.
        """
        flags, text = value.get("flags", 0), value["re"]
        if type(flags) is not int or flags & ~_FLAGS:
            raise ConfigError(
                f"{quote_value(dict(value))} has flags that are not allowed in a pattern"
            )
        if isinstance(text, str):
            self.spend(text, flags)
        try:
            return re.compile(text, flags)
        except (re.error, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ConfigError(f"{quote_value(dict(value))} is not a regex: {error}") from error
