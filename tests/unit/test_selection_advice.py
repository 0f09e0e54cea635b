# SPDX-License-Identifier: GPL-3.0-or-later
"""What is offered to somebody whose request doesn't fit really helps, the smallest change first."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from fleet_rows_builder import (
    NOW,
    in_places,
    make_deployment,
    make_index,
    make_row,
    make_rows,
    make_selection_request,
    make_selector,
)
from node_manager.fleet_index import FleetIndex
from node_manager.fleet_rows import NodeRow, write_row
from node_manager.selection_advice import advise, merge_patch
from node_manager.selection_request import SelectionRequest
from selection_model import Fleet, random_fleet, random_request


def advice_for(index: FleetIndex, request: SelectionRequest) -> list[dict[str, Any]]:
    """Let a request fail, and ask what would help."""
    selector = make_selector(index)
    failed = selector.select(request, NOW)
    assert not failed.fits
    return advise(selector, request, NOW, failed)


def helps(fleet: Fleet, request: SelectionRequest, change: dict[str, Any]) -> bool:
    """Do what a change says, to the request or to the fleet, and select again."""
    rows = list(fleet.rows)
    if change["kind"] == "request":
        request = SelectionRequest.model_validate(merge_patch(request.model_dump(mode="json"), change["patch"]))
    elif change["kind"] == "open_nodes":
        assert set(change["node_ids"]) <= {row.node_id for row in rows}
        rows = [
            replace(row, blocked=None, last_contact=NOW) if row.node_id in change["node_ids"] else row for row in rows
        ]
    else:
        rows += [added(number, node) for number, node in enumerate(change["nodes"])]
    index = make_index(rows, fleet.deployments.values())
    return make_selector(index).select(request, NOW).fits


def added(number: int, node: dict[str, Any]) -> NodeRow:
    """Make the node that a change asks for, and nothing more: what it leaves out isn't there."""
    location = node["location"]
    common = {name: amount for name, amount in node["effective"].items() if name not in {"gpu", "tpu"}}
    return make_row(
        f"new-{number}",
        node_type=node["node_type"],
        region=location.get("region"),
        zone=location.get("zone"),
        site=location.get("site"),
        latitude=location.get("latitude"),
        longitude=location.get("longitude"),
        labels=node["labels"],
        features=node["features"],
        effective=node["effective"],
        capacity=common,
        units={
            name: [str(unit) for unit in range(count)]
            for name, count in node["effective"].items()
            if name not in common
        },
        cpu_percent=None,
        memory_percent=None,
    )


def failing_cases(seeds: range) -> list[tuple[int, Fleet, SelectionRequest]]:
    """Make fleets and requests that don't fit them."""
    found = []
    for seed in seeds:
        dice = random.Random(seed)
        fleet = random_fleet(dice)
        request = random_request(dice, fleet)
        index = make_index(fleet.rows, fleet.deployments.values())
        if not make_selector(index).select(request, NOW).fits:
            found.append((seed, fleet, request))
    return found


def test_advise_offers_only_what_helps() -> None:
    useless, kinds = [], Counter[str]()

    for seed, fleet, request in failing_cases(range(30_000, 30_500)):
        for change in advice_for(make_index(fleet.rows, fleet.deployments.values()), request):
            kinds[change["kind"]] += 1
            if not helps(fleet, request, change):
                useless.append((seed, change))

    assert useless == []
    assert min(kinds[kind] for kind in ("request", "open_nodes", "add_nodes")) > 10, kinds


def test_advise_offers_something_wherever_the_fleet_has_an_open_node() -> None:
    # Without any rule, and for little, one replica runs on any open node that has something left.
    silent = []

    for seed, fleet, request in failing_cases(range(40_000, 40_400)):
        bare = make_selection_request(resources=dict.fromkeys(request.resources, 1), labels=request.labels)
        index = make_index(fleet.rows, fleet.deployments.values())
        possible = make_selector(index).select(bare, NOW).fits
        if possible and not advice_for(make_index(fleet.rows, fleet.deployments.values()), request):
            silent.append(seed)

    assert silent == []


def test_advise_leaves_the_index_as_it_was() -> None:
    for seed, fleet, request in failing_cases(range(30_000, 30_150)):
        index = make_index(fleet.rows, fleet.deployments.values())
        selector = make_selector(index)
        failed = selector.select(request, NOW)
        before = look_at(index)

        advise(selector, request, NOW, failed)

        assert look_at(index) == before, seed
        assert index.removed == {}, seed


def look_at(index: FleetIndex) -> dict[str, Any]:
    """Write down what selection sees of each node; places that no node has don't matter."""
    found: dict[str, Any] = {
        node_id: (
            write_row(index.rows[place]),  # type: ignore[arg-type]
            index.available[:, place].tolist(),
            index.blocked[place].item(),
            index.last_contact[place].item(),
            index.load[place].item(),
            index.stability[place].item(),
            {name: free[place][free[place] > 0].tolist() for name, free in index.devices.items() if free[place].any()},
        )
        for node_id, place in index.place_of.items()
    }
    found["holders"] = {name: dict(held) for name, held in index.deployments.holders.items()}
    found["deployments"] = dict(index.deployments.rows)
    found["blocked"] = index.blocked_counts()
    return found


# what exactly is offered


def patches(index: FleetIndex, **request: Any) -> list[dict[str, Any]]:
    """Give the patches that are offered, in order."""
    changes = advice_for(index, make_selection_request(**request))
    return [change["patch"] for change in changes if change["kind"] == "request"]


def test_advise_finds_the_most_replicas() -> None:
    assert {"replicas": 4} in patches(make_index(make_rows(2)), replicas=6, resources={"memory_mib": 4000})


def test_advise_finds_the_largest_amount() -> None:
    index = make_index([make_row("n1", allocated={"memory_mib": 1000}), make_row("n2", allocated={"memory_mib": 2500})])

    found = patches(index, replicas=3, resources={"memory_mib": 6000, "cpu_millicores": 100})

    assert {"resources": {"memory_mib": 3500}} in found


def test_advise_finds_the_nearest_distance() -> None:
    rows = [make_row(f"n{number}", latitude=48.0 + number, longitude=11.0) for number in range(5)]
    within = {"latitude": 47.0, "longitude": 11.0, "max_km": 50}

    (first, *_) = patches(make_index(rows), constraints={"within": within})

    assert first == {"constraints": {"within": {"max_km": 111.3}}}


def test_advise_finds_the_smallest_skew() -> None:
    rows = in_places({"a": ("r", "a", "1"), "b": ("r", "b", "2")})
    rows[1] = replace(rows[1], effective={"cpu_millicores": 100})

    found = patches(make_index(rows), replicas=5, spread={"scope": "zone", "max_skew": 1})

    assert {"spread": {"max_skew": 3}} in found


def test_advise_finds_fewer_units_and_smaller_shares() -> None:
    index = make_index([make_row(units={"gpu": ["0", "1", "2"]}, used_units={"gpu": {"0": 400, "1": 600, "2": 600}})])

    whole = patches(index, resources={"gpu": 1, "cpu_millicores": 1})
    shares = patches(index, resources={"gpu": {"count": 3, "share_milli": 500}})

    assert {"resources": {"gpu": {"count": 1, "share_milli": 600}}} in whole
    assert {"resources": {"gpu": {"count": 1, "share_milli": 500}}} in shares


SOFTENED = {
    "a type": ({"constraints": {"node_types": ["gateway"]}}, {"constraints": {"node_types": None}}),
    "a zone": ({"constraints": {"zones": ["q"]}}, {"constraints": {"zones": None}}),
    "one label of two": (
        {"constraints": {"labels": {"line": "x", "disk": "hdd"}}},
        {"constraints": {"labels": {"disk": None}}},
    ),
    "one feature of two": ({"constraints": {"features": ["tpm", "docker"]}}, {"constraints": {"features": ["docker"]}}),
    "nodes that aren't there": ({"constraints": {"node_ids": ["n9"]}}, {"constraints": {"node_ids": None}}),
    "all excluded": ({"constraints": {"exclude_node_ids": ["n1"]}}, {"constraints": {"exclude_node_ids": None}}),
    "spread without zones": ({"spread": {"scope": "region"}}, {"spread": None}),
}


@pytest.mark.parametrize(("request_", "patch"), SOFTENED.values(), ids=SOFTENED)
def test_advise_leaves_out_the_rule_that_stands_in_the_way(request_: dict[str, Any], patch: dict[str, Any]) -> None:
    index = make_index([make_row(region=None, labels={"line": "x"}, features=["docker"])])

    assert patches(index, **request_) == [patch]


@pytest.mark.parametrize("name", ["affinity", "anti_affinity"])
def test_advise_makes_a_required_term_preferred(name: str) -> None:
    index = make_index([make_row(deployments={"db": 1})], [make_deployment("db")])
    target = {"deployment_id": "db" if name == "anti_affinity" else "none"}

    (patch,) = patches(index, **{name: [{"scope": "node", **target}]})

    assert [term["mode"] for term in patch[name]] == ["preferred"]


def test_advise_puts_changes_together_where_no_single_one_helps() -> None:
    index = make_index([make_row()])
    constraints = {"zones": ["q"], "labels": {"line": "x"}}

    (patch,) = patches(index, constraints=constraints, resources={"cpu_millicores": 9000})

    assert patch == {
        "constraints": {"zones": None, "labels": {"line": None}},
        "resources": {"cpu_millicores": 4000},
    }


def test_advise_sorts_by_size() -> None:
    index = make_index(make_rows(2))

    found = patches(
        index, replicas=3, resources={"memory_mib": 4100, "cpu_millicores": 100}, constraints={"features": []}
    )

    # A fortieth less memory is a smaller change than a replica of three less.
    assert found == [{"resources": {"memory_mib": 4000}}, {"replicas": 2}]


OUT = {
    "cordoned": {"blocked": "not_active"},
    "unhealthy": {"blocked": "unhealthy"},
    "quarantined": {"blocked": "quarantined"},
    "stale": {"last_contact": NOW - 1000},
    "never seen": {"last_contact": None},
}


@pytest.mark.parametrize("out", OUT.values(), ids=OUT)
def test_advise_names_the_nodes_that_are_out_and_would_do(out: dict[str, Any]) -> None:
    rows = [
        make_row("small", effective={"cpu_millicores": 50}, **out),
        make_row("right", **out),
        make_row("other-zone", zone="b", **out),
    ]

    changes = advice_for(make_index(rows), make_selection_request(constraints={"zones": ["a"]}))

    (opened,) = [change for change in changes if change["kind"] == "open_nodes"]
    assert opened["node_ids"] == ["right"]


def test_advise_on_an_empty_fleet_says_what_to_add() -> None:
    constraints = {"zones": ["a"], "labels": {"line": ["x", "y"]}, "features": ["docker"], "node_types": ["server"]}
    request = make_selection_request(
        resources={"cpu_millicores": 500, "gpu": {"count": 2, "share_milli": 300}}, replicas=2, constraints=constraints
    )

    (change,) = advice_for(make_index([]), request)

    assert change["kind"] == "add_nodes"
    assert len(change["nodes"]) == 2
    assert change["nodes"][0] == {
        "node_type": "server",
        "labels": {"line": "x"},
        "features": ["docker"],
        "location": {"zone": "a"},
        "effective": {"cpu_millicores": 500, "gpu": 2},
    }


# patches

MERGED: dict[str, tuple[Any, Any, Any]] = {
    # RFC 7396, appendix A.
    "replace": ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    "add": ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    "remove": ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    "list": ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    "to list": ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    "nested": ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    "lists are whole": ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    "not an object": ({"a": "foo"}, "bar", "bar"),
    "null in a document stays": ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    "of nothing": ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
}


@pytest.mark.parametrize(("document", "patch", "expected"), MERGED.values(), ids=MERGED)
def test_merge_patch_follows_rfc_7396(document: Any, patch: Any, expected: Any) -> None:
    assert merge_patch(document, patch) == expected
