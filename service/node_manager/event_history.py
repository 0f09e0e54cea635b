# SPDX-License-Identifier: GPL-3.0-or-later
"""Read events that are in the outbox already, a page at a time, and only those that somebody wants.

Reads the store and decides nothing about who gets them; the reader of what is new is outbox.OutboxReader.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import sqlalchemy as sa

from node_manager import outbox
from node_manager.outbox import StoredEvent
from node_manager.store import Store, tables

# What one query may look through, so that a filter that matches nothing doesn't keep a connection for long.
_MAX_SCANNED = 20_000
# The last number given, whatever became of it; the table may be empty.
_LAST_WRITTEN = sa.text("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'")
# On PostgreSQL numbers are taken before the commit, but not before this lock, which is held until then.
_WRITERS = sa.text(
    "SELECT count(*) FROM pg_locks WHERE locktype = 'relation' AND mode = 'RowExclusiveLock'"
    " AND relation = to_regclass('outbox')"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
_LAST_TAKEN = sa.text("SELECT pg_sequence_last_value(pg_get_serial_sequence('outbox', 'sequence')::regclass)")
_TRIES = 20
_TRY_SECONDS = 0.01
# Where somebody always writes: no transaction of ours is open for longer than this.
_UNSETTLED = timedelta(seconds=60)
_MAX_UNSETTLED_EVENTS = 20_000

_table = tables.outbox.c


@dataclass(frozen=True)
class EventFilter:
    """Which events are wanted: of any of the types, and of any of the topics, and of any of the nodes; empty: of all."""

    types: frozenset[str] = frozenset()
    topics: frozenset[str] = frozenset()
    node_ids: frozenset[str] = frozenset()

    def matches(self, event: StoredEvent) -> bool:
        """Tell whether *event* is wanted."""
        return (
            (not self.types or event.type in self.types)
            and (not self.topics or event.topic in self.topics)
            and (not self.node_ids or event.node_id in self.node_ids)
        )

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """Say the same in SQL."""
        pairs = ((_table.type, self.types), (_table.topic, self.topics), (_table.node_id, self.node_ids))
        return [column.in_(sorted(wanted)) for column, wanted in pairs if wanted]


class Page(NamedTuple):
    """Events in their order, and the number up to which all were looked at."""

    events: Sequence[StoredEvent]
    reached: int


def read_page(store: Store, wanted: EventFilter, after: int, up_to: int, size: int) -> Page:
    """Read up to *size* wanted events numbered above *after* and up to *up_to*.

    Errors: StoreUnavailableError.
    """
    with store.read() as connection:
        first = connection.scalar(sa.select(sa.func.min(_table.sequence)).where(_table.sequence > after))
        if first is None or first > up_to:
            return Page((), max(after, up_to))
        last = min(up_to, first - 1 + _MAX_SCANNED)
        query = sa.select(tables.outbox).where(_table.sequence.between(first, last), *wanted.conditions())
        rows = connection.execute(query.order_by(_table.sequence).limit(size))
        events = [StoredEvent._make(row) for row in rows]
    return Page(events, events[-1].sequence if len(events) == size else last)


def oldest(store: Store) -> int | None:
    """Give the lowest number that is still there.

    Errors: StoreUnavailableError.
    """
    with store.read() as connection:
        found: int | None = connection.scalar(sa.select(sa.func.min(_table.sequence)))
    return found


def settled_position(store: Store, now: datetime) -> int:
    """Give a number up to which no event can appear any more; who wants all that comes from now on reads from there.

    Errors: StoreUnavailableError.
    """
    if store.dialect == "sqlite":
        with store.read() as connection:
            return int(connection.scalar(_LAST_WRITTEN) or 0)
    for _ in range(_TRIES):
        with store.read() as connection:
            last_taken = connection.scalar(_LAST_TAKEN) or 0
            if connection.scalar(_WRITERS) == 0:
                return int(last_taken)
        time.sleep(_TRY_SECONDS)
    newest = outbox.newest(store)
    floor = max(0, newest - _MAX_UNSETTLED_EVENTS)
    query = (
        sa.select(_table.sequence)
        .where(_table.sequence > floor, _table.occurred_at < now - _UNSETTLED)
        .order_by(_table.sequence.desc())
        .limit(1)
    )
    with store.read() as connection:
        return connection.scalar(query) or floor
