# SPDX-License-Identifier: GPL-3.0-or-later
"""What is seen on nodes, handed in and read over HTTP."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from observed import documented, observation

PASSED = {
    "name": "ssh",
    "kind": "tcp",
    "severity": "critical",
    "state": "passed",
    "message": "ok",
    "latency_seconds": 0.001,
    "value": None,
    "unit": None,
}


def ago(seconds: float) -> str:
    """Give the time so many seconds ago."""
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def record(api: httpx.Client, *observations: dict[str, Any]) -> dict[str, Any]:
    """Hand a batch in."""
    answer = api.post("/observations", json={"observations": observations})
    assert answer.status_code == 200, answer.text
    outcome: dict[str, Any] = answer.json()
    return outcome


@pytest.fixture
def node(api: httpx.Client, node_id: str) -> str:
    """Register a node that nobody looks at."""
    body = {"node_id": node_id, "address": "127.0.9.7", "node_type": "edge-gateway"}
    assert api.post("/nodes", params={"look": "false"}, json=body).status_code == 201
    return node_id


def test_facts_give_capacity_and_books(api: httpx.Client, node: str) -> None:
    record(api, observation(node, "facts", ago(1)))

    books = api.get(f"/nodes/{node}/resources").json()

    assert books["capacity"] == {
        "cpu_millicores": 4000,
        "memory_mib": 3828,
        "disk_mib": 29820,
        "network_mbps": 1000,
        "gpu": 1,
        "camera": 1,
        "serial": 1,
    }
    assert books["effective"]["cpu_millicores"] == int((4000 - 200) * 1.5)
    assert books["available"] == books["effective"]


def test_declared_capacity_wins_and_facts_never_change_it(api: httpx.Client, node: str) -> None:
    api.put(f"/nodes/{node}", json={"address": "127.0.9.7", "capacity": {"disk_mib": 1000}})

    record(api, observation(node, "facts", ago(1)))

    shown = api.get(f"/nodes/{node}").json()
    assert (shown["capacity"]["disk_mib"], shown["declared_capacity"]) == (1000, {"disk_mib": 1000})


def test_report_makes_healthy_and_schedulable(api: httpx.Client, node: str) -> None:
    record(api, observation(node, "report", ago(1), checks=[PASSED]))

    shown = api.get(f"/nodes/{node}/health").json()

    assert (shown["health"], shown["status"], shown["schedulable"]) == ("healthy", "online", True)


def test_failed_critical_check_degrades_with_its_message(api: httpx.Client, node: str) -> None:
    record(api, observation(node, "report", ago(1)))

    shown = api.get(f"/nodes/{node}/health").json()

    assert (shown["health"], shown["schedulable"]) == ("degraded", False)
    assert "/ is 97.0 % full" in shown["health_cause"]
    broken = [item["reason"] for item in shown["conditions"] if not item["status"]]
    assert broken == ["CriticalCheckFailed"]


@pytest.mark.parametrize(
    ("reason", "condition", "health"),
    [
        ("ConnectionRefused", "Reachable", "unreachable"),
        ("AuthenticationFailed", "Authenticated", "degraded"),
        ("HostKeyChanged", "HostKeyTrusted", "degraded"),
        ("PythonMissing", "PythonAvailable", "degraded"),
        ("ModuleFailed", "ProbeWorking", "degraded"),
    ],
)
def test_failed_contact_has_a_condition_of_its_own(
    api: httpx.Client, node: str, reason: str, condition: str, health: str
) -> None:
    record(api, observation(node, "contact", ago(1), reason=reason, message="as ssh put it"))

    shown = api.get(f"/nodes/{node}/health").json()

    broken = [(item["type"], item["reason"], item["message"]) for item in shown["conditions"] if not item["status"]]
    assert (shown["health"], broken) == (health, [(condition, reason, "as ssh put it")])


@pytest.mark.parametrize("verdict", [{"liveness": "unreachable", "reason": "TimedOut", "message": "gone"}, {}])
def test_verdict_is_taken_from_nobody(api: httpx.Client, node: str, verdict: dict[str, Any]) -> None:
    told = {"node_id": node, "observed_at": ago(1), "source": "test", "kind": "verdict", "data": verdict}

    outcome = record(api, told)

    assert (outcome["recorded"], [item["code"] for item in outcome["rejected"]]) == (0, ["unusable"])
    assert api.get(f"/nodes/{node}").json()["health"] == "unknown"


def test_health_tells_how_it_came_about(api: httpx.Client, node: str) -> None:
    record(api, observation(node, "report", ago(3), checks=[PASSED]))
    record(api, observation(node, "contact", ago(2), reason="TimedOut", message="no answer"))
    record(api, observation(node, "sample", ago(1)))

    shown = api.get(f"/nodes/{node}/health").json()

    told = [(item["from"], item["to"], item["cause"], item["source"]) for item in shown["transitions"]]
    assert told == [
        ("suspect", "healthy", "no check failed", "test"),
        ("healthy", "suspect", "TimedOut: no answer", "test"),
        ("unknown", "healthy", "no check failed", "test"),
    ]
    assert (shown["evidence"], shown["frozen_until"], shown["probation_until"], shown["flap_penalty"]) == (
        None, None, None, 0,
    )  # fmt: skip
    assert {item["severity"] for item in shown["conditions"]} == {"critical"}


def test_node_that_was_lost_shows_how_far_it_is_on_its_way_back(api: httpx.Client, node: str) -> None:
    record(api, observation(node, "contact", ago(5), reason="NoRoute", message="down"))

    record(api, observation(node, "sample", ago(1)))

    shown = api.get(f"/nodes/{node}/health").json()
    assert (shown["health"], shown["status"], shown["schedulable"]) == ("recovering", "online", False)
    assert shown["health_cause"].startswith("is back: 1 of 3 good samples over 0 of 30 s")


def test_node_tells_how_fresh_facts_and_applications_are(api: httpx.Client, node: str) -> None:
    record(api, observation(node, "facts", ago(3)), observation(node, "sample", ago(2)))

    shown = api.get(f"/nodes/{node}").json()

    assert (shown["facts_source"], shown["applications_source"]) == ("test", "test")
    assert 3 <= shown["facts_age_seconds"] < 30
    assert 2 <= shown["applications_age_seconds"] < 30


def test_changed_host_key_quarantines_until_forgotten(api: httpx.Client, node: str) -> None:
    record(api, observation(node, "contact", ago(2), reason="HostKeyChanged", message="changed"))
    before = api.get(f"/nodes/{node}").json()["quarantined"]

    api.delete(f"/nodes/{node}/host-keys")

    assert (before, api.get(f"/nodes/{node}").json()["quarantined"]) == (True, False)


def test_late_observation_changes_nothing(api: httpx.Client, node: str) -> None:
    record(api, observation(node, "sample", ago(10), uptime_seconds=20.0))

    outcome = record(api, observation(node, "sample", ago(60), uptime_seconds=10.0))

    shown = api.get(f"/nodes/{node}/utilization").json()
    assert (outcome["late"], shown["sample"]["uptime_seconds"]) == (1, 20.0)


def test_batch_takes_what_is_good_and_names_the_rest(api: httpx.Client, node: str) -> None:
    bad = observation(node, "sample", ago(5), cpu={"count": "many"})

    outcome = record(api, observation("nobody", "facts", ago(5)), bad, observation(node, "report", ago(1)))

    assert outcome["recorded"] == 1
    assert [(item["index"], item["code"]) for item in outcome["rejected"]] == [(0, "node_not_found"), (1, "unusable")]


def test_utilization_before_any_sample_says_what_to_do(api: httpx.Client, node: str) -> None:
    answer = api.get(f"/nodes/{node}/utilization")

    assert (answer.status_code, answer.json()["code"]) == (404, "not_observed")
    assert "health/check" in answer.json()["detail"]


def test_utilization_has_age_source_and_history(api: httpx.Client, node: str) -> None:
    record(api, observation(node, "sample", ago(2)))

    shown = api.get(f"/nodes/{node}/utilization", params={"window": "1h"}).json()

    assert shown["source"] == "test"
    assert 1 < shown["age_seconds"] < 30
    assert shown["utilization"]["disk_percent"] == 28.3
    assert [minute["samples"] for minute in shown["history"]] == [1]


def test_applications_come_from_containers(api: httpx.Client, node: str) -> None:
    sample = documented("sample")
    sample["containers"]["items"][0]["labels"] = {
        "iot-platform.deployment-id": "d-1",
        "iot-platform.application": "cam",
    }
    record(api, observation(node, "sample", ago(1), containers=sample["containers"]))

    shown = api.get(f"/nodes/{node}").json()["applications"]

    assert shown == [{"name": "cam", "deployment_id": "d-1", "containers": ["app"], "running": 1}]


def test_hostname_with_jinja_is_shown_verbatim(api: httpx.Client, node: str) -> None:
    jinja = "{{ lookup('pipe','touch x') }}"

    record(api, observation(node, "facts", ago(1), hostname=jinja))

    assert api.get(f"/nodes/{node}").json()["facts"]["hostname"] == jinja
