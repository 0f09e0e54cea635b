# SPDX-License-Identifier: GPL-3.0-or-later
"""The feed of changed nodes: whoever changes what selection looks at notes it here, in the same transaction.

One row per node, so it never grows. A mark is not a place in a log: a reader takes all marks from its own on, and may meet a
node twice, never miss one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import sqlalchemy as sa

from node_manager.store import tables
from node_manager.store.bulk import TextList


class Change(NamedTuple):
    """One node that changed (or is gone); with a writer, the writer's own picture lacks nothing of it."""

    node_id: str
    mark: int
    writer: str | None


def note(connection: sa.Connection, node_ids: Iterable[str], writer: str | None = None, seen: int = 0) -> int | None:
    """Note that nodes changed; give the mark, None if there were none.

    Shapes: *writer* is who already has the change in its own picture, of all others that from before *seen*, a mark to
        read from. What somebody else noted since then is in the same row, so the row then names no writer.
    """
    rows = sorted(set(node_ids))
    if not rows:
        return None
    mark = _next_mark(connection)
    noted = {"mark": mark, "writer": writer, "seen": seen}
    connection.execute(_UPSERTS[connection.dialect.name], {"node_ids": rows, **noted})
    return mark


def read(connection: sa.Connection, since: int) -> tuple[list[Change], int]:
    """Give the changes with a mark of *since* or later, and the mark to read from next time."""
    if connection.dialect.name == "sqlite":
        # One writer at a time: marks are committed in their order.
        following = _highest(connection) + 1
    else:
        # All transactions before this one have ended: what they noted is visible now.
        following = int(connection.scalar(sa.text("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint")) or 0)
    return [Change._make(row) for row in connection.execute(_READ, {"since": since})], following


def _highest(connection: sa.Connection) -> int:
    return int(connection.scalar(_HIGHEST) or 0)


def _next_mark(connection: sa.Connection) -> int:
    if connection.dialect.name == "sqlite":
        return _highest(connection) + 1
    return int(connection.scalar(sa.text("SELECT pg_current_xact_id()::text::bigint")) or 0)


_HIGHEST = sa.select(sa.func.max(tables.node_changes.c.mark))
_READ = sa.select(tables.node_changes.c.node_id, tables.node_changes.c.mark, tables.node_changes.c.writer).where(
    tables.node_changes.c.mark >= sa.bindparam("since")
)


# All in one statement; without a condition SQLite would take ON for that of a join.
_UPSERT = """
    INSERT INTO node_changes (node_id, mark, writer)
    SELECT value, :mark, :writer FROM {listed} WHERE true
    ON CONFLICT (node_id) DO UPDATE SET
        mark = excluded.mark,
        writer = CASE WHEN node_changes.mark < :seen OR node_changes.writer = excluded.writer THEN excluded.writer END
"""
_UPSERTS = {
    dialect: sa.text(_UPSERT.format(listed=listed)).bindparams(
        sa.bindparam("node_ids", type_=TextList),
        sa.bindparam("mark", type_=sa.BigInteger),
        sa.bindparam("writer", type_=sa.String),
        sa.bindparam("seen", type_=sa.BigInteger),
    )
    for dialect, listed in {
        "sqlite": "json_each(:node_ids)",
        "postgresql": "unnest(:node_ids) AS given (value)",
    }.items()
}
