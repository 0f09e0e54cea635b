# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator's word on a node's status leads to: which statuses follow each other, and what is refused.

Works in the transaction of the caller, which holds the node's row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, assert_never

import sqlalchemy as sa

from node_manager import drain_events, node_admin
from node_manager.domain import Admin, JobAction
from node_manager.drain_blockers import Situation, read_situation
from node_manager.node_admin import Notes, Record, Standing
from node_manager.problems import ConflictError, InvalidInputError
from node_manager.settings import Settings


@dataclass(frozen=True)
class StatusRequest:
    """What somebody wants a node's status to be; the meaning of each key is that of PUT /nodes/{node_id}/status."""

    status: Admin
    drain: bool = False
    deadline_seconds: float | None = None
    reason: str = ""
    until: datetime | None = None
    keep_cordon: bool | None = None
    force: bool = False


@dataclass(frozen=True)
class Work:
    """One request in its transaction."""

    connection: sa.Connection
    node: Standing
    record: Record | None
    wanted: StatusRequest
    requested_by: str
    proposals: tuple[dict[str, Any], ...]
    now: datetime


def check_request(wanted: StatusRequest, now: datetime) -> None:
    """Refuse what makes no sense for any node.

    Errors: InvalidInputError.
    """
    status = wanted.status
    drains = status in {Admin.MAINTENANCE, Admin.CORDONED}
    if wanted.drain and not drains:
        raise InvalidInputError("drain", "goes with status maintenance or cordoned; status active cancels a drain")
    if wanted.deadline_seconds is not None and not wanted.drain:
        raise InvalidInputError(
            "deadline_seconds", "limits a drain; send drain: true with it, or until for the maintenance to end"
        )
    if wanted.until is not None and status is not Admin.MAINTENANCE:
        raise InvalidInputError("until", "goes with status maintenance: it says when that ends by itself")
    if wanted.keep_cordon is not None and status not in {Admin.MAINTENANCE, Admin.ACTIVE}:
        raise InvalidInputError("keep_cordon", "goes with status maintenance, or active to end one")
    if wanted.force and status not in {Admin.MAINTENANCE, Admin.ACTIVE}:
        raise InvalidInputError(
            "force", "goes with status active, to leave unchecked, or maintenance, to take over another operator's"
        )
    if wanted.until is not None and wanted.until <= now:
        raise InvalidInputError("until", "is in the past; send a later time, or leave it out to end it by hand")
    deadline_at = _deadline(wanted, now)
    if wanted.until is not None and deadline_at is not None and deadline_at >= wanted.until:
        raise InvalidInputError("deadline_seconds", "is not over before until: no time would be left for the work")


def apply(settings: Settings, work: Work) -> JobAction | None:
    """Do what is wanted, in its transaction; give what is to be done on the node after it.

    Errors: InvalidInputError; ConflictError where another operator holds the node.
    """
    match work.wanted.status:
        case Admin.ACTIVE:
            node_admin.forget_repairs(work.connection, work.node.node_id)
            return _activate(work)
        case Admin.CORDONED:
            return _cordon(settings, work)
        case Admin.MAINTENANCE:
            return _maintain(settings, work)
        case Admin.OFFLINE:
            _set_plainly(work, Admin.OFFLINE)
            return None
        case Admin.DRAINING:
            raise InvalidInputError("status", "expected maintenance or cordoned with drain: true")
        case _:
            assert_never(work.wanted.status)


def _deadline(wanted: StatusRequest, now: datetime) -> datetime | None:
    return None if wanted.deadline_seconds is None else now + timedelta(seconds=wanted.deadline_seconds)


def _activate(work: Work) -> JobAction | None:
    node, wanted = work.node, work.wanted
    if node.admin is Admin.DRAINING and work.record is not None:
        back_to = Admin.CORDONED if wanted.keep_cordon else work.record.notes.before
        drain_events.tell_end(work.connection, work.record, "cancelled", [], work.now, by=work.requested_by)
        node_admin.forget(work.connection, node.node_id)
        node_admin.change(work.connection, node, back_to, wanted.reason or "the drain was cancelled", work.now)
        return None
    if node.admin is not Admin.MAINTENANCE:
        if wanted.keep_cordon:
            raise InvalidInputError("keep_cordon", "the node is not in maintenance; send status cordoned")
        _set_plainly(work, Admin.ACTIVE)
        return None
    record = work.record or Record(node.node_id, "", "", work.now)
    keep_cordon = record.keep_cordon if wanted.keep_cordon is None else wanted.keep_cordon
    if wanted.force:
        if record.drains:
            drain_events.tell_end(work.connection, record, "cancelled", [], work.now, by=work.requested_by)
        node_admin.forget(work.connection, node.node_id)
        told = f"{work.requested_by} ended it without a check"
        after = Admin.CORDONED if keep_cordon else Admin.ACTIVE
        node_admin.change(work.connection, node, after, f"{told}: {wanted.reason}" if wanted.reason else told, work.now)
        return JobAction.CHECK
    if record.leaving_at is not None and record.keep_cordon == keep_cordon:
        return None
    if record.drains:
        drain_events.tell_end(work.connection, record, "cancelled", [], work.now, by=work.requested_by)
        record = replace(record, drain=False, deadline_at=None)
    notes = replace(
        record.notes, leaving_for=f"asked for by {work.requested_by}", message="", retry_at=None, looked_at=work.now
    )
    node_admin.write(
        work.connection,
        replace(record, keep_cordon=keep_cordon, leaving_at=record.leaving_at or work.now, notes=notes),
    )
    node_admin.change(work.connection, node, node.admin, "", work.now)
    return JobAction.CHECK


def _cordon(settings: Settings, work: Work) -> JobAction | None:
    node = work.node
    if not work.wanted.drain:
        _set_plainly(work, Admin.CORDONED)
        return None
    if node.admin is Admin.MAINTENANCE:
        raise ConflictError(
            f"node {node.node_id!r} is in maintenance; status maintenance with drain: true drains it there",
            node_id=node.node_id,
        )
    if node.admin is Admin.DRAINING:
        return _hold_on(settings, work, Admin.CORDONED)
    return _begin(settings, work, Admin.CORDONED)


def _maintain(settings: Settings, work: Work) -> JobAction | None:
    if work.node.admin in {Admin.DRAINING, Admin.MAINTENANCE} and work.record is not None:
        return _hold_on(settings, work, Admin.MAINTENANCE)
    return _begin(settings, work, Admin.MAINTENANCE)


def _begin(settings: Settings, work: Work, then: Admin) -> JobAction | None:
    node, wanted, now = work.node, work.wanted, work.now
    keep_cordon = node.admin is Admin.CORDONED if wanted.keep_cordon is None else wanted.keep_cordon
    # Declared as in maintenance before such things were recorded: then it only gets its record.
    before = Admin.ACTIVE if node.admin is Admin.MAINTENANCE else node.admin
    notes = Notes(before=before, then=then)
    record = Record(
        node.node_id, wanted.reason, work.requested_by, now, until=wanted.until, keep_cordon=keep_cordon, notes=notes
    )
    after = Admin.DRAINING if wanted.drain and node.admin is not Admin.MAINTENANCE else Admin.MAINTENANCE
    action = None
    if wanted.drain:
        action = _start_drain(settings, work, record)
    else:
        node_admin.write(work.connection, record)
    node_admin.change(work.connection, node, after, wanted.reason, now)
    return action


def _hold_on(settings: Settings, work: Work, then: Admin) -> JobAction | None:
    """Change a drain or maintenance that is under way."""
    node, wanted, record, now = work.node, work.wanted, work.record, work.now
    assert record is not None
    if record.requested_by not in {"", work.requested_by} and not wanted.force:
        raise ConflictError(
            f"node {node.node_id!r} is held by {record.requested_by!r} since {record.started_at.isoformat()} "
            f"({record.reason or 'no reason given'}); agree with them, or take it over with force: true",
            node_id=node.node_id,
            requested_by=record.requested_by,
            started_at=record.started_at.isoformat(),
            reason=record.reason,
        )
    new = replace(
        record,
        reason=wanted.reason or record.reason,
        requested_by=work.requested_by,
        until=wanted.until,
        keep_cordon=record.keep_cordon if wanted.keep_cordon is None else wanted.keep_cordon,
        leaving_at=None,
        notes=replace(record.notes, then=then, leaving_for="", message="", retry_at=None),
    )
    after, action = node.admin, None
    if wanted.drain and record.drains:
        new = replace(new, deadline_at=_deadline(wanted, now))
        node_admin.write(work.connection, new)
        if new.deadline_at != record.deadline_at:
            situation = _situation(settings, work.connection, node.node_id)
            drain_events.tell_progress(work.connection, new, situation.blockers, now)
    elif wanted.drain and not _is_still_empty(settings, work.connection, record):
        action = _start_drain(settings, work, replace(new, drained_at=None))
    else:
        if record.drains and not wanted.drain:
            situation = _situation(settings, work.connection, node.node_id)
            drain_events.tell_end(work.connection, record, "skipped", situation.blockers, now, by=work.requested_by)
        if not wanted.drain:
            new = replace(new, drain=record.drain and record.drained_at is not None, deadline_at=None)
        node_admin.write(work.connection, new)
        after = then
    if after is not node.admin or new != record:
        node_admin.change(work.connection, node, after, new.reason, now)
    return action


def _set_plainly(work: Work, admin: Admin) -> None:
    if work.node.admin is admin:
        return
    if work.record is not None and work.record.drains:
        drain_events.tell_end(work.connection, work.record, "cancelled", [], work.now, by=work.requested_by)
    node_admin.forget(work.connection, work.node.node_id)
    node_admin.change(work.connection, work.node, admin, work.wanted.reason, work.now)


def _start_drain(settings: Settings, work: Work, record: Record) -> JobAction | None:
    """Ask the owners to move what they have there; give what is to be looked at."""
    now = work.now
    notes = replace(record.notes, gave_up=False, emptied_at=None, proposals=work.proposals, proposed_at=now)
    record = replace(record, drain=True, deadline_at=_deadline(work.wanted, now), notes=notes)
    node_admin.write(work.connection, record)
    situation = _situation(settings, work.connection, record.node_id)
    if not situation.allocations:
        notes = replace(notes, emptied_at=now, looked_at=now)
    node_admin.write(work.connection, replace(record, notes=replace(notes, told=situation.held_keys)))
    drain_events.tell_start(work.connection, record, situation, now)
    return None if situation.allocations else JobAction.GATHER


def _situation(settings: Settings, connection: sa.Connection, node_id: str) -> Situation:
    situation = read_situation(connection, settings, node_id)
    assert situation is not None
    return situation


def _is_still_empty(settings: Settings, connection: sa.Connection, record: Record) -> bool:
    """Tell whether a node that was drained has stayed so."""
    if record.drained_at is None:
        return False
    node_admin.write(connection, replace(record, drained_at=None))
    empty = not _situation(settings, connection, record.node_id).held
    node_admin.write(connection, record)
    return empty
