# SPDX-License-Identifier: GPL-3.0-or-later
"""The feed of changed nodes: whoever changes what selection looks at notes it here, in the same transaction.

One row per node, so it never grows. A mark is not a place in a log: a reader takes all marks from its own on, and may meet a
node twice, never miss one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from node_manager.store import tables


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
    statement = _UPSERTS[connection.dialect.name]
    noted = {"mark": mark, "writer": writer, "seen": seen}
    connection.execute(statement, [{"node_id": node_id, **noted} for node_id in rows])
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


def _upsert(dialect_insert: type[sqlite.Insert] | type[postgresql.Insert]) -> sa.Insert:
    there = tables.node_changes.c
    statement = dialect_insert(tables.node_changes).values(
        node_id=sa.bindparam("node_id"), mark=sa.bindparam("mark"), writer=sa.bindparam("writer")
    )
    new = statement.excluded
    known = sa.or_(there.mark < sa.bindparam("seen", type_=sa.BigInteger), there.writer == new.writer)
    return statement.on_conflict_do_update(
        index_elements=["node_id"], set_={"mark": new.mark, "writer": sa.case((known, new.writer), else_=None)}
    )


_UPSERTS = {"sqlite": _upsert(sqlite.Insert), "postgresql": _upsert(postgresql.Insert)}
