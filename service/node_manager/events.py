# SPDX-License-Identifier: GPL-3.0-or-later
"""Write events into the outbox, in the transaction of the change they tell of, and read them back."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from node_manager.store import tables


class EventType(StrEnum):
    """The events there are; the part before the last dot names the topic."""

    NODE_REGISTERED = "node.lifecycle.registered"
    NODE_UPDATED = "node.lifecycle.updated"
    NODE_DEREGISTERED = "node.lifecycle.deregistered"
    NODE_ADMIN_CHANGED = "node.lifecycle.admin_changed"
    HOST_KEYS_PINNED = "node.lifecycle.host_keys_pinned"
    HEALTH_CHANGED = "node.health.changed"

    @property
    def topic(self) -> str:
        """Name the topic, without prefix and version."""
        return self.value.rpartition(".")[0]


def emit(connection: sa.Connection, event: EventType, node_id: str, at: datetime, data: dict[str, Any]) -> None:
    """Add one event to the outbox."""
    connection.execute(
        tables.outbox.insert(),
        {
            "event_id": str(uuid.uuid4()),
            "topic": event.topic,
            "type": event.value,
            "node_id": node_id,
            "occurred_at": at,
            "data": data,
        },
    )


def of_node(connection: sa.Connection, node_id: str, limit: int, before: int | None) -> list[sa.Row[Any]]:
    """Read a node's events, newest first, those with a sequence below *before*."""
    query = sa.select(tables.outbox).where(tables.outbox.c.node_id == node_id)
    if before is not None:
        query = query.where(tables.outbox.c.sequence < before)
    return list(connection.execute(query.order_by(tables.outbox.c.sequence.desc()).limit(limit)))
