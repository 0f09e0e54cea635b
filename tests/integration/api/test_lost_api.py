# SPDX-License-Identifier: GPL-3.0-or-later
"""What would become of a node's work, over HTTP."""

from __future__ import annotations

import httpx
from node_manager.api.lost import router
from running_service import RunningService


def register(api: httpx.Client, node_id: str, memory_mib: int = 100) -> None:
    """Register a node that nobody looks at."""
    body = {"node_id": node_id, "address": "127.0.9.7", "capacity": {"memory_mib": memory_mib}}
    answer = api.post("/nodes", params={"look": "false"}, json=body)
    assert answer.status_code == 201, answer.text


def hold(api: httpx.Client, node_id: str, allocation_id: str) -> None:
    """Allocate 10 MiB."""
    body = {"allocation_id": allocation_id, "owner": "shop", "resources": {"memory_mib": 10}}
    assert api.post(f"/nodes/{node_id}/allocate", json=body).status_code == 201


def test_replacements_of_a_node_that_is_well(own_service: RunningService, node_id: str) -> None:
    with own_service.start().client() as api:
        register(api, node_id)
        hold(api, node_id, f"{node_id}.a")
        before = api.get(f"/nodes/{node_id}/resources").json()

        answer = api.get(f"/nodes/{node_id}/replacements")
        after = api.get(f"/nodes/{node_id}/resources").json()

    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["node_id"], found["left_out"], found["computed_at"][-1]) == (node_id, 0, "Z")
    (item,) = found["items"]
    # Nodes that nobody has looked at take no work.
    assert item["to_node"] is None
    assert item["why"].startswith("fits nowhere: of ")
    assert {key: item[key] for key in ("allocation_id", "owner", "deployment_id", "resources")} == {
        "allocation_id": f"{node_id}.a",
        "owner": "shop",
        "deployment_id": None,
        "resources": {"memory_mib": 10},
    }
    assert after == before


def test_replacements_of_a_node_without_work_and_of_none(api: httpx.Client, node_id: str) -> None:
    register(api, node_id)

    assert api.get(f"/nodes/{node_id}/replacements").json()["items"] == []
    answer = api.get(f"/nodes/{node_id}-gone/replacements")
    assert (answer.status_code, answer.json()["code"]) == (404, "node_not_found")


def test_replacements_are_described(api: httpx.Client) -> None:
    described = api.get("/openapi.json").json()["paths"]

    assert [path for path in described if path.endswith("/replacements")] == [route.path for route in router.routes]  # type: ignore[attr-defined]


def test_the_epoch_is_shown_with_the_node_and_its_books(api: httpx.Client, node_id: str) -> None:
    register(api, node_id)

    assert api.get(f"/nodes/{node_id}").json()["epoch"] == 1
    assert api.get(f"/nodes/{node_id}/resources").json()["epoch"] == 1
