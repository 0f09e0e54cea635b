# SPDX-License-Identifier: GPL-3.0-or-later
"""Count how many nodes there are and how many are unwell, per zone and in the fleet: what the guard of repairs looks at.

Two queries whose cost hardly grows with the fleet while it is well; writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import sqlalchemy as sa

from node_manager.domain import Health
from node_manager.guard_terms import Census
from node_manager.node_brief import IN_HAND
from node_manager.node_states import has_critical
from node_manager.recovery_guard import FLEET, scope_of
from node_manager.store import tables

_UNWELL = frozenset((Health.SUSPECT.value, Health.UNREACHABLE.value, Health.FLAPPING.value, Health.RECOVERING.value))
_nodes, _states, _recoveries = tables.nodes.c, tables.node_states.c, tables.recoveries.c


def take(connection: sa.Connection) -> dict[str, Census]:
    """Count each scope that has nodes."""
    nodes: Counter[str] = Counter()
    unhealthy: Counter[str] = Counter()
    unreachable: Counter[str] = Counter()
    in_recovery: Counter[str] = Counter()
    repaired = {row.node_id for row in connection.execute(_IN_RECOVERY)}
    for zone, count in connection.execute(_COUNTS):
        _add(nodes, zone, count)
    # Whatever is in recovery is unwell, even if it answers again.
    for row in connection.execute(_SUSPECTED):
        lost = row.health == Health.UNREACHABLE.value
        if row.node_id in repaired or row.health in _UNWELL or has_critical(row.conditions):
            _add(unhealthy, row.zone)
        if lost:
            _add(unreachable, row.zone)
        if row.node_id in repaired:
            repaired.discard(row.node_id)
            _add(in_recovery, row.zone)
    for zone in _zones_of(connection, repaired):
        _add(unhealthy, zone)
        _add(in_recovery, zone)
    return {scope: Census(nodes[scope], unhealthy[scope], unreachable[scope], in_recovery[scope]) for scope in nodes}


def _add(counts: Counter[str], zone: str | None, count: int = 1) -> None:
    counts[scope_of(zone)] += count
    counts[FLEET] += count


def _zones_of(connection: sa.Connection, node_ids: Iterable[str]) -> list[str | None]:
    wanted = sorted(node_ids)
    if not wanted:
        return []
    query = sa.select(_nodes.zone).where(_nodes.node_id.in_(wanted), _nodes.admin.not_in(IN_HAND))
    return list(connection.scalars(query))


_COUNTS = sa.select(_nodes.zone, sa.func.count()).where(_nodes.admin.not_in(IN_HAND)).group_by(_nodes.zone)
_SUSPECTED = (
    sa.select(_nodes.node_id, _nodes.zone, _states.health, sa.cast(_states.conditions, sa.Text).label("conditions"))
    .join(tables.nodes, _nodes.node_id == _states.node_id)
    .where(_nodes.admin.not_in(IN_HAND), _states.health.in_((*sorted(_UNWELL), Health.DEGRADED.value)))
)
_IN_RECOVERY = sa.select(_recoveries.node_id).where(_recoveries.ended_at.is_(None), _recoveries.dry_run.is_(sa.false()))
