# SPDX-License-Identifier: GPL-3.0-or-later
"""What node selection looks at, one row per node, read from the store.

A row holds values only, no row depends on another, and rows can be written down and read back: a decision is replayed from them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from operator import attrgetter
from typing import Any

import sqlalchemy as sa

from node_manager.capacity import effective_of
from node_manager.domain import Admin, Health, Resource, Severity
from node_manager.overcommit import is_pressed
from node_manager.resources import COMMON
from node_manager.settings import Settings
from node_manager.store import tables

# Why a node takes no new work, whatever the time is.
NOT_ACTIVE = "not_active"
QUARANTINED = "quarantined"
UNHEALTHY = "unhealthy"
_CPU, _MEMORY = Resource.CPU_MILLICORES.value, Resource.MEMORY_MIB.value
_UNKNOWN_LOAD_PERCENT = 50.0
# Half of the full score for a node that has kept its health for an hour.
_STEADY_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node as selection sees it. Times are seconds since 1970."""

    node_id: str
    node_type: str | None
    region: str | None
    zone: str | None
    site: str | None
    latitude: float | None
    longitude: float | None
    labels: Mapping[str, str]
    features: Sequence[str]
    images: Sequence[str]
    blocked: str | None
    last_contact: float | None
    health: str
    health_since: float
    # What may be allocated now, devices in units; and what is, devices per unit in thousandths.
    effective: Mapping[str, int]
    units: Mapping[str, Sequence[str]]
    allocated: Mapping[str, int]
    used_units: Mapping[str, Mapping[str, int]]
    # Without overcommit: what a percentage of use is a percentage of.
    capacity: Mapping[str, int]
    cpu_percent: float | None
    memory_percent: float | None
    # Reserved since the newest sample, so not in its percentages yet.
    unseen: Mapping[str, int]
    deployments: Mapping[str, int]
    # When overcommit comes back, if it is off for pressure.
    pressed_until: float | None


@dataclass(frozen=True, slots=True)
class DeploymentRow:
    """What selection must know of a deployment that has replicas somewhere."""

    deployment_id: str
    labels: Mapping[str, str]
    # Its required anti-affinity as in its request: others must keep their distance too.
    repels: Sequence[Mapping[str, Any]]


_NAMES = [field.name for field in fields(NodeRow)]
_VALUES = attrgetter(*_NAMES)
_ALLOCATED, _USED_UNITS = _NAMES.index("allocated"), _NAMES.index("used_units")
_UNSEEN, _DEPLOYMENTS = _NAMES.index("unseen"), _NAMES.index("deployments")


def write_row(row: NodeRow) -> list[Any]:
    """Turn a row into plain data."""
    return list(_VALUES(row))


def read_row(values: Sequence[Any]) -> NodeRow:
    """Turn plain data back into the row it was."""
    return NodeRow(*values)


def with_books(
    row: NodeRow,
    allocated: Mapping[str, int],
    used_units: Mapping[str, Mapping[str, int]],
    unseen: Mapping[str, int],
    deployments: Mapping[str, int],
) -> NodeRow:
    """Give the row with other books; what dataclasses.replace does, in a quarter of its time."""
    values = list(_VALUES(row))
    values[_ALLOCATED], values[_USED_UNITS], values[_UNSEEN] = allocated, used_units, unseen
    values[_DEPLOYMENTS] = deployments
    return NodeRow(*values)


def load_score(row: NodeRow) -> float:
    """Score how idle a node is, 0 to 100: what was measured, and what was reserved since.

    Without a sample, what is allocated stands for what is used; without capacity that says nothing.
    """
    found = []
    for name, percent in ((_CPU, row.cpu_percent), (_MEMORY, row.memory_percent)):
        total = row.capacity.get(name)
        if percent is not None:
            found.append(percent + (100.0 * row.unseen.get(name, 0) / total if total else 0.0))
        elif total:
            found.append(100.0 * row.allocated.get(name, 0) / total)
    return 100.0 - min(100.0, max(found, default=_UNKNOWN_LOAD_PERCENT))


def stability_score(row: NodeRow, now: float) -> float:
    """Score how long a node has kept its health, 0 to 100; half as much where that is not the best."""
    age = max(0.0, now - row.health_since)
    whole = 100.0 if row.health == Health.HEALTHY.value else 50.0
    return whole * age / (age + _STEADY_SECONDS)


def load_rows(
    connection: sa.Connection, settings: Settings, now: datetime, node_ids: Sequence[str] | None = None
) -> list[NodeRow]:
    """Read the rows of all nodes, or of *node_ids*; those that are gone are left out."""
    query, held = _NODES, _ALLOCATIONS
    if node_ids is not None:
        query = query.where(tables.nodes.c.node_id.in_(node_ids))
        held = held.where(tables.allocations.c.node_id.in_(node_ids))
    allocations: defaultdict[str, list[Any]] = defaultdict(list)
    for allocation in connection.execute(held):
        allocations[allocation.node_id].append(allocation)
    return [_row(row, allocations.get(row.node_id, ()), settings, now) for row in connection.execute(query)]


def load_deployments(connection: sa.Connection, deployment_ids: Iterable[str] | None = None) -> list[DeploymentRow]:
    """Read the rows of all deployments, or of *deployment_ids*; those that nobody placed here are left out."""
    table = tables.deployments.c
    query = sa.select(table.deployment_id, table.request)
    if deployment_ids is not None:
        query = query.where(table.deployment_id.in_(sorted(deployment_ids)))
    return [deployment_row(row.deployment_id, row.request) for row in connection.execute(query)]


def deployment_row(deployment_id: str, request: Mapping[str, Any]) -> DeploymentRow:
    """Take from a deployment's request what others must respect."""
    repels = [
        term
        for term in request.get("anti_affinity", ())
        if term["mode"] == "required" and term.get("deployment_id") != deployment_id and not term.get("node_labels")
    ]
    return DeploymentRow(deployment_id, request.get("labels", {}), repels)


def _row(row: Any, allocations: Iterable[Any], settings: Settings, now: datetime) -> NodeRow:
    limits = settings.configuration.allocation
    pressed = is_pressed(row.pressed_at, now, limits)
    node_type = settings.node_types.get(row.type) if row.type else None
    unseen: dict[str, int] = {}
    deployments: dict[str, int] = {}
    for allocation in allocations:
        if allocation.deployment_id is not None:
            deployments[allocation.deployment_id] = deployments.get(allocation.deployment_id, 0) + 1
        if row.sampled_at is None or allocation.created_at >= row.sampled_at:
            for name, amount in allocation.resources.items():
                if name in COMMON:
                    unseen[name] = unseen.get(name, 0) + amount
    return NodeRow(
        node_id=row.node_id,
        node_type=row.type,
        region=row.region,
        zone=row.zone,
        site=row.site,
        latitude=row.latitude,
        longitude=row.longitude,
        labels=row.labels,
        features=sorted(row.features or ()),
        images=sorted({item["image"] for item in _listed(row.containers) if item.get("image")}),
        blocked=_blocked(row),
        last_contact=None if row.last_contact_at is None else row.last_contact_at.timestamp(),
        health=row.health,
        health_since=row.health_since.timestamp(),
        effective=effective_of(row.account_capacity or {}, node_type, pressed=pressed),
        units=row.units or {},
        allocated=row.allocated or {},
        used_units=row.used_units or {},
        capacity=row.account_capacity or {},
        cpu_percent=row.cpu_percent,
        memory_percent=row.memory_percent,
        unseen=unseen,
        deployments=deployments,
        pressed_until=row.pressed_at.timestamp() + limits.pressure_hold_seconds if pressed else None,
    )


def _blocked(row: Any) -> str | None:
    """Tell why a node takes no new work; the rule of health_checker.is_schedulable, but for freshness."""
    if row.admin != Admin.ACTIVE.value:
        return NOT_ACTIVE
    if row.quarantined:
        return QUARANTINED
    well = row.health in {Health.HEALTHY.value, Health.DEGRADED.value} and all(
        condition["status"] or condition["severity"] == Severity.WARNING.value for condition in row.conditions
    )
    return None if well else UNHEALTHY


def _listed(containers: Any) -> list[dict[str, Any]]:
    # A part of a JSON document comes as text from one driver and read from the other.
    found = json.loads(containers) if isinstance(containers, str) else containers
    return found or []


_nodes, _states, _samples = tables.nodes.c, tables.node_states.c, tables.node_samples.c
_accounts, _facts = tables.node_accounts.c, tables.node_facts.c
# Parts of the documents, not the documents: reading those as a whole would take most of the time.
_NODES = (
    sa.select(
        _nodes.node_id,
        sa.func.coalesce(_nodes.node_type, _states.recognised_type).label("type"),
        _nodes.region,
        _nodes.zone,
        _nodes.site,
        _nodes.latitude,
        _nodes.longitude,
        _nodes.labels,
        _nodes.admin,
        _states.quarantined,
        _states.health,
        _states.health_since,
        _states.conditions,
        _states.last_contact_at,
        _states.pressed_at,
        _facts.facts["features"].label("features"),
        _samples.observed_at.label("sampled_at"),
        _samples.sample[("cpu", "use_percent")].as_float().label("cpu_percent"),
        _samples.sample[("memory", "use_percent")].as_float().label("memory_percent"),
        _samples.sample[("containers", "items")].label("containers"),
        _accounts.capacity.label("account_capacity"),
        _accounts.units,
        _accounts.allocated,
        _accounts.used_units,
    )
    .join(tables.node_states, _states.node_id == _nodes.node_id)
    .join(tables.node_accounts, _accounts.node_id == _nodes.node_id, isouter=True)
    .join(tables.node_facts, _facts.node_id == _nodes.node_id, isouter=True)
    .join(tables.node_samples, _samples.node_id == _nodes.node_id, isouter=True)
)
_ALLOCATIONS = sa.select(
    tables.allocations.c.node_id,
    tables.allocations.c.deployment_id,
    tables.allocations.c.resources,
    tables.allocations.c.created_at,
)
