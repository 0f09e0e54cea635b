# SPDX-License-Identifier: GPL-3.0-or-later
"""Tokens, roles and the audit, over HTTP."""

from __future__ import annotations

import json
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing

import httpx
import pytest
from builders import make_host_key
from observed import observation
from running_service import RunningService


def nodectl(service: RunningService, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run nodectl on the service's store."""
    return subprocess.run(
        [sys.executable, "-m", "node_manager", *arguments],
        env=service.variables(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def make_token(service: RunningService, role: str) -> dict[str, str]:
    """Make a token with nodectl, while the service runs."""
    made = nodectl(service, "token", "create", f"test {role}", "--role", role, "-o", "json")
    found: dict[str, str] = json.loads(made.stdout)
    return found


def test_admin_token_file_is_for_its_owner_only(service: RunningService) -> None:
    mode = (service.home / "admin.token").stat().st_mode

    assert stat.S_IMODE(mode) == 0o600


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer nm_wrong"},
        {"Authorization": "Basic eDp5"},
        {"Authorization": "Bearer " + "x" * 5000},
    ],
    ids=["none", "unknown", "basic", "long"],
)
@pytest.mark.parametrize("path", ["/nodes", "/nodes/local", "/jobs", "/inventory", "/node-types"])
def test_call_without_token_answers_401(service: RunningService, path: str, headers: dict[str, str]) -> None:
    answer = httpx.get(service.url + path, headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("role", "read", "write", "observe"),
    [("viewer", 200, 403, 403), ("agent", 403, 403, 200), ("operator", 200, 404, 200), ("admin", 200, 404, 200)],
)
def test_role_decides(service: RunningService, role: str, read: int, write: int, observe: int) -> None:
    token = make_token(service, role)["token"]
    batch = {
        "observations": [
            {"node_id": "nobody", "observed_at": "2026-01-01T00:00:00Z", "source": "agent", "kind": "facts", "data": {}}
        ]
    }

    with service.client(token) as client:
        statuses = (
            client.get("/nodes").status_code,
            client.delete("/nodes/nobody").status_code,
            client.post("/observations", json=batch).status_code,
        )

    assert statuses == (read, write, observe)


def test_agent_cannot_pin_a_host_key_for_a_node(service: RunningService, node_id: str) -> None:
    agent = make_token(service, "agent")["token"]
    facts = observation(node_id, "facts", "2026-01-01T00:00:00Z", ssh_host_keys=[make_host_key()])
    with service.client() as admin, service.client(agent) as other:
        admin.post("/nodes", params={"look": "false"}, json={"node_id": node_id, "address": "127.0.9.1"})

        outcome = other.post("/observations", json={"observations": [facts]}).json()

        shown = admin.get(f"/nodes/{node_id}").json()
    assert (outcome["recorded"], shown["host_keys"]) == (1, [])


def test_revoked_token_is_refused(own_service: RunningService) -> None:
    own_service.environment["NODE_MANAGER_AUTH__CACHE_SECONDS"] = "0.01"
    own_service.start()
    token = make_token(own_service, "viewer")

    with own_service.client(token["token"]) as client:
        before = client.get("/nodes").status_code
        nodectl(own_service, "token", "revoke", token["token_id"])
        after = client.get("/nodes").status_code

    assert (before, after) == (200, 401)


def test_writes_are_audited_with_actor_and_outcome(service: RunningService, node_id: str) -> None:
    viewer = make_token(service, "viewer")["token"]
    with service.client() as admin, service.client(viewer) as other:
        admin.post("/nodes", params={"look": "false"}, json={"node_id": node_id, "address": "127.0.9.1"})
        other.delete(f"/nodes/{node_id}", headers={"X-Request-ID": f"audit-{node_id}"})

    with closing(sqlite3.connect(service.home / "node-manager.db")) as store:
        rows = store.execute("SELECT actor, role, action, outcome, request_id FROM audit ORDER BY sequence").fetchall()

    assert ("test viewer", "viewer", f"DELETE /nodes/{node_id}", 403, f"audit-{node_id}") in rows
    assert ("admin (first start)", "admin", "POST /nodes", 201) in [row[:4] for row in rows]


def test_no_token_is_stored_or_logged(service: RunningService) -> None:
    token = make_token(service, "viewer")["token"]
    with service.client(token) as client:
        client.get("/nodes")

    stored = b"".join(path.read_bytes() for path in service.home.glob("node-manager.db*"))

    assert token.encode() not in stored
    assert token not in service.log


def test_a_caller_who_hangs_up_is_no_bug(own_service: RunningService) -> None:
    own_service.start()
    head = (
        f"POST /deployment/node-selection HTTP/1.1\r\nHost: manager\r\nAuthorization: Bearer {own_service.token}\r\n"
        "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    )

    with socket.create_connection(("127.0.0.1", own_service.port), timeout=10) as connection:
        connection.sendall(head.encode())

    outcomes: list[tuple[int]] = []
    deadline = time.monotonic() + 10
    with closing(sqlite3.connect(own_service.home / "node-manager.db")) as database:
        while not outcomes and time.monotonic() < deadline:
            outcomes = database.execute("SELECT outcome FROM audit WHERE action LIKE '%node-selection'").fetchall()
    assert outcomes == [(400,)]
    assert "unexpected error" not in own_service.log
