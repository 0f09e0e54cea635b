# SPDX-License-Identifier: GPL-3.0-or-later
"""Quotas: how much of each resource class an owner may have reserved at most.

Set and shown here; the ledger enforces them in the transaction that reserves. A quota below what is used evicts nothing and
stops growth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from node_manager.ledger import Ledger
from node_manager.node_registry import Clock, utc_now
from node_manager.problems import QuotaNotFoundError
from node_manager.resources import COMMON, WHOLE_MILLI, shown
from node_manager.settings import Settings
from node_manager.store import Store, tables

_owners = tables.owners


@dataclass(frozen=True)
class Quota:
    """An owner's limits and use, per resource class; devices in units, with decimals where shared."""

    owner: str
    hard: dict[str, float | int]
    used: dict[str, float | int]


class Quotas:
    """The quotas of one store."""

    def __init__(self, store: Store, settings: Settings, clock: Clock = utc_now) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock

    def get(self, owner: str) -> Quota:
        """Read one quota.

        Errors: QuotaNotFoundError.
        """
        with self._store.read() as connection:
            row = connection.execute(sa.select(_owners).where(_owners.c.owner == owner)).one_or_none()
        if row is None or row.hard is None:
            raise QuotaNotFoundError(
                f"owner {owner!r} has no quota and is not limited; PUT /quotas/{owner} sets one", owner=owner
            )
        return _quota_of_row(row)

    def put(self, owner: str, hard: Mapping[str, int]) -> Quota:
        """Set the limits of an owner: classes left out are not limited; devices in whole units."""
        counted = {name: limit if name in COMMON else limit * WHOLE_MILLI for name, limit in sorted(hard.items())}
        with self._store.write() as connection:
            return _quota_of_row(self._set(connection, owner, counted))

    def delete(self, owner: str) -> bool:
        """Lift the limits of an owner; False if there were none."""
        with self._store.write() as connection:
            hard = connection.scalar(sa.select(_owners.c.hard).where(_owners.c.owner == owner).with_for_update())
            if hard is None:
                return False
            self._set(connection, owner, None)
        return True

    def page(self, limit: int, after: str | None) -> tuple[list[Quota], str | None]:
        """List quotas in the order of their owners, those behind *after*; and what is behind the last, if anything."""
        query = (
            sa.select(_owners)
            .where(_owners.c.owner > (after or ""), _owners.c.hard.is_not(None))
            .order_by(_owners.c.owner)
            .limit(limit + 1)
        )
        with self._store.read() as connection:
            rows = connection.execute(query).all()
        found = [_quota_of_row(row) for row in rows[:limit]]
        return found, found[-1].owner if len(rows) > limit else None

    def _set(self, connection: sa.Connection, owner: str, hard: dict[str, int] | None) -> sa.Row[Any]:
        Ledger(connection, self._settings, self._clock()).hold([owner], [])
        connection.execute(
            _owners.update().where(_owners.c.owner == owner).values(hard=hard, version=_owners.c.version + 1)
        )
        return connection.execute(sa.select(_owners).where(_owners.c.owner == owner)).one()


def _quota_of_row(row: sa.Row[Any]) -> Quota:
    return Quota(row.owner, shown(row.hard), shown(row.used))
