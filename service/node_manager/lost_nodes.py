# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of the work of nodes that are lost: others hear of it at once, and after a while it is taken from the node.

A row and an event tell that a node is lost, with where its work could go. Its allocations stay until the time to reclaim them has
come; a node that is back before that keeps all. docs/lost-nodes.md says it in words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import postgresql, sqlite

from node_manager import accounts, changes
from node_manager.domain import Health
from node_manager.events import EventType, NewEvent, emit_all
from node_manager.ledger import Ledger, StaleAccountError, select_held
from node_manager.node_brief import IN_HAND
from node_manager.node_registry import Clock, utc_now
from node_manager.replacements import MAX_ALLOCATIONS, Plan, Replacements
from node_manager.settings import Settings
from node_manager.store import Store, tables
from node_manager.views import render_time

RELEASE_REASON = "node_lost"
# A manager that has just started may have started with a clock that is wrong, and with news that are old.
SETTLING_SECONDS = 300.0
# Of one round, so that it stays short; the next one is a second later.
NODES_PER_ROUND = 100
RECLAIMS_PER_ROUND = 20
_MAX_TOLD = 500
_BACK = "back"


@dataclass(frozen=True)
class _Seen:
    """Since when this manager sees something, and how long it was to last then; seconds of the monotonic clock."""

    at: float
    left: float


class LostNodes:
    """The lost nodes of one store; one thread at a time calls round()."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        replacements: Replacements,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._settings = settings
        self._replacements = replacements
        self._clock = clock
        self._monotonic = monotonic
        self._reclaim_after = settings.configuration.recovery.reclaim_after_seconds
        self._autonomy = settings.configuration.health.autonomy_seconds
        self._log = structlog.get_logger()
        # The wall clock may be set while one of these lasts; how long it lasts is measured from when it was first seen.
        self._frozen: dict[tuple[str, datetime], _Seen] = {}
        self._lost: dict[tuple[str, datetime], _Seen] = {}

    def round(self) -> None:
        """Tell of nodes that are lost, take the work from those that were for too long, forget those that are back.

        Errors: StoreUnavailableError.
        """
        with self._store.read() as connection:
            rows = connection.execute(_LOOK).all()
        if not rows and not self._frozen and not self._lost:
            return
        now, at = self._clock(), self._monotonic()
        self._note(rows, now, at)
        over = {row.node_id for row in rows if row.lost_at is not None and _is_over(row, row)}
        if over:
            self._forget(over)
        rows = [row for row in rows if row.health == Health.UNREACHABLE.value and row.node_id not in over]
        silent = [row for row in rows if row.admin not in IN_HAND and not self._is_frozen(row, at)]
        new = [row.node_id for row in silent if row.lost_at is None]
        if new:
            self._tell(new[:NODES_PER_ROUND])
        due = [row for row in silent if row.lost_at is not None and not row.reclaimed_at and self._is_due(row, now, at)]
        for row in due[:RECLAIMS_PER_ROUND]:
            self._reclaim(row.node_id, row.lost_at)

    def _note(self, rows: Iterable[Any], now: datetime, at: float) -> None:
        """Remember since when each freeze and each loss is seen, and forget those that are over."""
        frozen, lost = {}, {}
        for row in rows:
            if row.frozen_until is not None:
                key = (row.node_id, row.frozen_until)
                frozen[key] = self._frozen.get(key) or _Seen(at, _left(row.frozen_until, now, self._autonomy))
            if row.lost_at is not None and row.reclaimed_at is None:
                key = (row.node_id, row.lost_at)
                lost[key] = self._lost.get(key) or _Seen(at, _left(row.reclaim_at, now, self._reclaim_after))
        self._frozen, self._lost = frozen, lost

    def _is_frozen(self, row: Any, at: float) -> bool:
        seen = self._frozen.get((row.node_id, row.frozen_until))
        return seen is not None and at - seen.at < seen.left

    def _is_due(self, row: Any, now: datetime, at: float) -> bool:
        """Tell whether a node was lost for long enough, whatever became of the wall clock since that was first seen."""
        seen = self._lost[row.node_id, row.lost_at]
        watched = at - seen.at
        if watched >= self._reclaim_after:
            return True
        # What went by before this manager looked is known by the wall clock alone.
        enough = min(self._reclaim_after, max(seen.left, SETTLING_SECONDS))
        return bool(now >= row.reclaim_at and watched >= enough)

    def _forget(self, node_ids: Collection[str]) -> None:
        with self._store.write() as connection:
            connection.execute(_FORGET, [{"of_node": node_id} for node_id in sorted(node_ids)])

    def _tell(self, node_ids: Sequence[str]) -> None:
        """Write down that nodes are lost, and tell it with proposals, in one transaction."""
        chosen = self._within_bounds(node_ids)
        # Takes its time, so nobody's writes wait for it.
        plans = self._replacements.plans(chosen)
        now = self._clock()
        events: list[NewEvent] = []
        with self._store.write() as connection:
            insert = _INSERT[connection.dialect.name]
            for node_id in sorted(chosen):
                node = _hold(connection, node_id)
                if node is None or node.health != Health.UNREACHABLE.value or node.admin in IN_HAND:
                    continue
                # Whoever saw it last may have had a clock ahead of this one.
                lost_at = max(now, node.health_since)
                reclaim_at = lost_at + timedelta(seconds=self._reclaim_after)
                values = {"node_id": node_id, "lost_at": lost_at, "reclaim_at": reclaim_at, "reclaimed_at": None}
                # Not there where another manager was faster, who told it then.
                if connection.scalar(insert, values) is not None:
                    data = _lost_data(plans[node_id], node, lost_at, reclaim_at)
                    events.append(NewEvent(EventType.NODE_LOST, node_id, lost_at, data))
            emit_all(connection, events)
        at = self._monotonic()
        for event in events:
            self._lost[event.node_id, event.at] = _Seen(at, self._reclaim_after)
            self._log.warning("a node is lost", node_id=event.node_id, allocations=event.data["allocations"])

    def _within_bounds(self, node_ids: Sequence[str]) -> list[str]:
        """Take as many nodes as have together no more allocations than proposals are made for at once; at least one."""
        table = tables.allocations.c
        query = (
            sa.select(table.node_id, sa.func.count().label("held"))
            .where(table.node_id.in_(node_ids))
            .group_by(table.node_id)
        )
        with self._store.read() as connection:
            counts = {row.node_id: row.held for row in connection.execute(query)}
        chosen: list[str] = []
        total = 0
        for node_id in node_ids:
            total += min(counts.get(node_id, 0), MAX_ALLOCATIONS)
            if chosen and total > MAX_ALLOCATIONS:
                break
            chosen.append(node_id)
        return chosen

    def _reclaim(self, node_id: str, lost_at: datetime) -> None:
        """Take all allocations from a lost node, and let its epoch move on; nothing if it isn't lost any more."""
        now, table, lost = self._clock(), tables.allocations, tables.lost_nodes
        try:
            with self._store.write() as connection:
                ledger = Ledger(connection, self._settings, now)
                # In the ledger's order: owners before the node.
                owners = sa.select(table.c.owner).where(table.c.node_id == node_id).distinct()
                ledger.hold(connection.scalars(owners), [])
                node = _hold(connection, node_id)
                row = connection.execute(sa.select(lost).where(lost.c.node_id == node_id)).one_or_none()
                if node is None or row is None or row.lost_at != lost_at:
                    return
                if row.reclaimed_at is not None or _is_over(node, row):
                    return
                held = select_held(connection, ledger, table.c.node_id == node_id)
                for allocation in held:
                    ledger.drop(allocation, RELEASE_REASON)
                ledger.write()
                epoch = accounts.move_on(connection, node_id)
                connection.execute(lost.update().where(lost.c.node_id == node_id).values(reclaimed_at=now))
                data = {
                    "lost_at": render_time(lost_at),
                    "epoch": epoch,
                    "allocations": len(held),
                    "released": [allocation.allocation_id for allocation in held[:_MAX_TOLD]],
                    "deployments": _deployments(allocation.deployment_id for allocation in held),
                }
                emit_all(connection, [NewEvent(EventType.NODE_RECLAIMED, node_id, now, data)])
                changes.note(connection, [node_id])
        except StaleAccountError:
            # Somebody released some of it at the same time; the next round takes the rest.
            return
        self._log.warning("the work of a lost node was taken from it", node_id=node_id, allocations=len(held))


def _is_over(node: Any, row: Any) -> bool:
    """Tell whether a loss is over: the node is back, was back, or an operator has it in hand before its work was taken.

    What is silent when that ends is lost anew, with all its time.
    """
    if node.health != Health.UNREACHABLE.value or node.health_since > row.lost_at:
        return True
    return node.admin in IN_HAND and row.reclaimed_at is None


def _left(until: datetime, now: datetime, most: float) -> float:
    return min(most, max(0.0, (until - now).total_seconds()))


def _hold(connection: sa.Connection, node_id: str) -> Any:
    """Keep everybody else from the node until the end of the transaction, and read it; None if it isn't registered."""
    connection.execute(_HOLD, {"of_node": node_id}).all()
    return connection.execute(_NODE, {"of_node": node_id}).one_or_none()


def _lost_data(plan: Plan, node: Any, lost_at: datetime, reclaim_at: datetime) -> dict[str, Any]:
    told = plan.items[:_MAX_TOLD]
    return {
        "lost_at": render_time(lost_at),
        "reclaim_at": render_time(reclaim_at),
        "evidence": node.evidence,
        "cause": node.health_cause,
        "epoch": node.epoch,
        "allocations": len(plan.items) + plan.left_out,
        "deployments": _deployments(item.deployment_id for item in plan.items),
        "replacements": [item.as_data() for item in told],
        "left_out": len(plan.items) - len(told) + plan.left_out,
    }


def _deployments(found: Iterable[str | None]) -> list[str]:
    return sorted({deployment_id for deployment_id in found if deployment_id is not None})


_nodes, _states, _lost = tables.nodes.c, tables.node_states.c, tables.lost_nodes.c
_READ = (
    _states.node_id,
    _states.health,
    _states.health_since,
    _states.frozen_until,
    _nodes.admin,
    _lost.lost_at,
    _lost.reclaim_at,
    _lost.reclaimed_at,
)
# In two halves, each by an index; together, or with a plain join in the second, SQLite would go through all nodes each second.
_LOOK = sa.union_all(
    sa.select(*_READ)
    .select_from(tables.node_states)
    .join(tables.nodes, _nodes.node_id == _states.node_id)
    .join(tables.lost_nodes, _lost.node_id == _states.node_id, isouter=True)
    .where(_states.health == Health.UNREACHABLE.value),
    # Of what is back no more needs to be known.
    sa.select(
        _lost.node_id,
        sa.literal(_BACK),
        _lost.lost_at,
        sa.null(),
        sa.literal(_BACK),
        _lost.lost_at,
        _lost.reclaim_at,
        _lost.reclaimed_at,
    ).where(~sa.exists().where(_states.node_id == _lost.node_id, _states.health == Health.UNREACHABLE.value)),
)
_HOLD = sa.select(_nodes.node_id).where(_nodes.node_id == sa.bindparam("of_node")).with_for_update()
_NODE = (
    sa.select(
        _nodes.admin,
        _states.health,
        _states.health_since,
        _states.health_cause,
        _states.evidence,
        tables.node_accounts.c.epoch,
    )
    .join(tables.node_states, _states.node_id == _nodes.node_id)
    .join(tables.node_accounts, tables.node_accounts.c.node_id == _nodes.node_id, isouter=True)
    .where(_nodes.node_id == sa.bindparam("of_node"))
)
# Only what _is_over still says of.
_FORGET = tables.lost_nodes.delete().where(
    _lost.node_id == sa.bindparam("of_node"),
    ~sa.exists().where(
        _states.node_id == _lost.node_id,
        _states.health == Health.UNREACHABLE.value,
        _nodes.node_id == _lost.node_id,
        _states.health_since <= _lost.lost_at,
        sa.or_(_nodes.admin.not_in(IN_HAND), _lost.reclaimed_at.is_not(None)),
    ),
)
_INSERT = {
    "sqlite": sqlite.insert(tables.lost_nodes).on_conflict_do_nothing().returning(_lost.node_id),
    "postgresql": postgresql.insert(tables.lost_nodes).on_conflict_do_nothing().returning(_lost.node_id),
}
