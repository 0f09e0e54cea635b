# SPDX-License-Identifier: GPL-3.0-or-later
"""What the selector promises: it finds a place wherever there is one, and the best one by its scores."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from fleet_rows_builder import (
    CAPACITY,
    NOW,
    chosen,
    in_places,
    make_deployment,
    make_index,
    make_row,
    make_rows,
    make_selection_request,
    make_selector,
    select,
)
from node_manager import node_selector
from node_manager.fleet_rows import write_row
from node_manager.node_selector import WEIGHTS, Selection
from node_manager.selection_request import SelectionRequest, Strategy
from selection_model import Fleet, breaches, random_fleet, random_request, shuffled, solve

GPUS = {"gpu": ["0", "1", "2"]}
SIX_SITES = {
    f"{site}-{number}": (region, zone, site)
    for region, zone, site in (
        ("r", "a", "a1"), ("r", "a", "a2"), ("r", "b", "b1"), ("r", "b", "b2"), ("s", "c", "c1"), ("s", "c", "c2"),
    )
    for number in (1, 2)
}  # fmt: skip


def select_in(fleet: Fleet, request: SelectionRequest) -> Selection:
    """Select over a fresh index."""
    return make_selector(make_index(fleet.rows, fleet.deployments.values())).select(request, NOW)


def case(seed: int) -> tuple[Fleet, SelectionRequest]:
    """Make a fleet and a request for it."""
    dice = random.Random(seed)
    fleet = random_fleet(dice)
    return fleet, random_request(dice, fleet)


# against the solver


def test_select_places_all_replicas_exactly_where_a_solver_can() -> None:
    wrong, feasible = [], 0

    for seed in range(700):
        fleet, request = case(seed)
        possible = solve(fleet, request) is not None
        feasible += possible
        if select_in(fleet, request).fits is not possible:
            wrong.append((seed, possible))

    assert wrong == []
    assert 200 < feasible < 500


def test_select_keeps_to_every_rule() -> None:
    broken, placed = [], 0

    for seed in range(10_000, 12_000):
        fleet, request = case(seed)
        selection = select_in(fleet, request)
        placed += selection.fits
        found = breaches(fleet, request, chosen(selection)) if selection.fits else []
        found += [] if len(selection.choices) == (request.replicas if selection.fits else 0) else ["how many"]
        if found:
            broken.append((seed, found))

    assert broken == []
    assert placed > 600


def test_select_counts_each_node_left_out_once() -> None:
    wrong = []

    for seed in range(10_000, 11_000):
        fleet, request = case(seed)
        request = request.model_copy(update={"replicas": 1})
        selection = select_in(fleet, request)
        lost = sum(selection.rejected.values())
        # Of those that are left at least one is chosen; where nothing fits, nobody is left.
        if selection.considered != len(fleet.rows) or (lost < selection.considered) is not selection.fits:
            wrong.append((seed, selection.rejected))

    assert wrong == []


def test_select_decides_the_same_whatever_the_order_of_the_rows() -> None:
    wrong = []

    for seed in range(20_000, 20_600):
        fleet, request = case(seed)
        request = request.model_copy(update={"explain": True})
        first = select_in(fleet, request)
        again = select_in(shuffled(random.Random(seed), fleet), request)
        if (first.choices, first.candidates, first.rejected) != (again.choices, again.candidates, again.rejected):
            wrong.append(seed)

    assert wrong == []


def test_select_decides_the_same_from_whole_columns_and_from_gathered_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    for many in (0.0, 1.0):
        monkeypatch.setattr(node_selector, "_MANY", many)
        cases = (case(seed) for seed in range(30_000, 30_300))
        selections = [select_in(fleet, request.model_copy(update={"explain": True})) for fleet, request in cases]
        found.append([(each.choices, each.candidates, each.rejected) for each in selections])

    assert found[0] == found[1]


def test_select_that_fails_leaves_the_index_as_it_was() -> None:
    for seed in range(10_000, 10_300):
        fleet, request = case(seed)
        index = make_index(fleet.rows, fleet.deployments.values())
        before = [write_row(row) for row in fleet.rows]

        selector = make_selector(index)
        selector.undo(selector.select(request, NOW))

        assert before == [write_row(row) for row in index.rows if row is not None]
        assert (index.available == make_index(fleet.rows).available).all()
        assert index.deployments.holders == make_index(fleet.rows).deployments.holders


# several replicas


PACKED = {
    "one share of one unit each": ({"gpu": {"count": 1, "share_milli": 500}}, {}, 6),
    "two shares of different units each": ({"gpu": {"count": 2, "share_milli": 500}}, {}, 3),
    "two small shares": ({"gpu": {"count": 2, "share_milli": 250}}, {}, 6),
    "three of three": ({"gpu": {"count": 3, "share_milli": 333}}, {}, 3),
    "two shares beside what is used": ({"gpu": {"count": 2, "share_milli": 250}}, {"0": 250, "1": 500}, 4),
    "whole units": ({"gpu": 1}, {"0": 1}, 2),
    "shares too large to share": ({"gpu": {"count": 1, "share_milli": 501}}, {}, 3),
}


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize(("resources", "used", "most"), PACKED.values(), ids=PACKED)
def test_select_fills_a_nodes_devices_to_the_last_replica(
    resources: dict[str, Any], used: dict[str, int], most: int, strategy: Strategy
) -> None:
    row = make_row(units=GPUS, used_units={"gpu": used} if used else {})

    fits = select(make_index([row]), resources=resources, replicas=most, strategy=strategy)
    too_many = select(make_index([row]), resources=resources, replicas=most + 1, strategy=strategy)

    assert (fits.fits, too_many.fits) == (True, False)
    taken = Counter(used)
    for choice in fits.choices:
        taken.update(choice.units["gpu"])
    assert max(taken.values()) <= 1000


def test_select_keeps_whole_units_whole_where_nothing_is_lost_by_it() -> None:
    row = make_row(units={"gpu": ["0", "1", "2", "3"]}, used_units={"gpu": {"2": 300, "3": 300}})

    selection = select(make_index([row]), resources={"gpu": {"count": 2, "share_milli": 300}}, replicas=2)

    assert [choice.units for choice in selection.choices] == [{"gpu": {"2": 300, "3": 300}}] * 2


def test_select_tries_the_next_domain_where_the_best_is_too_small_for_all() -> None:
    # The zone with the idlest node has no room for the third replica, which the rule about nodes hides at first.
    rows = [
        make_row("best", zone="a", cpu_percent=0.0, memory_percent=0.0),
        make_row("good", zone="a"),
        *(make_row(f"busy-{number}", zone="b", cpu_percent=80.0) for number in range(3)),
    ]
    own = {"deployment_id": "web"}

    selection = select(
        make_index(rows),
        replicas=3,
        affinity=[{**own, "scope": "zone"}],
        anti_affinity=[{**own, "scope": "node"}],
    )

    assert chosen(selection) == ["busy-0", "busy-1", "busy-2"]


def test_select_tries_the_next_site_of_the_same_zone_where_both_must_be_shared() -> None:
    rows = [
        make_row("best", site="a1", cpu_percent=0.0, memory_percent=0.0),
        make_row("busy-0", site="a2", cpu_percent=80.0),
        make_row("busy-1", site="a2", cpu_percent=80.0),
    ]
    own = {"deployment_id": "web"}

    selection = select(
        make_index(rows),
        replicas=2,
        affinity=[{**own, "scope": "zone"}, {**own, "scope": "site"}],
        anti_affinity=[{**own, "scope": "node"}],
    )

    assert chosen(selection) == ["busy-0", "busy-1"]


@pytest.mark.parametrize(("scope", "most"), [("node", 12), ("site", 6), ("zone", 3), ("region", 2)])
def test_select_gives_each_domain_one_replica_that_keeps_away_from_the_others(scope: str, most: int) -> None:
    index = make_index(in_places(SIX_SITES))
    terms = [{"scope": scope, "deployment_id": "web"}]

    fits = select(index, replicas=most, anti_affinity=terms)
    too_many = select(make_index(in_places(SIX_SITES)), replicas=most + 1, anti_affinity=terms)

    assert (fits.fits, too_many.fits) == (True, False)
    column = ("region", "zone", "site", "node").index(scope)
    assert len({(*SIX_SITES[node_id], node_id)[column] for node_id in chosen(fits)}) == most


@pytest.mark.parametrize(("scope", "inside"), [("node", 1), ("site", 2), ("zone", 4), ("region", 8)])
def test_select_keeps_replicas_together(scope: str, inside: int) -> None:
    selection = select(
        make_index(in_places(SIX_SITES)), replicas=8, affinity=[{"scope": scope, "deployment_id": "web"}]
    )

    places = {(*SIX_SITES[node_id], node_id) for node_id in chosen(selection)}
    depth = {"region": 0, "zone": 1, "site": 2, "node": 3}[scope]
    assert len({place[depth] for place in places}) == 1
    assert len(places) <= inside


SPREADS = {
    "even": (1, {"a": 4, "b": 4, "c": 4}, 7, {3, 2}),
    "as even as room allows": (1, {"a": 4, "b": 4, "c": 1}, 5, {2, 1}),
    "skew of two": (2, {"a": 4, "b": 1, "c": 1}, 5, {3, 1}),
}


@pytest.mark.parametrize(("max_skew", "rooms", "most", "counts"), SPREADS.values(), ids=SPREADS)
def test_select_spreads_no_less_evenly_than_asked(
    max_skew: int, rooms: dict[str, int], most: int, counts: set[int]
) -> None:
    rows = [make_row(f"n-{zone}", zone=zone, effective={"cpu_millicores": 100 * room}) for zone, room in rooms.items()]
    spread = {"scope": "zone", "max_skew": max_skew}

    selection = select(make_index(rows), replicas=most, spread=spread)
    more = select(make_index(rows), replicas=13, spread=spread)

    assert counts == set(Counter(chosen(selection)).values())
    assert not more.fits


def test_select_spread_counts_a_zone_that_is_full_as_empty() -> None:
    rows = [make_row("n-a", zone="a"), make_row("n-b", zone="b", effective={"cpu_millicores": 50})]

    one, two = (select(make_index(rows), replicas=count, spread={"scope": "zone", "max_skew": 1}) for count in (1, 2))

    assert (one.fits, two.fits) == (True, False)


def test_select_spread_does_not_count_a_zone_that_a_filter_leaves_out() -> None:
    rows = [
        make_row("n-a", zone="a"),
        make_row("n-b", zone="b"),
        make_row("n-c", zone="c", labels={"old": "yes"}, node_type="gateway"),
    ]

    selection = select(
        make_index(rows),
        replicas=6,
        spread={"scope": "zone", "max_skew": 1},
        constraints={"node_types": ["server"]},
    )

    assert Counter(chosen(selection)) == {"n-a": 3, "n-b": 3}


@pytest.mark.parametrize(("replicas", "fits"), [(2, True), (3, False)])
def test_select_spread_over_a_single_zone_allows_the_skew_and_no_more(replicas: int, *, fits: bool) -> None:
    selection = select(make_index(make_rows(3)), replicas=replicas, spread={"scope": "zone", "max_skew": 2})

    assert fits is selection.fits


@pytest.mark.parametrize("scope", ["zone", "site", "region"])
def test_select_spread_uses_no_node_outside_all_domains(scope: str) -> None:
    rows = [make_row("nowhere", region=None, zone=None, site=None, cpu_percent=0.0), make_row("n1", cpu_percent=90.0)]

    selection = select(make_index(rows), spread={"scope": scope})

    assert chosen(selection) == ["n1"]
    assert selection.rejected == {"spread": 1}


def test_select_tells_of_the_replica_that_was_looked_at_last() -> None:
    rows = in_places({"a1": ("r", "a", "1"), "a2": ("r", "a", "1"), "b1": ("r", "b", "2"), "c1": ("r", "c", "3")})
    own = [{"scope": "zone", "deployment_id": "web"}]
    index = make_index(rows, [make_deployment("db")])
    index.put(replace(rows[3], deployments={"db": 1}))

    selection = select(index, replicas=3, anti_affinity=[*own, {"scope": "zone", "deployment_id": "db"}])

    # One for db, the other three for the two replicas that are placed already.
    assert (selection.fits, selection.rejected) == (False, {"anti_affinity": 4})


def test_select_forgets_a_reason_that_no_longer_holds() -> None:
    rows = in_places({"a": ("r", "a", "1"), "b": ("r", "b", "2")})

    selection = select(make_index(rows), replicas=3, spread={"scope": "zone", "max_skew": 1})

    assert (selection.fits, selection.rejected) == (True, {})


# scores


def score(index: Any, node_id: str, **more: Any) -> Any:
    """Give the scores that the first replica has on one node."""
    return select(index, constraints={"node_ids": [node_id]}, **more).choices[0].scores


def test_select_scores_by_name_and_weight() -> None:
    for strategy in Strategy:
        (choice,) = select(make_index(make_rows(3)), strategy=strategy).choices

        weights = WEIGHTS[strategy]
        assert set(weights) == set(choice.scores)
        mean = sum(choice.scores[name] * weight for name, weight in weights.items()) / sum(weights.values())
        assert mean == pytest.approx(choice.score)


LOADS = {
    "measured, the scarcer counts": ({"cpu_percent": 30.0, "memory_percent": 60.0}, 40),
    "reserved since": ({"cpu_percent": 30.0, "unseen": {"cpu_millicores": 2000}}, 20),
    "never below nothing": ({"cpu_percent": 90.0, "unseen": {"cpu_millicores": 4000}}, 0),
    "without a sample by what is allocated": (
        {"cpu_percent": None, "memory_percent": None, "allocated": {"memory_mib": 2000}, "unseen": {"memory_mib": 2000}},
        75,
    ),
    "measured, of a size that nobody knows": ({"cpu_percent": 55.0, "capacity": {}, "unseen": {"memory_mib": 9}}, 45),
    "nothing known": ({"cpu_percent": None, "memory_percent": None, "capacity": {}}, 50),
    "of true capacity, not of overcommit": (
        {"cpu_percent": 0.0, "memory_percent": 0.0, "unseen": {"cpu_millicores": 1000}, "capacity": {"cpu_millicores": 2000}},
        50,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), LOADS.values(), ids=LOADS)
def test_select_scores_live_load(changes: dict[str, Any], expected: float) -> None:
    assert expected == pytest.approx(score(make_index([make_row(**changes)]), "n1")["load"])


STABILITIES = {
    "healthy for an hour": ({"health_since": NOW - 3600}, 50),
    "healthy for three": ({"health_since": NOW - 3 * 3600}, 75),
    "degraded for an hour": ({"health": "degraded", "health_since": NOW - 3600}, 25),
    "since just now": ({"health_since": NOW}, 0),
    "from the future": ({"health_since": NOW + 600}, 0),
}


@pytest.mark.parametrize(("changes", "expected"), STABILITIES.values(), ids=STABILITIES)
def test_select_scores_stability(changes: dict[str, Any], expected: float) -> None:
    assert expected == pytest.approx(score(make_index([make_row(**changes)]), "n1")["stability"], abs=0.5)


def test_select_scores_how_much_is_left_and_how_evenly() -> None:
    row = make_row(allocated={"cpu_millicores": 1000, "memory_mib": 4000}, units={"gpu": ["0", "1"]})

    found = score(make_index([row]), "n1", resources={"cpu_millicores": 1000, "memory_mib": 2000, "gpu": 1})

    # Half of the processors, three quarters of the memory, half of the devices would be in use.
    assert pytest.approx(found["fit"], abs=0.01) == 100 * (1 - (0.5 + 0.75 + 0.5) / 3)
    assert pytest.approx(found["balance"]) == 75


def test_select_scores_nearness_to_a_point() -> None:
    rows = [
        make_row("here", latitude=48.0, longitude=11.0),
        # 500 km of a great circle to the north.
        make_row("half", latitude=48.0 + 4.4966, longitude=11.0),
        make_row("unknown"),
    ]
    near = {"latitude": 48.0, "longitude": 11.0}

    found = [score(make_index(rows), node_id, near=near)["geography"] for node_id in ("here", "half", "unknown")]

    assert pytest.approx(found, abs=0.1) == [100, 50, 0]


def test_select_scores_images_by_the_part_that_is_there() -> None:
    rows = [make_row("both", images=["a:1", "b:2"]), make_row("one", images=["b:2", "b:1"]), make_row("none")]

    found = [score(make_index(rows), row.node_id, images=["a:1", "b:2"])["images"] for row in rows]

    assert found == [100, 50, 0]


def test_select_scores_what_nobody_asked_about_in_full() -> None:
    found = score(make_index([make_row()]), "n1")

    assert (found["affinity"], found["geography"], found["images"]) == (100, 100, 100)


def preferences(index: Any, **terms: Any) -> dict[str, float]:
    """Give the affinity score of the first replica on each node."""
    return {row.node_id: score(index, row.node_id, **terms)["affinity"] for row in index.rows}


PREFERRED = {
    "near a deployment": ({"affinity": [{"scope": "zone", "deployment_id": "db"}]}, [100, 100, 0]),
    "on the deployment's node": ({"affinity": [{"scope": "node", "deployment_id": "db"}]}, [100, 0, 0]),
    "near its labels": ({"affinity": [{"scope": "zone", "deployment_labels": {"app": "db"}}]}, [100, 100, 0]),
    "near several labels": (
        {"affinity": [{"scope": "zone", "deployment_labels": {"app": "db", "tier": "back"}}]},
        [100, 100, 0],
    ),
    "near a node's labels": ({"affinity": [{"scope": "node", "node_labels": {"disk": "ssd"}}]}, [0, 0, 100]),
    "away from it": ({"anti_affinity": [{"scope": "zone", "deployment_id": "db"}]}, [0, 0, 100]),
    "away from a node": ({"anti_affinity": [{"scope": "node", "deployment_id": "db"}]}, [0, 100, 100]),
    "by weight": (
        {
            "affinity": [{"scope": "zone", "deployment_id": "db", "weight": 3}],
            "anti_affinity": [{"scope": "node", "deployment_id": "db", "weight": 1}],
        },
        [75, 100, 25],
    ),
    "of nothing that is there": ({"affinity": [{"scope": "zone", "deployment_id": "none"}]}, [0, 0, 0]),
}


@pytest.mark.parametrize(("terms", "expected"), PREFERRED.values(), ids=PREFERRED)
def test_select_scores_what_is_preferred(terms: dict[str, list[dict[str, Any]]], expected: list[float]) -> None:
    rows = [
        make_row("holder", zone="a", deployments={"db": 1}),
        make_row("neighbour", zone="a"),
        make_row("other", zone="b", labels={"disk": "ssd"}),
    ]
    index = make_index(rows, [make_deployment("db", {"app": "db", "tier": "back"})])
    preferred = {name: [{"mode": "preferred", **term} for term in each] for name, each in terms.items()}

    found = preferences(index, **preferred)

    assert expected == pytest.approx(list(found.values()))


@pytest.mark.parametrize("strategy", [Strategy.BALANCED, Strategy.SPREAD])
@pytest.mark.parametrize("scope", ["node", "zone"])
def test_select_scores_preferred_terms_about_its_own_replicas(scope: str, strategy: Strategy) -> None:
    # Another deployment with the same label is on the first node; the score says where own replicas and it are.
    rows = [make_row("n1", zone="a", deployments={"old": 1}), make_row("n2", zone="b")]
    index = make_index(rows, [make_deployment("old", {"app": "web"})])
    request = make_selection_request(
        replicas=4,
        labels={"app": "web"},
        strategy=strategy,
        anti_affinity=[{"mode": "preferred", "scope": scope, "deployment_labels": {"app": "web"}}],
    )

    selection = select(index, request)

    taken = {"n1"}
    for choice in selection.choices:
        assert (0 if choice.node_id in taken else 100) == choice.scores["affinity"]
        taken.add(choice.node_id)
    assert {"n1", "n2"} == set(chosen(selection))


def test_select_scores_how_few_replicas_are_on_the_node_and_in_its_zone() -> None:
    rows = in_places({"a1": ("r", "a", "1"), "a2": ("r", "a", "1"), "b1": ("r", "b", "2")})
    selection = select(make_index(rows), replicas=3)

    found = [choice.scores["spread"] for choice in selection.choices]

    # An empty zone, then a free node in a zone as full as the other.
    assert found == [100, 100, 50]
    assert len(set(chosen(selection))) == 3


# strategies


def test_select_binpack_fills_the_node_that_is_in_use() -> None:
    rows = [*make_rows(5), make_row("used", allocated={"cpu_millicores": 2000, "memory_mib": 4000})]

    selection = select(
        make_index(rows), strategy="binpack", replicas=4, resources={"cpu_millicores": 500, "memory_mib": 1000}
    )

    assert chosen(selection) == ["used"] * 4


def test_select_binpack_leaves_devices_to_those_who_need_them() -> None:
    rows = [make_row("gpu", units=GPUS, effective={**CAPACITY, "gpu": 3}), make_row("plain")]
    index = make_index(rows)
    selector = make_selector(index)
    for number in range(4):
        gpu = make_selection_request(f"g{number}", {"gpu": 1, "cpu_millicores": 100}, strategy="binpack", dry_run=True)
        selector.undo(selector.select(gpu, NOW))

    selection = selector.select(make_selection_request(strategy="binpack"), NOW)

    assert chosen(selection) == ["plain"]


def test_select_balanced_prefers_the_idle_node() -> None:
    rows = [make_row("busy", cpu_percent=90.0), make_row("idle", cpu_percent=1.0)]

    assert chosen(select(make_index(rows))) == ["idle"]


@pytest.mark.parametrize("strategy", [Strategy.BALANCED, Strategy.SPREAD])
def test_select_spreads_replicas_over_equal_nodes(strategy: Strategy) -> None:
    selection = select(make_index(make_rows(10)), replicas=10, strategy=strategy)

    assert len(set(chosen(selection))) == 10


# ties, herds


def test_select_breaks_ties_by_a_hash_that_spreads_evenly() -> None:
    index = make_index(make_rows(10))
    selector, found = make_selector(index), Counter[str]()

    for number in range(2000):
        selection = selector.select(make_selection_request(f"d{number}"), NOW)
        found.update(chosen(selection))
        selector.undo(selection)

    # 200 each; six standard deviations of a fair draw are 80.
    assert all(120 < found[row.node_id] < 280 for row in make_rows(10)), found


def test_select_gives_the_same_request_the_same_node() -> None:
    found = {tuple(chosen(select(make_index(make_rows(50)), deployment_id="d7"))) for _ in range(3)}

    assert len(found) == 1


def test_select_counts_what_was_reserved_since_the_sample_as_load() -> None:
    index = make_index([make_row("n1", cpu_percent=0.0, memory_percent=0.0)])
    before = float(index.load[0])

    select(index, resources={"cpu_millicores": 1000})

    assert (before, float(index.load[0])) == (100, 75)


@pytest.mark.parametrize("strategy", [Strategy.BALANCED, Strategy.SPREAD])
def test_select_does_not_send_everybody_to_the_idlest_node(strategy: Strategy) -> None:
    index = make_index([*make_rows(20, cpu_percent=20.0), make_row("idlest", cpu_percent=10.0)])
    selector, found = make_selector(index), Counter[str]()

    for number in range(105):
        found.update(chosen(selector.select(make_selection_request(f"d{number}", strategy=strategy), NOW)))

    assert len(found) == 21
    assert max(found.values()) <= 10


# explain


def test_select_explain_names_the_best_that_were_not_chosen() -> None:
    rows = [make_row(f"n{number}", cpu_percent=10.0 * number, memory_percent=0.0) for number in range(9)]

    selection = select(make_index(rows), explain=True)

    assert chosen(selection) == ["n0"]
    assert [node_id for node_id, _ in selection.candidates] == ["n1", "n2", "n3", "n4", "n5"]
    assert sorted((score for _, score in selection.candidates), reverse=True) == [s for _, s in selection.candidates]


def test_select_explain_of_few_nodes_names_all_others() -> None:
    selection = select(make_index(make_rows(2)), explain=True)

    assert len(selection.candidates) == 1


def test_select_on_no_nodes_at_all_fits_nothing() -> None:
    selection = select(
        make_index([]),
        explain=True,
        spread={"scope": "zone"},
        affinity=[{"scope": "site", "deployment_id": "web"}],
        constraints={"zones": ["a"], "labels": {"a": ["b"]}, "within": {"latitude": 0, "longitude": 0, "max_km": 1}},
    )

    assert (selection.fits, selection.considered, selection.rejected) == (False, 0, {})
