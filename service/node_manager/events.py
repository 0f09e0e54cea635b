# SPDX-License-Identifier: GPL-3.0-or-later
"""Write events into the outbox, in the transaction of the change they tell of, and read them back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa

from node_manager.ids import ordered_ids
from node_manager.store import tables
from node_manager.store.bulk import BulkInsert


class EventType(StrEnum):
    """The events there are; the part before the last dot names the topic."""

    NODE_REGISTERED = "node.lifecycle.registered"
    NODE_UPDATED = "node.lifecycle.updated"
    NODE_DEREGISTERED = "node.lifecycle.deregistered"
    NODE_ADMIN_CHANGED = "node.lifecycle.admin_changed"
    HOST_KEYS_PINNED = "node.lifecycle.host_keys_pinned"
    # A drain: asked for, its workloads as they are now, and done; owners are expected to move what they have there.
    DRAIN_STARTED = "node.lifecycle.drain_started"
    DRAIN_PROGRESSED = "node.lifecycle.drain_progressed"
    DRAIN_ENDED = "node.lifecycle.drain_ended"
    HEALTH_CHANGED = "node.health.changed"
    # A lost node: what ran there and where it could go; then that its allocations were taken from it.
    NODE_LOST = "node.health.lost"
    NODE_RECLAIMED = "node.health.reclaimed"
    GHOSTS_FOUND = "node.health.ghosts_found"
    RECOVERY_STARTED = "recovery.started"
    RECOVERY_STEP_ENDED = "recovery.step_ended"
    RECOVERY_ENDED = "recovery.ended"
    # The guard of a zone or of the fleet; "node_id" of these is the scope.
    GUARD_CHANGED = "recovery.guard_changed"
    ALLOCATION_RESERVED = "allocation.reserved"
    ALLOCATION_CONFIRMED = "allocation.confirmed"
    ALLOCATION_RELEASED = "allocation.released"
    # What became of a command; "node_id" of these is the node or the deployment that it was about.
    COMMAND_DONE = "commands.answer.done"
    COMMAND_FAILED = "commands.answer.failed"

    @property
    def topic(self) -> str:
        """Name the topic, without prefix and version."""
        return self.value.rpartition(".")[0]


_TOPICS = {event: event.topic for event in EventType}
_INSERT = BulkInsert(tables.outbox, "event_id", "topic", "type", "node_id", "occurred_at", "data", "causation_id")
# The command that the work under way was asked for by.
_CAUSE: ContextVar[str | None] = ContextVar("cause", default=None)


class NewEvent(NamedTuple):
    """One event to be written."""

    event: EventType
    node_id: str
    at: datetime
    data: dict[str, Any]


def emit(connection: sa.Connection, event: EventType, node_id: str, at: datetime, data: dict[str, Any]) -> None:
    """Add one event to the outbox."""
    emit_all(connection, [NewEvent(event, node_id, at, data)])


def emit_all(connection: sa.Connection, found: Sequence[NewEvent]) -> None:
    """Add events to the outbox, in their order."""
    cause = _CAUSE.get()
    _INSERT(
        connection,
        [
            (event_id, _TOPICS[new.event], new.event.value, new.node_id, new.at, new.data, cause)
            for event_id, new in zip(ordered_ids(len(found)), found, strict=True)
        ],
    )


@contextmanager
def caused_by(command_id: str) -> Iterator[None]:
    """Have all events that are written inside name the command that they follow from."""
    token = _CAUSE.set(command_id)
    try:
        yield
    finally:
        _CAUSE.reset(token)


def of_node(connection: sa.Connection, node_id: str, limit: int, before: int | None) -> list[sa.Row[Any]]:
    """Read a node's events, newest first, those with a sequence below *before*."""
    query = sa.select(tables.outbox).where(tables.outbox.c.node_id == node_id)
    if before is not None:
        query = query.where(tables.outbox.c.sequence < before)
    return list(connection.execute(query.order_by(tables.outbox.c.sequence.desc()).limit(limit)))
