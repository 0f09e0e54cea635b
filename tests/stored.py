# SPDX-License-Identifier: GPL-3.0-or-later
"""A look at all that a store holds, to compare before and after."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from node_manager.store import Store, tables


class Rows:
    """The rows of a store's tables."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def of(self, table: sa.Table) -> list[dict[str, Any]]:
        """Read one table in the order of its key."""
        with self._store.read() as connection:
            return [dict(row._mapping) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]

    def everything(self) -> dict[str, list[dict[str, Any]]]:
        """Read all tables."""
        return {table.name: self.of(table) for table in tables.metadata.sorted_tables}

    def events(self, event_type: str | None = None) -> list[dict[str, Any]]:
        """Read the outbox in order, of one type if given."""
        return [row for row in self.of(tables.outbox) if event_type in {None, row["type"]}]
