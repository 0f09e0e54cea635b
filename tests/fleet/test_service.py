# SPDX-License-Identifier: GPL-3.0-or-later
"""The running service on real nodes: registered over HTTP, broken in different ways, told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from running_service import RunningService

from fleet.conftest import RunningFleet
from fleet.image import DATA_DIRECTORY, SERVICE, USER
from fleet.nodes import Node

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
# What a busy test machine says of its own load is not what these tests are about.
CONFIG = {
    "thresholds": {"disk_percent": {"warning": 85, "critical": 95}},
    "node_types_file": "node_types.json",
}
NODE_TYPES = {
    "node_types": {
        "demo": {
            "description": "A node of the test fleet",
            "checks": [
                {"name": "demo-app", "kind": "service", "unit": SERVICE, "severity": "critical"},
                {"name": "data", "kind": "filesystem", "mount": DATA_DIRECTORY, "severity": "critical"},
            ],
        }
    }
}


@pytest.fixture
def service(running_fleet: RunningFleet, tmp_path: Path) -> Iterator[RunningService]:
    """Run a service that can log in to the fleet and checks its demo service and data disk."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    (tmp_path / "node_types.json").write_text(json.dumps(NODE_TYPES), "utf-8")
    key = str(running_fleet.fleet.nodes[0].private_key)
    running = RunningService(
        tmp_path / "home",
        {
            "NODE_MANAGER_CONFIG": str(tmp_path / "config.json"),
            "NODE_MANAGER_SSH__CREDENTIALS": json.dumps({"fleet": {"private_key_file": key, "user": USER}}),
        },
    ).start()
    yield running
    running.kill()


def declaration(node: Node, **more: object) -> dict[str, object]:
    """Declare a node of the fleet, with nothing pinned."""
    connection = {"credential": "fleet", "become": True, "port": node.port}
    return {"node_id": node.node_id, "address": node.address, "node_type": "demo", "connection": connection, **more}


def register(service: RunningService, node: Node, **more: object) -> dict[str, Any]:
    """Register a node and wait until it has been looked at."""
    with service.client(timeout=120) as api:
        answer = api.post("/nodes", params={"wait": 60}, json=declaration(node, **more))
    assert answer.status_code == 201, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def check(service: RunningService, node_id: str) -> dict[str, Any]:
    """Run the health checks of a node and give the verdict."""
    with service.client(timeout=120) as api:
        answer = api.post(f"/nodes/{node_id}/health/check", params={"wait": 60})
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def broken(health: dict[str, Any]) -> list[tuple[str, str]]:
    """Give the conditions that don't hold, with their reasons."""
    return [(item["type"], item["reason"]) for item in health["conditions"] if not item["status"]]


def failed(health: dict[str, Any]) -> list[str]:
    """Give the names of the failed checks."""
    return [item["name"] for item in health["report"]["checks"] if item["state"] == "failed"]


def test_five_nodes_register_and_their_faults_show_distinctly(
    service: RunningService, running_fleet: RunningFleet
) -> None:
    nodes = running_fleet.fleet.up(5, image=running_fleet.image)
    stopped, without_service, full, *_sound = nodes
    try:
        with ThreadPoolExecutor(5) as pool:
            registered = list(pool.map(lambda node: register(service, node), nodes))
        stopped.stop()
        without_service.stop_service()
        full.fill_disk()

        with ThreadPoolExecutor(5) as pool:
            by_api = dict(zip(nodes, pool.map(lambda node: check(service, node.node_id), nodes), strict=True))
        service.stop()
        by_hand = run_check_by_hand(service)

        assert [(node["health"], node["facts"]["os"]["id"]) for node in registered] == [("healthy", "debian")] * 5
        assert by_api[stopped]["health"] == "suspect"
        assert broken(by_api[stopped]) == [("Reachable", "ConnectionRefused")]
        assert failed(by_api[without_service]) == ["demo-app"]
        assert failed(by_api[full]) == ["data", f"disk_percent {DATA_DIRECTORY}"]
        assert [by_api[node]["health"] for node in _sound] == ["healthy", "healthy"]
        assert by_hand == {node.node_id: shown["health"] for node, shown in by_api.items()}
    finally:
        for node in (stopped, without_service, full):
            running_fleet.fleet.replace(node, image=running_fleet.image)


def run_check_by_hand(service: RunningService) -> dict[str, str]:
    """Run playbooks/check.yml with the service stopped; give what the registry says afterwards."""
    bin_directory = Path(sys.executable).parent
    before = [node["last_contact_at"] for node in nodectl_nodes(service)]
    subprocess.run(
        [str(bin_directory / "ansible-playbook"), "playbooks/check.yml"],
        cwd=ROOT,
        env={**service.variables(), "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        timeout=120,
        check=False,
    )
    after = nodectl_nodes(service)
    assert [node["last_contact_at"] for node in after] != before
    return {node["node_id"]: node["health"] for node in after}


def nodectl_nodes(service: RunningService) -> list[dict[str, Any]]:
    """List the nodes with nodectl, which reads the store itself."""
    done = subprocess.run(
        [sys.executable, "-m", "node_manager", "nodes", "-o", "json"],
        env=service.variables(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    listed: list[dict[str, Any]] = json.loads(done.stdout)
    return listed


def test_fifty_callers_share_one_run(service: RunningService, running_fleet: RunningFleet) -> None:
    node = running_fleet.fleet.nodes[0]
    register(service, node)

    with ThreadPoolExecutor(50) as pool:
        verdicts = list(pool.map(lambda _: check(service, node.node_id)["health"], range(50)))

    with service.client() as api:
        jobs = api.get("/jobs", params={"node_id": node.node_id, "action": "check"}).json()["items"]
    assert verdicts == ["healthy"] * 50
    assert len(jobs) == 1


def test_changed_host_key_quarantines_until_an_operator_forgets_it(service: RunningService, node: Node) -> None:
    pinned = register(service, node)["host_keys"]
    node.regenerate_host_key()

    changed = check(service, node.node_id)
    with service.client() as api:
        api.delete(f"/nodes/{node.node_id}/host-keys")
    trusted = check(service, node.node_id)

    assert [key["origin"] for key in pinned] == ["first_use"]
    assert (changed["health"], changed["quarantined"]) == ("degraded", True)
    assert broken(changed) == [("HostKeyTrusted", "HostKeyChanged")]
    assert (trusted["health"], trusted["quarantined"]) == ("healthy", False)


def test_wrong_given_host_key_is_refused_from_the_start(service: RunningService, node: Node) -> None:
    other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHIXi1cvJQWGXaKJE4UzY6jVWkFH9Hf2Gk3k4z4s4w5Z"

    shown = register(service, node, host_keys=[other])

    assert broken(shown) == [("HostKeyTrusted", "HostKeyChanged")]
    assert shown["facts"] is None


def test_node_without_python_has_a_condition_of_its_own(service: RunningService, node: Node) -> None:
    register(service, node)
    node.remove_python()

    shown = check(service, node.node_id)

    assert broken(shown) == [("PythonAvailable", "PythonMissing")]
    assert shown["status"] == "online"


def test_wrong_key_has_a_condition_of_its_own(service: RunningService, node: Node) -> None:
    register(service, node)
    node.authorize("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHIXi1cvJQWGXaKJE4UzY6jVWkFH9Hf2Gk3k4z4s4w5Z")

    shown = check(service, node.node_id)

    assert broken(shown) == [("Authenticated", "AuthenticationFailed")]
    assert shown["status"] == "online"


def test_hung_node_is_given_up_within_its_time(service: RunningService, node: Node) -> None:
    register(service, node)
    node.pause()
    try:
        shown = check(service, node.node_id)
    finally:
        node.unpause()

    assert broken(shown) == [("Reachable", "TimedOut")]
