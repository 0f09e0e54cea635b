# SPDX-License-Identifier: GPL-3.0-or-later
"""The two links to the registry are one contract: in process, and over HTTP to a running service."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.plugin_utils._link import (
    HttpLink,
    LinkError,
    LocalLink,
    open_link,
)
from builders import make_report
from running_service import RunningService

SERVICE = Path(__file__).parent / "api" / "service_without_ansible.py"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    running = RunningService(tmp_path_factory.mktemp("service") / "home", command=(str(SERVICE),)).start()
    yield running
    running.kill()


@pytest.fixture(params=["local", "http"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    environment = {"NODE_MANAGER_HOME": str(tmp_path / "home")}
    if request.param == "http":
        service: RunningService = request.getfixturevalue("service")
        environment |= {"NODE_MANAGER_URL": service.url, "NODE_MANAGER_TOKEN": service.token}
    with open_link(environment) as opened:
        yield opened
        for node in opened.nodes():
            opened.deregister(node["node_id"], force=True)


def declaration(**more: Any) -> dict[str, Any]:
    return {"node_id": "gw-7", "address": "192.0.2.7", "labels": {"line": "a b=c"}, **more}


def test_link_registers_once(link: Any) -> None:
    first = link.register(declaration())
    second = link.register(declaration())

    assert (first["created"], second["created"]) == (True, False)
    assert first["node"]["node_id"] == "gw-7"
    assert {"labels", "location", "connection", "declared_capacity", "host_keys", "generation"} <= first["node"].keys()


def test_link_says_which_field_is_wrong(link: Any) -> None:
    with pytest.raises(LinkError, match=r"connection\.user") as raised:
        link.register(declaration(connection={"user": "-oProxyCommand=x"}))

    assert (raised.value.status, raised.value.temporary) == (422, False)


def test_link_refuses_another_declaration_of_the_same_node(link: Any) -> None:
    link.register(declaration())

    with pytest.raises(LinkError) as raised:
        link.register(declaration(address="192.0.2.8"))

    assert raised.value.code == "node_exists"


def test_link_updates_what_it_knows_and_nothing_newer(link: Any) -> None:
    generation = link.register(declaration())["node"]["generation"]

    node = link.update("gw-7", {"address": "192.0.2.8"}, generation=generation)
    with pytest.raises(LinkError) as raised:
        link.update("gw-7", {"address": "192.0.2.9"}, generation=generation)

    assert (node["address"], node["labels"]) == ("192.0.2.8", {})
    assert raised.value.code == "stale_generation"


def test_link_finds_nodes(link: Any) -> None:
    link.register(declaration())
    link.register(declaration(node_id="gw-8", labels={}, location={"zone": "eu 1&a"}))

    assert link.node("gw-9") is None
    assert link.node("gw-7")["address"] == "192.0.2.7"
    assert [node["node_id"] for node in link.nodes()] == ["gw-7", "gw-8"]
    assert [node["node_id"] for node in link.nodes({"labels": {"line": "a b=c"}})] == ["gw-7"]
    assert [node["node_id"] for node in link.nodes({"zone": "eu 1&a", "status": "online"})] == ["gw-8"]


def test_link_deregisters(link: Any) -> None:
    link.register(declaration())

    link.deregister("gw-7")

    assert link.node("gw-7") is None
    with pytest.raises(LinkError) as raised:
        link.deregister("gw-7")
    assert raised.value.code == "node_not_found"


def test_link_records_and_tells_what_was_not_taken(link: Any) -> None:
    link.register(declaration())
    contact = {"reached": False, "reason": "ConnectionRefused", "message": "no"}
    seen = {"observed_at": datetime.now(UTC).isoformat(), "source": "ansible", "kind": "contact", "data": contact}

    outcome = link.record([{"node_id": "gw-7", **seen}, {"node_id": "gw-9", **seen}])

    assert (outcome["recorded"], outcome["late"]) == (1, 0)
    assert [(item["index"], item["node_id"], item["code"]) for item in outcome["rejected"]] == [
        (1, "gw-9", "node_not_found")
    ]


def test_link_gives_the_inventory(link: Any) -> None:
    link.register(declaration())
    link.register(declaration(node_id="gw-8"))

    whole, one, none = link.inventory(), link.inventory(["gw-7", "gw-9"]), link.inventory([])

    assert [node["node_id"] for node in whole["nodes"]] == ["gw-7", "gw-8"]
    assert [node["node_id"] for node in one["nodes"]] == ["gw-7"]
    assert none["nodes"] == []
    assert whole.keys() == one.keys() == none.keys()


def test_link_gives_the_node_types(link: Any) -> None:
    answer = link.node_types()

    assert answer["node_types"]["constrained"].keys() >= {"recognised_by", "checks", "thresholds"}
    assert answer["thresholds"]["disk_percent"] == {"warning": 85, "critical": 95}
    assert answer["checks_timeout_seconds"] > 0


def found_healthy(link: Any, *node_ids: str) -> None:
    """Register nodes with 1000 MiB that were found healthy just now."""
    for node_id in node_ids:
        link.register(declaration(node_id=node_id, capacity={"memory_mib": 1000, "gpu": 1}))
    seen = {"observed_at": datetime.now(UTC).isoformat(), "source": "ansible", "kind": "report", "data": make_report()}
    assert link.record([{"node_id": node_id, **seen} for node_id in node_ids])["rejected"] == []


ALLOCATION = {"allocation_id": "batch:a", "owner": "t", "resources": {"memory_mib": 600}, "ttl_seconds": 60}


def test_link_allocates_once(link: Any) -> None:
    found_healthy(link, "gw-7")

    absent = link.allocation("batch:a")
    first, second = link.allocate("gw-7", ALLOCATION), link.allocate("gw-7", ALLOCATION)

    assert absent is None
    assert (first["created"], second["created"]) == (True, False)
    assert first["allocation"] == second["allocation"] == link.allocation("batch:a")
    assert link.resources("gw-7")["available"]["memory_mib"] == 400


def test_link_confirms_and_deallocates(link: Any) -> None:
    found_healthy(link, "gw-7")
    link.allocate("gw-7", ALLOCATION)

    confirmed = link.confirm("batch:a")
    released = [link.deallocate("gw-7", "batch:a"), link.deallocate("gw-7", "batch:a")]

    assert confirmed["expires_at"] is None
    assert released == [True, False]
    with pytest.raises(LinkError) as raised:
        link.confirm("batch:a")
    assert (raised.value.code, raised.value.temporary) == ("allocation_not_found", False)


@pytest.mark.parametrize(
    ("node_id", "changes", "code"),
    [
        ("gw-7", {"resources": {"memory_mib": 1001}}, "insufficient_resources"),
        ("gw-7", {"resources": {"memory_mib": "1"}}, "invalid_input"),
        ("gw-7", {"owner": "a b"}, "invalid_input"),
        ("gw-7", {"more": 1}, "invalid_input"),
        ("gw-9", {}, "node_not_found"),
    ],
)
def test_link_tells_why_nothing_is_allocated(link: Any, node_id: str, changes: dict[str, Any], code: str) -> None:
    found_healthy(link, "gw-7")

    with pytest.raises(LinkError) as raised:
        link.allocate(node_id, {**ALLOCATION, **changes})

    assert raised.value.code == code


def test_link_selects_confirms_and_releases(link: Any) -> None:
    found_healthy(link, "gw-7", "gw-8")
    request = {"deployment_id": "web", "owner": "t", "replicas": 2, "resources": {"memory_mib": 600}, "ttl_seconds": 60}

    rehearsal, absent = link.select({**request, "dry_run": True}), link.deployment("web")
    first, second = link.select(request), link.select(request)
    confirmed = link.confirm_deployment("web")

    assert (rehearsal["reserved"], rehearsal["decision_id"], absent) == (False, None, None)
    assert {node["node_id"] for node in first["nodes"]} == {"gw-7", "gw-8"}
    assert first == second
    assert [allocation["expires_at"] for allocation in confirmed] == [None, None]
    assert [allocation["allocation_id"] for allocation in link.deployment("web")] == ["web:0", "web:1"]
    assert link.release_deployment("web") == 2
    with pytest.raises(LinkError) as raised:
        link.release_deployment("web")
    assert raised.value.code == "deployment_not_found"


def test_link_tells_why_nothing_fits(link: Any) -> None:
    found_healthy(link, "gw-7")

    with pytest.raises(LinkError, match="1 insufficient_memory_mib") as raised:
        link.select({"deployment_id": "web", "owner": "t", "resources": {"memory_mib": 1001}})

    assert (raised.value.code, raised.value.temporary) == ("nothing_fits", False)


def test_link_gives_advice(link: Any) -> None:
    found_healthy(link, "gw-7")
    for number in range(3):
        link.select({"deployment_id": f"web-{number}", "owner": "t", "resources": {"memory_mib": 300}})
    found_healthy(link, "gw-8")

    advice = link.optimization()

    assert advice["imbalance_after"] < advice["imbalance_before"]
    assert {(move["from_node"], move["to_node"]) for move in advice["moves"]} == {("gw-7", "gw-8")}


def test_both_links_have_the_same_methods() -> None:
    methods = [
        {name: inspect.signature(value) for name, value in vars(link).items() if not name.startswith("_")}
        for link in (LocalLink, HttpLink)
    ]

    assert methods[0] == methods[1]


def test_link_without_a_token_says_where_to_put_one(service: RunningService) -> None:
    with open_link({"NODE_MANAGER_URL": service.url}) as link, pytest.raises(LinkError) as raised:
        link.nodes()

    assert "set NODE_MANAGER_TOKEN" in str(raised.value)
    assert raised.value.temporary


def test_link_to_nowhere_says_so() -> None:
    with open_link({"NODE_MANAGER_URL": "http://127.0.0.1:9"}) as link, pytest.raises(LinkError) as raised:
        link.nodes()

    assert "is the service running" in str(raised.value)
