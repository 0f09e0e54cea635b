# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole way of a deployment's traffic: placed by the service, told by nodectl, shared by a real HAProxy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from builders import make_contact, make_facts, make_report, make_sample
from haproxy_process import HaproxyProcess, ServingNode, require_haproxy, serving_nodes
from running_service import RunningService

NODE_IDS = ["gw-1", "gw-2", "gw-3"]
REQUESTS = 300
TOLERANCE_POINTS = 2


@dataclass
class Site:
    """A running service, three nodes that serve, and HAProxy in front of them."""

    service: RunningService
    client: httpx.Client
    nodes: dict[str, ServingNode]
    haproxy: HaproxyProcess

    def see(self, node_id: str, kind: str, data: dict[str, Any]) -> None:
        """Hand in one observation."""
        item = {"node_id": node_id, "observed_at": datetime.now(UTC).isoformat(), "source": "test", "kind": kind}
        answer = self.client.post("/observations", json={"observations": [{**item, "data": data}]})
        assert answer.json()["recorded"] == 1, answer.text

    def shares(self) -> Counter[str]:
        """Bring the weights to HAProxy, and count in percent who answers."""
        nodectl(self.service, "traffic", "web", "--haproxy-socket", str(self.haproxy.socket_path))
        answered = self.haproxy.ask(REQUESTS)
        return Counter({node_id: round(100 * count / REQUESTS) for node_id, count in answered.items()})

    def weights(self) -> dict[str, int]:
        """Read what the service says."""
        nodes = self.client.get("/deployment/web/traffic").json()["nodes"]
        return {node["node_id"]: node["weight"] for node in nodes}


def nodectl(service: RunningService, *arguments: str) -> str:
    """Run nodectl against the service over HTTP."""
    variables = {**service.variables(), "NODE_MANAGER_URL": service.url, "NODE_MANAGER_TOKEN": service.token}
    command = [sys.executable, "-m", "node_manager", *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Place a deployment on three nodes, and put HAProxy in front of them."""
    require_haproxy("traffic follows the service's advice in a real HAProxy")
    with ExitStack() as stack:
        nodes = stack.enter_context(serving_nodes(NODE_IDS, "127.0.33"))
        # A node is lost without waiting.
        quick = {
            "NODE_MANAGER_HEALTH__SILENCE_BEFORE_UNREACHABLE_SECONDS": "0.001",
            "NODE_MANAGER_MONITORING__GATHER_INTERVAL_SECONDS": "0.001",
        }
        service = RunningService(tmp_path / "home", quick)
        service.home.mkdir()
        stack.callback(service.start().stop)
        client = stack.enter_context(service.client())
        found = Site(service, client, nodes, HaproxyProcess("", "web"))
        for node in nodes.values():
            body = {"node_id": node.node_id, "address": node.address}
            assert client.post("/nodes?look=false", json=body).status_code == 201
            for kind, data in (("facts", make_facts()), ("sample", make_sample(10.0)), ("report", make_report())):
                found.see(node.node_id, kind, data)
        wanted = {
            "deployment_id": "web",
            "owner": "team",
            "replicas": 3,
            "resources": {"cpu_millicores": 100},
            "anti_affinity": [{"deployment_id": "web"}],
        }
        assert client.post("/deployment/node-selection", json=wanted).status_code == 201
        port = str(next(iter(nodes.values())).port)
        found.haproxy.backends = nodectl(service, "traffic", "web", "--output", "haproxy", "--port", port)
        stack.enter_context(found.haproxy)
        yield found


def assert_about(expected: dict[str, int], found: Counter[str]) -> None:
    """Compare shares in percent."""
    assert found.keys() == {node_id for node_id, share in expected.items() if share}
    assert all(abs(found[node_id] - share) <= TOLERANCE_POINTS for node_id, share in expected.items()), found


def test_traffic_is_shared_evenly_among_equal_nodes(site: Site) -> None:
    assert_about({"gw-1": 34, "gw-2": 33, "gw-3": 33}, site.shares())


def test_traffic_leaves_a_node_that_becomes_loaded_and_comes_back(site: Site) -> None:
    site.see("gw-2", "sample", make_sample(90.0))
    loaded, told = site.shares(), site.weights()

    site.see("gw-2", "sample", make_sample(10.0))
    calm = site.shares()

    assert told["gw-2"] < 10
    assert_about(told, loaded)
    assert_about({"gw-1": 34, "gw-2": 33, "gw-3": 33}, calm)


def test_traffic_leaves_a_node_in_maintenance(site: Site) -> None:
    site.client.put("/nodes/gw-1/status", json={"status": "maintenance"})

    assert_about({"gw-1": 0, "gw-2": 50, "gw-3": 50}, site.shares())


def test_traffic_leaves_a_node_that_is_lost(site: Site) -> None:
    for _ in range(4):
        site.see("gw-3", "contact", make_contact())

    assert site.client.get("/nodes/gw-3").json()["health"] == "unreachable"
    assert_about({"gw-1": 50, "gw-2": 50, "gw-3": 0}, site.shares())


def test_traffic_stays_with_a_cordoned_node_that_takes_no_new_work(site: Site) -> None:
    site.client.put("/nodes/gw-1/status", json={"status": "cordoned"})

    load = {item["node_id"]: item for item in site.client.get("/load").json()["items"]}

    assert_about({"gw-1": 34, "gw-2": 33, "gw-3": 33}, site.shares())
    assert [load[node_id]["schedulable"] for node_id in NODE_IDS] == [False, True, True]


def test_traffic_table_and_json_say_the_same(site: Site) -> None:
    table = nodectl(site.service, "traffic", "web")

    rows = json.loads(nodectl(site.service, "traffic", "web", "--output", "json"))

    assert [row["weight"] for row in rows] == [34, 33, 33]
    assert all(f"{row['node_id']}" in table and str(row["weight"]) in table for row in rows)
