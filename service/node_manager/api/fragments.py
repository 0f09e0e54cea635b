# SPDX-License-Identifier: GPL-3.0-or-later
"""Rendered lists of nodes, kept as JSON bytes while they are current.

A list of 100 nodes is 100 joins and renderings otherwise. A node's bytes are current while its generation and revision are
those of the store; a page's while nothing at all was committed. Freshness changes by time alone, and ends both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from threading import Lock

from node_manager.node_registry import Clock, Node, NodeRegistry, NodeVersion
from node_manager.settings import Settings
from node_manager.store import Store
from node_manager.views import render_node, stale_after

_MAX_NODES = 20_000
# A page is about 60 KiB at the usual size.
_MAX_PAGES = 256


@dataclass(frozen=True)
class Rendered:
    """JSON and until when it is true at the most; None: until something changes."""

    body: bytes
    stale_at: datetime | None


class NodeFragments:
    """Bounded caches of rendered nodes and pages."""

    def __init__(self, store: Store, registry: NodeRegistry, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._nodes: dict[str, tuple[NodeVersion, Rendered]] = {}
        self._pages: dict[bytes, tuple[str, Rendered]] = {}
        self._lock = Lock()

    def page(self, key: bytes, make: Callable[[], Rendered]) -> bytes:
        """Give the page of *key*, made anew by *make* if anything was committed since it was made."""
        # Asked before the page is made: what commits meanwhile makes the page old, never wrongly current.
        mark = self._store.change_mark()
        kept = self._pages.get(key)
        if kept is not None and kept[0] == mark and _stands(kept[1], self._clock()):
            return kept[1].body
        made = make()
        with self._lock:
            self._pages.pop(key, None)
            self._pages[key] = (mark, made)
            while len(self._pages) > _MAX_PAGES:
                del self._pages[next(iter(self._pages))]
        return made.body

    def nodes(self, versions: Sequence[NodeVersion]) -> list[Rendered]:
        """Render each node in order; one that is gone by now is left out."""
        now = self._clock()
        found: dict[str, Rendered | None] = {version.node_id: self._current(version, now) for version in versions}
        missing = [version.node_id for version in versions if found[version.node_id] is None]
        if missing:
            nodes = self._registry.load(missing)
            found.update((node_id, self._render(node, now)) for node_id, node in nodes.items())
            self._keep((node, found[node_id]) for node_id, node in nodes.items())
        return [rendered for version in versions if (rendered := found[version.node_id]) is not None]

    def _current(self, version: NodeVersion, now: datetime) -> Rendered | None:
        kept = self._nodes.get(version.node_id)
        return kept[1] if kept is not None and kept[0] == version and _stands(kept[1], now) else None

    def _render(self, node: Node, now: datetime) -> Rendered:
        contact = node.state.last_contact_at
        stale_at = None if contact is None else contact + stale_after(self._settings)
        body = json.dumps(render_node(node, self._settings, now), separators=(",", ":")).encode()
        return Rendered(body, stale_at if stale_at is not None and stale_at > now else None)

    def _keep(self, fresh: Iterable[tuple[Node, Rendered | None]]) -> None:
        with self._lock:
            for node, rendered in fresh:
                if rendered is not None:
                    self._nodes[node.node_id] = (NodeVersion(node.node_id, node.generation, node.revision), rendered)
            for node_id in list(self._nodes)[: max(0, len(self._nodes) - _MAX_NODES)]:
                del self._nodes[node_id]


def _stands(rendered: Rendered, now: datetime) -> bool:
    return rendered.stale_at is None or now < rendered.stale_at
