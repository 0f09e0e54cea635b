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

import select
import time
from collections import deque
from queue import SimpleQueue
from typing import Callable, Deque, Dict, Optional

from ._probe import Sampler
from ._probe_lines import Outbox
from ._probe_read import Reader
from ._probe_run import Batch, WakePipe

PRIME_SECONDS = 1.0
MAX_ASKED = 8
# How long after a sample was due the main thread looks whether it came.
_LOOK_AFTER_SECONDS = 0.5
# How soon it looks after a sample that was asked for.
_LOOK_SOON_SECONDS = 0.05
# poll(2) counts milliseconds in 32 bits.
_MAX_WAIT_SECONDS = 3600.0
_NEVER = float("inf")


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
        self._pipe = WakePipe()
        self._poller = select.poll()
        self._poller.register(self._pipe.reading, select.POLLIN)
        self._asked: Deque[Optional[str]] = deque()
        # Until when no thread is tried for, after there was none to be had.
        self._thread_at = 0.0
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
        now = time.monotonic()
        return now + _LOOK_SOON_SECONDS if self._asked else max(now, self.due) + _LOOK_AFTER_SECONDS

    def ask(self, command_id: Optional[str]) -> bool:
        """Have a sample taken as soon as can be; false if too many wait."""
        if len(self._asked) >= MAX_ASKED:
            return False
        self._asked.append(command_id)
        self._pipe.wake()
        return True

    def look(self) -> float:
        """Give up what hangs, and see that there is a thread; give the time to look again. For the main thread."""
        # Before the sampler is asked: what begins meanwhile is looked at in time.
        look_at = self.look_at
        overdue_at = self._sampler.look()
        now = time.monotonic()
        if self._begun != self.done and overdue_at == _NEVER:
            # It is about to begin, or just ended.
            look_at = min(look_at, now + _LOOK_SOON_SECONDS)
        if now >= self._thread_at:
            try:
                self._sampler.keep_worker()
            except RuntimeError as error:
                self._thread_at = now + self._interval
                self._outbox.fail_because("sample", error)
        return min(overdue_at, max(look_at, self._thread_at))

    def _wait(self, handed_over: SimpleQueue[Optional[Batch]]) -> Optional[Batch]:
        """Do what the idle thread does: wait for the time of the next sample, for somebody who asks, or for the end."""
        while True:
            # In this order: whoever gave this thread up did so while a sample was under way.
            is_idle = self._begun == self.done
            if not handed_over.empty():
                return handed_over.get()
            now = time.monotonic()
            batch = None
            # Counted first of all: the main thread is to see that something is under way before that nothing is due.
            if is_idle and now >= self.due:
                self._begun += 1
                batch = self._begin_due(now)
            elif is_idle and self._asked:
                self._begun += 1
                batch = self._begin(self._sampler.begin, self._asked.popleft())
            else:
                wait_seconds = max(0.0, self.due - now) if is_idle else _LOOK_SOON_SECONDS
                # Rounded up: what is not quite due would be looked for again and again.
                if self._poller.poll(int(min(wait_seconds, _MAX_WAIT_SECONDS) * 1000) + 1):
                    self._pipe.drain()
            if batch is not None:
                return batch

    def _begin_due(self, now: float) -> Optional[Batch]:
        if self._begun == 1:
            self.due = now + PRIME_SECONDS
            return self._begin(lambda then: self._sampler.begin_priming(PRIME_SECONDS * 2, then), None)
        if self._is_on_beat:
            self.due = next_on_beat(self.due, self._interval, now)
        else:
            self._is_on_beat = True
            # The others begin half an interval later at the earliest: rates over an instant say nothing.
            self.due = next_on_beat(self.due + self._offset, self._interval, now + self._interval / 2)
        return self._begin(self._sampler.begin, None)

    def _begin(self, begin: Callable[[Callable[..., None]], Batch], command_id: Optional[str]) -> Optional[Batch]:
        try:
            return begin(lambda take: self._hand_in(take, command_id))
        except Exception as error:
            # Nothing of it was begun, and this thread is to go on.
            self._outbox.fail_because("sample", error, command_id)
            self._end_turn()
            return None

    def _hand_in(self, take: Callable[[], Optional[Dict[str, object]]], command_id: Optional[str]) -> None:
        try:
            sample = take()
            if sample is not None:
                self._outbox.tell_sample(sample, command_id)
        except Exception as error:
            # Whatever it was, the loop goes on: the next turn may do better.
            self._outbox.fail_because("sample", error, command_id)
        self._end_turn()

    def _end_turn(self) -> None:
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
