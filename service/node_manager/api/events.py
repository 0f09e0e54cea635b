# SPDX-License-Identifier: GPL-3.0-or-later
"""GET /events: what happens, as server-sent events.

The framework's own way (an endpoint that yields) reads ahead of the client, can't bound the time of a send and has one keepalive
for all; so the stream is written here, with the framework's format.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.security.utils import get_authorization_scheme_param
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from node_manager.access import Tokens
from node_manager.api.errors import responses
from node_manager.api.parameters import PartsDependency
from node_manager.api.security import Viewer
from node_manager.event_history import EventFilter
from node_manager.event_hub import EventHub, Reader
from node_manager.event_stream import EventStream, Terms
from node_manager.events import EventType
from node_manager.http_server import ABORT
from node_manager.problems import InvalidInputError

# A client that takes nothing for so long is cut off.
SEND_SECONDS = 30.0
# The last words are not worth waiting for.
_LAST_SEND_SECONDS = 1.0
_MAX_FILTERS = 100
_MAX_ID_DIGITS = 18
_TOPICS = sorted({event.topic for event in EventType})
_TOPIC_PATTERN = f"^({'|'.join(re.escape(topic) for topic in _TOPICS)})$"

router = APIRouter(tags=["events"])


class EventStreamResponse(Response):
    """A response that goes on until the stream ends, the client leaves or takes nothing any more."""

    media_type = "text/event-stream"

    def __init__(self, hub: EventHub, reader: Reader, stream: EventStream) -> None:
        # Closed at the end: the connection has nothing else to say. No proxy is to hold back what it gets.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Connection": "close"})
        del self.headers["content-length"]
        self._hub = hub
        self._reader = reader
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await self._send_until(gone, send)
        except TimeoutError:
            if not gone.done() and (abort := scope.get("extensions", {}).get(ABORT)) is not None:
                abort()
                await asyncio.wait([gone], timeout=_LAST_SEND_SECONDS)
        finally:
            gone.cancel()
            self._hub.leave(self._reader)

    async def _send_until(self, gone: asyncio.Future[None], send: Send) -> None:
        """Send all of it. Errors: TimeoutError if the client left or takes nothing."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(SEND_SECONDS) as limit, aclosing(self._stream.chunks()) as chunks:

            def hurry(seconds: float) -> None:
                if not limit.expired():
                    limit.reschedule(loop.time() + seconds)

            def leave(_gone: asyncio.Future[None]) -> None:
                hurry(0)

            gone.add_done_callback(leave)
            self._reader.on_close = lambda: hurry(_LAST_SEND_SECONDS)
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for chunk in chunks:
                    hurry(_LAST_SEND_SECONDS if self._hub.closing else SEND_SECONDS)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    if not (self._hub.closing or gone.done()):
                        limit.reschedule(None)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                gone.remove_done_callback(leave)
                self._reader.on_close = None


@router.get(
    "/events",
    response_class=Response,
    responses={
        200: {
            "description": "The events, each a CloudEvent in `data`, its type in `event`, where to go on in `id`",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **responses(422),
    },
)
async def follow_events(
    request: Request,
    parts: PartsDependency,
    _identity: Viewer,
    event_type: Annotated[
        list[EventType] | None, Query(alias="type", max_length=_MAX_FILTERS, description="Only of these types")
    ] = None,
    topic: Annotated[
        list[Annotated[str, Field(pattern=_TOPIC_PATTERN)]] | None,
        Query(max_length=_MAX_FILTERS, description="Only of these topics"),
    ] = None,
    node_id: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=253)]] | None,
        Query(max_length=_MAX_FILTERS, description="Only of these nodes"),
    ] = None,
    after: Annotated[
        str | None, Query(description="Go on behind this id; 0: the oldest event there is; left out: from now on")
    ] = None,
    follow: Annotated[
        bool, Query(description="false: end once all is told that is there, by default from the oldest on")
    ] = True,
    last_event_id: Annotated[str | None, Header(description="As `after`, and before it")] = None,
) -> Response:
    """Follow what happens, as server-sent events; `Last-Event-ID` goes on where an earlier stream ended."""
    position = _read_id("Last-Event-ID", last_event_id)
    if position is None:
        position = _read_id("after", after)
    if position is None and not follow:
        position = 0
    wanted = EventFilter(
        frozenset(kind.value for kind in event_type or ()), frozenset(topic or ()), frozenset(node_id or ())
    )
    terms = Terms(position, follow, parts.settings.configuration.event_stream.keepalive_seconds, _allowance(request))
    reader = await parts.hub.join(wanted)
    try:
        lowest, newest = await parts.hub.kept()
    except BaseException:
        parts.hub.leave(reader)
        raise
    return EventStreamResponse(parts.hub, reader, EventStream(parts.hub, reader, terms, lowest, newest))


def _read_id(field: str, text: str | None) -> int | None:
    if text is None or text == "":
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_ID_DIGITS):
        raise InvalidInputError(field, f"expected the id of an earlier event, got {text[:40]!r}")
    return int(text)


def _allowance(request: Request) -> Callable[[], Awaitable[bool]]:
    """Give a way to ask whether the bearer of a request is still let in."""
    # As the door reads it.
    _, text = get_authorization_scheme_param(request.headers.get("authorization"))
    parts = request.app.state.parts
    tokens: Tokens = parts.tokens
    enabled: bool = parts.settings.configuration.auth.enabled

    async def is_allowed() -> bool:
        if not enabled or tokens.cached(text) is not None:
            return True
        return await run_in_threadpool(tokens.authenticate, text) is not None

    return is_allowed


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
