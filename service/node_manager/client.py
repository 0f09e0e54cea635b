# SPDX-License-Identifier: GPL-3.0-or-later
"""The manager as the command line and the plugins see it: in process on the local store, or over HTTP.

Both answer with the same plain data, those of the API.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from node_manager import cloud_events, event_history, outbox
from node_manager.declarations import NodeDeclaration
from node_manager.deployments import DeploymentPlacer
from node_manager.domain import Health, Status
from node_manager.event_history import EventFilter
from node_manager.load_distribution import TrafficState, Weight
from node_manager.node_filters import NodeFilter
from node_manager.node_registry import Clock, NodeRegistry, utc_now
from node_manager.outbox import OutboxReader
from node_manager.problems import ProblemError
from node_manager.resource_allocator import ResourceAllocator
from node_manager.settings import Settings
from node_manager.store import Store
from node_manager.traffic import Traffic
from node_manager.views import render_node

_PAGE = 1000
_POLL_SECONDS = 0.5
# How long a service may be away before who follows it gives up.
_RECONNECT_SECONDS = 60.0
_ANSWER_SECONDS = 30.0
# Well above the pause between two keepalives (event_stream.keepalive_seconds); where it isn't, a quiet stream is taken up again.
_QUIET_SECONDS = 120.0
_NOTES = frozenset({"gap", "dropped", "bye"})


class UnreachableManagerError(Exception):
    """The service can't be reached at its URL; the text says why."""


class Manager(Protocol):
    """What both ways can do."""

    def nodes(self, wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """List nodes, filtered as GET /nodes does (status, health, type, zone, site, region, label)."""

    def register(self, declaration: NodeDeclaration) -> tuple[dict[str, Any], bool]:
        """Register a node; the node and whether it is new."""

    def traffic(self, deployment_id: str) -> list[Weight]:
        """Read how a deployment's traffic is to be shared."""

    def events(
        self, wanted: EventFilter, after: int | None, note: Callable[[str], None], *, follow: bool
    ) -> Iterator[dict[str, Any]]:
        """Give events as CloudEvents, behind *after* or, None, from now on; what else is to be known goes to *note*."""


class LocalManager:
    """The manager in this process, on its store; works with the service stopped."""

    def __init__(self, store: Store, settings: Settings, clock: Clock = utc_now) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._registry = NodeRegistry(store, settings, clock)
        allocator = ResourceAllocator(store, settings, clock)
        self._traffic = Traffic(store, settings, DeploymentPlacer(store, settings, allocator, clock), clock)

    def nodes(self, wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """List nodes page by page."""
        status, health = wanted.get("status"), wanted.get("health")
        wanted_nodes = NodeFilter(
            status=Status(status) if status else None,
            health=Health(health) if health else None,
            node_type=wanted.get("type"),
            zone=wanted.get("zone"),
            site=wanted.get("site"),
            region=wanted.get("region"),
            labels=tuple(_split_label(text) for text in wanted.get("label") or ()),
        )
        after = None
        while True:
            page = self._registry.page(wanted_nodes, _PAGE, after)
            nodes = self._registry.load([version.node_id for version in page.versions])
            for version in page.versions:
                if version.node_id in nodes:
                    yield render_node(nodes[version.node_id], self._settings, self._clock())
            after = page.next_after
            if after is None:
                return

    def register(self, declaration: NodeDeclaration) -> tuple[dict[str, Any], bool]:
        """Register a node in the store."""
        node, created = self._registry.register(declaration)
        return render_node(node, self._settings, self._clock()), created

    def traffic(self, deployment_id: str) -> list[Weight]:
        """Read the weights from the store."""
        return self._traffic.weights_of(deployment_id)

    def events(
        self,
        wanted: EventFilter,
        after: int | None,
        note: Callable[[str], None],  # noqa: ARG002  # nothing is to be known
        *,
        follow: bool,
    ) -> Iterator[dict[str, Any]]:
        """Read events from the store."""
        source = self._settings.configuration.kafka.source
        position = event_history.settled_position(self._store, self._clock()) if after is None else after
        if not follow:
            newest = outbox.newest(self._store)
            while position < newest:
                page = event_history.read_page(self._store, wanted, position, newest, _PAGE)
                yield from (cloud_events.structured(event, source) for event in page.events)
                position = page.reached
            return
        reader = OutboxReader(self._store, position)
        while True:
            events = reader.read(_PAGE)
            yield from (cloud_events.structured(event, source) for event in events if wanted.matches(event))
            if not events:
                time.sleep(_POLL_SECONDS)


class HttpManager:
    """The manager behind its API."""

    def __init__(self, url: str, token: str | None) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=_ANSWER_SECONDS)

    def nodes(self, wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """List nodes page by page."""
        cursor = None
        while True:
            query = {key: value for key, value in wanted.items() if value is not None}
            page = self._call(
                "GET", "/nodes", params={**query, "limit": _PAGE, **({"cursor": cursor} if cursor else {})}
            )
            yield from page.json()["items"]
            cursor = page.json()["next_cursor"]
            if cursor is None:
                return

    def register(self, declaration: NodeDeclaration) -> tuple[dict[str, Any], bool]:
        """Register a node over HTTP."""
        answer = self._call("POST", "/nodes", json=declaration.model_dump(mode="json", exclude_unset=True))
        return answer.json(), answer.status_code == 201

    def traffic(self, deployment_id: str) -> list[Weight]:
        """Read the weights over HTTP."""
        answer = self._call("GET", f"/deployment/{quote(deployment_id, safe='')}/traffic")
        return [Weight(**{**node, "state": TrafficState(node["state"])}) for node in answer.json()["nodes"]]

    def events(
        self, wanted: EventFilter, after: int | None, note: Callable[[str], None], *, follow: bool
    ) -> Iterator[dict[str, Any]]:
        """Follow GET /events; takes it up again where it was interrupted."""
        position = None if after is None else str(after)
        # Some come twice after an interruption.
        seen: deque[str] = deque(maxlen=_PAGE)
        failed_since: float | None = None
        while True:
            try:
                for event, data, last_id in self._stream(wanted, position, follow=follow):
                    position, failed_since = last_id or position, None
                    if event in _NOTES:
                        note(f"{event}: {data.get('message')}")
                    elif data and data.get("id") not in seen:
                        seen.append(data["id"])
                        yield data
                if not follow:
                    return
            except httpx.HTTPError as error:
                failed_since = failed_since or time.monotonic()
                if not follow or time.monotonic() - failed_since > _RECONNECT_SECONDS:
                    raise UnreachableManagerError(f"{self._client.base_url}: {error}") from error
            time.sleep(_POLL_SECONDS)

    def _stream(
        self, wanted: EventFilter, position: str | None, *, follow: bool
    ) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Give event, data and the last id of each block; of keepalives and the like there is only the id."""
        query = {
            "type": sorted(wanted.types),
            "topic": sorted(wanted.topics),
            "node_id": sorted(wanted.node_ids),
            "follow": str(follow).lower(),
        }
        headers = {} if position is None else {"Last-Event-ID": position}
        timeout = httpx.Timeout(_ANSWER_SECONDS, read=_QUIET_SECONDS)
        with self._client.stream("GET", "/events", params=query, headers=headers, timeout=timeout) as answer:
            if not answer.is_success:
                answer.read()
                raise _failure(answer)
            event = last_id = data = ""
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "id":
                    last_id = value
                elif name == "data":
                    data = value
                elif not line:
                    yield event, json.loads(data) if data else {}, last_id
                    event = data = ""

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise UnreachableManagerError(f"{self._client.base_url}: {error}") from error
        if answer.is_success:
            return answer
        raise _failure(answer)


def read_token(environ: Mapping[str, str], home: Path) -> str | None:
    """Find the token for HTTP: NODE_MANAGER_TOKEN, the file in NODE_MANAGER_TOKEN_FILE, or admin.token."""
    if token := environ.get("NODE_MANAGER_TOKEN"):
        return token
    path = Path(environ.get("NODE_MANAGER_TOKEN_FILE") or home / "admin.token")
    return path.read_text("ascii").strip() if path.exists() else None


def _failure(answer: httpx.Response) -> ProblemError | UnreachableManagerError:
    try:
        problem = answer.json()
        failure = ProblemError(problem["detail"])
        failure.status, failure.code = answer.status_code, problem["code"]
    except (ValueError, KeyError, TypeError):
        return UnreachableManagerError(f"{answer.url}: HTTP {answer.status_code}, not an answer of Node Manager")
    return failure


def _split_label(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    return key, value if equals else None
