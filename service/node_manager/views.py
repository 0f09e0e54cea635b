# SPDX-License-Identifier: GPL-3.0-or-later
"""How nodes and what was seen on them look as JSON: one rendering for the API, the command line and the plugins.

Pure: domain objects in, plain data out.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from node_manager.health_checker import NodeState
from node_manager.node_registry import Node
from node_manager.resource_allocator import Account, capacity_of
from node_manager.resource_monitor import Minute, Observed, applications_of, summarise
from node_manager.settings import Settings
from node_manager.shapes import Sample


def render_time(at: datetime | None) -> str | None:
    """Write a time as RFC 3339 in UTC with Z and microseconds."""
    return None if at is None else at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def render_node(node: Node, settings: Settings, now: datetime) -> dict[str, Any]:
    """Show a node as lists and answers have it."""
    return {
        "node_id": node.node_id,
        "name": node.name,
        "address": node.address,
        "node_type": node.node_type,
        "node_type_source": _type_source(node),
        "labels": node.labels,
        "location": node.location,
        "connection": node.connection,
        "capacity": capacity_of(node.declared_capacity, node.facts),
        "declared_capacity": node.declared_capacity,
        "admin": node.admin.value,
        "health": node.state.health.value,
        "status": node.status.value,
        "schedulable": node.schedulable(now, stale_after(settings)),
        "quarantined": node.state.quarantined,
        "last_contact_at": render_time(node.state.last_contact_at),
        "generation": node.generation,
        "created_at": render_time(node.created_at),
        "updated_at": render_time(node.updated_at),
    }


def render_node_detail(node: Node, sample: Observed | None, settings: Settings, now: datetime) -> dict[str, Any]:
    """Show a node with all that is known of it but its samples."""
    parsed = None if sample is None else Sample.model_validate(sample.data)
    return {
        **render_node(node, settings, now),
        "health_since": render_time(node.state.health_since),
        "health_cause": node.state.health_cause,
        "conditions": render_conditions(node.state),
        "facts": node.facts,
        "facts_observed_at": render_time(node.facts_observed_at),
        "applications": [] if parsed is None else [item.model_dump() for item in applications_of(parsed)],
        "host_keys": [{"public_key": key, "origin": origin} for key, origin in node.host_keys],
    }


def render_health(node: Node, report: Observed | None, settings: Settings, now: datetime) -> dict[str, Any]:
    """Show the verdict on a node, why it stands, and the checks behind it."""
    return {
        "node_id": node.node_id,
        "admin": node.admin.value,
        "health": node.state.health.value,
        "health_since": render_time(node.state.health_since),
        "health_cause": node.state.health_cause,
        "status": node.status.value,
        "schedulable": node.schedulable(now, stale_after(settings)),
        "quarantined": node.state.quarantined,
        "failures": node.state.failures,
        "last_contact_at": render_time(node.state.last_contact_at),
        "last_attempt_at": render_time(node.state.last_attempt_at),
        "conditions": render_conditions(node.state),
        "report": None if report is None else report.data,
        "observed_at": None if report is None else render_time(report.observed_at),
        "source": None if report is None else report.source,
        "age_seconds": None if report is None else _age_seconds(report, now),
    }


def render_utilization(node_id: str, sample: Observed, minutes: list[Minute] | None, now: datetime) -> dict[str, Any]:
    """Show a node's newest sample, in short and whole, and its history where asked for."""
    return {
        "node_id": node_id,
        "observed_at": render_time(sample.observed_at),
        "source": sample.source,
        "age_seconds": _age_seconds(sample, now),
        "utilization": asdict(summarise(Sample.model_validate(sample.data))),
        "sample": sample.data,
        "history": None
        if minutes is None
        else [{**asdict(minute), "start": render_time(minute.start)} for minute in minutes],
    }


def render_resources(node_id: str, books: Account, allocations: list[dict[str, Any]]) -> dict[str, Any]:
    """Show a node's books and what is allocated on it."""
    return {"node_id": node_id, **asdict(books), "allocations": allocations}


def render_node_types(settings: Settings) -> dict[str, Any]:
    """Show what is checked on each type, and the general thresholds for nodes of no known type."""
    return {
        "node_types": {
            name: {
                "description": definition.description,
                "recognised_by": None
                if definition.recognised_by is None
                else definition.recognised_by.model_dump(exclude_none=True),
                "checks": definition.checks_as_data(),
                "thresholds": settings.thresholds_of(name),
            }
            for name, definition in sorted(settings.node_types.items())
        },
        "thresholds": settings.thresholds_of(None),
        "checks_timeout_seconds": settings.configuration.health.checks_timeout_seconds,
    }


def render_conditions(state: NodeState) -> list[dict[str, Any]]:
    """Show a node's conditions."""
    return [
        {
            "type": condition.type.value,
            "status": condition.status,
            "reason": condition.reason,
            "message": condition.message,
            "since": render_time(condition.since),
        }
        for condition in state.conditions
    ]


def stale_after(settings: Settings) -> timedelta:
    """Tell from which age on a contact no longer makes a node schedulable."""
    return timedelta(seconds=settings.configuration.monitoring.stale_after_seconds)


def _type_source(node: Node) -> str | None:
    if node.declared_type is not None:
        return "declared"
    return None if node.recognised_type is None else "recognised"


def _age_seconds(observed: Observed, now: datetime) -> float:
    return max(0.0, (now - observed.observed_at).total_seconds())
