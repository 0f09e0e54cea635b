# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Take samples on their beat, and when asked, on a thread that keeps the time by itself.

Standard library only. Runs on nodes with Python 3.8.

A thread that wakes, reads and hands in costs far less than one that has to be told to by another: every hand-over finds
the processor's caches filled with what ran meanwhile. So the main thread only looks, a moment after a sample should
have come, whether its thread is held up.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import deque
from queue import SimpleQueue
from typing import Callable, Deque, Dict, Optional

from ._probe import Sampler
from ._probe_lines import Outbox
from ._probe_read import Reader
from ._probe_run import Batch

PRIME_SECONDS = 1.0
_MAX_ASKED = 8
# How long after a sample was due the main thread looks whether it came.
_LOOK_AFTER_SECONDS = 0.5
# How soon it looks after a sample that was asked for.
_LOOK_SOON_SECONDS = 0.05


class Sampling:
    """Samples, one after another, first the counters alone; *finished* is called after each, on whichever thread."""

    def __init__(
        self,
        reader: Reader,
        outbox: Outbox,
        finished: Callable[[], None],
        *,
        interval_seconds: float,
        offset_seconds: float,
        containers_interval_seconds: float,
        services_interval_seconds: float,
    ) -> None:
        """Take the first sample at once; *offset_seconds* moves all others."""
        self._sampler = Sampler(
            reader,
            containers_interval_seconds=containers_interval_seconds,
            services_interval_seconds=services_interval_seconds,
            wait=self._wait,
        )
        self._outbox = outbox
        self._finished = finished
        self._interval = interval_seconds
        self._offset = offset_seconds
        self._woken, self._wake_end = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake_end, False)
        self._poller = select.poll()
        self._poller.register(self._woken, select.POLLIN)
        self._asked: Deque[Optional[str]] = deque()
        self._is_on_beat = False
        self._begun = 0
        self.done = 0
        self.due = 0.0

    @property
    def idle(self) -> bool:
        """Tell whether no sample is under way or asked for."""
        return not self._asked and self._begun == self.done

    @property
    def look_at(self) -> float:
        """The time to look whether the next sample came."""
        return max(time.monotonic(), self.due) + _LOOK_AFTER_SECONDS

    def ask(self, command_id: Optional[str]) -> bool:
        """Have a sample taken as soon as can be; false if too many wait."""
        if len(self._asked) >= _MAX_ASKED:
            return False
        self._asked.append(command_id)
        # A full pipe wakes as well as one more byte would.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_end, b"\0")
        return True

    def look(self) -> float:
        """Give up what hangs, and see that there is a thread; give the time to look again. For the main thread."""
        now = time.monotonic()
        try:
            look_at = self._sampler.look()
        except RuntimeError as error:
            self._outbox.fail_because("sample", error)
            look_at = now + self._interval
        else:
            look_at = min(look_at, self.look_at)
        return min(look_at, now + _LOOK_SOON_SECONDS) if self._asked else look_at

    def _wait(self, handed_over: SimpleQueue[Optional[Batch]]) -> Optional[Batch]:
        """Do what the idle thread does: wait for the time of the next sample, for somebody who asks, or for the end."""
        while True:
            # In this order: whoever gave this thread up did so while a sample was under way.
            is_idle = self._begun == self.done
            if not handed_over.empty():
                return handed_over.get()
            now = time.monotonic()
            if is_idle and now >= self.due:
                return self._begin_due(now)
            if is_idle and self._asked and self._begun:
                return self._begin(self._asked.popleft())
            wait_seconds = max(0.0, self.due - now) if is_idle else _LOOK_SOON_SECONDS
            # Rounded up: what is not quite due would be looked for again and again.
            if self._poller.poll(int(wait_seconds * 1000) + 1):
                os.read(self._woken, 4096)

    def _begin_due(self, now: float) -> Batch:
        if not self._begun:
            self.due = now + PRIME_SECONDS
            self._begun += 1
            return self._sampler.begin_priming(PRIME_SECONDS * 2, lambda take: self._hand_in(take, None))
        origin = self.due
        after = now
        if not self._is_on_beat:
            # The others begin half an interval later at the earliest: rates over an instant say nothing.
            self._is_on_beat, origin, after = True, self.due + self._offset, now + self._interval / 2
        self.due = next_on_beat(origin, self._interval, after)
        return self._begin(None)

    def _begin(self, command_id: Optional[str]) -> Batch:
        self._begun += 1
        return self._sampler.begin(lambda take: self._hand_in(take, command_id))

    def _hand_in(self, take: Callable[[], Optional[Dict[str, object]]], command_id: Optional[str]) -> None:
        try:
            sample = take()
            if sample is not None:
                self._outbox.tell_sample(sample, command_id)
        except Exception as error:
            # Whatever it was, the loop goes on: the next turn may do better.
            self._outbox.fail_because("sample", error, command_id)
        now = time.monotonic()
        if self._is_on_beat and self.due <= now:
            # It has missed this turn; the next one comes on its beat.
            self.due = next_on_beat(self.due, self._interval, now)
        self.done += 1
        self._finished()


def next_on_beat(origin: float, interval: float, after: float) -> float:
    """Give the first of the moments *origin* + n x *interval* that lies later than *after*."""
    if after < origin:
        return origin
    return origin + (int((after - origin) / interval) + 1) * interval
