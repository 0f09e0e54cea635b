# SPDX-License-Identifier: GPL-3.0-or-later
"""How nodes and what was seen on them look as JSON: one rendering for the API, the command line and the plugins.

Pure: domain objects in, plain data out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from node_manager.capacity import Account, capacity_of
from node_manager.health_checker import NodeState, penalty_at
from node_manager.ledger import Allocation
from node_manager.node_registry import Node
from node_manager.node_states import Transition
from node_manager.resources import as_data
from node_manager.samples import Minute, Observed, applications_of, summarise
from node_manager.settings import Settings
from node_manager.shapes import Sample

if TYPE_CHECKING:
    # Types only: loading them costs 0.15 s, which each worker of a playbook would pay.
    from node_manager.advice import Suggestions
    from node_manager.deployments import Placed
    from node_manager.drain_blockers import Situation
    from node_manager.fault_handler import Outlook
    from node_manager.guard_keeper import Pause, ScopeReport
    from node_manager.recovery_rows import Recovery


def render_time(at: datetime | None) -> str | None:
    """Write a time as RFC 3339 in UTC with Z and microseconds."""
    return None if at is None else at.astimezone(UTC).isoformat(timespec="microseconds")[:-6] + "Z"


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
        "capacity": capacity_of(
            node.declared_capacity, node.facts, settings.node_types.get(node.node_type) if node.node_type else None
        ),
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


def render_node_state(node: Node, settings: Settings, now: datetime) -> dict[str, Any]:
    """Show a node as the topic of states has it: what lists have, and why, without the times of mere contacts."""
    shown = render_node(node, settings, now)
    del shown["last_contact_at"]
    return {
        **shown,
        "health_since": render_time(node.state.health_since),
        "conditions": render_conditions(node.state),
    }


def render_node_detail(
    node: Node, sample: Observed | None, situation: Situation | None, settings: Settings, now: datetime
) -> dict[str, Any]:
    """Show a node with all that is known of it but its samples; *situation* is that of its drain or maintenance."""
    parsed = None if sample is None else Sample.model_validate(sample.data)
    return {
        **render_node(node, settings, now),
        "health_since": render_time(node.state.health_since),
        "health_cause": node.state.health_cause,
        "conditions": render_conditions(node.state),
        "facts": node.facts,
        "facts_observed_at": render_time(node.facts_observed_at),
        "facts_source": node.facts_source,
        "facts_age_seconds": _age_of(node.facts_observed_at, now),
        "applications_observed_at": None if sample is None else render_time(sample.observed_at),
        "applications_source": None if sample is None else sample.source,
        "applications_age_seconds": None if sample is None else _age_seconds(sample, now),
        "applications": [] if parsed is None else [item.model_dump() for item in applications_of(parsed)],
        "host_keys": [{"public_key": key, "origin": origin} for key, origin in node.host_keys],
        "epoch": node.epoch,
        "maintenance": None if situation is None else render_maintenance(situation),
    }


def render_maintenance(situation: Situation) -> dict[str, Any]:
    """Show how it stands with a node's drain or maintenance, and what is in the way."""
    record, notes = situation.record, situation.record.notes
    return {
        "phase": "draining" if record.drains else "maintenance" if record.leaving_at is None else "leaving",
        "reason": record.reason,
        "requested_by": record.requested_by,
        "started_at": render_time(record.started_at),
        "then": notes.then.value,
        "deadline_at": render_time(record.deadline_at),
        "drained_at": render_time(record.drained_at),
        "until": render_time(record.until),
        "keep_cordon": record.keep_cordon,
        "leaving_at": render_time(record.leaving_at),
        "message": notes.message,
        "blockers": [
            {
                "kind": blocker.kind.value,
                "allocation_id": blocker.allocation_id,
                "container": blocker.container,
                "deployment_id": blocker.deployment_id,
                "owner": blocker.owner,
                "since": render_time(blocker.since),
                "message": blocker.message,
            }
            for blocker in situation.blockers
        ],
        "proposals": list(notes.proposals),
    }


def render_health(
    node: Node, report: Observed | None, settings: Settings, now: datetime, transitions: Sequence[Transition] = ()
) -> dict[str, Any]:
    """Show the verdict on a node, why it stands, how it came about, and the checks behind it."""
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
        "evidence": None if node.state.evidence is None else node.state.evidence.value,
        "frozen_until": render_time(node.state.frozen_until),
        "probation_until": render_time(node.state.probation_until),
        "flap_penalty": round(penalty_at(node.state, now, settings.configuration.health), 1),
        "conditions": render_conditions(node.state),
        "transitions": [
            {
                "from": transition.before,
                "to": transition.after,
                "cause": transition.cause,
                "source": transition.source,
                "at": render_time(transition.at),
            }
            for transition in transitions
        ],
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


def render_resources(node_id: str, books: Account, allocations: list[Allocation]) -> dict[str, Any]:
    """Show a node's books and what is allocated on it."""
    return {
        "node_id": node_id,
        **asdict(books),
        "allocations": [render_allocation(allocation) for allocation in allocations],
    }


def render_allocation(allocation: Allocation) -> dict[str, Any]:
    """Show one allocation."""
    return {
        "allocation_id": allocation.allocation_id,
        "node_id": allocation.node_id,
        "owner": allocation.owner,
        "deployment_id": allocation.deployment_id,
        "resources": as_data(allocation.ask),
        "units": allocation.units,
        "ttl_seconds": allocation.ttl_seconds,
        "expires_at": render_time(allocation.expires_at),
        "created_at": render_time(allocation.created_at),
    }


def render_placed(placed: Placed) -> dict[str, Any]:
    """Show what was chosen for a deployment."""
    allocations: list[Allocation | None] = list(placed.allocations) or [None] * len(placed.answer["nodes"])
    chosen = (
        {item["node_id"]: item for item in placed.answer["nodes"]}
        if len(allocations) != len(placed.answer["nodes"])
        else None
    )
    nodes = []
    for number, allocation in enumerate(allocations):
        item = (
            placed.answer["nodes"][number] if chosen is None else chosen.get(allocation.node_id if allocation else "")
        )
        nodes.append(_render_choice(item, allocation))
    expires_at = placed.allocations[0].expires_at if placed.allocations else None
    return {
        "deployment_id": placed.request.deployment_id,
        "owner": placed.request.owner,
        "decision_id": placed.decision_id,
        "strategy": placed.request.strategy.value,
        "reserved": bool(placed.allocations),
        "nodes": nodes,
        "considered": placed.answer["considered"],
        "rejected": placed.answer["rejected"],
        "candidates": [_rounded(item) for item in placed.answer["candidates"]],
        "expires_at": render_time(expires_at),
        "created_at": render_time(placed.at),
    }


def render_suggestions(found: Suggestions) -> dict[str, Any]:
    """Show what had better be moved."""
    return {
        **asdict(found),
        "at": render_time(found.at),
        "moves": [{**asdict(move), "since": render_time(move.since)} for move in found.moves],
    }


def render_decision(row: Any) -> dict[str, Any]:
    """Show a decision on record."""
    answer = row.answer
    return {
        "decision_id": row.decision_id,
        "deployment_id": row.deployment_id,
        "at": render_time(row.at),
        "request": row.request,
        **answer,
        "nodes": [_rounded(item) for item in answer["nodes"]],
        "candidates": [_rounded(item) for item in answer["candidates"]],
    }


def _render_choice(item: Mapping[str, Any] | None, allocation: Allocation | None) -> dict[str, Any]:
    found = _rounded(item) if item is not None else {"score": None, "scores": {}, "units": {}}
    if allocation is not None:
        return {
            **found,
            "node_id": allocation.node_id,
            "units": allocation.units,
            "allocation_id": allocation.allocation_id,
        }
    return {**found, "allocation_id": None}


def _rounded(item: Mapping[str, Any]) -> dict[str, Any]:
    """Show scores as people read them; the record has them exactly."""
    found = {**item, "score": None if item["score"] is None else round(item["score"], 2)}
    if "scores" in item:
        found["scores"] = {name: round(score, 2) for name, score in item["scores"].items()}
    return found


def render_recovery(recovery: Recovery) -> dict[str, Any]:
    """Show a climb of the recovery ladder with its steps."""
    return {
        "recovery_id": recovery.recovery_id,
        "node_id": recovery.node_id,
        "state": recovery.state.value,
        "dry_run": recovery.dry_run,
        "conditions": list(recovery.conditions),
        "critical": recovery.critical,
        "attempt": recovery.attempt,
        "canary": recovery.canary,
        "driver": recovery.driver,
        "requested_by": recovery.requested_by,
        "reason": recovery.reason,
        "message": recovery.message,
        "started_at": render_time(recovery.started_at),
        "cancel_requested_at": render_time(recovery.cancel_requested_at),
        "ended_at": render_time(recovery.ended_at),
        "steps": [
            {
                "position": step.position,
                "step": step.step,
                "state": step.state.value,
                "job_ids": list(step.job_ids),
                "message": step.message,
                "started_at": render_time(step.started_at),
                "acted_at": render_time(step.acted_at),
                "ended_at": render_time(step.ended_at),
            }
            for step in recovery.steps
        ],
    }


def render_pause(pause: Pause) -> dict[str, Any]:
    """Show a pause of automatic repair."""
    return {
        "name": pause.name,
        "zone": pause.zone,
        "reason": pause.reason,
        "until": render_time(pause.until),
        "created_by": pause.created_by,
        "created_at": render_time(pause.created_at),
    }


def render_scope(report: ScopeReport) -> dict[str, Any]:
    """Show the guard of a zone, or of the fleet."""
    state, census = report.state, report.census
    return {
        "scope": report.scope,
        "state": state.state.value,
        "since": render_time(state.since),
        "cause": state.cause,
        "exit": report.exit,
        "nodes": census.nodes,
        "unhealthy": census.unhealthy,
        "unreachable": census.unreachable,
        "in_recovery": census.in_recovery,
        "in_recovery_limit": report.in_recovery_limit,
        "last_start_at": render_time(state.last_start_at),
        "canary": None if state.canary is None else state.canary.node_id,
    }


def render_repair(outlook: Outlook, scopes: Sequence[ScopeReport]) -> dict[str, Any]:
    """Show how it stands with a node's repair; *scopes* are the guards that it depends on."""
    return {
        "active": None if outlook.active is None else render_recovery(outlook.active),
        "last": None if outlook.last is None else render_recovery(outlook.last),
        "attempts": outlook.record.attempts,
        "gave_up_at": render_time(outlook.record.gave_up_at),
        "conditions": list(outlook.found.conditions),
        "steps": list(outlook.found.steps),
        "left_out": [asdict(left) for left in outlook.found.left_out],
        "not_now": outlook.not_now,
        "guard": [render_scope(scope) for scope in scopes],
    }


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
            "severity": condition.severity.value,
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


def _age_of(at: datetime | None, now: datetime) -> float | None:
    return None if at is None else max(0.0, (now - at).total_seconds())
