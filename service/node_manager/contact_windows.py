# SPDX-License-Identifier: GPL-3.0-or-later
"""When nodes that sleep on purpose are awake.

Pure: the time of the day is a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from node_manager.node_types import ContactWindow

_DAY_SECONDS = 86_400


def expected_at(windows: Sequence[ContactWindow], second_of_day: float) -> tuple[bool, float]:
    """Tell whether a node is expected to answer, and in how many seconds that changes.

    Shapes: a window that ends before it starts spans midnight, one that ends where it starts lasts all day; no window at
    all means always.
    Units: *second_of_day* counts from 00:00 UTC.
    """
    if not windows:
        return True, math.inf
    spans = [_span(window) for window in windows]
    covered = 0.0
    # Where one window ends, another may go on.
    for _ in range(len(spans) + 1):
        left = [length - (second_of_day + covered - start) % _DAY_SECONDS for start, length in spans]
        covered += max(0.0, *left)
    if covered >= _DAY_SECONDS:
        return True, math.inf
    if covered > 0:
        return True, covered
    return False, min((start - second_of_day) % _DAY_SECONDS for start, _ in spans)


def _span(window: ContactWindow) -> tuple[int, int]:
    start, end = (_second_of(text) for text in (window.start, window.end))
    return start, (end - start) % _DAY_SECONDS or _DAY_SECONDS


def _second_of(text: str) -> int:
    hours, minutes = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60
