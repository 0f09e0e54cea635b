# SPDX-License-Identifier: GPL-3.0-or-later
"""The stream of the manager's own machine: the same probe, in a process beside us instead of behind SSH."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from node_manager.domain import ContactReason
from node_manager.peers import Answer
from node_manager.ssh_targets import (
    NodeStream,
    StreamEnd,
    Target,
    end_of_probe,
    error_of,
    one_line,
)
from node_manager.stream_lines import FLOOD_SECONDS, ErrorTail, LineFeed

_CLOSE_SECONDS = 2.0
_MAX_UNREAD_BYTES = 64 * 1024
_PYTHON = re.compile(r"python3?(?:\.\d+)?$")
# No secrets of the service's own environment.
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


async def open_local(
    target: Target,
    command: str,
    stdin: Sequence[bytes],
    on_line: Callable[[bytes], None],
    on_end: Callable[[StreamEnd], None],
    max_line_bytes: int,
    flood_seconds: float = FLOOD_SECONDS,
) -> NodeStream:
    """Start the probe here; a command that begins with python runs under the interpreter that runs us.

    Errors: StreamError when no process can be started.
    """
    loop = asyncio.get_running_loop()
    stream = LocalStream(target, on_line, on_end, max_line_bytes, flood_seconds)
    try:
        transport, _ = await loop.subprocess_exec(
            lambda: stream, *_arguments(target, command), env=_ENVIRONMENT, cwd="/", start_new_session=True
        )
    except OSError as error:
        raise error_of(error, target) from error
    for chunk in stdin:
        cast("asyncio.WriteTransport", transport.get_pipe_transport(0)).write(chunk)
    loop.call_soon(stream.begin)
    return stream


class LocalStream(NodeStream, asyncio.SubprocessProtocol):
    """One process; it is also what asyncio calls when the process writes or ends."""

    def __init__(
        self,
        target: Target,
        on_line: Callable[[bytes], None],
        on_end: Callable[[StreamEnd], None],
        max_line_bytes: int,
        flood_seconds: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._target = target
        self._on_end = on_end
        self._feed = LineFeed(on_line, self._wait, self._fail, self._loop.time, max_line_bytes, flood_seconds)
        self._errors = ErrorTail()
        self._transport: asyncio.SubprocessTransport | None = None
        self._end: StreamEnd | None = None
        self._begun = False
        self._gone = asyncio.Event()

    def begin(self) -> None:
        """Hand on lines, and the end, from now on."""
        self._feed.flow()
        self._begun = True
        if self._end is not None:
            self._on_end(self._end)

    def send(self, command: Mapping[str, object]) -> None:
        """Write one JSON line to the probe; never waits, and ends the stream of a probe that doesn't read."""
        if self._end is not None or self._transport is None:
            return
        pipe = cast("asyncio.WriteTransport | None", self._transport.get_pipe_transport(0))
        if pipe is None or pipe.is_closing():
            return
        if pipe.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            self._fail(ContactReason.MODULE_FAILED, "the probe doesn't read its commands")
            return
        pipe.write(json.dumps(command, separators=(",", ":")).encode() + b"\n")

    async def ask_peer(self, addresses: Sequence[str], port: int, timeout_seconds: float) -> Answer:  # noqa: ARG002
        """Say nothing: the manager's own machine sees what the manager sees, and is nobody's witness."""
        return Answer.CANNOT_TELL

    async def close(self) -> None:
        """End the stream within two seconds; does nothing to an ended one."""
        self._finish(StreamEnd(ContactReason.OK, "closed"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._gone.wait()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the process."""
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """Take what the probe wrote."""
        if fd == 1:
            self._feed.feed(data)
        else:
            self._errors.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Say how the process ended; both pipes are read to their end."""
        self._gone.set()
        if self._transport is not None:
            self._transport.close()
        code = self._transport.get_returncode() if self._transport is not None else None
        name = signal.Signals(-code).name.removeprefix("SIG") if code is not None and code < 0 else ""
        self._finish(end_of_probe(self._target, code, name, self._errors.last_line()))

    def _wait(self, seconds: float) -> None:
        self._reading(go_on=False)
        self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._reading(go_on=True)
        self._feed.flow()

    def _reading(self, *, go_on: bool) -> None:
        pipe = self._transport.get_pipe_transport(1) if self._transport is not None else None
        if pipe is None or pipe.is_closing():
            return
        reader = cast("asyncio.ReadTransport", pipe)
        if go_on:
            reader.resume_reading()
        else:
            reader.pause_reading()

    def _fail(self, reason: ContactReason, words: str) -> None:
        self._finish(StreamEnd(reason, one_line(f"{self._target}: {words}")))

    def _finish(self, end: StreamEnd) -> None:
        if self._end is not None:
            return
        self._end = end
        self._feed.close()
        if self._transport is not None and not self._gone.is_set():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # The group: sudo and a shell may stand between us and the probe.
                os.killpg(self._transport.get_pid(), signal.SIGKILL)
            self._transport.close()
        if self._begun:
            self._loop.call_soon(self._on_end, end)


def _arguments(target: Target, command: str) -> list[str]:
    words = shlex.split(command)
    if words and _PYTHON.match(words[0]):
        words[0] = sys.executable
        command = shlex.join(words)
    is_root = os.geteuid() == 0
    return ["/bin/sh", "-c", f"sudo -n {command}" if target.become and not is_root else command]
