# SPDX-License-Identifier: GPL-3.0-or-later
"""How the manager tells over HTTP what it watches, and what trouble it has."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import httpx
from job_parts import wait_until
from running_service import RunningService

NOTHING = {"watching": False, "states": {}, "left_to_ansible": [], "faults": [], "observations_given_up": 0}


def test_monitoring_of_a_manager_that_does_not_watch_is_empty(api: httpx.Client) -> None:
    answer = api.get("/monitoring")

    assert (answer.status_code, answer.json()) == (200, NOTHING)


def test_monitoring_needs_a_token(service: RunningService) -> None:
    answer = httpx.get(f"{service.url}/monitoring", timeout=30)

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")


def test_monitoring_tells_how_nodes_are_watched_and_who_is_not(tmp_path: Path) -> None:
    variables = {
        "NODE_MANAGER_MONITORING__SCHEDULED": "true",
        "NODE_MANAGER_MONITORING__GATHER_INTERVAL_SECONDS": "3600",
        "NODE_MANAGER_SSH__CREDENTIALS": '{"gone": {"private_key_file": "no-such-key"}}',
        "NODE_MANAGER_SSH__DEFAULT_CREDENTIAL": "gone",
    }
    service = RunningService(tmp_path / "home", variables, ("-m", "node_manager", "serve", "--local")).start()
    try:
        with service.client() as api:
            body = {"node_id": "gw-1", "address": "127.0.9.7", "admin": "maintenance"}
            assert api.post("/nodes", params={"look": "false"}, json=body).status_code == 201
            expected = {"left_to_ansible": 1, "streaming": 1}
            wait_until(lambda: api.get("/monitoring").json()["states"] == expected)
            shown = api.get("/monitoring").json()
    finally:
        service.kill()

    (left,) = shown["left_to_ansible"]
    fault = shown["faults"][0]
    assert (shown["watching"], left["node_id"], shown["observations_given_up"]) == (True, "gw-1", 0)
    assert ("no-such-key" in left["reason"], fault["message"]) == (True, left["reason"])
    assert (fault["count"] >= 1, datetime.fromisoformat(fault["last_at"]).tzinfo is not None) == (True, True)
