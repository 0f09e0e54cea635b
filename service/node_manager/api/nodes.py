# SPDX-License-Identifier: GPL-3.0-or-later
"""The registry over HTTP: list, register, read, update, deregister, set status, events."""

from __future__ import annotations

import json
from typing import Annotated

import structlog
from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from node_manager import events, samples
from node_manager.api.answers import etag, job_headers, json_response, wait_for, write_cursor
from node_manager.api.errors import responses
from node_manager.api.fragments import NodeFragments, Rendered
from node_manager.api.parameters import (
    Cursor,
    IfMatch,
    Limit,
    NodeIdPath,
    PartsDependency,
    Wait,
    describe_query,
    read_cursor,
    read_if_match,
    read_number_cursor,
    read_query,
)
from node_manager.api.schemas import EventPageOut, NodeDetailOut, NodeFilterQuery, NodePageOut, NodeQuery
from node_manager.api.security import Operator, Viewer
from node_manager.declarations import NodeChange, NodeDeclaration
from node_manager.domain import JobAction
from node_manager.drain_blockers import load_situation
from node_manager.maintenance_requests import StatusRequest
from node_manager.node_filters import NodeFilter
from node_manager.node_registry import Node, NodeRegistry
from node_manager.parts import Parts
from node_manager.problems import InvalidInputError, QueueFullError
from node_manager.status_input import StatusIn
from node_manager.views import render_node_detail, render_time

_log = structlog.get_logger()
_EXAMPLE = {
    "node_id": "gw-7",
    "address": "192.0.2.7",
    "node_type": "edge-gateway",
    "labels": {"line": "a"},
    "location": {"region": "eu", "zone": "eu-1a", "site": "plant-2"},
    "connection": {"user": "manager", "become": True},
}


def make_router(fragments: NodeFragments) -> APIRouter:
    """Build the endpoints under /nodes; *fragments* renders the items of lists."""
    router = APIRouter(tags=["nodes"])

    @router.get("/nodes", response_model=NodePageOut, responses=responses(422), openapi_extra=describe_query(NodeQuery))
    def list_nodes(parts: PartsDependency, _identity: Viewer, request: Request) -> Response:
        """List nodes in the order of their ids."""

        def make() -> Rendered:
            query = read_query(request, NodeQuery)
            return _render_page(parts.registry, fragments, query)

        return Response(fragments.page(request.scope["query_string"], make), media_type="application/json")

    @router.post(
        "/nodes",
        status_code=201,
        response_model=NodeDetailOut,
        responses={
            200: {"model": NodeDetailOut, "description": "It was there already"},
            **responses(400, 409, 413, 422),
        },
        openapi_extra={"requestBody": {"content": {"application/json": {"example": _EXAMPLE}}}},
    )
    async def register_node(
        parts: PartsDependency,
        identity: Operator,
        declaration: NodeDeclaration,
        wait: Wait = 0,
        look: Annotated[bool, Query(description="Look at a new node at once; false: somebody else does")] = True,
    ) -> Response:
        """Register a node and look at it: facts, resources, first health check, by a job that Link names.

        The same body again answers 200 and changes nothing; another body for the same id answers 409.
        """
        node, created = await run_in_threadpool(parts.registry.register, declaration)
        headers = {"Location": f"/nodes/{node.node_id}"}
        if look and (created or wait > 0):
            try:
                job = await run_in_threadpool(parts.jobs.submit, JobAction.REGISTER, [node.node_id], identity.name)
            except QueueFullError:
                # The node is registered, and that is what was asked for; the scheduler comes to it.
                _log.warning("a new node waits for its first look, the job queue is full", node_id=node.node_id)
            else:
                headers |= job_headers(job.job_id)
                if wait > 0:
                    await wait_for(parts, job, wait)
        return await run_in_threadpool(_detail, parts, node.node_id, 201 if created else 200, headers)

    @router.get("/nodes/{node_id}", response_model=NodeDetailOut, responses=responses(404, 422))
    def read_node(parts: PartsDependency, _identity: Viewer, node_id: NodeIdPath) -> Response:
        """Read one node with its facts, conditions and applications."""
        return _detail(parts, node_id)

    @router.put(
        "/nodes/{node_id}",
        response_model=NodeDetailOut,
        responses=responses(400, 404, 412, 413, 422),
        openapi_extra={
            "requestBody": {
                "content": {
                    "application/json": {"example": {key: _EXAMPLE[key] for key in _EXAMPLE if key != "node_id"}}
                }
            }
        },
    )
    def update_node(
        parts: PartsDependency, _identity: Operator, node_id: NodeIdPath, change: NodeChange, if_match: IfMatch = None
    ) -> Response:
        """Replace what is declared about a node; what is left out is gone, but for admin, which stays."""
        parts.registry.update(node_id, change, if_generation=read_if_match(if_match))
        return _detail(parts, node_id)

    @router.delete("/nodes/{node_id}", status_code=204, responses=responses(404, 409, 412, 422))
    def deregister_node(
        parts: PartsDependency,
        _identity: Operator,
        node_id: NodeIdPath,
        if_match: IfMatch = None,
        force: Annotated[bool, Query(description="Drop the allocations that it still holds")] = False,
    ) -> Response:
        """Remove a node; 409 while it holds allocations or is another's jump host."""
        parts.registry.deregister(node_id, force=force, if_generation=read_if_match(if_match))
        return Response(status_code=204)

    @router.put(
        "/nodes/{node_id}/status", response_model=NodeDetailOut, responses=responses(400, 404, 409, 412, 413, 422)
    )
    def set_status(
        parts: PartsDependency, identity: Operator, node_id: NodeIdPath, wanted: StatusIn, if_match: IfMatch = None
    ) -> Response:
        """Say whether a node takes part: put it into maintenance, empty it first, take it back.

        A drain asks the owners by event to move what they have there, with a proposal for each allocation; what is still
        in the way is in `maintenance.blockers`. Maintenance is left after a full health check that passes. 409: another
        operator holds the node.
        """
        request = StatusRequest(**dict(wanted))
        parts.maintenance.set_status(node_id, request, identity.name, if_generation=read_if_match(if_match))
        return _detail(parts, node_id)

    @router.delete("/nodes/{node_id}/host-keys", response_model=NodeDetailOut, responses=responses(404, 422))
    def forget_host_keys(parts: PartsDependency, _identity: Operator, node_id: NodeIdPath) -> Response:
        """Forget the pinned host keys and end the quarantine: the next key that the node shows is pinned."""
        parts.registry.forget_host_keys(node_id)
        return _detail(parts, node_id)

    @router.get("/nodes/{node_id}/events", response_model=EventPageOut, responses=responses(404, 422))
    def list_events(
        parts: PartsDependency, _identity: Viewer, node_id: NodeIdPath, limit: Limit = 100, cursor: Cursor = None
    ) -> Response:
        """List what happened to a node, newest first; also of one that is gone."""
        before = read_number_cursor(cursor)
        with parts.store.read() as connection:
            rows = events.of_node(connection, node_id, limit + 1, before)
        if not rows and before is None:
            parts.registry.get(node_id)
        items = [
            {
                "sequence": row.sequence,
                "event_id": row.event_id,
                "type": row.type,
                "node_id": row.node_id,
                "occurred_at": render_time(row.occurred_at),
                "data": row.data,
            }
            for row in rows[:limit]
        ]
        following = write_cursor(rows[limit - 1].sequence) if len(rows) > limit else None
        return json_response({"items": items, "next_cursor": following})

    return router


def read_filter(query: NodeFilterQuery) -> NodeFilter:
    """Read which nodes somebody asks for.

    Errors: InvalidInputError.
    """
    _no_nul({"type": query.type, "zone": query.zone, "site": query.site, "region": query.region})
    labels = tuple(_read_label(text) for text in query.label)
    return NodeFilter(query.status, query.health, query.type, query.zone, query.site, query.region, labels)


def _render_page(registry: NodeRegistry, fragments: NodeFragments, query: NodeQuery) -> Rendered:
    page = registry.page(read_filter(query), query.limit, _read_id_cursor(query.cursor))
    following = None if page.next_after is None else write_cursor(page.next_after)
    items = fragments.nodes(page.versions)
    body = b'{"items":[' + b",".join(item.body for item in items) + b'],"next_cursor":'
    return Rendered(
        body + json.dumps(following).encode() + b"}",
        min((item.stale_at for item in items if item.stale_at is not None), default=None),
    )


def _detail(parts: Parts, node_id: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    node: Node = parts.registry.get(node_id)
    sample = samples.newest_sample(parts.store, node_id)
    situation = load_situation(parts.store, parts.settings, node_id)
    body = render_node_detail(node, sample, situation, parts.settings, parts.clock())
    return json_response(body, status, {**(headers or {}), "ETag": etag(node.generation)})


def _read_label(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    _no_nul({"label": text})
    if not key or len(key) > 63 or len(value) > 255:
        raise InvalidInputError("label", "expected key=value or key")
    return key, value if equals else None


def _read_id_cursor(cursor: str | None) -> str | None:
    after = read_cursor(cursor)
    _no_nul({"cursor": after})
    return after


def _no_nul(texts: dict[str, str | None]) -> None:
    """Refuse what no stored text can hold and PostgreSQL would not even compare."""
    for field, text in texts.items():
        if text is not None and "\x00" in text:
            raise InvalidInputError(field, "expected text without NUL")
