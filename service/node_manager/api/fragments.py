# SPDX-License-Identifier: GPL-3.0-or-later
"""Rendered nodes, kept as JSON bytes while they are current.

A list of 100 nodes is 100 joins and renderings otherwise; with this it is one narrow query. An entry is current while the
node's generation and revision are those of the store, and until its freshness, which changes by time alone, runs out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from threading import Lock

from node_manager.node_registry import Clock, Node, NodeRegistry, NodeVersion
from node_manager.settings import Settings
from node_manager.views import render_node, stale_after


@dataclass(frozen=True)
class _Fragment:
    version: NodeVersion
    stale_at: datetime | None
    body: bytes


class NodeFragments:
    """A bounded cache of rendered nodes."""

    def __init__(self, registry: NodeRegistry, settings: Settings, clock: Clock, max_entries: int = 20_000) -> None:
        self._registry = registry
        self._settings = settings
        self._clock = clock
        self._max_entries = max_entries
        self._fragments: dict[str, _Fragment] = {}
        self._lock = Lock()

    def render(self, versions: Sequence[NodeVersion]) -> list[bytes]:
        """Give the JSON of each node in order; one that is gone by now is left out."""
        now = self._clock()
        found = {version.node_id: self._fragments.get(version.node_id) for version in versions}
        missing = [version for version in versions if not _current(found[version.node_id], version, now)]
        if missing:
            nodes = self._registry.load([version.node_id for version in missing])
            for version in missing:
                node = nodes.get(version.node_id)
                found[version.node_id] = None if node is None else self._rendered(node, now)
            self._keep(fragment for version in missing if (fragment := found[version.node_id]) is not None)
        return [fragment.body for version in versions if (fragment := found[version.node_id]) is not None]

    def _rendered(self, node: Node, now: datetime) -> _Fragment:
        contact = node.state.last_contact_at
        stale_at = None if contact is None else contact + stale_after(self._settings)
        body = json.dumps(render_node(node, self._settings, now), separators=(",", ":")).encode()
        version = NodeVersion(node.node_id, node.generation, node.revision)
        return _Fragment(version, stale_at if stale_at is not None and stale_at > now else None, body)

    def _keep(self, fragments: Iterable[_Fragment]) -> None:
        with self._lock:
            for fragment in fragments:
                self._fragments[fragment.version.node_id] = fragment
            for node_id in list(self._fragments)[: max(0, len(self._fragments) - self._max_entries)]:
                del self._fragments[node_id]


def _current(fragment: _Fragment | None, version: NodeVersion, now: datetime) -> bool:
    return (
        fragment is not None and fragment.version == version and (fragment.stale_at is None or now < fragment.stale_at)
    )
