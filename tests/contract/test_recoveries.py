# SPDX-License-Identifier: GPL-3.0-or-later
"""Climbs of the recovery ladder, on either engine: one at a time on a node, each act begun once, nothing written by half.

Run as a program (`python test_recoveries.py URL`) it climbs with one node after the other until it is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from builders import START, FakeClock, make_declaration, make_report, make_settings, observe, seconds
from node_manager import changes
from node_manager.domain import Admin, RecoveryState, StepState
from node_manager.events import EventType
from node_manager.node_admin import forget_repairs
from node_manager.node_registry import NodeRegistry, utc_now
from node_manager.observations import ObservationLog
from node_manager.problems import (
    ConflictError,
    InvalidInputError,
    NodeNotFoundError,
    RecoveryInProgressError,
    RecoveryNotFoundError,
)
from node_manager.recoveries import (
    MANAGER,
    MAX_STEPS,
    PLAYBOOK,
    PLAYBOOK_SECONDS,
    NewRecovery,
    Recoveries,
)
from node_manager.recovery_rows import Recovery, read_patient, read_repairs, sick_nodes
from node_manager.settings import Settings
from node_manager.store import Store, open_store, tables
from stored import Rows

STEPS = ("restart_service", "reboot", "give_up")
RACERS = 4


@pytest.fixture
def settings() -> Settings:
    """Give settings with a way to power nodes and two ladders."""
    ladders = {"ChecksPassing": list(STEPS), "Reachable": ["power_cycle", "give_up"]}
    return make_settings({"recovery": {"power": {"command": ["/bin/true"]}, "ladders": ladders}})


@pytest.fixture
def recoveries(store: Store, settings: Settings, clock: FakeClock) -> Recoveries:
    """Give the climbs."""
    return Recoveries(store, settings, clock)


@pytest.fixture(autouse=True)
def _nodes(registry: NodeRegistry, log: ObservationLog, clock: FakeClock) -> None:
    """Register gw-7, whose checks fail, and gw-8, of which nothing is known."""
    for node_id in ("gw-7", "gw-8"):
        registry.register(make_declaration(node_id, location={"zone": "plant"}))
    clock.advance(60)
    fail_checks(log, clock)


def fail_checks(log: ObservationLog, clock: FakeClock, node_id: str = "gw-7", severity: str = "critical") -> None:
    """Let a check of a node fail."""
    log.record([observe("report", make_report((severity, "failed")), clock.now, node_id)])


def pass_checks(log: ObservationLog, clock: FakeClock, node_id: str = "gw-7") -> None:
    """Let all checks of a node pass."""
    clock.advance(1)
    log.record([observe("report", make_report(), clock.now, node_id)])


def conclude(log: ObservationLog, clock: FakeClock, liveness: str, node_id: str = "gw-7") -> None:
    """Let the manager conclude something from a node's silence."""
    clock.advance(1)
    verdict = {"liveness": liveness, "reason": "TimedOut", "message": "", "evidence": "peers_blind"}
    log.record([observe("verdict", verdict, clock.now, node_id, source="stream")], from_manager=True)


@contextmanager
def begun_in(store: Store, settings: Settings, node_id: str) -> Iterator[tuple[sa.Connection, Any]]:
    """Hold a node in a transaction."""
    with store.write() as connection:
        yield connection, read_patient(connection, settings, node_id)


def begin(recoveries: Recoveries, store: Store, settings: Settings, node_id: str = "gw-7", **more: Any) -> Recovery:
    """Begin a climb as the manager does by itself."""
    wanted: dict[str, Any] = {
        "steps": STEPS,
        "requested_by": "recovery",
        "conditions": ("ChecksPassing",),
        "critical": True,
        "attempt": 1,
        **more,
    }
    with begun_in(store, settings, node_id) as (connection, patient):
        return recoveries.begin(connection, patient, NewRecovery(**wanted))


@pytest.fixture
def climb(recoveries: Recoveries, store: Store, settings: Settings) -> Recovery:
    """Give a climb that the manager began with gw-7."""
    return begin(recoveries, store, settings)


def ask(recoveries: Recoveries, node_id: str = "gw-7", steps: Sequence[str] | None = None, **more: Any) -> Recovery:
    """Ask for a climb as a person does."""
    wanted: dict[str, Any] = {"dry_run": False, "driver": MANAGER, **more}
    return recoveries.begin_by_hand(node_id, steps, "ops", "it hangs", **wanted)


def race(*calls: Callable[[], Any]) -> list[Any]:
    """Make calls at the same moment; give what each gave or raised."""
    barrier = threading.Barrier(len(calls))
    ends: list[Any] = [None] * len(calls)

    def run(place: int) -> None:
        barrier.wait(10)
        try:
            ends[place] = calls[place]()
        except Exception as error:
            ends[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return ends


def repairs_of(store: Store, node_id: str = "gw-7") -> tuple[int, Any, Any] | None:
    """Read what is remembered of a node's repairs."""
    with store.read() as connection:
        found = read_repairs(connection, [node_id]).get(node_id)
    return None if found is None else (found.attempts, found.last_ended_at, found.gave_up_at)


# beginning


def test_begin_by_hand_takes_what_is_wrong(recoveries: Recoveries, clock: FakeClock, rows: Rows) -> None:
    begun = ask(recoveries)

    assert (begun.node_id, begun.zone, begun.state, begun.dry_run) == ("gw-7", "plant", RecoveryState.RUNNING, False)
    assert (begun.conditions, begun.critical, begun.attempt) == (("ChecksPassing",), True, 0)
    assert (begun.driver, begun.requested_by, begun.reason) == (MANAGER, "ops", "it hangs")
    assert (begun.started_at, begun.deadline_at, begun.ended_at) == (clock.now, None, None)
    assert [(step.position, step.step, step.state) for step in begun.steps] == [
        (0, "restart_service", StepState.WAITING),
        (1, "reboot", StepState.WAITING),
    ]
    assert recoveries.get(begun.recovery_id) == begun
    (event,) = rows.events(EventType.RECOVERY_STARTED)
    assert (event["node_id"], event["topic"]) == ("gw-7", "recovery")
    assert event["data"] == {
        "recovery_id": begun.recovery_id,
        "conditions": ["ChecksPassing"],
        "attempt": 0,
        "requested_by": "ops",
        "reason": "it hangs",
        "steps": ["restart_service", "reboot"],
    }


def test_begin_by_hand_takes_the_steps_that_somebody_names(recoveries: Recoveries) -> None:
    begun = ask(recoveries, "gw-8", ["reboot", "restart_service", "reboot"])

    assert [step.step for step in begun.steps] == ["reboot", "restart_service", "reboot"]
    assert (begun.conditions, begun.critical) == ((), False)


@pytest.mark.parametrize(
    "steps", [[], ["reboot"] * (MAX_STEPS + 1), ["reboto"], ["reboot", "../x"]], ids=["none", "many", "unknown", "path"]
)
def test_begin_by_hand_refuses_steps_that_there_are_not(recoveries: Recoveries, rows: Rows, steps: list[str]) -> None:
    before = rows.everything()

    with pytest.raises(InvalidInputError, match="steps"):
        ask(recoveries, steps=steps)

    assert rows.everything() == before


def test_begin_by_hand_refuses_nodes_that_there_are_not(recoveries: Recoveries) -> None:
    with pytest.raises(NodeNotFoundError):
        ask(recoveries, "gw-9")


def test_begin_by_hand_says_why_nothing_can_be_tried(
    recoveries: Recoveries, log: ObservationLog, clock: FakeClock, store: Store
) -> None:
    conclude(log, clock, "unreachable")
    bare = Recoveries(store, make_settings(), clock)

    with pytest.raises(ConflictError, match=r"node 'gw-7': power_cycle: recovery.power is not configured"):
        ask(bare)

    assert [step.step for step in ask(recoveries).steps] == ["power_cycle"]


def test_begin_refuses_a_second_one_and_says_who_and_since_when(recoveries: Recoveries, climb: Recovery) -> None:
    with pytest.raises(RecoveryInProgressError) as caught:
        ask(recoveries)

    assert caught.value.detail == (
        "node 'gw-7' is being repaired by recovery since 2026-11-22 18:01:00 UTC; wait for its end, or POST"
        f" /recoveries/{climb.recovery_id}/cancel"
    )
    assert caught.value.extra == {
        "node_id": "gw-7",
        "recovery_id": climb.recovery_id,
        "requested_by": "recovery",
        "started_at": "2026-11-22T18:01:00Z",
    }
    assert ask(recoveries, "gw-8").node_id == "gw-8"


@pytest.mark.parametrize("round_", range(3))
def test_begin_at_once_lets_one_begin(
    recoveries: Recoveries, store: Store, settings: Settings, rows: Rows, round_: int
) -> None:
    by_itself = [lambda: begin(recoveries, store, settings)] * 2

    ends = race(*by_itself, *[lambda: ask(recoveries)] * (RACERS - 2))

    (winner,) = [end for end in ends if isinstance(end, Recovery)]
    losers = [end for end in ends if end is not winner]
    assert [type(end) for end in losers] == [RecoveryInProgressError] * (RACERS - 1)
    assert {end.extra["recovery_id"] for end in losers} == {winner.recovery_id}
    assert {end.extra["requested_by"] for end in losers} == {winner.requested_by}
    assert recoveries.active() == [winner]
    assert len(rows.events(EventType.RECOVERY_STARTED)) == 1


def test_begin_again_after_the_end(recoveries: Recoveries, climb: Recovery) -> None:
    recoveries.end(climb.recovery_id)

    again = ask(recoveries)

    assert recoveries.active() == [again]
    ended = recoveries.get(climb.recovery_id)
    assert recoveries.latest_of("gw-7") == (again, ended)
    recoveries.end(again.recovery_id)
    assert recoveries.latest_of("gw-7") == (None, recoveries.get(again.recovery_id))


def test_dry_runs_neither_block_nor_wait(recoveries: Recoveries, climb: Recovery, rows: Rows) -> None:
    before = rows.events()

    first, second = ask(recoveries, dry_run=True), ask(recoveries, dry_run=True)

    assert recoveries.active() == [climb, first, second]
    assert recoveries.latest_of("gw-7") == (climb, None)
    recoveries.end(climb.recovery_id)
    assert not ask(recoveries).dry_run
    assert rows.events()[: len(before)] == before


def test_dry_runs_tell_nobody_and_are_remembered_by_nobody(recoveries: Recoveries, rows: Rows, store: Store) -> None:
    before = rows.events()
    dry = ask(recoveries, dry_run=True)

    recoveries.end_step(dry.recovery_id, 0, StepState.PLANNED, "would restart nginx")
    recoveries.end_step(dry.recovery_id, 1, StepState.SKIPPED, "not needed")
    ended = recoveries.end(dry.recovery_id)

    assert ended.state is RecoveryState.PLANNED
    assert ended.message == "restart_service planned (would restart nginx); reboot skipped (not needed)"
    assert rows.events() == before
    assert repairs_of(store) is None
    assert recoveries.latest_of("gw-7") == (None, None)


# claiming


def test_claim_is_given_once(recoveries: Recoveries, climb: Recovery, clock: FakeClock) -> None:
    first = recoveries.claim_act(climb.recovery_id, 0)
    clock.advance(5)
    second = recoveries.claim_act(climb.recovery_id, 0)

    assert first == (True, "")
    assert second == (False, "it was begun at 18:01:00 UTC already and is not repeated")
    assert recoveries.get(climb.recovery_id).steps[0].acted_at == START + seconds(60)
    assert recoveries.claim_act(climb.recovery_id, 1) == (True, "")


def test_claim_at_once_is_given_to_one(recoveries: Recoveries) -> None:
    begun = ask(recoveries, steps=["restart_service"] * 10)

    ends = [race(*[lambda at=at: recoveries.claim_act(begun.recovery_id, at)[0]] * RACERS) for at in range(10)]

    assert [sorted(end) for end in ends] == [[False] * (RACERS - 1) + [True]] * 10


def test_claim_is_not_given_again_by_another_manager(
    recoveries: Recoveries, climb: Recovery, store_url: str, settings: Settings, clock: FakeClock
) -> None:
    recoveries.claim_act(climb.recovery_id, 0)

    with closing(open_store(store_url)) as reopened:
        again = Recoveries(reopened, settings, clock)
        assert [again.claim_act(climb.recovery_id, position)[0] for position in (0, 1)] == [False, True]


@pytest.mark.parametrize(
    ("before", "told"),
    [
        (lambda parts, it: parts.cancel(it.recovery_id), "the recovery was cancelled"),
        (lambda parts, it: parts.end(it.recovery_id), "the recovery has ended meanwhile"),
        (
            lambda parts, it: parts.end_step(it.recovery_id, 0, StepState.FAILED, None),
            "the recovery has ended meanwhile",
        ),
    ],
    ids=["cancelled", "ended", "step-ended"],
)
def test_claim_is_refused_after_the_end(
    recoveries: Recoveries, climb: Recovery, before: Callable[[Recoveries, Recovery], Any], told: str
) -> None:
    before(recoveries, climb)

    assert recoveries.claim_act(climb.recovery_id, 0) == (False, told)
    assert recoveries.get(climb.recovery_id).steps[0].acted_at is None


def test_claim_is_refused_in_a_dry_run(recoveries: Recoveries) -> None:
    dry = ask(recoveries, dry_run=True)

    assert recoveries.claim_act(dry.recovery_id, 0) == (False, "it is a dry run")


@pytest.mark.parametrize("admin", [Admin.MAINTENANCE, Admin.DRAINING, Admin.OFFLINE], ids=str)
def test_claim_is_refused_where_somebody_took_the_node(
    recoveries: Recoveries, climb: Recovery, registry: NodeRegistry, admin: Admin
) -> None:
    registry.set_admin("gw-7", admin, "new fan")

    told = [recoveries.claim_act(climb.recovery_id, position) for position in range(3)]

    assert told == [(False, f"the node is {admin} now")] * 3


def test_claim_is_given_to_who_asked_for_it_in_maintenance(recoveries: Recoveries, registry: NodeRegistry) -> None:
    registry.set_admin("gw-7", Admin.MAINTENANCE, "new fan")
    begun = ask(recoveries, steps=["reboot"])

    assert recoveries.claim_act(begun.recovery_id, 0) == (True, "")


def test_claim_is_refused_for_a_node_that_is_gone(
    recoveries: Recoveries, climb: Recovery, registry: NodeRegistry
) -> None:
    registry.deregister("gw-7")

    assert recoveries.claim_act(climb.recovery_id, 0) == (False, "the node was deregistered meanwhile")


def test_claim_is_refused_where_the_node_fell_silent(
    recoveries: Recoveries, climb: Recovery, log: ObservationLog, clock: FakeClock
) -> None:
    conclude(log, clock, "unreachable")

    assert recoveries.claim_act(climb.recovery_id, 1) == (False, "the node doesn't answer")
    # To give up takes no node.
    assert recoveries.claim_act(climb.recovery_id, 2) == (True, "")


def test_claim_is_refused_where_what_was_wrong_is_gone(
    recoveries: Recoveries, climb: Recovery, log: ObservationLog, clock: FakeClock
) -> None:
    pass_checks(log, clock)

    told = [recoveries.claim_act(climb.recovery_id, position) for position in range(3)]

    assert told == [(False, "what was wrong is gone")] * 3


@pytest.mark.parametrize("step", ["power_cycle", "give_up"])
def test_claim_of_power_needs_a_node_that_is_still_down(
    recoveries: Recoveries, store: Store, settings: Settings, log: ObservationLog, clock: FakeClock, step: str
) -> None:
    conclude(log, clock, "unreachable")
    begun = begin(recoveries, store, settings, steps=[step, step], conditions=("Reachable",))
    assert recoveries.claim_act(begun.recovery_id, 0) == (True, "")

    clock.advance(5)
    log.record([observe("contact", {"reached": True, "reason": "Ok", "message": ""}, clock.now)])

    assert recoveries.claim_act(begun.recovery_id, 1) == (False, "what was wrong is gone")


def test_claim_of_power_needs_a_verdict(
    recoveries: Recoveries, store: Store, settings: Settings, log: ObservationLog, clock: FakeClock
) -> None:
    begun = begin(recoveries, store, settings, steps=["power_cycle"], conditions=("Reachable", "ChecksPassing"))
    conclude(log, clock, "suspect")

    assert recoveries.claim_act(begun.recovery_id, 0) == (False, "that it is down is not confirmed yet")


@pytest.mark.parametrize("position", [-1, 3])
def test_steps_that_there_are_not_are_refused(recoveries: Recoveries, climb: Recovery, position: int) -> None:
    for call in (
        lambda: recoveries.claim_act(climb.recovery_id, position),
        lambda: recoveries.end_step(climb.recovery_id, position, StepState.FAILED, None),
        lambda: recoveries.start_step(climb.recovery_id, position, "job"),
    ):
        with pytest.raises(InvalidInputError, match="position: expected 0 to 2"):
            call()


def test_recoveries_that_there_are_not_are_refused(recoveries: Recoveries) -> None:
    for call in (
        lambda: recoveries.get("none"),
        lambda: recoveries.claim_act("none", 0),
        lambda: recoveries.end_step("none", 0, StepState.FAILED, None),
        lambda: recoveries.start_step("none", 0, "job"),
        lambda: recoveries.give_up("none", ""),
        lambda: recoveries.end("none"),
        lambda: recoveries.cancel("none"),
    ):
        with pytest.raises(RecoveryNotFoundError, match="no recovery 'none'"):
            call()


# steps


def test_start_step_notes_each_job(recoveries: Recoveries, climb: Recovery, clock: FakeClock) -> None:
    recoveries.start_step(climb.recovery_id, 0, "job-1")
    clock.advance(60)

    step = recoveries.start_step(climb.recovery_id, 0, "job-2").steps[0]

    assert (step.state, step.job_ids, step.started_at) == (StepState.RUNNING, ("job-1", "job-2"), START + seconds(60))
    assert recoveries.get(climb.recovery_id).next_step == step


def test_start_step_wakes_no_step_whose_job_was_quicker(recoveries: Recoveries, climb: Recovery) -> None:
    recoveries.end_step(climb.recovery_id, 0, StepState.SUCCEEDED, "it was quick")
    recoveries.end_step(climb.recovery_id, 1, StepState.SKIPPED, "not needed")
    recoveries.end(climb.recovery_id)

    steps = [recoveries.start_step(climb.recovery_id, position, "job").steps[position] for position in (0, 2)]

    assert [(step.state, step.job_ids) for step in steps] == [
        (StepState.SUCCEEDED, ("job",)),
        (StepState.WAITING, ("job",)),
    ]


def test_end_step_believes_the_first(recoveries: Recoveries, climb: Recovery, clock: FakeClock, rows: Rows) -> None:
    recoveries.start_step(climb.recovery_id, 0, "job-1")
    clock.advance(7)
    recoveries.end_step(climb.recovery_id, 0, StepState.FAILED, "nginx is still down")
    clock.advance(7)

    after = recoveries.end_step(climb.recovery_id, 0, StepState.SUCCEEDED, "no, it is up")

    step = after.steps[0]
    assert (step.state, step.message, step.ended_at) == (StepState.FAILED, "nginx is still down", START + seconds(67))
    assert after.next_step == after.steps[1]
    (event,) = rows.events(EventType.RECOVERY_STEP_ENDED)
    assert event["data"] == {
        "recovery_id": climb.recovery_id,
        "step": "restart_service",
        "position": 0,
        "state": "failed",
        "message": "nginx is still down",
        "job_ids": ["job-1"],
    }


def test_end_step_after_the_act_is_no_skip(recoveries: Recoveries, climb: Recovery) -> None:
    # A manager died after the act, and the next one's precheck found nothing left to do.
    recoveries.claim_act(climb.recovery_id, 0)

    steps = [recoveries.end_step(climb.recovery_id, at, StepState.SKIPPED, "fine").steps[at] for at in (0, 1)]

    assert [step.state for step in steps] == [StepState.SUCCEEDED, StepState.SKIPPED]
    assert recoveries.end(climb.recovery_id).state is RecoveryState.SUCCEEDED


def test_end_step_at_once_is_told_once(recoveries: Recoveries, climb: Recovery, rows: Rows) -> None:
    states = [StepState.SUCCEEDED, StepState.FAILED] * 2

    ends = race(*[lambda s=s: recoveries.end_step(climb.recovery_id, 0, s, s.value) for s in states])

    (event,) = rows.events(EventType.RECOVERY_STEP_ENDED)
    assert {end.steps[0].state.value for end in ends} == {event["data"]["state"]}


@pytest.mark.parametrize("state", [StepState.WAITING, StepState.RUNNING], ids=str)
def test_end_step_refuses_what_is_no_end(recoveries: Recoveries, climb: Recovery, state: StepState) -> None:
    with pytest.raises(InvalidInputError, match="state: expected one of failed, planned, skipped, succeeded"):
        recoveries.end_step(climb.recovery_id, 0, state, None)


def test_end_step_after_the_end_changes_nothing(recoveries: Recoveries, climb: Recovery, rows: Rows) -> None:
    recoveries.end(climb.recovery_id)
    before = rows.everything()

    recoveries.end_step(climb.recovery_id, 0, StepState.SUCCEEDED, "late")

    assert rows.everything() == before


def test_messages_have_a_bound(recoveries: Recoveries, climb: Recovery) -> None:
    recoveries.end_step(climb.recovery_id, 0, StepState.FAILED, "x" * 100_000)
    ended = recoveries.end(climb.recovery_id)

    assert ended.steps[0].message == "x" * 2000
    assert len(ended.message or "") == 2000


# the end

W, K, S, F, P = StepState.WAITING, StepState.SKIPPED, StepState.SUCCEEDED, StepState.FAILED, StepState.PLANNED


@pytest.mark.parametrize(
    ("states", "ended_as", "message"),
    [
        ((W, W, W), RecoveryState.FAILED, "no step was tried"),
        ((K, K, W), RecoveryState.FAILED, "restart_service skipped (why); reboot skipped (why)"),
        ((S, W, W), RecoveryState.SUCCEEDED, "restart_service succeeded (why)"),
        ((F, S, W), RecoveryState.SUCCEEDED, "restart_service failed (why); reboot succeeded (why)"),
        ((S, K, W), RecoveryState.SUCCEEDED, "restart_service succeeded (why); reboot skipped (why)"),
        ((S, F, W), RecoveryState.FAILED, "restart_service succeeded (why); reboot failed (why)"),
        ((F, F, W), RecoveryState.FAILED, "restart_service failed (why); reboot failed (why)"),
        ((F, F, S), RecoveryState.GAVE_UP, "gave up; restart_service: why; reboot: why"),
        ((K, K, S), RecoveryState.GAVE_UP, "gave up"),
        ((S, F, F), RecoveryState.FAILED, "restart_service succeeded (why); reboot failed (why); give_up failed (why)"),
        ((F, S, K), RecoveryState.SUCCEEDED, None),
    ],
)
def test_end_follows_from_the_steps(
    recoveries: Recoveries,
    climb: Recovery,
    states: tuple[StepState, ...],
    ended_as: RecoveryState,
    message: str | None,
) -> None:
    for position, state in enumerate(states):
        if state is not W:
            recoveries.end_step(climb.recovery_id, position, state, "why")

    ended = recoveries.end(climb.recovery_id)

    assert ended.state is ended_as
    assert message in {None, ended.message}


def test_end_tells_and_remembers(
    recoveries: Recoveries, climb: Recovery, clock: FakeClock, rows: Rows, store: Store
) -> None:
    clock.advance(12.5)

    ended = recoveries.end(climb.recovery_id, "all is lost", state=RecoveryState.CANCELLED)

    assert (ended.state, ended.message, ended.ended_at) == (RecoveryState.CANCELLED, "all is lost", clock.now)
    (event,) = rows.events(EventType.RECOVERY_ENDED)
    assert event["data"] == {
        "recovery_id": climb.recovery_id,
        "state": "cancelled",
        "message": "all is lost",
        "conditions": ["ChecksPassing"],
        "attempt": 1,
        "requested_by": "recovery",
        "duration_seconds": 12.5,
    }
    assert repairs_of(store) == (1, clock.now, None)


def test_end_counts_the_tries(recoveries: Recoveries, store: Store, settings: Settings, clock: FakeClock) -> None:
    for attempt in (1, 2):
        recoveries.end(begin(recoveries, store, settings, attempt=attempt).recovery_id)
        clock.advance(120)

    assert repairs_of(store) == (2, START + seconds(180), None)


def test_end_of_what_somebody_asked_for_is_no_try(recoveries: Recoveries, store: Store) -> None:
    recoveries.end(ask(recoveries).recovery_id)

    assert repairs_of(store) is None


def test_end_is_idempotent(recoveries: Recoveries, climb: Recovery, clock: FakeClock, rows: Rows) -> None:
    seen: list[Recovery] = []

    def note(connection: sa.Connection, recovery: Recovery) -> None:
        seen.append(recovery)

    first = recoveries.end(climb.recovery_id, "one", also=note)
    before = rows.everything()
    clock.advance(60)
    second = recoveries.end(climb.recovery_id, "two", state=RecoveryState.SUCCEEDED, also=note)

    assert (first, second) == (seen[0], first)
    assert len(seen) == 1
    assert rows.everything() == before


def test_end_at_once_is_told_once(recoveries: Recoveries, climb: Recovery, rows: Rows) -> None:
    also: list[str] = []

    ends = race(
        *[
            lambda word=word: recoveries.end(climb.recovery_id, word, also=lambda _, it: also.append(str(it.message)))
            for word in "abcd"
        ]
    )

    (event,) = rows.events(EventType.RECOVERY_ENDED)
    assert {end.message for end in ends} == {event["data"]["message"]} == set(also)
    assert len(also) == 1


def test_end_does_nothing_where_what_belongs_to_it_fails(recoveries: Recoveries, climb: Recovery, rows: Rows) -> None:
    before = rows.everything()

    def fail(connection: sa.Connection, recovery: Recovery) -> None:
        raise RuntimeError(recovery.state.value)

    with pytest.raises(RuntimeError, match="failed"):
        recoveries.end(climb.recovery_id, also=fail)

    assert rows.everything() == before


def test_end_and_give_up_take_a_node_that_is_gone(
    recoveries: Recoveries, climb: Recovery, registry: NodeRegistry, rows: Rows
) -> None:
    registry.deregister("gw-7")

    recoveries.end_step(climb.recovery_id, 0, StepState.FAILED, "it went away")
    recoveries.give_up(climb.recovery_id, "nothing helped")
    ended = recoveries.end(climb.recovery_id)

    assert ended.state is RecoveryState.FAILED
    assert rows.of(tables.repair_records) == []
    assert rows.events(EventType.NODE_ADMIN_CHANGED) == []


def test_cancel_asks_for_the_end(recoveries: Recoveries, climb: Recovery, clock: FakeClock) -> None:
    cancelled = recoveries.cancel(climb.recovery_id)

    assert (cancelled.cancel_requested_at, cancelled.ended_at) == (clock.now, None)
    recoveries.end(climb.recovery_id, state=RecoveryState.CANCELLED)
    with pytest.raises(ConflictError, match="has already ended: cancelled"):
        recoveries.cancel(climb.recovery_id)


# giving up


def test_give_up_cordons_tells_and_leaves_the_node_alone(
    recoveries: Recoveries, climb: Recovery, registry: NodeRegistry, clock: FakeClock, rows: Rows, store: Store
) -> None:
    with store.read() as connection:
        mark = changes.read(connection, 0)[1]
    generation = registry.get("gw-7").generation

    recoveries.give_up(climb.recovery_id, "reboot: timed out")

    node = registry.get("gw-7")
    assert (node.admin, node.generation) == (Admin.CORDONED, generation + 1)
    (event,) = rows.events(EventType.NODE_ADMIN_CHANGED)
    assert (event["node_id"], event["data"]) == (
        "gw-7",
        {"from": "active", "to": "cordoned", "reason": "recovery gave up: reboot: timed out"},
    )
    with store.read() as connection:
        assert [change.node_id for change in changes.read(connection, mark)[0]] == ["gw-7"]
    assert repairs_of(store) == (0, None, clock.now)
    recoveries.end(climb.recovery_id)
    assert repairs_of(store) == (1, clock.now, clock.now)


def test_give_up_takes_no_node_from_work_for_warnings(
    recoveries: Recoveries, store: Store, settings: Settings, registry: NodeRegistry, clock: FakeClock, rows: Rows
) -> None:
    begun = begin(recoveries, store, settings, critical=False)

    recoveries.give_up(begun.recovery_id, "the clock drifts")

    assert registry.get("gw-7").admin is Admin.ACTIVE
    assert rows.events(EventType.NODE_ADMIN_CHANGED) == []
    assert repairs_of(store) == (0, None, clock.now)


@pytest.mark.parametrize("admin", [Admin.CORDONED, Admin.MAINTENANCE], ids=str)
def test_give_up_leaves_what_an_operator_said(
    recoveries: Recoveries, climb: Recovery, registry: NodeRegistry, rows: Rows, admin: Admin
) -> None:
    registry.set_admin("gw-7", admin, "new fan")
    before = rows.events()

    recoveries.give_up(climb.recovery_id, "nothing helped")

    assert registry.get("gw-7").admin is admin
    assert rows.events() == before


@pytest.mark.parametrize("why", ["dry-run", "ended", "cancelled"])
def test_give_up_does_nothing_for_what_does_not_go_on(
    recoveries: Recoveries, store: Store, settings: Settings, rows: Rows, why: str
) -> None:
    begun = begin(recoveries, store, settings, dry_run=why == "dry-run")
    if why == "ended":
        recoveries.end(begun.recovery_id)
    if why == "cancelled":
        recoveries.cancel(begun.recovery_id)
    before = rows.everything()

    recoveries.give_up(begun.recovery_id, "nothing helped")

    assert rows.everything() == before


def test_forget_repairs_begins_anew(recoveries: Recoveries, climb: Recovery, store: Store) -> None:
    recoveries.give_up(climb.recovery_id, "")
    recoveries.end(climb.recovery_id)

    with store.write() as connection:
        forget_repairs(connection, "gw-7")

    assert repairs_of(store) is None


# a playbook that somebody started


def test_a_playbook_that_is_heard_of_gets_its_time_anew(recoveries: Recoveries, clock: FakeClock) -> None:
    begun = ask(recoveries, driver=PLAYBOOK)
    assert begun.deadline_at == clock.now + seconds(PLAYBOOK_SECONDS)

    clock.advance(3000)
    recoveries.claim_act(begun.recovery_id, 0)
    assert recoveries.get(begun.recovery_id).deadline_at == clock.now + seconds(PLAYBOOK_SECONDS)

    clock.advance(3000)
    ended = recoveries.end_step(begun.recovery_id, 0, StepState.FAILED, None)
    assert ended.deadline_at == clock.now + seconds(PLAYBOOK_SECONDS)


def test_the_manager_has_no_deadline(recoveries: Recoveries, climb: Recovery) -> None:
    recoveries.claim_act(climb.recovery_id, 0)

    assert recoveries.end_step(climb.recovery_id, 0, StepState.FAILED, None).deadline_at is None


# lists


def test_page_lists_the_newest_first(recoveries: Recoveries) -> None:
    begun = [ask(recoveries, "gw-7" if number % 2 else "gw-8", dry_run=True) for number in range(7)]
    recoveries.end(begun[3].recovery_id)

    pages, before = [], None
    while True:
        page = recoveries.page(3, before)
        pages.append([item.recovery_id for item in page.recoveries])
        before = page.next_cursor
        if before is None:
            break

    ids = [item.recovery_id for item in reversed(begun)]
    assert pages == [ids[:3], ids[3:6], ids[6:]]
    assert recoveries.page(7, None).next_cursor is None
    only = recoveries.page(10, None, node_id="gw-7").recoveries
    assert [item.recovery_id for item in only] == [begun[number].recovery_id for number in (5, 3, 1)]
    assert [item.recovery_id for item in recoveries.page(10, None, state=RecoveryState.PLANNED).recoveries] == [ids[3]]
    assert len(only[0].steps) == 2


def test_page_of_nothing_is_empty(recoveries: Recoveries) -> None:
    page = recoveries.page(5, None)

    assert (page.recoveries, page.next_cursor) == ([], None)


def test_prune_forgets_what_ended_long_ago(
    recoveries: Recoveries, climb: Recovery, settings: Settings, clock: FakeClock, rows: Rows
) -> None:
    days = settings.configuration.storage.history_days
    old, kept, dry = ask(recoveries, "gw-8"), None, ask(recoveries, dry_run=True)
    recoveries.end(old.recovery_id)
    recoveries.end(dry.recovery_id)
    clock.advance(1)
    kept = ask(recoveries, "gw-8")
    recoveries.end(kept.recovery_id)
    clock.advance(days * 86400)

    recoveries.prune()

    assert [row["recovery_id"] for row in rows.of(tables.recoveries)] == [climb.recovery_id, kept.recovery_id]
    assert {row["recovery_id"] for row in rows.of(tables.recovery_steps)} == {climb.recovery_id, kept.recovery_id}


def test_the_record_of_a_climb_outlives_the_node_and_its_repairs_do_not(
    recoveries: Recoveries, climb: Recovery, registry: NodeRegistry, rows: Rows
) -> None:
    recoveries.end(climb.recovery_id)
    registry.deregister("gw-7")

    assert recoveries.get(climb.recovery_id).state is RecoveryState.FAILED
    assert rows.of(tables.repair_records) == []


def test_sick_nodes_are_those_that_may_be_repaired(
    recoveries: Recoveries,
    store: Store,
    settings: Settings,
    registry: NodeRegistry,
    log: ObservationLog,
    clock: FakeClock,
) -> None:
    for number in range(5):
        registry.register(make_declaration(f"n{number}"))
    clock.advance(1)
    for number in range(5):
        fail_checks(log, clock, f"n{number}")
    registry.set_admin("n1", Admin.MAINTENANCE, "new fan")
    registry.set_admin("n2", Admin.CORDONED, "new fan")
    given_up = begin(recoveries, store, settings, "n3")
    recoveries.give_up(given_up.recovery_id, "")
    conclude(log, clock, "unreachable", "n4")

    def sick(after: str, limit: int) -> list[str]:
        with store.read() as connection:
            return [patient.node_id for patient in sick_nodes(connection, settings, clock.now, after, limit)]

    assert sick("", 10) == ["gw-7", "n0", "n2", "n4"]
    assert (sick("", 2), sick("n0", 2), sick("n2", 2)) == (["gw-7", "n0"], ["n2", "n4"], ["n4"])


# nothing by half


@contextmanager
def broken_at(statement: int) -> Iterator[list[str]]:
    """Let that statement of all that are made fail; give those that were made before."""
    made: list[str] = []

    def count(connection: Any, cursor: Any, text: str, *_: Any) -> None:
        if len(made) == statement:
            raise RuntimeError("the power went")
        made.append(text)

    sa.event.listen(sa.Engine, "before_cursor_execute", count)
    try:
        yield made
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", count)


@pytest.mark.parametrize("call", ["begin", "start_step", "claim_act", "end_step", "give_up", "end", "cancel"])
def test_each_change_is_there_as_a_whole_or_not_at_all(
    recoveries: Recoveries, store: Store, settings: Settings, rows: Rows, call: str
) -> None:
    held = begin(recoveries, store, settings).recovery_id
    calls: dict[str, Callable[[], Any]] = {
        "begin": lambda: ask(recoveries, "gw-8"),
        "start_step": lambda: recoveries.start_step(held, 0, "job"),
        "claim_act": lambda: recoveries.claim_act(held, 0),
        "end_step": lambda: recoveries.end_step(held, 0, StepState.FAILED, "why"),
        "give_up": lambda: recoveries.give_up(held, "why"),
        "end": lambda: recoveries.end(held),
        "cancel": lambda: recoveries.cancel(held),
    }
    before = rows.everything()

    for statement in range(100):
        with broken_at(statement) as made:
            try:
                calls[call]()
            except RuntimeError:
                pass
            else:
                break
        assert rows.everything() == before, f"after {made}"

    assert statement > 1
    assert rows.everything() != before


@pytest.mark.parametrize("acknowledgements", [1, 50, 137])
def test_kill_loses_nothing_acknowledged_and_leaves_nothing_half(store_url: str, acknowledgements: int) -> None:
    told = climb_until_killed(store_url, acknowledgements)

    with closing(open_store(store_url)) as store:
        rows = Rows(store)
        climbs = {row["recovery_id"]: row for row in rows.of(tables.recoveries)}
        steps = {(row["recovery_id"], row["position"]): row for row in rows.of(tables.recovery_steps)}
        nodes = {row["node_id"]: row for row in rows.of(tables.nodes)}
        records = {row["node_id"]: row for row in rows.of(tables.repair_records)}
        seen = Counter(
            (row["type"], row["data"].get("recovery_id", row["node_id"]), row["data"].get("position"))
            for row in rows.events()
        )
    for what, recovery_id in told:
        assert recovery_id in climbs
        assert what != "claimed" or steps[recovery_id, 0]["acted_at"] is not None
        assert what != "step-ended" or steps[recovery_id, 0]["ended_at"] is not None
        assert what != "ended" or climbs[recovery_id]["ended_at"] is not None
    assert set(steps) == {(recovery_id, position) for recovery_id in climbs for position in range(2)}
    for recovery_id, climb in climbs.items():
        node_id, ended = climb["node_id"], int(climb["ended_at"] is not None)
        gave_up = nodes[node_id]["admin"] == "cordoned"
        assert seen[EventType.RECOVERY_STARTED, recovery_id, None] == 1
        assert seen[EventType.RECOVERY_ENDED, recovery_id, None] == ended
        assert seen[EventType.RECOVERY_STEP_ENDED, recovery_id, 0] == (steps[recovery_id, 0]["ended_at"] is not None)
        assert seen[EventType.NODE_ADMIN_CHANGED, node_id, None] == gave_up
        assert (node_id in records and records[node_id]["gave_up_at"] is not None) == gave_up
        assert records.get(node_id, {"attempts": 0})["attempts"] == ended


def climb_until_killed(url: str, acknowledgements: int) -> list[tuple[str, str]]:
    """Climb in another process, kill it in the middle of the write after that many, and give what it acknowledged."""
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1])}
    with subprocess.Popen(
        [sys.executable, str(here), url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as climber:
        assert climber.stdout is not None
        assert climber.stderr is not None
        lines = [climber.stdout.readline() for _ in range(acknowledgements)]
        climber.send_signal(signal.SIGKILL)
        lines += climber.stdout.readlines()
        assert (climber.wait(10), climber.stderr.read()) == (-signal.SIGKILL, "")
    return [(what, recovery_id) for what, recovery_id in (line.split() for line in lines if line[-1] == "\n")]


def main(url: str) -> None:
    """Climb with one node after the other, and say after each commit what was committed."""
    store, settings = open_store(url), make_settings()
    registry, recoveries, clock = NodeRegistry(store, settings), Recoveries(store, settings), FakeClock(utc_now())
    log = ObservationLog(store, settings)
    for number in range(200):
        registry.register(make_declaration(f"node-{number}"))
        clock.now = utc_now()
        fail_checks(log, clock, f"node-{number}")
        held = begin(recoveries, store, settings, f"node-{number}", steps=["own_step", "give_up"]).recovery_id
        for what, call in (
            ("begun", lambda: None),
            ("claimed", lambda held=held: recoveries.claim_act(held, 0)),
            ("step-ended", lambda held=held: recoveries.end_step(held, 0, StepState.FAILED, "why")),
            ("given-up", lambda held=held: recoveries.give_up(held, "why")),
            ("ended", lambda held=held: recoveries.end(held)),
        ):
            call()
            sys.stdout.write(f"{what} {held}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
