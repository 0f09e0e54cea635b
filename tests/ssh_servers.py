# SPDX-License-Identifier: GPL-3.0-or-later
"""SSH servers of all manners, friendly and hostile, on loopback: what a watched node may turn out to be.

Run as a program, it serves one friendly node per port for measurements from another process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Node:
    """A served node, and what was seen of its callers."""

    address: str
    port: int
    host_keys: tuple[str, ...] = ()
    handshakes: int = 0
    most_handshakes: int = 0
    logins: int = 0
    open_connections: int = 0
    connections: list[asyncssh.SSHServerConnection] = field(default_factory=list)
    ciphers: set[str] = field(default_factory=set)


class _Server(asyncssh.SSHServer):
    def __init__(self, node: Node, *, needs_key: bool, banner: str, forwards: bool) -> None:
        self._node = node
        self._needs_key = needs_key
        self._banner = banner
        self._forwards = forwards
        self._in_handshake = False

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        node = self._node
        node.connections.append(conn)
        node.open_connections += 1
        node.handshakes += 1
        node.most_handshakes = max(node.most_handshakes, node.handshakes)
        self._in_handshake = True

    def connection_lost(self, exc: Exception | None) -> None:
        self._node.open_connections -= 1
        self._over()

    def begin_auth(self, username: str) -> bool:
        for _ in range(len(self._banner) // 30000):
            self._connection.send_auth_banner(self._banner[:30000])
        return self._needs_key

    def auth_completed(self) -> None:
        self._node.logins += 1
        self._node.ciphers.add(self._connection.get_extra_info("recv_cipher"))
        self._over()

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> bool:
        if not self._forwards:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "open failed")
        return True

    def _over(self) -> None:
        if self._in_handshake:
            self._in_handshake = False
            self._node.handshakes -= 1


@asynccontextmanager
async def ssh_node(
    address: str = "127.0.0.1",
    *,
    kinds: tuple[str, ...] = ("ssh-ed25519",),
    authorized_key: Path | None = None,
    banner: str = "",
    forwards: bool = True,
    **options: Any,
) -> AsyncIterator[Node]:
    """Serve a node that understands a few commands; see _run."""
    keys = [asyncssh.generate_private_key(kind) for kind in kinds]
    publics = tuple(" ".join(key.export_public_key().decode().split()[:2]) for key in keys)
    node = Node(address, 0, publics)
    needs_key = authorized_key is not None
    listener = await asyncssh.listen(
        address,
        0,
        server_host_keys=keys,
        server_factory=lambda: _Server(node, needs_key=needs_key, banner=banner, forwards=forwards),
        authorized_client_keys=None if authorized_key is None else str(authorized_key),
        process_factory=_run,
        encoding=None,
        **options,
    )
    node.port = listener.get_port()
    try:
        yield node
    finally:
        for connection in node.connections:
            connection.abort()
        listener.close()
        await listener.wait_closed()


async def _run(process: asyncssh.SSHServerProcess[bytes]) -> None:
    with contextlib.suppress(OSError, asyncssh.Error):
        word, _, rest = (process.command or "").partition(" ")
        action = _ACTIONS.get(word)
        if action is None:
            await _shell(process, process.command or "")
        else:
            await action(process, rest)


async def _echo(process: asyncssh.SSHServerProcess[bytes], rest: str) -> None:
    async for line in process.stdin:
        process.stdout.write(line)
    process.exit(0)


async def _lines(process: asyncssh.SSHServerProcess[bytes], rest: str) -> None:
    """Write some lines, then drop the connection, or end with a code."""
    count, _, then = rest.partition(" ")
    for number in range(int(count)):
        process.stdout.write(b'{"n":%d}\n' % number)
    await process.stdout.drain()
    if then == "drop":
        process.channel.get_connection().abort()
    elif then:
        process.stderr.write(b"first words\nlast words\x1b[31m\n")
        process.exit(int(then))
    else:
        await process.stdin.read()


async def _flood(process: asyncssh.SSHServerProcess[bytes], rest: str) -> None:
    stream, _, chunk = rest.partition(" ")
    writer = process.stderr if stream == "stderr" else process.stdout
    data = {"lines": b"{}\n" * 1000, "giant": b"x" * 30000, "bytes": b"x" * 30000}[chunk]
    while not process.channel.is_closing():
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0)


async def _slow(process: asyncssh.SSHServerProcess[bytes], rest: str) -> None:
    for byte in b'{"slow":1}\n':
        process.stdout.write(bytes([byte]))
        await asyncio.sleep(0.01)
    await process.stdin.read()


async def _deaf(process: asyncssh.SSHServerProcess[bytes], rest: str) -> None:
    process.channel.pause_reading()
    await asyncio.Event().wait()


async def _shell(process: asyncssh.SSHServerProcess[bytes], command: str) -> None:
    child = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    feeding = asyncio.create_task(_pump(process.stdin, child.stdin))
    try:
        await asyncio.gather(_pump(child.stdout, process.stdout), _pump(child.stderr, process.stderr))
        code = await child.wait()
        process.exit(code if code >= 0 else 128 - code)
    finally:
        feeding.cancel()
        if child.returncode is None:
            child.kill()
            await child.wait()


async def _pump(reader: Any, writer: Any) -> None:
    with contextlib.suppress(OSError, asyncssh.Error):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        if isinstance(writer, asyncio.StreamWriter):
            writer.close()


_ACTIONS = {"echo": _echo, "lines": _lines, "flood": _flood, "slow": _slow, "deaf": _deaf}


@asynccontextmanager
async def tcp_node(talk: Talk, address: str = "127.0.0.1") -> AsyncIterator[Node]:
    """Serve anything but proper SSH."""
    writers: list[asyncio.StreamWriter] = []
    node = Node(address, 0)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        writers.append(writer)
        node.open_connections += 1
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await talk(reader, writer)
        writer.close()
        node.open_connections -= 1

    server = await asyncio.start_server(serve, address, 0)
    node.port = server.sockets[0].getsockname()[1]
    try:
        yield node
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Accept and never answer."""
    await reader.read()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Accept and close."""
    writer.transport.abort()


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer as a web server would."""
    writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    await writer.drain()
    writer.close()


async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Begin with endless lines."""
    while True:
        writer.write(b"hello\r\n" * 1000)
        await writer.drain()


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Begin like SSH and go on with noise, which happens to look like a part of a login."""
    padding, part_of_login = b"\x04", b"\x3c"
    writer.write(b"SSH-2.0-noise\r\n" + b"\x00\x00\x01\x00" + padding + part_of_login + os.urandom(4096))
    await reader.read()


async def unfinished(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Greet and never go on with the key exchange."""
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    await reader.read()


async def dripping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send the greeting a byte at a time and never end it."""
    while True:
        writer.write(b"S")
        await asyncio.sleep(0.02)


@asynccontextmanager
async def real_sshd(folder: Path, address: str = "127.0.0.1") -> AsyncIterator[Node]:
    """Run OpenSSH's server with a temporary configuration; folder/id is a key that may log in."""
    for name in ("host", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True, timeout=20)
    (folder / "id.pub").rename(folder / "authorized")
    with contextlib.suppress(OSError):
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    probe = await asyncio.start_server(silent, address, 0)
    port = probe.sockets[0].getsockname()[1]
    probe.close()
    await probe.wait_closed()
    lines = [
        f"ListenAddress {address}:{port}",
        f"HostKey {folder / 'host'}",
        f"AuthorizedKeysFile {folder / 'authorized'}",
        "StrictModes no",
        "UsePAM no",
        "PermitRootLogin yes",
        "PidFile none",
    ]
    (folder / "config").write_text("\n".join(lines) + "\n", "utf-8")
    sshd = await asyncio.create_subprocess_exec(
        "/usr/sbin/sshd",
        "-D",
        "-e",
        "-f",
        str(folder / "config"),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert sshd.stderr is not None
    async with asyncio.timeout(10):
        said = b""
        while b"Server listening" not in said:
            line = await sshd.stderr.readline()
            assert line, f"sshd ended: {said.decode()}"
            said += line
    drain = asyncio.create_task(sshd.stderr.read())
    key = " ".join((folder / "host.pub").read_text("utf-8").split()[:2])
    try:
        yield Node(address, port, (key,))
    finally:
        os.killpg(sshd.pid, signal.SIGKILL)
        await sshd.wait()
        await drain


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--address", default="127.0.0.1")
    arguments = parser.parse_args()
    async with contextlib.AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(ssh_node(arguments.address)) for _ in range(arguments.nodes)]
        print(*(node.port for node in nodes), flush=True)  # noqa: T201
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
