# SPDX-License-Identifier: GPL-3.0-or-later
"""Each filter by itself: whom it leaves, whom it leaves out, and under which name it counts them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fleet_rows_builder import (
    NOW,
    STALE_AFTER_SECONDS,
    chosen,
    in_places,
    make_deployment,
    make_index,
    make_row,
    make_rows,
    make_selection_request,
    select,
)
from node_manager.fleet_index import FleetIndex
from node_manager.geography import EARTH_RADIUS_KM, chord_of, kilometres_of
from node_manager.selection_filters import Filters


def left(index: FleetIndex, **request: Any) -> tuple[list[str], dict[str, int]]:
    """Name the nodes that the filters leave, and count the others by reason."""
    wanted = make_selection_request(**request)
    found = Filters(index, STALE_AFTER_SECONDS).apply(wanted, wanted.ask, NOW)
    names = [index.rows[place].node_id for place in np.flatnonzero(found.alive)]  # type: ignore[union-attr]
    assert len(names) == found.left == len(index) - sum(found.rejected.values())
    return sorted(names), found.rejected


# what a node must be

FLEET = [
    make_row("n1", node_type="server", region="r", zone="a", site="a1", labels={"line": "x"}, features=["docker"]),
    make_row("n2", node_type="edge", region="r", zone="a", site="a2", labels={"line": "y"}, features=["docker", "tpm"]),
    make_row("n3", node_type="edge", region="r", zone="b", site="b1", labels={"line": "z", "disk": "ssd"}),
    make_row("n4", node_type=None, region="s", zone="c", site=None, labels={}, features=["tpm"]),
]
CONSTRAINTS: dict[str, tuple[dict[str, Any], list[str], dict[str, int]]] = {
    "nothing": ({}, ["n1", "n2", "n3", "n4"], {}),
    "one type": ({"node_types": ["edge"]}, ["n2", "n3"], {"node_type": 2}),
    "several types": ({"node_types": ["edge", "server"]}, ["n1", "n2", "n3"], {"node_type": 1}),
    "a type that no node has": ({"node_types": ["gateway"]}, [], {"node_type": 4}),
    "region": ({"regions": ["s"]}, ["n4"], {"region": 3}),
    "zone": ({"zones": ["b", "c"]}, ["n3", "n4"], {"zone": 2}),
    "zone that no node is in": ({"zones": ["q"]}, [], {"zone": 4}),
    "site": ({"sites": ["a2"]}, ["n2"], {"site": 3}),
    "label": ({"labels": {"line": "x"}}, ["n1"], {"label line": 3}),
    "label of several values": ({"labels": {"line": ["x", "z"]}}, ["n1", "n3"], {"label line": 2}),
    "several labels": ({"labels": {"line": ["y", "z"], "disk": "ssd"}}, ["n3"], {"label line": 2, "label disk": 1}),
    "feature": ({"features": ["tpm"]}, ["n2", "n4"], {"feature tpm": 2}),
    "all features": ({"features": ["docker", "tpm"]}, ["n2"], {"feature docker": 2, "feature tpm": 1}),
    "listed": ({"node_ids": ["n1", "n3", "unknown"]}, ["n1", "n3"], {"not_listed": 2}),
    "only unknown ones listed": ({"node_ids": ["unknown"]}, [], {"not_listed": 4}),
    "excluded": ({"exclude_node_ids": ["n1", "n2", "unknown"]}, ["n3", "n4"], {"excluded": 2}),
    "excluded twice": ({"exclude_node_ids": ["n1", "n1"]}, ["n2", "n3", "n4"], {"excluded": 1}),
    "listed and excluded": (
        {"node_ids": ["n1", "n2"], "exclude_node_ids": ["n1"]},
        ["n2"],
        {"not_listed": 2, "excluded": 1},
    ),
    "the first reason counts": (
        {"node_types": ["edge"], "zones": ["b"], "labels": {"disk": "hdd"}},
        [],
        {"node_type": 2, "zone": 1, "label disk": 1},
    ),
}


@pytest.mark.parametrize(("constraints", "expected", "rejected"), CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_apply_keeps_to_constraints(constraints: dict[str, Any], expected: list[str], rejected: dict[str, int]) -> None:
    assert left(make_index(FLEET), constraints=constraints) == (expected, rejected)


# whether it takes work

STATES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "open": ({}, {}),
    "cordoned": ({"blocked": "not_active"}, {"not_active": 1}),
    "quarantined": ({"blocked": "quarantined"}, {"quarantined": 1}),
    "unhealthy": ({"blocked": "unhealthy"}, {"unhealthy": 1}),
    "as old as allowed": ({"last_contact": NOW - STALE_AFTER_SECONDS}, {}),
    "stale": ({"last_contact": NOW - STALE_AFTER_SECONDS - 0.001}, {"stale": 1}),
    "never seen": ({"last_contact": None}, {"stale": 1}),
    "cordoned and never seen": ({"blocked": "not_active", "last_contact": None}, {"not_active": 1}),
}


@pytest.mark.parametrize(("state", "rejected"), STATES.values(), ids=STATES)
def test_apply_leaves_out_nodes_that_take_no_work(state: dict[str, Any], rejected: dict[str, int]) -> None:
    index = make_index([make_row("n1", **state), make_row("n2")])

    assert left(index) == ((["n2"], rejected) if rejected else (["n1", "n2"], {}))


def test_apply_does_not_count_a_node_that_is_gone() -> None:
    index = make_index(make_rows(3))
    index.remove("n01")

    assert left(index, constraints={"zones": ["a"]}) == (["n00", "n02"], {})
    assert select(index, resources={"memory_mib": 10**9}).rejected == {"insufficient_memory_mib": 2}


# distance

KM_PER_DEGREE = math.pi * EARTH_RADIUS_KM / 180
DISTANCES: dict[str, tuple[tuple[float | None, float | None], tuple[float, float], float, bool]] = {
    "at the point": ((48.0, 11.0), (48.0, 11.0), 0.001, True),
    "just inside": ((49.0, 11.0), (48.0, 11.0), KM_PER_DEGREE + 0.001, True),
    "just outside": ((49.0, 11.0), (48.0, 11.0), KM_PER_DEGREE - 0.001, False),
    "along a circle of latitude": ((60.0, 11.0), (60.0, 12.0), KM_PER_DEGREE / 2 + 0.1, True),
    "over the antimeridian": ((0.0, 179.5), (0.0, -179.5), KM_PER_DEGREE + 0.001, True),
    "not quite over the antimeridian": ((0.0, 179.5), (0.0, -179.5), KM_PER_DEGREE - 0.001, False),
    "over the pole": ((89.5, 0.0), (89.5, 180.0), KM_PER_DEGREE + 0.001, True),
    "at the pole longitude is nothing": ((90.0, 0.0), (90.0, 123.0), 0.001, True),
    "the south pole": ((-90.0, 17.0), (-89.0, 50.0), KM_PER_DEGREE + 0.001, True),
    "half the earth": ((0.0, 0.0), (90.0, 0.0), 90 * KM_PER_DEGREE - 0.001, False),
    "place unknown": ((None, None), (48.0, 11.0), 20_100, False),
}


@pytest.mark.parametrize(("place", "point", "max_km", "expected"), DISTANCES.values(), ids=DISTANCES)
def test_apply_measures_distance(
    place: tuple[float | None, float | None], point: tuple[float, float], max_km: float, *, expected: bool
) -> None:
    index = make_index([make_row("n1", latitude=place[0], longitude=place[1])])

    found, rejected = left(
        index, constraints={"within": {"latitude": point[0], "longitude": point[1], "max_km": max_km}}
    )

    assert (found, rejected) == ((["n1"], {}) if expected else ([], {"distance": 1}))


def test_apply_finds_every_node_of_known_place_within_the_whole_earth() -> None:
    # Chords of opposite points come out a rounding longer than two.
    points = [(0.37 * number % 90, 7.7 * number % 180) for number in range(1, 200)]
    index = make_index(make_row(f"n{n}", latitude=-lat, longitude=lon - 180) for n, (lat, lon) in enumerate(points))

    for latitude, longitude in points:
        within = {"latitude": latitude, "longitude": longitude, "max_km": 20_100}
        assert left(index, constraints={"within": within})[1] == {}


@pytest.mark.parametrize("kilometres", [0.001, 1.0, 500.0, 10_000.0, 20_000.0])
def test_kilometres_of_undoes_chord_of(kilometres: float) -> None:
    assert kilometres_of(chord_of(kilometres)) == pytest.approx(kilometres)


# room

GPU_FLEET = [
    make_row("none"),
    make_row("whole", units={"gpu": ["0", "1"]}),
    make_row("halves", units={"gpu": ["0", "1"]}, used_units={"gpu": {"0": 500, "1": 500}}),
    make_row("half", units={"gpu": ["0", "1"]}, used_units={"gpu": {"0": 500, "1": 1000}}),
    make_row("gone", units={"gpu": ["0"]}, used_units={"gpu": {"0": 1000, "9": 500}}),
]
ROOMS: dict[str, tuple[Any, list[str]]] = {
    "one whole": (1, ["whole"]),
    "two whole": (2, ["whole"]),
    "three whole": (3, []),
    "a share": ({"count": 1, "share_milli": 500}, ["half", "halves", "whole"]),
    "a larger share": ({"count": 1, "share_milli": 501}, ["whole"]),
    "two shares of two units": ({"count": 2, "share_milli": 500}, ["halves", "whole"]),
    "three shares of three units": ({"count": 3, "share_milli": 1}, []),
}


@pytest.mark.parametrize(("wanted", "expected"), ROOMS.values(), ids=ROOMS)
def test_apply_leaves_nodes_with_room_for_devices(wanted: Any, expected: list[str]) -> None:
    found, rejected = left(make_index(GPU_FLEET), resources={"gpu": wanted})

    assert (found, rejected) == (expected, {"insufficient_gpu": 5 - len(expected)})


def test_apply_names_the_first_class_that_is_short() -> None:
    rows = [
        make_row("n1", allocated={"cpu_millicores": 3900}),
        make_row("n2", allocated={"cpu_millicores": 3901}),
        make_row("n3", allocated={"memory_mib": 7999}),
        make_row("n4", allocated={"cpu_millicores": 9999}),
        make_row("n5", effective={"cpu_millicores": 4000}),
    ]

    found = left(make_index(rows), resources={"cpu_millicores": 100, "memory_mib": 2})

    assert found == (["n1"], {"insufficient_cpu_millicores": 2, "insufficient_memory_mib": 2})


def test_apply_of_a_device_that_no_node_has_fits_nothing() -> None:
    assert left(make_index(make_rows(2)), resources={"tpu": 1}) == ([], {"insufficient_tpu": 2})


SLOTS: dict[str, tuple[dict[str, Any], int]] = {
    "amounts": ({"cpu_millicores": 900}, 4),
    "the scarcest": ({"cpu_millicores": 100, "memory_mib": 3000}, 2),
    "whole units": ({"gpu": 2}, 2),
    "shares": ({"gpu": {"count": 1, "share_milli": 300}}, 15),
    "shares of different units": ({"gpu": {"count": 3, "share_milli": 500}}, 3),
    "most": ({"cpu_millicores": 1}, 99),
    "none there": ({"tpu": 1}, 0),
}


@pytest.mark.parametrize(("resources", "expected"), SLOTS.values(), ids=SLOTS)
def test_slots_counts_replicas(resources: dict[str, Any], expected: int) -> None:
    index = make_index([make_row(units={"gpu": ["0", "1", "2", "3", "4"]})])
    ask = make_selection_request(resources=resources).ask

    assert Filters(index, STALE_AFTER_SECONDS).slots(ask, 99).tolist() == [expected]


def test_slots_needs_different_units_for_each_replica() -> None:
    used = {"0": 0, "1": 900, "2": 1000}
    index = make_index([make_row(units={"gpu": list(used)}, used_units={"gpu": used})])
    ask = make_selection_request(resources={"gpu": {"count": 2, "share_milli": 100}}).ask

    # Ten shares are free on the first unit, one on the second: for the second replica a partner is missing.
    assert Filters(index, STALE_AFTER_SECONDS).slots(ask, 99).tolist() == [1]


# affinity and anti-affinity

PLACES = {
    "db": ("r", "a", "a1"),
    "a1": ("r", "a", "a1"),
    "a2": ("r", "a", "a2"),
    "b1": ("r", "b", "b1"),
    "c1": ("s", "c", "c1"),
    "nowhere": (None, None, None),
}
NEAR = {
    "node": ["db"],
    "site": ["a1", "db"],
    "zone": ["a1", "a2", "db"],
    "region": ["a1", "a2", "b1", "db"],
}
TARGETS = {
    "a deployment": {"deployment_id": "db"},
    "one label of deployments": {"deployment_labels": {"app": "db"}},
    "all labels of deployments": {"deployment_labels": {"app": "db", "tier": "back"}},
    "labels of nodes": {"node_labels": {"disk": "ssd", "line": "x"}},
}


def placed_fleet() -> FleetIndex:
    """Build a fleet with a database on one node; others share only one of its labels, or of the node's."""
    rows = [
        replace(row, deployments={"db": 2}, labels={"disk": "ssd", "line": "x"})
        if row.node_id == "db"
        else replace(row, labels={"disk": "ssd"})
        for row in in_places(PLACES)
    ]
    return make_index(rows, [make_deployment("db", {"app": "db", "tier": "back"}), make_deployment("idle")])


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("scope", NEAR)
def test_apply_keeps_near_what_affinity_requires(scope: str, target: dict[str, Any]) -> None:
    found = left(placed_fleet(), affinity=[{"scope": scope, **target}])

    assert found == (NEAR[scope], {"affinity": 6 - len(NEAR[scope])})


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("scope", NEAR)
def test_apply_keeps_away_from_what_anti_affinity_requires(scope: str, target: dict[str, Any]) -> None:
    found = left(placed_fleet(), anti_affinity=[{"scope": scope, **target}])

    assert found == (sorted(set(PLACES) - set(NEAR[scope])), {"anti_affinity": len(NEAR[scope])})


@pytest.mark.parametrize("name", ["affinity", "anti_affinity"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_apply_leaves_out_nobody_for_what_is_preferred(name: str, target: dict[str, Any]) -> None:
    found = left(placed_fleet(), **{name: [{"scope": "zone", "mode": "preferred", **target}]})

    assert found == (sorted(PLACES), {})


@pytest.mark.parametrize("scope", NEAR)
@pytest.mark.parametrize(
    "target", [{"deployment_id": "none"}, {"deployment_labels": {"app": "none"}}, {"node_labels": {"no": "ne"}}]
)
def test_apply_finds_nothing_near_what_is_nowhere(scope: str, target: dict[str, Any]) -> None:
    near = left(placed_fleet(), affinity=[{"scope": scope, **target}])
    away = left(placed_fleet(), anti_affinity=[{"scope": scope, **target}])

    assert (near, away) == (([], {"affinity": 6}), (sorted(PLACES), {}))


@pytest.mark.parametrize("scope", NEAR)
def test_apply_lets_the_first_of_replicas_that_must_be_together_go_anywhere(scope: str) -> None:
    found = left(
        placed_fleet(), labels={"app": "web"}, affinity=[{"scope": scope, "deployment_labels": {"app": "web"}}]
    )

    assert found == (sorted(PLACES), {})


def test_apply_keeps_new_replicas_near_others_with_their_label() -> None:
    found = left(placed_fleet(), labels={"app": "db"}, affinity=[{"scope": "site", "deployment_labels": {"app": "db"}}])

    assert found == (["a1", "db"], {"affinity": 4})


def test_apply_forgets_a_target_that_left() -> None:
    index = placed_fleet()
    index.put(replace(index.row_of("db"), deployments={}))  # type: ignore[type-var]

    found = left(index, anti_affinity=[{"scope": "zone", "deployment_labels": {"app": "db"}}])

    assert found == (sorted(PLACES), {})


def test_apply_follows_a_target_whose_node_moved() -> None:
    index = placed_fleet()
    index.put(replace(index.row_of("db"), region="s", zone="c", site="c1"))  # type: ignore[type-var]

    found = left(index, affinity=[{"scope": "zone", "deployment_labels": {"app": "db"}}])

    assert found == (["c1", "db"], {"affinity": 4})


# those who were there first

REPELLED = {
    "by id": ({"deployment_id": "web"}, {}, True),
    "by another id": ({"deployment_id": "api"}, {}, False),
    "by label": ({"deployment_labels": {"app": "web"}}, {"app": "web"}, True),
    "by label among others": ({"deployment_labels": {"app": "web"}}, {"app": "web", "tier": "front"}, True),
    "by all labels": ({"deployment_labels": {"app": "web", "tier": "front"}}, {"app": "web", "tier": "front"}, True),
    "by more labels than it has": ({"deployment_labels": {"app": "web", "tier": "front"}}, {"app": "web"}, False),
    "by another value": ({"deployment_labels": {"app": "api"}}, {"app": "web"}, False),
}


@pytest.mark.parametrize(("term", "labels", "repelled"), REPELLED.values(), ids=REPELLED)
@pytest.mark.parametrize("scope", NEAR)
def test_apply_keeps_away_from_deployments_that_keep_others_away(
    scope: str, term: dict[str, Any], labels: dict[str, str], *, repelled: bool
) -> None:
    index = placed_fleet()
    index.put_deployment(make_deployment("db", {}, {"scope": scope, **term}))

    found, rejected = left(index, labels=labels)

    if repelled:
        assert (found, rejected) == (sorted(set(PLACES) - set(NEAR[scope])), {"anti_affinity": len(NEAR[scope])})
    else:
        assert (found, rejected) == (sorted(PLACES), {})


def test_apply_is_not_repelled_by_a_deployment_that_was_forgotten() -> None:
    index = placed_fleet()
    index.put_deployment(make_deployment("db", {}, {"scope": "zone", "deployment_id": "web"}))
    index.forget_deployment("db")

    assert left(index) == (sorted(PLACES), {})


def test_select_respects_a_deployment_placed_before_it_that_repels_it() -> None:
    index = make_index(make_rows(2))
    first = select(index, deployment_id="db", anti_affinity=[{"deployment_labels": {"app": "web"}}])
    index.put_deployment(make_deployment("db", {}, {"deployment_labels": {"app": "web"}}))

    second = select(index, deployment_id="web", labels={"app": "web"}, replicas=3)

    assert set(chosen(second)) == {"n00", "n01"} - set(chosen(first))


# the index changes, masks are kept


def test_apply_sees_what_changed_since_it_was_asked_last() -> None:
    index = make_index(FLEET)
    constraints = {"labels": {"line": "x"}, "features": ["docker"], "zones": ["a"]}
    before = left(index, constraints=constraints)

    index.put(replace(FLEET[1], labels={"line": "x"}))
    index.put(replace(FLEET[0], zone="b"))
    index.put(make_row("n5", labels={"line": "x"}, features=["docker"]))
    index.remove("n3")

    assert before == (["n1"], {"zone": 2, "label line": 1})
    assert left(index, constraints=constraints) == (["n2", "n5"], {"zone": 2})
