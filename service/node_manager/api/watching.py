# SPDX-License-Identifier: GPL-3.0-or-later
"""What is seen on nodes, over HTTP: resources, utilization, health, checks, and the door for observations."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Response
from starlette.concurrency import run_in_threadpool

from node_manager import samples
from node_manager.access import Identity
from node_manager.api.answers import job_headers, json_response, not_looked_at, wait_for
from node_manager.api.errors import responses
from node_manager.api.jobs import render_job
from node_manager.api.parameters import MaxAge, NodeIdPath, PartsDependency, Wait
from node_manager.api.schemas import JobOut, ObservationsIn, OutcomeOut, UtilizationOut
from node_manager.api.schemas_recovery import RepairableHealthOut
from node_manager.api.security import Observer, Operator, Viewer
from node_manager.domain import JobAction, ObservationKind, Role
from node_manager.node_states import transitions_of
from node_manager.observations import Observation
from node_manager.parts import Parts
from node_manager.samples import Observed
from node_manager.views import render_health, render_repair, render_utilization

router = APIRouter(tags=["watching"])
_WAIT_FOR_FRESH_SECONDS = 60.0
_WAIT_FOR_STREAM_SECONDS = 25.0
_TRANSITIONS = 10
_SEEN_BY = {JobAction.GATHER: ObservationKind.SAMPLE, JobAction.CHECK: ObservationKind.REPORT}


@router.get("/nodes/{node_id}/utilization", response_model=UtilizationOut, responses=responses(404, 422))
async def read_utilization(
    parts: PartsDependency,
    identity: Viewer,
    node_id: NodeIdPath,
    max_age: MaxAge = None,
    window: Annotated[
        str | None, Query(pattern=r"^[1-9][0-9]{0,3}[mhd]$", description="Also the history of this long, such as 1h")
    ] = None,
) -> Response:
    """Read the newest sample, in short and whole."""
    await run_in_threadpool(parts.registry.get, node_id)
    sample = await run_in_threadpool(samples.newest_sample, parts.store, node_id)
    if _too_old(parts, sample, max_age) and await _look(parts, node_id, JobAction.GATHER, identity):
        sample = await run_in_threadpool(samples.newest_sample, parts.store, node_id)
    if sample is None:
        return not_looked_at(node_id, "sample")
    minutes = None
    if window is not None:
        since = parts.clock() - _window(window)
        minutes = await run_in_threadpool(samples.history, parts.store, node_id, since)
    return json_response(render_utilization(node_id, sample, minutes, parts.clock()))


@router.get("/nodes/{node_id}/health", response_model=RepairableHealthOut, responses=responses(404, 422))
async def read_health(
    parts: PartsDependency, identity: Viewer, node_id: NodeIdPath, max_age: MaxAge = None
) -> Response:
    """Read the verdict on a node, its conditions and its newest checks."""
    await run_in_threadpool(parts.registry.get, node_id)
    if max_age is not None:
        report = await run_in_threadpool(samples.newest_report, parts.store, node_id)
        if _too_old(parts, report, max_age):
            await _look(parts, node_id, JobAction.CHECK, identity)
    return await run_in_threadpool(_health, parts, node_id)


@router.post(
    "/nodes/{node_id}/health/check",
    status_code=202,
    response_model=JobOut,
    responses={200: {"model": RepairableHealthOut, "description": "The checks ran in time"}, **responses(404, 422)},
)
async def check_health(parts: PartsDependency, identity: Operator, node_id: NodeIdPath, wait: Wait = 0) -> Response:
    """Run a node's health checks now; callers at the same time share one run.

    Answers 202 with the job, or, with *wait*, 200 with the verdict if it is there in time.
    """
    await run_in_threadpool(parts.registry.get, node_id)
    job = await run_in_threadpool(parts.jobs.submit, JobAction.CHECK, [node_id], identity.name)
    if wait > 0 and await wait_for(parts, job, wait):
        response = await run_in_threadpool(_health, parts, node_id)
        response.headers.update(job_headers(job.job_id))
        return response
    body = render_job(await run_in_threadpool(parts.jobs.get, job.job_id))
    return json_response(body, 202, {"Location": f"/jobs/{job.job_id}", **job_headers(job.job_id)})


@router.post("/observations", response_model=OutcomeOut, responses=responses(400, 413, 422))
def record_observations(parts: PartsDependency, identity: Observer, body: ObservationsIn) -> Response:
    """Hand in what was seen on nodes: one batch, one transaction; each item is recorded, late or rejected."""
    batch = [
        Observation(item.node_id, item.observed_at, item.source, item.kind, item.data) for item in body.observations
    ]
    return json_response(asdict(parts.observations.record(batch, may_pin=identity.role is not Role.AGENT)))


def _health(parts: Parts, node_id: str) -> Response:
    node = parts.registry.get(node_id)
    report = samples.newest_report(parts.store, node_id)
    with parts.store.read() as connection:
        transitions = transitions_of(connection, node_id, _TRANSITIONS)
    body = render_health(node, report, parts.settings, parts.clock(), transitions)
    repair = render_repair(parts.faults.outlook(node_id), parts.guard.scopes_of(node.location["zone"]))
    return json_response({**body, "recovery": repair})


def _too_old(parts: Parts, observed: Observed | None, max_age: float | None) -> bool:
    if max_age is None:
        return False
    return observed is None or (parts.clock() - observed.observed_at).total_seconds() > max_age


async def _look(parts: Parts, node_id: str, action: JobAction, identity: Identity) -> bool:
    """Have a node looked at, over its stream where one is open and by a job otherwise, and wait for it.

    A viewer, who may not start work, gets what is stored.
    """
    if identity.role is Role.VIEWER:
        return False
    fetched = parts.monitor.fetch(node_id, _SEEN_BY[action])
    if fetched is not None:
        with suppress(TimeoutError):
            # Others may wait for the same look: who goes away must not end it for them.
            if await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(fetched)), _WAIT_FOR_STREAM_SECONDS):
                return True
    job = await run_in_threadpool(parts.jobs.submit, action, [node_id], identity.name)
    return await wait_for(parts, job, _WAIT_FOR_FRESH_SECONDS)


def _window(text: str) -> timedelta:
    count = int(text[:-1])
    match text[-1]:
        case "m":
            return timedelta(minutes=count)
        case "h":
            return timedelta(hours=count)
        case _:
            return timedelta(days=count)
