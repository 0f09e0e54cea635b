# SPDX-License-Identifier: GPL-3.0-or-later
"""Read the outbox as a stream: in order, each event once, and a position to go on from after a restart.

Decides nothing about who gets the events. On PostgreSQL transactions number their events before they commit, so an event may
appear below others that were read already; the reader remembers the numbers it has not seen until they can't come any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa

from node_manager.store import Store, tables

# The reader that has to have seen an event before it may be forgotten.
KAFKA = "kafka"

# Between taking a number and being seen as a transaction at all, PostgreSQL needs microseconds.
_GAP_SECONDS = 5.0
_SNAPSHOT = sa.text(
    "SELECT pg_snapshot_xmin(snapshot)::text::bigint, pg_snapshot_xmax(snapshot)::text::bigint"
    " FROM pg_current_snapshot() AS snapshot"
)
_table = tables.outbox.c
_READ = sa.select(tables.outbox).order_by(_table.sequence).limit(sa.bindparam("size"))
_READ_NEW = _READ.where(_table.sequence > sa.bindparam("top"))


class StoredEvent(NamedTuple):
    """An event as the outbox has it, in the order of its columns."""

    sequence: int
    event_id: str
    topic: str
    type: str
    node_id: str
    occurred_at: datetime
    data: dict[str, Any]
    causation_id: str | None


class _Gap(NamedTuple):
    """Numbers that were not there when higher ones were, and when they can't come any more."""

    first: int
    last: int
    after_transaction: int
    after_seconds: float


class OutboxReader:
    """Reads on from a position; for one thread."""

    def __init__(self, store: Store, position: int, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Begin after *position*, which is a reader's *position* of before, or 0."""
        self._store = store
        self._monotonic = monotonic
        self._top = position
        self._gaps: list[_Gap] = []

    @property
    def position(self) -> int:
        """Give the number up to which everything was read: who goes on from there misses nothing, and may meet some twice."""
        return self._gaps[0].first - 1 if self._gaps else self._top

    def read(self, size: int) -> list[StoredEvent]:
        """Give up to *size* events that were not read yet, those of one node in the order of their changes.

        Errors: StoreUnavailableError; nothing was read then.
        """
        if self._store.dialect == "sqlite":
            # One writer at a time: numbers are committed in their order.
            with self._store.read() as connection:
                found = [StoredEvent._make(row) for row in connection.execute(_READ_NEW, self._limits(size))]
            self._top = found[-1].sequence if found else self._top
            return found
        with self._store.read() as connection:
            oldest_running, next_transaction = connection.execute(_SNAPSHOT).one()
            query = _READ_NEW
            if self._gaps:
                within = [_table.sequence.between(gap.first, gap.last) for gap in self._gaps]
                query = _READ.where(sa.or_(_table.sequence > sa.bindparam("top"), *within))
            found = [StoredEvent._make(row) for row in connection.execute(query, self._limits(size))]
        self._note_gaps([event.sequence for event in found], oldest_running, next_transaction, whole=len(found) < size)
        return found

    def _limits(self, size: int) -> dict[str, int]:
        return {"top": self._top, "size": size}

    def _note_gaps(self, read: Sequence[int], oldest_running: int, next_transaction: int, *, whole: bool) -> None:
        now = self._monotonic()
        late = [sequence for sequence in read if sequence <= self._top]
        new = [sequence for sequence in read if sequence > self._top]
        gaps: list[_Gap] = []
        for gap in self._gaps:
            over = gap.after_transaction <= oldest_running and gap.after_seconds <= now
            if over and (whole or (read and gap.last <= read[-1])):
                continue
            gaps.extend(_without(gap, [sequence for sequence in late if gap.first <= sequence <= gap.last]))
        before = self._top
        for sequence in new:
            if sequence > before + 1:
                gaps.append(_Gap(before + 1, sequence - 1, next_transaction, now + _GAP_SECONDS))
            before = sequence
        self._gaps, self._top = gaps, before


def _without(gap: _Gap, sequences: Sequence[int]) -> list[_Gap]:
    """Give what is left of a gap when some of its numbers have come."""
    left = []
    first = gap.first
    for sequence in [*sequences, gap.last + 1]:
        if sequence > first:
            left.append(gap._replace(first=first, last=sequence - 1))
        first = sequence + 1
    return left


def newest(store: Store) -> int:
    """Give the highest number there is, 0 if there is none.

    Errors: StoreUnavailableError.
    """
    with store.read() as connection:
        return int(connection.scalar(sa.select(sa.func.max(_table.sequence))) or 0)


def load_position(store: Store, name: str) -> int:
    """Give the position that a reader saved under *name*, 0 if none did.

    Errors: StoreUnavailableError.
    """
    with store.read() as connection:
        query = sa.select(tables.relay_positions.c.position).where(tables.relay_positions.c.name == name)
        return int(connection.scalar(query) or 0)


def save_position(connection: sa.Connection, name: str, position: int, now: datetime) -> None:
    """Save a position under *name*."""
    table = tables.relay_positions
    values = {"position": position, "updated_at": now}
    if connection.execute(table.update().where(table.c.name == name), values).rowcount == 0:
        connection.execute(table.insert(), {"name": name, **values})


def prune(store: Store, now: datetime, keep: timedelta, up_to: int | None) -> None:
    """Forget events that are older than *keep*, of those numbered *up_to* or lower where that is given.

    Errors: StoreUnavailableError.
    """
    statement = tables.outbox.delete().where(_table.occurred_at < now - keep)
    if up_to is not None:
        statement = statement.where(_table.sequence <= up_to)
    with store.write() as connection:
        connection.execute(statement)


def backlog(store: Store, position: int) -> tuple[int, datetime | None]:
    """Give about how many events are behind *position*, and when the first of them happened.

    Errors: StoreUnavailableError.
    """
    with store.read() as connection:
        first = connection.execute(_READ_NEW, {"top": position, "size": 1}).one_or_none()
        if first is None:
            return 0, None
        last = connection.scalar(sa.select(sa.func.max(_table.sequence)))
        return int(last) - first.sequence + 1, first.occurred_at


def drop_oldest(store: Store, position: int, count: int, now: datetime) -> tuple[int, int]:
    """Delete the first *count* numbers behind *position*; give how many events that were, and the position after them.

    Errors: StoreUnavailableError.
    """
    with store.write() as connection:
        first = connection.execute(_READ_NEW, {"top": position, "size": 1}).one_or_none()
        if first is None:
            return 0, position
        last = first.sequence + count - 1
        statement = tables.outbox.delete().where(_table.sequence > position, _table.sequence <= last)
        dropped = connection.execute(statement).rowcount
        save_position(connection, KAFKA, last, now)
        return dropped, last
