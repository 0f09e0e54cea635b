# SPDX-License-Identifier: GPL-3.0-or-later
"""The two links to the registry are one contract: in process, and over HTTP to a running service."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.plugin_utils._link import LinkError, open_link
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


def test_link_without_a_token_says_where_to_put_one(service: RunningService) -> None:
    with open_link({"NODE_MANAGER_URL": service.url}) as link, pytest.raises(LinkError) as raised:
        link.nodes()

    assert "set NODE_MANAGER_TOKEN" in str(raised.value)
    assert raised.value.temporary


def test_link_to_nowhere_says_so() -> None:
    with open_link({"NODE_MANAGER_URL": "http://127.0.0.1:9"}) as link, pytest.raises(LinkError) as raised:
        link.nodes()

    assert "is the service running" in str(raised.value)
