# SPDX-License-Identifier: GPL-3.0-or-later
"""Allocations and quotas over HTTP, as sister services call them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

CAPACITY = {"cpu_millicores": 4000, "memory_mib": 100, "gpu": 2}


@pytest.fixture
def node(api: httpx.Client, node_id: str) -> str:
    """Register a node with 4000 millicores, 100 MiB and 2 GPUs."""
    return register(api, node_id)


def register(api: httpx.Client, node_id: str) -> str:
    """Register a node that nobody looks at."""
    body = {"node_id": node_id, "address": "127.0.9.7", "capacity": CAPACITY}
    answer = api.post("/nodes", params={"look": "false"}, json=body)
    assert answer.status_code == 201, answer.text
    return node_id


def body(node_id: str, **changes: Any) -> dict[str, Any]:
    """Give the body of an allocation, with an id of the node's own."""
    return {"allocation_id": f"{node_id}.a", "owner": "shop", "resources": {"memory_mib": 60}, **changes}


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Read a problem, and check what all of them have."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    found: dict[str, Any] = answer.json()
    assert found["code"] == code
    return found


# allocate


def test_allocate_answers_201_with_location_and_units(api: httpx.Client, node: str) -> None:
    wanted = body(node, resources={"memory_mib": 60, "gpu": {"count": 1, "share_milli": 460}}, deployment_id="web")

    answer = api.post(f"/nodes/{node}/allocate", json=wanted)

    assert answer.status_code == 201
    assert answer.headers["location"] == f"/allocations/{node}.a"
    shown = answer.json()
    assert shown["units"] == {"gpu": {"0": 460}}
    assert shown["resources"] == wanted["resources"]
    assert (shown["ttl_seconds"], shown["expires_at"], shown["deployment_id"]) == (None, None, "web")
    assert api.get(answer.headers["location"]).json() == shown


def test_allocate_same_body_answers_200(api: httpx.Client, node: str) -> None:
    first = api.post(f"/nodes/{node}/allocate", json=body(node))
    spelled = body(node, deployment_id=None, ttl_seconds=None)

    again = api.post(f"/nodes/{node}/allocate", json=spelled)

    assert (again.status_code, again.json()) == (200, first.json())


def test_allocate_same_id_for_something_else_answers_422_naming_it(api: httpx.Client, node: str) -> None:
    api.post(f"/nodes/{node}/allocate", json=body(node))

    answer = api.post(f"/nodes/{node}/allocate", json=body(node, resources={"memory_mib": 61}, owner="lab"))

    found = problem(answer, 422, "allocation_mismatch")
    assert found["differing"] == ["owner", "resources"]
    assert "use a new allocation_id" in found["detail"]


def test_allocate_more_than_there_is_answers_409_with_numbers(api: httpx.Client, node: str) -> None:
    answer = api.post(f"/nodes/{node}/allocate", json=body(node, resources={"memory_mib": 101, "gpu": 3}))

    found = problem(answer, 409, "insufficient_resources")
    assert found["shortages"] == [
        {"resource": "memory_mib", "requested": 101, "available": 100},
        {"resource": "gpu", "requested": 3, "available": 2},
    ]
    assert "POST /deployment/node-selection" in found["detail"]
    assert api.get(f"/nodes/{node}/resources").json()["allocations"] == []


def test_allocate_on_an_unknown_node_answers_404(api: httpx.Client, node_id: str) -> None:
    answer = api.post(f"/nodes/{node_id}/allocate", json=body(node_id))

    assert "POST /nodes registers it" in problem(answer, 404, "node_not_found")["detail"]


def test_allocate_on_a_node_in_maintenance_answers_409(api: httpx.Client, node: str) -> None:
    api.put(f"/nodes/{node}/status", json={"status": "maintenance", "reason": "new disk"})

    answer = api.post(f"/nodes/{node}/allocate", json=body(node))

    assert "choose another node" in problem(answer, 409, "node_not_schedulable")["detail"]


def test_allocate_on_a_cordoned_node_answers_409(api: httpx.Client, node: str) -> None:
    declared = {"address": "127.0.9.7", "capacity": CAPACITY, "admin": "cordoned"}
    assert api.put(f"/nodes/{node}", json=declared).status_code == 200

    answer = api.post(f"/nodes/{node}/allocate", json=body(node))

    assert "is cordoned; choose another node" in problem(answer, 409, "node_not_schedulable")["detail"]


def test_allocate_of_a_class_that_no_node_has_answers_422_naming_it(api: httpx.Client, node: str) -> None:
    answer = api.post(f"/nodes/{node}/allocate", json=body(node, resources={"memory_mb": 1}))

    found = problem(answer, 422, "invalid_input")
    assert found["errors"][0]["field"] == "resources.memory_mb"
    assert "memory_mib" in found["errors"][0]["message"]


BAD = {
    "amount-negative": ({"resources": {"memory_mib": -1}}, "resources.memory_mib", "greater than or equal to 1"),
    "amount-zero": ({"resources": {"memory_mib": 0}}, "resources.memory_mib", "greater than or equal to 1"),
    "amount-huge": ({"resources": {"memory_mib": 10**12 + 1}}, "resources.memory_mib", "less than or equal to"),
    "amount-beyond-64-bits": ({"resources": {"memory_mib": 10**40}}, "resources.memory_mib", ""),
    "amount-float": ({"resources": {"memory_mib": 1.5}}, "resources.memory_mib", "integer"),
    "amount-whole-float": ({"resources": {"memory_mib": 1.0}}, "resources.memory_mib", "integer"),
    "amount-bool": ({"resources": {"memory_mib": True}}, "resources.memory_mib", "integer"),
    "amount-string": ({"resources": {"memory_mib": "60"}}, "resources.memory_mib", "integer"),
    "amount-null": ({"resources": {"memory_mib": None}}, "resources.memory_mib", "integer"),
    "share-of-a-common-class": ({"resources": {"memory_mib": {"count": 1}}}, "resources", "memory_mib"),
    "share-of-nothing": (
        {"resources": {"gpu": {"share_milli": 0}}},
        "resources.gpu.share_milli",
        "greater than or equal to 1",
    ),
    "share-beyond-whole": (
        {"resources": {"gpu": {"share_milli": 1001}}},
        "resources.gpu.share_milli",
        "less than or equal to",
    ),
    "share-bool": ({"resources": {"gpu": {"share_milli": True}}}, "resources.gpu.share_milli", "integer"),
    "units-too-many": ({"resources": {"gpu": 257}}, "resources", "gpu: expected at most 256"),
    "count-zero": ({"resources": {"gpu": {"count": 0}}}, "resources.gpu.count", "greater than or equal to 1"),
    "class-upper": ({"resources": {"GPU": 1}}, "resources.GPU.[key]", "pattern"),
    "class-path": ({"resources": {"../gpu": 1}}, "resources.../gpu.[key]", "pattern"),
    "nothing": ({"resources": {}}, "resources", "at least 1"),
    "no-object": ({"resources": [1]}, "resources", ""),
    "ttl-zero": ({"ttl_seconds": 0}, "ttl_seconds", "greater than or equal to 1"),
    "ttl-negative": ({"ttl_seconds": -1}, "ttl_seconds", "greater than or equal to 1"),
    "ttl-beyond": ({"ttl_seconds": 86401}, "ttl_seconds", "at most 86400 (allocation.max_ttl_seconds)"),
    "ttl-huge": ({"ttl_seconds": 10**30}, "ttl_seconds", ""),
    "ttl-float": ({"ttl_seconds": 1.5}, "ttl_seconds", "integer"),
    "ttl-bool": ({"ttl_seconds": True}, "ttl_seconds", "integer"),
    "ttl-string": ({"ttl_seconds": "60"}, "ttl_seconds", "integer"),
    "id-empty": ({"allocation_id": ""}, "allocation_id", "pattern"),
    "id-path": ({"allocation_id": "../etc"}, "allocation_id", "pattern"),
    "id-slash": ({"allocation_id": "a/b"}, "allocation_id", "pattern"),
    "id-newline": ({"allocation_id": "a\n"}, "allocation_id", "pattern"),
    "id-nul": ({"allocation_id": "a\0b"}, "allocation_id", "pattern"),
    "id-long": ({"allocation_id": "a" * 129}, "allocation_id", "at most 128"),
    "id-number": ({"allocation_id": 7}, "allocation_id", "string"),
    "owner-empty": ({"owner": ""}, "owner", "pattern"),
    "owner-long": ({"owner": "a" * 254}, "owner", "at most 253"),
    "owner-jinja": ({"owner": "{{ x }}"}, "owner", "pattern"),
    "deployment-path": ({"deployment_id": "a/../b"}, "deployment_id", "pattern"),
    "unknown-key": ({"node": "gw-7"}, "node", "unknown key"),
}


@pytest.mark.parametrize(("change", "field", "told"), BAD.values(), ids=BAD)
def test_allocate_refuses_naming_the_field_and_takes_nothing(
    api: httpx.Client, node: str, change: dict[str, Any], field: str, told: str
) -> None:
    answer = api.post(f"/nodes/{node}/allocate", json=body(node, **change))

    errors = problem(answer, 422, "invalid_input")["errors"]
    assert [error["field"] for error in errors] == [field]
    assert told in errors[0]["message"]
    assert api.get(f"/nodes/{node}/resources").json()["allocations"] == []


@pytest.mark.parametrize("key", ["allocation_id", "owner", "resources"])
def test_allocate_refuses_a_body_that_lacks_something(api: httpx.Client, node: str, key: str) -> None:
    wanted = body(node)
    del wanted[key]

    errors = problem(api.post(f"/nodes/{node}/allocate", json=wanted), 422, "invalid_input")["errors"]

    assert [error["field"] for error in errors] == [key]


@pytest.mark.parametrize("amount", ["NaN", "Infinity", "1e400", "1e3"])
def test_allocate_refuses_numbers_that_are_none(api: httpx.Client, node: str, amount: str) -> None:
    text = f'{{"allocation_id": "{node}.a", "owner": "shop", "resources": {{"memory_mib": {amount}}}}}'

    answer = api.post(f"/nodes/{node}/allocate", content=text, headers={"Content-Type": "application/json"})

    assert answer.status_code in {400, 422}, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


# deallocate, confirm, read


def test_deallocate_releases_once(api: httpx.Client, node: str) -> None:
    api.post(f"/nodes/{node}/allocate", json=body(node))

    first, again = (api.post(f"/nodes/{node}/deallocate", json={"allocation_id": f"{node}.a"}) for _ in range(2))

    assert (first.status_code, first.json()) == (200, {"allocation_id": f"{node}.a", "released": True})
    assert (again.status_code, again.json()) == (200, {"allocation_id": f"{node}.a", "released": False})
    assert api.get(f"/nodes/{node}/resources").json()["available"]["memory_mib"] == 100


def test_deallocate_of_something_on_another_node_answers_409(api: httpx.Client, node: str) -> None:
    other = register(api, f"{node}-b")
    api.post(f"/nodes/{node}/allocate", json=body(node))

    answer = api.post(f"/nodes/{other}/deallocate", json={"allocation_id": f"{node}.a"})

    found = problem(answer, 409, "conflict")
    assert found["node_id"] == node
    assert "release it there" in found["detail"]
    assert api.get(f"/allocations/{node}.a").status_code == 200


def test_deallocate_on_an_unknown_node_answers_404(api: httpx.Client, node_id: str) -> None:
    answer = api.post(f"/nodes/{node_id}/deallocate", json={"allocation_id": f"{node_id}.a"})

    problem(answer, 404, "node_not_found")


@pytest.mark.parametrize(
    "wanted", [{}, {"allocation_id": "../a"}, {"allocation_id": 7}, {"allocation_id": "a", "x": 1}]
)
def test_deallocate_refuses_a_bad_body(api: httpx.Client, node: str, wanted: dict[str, Any]) -> None:
    problem(api.post(f"/nodes/{node}/deallocate", json=wanted), 422, "invalid_input")


def test_confirm_keeps_and_may_be_repeated(api: httpx.Client, node: str) -> None:
    made = api.post(f"/nodes/{node}/allocate", json=body(node, ttl_seconds=60)).json()

    first, again = (api.post(f"/allocations/{node}.a/confirm") for _ in range(2))

    assert made["expires_at"] > made["created_at"]
    assert (first.status_code, first.json()) == (200, {**made, "expires_at": None})
    assert again.json() == first.json()


@pytest.mark.parametrize(("method", "path"), [("POST", "/allocations/none/confirm"), ("GET", "/allocations/none")])
def test_allocations_that_are_not_there_answer_404(api: httpx.Client, method: str, path: str) -> None:
    problem(api.request(method, path), 404, "allocation_not_found")


@pytest.mark.parametrize("path", ["/allocations/-a", f"/allocations/{'a' * 129}", "/allocations/a%20b"])
def test_allocations_of_a_bad_id_answer_422(api: httpx.Client, path: str) -> None:
    errors = problem(api.get(path), 422, "invalid_input")["errors"]

    assert errors[0]["field"] == "allocation_id"


def test_list_allocations_pages_and_filters(api: httpx.Client, node: str) -> None:
    for number in range(3):
        wanted = body(
            node, allocation_id=f"{node}.{number}", owner=f"{node}-o{number % 2}", resources={"memory_mib": 1}
        )
        api.post(f"/nodes/{node}/allocate", json=wanted)

    first = api.get("/allocations", params={"node_id": node, "limit": 2}).json()
    second = api.get("/allocations", params={"node_id": node, "limit": 2, "cursor": first["next_cursor"]}).json()
    of_one = api.get("/allocations", params={"owner": f"{node}-o1"}).json()

    found = [item["allocation_id"] for item in first["items"] + second["items"]]
    assert found == [f"{node}.0", f"{node}.1", f"{node}.2"]
    assert second["next_cursor"] is None
    assert [item["allocation_id"] for item in of_one["items"]] == [f"{node}.1"]


def test_read_resources_shows_the_books(api: httpx.Client, node: str) -> None:
    wanted = body(node, resources={"memory_mib": 60, "gpu": {"count": 1, "share_milli": 460}})
    made = api.post(f"/nodes/{node}/allocate", json=wanted).json()

    shown = api.get(f"/nodes/{node}/resources").json()

    assert shown["capacity"] == shown["effective"] == CAPACITY
    assert shown["allocated"] == {"cpu_millicores": 0, "memory_mib": 60, "gpu": 1}
    assert shown["available"] == {"cpu_millicores": 4000, "memory_mib": 40, "gpu": 1}
    assert shown["devices"]["gpu"][0] == {"unit": "0", "allocated_milli": 460, "present": True}
    assert shown["allocations"] == [made]
    assert not shown["overcommitted"]


@pytest.mark.parametrize("key", ["node_id", "owner", "deployment_id"])
@pytest.mark.parametrize("value", ["a\0b", "-", "a b", "", "a" * 254], ids=["nul", "hyphen", "space", "empty", "long"])
def test_list_allocations_refuses_what_is_no_name(api: httpx.Client, key: str, value: str) -> None:
    errors = problem(api.get("/allocations", params={key: value}), 422, "invalid_input")["errors"]

    assert [error["field"] for error in errors] == [key]


# quotas


def test_quota_is_enforced_shown_and_lifted(api: httpx.Client, node: str) -> None:
    owner = f"{node}-owner"
    put = api.put(f"/quotas/{owner}", json={"hard": {"memory_mib": 50}})

    refused = api.post(f"/nodes/{node}/allocate", json=body(node, owner=owner))
    lifted = api.delete(f"/quotas/{owner}")
    taken = api.post(f"/nodes/{node}/allocate", json=body(node, owner=owner))

    assert (put.status_code, put.json()) == (200, {"owner": owner, "hard": {"memory_mib": 50}, "used": {}})
    found = problem(refused, 403, "quota_exceeded")
    assert found["exceeded"] == [{"resource": "memory_mib", "hard": 50, "used": 0, "requested": 60}]
    assert f"PUT /quotas/{owner}" in found["detail"]
    assert (lifted.status_code, taken.status_code) == (204, 201)
    assert api.delete(f"/quotas/{owner}").status_code == 204
    problem(api.get(f"/quotas/{owner}"), 404, "quota_not_found")


def test_list_quotas_pages(api: httpx.Client, node_id: str) -> None:
    owners = [f"{node_id}-{letter}" for letter in "abc"]
    for owner in owners:
        api.put(f"/quotas/{owner}", json={"hard": {"gpu": 1}})

    found, cursor = [], None
    while True:
        page = api.get("/quotas", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        found += [item["owner"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break

    assert [owner for owner in found if owner.startswith(f"{node_id}-")] == owners
    assert len(set(found)) == len(found)


BAD_QUOTAS = {
    "negative": ({"hard": {"memory_mib": -1}}, "hard.memory_mib", "greater than or equal to 0"),
    "huge": ({"hard": {"memory_mib": 10**12 + 1}}, "hard.memory_mib", "less than or equal to"),
    "units-huge": ({"hard": {"gpu": 2_560_001}}, "hard", "gpu: expected at most"),
    "float": ({"hard": {"gpu": 0.5}}, "hard.gpu", "integer"),
    "bool": ({"hard": {"gpu": True}}, "hard.gpu", "integer"),
    "string": ({"hard": {"gpu": "1"}}, "hard.gpu", "integer"),
    "share": ({"hard": {"gpu": {"count": 1}}}, "hard.gpu", "integer"),
    "class-upper": ({"hard": {"GPU": 1}}, "hard", "pattern"),
    "nothing": ({"hard": {}}, "hard", "at least 1"),
    "missing": ({}, "hard", "required"),
    "unknown-key": ({"hard": {"gpu": 1}, "soft": {}}, "soft", "unknown key"),
}


@pytest.mark.parametrize(("wanted", "field", "told"), BAD_QUOTAS.values(), ids=BAD_QUOTAS)
def test_set_quota_refuses_naming_the_field(
    api: httpx.Client, node_id: str, wanted: dict[str, Any], field: str, told: str
) -> None:
    answer = api.put(f"/quotas/{node_id}", json=wanted)

    errors = problem(answer, 422, "invalid_input")["errors"]
    assert any(error["field"].startswith(field) and told in error["message"].lower() for error in errors), errors
    assert api.get(f"/quotas/{node_id}").status_code == 404


def test_set_quota_of_a_bad_owner_answers_422(api: httpx.Client) -> None:
    errors = problem(api.put("/quotas/-x", json={"hard": {"gpu": 1}}), 422, "invalid_input")["errors"]

    assert errors[0]["field"] == "owner"


# who may


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/nodes/gw-0/allocate"),
        ("POST", "/nodes/gw-0/deallocate"),
        ("POST", "/allocations/a/confirm"),
        ("PUT", "/quotas/shop"),
        ("DELETE", "/quotas/shop"),
        ("GET", "/nodes/gw-0/resources"),
        ("GET", "/allocations"),
        ("GET", "/quotas"),
    ],
)
def test_allocation_needs_a_token(api: httpx.Client, method: str, path: str) -> None:
    answer = api.request(method, path, headers={"Authorization": "Bearer none"})

    problem(answer, 401, "unauthenticated")
