# SPDX-License-Identifier: GPL-3.0-or-later
"""The way from the streams to the store: batches, their order, who waits, and what a store that is away costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any

import pytest
from builders import START, FakeClock, make_contact, make_declaration, make_sample, observe, seconds
from contract.test_unavailable import locked_from_outside
from job_parts import wait_until
from node_manager import recorder as module
from node_manager.node_registry import NodeRegistry
from node_manager.observations import Observation, ObservationLog, Outcome
from node_manager.recorder import BATCH, Recorder
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError, open_store, tables
from stored import Rows

NEVER_SECONDS = 3600.0
SOON_SECONDS = 0.01


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """Open a store that gives up soon."""
    with closing(open_store(store_url, busy_timeout_seconds=0.1)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try a store that does not answer again soon."""
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.05)


class NotedLog(ObservationLog):
    """The one door; it notes what goes through, and what comes of it."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.attempts: list[int] = []
        self.taken: list[list[Observation]] = []
        self.outcomes: list[Outcome] = []
        # Numbers of attempts at which the store is away.
        self.away_at: set[int] = set()

    def record(self, batch: Sequence[Observation], *, may_pin: bool = True, from_manager: bool = False) -> Outcome:
        self.attempts.append(len(batch))
        if len(self.attempts) in self.away_at:
            raise StoreUnavailableError("away for a moment")
        outcome = super().record(batch, may_pin=may_pin, from_manager=from_manager)
        self.taken.append(list(batch))
        self.outcomes.append(outcome)
        return outcome

    @property
    def recorded(self) -> int:
        return sum(outcome.recorded for outcome in self.outcomes)

    @property
    def late(self) -> int:
        return sum(outcome.late for outcome in self.outcomes)


@pytest.fixture
def log(store: Store, settings: Settings, clock: FakeClock) -> NotedLog:
    """Give the one door, at a time when all that is seen here has been seen."""
    clock.advance(60)
    return NotedLog(store, settings, clock)


@pytest.fixture(autouse=True)
def nodes(store: Store, settings: Settings) -> None:
    """Register two nodes."""
    registry = NodeRegistry(store, settings, FakeClock())
    for node_id in ("gw-1", "gw-2"):
        registry.register(make_declaration(node_id))


@contextmanager
def recording(log: ObservationLog, pause_seconds: float = SOON_SECONDS) -> Iterator[Recorder]:
    """Run a recorder."""
    recorder = Recorder(log, pause_seconds)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.stop()


def sample(number: int, node_id: str = "gw-1") -> Observation:
    """Give the sample of a moment."""
    return observe("sample", make_sample(), START + timedelta(milliseconds=number), node_id, "stream")


def contact(number: int, node_id: str = "gw-1") -> Observation:
    """Give a small observation of a moment, that is nothing to give up."""
    return observe("contact", make_contact(), START + timedelta(milliseconds=number), node_id, "stream")


def verdict(number: int, node_id: str = "gw-1", liveness: str = "suspect") -> Observation:
    """Give a verdict of a moment."""
    data = {"liveness": liveness, "reason": "TimedOut", "message": "nothing heard for 9.0 s"}
    return observe("verdict", data, START + timedelta(milliseconds=number), node_id, "stream")


def poison(number: int) -> Observation:
    """Give an observation that nobody foresaw: its time has no zone."""
    return observe("sample", make_sample(), (START + timedelta(milliseconds=number)).replace(tzinfo=None), "gw-1")


def put_waited(recorder: Recorder, *observations: Observation) -> list[Future[bool]]:
    """Hand in what is waited for."""
    waiters: list[Future[bool]] = []
    for observation in observations:
        waiters.append(Future())
        recorder.put(observation, waiters[-1])
    return waiters


def answers(waiters: Sequence[Future[bool]]) -> list[bool]:
    """Wait for all answers."""
    return [waiter.result(20) for waiter in waiters]


def health_of(rows: Rows) -> dict[str, str]:
    """Read the stored health of the nodes."""
    return {row["node_id"]: row["health"] for row in rows.of(tables.node_states)}


# batches and order


def test_put_makes_batches_of_what_waits(log: NotedLog) -> None:
    recorder = Recorder(log, NEVER_SECONDS)
    for number in range(2 * BATCH + BATCH // 2):
        recorder.put(contact(number))

    recorder.start()
    wait_until(lambda: log.recorded == 2 * BATCH + BATCH // 2)
    recorder.stop()

    assert [len(batch) for batch in log.taken] == [BATCH, BATCH, BATCH // 2]


def test_put_keeps_the_order_of_each_node(log: NotedLog, rows: Rows) -> None:
    with recording(log) as recorder:
        for number in range(300):
            recorder.put(sample(number))
            recorder.put(sample(number, "gw-2"))
        answers(put_waited(recorder, sample(300), sample(300, "gw-2")))

    assert (log.recorded, log.late) == (602, 0)
    assert [row["observed_at"] for row in rows.of(tables.node_samples)] == [START + seconds(0.3)] * 2


def test_put_of_samples_waits_for_company(log: NotedLog) -> None:
    with recording(log, NEVER_SECONDS) as recorder:
        for number in range(20):
            recorder.put(sample(number))
            time.sleep(0.01)
        answers(put_waited(recorder, sample(20)))

    assert len(log.taken) <= 3


def test_put_of_what_is_routine_waits_three_pauses_and_all_else_one(log: NotedLog) -> None:
    with recording(log, 0.5) as recorder:
        time.sleep(0.1)  # the recorder is in a pause by then
        begun = time.monotonic()
        recorder.put(sample(1), soon=False)
        wait_until(lambda: log.recorded == 1)
        patient = time.monotonic() - begun
        begun = time.monotonic()
        recorder.put(sample(2))
        wait_until(lambda: log.recorded == 2)
        soon = time.monotonic() - begun

    assert patient > 1.0
    assert soon < 1.0


def test_full_batch_waits_for_nobody(log: NotedLog) -> None:
    with recording(log, NEVER_SECONDS) as recorder:
        for number in range(BATCH):
            recorder.put(sample(number), soon=False)

        wait_until(lambda: log.recorded == BATCH)


@pytest.mark.parametrize("make", [verdict, contact])
def test_put_of_what_the_manager_found_is_recorded_at_once(log: NotedLog, make: Callable[[int], Observation]) -> None:
    with recording(log, NEVER_SECONDS) as recorder:
        recorder.put(make(1))

        wait_until(lambda: log.recorded == 1)


# who waits


def test_waiter_is_told_once_it_is_in_the_store(log: NotedLog, rows: Rows) -> None:
    stored: list[int] = []
    waiter: Future[bool] = Future()
    waiter.add_done_callback(lambda _waiter: stored.append(len(rows.of(tables.node_samples))))

    with recording(log, NEVER_SECONDS) as recorder:
        recorder.put(sample(1), waiter)

        assert waiter.result(20) is True
    assert stored == [1]


def test_waiter_that_has_gone_does_no_harm(log: NotedLog) -> None:
    gone: Future[bool] = Future()
    gone.cancel()

    with recording(log, NEVER_SECONDS) as recorder:
        recorder.put(sample(1), gone)
        first = answers(put_waited(recorder, sample(2)))
        second = answers(put_waited(recorder, sample(3)))

    assert (first, second, log.recorded) == ([True], [True], 3)


def test_waiter_of_what_is_rejected_is_told_so(log: NotedLog) -> None:
    unusable = observe("sample", b'{"schema": 1, "cpu": "many"}', START, "gw-1", "stream")

    with recording(log) as recorder:
        told = answers(put_waited(recorder, sample(1, "gw-2"), unusable, sample(2, "unknown"), sample(2, "gw-2")))

    assert told == [True, False, False, True]


# the store is away


def test_store_that_is_away_costs_nothing_but_time(
    log: NotedLog, rows: Rows, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    with recording(log) as recorder:
        with locked_from_outside(store_url):
            waiters = put_waited(recorder, sample(1), sample(1, "gw-2"), verdict(2, "gw-2"), sample(3))
            wait_until(lambda: len(log.attempts) >= 2)
            waited = [waiter.done() for waiter in waiters]
            recorder.put(sample(4))
        told = answers([*waiters, *put_waited(recorder, sample(5))])

    assert (waited, told) == ([False] * 4, [True] * 5)
    assert (log.recorded, log.late, recorder.given_up) == (6, 0, 0)
    assert health_of(rows) == {"gw-1": "unknown", "gw-2": "suspect"}


def test_stop_while_the_store_is_away_lets_those_who_wait_go(log: NotedLog, store_url: str) -> None:
    recorder = Recorder(log, SOON_SECONDS)
    recorder.start()

    with locked_from_outside(store_url):
        waiters = put_waited(recorder, sample(1), verdict(2))
        wait_until(lambda: log.attempts)
        recorder.stop()

        assert [waiter.done() and waiter.result() for waiter in waiters] == [False, False]


# too much waits


def test_overflow_gives_up_the_oldest_samples_and_no_verdict(log: NotedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 4)
    recorder = Recorder(log, SOON_SECONDS)
    recorder.put(verdict(0, "gw-2"))
    (oldest,) = put_waited(recorder, sample(1))
    for observation in (sample(2), contact(3), sample(4), sample(5)):
        recorder.put(observation)

    assert oldest.result(0) is False
    recorder.start()
    wait_until(lambda: log.recorded)
    recorder.stop()

    kept = [(item.kind.value, item.observed_at - START) for item in log.taken[0]]
    moments = [("verdict", 0), ("contact", 3), ("sample", 4), ("sample", 5)]
    assert kept == [(kind, timedelta(milliseconds=number)) for kind, number in moments]
    assert recorder.given_up == 2


def test_overflow_of_verdicts_alone_gives_up_none(log: NotedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 2)
    recorder = Recorder(log, SOON_SECONDS)
    for number in range(4):
        recorder.put(verdict(number))

    recorder.start()
    recorder.stop()

    assert ([len(batch) for batch in log.taken], recorder.given_up) == ([4], 0)


# what can't be recorded


def test_poison_takes_no_other_with_it(log: NotedLog) -> None:
    recorder = Recorder(log, SOON_SECONDS)
    waiters = put_waited(recorder, sample(1), sample(2), sample(3), poison(4), verdict(5, "gw-2"), sample(6), sample(7))

    recorder.start()
    told = answers(waiters)
    after = answers(put_waited(recorder, sample(8)))
    recorder.stop()

    assert told == [True, True, True, False, True, True, True]
    assert (after, log.recorded, recorder.given_up) == ([True], 7, 1)


def test_poison_while_the_store_goes_away_counts_once(log: NotedLog) -> None:
    # All four, the good half, the other half, the poison; then the store is away for what is left.
    log.away_at = {5}
    recorder = Recorder(log, SOON_SECONDS)
    waiters = put_waited(recorder, sample(1), sample(2), poison(3), sample(4))

    recorder.start()
    told = answers(waiters)
    after = answers(put_waited(recorder, sample(5)))
    recorder.stop()

    assert (told, after) == ([True, True, False, True], [True])
    assert (log.recorded, log.late, recorder.given_up) == (4, 0, 1)


# the end


def test_stop_records_what_waits(log: NotedLog) -> None:
    recorder = Recorder(log, NEVER_SECONDS)
    for number in range(BATCH + BATCH // 2):
        recorder.put(sample(number))

    # Stopped before its first round: how far it had come plays no part.
    recorder.stop()
    recorder.start()
    recorder.stop()

    assert (log.recorded, recorder.given_up) == (BATCH + BATCH // 2, 0)


def test_put_after_the_end_keeps_nobody_waiting(log: NotedLog) -> None:
    recorder = Recorder(log, SOON_SECONDS)
    recorder.start()
    recorder.stop()

    (waiter,) = put_waited(recorder, sample(1))

    assert waiter.result(5) is False
