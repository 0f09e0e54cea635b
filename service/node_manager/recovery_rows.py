# SPDX-License-Identifier: GPL-3.0-or-later
"""Read climbs of the recovery ladder, and what repair needs to know of nodes, from the tables.

Inside the caller's transaction; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from node_manager.domain import Admin, Health, RecoveryState, StepState
from node_manager.node_states import state_of_row
from node_manager.problems import NodeNotFoundError, RecoveryNotFoundError
from node_manager.recovery_ladder import REPAIRABLE, Patient, Repairs
from node_manager.settings import Settings
from node_manager.store import tables

ENDS = frozenset((StepState.SKIPPED, StepState.SUCCEEDED, StepState.FAILED, StepState.PLANNED))
_recoveries, _steps, _records = tables.recoveries, tables.recovery_steps, tables.repair_records


@dataclass(frozen=True)
class Step:
    """One step of a climb."""

    position: int
    step: str
    state: StepState
    job_ids: tuple[str, ...]
    message: str | None
    started_at: datetime | None
    acted_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True)
class Recovery:
    """One climb of the ladder; attempt is 0 where a person asked for it."""

    sequence: int
    recovery_id: str
    node_id: str
    zone: str | None
    state: RecoveryState
    dry_run: bool
    conditions: tuple[str, ...]
    critical: bool
    attempt: int
    canary: bool
    driver: str
    requested_by: str
    reason: str
    message: str | None
    started_at: datetime
    deadline_at: datetime | None
    cancel_requested_at: datetime | None
    ended_at: datetime | None
    steps: tuple[Step, ...]

    @property
    def next_step(self) -> Step | None:
        """Give the step that is under way, or waits; None once all have ended."""
        return next((step for step in self.steps if step.state not in ENDS), None)


def active_of(connection: sa.Connection, node_id: str) -> Recovery | None:
    """Find the climb that goes on on a node, dry runs left out; None where there is none."""
    which = sa.and_(
        _recoveries.c.node_id == node_id, _recoveries.c.ended_at.is_(None), _recoveries.c.dry_run.is_(sa.false())
    )
    return next(iter(load(connection, which)), None)


def held(connection: sa.Connection, recovery_id: str) -> Recovery:
    """Read a climb and hold it until the end of the transaction."""
    connection.execute(
        sa.select(_recoveries.c.sequence).where(_recoveries.c.recovery_id == recovery_id).with_for_update()
    )
    return known(connection, recovery_id)


def known(connection: sa.Connection, recovery_id: str) -> Recovery:
    """Read a climb.

    Errors: RecoveryNotFoundError.
    """
    found = load(connection, _recoveries.c.recovery_id == recovery_id)
    if not found:
        raise RecoveryNotFoundError(
            f"no recovery {recovery_id!r} is on record; GET /recoveries lists those that are", recovery_id=recovery_id
        )
    return found[0]


def load(connection: sa.Connection, which: sa.ColumnElement[bool]) -> list[Recovery]:
    """Read the climbs that *which* lets pass, in the order of their starts, with their steps."""
    rows = connection.execute(sa.select(_recoveries).where(which).order_by(_recoveries.c.sequence)).all()
    if not rows:
        return []
    steps: dict[str, list[Step]] = {}
    found = connection.execute(
        sa.select(_steps).where(_steps.c.recovery_id.in_([row.recovery_id for row in rows])).order_by(_steps.c.position)
    )
    for row in found:
        steps.setdefault(row.recovery_id, []).append(
            Step(
                row.position,
                row.step,
                StepState(row.state),
                tuple(row.job_ids),
                row.message,
                row.started_at,
                row.acted_at,
                row.ended_at,
            )
        )
    return [
        Recovery(
            **{
                **row._mapping,
                "state": RecoveryState(row.state),
                "conditions": tuple(row.conditions),
                "steps": tuple(steps.get(row.recovery_id, ())),
            }
        )
        for row in rows
    ]


def read_patient(connection: sa.Connection, settings: Settings, node_id: str) -> Patient:
    """Read what repair needs to know of a node, and hold its row.

    Errors: NodeNotFoundError.
    """
    query = _PATIENT.where(tables.nodes.c.node_id == node_id).with_for_update(of=tables.nodes)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NodeNotFoundError(node_id)
    return patient_of_row(row, settings)


def read_patients(connection: sa.Connection, settings: Settings, node_ids: Iterable[str]) -> dict[str, Patient]:
    """Read several nodes; those that are gone are left out."""
    rows = connection.execute(_PATIENT.where(tables.nodes.c.node_id.in_(list(node_ids))))
    return {row.node_id: patient_of_row(row, settings) for row in rows}


def sick_nodes(connection: sa.Connection, settings: Settings, now: datetime, after: str, limit: int) -> list[Patient]:
    """Read the nodes, ordered by node_id and behind *after*, that may be repaired by themselves."""
    states = tables.node_states.c
    query = (
        _PATIENT.join(_records, _records.c.node_id == tables.nodes.c.node_id, isouter=True)
        .where(
            tables.nodes.c.node_id > after,
            tables.nodes.c.admin.in_([admin.value for admin in REPAIRABLE]),
            states.health.in_((Health.DEGRADED.value, Health.UNREACHABLE.value)),
            sa.not_(states.quarantined),
            sa.not_(states.suppressed),
            sa.or_(states.frozen_until.is_(None), states.frozen_until <= now),
            _records.c.gave_up_at.is_(None),
        )
        .order_by(tables.nodes.c.node_id)
        .limit(limit)
    )
    return [patient_of_row(row, settings) for row in connection.execute(query)]


def patient_of_row(row: sa.Row[Any], settings: Settings) -> Patient:
    """Make a patient of a row that PATIENT_COLUMNS gave."""
    return Patient(
        node_id=row.node_id,
        zone=row.zone,
        admin=Admin(row.admin),
        is_local=row.connection["kind"] == "local",
        state=state_of_row(row),
        ladders=settings.ladders_of(row.node_type or row.recognised_type),
        has_power=settings.configuration.recovery.power is not None,
    )


def read_repairs(connection: sa.Connection, node_ids: Iterable[str]) -> dict[str, Repairs]:
    """Read what is remembered of repairs, for those nodes that have something."""
    rows = connection.execute(sa.select(_records).where(_records.c.node_id.in_(list(node_ids))))
    return {row.node_id: Repairs(row.attempts, row.last_ended_at, row.gave_up_at) for row in rows}


_STATE_COLUMNS = [column for column in tables.node_states.c if column.name != "node_id"]
PATIENT_COLUMNS = (
    tables.nodes.c.node_id,
    tables.nodes.c.zone,
    tables.nodes.c.admin,
    tables.nodes.c.connection,
    tables.nodes.c.node_type,
    *_STATE_COLUMNS,
)
_PATIENT = sa.select(*PATIENT_COLUMNS).join(tables.node_states, tables.node_states.c.node_id == tables.nodes.c.node_id)
