# SPDX-License-Identifier: GPL-3.0-or-later
"""Bring traffic weights to HAProxy: as a section of its configuration, or into a running one over its runtime API.

Touches one unix socket and nothing else. Imports the weights and the standard library; knows no store and no API.
Node ids and addresses come from outside: each is checked against a closed alphabet before it is part of a line.
Source: HAProxy's configuration manual and management guide, version 2.6.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from node_manager.load_distribution import TrafficState, Weight

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,255}")
_CLEAN_NODE_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,252}")
_CHECK_PATH = re.compile(r"/[A-Za-z0-9._~/=&?-]{0,1000}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
# The C library reads such a last label as an address: HAProxy takes 0x0 for 0.0.0.0.
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_WEIGHT_MAX = 256

# A dead server is out after three checks and in after two; servers added at run time ignore a default-server line.
_CHECKED = "check inter 2s fall 3 rise 2"
# 4095 servers (the most that roundrobin takes) with the longest names make some 1.6 MB.
_LIMIT_ANSWER_BYTES = 8 * 1024 * 1024
_CHUNK_BYTES = 65536

# show servers state: bits of srv_admin_state and srv_check_state.
_FORCED_MAINTENANCE, _NO_ADDRESS, _FORCED_DRAIN = 0x01, 0x20, 0x08
_CHECK_CONFIGURED, _CHECK_ENABLED = 0x02, 0x04
_COLUMNS = (
    "be_name",
    "srv_name",
    "srv_addr",
    "srv_admin_state",
    "srv_uweight",
    "srv_check_state",
    "srv_fqdn",
)
_STATE_WORDS = {TrafficState.READY: "ready", TrafficState.DRAIN: "drain", TrafficState.DOWN: "maint"}


class Mode(StrEnum):
    """What HAProxy understands of the traffic."""

    HTTP = "http"
    TCP = "tcp"


class ChangeKind(StrEnum):
    """What was set on a server."""

    ADDED = "added"
    ADDRESS = "address"
    WEIGHT = "weight"
    STATE = "state"


@dataclass(frozen=True)
class Change:
    """One thing that was set on one server, in HAProxy's own words; a server that was added had nothing before."""

    server: str
    kind: ChangeKind
    before: str
    after: str


class HaproxyError(Exception):
    """HAProxy can't be given the weights; the text says what, of which server, and what to do.

    What was set before the failure, or in spite of it on other servers, stands in `changes`.
    """

    def __init__(self, message: str, changes: Sequence[Change] = ()) -> None:
        super().__init__(message)
        self.changes = tuple(changes)


@dataclass(frozen=True)
class _Server:
    """One server as a running HAProxy has it; *address* is empty where its name was never found."""

    name: str
    address: str
    host_name: str
    weight: int
    state: TrafficState
    unchecked: bool


def render_backend(
    name: str, weights: Sequence[Weight], port: int, *, mode: Mode = Mode.HTTP, check_path: str | None = None
) -> str:
    """Write a backend section with a server for each node.

    Shapes: `roundrobin`, because with it each server's share is its weight and the runtime API may change it; no timeouts,
    which belong into the file's `defaults`. With *check_path* HAProxy's own checks ask for it over HTTP, else they only
    connect. A node that is down is `disabled`; one that drains has weight 0, which keeps what is established.
    Errors: HaproxyError if the backend's name, an address, the port or the path could mean anything else to HAProxy.
    """
    _check_name(name)
    _check_port(port)
    if check_path is not None and not _CHECK_PATH.fullmatch(check_path):
        raise HaproxyError(
            f"check path {check_path[:80]!r}: expected a / and then letters, digits and . _ ~ / = & ? - only"
        )
    named = _by_server_name(weights)
    lines = [
        f"backend {name}",
        f"    mode {mode}",
        "    balance roundrobin",
        # A request whose server can't be connected to goes to another one.
        "    option redispatch",
        *([f"    option httpchk GET {check_path}"] if check_path else []),
        # Without `none`, one host name that can't be looked up keeps all of HAProxy from starting.
        f"    default-server {_CHECKED} init-addr last,libc,none",
    ]
    for server, weight in named.items():
        disabled = " disabled" if weight.state is TrafficState.DOWN else ""
        lines.append(f"    server {server} {_endpoint(weight, port)} weight {weight.weight}{disabled}")
    return "\n".join(lines) + "\n"


def server_name(node_id: str) -> str:
    """Give the name of a node's server: its id, or, where HAProxy might misread that, its harmless part and a digest."""
    if _CLEAN_NODE_ID.fullmatch(node_id):
        return node_id
    digest = hashlib.sha256(node_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    # An underscore is in no clean id, so that no two nodes share a server.
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', node_id)[:200]}_{digest}"


class RuntimeApi:
    """A running HAProxy behind its `stats socket`, which must have `level admin`."""

    def __init__(self, socket_path: Path, timeout_seconds: float = 5.0) -> None:
        self._socket_path = socket_path
        self._timeout_seconds = timeout_seconds

    def apply(
        self,
        backend: str,
        weights: Sequence[Weight],
        *,
        port: int | None = None,
        keep_others: bool = False,
        allow_empty: bool = False,
    ) -> list[Change]:
        """Set weight, state and address of each node's server where they differ; give what was set.

        Those that take traffic come first, so that no request finds the backend empty. A node without a server gets one
        if *port* is given. Servers that *weights* doesn't name drain, unless *keep_others*: the nodes left the deployment.
        What is set lasts until HAProxy is restarted or reloaded; render_backend writes what lasts longer.
        Errors: HaproxyError if HAProxy doesn't answer or refuses, after the other servers were set; if no node may take
        traffic, since a manager that sees nobody may be blind itself, unless *allow_empty*; if servers are there but
        none is a node's, since the backend is likely another's. In the last two nothing is set.
        """
        _check_name(backend)
        if port is not None:
            _check_port(port)
        named = _by_server_name(weights)
        if not allow_empty and not any(weight.weight for weight in weights):
            why = "; ".join(f"{server}: {_printable(weight.reason)}" for server, weight in list(named.items())[:5])
            raise HaproxyError(
                f"no node may take traffic ({why or 'there is none'}): backend {backend} stays as it is; "
                "look at the nodes, or allow the backend to be emptied"
            )
        known = self._servers(backend)
        if known and not known.keys() & named.keys():
            raise HaproxyError(
                f"backend {backend} has {len(known)} servers and none is a node of the deployment: is it the right "
                "backend? If all nodes were replaced, render the backend and reload HAProxy"
            )
        run = _Run(self, backend, port)
        for server, weight in sorted(named.items(), key=lambda item: not item[1].weight):
            run.attempt(server, known.get(server), weight)
        if not keep_others:
            for server in sorted(known.keys() - named.keys()):
                run.attempt_to_drain(known[server])
        if run.failures:
            more = f"; and {len(run.failures) - 5} more" if len(run.failures) > 5 else ""
            raise HaproxyError(f"backend {backend}: {'; '.join(run.failures[:5])}{more}", run.changes)
        return run.changes

    def command(self, line: str) -> str:
        """Send one command, checked by the caller to be one; give its answer.

        Errors: HaproxyError if the socket can't be used, or the answer is late, too long or "Permission denied".
        """
        answer = self._exchange(line.encode("ascii") + b"\n").decode("utf-8", "replace").strip()
        if answer == "Permission denied":
            raise HaproxyError(
                f"{self._socket_path}: permission denied; its 'stats socket' line needs 'level admin', for '{line[:80]}'"
            )
        return answer

    def _exchange(self, request: bytes) -> bytes:
        deadline = time.monotonic() + self._timeout_seconds
        chunks: list[bytes] = []
        size = 0
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(self._timeout_seconds)
                connection.connect(str(self._socket_path))
                connection.sendall(request)
                while True:
                    # Many small reads may each be in time and all of them never end.
                    connection.settimeout(max(0.001, deadline - time.monotonic()))
                    chunk = connection.recv(_CHUNK_BYTES)
                    if not chunk:
                        return b"".join(chunks)
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > _LIMIT_ANSWER_BYTES:
                        raise HaproxyError(
                            f"{self._socket_path}: more than {_LIMIT_ANSWER_BYTES} bytes came; is this HAProxy's socket?"
                        )
        except TimeoutError:
            raise HaproxyError(
                f"{self._socket_path}: no full answer in {self._timeout_seconds:g} s; is HAProxy stuck?"
            ) from None
        except OSError as error:
            raise HaproxyError(
                f"{self._socket_path}: {error}; it must be the path of a 'stats socket' of a running HAProxy that this "
                "user may write to"
            ) from error

    def _servers(self, backend: str) -> dict[str, _Server]:
        answer = self.command(f"show servers state {backend}")
        if answer == "Can't find backend.":
            raise HaproxyError(
                f"HAProxy has no backend {backend}; add the rendered one to its configuration and reload"
            )
        return {server.name: server for server in _parse_servers(answer)}


class _Run:
    """One application of weights: goes on after a server that fails, and keeps what happened."""

    def __init__(self, api: RuntimeApi, backend: str, port: int | None) -> None:
        self.changes: list[Change] = []
        self.failures: list[str] = []
        self._api = api
        self._backend = backend
        self._port = port

    def attempt(self, server: str, known: _Server | None, weight: Weight) -> None:
        """Bring one node's server to its weight."""
        try:
            if known is None:
                # Nothing goes where no server is.
                if not weight.weight:
                    return
                known = self._add(server, weight)
            elif weight.state is TrafficState.READY:
                self._set_address(known, weight)
            # HAProxy would call a server ready that it has no address for.
            self._settle(known, weight.weight, weight.state if known.address else TrafficState.DOWN)
        except _RefusedError as refusal:
            self.failures.append(f"server {server}: {refusal}")
        except HaproxyError as error:
            raise HaproxyError(f"backend {self._backend}, server {server}: {error}", self.changes) from error

    def attempt_to_drain(self, known: _Server) -> None:
        """Take new traffic from a server that is no node's, and keep its weight."""
        if known.state is not TrafficState.READY:
            return
        try:
            self._settle(known, known.weight, TrafficState.DRAIN)
        except _RefusedError as refusal:
            self.failures.append(f"server {known.name}: {refusal}")
        except HaproxyError as error:
            raise HaproxyError(f"backend {self._backend}, server {known.name}: {error}", self.changes) from error

    def _add(self, server: str, weight: Weight) -> _Server:
        address = _parse_address(weight)
        if self._port is None:
            raise _RefusedError(
                "isn't in the backend; say the port to add it, or render the backend and reload HAProxy"
            )
        if not _is_ip(address):
            raise _RefusedError(
                f"HAProxy looks up host names ({address}) only when it starts; render the backend and reload HAProxy"
            )
        endpoint = _endpoint(weight, self._port)
        self._send(
            f"add server {self._backend}/{server} {endpoint} weight {weight.weight} {_CHECKED}", expected="New server"
        )
        self.changes.append(Change(server, ChangeKind.ADDED, "", endpoint))
        # It starts in maintenance, with its checks off.
        return _Server(server, address, "", weight.weight, TrafficState.DOWN, unchecked=True)

    def _set_address(self, known: _Server, weight: Weight) -> None:
        address = _parse_address(weight)
        if not _is_ip(address):
            if not known.address or known.host_name.lower() != address:
                raise _RefusedError(
                    f"HAProxy looks up host names ({address}) only when it starts; render the backend and reload HAProxy"
                )
            return
        if not known.address:
            raise _RefusedError(
                f"HAProxy found no address for {known.host_name or 'it'}, and takes none before a reload: "
                f"render the backend with {address} and reload HAProxy"
            )
        if ipaddress.ip_address(known.address) != ipaddress.ip_address(address):
            self._send(f"set server {self._backend}/{known.name} addr {address}", expected="IP changed")
            self.changes.append(Change(known.name, ChangeKind.ADDRESS, known.address, address))

    def _settle(self, known: _Server, weight: int, state: TrafficState) -> None:
        server = f"{self._backend}/{known.name}"
        if known.state is not state and state is not TrafficState.READY:
            self._set_state(server, known, state)
        if known.weight != weight:
            self._send(f"set server {server} weight {weight}")
            self.changes.append(Change(known.name, ChangeKind.WEIGHT, str(known.weight), str(weight)))
        if known.state is not state and state is TrafficState.READY:
            if known.unchecked:
                self._send(f"enable health {server}")
            self._set_state(server, known, state)

    def _set_state(self, server: str, known: _Server, state: TrafficState) -> None:
        self._send(f"set server {server} state {_STATE_WORDS[state]}")
        self.changes.append(Change(known.name, ChangeKind.STATE, _STATE_WORDS[known.state], _STATE_WORDS[state]))

    def _send(self, line: str, expected: str = "") -> None:
        """Send a command whose answer begins with *expected*; without it, one that succeeds in silence."""
        answer = self._api.command(line)
        if not answer.startswith(expected) or (answer and not expected):
            raise _RefusedError(f"HAProxy answered '{_printable(answer[:200])}' to '{line[:200]}'")


class _RefusedError(Exception):
    """One server can't be set; the others can."""


def _parse_servers(text: str) -> list[_Server]:
    """Read `show servers state`.

    Shapes: the format's version, the columns' names, then a line per server.
    Errors: HaproxyError if it isn't version 1 or a column is missing.
    """
    # 1
    # # be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight ...
    # 3 shop 1 gw-7 192.0.2.7 2 0 50 50 ...
    version, _, rest = text.partition("\n")
    head, *lines = rest.splitlines() or [""]
    columns = {column: number for number, column in enumerate(head.removeprefix("#").split())}
    if version.strip() != "1" or not columns.keys() >= set(_COLUMNS):
        raise HaproxyError(f"'show servers state' answered '{_printable(text[:200])}', which isn't its version 1")
    servers = []
    for line in lines:
        fields = line.split()
        if not fields or line.startswith("#"):
            continue
        try:
            servers.append(_parse_server({column: fields[columns[column]] for column in _COLUMNS}))
        except (ValueError, IndexError):
            raise HaproxyError(
                f"'show servers state' has the line '{_printable(line[:200])}', not a server's"
            ) from None
    return servers


def _parse_server(fields: dict[str, str]) -> _Server:
    if not _NAME.fullmatch(fields["srv_name"]):
        raise ValueError("not a server's name")
    admin, check = int(fields["srv_admin_state"]), int(fields["srv_check_state"])
    state = TrafficState.READY
    if admin & (_FORCED_MAINTENANCE | _NO_ADDRESS):
        state = TrafficState.DOWN
    elif admin & _FORCED_DRAIN:
        state = TrafficState.DRAIN
    address = fields["srv_addr"]
    return _Server(
        fields["srv_name"],
        address if _is_ip(address) else "",
        "" if fields["srv_fqdn"] == "-" else fields["srv_fqdn"],
        int(fields["srv_uweight"]),
        state,
        unchecked=bool(check & _CHECK_CONFIGURED) and not check & _CHECK_ENABLED,
    )


def _by_server_name(weights: Sequence[Weight]) -> dict[str, Weight]:
    named = {server_name(weight.node_id): weight for weight in weights}
    if len(named) != len(weights):
        raise HaproxyError("a node stands in the weights twice; expected each once")
    for server, weight in named.items():
        if not 0 <= weight.weight <= _WEIGHT_MAX or (weight.weight and weight.state is not TrafficState.READY):
            raise HaproxyError(
                f"server {server}: weight {weight.weight} and state {weight.state}; expected 0 to {_WEIGHT_MAX}, and 0 "
                "unless it is ready"
            )
    return named


def _endpoint(weight: Weight, port: int) -> str:
    try:
        address = _parse_address(weight)
    except _RefusedError as refusal:
        raise HaproxyError(f"server {server_name(weight.node_id)}: {refusal}") from None
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _parse_address(weight: Weight) -> str:
    """Check a node's address; give it in its one spelling."""
    text = weight.address
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        last = text.rstrip(".").rpartition(".")[2]
        if len(text) <= 253 and _HOST_NAME.fullmatch(text) and not _NUMBER.fullmatch(last):
            return text.lower()
        raise _RefusedError(f"address {text[:80]!r}: expected an IPv4 or IPv6 address or a host name") from None
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.scope_id is not None:
        raise _RefusedError(f"address {text[:80]!r}: HAProxy takes no zone; give the node an address without %")
    # HAProxy sends to 0.0.0.0 and :: what the client asked for: anywhere.
    bare = getattr(parsed, "ipv4_mapped", None) or parsed
    if bare.is_unspecified or bare.is_multicast:
        raise _RefusedError(f"address {text[:80]!r}: expected the address of one node")
    return str(parsed)


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _check_name(backend: str) -> None:
    if not _NAME.fullmatch(backend):
        raise HaproxyError(f"backend {backend[:80]!r}: expected 1 to 255 letters, digits and _ . : - only")


def _check_port(port: int) -> None:
    if not 1 <= port <= 65535:
        raise HaproxyError(f"port {port}: expected 1 to 65535")


def _printable(text: str) -> str:
    """Keep what came from outside from steering a terminal or a log."""
    return "".join(character if character.isprintable() else " " for character in text)
