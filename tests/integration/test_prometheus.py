# SPDX-License-Identifier: GPL-3.0-or-later
"""A real Prometheus scrapes a running service, finds the nodes there, and its alert fires and clears."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from exercised_service import LOST, NODES, exercise, lose, make_service, see
from job_parts import wait_until
from metrics_scrape import read
from parts import require
from prometheus_process import prometheus, promtool
from running_service import RunningService, free_port

DOCS = Path(__file__).resolve().parents[2] / "docs" / "prometheus"
UNREACHABLE = "NodeManagerNodeUnreachable"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    running = make_service(tmp_path / "home").start()
    with running.client() as api:
        exercise(api)
    yield running
    running.kill()


def configure(folder: Path, service: RunningService, port: int) -> dict[str, Any]:
    """Give the documented configuration, in a hurry, with all targets on loopback."""
    shutters = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    rules = yaml.safe_load((DOCS / "alerts.yml").read_text("utf-8"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["for"] = "1s"
            rule.pop("keep_firing_for", None)
    (folder / "alerts.yml").write_text(yaml.safe_dump(rules), "utf-8")
    (folder / "rules.yml").write_text((DOCS / "rules.yml").read_text("utf-8"), "utf-8")
    (folder / "token").write_text(service.token, "ascii")
    found: dict[str, Any] = yaml.safe_load((DOCS / "prometheus.yml").read_text("utf-8"))
    found["global"] = shutters
    manager, nodes = found["scrape_configs"]
    manager["authorization"]["credentials_file"] = str(folder / "token")
    manager["static_configs"] = [{"targets": [f"127.0.0.1:{service.port}"]}]
    (discovery,) = nodes["http_sd_configs"]
    discovery["url"] = discovery["url"].replace("http://127.0.0.1:8080", service.url)
    discovery["refresh_interval"] = "1s"
    discovery["authorization"]["credentials_file"] = str(folder / "token")
    # In the place of each node's exporter stands Prometheus itself: nobody may scrape addresses that are made up.
    nodes["relabel_configs"].append({"target_label": "__address__", "replacement": f"127.0.0.1:{port}"})
    return found


def run(folder: Path, service: RunningService) -> AbstractContextManager[httpx.Client]:
    """Run a Prometheus of the documented configuration."""
    port = free_port()
    return prometheus(folder, configure(folder, service, port), port)


def query(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """Ask for the present value."""
    answer = client.get("api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def firing(client: httpx.Client, name: str) -> list[dict[str, str]]:
    """Give the labels of what fires."""
    alerts = client.get("api/v1/alerts").json()["data"]["alerts"]
    return [found["labels"] for found in alerts if found["state"] == "firing" and found["labels"]["alertname"] == name]


def dashboard_queries() -> list[str]:
    """Give the queries of the dashboard, with its variables filled in."""
    panels = json.loads((DOCS / "dashboard.json").read_text("utf-8"))["panels"]
    told = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    variables = {"$job": "node-manager", "$node": "gw-1", "$__rate_interval": "5s"}
    for variable, value in variables.items():
        told = [expression.replace(variable, value) for expression in told]
    return told


def test_a_prometheus_scrapes_discovers_alerts_and_clears(service: RunningService, tmp_path: Path) -> None:
    require("prometheus", "the metrics are made for it")
    folder = tmp_path / "prometheus"
    folder.mkdir()
    with run(folder, service) as client, service.client() as api:
        wait_until(lambda: [found["value"][1] for found in query(client, 'up{job="node-manager"}')] == ["1"])
        wait_until(lambda: len(query(client, 'up{job="node"} == 1')) == len(NODES))
        discovered = query(client, 'up{job="node"}')
        wait_until(lambda: bool(firing(client, UNREACHABLE)))
        fired = firing(client, UNREACHABLE)
        answers = {expression: query(client, expression) for expression in dashboard_queries()}
        see(api, LOST)
        wait_until(lambda: not firing(client, UNREACHABLE))
        seen_again = query(client, f'node_manager_node_up{{node_id="{LOST}"}}')
        targets = client.get("api/v1/targets").json()["data"]["droppedTargets"]

    assert {found["metric"]["node_id"] for found in discovered} == set(NODES)
    assert discovered[0]["metric"].items() >= {"zone": "eu-1a", "site": "plant-2", "node_label_team_x": "b"}.items()
    assert [found["node_id"] for found in fired] == [LOST]
    assert fired[0].items() >= {"zone": "eu-1a", "severity": "warning", "name": LOST}.items()
    assert [found["value"][1] for found in seen_again] == ["1"]
    assert targets == []
    # Of what only now and then happens there may be nothing yet; all else has an answer.
    now_and_then = ("rate(", "increase(", ":p95", "== 1")
    silent = [expression for expression, found in answers.items() if not found]
    assert [expression for expression in silent if not any(word in expression for word in now_and_then)] == []


def test_a_node_in_maintenance_is_no_target_of_the_example(service: RunningService, tmp_path: Path) -> None:
    require("prometheus", "the metrics are made for it")
    folder = tmp_path / "prometheus"
    folder.mkdir()
    with service.client() as api:
        assert api.put("/nodes/gw-2/status", json={"status": "maintenance"}).status_code == 200
    with run(folder, service) as client:
        wait_until(lambda: len(client.get("api/v1/targets").json()["data"]["droppedTargets"]) == 1)
        targets = client.get("api/v1/targets").json()["data"]

    assert {target["labels"].get("node_id") for target in targets["activeTargets"]} == {None, "gw-1", "gw-3"}
    assert targets["droppedTargets"][0]["discoveredLabels"]["__meta_node_manager_node_id"] == "gw-2"


def test_a_real_scrape_passes_promtool(service: RunningService) -> None:
    require("prometheus", "promtool comes with it")
    with service.client() as api:
        lose(api, LOST)
        scrape = api.get("/metrics").text

    done = promtool("check", "metrics", text=scrape)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert read(scrape).value("node_manager_store_up") == 1
