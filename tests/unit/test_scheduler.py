# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes are looked at, when, by whom."""

from __future__ import annotations

import pytest
from job_parts import FakeClock, FakeRunner, add_nodes, make_settings, wait_until
from node_manager.domain import Admin, ContactReason, JobAction, ObservationKind
from node_manager.jobs import JobQueue
from node_manager.node_registry import NodeRegistry
from node_manager.observations import Observation, ObservationLog
from node_manager.scheduler import LEASE_SECONDS, NODES_PER_JOB, Scheduler
from node_manager.store import StoreUnavailableError, open_store, tables

SAMPLE = {
    "schema": 1,
    **dict.fromkeys(
        [
            "boot_id", "uptime_seconds", "clock_unix_seconds", "interval_seconds", "cpu", "memory", "io", "filesystems",
            "network", "containers", "thermal", "root_read_only",
        ]
    ),
    "errors": [],
}  # fmt: skip
REPORT = {"schema": 1, "duration_seconds": 0.1, "checks": []}


@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path, MONITORING__GATHER_INTERVAL_SECONDS="60", MONITORING__CHECK_INTERVAL_SECONDS="300")


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, settings):
    url = settings.storage_url if request.param == "sqlite" else request.getfixturevalue("postgresql_database")
    store = open_store(url)
    yield store
    store.close()


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def fleet(store, settings, clock):
    return Fleet(store, settings, clock)


class Fleet:
    """A manager whose jobs end when the test says what was seen."""

    def __init__(self, store, settings, clock) -> None:
        self.store, self.settings, self.clock = store, settings, clock
        self.queue = JobQueue(store, settings, clock, "one", runner=FakeRunner(settings))
        self.in_hand: set[str] = set()
        self.scheduler = Scheduler(
            store, settings, self.queue, clock, "one", is_in_hand=lambda node_id: node_id in self.in_hand
        )
        self.door = ObservationLog(store, settings, clock)

    def round(self) -> list[tuple[JobAction, tuple[str, ...]]]:
        """Do a round; give the new jobs, which are then gone without having seen anything."""
        self.scheduler.round()
        jobs = self.queue.page(100).jobs
        with self.store.write() as connection:
            connection.execute(tables.jobs.delete())
        return [(job.action, job.node_ids) for job in reversed(jobs)]

    def see(self, node_id: str, *kinds: ObservationKind, reason: ContactReason | None = None) -> None:
        """Let something be seen now."""
        data = {ObservationKind.SAMPLE: SAMPLE, ObservationKind.REPORT: REPORT}
        if reason is not None:
            data[ObservationKind.CONTACT] = {"reached": False, "reason": reason.value, "message": "test"}
        outcome = self.door.record([Observation(node_id, self.clock(), "test", kind, data[kind]) for kind in kinds])
        assert outcome.rejected == []

    def fail(self, node_id: str) -> None:
        """Let a contact fail now."""
        self.see(node_id, ObservationKind.CONTACT, reason=ContactReason.TIMED_OUT)


BOTH = (ObservationKind.SAMPLE, ObservationKind.REPORT)


def test_round_checks_new_nodes_at_once_and_gathers_nothing_twice(fleet):
    add_nodes(fleet.store, fleet.settings, "a", "b")

    assert fleet.round() == [(JobAction.CHECK, ("a", "b"))]


def test_round_leaves_nodes_alone_that_were_seen_lately(fleet, clock):
    add_nodes(fleet.store, fleet.settings, "a")
    fleet.see("a", *BOTH)
    clock.advance(59)

    assert fleet.round() == []


def test_round_gathers_and_checks_at_their_intervals(fleet, clock):
    add_nodes(fleet.store, fleet.settings, "a")
    fleet.see("a", *BOTH)

    seen = []
    for _ in range(10):
        clock.advance(60)
        for action, _nodes in fleet.round():
            seen.append(action)
            fleet.see("a", *(BOTH if action is JobAction.CHECK else [ObservationKind.SAMPLE]))

    one_period = [JobAction.GATHER] * 4 + [JobAction.CHECK]
    assert seen == one_period * 2


def test_round_leaves_nodes_alone_that_are_offline_by_order_and_checks_those_in_maintenance(fleet):
    add_nodes(fleet.store, fleet.settings, "out", "serviced")
    registry = NodeRegistry(fleet.store, fleet.settings)
    registry.set_admin("out", Admin.OFFLINE, "test")
    registry.set_admin("serviced", Admin.MAINTENANCE, "test")

    assert fleet.round() == [(JobAction.CHECK, ("serviced",))]


def test_round_does_not_try_again_before_the_interval_when_nothing_came_of_it(fleet, clock):
    add_nodes(fleet.store, fleet.settings, "a")
    fleet.round()
    clock.advance(30)
    assert fleet.round() == [(JobAction.GATHER, ("a",))]
    clock.advance(30)
    assert fleet.round() == []

    clock.advance(30)

    assert fleet.round() == [(JobAction.GATHER, ("a",))]


def test_round_tries_a_suspect_again_soon_and_then_slowly_until_it_is_unreachable(fleet, clock):
    add_nodes(fleet.store, fleet.settings, "a")
    fleet.see("a", *BOTH)
    clock.advance(11)
    fleet.fail("a")
    assert fleet.round() == []

    pauses = []
    while NodeRegistry(fleet.store, fleet.settings).get("a").state.health == "suspect":
        pause = 0
        while (JobAction.CHECK, ("a",)) not in fleet.round():
            clock.advance(1)
            pause += 1
        pauses.append(pause)
        fleet.fail("a")

    # Three failures soon; from then on it takes three gather intervals without contact.
    assert pauses[:3] == [2, 2, 10]
    assert 180 <= 11 + sum(pauses) < 200
    clock.advance(10)
    assert (JobAction.CHECK, ("a",)) not in fleet.round()


def test_round_checks_a_node_that_is_back_until_it_has_proven_itself(fleet, clock):
    add_nodes(fleet.store, fleet.settings, "a")
    fleet.see("a", *BOTH)
    for _ in range(4):
        clock.advance(60)
        fleet.fail("a")
    fleet.round()
    clock.advance(10)
    fleet.see("a", ObservationKind.SAMPLE)

    seen = []
    for _ in range(4):
        clock.advance(10)
        seen.append(fleet.round())
        if seen[-1]:
            fleet.see("a", *BOTH)

    assert seen == [[(JobAction.CHECK, ("a",))]] * 3 + [[]]
    assert NodeRegistry(fleet.store, fleet.settings).get("a").state.health == "healthy"


def test_round_does_not_ask_for_what_is_on_its_way(fleet):
    add_nodes(fleet.store, fleet.settings, "a", "b", "c")
    fleet.queue.submit(JobAction.REGISTER, ["a"], "test")
    fleet.queue.submit(JobAction.GATHER, ["b"], "test")

    fleet.scheduler.round()

    checks = fleet.queue.page(10, action=JobAction.CHECK).jobs
    assert [job.node_ids for job in checks] == [("b", "c")]
    assert len(fleet.queue.page(10, action=JobAction.GATHER).jobs) == 1


def test_round_leaves_nodes_alone_that_are_in_hand_until_they_are_not(fleet, clock):
    add_nodes(fleet.store, fleet.settings, "a", "b")
    fleet.in_hand = {"a"}
    assert fleet.round() == [(JobAction.CHECK, ("b",))]
    clock.advance(3600)
    fleet.in_hand = {"a", "b"}
    assert fleet.round() == []

    fleet.in_hand = {"b"}
    clock.advance(10)

    assert fleet.round() == [(JobAction.CHECK, ("a",))]


def test_round_does_not_follow_up_on_nodes_that_are_in_hand(fleet, clock):
    add_nodes(fleet.store, fleet.settings, "a", "b")
    for node_id in ("a", "b"):
        fleet.see(node_id, *BOTH)
    clock.advance(11)
    for node_id in ("a", "b"):
        fleet.fail(node_id)
    fleet.in_hand = {"a"}
    clock.advance(2)

    assert fleet.round() == [(JobAction.CHECK, ("b",))]


def test_round_splits_many_nodes(fleet, settings):
    add_nodes(fleet.store, settings, *(f"n{number}" for number in range(NODES_PER_JOB + 1)))

    assert [len(nodes) for _, nodes in fleet.round()] == [NODES_PER_JOB, 1]


def test_round_is_for_one_manager_until_it_is_gone(fleet, store, settings, clock):
    other = Scheduler(store, settings, fleet.queue, clock, "two")
    assert fleet.scheduler.round()
    assert not other.round()
    clock.advance(LEASE_SECONDS - 1)
    assert not other.round()

    clock.advance(5)

    assert other.round()
    assert not fleet.scheduler.round()


def test_stop_lets_another_manager_lead_at_once(fleet, store, settings, clock):
    other = Scheduler(store, settings, fleet.queue, clock, "two")
    assert fleet.scheduler.round()

    fleet.scheduler.stop()

    assert other.round()


def test_round_prunes_what_is_too_old_once_an_hour(fleet, clock):
    add_nodes(fleet.store, fleet.settings, "a")
    fleet.see("a", *BOTH)
    fleet.round()
    clock.advance(8 * 24 * 3600)

    fleet.round()

    with fleet.store.read() as connection:
        assert connection.execute(tables.sample_history.select()).all() == []


def test_start_does_a_first_round_soon_and_survives_a_store_that_does_not_answer(fleet, monkeypatch):
    add_nodes(fleet.store, fleet.settings, "a")
    write, failures = fleet.store.write, []

    def first_fails():
        if not failures:
            failures.append(1)
            raise StoreUnavailableError("not yet")
        return write()

    monkeypatch.setattr(fleet.store, "write", first_fails)

    fleet.scheduler.start()
    wait_until(lambda: fleet.queue.page(1).jobs)
    fleet.scheduler.stop()

    assert failures == [1]
    assert fleet.queue.page(1).jobs[0].node_ids == ("a",)
