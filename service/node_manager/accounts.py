# SPDX-License-Identifier: GPL-3.0-or-later
"""The accounts of nodes as they are stored: opened with the node, kept in step with what it has.

Takes part in the transactions of others; what is allocated is the ledger's business and never changed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from node_manager import changes
from node_manager.capacity import capacity_of, units_of
from node_manager.settings import Settings
from node_manager.store import Store, tables

_accounts = tables.node_accounts


def fit(
    connection: sa.Connection,
    node_id: str,
    node_type: str | None,
    declared: Mapping[str, int],
    facts: Mapping[str, Any] | None,
    settings: Settings,
) -> bool:
    """Make a node's account agree with what it has, opening it if there is none; False if it did already.

    The caller holds the node's row and notes the change.
    """
    definition = settings.node_types.get(node_type) if node_type else None
    capacity = dict(sorted(capacity_of(declared, facts, definition).items()))
    wanted = {"node_type": node_type, "capacity": capacity, "units": units_of(capacity, facts)}
    row = connection.execute(sa.select(_accounts).where(_accounts.c.node_id == node_id).with_for_update()).one_or_none()
    if row is None:
        empty: dict[str, Any] = {"allocated": {}, "used_units": {}, "version": 1, "epoch": 1}
        connection.execute(_accounts.insert(), {"node_id": node_id, **wanted, **empty})
        return True
    if all(row._mapping[key] == value for key, value in wanted.items()):
        return False
    connection.execute(
        _accounts.update().where(_accounts.c.node_id == node_id).values(version=_accounts.c.version + 1, **wanted)
    )
    return True


def move_on(connection: sa.Connection, node_id: str) -> int | None:
    """Begin a new epoch of a node, whose row the caller holds; give it, None where there is no account."""
    epoch: int | None = connection.scalar(
        _accounts.update()
        .where(_accounts.c.node_id == node_id)
        .values(version=_accounts.c.version + 1, epoch=_accounts.c.epoch + 1)
        .returning(_accounts.c.epoch)
    )
    return epoch


def epoch_of(store: Store, node_id: str) -> int | None:
    """Read how often work was taken from a node, counted from 1; None where there is no account yet."""
    with store.read() as connection:
        return connection.scalar(sa.select(_accounts.c.epoch).where(_accounts.c.node_id == node_id))


def fit_all(store: Store, settings: Settings) -> int:
    """Make all accounts agree with nodes and node types, as after a change of node_types.json; give how many did not."""
    nodes, states, facts = tables.nodes.c, tables.node_states.c, tables.node_facts.c
    query = (
        sa.select(
            nodes.node_id,
            sa.func.coalesce(nodes.node_type, states.recognised_type).label("node_type"),
            nodes.capacity,
            facts.facts,
            _accounts.c.node_type.label("fitted_type"),
            _accounts.c.capacity.label("fitted_capacity"),
        )
        .join(tables.node_states, states.node_id == nodes.node_id)
        .join(tables.node_facts, facts.node_id == nodes.node_id, isouter=True)
        .join(_accounts, _accounts.c.node_id == nodes.node_id, isouter=True)
        .order_by(nodes.node_id)
    )
    # Read first: most starts find nothing to do, and need not hold up another manager's writes.
    with store.read() as connection:
        differing = [row.node_id for row in connection.execute(query).all() if _differs(row, settings)]
    for start in range(0, len(differing), 500):
        chunk = differing[start : start + 500]
        with store.write() as connection:
            connection.execute(
                sa.select(nodes.node_id)
                .where(nodes.node_id.in_(chunk))
                .order_by(nodes.node_id)
                .with_for_update(read=True)
            ).all()
            for row in connection.execute(query.where(nodes.node_id.in_(chunk))).all():
                fit(connection, row.node_id, row.node_type, row.capacity, row.facts, settings)
            changes.note(connection, chunk)
    return len(differing)


def _differs(row: Any, settings: Settings) -> bool:
    definition = settings.node_types.get(row.node_type) if row.node_type else None
    wanted = capacity_of(row.capacity, row.facts, definition)
    return bool(row.fitted_type != row.node_type or row.fitted_capacity != wanted)
