# SPDX-License-Identifier: GPL-3.0-or-later
"""Repair over HTTP: ask for it, follow it, end it; the guard and its pauses."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from starlette.concurrency import run_in_threadpool

from node_manager.api.answers import json_response, write_cursor
from node_manager.api.errors import responses
from node_manager.api.parameters import Cursor, Limit, NodeIdPath, PartsDependency, Wait, read_number_cursor
from node_manager.api.schemas_recovery import (
    PAUSE_NAME_PATTERN,
    ClaimOut,
    GuardOut,
    MessageIn,
    PauseIn,
    PauseOut,
    RecoverIn,
    RecoveryOut,
    RecoveryPageOut,
    StepEndIn,
)
from node_manager.api.security import Operator, Viewer
from node_manager.declarations import NODE_ID_PATTERN
from node_manager.domain import RecoveryState, StepState
from node_manager.parts import Parts
from node_manager.recovery_rows import Recovery
from node_manager.views import render_pause, render_recovery, render_scope

router = APIRouter(tags=["recovery"])
RecoveryIdPath = Annotated[str, Path(max_length=36, pattern=r"^[0-9a-f-]{36}$", description="The recovery's id")]
PositionPath = Annotated[int, Path(ge=0, le=1000, description="The step's place, from 0")]
PauseNamePath = Annotated[str, Path(pattern=PAUSE_NAME_PATTERN, description="The pause's name")]

_POLL_SECONDS = 0.25


@router.post(
    "/nodes/{node_id}/recover",
    status_code=202,
    response_model=RecoveryOut,
    responses={
        200: {"model": RecoveryOut, "description": "It has ended already"},
        **responses(400, 404, 409, 413, 422),
    },
)
async def recover(
    parts: PartsDependency,
    identity: Operator,
    node_id: NodeIdPath,
    wanted: RecoverIn | None = None,
    dry_run: Annotated[bool, Query(description="Only find out what would be done; nothing is changed")] = False,
    wait: Wait = 0,
) -> Response:
    """Repair a node: one climb of its ladder, step by step, each step a job.

    Without steps, what the ladders have for what is wrong; where nothing is known to be wrong, all mild steps, of which each
    looks first whether it is needed. 409 names who repairs the node already, and since when. A person's repair waits
    neither for the guard nor for pauses.
    """
    asked = wanted or RecoverIn()
    recovery = await run_in_threadpool(
        parts.recoveries.begin_by_hand,
        node_id,
        asked.steps,
        identity.name,
        asked.reason,
        dry_run=dry_run,
        driver=asked.driver,
    )
    recovery = await _wait(parts, recovery, min(wait, parts.settings.server.max_wait_seconds))
    headers = {"Location": f"/recoveries/{recovery.recovery_id}"}
    return json_response(render_recovery(recovery), 202 if recovery.ended_at is None else 200, headers)


@router.get("/recoveries", response_model=RecoveryPageOut, responses=responses(422))
def list_recoveries(
    parts: PartsDependency,
    _identity: Viewer,
    limit: Limit = 100,
    cursor: Cursor = None,
    node_id: Annotated[
        str | None, Query(max_length=253, pattern=NODE_ID_PATTERN, description="Only those of this node")
    ] = None,
    state: Annotated[RecoveryState | None, Query(description="Only in this state")] = None,
) -> Response:
    """List climbs of the ladder, newest first, dry runs included."""
    page = parts.recoveries.page(limit, read_number_cursor(cursor), node_id=node_id, state=state)
    following = None if page.next_cursor is None else write_cursor(page.next_cursor)
    return json_response(
        {"items": [render_recovery(recovery) for recovery in page.recoveries], "next_cursor": following}
    )


@router.get("/recoveries/{recovery_id}", response_model=RecoveryOut, responses=responses(404, 422))
def read_recovery(parts: PartsDependency, _identity: Viewer, recovery_id: RecoveryIdPath) -> Response:
    """Read one climb with its steps and their jobs."""
    return json_response(render_recovery(parts.recoveries.get(recovery_id)))


@router.post("/recoveries/{recovery_id}/cancel", response_model=RecoveryOut, responses=responses(404, 409, 422))
def cancel_recovery(parts: PartsDependency, _identity: Operator, recovery_id: RecoveryIdPath) -> Response:
    """End a climb: no further act begins, and the job that runs is stopped."""
    return json_response(render_recovery(parts.recoveries.cancel(recovery_id)))


@router.post("/recoveries/{recovery_id}/steps/{position}/claim", response_model=ClaimOut, responses=responses(404, 422))
def claim_act(
    parts: PartsDependency, _identity: Operator, recovery_id: RecoveryIdPath, position: PositionPath
) -> Response:
    """Ask, from a playbook that carries out a step, whether its act may begin; that is granted once."""
    act, message = parts.recoveries.claim_act(recovery_id, position)
    return json_response({"act": act, "message": message})


@router.put(
    "/recoveries/{recovery_id}/steps/{position}", response_model=RecoveryOut, responses=responses(400, 404, 413, 422)
)
def end_step(
    parts: PartsDependency,
    _identity: Operator,
    recovery_id: RecoveryIdPath,
    position: PositionPath,
    told: StepEndIn,
) -> Response:
    """Say, from a playbook that carries out a step, how it ended."""
    return json_response(
        render_recovery(parts.recoveries.end_step(recovery_id, position, StepState(told.state), told.message))
    )


@router.post("/recoveries/{recovery_id}/give-up", response_model=RecoveryOut, responses=responses(400, 404, 413, 422))
def give_up(parts: PartsDependency, _identity: Operator, recovery_id: RecoveryIdPath, told: MessageIn) -> Response:
    """Keep work off a node that can't be repaired."""
    return json_response(render_recovery(parts.recoveries.give_up(recovery_id, told.message or "")))


@router.post("/recoveries/{recovery_id}/end", response_model=RecoveryOut, responses=responses(400, 404, 413, 422))
def end_recovery(parts: PartsDependency, _identity: Operator, recovery_id: RecoveryIdPath, told: MessageIn) -> Response:
    """Say, from a playbook that climbs, that the climb has ended; its state follows from its steps."""
    return json_response(render_recovery(parts.recoveries.end(recovery_id, told.message)))


@router.get("/guard", response_model=GuardOut, responses=responses())
def read_guard(parts: PartsDependency, _identity: Viewer) -> Response:
    """See whether nodes are repaired by themselves now: the breaker of each zone and of the fleet, and all pauses."""
    return json_response(
        {
            "automatic": parts.settings.configuration.recovery.automatic,
            "scopes": [render_scope(scope) for scope in parts.guard.scopes()],
            "pauses": [render_pause(found) for found in parts.guard.pauses()],
        }
    )


@router.put("/guard/pauses/{name}", response_model=PauseOut, responses=responses(400, 413, 422))
def pause(parts: PartsDependency, identity: Operator, name: PauseNamePath, wanted: PauseIn) -> Response:
    """Pause automatic repair, in a zone or everywhere, until somebody deletes the pause or its time is over."""
    return json_response(render_pause(parts.guard.pause(name, wanted.zone, wanted.reason, wanted.until, identity.name)))


@router.delete("/guard/pauses/{name}", status_code=204, responses=responses(404, 422))
def end_pause(parts: PartsDependency, _identity: Operator, name: PauseNamePath) -> Response:
    """End a pause."""
    parts.guard.end_pause(name)
    return Response(status_code=204)


async def _wait(parts: Parts, recovery: Recovery, seconds: float) -> Recovery:
    """Wait for a climb's end without holding a thread."""
    until = asyncio.get_running_loop().time() + seconds
    while recovery.ended_at is None and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(_POLL_SECONDS)
        recovery = await run_in_threadpool(parts.recoveries.get, recovery.recovery_id)
    return recovery
