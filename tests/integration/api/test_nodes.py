# SPDX-License-Identifier: GPL-3.0-or-later
"""The registry over HTTP, as sister services call it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from running_service import RunningService

BODY = {"address": "127.0.9.7", "node_type": "edge-gateway", "labels": {"line": "a"}}


def register(api: httpx.Client, node_id: str, **more: object) -> httpx.Response:
    """Register a node that nobody looks at."""
    return api.post("/nodes", params={"look": "false"}, json={"node_id": node_id, **BODY, **more})


def test_register_creates_with_location_and_etag(api: httpx.Client, node_id: str) -> None:
    answer = register(api, node_id)

    assert answer.status_code == 201
    assert answer.headers["location"] == f"/nodes/{node_id}"
    assert answer.headers["etag"] == '"1"'
    assert answer.json()["health"] == "unknown"


def test_register_same_body_answers_200(api: httpx.Client, node_id: str) -> None:
    register(api, node_id)

    answer = register(api, node_id)

    assert answer.status_code == 200
    assert answer.json()["generation"] == 1


def test_register_other_body_answers_409_naming_the_difference(api: httpx.Client, node_id: str) -> None:
    register(api, node_id)

    answer = register(api, node_id, address="127.0.9.8")

    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "node_exists"
    assert answer.json()["differing"] == ["address"]


def test_register_at_once_makes_one_node(service: RunningService, node_id: str) -> None:
    def call(number: int) -> int:
        with service.client() as client:
            return register(client, node_id, address=f"127.0.9.{number % 2}").status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(call, range(8)))

    assert statuses.count(201) == 1
    assert set(statuses) <= {200, 201, 409}


def test_register_keeps_maintenance_when_repeated(api: httpx.Client, node_id: str) -> None:
    register(api, node_id)
    api.put(f"/nodes/{node_id}/status", json={"status": "maintenance", "reason": "new disk"})

    answer = register(api, node_id)

    assert answer.status_code == 200
    assert answer.json()["status"] == "maintenance"


HOSTILE = {
    "ansible-key": ({"ansible_ssh_common_args": "-oProxyCommand=x"}, "ansible_ssh_common_args"),
    "ansible-key-in-connection": ({"connection": {"ansible_user": "x"}}, "connection"),
    "ansible-key-in-labels": ({"labels": {"ansible_connection": "local"}}, "labels"),
    "local-connection": ({"connection": {"kind": "local"}}, "connection.kind"),
    "user-option": ({"connection": {"user": "-oProxyCommand=touch x"}}, "connection.user"),
    "two-hosts": ({"address": "a,b"}, "address"),
    "pattern": ({"address": "!all"}, "address"),
    "newline": ({"address": "a\nb"}, "address"),
    "leading-hyphen": ({"address": "-oProxyCommand=x"}, "address"),
    "id-path": ({"node_id": "../../etc"}, "node_id"),
    "id-long": ({"node_id": "a" * 300}, "node_id"),
    "id-upper": ({"node_id": "GW-7"}, "node_id"),
    "id-lookalike": ({"node_id": "gw-\u0430"}, "node_id"),
    "unknown-key": ({"colour": "red"}, "colour"),
    "unknown-type": ({"node_type": "toaster"}, "node_type"),
    "unknown-credential": ({"connection": {"credential": "nope"}}, "connection.credential"),
    "unknown-jump-host": ({"connection": {"jump_host": "nowhere"}}, "connection.jump_host"),
}


@pytest.mark.parametrize(("change", "field"), HOSTILE.values(), ids=HOSTILE)
def test_register_refuses_naming_the_field(
    api: httpx.Client, node_id: str, change: dict[str, object], field: str
) -> None:
    answer = api.post("/nodes", json={"node_id": node_id, **BODY, **change})

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "invalid_input"
    assert any(error["field"].startswith(field) for error in answer.json()["errors"]), answer.text
    assert api.get(f"/nodes/{node_id}").status_code == 404


def test_register_stores_jinja_verbatim(api: httpx.Client, node_id: str) -> None:
    jinja = "{{ lookup('pipe','touch x') }}"

    answer = register(api, node_id, name=jinja, labels={"note": jinja}, location={"site": jinja})

    assert answer.status_code == 201
    shown = api.get(f"/nodes/{node_id}").json()
    assert shown["name"] == shown["labels"]["note"] == shown["location"]["site"] == jinja


def test_update_with_stale_etag_answers_412(api: httpx.Client, node_id: str) -> None:
    register(api, node_id)
    first = api.put(f"/nodes/{node_id}", json={"address": "127.0.9.9"}, headers={"If-Match": '"1"'})

    answer = api.put(f"/nodes/{node_id}", json={"address": "127.0.9.10"}, headers={"If-Match": '"1"'})

    assert first.status_code == 200
    assert first.headers["etag"] == '"2"'
    assert answer.status_code == 412
    assert answer.json()["code"] == "stale_generation"
    assert api.get(f"/nodes/{node_id}").json()["address"] == "127.0.9.9"


@pytest.mark.parametrize("tag", ["W/x", "²", "", '"1', "9" * 40], ids=["weak", "superscript", "empty", "half", "long"])
def test_update_with_an_etag_of_no_node_answers_412(api: httpx.Client, node_id: str, tag: str) -> None:
    register(api, node_id)
    etag = tag.encode("latin-1")

    answer = api.delete(f"/nodes/{node_id}", headers={b"If-Match": b'"' + etag + b'"'})

    assert (answer.status_code, answer.json()["code"]) == (412, "stale_generation")


def test_deregister_removes(api: httpx.Client, node_id: str) -> None:
    register(api, node_id)

    answer = api.delete(f"/nodes/{node_id}")

    assert answer.status_code == 204
    assert api.get(f"/nodes/{node_id}").json()["code"] == "node_not_found"
    types = [event["type"] for event in api.get(f"/nodes/{node_id}/events").json()["items"]]
    assert types == ["node.lifecycle.deregistered", "node.lifecycle.registered"]


def test_list_pages_through_all_that_pass_the_filters(api: httpx.Client, node_id: str) -> None:
    names = sorted(f"{node_id}-{number}" for number in range(5))
    for name in names:
        register(api, name, labels={"batch": node_id})

    found, cursor, pages = [], None, 0
    while True:
        query = {"label": f"batch={node_id}", "limit": 2, **({"cursor": cursor} if cursor else {})}
        page = api.get("/nodes", params=query).json()
        found += [node["node_id"] for node in page["items"]]
        cursor, pages = page["next_cursor"], pages + 1
        if cursor is None:
            break

    assert (found, pages) == (names, 3)


def test_list_shows_a_change_at_once(api: httpx.Client, node_id: str) -> None:
    register(api, node_id, labels={"only": node_id})
    api.get("/nodes", params={"label": f"only={node_id}"})

    api.put(f"/nodes/{node_id}/status", json={"status": "cordoned"})

    listed = api.get("/nodes", params={"label": f"only={node_id}"}).json()["items"]
    assert [node["admin"] for node in listed] == ["cordoned"]


PROBLEMS = {
    "unknown-node": ("GET", "/nodes/nobody", {}, 404, "node_not_found"),
    "unknown-path": ("GET", "/nowhere", {}, 404, "not_found"),
    "wrong-method": ("PATCH", "/nodes", {}, 405, "method_not_allowed"),
    "bad-json": (
        "POST",
        "/nodes",
        {"content": b"{", "headers": {"content-type": "application/json"}},
        400,
        "invalid_json",
    ),
    "no-body": ("POST", "/nodes", {}, 422, "invalid_input"),
    "large-body": ("POST", "/nodes", {"content": b"x" * (10 * 1024 * 1024)}, 413, "body_too_large"),
    "bad-cursor": ("GET", "/nodes?cursor=%21", {}, 422, "invalid_input"),
    "bad-limit": ("GET", "/nodes?limit=0", {}, 422, "invalid_input"),
    "bad-id": ("GET", "/nodes/UPPER", {}, 422, "invalid_input"),
    "bad-job": ("GET", "/jobs/not-a-uuid", {}, 422, "invalid_input"),
    "unknown-job": ("GET", "/jobs/00000000-0000-4000-8000-000000000000", {}, 404, "job_not_found"),
}


@pytest.mark.parametrize(("method", "path", "options", "status", "code"), PROBLEMS.values(), ids=PROBLEMS)
def test_problem_has_a_stable_code(
    api: httpx.Client, method: str, path: str, options: dict[str, object], status: int, code: str
) -> None:
    answer = api.request(method, path, **options)  # type: ignore[arg-type]

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"


def test_body_without_length_is_limited_too(api: httpx.Client) -> None:
    chunks = (b"x" * 65536 for _ in range(160))

    answer = api.post("/nodes", content=chunks, headers={"content-type": "application/json"})

    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
