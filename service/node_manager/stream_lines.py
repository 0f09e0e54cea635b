# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node's probe says, cut into lines and kept within bounds: length, rate, and what is remembered of its errors.

Knows neither SSH nor processes; a carrier feeds it bytes and is told when to stop reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from node_manager.domain import ContactReason

BEAT = b'{"kind":"beat"}'
# How the probe writes what it saw.
DATA_LINE = re.compile(
    rb'\{"kind":"(?P<kind>[a-z]{1,16})"(?:,"id":"(?P<id>[0-9a-f]{32})")?,"data":(?P<data>.*)\}', re.DOTALL
)
LINES_BURST = 50
LINES_PER_SECOND = 10.0
# How long a node may go on sending more than it should before it is cut off.
FLOOD_SECONDS = 30.0
_ERROR_TAIL_BYTES = 2048


class Allowance:
    """A bucket of tokens that fills by itself; taking more than it has costs waiting."""

    __slots__ = ("_at", "_burst", "_level", "_per_second", "_strained_since")

    def __init__(self, burst: float, per_second: float, now: float) -> None:
        self._burst = burst
        self._per_second = per_second
        self._level = burst
        self._at = now
        self._strained_since: float | None = None

    def take(self, amount: float, now: float) -> float:
        """Take *amount* and give the seconds to wait before the next."""
        level = min(self._burst, self._level + (now - self._at) * self._per_second)
        # Half full again is what tells a burst that ended from a flood that only pauses when it is made to.
        if level >= self._burst / 2:
            self._strained_since = None
        level -= amount
        self._level = level
        self._at = now
        if level >= 0:
            return 0.0
        if self._strained_since is None:
            self._strained_since = now
        return -level / self._per_second

    def strained_seconds(self, now: float) -> float:
        """Tell for how long more has been taken than there was."""
        return 0.0 if self._strained_since is None else now - self._strained_since


class LineFeed:
    """Cut a stream of bytes into lines and hand them on, not faster than a node may send them.

    *on_fault* is called once, with the reason and the words, for a line that is too long, for a flood and for an error of
    *on_line*; nothing is handed on after. *on_wait* is called with the seconds for which the carrier must not read.
    """

    __slots__ = (
        "_allowance",
        "_buffer",
        "_clock",
        "_flood_seconds",
        "_max_line_bytes",
        "_on_fault",
        "_on_line",
        "_on_wait",
        "_scanned",
        "_state",
    )
    _HELD, _FLOWING, _WAITING, _CLOSED = range(4)

    def __init__(
        self,
        on_line: Callable[[bytes], None],
        on_wait: Callable[[float], None],
        on_fault: Callable[[ContactReason, str], None],
        clock: Callable[[], float],
        max_line_bytes: int,
        flood_seconds: float = FLOOD_SECONDS,
    ) -> None:
        self._on_line = on_line
        self._on_wait = on_wait
        self._on_fault = on_fault
        self._clock = clock
        self._max_line_bytes = max_line_bytes
        self._flood_seconds = flood_seconds
        self._allowance = Allowance(LINES_BURST, LINES_PER_SECOND, clock())
        self._buffer = bytearray()
        self._scanned = 0
        # Held until the caller has the stream in hand: no line may come before.
        self._state = self._HELD

    def feed(self, data: bytes) -> None:
        """Take what was read."""
        if self._state == self._CLOSED:
            return
        self._buffer += data
        if self._state == self._FLOWING:
            self.flow()
        elif len(self._buffer) > self._max_line_bytes + 65536:
            self._fail(ContactReason.OUTPUT_UNUSABLE, f"sent more than {len(self._buffer)} bytes without waiting")

    def flow(self) -> None:
        """Hand on the lines that have arrived, from the start or after a wait."""
        if self._state == self._CLOSED:
            return
        self._state = self._FLOWING
        buffer = self._buffer
        start = 0
        while (end := buffer.find(b"\n", max(start, self._scanned))) >= 0:
            if end - start > self._max_line_bytes:
                break
            line = bytes(buffer[start:end])
            start = end + 1
            if not self._hand_on(line):
                break
        else:
            self._scanned = len(buffer) - start
        del buffer[:start]
        if self._state != self._FLOWING:
            self._scanned = 0
        elif len(buffer) > self._max_line_bytes:
            self._fail(ContactReason.OUTPUT_UNUSABLE, f"sent a line longer than {self._max_line_bytes} bytes")

    def rest(self) -> bytes:
        """Give the beginning of a line that never ended."""
        return bytes(self._buffer[:_ERROR_TAIL_BYTES])

    def close(self) -> None:
        """Hand on nothing more."""
        self._state = self._CLOSED
        self._buffer = bytearray()

    def _hand_on(self, line: bytes) -> bool:
        now = self._clock()
        wait = self._allowance.take(1, now)
        try:
            self._on_line(line)
        except Exception as error:
            # Else the carrier would take it for the node's fault.
            self._fail(ContactReason.MANAGER_FAULT, f"a line could not be taken: {type(error).__name__}: {error}")
        if self._state != self._FLOWING:
            return False
        if wait <= 0:
            return True
        if self._allowance.strained_seconds(now) > self._flood_seconds:
            self._fail(ContactReason.OUTPUT_UNUSABLE, f"sends more than {LINES_PER_SECOND:g} lines a second")
            return False
        self._state = self._WAITING
        self._on_wait(wait)
        return False

    def _fail(self, reason: ContactReason, words: str) -> None:
        self.close()
        self._on_fault(reason, words)


class ErrorTail:
    """The last that a probe wrote on standard error."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> None:
        """Take what was read and forget what is older."""
        self._tail = (self._tail + data[-_ERROR_TAIL_BYTES:])[-_ERROR_TAIL_BYTES:]

    def last_line(self) -> str:
        """Give the last line that isn't empty."""
        lines = (line.strip() for line in reversed(self._tail.decode("utf-8", "replace").splitlines()))
        return next((line for line in lines if line), "")
