# SPDX-License-Identifier: GPL-3.0-or-later
"""Lines are cut, bounded and slowed down; a node's last words are kept."""

from __future__ import annotations

import pytest
from node_manager.domain import ContactReason
from node_manager.stream_lines import LINES_BURST, Allowance, ErrorTail, LineFeed


class Carrier:
    """A carrier with a clock of its own, that reads again when it may."""

    def __init__(self, max_line_bytes: int = 100) -> None:
        self.now = 0.0
        self.lines: list[bytes] = []
        self.waits: list[float] = []
        self.faults: list[tuple[ContactReason, str]] = []
        self.feed = LineFeed(
            self.lines.append,
            self.waits.append,
            lambda reason, words: self.faults.append((reason, words)),
            lambda: self.now,
            max_line_bytes,
            flood_seconds=30,
        )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_feed_cuts_lines_wherever_the_pieces_end(size: int) -> None:
    carrier = Carrier()
    data = b"one\ntwo\n\nthree\nfour"

    carrier.feed.flow()
    for start in range(0, len(data), size):
        carrier.feed.feed(data[start : start + size])

    assert carrier.lines == [b"one", b"two", b"", b"three"]
    assert carrier.faults == []


@pytest.mark.parametrize(("length", "faults"), [(100, 0), (101, 1)])
@pytest.mark.parametrize("newline", [b"", b"\n"])
def test_feed_bounds_a_line(length: int, faults: int, newline: bytes) -> None:
    carrier = Carrier()

    carrier.feed.flow()
    carrier.feed.feed(b"ok\n" + b"x" * length + newline)

    assert carrier.lines[0] == b"ok"
    assert len(carrier.faults) == faults


def test_feed_holds_back_what_comes_before_the_start() -> None:
    carrier = Carrier()

    carrier.feed.feed(b"early\n")
    before = list(carrier.lines)
    carrier.feed.flow()

    assert (before, carrier.lines) == ([], [b"early"])


def test_feed_lets_a_burst_through_and_then_so_many_a_second() -> None:
    carrier = Carrier()

    carrier.feed.flow()
    carrier.feed.feed(b"x\n" * 500)
    burst = len(carrier.lines)
    for _ in range(100):
        carrier.now += carrier.waits[-1]
        carrier.feed.flow()

    assert LINES_BURST <= burst <= LINES_BURST + 1
    assert len(carrier.lines) - burst <= 10 * carrier.now + 1
    assert carrier.faults == []


def test_feed_ends_a_flood_that_goes_on() -> None:
    carrier = Carrier(max_line_bytes=10_000)

    carrier.feed.flow()
    carrier.feed.feed(b"x\n" * 2000)
    while not carrier.faults:
        carrier.now += carrier.waits[-1]
        carrier.feed.flow()

    assert 30 < carrier.now < 32
    assert carrier.faults[0][0] is ContactReason.OUTPUT_UNUSABLE


def test_allowance_forgets_a_burst_that_ended() -> None:
    allowance = Allowance(10, 1, 0)

    allowance.take(11, 0)
    strained = allowance.strained_seconds(3)
    allowance.take(1, 100)

    assert (strained, allowance.strained_seconds(200)) == (3, 0)


def test_error_tail_keeps_the_last_words_only() -> None:
    tail = ErrorTail()

    for _ in range(1000):
        tail.feed(b"x" * 1000)
    tail.feed(b"\nlast \xff words\n\n")

    assert tail.last_line() == "last \ufffd words"
