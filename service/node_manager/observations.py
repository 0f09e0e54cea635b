# SPDX-License-Identifier: GPL-3.0-or-later
"""The one door: everything seen on a node comes in through record(), whoever saw it.

One batch is one transaction: the newest facts, sample and report, the history, the state transitions and their events.
Never writes what was declared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel

from node_manager import accounts, changes, host_keys, observation_rows, workloads
from node_manager.contact_windows import expected_at
from node_manager.declarations import is_node_id, parse_host_key
from node_manager.domain import Admin, ContactReason, ObservationKind, clean, recognise
from node_manager.events import EventType, NewEvent, emit_all
from node_manager.health_checker import (
    NodeState,
    after_failure,
    after_report,
    after_success,
    after_verdict,
    in_maintenance,
)
from node_manager.node_conditions import WORKLOADS, Judgement, conditions_of_report, fold, limits_of
from node_manager.node_registry import Clock, utc_now
from node_manager.observation_parsing import Content, UnusableError, parse
from node_manager.observation_rows import Newest, NodeWork
from node_manager.overcommit import after_sample
from node_manager.samples import add_to_history
from node_manager.settings import Settings
from node_manager.shapes import Contact, Facts, Report, Sample, Verdict
from node_manager.store import Store
from node_manager.store.documents import JsonText
from node_manager.timings import NO_TIMINGS, Timings
from node_manager.workloads import workloads_of

# A controller whose clock runs ahead must not keep later observations out.
# A node, when and by whom it was looked at, and what was seen.
SampleTold = tuple[str, datetime, str, Sample]

_FUTURE_TOLERANCE = timedelta(seconds=5)
_SOURCE_CHARACTERS = 64
# Only Ansible tells of a silence by a contact, and looks once in an interval: three that are missed, and time to start anew.
_SILENT_INTERVALS = 3
_SILENCE_FACTOR = 5
# What the one who looked says about the attempt, not what the node said.
_ABOUT_THE_ATTEMPT = frozenset((ObservationKind.CONTACT, ObservationKind.VERDICT))
_NOT_THE_MANAGER = "kind: only the manager itself gives verdicts; hand in what was seen"
_NOTHING_SEEN = Judgement({}, [], [], (), datetime.min.replace(tzinfo=UTC))


@dataclass(frozen=True)
class Observation:
    """One thing seen on one node; data is as in docs/observations.md, or that as JSON, and not trusted."""

    node_id: str
    observed_at: datetime
    source: str
    kind: ObservationKind
    data: dict[str, Any] | bytes


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


@dataclass(frozen=True, slots=True)
class _Parsed:
    at: datetime
    index: int
    node_id: str
    source: str
    kind: ObservationKind
    content: BaseModel
    document: JsonText
    # False for the contact that stands in for a rejected observation: that one is counted as rejected already.
    counted: bool


@dataclass
class _Batch:
    """What a batch leads to beside the nodes' own rows."""

    may_pin: bool
    now: datetime
    events: list[NewEvent] = field(default_factory=list)
    samples: list[SampleTold] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict)
    # The first keys that a node showed in the batch, and when.
    keys: dict[str, tuple[list[str], datetime]] = field(default_factory=dict)


class ObservationLog:
    """The door to the store for what is seen."""

    def __init__(self, store: Store, settings: Settings, clock: Clock = utc_now, timings: Timings = NO_TIMINGS) -> None:
        self._timings = timings
        self._store = store
        self._settings = settings
        self._clock = clock
        # Told of samples once they are in the store; must not wait.
        self.on_samples: Callable[[Sequence[SampleTold]], object] | None = None
        self._limits = settings.configuration.health
        self._silence = timedelta(
            seconds=max(
                _SILENCE_FACTOR * self._limits.silence_before_unreachable_seconds,
                _SILENT_INTERVALS * settings.configuration.monitoring.gather_interval_seconds,
            )
        )
        self._condition_limits = {name: limits_of(settings, name) for name in (None, *settings.node_types)}
        self._rules = {
            name: definition.recognised_by.model_dump(exclude_none=True)
            for name, definition in settings.node_types.items()
            if definition.recognised_by is not None
        }

    def record(self, batch: Sequence[Observation], *, may_pin: bool = True, from_manager: bool = False) -> Outcome:
        """Take a batch in, whole: each observation is recorded, late or rejected with its reason.

        Shapes: without *may_pin* no host key is pinned from facts: an agent speaks for itself, not for other nodes' keys.
            Verdicts are taken only *from_manager*.
        Errors: StoreUnavailableError; then nothing of the batch was taken.
        """
        began = time.perf_counter()
        outcome = Outcome()
        now = self._clock()
        parsed = sorted(
            self._parse(batch, now, outcome, from_manager=from_manager), key=lambda item: (item.at, item.index)
        )
        if not parsed:
            self._timings.count_observations(0, 0, len(outcome.rejected))
            return outcome
        pins = may_pin and self._settings.configuration.ssh.host_key_policy == "first_use"
        work = _Batch(pins, now)
        with self._store.write() as connection:
            works = observation_rows.load(
                connection,
                sorted({item.node_id for item in parsed}),
                {item.kind for item in parsed},
                now + _FUTURE_TOLERANCE,
                self._limits,
            )
            for item in parsed:
                node = works.get(item.node_id)
                if node is None:
                    if item.counted:
                        outcome.rejected.append(_unknown_node(item.index, item.node_id))
                    continue
                taken = self._fold(work, node, item)
                if item.counted:
                    outcome.recorded += taken
                    outcome.late += not taken
            observation_rows.write(connection, works)
            changed = {node_id: node.workloads for node_id, node in works.items() if node.workloads is not None}
            workloads.write(connection, changed, now)
            self._write_facts(connection, work, works)
            emit_all(connection, work.events)
            changes.note(connection, [node_id for node_id, node in works.items() if node.changed])
            add_to_history(connection, [(node_id, at, sample) for node_id, at, _, sample in work.samples])
        if self.on_samples is not None:
            self.on_samples(work.samples)
        outcome.rejected.sort(key=lambda rejection: rejection.index)
        self._timings.observe_recording(time.perf_counter() - began)
        self._timings.count_observations(outcome.recorded, outcome.late, len(outcome.rejected))
        return outcome

    def _parse(
        self, batch: Sequence[Observation], now: datetime, outcome: Outcome, *, from_manager: bool
    ) -> Iterable[_Parsed]:
        latest = now + _FUTURE_TOLERANCE
        for index, told in enumerate(batch):
            if not is_node_id(told.node_id):
                outcome.rejected.append(_unknown_node(index, told.node_id))
                continue
            if told.kind is ObservationKind.VERDICT and not from_manager:
                outcome.rejected.append(Rejection(index, told.node_id, "unusable", _NOT_THE_MANAGER))
                continue
            at = min(told.observed_at, latest)
            source = str(clean(told.source))[:_SOURCE_CHARACTERS]
            try:
                content, counted, kind = parse(told.kind, told.data), True, told.kind
            except UnusableError as error:
                outcome.rejected.append(Rejection(index, told.node_id, "unusable", str(error)))
                if told.kind in _ABOUT_THE_ATTEMPT:
                    continue
                # The node did answer, with something that can't be used: that is a condition of the node, not silence.
                found = Contact(reached=False, reason=ContactReason.OUTPUT_UNUSABLE, message=str(error))
                content, counted, kind = Content(found, JsonText()), False, ObservationKind.CONTACT
            yield _Parsed(at, index, told.node_id, source, kind, content.shape, content.document, counted)

    def _fold(self, batch: _Batch, node: NodeWork, item: _Parsed) -> bool:
        """Fold one observation into the node's state; False if something newer is stored already."""
        # A verdict is about attempts, and late where a later one is known.
        kind = ObservationKind.CONTACT if item.kind is ObservationKind.VERDICT else item.kind
        stored_at = node.newest.get(kind)
        if stored_at is not None and item.at <= stored_at:
            return False
        last_attempt_at = node.last_attempt_at
        node.newest[kind] = item.at
        if kind is not ObservationKind.CONTACT:
            node.changed = True
            node.writes[kind] = Newest(item.at, item.source, item.document)
        if isinstance(item.content, Facts):
            self._take_facts(batch, node, item, item.content)
        if isinstance(item.content, Sample):
            batch.samples.append((item.node_id, item.at, item.source, item.content))
            cpu = item.content.cpu
            node.pressure = after_sample(
                node.pressure,
                cpu.use_percent if cpu else None,
                cpu.pressure.some_avg60_percent if cpu and cpu.pressure else None,
                item.at,
                self._settings.configuration.allocation,
            )
        # Checks are judged even if another look came later: that one may have been no run of the checks.
        if last_attempt_at is None or item.at >= last_attempt_at or isinstance(item.content, Report):
            self._transit(batch, node, item)
        return True

    def _take_facts(self, batch: _Batch, node: NodeWork, item: _Parsed, facts: Facts) -> None:
        batch.facts[item.node_id] = facts
        node.recognised_type = recognise(facts.model_dump(by_alias=True), self._rules)
        if batch.may_pin and item.node_id not in batch.keys:
            keys = list(_usable_keys(facts.ssh_host_keys))
            if keys:
                batch.keys[item.node_id] = (keys, item.at)

    def _transit(self, batch: _Batch, node: NodeWork, item: _Parsed) -> None:
        seen = _NOTHING_SEEN
        if isinstance(item.content, Sample):
            limits = self._condition_limits.get(node.node_type) or self._condition_limits[None]
            seen = fold(node.readings, item.content, limits, item.at)
            if seen.memory.get(WORKLOADS) != node.readings.get(WORKLOADS):
                node.workloads = workloads_of(item.content)
            node.readings = seen.memory
            if node.settled and node.stays_settled(seen):
                # Nine samples in ten: nothing but time went by.
                node.answered_at = node.newest[ObservationKind.CONTACT] = item.at
                return
        before = node.state
        after = self._judge(before, node.node_type, item.content, seen, item.at)
        if after == before:
            return
        if node.admin is Admin.MAINTENANCE:
            after = in_maintenance(before, after)
        if after.last_attempt_at is not None:
            node.newest[ObservationKind.CONTACT] = after.last_attempt_at
        node.changed = True
        node.state = after
        if after.health is not before.health:
            told = {
                "from": before.health.value,
                "to": after.health.value,
                "cause": after.health_cause,
                "source": item.source,
            }
            batch.events.append(NewEvent(EventType.HEALTH_CHANGED, item.node_id, item.at, told))

    def _judge(
        self, state: NodeState, node_type: str | None, content: BaseModel, seen: Judgement, at: datetime
    ) -> NodeState:
        if isinstance(content, Report):
            return after_report(state, content, at, self._limits, conditions_of_report(content, at))
        if isinstance(content, Verdict):
            return after_verdict(state, content, at, self._limits)
        if isinstance(content, Contact) and not content.reached:
            return after_failure(state, content, at, self._limits, self._silence, asleep=self._sleeps(node_type, at))
        # Facts come with a sample, which counts.
        good_samples = int(not isinstance(content, Facts))
        return after_success(state, at, self._limits, seen.conditions, seen.unknown, good_samples)

    def _sleeps(self, node_type: str | None, at: datetime) -> bool:
        """Tell whether a node of the type may be silent then, as declared."""
        definition = self._settings.node_types.get(node_type) if node_type is not None else None
        if definition is None or not definition.contact_windows:
            return False
        utc = at.astimezone(UTC)
        expected, _ = expected_at(definition.contact_windows, utc.hour * 3600 + utc.minute * 60 + utc.second)
        return not expected

    def _write_facts(self, connection: sa.Connection, batch: _Batch, works: dict[str, NodeWork]) -> None:
        if not batch.facts:
            return
        declared = observation_rows.load_declared(connection, sorted(batch.facts))
        for node_id, facts in sorted(batch.facts.items()):
            row = declared[node_id]
            if node_id in batch.keys and not row.keyed and row.connection["kind"] != "local":
                keys, at = batch.keys[node_id]
                host_keys.pin(connection, node_id, keys, host_keys.FIRST_USE, at)
            content = facts.model_dump(mode="json", by_alias=True)
            accounts.fit(connection, node_id, works[node_id].node_type, row.capacity, content, self._settings)


def _usable_keys(texts: Iterable[str]) -> Iterable[str]:
    """Read the keys that a node shows; what is none is left out, for it would only lock the node out."""
    for text in texts:
        with suppress(ValueError):
            yield parse_host_key(text)


def _unknown_node(index: int, node_id: str) -> Rejection:
    return Rejection(index, node_id, "node_not_found", f"node {node_id[:253]!r} is not registered")
