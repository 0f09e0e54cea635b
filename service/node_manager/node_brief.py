# SPDX-License-Identifier: GPL-3.0-or-later
"""The few words of a node that whoever reads the whole fleet asks for, among them whether new work may be placed on it.

As health_checker.is_schedulable says it, from a handful of columns: a node that is healthy has no condition that fails, so
that only the conditions of degraded ones are read.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from node_manager.domain import Admin, Health
from node_manager.node_states import has_critical
from node_manager.store import tables

_nodes, _states = tables.nodes.c, tables.node_states.c
# An operator has such a node in hand: whatever becomes of it is nobody's alarm, and says nothing about failures.
IN_HAND = (Admin.MAINTENANCE.value, Admin.OFFLINE.value)
TYPE = sa.func.coalesce(_nodes.node_type, _states.recognised_type).label("type")
COLUMNS = (
    _nodes.node_id,
    _nodes.name,
    TYPE,
    _nodes.region,
    _nodes.zone,
    _nodes.site,
    _nodes.admin,
    _states.health,
    _states.quarantined,
    _states.last_contact_at,
    sa.case((_states.health == Health.DEGRADED.value, sa.cast(_states.conditions, sa.Text))).label("conditions"),
)


def is_schedulable(row: Any, fresh_from: datetime) -> bool:
    """Tell of a row with COLUMNS whether new work may be placed on the node; contacts before *fresh_from* are too old."""
    if row.admin != Admin.ACTIVE.value or row.quarantined:
        return False
    if row.last_contact_at is None or row.last_contact_at < fresh_from:
        return False
    if row.health == Health.DEGRADED.value:
        return not has_critical(row.conditions)
    return bool(row.health == Health.HEALTHY.value)
