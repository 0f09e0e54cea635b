# SPDX-License-Identifier: GPL-3.0-or-later
"""What PromQL expressions speak of: their metrics, the labels they choose by, and those they group by.

A tokenizer, no parser: that an expression is one at all, promtool says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)
    |(?P<range>\[[^\]]*\])
    |(?P<number>\d[\w.]*)
    |(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    |(?P<operator>=~|!~|!=|==|<=|>=|[-+*/%^<>=(){},@])
    |(?P<space>\s+)""",
    re.VERBOSE,
)
_LISTS = frozenset(("by", "without", "on", "ignoring", "group_left", "group_right"))
_WORDS = frozenset(("and", "or", "unless", "bool", "offset", "inf", "nan", "atan2"))


@dataclass
class Spoken:
    """What one expression speaks of."""

    # Each metric with its matchers: label, operator, text.
    metrics: list[tuple[str, list[tuple[str, str, str]]]] = field(default_factory=list)
    grouped: set[str] = field(default_factory=set)


def read(expression: str) -> Spoken:
    """Read an expression.

    Errors: ValueError at what is no token of the language.
    """
    found = Spoken()
    tokens = list(_tokens(expression))
    place = 0
    while place < len(tokens):
        kind, text = tokens[place]
        following = tokens[place + 1][1] if place + 1 < len(tokens) else ""
        place += 1
        if kind != "name":
            continue
        if text.lower() in _LISTS:
            if following == "(":
                end = _end(tokens, place, ")")
                found.grouped.update(name for part, name in tokens[place:end] if part == "name")
                place = end
        elif text.lower() in _WORDS or following == "(" or following.lower() in {"by", "without"}:
            continue
        elif following == "{":
            end = _end(tokens, place, "}")
            found.metrics.append((text, _matchers([token for _, token in tokens[place + 1 : end]])))
            place = end
        else:
            found.metrics.append((text, []))
    return found


def _tokens(expression: str) -> Iterator[tuple[str, str]]:
    place = 0
    while place < len(expression):
        match = _TOKEN.match(expression, place)
        if match is None:
            raise ValueError(f"no PromQL: {expression[place : place + 20]!r} in {expression!r}")
        place = match.end()
        if match.lastgroup is not None and match.lastgroup != "space":
            yield match.lastgroup, match.group()


def _end(tokens: list[tuple[str, str]], place: int, closing: str) -> int:
    return next(number for number in range(place, len(tokens)) if tokens[number] == ("operator", closing))


def _matchers(tokens: list[str]) -> list[tuple[str, str, str]]:
    parts = [token for token in tokens if token != ","]
    return [(parts[number], parts[number + 1], parts[number + 2][1:-1]) for number in range(0, len(parts), 3)]
