# SPDX-License-Identifier: GPL-3.0-or-later
"""The mass-failure guard under seeded storms, of which tests/bench/storm.py prints larger ones."""

from __future__ import annotations

import pytest
from bench.storm import row_of
from node_manager.domain import GuardState
from storm_traces import Books, Manager, Storm, storms

NODES, SECONDS, SEEDS = 300, 2700, 2
STORMS = [(storm, seed) for seed in range(SEEDS) for storm in storms(NODES, SECONDS, seed)]
BY_NAME = {storm.name: storm for storm, seed in STORMS if seed == 0}


def run(storm: Storm, seed: int = 0) -> Books:
    """Let a storm pass over a guarded fleet."""
    return Manager(storm, seed).run()


@pytest.mark.parametrize(("storm", "seed"), STORMS, ids=[f"{storm.name}-{seed}" for storm, seed in STORMS])
def test_storm_never_passes_the_budget(storm: Storm, seed: int) -> None:
    assert run(storm, seed).passed == []


@pytest.mark.parametrize("name", ["fleet cut", "rack cut", "repairs that fail"])
def test_storm_that_is_over_leaves_every_scope_closed_and_every_node_well(name: str) -> None:
    books = run(BY_NAME[name])

    assert (books.still_open, books.healthy_at_end) == ([], NODES)


def test_fleet_cut_starts_nothing_and_closes_by_checks() -> None:
    books = run(BY_NAME["fleet cut"])

    assert books.started == 0
    assert books.canaries["check"] >= 1
    assert books.closed_at is not None
    assert books.closed_at - books.last_back < 180


def test_zones_cut_are_left_alone_while_the_others_are_repaired() -> None:
    books = run(BY_NAME["zones cut"])

    # Zones of one and two nodes are too small to be judged by parts; the pair is dark as a whole.
    assert books.on_living == 0
    assert books.repaired > 5


def test_crashes_now_and_then_are_repaired_and_open_nothing() -> None:
    books = run(BY_NAME["background crashes"])

    assert (books.seconds_in[GuardState.OPEN], books.hit) == (0, books.repaired)


def test_repairs_that_fail_open_the_guard_and_one_that_works_closes_it() -> None:
    books = run(BY_NAME["repairs that fail"])

    assert books.canaries["recovery"] >= 2
    assert books.repaired > 0
    assert books.started < Manager(BY_NAME["repairs that fail"], 0, None).run().started


def test_books_without_a_guard_show_what_it_prevents() -> None:
    storm = BY_NAME["fleet cut"]

    naive = Manager(storm, 0, None).run()

    assert naive.on_living >= NODES
    assert row_of(storm.name, run(storm), naive, NODES)[3] == str(naive.started)
