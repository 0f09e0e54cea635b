# SPDX-License-Identifier: GPL-3.0-or-later
"""What endpoints answer with: plain data as JSON, cursors, entity tags, jobs to follow or to wait for."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from fastapi import Response

from node_manager.api.errors import problem_response
from node_manager.jobs import Job
from node_manager.parts import Parts
from node_manager.store.documents import write_json


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with plain data that the domain has already brought into shape."""
    return Response(write_json(body), status, headers, "application/json")


def write_cursor(value: str | int) -> str:
    """Wrap the last key of a page so that callers don't build on it."""
    return base64.urlsafe_b64encode(str(value).encode()).decode()


def etag(generation: int) -> str:
    """Write a generation as an entity tag."""
    return f'"{generation}"'


def job_headers(job_id: str) -> dict[str, str]:
    """Point at a job in the way of RFC 8288 and RFC 5989."""
    return {"Link": f'</jobs/{job_id}>; rel="monitor"'}


async def wait_for(parts: Parts, job: Job, seconds: float) -> bool:
    """Wait for a job's end without holding a thread; False if it is still on its way."""
    bounded = min(seconds, parts.settings.server.max_wait_seconds)
    future = asyncio.wrap_future(parts.jobs.future(job.job_id))
    try:
        await asyncio.wait_for(asyncio.shield(future), bounded)
    except TimeoutError:
        # The job goes on; nobody else looks at this future any more.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return False
    return True


def not_looked_at(node_id: str, what: str) -> Response:
    """Answer for a node of which nothing has been seen yet."""
    return problem_response(
        404,
        "not_observed",
        f"node {node_id!r} has no {what} yet; POST /nodes/{node_id}/health/check?wait=30 looks at it now",
        node_id=node_id,
    )
