# SPDX-License-Identifier: GPL-3.0-or-later
"""Take nodes out of work and back: cordon, drain, maintenance, and the check that stands before the return.

Everything is decided from the store, so it does not matter which manager does it, nor whether one was restarted in the middle.
The rules in words are in docs/maintenance.md.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import structlog

from node_manager import drain_events, node_admin
from node_manager.domain import Admin, Health, JobAction
from node_manager.drain_blockers import Situation, judge, read_situation
from node_manager.maintenance_requests import StatusRequest, Work, apply, check_request
from node_manager.maintenance_steps import RETRY_SECONDS, Step, next_step
from node_manager.node_admin import Standing
from node_manager.node_registry import Clock, utc_now
from node_manager.problems import NodeNotFoundError, ProblemError
from node_manager.settings import Settings
from node_manager.store import Also, Store, tables

if TYPE_CHECKING:
    # Types only: a playbook's link must not wait for what they load.
    from node_manager.jobs import JobQueue
    from node_manager.replacements import Replacements

_REQUESTED_BY = "maintenance"
_MAX_HOLDER_CHARACTERS = 64
_MAX_REASON_CHARACTERS = 1000
# More steps than one node can need at once.
_STEPS = 6
_OF_DRAIN = frozenset(Step) - {Step.ASK, Step.CHECK, Step.LEAVE, Step.STAY}


class Maintenance:
    """The maintenance of the nodes of one store."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        replacements: Replacements,
        jobs: JobQueue | None,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._settings = settings
        self._replacements = replacements
        # None: nobody looks at nodes on our behalf; the caller does.
        self._jobs = jobs
        self._clock = clock
        self._log = structlog.get_logger()

    def set_status(
        self,
        node_id: str,
        wanted: StatusRequest,
        requested_by: str,
        *,
        if_generation: int | None = None,
        also: Also | None = None,
    ) -> None:
        """Say whether a node takes part, and see to what that needs.

        Shapes: *also* is done in the same transaction.
        Errors: NodeNotFoundError; StaleGenerationError; InvalidInputError; ConflictError where another operator holds the node.
        """
        now = self._clock()
        check_request(wanted, now)
        proposals = self._propose(node_id) if wanted.drain else ()
        with self._store.write() as connection:
            node = node_admin.lock(connection, node_id, if_generation)
            record = node_admin.read(connection, node_id)
            work = Work(connection, node, record, wanted, requested_by[:_MAX_HOLDER_CHARACTERS], tuple(proposals), now)
            action = apply(self._settings, work)
            if also is not None:
                also(connection)
        if action is not None:
            self._submit(action, node_id)

    def round(self) -> None:
        """Do what is due now, on all nodes that are in drain or maintenance.

        Errors: StoreUnavailableError.
        """
        with self._store.read() as connection:
            due = connection.scalars(_DUE, {"now": self._clock()}).all()
        for node_id in due:
            for step in self.advance(node_id):
                self._log.info("maintenance goes on", node_id=node_id, step=step.name.lower())

    def advance(self, node_id: str) -> list[Step]:
        """Do what is due now about one node, and give it; nothing where it is not in drain or maintenance.

        Errors: StoreUnavailableError.
        """
        taken: list[Step] = []
        for _ in range(_STEPS):
            now = self._clock()
            with self._store.read() as connection:
                situation = read_situation(connection, self._settings, node_id)
            step = None if situation is None else next_step(situation, now)
            if step is None or not self._take(node_id, step, now):
                break
            taken.append(step)
        return taken

    def _take(self, node_id: str, step: Step, now: datetime) -> bool:
        """Take one step, if it is still the one to take; False if there is nothing to be done now after all."""
        if step is Step.CHECK and self._jobs is not None:
            on_its_way = node_id in self._jobs.active_nodes(JobAction.CHECK, JobAction.REGISTER)
            if on_its_way:
                return False
        proposals: tuple[dict[str, Any], ...] | None = None
        try:
            if step in {Step.TELL, Step.PROPOSE}:
                proposals = self._propose(node_id)
            with self._store.write() as connection:
                node = node_admin.lock(connection, node_id)
                situation = read_situation(connection, self._settings, node_id)
                if situation is None or next_step(situation, now) is not step:
                    # Somebody else was faster; the next round looks again.
                    return False
                action = _step(connection, node, situation, step, proposals, now)
        except NodeNotFoundError:
            return False
        if action is not None:
            self._submit(action, node_id)
        return True

    def _propose(self, node_id: str) -> tuple[dict[str, Any], ...]:
        return tuple(replacement.as_data() for replacement in self._replacements.of(node_id))

    def _submit(self, action: JobAction, node_id: str) -> None:
        if self._jobs is None:
            return
        try:
            self._jobs.submit(action, [node_id], _REQUESTED_BY)
        except ProblemError as error:
            # The queue is full, or the node was deregistered just now: the next round tries again.
            self._log.warning("a node is not looked at this time", node_id=node_id, reason=error.detail)


def _step(
    connection: sa.Connection,
    node: Standing,
    situation: Situation,
    step: Step,
    proposals: tuple[dict[str, Any], ...] | None,
    now: datetime,
) -> JobAction | None:
    """Take one step in the transaction that holds the node; give what is to be done on the node after it."""
    if step in _OF_DRAIN:
        return _step_of_drain(connection, node, situation, step, proposals, now)
    record, notes = situation.record, situation.record.notes
    action: JobAction | None = JobAction.CHECK
    if step is Step.ASK:
        notes = replace(notes, leaving_for="its time is over", looked_at=now)
        node_admin.write(connection, replace(record, leaving_at=now, notes=notes))
    elif step is Step.CHECK:
        node_admin.write(connection, replace(record, notes=replace(notes, looked_at=now)))
    elif step is Step.LEAVE:
        node_admin.forget(connection, node.node_id)
        after = Admin.CORDONED if record.keep_cordon else Admin.ACTIVE
        node_admin.change(connection, node, after, f"its check passed, {notes.leaving_for}", now)
        # What was concluded before the maintenance is judged anew.
        action = None if situation.state.health is Health.HEALTHY else JobAction.CHECK
    elif step is Step.STAY:
        message = f"it stays in maintenance, its check failed: {judge(situation)}"[:_MAX_REASON_CHARACTERS]
        notes = replace(notes, message=message, retry_at=now + timedelta(seconds=RETRY_SECONDS))
        node_admin.write(connection, replace(record, leaving_at=None, notes=notes))
        action = None
    else:
        raise AssertionError(step)
    return action


def _step_of_drain(
    connection: sa.Connection,
    node: Standing,
    situation: Situation,
    step: Step,
    proposals: tuple[dict[str, Any], ...] | None,
    now: datetime,
) -> JobAction | None:
    record, notes = situation.record, situation.record.notes
    if step in {Step.DRAINED, Step.DEADLINE}:
        _finish_drain(connection, node, situation, step, now)
    elif step is Step.FORGET:
        if record.drains:
            drain_events.tell_end(connection, record, "cancelled", [], now)
        node_admin.forget(connection, node.node_id)
    elif step is Step.OVER:
        why = "the time of the maintenance was over before the node was drained"
        drain_events.tell_end(connection, record, "cancelled", situation.blockers, now, why=why)
        node_admin.forget(connection, node.node_id)
        node_admin.change(connection, node, notes.before, why, now)
    elif step is Step.REFILLED:
        node_admin.write(connection, replace(record, notes=replace(notes, emptied_at=None)))
    elif step in {Step.TELL, Step.PROPOSE}:
        notes = replace(notes, told=situation.held_keys)
        if proposals is not None:
            notes = replace(notes, proposals=proposals, proposed_at=now)
        record = replace(record, notes=notes)
        node_admin.write(connection, record)
        if step is Step.TELL:
            drain_events.tell_progress(connection, record, situation.blockers, now)
    else:
        emptied_at = now if step is Step.EMPTIED else notes.emptied_at
        node_admin.write(connection, replace(record, notes=replace(notes, emptied_at=emptied_at, looked_at=now)))
        return JobAction.GATHER
    return None


def _finish_drain(connection: sa.Connection, node: Standing, situation: Situation, step: Step, now: datetime) -> None:
    record, notes = situation.record, situation.record.notes
    if step is Step.DRAINED:
        record = replace(record, drained_at=now, notes=replace(notes, told=(), proposals=()))
    else:
        told = situation.held_keys
        record = replace(record, notes=replace(notes, gave_up=True, told=told))
    if notes.gave_up:
        # It is in maintenance since its deadline; that it is empty after all is worth telling, and changes nothing.
        drain_events.tell_progress(connection, record, [], now)
    else:
        drain_events.tell_end(connection, record, step.name.lower(), situation.blockers, now)
    if notes.then is Admin.CORDONED and situation.admin is Admin.DRAINING:
        node_admin.forget(connection, node.node_id)
    else:
        node_admin.write(connection, record)
    if situation.admin is Admin.DRAINING:
        why = (
            "drained"
            if step is Step.DRAINED
            else f"its deadline passed, still there: {drain_events.named(situation.blockers)}"
        )
        reason = f"{record.reason} ({why})" if record.reason else why
        node_admin.change(connection, node, notes.then, reason[:_MAX_REASON_CHARACTERS], now)


_table = tables.maintenances.c
_DUE = (
    sa.select(_table.node_id)
    .where(
        sa.or_(
            sa.and_(_table.drain, _table.drained_at.is_(None)),
            _table.leaving_at.is_not(None),
            _table.until <= sa.bindparam("now", type_=tables.maintenances.c.until.type),
        )
    )
    .order_by(_table.node_id)
)
