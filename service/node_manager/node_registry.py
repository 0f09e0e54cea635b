# SPDX-License-Identifier: GPL-3.0-or-later
"""The registry: which nodes there are and what was declared about them.

Every write is one transaction, compare-and-swap on the node's generation, with its event. Observed things are read here
to show a node whole, never written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from node_manager import accounts, changes, events, host_keys, node_admin
from node_manager.declarations import NodeChange, NodeDeclaration
from node_manager.domain import Admin, Status
from node_manager.health_checker import NodeState, derive_status, is_schedulable, new_state
from node_manager.ledger import Ledger, select_held
from node_manager.node_filters import NodeFilter, conditions
from node_manager.node_states import insert_state, state_of_row
from node_manager.problems import (
    InvalidInputError,
    NodeExistsError,
    NodeInUseError,
    NodeNotFoundError,
)
from node_manager.settings import Settings
from node_manager.store import Also, Store, tables

Clock = Callable[[], datetime]
_JUMP_LIMIT = 8


def utc_now() -> datetime:
    """Give the current time, aware."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Node:
    """One node: what was declared, and beside it what was concluded."""

    node_id: str
    name: str
    address: str
    declared_type: str | None
    recognised_type: str | None
    labels: dict[str, str]
    location: dict[str, Any]
    connection: dict[str, Any]
    declared_capacity: dict[str, int]
    admin: Admin
    generation: int
    revision: int
    created_at: datetime
    updated_at: datetime
    state: NodeState
    facts: dict[str, Any] | None = None
    facts_observed_at: datetime | None = None
    facts_source: str | None = None
    host_keys: tuple[tuple[str, str], ...] = ()
    # How often work was taken from it, counted from 1.
    epoch: int = 1

    @property
    def node_type(self) -> str | None:
        """Give the type that counts: the declared one, else the recognised one."""
        return self.declared_type or self.recognised_type

    @property
    def status(self) -> Status:
        """Fold admin and health into one word."""
        return derive_status(self.admin, self.state.health)

    def schedulable(self, now: datetime, stale_after: timedelta) -> bool:
        """Tell whether new work may be placed here."""
        return is_schedulable(self.admin, self.state, now, stale_after)


class NodeVersion(NamedTuple):
    """The identity of one rendered node: as long as it is equal, the node is too."""

    node_id: str
    generation: int
    revision: int


@dataclass(frozen=True)
class NodePage:
    """One page of a list; next_after is None at the end."""

    versions: list[NodeVersion] = field(default_factory=list)
    next_after: str | None = None


class NodeRegistry:
    """The declared state of all nodes."""

    def __init__(self, store: Store, settings: Settings, clock: Clock = utc_now) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock

    def register(
        self, declaration: NodeDeclaration, *, allow_local: bool = False, also: Also | None = None
    ) -> tuple[Node, bool]:
        """Add a node; the same declaration again gives the node there is and False.

        Shapes: *also* is done in the same transaction.
        Errors: NodeExistsError if it was declared otherwise; InvalidInputError on an unknown type, credential or jump
            host.
        """
        _check_local(declaration, allow_local=allow_local)
        now = self._clock()
        values = _declared_values(declaration.node_id, declaration)
        try:
            with self._store.write() as connection:
                existing = _select_one(connection, declaration.node_id)
                if existing is not None:
                    same = _same_or_conflict(existing, declaration)
                    if also is not None:
                        also(connection)
                    return same, False
                self._check_references(connection, declaration.node_id, declaration, has_keys=False)
                connection.execute(
                    tables.nodes.insert(),
                    {"admin": Admin.ACTIVE.value, **values, "generation": 1, "created_at": now, "updated_at": now},
                )
                _write_labels(connection, declaration.node_id, declaration.labels)
                host_keys.pin(connection, declaration.node_id, declaration.host_keys, host_keys.GIVEN, now)
                insert_state(connection, declaration.node_id, new_state(now))
                declared_admin = declaration.admin or Admin.ACTIVE
                node_admin.follow(connection, declaration.node_id, Admin.ACTIVE, declared_admin, "declared", now)
                self._fit_account(connection, declaration.node_id)
                told = _event_data(values, declared_admin, 1)
                events.emit(connection, events.EventType.NODE_REGISTERED, declaration.node_id, now, told)
                if also is not None:
                    also(connection)
                return _select_known(connection, declaration.node_id), True
        except IntegrityError:
            # Two registrations of one id at once (PostgreSQL lets both in): the other one won, judge against it.
            return _same_or_conflict(self.get(declaration.node_id), declaration), False

    def update(
        self, node_id: str, change: NodeChange, *, if_generation: int | None = None, allow_local: bool = False
    ) -> Node:
        """Replace what is declared about a node.

        Errors: NodeNotFoundError; StaleGenerationError if *if_generation* is no longer the node's; InvalidInputError.
        """
        now = self._clock()
        values = _declared_values(node_id, change)
        with self._store.write() as connection:
            node = _lock(connection, node_id, if_generation)
            _check_local(change, allow_local=allow_local or node.connection["kind"] == "local")
            _check_admin(node_id, node.admin, change)
            self._check_references(connection, node_id, change, has_keys=bool(node.host_keys))
            generation = node.generation + 1
            connection.execute(
                tables.nodes.update().where(tables.nodes.c.node_id == node_id),
                {**values, "generation": generation, "updated_at": now},
            )
            connection.execute(tables.node_labels.delete().where(tables.node_labels.c.node_id == node_id))
            _write_labels(connection, node_id, change.labels)
            if change.host_keys:
                host_keys.forget(connection, node_id)
                host_keys.pin(connection, node_id, change.host_keys, host_keys.GIVEN, now)
            self._fit_account(connection, node_id)
            told = _event_data(values, change.admin or node.admin, generation)
            events.emit(connection, events.EventType.NODE_UPDATED, node_id, now, told)
            if change.admin is not None and change.admin is not node.admin:
                node_admin.follow(connection, node_id, node.admin, change.admin, "declared", now)
                if change.admin is Admin.ACTIVE:
                    node_admin.forget_repairs(connection, node_id)
                node_admin.tell(connection, node_id, node.admin, change.admin, "declared", now)
            return _select_known(connection, node_id)

    def set_admin(self, node_id: str, admin: Admin, reason: str, *, if_generation: int | None = None) -> Node:
        """Change at once whether a node takes part; what operators ask for goes through maintenance.py.

        Errors: NodeNotFoundError, StaleGenerationError.
        """
        now = self._clock()
        with self._store.write() as connection:
            standing = node_admin.lock(connection, node_id, if_generation)
            if standing.admin is not admin:
                node_admin.follow(connection, node_id, standing.admin, admin, reason, now)
                node_admin.change(connection, standing, admin, reason, now)
            return _select_known(connection, node_id)

    def forget_host_keys(self, node_id: str) -> Node:
        """Trust the key that the node shows next, and end its quarantine: the operator knows why the key changed.

        Errors: NodeNotFoundError.
        """
        now = self._clock()
        with self._store.write() as connection:
            node = _lock(connection, node_id, None)
            host_keys.forget(connection, node_id)
            connection.execute(
                tables.nodes.update().where(tables.nodes.c.node_id == node_id),
                {"generation": node.generation + 1, "updated_at": now},
            )
            changes.note(connection, [node_id])
            events.emit(connection, events.EventType.HOST_KEYS_PINNED, node_id, now, {"origin": None, "host_keys": []})
            return _select_known(connection, node_id)

    def deregister(self, node_id: str, *, force: bool = False, if_generation: int | None = None) -> None:
        """Remove a node and all that was seen on it.

        Errors: NodeNotFoundError; NodeInUseError while it holds allocations (*force* drops them) or is a jump host.
        """
        now = self._clock()
        table = tables.allocations
        with self._store.write() as connection:
            ledger = Ledger(connection, self._settings, now)
            # In the ledger's order: owners before the node.
            ledger.hold(connection.scalars(sa.select(table.c.owner).where(table.c.node_id == node_id).distinct()), [])
            _lock(connection, node_id, if_generation)
            dropped = select_held(connection, ledger, table.c.node_id == node_id)
            held = [allocation.allocation_id for allocation in dropped]
            if held and not force:
                raise NodeInUseError(
                    f"node {node_id!r} holds {len(held)} allocations; release them first, or repeat with force=true",
                    node_id=node_id,
                    allocations=held[:100],
                )
            behind = self._nodes_behind(connection, node_id)
            if behind:
                raise NodeInUseError(
                    f"node {node_id!r} is the jump host of {', '.join(behind[:5])}; declare another way to them first",
                    node_id=node_id,
                )
            for allocation in dropped:
                ledger.drop(allocation, "node_deregistered")
            ledger.write()
            changes.note(connection, [node_id])
            connection.execute(tables.nodes.delete().where(tables.nodes.c.node_id == node_id))
            events.emit(
                connection,
                events.EventType.NODE_DEREGISTERED,
                node_id,
                now,
                {"forced": force, "dropped_allocations": held},
            )

    def get(self, node_id: str) -> Node:
        """Read one node with its facts and host keys.

        Errors: NodeNotFoundError.
        """
        with self._store.read() as connection:
            return _select_known(connection, node_id)

    def page(self, wanted: NodeFilter, limit: int, after: str | None) -> NodePage:
        """List the versions of the nodes that pass *wanted*, ordered by node_id, those behind *after*."""
        query = _PAGE_QUERY
        found = conditions(wanted)
        if found:
            query = query.where(*found)
        with self._store.read() as connection:
            # Ids are not empty, so all of them are behind "".
            rows = connection.execute(query, {"after": after or "", "most": limit + 1}).all()
        versions = [NodeVersion._make(row) for row in rows[:limit]]
        return NodePage(versions, versions[-1].node_id if len(rows) > limit else None)

    def load(self, node_ids: Sequence[str]) -> dict[str, Node]:
        """Read several nodes with their facts; ids that are gone are left out."""
        with self._store.read() as connection:
            rows = connection.execute(_NODE_QUERY.where(tables.nodes.c.node_id.in_(node_ids))).all()
        return {row.node_id: _node_of_row(row) for row in rows}

    def existing(self, node_ids: Sequence[str]) -> set[str]:
        """Tell which of *node_ids* are registered."""
        with self._store.read() as connection:
            return set(
                connection.scalars(sa.select(tables.nodes.c.node_id).where(tables.nodes.c.node_id.in_(node_ids)))
            )

    def _fit_account(self, connection: sa.Connection, node_id: str) -> None:
        node = _select_known(connection, node_id)
        accounts.fit(connection, node_id, node.node_type, node.declared_capacity, node.facts, self._settings)
        changes.note(connection, [node_id])

    def _check_references(self, connection: sa.Connection, node_id: str, change: NodeChange, *, has_keys: bool) -> None:
        if change.node_type is not None and change.node_type not in self._settings.node_types:
            known = ", ".join(sorted(self._settings.node_types))
            raise InvalidInputError("node_type", f"expected one of {known}, got {change.node_type!r}")
        link = change.connection
        if link.kind == "local":
            return
        credentials = self._settings.configuration.ssh.credentials
        if link.credential is not None and link.credential not in credentials:
            known = ", ".join(sorted(credentials)) or "none configured"
            raise InvalidInputError(
                "connection.credential", f"expected one of ssh.credentials in config.json ({known})"
            )
        if self._settings.configuration.ssh.host_key_policy == "given" and not (change.host_keys or has_keys):
            raise InvalidInputError("host_keys", "expected at least one key: ssh.host_key_policy is 'given'")
        hop = link.jump_host
        for _ in range(_JUMP_LIMIT):
            if hop is None:
                return
            if hop == node_id:
                raise InvalidInputError("connection.jump_host", f"{link.jump_host!r} leads back to {node_id!r}")
            # Held until the end of the transaction: neither may the hop go meanwhile, nor two updates close a circle.
            declared = connection.scalar(
                sa.select(tables.nodes.c.connection).where(tables.nodes.c.node_id == hop).with_for_update(read=True)
            )
            if declared is None:
                raise InvalidInputError("connection.jump_host", f"node {hop!r} is not registered; register it first")
            hop = declared["jump_host"]
        if hop is not None:
            raise InvalidInputError("connection.jump_host", f"expected at most {_JUMP_LIMIT} hops")

    @staticmethod
    def _nodes_behind(connection: sa.Connection, node_id: str) -> list[str]:
        jump_host = tables.nodes.c.connection["jump_host"].as_string()
        query = sa.select(tables.nodes.c.node_id).where(jump_host == node_id, tables.nodes.c.node_id != node_id)
        return list(connection.scalars(query.order_by(tables.nodes.c.node_id).limit(6)))


# Built once: putting a statement together costs more than SQLite needs to run it.
_PAGE_QUERY = (
    sa.select(tables.nodes.c.node_id, tables.nodes.c.generation, tables.node_states.c.revision)
    .join(tables.node_states, tables.node_states.c.node_id == tables.nodes.c.node_id)
    .where(tables.nodes.c.node_id > sa.bindparam("after"))
    .order_by(tables.nodes.c.node_id)
    .limit(sa.bindparam("most"))
)
_NODE_QUERY = (
    sa.select(
        tables.nodes,
        *(column for column in tables.node_states.c if column.name != "node_id"),
        tables.node_facts.c.facts,
        tables.node_facts.c.observed_at.label("facts_observed_at"),
        tables.node_facts.c.source.label("facts_source"),
        sa.func.coalesce(tables.node_accounts.c.epoch, 1).label("epoch"),
    )
    .join(tables.node_states, tables.node_states.c.node_id == tables.nodes.c.node_id)
    .join(tables.node_facts, tables.node_facts.c.node_id == tables.nodes.c.node_id, isouter=True)
    .join(tables.node_accounts, tables.node_accounts.c.node_id == tables.nodes.c.node_id, isouter=True)
)


def _select_one(connection: sa.Connection, node_id: str) -> Node | None:
    row = connection.execute(_NODE_QUERY.where(tables.nodes.c.node_id == node_id)).one_or_none()
    if row is None:
        return None
    keys = connection.execute(
        sa.select(tables.host_keys.c.public_key, tables.host_keys.c.origin)
        .where(tables.host_keys.c.node_id == node_id)
        .order_by(tables.host_keys.c.public_key)
    )
    return _node_of_row(row, tuple((key, origin) for key, origin in keys))


def _select_known(connection: sa.Connection, node_id: str) -> Node:
    node = _select_one(connection, node_id)
    if node is None:
        raise NodeNotFoundError(node_id)
    return node


def _lock(connection: sa.Connection, node_id: str, if_generation: int | None) -> Node:
    """Hold the node's row until the end of the transaction and check that it is the one the caller knows."""
    node_admin.lock(connection, node_id, if_generation)
    return _select_known(connection, node_id)


def _node_of_row(row: sa.Row[Any], host_keys: tuple[tuple[str, str], ...] = ()) -> Node:
    return Node(
        node_id=row.node_id,
        name=row.name,
        address=row.address,
        declared_type=row.node_type,
        recognised_type=row.recognised_type,
        labels=row.labels,
        location={
            "region": row.region,
            "zone": row.zone,
            "site": row.site,
            "latitude": row.latitude,
            "longitude": row.longitude,
        },
        connection=row.connection,
        declared_capacity=row.capacity,
        admin=Admin(row.admin),
        generation=row.generation,
        revision=row.revision,
        created_at=row.created_at,
        updated_at=row.updated_at,
        state=state_of_row(row),
        facts=row.facts,
        facts_observed_at=row.facts_observed_at,
        facts_source=row.facts_source,
        host_keys=host_keys,
        epoch=row.epoch,
    )


def _check_local(change: NodeChange, *, allow_local: bool) -> None:
    if change.connection.kind == "local" and not allow_local:
        raise InvalidInputError(
            "connection.kind",
            "local is the manager's own machine and is registered there only: nodectl register --local",
        )


def _check_admin(node_id: str, admin: Admin, change: NodeChange) -> None:
    if change.admin is None or change.admin is admin:
        return
    # What is declared over and over must not end what an operator began, nor skip the check before the return.
    if admin is Admin.DRAINING or (admin is Admin.MAINTENANCE and change.admin is not Admin.OFFLINE):
        raise InvalidInputError(
            "admin",
            f"the node is in {admin}; PUT /nodes/{node_id}/status with status active ends that, or leave admin out",
        )


def _declared_values(node_id: str, change: NodeChange) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "name": change.name or node_id,
        "address": change.address,
        "node_type": change.node_type,
        "labels": dict(sorted(change.labels.items())),
        **change.location.model_dump(),
        "connection": change.connection.model_dump(),
        "capacity": dict(sorted(change.capacity.items())),
        # Left out, it stays as it is: a repeated registration must not end an operator's maintenance.
        **({"admin": change.admin.value} if change.admin is not None else {}),
    }


def _same_or_conflict(node: Node, declaration: NodeDeclaration) -> Node:
    wanted = _declared_values(declaration.node_id, declaration)
    there = {
        "node_id": node.node_id,
        "name": node.name,
        "address": node.address,
        "node_type": node.declared_type,
        "labels": node.labels,
        **node.location,
        "connection": node.connection,
        "capacity": node.declared_capacity,
        "admin": node.admin.value,
    }
    differing = sorted(key for key, value in wanted.items() if there[key] != value)
    given = {key for key, origin in node.host_keys if origin == host_keys.GIVEN}
    if declaration.host_keys and set(declaration.host_keys) != given:
        differing.append("host_keys")
    if differing:
        raise NodeExistsError(
            f"node {node.node_id!r} is registered with another {', '.join(differing)}; "
            f"PUT /nodes/{node.node_id} changes it",
            node_id=node.node_id,
            differing=differing,
        )
    return node


def _write_labels(connection: sa.Connection, node_id: str, labels: dict[str, str]) -> None:
    if labels:
        connection.execute(
            tables.node_labels.insert(),
            [{"node_id": node_id, "key": key, "value": value} for key, value in labels.items()],
        )


def _event_data(values: dict[str, Any], admin: Admin, generation: int) -> dict[str, Any]:
    told = {key: value for key, value in values.items() if key != "connection"}
    return {"node": {**told, "admin": admin.value}, "generation": generation}
