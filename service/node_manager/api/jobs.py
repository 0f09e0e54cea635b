# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs over HTTP: start, list, read, cancel, follow the log."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response
from starlette.concurrency import run_in_threadpool

from node_manager.api.answers import job_headers, json_response, wait_for, write_cursor
from node_manager.api.errors import responses
from node_manager.api.parameters import Cursor, Limit, PartsDependency, Wait, read_cursor
from node_manager.api.schemas import JobIn, JobOut, JobPageOut
from node_manager.api.security import Operator, Viewer
from node_manager.declarations import NODE_ID_PATTERN
from node_manager.domain import JobAction, JobState
from node_manager.jobs import Job
from node_manager.problems import InvalidInputError
from node_manager.views import render_time

router = APIRouter(tags=["jobs"])
JobIdPath = Annotated[UUID, Path(description="The job's id")]


def render_job(job: Job) -> dict[str, Any]:
    """Show a job with its result on each node."""
    return {
        "job_id": job.job_id,
        "action": job.action.value,
        "state": job.state.value,
        "requested_by": job.requested_by,
        "variables": dict(job.variables),
        "message": job.message,
        "created_at": render_time(job.created_at),
        "started_at": render_time(job.started_at),
        "ended_at": render_time(job.ended_at),
        "nodes": [
            {"node_id": node.node_id, "result": node.result.value if node.result else None, "message": node.message}
            for node in job.nodes
        ],
    }


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobOut,
    responses={200: {"model": JobOut, "description": "It ended in time"}, **responses(400, 413, 422)},
)
async def start_job(parts: PartsDependency, identity: Operator, wanted: JobIn, wait: Wait = 0) -> Response:
    """Run work on some nodes through Ansible."""
    node_ids = sorted(set(wanted.node_ids))
    unknown = sorted(set(node_ids) - await run_in_threadpool(parts.registry.existing, node_ids))
    if unknown:
        raise InvalidInputError("node_ids", f"not registered: {', '.join(unknown[:10])}")
    job = await run_in_threadpool(parts.jobs.submit, wanted.action, node_ids, identity.name)
    ended = wait > 0 and await wait_for(parts, job, wait)
    job = await run_in_threadpool(parts.jobs.get, job.job_id)
    headers = {"Location": f"/jobs/{job.job_id}", **job_headers(job.job_id)}
    return json_response(render_job(job), 200 if ended else 202, headers)


@router.get("/jobs", response_model=JobPageOut, responses=responses(422))
def list_jobs(
    parts: PartsDependency,
    _identity: Viewer,
    limit: Limit = 100,
    cursor: Cursor = None,
    state: Annotated[JobState | None, Query(description="Only in this state")] = None,
    action: Annotated[JobAction | None, Query(description="Only of this action")] = None,
    node_id: Annotated[
        str | None, Query(max_length=253, pattern=NODE_ID_PATTERN, description="Only those that touch this node")
    ] = None,
) -> Response:
    """List jobs, newest first."""
    page = parts.jobs.page(limit, read_cursor(cursor), state=state, action=action, node_id=node_id)
    following = None if page.next_cursor is None else write_cursor(page.next_cursor)
    return json_response({"items": [render_job(job) for job in page.jobs], "next_cursor": following})


@router.get("/jobs/{job_id}", response_model=JobOut, responses=responses(404, 422))
def read_job(parts: PartsDependency, _identity: Viewer, job_id: JobIdPath) -> Response:
    """Read a job with its result on each node."""
    return json_response(render_job(parts.jobs.get(str(job_id))))


@router.post("/jobs/{job_id}/cancel", response_model=JobOut, responses=responses(404, 409, 422))
def cancel_job(parts: PartsDependency, _identity: Operator, job_id: JobIdPath) -> Response:
    """Stop a job; nodes it has not come to are left alone."""
    return json_response(render_job(parts.jobs.cancel(str(job_id))))


@router.get(
    "/jobs/{job_id}/log",
    response_class=Response,
    responses={200: {"description": "The log so far", "content": {"text/plain": {}}}, **responses(404, 422)},
)
def read_log(
    parts: PartsDependency,
    _identity: Viewer,
    job_id: JobIdPath,
    offset: Annotated[int, Query(ge=0, le=2**40, description="Skip this many bytes; X-Next-Offset tells the next")] = 0,
) -> Response:
    """Read what Ansible printed, also while it runs."""
    log = parts.jobs.log(str(job_id), offset)
    return Response(log, media_type="text/plain", headers={"X-Next-Offset": str(offset + len(log))})
