# SPDX-License-Identifier: GPL-3.0-or-later
"""A service that has done a bit of everything, so that its metrics have all their series."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from job_parts import wait_until
from observed import observation
from running_service import RunningService, free_port

# A runner that looks at nothing: made-up addresses must not be tried for real.
COMMAND = (str(Path(__file__).parent / "integration" / "api" / "service_without_ansible.py"),)
NODES = ("gw-1", "gw-2", "gw-3")
LOST = "gw-3"
# More than health.failures_before_unreachable.
_ATTEMPTS = 5


def make_service(home: Path) -> RunningService:
    """Give a service, not started, for which Kafka is configured and never there."""
    return RunningService(
        home,
        {"NODE_MANAGER_KAFKA__BOOTSTRAP_SERVERS": f'["127.0.0.1:{free_port()}"]'},
        COMMAND,
    )


def exercise(api: httpx.Client) -> None:
    """Register nodes, of which one is unreachable in the end, reserve on one, place a deployment, and run a job."""
    for number, node_id in enumerate(NODES):
        body = {
            "node_id": node_id,
            "address": f"127.0.9.{number + 1}",
            "location": {"region": "eu", "zone": "eu-1a", "site": "plant-2"},
            "labels": {"line": "a", "team/x": "b"},
            "capacity": {"cpu_millicores": 4000, "memory_mib": 4096},
        }
        _post(api, "/nodes?look=false", body, 201)
    see(api, *NODES, ago_seconds=3600)
    see(api, *(node_id for node_id in NODES if node_id != LOST))
    lose(api, LOST)
    ask = {"cpu_millicores": 100, "memory_mib": 16}
    _post(api, "/nodes/gw-1/allocate", {"allocation_id": "a-1", "owner": "shop", "resources": ask}, 201)
    request = {"deployment_id": "web-1", "owner": "shop", "replicas": 1, "resources": ask}
    _post(api, "/deployment/node-selection", request, 201)
    job = _post(api, "/jobs", {"action": "check", "node_ids": ["gw-1"]}, 202)
    wait_until(lambda: api.get(f"/jobs/{job['job_id']}").json()["state"] == "succeeded")


def see(api: httpx.Client, *node_ids: str, ago_seconds: float = 0) -> None:
    """Tell that nodes are well."""
    at = _ago(ago_seconds)
    report = {"checks": []}
    seen = [observation(node_id, "facts", at) for node_id in node_ids]
    seen += [observation(node_id, "sample", at) for node_id in node_ids]
    seen += [observation(node_id, "report", at, **report) for node_id in node_ids]
    _post(api, "/observations", {"observations": seen}, 200)


def lose(api: httpx.Client, node_id: str) -> None:
    """Tell that a node that was seen long ago doesn't answer, whoever tries."""
    failed = {"reached": False, "reason": "TimedOut", "message": "no answer"}
    told = {"node_id": node_id, "source": "test", "kind": "contact", "data": failed}
    attempts = [{**told, "observed_at": _ago(_ATTEMPTS - number)} for number in range(_ATTEMPTS)]
    _post(api, "/observations", {"observations": attempts}, 200)
    assert api.get(f"/nodes/{node_id}").json()["health"] == "unreachable"


def _ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def _post(api: httpx.Client, path: str, body: dict[str, object], status: int) -> dict[str, str]:
    answer = api.post(path, json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, str] = answer.json()
    return found
