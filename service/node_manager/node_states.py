# SPDX-License-Identifier: GPL-3.0-or-later
"""Node states between the table and the pure NodeState; the changes of health that were told of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from node_manager.domain import ConditionType, Evidence, Health, Severity
from node_manager.events import EventType
from node_manager.health_checker import Condition, NodeState, Return, is_settled
from node_manager.overcommit import Pressure
from node_manager.store import tables
from node_manager.store.bulk import BulkUpdate
from node_manager.store.documents import read_json, write_json

_STATE = (
    "health",
    "health_since",
    "health_cause",
    "last_contact_at",
    "last_attempt_at",
    "failures",
    "conditions",
    "quarantined",
    "evidence",
    "frozen_until",
    "return_samples",
    "return_since",
    "probation_until",
    "flap_penalty",
    "flap_at",
    "suppressed",
    "readings",
    "settled",
)
_PRESSURE = ("cpu_readings", "pressed_at")
_TYPES = {condition.value: condition for condition in ConditionType}
_HEALTH = {health.value: health for health in Health}
_SEVERITIES = {severity.value: severity for severity in Severity}
# No other text in a document has quotes that aren't escaped.
_MARKS = {condition: f'"type":"{condition.value}"' for condition in ConditionType}
_GOOD_MARKS = {condition: f'{mark},"status":true' for condition, mark in _MARKS.items()}
_FIRST_MARK = '{"type":'
_BAD_MARK = '"status":false'
_CRITICAL = Severity.CRITICAL.value
_CRITICAL_MARK = f'"severity":"{_CRITICAL}"'
# It stands in a message, too, that has quotes and a colon; then the conditions are read.
_SPACED = '": '
_WHOLE = BulkUpdate(tables.node_states, (*_STATE, *_PRESSURE, "recognised_type", "revision"), ("node_id",))
_TIMES = BulkUpdate(
    tables.node_states, ("last_contact_at", "last_attempt_at", *_PRESSURE, "readings", "revision"), ("node_id",)
)


@dataclass(frozen=True)
class Transition:
    """One change of a node's health."""

    before: str
    after: str
    cause: str
    source: str
    at: datetime


def state_of_row(row: sa.Row[Any]) -> NodeState:
    """Read a state from a row that has the columns of node_states."""
    return NodeState(
        health=_HEALTH[row.health],
        health_since=row.health_since,
        health_cause=row.health_cause,
        last_contact_at=row.last_contact_at,
        last_attempt_at=row.last_attempt_at,
        failures=row.failures,
        # Whoever reads many rows takes the documents as text, for most of them need no reading.
        conditions=read_conditions(read_json(row.conditions) if isinstance(row.conditions, str) else row.conditions),
        quarantined=row.quarantined,
        evidence=None if row.evidence is None else Evidence(row.evidence),
        frozen_until=row.frozen_until,
        returning=None if row.return_samples is None else Return(row.return_samples, row.return_since),
        probation_until=row.probation_until,
        flap_penalty=row.flap_penalty,
        flap_at=row.flap_at,
        suppressed=row.suppressed,
        readings=read_json(row.readings) if isinstance(row.readings, str) else row.readings,
    )


def read_conditions(found: Iterable[dict[str, Any]]) -> tuple[Condition, ...]:
    """Read conditions as they are stored."""
    return tuple(
        Condition(
            _TYPES[raw["type"]],
            raw["status"],
            raw["reason"],
            raw["message"],
            datetime.fromtimestamp(raw["since"], UTC),
            _SEVERITIES[raw["severity"]],
        )
        for raw in found
    )


def conditions_as_data(conditions: Iterable[Condition]) -> list[dict[str, Any]]:
    """Give conditions as they are stored."""
    return [
        {
            "type": condition.type.value,
            "status": condition.status,
            "reason": str(condition.reason),
            "message": condition.message,
            "since": condition.since.timestamp(),
            "severity": condition.severity.value,
        }
        for condition in conditions
    ]


# Conditions as they are stored, as text: searched where reading them would be most of the work. A text that was written
# otherwise, with spaces put in, may say it all the same.


def is_known(told: ConditionType, conditions: str) -> bool:
    """Tell whether anything of a type is said."""
    return _MARKS[told] in conditions


def is_good(told: ConditionType, conditions: str) -> bool:
    """Tell whether a type is said to be well: there is but one way to say so."""
    return _GOOD_MARKS[told] in conditions


def is_said(bad: Condition, conditions: str) -> bool:
    """Tell whether just that is said, at whatever time it began."""
    told = write_json({"reason": bad.reason, "message": bad.message})[1:-1]
    beginning = f'{_MARKS[bad.type]},"status":false,{told},"since":'
    at = conditions.find(beginning)
    if at < 0:
        return False
    severity = conditions.find(',"severity":', at + len(beginning))
    return conditions.startswith(f',"severity":"{bad.severity.value}"}}', severity)


def has_critical(conditions: str) -> bool:
    """Tell whether a condition is said that is critical and not well."""
    if _SPACED in conditions:
        return any(not found["status"] and found["severity"] == _CRITICAL for found in read_json(conditions))
    return any(_BAD_MARK in told and _CRITICAL_MARK in told for told in conditions.split(_FIRST_MARK))


def insert_state(connection: sa.Connection, node_id: str, state: NodeState) -> None:
    """Write the first state of a node."""
    connection.execute(
        tables.node_states.insert(),
        {
            "node_id": node_id,
            "revision": _first_revision(state),
            "recognised_type": None,
            **dict(zip(_STATE, _values(state), strict=True)),
            **dict(zip(_PRESSURE, _pressure_values(Pressure()), strict=True)),
        },
    )


@dataclass(frozen=True)
class StateUpdate:
    """A node's state as it is to be written; its revision is the one that was read, while the row is held."""

    node_id: str
    state: NodeState
    pressure: Pressure
    recognised_type: str | None
    revision: int


@dataclass(frozen=True)
class TimesUpdate:
    """A settled node's times: all that one more good sample changes."""

    node_id: str
    at: datetime
    pressure: Pressure
    # JSON already, where nothing in it changed.
    readings: Any
    revision: int


def update_states(connection: sa.Connection, whole: list[StateUpdate], times: list[TimesUpdate]) -> None:
    """Write states and count their revisions up."""
    _WHOLE(
        connection,
        [
            (
                *_values(update.state),
                *_pressure_values(update.pressure),
                update.recognised_type,
                update.revision + 1,
                update.node_id,
            )
            for update in whole
        ],
    )
    _TIMES(
        connection,
        [
            (
                update.at,
                update.at,
                *_pressure_values(update.pressure),
                update.readings,
                update.revision + 1,
                update.node_id,
            )
            for update in times
        ],
    )


def transitions_of(connection: sa.Connection, node_id: str, limit: int) -> list[Transition]:
    """Read a node's last changes of health, newest first."""
    table = tables.outbox.c
    query = (
        sa.select(table.occurred_at, table.data)
        .where(table.node_id == node_id, table.type == EventType.HEALTH_CHANGED.value)
        .order_by(table.sequence.desc())
        .limit(limit)
    )
    return [
        Transition(row.data["from"], row.data["to"], row.data["cause"], row.data["source"], row.occurred_at)
        for row in connection.execute(query)
    ]


def pressure_of_row(row: sa.Row[Any]) -> Pressure:
    """Read the pressure from a row that has the columns of node_states."""
    return Pressure(tuple(row.cpu_readings), row.pressed_at)


def _pressure_values(pressure: Pressure) -> tuple[Any, ...]:
    return pressure.readings, pressure.pressed_at


def _first_revision(state: NodeState) -> int:
    """Start at the microsecond of registration: a node registered anew must not pass for the one before it."""
    return (state.health_since - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


def _values(state: NodeState) -> tuple[Any, ...]:
    """Give the values of _STATE."""
    return (
        state.health.value,
        state.health_since,
        state.health_cause,
        state.last_contact_at,
        state.last_attempt_at,
        state.failures,
        conditions_as_data(state.conditions),
        state.quarantined,
        None if state.evidence is None else state.evidence.value,
        state.frozen_until,
        None if state.returning is None else state.returning.samples,
        None if state.returning is None else state.returning.since,
        state.probation_until,
        state.flap_penalty,
        state.flap_at,
        state.suppressed,
        state.readings,
        is_settled(state),
    )
