# SPDX-License-Identifier: GPL-3.0-or-later
"""nodectl events: from the store of this machine, and from a service over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from node_manager import client
from node_manager.event_history import EventFilter
from running_service import RunningService

WAIT_SECONDS = 60


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    """Run a service with three registered nodes."""
    running = RunningService(tmp_path / "home").start()
    with running.client() as api:
        for number in range(3):
            register(api, f"gw-{number}")
    yield running
    running.kill()


def register(api: httpx.Client, node_id: str) -> None:
    answer = api.post("/nodes", params={"look": "false"}, json={"node_id": node_id, "address": "127.0.9.7"})
    assert answer.status_code == 201, answer.text


def nodectl(service: RunningService, *arguments: str, url: str | None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "node_manager", "events", *arguments],
        env=service.variables() | ({"NODE_MANAGER_URL": url} if url else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(params=["local", "http"])
def url(request: pytest.FixtureRequest, service: RunningService) -> str | None:
    """Give both ways to a manager."""
    return service.url if request.param == "http" else None


def test_events_shows_what_happened(service: RunningService, url: str | None) -> None:
    with nodectl(service, url=url) as shown, nodectl(service, "-o", "json", "--node", "gw-1", url=url) as one:
        lines = shown.communicate(timeout=WAIT_SECONDS)[0].splitlines()
        found = [json.loads(line) for line in one.communicate(timeout=WAIT_SECONDS)[0].splitlines()]

    assert [line.split()[1:4] for line in lines] == [
        [str(number + 1), "node.lifecycle.registered", f"gw-{number}"] for number in range(3)
    ]
    assert [(event["type"], event["subject"]) for event in found] == [("node.lifecycle.registered", "gw-1")]


def test_events_follows_what_happens(service: RunningService, url: str | None) -> None:
    with nodectl(service, "--follow", "--after", "2", "-o", "json", url=url) as following:
        assert following.stdout is not None
        first = json.loads(following.stdout.readline())
        with service.client() as api:
            register(api, "gw-9")
        second = json.loads(following.stdout.readline())
        following.kill()
        following.communicate(timeout=WAIT_SECONDS)

    assert [first["subject"], second["subject"]] == ["gw-2", "gw-9"]


def test_events_goes_on_when_the_service_comes_back(service: RunningService) -> None:
    with nodectl(service, "-f", "--after", "0", "-o", "json", url=service.url) as following:
        assert following.stdout is not None
        found: list[Any] = [json.loads(following.stdout.readline()) for _ in range(3)]
        service.stop()
        service.start()
        with service.client() as api:
            register(api, "gw-9")
        found.append(json.loads(following.stdout.readline()))
        following.kill()
        noted = following.communicate(timeout=WAIT_SECONDS)[1]

    assert [event["subject"] for event in found] == ["gw-0", "gw-1", "gw-2", "gw-9"]
    assert "bye: the manager stops" in noted


def test_events_of_a_revoked_token_ends_with_the_reason(service: RunningService) -> None:
    with nodectl(service, url=service.url) as refused:
        refused.communicate(timeout=WAIT_SECONDS)
    service.environment["NODE_MANAGER_TOKEN"] = "nm_wrong"

    with nodectl(service, "--follow", url=service.url) as refused:
        errors = refused.communicate(timeout=WAIT_SECONDS)[1]

    assert (refused.returncode, "unauthenticated" in errors) == (1, True)


def test_events_without_a_service_says_so(service: RunningService) -> None:
    with nodectl(service, url="http://127.0.0.1:1") as refused:
        errors = refused.communicate(timeout=WAIT_SECONDS)[1]

    assert (refused.returncode, "127.0.0.1:1" in errors) == (3, True)


class Flaky(ThreadingHTTPServer):
    """Answers GET /events with one script after the other, cutting each off at its end; None keeps still for a while."""

    daemon_threads = True

    def __init__(self, *scripts: list[str | None]) -> None:
        super().__init__(("127.0.0.1", 0), _FlakyHandler)
        self.scripts = list(scripts)
        self.asked_from: list[str | None] = []


class _FlakyHandler(BaseHTTPRequestHandler):
    server: Flaky

    def do_GET(self) -> None:
        self.server.asked_from.append(self.headers.get("Last-Event-ID"))
        self.send_response(200)
        # Longer than what follows: it can't end well.
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for block in self.server.scripts.pop(0):
            if block is None:
                threading.Event().wait(0.6)
            else:
                self.wfile.write(f"{block}\n\n".encode())
                self.wfile.flush()

    def log_message(self, *_arguments: object) -> None:
        """Keep quiet."""


@contextmanager
def followed(*scripts: list[str | None]) -> Iterator[tuple[Flaky, Iterator[dict[str, Any]]]]:
    """Follow such a server from now on."""
    with Flaky(*scripts) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with closing(client.HttpManager(f"http://127.0.0.1:{server.server_port}", None)) as manager:
            yield server, manager.events(EventFilter(), None, lambda _: None, follow=True)
        server.shutdown()
        thread.join()


EVENT = 'event: x\ndata: {"id": "e"}\nid: 50'


def test_events_goes_on_where_a_quiet_stream_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(client, "_QUIET_SECONDS", 0.3)
    with followed(
        [": connected\nid: 41\nretry: 2000"],
        [": connected\nid: 41", ": keepalive\nid: 47"],
        # Longer than the follower waits for a keepalive.
        [": connected\nid: 48", None],
        [EVENT],
    ) as (server, events):
        found = next(events)

    assert found == {"id": "e"}
    assert server.asked_from == [None, "41", "47", "48"]


def test_events_outlives_any_number_of_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(client, "_RECONNECT_SECONDS", 0.2)
    cut: list[str | None] = [": connected\nid: 41"]
    with followed(*[cut] * 60, [EVENT]) as (server, events):
        assert next(events) == {"id": "e"}

    assert len(server.asked_from) == 61
