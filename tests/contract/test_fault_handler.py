# SPDX-License-Identifier: GPL-3.0-or-later
"""Repairs from the first bad report to the end, on either engine, through whatever happens to the manager in between.

The queue of jobs is the real one; what Ansible would do on the node is played here, by the rules of the role: look, claim, act,
look again, report.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from builders import FakeClock, make_declaration, make_report, make_settings, observe
from job_parts import FakeRunner, wait_until
from node_manager import fault_handler
from node_manager.domain import Admin, JobAction, JobState, NodeResult, RecoveryState, StepState
from node_manager.events import EventType
from node_manager.fault_handler import MAX_JOBS_PER_STEP, REQUESTED_BY, FaultHandler
from node_manager.guard_keeper import GuardKeeper
from node_manager.job_store import Job, JobStore
from node_manager.jobs import JobQueue
from node_manager.node_admin import forget_repairs
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.playbook_process import RunEnd, RunRequest
from node_manager.problems import NodeNotFoundError, RecoveryInProgressError
from node_manager.recoveries import MANAGER, PLAYBOOK, PLAYBOOK_SECONDS, Recoveries
from node_manager.recovery_ladder import Repairs
from node_manager.recovery_rows import Recovery, read_repairs
from node_manager.settings import Settings
from node_manager.store import Store, tables
from stored import Rows

LADDERS = {
    "ChecksPassing": ["restart_service", "reboot", "give_up"],
    "Reachable": ["power_cycle", "give_up"],
}
# The guard has tests of its own.
CALM = {
    "start_interval_seconds": 0,
    "in_flight_percent": 100,
    "unhealthy_nodes": 100_000,
    "dark_nodes": 100_000,
    "failed_recoveries": 100,
    "last_recoveries": 100,
}


class Killed(BaseException):  # no error: what a test does to a manager
    """The manager and its playbook died."""


@dataclass
class Fleet:
    """What is so on the nodes, whether or not anybody looks: who is broken, what mends it, what was done there."""

    broken: set[str] = field(default_factory=set)
    mended_by: dict[str, str] = field(default_factory=dict)
    acts: list[tuple[str, str]] = field(default_factory=list)


class World:
    """One manager at a time on one store, with a fleet."""

    def __init__(self, store: Store, settings: Settings, clock: FakeClock, fleet: Fleet | None = None) -> None:
        self.store = store
        self.settings = settings
        self.clock = clock
        self.fleet = fleet or Fleet()
        self.registry = NodeRegistry(store, settings, clock)
        self.log = ObservationLog(store, settings, clock)
        self.jobs = JobStore(store)
        self.recoveries = Recoveries(store, settings, clock)
        self.queue = JobQueue(store, settings, clock, "one", runner=FakeRunner(settings))
        self.guard = GuardKeeper(store, settings, self.queue, clock)
        self.handler = FaultHandler(store, settings, self.recoveries, self.queue, self.guard, clock)

    def restarted(self) -> World:
        """Give the next life of the manager, which interrupts what ran in the one before."""
        after = World(self.store, self.settings, self.clock, self.fleet)
        after.queue.recover({"one"})
        return after

    # the nodes

    def add(self, node_id: str = "gw-7", **more: Any) -> None:
        """Register a node that is well."""
        self.registry.register(make_declaration(node_id, **more))
        self.clock.advance(1)
        self.report(node_id)

    def break_down(self, node_id: str = "gw-7", mended_by: str = "nothing", severity: str = "critical") -> None:
        """Let a node's check fail, until a step that helps."""
        self.fleet.broken.add(node_id)
        self.fleet.mended_by[node_id] = mended_by
        self.report(node_id, severity)

    def report(self, node_id: str = "gw-7", severity: str = "critical") -> None:
        """Look at a node's checks."""
        self.clock.advance(1)
        state = "failed" if node_id in self.fleet.broken else "passed"
        self.log.record([observe("report", make_report((severity, state)), self.clock.now, node_id)])

    def conclude(self, liveness: str, node_id: str = "gw-7", evidence: str = "peers_blind") -> None:
        """Let the manager conclude something from a node's silence."""
        self.clock.advance(1)
        verdict = {"liveness": liveness, "reason": "TimedOut", "message": "", "evidence": evidence}
        self.log.record([observe("verdict", verdict, self.clock.now, node_id, source="stream")], from_manager=True)

    # the manager

    def round(self, after: float = 3) -> None:
        """Let time go by and the manager look."""
        self.clock.advance(after)
        self.handler.round()

    def job(self, **wanted: Any) -> Job:
        """Give the one job of recovery that waits or runs."""
        (job,) = self.active_jobs(**wanted)
        return job

    def active_jobs(self, **wanted: Any) -> list[Job]:
        """Give the jobs of recovery that wait or run."""
        found = self.queue.page(100, action=JobAction.RECOVER, **wanted).jobs
        return [job for job in found if not job.ended]

    def all_jobs(self) -> list[Job]:
        """Give all jobs of recovery, in the order of arrival."""
        return self.queue.page(1000, action=JobAction.RECOVER).jobs[::-1]

    def take_job(self) -> Job:
        """Start the next job, as the queue would."""
        while True:
            job = self.jobs.claim_next("one", self.clock.now, lambda _: 600.0)
            assert job is not None
            if job.action is JobAction.RECOVER:
                return job
            # The checks that follow an interrupted job.
            self.end_job(job)

    def end_job(
        self,
        job: Job,
        state: JobState = JobState.SUCCEEDED,
        outcome: NodeResult = NodeResult.OK,
        why: str | None = None,
    ) -> None:
        """End a job that was taken."""
        told = None if state is JobState.SUCCEEDED else why
        outcomes = dict.fromkeys(job.node_ids, (outcome, why)) if state is JobState.SUCCEEDED else {}
        self.jobs.finish(job, state, told, outcomes, self.clock.now)

    def play(self, killed_at: str | None = None) -> Job:
        """Take the next job and do what its playbook would do, up to a point at which all dies."""
        job = self.take_job()
        self._stop_if(killed_at == "taken")
        (step,), node_id = job.variables["node_recover_steps"], job.node_ids[0]
        recovery_id, position = job.variables["node_recover_recovery_id"], job.variables["node_recover_position"]
        if job.variables["node_recover_dry_run"]:
            state, why = StepState.PLANNED, f"would {step}"
        elif node_id not in self.fleet.broken:
            state, why = StepState.SKIPPED, "not needed"
        else:
            may, _ = self.recoveries.claim_act(recovery_id, position)
            self._stop_if(killed_at == "claimed")
            if may:
                self.fleet.acts.append((recovery_id, step))
                if step == "give_up":
                    self.recoveries.give_up(recovery_id, "nothing helped")
                if step == self.fleet.mended_by[node_id]:
                    self.fleet.broken.discard(node_id)
            self._stop_if(killed_at == "acted")
            if step != "power_cycle":
                self.report(node_id)
            helped = node_id not in self.fleet.broken or (step == "give_up" and may)
            state, why = (StepState.SUCCEEDED, "it is up") if helped else (StepState.FAILED, "it is still down")
        self.recoveries.end_step(recovery_id, position, state, why)
        self._stop_if(killed_at == "reported")
        self.end_job(job)
        return job

    def finish(self, rounds: int = 20) -> Recovery:
        """Go on until the climb has ended; give it."""
        for _ in range(rounds):
            self.round(0)
            if not self.recoveries.active():
                break
            if self.active_jobs():
                self.play()
        else:
            pytest.fail(f"after {rounds} rounds it still goes on")
        return self.recoveries.page(1, None).recoveries[0]

    def begun(self) -> Recovery:
        """Let the manager begin; give the climb, whose first job waits."""
        self.round(12)
        self.round()
        (recovery,) = self.recoveries.active()
        return recovery

    @staticmethod
    def _stop_if(killed: bool) -> None:
        if killed:
            raise Killed

    # what is so

    def climbs(self) -> list[Recovery]:
        """Give all climbs, oldest first."""
        return self.recoveries.page(1000, None).recoveries[::-1]

    def record(self, node_id: str = "gw-7") -> Repairs | None:
        """Give what is remembered of a node's repairs."""
        with self.store.read() as connection:
            return read_repairs(connection, [node_id]).get(node_id)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Give settings with a calm guard and short ladders."""
    return changed(tmp_path)


def changed(home: Path, **recovery: Any) -> Settings:
    """Give those settings with something of recovery changed."""
    power = {"command": ["/bin/true"], "back_within_seconds": 77}
    known = {"ladders": LADDERS, "power": power, "guard": CALM, **recovery}
    return make_settings({"recovery": known, "storage": {"history_days": 365}}, home)


@pytest.fixture
def world(store: Store, settings: Settings, clock: FakeClock) -> World:
    """Give a manager and the node gw-7, which is well."""
    world = World(store, settings, clock)
    world.add()
    return world


def with_settings(world: World, **recovery: Any) -> World:
    """Give the manager other settings."""
    return World(world.store, changed(world.settings.home, **recovery), world.clock, world.fleet)


def told(recovery: Recovery) -> list[tuple[str, str, str | None]]:
    """Give steps, their states and messages."""
    return [(step.step, step.state.value, step.message) for step in recovery.steps]


# the way from the first bad report to the end


def test_round_waits_then_begins_one_climb_with_one_job(world: World) -> None:
    world.break_down()

    world.round(0)
    world.round(9)
    assert world.climbs() == []
    world.round(3)
    world.round()
    world.round()

    (climb,) = world.climbs()
    assert (climb.node_id, climb.attempt, climb.driver, climb.requested_by) == ("gw-7", 1, MANAGER, REQUESTED_BY)
    assert (climb.conditions, climb.critical, climb.dry_run) == (("ChecksPassing",), True, False)
    assert [step.step for step in climb.steps] == ["restart_service", "reboot"]
    (job,) = world.all_jobs()
    assert (job.action, job.node_ids, job.requested_by) == (JobAction.RECOVER, ("gw-7",), REQUESTED_BY)
    assert job.variables == {
        "node_recover_recovery_id": climb.recovery_id,
        "node_recover_steps": ["restart_service"],
        "node_recover_position": 0,
        "node_recover_dry_run": False,
        "node_recover_steps_directory": "",
        "node_recover_back_within_seconds": 77.0,
    }
    assert (climb.steps[0].state, climb.steps[0].job_ids) == (StepState.RUNNING, (job.job_id,))


def test_round_tells_the_playbook_where_an_operators_steps_are(world: World) -> None:
    world = with_settings(world, steps_directory="steps", power=None)
    world.break_down()
    world.begun()

    variables = world.job().variables
    assert variables["node_recover_steps_directory"] == str(world.settings.home / "steps")
    assert "node_recover_back_within_seconds" not in variables


def test_round_leaves_nodes_alone_that_are_well(world: World) -> None:
    world.round(60)
    world.round(60)

    assert (world.climbs(), world.all_jobs()) == ([], [])


def test_a_step_that_helps_ends_the_climb(world: World, rows: Rows) -> None:
    world.break_down(mended_by="restart_service")
    world.begun()

    world.play()
    world.round()

    (ended,) = world.climbs()
    assert (ended.state, ended.message) == (RecoveryState.SUCCEEDED, "restart_service succeeded (it is up)")
    assert told(ended) == [("restart_service", "succeeded", "it is up"), ("reboot", "waiting", None)]
    assert world.record() == Repairs(1, world.clock.now)
    types = [row["type"] for row in rows.events() if row["type"].startswith("recovery.")]
    assert types == [EventType.RECOVERY_STARTED, EventType.RECOVERY_STEP_ENDED, EventType.RECOVERY_ENDED]
    world.round(600)
    assert world.recoveries.active() == []


def test_a_step_that_fails_leads_to_the_next(world: World) -> None:
    world.break_down(mended_by="reboot")
    climb = world.begun()

    world.play()
    world.round()

    job = world.job()
    assert (job.variables["node_recover_steps"], job.variables["node_recover_position"]) == (["reboot"], 1)
    ended = world.finish()
    assert told(ended) == [("restart_service", "failed", "it is still down"), ("reboot", "succeeded", "it is up")]
    assert ended.state is RecoveryState.SUCCEEDED
    assert world.fleet.acts == [(climb.recovery_id, "restart_service"), (climb.recovery_id, "reboot")]


def test_a_climb_in_which_nothing_helps_has_failed(world: World) -> None:
    world.break_down()

    world.begun()
    ended = world.finish()

    assert ended.state is RecoveryState.FAILED
    assert ended.message == "restart_service failed (it is still down); reboot failed (it is still down)"


def test_a_node_that_mends_by_itself_is_left_alone(world: World) -> None:
    world.break_down()
    world.begun()

    world.fleet.broken.clear()
    world.play()
    world.report()
    world.round()

    (ended,) = world.climbs()
    assert (ended.state, ended.message) == (RecoveryState.SUCCEEDED, "it mended by itself")
    assert told(ended)[1] == ("reboot", "waiting", None)
    assert world.fleet.acts == []


def test_a_node_that_falls_silent_in_the_middle_has_not_mended(world: World) -> None:
    world.break_down()
    world.begun()
    job = world.take_job()
    world.recoveries.end_step(job.variables["node_recover_recovery_id"], 0, StepState.SKIPPED, "not needed")
    world.end_job(job)

    # What its checks said is forgotten with that.
    world.conclude("unreachable")
    world.round()
    world.end_job(world.take_job(), outcome=NodeResult.UNREACHABLE, why="Connection refused")
    world.round()
    world.round(0)

    (ended,) = world.climbs()
    assert ended.state is RecoveryState.FAILED
    assert told(ended)[1] == ("reboot", "failed", "Connection refused")


def test_a_lost_node_is_cycled_where_peers_are_blind(world: World) -> None:
    world.conclude("unreachable")
    world.fleet.broken.add("gw-7")
    world.fleet.mended_by["gw-7"] = "power_cycle"
    climb = world.begun()

    assert (climb.conditions, [step.step for step in climb.steps]) == (("Reachable",), ["power_cycle"])
    assert world.finish().state is RecoveryState.SUCCEEDED
    assert world.fleet.acts == [(climb.recovery_id, "power_cycle")]


@pytest.mark.parametrize("evidence", ["nobody_to_ask", "site_dark"])
def test_a_lost_node_of_which_nobody_knows_is_left_alone(world: World, evidence: str) -> None:
    world.conclude("unreachable", evidence=evidence)

    for _ in range(5):
        world.round(600)

    assert world.climbs() == []


def test_a_node_that_came_back_while_its_job_waited_keeps_its_power(world: World) -> None:
    world.conclude("unreachable")
    world.fleet.broken.add("gw-7")
    world.fleet.mended_by["gw-7"] = "nothing"
    world.begun()

    world.clock.advance(5)
    contact = {"reached": True, "reason": "Ok", "message": ""}
    world.log.record([observe("contact", contact, world.clock.now)])
    world.finish()

    assert world.fleet.acts == []


@pytest.mark.parametrize("health", ["suspect", "path_lost"])
def test_a_node_that_is_not_lost_for_sure_is_left_alone(world: World, health: str) -> None:
    world.break_down()
    world.conclude(health)

    for _ in range(5):
        world.round(600)

    assert world.climbs() == []


# how jobs end


@pytest.mark.parametrize(
    ("state", "outcome", "why"),
    [
        (JobState.SUCCEEDED, NodeResult.UNREACHABLE, "Connection refused"),
        (JobState.SUCCEEDED, NodeResult.FAILED, "no such module"),
        (JobState.FAILED, NodeResult.OK, "the playbook is broken"),
        (JobState.TIMED_OUT, NodeResult.OK, "stopped at its deadline of 600 s"),
    ],
    ids=["unreachable", "failed-on-the-node", "failed", "timed-out"],
)
def test_a_job_without_a_report_fails_its_step(world: World, state: JobState, outcome: NodeResult, why: str) -> None:
    world.break_down(mended_by="reboot")
    world.begun()
    world.end_job(world.take_job(), state, outcome, why)

    world.round()
    ended = world.finish()

    assert len(world.all_jobs()) == 2
    step = ended.steps[0]
    assert step.state is StepState.FAILED
    assert why in str(step.message) or "the run ended before this node was done" in str(step.message)
    assert ended.state is RecoveryState.SUCCEEDED


def test_a_job_that_says_nothing_at_all_fails_its_step(world: World) -> None:
    world.break_down()
    world.begun()
    job = world.take_job()
    world.end_job(job)

    world.round()

    assert told(world.climbs()[0])[0] == (
        "restart_service",
        "failed",
        f"job {job.job_id} ended as succeeded without a report",
    )


def test_a_cancelled_job_cancels_the_climb(world: World) -> None:
    world.break_down()
    climb = world.begun()
    job = world.job()
    world.queue.cancel(job.job_id)

    world.round()

    (ended,) = world.climbs()
    assert (ended.recovery_id, ended.state) == (climb.recovery_id, RecoveryState.CANCELLED)
    assert ended.message == f"job {job.job_id} of step restart_service was cancelled"
    assert told(ended)[0] == ("restart_service", "failed", f"job {job.job_id} was cancelled")


def test_an_interrupted_job_has_its_step_tried_again_some_times(world: World) -> None:
    world.break_down()
    world.begun()

    for _ in range(MAX_JOBS_PER_STEP):
        job = world.take_job()
        assert job.variables["node_recover_position"] == 0
        world = world.restarted()
        world.round()

    (climb,) = world.climbs()
    assert len(climb.steps[0].job_ids) == MAX_JOBS_PER_STEP
    assert climb.steps[0].state is StepState.FAILED
    assert "ended in the middle" in str(climb.steps[0].message) or "before this node" in str(climb.steps[0].message)
    world.round()
    assert world.job().variables["node_recover_position"] == 1


@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.INTERRUPTED, JobState.TIMED_OUT], ids=str)
def test_a_report_counts_however_its_job_ends_after_it(
    world: World, monkeypatch: pytest.MonkeyPatch, state: JobState
) -> None:
    world.break_down(mended_by="restart_service")
    climb = world.begun()
    job, read = world.take_job(), world.queue.get

    def read_after_the_report(job_id: str) -> Job:
        if not read(job_id).ended:
            world.fleet.broken.clear()
            world.report()
            world.recoveries.end_step(climb.recovery_id, 0, StepState.SUCCEEDED, "it is up")
            world.end_job(job, state, why="so it ended")
        return read(job_id)

    monkeypatch.setattr(world.queue, "get", read_after_the_report)
    for _ in range(3):
        world.round(0)

    (ended,) = world.climbs()
    assert (ended.state, told(ended)[0]) == (RecoveryState.SUCCEEDED, ("restart_service", "succeeded", "it is up"))
    assert len(world.all_jobs()) == 1


def test_a_job_that_was_forgotten_has_its_step_tried_again(world: World, store: Store) -> None:
    world.break_down(mended_by="restart_service")
    world.begun()
    forget_jobs(store)

    assert world.finish().state is RecoveryState.SUCCEEDED


def forget_jobs(store: Store) -> None:
    """Take all jobs from the record, as pruning does."""
    with store.write() as connection:
        connection.execute(tables.jobs.delete())


def test_a_full_queue_lets_the_climb_wait(world: World) -> None:
    full = make_settings({"ansible": {"max_queued_jobs": 1}}, world.settings.home)
    world.registry.register(make_declaration("gw-8"))
    waiting = world.queue.submit(JobAction.GATHER, ["gw-8"], "ops")
    world.break_down(mended_by="restart_service")
    world.queue = JobQueue(world.store, full, world.clock, "one", runner=FakeRunner(full))
    world.handler = FaultHandler(world.store, world.settings, world.recoveries, world.queue, world.guard, world.clock)

    climb = world.begun()
    assert (world.all_jobs(), climb.steps[0].state) == ([], StepState.WAITING)
    world.queue.cancel(waiting.job_id)

    assert world.finish().state is RecoveryState.SUCCEEDED


# the manager dies, and goes on

BOUNDARIES = (
    "begun",
    "submitted",
    "noted",
    "taken",
    "claimed",
    "acted",
    "reported",
    "job-ended",
    "second-submitted",
    "second-claimed",
    "second-acted",
    "second-reported",
    "second-job-ended",
)


def go_up_to(world: World, boundary: str) -> None:
    """Begin a climb and go on until the manager dies."""
    first = boundary.removeprefix("second-")
    world.round(12)
    if boundary.startswith("second-"):
        world.round()
        world.play()
        if first == "submitted":
            die_after_submitting(world)
            return
        world.round()
    elif first == "submitted":
        die_after_submitting(world)
        return
    elif first != "begun":
        world.round()
    if first in {"taken", "claimed", "acted", "reported"}:
        with pytest.raises(Killed):
            world.play(killed_at=first)
    elif first == "job-ended":
        world.play()


def die_after_submitting(world: World) -> None:
    """Let the manager die when a job waits and nobody has noted for which step."""
    submit = world.queue.submit

    def submit_and_die(*arguments: Any) -> Job:
        submit(*arguments)
        raise Killed

    world.queue.submit = submit_and_die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        world.round()


@pytest.mark.parametrize(
    ("boundary", "mended_by"),
    [
        (boundary, mended_by)
        for boundary in BOUNDARIES
        for mended_by in ("restart_service", "reboot", "nothing")
        # What the first step mends has no second one.
        if not (boundary.startswith("second-") and mended_by == "restart_service")
    ],
)
def test_a_restart_goes_on_where_it_was_and_acts_once(world: World, boundary: str, mended_by: str) -> None:
    world.break_down(mended_by=mended_by)
    go_up_to(world, boundary)
    (before,) = world.climbs()

    world = world.restarted()
    ended = world.finish()

    assert ended.recovery_id == before.recovery_id
    assert len(world.climbs()) == 1
    assert set(Counter(world.fleet.acts).values()) <= {1}
    lost = {"claimed": 0, "second-claimed": 1}.get(boundary)
    done = [step for step in ("restart_service", "reboot") if (ended.recovery_id, step) in world.fleet.acts]
    if lost is None:
        assert done == (["restart_service"] if mended_by == "restart_service" else ["restart_service", "reboot"])
        assert ended.state is (RecoveryState.FAILED if mended_by == "nothing" else RecoveryState.SUCCEEDED)
    else:
        # In doubt, so not done again: its postcheck said that it had not helped.
        assert ("restart_service", "reboot")[lost] not in done
        assert ended.steps[lost].state is StepState.FAILED
    assert world.active_jobs() == []
    assert world.record() == Repairs(1, world.clock.now)


def test_a_restart_at_each_boundary_of_one_climb_goes_on(world: World) -> None:
    world.break_down(mended_by="reboot")
    world.round(12)
    for killed_at in ("taken", "claimed", "acted", "reported"):
        world = world.restarted()
        world.round()
        with pytest.raises(Killed):
            world.play(killed_at)

    ended = world.restarted().finish()

    assert set(Counter(world.fleet.acts).values()) <= {1}
    assert len(world.climbs()) == 1
    assert ended.ended_at is not None


# an operator in the middle


@pytest.mark.parametrize("admin", [Admin.MAINTENANCE, Admin.DRAINING, Admin.OFFLINE], ids=str)
def test_a_node_that_somebody_takes_is_let_go_before_the_next_step(world: World, admin: Admin) -> None:
    world.break_down()
    world.begun()
    world.registry.set_admin("gw-7", admin, "new fan")

    world.play()
    world.round()
    world.round(600)

    (ended,) = world.climbs()
    assert (ended.state, ended.message) == (RecoveryState.CANCELLED, f"the node is {admin} now")
    assert world.fleet.acts == []


def test_a_node_that_somebody_takes_is_not_tried_again_after_a_restart(world: World) -> None:
    world.break_down()
    world.begun()
    world.take_job()
    world.registry.set_admin("gw-7", Admin.MAINTENANCE, "new fan")

    world = world.restarted()
    world.round()
    world.round()

    (ended,) = world.climbs()
    assert (ended.state, len(world.all_jobs())) == (RecoveryState.CANCELLED, 1)


@pytest.mark.parametrize("admin", [Admin.MAINTENANCE, Admin.DRAINING, Admin.OFFLINE], ids=str)
def test_a_node_that_somebody_has_is_left_alone(world: World, admin: Admin) -> None:
    world.break_down()
    world.registry.set_admin("gw-7", admin, "new fan")

    world.round(60)
    world.round(60)

    assert world.climbs() == []


def test_a_node_that_somebody_takes_at_that_moment_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.break_down()
    decide = world.handler.why_not_now

    def take_after_deciding(*arguments: Any) -> str | None:
        why = decide(*arguments)
        world.registry.set_admin("gw-7", Admin.MAINTENANCE, "new fan")
        return why

    monkeypatch.setattr(world.handler, "why_not_now", take_after_deciding)

    world.round(12)

    assert world.climbs() == []


@pytest.mark.parametrize("moment", ["begun", "noted", "taken", "interrupted", "reported"])
def test_a_node_that_is_deregistered_in_the_middle_ends_its_climb(world: World, moment: str) -> None:
    world.break_down()
    go_up_to(world, "taken" if moment == "interrupted" else moment)
    if moment == "interrupted":
        world.queue.recover({"one"})
    world.registry.deregister("gw-7")

    for _ in range(4):
        world.round()
        for job in world.active_jobs():
            taken = job if job.state is JobState.RUNNING else world.take_job()
            world.end_job(taken, outcome=NodeResult.UNREACHABLE, why="no such host")

    (ended,) = world.climbs()
    assert ended.ended_at is not None
    assert ended.state in {RecoveryState.CANCELLED, RecoveryState.FAILED}
    assert world.fleet.acts in ([], [(ended.recovery_id, "restart_service")])


def test_cancel_ends_a_climb_whose_job_waits(world: World) -> None:
    world.break_down()
    climb = world.begun()

    world.recoveries.cancel(climb.recovery_id)
    for _ in range(3):
        world.round(0)

    (ended,) = world.climbs()
    assert (ended.state, ended.message) == (RecoveryState.CANCELLED, "cancelled")
    assert [job.state for job in world.all_jobs()] == [JobState.CANCELLED]


def test_cancel_waits_for_the_job_that_runs(world: World) -> None:
    world.break_down()
    climb = world.begun()
    job = world.take_job()

    world.recoveries.cancel(climb.recovery_id)
    world.round()
    assert world.jobs.cancel_requests("one") == {job.job_id}
    assert world.recoveries.active() != []
    world.end_job(job, JobState.CANCELLED, why="cancelled while it ran")
    world.round()

    (ended,) = world.climbs()
    assert (ended.state, told(ended)[0]) == (RecoveryState.CANCELLED, ("restart_service", "failed", "cancelled"))
    assert world.fleet.acts == []


@pytest.mark.parametrize("boundary", ["begun", "noted", "reported", "job-ended"])
def test_cancel_ends_a_climb_after_a_restart(world: World, boundary: str) -> None:
    world.break_down()
    go_up_to(world, boundary)
    (climb,) = world.climbs()
    world.recoveries.cancel(climb.recovery_id)

    world = world.restarted()
    for _ in range(3):
        world.round(0)

    assert world.climbs()[0].state is RecoveryState.CANCELLED


def test_cancel_ends_a_climb_whose_job_was_forgotten(world: World, store: Store) -> None:
    world.break_down()
    climb = world.begun()
    forget_jobs(store)

    world.recoveries.cancel(climb.recovery_id)
    world.round()

    assert world.climbs()[0].state is RecoveryState.CANCELLED


# tries


def test_tries_pause_twice_as_long_each_time_then_give_up(world: World, rows: Rows) -> None:
    world.break_down()
    started, ended = [], []
    for _ in range(3):
        while not world.recoveries.active():
            world.round(2)
        climb = world.finish()
        started.append(climb.started_at)
        ended.append(climb.ended_at)
        assert climb.ended_at is not None

    pauses = [(begin - end).total_seconds() for begin, end in zip(started[1:], ended, strict=False) if end]
    assert [120 <= pauses[0] <= 123, 240 <= pauses[1] <= 243] == [True, True]
    assert [climb.attempt for climb in world.climbs()] == [1, 2, 3]
    assert [climb.state.value for climb in world.climbs()] == ["failed", "failed", "gave_up"]
    assert world.registry.get("gw-7").admin is Admin.CORDONED
    (event,) = rows.events(EventType.NODE_ADMIN_CHANGED)
    assert event["data"]["reason"] == "recovery gave up: restart_service: it is still down; reboot: it is still down"
    for _ in range(5):
        world.round(7200)
    assert len(world.climbs()) == 3
    with world.store.write() as connection:
        forget_repairs(connection, "gw-7")
    world.round()
    assert world.recoveries.active()[0].attempt == 1


def test_tries_are_remembered_by_the_next_manager(world: World) -> None:
    world.break_down()
    world.begun()
    world.finish()

    world = world.restarted()
    world.round(60)
    assert len(world.climbs()) == 1
    world.round(61)

    assert [climb.attempt for climb in world.climbs()] == [1, 2]


def test_tries_are_forgotten_after_a_time_without_trouble(world: World) -> None:
    world.break_down(mended_by="restart_service")
    world.begun()
    world.finish()

    world.report()
    world.round(3500)
    assert world.record() is not None
    world.round(101)
    assert world.record() is None


def test_tries_are_kept_while_there_is_trouble(world: World) -> None:
    world = with_settings(world, attempts=1)
    world.break_down()
    world.begun()
    world.finish()
    with world.store.write() as connection:
        connection.execute(tables.repair_records.update(), {"gave_up_at": None})

    for _ in range(10):
        world.round(1000)
    assert world.record() is not None

    # From the last trouble on, and not from the last try.
    world.fleet.broken.clear()
    world.report()
    world.round(3000)
    assert world.record() is not None
    world.round(700)
    assert world.record() is None


def test_a_node_that_was_given_up_stays_so_until_somebody_says_otherwise(world: World) -> None:
    world = with_settings(world, attempts=1)
    world.break_down()
    world.begun()
    assert world.finish().state is RecoveryState.GAVE_UP

    world.fleet.broken.clear()
    world.report()
    world.round(100_000)

    record = world.record()
    assert record is not None
    assert record.gave_up_at is not None


def test_a_clock_that_was_set_back_holds_nobody_up_for_long(world: World) -> None:
    world.break_down()
    world.begun()
    world.finish()

    world.clock.advance(-30 * 86400)
    for _ in range(3):
        world.round(130)

    assert len(world.climbs()) == 2


def test_trouble_that_comes_back_after_the_last_try_helped_is_given_up(world: World) -> None:
    world = with_settings(world, attempts=2)
    for _ in range(2):
        world.break_down(mended_by="restart_service")
        while not world.recoveries.active():
            world.round(30)
        assert world.finish().state is RecoveryState.SUCCEEDED

    world.break_down()
    for _ in range(20):
        world.round(60)
        if world.recoveries.active():
            world.finish()

    record = world.record()
    assert record is not None
    assert record.gave_up_at is not None
    assert world.registry.get("gw-7").admin is Admin.CORDONED
    assert [len(climb.steps) for climb in world.climbs()] == [2, 3, 1]
    assert told(world.climbs()[-1])[0][:2] == ("give_up", "succeeded")


# several managers, many nodes


def test_two_managers_on_one_store_begin_one_climb(world: World) -> None:
    other = World(world.store, world.settings, world.clock, world.fleet)
    world.break_down(mended_by="reboot")
    world.clock.advance(12)
    for _ in range(4):
        at_once(world.handler.round, other.handler.round)
        world.clock.advance(3)
        for job in world.active_jobs():
            if job.state is JobState.QUEUED:
                world.play()

    ended = world.finish()

    assert len(world.climbs()) == 1
    assert ended.state is RecoveryState.SUCCEEDED
    assert sorted(step for _, step in world.fleet.acts) == ["reboot", "restart_service"]


def at_once(*calls: Callable[[], None]) -> None:
    """Make calls at the same moment; none may fail."""
    barrier, errors = threading.Barrier(len(calls)), []

    def run(call: Callable[[], None]) -> None:
        barrier.wait(10)
        try:
            call()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []


def test_nodes_for_which_nothing_can_be_done_keep_no_other_from_its_turn(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fault_handler, "_PAGE", 3)
    for number in range(8):
        world.add(f"a-{number}")
        world.conclude("unreachable", f"a-{number}", evidence="nobody_to_ask")
    for node_id in ("gw-7", "gw-8"):
        if node_id == "gw-8":
            world.add(node_id)
        world.break_down(node_id)
    world.clock.advance(60)

    for _ in range(4):
        world.round()

    assert {climb.node_id for climb in world.climbs()} == {"gw-7", "gw-8"}


def test_each_broken_node_has_its_own_climb(world: World) -> None:
    for number in range(4):
        world.add(f"n-{number}")
        world.break_down(f"n-{number}", mended_by="restart_service")
    world.round(12)
    world.round()

    assert sorted(job.node_ids for job in world.active_jobs()) == [(f"n-{number}",) for number in range(4)]
    world.finish(40)
    assert [climb.state for climb in world.climbs()] == [RecoveryState.SUCCEEDED] * 4


def test_a_climb_that_cannot_go_on_keeps_no_other_from_it(world: World) -> None:
    world.add("gw-8")
    for node_id in ("gw-7", "gw-8"):
        world.break_down(node_id, mended_by="restart_service")
    world.round(12)
    world.round()
    first = world.recoveries.active()[0]
    with world.store.write() as connection:
        connection.execute(tables.jobs.delete().where(tables.jobs.c.job_id.in_(first.steps[0].job_ids)))
    world.registry.deregister(first.node_id)

    world.play()
    for _ in range(3):
        world.round()

    assert all(climb.ended_at is not None for climb in world.climbs())


# who may


def test_nothing_is_repaired_by_itself_where_that_is_switched_off(world: World) -> None:
    world = with_settings(world, automatic=False)
    world.break_down(mended_by="restart_service")
    for _ in range(3):
        world.round(60)
    assert world.climbs() == []

    world.recoveries.begin_by_hand("gw-7", None, "ops", "it hangs", dry_run=False, driver=MANAGER)

    ended = world.finish()
    assert (ended.state, ended.attempt, ended.requested_by) == (RecoveryState.SUCCEEDED, 0, "ops")
    assert world.record() is None


def test_a_dry_run_plans_each_step_and_changes_nothing(world: World, rows: Rows) -> None:
    world = with_settings(world, automatic=False)
    world.break_down()
    before = rows.events()
    world.recoveries.begin_by_hand("gw-7", None, "ops", "what if", dry_run=True, driver=MANAGER)

    ended = world.finish()

    assert ended.state is RecoveryState.PLANNED
    assert told(ended) == [
        ("restart_service", "planned", "would restart_service"),
        ("reboot", "planned", "would reboot"),
    ]
    assert [job.variables["node_recover_dry_run"] for job in world.all_jobs()] == [True, True]
    assert (world.fleet.acts, world.record(), rows.events()) == ([], None, before)


def test_a_dry_run_goes_on_beside_a_repair(world: World) -> None:
    world.break_down(mended_by="restart_service")
    world.begun()
    world.recoveries.begin_by_hand("gw-7", None, "ops", "what if", dry_run=True, driver=MANAGER)

    world.finish()

    assert [climb.state for climb in world.climbs()] == [RecoveryState.SUCCEEDED, RecoveryState.PLANNED]


def test_a_person_does_not_come_between(world: World) -> None:
    world.break_down(mended_by="restart_service")
    world.begun()

    with pytest.raises(RecoveryInProgressError, match="is being repaired by recovery since"):
        world.recoveries.begin_by_hand("gw-7", ["reboot"], "ops", "", dry_run=False, driver=PLAYBOOK)

    assert world.finish().state is RecoveryState.SUCCEEDED


def test_a_person_repairs_a_node_in_maintenance(world: World) -> None:
    world.break_down(mended_by="restart_service")
    world.registry.set_admin("gw-7", Admin.MAINTENANCE, "new fan")
    world.recoveries.begin_by_hand("gw-7", None, "ops", "", dry_run=False, driver=MANAGER)

    world.finish()

    assert next(step for _, step in world.fleet.acts) == "restart_service"


def test_a_playbook_that_somebody_started_is_left_alone_and_not_waited_for_forever(world: World) -> None:
    world.break_down()
    world.recoveries.begin_by_hand("gw-7", None, "ops", "", dry_run=False, driver=PLAYBOOK)

    world.round(PLAYBOOK_SECONDS - 1)
    assert world.all_jobs() == []
    assert len(world.recoveries.active()) == 1
    world.round(2)

    (ended, *_) = world.climbs()
    assert (ended.state, ended.message) == (
        RecoveryState.FAILED,
        "the playbook that drove it has not been heard of any more",
    )


def test_pauses_hold_back_what_is_due_and_not_what_goes_on(world: World) -> None:
    world.add("gw-8")
    world.break_down(mended_by="restart_service")
    world.begun()
    world.guard.pause("fair", None, "the fair", None, "ops")
    world.break_down("gw-8")

    for _ in range(3):
        world.round(30)
    world.finish()

    assert [(climb.node_id, climb.state) for climb in world.climbs()] == [("gw-7", RecoveryState.SUCCEEDED)]
    assert "the fair" in str(world.handler.outlook("gw-8").not_now)


# the outlook


def test_outlook_tells_what_was_is_and_would_be_done(world: World) -> None:
    quiet = world.handler.outlook("gw-7")
    world.break_down()
    waits = world.handler.outlook("gw-7")
    climb = world.begun()
    active = world.handler.outlook("gw-7")
    world.finish()
    after = world.handler.outlook("gw-7")

    assert (quiet.active, quiet.last, quiet.found.conditions, quiet.not_now) == (None, None, (), None)
    assert waits.found.steps == ("restart_service", "reboot")
    assert waits.not_now is not None
    assert active.active is not None
    assert (active.active.recovery_id, active.not_now) == (climb.recovery_id, None)
    assert after.last is not None
    assert (after.active, after.last.recovery_id, after.record.attempts) == (None, climb.recovery_id, 1)
    assert str(after.not_now).startswith("tried 1 of 3 times, next at ")
    with pytest.raises(NodeNotFoundError):
        world.handler.outlook("gw-9")


# with the queue's own threads


class Playing(FakeRunner):
    """Runs jobs of recovery by the rules of the role."""

    def __init__(self, settings: Settings, recoveries: Recoveries, log: ObservationLog, clock: FakeClock) -> None:
        super().__init__(settings)
        self._recoveries = recoveries
        self._log = log
        self._clock = clock

    def run(self, request: RunRequest, stop: threading.Event) -> RunEnd:
        if request.action is JobAction.RECOVER:
            told: Mapping[str, Any] = request.variables
            where = told["node_recover_recovery_id"], told["node_recover_position"]
            assert self._recoveries.claim_act(*where) == (True, "")
            helped = told["node_recover_steps"] == ["reboot"]
            if helped:
                self._log.record([observe("report", make_report(), self._clock.now, request.node_ids[0])])
            self._recoveries.end_step(*where, StepState.SUCCEEDED if helped else StepState.FAILED, "so it went")
        return super().run(request, stop)


@pytest.fixture
def running(world: World) -> Iterator[World]:
    """Give a manager whose queue runs jobs by itself."""
    runner = Playing(world.settings, world.recoveries, world.log, world.clock)
    world.queue = JobQueue(world.store, world.settings, world.clock, "one", runner=runner)
    world.guard = GuardKeeper(world.store, world.settings, world.queue, world.clock)
    world.handler = FaultHandler(world.store, world.settings, world.recoveries, world.queue, world.guard, world.clock)
    world.queue.start()
    yield world
    world.queue.stop()


def test_a_climb_runs_to_its_end_with_a_queue_of_its_own(running: World) -> None:
    running.break_down()
    running.round(12)

    def ended() -> bool:
        running.handler.round()
        return running.recoveries.active() == []

    wait_until(ended)

    (climb,) = running.climbs()
    assert climb.state is RecoveryState.SUCCEEDED
    assert told(climb) == [("restart_service", "failed", "so it went"), ("reboot", "succeeded", "so it went")]
