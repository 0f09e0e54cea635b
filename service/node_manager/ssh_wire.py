# SPDX-License-Identifier: GPL-3.0-or-later
"""One SSH connection to one node: dialled, bounded against what a hostile node can send, its host key judged, logged in.

Runs no command on the node and shares nothing between nodes but the loaded private keys. The traps are of asyncssh 2.24.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ipaddress
import os
import resource
import socket
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import asyncssh

# Beside its name for what it does when it is loaded.
from node_manager import ssh_cipher  # noqa: F401
from node_manager.domain import ContactReason
from node_manager.ssh_targets import StreamError, Target, UnsuitedError, error_of_way, own_shortage
from node_manager.stream_lines import FLOOD_SECONDS, Allowance

# Measured per 2 KB line here: aes128-gcm 57 us, aes128-ctr 64 us, chacha20 110 us.
_CIPHERS = [
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes256-ctr",
    "chacha20-poly1305@openssh.com",
]
# No group exchange: there the node chooses the numbers that we would have to calculate with.
_KEY_EXCHANGES = [
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
    "diffie-hellman-group14-sha256",
    "diffie-hellman-group16-sha512",
]
_MACS = ["hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256", "hmac-sha2-512"]
# Plain keys only: a certificate would be trusted by another rule than the pinned key.
_HOST_KEY_ALGORITHMS = {
    "ssh-ed25519": ["ssh-ed25519"],
    "ecdsa-sha2-nistp256": ["ecdsa-sha2-nistp256"],
    "ecdsa-sha2-nistp384": ["ecdsa-sha2-nistp384"],
    "ecdsa-sha2-nistp521": ["ecdsa-sha2-nistp521"],
    "ssh-rsa": ["rsa-sha2-256", "rsa-sha2-512"],
}
# asyncssh copies all that it hasn't parsed for each packet, so 16 KiB of the smallest packets take 11 ms and 256 KiB seconds.
_READ_BYTES = 16 * 1024
_LOGIN_MAX_BYTES = 256 * 1024
_BURST_BYTES = 512 * 1024
_BYTES_PER_SECOND = 128 * 1024
# What a read costs beside its bytes, in bytes: a node may not buy a thousand wake-ups a second with a byte each.
_READ_COST = 256
_JUMP_HOST_SHARE = 64
# What a peer may leave unread; also how much of a channel asyncssh can be made to hold while we don't read.
WINDOW_BYTES = 64 * 1024
# A half-dead connection is freed by the kernel after this.
_DEAD_AFTER_SECONDS = 30
_SPARE_FILES = 128
_THREADS = 8
_DEFAULT_KEYS_LIVE_SECONDS = 60.0

_Session = TypeVar("_Session")


class _Channel(Protocol):
    def abort(self) -> None: ...


class _Transport(_Channel, Protocol):
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_write_buffer_size(self) -> int: ...


class Wire(asyncio.BufferedProtocol):
    """What stands between a socket, or a jump host's channel, and asyncssh, and decides how fast is read.

    asyncssh itself goes on reading, and answering into an endless buffer, whatever a node sends.
    """

    _WRITING, _BYTES, _LINES = 1, 2, 4

    def __init__(self, read_buffer: memoryview, share: float, flood_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.connection: asyncssh.SSHClientConnection | None = None
        self.logged_in = False
        # Our own verdict on the node, where asyncssh would only know that the connection ended.
        self.fault: tuple[ContactReason, str] | None = None
        self.transport: _Transport | None = None
        self._buffer = read_buffer
        self._allowance = Allowance(_BURST_BYTES * share, _BYTES_PER_SECOND * share, self._loop.time())
        self._flood_seconds = flood_seconds
        self._login_bytes = 0
        self._holds = 0

    def wait(self, seconds: float, then: Callable[[], None]) -> None:
        """Read nothing for *seconds*, then call *then* and go on."""
        self._hold(self._LINES)
        self._loop.call_later(seconds, self._go_on, self._LINES, then)

    def unsent_bytes(self) -> int:
        """Tell how much the node has not yet taken."""
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def fail(self, reason: ContactReason, words: str) -> None:
        """End the connection for what the node did."""
        self.fault = self.fault or (reason, words)
        if self.connection is not None:
            self.connection.abort()

    # asyncio's side

    def connection_made(self, transport: Any) -> None:
        """Hand the transport to asyncssh, if anybody still wants it."""
        if self.connection is None:
            transport.abort()
            return
        self.transport = transport
        self.connection.connection_made(transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Give the buffer of all wires: what is read is taken out before anything else is."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read."""
        self.data_received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes, datatype: int | None = None) -> None:
        """Hand data on to asyncssh; a jump host's channel comes in here."""
        connection = self.connection
        if connection is None or self.fault is not None:
            return
        connection.data_received(data, datatype)
        if not self.logged_in:
            self._login_bytes += len(data)
            if self._login_bytes > _LOGIN_MAX_BYTES:
                self.fail(ContactReason.OUTPUT_UNUSABLE, f"sent {self._login_bytes} bytes before the login was done")
            return
        now = self._loop.time()
        wait = self._allowance.take(len(data) + _READ_COST, now)
        if wait <= 0:
            return
        if self._allowance.strained_seconds(now) > self._flood_seconds:
            self.fail(ContactReason.OUTPUT_UNUSABLE, f"sends more than {_BYTES_PER_SECOND} bytes a second")
            return
        self._hold(self._BYTES)
        self._loop.call_later(wait, self._go_on, self._BYTES)

    def eof_received(self) -> None:
        """Tell asyncssh."""
        if self.connection is not None:
            self.connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell asyncssh."""
        self.transport = None
        if self.connection is not None:
            self.connection.connection_lost(exc)

    def session_started(self) -> None:
        """Do nothing: a jump host's channel calls it."""

    def pause_writing(self) -> None:
        """Read nothing more from a node that doesn't read, or our answers would pile up."""
        self._hold(self._WRITING)

    def resume_writing(self) -> None:
        """Read again."""
        self._go_on(self._WRITING)

    def _hold(self, why: int) -> None:
        if not self._holds and self.transport is not None:
            self.transport.pause_reading()
        self._holds |= why

    def _go_on(self, why: int, then: Callable[[], None] | None = None) -> None:
        if not self._holds & why:
            return
        self._holds &= ~why
        if then is not None:
            then()
        if not self._holds and self.transport is not None:
            self.transport.resume_reading()


class Login:
    """A connection that is logged in."""

    def __init__(self, connection: asyncssh.SSHClientConnection, wire: Wire, host_key: str) -> None:
        self.connection = connection
        self.wire = wire
        self.host_key = host_key


class KeyRing:
    """What all connections with the same private key have in common, read once and again when the file changes."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._options: dict[str | None, tuple[object, asyncssh.SSHClientConnectionOptions]] = {}

    async def options_for(self, target: Target) -> asyncssh.SSHClientConnectionOptions:
        """Give options of its own for one connection."""
        path = target.private_key_file
        try:
            version = _version_of(path)
            known = self._options.get(path)
            if known is None or known[0] != version:
                loop = asyncio.get_running_loop()
                known = version, await loop.run_in_executor(self._executor, _load_options, path)
                self._options[path] = known
        except (OSError, ValueError) as error:
            words = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            raise UnsuitedError(
                f"{target}: the private key {path or 'of the service user'} is unusable: {words}"
            ) from error
        options = copy.copy(known[1])
        # asyncssh writes the signature algorithm that a server takes into the key pair, and reads it again after an answer:
        # two logins at once to servers of different ages would spoil each other's.
        options.client_keys = [copy.copy(pair) for pair in options.client_keys or ()]
        options.username = target.user
        options.orig_host = options.host = target.address
        options.port = target.port
        options.server_host_key_algs = _algorithms_for(target.host_keys)
        return options


class _Client(asyncssh.SSHClient):
    """Judges the host key, at the login and at each new key exchange."""

    def __init__(self, target: Target, on_lost: Callable[[], None] | None) -> None:
        self._target = target
        self._on_lost = on_lost
        self._trusted = {" ".join(key.split()[:2]) for key in target.host_keys}
        self.host_key = ""
        self.refusal: StreamError | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:  # noqa: ARG002
        """Tell whether the node is who it was; asyncssh asks for every key, as it is told of none."""
        shown = " ".join(key.export_public_key().decode().split()[:2])
        if not self._trusted and not self._target.strict:
            self._trusted.add(shown)
        if shown in self._trusted:
            self.host_key = shown
            return True
        offered = f"{shown.partition(' ')[0]} {key.get_fingerprint()}"
        if not self._trusted:
            self.refusal = UnsuitedError(
                f"{self._target}: shows {offered}, and no host key is given; register the node with it"
            )
            return False
        pinned = ", ".join(sorted(_fingerprint(text) for text in self._trusted))
        self.refusal = StreamError(
            ContactReason.HOST_KEY_CHANGED,
            f"{self._target}: shows {offered}, trusted is {pinned}; if the device was set up anew, forget its host keys",
        )
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Pass it on."""
        if self._on_lost is not None:
            self._on_lost()


class Logins:
    """Logs in to nodes; keeps what all logins share: loaded keys, threads for names and files, the buffer to read into."""

    def __init__(self, flood_seconds: float = FLOOD_SECONDS) -> None:
        # Threads of our own: a name server that doesn't answer must not use up those of the rest of the service.
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="ssh")
        self._keys = KeyRing(self._executor)
        self._read_buffer = memoryview(bytearray(_READ_BYTES))
        self._flood_seconds = flood_seconds

    def close(self) -> None:
        """Let the threads end."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def dial(self, target: Target) -> socket.socket:
        """Open a TCP connection, trying the addresses of a name one after the other; the caller limits the time."""
        return await dial(target, self._executor)

    async def log_in(
        self,
        target: Target,
        through: asyncssh.SSHClientConnection | None,
        on_lost: Callable[[], None] | None = None,
    ) -> Login:
        """Connect to *target* and log in; the caller limits the time.

        Shapes: *through* is the connection to its jump host; *on_lost* is given for one that is itself a jump host.
        Errors: StreamError where the cause is known here; otherwise whatever asyncssh and the system raise.
        """
        options = await self._keys.options_for(target)
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        client = _Client(target, on_lost)
        options.waiter = waiter
        options.protocol_factory = lambda: client
        wire = Wire(self._read_buffer, 1 if on_lost is None else _JUMP_HOST_SHARE, self._flood_seconds)
        sock = None if through is not None else await self.dial(target)
        # What asyncssh.connect() does for each connection, less 0.7 ms: there the options are made anew in a thread.
        wire.connection = connection = asyncssh.SSHClientConnection(loop, options, wait="auth")
        try:
            if through is not None:
                await open_way(through, target, lambda: wire)
            else:
                await loop.create_connection(lambda: wire, sock=sock)
            await waiter
        except BaseException as error:
            connection.abort()
            if wire.transport is None:
                # A jump host may still open the way, to nobody.
                wire.connection = None
                if sock is not None:
                    sock.close()
            if not waiter.cancel() and not waiter.cancelled():
                # Nobody else will ask for what is in it.
                waiter.exception()
            if isinstance(error, Exception):
                if client.refusal is not None:
                    raise client.refusal from error
                if wire.fault is not None:
                    raise StreamError(wire.fault[0], f"{target}: {wire.fault[1]}") from error
            raise
        wire.logged_in = True
        return Login(connection, wire, client.host_key)


async def open_way(through: asyncssh.SSHClientConnection, target: Target, session: Callable[[], Any]) -> None:
    """Open a TCP connection from a jump host to *target* and give it to *session*."""
    try:
        await finish_or_abandon(through.create_connection(session, target.address, target.port, window=WINDOW_BYTES))
    except asyncssh.ChannelOpenError as error:
        raise error_of_way(error, target) from error


async def finish_or_abandon(opening: Coroutine[Any, Any, tuple[_Channel, _Session]]) -> _Session:
    """Open a channel; when cancelled meanwhile, close it as soon as the far side has opened it.

    asyncssh can't take back a request for a channel: it would stay open, and owned by nobody, as long as the connection.
    """
    task = asyncio.ensure_future(opening)
    try:
        return (await asyncio.shield(task))[1]
    except asyncio.CancelledError:
        task.add_done_callback(_close_channel)
        raise


def _close_channel(task: asyncio.Future[tuple[_Channel, Any]]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result()[0].abort()


async def dial(target: Target, executor: Executor | None) -> socket.socket:
    """Open a TCP connection, trying the addresses of a name one after the other; the caller limits the time."""
    loop = asyncio.get_running_loop()
    addresses = await _resolve(loop, target, executor)
    failure: OSError | None = None
    for family, address in addresses:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _prepare(sock)
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    assert failure is not None
    raise failure


async def _resolve(
    loop: asyncio.AbstractEventLoop, target: Target, executor: Executor | None
) -> list[tuple[socket.AddressFamily, Any]]:
    # A thread for a literal address would cost more than the rest of the dialling.
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(target.address).version
        if "%" not in target.address:
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            return [(family, (target.address, target.port))]
    found = await loop.run_in_executor(
        executor, lambda: socket.getaddrinfo(target.address, target.port, type=socket.SOCK_STREAM)
    )
    return [(family, address) for family, _, _, _, address in found]


def _prepare(sock: socket.socket) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # The kernel gives the lowest number that is free, so a high one says that few are left for the rest of the service.
    if limit != resource.RLIM_INFINITY and sock.fileno() >= limit - min(_SPARE_FILES, limit // 8):
        raise own_shortage(f"too few open files left of {limit}; raise the limit of the Node Manager (LimitNOFILE)")
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _DEAD_AFTER_SECONDS // 2),
        ("TCP_KEEPINTVL", _DEAD_AFTER_SECONDS // 6),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", _DEAD_AFTER_SECONDS * 1000),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _load_options(path: str | None) -> asyncssh.SSHClientConnectionOptions:
    options = asyncssh.SSHClientConnectionOptions(
        config=None,
        client_keys=() if path is None else [path],
        # Not empty: for an empty one asyncssh reads the user's known_hosts, and with None it takes every key.
        known_hosts=([], [], []),
        x509_trusted_certs=None,
        x509_trusted_cert_paths=[],
        kex_algs=_KEY_EXCHANGES,
        encryption_algs=_CIPHERS,
        mac_algs=_MACS,
        compression_algs=["none"],
        preferred_auth=["publickey"],
        password_auth=False,
        kbdint_auth=False,
        host_based_auth=False,
        gss_host=None,
        agent_forwarding=False,
        x11_forwarding=False,
        request_pty=False,
        env={},
        send_env=[],
        encoding=None,
        utf8_decode_errors="replace",
        login_timeout=0,
        keepalive_interval=0,
        # After an hour all nodes that were connected at once would exchange keys at once: 10,000 are 25 s of CPU.
        rekey_seconds=0,
        window=WINDOW_BYTES,
    )
    if path is not None or not os.environ.get("SSH_AUTH_SOCK"):
        options.agent_path = None
    return options


def _version_of(path: str | None) -> object:
    if path is None:
        return int(time.monotonic() / _DEFAULT_KEYS_LIVE_SECONDS)
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino


def _algorithms_for(host_keys: tuple[str, ...]) -> list[str]:
    pinned = {key.partition(" ")[0] for key in host_keys}
    # The others too, so that a node with a new kind of key can show it: the message then names both.
    kinds = sorted(_HOST_KEY_ALGORITHMS, key=lambda kind: kind not in pinned)
    return [algorithm for kind in kinds for algorithm in _HOST_KEY_ALGORITHMS[kind]]


def _fingerprint(key: str) -> str:
    try:
        return f"{key.partition(' ')[0]} {asyncssh.import_public_key(key).get_fingerprint()}"
    except asyncssh.KeyImportError:
        return "a key that can't be read"
