# SPDX-License-Identifier: GPL-3.0-or-later
"""Drain and maintenance over HTTP, with the service doing by itself what follows; also killed in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from builders import make_container, make_containers, make_report, make_sample
from job_parts import wait_until
from running_service import RunningService

ALLOCATION_LABEL = "iot-platform.allocation-id"
CAPACITY = {"cpu_millicores": 1000, "memory_mib": 100}
RUNNER = (str(Path(__file__).with_name("service_without_ansible.py")),)


@pytest.fixture
def service(own_service: RunningService) -> RunningService:
    """Run a service whose jobs look at nothing, so that only what a test tells was seen."""
    own_service.command = RUNNER
    return own_service.start()


@pytest.fixture
def api(service: RunningService) -> Iterator[httpx.Client]:
    with service.client() as client:
        for node_id in ("gw-1", "gw-2"):
            body = {"node_id": node_id, "address": "127.0.9.7", "capacity": CAPACITY}
            client.post("/nodes", params={"look": "false"}, json=body)
            see(client, node_id)
        yield client


def see(api: httpx.Client, node_id: str, *containers: str, checks: tuple[tuple[str, str], ...] = ()) -> None:
    """Tell what runs on a node now, and how its checks ended."""
    items = [make_container(name, labels={ALLOCATION_LABEL: name}) for name in containers]
    seen = {"sample": make_sample(containers=make_containers(*items)), "report": make_report(*checks)}
    at = datetime.now(UTC).isoformat()
    batch = [
        {"node_id": node_id, "observed_at": at, "source": "ansible", "kind": kind, "data": data}
        for kind, data in seen.items()
    ]
    answer = api.post("/observations", json={"observations": batch})
    assert answer.json()["rejected"] == [], answer.text


def put(api: httpx.Client, node_id: str, status: str, **more: Any) -> httpx.Response:
    return api.put(f"/nodes/{node_id}/status", json={"status": status, **more})


def shown(api: httpx.Client, node_id: str = "gw-1") -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/nodes/{node_id}").json()
    return found


def becomes(api: httpx.Client, admin: str, node_id: str = "gw-1") -> None:
    """Wait until the service has brought the node so far."""
    wait_until(lambda: shown(api, node_id)["admin"] == admin)


def allocate(api: httpx.Client, node_id: str = "gw-1", allocation_id: str = "a1") -> None:
    body = {"allocation_id": allocation_id, "owner": "shop", "deployment_id": "web", "resources": {"memory_mib": 10}}
    answer = api.post(f"/nodes/{node_id}/allocate", json=body)
    assert answer.status_code == 201, answer.text


def release(api: httpx.Client, node_id: str = "gw-1", allocation_id: str = "a1") -> None:
    assert api.post(f"/nodes/{node_id}/deallocate", json={"allocation_id": allocation_id}).json()["released"]


def events(api: httpx.Client, kind: str) -> list[dict[str, Any]]:
    items = api.get("/nodes/gw-1/events").json()["items"]
    return [item["data"] for item in reversed(items) if item["type"] == f"node.lifecycle.{kind}"]


def drain_with_a_stubborn_workload(api: httpx.Client) -> None:
    allocate(api)
    see(api, "gw-1", "a1")
    answer = put(api, "gw-1", "maintenance", drain=True, reason="new disk")
    assert (answer.status_code, answer.json()["admin"]) == (200, "draining")


def test_drain_names_its_blockers_with_owner_time_and_proposal_until_they_are_gone(api: httpx.Client) -> None:
    drain_with_a_stubborn_workload(api)

    found = shown(api)["maintenance"]
    release(api)
    see(api, "gw-1", "a1")
    # Told once the service knows that the allocation is gone; what was seen before that proves nothing.
    wait_until(lambda: events(api, "drain_progressed"))
    left = shown(api)["maintenance"]["blockers"]
    see(api, "gw-1")
    becomes(api, "maintenance")

    assert [(item["kind"], item["owner"], item["deployment_id"]) for item in found["blockers"]] == [
        ("allocation", "shop", "web"),
        ("workload", "shop", None),
    ]
    assert [item["kind"] for item in left] == ["workload"]
    assert [item["to_node"] for item in found["proposals"]] == ["gw-2"]
    (told,) = events(api, "drain_started")
    assert told["replacements"] == found["proposals"]
    assert events(api, "drain_ended")[0]["outcome"] == "drained"


def test_drain_with_a_stubborn_workload_ends_at_its_deadline(api: httpx.Client) -> None:
    allocate(api)
    put(api, "gw-1", "maintenance", drain=True, deadline_seconds=1)

    becomes(api, "maintenance")

    assert [item["allocation_id"] for item in shown(api)["maintenance"]["blockers"]] == ["a1"]
    assert events(api, "drain_ended")[0]["outcome"] == "deadline"
    assert [item["allocation_id"] for item in api.get("/nodes/gw-1/resources").json()["allocations"]] == ["a1"]


def test_drain_is_cancelled_half_way(api: httpx.Client) -> None:
    drain_with_a_stubborn_workload(api)

    answer = put(api, "gw-1", "active")

    assert (answer.json()["admin"], answer.json()["maintenance"]) == ("active", None)
    assert events(api, "drain_ended")[0]["outcome"] == "cancelled"


KILLS: dict[str, Callable[[httpx.Client], None]] = {
    "begun": lambda api: None,
    "released": release,
    "seen-empty-before": lambda api: see(api, "gw-1"),
}


@pytest.mark.parametrize("moment", KILLS)
def test_drain_goes_on_after_the_manager_was_killed(service: RunningService, api: httpx.Client, moment: str) -> None:
    drain_with_a_stubborn_workload(api)
    KILLS[moment](api)

    service.kill()
    service.start()

    still = shown(api)
    if moment != "released":
        release(api)
    wait_until(lambda: events(api, "drain_progressed"))
    see(api, "gw-1")
    becomes(api, "maintenance")
    assert still["admin"] == "draining"
    assert still["maintenance"]["reason"] == "new disk"
    assert [len(events(api, kind)) for kind in ("drain_started", "drain_ended")] == [1, 1]


def test_leaving_goes_on_after_the_manager_was_killed(service: RunningService, api: httpx.Client) -> None:
    put(api, "gw-1", "maintenance")
    put(api, "gw-1", "active")

    service.kill()
    service.start()

    still = shown(api)
    see(api, "gw-1")
    becomes(api, "active")
    assert (still["admin"], still["maintenance"]["phase"]) == ("maintenance", "leaving")


def test_leaving_asks_for_a_check_and_is_refused_by_one_that_fails(api: httpx.Client) -> None:
    put(api, "gw-1", "maintenance")

    answer = put(api, "gw-1", "active")
    see(api, "gw-1", checks=(("critical", "failed"),))
    wait_until(lambda: shown(api)["maintenance"]["message"])

    assert answer.json()["maintenance"]["phase"] == "leaving"
    assert [job["action"] for job in api.get("/jobs", params={"node_id": "gw-1"}).json()["items"]][-1] == "check"
    stays = shown(api)
    assert (stays["admin"], stays["maintenance"]["phase"]) == ("maintenance", "maintenance")
    assert "check-0: it failed" in stays["maintenance"]["message"]


def test_until_ends_maintenance_by_itself(api: httpx.Client) -> None:
    until = datetime.now(UTC) + timedelta(seconds=1)
    put(api, "gw-1", "maintenance", until=until.isoformat())

    wait_until(lambda: shown(api)["maintenance"]["phase"] == "leaving")
    see(api, "gw-1")
    becomes(api, "active")

    assert "its time is over" in events(api, "admin_changed")[-1]["reason"]


def test_two_operators_at_once_one_holds_the_other_is_told(service: RunningService, api: httpx.Client) -> None:
    def token(name: str) -> str:
        command = [sys.executable, "-m", "node_manager", "token", "create", name, "--role", "operator", "-o", "json"]
        made = subprocess.run(
            command, env=service.variables(), capture_output=True, text=True, timeout=60, check=True
        ).stdout
        return str(json.loads(made)["token"])

    tokens = [token("anna"), token("ben")]

    def ask(mine: str) -> httpx.Response:
        with service.client(mine) as client:
            return put(client, "gw-1", "maintenance", reason="mine")

    with ThreadPoolExecutor(2) as pool:
        answers = sorted(pool.map(ask, tokens), key=lambda answer: answer.status_code)

    assert [answer.status_code for answer in answers] == [200, 409]
    holder = answers[0].json()["maintenance"]["requested_by"]
    refused = answers[1].json()
    assert (refused["code"], refused["requested_by"]) == ("conflict", holder)
    assert refused["started_at"][:10] in refused["detail"]


def test_if_match_of_an_older_node_answers_412(api: httpx.Client) -> None:
    answer = api.put("/nodes/gw-1/status", json={"status": "maintenance", "drain": True}, headers={"If-Match": '"9"'})

    assert (answer.status_code, answer.json()["code"]) == (412, "stale_generation")


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "drain-with-active": ({"status": "active", "drain": True}, "drain", "cancels a drain"),
    "deadline-without-drain": ({"status": "maintenance", "deadline_seconds": 60}, "deadline_seconds", "drain: true"),
    "deadline-zero": ({"status": "maintenance", "drain": True, "deadline_seconds": 0}, "deadline_seconds", "greater"),
    "deadline-text": ({"status": "maintenance", "drain": True, "deadline_seconds": "5"}, "deadline_seconds", "valid"),
    "deadline-true": ({"status": "maintenance", "drain": True, "deadline_seconds": True}, "deadline_seconds", "valid"),
    "until-past": ({"status": "maintenance", "until": "2020-01-01T00:00:00Z"}, "until", "in the past"),
    "until-number": ({"status": "maintenance", "until": 4e9}, "until", "RFC 3339"),
    "until-naive": ({"status": "maintenance", "until": "2099-01-01T00:00:00"}, "until", "timezone"),
    "until-with-cordoned": ({"status": "cordoned", "until": "2099-01-01T00:00:00Z"}, "until", "status maintenance"),
    "force-with-cordoned": ({"status": "cordoned", "force": True}, "force", "active"),
    "drain-zero": ({"status": "maintenance", "drain": 0}, "drain", "boolean"),
    "draining": ({"status": "draining"}, "status", "expected one of"),
    "unknown": ({"status": "maintenance", "drian": True}, "drian", "unknown key"),
}


def test_bad_input_answers_422_saying_what_to_do(api: httpx.Client) -> None:
    for name, (body, field, told) in BAD.items():
        answer = api.put("/nodes/gw-1/status", json=body)

        assert answer.status_code == 422, (name, answer.text)
        (error,) = answer.json()["errors"]
        assert (error["field"].split(".")[0], told in error["message"]) == (field, True), (name, error)
    assert shown(api)["generation"] == 1
