# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ask the Docker Engine API on its unix socket; podman answers the same API on its own.

Standard library only. Runs on nodes with Python 3.8. Touches nothing but sockets that it is given paths of; changes
nothing there.
Source: Docker Engine API v1.41 reference; podman-system-service(1).
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from ._engine_parse import ContainerUsage, build_item, parse_usage, parse_version

_MAX_RESPONSE_BYTES = 8 * 1024 * 1024
_MAX_CONTAINERS = 128
# Docker 20.10 holds each statistics answer back until its next measurement, up to 1.0 s (measured), even a one-shot
# one. Asked side by side, all come with the same measurement.
_PARALLEL = 64
_MAX_ERRORS = 4
_CONTAINER_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")

_DOCKER_SOCKETS = ("/var/run/docker.sock", "/run/docker.sock", "/run/user/{uid}/docker.sock")
_PODMAN_SOCKETS = ("/run/podman/podman.sock", "/run/user/{uid}/podman/podman.sock")
# Runtimes that speak only the Kubernetes CRI (gRPC), which the standard library does not.
_OTHER_RUNTIMES = (
    ("containerd", "/run/containerd/containerd.sock"),
    ("containerd", "/run/k3s/containerd/containerd.sock"),
    ("cri-o", "/run/crio/crio.sock"),
)


class EngineError(Exception):
    """The engine could not be asked, or its answer is no use."""


class EngineDeniedError(EngineError):
    """The engine is there, but this user may not talk to it."""


@dataclass(frozen=True)
class Runtime:
    """A container runtime and the socket it was found at; *version* is None where it can't be asked."""

    name: str
    version: Optional[str]
    socket: str
    api_version: Tuple[int, int] = (0, 0)
    listable: bool = True


@dataclass(frozen=True)
class Containers:
    """The containers part of a sample, with the counters that the next sample needs."""

    items: List[Dict[str, object]]
    usage: Dict[str, ContainerUsage]
    errors: List[str]


def no_runtime_message() -> str:
    """Say where a runtime was looked for; the users' own sockets are not worth their words."""
    return "no container runtime: no socket at {} or {}".format(_DOCKER_SOCKETS[0], _PODMAN_SOCKETS[0])


def cannot_list_message(runtime: Runtime) -> str:
    """Say why a runtime that is there has no containers listed."""
    return "{} at {} has no Docker-compatible API: its containers can't be listed".format(runtime.name, runtime.socket)


def find_runtime(locate: Callable[[str], str], deadline_seconds: float) -> Optional[Runtime]:
    """Find the container runtime: the first socket that answers.

    Shapes: *locate* turns a path on the node into one on this machine. None where there is no socket at all.
    Errors: EngineDeniedError or EngineError if there are sockets but none answers; the first one's reason.
    """
    first_error: Optional[EngineError] = None
    for path in _candidates():
        if not _exists(locate(path)):
            continue
        client = EngineClient(locate(path), deadline_seconds, shown_path=path)
        try:
            name, version, api_version = parse_version(client.get("/version"))
            return Runtime(name, version, path, api_version)
        except EngineError as error:
            first_error = first_error or error
        finally:
            client.close()
    if first_error is not None:
        raise first_error
    for name, path in _OTHER_RUNTIMES:
        if _exists(locate(path)):
            return Runtime(name, None, path, listable=False)
    return None


def _exists(path: str) -> bool:
    # A node without an engine looks for one with every sample: os.path.exists() makes an exception of each absent file.
    return os.access(path, os.F_OK)


def read_usage(runtime: Runtime, socket_path: str, deadline_seconds: float) -> Dict[str, ContainerUsage]:
    """Read only the CPU counters of the running containers, for a later `read_containers` to compare with.

    Shapes: empty for engines before API 1.41, whose stats carry their own earlier reading.
    """
    if not _has_one_shot(runtime):
        return {}
    rows, _total = _list(runtime, socket_path, deadline_seconds, "/containers/json")
    collected = _Collected()
    _ask_each(runtime, socket_path, deadline_seconds, rows, collected, with_inspect=False)
    return {key: usage for key, usage in collected.usage.items() if usage.cpu_nanoseconds is not None}


def read_containers(
    runtime: Runtime,
    socket_path: str,
    deadline_seconds: float,
    previous: Mapping[str, ContainerUsage],
    cpu_count: int,
) -> Containers:
    """List all containers, with the state of each and the use of the running ones.

    Shapes: what could not be asked before *deadline_seconds* (of time.monotonic) stays null in its item, and is in
        the errors. At most 128 containers, the running ones first.
    Errors: EngineError if not even the list could be had.
    """
    rows, left_out = _list(runtime, socket_path, deadline_seconds, "/containers/json?all=1")
    collected = _Collected()
    if left_out:
        collected.errors.append("{} containers left out, {} are listed".format(left_out, len(rows)))
    _ask_each(runtime, socket_path, deadline_seconds, rows, collected, with_inspect=True)
    with collected.lock:
        items = []
        for row in rows:
            key = str(row["Id"])
            usage = collected.usage.get(key)
            items.append(build_item(row, collected.details.get(key), usage, previous.get(key), cpu_count))
        return Containers(items, dict(collected.usage), list(collected.errors))


class EngineClient:
    """Send GET requests over one kept-open connection; every answer is bounded in time and size."""

    def __init__(
        self,
        socket_path: str,
        deadline_seconds: float,
        *,
        shown_path: str = "",
        max_bytes: int = _MAX_RESPONSE_BYTES,
    ) -> None:
        self._shown_path = shown_path or socket_path
        self._deadline_seconds = deadline_seconds
        self._max_bytes = max_bytes
        self._connection = _UnixConnection(socket_path)

    def get(self, path: str) -> object:
        """Return the JSON that the engine answers on *path*.

        Errors: EngineDeniedError; EngineError for every other way to fail, in words that name the socket.
        """
        try:
            return json.loads(self._read(path))
        except PermissionError as error:
            raise EngineDeniedError(
                "permission denied at {}: use become, or let the user into the socket's group".format(self._shown_path)
            ) from error
        except (socket.timeout, TimeoutError) as error:
            raise EngineError("timed out at {}{}".format(self._shown_path, path)) from error
        except (ValueError, RecursionError) as error:
            raise EngineError("no JSON from {}{}".format(self._shown_path, path)) from error
        except OSError as error:
            raise EngineError("{} at {}".format(error.strerror or error, self._shown_path)) from error
        except http.client.HTTPException as error:
            raise EngineError("no HTTP from {}: {}".format(self._shown_path, type(error).__name__)) from error
        finally:
            # After anything but a complete answer the connection is in the middle of one.
            if self._connection.unfinished:
                self.close()

    def close(self) -> None:
        self._connection.close()

    def _read(self, path: str) -> bytes:
        connection = self._connection
        connection.unfinished = True
        connection.timeout = self._remaining_seconds()
        if connection.sock is not None:
            connection.sock.settimeout(connection.timeout)
        connection.request("GET", path, headers={"Host": "localhost", "Accept": "application/json"})
        link = connection.sock
        with connection.getresponse() as response:
            pieces: List[bytes] = []
            size_bytes = 0
            while True:
                # A server that drips one byte at a time resets the socket's own timeout with each of them.
                if link is not None and link.fileno() >= 0:
                    link.settimeout(self._remaining_seconds())
                piece = response.read1(65536)
                if not piece:
                    break
                size_bytes += len(piece)
                if size_bytes > self._max_bytes:
                    raise EngineError(
                        "answer larger than {} bytes from {}{}".format(self._max_bytes, self._shown_path, path)
                    )
                pieces.append(piece)
            # read1 does not tell an early end from the right one.
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            if response.status != http.client.OK:
                raise EngineError("status {} from {}{}".format(response.status, self._shown_path, path))
        connection.unfinished = False
        return b"".join(pieces)

    def _remaining_seconds(self) -> float:
        remaining = self._deadline_seconds - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, socket_path: str) -> None:
        super().__init__("localhost")
        self._socket_path = socket_path
        self.unfinished = False

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._socket_path)
        except BaseException:
            self.close()
            raise


class _Collected:
    """What the asking threads bring together; *lock* guards it, since one may outlive the wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.details: Dict[str, object] = {}
        self.usage: Dict[str, ContainerUsage] = {}
        self.errors: List[str] = []


def _candidates() -> List[str]:
    uid = os.geteuid()
    return [path.format(uid=uid) for path in _DOCKER_SOCKETS + _PODMAN_SOCKETS]


def _has_one_shot(runtime: Runtime) -> bool:
    return runtime.api_version >= (1, 41)


def _list(
    runtime: Runtime, socket_path: str, deadline_seconds: float, path: str
) -> Tuple[List[Mapping[str, object]], int]:
    client = EngineClient(socket_path, deadline_seconds, shown_path=runtime.socket)
    try:
        answer = client.get(path)
    finally:
        client.close()
    if not isinstance(answer, list):
        raise EngineError("no list of containers from {}".format(runtime.socket))
    rows: List[Mapping[str, object]] = [
        row for row in answer if isinstance(row, dict) and _CONTAINER_ID.fullmatch(str(row.get("Id")))
    ]
    rows.sort(key=lambda row: row.get("State") != "running")
    return rows[:_MAX_CONTAINERS], max(0, len(rows) - _MAX_CONTAINERS)


def _ask_each(
    runtime: Runtime,
    socket_path: str,
    deadline_seconds: float,
    rows: Sequence[Mapping[str, object]],
    collected: _Collected,
    *,
    with_inspect: bool,
) -> None:
    """Ask about every container, over a few connections side by side, and return at the deadline at the latest."""
    pending = list(reversed(rows))

    def ask_until_done() -> None:
        client = EngineClient(socket_path, deadline_seconds, shown_path=runtime.socket)
        try:
            while True:
                with collected.lock:
                    if not pending:
                        return
                    row = pending.pop()
                _ask_one(client, runtime, row, collected, with_inspect)
        finally:
            client.close()

    threads = [
        threading.Thread(target=ask_until_done, name="engine", daemon=True)
        for _index in range(min(_PARALLEL, len(rows)) - 1)
    ]
    for thread in threads:
        thread.start()
    ask_until_done()
    for thread in threads:
        thread.join(max(0.0, deadline_seconds - time.monotonic()) + 0.1)


def _ask_one(
    client: EngineClient, runtime: Runtime, row: Mapping[str, object], collected: _Collected, with_inspect: bool
) -> None:
    key = str(row["Id"])
    try:
        if with_inspect:
            details = client.get("/containers/{}/json".format(key))
            with collected.lock:
                collected.details[key] = details
        if row.get("State") == "running":
            query = "stream=false&one-shot=true" if _has_one_shot(runtime) else "stream=false"
            stats = client.get("/containers/{}/stats?{}".format(key, query))
            with collected.lock:
                collected.usage[key] = parse_usage(stats, time.monotonic())
    except EngineError as error:
        # A container that ended between the list and this question is no fault.
        if "status 404" not in str(error) and "status 409" not in str(error):
            with collected.lock:
                if len(collected.errors) < _MAX_ERRORS:
                    collected.errors.append(str(error))
