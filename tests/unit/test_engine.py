# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine client against a real HTTP server on a real unix socket: recorded answers, and every way to misbehave."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils import _engine
from ansible_collections.iot_platform.node_manager.plugins.module_utils._engine import (
    EngineClient,
    EngineDeniedError,
    EngineError,
    Runtime,
    cannot_list_message,
    find_runtime,
    no_runtime_message,
    read_containers,
    read_usage,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._engine_parse import (
    ContainerUsage,
    build_item,
    parse_usage,
    parse_version,
)

RECORDED = Path(__file__).parents[1] / "fixtures" / "engine" / "docker-20.10"
DOCKER = Runtime("docker", "20.10.24", "/var/run/docker.sock", (1, 41))
Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.answer(self)  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        """Keep the tests' output clean."""

    def address_string(self) -> str:
        return "unix"

    def send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str) -> None:
        super().__init__(path, Handler)
        self.answer: Answer = answer_recorded
        self.released = threading.Event()
        self.paths: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up on a misbehaving server is what these tests want."""


def answer_recorded(handler: Handler) -> None:
    handler.server.paths.append(handler.path)  # type: ignore[attr-defined]
    match = re.fullmatch(r"/containers/([0-9a-f]+)/(json|stats)(\?.*)?", handler.path)
    if handler.path == "/version":
        name = "version.json"
    elif handler.path.startswith("/containers/json"):
        name = "containers.json"
    else:
        assert match is not None
        name = f"{'inspect' if match.group(2) == 'json' else 'stats'}-{match.group(1)}.json"
    file = RECORDED / name
    handler.send(file.read_bytes() if file.exists() else b'{"message": "no such file"}', 200 if file.exists() else 404)


def answer_chunked(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'8\r\n{"Versio\r\n9\r\nn": "24"}\r\n0\r\n\r\n')


def answer_until_close(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(b'{"Version": "24"}')
    handler.close_connection = True


def answer_never(handler: Handler) -> None:
    handler.server.released.wait(30)  # type: ignore[attr-defined]


def answer_drop_by_drop(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.server.released.wait(0.02):  # type: ignore[attr-defined]
        handler.wfile.write(b" ")


def answer_garbage(handler: Handler) -> None:
    handler.wfile.write(b"\x00\xff\x00 not HTTP at all\r\n\r\n")
    handler.close_connection = True


def answer_no_json(handler: Handler) -> None:
    handler.send(b"<html>a proxy's page</html>")


def answer_deep(handler: Handler) -> None:
    handler.send(b"[" * 200_000)


def answer_half(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.close_connection = True


def answer_huge(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(50 * 1024 * 1024))
    handler.end_headers()
    for _ in range(50):
        handler.wfile.write(b" " * (1024 * 1024))


def answer_fault(handler: Handler) -> None:
    handler.send(b'{"message": "dockerd is unwell"}', 500)


@pytest.fixture
def server() -> Iterator[Server]:
    # pytest's own temporary paths can be longer than the 107 bytes that a socket address holds.
    directory = tempfile.mkdtemp(prefix="nm-")
    engine = Server(f"{directory}/engine.sock")
    thread = threading.Thread(target=engine.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield engine
    engine.released.set()
    engine.shutdown()
    thread.join()
    engine.server_close()
    shutil.rmtree(directory)


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def locate_at(server: Server, path: str = "/var/run/docker.sock") -> Callable[[str], str]:
    return lambda asked: str(server.server_address) if asked == path else "/nonexistent/socket"


@pytest.mark.parametrize("answer", [answer_chunked, answer_until_close], ids=["chunked", "until-close"])
def test_get_reads_answer(server: Server, answer: Answer) -> None:
    server.answer = answer
    client = EngineClient(str(server.server_address), soon())

    actual = client.get("/version")
    client.close()

    assert actual == {"Version": "24"}


def test_get_keeps_connection_open(server: Server) -> None:
    client = EngineClient(str(server.server_address), soon())

    client.get("/version")
    link = client._connection.sock
    client.get("/version")
    kept = link is not None and client._connection.sock is link
    client.close()

    assert kept


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(answer_never, "timed out at /var/run/docker.sock", id="hanging"),
        pytest.param(answer_drop_by_drop, "timed out at /var/run/docker.sock", id="drop-by-drop"),
        pytest.param(answer_garbage, "no HTTP from /var/run/docker.sock", id="garbage"),
        pytest.param(answer_no_json, "no JSON from /var/run/docker.sock", id="html"),
        pytest.param(answer_deep, "no JSON from /var/run/docker.sock", id="deep"),
        pytest.param(answer_half, "no HTTP from /var/run/docker.sock: IncompleteRead", id="half"),
        pytest.param(answer_huge, "answer larger than 8388608 bytes", id="50-MB"),
        pytest.param(answer_fault, "status 500 from /var/run/docker.sock", id="fault"),
    ],
)
def test_get_names_what_is_wrong(server: Server, answer: Answer, message: str) -> None:
    server.answer = answer
    client = EngineClient(str(server.server_address), soon(0.3), shown_path="/var/run/docker.sock")
    started = time.monotonic()

    with pytest.raises(EngineError, match=re.escape(message)):
        client.get("/version")
    client.close()

    assert time.monotonic() - started < 3.0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_get_tells_missing_right(server: Server) -> None:
    os.chmod(str(server.server_address), 0o600)
    os.chmod(os.path.dirname(str(server.server_address)), 0o755)
    euid = os.geteuid()
    os.seteuid(65534)
    try:
        with pytest.raises(EngineDeniedError, match=r"permission denied at /var/run/docker\.sock"):
            EngineClient(str(server.server_address), soon(), shown_path="/var/run/docker.sock").get("/version")
    finally:
        os.seteuid(euid)


def test_find_runtime_reads_version(server: Server) -> None:
    expected = Runtime("docker", "20.10.24+dfsg1", "/var/run/docker.sock", (1, 41))

    actual = find_runtime(locate_at(server), soon())

    assert expected == actual


def test_find_runtime_finds_podman(server: Server) -> None:
    answer = {"Components": [{"Name": "Podman Engine"}], "Version": "4.3.1", "ApiVersion": "1.41"}
    server.answer = lambda handler: handler.send(json.dumps(answer).encode())

    actual = find_runtime(locate_at(server, "/run/podman/podman.sock"), soon())

    assert actual == Runtime("podman", "4.3.1", "/run/podman/podman.sock", (1, 41))


def test_find_runtime_finds_none() -> None:
    actual = find_runtime(lambda path: "/nonexistent" + path, soon())

    assert actual is None
    assert no_runtime_message().startswith("no container runtime: no socket at /var/run/docker.sock")


def test_find_runtime_raises_when_nobody_listens(server: Server, tmp_path: Path) -> None:
    path = f"{os.path.dirname(str(server.server_address))}/stale.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)

    with pytest.raises(EngineError, match=r"Connection refused at /var/run/docker\.sock"):
        find_runtime(lambda asked: path if asked == "/var/run/docker.sock" else "/nonexistent", soon())


def test_find_runtime_tells_containerd_apart(tmp_path: Path) -> None:
    (tmp_path / "run/containerd").mkdir(parents=True)
    (tmp_path / "run/containerd/containerd.sock").touch()

    actual = find_runtime(lambda path: str(tmp_path) + path, soon())

    assert actual is not None
    assert not actual.listable
    assert "no Docker-compatible API" in cannot_list_message(actual)


def test_read_containers_reads_recorded_engine(server: Server) -> None:
    previous = {
        row["Id"]: ContainerUsage(0.0, 0, None, None) for row in json.loads((RECORDED / "containers.json").read_text())
    }

    seen = read_containers(DOCKER, str(server.server_address), soon(), previous, 2)

    by_name = {str(item["name"]): item for item in seen.items}
    assert seen.errors == []
    assert [item["state"] for item in seen.items] == ["running", "running", "exited", "exited"]
    assert by_name["flapping"]["restarts"] == 2
    assert by_name["failed"]["exit_code"] == 3
    assert by_name["failed"]["cpu_percent"] is None
    assert by_name["app"]["health"] == "healthy"
    assert by_name["app"]["labels"] == {"com.example": "x"}
    assert by_name["app"]["memory_limit_bytes"] == 64 * 1024 * 1024
    assert isinstance(by_name["app"]["cpu_percent"], float)


def test_read_usage_asks_one_shot(server: Server) -> None:
    usage = read_usage(DOCKER, str(server.server_address), soon())

    assert len(usage) == 2
    assert all("one-shot=true" in path for path in server.paths if "stats" in path)


def test_read_usage_leaves_old_engines_alone(server: Server) -> None:
    usage = read_usage(Runtime("docker", "18.09", "/var/run/docker.sock", (1, 39)), str(server.server_address), soon())

    assert usage == {}
    assert server.paths == []


def test_read_containers_keeps_list_when_the_rest_hangs(server: Server) -> None:
    def answer(handler: Handler) -> None:
        (answer_recorded if handler.path.startswith("/containers/json") else answer_never)(handler)

    server.answer = answer
    started = time.monotonic()

    seen = read_containers(DOCKER, str(server.server_address), soon(0.5), {}, 2)

    assert len(seen.items) == 4
    assert {item["restarts"] for item in seen.items} == {None}
    assert any("timed out" in message for message in seen.errors)
    assert time.monotonic() - started < 2.0


def test_read_containers_caps_their_number(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "_MAX_CONTAINERS", 1)

    seen = read_containers(DOCKER, str(server.server_address), soon(), {}, 2)

    assert len(seen.items) == 1
    assert seen.errors == ["3 containers left out, 1 are listed"]


def test_read_containers_skips_hostile_ids(server: Server) -> None:
    rows = [{"Id": "../../version"}, {"Id": "a b"}, {"Id": None}, "no row"]
    server.answer = lambda handler: handler.send(json.dumps(rows).encode())

    seen = read_containers(DOCKER, str(server.server_address), soon(), {}, 2)

    assert [item["id"] for item in seen.items] in ([], ["None"])


@pytest.mark.parametrize("answer", [None, [], {}, {"Components": 3, "ApiVersion": 7}, "x"], ids=repr)
def test_parse_version_survives_any_shape(answer: object) -> None:
    name, version, api_version = parse_version(answer)

    assert (name, version, api_version) == ("docker", None, (0, 0))


def test_parse_usage_leaves_file_cache_out() -> None:
    stats = {
        "cpu_stats": {"cpu_usage": {"total_usage": 7}},
        "memory_stats": {"usage": 100, "stats": {"inactive_file": 30}},
    }

    usage = parse_usage(stats, 1.0)

    assert (usage.cpu_nanoseconds, usage.memory_bytes, usage.memory_limit_bytes) == (7, 70, None)


def test_parse_usage_compares_by_itself_on_old_engines() -> None:
    stats = {
        "cpu_stats": {"cpu_usage": {"total_usage": 150}, "system_cpu_usage": 2000},
        "precpu_stats": {"cpu_usage": {"total_usage": 100}, "system_cpu_usage": 1000},
    }

    usage = parse_usage(stats, 1.0)

    assert usage.own_percent == 5.0


def test_build_item_shares_the_whole_machine() -> None:
    before = ContainerUsage(10.0, 1_000_000_000, None, None)
    after = ContainerUsage(12.0, 2_000_000_000, 4096, 8192)

    item = build_item({"Id": "a" * 64, "Names": ["/app"], "State": "running"}, None, after, before, 4)

    assert item["cpu_percent"] == 12.5
    assert item["id"] == "a" * 12


@pytest.mark.parametrize(
    ("started_at", "expected"),
    [
        pytest.param("2026-11-22T17:00:00.123456789Z", "2026-11-22T17:00:00Z", id="docker"),
        pytest.param("2026-11-22T18:00:00.5+01:00", "2026-11-22T17:00:00Z", id="podman"),
        pytest.param("0001-01-01T00:00:00Z", None, id="never"),
        pytest.param("yesterday", None, id="garbage"),
    ],
)
def test_build_item_writes_start_in_utc(started_at: str, expected: str | None) -> None:
    item = build_item({"Id": "a"}, {"State": {"StartedAt": started_at}}, None, None, 1)

    assert item["started_at"] == expected


def test_build_item_reads_status_without_inspection() -> None:
    item = build_item({"Id": "a", "Status": "Up 5 seconds (unhealthy)"}, None, None, None, 1)

    assert item["health"] == "unhealthy"
