# SPDX-License-Identifier: GPL-3.0-or-later
"""Wait for a condition with a deadline: what tests use in place of a sleep. Imports the standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T | None], *, deadline_seconds: float, what: str, interval_seconds: float = 0.1
) -> T:
    """Call *condition* until it gives something true, and return that.

    Errors: TimeoutError that names *what* was waited for and the last answer.
    """
    end = time.monotonic() + deadline_seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() >= end:
            raise TimeoutError(f"Waited {deadline_seconds:g} s for {what}; last answer: {answer!r}")
        time.sleep(interval_seconds)
