# SPDX-License-Identifier: GPL-3.0-or-later
"""Deployments over HTTP: choosing nodes, what was chosen and why, and how traffic is to be shared."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from node_manager import decisions
from node_manager.api.answers import json_response
from node_manager.api.errors import responses
from node_manager.api.parameters import PartsDependency
from node_manager.api.schemas_deployment import (
    BatchOut,
    DecisionOut,
    DeploymentNodesOut,
    LoadOut,
    OptimizationOut,
    PlacementOut,
    ReleasedDeploymentOut,
    ReplayOut,
    SelectionBatch,
    TrafficOut,
)
from node_manager.api.security import Operator, Viewer
from node_manager.deployments import Placed
from node_manager.parts import Parts
from node_manager.problems import InvalidInputError, ProblemError
from node_manager.selection_request import SelectionRequest
from node_manager.store.documents import read_json
from node_manager.views import render_allocation, render_decision, render_placed, render_suggestions, render_time

router = APIRouter(tags=["deployment"])
DeploymentIdPath = Annotated[
    str, Path(max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The deployment's id")
]
DecisionIdPath = Annotated[str, Path(max_length=36, pattern=r"^[0-9a-f-]{1,36}$", description="The decision's id")]
_EXAMPLE = {
    "deployment_id": "web-1",
    "owner": "team-a",
    "replicas": 3,
    "resources": {"cpu_millicores": 500, "memory_mib": 256},
    "constraints": {"zones": ["eu-1a", "eu-1b"], "labels": {"line": ["a", "b"]}},
    "spread": {"scope": "zone", "max_skew": 1},
}
_SINGLE, _BATCH = TypeAdapter(SelectionRequest), TypeAdapter(SelectionBatch)
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "anyOf": [
                    {"$ref": "#/components/schemas/SelectionRequest"},
                    {"$ref": "#/components/schemas/SelectionBatch"},
                ]
            },
            "example": _EXAMPLE,
        }
    },
}


@router.post(
    "/deployment/node-selection",
    status_code=201,
    response_model=PlacementOut,
    responses={
        200: {"model": PlacementOut | BatchOut, "description": "Placed already, or nothing was reserved, or a batch"},
        **responses(400, 409, 413, 422),
    },
    openapi_extra={"requestBody": _BODY},
)
async def select_nodes(parts: PartsDependency, _identity: Operator, request: Request) -> Response:
    """Choose nodes for a deployment and reserve its resources there, for all replicas or none.

    The same body again answers 200 with what is reserved already. With `{"deployments": [...]}` many are placed in one pass, in
    their order, each for itself: the answer is 200 with a status per deployment.
    """
    body = await request.body()
    requests, is_batch = _read(body, parts)
    for wanted in requests:
        # Made here and kept: the one thread that places has enough to do.
        _ = wanted.json_text, wanted.ask
    outcomes = await asyncio.wrap_future(parts.placements.submit(requests))
    if is_batch:
        return json_response({"results": [_render(outcome) for outcome in outcomes]})
    (outcome,) = outcomes
    if isinstance(outcome, ProblemError):
        raise outcome
    return json_response(render_placed(outcome), _status_of(outcome))


@router.get("/deployment/{deployment_id}/nodes", response_model=DeploymentNodesOut, responses=responses(404, 422))
def read_nodes(parts: PartsDependency, _identity: Viewer, deployment_id: DeploymentIdPath) -> Response:
    """Read where a deployment's replicas are, with the state of these nodes."""
    request, allocations = parts.placer.nodes_of(deployment_id)
    nodes = parts.registry.load(sorted({allocation.node_id for allocation in allocations}))
    return json_response(
        {
            "deployment_id": deployment_id,
            "request": request,
            "nodes": [
                {
                    **render_allocation(allocation),
                    "address": node.address,
                    "status": node.status.value,
                    "health": node.state.health.value,
                }
                for allocation in allocations
                if (node := nodes.get(allocation.node_id)) is not None
            ],
        }
    )


@router.post("/deployment/{deployment_id}/confirm", response_model=DeploymentNodesOut, responses=responses(404, 422))
def confirm_deployment(parts: PartsDependency, identity: Operator, deployment_id: DeploymentIdPath) -> Response:
    """Keep what was reserved with ttl_seconds; repeating does no harm."""
    parts.placer.confirm(deployment_id)
    return read_nodes(parts, identity, deployment_id)


@router.delete("/deployment/{deployment_id}", response_model=ReleasedDeploymentOut, responses=responses(404, 422))
def delete_deployment(parts: PartsDependency, _identity: Operator, deployment_id: DeploymentIdPath) -> Response:
    """Release all that is reserved for a deployment."""
    return json_response({"deployment_id": deployment_id, "released": parts.placer.delete(deployment_id)})


@router.get("/deployment/{deployment_id}/traffic", response_model=TrafficOut, responses=responses(404, 422))
def read_traffic(parts: PartsDependency, _identity: Viewer, deployment_id: DeploymentIdPath) -> Response:
    """Read how traffic is to be shared among a deployment's nodes: 100 points, or none where no node can take any."""
    weights = parts.traffic.weights_of(deployment_id)
    return json_response(
        {
            "deployment_id": deployment_id,
            "at": render_time(parts.clock()),
            "nodes": [asdict(weight) for weight in weights],
        }
    )


@router.get("/load", response_model=LoadOut, responses=responses(422))
def read_load(
    parts: PartsDependency,
    _identity: Viewer,
    zone: Annotated[str | None, Query(max_length=63, description="Only in this zone")] = None,
    site: Annotated[str | None, Query(max_length=63, description="Only at this site")] = None,
    region: Annotated[str | None, Query(max_length=63, description="Only in this region")] = None,
) -> Response:
    """Read the load and health of all nodes at once."""
    items = [
        {**asdict(load), "last_contact_at": render_time(load.last_contact_at)}
        for load in parts.traffic.load()
        if zone in {None, load.zone} and site in {None, load.site} and region in {None, load.region}
    ]
    return json_response({"at": render_time(parts.clock()), "items": items})


@router.get("/optimization", response_model=OptimizationOut, responses=responses())
def read_optimization(parts: PartsDependency, _identity: Viewer) -> Response:
    """Read which replicas had better be on other nodes: advice, in the order in which to follow it."""
    return json_response(render_suggestions(parts.optimiser.advice()))


@router.get("/decisions/{decision_id}", response_model=DecisionOut, responses=responses(404, 422))
def read_decision(parts: PartsDependency, _identity: Viewer, decision_id: DecisionIdPath) -> Response:
    """Read what was decided: the request, what was left out and why, the scores of what was chosen."""
    return json_response(render_decision(decisions.read(parts.store, decision_id)))


@router.get("/decisions/{decision_id}/replay", response_model=ReplayOut, responses=responses(404, 422))
async def replay_decision(parts: PartsDependency, _identity: Viewer, decision_id: DecisionIdPath) -> Response:
    """Decide once more from the record of that time, and compare bit for bit."""
    stored, again = await run_in_threadpool(decisions.replay, parts.store, decision_id)
    return json_response(
        {"decision_id": decision_id, "identical": stored == again, "stored": stored, "replayed": again}
    )


def _read(body: bytes, parts: Parts) -> tuple[list[SelectionRequest], bool]:
    try:
        # One body, two shapes: told apart by hand, so that errors are about the one that was meant.
        document = read_json(body)
    except (ValueError, RecursionError) as error:
        raise RequestValidationError(
            [
                {
                    "type": "json_invalid",
                    "loc": ("body",),
                    "msg": "JSON decode error",
                    "input": {},
                    "ctx": {"error": str(error)},
                }
            ]
        ) from None
    is_batch = isinstance(document, dict) and "deployments" in document
    try:
        if not is_batch:
            return [_SINGLE.validate_python(document)], False
        requests = _BATCH.validate_python(document).deployments
    except ValidationError as error:
        found = [{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_url=False)]
        raise RequestValidationError(found) from None
    most = parts.settings.configuration.selection.max_deployments
    if len(requests) > most:
        raise InvalidInputError("deployments", f"expected at most {most} (selection.max_deployments)")
    return requests, True


def _status_of(outcome: Placed) -> int:
    return 201 if outcome.created and outcome.allocations else 200


def _render(outcome: Placed | ProblemError) -> dict[str, Any]:
    if isinstance(outcome, Placed):
        return {"status": _status_of(outcome), "placement": render_placed(outcome), "problem": None}
    problem = {"code": outcome.code, "detail": outcome.detail, **outcome.extra}
    return {"status": outcome.status, "placement": None, "problem": problem}
