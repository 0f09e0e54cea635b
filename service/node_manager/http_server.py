# SPDX-License-Identifier: GPL-3.0-or-later
"""uvicorn with two things more: streams hear of the end before it waits for them, and a connection can be cut off."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol
else:
    _Protocol = AutoHTTPProtocol

# ASGI's place for what a server can do beyond the specification.
ABORT = "node_manager.abort"


class CuttableProtocol(_Protocol):
    """Lets an application end its connection at once, with what was written to it and not taken.

    To return doesn't do: the server closes a connection only once all is sent, which never happens if nobody reads.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn itself has it
        """Begin with a connection."""
        super().connection_made(transport)
        app = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            scope.setdefault("extensions", {})[ABORT] = transport.abort
            await app(scope, receive, send)

        self.app = with_abort


class Server(uvicorn.Server):
    """A server whose end is told to the application before open responses are waited for."""

    def __init__(self, config: uvicorn.Config, on_shutdown: Callable[[], Any]) -> None:
        super().__init__(config)
        self._on_shutdown = on_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End; streams first, which would not end by themselves."""
        self._on_shutdown()
        await super().shutdown(sockets)
