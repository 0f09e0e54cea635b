# SPDX-License-Identifier: GPL-3.0-or-later
"""What the owners of a node's work are told of its drain: that it began, how it goes, how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from node_manager.drain_blockers import Blocker, BlockerKind, Situation
from node_manager.events import EventType, emit
from node_manager.node_admin import Record
from node_manager.views import render_time


def tell_start(connection: sa.Connection, record: Record, situation: Situation, now: datetime) -> None:
    """Ask the owners to move what they have on the node."""
    held = situation.held
    data = {
        **_drain_data(record),
        "allocations": [
            {"allocation_id": item.allocation_id, "owner": item.owner, "deployment_id": item.deployment_id}
            for item in situation.allocations
        ],
        "deployments": sorted({item.deployment_id for item in held if item.deployment_id is not None}),
        "workloads": [
            {
                "container": item.container,
                "allocation_id": item.allocation_id,
                "deployment_id": item.deployment_id,
                "owner": item.owner,
            }
            for item in held
            if item.kind is BlockerKind.WORKLOAD
        ],
        "replacements": list(record.notes.proposals),
    }
    emit(connection, EventType.DRAIN_STARTED, record.node_id, now, data)


def tell_progress(connection: sa.Connection, record: Record, blockers: Sequence[Blocker], now: datetime) -> None:
    """Tell the owners what is still there, and where it could go."""
    data = {
        **_drain_data(record),
        "blockers": [_blocker_data(blocker) for blocker in blockers],
        "replacements": list(record.notes.proposals),
    }
    emit(connection, EventType.DRAIN_PROGRESSED, record.node_id, now, data)


def tell_end(
    connection: sa.Connection,
    record: Record,
    outcome: str,
    blockers: Sequence[Blocker],
    now: datetime,
    *,
    by: str | None = None,
    why: str | None = None,
) -> None:
    """Tell the owners that a drain is over: drained, deadline, cancelled or skipped."""
    data = {
        **_drain_data(record),
        "outcome": outcome,
        "ended_by": by,
        "message": why,
        "blockers": [_blocker_data(blocker) for blocker in blockers],
    }
    emit(connection, EventType.DRAIN_ENDED, record.node_id, now, data)


def _drain_data(record: Record) -> dict[str, Any]:
    return {
        "reason": record.reason,
        "requested_by": record.requested_by,
        "then": record.notes.then.value,
        "deadline_at": render_time(record.deadline_at),
        "until": render_time(record.until),
    }


def _blocker_data(blocker: Blocker) -> dict[str, Any]:
    return {
        "kind": blocker.kind.value,
        "allocation_id": blocker.allocation_id,
        "container": blocker.container,
        "deployment_id": blocker.deployment_id,
        "owner": blocker.owner,
        "since": render_time(blocker.since),
        "message": blocker.message,
    }


def named(blockers: Sequence[Blocker]) -> str:
    """Name the first few of what is still there."""
    names = [
        f"{item.kind.value} {item.container or item.allocation_id}"
        for item in blockers
        if item.container or item.allocation_id
    ]
    shown = ", ".join(names[:5]) or "nobody could look"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
