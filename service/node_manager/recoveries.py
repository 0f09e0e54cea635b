# SPDX-License-Identifier: GPL-3.0-or-later
"""Climbs of the recovery ladder as the store keeps them: who repairs a node, how far it is, how it ended.

Each change is one transaction with its event. Decides that one climb at a time goes on on a node, and that the act of a step
is begun once: everything else about repair is decided elsewhere.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from node_manager import events, node_admin, recovery_ladder, recovery_steps
from node_manager.domain import Admin, RecoveryState, RecoveryStep, StepState
from node_manager.events import EventType
from node_manager.node_registry import Clock, utc_now
from node_manager.problems import (
    ConflictError,
    InvalidInputError,
    NodeNotFoundError,
    RecoveryInProgressError,
)
from node_manager.recovery_ladder import Patient, Plan
from node_manager.recovery_rows import ENDS, Recovery, Step, active_of, held, known, load, read_patient
from node_manager.settings import Settings
from node_manager.store import Store, tables

MANAGER = "manager"
PLAYBOOK = "playbook"
# A playbook that was started by hand and says nothing for so long is gone.
PLAYBOOK_SECONDS = 3600.0
MAX_STEPS = 20

_recoveries, _steps, _records = tables.recoveries, tables.recovery_steps, tables.repair_records
_MESSAGE_CHARACTERS = 2000
_REASON_CHARACTERS = 1000


@dataclass(frozen=True)
class NewRecovery:
    """A climb that is to begin."""

    steps: Sequence[str]
    requested_by: str
    reason: str = ""
    dry_run: bool = False
    driver: str = MANAGER
    conditions: Sequence[str] = ()
    critical: bool = False
    attempt: int = 0
    canary: bool = False


@dataclass(frozen=True)
class RecoveryPage:
    """One page of a list, newest first; next_cursor is None at the end."""

    recoveries: list[Recovery]
    next_cursor: int | None


class Recoveries:
    """The climbs of one store."""

    def __init__(self, store: Store, settings: Settings, clock: Clock = utc_now) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock

    def begin_by_hand(
        self, node_id: str, steps: Sequence[str] | None, requested_by: str, reason: str, *, dry_run: bool, driver: str
    ) -> Recovery:
        """Begin what somebody asked for; without *steps*, for what is wrong with the node, or all mild ones.

        Errors: NodeNotFoundError; InvalidInputError; RecoveryInProgressError says who repairs it already and since when.
        """
        there = recovery_steps.OURS | set(recovery_steps.own_steps(self._settings))
        for step in steps or ():
            if step not in there:
                raise InvalidInputError("steps", f"expected steps out of {', '.join(sorted(there))}, got {step!r}")
        if steps is not None and not 1 <= len(steps) <= MAX_STEPS:
            raise InvalidInputError(
                "steps", f"expected 1 to {MAX_STEPS} steps, or none to leave the choice to the manager"
            )
        with self._store.write() as connection:
            patient = read_patient(connection, self._settings, node_id)
            for step in steps or ():
                why = recovery_ladder.never(step, patient)
                if why is not None:
                    raise InvalidInputError("steps", f"{step} can't be done on node {node_id!r}: {why}")
            found = recovery_ladder.plan_by_hand(patient, self._settings.configuration.recovery)
            chosen = tuple(steps) if steps is not None else found.steps
            if not chosen:
                raise ConflictError(
                    f"node {node_id!r}: "
                    + (
                        "; ".join(f"{left.step}: {left.why}" for left in found.left_out)
                        or "no ladder has a step for it"
                    ),
                    node_id=node_id,
                )
            new = NewRecovery(chosen, requested_by, reason, dry_run, driver, found.conditions, critical=found.critical)
            return self.begin(connection, patient, new)

    def begin(self, connection: sa.Connection, patient: Patient, new: NewRecovery) -> Recovery:
        """Begin a climb in the caller's transaction, which holds the node's row.

        Errors: RecoveryInProgressError.
        """
        now = self._clock()
        if not new.dry_run:
            other = active_of(connection, patient.node_id)
            if other is not None:
                raise RecoveryInProgressError(
                    f"node {patient.node_id!r} is being repaired by {other.requested_by}"
                    f" since {other.started_at:%Y-%m-%d %H:%M:%S} UTC; wait for its end, or POST"
                    f" /recoveries/{other.recovery_id}/cancel",
                    node_id=patient.node_id,
                    recovery_id=other.recovery_id,
                    requested_by=other.requested_by,
                    started_at=other.started_at.isoformat().replace("+00:00", "Z"),
                )
        recovery_id = str(uuid.uuid4())
        by_playbook = new.driver == PLAYBOOK
        connection.execute(
            _recoveries.insert(),
            {
                "recovery_id": recovery_id,
                "node_id": patient.node_id,
                "zone": patient.zone,
                "state": RecoveryState.RUNNING.value,
                "dry_run": new.dry_run,
                "conditions": list(new.conditions),
                "critical": new.critical,
                "attempt": new.attempt,
                "canary": new.canary,
                "driver": new.driver,
                "requested_by": new.requested_by[:64],
                "reason": new.reason,
                "started_at": now,
                "deadline_at": now + timedelta(seconds=PLAYBOOK_SECONDS) if by_playbook else None,
            },
        )
        connection.execute(
            _steps.insert(),
            [
                {
                    "recovery_id": recovery_id,
                    "position": position,
                    "step": step,
                    "state": StepState.WAITING.value,
                    "job_ids": [],
                }
                for position, step in enumerate(new.steps)
            ],
        )
        if not new.dry_run:
            told = {
                "recovery_id": recovery_id,
                "conditions": list(new.conditions),
                "attempt": new.attempt,
                "requested_by": new.requested_by,
                "reason": new.reason,
                "steps": list(new.steps),
            }
            events.emit(connection, EventType.RECOVERY_STARTED, patient.node_id, now, told)
        return known(connection, recovery_id)

    def start_step(self, recovery_id: str, position: int, job_id: str) -> Recovery:
        """Note that a job was started for a step."""
        now = self._clock()
        with self._store.write() as connection:
            recovery = held(connection, recovery_id)
            step = _step_of(recovery, position)
            values: dict[str, Any] = {"job_ids": [*step.job_ids, job_id]}
            # The job may have been quicker than this note of it.
            if recovery.ended_at is None and step.state not in ENDS:
                values |= {"state": StepState.RUNNING.value, "started_at": step.started_at or now}
            _update_step(connection, step, recovery_id, **values)
            return known(connection, recovery_id)

    def claim_act(self, recovery_id: str, position: int) -> tuple[bool, str]:
        """Let the act of a step begin, once; tell whether it may, and why not.

        What a manager began before it was restarted is in doubt, and must not be done twice.
        """
        now = self._clock()
        with self._store.write() as connection:
            recovery = held(connection, recovery_id)
            step = _step_of(recovery, position)
            _note_sign_of_life(connection, recovery, now)
            if recovery.ended_at is not None or step.state in ENDS:
                return False, "the recovery has ended meanwhile"
            if recovery.cancel_requested_at is not None:
                return False, "the recovery was cancelled"
            if recovery.dry_run:
                return False, "it is a dry run"
            if step.acted_at is not None:
                return False, f"it was begun at {step.acted_at:%H:%M:%S} UTC already and is not repeated"
            why = self._why_no_more(connection, recovery, step)
            if why is not None:
                return False, why
            _update_step(connection, step, recovery_id, acted_at=now)
            return True, ""

    def end_step(self, recovery_id: str, position: int, state: StepState, message: str | None) -> Recovery:
        """Write how a step ended; of two who say so the first is believed.

        Errors: RecoveryNotFoundError; InvalidInputError.
        """
        if state not in ENDS:
            raise InvalidInputError("state", f"expected one of {', '.join(sorted(ENDS))}")
        now = self._clock()
        with self._store.write() as connection:
            recovery = held(connection, recovery_id)
            step = _step_of(recovery, position)
            if recovery.ended_at is not None or step.state in ENDS:
                return recovery
            _note_sign_of_life(connection, recovery, now)
            if state is StepState.SKIPPED and step.acted_at is not None:
                # A manager died after the act: that nothing is left to do is its doing.
                state = StepState.SUCCEEDED
            told = (message or "")[:_MESSAGE_CHARACTERS] or None
            _update_step(
                connection,
                step,
                recovery_id,
                state=state.value,
                message=told,
                started_at=step.started_at or now,
                ended_at=now,
            )
            if not recovery.dry_run:
                data = {
                    "recovery_id": recovery_id,
                    "step": step.step,
                    "position": position,
                    "state": state.value,
                    "message": told,
                    "job_ids": list(step.job_ids),
                }
                events.emit(connection, EventType.RECOVERY_STEP_ENDED, recovery.node_id, now, data)
            return known(connection, recovery_id)

    def give_up(self, recovery_id: str, message: str) -> Recovery:
        """Keep work off a node that can't be repaired, where what is wrong is critical, and leave it alone from now on."""
        now = self._clock()
        with self._store.write() as connection:
            recovery = held(connection, recovery_id)
            if recovery.dry_run or recovery.ended_at is not None or recovery.cancel_requested_at is not None:
                return recovery
            try:
                node = node_admin.lock(connection, recovery.node_id)
            except NodeNotFoundError:
                return recovery
            if recovery.critical and node.admin is Admin.ACTIVE:
                failed = [f"{step.step}: {step.message}" for step in recovery.steps if step.state is StepState.FAILED]
                told = "; ".join(failed) or message or "no step helped"
                node_admin.change(
                    connection, node, Admin.CORDONED, f"recovery gave up: {told}"[:_REASON_CHARACTERS], now
                )
            _remember(connection, recovery.node_id, now, gave_up_at=now)
            return recovery

    def end(
        self,
        recovery_id: str,
        message: str | None = None,
        *,
        state: RecoveryState | None = None,
        also: Callable[[sa.Connection, Recovery], None] | None = None,
    ) -> Recovery:
        """End a climb; its state follows from its steps unless it is given.

        Shapes: *also* is done in the same transaction, once. What has ended already stays as it is.
        """
        now = self._clock()
        with self._store.write() as connection:
            recovery = held(connection, recovery_id)
            if recovery.ended_at is not None:
                return recovery
            ended_as = state or _state_by_steps(recovery)
            told = (message or _summary(recovery, ended_as))[:_MESSAGE_CHARACTERS]
            connection.execute(
                _recoveries.update().where(_recoveries.c.recovery_id == recovery_id),
                {"state": ended_as.value, "message": told, "ended_at": now},
            )
            if not recovery.dry_run:
                data = {
                    "recovery_id": recovery_id,
                    "state": ended_as.value,
                    "message": told,
                    "conditions": list(recovery.conditions),
                    "attempt": recovery.attempt,
                    "requested_by": recovery.requested_by,
                    "duration_seconds": round((now - recovery.started_at).total_seconds(), 3),
                }
                events.emit(connection, EventType.RECOVERY_ENDED, recovery.node_id, now, data)
                if recovery.attempt:
                    _remember(connection, recovery.node_id, now, attempts=recovery.attempt, last_ended_at=now)
            ended = known(connection, recovery_id)
            if also is not None:
                also(connection, ended)
            return ended

    def cancel(self, recovery_id: str) -> Recovery:
        """Ask for the end of a climb; no further act of it begins.

        Errors: RecoveryNotFoundError; ConflictError if it has ended.
        """
        with self._store.write() as connection:
            recovery = held(connection, recovery_id)
            if recovery.ended_at is not None:
                raise ConflictError(
                    f"recovery {recovery_id} has already ended: {recovery.state}", recovery_id=recovery_id
                )
            connection.execute(
                _recoveries.update().where(_recoveries.c.recovery_id == recovery_id),
                {"cancel_requested_at": self._clock()},
            )
            return known(connection, recovery_id)

    def get(self, recovery_id: str) -> Recovery:
        """Read one climb.

        Errors: RecoveryNotFoundError.
        """
        with self._store.read() as connection:
            return known(connection, recovery_id)

    def active(self) -> list[Recovery]:
        """List the climbs that have not ended, in the order of their starts."""
        with self._store.read() as connection:
            return load(connection, _recoveries.c.ended_at.is_(None))

    def latest_of(self, node_id: str) -> tuple[Recovery | None, Recovery | None]:
        """Read the climb that goes on on a node, and the newest that has ended; dry runs left out."""
        of_node = sa.and_(_recoveries.c.node_id == node_id, _recoveries.c.dry_run.is_(sa.false()))
        ended = sa.and_(of_node, _recoveries.c.ended_at.is_not(None))
        with self._store.read() as connection:
            newest = connection.scalar(sa.select(sa.func.max(_recoveries.c.sequence)).where(ended))
            last = None if newest is None else load(connection, _recoveries.c.sequence == newest)[0]
            return active_of(connection, node_id), last

    def page(
        self, limit: int, before: int | None, *, node_id: str | None = None, state: RecoveryState | None = None
    ) -> RecoveryPage:
        """List climbs, newest first, those with a sequence below *before*."""
        query = sa.select(_recoveries.c.sequence).order_by(_recoveries.c.sequence.desc()).limit(limit + 1)
        if before is not None:
            query = query.where(_recoveries.c.sequence < before)
        if node_id is not None:
            query = query.where(_recoveries.c.node_id == node_id)
        if state is not None:
            query = query.where(_recoveries.c.state == state.value)
        with self._store.read() as connection:
            found = list(connection.scalars(query))
            shown = load(connection, _recoveries.c.sequence.in_(found[:limit]))[::-1]
        return RecoveryPage(shown, shown[-1].sequence if shown and len(found) > limit else None)

    def prune(self) -> None:
        """Forget climbs that ended longer ago than storage.history_days."""
        keep = timedelta(days=self._settings.configuration.storage.history_days)
        with self._store.write() as connection:
            connection.execute(_recoveries.delete().where(_recoveries.c.ended_at < self._clock() - keep))

    def _why_no_more(self, connection: sa.Connection, recovery: Recovery, step: Step) -> str | None:
        """Say why what the manager began by itself must not go on: the node is no longer what it was."""
        if not recovery.attempt:
            return None
        try:
            patient = read_patient(connection, self._settings, recovery.node_id)
        except NodeNotFoundError:
            return "the node was deregistered meanwhile"
        if patient.admin not in recovery_ladder.REPAIRABLE:
            return f"the node is {patient.admin} now"
        helped = [other.step for other in recovery.steps if other.state is StepState.SUCCEEDED]
        asked = Plan(conditions=recovery.conditions)
        if not recovery_ladder.goes_on(asked, patient.state, helped, patient.ladders):
            return "what was wrong is gone"
        if step.step == RecoveryStep.GIVE_UP:
            return None
        return recovery_ladder.why_not(
            step.step, patient, self._settings.configuration.recovery, critical=recovery.critical
        )


def _remember(connection: sa.Connection, node_id: str, now: datetime, **values: Any) -> None:
    found = connection.execute(_records.update().where(_records.c.node_id == node_id), values).rowcount
    if found:
        return
    # Held, so that it isn't deregistered meanwhile.
    node = sa.select(tables.nodes.c.node_id).where(tables.nodes.c.node_id == node_id).with_for_update(read=True)
    if connection.scalar(node) is not None:
        connection.execute(_records.insert(), {"node_id": node_id, "attempts": 0, "troubled_at": now, **values})


def _note_sign_of_life(connection: sa.Connection, recovery: Recovery, now: datetime) -> None:
    """Give the playbook that drives a climb its time anew."""
    if recovery.deadline_at is not None:
        deadline_at = now + timedelta(seconds=PLAYBOOK_SECONDS)
        which = _recoveries.c.recovery_id == recovery.recovery_id
        connection.execute(_recoveries.update().where(which), {"deadline_at": deadline_at})


def _step_of(recovery: Recovery, position: int) -> Step:
    if not 0 <= position < len(recovery.steps):
        raise InvalidInputError("position", f"expected 0 to {len(recovery.steps) - 1}")
    return recovery.steps[position]


def _update_step(connection: sa.Connection, step: Step, recovery_id: str, **values: Any) -> None:
    connection.execute(
        _steps.update().where(_steps.c.recovery_id == recovery_id, _steps.c.position == step.position), values
    )


def _state_by_steps(recovery: Recovery) -> RecoveryState:
    if recovery.dry_run:
        return RecoveryState.PLANNED
    last = recovery.steps[-1]
    if last.step == RecoveryStep.GIVE_UP and last.state is StepState.SUCCEEDED:
        return RecoveryState.GAVE_UP
    # What failed after a step that helped was still needed; what was skipped was not.
    decided = [step.state for step in recovery.steps if step.state in {StepState.SUCCEEDED, StepState.FAILED}]
    if not decided and not recovery.attempt and all(step.state is StepState.SKIPPED for step in recovery.steps):
        # A person asked, and there was nothing to do.
        return RecoveryState.SUCCEEDED
    return RecoveryState.SUCCEEDED if decided and decided[-1] is StepState.SUCCEEDED else RecoveryState.FAILED


def _summary(recovery: Recovery, state: RecoveryState) -> str:
    if state is RecoveryState.GAVE_UP:
        failed = [step for step in recovery.steps if step.state is StepState.FAILED]
        return "gave up" + "".join(f"; {step.step}: {step.message}" for step in failed)
    told = [
        f"{step.step} {step.state}" + (f" ({step.message})" if step.message else "")
        for step in recovery.steps
        if step.state in ENDS
    ]
    return "; ".join(told) or "no step was tried"
