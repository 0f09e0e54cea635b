# SPDX-License-Identifier: GPL-3.0-or-later
"""How traffic is shared: what each circumstance does to one node, and what holds for any nodes."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_manager.domain import Admin, Health
from node_manager.load_distribution import HOLD_BELOW_POINTS, Target, TrafficState, Weight, distribute, headroom

IDLE = Target("gw-0", "192.0.2.10", 1, Admin.ACTIVE, Health.HEALTHY, True, 0.0, 50.0, 0.0)
NEVER = [Admin.DRAINING, Admin.MAINTENANCE, Admin.OFFLINE]
METRICS = ["cpu_percent", "memory_percent", "cpu_pressure_percent"]
PERCENT = st.none() | st.floats(0, 100) | st.sampled_from([float("nan"), float("inf"), -5.0])


def nodes(*changes: dict[str, object]) -> list[Target]:
    """Make one node per set of changes to an idle healthy one, named gw-0, gw-1 and so on."""
    return [replace(IDLE, **{"node_id": f"gw-{number}", **change}) for number, change in enumerate(changes)]


def points(weights: list[Weight]) -> dict[str, int]:
    """Give the weights by node."""
    return {weight.node_id: weight.weight for weight in weights}


def share(*changes: dict[str, object]) -> list[int]:
    """Share traffic that was not shared before among nodes with these changes."""
    return [weight.weight for weight in distribute(nodes(*changes), {})]


def fleets(minimum: int = 0, maximum: int = 8) -> st.SearchStrategy[list[Target]]:
    """Draw fleets of any state."""
    target = st.builds(
        Target,
        node_id=st.integers(0, 999).map("gw-{}".format),
        address=st.just("192.0.2.10"),
        replicas=st.integers(0, 40),
        admin=st.sampled_from(Admin),
        health=st.sampled_from(Health),
        answering=st.booleans(),
        cpu_percent=PERCENT,
        memory_percent=PERCENT,
        cpu_pressure_percent=PERCENT,
        probation=st.booleans(),
    )
    return st.lists(target, min_size=minimum, max_size=maximum, unique_by=lambda drawn: drawn.node_id)


FIT = st.lists(
    st.builds(
        Target,
        node_id=st.integers(0, 999).map("gw-{}".format),
        address=st.just("192.0.2.10"),
        replicas=st.integers(1, 40),
        admin=st.sampled_from([Admin.ACTIVE, Admin.CORDONED]),
        health=st.sampled_from([Health.HEALTHY, Health.DEGRADED, Health.UNKNOWN, Health.FLAPPING]),
        answering=st.just(True),
        cpu_percent=PERCENT,
        memory_percent=PERCENT,
        cpu_pressure_percent=PERCENT,
        probation=st.booleans(),
    ),
    min_size=1,
    max_size=120,
    unique_by=lambda drawn: drawn.node_id,
)


# single circumstances


def test_distribute_of_nothing_is_nothing() -> None:
    assert distribute([], {"gw-0": 100}) == []


def test_distribute_refuses_a_node_named_twice() -> None:
    with pytest.raises(ValueError, match="each node once"):
        distribute([IDLE, replace(IDLE, address="192.0.2.11")], {})


def test_distribute_shares_evenly_with_the_odd_point_to_the_first_id() -> None:
    assert share({}, {}, {}) == [34, 33, 33]


def test_distribute_breaks_ties_by_id_in_any_order() -> None:
    targets = nodes({}, {}, {})

    weights = distribute(targets[::-1], {})

    assert points(weights) == {"gw-0": 34, "gw-1": 33, "gw-2": 33}


def test_distribute_says_nothing_of_a_healthy_node() -> None:
    assert distribute([IDLE], {}) == [Weight("gw-0", "192.0.2.10", 100, TrafficState.READY, "")]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"replicas": 3}, [75, 25]),
        ({"replicas": 0}, [0, 100]),
        ({"cpu_percent": 75.0}, [20, 80]),
        ({"cpu_percent": 100.0}, [9, 91]),
        ({"cpu_percent": 250.0}, [9, 91]),
        ({"cpu_percent": None}, [33, 67]),
        ({"cpu_percent": float("nan")}, [33, 67]),
        ({"memory_percent": 70.0}, [50, 50]),
        ({"memory_percent": 85.0}, [33, 67]),
        ({"memory_percent": None}, [50, 50]),
        ({"cpu_pressure_percent": 10.0}, [50, 50]),
        ({"cpu_pressure_percent": 30.0}, [33, 67]),
        ({"health": Health.DEGRADED}, [33, 67]),
        ({"health": Health.UNKNOWN}, [20, 80]),
        ({"health": Health.FLAPPING}, [20, 80]),
        ({"health": Health.SUSPECT}, [0, 100]),
        ({"health": Health.RECOVERING}, [0, 100]),
        ({"health": Health.UNREACHABLE}, [0, 100]),
        ({"answering": False}, [0, 100]),
        ({"probation": True}, [33, 67]),
        ({"health": Health.DEGRADED, "probation": True}, [20, 80]),
        ({"admin": Admin.CORDONED}, [50, 50]),
        ({"admin": Admin.DRAINING}, [0, 100]),
        ({"admin": Admin.MAINTENANCE}, [0, 100]),
        ({"admin": Admin.OFFLINE}, [0, 100]),
    ],
    ids=str,
)
def test_distribute_weighs_a_node_against_an_idle_one(changes: dict[str, object], expected: list[int]) -> None:
    assert share(changes, {}) == expected


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        ({"admin": Admin.DRAINING, "health": Health.UNREACHABLE}, TrafficState.DRAIN, "draining"),
        ({"admin": Admin.MAINTENANCE}, TrafficState.DOWN, "in maintenance"),
        ({"admin": Admin.OFFLINE}, TrafficState.DOWN, "taken offline by an operator"),
        ({"replicas": 0}, TrafficState.DOWN, "no replica runs there"),
        ({"health": Health.UNREACHABLE}, TrafficState.DOWN, "unreachable"),
        ({"answering": False}, TrafficState.DOWN, "not seen lately"),
        ({"health": Health.SUSPECT}, TrafficState.DOWN, "suspect: went silent a moment ago"),
        ({"health": Health.RECOVERING}, TrafficState.DOWN, "recovering: not proven yet"),
        ({"health": Health.DEGRADED}, TrafficState.READY, "degraded, at half weight"),
        ({"health": Health.UNKNOWN}, TrafficState.READY, "not fully checked yet, at a quarter of its weight"),
        ({"health": Health.FLAPPING}, TrafficState.READY, "comes and goes, at a quarter of its weight"),
        ({"probation": True}, TrafficState.READY, "came back lately, at half weight"),
        (
            {"health": Health.DEGRADED, "probation": True},
            TrafficState.READY,
            "degraded, at half weight; came back lately, at half weight",
        ),
        ({"cpu_percent": 99.0}, TrafficState.READY, ""),
    ],
    ids=str,
)
def test_distribute_says_why(changes: dict[str, object], state: TrafficState, reason: str) -> None:
    first = distribute(nodes(changes, {}), {})[0]

    assert (state, reason) == (first.state, first.reason)


def test_distribute_gives_a_small_node_its_point() -> None:
    assert share({"replicas": 1, "cpu_percent": 100.0}, {"replicas": 500}, {"replicas": 500}) == [1, 50, 49]


def test_distribute_says_so_where_there_are_too_few_points() -> None:
    weights = distribute(nodes(*[{"replicas": 2}] * 100, {}), {})

    assert [weight.reason for weight in weights if not weight.weight] == ["its share is less than a point"]


@pytest.mark.parametrize(
    ("cpu", "memory", "pressure", "expected"),
    [
        (40.0, 50.0, 5.0, 0.6),
        (40.0, 91.0, 5.0, 0.3),
        (40.0, 50.0, 42.0, 0.2),
        (100.0, 100.0, 100.0, 0.1),
        (None, None, None, 0.5),
    ],
)
def test_headroom_is_what_the_scarcest_leaves(
    cpu: float | None, memory: float | None, pressure: float | None, expected: float
) -> None:
    target = replace(IDLE, cpu_percent=cpu, memory_percent=memory, cpu_pressure_percent=pressure)

    assert headroom(target) == pytest.approx(expected)


# panic


def test_distribute_in_panic_shares_among_those_that_may_answer() -> None:
    weights = distribute(
        nodes(
            {"health": Health.SUSPECT},
            {"health": Health.RECOVERING, "cpu_percent": 66.0},
            {"health": Health.SUSPECT, "answering": False},
            {"health": Health.UNREACHABLE},
            {"admin": Admin.DRAINING},
        ),
        {},
    )

    assert [weight.weight for weight in weights] == [75, 25, 0, 0, 0]
    assert [weight.reason.startswith("panic, no node is fit: ") for weight in weights] == [True, True, *[False] * 3]


def test_distribute_without_a_node_that_may_answer_gives_reasons_only() -> None:
    weights = distribute(nodes({"health": Health.UNREACHABLE}, {"admin": Admin.DRAINING}), {"gw-0": 50, "gw-1": 50})

    assert [(weight.weight, weight.reason) for weight in weights] == [(0, "unreachable"), (0, "draining")]


def test_distribute_among_degraded_nodes_is_no_panic() -> None:
    weights = distribute(nodes({"health": Health.DEGRADED}, {"health": Health.DEGRADED}), {})

    assert [(weight.weight, weight.reason) for weight in weights] == [(50, "degraded, at half weight")] * 2


# hold


@pytest.mark.parametrize(
    ("previous", "expected"),
    [
        ({"gw-0": 54, "gw-1": 46}, [54, 46]),
        ({"gw-0": 55, "gw-1": 45}, [50, 50]),
        ({"gw-0": 50, "gw-1": 46, "gone": 4}, [50, 50]),
        ({"gw-0": 54, "gw-1": 46, "gw-2": 0}, [54, 46]),
        ({"gw-0": 54, "gw-1": 45}, [50, 50]),
        ({"gw-0": 104, "gw-1": -4}, [50, 50]),
        ({"gw-0": 100}, [50, 50]),
        ({}, [50, 50]),
    ],
    ids=["held", "five points", "a node left", "others had none", "sum", "negative", "newcomer", "first time"],
)
def test_distribute_holds_small_changes(previous: dict[str, int], expected: list[int]) -> None:
    weights = distribute(nodes({}, {}), previous)

    assert [weight.weight for weight in weights] == expected


def test_distribute_takes_a_point_from_a_bad_node_at_once() -> None:
    targets = nodes({"health": Health.SUSPECT}, {}, {})

    weights = distribute(targets, {"gw-0": 2, "gw-1": 49, "gw-2": 49})

    assert [weight.weight for weight in weights] == [0, 50, 50]


def test_distribute_lets_small_changes_add_up() -> None:
    weights = {"gw-0": 50, "gw-1": 50}
    seen = []

    for cpu in (6.0, 12.0, 18.0, 24.0):
        weights = points(distribute(nodes({"cpu_percent": cpu}, {}), weights))
        seen.append(weights["gw-0"])

    assert seen == [50, 50, 45, 45]


# whatever the nodes


@given(fleets(), st.dictionaries(st.integers(0, 999).map("gw-{}".format), st.integers(-5, 110), max_size=8))
def test_distribute_shares_all_or_nothing(targets: list[Target], previous: dict[str, int]) -> None:
    weights = distribute(targets, previous)

    able = any(weight.state is TrafficState.READY for weight in weights)
    assert (100 if able else 0) == sum(weight.weight for weight in weights)
    assert all(weight.weight >= 0 for weight in weights)
    assert sorted(target.node_id for target in targets) == [weight.node_id for weight in weights]


@given(FIT)
def test_distribute_gives_each_fit_node_something(targets: list[Target]) -> None:
    weights = distribute(targets, {})

    assert sum(weight.weight for weight in weights) == 100
    assert len(targets) > 100 or min(weight.weight for weight in weights) >= 1


@given(fleets(), st.dictionaries(st.integers(0, 999).map("gw-{}".format), st.integers(0, 100), max_size=8))
def test_distribute_gives_nothing_to_those_that_must_not(targets: list[Target], previous: dict[str, int]) -> None:
    weights = points(distribute(targets, previous))

    assert not any(
        weights[target.node_id]
        for target in targets
        if target.admin in NEVER or target.health is Health.UNREACHABLE or not target.answering or target.replicas == 0
    )


@given(fleets(), st.randoms(use_true_random=False), st.integers(0, 4))
def test_distribute_ignores_the_order(targets: list[Target], random: Random, shift: int) -> None:
    before = points(distribute(targets, {}))
    giver, taker = (list(before) * 2)[:2] if before else ("", "")
    previous = {**before, giver: before.get(giver, 0) - shift, taker: before.get(taker, 0) + shift}
    shuffled = random.sample(targets, len(targets))

    assert distribute(targets, previous) == distribute(shuffled, dict(reversed(previous.items())))


@given(FIT, st.data())
def test_distribute_holds_or_applies_whole(targets: list[Target], data: st.DataObject) -> None:
    fresh = points(distribute(targets, {}))
    moved = dict(fresh)
    for _ in range(data.draw(st.integers(0, 4))):
        giver, taker = data.draw(st.sampled_from(sorted(moved))), data.draw(st.sampled_from(sorted(moved)))
        amount = data.draw(st.integers(0, 6))
        if moved[giver] > amount:
            moved[giver] -= amount
            moved[taker] += amount
    same_nodes = {key for key in fresh if fresh[key]} == {key for key in moved if moved[key]}
    small = all(abs(fresh[key] - moved[key]) < HOLD_BELOW_POINTS for key in fresh)

    again = points(distribute(targets, moved))

    assert again == (moved if same_nodes and small else fresh)


@given(FIT)
def test_distribute_holds_its_own_weights(targets: list[Target]) -> None:
    first = distribute(targets, {})

    assert distribute(targets, points(first)) == first


@given(FIT | fleets(1), st.data())
def test_distribute_never_gives_more_to_a_busier_node(targets: list[Target], data: st.DataObject) -> None:
    victim = data.draw(st.sampled_from(targets))
    metric = data.draw(st.sampled_from(METRICS))
    low, high = sorted([data.draw(st.floats(0, 100)), data.draw(st.floats(0, 100))])

    lighter = points(distribute(_with(targets, victim, metric, low), {}))[victim.node_id]
    heavier = points(distribute(_with(targets, victim, metric, high), {}))[victim.node_id]

    assert heavier <= lighter


@given(FIT, st.floats(0, 100), st.floats(0, 100), st.data())
def test_distribute_gives_a_busier_node_at_most_what_it_had(
    targets: list[Target], one: float, other: float, data: st.DataObject
) -> None:
    low, high = sorted([one, other])
    victim = data.draw(st.sampled_from(targets))
    previous = points(distribute(targets, {}))

    lighter = points(distribute(_with(targets, victim, "cpu_percent", low), previous))[victim.node_id]
    heavier = points(distribute(_with(targets, victim, "cpu_percent", high), previous))[victim.node_id]

    # A hold can give back what a larger change elsewhere took, but never more than the node had.
    assert heavier <= max(lighter, previous[victim.node_id])


@given(FIT, st.data())
def test_distribute_never_gives_more_to_a_sicker_node(targets: list[Target], data: st.DataObject) -> None:
    victim = data.draw(st.sampled_from(targets))
    health = [Health.HEALTHY, Health.DEGRADED, Health.FLAPPING, Health.UNREACHABLE]
    worse = data.draw(st.integers(1, 3))

    well = points(distribute(_with(targets, victim, "health", health[worse - 1]), {}))[victim.node_id]
    sick = points(distribute(_with(targets, victim, "health", health[worse]), {}))[victim.node_id]

    assert sick <= well


def _with(targets: list[Target], victim: Target, field: str, value: object) -> list[Target]:
    return [replace(target, **{field: value}) if target is victim else target for target in targets]
