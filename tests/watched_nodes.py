# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes to be watched: SSH servers on loopback whose probe is the real one, or says what a test has it say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncssh
import ssh_servers
from builders import make_settings
from node_manager.declarations import NodeDeclaration
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.probe_bundle import bootstrap_command
from node_manager.recorder import Recorder
from node_manager.settings import Settings
from node_manager.store import Store
from stored import Rows

DEADLINE_SECONDS = 12.0
BEAT = b'{"kind":"beat"}'
# A node of a test that is not about silence may be as silent as it likes.
PATIENT = {"beat_interval_seconds": 3600.0}


class WatchedNode:
    """A node on one port and with one key until a test changes either; *real* ones run the probe that they are sent."""

    def __init__(
        self, node_id: str = "gw-1", *, real: bool = False, address: str = "127.0.0.1", **options: Any
    ) -> None:
        self.node_id = node_id
        self.address = address
        self.port = 0
        self.key = asyncssh.generate_private_key("ssh-ed25519")
        self.connections: list[asyncssh.SSHServerConnection] = []
        self.open_connections = 0
        self.logins = 0
        # What each probe was told at its start, and all commands that came.
        self.options: list[dict[str, Any]] = []
        self.commands: list[dict[str, Any]] = []
        # What a probe says at once, and what to a command.
        self.first_words: list[bytes] = [BEAT]
        self.answer: Callable[[dict[str, Any]], list[bytes]] = lambda _command: []
        self.beat_seconds: float | None = None
        self._real = real
        self._options = options
        self._listener: asyncssh.SSHAcceptor | None = None
        self._silent: socket.socket | None = None
        self._probes: list[asyncssh.SSHServerProcess[bytes]] = []

    @property
    def host_key(self) -> str:
        """Give its public key."""
        return " ".join(self.key.export_public_key().decode().split()[:2])

    @asynccontextmanager
    async def served(self) -> AsyncIterator[WatchedNode]:
        """Serve it."""
        await self.start()
        try:
            yield self
        finally:
            await self.stop()

    async def start(self) -> None:
        """Begin to serve, on the port that it had."""
        self._end_silence()
        self._listener = await asyncssh.listen(
            self.address,
            self.port,
            server_host_keys=[self.key],
            server_factory=lambda: _Server(self),
            process_factory=self._run,
            encoding=None,
            reuse_address=True,
            **self._options,
        )
        self.port = self._listener.get_port()

    async def stop(self) -> None:
        """Be gone: its port refuses."""
        self._end_silence()
        for connection in self.connections:
            connection.abort()
        self.connections.clear()
        if self._listener is not None:
            self._listener.close()
            await self._listener.wait_closed()
            self._listener = None

    async def freeze(self) -> None:
        """Hang: the kernel takes connections, and nothing else comes."""
        await self.stop()
        self._silent = socket.create_server((self.address, self.port))

    async def say(self, *lines: bytes) -> None:
        """Have its probe say something, once it runs."""
        await until(lambda: self._probes, "a probe")
        _write(self._probes[-1], lines)

    def drop(self) -> None:
        """Break all its connections."""
        for connection in self.connections:
            connection.abort()

    def _end_silence(self) -> None:
        if self._silent is not None:
            self._silent.close()
            self._silent = None

    async def _run(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        command = process.command or ""
        with contextlib.suppress(OSError, asyncssh.Error, asyncio.IncompleteReadError):
            if command != bootstrap_command() or self._real:
                await ssh_servers._shell(process, command)
            else:
                await self._probe(process)

    async def _probe(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        size = int(await process.stdin.readline())
        unpacker = zlib.decompressobj()
        unpacker.decompress(await process.stdin.readexactly(size))
        self.options.append(json.loads(unpacker.unused_data))
        self._probes.append(process)
        _write(process, self.first_words)
        beating = asyncio.create_task(self._beat(process))
        try:
            async for line in process.stdin:
                self.commands.append(json.loads(line))
                _write(process, self.answer(self.commands[-1]))
        finally:
            beating.cancel()

    async def _beat(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        with contextlib.suppress(OSError, asyncssh.Error):
            while self.beat_seconds is not None:
                process.stdout.write(BEAT + b"\n")
                await asyncio.sleep(self.beat_seconds)


class _Server(asyncssh.SSHServer):
    def __init__(self, node: WatchedNode) -> None:
        self._node = node

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._node.connections.append(conn)
        self._node.open_connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._node.open_connections -= 1

    def begin_auth(self, username: str) -> bool:
        return "authorized_client_keys" in self._node._options

    def auth_completed(self) -> None:
        self._node.logins += 1

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> bool:
        raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "open failed")


def _write(process: asyncssh.SSHServerProcess[bytes], lines: Iterable[bytes]) -> None:
    for line in lines:
        process.stdout.write(line + b"\n")


def data_line(kind: str, data: object, command: dict[str, Any] | None = None) -> bytes:
    """Write what was seen as the probe does."""
    asked = {} if command is None else {"id": command["id"]}
    return json.dumps({"kind": kind, **asked, "data": data}, separators=(",", ":")).encode()


def watch_settings(
    key_file: Path,
    monitoring: dict[str, Any] | None = None,
    health: dict[str, Any] | None = None,
    **more_types: dict[str, Any],
) -> Settings:
    """Give settings that can log in to watched nodes; they are patient unless told otherwise."""
    return make_settings(
        {
            "ssh": {"credentials": {"test": {"private_key_file": str(key_file)}}, "default_credential": "test"},
            "monitoring": {**PATIENT, "reconnect_max_seconds": 0.3, **(monitoring or {})},
            "health": {"grace_seconds": 0.05, **(health or {})},
        },
        **more_types,
    )


@contextmanager
def recording(store: Store, settings: Settings) -> Iterator[Recorder]:
    """Run a recorder that is quick."""
    recorder = Recorder(ObservationLog(store, settings), pause_seconds=0.02)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.stop()


def declaration_of(node: WatchedNode, **changes: Any) -> dict[str, Any]:
    """Declare a served node."""
    connection = {"port": node.port, **changes.pop("connection", {})}
    return {"node_id": node.node_id, "address": node.address, "connection": connection, **changes}


def register(store: Store, settings: Settings, node: WatchedNode, **changes: Any) -> None:
    """Register a served node."""
    NodeRegistry(store, settings).register(NodeDeclaration.model_validate(declaration_of(node, **changes)))


def row_of(store: Store, table: Any, node_id: str = "gw-1") -> dict[str, Any] | None:
    """Read the row of one node."""
    return next((row for row in Rows(store).of(table) if row["node_id"] == node_id), None)


async def until(condition: Callable[[], object], what: str = "it") -> None:
    """Wait for a condition in the event loop, with a deadline."""
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise TimeoutError(f"{what} did not come to be in {DEADLINE_SECONDS:g} s") from None
