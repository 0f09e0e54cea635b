# SPDX-License-Identifier: GPL-3.0-or-later
"""Repair nodes: carry each climb of the ladder from step to step, and begin climbs where a verdict and the guard allow.

Runs on the leading manager. All that it knows is in the store, so that a manager that was killed goes on where it was; what
was begun then is in doubt and goes through its precheck again, but its act is not repeated (see recoveries).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
import structlog

from node_manager import recovery_ladder, recovery_steps
from node_manager.domain import JobAction, JobState, NodeResult, RecoveryState, StepState
from node_manager.guard_keeper import GuardKeeper
from node_manager.jobs import Job, JobQueue
from node_manager.node_registry import Clock, utc_now
from node_manager.problems import JobNotFoundError, NodeNotFoundError, ProblemError
from node_manager.recoveries import MANAGER, NewRecovery, Recoveries
from node_manager.recovery_ladder import Patient, Plan, Repairs
from node_manager.recovery_rows import ENDS, Recovery, Step, read_patient, read_patients, read_repairs, sick_nodes
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError, tables

REQUESTED_BY = "recovery"
# A step whose jobs are interrupted over and over (managers that die) is given up.
MAX_JOBS_PER_STEP = 5
_SCAN_SECONDS = 2.0
_NEWEST_JOBS = 20
# Nodes that one look takes.
_PAGE = 500


@dataclass(frozen=True)
class Outlook:
    """How it stands with a node's repair; not_now is None where it is next, or nothing is wrong."""

    active: Recovery | None
    last: Recovery | None
    record: Repairs
    found: Plan
    not_now: str | None


class FaultHandler:
    """The repairs of a fleet, seen from the manager that leads."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        recoveries: Recoveries,
        jobs: JobQueue,
        guard: GuardKeeper,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._settings = settings
        self._recoveries = recoveries
        self._jobs = jobs
        self._guard = guard
        self._clock = clock
        self._log = structlog.get_logger()
        self._scanned_at: datetime | None = None
        self._seen_up_to = ""

    def round(self) -> None:
        """Carry on what is under way, then begin what is due.

        Errors: StoreUnavailableError.
        """
        now = self._clock()
        for recovery in self._recoveries.active():
            try:
                self._carry_on(recovery, now)
            except ProblemError as error:
                # The queue is full, or somebody was quicker: the next round sees what is there then.
                self._log.warning("a recovery waits", recovery_id=recovery.recovery_id, reason=error.detail)
            except StoreUnavailableError:
                raise
            except Exception:  # one that stumbles must not keep the others from their way
                self._log.exception("a recovery stumbled", recovery_id=recovery.recovery_id, node_id=recovery.node_id)
        if self._scanned_at is None or not timedelta(0) <= now - self._scanned_at < timedelta(seconds=_SCAN_SECONDS):
            self._scanned_at = now
            self._begin_due(now)

    # What is under way

    def _carry_on(self, recovery: Recovery, now: datetime) -> None:
        if recovery.driver != MANAGER:
            if recovery.deadline_at is not None and now >= recovery.deadline_at:
                self._end(recovery, RecoveryState.FAILED, "the playbook that drove it has not been heard of any more")
            elif recovery.cancel_requested_at is not None and recovery.next_step is None:
                self._end(recovery, RecoveryState.CANCELLED, "cancelled")
            return
        step = recovery.next_step
        if recovery.cancel_requested_at is not None:
            self._cancel(recovery, step)
        elif step is None:
            self._end(recovery)
        elif step.state is StepState.WAITING:
            self._start(recovery, step)
        else:
            self._follow(recovery, step)

    def _start(self, recovery: Recovery, step: Step) -> None:
        patient = self._patient(recovery.node_id)
        why = _why_let_go(recovery, patient)
        if why is not None:
            self._end(recovery, RecoveryState.CANCELLED, why)
        elif patient is not None and step.position and not recovery.dry_run and self._is_mended(recovery, patient):
            self._end(recovery)
        else:
            self._submit(recovery, step)

    def _submit(self, recovery: Recovery, step: Step) -> None:
        power = self._settings.configuration.recovery.power
        directory = recovery_steps.directory_of(self._settings)
        variables: dict[str, Any] = {
            "node_recover_recovery_id": recovery.recovery_id,
            "node_recover_steps": [step.step],
            "node_recover_position": step.position,
            "node_recover_dry_run": recovery.dry_run,
            "node_recover_steps_directory": "" if directory is None else str(directory),
        }
        if power is not None:
            variables["node_recover_back_within_seconds"] = power.back_within_seconds
        # A manager that died before it noted its job, or another one that leads too, has left one.
        others = self._jobs.page(_NEWEST_JOBS, action=JobAction.RECOVER, node_id=recovery.node_id).jobs
        waiting = next((job for job in others if not job.ended and job.variables == variables), None)
        job = waiting or self._jobs.submit(JobAction.RECOVER, [recovery.node_id], recovery.requested_by, variables)
        self._recoveries.start_step(recovery.recovery_id, step.position, job.job_id)
        self._log.info(
            "a step of recovery begins",
            node_id=recovery.node_id,
            step=step.step,
            recovery_id=recovery.recovery_id,
            job_id=job.job_id,
        )

    def _follow(self, recovery: Recovery, step: Step) -> None:
        """Look at the job of a step that has not reported its end."""
        job = self._job(step)
        if job is not None and not job.ended:
            return
        # It may have reported a moment before its end, after we read the recovery.
        recovery = self._recoveries.get(recovery.recovery_id)
        if recovery.steps[step.position].state in ENDS:
            return
        if job is None or job.state is JobState.INTERRUPTED:
            self._repeat(recovery, step, job)
        elif job.state is JobState.CANCELLED:
            self._fail(recovery, step, f"job {job.job_id} was cancelled")
            self._end(recovery, RecoveryState.CANCELLED, f"job {job.job_id} of step {step.step} was cancelled")
        else:
            self._fail(recovery, step, _why_failed(job))

    def _repeat(self, recovery: Recovery, step: Step, job: Job | None) -> None:
        """Try a step again that is in doubt: its precheck decides what is left to do."""
        why = _why_let_go(recovery, self._patient(recovery.node_id))
        if why is not None:
            self._fail(recovery, step, why)
            self._end(recovery, RecoveryState.CANCELLED, why)
        elif len(step.job_ids) < MAX_JOBS_PER_STEP:
            self._submit(recovery, step)
        else:
            self._fail(recovery, step, "its jobs are not on record any more" if job is None else _why_failed(job))

    def _fail(self, recovery: Recovery, step: Step, why: str) -> None:
        self._recoveries.end_step(recovery.recovery_id, step.position, StepState.FAILED, why)

    def _cancel(self, recovery: Recovery, step: Step | None) -> None:
        if step is not None and step.state is StepState.RUNNING:
            job = self._job(step)
            if job is not None and not job.ended:
                self._jobs.cancel(job.job_id)
                return
            self._fail(recovery, step, "cancelled")
        self._end(recovery, RecoveryState.CANCELLED, "cancelled")

    def _is_mended(self, recovery: Recovery, patient: Patient) -> bool:
        """Tell whether the steps so far were enough."""
        helped = [step.step for step in recovery.steps if step.state is StepState.SUCCEEDED]
        if not recovery.conditions:
            return False
        plan = Plan(conditions=recovery.conditions)
        return not recovery_ladder.goes_on(plan, patient.state, helped, patient.ladders)

    def _end(self, recovery: Recovery, state: RecoveryState | None = None, message: str | None = None) -> None:
        recovery = self._recoveries.get(recovery.recovery_id)
        if state is None and not recovery.dry_run:
            state, message = self._judge(recovery)
        with self._guard.undone_on_failure():
            ended = self._recoveries.end(recovery.recovery_id, message, state=state, also=self._guard.note_end)
        self._log.info(
            "a recovery has ended",
            node_id=ended.node_id,
            recovery_id=ended.recovery_id,
            state=ended.state.value,
            message=ended.message,
        )

    def _judge(self, recovery: Recovery) -> tuple[RecoveryState | None, str | None]:
        """Tell whether the trouble went by itself; None: the steps say how it ended."""
        if any(step.state in {StepState.SUCCEEDED, StepState.FAILED} for step in recovery.steps):
            return None, None
        patient = self._patient(recovery.node_id)
        if patient is None:
            return RecoveryState.CANCELLED, "the node was deregistered"
        if recovery.conditions and self._is_mended(recovery, patient):
            return RecoveryState.SUCCEEDED, "it mended by itself"
        return None, None

    def _patient(self, node_id: str) -> Patient | None:
        with self._store.read() as connection:
            return read_patients(connection, self._settings, [node_id]).get(node_id)

    def _job(self, step: Step) -> Job | None:
        """Read the last job of a step; None where it has been forgotten."""
        try:
            return self._jobs.get(step.job_ids[-1])
        except JobNotFoundError:
            return None

    # What is due

    def _begin_due(self, now: datetime) -> None:
        self._guard.look(now)
        self._keep_records(now)
        if not self._settings.configuration.recovery.automatic or self._guard.refusal_everywhere(now) is not None:
            return
        with self._store.read() as connection:
            sick = sick_nodes(connection, self._settings, now, self._seen_up_to, _PAGE)
            repairs = read_repairs(connection, [patient.node_id for patient in sick])
        # Page by page: those for whom nothing can be done must not keep others from their turn.
        self._seen_up_to = sick[-1].node_id if len(sick) == _PAGE else ""
        in_repair = {recovery.node_id for recovery in self._recoveries.active() if not recovery.dry_run}
        for patient in sorted(sick, key=lambda patient: patient.state.health_since):
            if patient.node_id in in_repair or self._guard.refusal(patient.zone, now) is not None:
                continue
            record = repairs.get(patient.node_id, Repairs())
            found = self.plan_of(patient, record)
            if found.conditions and self.why_not_now(patient, found, record, now) is None:
                self._begin(patient, found, record)

    def why_not_now(self, patient: Patient, found: Plan, record: Repairs, now: datetime) -> str | None:
        """Say why a node is not repaired by itself now; None where it is next."""
        settings = self._settings.configuration.recovery
        since = self._guard.waiting_since(patient.zone)
        why = recovery_ladder.why_not_now(patient, found, record, settings, now, since)
        return why if why is not None else self._guard.refusal(patient.zone, now)

    def plan_of(self, patient: Patient, record: Repairs) -> Plan:
        """Plan the next climb for a node."""
        settings = self._settings.configuration.recovery
        return recovery_ladder.plan(
            patient,
            settings,
            last_attempt=record.attempts + 1 >= settings.attempts,
            tries_left=record.attempts < settings.attempts,
        )

    def outlook(self, node_id: str) -> Outlook:
        """Tell what was, is and would be done for a node.

        Errors: NodeNotFoundError.
        """
        now = self._clock()
        with self._store.read() as connection:
            patient = read_patients(connection, self._settings, [node_id]).get(node_id)
            record = read_repairs(connection, [node_id]).get(node_id, Repairs())
        if patient is None:
            raise NodeNotFoundError(node_id)
        active, last = self._recoveries.latest_of(node_id)
        found = self.plan_of(patient, record)
        not_now = self.why_not_now(patient, found, record, now) if found.conditions and active is None else None
        return Outlook(active, last, record, found, not_now)

    def _begin(self, patient: Patient, found: Plan, record: Repairs) -> None:
        new = NewRecovery(
            found.steps,
            REQUESTED_BY,
            ", ".join(found.conditions),
            conditions=found.conditions,
            critical=found.critical,
            attempt=record.attempts + 1,
            canary=self._guard.is_canary(patient.zone),
        )
        try:
            with self._guard.undone_on_failure(), self._store.write() as connection:
                # Seen again while its row is held: an operator may have taken the node a moment ago.
                again = read_patient(connection, self._settings, patient.node_id)
                if again.admin is not patient.admin or self.plan_of(again, record).steps != found.steps:
                    return
                begun = self._recoveries.begin(connection, again, new)
                self._guard.note_start(connection, begun)
        except ProblemError as error:
            self._log.info("a node is not repaired now", node_id=patient.node_id, reason=error.detail)
            return
        self._log.info(
            "a recovery begins", node_id=patient.node_id, recovery_id=begun.recovery_id, conditions=found.conditions
        )

    def _keep_records(self, now: datetime) -> None:
        """Forget the repairs of nodes that have been well for long enough."""
        records = tables.repair_records
        with self._store.read() as connection:
            rows = connection.execute(sa.select(records.c.node_id, records.c.troubled_at, records.c.gave_up_at)).all()
            if not rows:
                return
            patients = read_patients(connection, self._settings, [row.node_id for row in rows])
            repairs = read_repairs(connection, patients)
        in_trouble = {
            node_id for node_id, patient in patients.items() if self.plan_of(patient, repairs[node_id]).conditions
        }
        reset = timedelta(seconds=self._settings.configuration.recovery.reset_seconds)
        # Written now and then only. A time that is ahead is of a clock that was set back since.
        noted = [
            row.node_id
            for row in rows
            if row.troubled_at > now or (row.node_id in in_trouble and now - row.troubled_at > reset / 60)
        ]
        well = [
            row.node_id
            for row in rows
            if row.node_id not in in_trouble and row.gave_up_at is None and now - row.troubled_at >= reset
        ]
        if noted or well:
            with self._store.write() as connection:
                connection.execute(records.update().where(records.c.node_id.in_(noted)), {"troubled_at": now})
                connection.execute(records.delete().where(records.c.node_id.in_(well)))


def _why_let_go(recovery: Recovery, patient: Patient | None) -> str | None:
    """Say why a climb must not go on: its node is gone, or somebody took it; None where it may."""
    if patient is None:
        return "the node was deregistered"
    if recovery.attempt and patient.admin not in recovery_ladder.REPAIRABLE:
        return f"the node is {patient.admin} now"
    return None


def _why_failed(job: Job) -> str:
    outcomes: Iterable[str] = (
        node.message or f"the node was {node.result}" for node in job.nodes if node.result not in {None, NodeResult.OK}
    )
    return next(iter(outcomes), None) or job.message or f"job {job.job_id} ended as {job.state} without a report"
