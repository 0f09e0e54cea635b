# SPDX-License-Identifier: GPL-3.0-or-later
"""Whom a silent node's neighbours are, and what their word is worth."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from node_manager.domain import Liveness
from node_manager.peers import Answer, Finding, Fleet

NOW = 1000.0
BLIND, SEEN, CANNOT_TELL = Answer.BLIND, Answer.SEEN, Answer.CANNOT_TELL


@dataclass
class Known:
    """A node as its watch knows it; heard this instant, unless a test says otherwise."""

    liveness: Liveness | None = None
    streaming: bool = True
    last_sign_at: float = NOW


ALIVE = Known()
LATE = Known(last_sign_at=NOW - 7)
SUSPECT = Known(Liveness.SUSPECT, streaming=False, last_sign_at=NOW - 12)
LOST = Known(Liveness.UNREACHABLE, streaming=False, last_sign_at=NOW - 500)
ASLEEP = Known(Liveness.ASLEEP, streaming=False, last_sign_at=NOW - 500)
NO_STREAM = Known(streaming=False, last_sign_at=NOW - 3)


def a_fleet(*near: Known, far: tuple[Known, ...] = ()) -> Fleet:
    """Make a fleet in which "me" is silent, with neighbours n0, n1... and others f0, f1... of another site."""
    fleet = Fleet(5.0, peers_of_site=3, peers_elsewhere=1)
    fleet.add("me", "here", SUSPECT)
    for number, known in enumerate(near):
        fleet.add(f"n{number}", "here", known)
    for number, known in enumerate(far):
        fleet.add(f"f{number}", "there", known)
    return fleet


def test_choose_takes_living_neighbours_and_one_from_elsewhere() -> None:
    fleet = a_fleet(*[ALIVE] * 10, far=(ALIVE,) * 10)

    chosen = fleet.choose("me", NOW)

    assert [name[0] for name in chosen] == ["n", "n", "n", "f"]
    assert len(set(chosen)) == 4


def test_choose_takes_nobody_who_is_not_heard() -> None:
    fleet = a_fleet(LATE, SUSPECT, LOST, ASLEEP, NO_STREAM, far=(LATE, LOST))

    assert fleet.choose("me", NOW) == []


def test_choose_is_the_same_each_time_and_another_for_another_attempt() -> None:
    fleet = a_fleet(*[ALIVE] * 50)

    assert fleet.choose("me", NOW, 1) == fleet.choose("me", NOW, 1)
    assert len({tuple(fleet.choose("me", NOW, attempt)) for attempt in range(10)}) > 5


def test_choose_spreads_the_asking() -> None:
    fleet = a_fleet(*[ALIVE] * 100)
    for number in range(100):
        fleet.add(f"s{number}", "here", SUSPECT)

    asked = Counter(peer for number in range(100) for peer in fleet.choose(f"s{number}", NOW))

    assert all(peer.startswith("n") for peer in asked)
    assert len(asked) > 30


@pytest.mark.parametrize(
    ("near", "far", "answers", "finding", "settled"),
    [
        ((ALIVE,), (), {"n0": SEEN}, Finding.SEEN, True),
        ((ALIVE, ALIVE), (), {"n0": BLIND, "n1": SEEN}, Finding.SEEN, True),
        ((ALIVE,), (ALIVE,), {"n0": BLIND, "f0": SEEN}, Finding.SEEN, True),
        ((SUSPECT,), (ALIVE,), {"f0": SEEN}, Finding.SEEN, True),
        ((ALIVE,), (), {"n0": BLIND}, Finding.BLIND, True),
        ((ALIVE, LOST), (ALIVE,), {"n0": BLIND, "f0": BLIND}, Finding.BLIND, True),
        ((ALIVE, LATE), (), {"n0": BLIND}, Finding.BLIND, False),
        ((ALIVE, ALIVE, LATE), (), {"n0": BLIND}, Finding.BLIND, True),
        ((LATE,), (ALIVE,), {"n0": BLIND}, Finding.DARK, False),
        ((SUSPECT,), (ALIVE,), {"n0": BLIND}, Finding.DARK, True),
        ((SUSPECT, LOST), (ALIVE,), {"f0": BLIND}, Finding.DARK, True),
        ((SUSPECT, LATE), (ALIVE,), {}, Finding.DARK, False),
        ((ALIVE,), (ALIVE,), {"n0": CANNOT_TELL}, Finding.NOBODY, False),
        ((ALIVE,), (ALIVE,), {"f0": BLIND}, Finding.NOBODY, False),
        ((ASLEEP,), (ALIVE,), {"f0": BLIND}, Finding.NOBODY, True),
        ((NO_STREAM,), (ALIVE,), {}, Finding.NOBODY, True),
        ((), (ALIVE,), {"f0": BLIND}, Finding.NOBODY, True),
        ((), (ALIVE,), {"f0": CANNOT_TELL}, Finding.NOBODY, True),
        ((), (), {}, Finding.NOBODY, True),
        ((), (SUSPECT,), {}, Finding.DARK, True),
        ((), (LATE,), {}, Finding.DARK, False),
        ((), (ASLEEP,), {}, Finding.NOBODY, True),
        ((ALIVE,), (), {"gone": BLIND, "n0": CANNOT_TELL}, Finding.NOBODY, False),
    ],
)
def test_weigh_tells_what_answers_mean(
    near: tuple[Known, ...], far: tuple[Known, ...], answers: dict[str, Answer], finding: Finding, settled: bool
) -> None:
    fleet = a_fleet(*near, far=far)

    found = fleet.weigh("me", answers, NOW)

    assert (finding, settled) == (found.finding, found.settled)
    assert found.message


def test_weigh_says_that_the_manager_may_be_cut_off_where_the_whole_fleet_is_silent() -> None:
    fleet = a_fleet(SUSPECT, far=(LOST,))

    assert "manager" in fleet.weigh("me", {}, NOW).message
    assert "manager" not in a_fleet(SUSPECT, far=(ALIVE,)).weigh("me", {}, NOW).message


def test_weigh_sees_how_a_site_goes_dark() -> None:
    dying = Known(last_sign_at=NOW - 1)
    fleet = a_fleet(dying, far=(ALIVE,))
    answers = {"n0": BLIND}
    found = [fleet.weigh("me", answers, NOW)]

    fleet.add("f0", "there", Known(last_sign_at=NOW + 60))
    found.append(fleet.weigh("me", answers, NOW + 5))
    dying.liveness, dying.streaming = Liveness.SUSPECT, False
    found.append(fleet.weigh("me", answers, NOW + 8))

    assert [(each.finding, each.settled) for each in found] == [
        (Finding.BLIND, True),
        (Finding.DARK, False),
        (Finding.DARK, True),
    ]


def test_remove_forgets_a_node_and_keeps_the_others() -> None:
    fleet = a_fleet(ALIVE, ALIVE, ALIVE, ALIVE)

    fleet.remove("n0")
    fleet.remove("n0")

    assert len(fleet) == 4
    assert {"n1", "n2", "n3"} == set(fleet.choose("me", NOW))


def test_add_moves_a_node_to_another_site() -> None:
    fleet = a_fleet(ALIVE)

    fleet.add("n0", None, ALIVE)

    assert Finding.NOBODY is fleet.weigh("me", {}, NOW).finding
    assert fleet.choose("me", NOW) == ["n0"]
