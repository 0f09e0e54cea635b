# SPDX-License-Identifier: GPL-3.0-or-later
"""Let an event loop stand still while nothing is under way in it, and then read in one go what came meanwhile.

Woken for each line by itself, it would find the processor's caches filled with something else, which costs many times the line:
docs/decisions/0016.
"""

from __future__ import annotations

import asyncio
import threading
import time

# How long after a question its answer is waited for without a pause.
_LIVELY_SECONDS = 2.0


class LoopRest:
    """The pauses of one loop."""

    def __init__(self) -> None:
        # What is under way; while there is any the loop doesn't stand still.
        self.busy: set[asyncio.Task[None]] = set()
        self._lively_until = 0.0
        self._hurry = threading.Event()

    def expect_answer(self) -> None:
        """Take in that somebody was asked, and may answer soon."""
        self._lively_until = time.monotonic() + _LIVELY_SECONDS

    def hurry(self) -> None:
        """Have the loop go on if it stands still; for other threads, once they have handed something in."""
        self._hurry.set()

    async def pause(self, seconds: float) -> None:
        """Let time pass; once the loop stood still, all that it has to read is read."""
        if self.busy or time.monotonic() < self._lively_until:
            await asyncio.sleep(seconds)
            return
        self._hurry.wait(seconds)
        self._hurry.clear()
        # One turn to look what is there to read, and one in which it is read: asyncio's own loop has whoever slept go first.
        for _ in range(2):
            await asyncio.sleep(0)
