# SPDX-License-Identifier: GPL-3.0-or-later
"""For Prometheus: the manager's metrics, and the nodes as targets to scrape."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Header, Request, Response

from node_manager import prometheus_targets
from node_manager.api.answers import json_response
from node_manager.api.errors import responses
from node_manager.api.nodes import read_filter
from node_manager.api.parameters import PartsDependency, describe_query, read_query
from node_manager.api.schemas_metrics import TargetGroupOut, TargetQuery
from node_manager.api.security import Scraper, Viewer

router = APIRouter(tags=["metrics"])
_TEXT = {"text/plain": {"schema": {"type": "string"}}, "application/openmetrics-text": {"schema": {"type": "string"}}}


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Metrics in the form that Accept asks for", "content": _TEXT}, **responses()},
)
async def read_metrics(
    request: Request,
    parts: PartsDependency,
    identity: Scraper,
    accept: Annotated[str, Header(description="application/openmetrics-text, or anything: Prometheus' text form")] = "",
) -> Response:
    """Read the manager's metrics, for Prometheus.

    While the store doesn't answer they are those of the process, and `node_manager_store_up` is 0; a token that was good within
    the last hour is still let in then, and 503 is for all others.
    """
    write = partial(parts.metrics.exposition, accept, asks_store=not identity.remembered)
    body, content_type = await to_thread.run_sync(write, limiter=request.app.state.scrapes)
    return Response(body, headers={"Content-Type": content_type})


@router.get(
    "/prometheus/targets",
    response_model=list[TargetGroupOut],
    responses=responses(422),
    openapi_extra=describe_query(TargetQuery),
)
def read_targets(parts: PartsDependency, _identity: Viewer, request: Request) -> Response:
    """List nodes as targets, for the HTTP service discovery of Prometheus; all that pass the filters at once."""
    query = read_query(request, TargetQuery)
    found = prometheus_targets.read(parts.store, parts.settings, read_filter(query), query.port, parts.clock())
    return json_response(found)
