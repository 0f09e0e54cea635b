# SPDX-License-Identifier: GPL-3.0-or-later
"""Find ghosts: workloads that run on a node which holds no allocation for them, as one that returns after its work was moved.

One manager looks, every few seconds, over all nodes at once. What it finds becomes a condition of the node, with one event per
change; the node's health follows with its next sample. A node that is out of reach is not judged.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

import sqlalchemy as sa

from node_manager import changes, observation_rows
from node_manager.domain import ConditionType, ContactReason, Health, Severity, one_line
from node_manager.events import EventType, NewEvent, emit_all
from node_manager.health_checker import Condition, NodeState
from node_manager.node_registry import Clock, utc_now
from node_manager.node_states import read_conditions
from node_manager.settings import Settings
from node_manager.store import Store, tables
from node_manager.store.bulk import is_one_of

LOOK_SECONDS = 15.0
# The allocation of work that was just started may be on its way, as may the end of work that was just released.
GRACE_SECONDS = 60.0
REASON = "NotOwned"
_NODES_AT_ONCE = 200
_NAMED = 5
_MAX_TOLD = 100
_MAX_MESSAGE_CHARACTERS = 1000
# Times of a state are only carried along.
_HORIZON = timedelta(minutes=1)
_ORDER = {condition: place for place, condition in enumerate(ConditionType)}


class Ghost(NamedTuple):
    """One workload that its node doesn't own, and the node that its allocation is on, if there is one."""

    node_id: str
    container: str
    allocation_id: str
    deployment_id: str | None
    owner_node: str | None


class Ghosts:
    """The search for ghosts in one store, by one thread. Grace is measured by the monotonic clock, which nobody sets."""

    def __init__(
        self, store: Store, settings: Settings, clock: Clock = utc_now, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._limits = settings.configuration.health
        self._clock = clock
        self._monotonic = monotonic
        self._looked_at = -math.inf
        # Since when each is seen, as long as it is.
        self._since: dict[tuple[str, str, str], float] = {}

    def round(self) -> None:
        """Look, if it is time to.

        Errors: StoreUnavailableError.
        """
        if self._monotonic() - self._looked_at >= LOOK_SECONDS:
            self.look()

    def look(self) -> None:
        """Find the ghosts there are, and tell of what changed.

        Errors: StoreUnavailableError.
        """
        with self._store.read() as connection:
            found = [Ghost._make(row) for row in connection.execute(_GHOSTS)]
            haunted = dict(_told(connection.execute(_HAUNTED)))
        now = self._monotonic()
        if now - self._looked_at > GRACE_SECONDS:
            # Another manager looked meanwhile: what was seen before that may have gone and come again.
            self._since.clear()
        self._looked_at = now
        self._since = {ghost[:3]: self._since.get(ghost[:3], now) for ghost in found}
        by_node: dict[str, list[Ghost]] = defaultdict(list)
        young: set[str] = set()
        for ghost in found:
            if now - self._since[ghost[:3]] >= GRACE_SECONDS:
                by_node[ghost.node_id].append(ghost)
            else:
                young.add(ghost.node_id)
        # What was told of a node stands until it is clear about all that is there now.
        due = sorted(
            node_id
            for node_id in haunted.keys() | by_node.keys()
            if not (node_id in haunted and node_id in young)
            and haunted.get(node_id, "") != _message(by_node.get(node_id, ()))
        )
        for start in range(0, len(due), _NODES_AT_ONCE):
            self._tell({node_id: by_node.get(node_id, []) for node_id in due[start : start + _NODES_AT_ONCE]})

    def _tell(self, found: Mapping[str, Sequence[Ghost]]) -> None:
        """Write what is to be said of nodes, and the events, unless somebody else was faster."""
        now = self._clock()
        events: list[NewEvent] = []
        with self._store.write() as connection:
            works = observation_rows.load(connection, sorted(found), (), now + _HORIZON, self._limits)
            epochs = {row.node_id: row.epoch for row in connection.execute(_EPOCHS, {"node_ids": sorted(found)})}
            for node_id, work in sorted(works.items()):
                ghosts = found[node_id]
                known, message = work.state.condition(ConditionType.WORKLOADS_OWNED), _message(ghosts)
                if message == ("" if known is None or known.status else known.message):
                    continue
                if ghosts:
                    new = Condition(ConditionType.WORKLOADS_OWNED, False, REASON, message, now, Severity.WARNING)
                    events.append(NewEvent(EventType.GHOSTS_FOUND, node_id, now, _data(ghosts, epochs.get(node_id))))
                else:
                    new = Condition(ConditionType.WORKLOADS_OWNED, True, ContactReason.OK.value, "", now)
                if known is not None and known.status is new.status:
                    new = replace(new, since=known.since)
                work.state = _with(work.state, new)
                work.changed = True
            changed = [node_id for node_id, work in works.items() if work.changed]
            observation_rows.write(connection, works)
            changes.note(connection, changed)
            emit_all(connection, events)


def _with(state: NodeState, new: Condition) -> NodeState:
    others = [condition for condition in state.conditions if condition.type is not new.type]
    return replace(state, conditions=tuple(sorted([*others, new], key=lambda condition: _ORDER[condition.type])))


def _message(ghosts: Sequence[Ghost]) -> str:
    """Say which containers these are; the empty text for none."""
    if not ghosts:
        return ""
    named = ", ".join(
        f"{one_line(ghost.container, 100)} (allocation {one_line(ghost.allocation_id, 100)} "
        f"{'is gone' if ghost.owner_node is None else f'is on {ghost.owner_node}'})"
        for ghost in ghosts[:_NAMED]
    )
    more = f" and {len(ghosts) - _NAMED} more" if len(ghosts) > _NAMED else ""
    count = f"{len(ghosts)} container{'s' if len(ghosts) > 1 else ''}"
    told = f"{count} without an allocation on this node, to be stopped: {named}{more}"
    return told[:_MAX_MESSAGE_CHARACTERS]


def _data(ghosts: Sequence[Ghost], epoch: int | None) -> dict[str, object]:
    told = [
        {
            "container": ghost.container,
            "allocation_id": ghost.allocation_id,
            "deployment_id": ghost.deployment_id,
            "owner_node": ghost.owner_node,
        }
        for ghost in ghosts[:_MAX_TOLD]
    ]
    return {"epoch": epoch, "containers": told, "left_out": len(ghosts) - len(told)}


def _told(rows: sa.CursorResult[tuple[str, object]]) -> Iterator[tuple[str, str]]:
    """Give the nodes that ghosts are told of, with what was said."""
    for row in rows:
        for condition in read_conditions(row.conditions):
            if condition.type is ConditionType.WORKLOADS_OWNED and not condition.status:
                yield row.node_id, condition.message


_workloads, _states, _allocations = tables.node_workloads.c, tables.node_states.c, tables.allocations.c
_GHOSTS = (
    sa.select(
        _workloads.node_id,
        _workloads.container,
        _workloads.allocation_id,
        _workloads.deployment_id,
        _allocations.node_id.label("owner_node"),
    )
    .join(tables.node_states, _states.node_id == _workloads.node_id)
    .join(tables.allocations, _allocations.allocation_id == _workloads.allocation_id, isouter=True)
    .where(
        sa.or_(_allocations.allocation_id.is_(None), _allocations.node_id != _workloads.node_id),
        _states.health != Health.UNREACHABLE.value,
    )
    .order_by(_workloads.node_id, _workloads.container)
)
# A settled node that is healthy has no false condition; where no such mark stands in the text, it needn't be read.
_HAUNTED = sa.select(_states.node_id, _states.conditions).where(
    sa.or_(_states.settled.is_(False), _states.health != Health.HEALTHY.value),
    _states.health != Health.UNREACHABLE.value,
    sa.cast(_states.conditions, sa.Text).contains(f'"reason":"{REASON}"'),
)
_EPOCHS = sa.select(tables.node_accounts.c.node_id, tables.node_accounts.c.epoch).where(
    is_one_of(tables.node_accounts.c.node_id, "node_ids")
)
