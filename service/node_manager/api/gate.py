# SPDX-License-Identifier: GPL-3.0-or-later
"""What every request passes before any endpoint: its id, the body limit, and the audit of writes.

Plain ASGI: a middleware class of the framework would put each request into a task of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node_manager.access import AuditEntry, AuditLog, Identity
from node_manager.api.errors import problem_response
from node_manager.coalescer import CoalescerFullError
from node_manager.node_registry import Clock
from node_manager.store import StoreUnavailableError

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Asked every few seconds, by those who look whether the manager lives.
_UNLOGGED = frozenset({"/healthz", "/readyz", "/metrics"})
_ROUTINE = frozenset({"/observations"})
_MAX_PATH = 200
_log = structlog.get_logger()


class Gate:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, audit: AuditLog, max_body_bytes: int, clock: Clock) -> None:
        self._app = app
        self._audit_log = audit
        self._max_body_bytes = max_body_bytes
        self._clock = clock
        self._run = uuid.uuid4().hex[:12]
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"{self._run}-{next(self._numbers)}"

        began = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
                if scope["method"] not in _READING:
                    # Before the caller hears of it, so that no answered write is missing from the audit.
                    await self._audit(scope, message["status"], request_id)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            length = headers.get("content-length", "")
            try:
                if length.isdecimal() and int(length) > self._max_body_bytes:
                    response = problem_response(413, "body_too_large", self._too_large())
                    await response(scope, receive, send_with_id)
                else:
                    await self._app(scope, self._limited(receive), send_with_id)
            finally:
                self._log_request(scope, status, time.monotonic() - began)

    def _log_request(self, scope: Scope, status: int, seconds: float) -> None:
        method, path = scope["method"], scope["path"]
        if status < 400:
            if path in _UNLOGGED:
                return
            # What only reads, and what agents send all the time, would hide what changes something.
            tell = _log.debug if method in _READING or path in _ROUTINE else _log.info
        else:
            tell = _log.error if status >= 500 else _log.warning if status in {401, 403} else _log.info
        identity: Identity | None = scope.get("identity")
        client = scope.get("client")
        tell(
            "request",
            method=method,
            path=path[:_MAX_PATH],
            status=status,
            duration_seconds=round(seconds, 4),
            actor=identity.name if identity is not None else None,
            client=client[0] if client else None,
        )

    def _limited(self, receive: Receive) -> Receive:
        left = self._max_body_bytes

        async def receive_limited() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise HTTPException(413, self._too_large())
            return message

        return receive_limited

    def _too_large(self) -> str:
        return f"the body is larger than server.max_body_bytes ({self._max_body_bytes}); send it in parts"

    async def _audit(self, scope: Scope, status: int, request_id: str) -> None:
        identity: Identity | None = scope.get("identity")
        if identity is None:
            # Nobody that we know: that stands in the log, so that strangers can't fill the audit.
            return
        action = f"{scope['method']} {scope['path']}"
        entry = AuditEntry(self._clock(), identity.name, identity.role, action, status, request_id)
        try:
            await asyncio.wrap_future(self._audit_log.append(entry))
        except (StoreUnavailableError, CoalescerFullError) as error:
            _log.error("audit entry not stored", reason=str(error), entry=str(entry))
