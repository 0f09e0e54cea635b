# SPDX-License-Identifier: GPL-3.0-or-later
"""What the topic of states gets: a snapshot of each node that changed, and word of each that is gone.

Reads the store and decides which nodes are due; publishes nothing itself. Begins with all nodes, so that a topic that lost
something is whole again after each start.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from node_manager import changes
from node_manager.node_registry import Clock, Node, NodeRegistry
from node_manager.settings import Settings
from node_manager.store import Store, tables
from node_manager.views import render_node_state, stale_after


class Snapshot(NamedTuple):
    """A node as it is now, as JSON; None: it is gone."""

    node_id: str
    document: bytes | None


class StateFeed:
    """Follows the nodes of a store; for one thread."""

    def __init__(self, store: Store, settings: Settings, registry: NodeRegistry, clock: Clock) -> None:
        self._store = store
        self._settings = settings
        self._registry = registry
        self._clock = clock
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what was given, and give all nodes again."""
        self._mark: int | None = None
        # In the order of their changes.
        self._pending: dict[str, None] = {}
        self._given: dict[str, int] = {}
        # When a node that stays silent is no longer schedulable: nothing in the store changes then.
        self._stale: list[tuple[datetime, str]] = []
        self._watched: set[str] = set()

    def look(self) -> None:
        """Note which nodes have changed since the last look.

        Errors: StoreUnavailableError.
        """
        with self._store.read() as connection:
            found, following = changes.read(connection, self._mark or 0)
            if self._mark is None:
                self._pending |= dict.fromkeys(connection.scalars(sa.select(tables.nodes.c.node_id)))
        self._mark = following
        self._pending |= dict.fromkeys(change.node_id for change in found)
        now = self._clock()
        while self._stale and self._stale[0][0] <= now:
            node_id = heapq.heappop(self._stale)[1]
            self._watched.discard(node_id)
            self._pending[node_id] = None

    def take(self, most: int) -> list[Snapshot]:
        """Give what is due, of up to *most* nodes; nodes that look as they did are left out.

        Errors: StoreUnavailableError; then nothing was taken.
        """
        if not self._pending:
            return []
        wanted = [node_id for node_id, _ in zip(self._pending, range(most), strict=False)]
        nodes = self._registry.load(wanted)
        found = list(self._due(wanted, nodes, self._clock()))
        for node_id in wanted:
            del self._pending[node_id]
        return found

    @property
    def waits(self) -> bool:
        """Tell whether there is more to take."""
        return bool(self._pending)

    def _due(self, wanted: list[str], nodes: dict[str, Node], now: datetime) -> Iterator[Snapshot]:
        for node_id in wanted:
            node = nodes.get(node_id)
            document = None
            if node is not None:
                shown = render_node_state(node, self._settings, now)
                document = json.dumps(shown, separators=(",", ":")).encode()
                self._watch(node, shown, now)
            seen = hash(document)
            if self._given.get(node_id) != seen:
                yield Snapshot(node_id, document)
            if node is None:
                self._given.pop(node_id, None)
            else:
                self._given[node_id] = seen

    def _watch(self, node: Node, shown: dict[str, Any], now: datetime) -> None:
        contact = node.state.last_contact_at
        if contact is None or not shown["schedulable"] or node.node_id in self._watched:
            return
        at = contact + stale_after(self._settings)
        if at > now:
            self._watched.add(node.node_id)
            heapq.heappush(self._stale, (at, node.node_id))
