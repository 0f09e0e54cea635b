# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node in drain or maintenance looks like now: what is still there, when it was last seen, whether its check passed.

Reads the store; the judgements on what was read are pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa

from node_manager.domain import Admin, ConditionType, Severity
from node_manager.health_checker import NodeState
from node_manager.node_admin import Record, of_row
from node_manager.node_states import state_of_row
from node_manager.settings import Settings
from node_manager.store import Store, tables

# Jobs read the containers for each sample; a stream may tell of those that it read one interval ago.
_JOB_SOURCE = "ansible"
_MAX_MESSAGE_CHARACTERS = 1000
_WAY_TO_IT = frozenset(
    (
        ConditionType.REACHABLE,
        ConditionType.MANAGEMENT_PATH,
        ConditionType.HOST_KEY_TRUSTED,
        ConditionType.AUTHENTICATED,
        ConditionType.PYTHON_AVAILABLE,
        ConditionType.PROBE_WORKING,
    )
)


class BlockerKind(StrEnum):
    """What keeps a node from being drained."""

    ALLOCATION = "allocation"
    WORKLOAD = "workload"
    # Nothing is known to be there, but nobody has looked since.
    UNSEEN = "unseen"


@dataclass(frozen=True)
class Blocker:
    """One thing that keeps a node from being drained."""

    kind: BlockerKind
    allocation_id: str | None
    container: str | None
    deployment_id: str | None
    owner: str | None
    since: datetime
    message: str

    @property
    def key(self) -> str:
        """Name it so that two looks can be compared."""
        return f"{self.kind}:{self.container or self.allocation_id or ''}"


class Look(NamedTuple):
    """A node's newest sample, as far as it tells of containers."""

    observed_at: datetime
    # By when the containers in it were read, at the latest.
    containers_at: datetime
    # Why it tells nothing of containers; empty where it does.
    cannot_tell: str


@dataclass(frozen=True)
class Situation:
    """All that is decided from, of one node."""

    admin: Admin
    record: Record
    state: NodeState
    report_at: datetime | None
    look: Look | None
    held: tuple[Blocker, ...]

    @property
    def allocations(self) -> list[Blocker]:
        """Give the allocations that are still there."""
        return [blocker for blocker in self.held if blocker.kind is BlockerKind.ALLOCATION]

    @property
    def held_keys(self) -> tuple[str, ...]:
        """Name what is still there, to be compared with what owners were told."""
        return tuple(blocker.key for blocker in self.held)

    @property
    def unseen(self) -> Blocker | None:
        """Tell why it is not known that the node is empty; None where it is, or something is there."""
        since = self.record.notes.emptied_at or self.record.started_at
        if self.held or (self.look is not None and not self.look.cannot_tell and self.look.containers_at >= since):
            return None
        if self.look is not None and self.look.containers_at >= since:
            why = f"its containers are not known: {self.look.cannot_tell}"
        else:
            why = "nobody has looked at it since its allocations were gone; the next sample tells"
        return Blocker(BlockerKind.UNSEEN, None, None, None, None, since, why)

    @property
    def blockers(self) -> list[Blocker]:
        """List what keeps the node from being drained; nothing where it is not to be."""
        if not self.record.drain or self.record.drained_at is not None:
            return []
        unseen = self.unseen
        return [*self.held, *([] if unseen is None else [unseen])]


def read_situation(connection: sa.Connection, settings: Settings, node_id: str) -> Situation | None:
    """Read what there is to decide about a node; None where it is not in drain or maintenance."""
    row = connection.execute(_SITUATION, {"node_id": node_id}).one_or_none()
    if row is None:
        return None
    record = of_row(row)
    look, held = None, []
    if record.drain and record.drained_at is None:
        look = _read_look(connection, settings, node_id)
        held = [*_read_allocations(connection, node_id), *_read_workloads(connection, node_id)]
    return Situation(Admin(row.admin), record, state_of_row(row), row.report_at, look, tuple(held))


def load_situation(store: Store, settings: Settings, node_id: str) -> Situation | None:
    """Read the same in a transaction of its own."""
    with store.read() as connection:
        return read_situation(connection, settings, node_id)


def judge(situation: Situation) -> str | None:
    """Tell what was seen of a node since it was to leave: "" if its full check passed, else why not; None: not known yet."""
    asked_at, state = situation.record.leaving_at, situation.state
    if asked_at is None:
        return None
    checked = situation.report_at is not None and situation.report_at >= asked_at
    tried = state.last_attempt_at is not None and state.last_attempt_at >= asked_at
    if not (checked or tried):
        return None
    if state.quarantined:
        return f"its host key changed; DELETE /nodes/{situation.record.node_id}/host-keys trusts the new one"
    failing = [
        condition
        for condition in state.conditions
        # Before the checks ran again, only what keeps them from running counts.
        if not condition.status
        and condition.severity is Severity.CRITICAL
        and (checked or condition.type in _WAY_TO_IT)
    ]
    if failing:
        told = "; ".join(f"{item.type.value}: {item.message or item.reason}" for item in failing)
        return told[:_MAX_MESSAGE_CHARACTERS]
    return "" if checked else None


def replacement_of(proposals: Iterable[dict[str, Any]], blocker: Blocker) -> dict[str, Any] | None:
    """Find where an allocation would go, or the one that a workload runs for."""
    wanted = blocker.allocation_id
    return next((item for item in proposals if wanted is not None and item["allocation_id"] == wanted), None)


def _read_look(connection: sa.Connection, settings: Settings, node_id: str) -> Look | None:
    row = connection.execute(_LOOK, {"node_id": node_id}).one_or_none()
    if row is None:
        return None
    lag = 0.0 if row.source == _JOB_SOURCE else settings.configuration.monitoring.sample_interval_seconds
    containers = row.sample.get("containers")
    if containers is None:
        why = "; ".join(
            str(error.get("message"))
            for error in row.sample.get("errors") or ()
            if error.get("collector") == "containers"
        )
        cannot_tell = why or "the node could not read them"
    else:
        # Without any runtime there are none, and a message says that.
        cannot_tell = str(containers["message"] or "") if containers["runtime"] is not None else ""
    return Look(row.observed_at, row.observed_at - timedelta(seconds=lag), cannot_tell[:_MAX_MESSAGE_CHARACTERS])


def _read_allocations(connection: sa.Connection, node_id: str) -> list[Blocker]:
    return [
        Blocker(
            BlockerKind.ALLOCATION,
            row.allocation_id,
            None,
            row.deployment_id,
            row.owner,
            row.created_at,
            "is still reserved here; its owner releases it once it is elsewhere",
        )
        for row in connection.execute(_ALLOCATIONS, {"node_id": node_id})
    ]


def _read_workloads(connection: sa.Connection, node_id: str) -> list[Blocker]:
    return [
        Blocker(
            BlockerKind.WORKLOAD,
            row.allocation_id,
            row.container,
            row.deployment_id,
            row.owner,
            row.seen_at,
            "still runs",
        )
        for row in connection.execute(_WORKLOADS, {"node_id": node_id})
    ]


_of_node: sa.BindParameter[str] = sa.bindparam("node_id")
_SITUATION = (
    sa.select(
        tables.maintenances,
        tables.nodes.c.admin,
        tables.node_reports.c.observed_at.label("report_at"),
        *(column for column in tables.node_states.c if column.name != "node_id"),
    )
    .join(tables.nodes, tables.nodes.c.node_id == tables.maintenances.c.node_id)
    .join(tables.node_states, tables.node_states.c.node_id == tables.maintenances.c.node_id)
    .join(tables.node_reports, tables.node_reports.c.node_id == tables.maintenances.c.node_id, isouter=True)
    .where(tables.maintenances.c.node_id == _of_node)
)
_LOOK = sa.select(tables.node_samples.c.observed_at, tables.node_samples.c.source, tables.node_samples.c.sample).where(
    tables.node_samples.c.node_id == _of_node
)
_ALLOCATIONS = (
    sa.select(tables.allocations)
    .where(tables.allocations.c.node_id == _of_node)
    .order_by(tables.allocations.c.allocation_id)
)
_WORKLOADS = (
    sa.select(
        tables.node_workloads,
        sa.func.coalesce(tables.allocations.c.owner, tables.deployments.c.owner).label("owner"),
    )
    .join(tables.allocations, tables.allocations.c.allocation_id == tables.node_workloads.c.allocation_id, isouter=True)
    .join(tables.deployments, tables.deployments.c.deployment_id == tables.node_workloads.c.deployment_id, isouter=True)
    .where(tables.node_workloads.c.node_id == _of_node)
    .order_by(tables.node_workloads.c.container)
)
