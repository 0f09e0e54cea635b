# SPDX-License-Identifier: GPL-3.0-or-later
"""Over HTTP: where the work of a node would go if the node were lost."""

from __future__ import annotations

from fastapi import APIRouter, Response

from node_manager.api.answers import json_response
from node_manager.api.errors import responses
from node_manager.api.parameters import NodeIdPath, PartsDependency
from node_manager.api.schemas_lost import ReplacementsOut
from node_manager.api.security import Viewer
from node_manager.views import render_time

router = APIRouter(tags=["deployment"])


@router.get("/nodes/{node_id}/replacements", response_model=ReplacementsOut, responses=responses(404, 422))
def read_replacements(parts: PartsDependency, _identity: Viewer, node_id: NodeIdPath) -> Response:
    """Read where the node's allocations would go if it were lost: what selection would choose, reserved by nobody."""
    plan = parts.replacements.plan(node_id)
    return json_response(
        {
            "node_id": node_id,
            "computed_at": render_time(plan.computed_at),
            "items": [item.as_data() for item in plan.items],
            "left_out": plan.left_out,
        }
    )
