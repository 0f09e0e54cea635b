# SPDX-License-Identifier: GPL-3.0-or-later
"""The stored side of the nodes of a batch: held, read, and written back in few statements.

Takes part in the transaction of observations.py, which decides what changes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from node_manager.domain import Admin, ObservationKind
from node_manager.health_checker import NodeState, without_future
from node_manager.node_conditions import Judgement
from node_manager.node_states import (
    StateUpdate,
    TimesUpdate,
    is_good,
    is_known,
    is_said,
    pressure_of_row,
    state_of_row,
    update_states,
)
from node_manager.overcommit import Pressure
from node_manager.settings import HealthSettings
from node_manager.store import tables
from node_manager.store.bulk import BulkInsert, BulkUpdate, Row, is_one_of
from node_manager.store.documents import JsonText, read_json
from node_manager.workloads import Workload

_DOCUMENTS = {
    ObservationKind.FACTS: (tables.node_facts, "facts"),
    ObservationKind.SAMPLE: (tables.node_samples, "sample"),
    ObservationKind.REPORT: (tables.node_reports, "report"),
}


@dataclass(frozen=True, slots=True)
class Newest:
    """One observation that is to replace the newest of its kind."""

    at: datetime
    source: str
    document: JsonText


@dataclass(slots=True)
class NodeWork:
    """One node's stored side while a batch is folded into it."""

    row: sa.Row[Any]
    admin: Admin
    pressure: Pressure
    recognised_type: str | None
    # Times beyond it were written by a clock that ran ahead.
    horizon: datetime
    limits: HealthSettings
    newest: dict[ObservationKind, datetime]
    # The kinds of which there is a row.
    stored: set[ObservationKind]
    settled: bool
    changed: bool = False
    # When a settled node last answered, as long as nothing else changed.
    answered_at: datetime | None = None
    writes: dict[ObservationKind, Newest] = field(default_factory=dict)
    # The managed workloads, where they are others than before.
    workloads: Sequence[Workload] | None = None
    _readings: Mapping[str, Any] | None = None
    _state: NodeState | None = None

    @property
    def node_type(self) -> str | None:
        """Give the type that counts."""
        declared: str | None = self.row.node_type
        return declared or self.recognised_type

    @property
    def last_attempt_at(self) -> datetime | None:
        """Tell when somebody last tried to reach it."""
        return self.newest.get(ObservationKind.CONTACT)

    @property
    def readings(self) -> Mapping[str, Any]:
        """Give what thresholds remember; always the same object until it is replaced."""
        if self._readings is None:
            self._readings = found = dict(read_json(self.row.readings))
            return found
        return self._readings

    @readings.setter
    def readings(self, readings: Mapping[str, Any]) -> None:
        """Remember something else."""
        self._readings = readings

    @property
    def state(self) -> NodeState:
        """Give its state, which is read only where it matters."""
        if self._state is None:
            state = without_future(state_of_row(self.row), self.horizon, self.limits)
            if self.answered_at is not None:
                state = replace(state, last_contact_at=self.answered_at, last_attempt_at=self.answered_at)
            self._state = state
        return self._state

    @state.setter
    def state(self, state: NodeState) -> None:
        """Put another state in its place."""
        self._state = state
        self.settled = False

    def stays_settled(self, seen: Judgement) -> bool:
        """Tell whether a sample says of a settled node only what is stored of it.

        The text of the conditions is searched and not read, which is most of what a quiet sample would cost.
        """
        text = self.row.conditions
        return (
            all(is_good(told, text) for told in seen.good)
            and all(is_said(found, text) for found in seen.bad)
            and not any(is_known(told, text) for told in seen.unknown)
        )

    def whole_update(self) -> StateUpdate:
        """Give all of its state to be written."""
        state = self.state if self._readings is None else replace(self.state, readings=self._readings)
        return StateUpdate(self.row.node_id, state, self.pressure, self.recognised_type, self.row.revision)

    def times_update(self, at: datetime) -> TimesUpdate:
        """Give what changed of a settled node."""
        readings = JsonText(self.row.readings) if self._readings is None else self._readings
        return TimesUpdate(self.row.node_id, at, self.pressure, readings, self.row.revision)


def load(
    connection: sa.Connection,
    node_ids: Sequence[str],
    kinds: Collection[ObservationKind],
    horizon: datetime,
    limits: HealthSettings,
) -> dict[str, NodeWork]:
    """Hold the nodes' rows and read what *kinds* of observations need; nodes that aren't there are left out."""
    given = {"node_ids": node_ids}
    if connection.dialect.name != "sqlite":
        # Before anything is read: what was read before the lock may have changed by the time it is given. In the
        # registry's order: the node against a change of what is declared, then its state. SQLite lets in one writer.
        for lock in _LOCKS:
            connection.execute(lock, given).all()
    newest: dict[str, dict[ObservationKind, datetime]] = defaultdict(dict)
    stored: dict[str, set[ObservationKind]] = defaultdict(set)
    for kind, query in _NEWEST.items():
        if kind in kinds:
            for node_id, at in connection.execute(query, given):
                stored[node_id].add(kind)
                if at <= horizon:
                    newest[node_id][kind] = at
    works = {}
    for row in connection.execute(_STATES, given):
        node_id = row.node_id
        times = newest[node_id]
        if row.last_attempt_at is not None and row.last_attempt_at <= horizon:
            times[ObservationKind.CONTACT] = row.last_attempt_at
        pressure = pressure_of_row(row)
        if pressure.pressed_at is not None and pressure.pressed_at > horizon:
            pressure = Pressure(pressure.readings, horizon)
        works[node_id] = NodeWork(
            row,
            Admin(row.admin),
            pressure,
            row.recognised_type,
            horizon,
            limits,
            times,
            stored[node_id],
            row.settled,
        )
    return works


def load_declared(connection: sa.Connection, node_ids: Sequence[str]) -> dict[str, sa.Row[Any]]:
    """Read of the nodes what their facts are held against: connection, capacity, and whether a host key is pinned."""
    return {row.node_id: row for row in connection.execute(_DECLARED, {"node_ids": node_ids})}


def write(connection: sa.Connection, works: dict[str, NodeWork]) -> None:
    """Write what changed, nodes in the order in which everybody holds them."""
    changed = [work for _, work in sorted(works.items()) if work.changed]
    whole: list[StateUpdate] = []
    times: list[TimesUpdate] = []
    for work in changed:
        if work.settled and work.answered_at is not None:
            times.append(work.times_update(work.answered_at))
        else:
            whole.append(work.whole_update())
    update_states(connection, whole, times)
    for kind in _DOCUMENTS:
        new: list[Row] = []
        again: list[Row] = []
        for work in changed:
            found = work.writes.get(kind)
            if found is not None:
                row = (found.at, found.source, found.document, work.row.node_id)
                (again if kind in work.stored else new).append(row)
        _UPDATES[kind](connection, again)
        _INSERTS[kind](connection, new)


_nodes, _states = tables.nodes.c, tables.node_states.c
_LOCKS = (
    sa.select(_nodes.node_id)
    .where(is_one_of(_nodes.node_id, "node_ids"))
    .order_by(_nodes.node_id)
    .with_for_update(read=True, key_share=True),
    sa.select(_states.node_id)
    .where(is_one_of(_states.node_id, "node_ids"))
    .order_by(_states.node_id)
    .with_for_update(),
)
_AS_TEXT = {"conditions", "readings"}
_STATES = (
    sa.select(
        _nodes.admin,
        _nodes.node_type,
        *(column for column in _states if column.name not in _AS_TEXT),
        # Most are only carried along.
        *(sa.cast(_states[name], sa.Text).label(name) for name in sorted(_AS_TEXT)),
    )
    .join(tables.nodes, _nodes.node_id == _states.node_id)
    .where(is_one_of(_states.node_id, "node_ids"))
)
_NEWEST = {
    kind: sa.select(table.c.node_id, table.c.observed_at).where(is_one_of(table.c.node_id, "node_ids"))
    for kind, (table, _) in _DOCUMENTS.items()
}
_DECLARED = sa.select(
    _nodes.node_id,
    _nodes.connection,
    _nodes.capacity,
    sa.exists().where(tables.host_keys.c.node_id == _nodes.node_id).label("keyed"),
).where(is_one_of(_nodes.node_id, "node_ids"))
_UPDATES = {
    kind: BulkUpdate(table, ("observed_at", "source", document), ("node_id",))
    for kind, (table, document) in _DOCUMENTS.items()
}
_INSERTS = {
    kind: BulkInsert(table, "observed_at", "source", document, "node_id")
    for kind, (table, document) in _DOCUMENTS.items()
}
