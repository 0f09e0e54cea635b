# SPDX-License-Identifier: GPL-3.0-or-later
"""Deployments over HTTP, as sister services call them. Each test has its own label on its nodes, and asks for that."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from builders import make_report, make_sample

CAPACITY = {"cpu_millicores": 1000, "memory_mib": 100, "gpu": 2}
SELECTION = "/deployment/node-selection"


@pytest.fixture
def fleet(api: httpx.Client, node_id: str) -> list[str]:
    """Register three nodes in two zones, and see them well."""
    names = [f"{node_id}-{number}" for number in range(3)]
    for name, zone in zip(names, ("a", "a", "b"), strict=True):
        declared = {
            "node_id": name,
            "address": "127.0.9.7",
            "capacity": CAPACITY,
            "labels": {"test": node_id},
            "location": {"region": "r", "zone": zone, "site": f"{zone}-{node_id}", "latitude": 48.0, "longitude": 11.0},
        }
        answer = api.post("/nodes", params={"look": "false"}, json=declared)
        assert answer.status_code == 201, answer.text
    see(api, names)
    return names


def see(api: httpx.Client, names: list[str]) -> None:
    """Tell that nodes were seen, healthy and nearly idle."""
    now = datetime.now(UTC).isoformat()
    told = [
        {"node_id": name, "observed_at": now, "source": "test", "kind": kind, "data": data}
        for name in names
        for kind, data in (("report", make_report()), ("sample", make_sample()))
    ]
    answer = api.post("/observations", json={"observations": told})
    assert answer.status_code in {200, 202}, answer.text


def body(node_id: str, **changes: Any) -> dict[str, Any]:
    """Ask for 60 MiB on nodes of this test."""
    constraints = {"labels": {"test": node_id}, **changes.pop("constraints", {})}
    return {
        "deployment_id": f"web-{node_id}",
        "owner": f"shop-{node_id}",
        "resources": {"memory_mib": 60},
        "constraints": constraints,
        **changes,
    }


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Read a problem, and check what all of them have."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    found: dict[str, Any] = answer.json()
    assert found["code"] == code, found
    return found


# place


@pytest.mark.usefixtures("fleet")
def test_select_nodes_answers_201_with_what_is_reserved(api: httpx.Client, node_id: str) -> None:
    answer = api.post(SELECTION, json=body(node_id, replicas=2, ttl_seconds=60, explain=True))

    shown = answer.json()
    assert answer.status_code == 201, shown
    assert (shown["reserved"], shown["strategy"], shown["deployment_id"]) == (True, "balanced", f"web-{node_id}")
    assert [node["allocation_id"] for node in shown["nodes"]] == [f"web-{node_id}:0", f"web-{node_id}:1"]
    assert all(0 <= score <= 100 for node in shown["nodes"] for score in (node["score"], *node["scores"].values()))
    assert len(shown["candidates"]) == 2
    assert shown["expires_at"] > shown["created_at"]
    for node in shown["nodes"]:
        held = api.get(f"/nodes/{node['node_id']}/resources").json()["allocations"]
        assert [item["allocation_id"] for item in held] == [node["allocation_id"]]


@pytest.mark.usefixtures("fleet")
def test_select_nodes_same_body_answers_200_with_the_same(api: httpx.Client, node_id: str) -> None:
    first = api.post(SELECTION, json=body(node_id, replicas=2))

    again = api.post(SELECTION, json=body(node_id, replicas=2))

    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()


@pytest.mark.usefixtures("fleet")
def test_select_nodes_other_body_answers_409_with_a_way_out(api: httpx.Client, node_id: str) -> None:
    api.post(SELECTION, json=body(node_id))

    answer = api.post(SELECTION, json=body(node_id, replicas=2))

    assert f"DELETE /deployment/web-{node_id}" in problem(answer, 409, "deployment_exists")["detail"]


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize("change", [{"dry_run": True}, {"reserve": False}])
def test_select_nodes_without_reserving_answers_200(api: httpx.Client, node_id: str, change: dict[str, bool]) -> None:
    answer = api.post(SELECTION, json=body(node_id, **change))

    shown = answer.json()
    assert answer.status_code == 200, shown
    assert (shown["reserved"], [node["allocation_id"] for node in shown["nodes"]]) == (False, [None])
    assert (shown["decision_id"] is None) is change.get("dry_run", False)
    problem(api.get(f"/deployment/web-{node_id}/nodes"), 404, "deployment_not_found")


NOTHING_FITS: dict[str, tuple[dict[str, Any], str]] = {
    "too much": ({"resources": {"memory_mib": 101}}, "insufficient_memory_mib"),
    "huge": ({"resources": {"memory_mib": 10**12}}, "insufficient_memory_mib"),
    "replicas beyond nodes": (
        {"replicas": 4, "anti_affinity": [{"deployment_id": "web-%s"}]},
        "taken_by_other_replicas",
    ),
    "skew with one zone": (
        {"replicas": 2, "spread": {"scope": "zone", "max_skew": 1}, "constraints": {"zones": ["a"]}},
        "spread",
    ),
    "a zone that isn't there": ({"constraints": {"zones": ["q"]}}, "zone"),
    "a type of which there are none": ({"constraints": {"node_types": ["server"]}}, "node_type"),
    "only nodes that aren't there": ({"constraints": {"node_ids": ["nobody"]}}, "not_listed"),
}


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize(("change", "reason"), NOTHING_FITS.values(), ids=NOTHING_FITS)
def test_select_nodes_that_fits_nowhere_answers_409_with_reasons_and_a_way_out(
    api: httpx.Client, node_id: str, change: dict[str, Any], reason: str
) -> None:
    for term in change.get("anti_affinity", []):
        change = {**change, "anti_affinity": [{**term, "deployment_id": f"web-{node_id}"}]}

    found = problem(api.post(SELECTION, json=body(node_id, **change)), 409, "nothing_fits")

    assert found["rejected"][reason] > 0
    assert found["changes"]
    assert found["changes"][0]["text"] in found["detail"]
    assert sum(found["rejected"].values()) == found["considered"]
    record = api.get(f"/decisions/{found['decision_id']}").json()
    assert (record["fits"], record["changes"]) == (False, found["changes"])
    problem(api.get(f"/deployment/web-{node_id}/nodes"), 404, "deployment_not_found")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "negative replicas": ({"replicas": -1}, "replicas"),
    "no replicas": ({"replicas": 0}, "replicas"),
    "too many replicas": ({"replicas": 10_001}, "replicas"),
    "more replicas than configured": ({"replicas": 1001}, "replicas"),
    "half a replica": ({"replicas": 1.5}, "replicas"),
    "replicas as text": ({"replicas": "2"}, "replicas"),
    "negative amount": ({"resources": {"memory_mib": -1}}, "resources.memory_mib"),
    "amount of zero": ({"resources": {"memory_mib": 0}}, "resources.memory_mib"),
    "huge amount": ({"resources": {"memory_mib": 10**30}}, "resources.memory_mib"),
    "no resources": ({"resources": {}}, "resources"),
    "unknown class": ({"resources": {"memory_mb": 1}}, "resources.memory_mb"),
    "share of memory": ({"resources": {"memory_mib": {"share_milli": 5}}}, "resources"),
    "share of nothing": ({"resources": {"gpu": {"share_milli": 0}}}, "resources.gpu.share_milli"),
    "units without end": ({"resources": {"gpu": 10_000}}, "resources"),
    "unknown key": ({"replica": 2}, "replica"),
    "unknown key inside": ({"constraints": {"zone": ["a"]}}, "constraints.zone"),
    "unknown type": ({"constraints": {"node_types": ["toaster"]}}, "constraints.node_types.0"),
    "label without values": ({"constraints": {"labels": {"line": []}}}, "constraints.labels.line"),
    "place beyond the pole": (
        {"constraints": {"within": {"latitude": 91, "longitude": 0, "max_km": 1}}},
        "constraints.within.latitude",
    ),
    "distance of nothing": (
        {"constraints": {"within": {"latitude": 0, "longitude": 0, "max_km": 0}}},
        "constraints.within.max_km",
    ),
    "listed and excluded": ({"constraints": {"node_ids": ["n1"], "exclude_node_ids": ["n1"]}}, "constraints"),
    "near and away": (
        {"affinity": [{"deployment_id": "db"}], "anti_affinity": [{"deployment_id": "db"}]},
        "body",
    ),
    "together and spread": (
        {"replicas": 2, "affinity": [{"scope": "zone", "deployment_id": "web-%s"}], "spread": {"scope": "zone"}},
        "body",
    ),
    "no target": ({"affinity": [{"scope": "zone"}]}, "affinity.0"),
    "two targets": ({"anti_affinity": [{"deployment_id": "a", "node_labels": {"a": "b"}}]}, "anti_affinity.0"),
    "unknown deployment in an affinity": ({"affinity": [{"deployment_id": "nobody"}]}, "affinity.0.deployment_id"),
    "skew of zero": ({"spread": {"max_skew": 0}}, "spread.max_skew"),
    "unknown scope": ({"spread": {"scope": "rack"}}, "spread.scope"),
    "unknown strategy": ({"strategy": "best"}, "strategy"),
    "a time of zero": ({"ttl_seconds": 0}, "ttl_seconds"),
    "a time too long": ({"ttl_seconds": 10**9}, "ttl_seconds"),
    "an id with a colon": ({"deployment_id": "web:1"}, "deployment_id"),
    "no owner": ({"owner": ""}, "owner"),
}


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize(("change", "field"), BAD.values(), ids=BAD)
def test_select_nodes_of_bad_input_answers_422_naming_the_field(
    api: httpx.Client, node_id: str, change: dict[str, Any], field: str
) -> None:
    if change.get("replicas") == 2 and "affinity" in change:
        change = {**change, "affinity": [{"scope": "zone", "deployment_id": f"web-{node_id}"}]}

    answer = api.post(SELECTION, json=body(node_id, **change))

    assert answer.status_code == 422, answer.text
    (error, *_) = answer.json()["errors"]
    assert error["field"] == field or (field == "constraints" and error["field"].startswith(field)), answer.json()
    assert len(error["message"]) > 10


RAW = {
    "no JSON": (b"{", 400),
    "no object": (b"[]", 422),
    "nothing": (b"", 400),
    "not a number": (b'{"near": {"latitude": NaN, "longitude": 0}}', 422),
    "half a character": (b'{"deployment_id": "web", "owner": "\\ud800"}', 422),
    "nested without end": (b"[" * 100_000, 400),
    "an empty batch": (b'{"deployments": []}', 422),
    "a batch of nothing": (b'{"deployments": null}', 422),
    "a batch with more beside it": (b'{"deployments": [], "owner": "shop"}', 422),
}


@pytest.mark.parametrize(("raw", "status"), RAW.values(), ids=RAW)
def test_select_nodes_of_something_else_answers_400_or_422(api: httpx.Client, raw: bytes, status: int) -> None:
    answer = api.post(SELECTION, content=raw, headers={"content-type": "application/json"})

    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize("text", ["half \ud800", "nothing \x00"], ids=["half a character", "a null"])
def test_select_nodes_of_strange_text_is_no_servers_fault(api: httpx.Client, node_id: str, text: str) -> None:
    import json

    raw = json.dumps(body(node_id, labels={"app": text}, images=[text]))

    answer = api.post(SELECTION, content=raw, headers={"content-type": "application/json"})

    assert answer.status_code in {201, 422}, answer.text


def test_select_nodes_over_quota_answers_403_with_numbers(api: httpx.Client, node_id: str, fleet: list[str]) -> None:
    assert len(fleet) == 3
    assert api.put(f"/quotas/shop-{node_id}", json={"hard": {"memory_mib": 100}}).status_code in {200, 201}

    found = problem(api.post(SELECTION, json=body(node_id, replicas=2)), 403, "quota_exceeded")

    assert found["exceeded"] == [{"resource": "memory_mib", "hard": 100, "used": 0, "requested": 120}]


# batches


@pytest.mark.usefixtures("fleet")
def test_select_nodes_of_a_batch_answers_200_with_a_status_each(api: httpx.Client, node_id: str) -> None:
    names = [f"{node_id}-{letter}" for letter in "abcd"]
    requests = [body(node_id, deployment_id=name) for name in names]

    answer = api.post(SELECTION, json={"deployments": [*requests, requests[0]]})

    results = answer.json()["results"]
    assert (answer.status_code, [result["status"] for result in results]) == (200, [201, 201, 201, 409, 200])
    assert results[3]["problem"]["code"] == "nothing_fits"
    assert results[3]["problem"]["changes"]
    assert results[4]["placement"] == results[0]["placement"]


def test_select_nodes_of_too_large_a_batch_answers_422(api: httpx.Client, node_id: str) -> None:
    requests = [body(node_id, deployment_id=f"d{number}") for number in range(501)]

    found = problem(api.post(SELECTION, json={"deployments": requests}), 422, "invalid_input")

    assert found["errors"][0]["field"] == "deployments"


def test_select_nodes_of_a_bad_one_in_a_batch_names_its_place(api: httpx.Client, node_id: str) -> None:
    answer = api.post(SELECTION, json={"deployments": [body(node_id), body(node_id, replicas=0)]})

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "deployments.1.replicas"


# read, confirm, delete


@pytest.mark.usefixtures("fleet")
def test_read_nodes_shows_where_replicas_are(api: httpx.Client, node_id: str) -> None:
    api.post(SELECTION, json=body(node_id, replicas=2))

    shown = api.get(f"/deployment/web-{node_id}/nodes").json()

    assert shown["request"]["replicas"] == 2
    assert {(node["status"], node["health"], node["address"]) for node in shown["nodes"]} == {
        ("online", "healthy", "127.0.9.7")
    }


@pytest.mark.usefixtures("fleet")
def test_confirm_deployment_takes_the_expiry_away(api: httpx.Client, node_id: str) -> None:
    api.post(SELECTION, json=body(node_id, ttl_seconds=60))

    answers = [api.post(f"/deployment/web-{node_id}/confirm") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert [node["expires_at"] for node in answers[1].json()["nodes"]] == [None]


@pytest.mark.usefixtures("fleet")
def test_delete_deployment_releases_and_is_gone(api: httpx.Client, node_id: str) -> None:
    api.post(SELECTION, json=body(node_id, replicas=3))

    answer = api.delete(f"/deployment/web-{node_id}")

    assert (answer.status_code, answer.json()) == (200, {"deployment_id": f"web-{node_id}", "released": 3})
    problem(api.delete(f"/deployment/web-{node_id}"), 404, "deployment_not_found")
    assert api.post(SELECTION, json=body(node_id, replicas=3)).status_code == 201


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "nodes"), ("GET", "traffic"), ("POST", "confirm"), ("DELETE", "")],
    ids=["nodes", "traffic", "confirm", "delete"],
)
def test_deployment_of_nobody_answers_404_with_a_way_out(api: httpx.Client, method: str, path: str) -> None:
    answer = api.request(method, f"/deployment/nobody/{path}".rstrip("/"))

    assert "POST /deployment/node-selection" in problem(answer, 404, "deployment_not_found")["detail"]


# decisions


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize("strategy", ["balanced", "binpack"])
def test_replay_decision_is_identical(api: httpx.Client, node_id: str, strategy: str) -> None:
    placed = api.post(SELECTION, json=body(node_id, replicas=2, strategy=strategy)).json()

    answer = api.get(f"/decisions/{placed['decision_id']}/replay")

    shown = answer.json()
    assert (answer.status_code, shown["identical"]) == (200, True)
    assert shown["stored"] == shown["replayed"]
    record = api.get(f"/decisions/{placed['decision_id']}").json()
    assert [node["node_id"] for node in record["nodes"]] == [node["node_id"] for node in placed["nodes"]]


@pytest.mark.parametrize("path", ["", "/replay"])
def test_read_decision_of_nobody_answers_404(api: httpx.Client, path: str) -> None:
    answer = api.get(f"/decisions/00000000-0000-0000-0000-000000000000{path}")

    problem(answer, 404, "decision_not_found")


# traffic and load


@pytest.mark.usefixtures("fleet")
def test_read_traffic_shares_a_hundred_points(api: httpx.Client, node_id: str) -> None:
    api.post(SELECTION, json=body(node_id, replicas=3))

    shown = api.get(f"/deployment/web-{node_id}/traffic").json()

    assert sum(node["weight"] for node in shown["nodes"]) == 100
    assert {node["state"] for node in shown["nodes"]} == {"ready"}
    assert all(node["address"] == "127.0.9.7" for node in shown["nodes"])


def test_read_traffic_gives_nothing_to_a_node_in_maintenance(api: httpx.Client, node_id: str, fleet: list[str]) -> None:
    api.post(SELECTION, json=body(node_id, replicas=3))
    api.put(f"/nodes/{fleet[0]}/status", json={"status": "maintenance", "reason": "new disk"})

    shown = api.get(f"/deployment/web-{node_id}/traffic").json()

    weights = {node["node_id"]: node["weight"] for node in shown["nodes"]}
    assert (weights[fleet[0]], sum(weights.values())) == (0, 100)


def test_read_load_tells_of_all_nodes_and_filters(api: httpx.Client, node_id: str, fleet: list[str]) -> None:
    api.put(f"/nodes/{fleet[1]}/status", json={"status": "maintenance", "reason": "new disk"})
    api.post(SELECTION, json=body(node_id, constraints={"node_ids": [fleet[0]]}))

    items = {item["node_id"]: item for item in api.get("/load").json()["items"]}
    at_site = api.get("/load", params={"site": f"a-{node_id}"}).json()["items"]

    assert set(fleet) <= set(items)
    assert [item["node_id"] for item in at_site] == sorted(fleet[:2])
    busy, closed, idle = (items[name] for name in fleet)
    assert (busy["schedulable"], busy["deployments"]) == (True, 1)
    # 60 of 100 MiB were reserved since 30 % were measured.
    assert (busy["memory_percent"], busy["idle_percent"], idle["idle_percent"]) == (30, 10, 70)
    assert (closed["schedulable"], closed["reason"]) == (False, "not_active")


# who may


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", SELECTION), ("DELETE", "/deployment/x"), ("POST", "/deployment/x/confirm"), ("GET", "/load")],
)
def test_deployment_endpoints_need_a_token(api: httpx.Client, method: str, path: str) -> None:
    answer = httpx.request(method, f"{api.base_url}{path}", json={})

    assert answer.status_code == 401
