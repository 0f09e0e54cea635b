# SPDX-License-Identifier: GPL-3.0-or-later
"""The running service on real nodes: registered over HTTP, broken in different ways, told apart."""

from __future__ import annotations

import json
import os
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


def test_another_controller_checks_over_http_with_a_token(
    service: RunningService, running_fleet: RunningFleet, tmp_path: Path
) -> None:
    node = running_fleet.fleet.nodes[0]
    before = register(service, node)["last_contact_at"]
    made = nodectl(service.variables(), "token", "create", "awx", "--role", "operator", "-o", "json")
    elsewhere = {
        **{key: value for key, value in os.environ.items() if not key.startswith("NODE_MANAGER_")},
        "NODE_MANAGER_HOME": str(tmp_path / "elsewhere"),
        "NODE_MANAGER_URL": service.url,
        "NODE_MANAGER_TOKEN": json.loads(made)["token"],
    }

    done = run_playbook("check.yml", elsewhere)

    assert done.returncode == 0, done.stdout
    assert nodectl_nodes(elsewhere)[0]["last_contact_at"] > before
    assert not (tmp_path / "elsewhere" / "node-manager.db").exists()


def run_playbook(name: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one of our playbooks, as an operator does in a checkout."""
    return subprocess.run(
        [str(Path(sys.executable).parent / "ansible-playbook"), f"playbooks/{name}"],
        cwd=ROOT,
        env={**variables, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_check_by_hand(service: RunningService) -> dict[str, str]:
    """Run playbooks/check.yml with the service stopped; give what the registry says afterwards."""
    before = [node["last_contact_at"] for node in nodectl_nodes(service.variables())]
    run_playbook("check.yml", service.variables())
    after = nodectl_nodes(service.variables())
    assert [node["last_contact_at"] for node in after] != before
    return {node["node_id"]: node["health"] for node in after}


def nodectl_nodes(variables: dict[str, str]) -> list[dict[str, Any]]:
    """List the nodes with nodectl, from the store itself or, where a URL is set, over HTTP."""
    listed: list[dict[str, Any]] = json.loads(nodectl(variables, "nodes", "-o", "json"))
    return listed


def nodectl(variables: dict[str, str], *arguments: str) -> str:
    """Run nodectl; give what it printed."""
    command = [sys.executable, "-m", "node_manager", *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=True).stdout


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
