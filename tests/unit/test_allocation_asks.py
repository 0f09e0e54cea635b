# SPDX-License-Identifier: GPL-3.0-or-later
"""What playbooks ask of allocation and selection, as the manager is asked."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.plugin_utils import _allocation
from ansible_collections.iot_platform.node_manager.plugins.plugin_utils._allocation import WrongValueError
from builders import START
from node_manager.capacity import account
from node_manager.ledger import Allocation
from node_manager.resources import DeviceShare, as_data, ask_of
from node_manager.selection_request import SelectionRequest
from node_manager.views import render_allocation, render_resources


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({"memory_mib": 5}, {"memory_mib": 5}, id="number"),
        pytest.param({"memory_mib": "5"}, {"memory_mib": 5}, id="text"),
        pytest.param({"memory_mib": "007"}, {"memory_mib": 7}, id="zeros"),
        pytest.param({"memory_mib": "-5"}, {"memory_mib": -5}, id="negative, which the manager refuses"),
        pytest.param({"gpu": {"share_milli": "460"}}, {"gpu": {"share_milli": 460}}, id="share"),
    ],
)
def test_read_resources_reads_whole_numbers(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert expected == _allocation.read_resources(given)


@pytest.mark.parametrize(
    "value", ["", " 5", "5 ", "5.0", "5e3", "0x5", "5_0", "+5", "\u0665", "9" * 19, "{{ 5 }}", 5.0, True, None, [5]]
)
def test_read_resources_names_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(WrongValueError, match=r"^resources\.memory_mib: expected a whole number, got "):
        _allocation.read_resources({"memory_mib": value})


@pytest.mark.parametrize(
    "given",
    [
        {"memory_mib": 5, "cpu_millicores": 6},
        {"gpu": 2},
        {"gpu": {}},
        {"gpu": {"count": 2}},
        {"gpu": {"share_milli": 1000}},
        {"gpu": {"count": 2, "share_milli": 460}},
    ],
)
def test_canonical_is_what_the_manager_writes(given: dict[str, Any]) -> None:
    asked = {
        name: DeviceShare.model_validate(amount) if isinstance(amount, dict) else amount
        for name, amount in given.items()
    }

    assert as_data(ask_of(asked)) == _allocation.canonical(given)


def test_expected_is_what_the_manager_shows_in_the_end() -> None:
    body = {"allocation_id": "a", "owner": "t", "resources": {"memory_mib": 5, "gpu": {"count": 1}}}
    made = Allocation("a", "gw-7", "t", None, ask_of(body["resources"] | {"gpu": 1}), {}, None, None, START)

    assert _allocation.shown(render_allocation(made)) == _allocation.expected("gw-7", body)


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        pytest.param({"memory_mib": 60}, [], id="all that is left"),
        pytest.param({"memory_mib": 61}, ["memory_mib"], id="one more"),
        pytest.param({"network_mbps": 1}, ["network_mbps"], id="a class that it lacks"),
        pytest.param({"gpu": 1}, [], id="whole unit"),
        pytest.param({"gpu": 2}, ["gpu"], id="two whole units"),
        pytest.param({"gpu": {"count": 2, "share_milli": 500}}, [], id="two halves"),
        pytest.param({"gpu": {"count": 2, "share_milli": 501}}, ["gpu"], id="more than two halves"),
        pytest.param({"camera": {"count": 1}}, ["camera"], id="a device that it lacks"),
    ],
)
def test_lacking_names_what_there_is_too_little_of(resources: dict[str, Any], expected: list[str]) -> None:
    books = account(
        {"memory_mib": 100, "gpu": 2}, {"gpu": ["0", "1"]}, None, {"memory_mib": 40, "gpu": 500}, {"gpu": {"0": 500}}
    )

    assert expected == _allocation.lacking(render_resources("gw-7", books, []), resources)


def test_selection_of_gives_a_request_that_the_manager_takes() -> None:
    options = {
        "owner": "t", "replicas": 2, "resources": {"memory_mib": "5"}, "labels": {"tier": 1, "spare": True},
        "constraints": {"labels": {"line": ["a", 2], "floor": 3}, "zones": ["eu-1a"],
                        "within": {"latitude": "52", "longitude": "13.5", "max_km": "40"}},
        "affinity": [{"node_labels": {"disk": True}, "mode": "preferred", "weight": "3"}], "anti_affinity": None,
        "spread": {"scope": "zone", "max_skew": "1"}, "near": {"latitude": "52.5", "longitude": 13},
        "images": ["app:1.2"], "strategy": "binpack", "ttl_seconds": 60, "reserve": True, "details": True,
    }  # fmt: skip

    request = SelectionRequest.model_validate(_allocation.selection_of("web-1", options))

    assert (request.deployment_id, request.replicas, request.ttl_seconds) == ("web-1", 2, 60)
    assert request.labels == {"tier": "1", "spare": "true"}
    assert request.constraints.labels == {"line": ["a", "2"], "floor": ["3"]}
    assert request.affinity[0].node_labels == {"disk": "true"}
    assert request.affinity[0].weight == 3
    assert request.constraints.within is not None
    assert request.constraints.within.max_km == 40
    assert request.spread is not None
    assert request.spread.max_skew == 1
    assert request.near is not None
    assert request.near.latitude == 52.5
    assert request.ask == ask_of({"memory_mib": 5})


@pytest.mark.parametrize(
    "node_id",
    ["all", "localhost", "127.0.0.1", "*", "!gw-1", "gw-1,gw-2", "gw-1:&a", "~gw", "", "-o", "{{ 1 }}", None, 7],
)
def test_node_ids_of_takes_only_names_of_nodes(node_id: Any) -> None:
    with pytest.raises(WrongValueError, match="which is no node's name"):
        _allocation.node_ids_of({"nodes": [{"node_id": "gw-7"}, {"node_id": node_id}]})


def test_node_ids_of_names_a_node_for_each_replica() -> None:
    placement = {"nodes": [{"node_id": node_id} for node_id in ("gw-7.plant-2", "gw-7.plant-2", "a")]}

    assert _allocation.node_ids_of(placement) == ["gw-7.plant-2", "gw-7.plant-2", "a"]


def test_summary_of_has_a_line_for_each_move() -> None:
    move = {"allocation_id": "web:0", "from_node": "gw-1", "to_node": "gw-2", "reason": "memory_mib is full"}

    lines = _allocation.summary_of({"imbalance_before": 0.5, "imbalance_after": 0.25, "moves": [move], "more": True})

    assert lines == [
        "imbalance 0.500, 0.250 after 1 move; there is more to move",
        "web:0: gw-1 -> gw-2 (memory_mib is full)",
    ]
