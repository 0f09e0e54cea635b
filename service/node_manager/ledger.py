# SPDX-License-Identifier: GPL-3.0-or-later
"""The books, in one transaction: accounts of nodes and owners, the allocations themselves, their events.

Everybody who reserves or releases goes through here. Owners are held before nodes and both in order, so that two writers never
wait for each other; each account is written only at the version it was read at. What is read here decides, whatever a picture
of the fleet said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from node_manager import accounts, changes, events
from node_manager.capacity import Shortage, choose_units, effective_of, shortages
from node_manager.domain import Admin
from node_manager.overcommit import is_pressed
from node_manager.resources import Ask, add_to, as_data, ask_of, in_thousandths
from node_manager.settings import Settings
from node_manager.store import tables
from node_manager.store.bulk import BulkInsert, BulkUpdate, is_one_of


class StaleAccountError(Exception):
    """An account changed since it was read; the transaction must be repeated."""


@dataclass(frozen=True)
class Allocation:
    """Resources reserved on one node; without *expires_at* they stay until they are released."""

    allocation_id: str
    node_id: str
    owner: str
    deployment_id: str | None
    ask: Ask
    units: Mapping[str, Mapping[str, int]]
    ttl_seconds: int | None
    expires_at: datetime | None
    created_at: datetime


@dataclass(frozen=True)
class Excess:
    """One resource class of which an owner asks for more than the quota leaves; devices in thousandths."""

    resource: str
    hard: int
    used: int
    requested: int


@dataclass
class NodeBooks:
    """One node's account within a transaction."""

    node_id: str
    admin: Admin
    quarantined: bool
    effective: dict[str, int]
    units: dict[str, list[str]]
    allocated: dict[str, int]
    used_units: dict[str, dict[str, int]]
    version: int
    changed: bool = False


@dataclass
class OwnerBooks:
    """One owner's account within a transaction; devices in thousandths."""

    hard: dict[str, int] | None
    used: dict[str, int]
    version: int
    changed: bool = False


class Ledger:
    """The accounts that one transaction works on."""

    def __init__(
        self, connection: sa.Connection, settings: Settings, now: datetime, writer: str | None = None, seen: int = 0
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._now = now
        # As in changes.note.
        self._writer = writer
        self._seen = seen
        self._nodes: dict[str, NodeBooks] = {}
        self._owners: dict[str, OwnerBooks] = {}
        self._added: list[Allocation] = []
        self._dropped: list[tuple[Allocation, str]] = []

    def hold(self, owners: Iterable[str], node_ids: Iterable[str]) -> None:
        """Read and hold accounts until the end of the transaction; nodes that aren't registered are left out.

        Once per transaction, or with the owners all held before.
        """
        self._hold_owners(sorted(set(owners).difference(self._owners)))
        self._hold_nodes(sorted(set(node_ids).difference(self._nodes)))

    def node(self, node_id: str) -> NodeBooks | None:
        """Give the account of a node that is held; None if it isn't registered."""
        return self._nodes.get(node_id)

    def owner(self, owner: str) -> OwnerBooks:
        """Give the account of an owner that is held."""
        return self._owners[owner]

    def shortages(self, node_id: str, ask: Ask) -> list[Shortage]:
        """Tell what the node lacks for *ask*; empty: it fits."""
        node = self._nodes[node_id]
        return shortages(ask, node.effective, node.allocated, node.units, node.used_units)

    def excesses(self, owner: str, ask: Ask, times: int = 1) -> list[Excess]:
        """Tell what of the owner's quota *times* such asks would pass; empty: none."""
        account = self._owners[owner]
        return excesses(account.hard, account.used, ask, times)

    def add(self, allocation: Allocation) -> Allocation:
        """Reserve what was found to fit; units are chosen here where *allocation* names none."""
        node = self._nodes[allocation.node_id]
        if allocation.ask.devices and not allocation.units:
            units = choose_units(allocation.ask, node.units, node.used_units)
            allocation = replace(allocation, units=units)
        self._book(allocation, 1)
        self._added.append(allocation)
        return allocation

    def drop(self, allocation: Allocation, reason: str) -> None:
        """Release one allocation."""
        self._book(allocation, -1)
        self._dropped.append((allocation, reason))

    def write(self) -> int | None:
        """Write everything that changed; give the mark in the feed of changes.

        Errors: StaleAccountError; then nothing of the transaction may be committed.
        """
        if self._dropped:
            gone = [allocation.allocation_id for allocation, _ in self._dropped]
            deleted = self._connection.execute(
                tables.allocations.delete().where(tables.allocations.c.allocation_id.in_(gone))
            )
            if deleted.rowcount != len(gone):
                raise StaleAccountError("allocations were released by somebody else")
            self._forget_empty_deployments()
        self._write_nodes()
        self._write_owners()
        _ADD(self._connection, [_row_of(allocation) for allocation in self._added])
        released = [_event(a, events.EventType.ALLOCATION_RELEASED, self._now, reason) for a, reason in self._dropped]
        reserved = [_event(a, events.EventType.ALLOCATION_RESERVED, self._now) for a in self._added]
        events.emit_all(self._connection, released + reserved)
        touched = [allocation.node_id for allocation in self._added] + [a.node_id for a, _ in self._dropped]
        return changes.note(self._connection, touched, self._writer, self._seen)

    def _book(self, allocation: Allocation, sign: int) -> None:
        node = self._nodes.get(allocation.node_id)
        if node is not None:
            node.changed = True
            add_to(node.allocated, dict(allocation.ask.amounts), sign)
            for name, units in allocation.units.items():
                used = node.used_units.setdefault(name, {})
                add_to(used, units, sign)
                if not used:
                    del node.used_units[name]
        owner = self._owners[allocation.owner]
        owner.changed = True
        add_to(owner.used, in_thousandths(allocation.ask), sign)

    def _hold_owners(self, owners: Sequence[str]) -> None:
        if not owners:
            return
        insert = _INSERT_OWNER[self._connection.dialect.name]
        known = {row.owner: row for row in self._connection.execute(_OWNERS, {"owners": owners})}
        missing = [owner for owner in owners if owner not in known]
        if missing:
            self._connection.execute(insert, [{"owner": owner, "used": {}, "version": 1} for owner in missing])
            known = {row.owner: row for row in self._connection.execute(_OWNERS, {"owners": owners})}
        for owner in owners:
            row = known[owner]
            self._owners[owner] = OwnerBooks(row.hard, dict(row.used), row.version)

    def _hold_nodes(self, node_ids: Sequence[str]) -> None:
        if not node_ids:
            return
        if self._connection.dialect.name != "sqlite":
            # In the registry's order: the node against deregistration, then its account. SQLite has one writer anyway.
            self._connection.execute(_HOLD_NODES, {"node_ids": node_ids}).all()
        rows = self._connection.execute(_ACCOUNTS, {"node_ids": node_ids}).all()
        if len(rows) < len(node_ids) and self._open_missing({row.node_id for row in rows}, node_ids):
            rows = self._connection.execute(_ACCOUNTS, {"node_ids": node_ids}).all()
        limits = self._settings.configuration.allocation
        for row in rows:
            node_type = self._settings.node_types.get(row.node_type) if row.node_type else None
            pressed = is_pressed(row.pressed_at, self._now, limits)
            self._nodes[row.node_id] = NodeBooks(
                node_id=row.node_id,
                admin=Admin(row.admin),
                quarantined=row.quarantined,
                effective=effective_of(row.capacity, node_type, pressed=pressed),
                units=row.units,
                allocated=row.allocated,
                used_units=row.used_units,
                version=row.version,
            )

    def _open_missing(self, there: set[str], node_ids: Sequence[str]) -> bool:
        """Open accounts of nodes that were registered before there were any."""
        nodes, states = tables.nodes.c, tables.node_states.c
        query = (
            sa.select(nodes.node_id, nodes.node_type, states.recognised_type, nodes.capacity, tables.node_facts.c.facts)
            .join(tables.node_states, states.node_id == nodes.node_id)
            .join(tables.node_facts, tables.node_facts.c.node_id == nodes.node_id, isouter=True)
            .where(nodes.node_id.in_([node_id for node_id in node_ids if node_id not in there]))
        )
        rows = self._connection.execute(query).all()
        for row in rows:
            node_type = row.node_type or row.recognised_type
            accounts.fit(self._connection, row.node_id, node_type, row.capacity, row.facts, self._settings)
        return bool(rows)

    def _forget_empty_deployments(self) -> None:
        """A deployment ends with its last allocation."""
        table, held = tables.deployments, tables.allocations
        names = {allocation.deployment_id for allocation, _ in self._dropped if allocation.deployment_id is not None}
        if names:
            any_left = sa.exists().where(held.c.deployment_id == table.c.deployment_id)
            self._connection.execute(table.delete().where(table.c.deployment_id.in_(sorted(names)), ~any_left))

    def _write_nodes(self) -> None:
        changed = [
            (node.allocated, node.used_units, node.version + 1, node.node_id, node.version)
            for node in self._nodes.values()
            if node.changed
        ]
        if _WRITE_NODES(self._connection, changed) != len(changed):
            raise StaleAccountError("an account of a node changed meanwhile")

    def _write_owners(self) -> None:
        changed = [
            (owner.used, owner.version + 1, name, owner.version)
            for name, owner in self._owners.items()
            if owner.changed
        ]
        if _WRITE_OWNERS(self._connection, changed) != len(changed):
            raise StaleAccountError("an account of an owner changed meanwhile")


def excesses(hard: Mapping[str, int] | None, used: Mapping[str, int], ask: Ask, times: int = 1) -> list[Excess]:
    """Tell what of a quota *times* such asks would pass; empty: none. Devices in thousandths."""
    return [
        Excess(name, limit, used.get(name, 0), wanted)
        for name, wanted in in_thousandths(ask, times).items()
        if (limit := (hard or {}).get(name)) is not None and used.get(name, 0) + wanted > limit
    ]


def allocation_of_row(row: sa.Row[Any]) -> Allocation:
    """Read one allocation."""
    return Allocation(
        allocation_id=row.allocation_id,
        node_id=row.node_id,
        owner=row.owner,
        deployment_id=row.deployment_id,
        ask=ask_of(row.resources),
        units=row.units,
        ttl_seconds=row.ttl_seconds,
        expires_at=row.expires_at,
        created_at=row.created_at,
    )


def select_held(
    connection: sa.Connection, ledger: Ledger, condition: sa.ColumnElement[bool], limit: int | None = None
) -> list[Allocation]:
    """Find allocations and hold them with their accounts; what went meanwhile is left out."""
    table = tables.allocations
    query = sa.select(table).where(condition).order_by(table.c.allocation_id)
    seen = connection.execute(query if limit is None else query.limit(limit)).all()
    if not seen:
        return []
    ledger.hold((row.owner for row in seen), (row.node_id for row in seen))
    places = {row.allocation_id: (row.owner, row.node_id) for row in seen}
    still = sa.select(table).where(condition, table.c.allocation_id.in_(places)).order_by(table.c.allocation_id)
    # Made anew under the same id, it is another allocation, whose accounts may not be held.
    return [
        allocation_of_row(row)
        for row in connection.execute(still.with_for_update())
        if (row.owner, row.node_id) == places[row.allocation_id]
    ]


def release_expired(connection: sa.Connection, ledger: Ledger, now: datetime, limit: int) -> int:
    """Release what was never confirmed in time, at most *limit*; give how many."""
    expired = select_held(connection, ledger, tables.allocations.c.expires_at <= now, limit)
    for allocation in expired:
        ledger.drop(allocation, "expired")
    return len(expired)


def _row_of(allocation: Allocation) -> tuple[Any, ...]:
    return (
        allocation.allocation_id,
        allocation.node_id,
        allocation.owner,
        allocation.deployment_id,
        as_data(allocation.ask),
        allocation.units,
        allocation.ttl_seconds,
        allocation.expires_at,
        allocation.created_at,
    )


def _event(allocation: Allocation, event: events.EventType, at: datetime, reason: str | None = None) -> events.NewEvent:
    data: dict[str, Any] = {
        "allocation_id": allocation.allocation_id,
        "owner": allocation.owner,
        "deployment_id": allocation.deployment_id,
        "resources": as_data(allocation.ask),
    }
    if reason is not None:
        data["reason"] = reason
    else:
        data |= {"units": allocation.units, "ttl_seconds": allocation.ttl_seconds}
    return events.NewEvent(event, allocation.node_id, at, data)


_accounts, _owners = tables.node_accounts, tables.owners
# Built once: putting a statement together costs more than SQLite needs to run it.
_HOLD_NODES = (
    sa.select(tables.nodes.c.node_id)
    .where(is_one_of(tables.nodes.c.node_id, "node_ids"))
    .order_by(tables.nodes.c.node_id)
    .with_for_update(read=True, key_share=True)
)
_ACCOUNTS = (
    sa.select(_accounts, tables.nodes.c.admin, tables.node_states.c.quarantined, tables.node_states.c.pressed_at)
    .join(tables.nodes, tables.nodes.c.node_id == _accounts.c.node_id)
    .join(tables.node_states, tables.node_states.c.node_id == _accounts.c.node_id)
    .where(is_one_of(_accounts.c.node_id, "node_ids"))
    .order_by(_accounts.c.node_id)
    .with_for_update(of=_accounts)
)
_OWNERS = sa.select(_owners).where(is_one_of(_owners.c.owner, "owners")).order_by(_owners.c.owner).with_for_update()
_INSERT_OWNER = {
    "sqlite": sqlite.insert(_owners).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(_owners).on_conflict_do_nothing(),
}
_ADD = BulkInsert(
    tables.allocations,
    "allocation_id",
    "node_id",
    "owner",
    "deployment_id",
    "resources",
    "units",
    "ttl_seconds",
    "expires_at",
    "created_at",
)
_WRITE_NODES = BulkUpdate(_accounts, ("allocated", "used_units", "version"), ("node_id", "version"))
_WRITE_OWNERS = BulkUpdate(_owners, ("used", "version"), ("owner", "version"))
