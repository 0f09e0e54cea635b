# SPDX-License-Identifier: GPL-3.0-or-later
"""The inventory, the node types, and whether the service lives."""

from __future__ import annotations

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Query, Response
from fastapi.responses import RedirectResponse

from node_manager import inventory
from node_manager.api.answers import json_response
from node_manager.api.errors import problem_response, responses
from node_manager.api.parameters import PartsDependency
from node_manager.api.schemas_monitoring import MonitoringOut
from node_manager.api.security import Viewer
from node_manager.declarations import NODE_ID_PATTERN
from node_manager.store import StoreUnavailableError
from node_manager.views import render_node_types, render_time

router = APIRouter()


@router.get("/inventory", tags=["ansible"], response_model=dict[str, Any], responses=responses(422))
def read_inventory(
    parts: PartsDependency,
    _identity: Viewer,
    node_id: Annotated[
        list[Annotated[str, Query(max_length=253, pattern=NODE_ID_PATTERN)]] | None,
        Query(max_length=100, description="Only these nodes"),
    ] = None,
) -> Response:
    """Read the registry as the inventory plugin takes it: hosts, their groups and variables, pinned host keys."""
    return json_response(inventory.build(parts.store, parts.settings, node_id))


@router.get("/node-types", tags=["ansible"], response_model=dict[str, Any], responses=responses())
def read_node_types(parts: PartsDependency, _identity: Viewer) -> Response:
    """Read the node types with the checks and thresholds in force."""
    return json_response(render_node_types(parts.settings))


@router.get("/monitoring", tags=["watching"], response_model=MonitoringOut, responses=responses())
def read_monitoring(parts: PartsDependency, _identity: Viewer) -> Response:
    """Read how this manager watches the fleet, and what trouble it has itself."""
    found = parts.monitor.overview()
    faults = [{**fault, "last_at": render_time(fault["last_at"])} for fault in found["faults"]]
    return json_response({**found, "faults": faults})


@router.get("/healthz", tags=["service"], response_model=dict[str, str])
def is_alive() -> Response:
    """Tell that the process answers."""
    return json_response({"status": "ok"})


@router.get("/readyz", tags=["service"], response_model=dict[str, str], responses={503: responses()[503]})
def is_ready(parts: PartsDependency) -> Response:
    """Tell whether requests can be served: the store answers."""
    try:
        with parts.store.read() as connection:
            connection.execute(sa.select(1))
    except StoreUnavailableError:
        return problem_response(503, "store_unavailable", "the store can't answer now", {"Retry-After": "2"})
    return json_response({"status": "ready"})


@router.get("/", include_in_schema=False)
def root() -> RedirectResponse:
    """Send people to the documentation."""
    return RedirectResponse("/docs")
