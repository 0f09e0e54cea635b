# SPDX-License-Identifier: GPL-3.0-or-later
"""A day of a fleet, watched by the real core on a virtual network: what is lost is found in time, and nothing else is."""

from __future__ import annotations

import pytest
from bench.detection import judge_ours, judge_timeout, unfrozen
from fleet_traces import Kind, World, make_trace


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_day_is_judged_rightly(seed: int) -> None:
    trace = make_trace(300, 1, seed)
    world = World(trace, seed)

    world.run()
    score = judge_ours(trace, world)

    # Where five packets of six round trips get lost, nobody reaches the node; of that nothing is promised.
    assert [cause for cause in score.false if Kind.JAM.value not in cause] == []
    assert score.spells > 0
    assert score.spells == score.found
    assert max(score.suspect) <= 10
    assert max(score.offline) <= 20
    assert unfrozen(world) == 0


def test_a_day_is_judged_better_than_by_time_alone() -> None:
    trace = make_trace(300, 1, 1)
    world = World(trace, 1)
    world.run()

    ours, kubernetes = judge_ours(trace, world), judge_timeout(trace, "", 10, 50, 5, 1)

    assert sum(ours.false.values()) < sum(kubernetes.false.values())
    assert max(ours.offline) < min(kubernetes.offline)


def test_a_day_with_the_same_seed_is_the_same_day() -> None:
    told = []
    for _ in range(2):
        world = World(make_trace(100, 1, 5), 5)
        world.run()
        told.append(world.told)

    assert told[0] == told[1]
