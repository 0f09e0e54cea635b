# SPDX-License-Identifier: GPL-3.0-or-later
"""Reserve resources on a given node and release them: each call is one transaction, whole or not at all.

Idempotent by allocation_id. Choosing nodes is the selector's business; the sums are the ledger's.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from node_manager import changes, events
from node_manager.capacity import Account, Shortage, account
from node_manager.domain import Admin
from node_manager.ledger import (
    Allocation,
    Excess,
    Ledger,
    StaleAccountError,
    allocation_of_row,
    release_expired,
    select_held,
)
from node_manager.node_registry import Clock, utc_now
from node_manager.overcommit import is_pressed
from node_manager.problems import (
    AllocationMismatchError,
    AllocationNotFoundError,
    ConflictError,
    InsufficientResourcesError,
    InvalidInputError,
    NodeNotFoundError,
    NodeNotSchedulableError,
    QuotaExceededError,
)
from node_manager.resources import COMMON, WHOLE_MILLI, Ask, shown
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError, tables
from node_manager.timings import NO_TIMINGS, Timings

_ATTEMPTS = 5
# In one transaction, which holds the accounts of all of them.
_EXPIRED_AT_ONCE = 1000


@dataclass(frozen=True)
class AllocationRequest:
    """What somebody wants reserved; the same id again must mean the same."""

    allocation_id: str
    owner: str
    ask: Ask
    deployment_id: str | None = None
    ttl_seconds: int | None = None


@dataclass(frozen=True)
class AllocationFilter:
    """Which allocations to list; an empty field lets all pass."""

    node_id: str | None = None
    owner: str | None = None
    deployment_id: str | None = None


class ResourceAllocator:
    """The allocations of one store."""

    def __init__(self, store: Store, settings: Settings, clock: Clock = utc_now, timings: Timings = NO_TIMINGS) -> None:
        self._timings = timings
        self._store = store
        self._settings = settings
        self._clock = clock

    def allocate(self, node_id: str, wanted: AllocationRequest) -> tuple[Allocation, bool]:
        """Reserve on one node; the same request again gives the allocation there is and False.

        Errors: NodeNotFoundError; NodeNotSchedulableError if an operator keeps work off it, or its host key is in doubt;
            InsufficientResourcesError; QuotaExceededError; AllocationMismatchError if the id is taken for something else;
            InvalidInputError on a resource class that no node has.
        """
        began = time.perf_counter()
        try:
            return self._allocate_at_last(node_id, wanted)
        finally:
            self._timings.observe_allocation(time.perf_counter() - began)

    def deallocate(self, node_id: str, allocation_id: str, reason: str = "deallocated") -> bool:
        """Release an allocation; False if there is none (any more): a repeated call does no harm.

        Errors: NodeNotFoundError; ConflictError if it is on another node.
        """
        with self._store.write() as connection:
            ledger = Ledger(connection, self._settings, self._clock())
            found = select_held(connection, ledger, tables.allocations.c.allocation_id == allocation_id)
            if not found:
                _require_node(connection, node_id)
                return False
            if found[0].node_id != node_id:
                raise ConflictError(
                    f"allocation {allocation_id!r} is on node {found[0].node_id!r}, not on {node_id!r}; release it there",
                    node_id=found[0].node_id,
                )
            ledger.drop(found[0], reason)
            ledger.write()
        return True

    def confirm(self, allocation_id: str) -> Allocation:
        """Keep an allocation for good; one that is kept already stays so.

        Errors: AllocationNotFoundError if it expired or never was.
        """
        self.expire()
        table, now = tables.allocations, self._clock()
        with self._store.write() as connection:
            row = connection.execute(
                sa.select(table).where(table.c.allocation_id == allocation_id).with_for_update()
            ).one_or_none()
            if row is None or (row.expires_at is not None and row.expires_at <= now):
                raise AllocationNotFoundError(
                    f"allocation {allocation_id!r} is not there: it expired, was released or never made; allocate again"
                )
            if row.expires_at is not None:
                keep_for_good(connection, [allocation_of_row(row)], now)
            return allocation_of_row(
                connection.execute(sa.select(table).where(table.c.allocation_id == allocation_id)).one()
            )

    def expire(self) -> int:
        """Release what was not confirmed in time; give how many."""
        now = self._clock()
        # Most of the time nothing is due, and a read holds up no writer.
        with self._store.read() as connection:
            due = connection.scalar(_DUE, {"now": now})
        if due is None:
            return 0
        total = 0
        while True:
            with self._store.write() as connection:
                ledger = Ledger(connection, self._settings, now)
                released = release_expired(connection, ledger, now, _EXPIRED_AT_ONCE)
                ledger.write()
            total += released
            if released < _EXPIRED_AT_ONCE:
                return total

    def get(self, allocation_id: str) -> Allocation:
        """Read one allocation.

        Errors: AllocationNotFoundError.
        """
        table = tables.allocations
        with self._store.read() as connection:
            row = connection.execute(sa.select(table).where(table.c.allocation_id == allocation_id)).one_or_none()
        if row is None:
            raise AllocationNotFoundError(f"allocation {allocation_id!r} is not there; GET /allocations lists what is")
        return allocation_of_row(row)

    def page(self, wanted: AllocationFilter, limit: int, after: str | None) -> tuple[list[Allocation], str | None]:
        """List allocations in the order of their ids, those behind *after*; and what is behind the last, if anything."""
        table = tables.allocations.c
        query = sa.select(tables.allocations).order_by(table.allocation_id).limit(limit + 1)
        for column, value in (
            (table.node_id, wanted.node_id),
            (table.owner, wanted.owner),
            (table.deployment_id, wanted.deployment_id),
        ):
            if value is not None:
                query = query.where(column == value)
        if after is not None:
            query = query.where(table.allocation_id > after)
        with self._store.read() as connection:
            rows = connection.execute(query).all()
        found = [allocation_of_row(row) for row in rows[:limit]]
        return found, found[-1].allocation_id if len(rows) > limit else None

    def books(self, node_id: str) -> tuple[Account, list[Allocation]]:
        """Read a node's account and all that is allocated on it, of one moment.

        Errors: NodeNotFoundError.
        """
        accounts, states, table = tables.node_accounts, tables.node_states, tables.allocations
        query = (
            sa.select(accounts, states.c.pressed_at)
            .join(states, states.c.node_id == accounts.c.node_id)
            .where(accounts.c.node_id == node_id)
        )
        held = sa.select(table).where(table.c.node_id == node_id).order_by(table.c.allocation_id)
        with self._store.read() as connection:
            row = connection.execute(query).one_or_none()
            if row is None:
                _require_node(connection, node_id)
            allocations = [allocation_of_row(each) for each in connection.execute(held)]
        if row is None:
            return account({}, {}, None, {}, {}), allocations
        node_type = self._settings.node_types.get(row.node_type) if row.node_type else None
        pressed = is_pressed(row.pressed_at, self._clock(), self._settings.configuration.allocation)
        found = account(row.capacity, row.units, node_type, row.allocated, row.used_units, pressed=pressed)
        return replace(found, epoch=row.epoch), allocations

    def _allocate_at_last(self, node_id: str, wanted: AllocationRequest) -> tuple[Allocation, bool]:
        check_ttl(wanted.ttl_seconds, self._settings)
        self.expire()
        for attempt in range(_ATTEMPTS):
            try:
                return self._allocate(node_id, wanted)
            except (StaleAccountError, IntegrityError) as error:
                # Another writer was faster; what it wrote is judged now.
                if attempt == _ATTEMPTS - 1:
                    raise StoreUnavailableError(f"the account of {node_id} changes too often") from error
        raise AssertionError("unreachable")

    def _allocate(self, node_id: str, wanted: AllocationRequest) -> tuple[Allocation, bool]:
        now, table = self._clock(), tables.allocations
        with self._store.write() as connection:
            ledger = Ledger(connection, self._settings, now)
            ledger.hold([wanted.owner], [node_id])
            row = connection.execute(
                sa.select(table).where(table.c.allocation_id == wanted.allocation_id)
            ).one_or_none()
            if row is not None:
                return _same_or_mismatch(allocation_of_row(row), node_id, wanted), False
            node = ledger.node(node_id)
            if node is None:
                raise NodeNotFoundError(node_id)
            if node.admin is not Admin.ACTIVE or node.quarantined:
                why = "in quarantine, its host key changed" if node.quarantined else node.admin.value
                raise NodeNotSchedulableError(
                    f"node {node_id!r} is {why}; choose another node, or make it active first", node_id=node_id
                )
            check_classes(connection, wanted.ask, self._settings, {*node.effective, *node.units})
            lacking = ledger.shortages(node_id, wanted.ask)
            if lacking:
                raise InsufficientResourcesError(
                    f"node {node_id!r} lacks {describe_shortages(lacking)}; ask for less, choose another node, or let "
                    "POST /deployment/node-selection choose",
                    node_id=node_id,
                    shortages=[
                        {"resource": item.resource, "requested": item.requested, "available": item.available}
                        for item in lacking
                    ],
                )
            excess = ledger.excesses(wanted.owner, wanted.ask)
            if excess:
                raise quota_error(wanted.owner, excess, node_id)
            expires_at = None if wanted.ttl_seconds is None else now + timedelta(seconds=wanted.ttl_seconds)
            made = ledger.add(
                Allocation(
                    wanted.allocation_id,
                    node_id,
                    wanted.owner,
                    wanted.deployment_id,
                    wanted.ask,
                    {},
                    wanted.ttl_seconds,
                    expires_at,
                    now,
                )
            )
            ledger.write()
        return made, True


def keep_for_good(connection: sa.Connection, allocations: Sequence[Allocation], at: datetime) -> None:
    """Take the expiry from allocations that the transaction holds."""
    table = tables.allocations
    ids = [allocation.allocation_id for allocation in allocations]
    connection.execute(table.update().where(table.c.allocation_id.in_(ids)).values(expires_at=None))
    events.emit_all(
        connection,
        [
            events.NewEvent(
                events.EventType.ALLOCATION_CONFIRMED,
                allocation.node_id,
                at,
                {
                    "allocation_id": allocation.allocation_id,
                    "owner": allocation.owner,
                    "deployment_id": allocation.deployment_id,
                },
            )
            for allocation in allocations
        ],
    )
    changes.note(connection, [allocation.node_id for allocation in allocations])


def check_ttl(ttl_seconds: int | None, settings: Settings) -> None:
    """Refuse to reserve without confirmation for longer than is configured.

    Errors: InvalidInputError.
    """
    longest = settings.configuration.allocation.max_ttl_seconds
    if ttl_seconds is not None and ttl_seconds > longest:
        raise InvalidInputError("ttl_seconds", f"expected at most {longest} (allocation.max_ttl_seconds)")


def check_classes(connection: sa.Connection, ask: Ask, settings: Settings, known: Collection[str]) -> None:
    """Refuse resource classes that neither the node types nor any node knows: a misspelt one would never fit.

    Errors: InvalidInputError.
    """
    if not ask.devices:
        return
    unknown = set(ask.classes.difference(known, COMMON))
    for definition in settings.node_types.values():
        unknown -= definition.resources.keys()
    if not unknown:
        return
    declared: set[str] = set()
    for (capacity,) in connection.execute(sa.select(tables.node_accounts.c.capacity)):
        declared.update(capacity)
    unknown -= declared
    if unknown:
        name = min(unknown)
        there = ", ".join(sorted(COMMON | declared))
        raise InvalidInputError(f"resources.{name}", f"no node has this resource class; there are {there}")


def describe_shortages(lacking: Sequence[Shortage]) -> str:
    """Say in words what is missing."""
    return ", ".join(
        f"{item.resource} ({item.requested} requested, {item.available} available)"
        if item.share_milli in {None, WHOLE_MILLI}
        else f"{item.resource} ({item.requested} x {item.share_milli} thousandths requested, {item.available} units have room)"
        for item in lacking
    )


def quota_error(owner: str, excess: Sequence[Excess], node_id: str | None = None) -> QuotaExceededError:
    """Say which limits of the owner's quota would be passed."""
    rows = [
        {
            "resource": item.resource,
            **{key: shown({item.resource: getattr(item, key)})[item.resource] for key in _NUMBERS},
        }
        for item in excess
    ]
    told = ", ".join(
        f"{row['resource']} (hard {row['hard']}, used {row['used']}, requested {row['requested']})" for row in rows
    )
    extra = {} if node_id is None else {"node_id": node_id}
    return QuotaExceededError(
        f"the quota of owner {owner!r} would be passed: {told}; release something, or raise it with PUT /quotas/{owner}",
        owner=owner,
        exceeded=rows,
        **extra,
    )


_NUMBERS = ("hard", "used", "requested")
_DUE = (
    sa.select(tables.allocations.c.allocation_id)
    .where(tables.allocations.c.expires_at <= sa.bindparam("now", type_=tables.UtcDateTime))
    .limit(1)
)


def _same_or_mismatch(there: Allocation, node_id: str, wanted: AllocationRequest) -> Allocation:
    differing = [
        name
        for name, old, new in (
            ("node_id", there.node_id, node_id),
            ("owner", there.owner, wanted.owner),
            ("deployment_id", there.deployment_id, wanted.deployment_id),
            ("resources", there.ask, wanted.ask),
            ("ttl_seconds", there.ttl_seconds, wanted.ttl_seconds),
        )
        if old != new
    ]
    if differing:
        raise AllocationMismatchError(
            f"allocation {wanted.allocation_id!r} is there with another {', '.join(differing)}; use a new allocation_id",
            differing=differing,
            node_id=there.node_id,
        )
    return there


def _require_node(connection: sa.Connection, node_id: str) -> None:
    if connection.scalar(sa.select(tables.nodes.c.node_id).where(tables.nodes.c.node_id == node_id)) is None:
        raise NodeNotFoundError(node_id)
