# SPDX-License-Identifier: GPL-3.0-or-later
"""The one door: everything seen on a node comes in through record(), whoever saw it.

One batch is one transaction: the newest facts, sample and report, the history, the state transitions and their events.
Never writes what was declared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ValidationError

from node_manager import events
from node_manager.domain import Admin, ContactReason, ObservationKind, TooLargeError, clean, recognise
from node_manager.health_checker import NodeState, after_failure, after_report, after_success
from node_manager.node_registry import FIRST_USE, Clock, utc_now
from node_manager.node_states import state_of_row, update_state
from node_manager.resource_monitor import add_to_history
from node_manager.settings import Settings
from node_manager.shapes import Contact, Facts, Report, Sample
from node_manager.store import Store, tables

# A controller whose clock runs ahead must not keep later observations out.
_FUTURE_TOLERANCE = timedelta(seconds=5)
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


@dataclass
class _NodeWork:
    """One node's stored side while a batch is folded into it."""

    admin: Admin
    is_local: bool
    has_keys: bool
    state: NodeState
    recognised_type: str | None
    newest: dict[ObservationKind, datetime]
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

    def record(self, batch: Sequence[Observation]) -> Outcome:
        """Take a batch in, whole: each observation is recorded, late or rejected with its reason.

        Errors: StoreUnavailableError; then nothing of the batch was taken.
        """
        outcome = Outcome()
        now = self._clock()
        parsed = sorted(self._parse(batch, now, outcome), key=lambda item: item.observation.observed_at)
        if not parsed:
            return outcome
        with self._store.write() as connection:
            works = _load(connection, sorted({item.observation.node_id for item in parsed}))
            history: list[tuple[str, datetime, Sample]] = []
            for item in parsed:
                node_id = item.observation.node_id
                work = works.get(node_id)
                if work is None:
                    outcome.rejected.append(
                        Rejection(item.index, node_id, "node_not_found", f"node {node_id!r} is not registered")
                    )
                elif self._fold(connection, work, item):
                    outcome.recorded += 1
                    if isinstance(item.content, Sample):
                        history.append((node_id, item.observation.observed_at, item.content))
                else:
                    outcome.late += 1
            for node_id, work in works.items():
                _write(connection, node_id, work)
            add_to_history(connection, history)
        outcome.rejected.sort(key=lambda rejection: rejection.index)
        return outcome

    def _parse(self, batch: Sequence[Observation], now: datetime, outcome: Outcome) -> Iterable[_Parsed]:
        for index, observation in enumerate(batch):
            at = min(observation.observed_at, now + _FUTURE_TOLERANCE)
            try:
                data = clean(observation.data)
                content = _SHAPES[observation.kind].model_validate(data)
            except (ValidationError, TooLargeError) as error:
                code, message = "unusable", _first_line(error)
                outcome.rejected.append(Rejection(index, observation.node_id, code, message))
                # The node did answer, with something that can't be used: that is a condition of the node, not silence.
                content = Contact(reached=False, reason=ContactReason.OUTPUT_UNUSABLE, message=message)
                kind = ObservationKind.CONTACT
                outcome.recorded -= 1
            else:
                kind = observation.kind
            yield _Parsed(index, replace(observation, observed_at=at, kind=kind), content)

    def _fold(self, connection: sa.Connection, work: _NodeWork, item: _Parsed) -> bool:
        """Fold one observation into the node's state; False if something newer is stored already."""
        at, kind = item.observation.observed_at, item.observation.kind
        stored_at = work.newest.get(kind)
        if stored_at is not None and at <= stored_at:
            return False
        work.newest[kind] = at
        if kind is not ObservationKind.CONTACT:
            work.writes[kind] = item.observation
            work.contents[kind] = item.content
        if isinstance(item.content, Facts):
            self._take_facts(connection, work, item.observation, item.content)
        last_attempt_at = work.state.last_attempt_at
        if last_attempt_at is None or at >= last_attempt_at:
            self._transit(connection, work, item)
        return True

    def _take_facts(self, connection: sa.Connection, work: _NodeWork, observation: Observation, facts: Facts) -> None:
        work.recognised_type = recognise(facts.model_dump(by_alias=True), self._rules)
        if work.has_keys or work.is_local or not facts.ssh_host_keys:
            return
        keys = sorted({" ".join(key.split()[:2]) for key in facts.ssh_host_keys})
        connection.execute(
            tables.host_keys.insert(),
            [
                {
                    "node_id": observation.node_id,
                    "public_key": key,
                    "origin": FIRST_USE,
                    "pinned_at": observation.observed_at,
                }
                for key in keys
            ],
        )
        events.emit(
            connection,
            events.EventType.HOST_KEYS_PINNED,
            observation.node_id,
            observation.observed_at,
            {"origin": FIRST_USE, "host_keys": keys},
        )
        work.has_keys = True

    def _transit(self, connection: sa.Connection, work: _NodeWork, item: _Parsed) -> None:
        before, at = work.state, item.observation.observed_at
        after = self._judge(before, item.content, at)
        if work.admin is Admin.MAINTENANCE:
            # An operator works on it: what is seen is kept, no verdict follows from it.
            after = replace(
                after, health=before.health, health_since=before.health_since, health_cause=before.health_cause
            )
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

    def _judge(self, state: NodeState, content: BaseModel, at: datetime) -> NodeState:
        if isinstance(content, Report):
            return after_report(state, content, at)
        if isinstance(content, Contact) and not content.reached:
            return after_failure(state, content, at, self._settings.configuration.health)
        return after_success(state, at)


def _load(connection: sa.Connection, node_ids: Sequence[str]) -> dict[str, _NodeWork]:
    query = (
        sa.select(tables.nodes.c.admin, tables.nodes.c.connection, tables.node_states)
        .join(tables.nodes, tables.nodes.c.node_id == tables.node_states.c.node_id)
        .where(tables.node_states.c.node_id.in_(node_ids))
        .order_by(tables.node_states.c.node_id)
        .with_for_update(of=tables.node_states)
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
            is_local=row.connection["kind"] == "local",
            has_keys=row.node_id in keyed,
            state=state,
            recognised_type=row.recognised_type,
            newest=newest[row.node_id],
        )
    return works


def _write(connection: sa.Connection, node_id: str, work: _NodeWork) -> None:
    update_state(connection, node_id, work.state, work.recognised_type)
    for kind, observation in work.writes.items():
        table, document = _NEWEST[kind]
        values = {
            "observed_at": observation.observed_at,
            "source": observation.source,
            document: work.contents[kind].model_dump(mode="json", by_alias=True),
        }
        updated = connection.execute(table.update().where(table.c.node_id == node_id), values)
        if updated.rowcount == 0:
            connection.execute(table.insert(), {"node_id": node_id, **values})


def _first_line(error: ValidationError | TooLargeError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"[:4000]
    return str(error)[:4000]
