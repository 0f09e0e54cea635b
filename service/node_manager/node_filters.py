# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes a list shows: the filters of GET /nodes, as conditions of a query."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from node_manager.domain import Admin, Health, Status
from node_manager.store import tables


@dataclass(frozen=True)
class NodeFilter:
    """Which nodes to list; an empty field lets all pass, labels must all hold."""

    status: Status | None = None
    health: Health | None = None
    node_type: str | None = None
    zone: str | None = None
    site: str | None = None
    region: str | None = None
    labels: tuple[tuple[str, str | None], ...] = ()


def conditions(wanted: NodeFilter) -> list[sa.ColumnElement[bool]]:
    """Write the filter as conditions on nodes joined with node_states."""
    nodes, states = tables.nodes.c, tables.node_states.c
    found: list[sa.ColumnElement[bool]] = []
    if wanted.status is not None:
        in_maintenance = nodes.admin == Admin.MAINTENANCE.value
        out = sa.or_(nodes.admin == Admin.OFFLINE.value, states.health == Health.UNREACHABLE.value)
        match wanted.status:
            case Status.MAINTENANCE:
                found.append(in_maintenance)
            case Status.OFFLINE:
                found.append(sa.and_(sa.not_(in_maintenance), out))
            case Status.ONLINE:
                found.append(sa.and_(sa.not_(in_maintenance), sa.not_(out)))
    if wanted.health is not None:
        found.append(states.health == wanted.health.value)
    if wanted.node_type is not None:
        found.append(sa.func.coalesce(nodes.node_type, states.recognised_type) == wanted.node_type)
    for column, value in ((nodes.zone, wanted.zone), (nodes.site, wanted.site), (nodes.region, wanted.region)):
        if value is not None:
            found.append(column == value)
    for key, label in wanted.labels:
        labels = tables.node_labels.alias()
        match_label = sa.exists().where(labels.c.node_id == nodes.node_id, labels.c.key == key)
        found.append(match_label if label is None else match_label.where(labels.c.value == label))
    return found
