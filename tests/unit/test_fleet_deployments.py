# SPDX-License-Identifier: GPL-3.0-or-later
"""Where replicas are, by deployment and label: the counts kept on the way are those that are counted anew."""

from __future__ import annotations

import random

import numpy as np
from fleet_rows_builder import make_deployment
from node_manager.fleet_deployments import FleetDeployments

PAIRS = [(key, value) for key in ("app", "tier") for value in "xyz"]


def test_hold_put_forget_and_move_come_to_what_is_counted_anew() -> None:
    dice = random.Random(5)
    kept, cell_of = FleetDeployments(), np.zeros(8, np.intp)

    for _ in range(3000):
        name, place = f"d{dice.randrange(5)}", dice.randrange(8)
        happening = dice.randrange(4)
        if happening == 0:
            labels = {key: dice.choice("xyz") for key in ("app", "tier") if dice.random() < 0.7}
            kept.put(make_deployment(name, labels), cell_of)
        elif happening == 1:
            kept.forget(name, cell_of)
        elif happening == 2:
            held = kept.holders.get(name, {}).get(place, 0)
            kept.hold(name, place, int(cell_of[place]), dice.randint(-held, 2))
        else:
            before, cell_of[place] = int(cell_of[place]), dice.randrange(100)
            kept.move(list(kept.holders), place, before, int(cell_of[place]))

        for pair in PAIRS:
            cells = {
                int(cell_of[place])
                for name, row in kept.rows.items()
                if row.labels.get(pair[0]) == pair[1]
                for place in kept.holders.get(name, ())
            }
            assert set(np.flatnonzero(kept.cells_of(pair, 100)).tolist()) == cells


def test_labelled_needs_all_labels() -> None:
    kept = FleetDeployments()
    for name, labels in (("d1", {"app": "x", "tier": "y"}), ("d2", {"app": "x"}), ("d3", {})):
        kept.put(make_deployment(name, labels), np.zeros(0, np.intp))

    found = [kept.labelled(labels) for labels in ({"app": "x"}, {"app": "x", "tier": "y"}, {"app": "z"})]

    assert found == [{"d1", "d2"}, {"d1"}, set()]


def test_repellers_of_finds_those_who_may_keep_one_away_in_a_fixed_order() -> None:
    kept, cell_of = FleetDeployments(), np.zeros(0, np.intp)
    for name in ("d3", "d1", "d2"):
        kept.put(make_deployment(name, {}, {"deployment_id": "web"}, {"deployment_labels": {"app": "x"}}), cell_of)
    kept.put(make_deployment("web", {}, {"deployment_labels": {"app": "x"}}), cell_of)
    kept.forget("d2", cell_of)

    def names(deployment_id: str, **labels: str) -> list[str]:
        return [row.deployment_id for row in kept.repellers_of(deployment_id, labels)]

    assert names("web", app="x") == ["d1", "d3"]
    assert names("api", app="x") == ["d1", "d3", "web"]
    assert names("api", app="y") == []
