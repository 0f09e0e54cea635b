# SPDX-License-Identifier: GPL-3.0-or-later
"""Callers who come together share a pass, each hears of its own, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from fleet_rows_builder import make_selection_request
from node_manager import coalescer
from node_manager.placement_queue import PlacementQueue
from node_manager.problems import PlacementQueueFullError
from node_manager.store import StoreUnavailableError

WAIT_SECONDS = 30


class HeldPlacer:
    """Places nothing, and waits before that until it is let go; answers with the ids that it was asked for."""

    def __init__(self) -> None:
        self.passes: list[list[str]] = []
        self.entered = threading.Semaphore(0)
        self.free = threading.Event()
        self.error: Exception | None = None

    def place(self, requests: Sequence[Any]) -> list[Any]:
        """Answer for each request."""
        self.passes.append([request.deployment_id for request in requests])
        self.entered.release()
        assert self.free.wait(WAIT_SECONDS)
        if self.error is not None:
            raise self.error
        return self.passes[-1]


@pytest.fixture
def placer() -> HeldPlacer:
    """Give a placer that waits."""
    return HeldPlacer()


@pytest.fixture
def queue(placer: HeldPlacer) -> Iterator[PlacementQueue]:
    """Give a queue that works, its first pass under way."""
    found = PlacementQueue(placer)  # type: ignore[arg-type]
    found.start()
    submit(found, "first")
    assert placer.entered.acquire(timeout=WAIT_SECONDS)
    yield found
    placer.free.set()
    found.stop()


def submit(queue: PlacementQueue, *names: str) -> Future[Any]:
    """Ask for deployments."""
    return queue.submit([make_selection_request(name) for name in names])


def test_submit_gives_each_caller_its_own_outcomes_of_one_pass(queue: PlacementQueue, placer: HeldPlacer) -> None:
    futures = [submit(queue, "a"), submit(queue, "b", "c"), submit(queue, "d")]

    placer.free.set()

    assert [future.result(WAIT_SECONDS) for future in futures] == [["a"], ["b", "c"], ["d"]]
    assert placer.passes == [["first"], ["a", "b", "c", "d"]]


def test_submit_shares_a_pass_among_a_bounded_number(queue: PlacementQueue, placer: HeldPlacer) -> None:
    futures = [submit(queue, f"d{number}") for number in range(300)]

    placer.free.set()

    assert [future.result(WAIT_SECONDS) for future in futures] == [[f"d{number}"] for number in range(300)]
    assert [len(each) for each in placer.passes] == [1, 128, 128, 44]


def test_submit_tells_everybody_of_an_error_and_goes_on(queue: PlacementQueue, placer: HeldPlacer) -> None:
    placer.error = StoreUnavailableError("the disk is full")
    futures = [submit(queue, "a"), submit(queue, "b")]

    placer.free.set()

    for future in futures:
        with pytest.raises(StoreUnavailableError):
            future.result(WAIT_SECONDS)
    placer.error = None
    assert submit(queue, "c").result(WAIT_SECONDS) == ["c"]


def test_submit_places_nothing_for_whoever_went_away(queue: PlacementQueue, placer: HeldPlacer) -> None:
    gone, stays = submit(queue, "gone"), submit(queue, "stays")

    assert gone.cancel()
    placer.free.set()

    assert stays.result(WAIT_SECONDS) == ["stays"]
    assert placer.passes == [["first"], ["stays"]]


def test_submit_to_a_full_queue_is_refused(placer: HeldPlacer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalescer, "_MAX_WAITING", 2)
    queue = PlacementQueue(placer)  # type: ignore[arg-type]
    submit(queue, "a")
    submit(queue, "b")

    with pytest.raises(PlacementQueueFullError, match="repeat the request") as caught:
        submit(queue, "c")

    assert caught.value.status == 503


def test_stop_places_what_waits(queue: PlacementQueue, placer: HeldPlacer) -> None:
    future = submit(queue, "last")
    placer.free.set()

    queue.stop()

    assert future.result(0) == ["last"]
