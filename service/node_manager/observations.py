# SPDX-License-Identifier: GPL-3.0-or-later
"""The one door: everything seen on a node comes in through record(), whoever saw it.

One batch is one transaction: the newest facts, sample and report, the history, the state transitions and their events.
Never writes what was declared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ValidationError

from node_manager import accounts, changes, events, host_keys
from node_manager.declarations import is_node_id, parse_host_key
from node_manager.domain import Admin, ContactReason, ObservationKind, TooLargeError, clean, recognise
from node_manager.health_checker import NodeState, after_failure, after_report, after_success
from node_manager.node_registry import Clock, utc_now
from node_manager.node_states import pressure_of_row, state_of_row, update_state
from node_manager.overcommit import Pressure, after_sample
from node_manager.samples import add_to_history
from node_manager.settings import Settings
from node_manager.shapes import Contact, Facts, Report, Sample
from node_manager.store import Store, tables

# A controller whose clock runs ahead must not keep later observations out.
_FUTURE_TOLERANCE = timedelta(seconds=5)
_SOURCE_CHARACTERS = 64
_SHAPES: dict[ObservationKind, type[BaseModel]] = {
    ObservationKind.FACTS: Facts,
    ObservationKind.SAMPLE: Sample,
    ObservationKind.REPORT: Report,
    ObservationKind.CONTACT: Contact,
}
_NEWEST = {
    ObservationKind.FACTS: (tables.node_facts, "facts"),
    ObservationKind.SAMPLE: (tables.node_samples, "sample"),
    ObservationKind.REPORT: (tables.node_reports, "report"),
}


@dataclass(frozen=True)
class Observation:
    """One thing seen on one node; data is as in docs/observations.md and not trusted."""

    node_id: str
    observed_at: datetime
    source: str
    kind: ObservationKind
    data: dict[str, Any]


@dataclass(frozen=True)
class Rejection:
    """One observation of a batch that was not taken."""

    index: int
    node_id: str
    code: str
    message: str


@dataclass
class Outcome:
    """What became of a batch."""

    recorded: int = 0
    late: int = 0
    rejected: list[Rejection] = field(default_factory=list)


@dataclass(frozen=True)
class _Parsed:
    index: int
    observation: Observation
    content: BaseModel
    # False for the contact that stands in for a rejected observation: that one is counted as rejected already.
    counted: bool = True


@dataclass
class _NodeWork:
    """One node's stored side while a batch is folded into it."""

    admin: Admin
    may_pin: bool
    state: NodeState
    pressure: Pressure
    declared_type: str | None
    recognised_type: str | None
    capacity: dict[str, int]
    newest: dict[ObservationKind, datetime]
    changed: bool = False
    writes: dict[ObservationKind, Observation] = field(default_factory=dict)
    contents: dict[ObservationKind, BaseModel] = field(default_factory=dict)


class ObservationLog:
    """The door to the store for what is seen."""

    def __init__(self, store: Store, settings: Settings, clock: Clock = utc_now) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._rules = {
            name: definition.recognised_by.model_dump(exclude_none=True)
            for name, definition in settings.node_types.items()
            if definition.recognised_by is not None
        }

    def record(self, batch: Sequence[Observation], *, may_pin: bool = True) -> Outcome:
        """Take a batch in, whole: each observation is recorded, late or rejected with its reason.

        Shapes: without *may_pin* no host key is pinned from facts: an agent speaks for itself, not for other nodes' keys.
        Errors: StoreUnavailableError; then nothing of the batch was taken.
        """
        outcome = Outcome()
        now = self._clock()
        parsed = sorted(self._parse(batch, now, outcome), key=lambda item: item.observation.observed_at)
        if not parsed:
            return outcome
        with self._store.write() as connection:
            pins = may_pin and self._settings.configuration.ssh.host_key_policy == "first_use"
            works = _load(connection, sorted({item.observation.node_id for item in parsed}), may_pin=pins)
            history: list[tuple[str, datetime, Sample]] = []
            for item in parsed:
                node_id = item.observation.node_id
                work = works.get(node_id)
                if work is None:
                    if item.counted:
                        outcome.rejected.append(_unknown_node(item.index, node_id))
                    continue
                taken = self._fold(connection, work, item)
                if item.counted:
                    outcome.recorded += taken
                    outcome.late += not taken
                if taken and isinstance(item.content, Sample):
                    history.append((node_id, item.observation.observed_at, item.content))
            # In the order in which everybody holds accounts.
            changed = sorted(node_id for node_id, work in works.items() if work.changed)
            for node_id in changed:
                self._write(connection, node_id, works[node_id])
            changes.note(connection, changed)
            add_to_history(connection, history)
        outcome.rejected.sort(key=lambda rejection: rejection.index)
        return outcome

    def _parse(self, batch: Sequence[Observation], now: datetime, outcome: Outcome) -> Iterable[_Parsed]:
        for index, told in enumerate(batch):
            if not is_node_id(told.node_id):
                outcome.rejected.append(_unknown_node(index, told.node_id))
                continue
            observation = replace(
                told,
                observed_at=min(told.observed_at, now + _FUTURE_TOLERANCE),
                source=str(clean(told.source))[:_SOURCE_CHARACTERS],
            )
            try:
                content = _SHAPES[told.kind].model_validate(clean(told.data))
            except (ValidationError, TooLargeError) as error:
                message = _first_line(error)
                outcome.rejected.append(Rejection(index, told.node_id, "unusable", message))
                if told.kind is ObservationKind.CONTACT:
                    # What the one who looked says about the attempt; the node has no part in it.
                    continue
                # The node did answer, with something that can't be used: that is a condition of the node, not silence.
                content = Contact(reached=False, reason=ContactReason.OUTPUT_UNUSABLE, message=message)
                yield _Parsed(index, replace(observation, kind=ObservationKind.CONTACT), content, counted=False)
            else:
                yield _Parsed(index, observation, content)

    def _fold(self, connection: sa.Connection, work: _NodeWork, item: _Parsed) -> bool:
        """Fold one observation into the node's state; False if something newer is stored already."""
        at, kind = item.observation.observed_at, item.observation.kind
        stored_at = work.newest.get(kind)
        if stored_at is not None and at <= stored_at:
            return False
        work.newest[kind] = at
        if kind is not ObservationKind.CONTACT:
            work.changed = True
            work.writes[kind] = item.observation
            work.contents[kind] = item.content
        if isinstance(item.content, Facts):
            self._take_facts(connection, work, item.observation, item.content)
        if isinstance(item.content, Sample):
            cpu = item.content.cpu
            work.pressure = after_sample(
                work.pressure,
                cpu.use_percent if cpu else None,
                cpu.pressure.some_avg60_percent if cpu and cpu.pressure else None,
                at,
                self._settings.configuration.allocation,
            )
        last_attempt_at = work.state.last_attempt_at
        # Checks are judged even if another look came later: that one may have been no run of the checks.
        if last_attempt_at is None or at >= last_attempt_at or isinstance(item.content, Report):
            self._transit(connection, work, item)
        return True

    def _take_facts(self, connection: sa.Connection, work: _NodeWork, observation: Observation, facts: Facts) -> None:
        work.recognised_type = recognise(facts.model_dump(by_alias=True), self._rules)
        if work.may_pin:
            keys = list(_usable_keys(facts.ssh_host_keys))
            host_keys.pin(connection, observation.node_id, keys, host_keys.FIRST_USE, observation.observed_at)
            work.may_pin = not keys

    def _transit(self, connection: sa.Connection, work: _NodeWork, item: _Parsed) -> None:
        before, at = work.state, item.observation.observed_at
        after = self._judge(before, item.content, at)
        if work.admin is Admin.MAINTENANCE:
            # An operator works on it: what is seen is kept, no verdict follows from it.
            after = replace(
                after, health=before.health, health_since=before.health_since, health_cause=before.health_cause
            )
        work.changed = work.changed or after != before
        work.state = after
        if after.health is not before.health:
            events.emit(
                connection,
                events.EventType.HEALTH_CHANGED,
                item.observation.node_id,
                at,
                {
                    "from": before.health.value,
                    "to": after.health.value,
                    "cause": after.health_cause,
                    "source": item.observation.source,
                },
            )

    def _write(self, connection: sa.Connection, node_id: str, work: _NodeWork) -> None:
        update_state(connection, node_id, work.state, work.recognised_type, work.pressure)
        for kind, observation in work.writes.items():
            table, document = _NEWEST[kind]
            content = work.contents[kind].model_dump(mode="json", by_alias=True)
            values = {"observed_at": observation.observed_at, "source": observation.source, document: content}
            updated = connection.execute(table.update().where(table.c.node_id == node_id), values)
            if updated.rowcount == 0:
                connection.execute(table.insert(), {"node_id": node_id, **values})
            if kind is ObservationKind.FACTS:
                node_type = work.declared_type or work.recognised_type
                accounts.fit(connection, node_id, node_type, work.capacity, content, self._settings)

    def _judge(self, state: NodeState, content: BaseModel, at: datetime) -> NodeState:
        if isinstance(content, Report):
            return after_report(state, content, at)
        if isinstance(content, Contact) and not content.reached:
            return after_failure(state, content, at, self._settings.configuration.health)
        return after_success(state, at)


def _lock(connection: sa.Connection, node_ids: Sequence[str]) -> None:
    """Hold the nodes' rows in the registry's order: the node against a change of what is declared, then its state."""
    for table, only_key in ((tables.nodes, True), (tables.node_states, False)):
        query = sa.select(table.c.node_id).where(table.c.node_id.in_(node_ids)).order_by(table.c.node_id)
        connection.execute(query.with_for_update(read=only_key, key_share=only_key)).all()


def _load(connection: sa.Connection, node_ids: Sequence[str], *, may_pin: bool) -> dict[str, _NodeWork]:
    # Before anything is read: what was read before the lock may have changed by the time it is given.
    _lock(connection, node_ids)
    query = (
        sa.select(
            tables.nodes.c.admin,
            tables.nodes.c.connection,
            tables.nodes.c.node_type,
            tables.nodes.c.capacity,
            tables.node_states,
        )
        .join(tables.nodes, tables.nodes.c.node_id == tables.node_states.c.node_id)
        .where(tables.node_states.c.node_id.in_(node_ids))
    )
    keyed = set(
        connection.scalars(
            sa.select(tables.host_keys.c.node_id).where(tables.host_keys.c.node_id.in_(node_ids)).distinct()
        )
    )
    newest: dict[str, dict[ObservationKind, datetime]] = defaultdict(dict)
    for kind, (table, _) in _NEWEST.items():
        for node_id, at in connection.execute(
            sa.select(table.c.node_id, table.c.observed_at).where(table.c.node_id.in_(node_ids))
        ):
            newest[node_id][kind] = at
    works = {}
    for row in connection.execute(query):
        state = state_of_row(row)
        if state.last_attempt_at is not None:
            newest[row.node_id][ObservationKind.CONTACT] = state.last_attempt_at
        works[row.node_id] = _NodeWork(
            admin=Admin(row.admin),
            may_pin=may_pin and row.connection["kind"] != "local" and row.node_id not in keyed,
            state=state,
            pressure=pressure_of_row(row),
            declared_type=row.node_type,
            recognised_type=row.recognised_type,
            capacity=row.capacity,
            newest=newest[row.node_id],
        )
    return works


def _usable_keys(texts: Iterable[str]) -> Iterable[str]:
    """Read the keys that a node shows; what is none is left out, for it would only lock the node out."""
    for text in texts:
        with suppress(ValueError):
            yield parse_host_key(text)


def _unknown_node(index: int, node_id: str) -> Rejection:
    return Rejection(index, node_id, "node_not_found", f"node {node_id[:253]!r} is not registered")


def _first_line(error: ValidationError | TooLargeError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"[:4000]
    return str(error)[:4000]
