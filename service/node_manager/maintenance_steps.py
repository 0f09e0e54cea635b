# SPDX-License-Identifier: GPL-3.0-or-later
"""What is to be done next about a node in drain or maintenance. Pure: the situation and the time in, one step out."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import Enum, auto

from node_manager.domain import Admin
from node_manager.drain_blockers import Situation, judge

# Between two looks that are asked for on account of one node; a job that is on its way is not joined by a second one.
LOOK_SECONDS = 30.0
CHECK_SECONDS = 15.0
# Between two times that owners' proposals are worked out, and that a node past its `until` is tried.
PROPOSE_SECONDS = 60.0
RETRY_SECONDS = 60.0


class Step(Enum):
    """What there is to do."""

    # It takes part again, set by somebody who knows nothing of maintenance.
    FORGET = auto()
    # Of a drain.
    DRAINED = auto()
    DEADLINE = auto()
    OVER = auto()
    EMPTIED = auto()
    REFILLED = auto()
    TELL = auto()
    PROPOSE = auto()
    LOOK = auto()
    # Of a maintenance.
    ASK = auto()
    LEAVE = auto()
    STAY = auto()
    CHECK = auto()


def next_step(situation: Situation, now: datetime) -> Step | None:
    """Tell what is to be done now; None: wait."""
    if situation.admin not in {Admin.DRAINING, Admin.MAINTENANCE}:
        return Step.FORGET
    record = situation.record
    over = record.until is not None and record.until <= now
    if situation.admin is Admin.DRAINING and over:
        return Step.OVER
    if record.drain and record.drained_at is None:
        step = _of_drain(situation, now)
        if step is not None:
            return step
    if situation.admin is Admin.DRAINING:
        return None
    if record.leaving_at is not None:
        found = judge(situation)
        if found is not None:
            return Step.STAY if found else Step.LEAVE
        return Step.CHECK if _is_due(record.notes.looked_at, CHECK_SECONDS, now) else None
    if over and (record.notes.retry_at is None or record.notes.retry_at <= now):
        return Step.ASK
    return None


def _of_drain(situation: Situation, now: datetime) -> Step | None:
    record, notes = situation.record, situation.record.notes
    blockers = situation.blockers
    # Empty at a glance is not enough: that it is so must have been seen after the last allocation was gone.
    if not blockers and notes.emptied_at is not None:
        return Step.DRAINED
    if record.drains and record.deadline_at is not None and record.deadline_at <= now:
        return Step.DEADLINE
    allocations = situation.allocations
    if not allocations and notes.emptied_at is None:
        return Step.EMPTIED
    if allocations and notes.emptied_at is not None:
        return Step.REFILLED
    if situation.held_keys != notes.told:
        return Step.TELL
    if allocations and record.drains and _is_due(notes.proposed_at, PROPOSE_SECONDS, now):
        return Step.PROPOSE
    seen_at = situation.look.observed_at if situation.look is not None else None
    if not allocations and _is_due(notes.looked_at, LOOK_SECONDS, now) and _is_due(seen_at, LOOK_SECONDS, now):
        return Step.LOOK
    return None


def _is_due(last: datetime | None, seconds: float, now: datetime) -> bool:
    # A clock that was set back must not stop everything until it has caught up.
    return last is None or now >= last + timedelta(seconds=seconds) or now < last - timedelta(seconds=seconds)
