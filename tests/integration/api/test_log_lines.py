# SPDX-License-Identifier: GPL-3.0-or-later
"""What a running service writes of requests and jobs, and that it never writes a secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running_service import RunningService
from sqlalchemy import make_url

PASSWORD = "hunter2-hunter2"


def lines_of(service: RunningService) -> list[dict[str, Any]]:
    return [json.loads(line) for line in service.log.splitlines() if line.startswith("{")]


def requests_of(service: RunningService) -> list[tuple[Any, ...]]:
    return [
        (line["level"], line["method"], line["path"], line["status"], line["actor"])
        for line in lines_of(service)
        if line["event"] == "request"
    ]


def test_requests_stand_in_the_log_by_what_they_did(own_service: RunningService) -> None:
    own_service.environment["NODE_MANAGER_LOGGING__FORMAT"] = "json"
    own_service.start()
    with own_service.client() as api, own_service.client(token="nm_" + "x" * 40) as stranger:
        api.get("/nodes")
        api.get("/healthz")
        body = {"node_id": "gw-1", "address": "127.0.9.7"}
        given = api.post("/nodes", params={"look": "false"}, json=body, headers={"X-Request-ID": "mine-1"})
        api.get("/nodes/gw-2")
        stranger.delete("/nodes/gw-1")
    own_service.stop()  # a line is written after its answer: the last one may still be missing

    admin = "admin (first start)"
    assert given.headers["x-request-id"] == "mine-1"
    assert requests_of(own_service) == [
        ("info", "POST", "/nodes", 201, admin),
        ("info", "GET", "/nodes/gw-2", 404, admin),
        ("warning", "DELETE", "/nodes/gw-1", 401, None),
    ]
    told = [line for line in lines_of(own_service) if line["event"] == "request"]
    assert told[0]["request_id"] == "mine-1"
    assert all(line["request_id"] and line["client"] == "127.0.0.1" for line in told)
    assert all(0 <= line["duration_seconds"] < 60 for line in told)


def test_lines_of_a_job_name_it(own_service: RunningService) -> None:
    own_service.command = (str(Path(__file__).with_name("service_without_ansible.py")),)
    own_service.environment["NODE_MANAGER_LOGGING__FORMAT"] = "json"
    own_service.start()
    with own_service.client() as api:
        for number in range(7):
            body = {"node_id": f"gw-{number}", "address": "127.0.9.7"}
            api.post("/nodes", params={"look": "false"}, json=body)
        node_ids = [f"gw-{number}" for number in range(7)]
        job = api.post("/jobs", params={"wait": 30}, json={"action": "check", "node_ids": node_ids}).json()

    own_service.stop()
    told = [line for line in lines_of(own_service) if line.get("job_id") == job["job_id"]]
    assert [line["event"] for line in told][:1] == ["job started"]
    assert {tuple(line["node_ids"]) for line in told} == {tuple(node_ids[:5])}


@pytest.mark.postgresql
@pytest.mark.parametrize("form", ["json", "console"])
def test_log_of_a_real_run_holds_no_secret(own_service: RunningService, postgresql_database: str, form: str) -> None:
    url = make_url(postgresql_database).set(password=PASSWORD).render_as_string(hide_password=False)
    own_service.environment |= {
        "NODE_MANAGER_STORAGE__URL": url,
        "NODE_MANAGER_LOGGING__LEVEL": "debug",
        "NODE_MANAGER_LOGGING__FORMAT": form,
    }
    own_service.start()
    with own_service.client() as api:
        api.get("/nodes")
        api.post("/nodes", params={"look": "false", "token": PASSWORD}, json={"node_id": PASSWORD, "address": "x y"})
        api.get("/nodes", headers={"Authorization": f"Bearer nm_{PASSWORD}-and-more"})
        api.get(f"/nodes/{PASSWORD}")

    own_service.stop()

    assert PASSWORD in url
    assert "request" in own_service.log
    assert PASSWORD not in own_service.log
    assert own_service.token not in own_service.log


def test_service_that_can_not_start_tells_no_password(own_service: RunningService, tmp_path: Path) -> None:
    own_service.environment["NODE_MANAGER_STORAGE__URL"] = f"postgresql+psycopg://nodes:{PASSWORD}@127.0.0.1:1/nodes"

    with pytest.raises(RuntimeError) as caught:
        own_service.start()

    assert PASSWORD not in str(caught.value)
