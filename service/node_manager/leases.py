# SPDX-License-Identifier: GPL-3.0-or-later
"""Rows that say who does something now, and until when.

Touches the leases table inside the caller's transaction: the row's holder and expiry are compared and set in one
statement, so that of two managers one gets it. Managers on several machines need clocks that agree within seconds.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from node_manager.store import tables


def acquire(connection: sa.Connection, name: str, holder: str, now: datetime, seconds: float) -> bool:
    """Take or renew the lease *name*; False while somebody else holds it."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(tables.leases)
    statement = statement.values(name=name, holder=holder, expires_at=now + timedelta(seconds=seconds))
    statement = statement.on_conflict_do_update(
        index_elements=["name"],
        set_={"holder": statement.excluded.holder, "expires_at": statement.excluded.expires_at},
        where=(tables.leases.c.holder == holder) | (tables.leases.c.expires_at <= now),
    )
    # Not rowcount: for inserts the drivers don't agree on what it means.
    return connection.scalar(statement.returning(tables.leases.c.name)) is not None


def renew(connection: sa.Connection, name: str, holder: str, now: datetime, seconds: float) -> bool:
    """Prolong a lease that is held; False if it was taken away."""
    statement = tables.leases.update().where(tables.leases.c.name == name, tables.leases.c.holder == holder)
    return connection.execute(statement, {"expires_at": now + timedelta(seconds=seconds)}).rowcount == 1


def release(connection: sa.Connection, name: str, holder: str) -> None:
    """Give a lease back; nothing happens if somebody else holds it."""
    connection.execute(tables.leases.delete().where(tables.leases.c.name == name, tables.leases.c.holder == holder))


def live(connection: sa.Connection, prefix: str, now: datetime) -> set[str]:
    """Tell who holds a lease, of those whose name begins with *prefix*, that has not run out."""
    query = sa.select(tables.leases.c.holder).where(
        tables.leases.c.name.startswith(prefix, autoescape=True), tables.leases.c.expires_at > now
    )
    return set(connection.scalars(query))


def sweep(connection: sa.Connection, prefix: str, before: datetime) -> None:
    """Forget the leases, of those whose name begins with *prefix*, that ran out before *before*."""
    connection.execute(
        tables.leases.delete().where(
            tables.leases.c.name.startswith(prefix, autoescape=True), tables.leases.c.expires_at < before
        )
    )
