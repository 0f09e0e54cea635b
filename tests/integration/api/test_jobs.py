# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs over HTTP, with a runner that answers at once or, for a full queue, not at all."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fleet.waiting import wait_until
from running_service import RunningService


@pytest.fixture
def service_without_ansible(own_service: RunningService) -> RunningService:
    """Start a service whose jobs try no address."""
    own_service.command = (str(Path(__file__).with_name("service_without_ansible.py")),)
    return own_service


def register(api: httpx.Client, node_id: str) -> httpx.Response:
    """Register a node that is looked at."""
    return api.post("/nodes", json={"node_id": node_id, "address": "127.0.9.7"})


def test_register_points_at_its_job(service_without_ansible: RunningService) -> None:
    service_without_ansible.start()
    with service_without_ansible.client() as api:
        link = register(api, "gw-1").headers["link"]
        job = api.get(link[1 : link.index(">")]).json()

    assert link.endswith('; rel="monitor"')
    assert (job["action"], [node["node_id"] for node in job["nodes"]]) == ("register", ["gw-1"])


def test_register_holds_when_the_job_queue_is_full(service_without_ansible: RunningService) -> None:
    service_without_ansible.environment |= {
        "NODE_MANAGER_ANSIBLE__MAX_QUEUED_JOBS": "1",
        "NODE_MANAGER_TEST_HOLD_JOBS": "1",
    }
    service_without_ansible.start()
    with service_without_ansible.client() as api:
        answers = [register(api, f"gw-{number}") for number in range(8)]
        refused = api.post("/nodes/gw-7/health/check")
        listed = api.get("/nodes").json()["items"]

    assert {answer.status_code for answer in answers} == {201}
    assert "link" not in answers[-1].headers
    assert (refused.status_code, refused.json()["code"]) == (503, "job_queue_full")
    assert int(refused.headers["retry-after"]) > 0
    assert len(listed) == 8


def test_start_job_waits_for_its_result(service_without_ansible: RunningService) -> None:
    service_without_ansible.start()
    with service_without_ansible.client() as api:
        for number in (1, 2):
            api.post("/nodes", params={"look": "false"}, json={"node_id": f"gw-{number}", "address": "127.0.9.7"})
        answer = api.post("/jobs", params={"wait": 30}, json={"action": "check", "node_ids": ["gw-1", "gw-2"]})
        listed = api.get("/jobs", params={"node_id": "gw-2", "state": "succeeded"}).json()["items"]

    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert [node["result"] for node in answer.json()["nodes"]] == ["ok", "ok"]
    assert [job["job_id"] for job in listed] == [answer.json()["job_id"]]


def test_start_job_names_unknown_nodes(service_without_ansible: RunningService) -> None:
    service_without_ansible.start()
    with service_without_ansible.client() as api:
        answer = api.post("/jobs", json={"action": "check", "node_ids": ["nobody"]})

    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "node_ids")
    assert "nobody" in answer.json()["detail"]


def test_cancel_ends_a_running_job_and_may_be_repeated(service_without_ansible: RunningService) -> None:
    service_without_ansible.environment["NODE_MANAGER_TEST_HOLD_JOBS"] = "1"
    service_without_ansible.start()
    with service_without_ansible.client() as api:
        api.post("/nodes", params={"look": "false"}, json={"node_id": "gw-1", "address": "127.0.9.7"})
        job = api.post("/jobs", json={"action": "check", "node_ids": ["gw-1"]}).json()["job_id"]
        wait_until(
            lambda: api.get(f"/jobs/{job}").json()["state"] == "running", deadline_seconds=20, what="the job runs"
        )
        first = api.post(f"/jobs/{job}/cancel").status_code
        wait_until(lambda: api.get(f"/jobs/{job}").json()["ended_at"], deadline_seconds=20, what="the job ends")
        ended = api.get(f"/jobs/{job}").json()
        again = api.post(f"/jobs/{job}/cancel").status_code

    assert (first, again) == (200, 200)
    assert (ended["state"], [node["result"] for node in ended["nodes"]]) == ("cancelled", ["not_run"])


def test_cancel_of_a_job_that_ended_well_is_a_conflict(service_without_ansible: RunningService) -> None:
    service_without_ansible.start()
    with service_without_ansible.client() as api:
        api.post("/nodes", params={"look": "false"}, json={"node_id": "gw-1", "address": "127.0.9.7"})
        body = {"action": "check", "node_ids": ["gw-1"]}
        job = api.post("/jobs", params={"wait": 30}, json=body).json()["job_id"]

        answer = api.post(f"/jobs/{job}/cancel")

    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
