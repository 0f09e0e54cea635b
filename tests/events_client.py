# SPDX-License-Identifier: GPL-3.0-or-later
"""A reader of GET /events as its documentation has it: a socket, the text of server-sent events, and the id to go on from."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

from running_service import RunningService

WAIT_SECONDS = 30


@dataclass
class Message:
    """What stands between two empty lines."""

    event: str = "message"
    data: str = ""
    last_id: str | None = None
    comments: list[str] = field(default_factory=list)

    @property
    def json(self) -> Any:
        """Read the data."""
        return json.loads(self.data)


class EventReader:
    """One connection to GET /events; a plain socket, so that a test can leave what came unread."""

    def __init__(
        self,
        service: RunningService,
        query: dict[str, Any] | None = None,
        *,
        last_event_id: str | None = None,
        token: str | None = None,
        receive_buffer: int | None = None,
    ) -> None:
        """Connect and read the head of the answer."""
        self.last_id = last_event_id
        self._left = b""
        self._socket = socket.socket()
        self._socket.settimeout(WAIT_SECONDS)
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.connect(("127.0.0.1", service.port))
        path = "/events" + (f"?{urlencode(query, doseq=True)}" if query else "")
        head = [f"GET {path} HTTP/1.1", "Host: test", f"Authorization: Bearer {token or service.token}"]
        if last_event_id is not None:
            head.append(f"Last-Event-ID: {last_event_id}")
        self._socket.sendall("\r\n".join([*head, "", ""]).encode())
        status, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        self.status = int(status.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._text = b""

    def __enter__(self) -> EventReader:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def messages(self) -> Iterator[Message]:
        """Read message by message, until the service ends the stream."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            assert time.monotonic() < deadline, "nothing but keepalives came"
            block, found, rest = self._text.partition(b"\n\n")
            if found:
                self._text = rest
                message = self._parse(block.decode())
                yield message
                deadline = time.monotonic() + WAIT_SECONDS if message.data else deadline
            elif not (more := self._chunk()):
                return
            else:
                self._text += more

    def events(self) -> Iterator[Message]:
        """Read those messages that carry data."""
        return (message for message in self.messages() if message.data)

    def take(self, count: int) -> list[Any]:
        """Read so many CloudEvents."""
        found = self.events()
        return [next(found).json for _ in range(count)]

    def until(self, is_last: Callable[[Message], bool]) -> list[Message]:
        """Read messages up to the one that was waited for."""
        found = []
        for message in self.messages():
            found.append(message)
            if is_last(message):
                return found
        raise AssertionError(f"the stream ended after {found[-3:]}")

    def rest(self) -> list[Message]:
        """Read all that there is before the stream ends."""
        return list(self.messages())

    def body(self) -> str:
        """Read an answer that is no stream."""
        length = int(self.headers["content-length"])
        while len(self._left) < length:
            self._left += self._receive()
        return self._left[:length].decode()

    def _parse(self, block: str) -> Message:
        message = Message()
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "":
                message.comments.append(value)
            elif name == "event":
                message.event = value
            elif name == "data":
                message.data += value
            elif name == "id":
                message.last_id = self.last_id = value
        return message

    def _chunk(self) -> bytes:
        size = int(self._until(b"\r\n") or b"0", 16)
        while len(self._left) < size + 2:
            self._left += self._receive()
        chunk, self._left = self._left[:size], self._left[size + 2 :]
        return chunk

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._left:
            more = self._receive()
            if not more:
                return b""
            self._left += more
        found, _, self._left = self._left.partition(mark)
        return found

    def _receive(self) -> bytes:
        return self._socket.recv(65536)
