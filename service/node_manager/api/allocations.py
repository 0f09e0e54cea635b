# SPDX-License-Identifier: GPL-3.0-or-later
"""Reserving and releasing resources over HTTP, and the quotas of owners."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from node_manager.api.answers import json_response, write_cursor
from node_manager.api.errors import responses
from node_manager.api.parameters import Cursor, Limit, NodeIdPath, PartsDependency, read_cursor
from node_manager.api.schemas_allocation import (
    ALLOCATION_ID_PATTERN,
    OWNER_PATTERN,
    AllocateIn,
    AllocationOut,
    AllocationPageOut,
    DeallocateIn,
    QuotaIn,
    QuotaOut,
    QuotaPageOut,
    ReleasedOut,
    ResourcesOut,
)
from node_manager.api.security import Operator, Viewer
from node_manager.declarations import NODE_ID_PATTERN
from node_manager.quotas import Quota
from node_manager.resource_allocator import AllocationFilter, AllocationRequest
from node_manager.resources import ask_of
from node_manager.views import render_allocation, render_resources

router = APIRouter(tags=["allocation"])
AllocationIdPath = Annotated[
    str, Path(max_length=128, pattern=ALLOCATION_ID_PATTERN, description="The allocation's id")
]
OwnerPath = Annotated[str, Path(max_length=253, pattern=OWNER_PATTERN, description="The owner's name")]


@router.get("/nodes/{node_id}/resources", response_model=ResourcesOut, responses=responses(404, 422))
def read_resources(parts: PartsDependency, _identity: Viewer, node_id: NodeIdPath) -> Response:
    """Read what a node has, what of it is reserved, allocated and available, and by whom."""
    books, allocations = parts.allocator.books(node_id)
    return json_response(render_resources(node_id, books, allocations))


@router.post(
    "/nodes/{node_id}/allocate",
    status_code=201,
    response_model=AllocationOut,
    responses={
        200: {"model": AllocationOut, "description": "It was there already"},
        **responses(400, 404, 409, 413, 422),
    },
)
def allocate(parts: PartsDependency, _identity: Operator, node_id: NodeIdPath, wanted: AllocateIn) -> Response:
    """Reserve resources on a node, all or nothing.

    The same body again answers 200 and changes nothing; another body for the same allocation_id answers 422. With ttl_seconds
    the allocation is gone after that time unless POST /allocations/{allocation_id}/confirm keeps it.
    """
    request = AllocationRequest(
        wanted.allocation_id, wanted.owner, ask_of(wanted.resources), wanted.deployment_id, wanted.ttl_seconds
    )
    allocation, created = parts.allocator.allocate(node_id, request)
    headers = {"Location": f"/allocations/{allocation.allocation_id}"}
    return json_response(render_allocation(allocation), 201 if created else 200, headers)


@router.post("/nodes/{node_id}/deallocate", response_model=ReleasedOut, responses=responses(400, 404, 409, 413, 422))
def deallocate(parts: PartsDependency, _identity: Operator, node_id: NodeIdPath, wanted: DeallocateIn) -> Response:
    """Release an allocation; a repeated call answers released: false and does no harm."""
    released = parts.allocator.deallocate(node_id, wanted.allocation_id)
    return json_response({"allocation_id": wanted.allocation_id, "released": released})


@router.get("/allocations", response_model=AllocationPageOut, responses=responses(422))
def list_allocations(
    parts: PartsDependency,
    _identity: Viewer,
    node_id: Annotated[
        str | None, Query(max_length=253, pattern=NODE_ID_PATTERN, description="Only on this node")
    ] = None,
    owner: Annotated[str | None, Query(max_length=253, pattern=OWNER_PATTERN, description="Only of this owner")] = None,
    deployment_id: Annotated[
        str | None, Query(max_length=253, pattern=OWNER_PATTERN, description="Only of this deployment")
    ] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> Response:
    """List allocations in the order of their ids."""
    wanted = AllocationFilter(node_id, owner, deployment_id)
    found, following = parts.allocator.page(wanted, limit, read_cursor(cursor))
    return json_response(
        {
            "items": [render_allocation(allocation) for allocation in found],
            "next_cursor": None if following is None else write_cursor(following),
        }
    )


@router.get("/allocations/{allocation_id}", response_model=AllocationOut, responses=responses(404, 422))
def read_allocation(parts: PartsDependency, _identity: Viewer, allocation_id: AllocationIdPath) -> Response:
    """Read one allocation."""
    return json_response(render_allocation(parts.allocator.get(allocation_id)))


@router.post("/allocations/{allocation_id}/confirm", response_model=AllocationOut, responses=responses(404, 422))
def confirm_allocation(parts: PartsDependency, _identity: Operator, allocation_id: AllocationIdPath) -> Response:
    """Keep an allocation that was made with ttl_seconds; repeating does no harm."""
    return json_response(render_allocation(parts.allocator.confirm(allocation_id)))


@router.get("/quotas", response_model=QuotaPageOut, responses=responses(422))
def list_quotas(parts: PartsDependency, _identity: Viewer, limit: Limit = 100, cursor: Cursor = None) -> Response:
    """List quotas in the order of their owners."""
    found, following = parts.quotas.page(limit, read_cursor(cursor))
    return json_response(
        {
            "items": [_render(quota) for quota in found],
            "next_cursor": None if following is None else write_cursor(following),
        }
    )


@router.get("/quotas/{owner}", response_model=QuotaOut, responses=responses(404, 422))
def read_quota(parts: PartsDependency, _identity: Viewer, owner: OwnerPath) -> Response:
    """Read an owner's limits and use."""
    return json_response(_render(parts.quotas.get(owner)))


@router.put("/quotas/{owner}", response_model=QuotaOut, responses=responses(400, 413, 422))
def set_quota(parts: PartsDependency, _identity: Operator, owner: OwnerPath, wanted: QuotaIn) -> Response:
    """Set an owner's limits; below what is used nothing is evicted, and nothing more is given."""
    return json_response(_render(parts.quotas.put(owner, wanted.hard)))


@router.delete("/quotas/{owner}", status_code=204, responses=responses(422))
def delete_quota(parts: PartsDependency, _identity: Operator, owner: OwnerPath) -> Response:
    """Lift an owner's limits; repeating does no harm."""
    parts.quotas.delete(owner)
    return Response(status_code=204)


def _render(quota: Quota) -> dict[str, object]:
    return {"owner": quota.owner, "hard": quota.hard, "used": quota.used}
