# SPDX-License-Identifier: GPL-3.0-or-later
"""The transport of the SSH stream: one connection per node, a probe fed on standard input, one JSON line per sample back.

Knows nothing of the store and decides nothing about health: it says what happened, in the words of ContactReason.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import cast

import asyncssh

from node_manager.domain import ContactReason
from node_manager.local_stream import open_local
from node_manager.peer_view import ask
from node_manager.peers import Answer
from node_manager.ssh_targets import (
    NodeStream,
    StreamEnd,
    StreamError,
    Target,
    as_user_of,
    end_of,
    end_of_probe,
    error_behind,
    error_of,
    one_line,
)
from node_manager.ssh_wire import WINDOW_BYTES, Login, Logins, open_way
from node_manager.stream_lines import FLOOD_SECONDS, ErrorTail, LineFeed

__all__ = ["NodeStream", "StreamEnd", "StreamError", "StreamOpener", "Target"]

_CLOSE_SECONDS = 2.0
_MAX_UNREAD_BYTES = 64 * 1024
_GREETING_MAX_BYTES = 8192


class StreamOpener:
    """Opens the streams of all nodes: bounds the handshakes at once, and keeps one connection to each jump host."""

    def __init__(
        self,
        *,
        max_handshakes: int,
        handshake_timeout_seconds: float,
        max_line_bytes: int,
        flood_seconds: float = FLOOD_SECONDS,
    ) -> None:
        self._slots = asyncio.Semaphore(max_handshakes)
        self._timeout_seconds = handshake_timeout_seconds
        self._max_line_bytes = max_line_bytes
        self._flood_seconds = flood_seconds
        self._logins = Logins(flood_seconds)
        self._jumps: dict[Target, _Jump] = {}
        # A dozen lines for every connection, some of them in a node's own words.
        logging.getLogger("asyncssh").setLevel(logging.WARNING)

    async def open(
        self,
        target: Target,
        command: str,
        stdin: Sequence[bytes],
        on_line: Callable[[bytes], None],
        on_end: Callable[[StreamEnd], None],
    ) -> NodeStream:
        """Run *command* on the node, as root where the target says so, and feed it *stdin*.

        Shapes: *on_line* is called in the event loop for each whole line, without its newline, once the stream was given back;
        *on_end* exactly once after that.
        Errors: StreamError; nothing is left behind, also when cancelled.
        """
        if target.local:
            return await open_local(target, command, stdin, on_line, on_end, self._max_line_bytes, self._flood_seconds)
        with contextlib.ExitStack() as stack:
            # First the jump host, then a place among the handshakes: a dead jump host must not keep them all busy.
            through = await self._acquire(target, stack)
            async with self._slots, _limited(target, self._timeout_seconds):
                login = await self._logins.log_in(target, through)
                stream = _SshStream(target, login, on_line, on_end, self._max_line_bytes, self._flood_seconds)
                await stream.start(as_user_of(target, command), stdin)
            stream.keep(stack.pop_all())
        asyncio.get_running_loop().call_soon(stream.begin)
        return stream

    async def knock(self, target: Target, timeout_seconds: float) -> tuple[ContactReason, str]:
        """Look whether the SSH port answers, on a fresh connection; through its jump host on the connection that is there."""
        if target.local:
            return ContactReason.OK, ""
        try:
            with contextlib.ExitStack() as stack:
                async with _limited(target, timeout_seconds):
                    await self._greet(target, await self._acquire(target, stack))
        except StreamError as error:
            return error.reason, error.message
        return ContactReason.OK, ""

    async def close(self) -> None:
        """Give up what streams don't hold; close those first."""
        for jump in list(self._jumps.values()):
            jump.drop()
        self._jumps.clear()
        self._logins.close()

    async def _greet(self, target: Target, through: asyncssh.SSHClientConnection | None) -> None:
        greeting = _Greeting()
        sock = None
        try:
            if through is not None:
                await open_way(through, target, lambda: greeting)
            else:
                sock = await self._logins.dial(target)
                await asyncio.get_running_loop().create_connection(lambda: greeting, sock=sock)
            await greeting.heard
        finally:
            greeting.drop()
            if sock is not None and greeting.transport is None:
                sock.close()

    # jump hosts

    async def _acquire(self, target: Target, stack: contextlib.ExitStack) -> asyncssh.SSHClientConnection | None:
        """Give the connection to the target's jump host, to be kept until *stack* is closed."""
        host = target.jump
        if host is None:
            return None
        jump = self._jumps.get(host)
        if jump is None:
            jump = self._jumps[host] = _Jump()
            jump.task = asyncio.create_task(self._log_in_to_jump(host, jump))
            jump.task.add_done_callback(_retrieve)
        jump.users += 1
        stack.callback(self._release, host, jump)
        assert jump.task is not None
        try:
            # Shared with all that wait for it: one that is cancelled must not take it from the others.
            return (await asyncio.shield(jump.task)).connection
        except StreamError as error:
            raise error_behind(error, host) from error

    async def _log_in_to_jump(self, host: Target, jump: _Jump) -> Login:
        try:
            with contextlib.ExitStack() as stack:
                through = await self._acquire(host, stack)
                async with self._slots, _limited(host, self._timeout_seconds):
                    login = await self._logins.log_in(host, through, lambda: self._forget(host, jump))
                jump.login = login
                jump.way = stack.pop_all()
                return login
        except BaseException:
            self._forget(host, jump)
            raise

    def _forget(self, host: Target, jump: _Jump) -> None:
        if self._jumps.get(host) is jump:
            del self._jumps[host]

    def _release(self, host: Target, jump: _Jump) -> None:
        jump.users -= 1
        if jump.users == 0:
            self._forget(host, jump)
            jump.drop()


class _Jump:
    """The connection to one jump host, and how many need it."""

    def __init__(self) -> None:
        self.users = 0
        self.task: asyncio.Task[Login] | None = None
        self.login: Login | None = None
        self.way: contextlib.ExitStack | None = None

    def drop(self) -> None:
        """Close the connection, or stop opening it."""
        if self.task is not None:
            self.task.cancel()
        if self.login is not None:
            self.login.connection.close()
        if self.way is not None:
            self.way.close()
            self.way = None


class _SshStream(NodeStream):
    """The stream of one node, over a connection of its own."""

    def __init__(
        self,
        target: Target,
        login: Login,
        on_line: Callable[[bytes], None],
        on_end: Callable[[StreamEnd], None],
        max_line_bytes: int,
        flood_seconds: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._target = target
        self._connection = login.connection
        self._wire = login.wire
        self.host_key = login.host_key
        self._on_end = on_end
        self._way: contextlib.ExitStack | None = None
        self._end: StreamEnd | None = None
        self._begun = False
        self._changed = asyncio.Event()
        feed = LineFeed(on_line, self._wait, self._fail, loop.time, max_line_bytes, flood_seconds)
        self._session = _ProbeSession(feed, self._changed.set, self._concluded)

    async def start(self, command: str, stdin: Sequence[bytes]) -> None:
        """Start the probe and write all of *stdin*."""
        try:
            await self._connection.create_session(
                lambda: self._session, command, encoding=None, window=WINDOW_BYTES, request_pty=False
            )
            session = self._session
            assert session.channel is not None
            session.channel.set_write_buffer_limits(0)
            for chunk in stdin:
                session.channel.write(chunk)
            while session.channel.get_write_buffer_size() and self._end is None:
                self._changed.clear()
                await self._changed.wait()
        except BaseException as error:
            self._finish(StreamEnd(ContactReason.OK, ""))
            if self._wire.fault is not None and isinstance(error, Exception):
                raise StreamError(self._wire.fault[0], f"{self._target}: {self._wire.fault[1]}") from error
            raise
        if self._end is not None:
            raise StreamError(*self._end)

    def keep(self, way: contextlib.ExitStack) -> None:
        """Hold the jump host's connection until the end."""
        self._way = way

    def begin(self) -> None:
        """Hand on lines, and the end, from now on."""
        self._session.feed.flow()
        self._begun = True
        if self._end is not None:
            self._on_end(self._end)

    def send(self, command: Mapping[str, object]) -> None:
        """Write one JSON line to the probe; never waits, and ends the stream of a probe that doesn't read."""
        channel = self._session.channel
        if self._end is not None or channel is None or channel.is_closing():
            return
        if channel.get_write_buffer_size() + self._wire.unsent_bytes() > _MAX_UNREAD_BYTES:
            self._fail(ContactReason.MODULE_FAILED, "the probe doesn't read its commands")
            return
        channel.write(json.dumps(command, separators=(",", ":")).encode() + b"\n")

    async def ask_peer(self, addresses: Sequence[str], port: int, timeout_seconds: float) -> Answer:
        """Ask this node whether one of *addresses* answers by TCP; never raises for what the node does."""
        if self._end is not None:
            return Answer.CANNOT_TELL
        return await ask(self._connection, addresses, port, timeout_seconds)

    async def close(self) -> None:
        """End the stream within two seconds; does nothing to an ended one."""
        self._finish(StreamEnd(ContactReason.OK, "closed"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._connection.wait_closed()

    def _wait(self, seconds: float) -> None:
        self._wire.wait(seconds, self._session.feed.flow)

    def _fail(self, reason: ContactReason, words: str) -> None:
        self._finish(StreamEnd(reason, one_line(f"{self._target}: {words}")))

    def _concluded(self, error: Exception | None) -> None:
        """Say why the channel was closed, by the node or with the connection."""
        session = self._session
        fault = self._wire.fault
        if fault is not None:
            self._fail(*fault)
        elif session.exit_code is not None or session.exit_signal:
            last_line = session.errors.last_line()
            self._finish(end_of_probe(self._target, session.exit_code, session.exit_signal, last_line))
        elif error is not None:
            self._finish(end_of(error, self._target))
        elif self._connection.is_closed():
            self._fail(ContactReason.CONNECTION_LOST, "the node closed the connection")
        else:
            self._finish(end_of_probe(self._target, None, "", session.errors.last_line()))

    def _finish(self, end: StreamEnd) -> None:
        if self._end is not None:
            return
        self._end = end
        self._session.feed.close()
        self._connection.close()
        self._changed.set()
        if self._way is not None:
            self._way.close()
            self._way = None
        if self._begun:
            # Not from inside on_line, or send().
            asyncio.get_running_loop().call_soon(self._on_end, end)


class _ProbeSession(asyncssh.SSHClientSession[bytes]):
    """What asyncssh calls for the probe's channel."""

    _EXIT_CODE_SECONDS = 2.0

    def __init__(
        self, feed: LineFeed, on_writable: Callable[[], None], on_closed: Callable[[Exception | None], None]
    ) -> None:
        self.feed = feed
        self.errors = ErrorTail()
        self.exit_code: int | None = None
        self.exit_signal = ""
        self.channel: asyncssh.SSHClientChannel[bytes] | None = None
        self._on_writable = on_writable
        self._on_closed = on_closed

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        self.channel = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype is None:
            self.feed.feed(data)
        else:
            self.errors.feed(data)

    def resume_writing(self) -> None:
        self._on_writable()

    def exit_status_received(self, status: int) -> None:
        self.exit_code = status

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:  # noqa: ARG002
        self.exit_signal = signal

    def eof_received(self) -> bool:
        # A probe that closed its output is of no use, whether or not it goes on living.
        if self.channel is not None:
            asyncio.get_running_loop().call_later(self._EXIT_CODE_SECONDS, self.channel.abort)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        # asyncssh tells the channels first and only then closes the connection: look at it when it is through.
        asyncio.get_running_loop().call_soon(self._on_closed, exc)


class _Greeting(asyncio.Protocol):
    """Hears the first words of an SSH server, and says nothing."""

    def __init__(self) -> None:
        self.heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self._said = b""
        self._dropped = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._dropped:
            self.drop()

    def data_received(self, data: bytes, datatype: int | None = None) -> None:  # noqa: ARG002
        self._said += data[:_GREETING_MAX_BYTES]
        *lines, rest = self._said.split(b"\n")
        if self.heard.done():
            return
        # RFC 4253, 4.2: a server may say something else first.
        if any(line.startswith(b"SSH-") for line in lines) or rest.startswith(b"SSH-2.0-"):
            self.heard.set_result(None)
        elif len(self._said) >= _GREETING_MAX_BYTES:
            self._fail(ContactReason.OUTPUT_UNUSABLE, "what answers there is no SSH server")

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self._said:
            self._fail(ContactReason.OUTPUT_UNUSABLE, "what answers there is no SSH server")
        else:
            self._fail(ContactReason.CONNECTION_LOST, "closed the connection without a word")

    def session_started(self) -> None:
        """Do nothing: a jump host's channel calls it."""

    def drop(self) -> None:
        """Close the connection, also one that is made later."""
        self._dropped = True
        self.heard.cancel()
        if self.transport is not None:
            self.transport.abort()

    def _fail(self, reason: ContactReason, words: str) -> None:
        if not self.heard.done():
            self.heard.set_exception(StreamError(reason, words))


@asynccontextmanager
async def _limited(target: Target, seconds: float) -> AsyncIterator[None]:
    """Limit the time, and turn every error into a StreamError."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except Exception as error:
        raise error_of(error, target) from error


def _retrieve(task: asyncio.Task[Login]) -> None:
    # When all who waited have gone, nobody else asks for the error.
    if not task.cancelled():
        task.exception()
