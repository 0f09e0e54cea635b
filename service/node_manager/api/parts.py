# SPDX-License-Identifier: GPL-3.0-or-later
"""What endpoints share: the parts of the running service, cursors, entity tags, waiting for a job."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Query, Request, Response

from node_manager.access import Tokens
from node_manager.api.errors import problem_response
from node_manager.declarations import NODE_ID_PATTERN
from node_manager.jobs import Job, JobQueue
from node_manager.node_registry import Clock, NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.problems import InvalidInputError, StaleGenerationError
from node_manager.settings import Settings
from node_manager.store import Store

MAX_PAGE = 1000


@dataclass(frozen=True)
class Parts:
    """The parts of the running service that endpoints call."""

    settings: Settings
    store: Store
    registry: NodeRegistry
    observations: ObservationLog
    jobs: JobQueue
    tokens: Tokens
    clock: Clock


async def _parts(request: Request) -> Parts:
    # async although it waits for nothing: the framework would send a plain function through the thread pool.
    parts: Parts = request.app.state.parts
    return parts


PartsDependency = Annotated[Parts, Depends(_parts)]
NodeIdPath = Annotated[
    str, Path(max_length=253, pattern=NODE_ID_PATTERN, description="The node's id", examples=["gw-7"])
]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Largest number of items")]
Cursor = Annotated[
    str | None, Query(max_length=512, description="next_cursor of the page before; left out: the first page")
]
IfMatch = Annotated[
    str | None, Header(description="The ETag that the change is based on; another one on the node answers 412")
]
Wait = Annotated[float, Query(ge=0, le=3600, description="Seconds to wait for the job's result; 0 answers at once")]
MaxAge = Annotated[
    float | None, Query(ge=0, le=86400, description="Look afresh where the newest is older than these seconds")
]


def write_cursor(value: str | int) -> str:
    """Wrap the last key of a page so that callers don't build on it."""
    return base64.urlsafe_b64encode(str(value).encode()).decode()


def read_cursor(cursor: str | None) -> str | None:
    """Unwrap a cursor.

    Errors: InvalidInputError if it is not one of ours.
    """
    if cursor is None:
        return None
    try:
        return base64.b64decode(cursor, altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        raise InvalidInputError("cursor", "expected the next_cursor of an earlier page") from None


def read_number_cursor(cursor: str | None) -> int | None:
    """Unwrap a cursor that holds a number."""
    text = read_cursor(cursor)
    if text is None:
        return None
    if not text.isdigit() or len(text) > 18:
        raise InvalidInputError("cursor", "expected the next_cursor of an earlier page")
    return int(text)


def etag(generation: int) -> str:
    """Write a generation as an entity tag."""
    return f'"{generation}"'


def read_if_match(value: str | None) -> int | None:
    """Read the generation that a change is based on; None for any.

    Errors: StaleGenerationError if it is no entity tag of ours: nothing can match it.
    """
    if value is None or value.strip() == "*":
        return None
    text = value.strip().removeprefix('"').removesuffix('"')
    if not text.isdigit() or len(text) > 18:
        raise StaleGenerationError(f'If-Match: expected the node\'s ETag, such as "3", got {value[:40]!r}')
    return int(text)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with plain data that the domain has already brought into shape."""
    return Response(json.dumps(body), status, headers, "application/json")


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
