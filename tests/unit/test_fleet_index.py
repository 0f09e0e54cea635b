# SPDX-License-Identifier: GPL-3.0-or-later
"""The fleet in columns says what the rows say, whatever came and went before."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fleet_rows_builder import CAPACITY, NOW, make_deployment, make_index, make_row, make_rows, make_selection_request
from node_manager.fleet_index import CLASSES, FleetIndex
from selection_model import random_fleet


def at(index: FleetIndex, node_id: str) -> dict[str, Any]:
    """Write down what the columns say of one node."""
    place = index.place_of[node_id]
    cell = index.cell[place]
    kept = ("blocked", "last_contact", "load", "stability", "tie")
    return {
        **{name: getattr(index, name)[place].item() for name in kept},
        **{name: getattr(index, name)[:, place].tolist() for name in ("available", "total", "share", "inverse")},
        "position": str(index.position[:, place].tolist()),
        "cell": [
            next((value for value, code in index._codes[name].items() if code == codes[cell]), None)
            for name, codes in index.cell_codes.items()
        ],
        "devices": {
            name: (free[place][: index.device_counts[name][place]].tolist(), index.whole_units[name][place].item())
            for name, free in index.devices.items()
            if index.device_counts[name][place]
        },
    }


def test_put_remove_and_put_again_come_to_the_same_as_a_fresh_index() -> None:
    dice = random.Random(3)
    pool = [row for seed in range(40) for row in random_fleet(random.Random(seed)).rows]
    index, current = FleetIndex(2), {}

    for number in range(2000):
        row = dice.choice(pool)
        # Many names, so that the columns must grow, and few, so that places are taken again.
        node_id = f"{row.node_id}-{dice.randrange(40 if number < 1000 else 2)}"
        if dice.random() < 0.3:
            index.remove(node_id)
            current.pop(node_id, None)
        else:
            current[node_id] = replace(row, node_id=node_id)
            index.put(current[node_id])

    fresh = make_index(current.values())
    assert index.place_of.keys() == fresh.place_of.keys()
    assert {name: at(index, name) for name in current} == {name: at(fresh, name) for name in current}
    assert index.blocked_counts() == fresh.blocked_counts()
    by_node = [
        {
            name: {row.rows[place].node_id: n for place, n in held.items()}
            for name, held in row.deployments.holders.items()
        }  # type: ignore[union-attr]
        for row in (index, fresh)
    ]
    assert by_node[0] == by_node[1]


def test_put_of_more_nodes_than_there_are_places_grows_every_column() -> None:
    index = FleetIndex(1)

    for row in make_rows(60, units={"gpu": ["0"]}, images=["app:1"], labels={"line": "x"}):
        index.put(row)
        index.mask_of_image("app:1")

    assert len(index) == 60
    assert index.mask_of_label("line", ["x"]).sum() == 60
    assert index.mask_of_image("app:1").sum() == 60
    assert index.whole_units["gpu"][:60].tolist() == [1] * 60


def test_remove_keeps_nothing_of_a_node_in_the_masks() -> None:
    index = make_index([make_row("n1", labels={"line": "x"}, features=["tpm"], images=["a:1"], units={"gpu": ["0"]})])
    masks = (
        lambda: index.mask_of_label("line", ["x"]),
        lambda: index.mask_of_feature("tpm"),
        lambda: index.mask_of_image("a:1"),
    )
    assert [mask().sum() for mask in masks] == [1, 1, 1]

    index.remove("n1")
    index.put(make_row("n2"))

    assert [mask().sum() for mask in masks] == [0, 0, 0]
    assert (index.places, index.whole_units["gpu"][0]) == (1, 0)


def test_remove_of_an_unknown_node_does_no_harm() -> None:
    index = make_index(make_rows(1))

    index.remove("nobody")

    assert (len(index), index.removed) == (1, {})


def test_reserve_counts_as_put_of_the_row_it_leaves() -> None:
    row = make_row(units={"gpu": ["0", "1"]}, used_units={"gpu": {"0": 300}}, cpu_percent=20.0)
    index = make_index([row])
    ask = make_selection_request(resources={"cpu_millicores": 500, "gpu": {"count": 1, "share_milli": 600}}).ask

    before = index.reserve(0, ask, {"gpu": {"0": 600}}, "web")

    after = index.rows[0]
    assert (before, after) != (after, None)
    assert at(index, "n1") == at(make_index([after]), "n1")  # type: ignore[list-item]
    assert index.devices["gpu"][0].tolist() == [100, 1000]
    assert index.deployments.holders == {"web": {0: 1}}
    index.put(before)
    assert at(index, "n1") == at(make_index([row]), "n1")
    assert index.deployments.holders == {}


def test_put_touches_what_changed_and_no_other() -> None:
    index = make_index(make_rows(3))
    before = index.clock

    index.put(make_row("n01", zone="b"))

    assert np.flatnonzero(index.touched[:3] > before).tolist() == [index.place_of["n01"]]


def test_tick_lets_stability_grow_by_the_minute() -> None:
    index = make_index([make_row(health_since=NOW - 3600)])
    found = []

    for now in (NOW, NOW + 59, NOW + 3 * 3600):
        index.tick(now)
        found.append(round(float(index.stability[0])))

    assert found == [50, 50, 80]


def test_due_names_each_node_once_and_only_those_that_are_there() -> None:
    until = {"n1": NOW + 10, "n2": NOW + 20, "n3": NOW + 5}
    index = make_index(make_row(node_id, pressed_until=time) for node_id, time in until.items())
    index.remove("n3")

    assert [index.due(now) for now in (NOW + 9.9, NOW + 10, NOW + 30, NOW + 40)] == [[], ["n1"], ["n2"], []]


def test_space_gives_columns_that_follow_the_index() -> None:
    index = make_index(make_rows(2, units={"gpu": ["0"]}))
    space = index.space()

    index.reserve(0, make_selection_request(resources={"cpu_millicores": 500}).ask, {}, "web")

    assert index.space() is space
    assert space.amounts["cpu_millicores"].tolist() == [3500, 4000]
    assert set(space.amounts) == set(CLASSES) == set(CAPACITY)
    index.put(make_row("n03"))
    assert len(index.space().version) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_cells_of_deployments_follows_nodes_and_labels(count: int) -> None:
    labels = dict(list({"app": "db", "tier": "back"}.items())[:count])
    index = make_index([make_row("n1", zone="a", deployments={"db": 1}), make_row("n2", zone="b")])
    found = []

    def look() -> None:
        found.append(index.cells_of_deployments(labels)[index.cell[: index.places]].tolist())

    look()
    index.put_deployment(make_deployment("db", {"app": "db", "tier": "back"}))
    look()
    index.put(make_row("n1", zone="a"))
    index.put(make_row("n2", zone="b", deployments={"db": 2}))
    look()
    index.put_deployment(make_deployment("db", {"app": "other"}))
    look()

    assert found == [[False, False], [True, False], [False, True], [False, False]]
