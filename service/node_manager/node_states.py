# SPDX-License-Identifier: GPL-3.0-or-later
"""Node states between the table and the pure NodeState."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from node_manager.domain import ConditionType, Health
from node_manager.health_checker import Condition, NodeState
from node_manager.overcommit import Pressure
from node_manager.store import tables


def state_of_row(row: sa.Row[Any]) -> NodeState:
    """Read a state from a row that has the columns of node_states."""
    return NodeState(
        health=Health(row.health),
        health_since=row.health_since,
        health_cause=row.health_cause,
        last_contact_at=row.last_contact_at,
        last_attempt_at=row.last_attempt_at,
        failures=row.failures,
        conditions=tuple(
            Condition(
                type=ConditionType(raw["type"]),
                status=raw["status"],
                reason=raw["reason"],
                message=raw["message"],
                since=datetime.fromtimestamp(raw["since"], UTC),
            )
            for raw in row.conditions
        ),
        quarantined=row.quarantined,
    )


def insert_state(connection: sa.Connection, node_id: str, state: NodeState) -> None:
    """Write the first state of a node."""
    connection.execute(
        tables.node_states.insert(),
        {
            "node_id": node_id,
            "revision": _first_revision(state),
            "recognised_type": None,
            **_values(state),
            **_pressure_values(Pressure()),
        },
    )


def update_state(
    connection: sa.Connection, node_id: str, state: NodeState, recognised_type: str | None, pressure: Pressure
) -> None:
    """Write a node's state and count its revision up."""
    connection.execute(
        tables.node_states.update()
        .where(tables.node_states.c.node_id == node_id)
        .values(
            revision=tables.node_states.c.revision + 1,
            recognised_type=recognised_type,
            **_values(state),
            **_pressure_values(pressure),
        )
    )


def pressure_of_row(row: sa.Row[Any]) -> Pressure:
    """Read the pressure from a row that has the columns of node_states."""
    return Pressure(tuple(row.cpu_readings), row.pressed_at)


def _pressure_values(pressure: Pressure) -> dict[str, Any]:
    return {"cpu_readings": pressure.readings, "pressed_at": pressure.pressed_at}


def _first_revision(state: NodeState) -> int:
    """Start at the microsecond of registration: a node registered anew must not pass for the one before it."""
    return (state.health_since - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


def _values(state: NodeState) -> dict[str, Any]:
    return {
        "health": state.health.value,
        "health_since": state.health_since,
        "health_cause": state.health_cause,
        "last_contact_at": state.last_contact_at,
        "last_attempt_at": state.last_attempt_at,
        "failures": state.failures,
        "conditions": [
            {
                "type": condition.type.value,
                "status": condition.status,
                "reason": condition.reason,
                "message": condition.message,
                "since": condition.since.timestamp(),
            }
            for condition in state.conditions
        ],
        "quarantined": state.quarantined,
    }
