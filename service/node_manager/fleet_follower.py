# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep a fleet index current from the store: all of it at first, then what the feed of changes names."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import sqlalchemy as sa

from node_manager import changes
from node_manager.fleet_index import FleetIndex
from node_manager.fleet_rows import load_deployments, load_rows
from node_manager.settings import Settings

_NODES_PER_QUERY = 500


def follow(
    index: FleetIndex, connection: sa.Connection, settings: Settings, now: datetime, since: int, writer: str
) -> int:
    """Take over what changed in the store since a mark; give the mark to go on from.

    Shapes: *since* 0 reads everything, into an empty index; what *writer* noted, and nobody else since, the index has already.
    """
    found, following = changes.read(connection, since)
    if since == 0:
        for row in load_rows(connection, settings, now):
            index.put(row)
        for deployment in load_deployments(connection):
            index.put_deployment(deployment)
        return following
    changed = {change.node_id for change in found if change.writer != writer}
    changed.update(index.due(now.timestamp()))
    if changed:
        _reload(index, connection, settings, now, changed)
    return following


def _reload(
    index: FleetIndex, connection: sa.Connection, settings: Settings, now: datetime, node_ids: Iterable[str]
) -> None:
    """Read nodes anew, and the deployments on them."""
    wanted = sorted(node_ids)
    before = _deployments_on(index, wanted)
    gone = set(wanted)
    for start in range(0, len(wanted), _NODES_PER_QUERY):
        for row in load_rows(connection, settings, now, wanted[start : start + _NODES_PER_QUERY]):
            gone.discard(row.node_id)
            index.put(row)
    for node_id in gone:
        index.remove(node_id)
    after = _deployments_on(index, wanted)
    known = index.deployments.rows
    placed = load_deployments(connection, after) if after else []
    for deployment in placed:
        if known.get(deployment.deployment_id) != deployment:
            index.put_deployment(deployment)
    # Gone, or there by allocations that somebody made one by one.
    for name in (before | after).difference(deployment.deployment_id for deployment in placed):
        if name in after or name not in index.deployments.holders:
            index.forget_deployment(name)


def _deployments_on(index: FleetIndex, node_ids: Iterable[str]) -> set[str]:
    rows = (index.row_of(node_id) for node_id in node_ids)
    return {name for row in rows if row is not None for name in row.deployments}
