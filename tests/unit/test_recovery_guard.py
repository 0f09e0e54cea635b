# SPDX-License-Identifier: GPL-3.0-or-later
"""The mass-failure guard rule by rule."""

from __future__ import annotations

from datetime import timedelta

import pytest
from guard_room import LIMITS, T0, WELL, Room
from node_manager.domain import GuardState
from node_manager.guard_terms import Canary, CanaryKind, CauseKind, Census, Outcome, ScopeState
from node_manager.recovery_guard import (
    ANSWER_SECONDS,
    FLEET,
    LONGEST_OPEN_SECONDS,
    REPAIR_FIRST_SECONDS,
    Guard,
    Pause,
    Permit,
    Refusal,
    in_flight_limit,
    observe,
    open_seconds,
    scope_of,
)
from node_manager.settings import GuardSettings

CLOSED, OPEN, HALF_OPEN = GuardState.CLOSED, GuardState.OPEN, GuardState.HALF_OPEN
SICK = Census(20, unhealthy=8)


def half_open() -> Room:
    """Give a room that was sick and is half-open."""
    room = Room(SICK)
    room.watch(WELL, 61)
    assert room.state.state is HALF_OPEN
    return room


@pytest.mark.parametrize(
    ("census", "expected"),
    [
        (Census(20, unhealthy=7), CLOSED),
        (Census(20, unhealthy=8), OPEN),
        (Census(4, unhealthy=2), CLOSED),
        (Census(4, unhealthy=3), OPEN),
        (Census(3, unhealthy=2, unreachable=2), CLOSED),
        (Census(2, unhealthy=2, unreachable=1), CLOSED),
        (Census(2, unhealthy=2, unreachable=2), OPEN),
        (Census(1, unhealthy=1, unreachable=1), CLOSED),
        (Census(0), CLOSED),
    ],
    ids=[
        "below",
        "40 %",
        "two of four",
        "three of four",
        "not all",
        "a pair half",
        "a pair dark",
        "a lone one",
        "empty",
    ],
)
def test_observe_opens_at_the_edges(census: Census, expected: GuardState) -> None:
    assert observe(ScopeState(CLOSED, T0), census, T0, LIMITS).state is expected


@pytest.mark.parametrize(("nodes", "expected"), [(0, 1), (1, 1), (9, 1), (19, 1), (20, 2), (1000, 100)])
def test_in_flight_limit_is_a_tenth_and_never_nothing(nodes: int, expected: int) -> None:
    assert in_flight_limit(Census(nodes), LIMITS) == expected


@pytest.mark.parametrize("nodes", [1, 2])
def test_lone_dead_node_of_a_small_zone_may_be_repaired(nodes: int) -> None:
    room = Room(Census(nodes, unhealthy=1, unreachable=1))

    assert room.begin("a")


def test_closed_guard_lets_one_begin_in_each_interval() -> None:
    room = Room()

    assert room.begin("a")
    room.look(after=9.5)
    assert room.ask() == "the fleet: a recovery began 10 s ago; one may every 10 s"
    room.look(after=0.5)
    assert room.begin("b")


def test_fleet_parts_starts_of_different_zones() -> None:
    guard = Guard(LIMITS)
    guard.observe({FLEET: Census(40), "zone:a": Census(20), "zone:b": Census(20)}, T0, 0)
    guard.started("a", "node", T0)

    assert isinstance(guard.decide("b", T0), Refusal)


def test_in_flight_is_bounded_and_says_so() -> None:
    room = Room(Census(20, unhealthy=2, in_recovery=2))

    assert room.ask() == "zone hall: 2 of 20 nodes are in recovery; 2 may be at once"


def test_starts_between_two_looks_count_as_in_flight() -> None:
    guard = Guard(GuardSettings(start_interval_seconds=0))
    guard.observe({FLEET: Census(1000), "zone:a": Census(20)}, T0, 0)

    begun = 0
    while isinstance(guard.decide("a", T0), Permit) and begun < 10:
        guard.started("a", f"node-{begun}", T0)
        begun += 1

    assert begun == 2


def test_open_zone_refuses_there_only_and_an_open_fleet_everywhere() -> None:
    guard = Guard(LIMITS)
    counts = {FLEET: Census(40, unhealthy=15), "zone:a": Census(20, unhealthy=15), "zone:": Census(20)}
    guard.observe(counts, T0, 0)

    assert isinstance(guard.decide("a", T0), Refusal)
    assert isinstance(guard.decide(None, T0), Permit)
    assert guard.refusal_of_fleet(T0) is None

    guard.observe({**counts, FLEET: Census(40, unhealthy=16)}, T0, 0)

    reason = "the fleet: the guard is open since 2026-07-01T00:00:00Z: 16 of 40 nodes are unhealthy (40 %)"
    assert guard.decide(None, T0) == Refusal(reason)
    assert guard.refusal_of_fleet(T0) == reason


def test_scope_that_was_never_counted_refuses() -> None:
    assert isinstance(Guard(LIMITS).decide("a", T0), Refusal)
    assert isinstance(Room().guard.decide("unknown", T0), Refusal)


def test_open_guard_stays_open_for_its_time_though_the_cause_went_at_once() -> None:
    room = Room(SICK)

    assert room.watch(WELL, 59) is OPEN
    assert room.watch(WELL, 1) is HALF_OPEN


def test_open_guard_waits_until_the_cause_has_settled() -> None:
    room = Room(SICK)
    room.watch(SICK, 300)

    # Gone for 29 s, seen again, gone for 30 s.
    assert room.watch(WELL, 30) is OPEN
    assert room.watch(SICK, 1) is OPEN
    assert room.watch(WELL, 30) is OPEN
    assert room.watch(WELL, 1) is HALF_OPEN


def test_census_at_the_edge_does_not_flutter() -> None:
    room, turns = Room(), 0
    before = CLOSED

    for second in range(600):
        state = room.look((SICK, Census(20, unhealthy=7))[second % 2], after=1)
        turns += state is not before
        before = state

    assert turns == 1


def test_half_open_guard_that_sees_the_cause_opens_again() -> None:
    room = half_open()

    assert room.look(SICK) is OPEN
    assert room.state.since == room.now


def test_half_open_guard_lets_one_canary_begin() -> None:
    room = half_open()

    assert room.guard.decide("hall", room.now) == Permit(canary=True)
    assert room.begin("a")
    room.look(after=20)
    assert not room.begin("b")
    assert room.state.canary == Canary("a", CanaryKind.RECOVERY, room.now - timedelta(seconds=20))


def test_canary_that_succeeds_closes_and_nodes_wait_anew() -> None:
    room = half_open()
    room.begin("a")
    room.end("b", succeeded=False)
    assert room.state.state is HALF_OPEN

    room.end("a", succeeded=True)

    assert room.state.state is CLOSED
    assert (room.state.outcomes, room.state.canary, room.state.cause) == ((), None, None)
    assert room.guard.grace_since("hall") == room.now


def test_canary_that_fails_opens_for_longer_each_time_up_to_a_bound() -> None:
    room, lasted = half_open(), []
    for _ in range(9):
        room.begin("a")
        room.end("a", succeeded=False)
        assert room.state.state is OPEN
        opened = room.at
        while room.look(after=10) is OPEN:
            assert room.at - opened < 2 * LONGEST_OPEN_SECONDS
        lasted.append(room.at - opened)

    assert lasted[:3] == [120, 240, 480]
    assert lasted[-2:] == [LONGEST_OPEN_SECONDS, LONGEST_OPEN_SECONDS]


def test_open_seconds_above_the_bound_are_kept() -> None:
    state = ScopeState(OPEN, T0, failed_canaries=10_000)

    assert open_seconds(state, GuardSettings(open_seconds=7200)) == 7200


def test_canary_that_is_broken_off_makes_room_for_another() -> None:
    room = half_open()
    room.begin("a")

    room.end("a", None)

    room.look(after=10)
    assert room.state.state is HALF_OPEN
    assert room.begin("b")


@pytest.mark.parametrize("kind", CanaryKind)
def test_canary_without_an_answer_counts_as_failed(kind: CanaryKind) -> None:
    room = half_open()
    if kind is CanaryKind.RECOVERY:
        room.begin("a")
    else:
        room.look(after=20)
        room.guard.check_started("hall", "a", room.now)

    assert room.look(after=ANSWER_SECONDS[kind] - 1) is HALF_OPEN
    assert room.look(after=1) is OPEN
    assert room.state.failed_canaries == 1


def test_check_is_the_canary_where_no_recovery_is_wanted() -> None:
    room = half_open()
    assert room.guard.checks_wanted(room.now) == []

    room.look(after=20)
    assert room.guard.checks_wanted(room.now) == ["zone:hall"]
    room.guard.check_started("hall", "a", room.now)
    assert room.guard.checks_wanted(room.now) == []
    assert not room.begin("b")
    # Neither another node's check nor a repair that was in flight is its answer.
    room.guard.checked("hall", "b", passed=True, now=room.now)
    room.end("a", succeeded=True)
    assert room.state.state is HALF_OPEN

    room.guard.checked("hall", "a", passed=True, now=room.now)
    assert room.state.state is CLOSED


def test_check_that_fails_opens_again() -> None:
    room = half_open()
    room.look(after=20)
    room.guard.check_started("hall", "a", room.now)

    room.guard.checked("hall", "a", passed=False, now=room.now)

    assert (room.state.state, room.state.kind) == (OPEN, CauseKind.CHECK_FAILED)


def test_failed_recoveries_open_and_a_repair_is_preferred_to_a_check() -> None:
    room = Room()
    for node, succeeded in [("a", False), ("b", True), ("c", False), ("d", True)]:
        room.end(node, succeeded)
    assert room.state.state is CLOSED

    room.end("e", succeeded=False)

    assert (room.state.state, room.state.cause) == (OPEN, "3 of the last 5 recoveries failed")
    assert room.look(after=60) is HALF_OPEN
    room.look(after=REPAIR_FIRST_SECONDS - 1)
    assert room.guard.checks_wanted(room.now) == []
    room.look(after=1)
    assert sorted(room.guard.checks_wanted(room.now)) == ["fleet", "zone:hall"]


def test_outcomes_beyond_the_last_are_forgotten() -> None:
    room = Room()

    for number in range(5):
        room.end(f"bad-{number}" if number < 2 else f"good-{number}", number >= 2)
    room.end("good", succeeded=True)
    room.end("worse", succeeded=False)

    assert room.state.state is CLOSED
    assert len(room.state.outcomes) == LIMITS.last_recoveries


def test_outcomes_that_are_too_many_by_new_limits_open_at_the_next_look() -> None:
    failed = tuple(Outcome(node, succeeded=False) for node in "ab")

    state = observe(ScopeState(CLOSED, T0, outcomes=failed), WELL, T0, GuardSettings(failed_recoveries=2))

    assert state.state is OPEN


def test_one_node_whose_repairs_fail_is_no_mass_failure() -> None:
    room = Room()

    for _ in range(5):
        room.end("a", succeeded=False)

    assert (room.state.state, room.state.outcomes) == (CLOSED, (Outcome("a", succeeded=False),))


def test_scope_without_nodes_closes_by_itself() -> None:
    room = Room(SICK)

    assert room.watch(Census(0), 59) is OPEN
    assert room.watch(Census(0), 2) is CLOSED


def test_scope_that_is_gone_is_forgotten() -> None:
    room = Room()

    changes = room.guard.observe({FLEET: room.fleet}, room.now, room.at)

    assert [(change.scope, change.after) for change in changes] == [("zone:hall", None)]


@pytest.mark.parametrize("ahead", [-86_400.0, 86_400.0])
def test_clock_that_is_set_changes_no_duration(ahead: float) -> None:
    room = Room(SICK)
    room.watch(WELL, 10)
    room.ahead = ahead

    assert room.watch(WELL, 49) is OPEN
    assert room.watch(WELL, 1) is HALF_OPEN
    assert room.begin("a")
    room.ahead = 0.0
    room.look(after=9)
    room.end("a", succeeded=True)
    assert not room.begin("b")
    room.look(after=1)
    assert room.begin("b")


@pytest.mark.parametrize("ahead", [-86_400.0, 0.0, 86_400.0])
def test_restart_remembers_and_lets_nothing_begin_too_early(ahead: float) -> None:
    room = Room()
    room.begin("a")
    room.restart()
    room.ahead = ahead
    room.look(after=1)

    assert not room.begin("b")
    room.look(after=10)
    assert room.begin("b")


def test_restart_while_open_with_the_clock_set_back_ends_in_time() -> None:
    room = Room(SICK)
    room.restart()
    room.ahead = -86_400.0

    assert room.watch(WELL, 62) is HALF_OPEN


def test_restart_keeps_a_repair_as_canary_and_makes_a_check_anew() -> None:
    room = half_open()
    room.begin("a")
    room.restart()
    room.look(after=10)
    assert not room.begin("b")
    room.end("a", None)
    room.look(after=20)
    room.guard.check_started("hall", "c", room.now)

    room.restart()
    room.look(after=1)

    assert room.guard.checks_wanted(room.now) == ["zone:hall"]


def test_pause_refuses_in_its_zone_until_it_ends() -> None:
    room = Room()
    until = room.now + timedelta(seconds=5)
    room.guard.pauses = (Pause("works", "hall", "new switches", until), Pause("old", None, "done", room.now))

    assert room.ask() == "zone hall: paused by works until 2026-07-01T00:00:05Z: new switches"
    assert room.guard.refusal_of_fleet(room.now) is None
    room.look(after=5)
    assert room.ask() is None
    room.guard.pauses = (Pause("all", None, "storm drill"),)
    assert room.ask() == "the fleet: paused by all: storm drill"
    assert room.guard.refusal_of_fleet(room.now) == room.ask()


def test_pause_of_the_nodes_without_a_zone_is_not_one_of_the_fleet() -> None:
    guard = Guard(LIMITS)
    guard.observe({FLEET: Census(40), "zone:a": Census(20), scope_of(None): Census(20)}, T0, 0)
    guard.pauses = (Pause("loose", "", "moving"),)

    assert isinstance(guard.decide(None, T0), Refusal)
    assert isinstance(guard.decide("a", T0), Permit)


def test_undo_takes_a_start_back() -> None:
    room = half_open()
    before = dict(room.guard.states)

    room.guard.undo(room.guard.started("hall", "a", room.now))

    assert room.guard.states == before


def test_observe_reports_what_turned_and_nothing_twice() -> None:
    room = Room()
    counts = {FLEET: room.fleet, "zone:hall": SICK}

    changes = room.guard.observe(counts, room.now, room.at)

    assert [(change.scope, change.turned) for change in changes] == [("zone:hall", True)]
    assert room.guard.observe(counts, room.now, room.at) == []


def test_exit_says_what_it_takes() -> None:
    room = Room(SICK)

    def exit_now() -> str | None:
        return room.guard.exit_of("zone:hall", room.now)

    sick = "fewer than 8 unhealthy for 30 s; then one recovery or check that succeeds, from 2026-07-01T00:01:00Z on"
    assert exit_now() == sick
    assert room.guard.exit_of(FLEET, room.now) is None
    room.watch(WELL, 61)
    assert exit_now() == ("the next recovery in it, tried alone, succeeds; where none is due, a full check of one node")
    room.begin("a")
    assert exit_now() == (
        "the recovery of a, begun at 2026-07-01T00:01:01Z succeeds; it counts as failed at 2026-07-01T00:31:01Z"
    )
