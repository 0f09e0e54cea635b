# SPDX-License-Identifier: GPL-3.0-or-later
"""Work that is shared by those who come at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from threading import Event

import pytest
from node_manager.coalescer import Coalescer, CoalescerFullError

SECONDS = 10


class Workshop:
    """Work that doubles numbers, and waits where it is told to."""

    def __init__(self) -> None:
        self.rounds: list[list[int]] = []
        self.busy = Event()
        self.go_on = Event()
        self.coalescer: Coalescer[int, int] = Coalescer("doubling", self._double, most=4)

    def _double(self, items: Sequence[int]) -> list[int]:
        self.rounds.append(list(items))
        self.busy.set()
        assert self.go_on.wait(SECONDS)
        if 13 in items:
            raise ValueError("13 can't be doubled")
        return [2 * item for item in items]


@pytest.fixture
def workshop() -> Iterator[Workshop]:
    """Give a workshop that waits in its first round."""
    found = Workshop()
    found.coalescer.start()
    yield found
    found.go_on.set()
    found.coalescer.stop()


def crowd(workshop: Workshop, items: Sequence[int]) -> list[Future[int]]:
    """Have all of *items* come while the first is worked on."""
    first = workshop.coalescer.submit(0)
    assert workshop.busy.wait(SECONDS)
    return [first, *(workshop.coalescer.submit(item) for item in items)]


def test_submit_gives_each_its_own_result(workshop: Workshop) -> None:
    futures = crowd(workshop, [1, 2, 3])
    workshop.go_on.set()

    assert [future.result(SECONDS) for future in futures] == [0, 2, 4, 6]


def test_submit_shares_a_round_up_to_the_bound(workshop: Workshop) -> None:
    futures = crowd(workshop, range(1, 7))
    workshop.go_on.set()
    futures[-1].result(SECONDS)

    assert workshop.rounds == [[0], [1, 2, 3, 4], [5, 6]]


def test_submit_tells_all_of_a_round_that_it_failed_and_goes_on(workshop: Workshop) -> None:
    futures = crowd(workshop, [1, 13, 2, 3, 4])
    workshop.go_on.set()

    assert [type(future.exception(SECONDS)) for future in futures] == [
        type(None), ValueError, ValueError, ValueError, ValueError, type(None),
    ]  # fmt: skip


def test_submit_leaves_out_who_called_off(workshop: Workshop) -> None:
    futures = crowd(workshop, [1, 2])
    futures[1].cancel()
    workshop.go_on.set()
    futures[2].result(SECONDS)

    assert workshop.rounds == [[0], [2]]


def test_submit_refuses_when_too_many_wait() -> None:
    coalescer: Coalescer[int, int] = Coalescer("nothing", list, most=1)
    for item in range(4096):
        coalescer.submit(item)

    with pytest.raises(CoalescerFullError, match="4096 wait for nothing already"):
        coalescer.submit(4096)


def test_stop_does_what_waits() -> None:
    workshop = Workshop()
    futures = [workshop.coalescer.submit(item) for item in range(9)]
    workshop.go_on.set()

    workshop.coalescer.start()
    workshop.coalescer.stop()

    assert [future.result(0) for future in futures] == [2 * item for item in range(9)]


def test_submit_refuses_once_it_was_stopped() -> None:
    workshop = Workshop()
    workshop.coalescer.start()
    workshop.coalescer.stop()

    with pytest.raises(CoalescerFullError, match="doubling has ended"):
        workshop.coalescer.submit(1)
