# SPDX-License-Identifier: GPL-3.0-or-later
"""The mass-failure guard under whatever sequence of events, restarts and clocks that are set, and through JSON."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from guard_room import LIMITS, T0, WELL, Room
from hypothesis import given, settings
from hypothesis import strategies as st
from node_manager.domain import GuardState
from node_manager.guard_terms import Canary, CanaryKind, CauseKind, Census, Outcome, ScopeState
from node_manager.recovery_guard import (
    FLEET,
    LONGEST_OPEN_SECONDS,
    observe,
)

CLOSED, OPEN, HALF_OPEN = GuardState.CLOSED, GuardState.OPEN, GuardState.HALF_OPEN

FULL = ScopeState(
    HALF_OPEN,
    T0,
    CauseKind.DARK,
    "dark",
    T0,
    Canary("a", CanaryKind.CHECK, T0),
    3,
    (Outcome("a", succeeded=True), Outcome("b", succeeded=False)),
    T0,
    T0,
)


@pytest.mark.parametrize("state", [FULL, ScopeState(CLOSED, T0)], ids=["full", "bare"])
def test_document_gives_back_what_was_stored(state: ScopeState) -> None:
    assert ScopeState.from_document(json.loads(json.dumps(state.to_document()))) == state


def test_document_with_less_than_all_is_read() -> None:
    assert ScopeState.from_document({"state": "open", "since": T0.isoformat()}) == ScopeState(OPEN, T0)
    assert ScopeState.from_document({}).state is CLOSED


def test_document_with_an_unknown_state_is_open_and_ends() -> None:
    state = ScopeState.from_document({"state": "ajar"})

    assert state.state is OPEN
    assert observe(state, WELL, T0, LIMITS).state is HALF_OPEN


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "since"]), inner),
    max_leaves=4,
)


@settings(deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(FULL.to_document())), JSON))
def test_document_with_anything_in_it_is_read_and_can_be_written(changes: dict[str, Any]) -> None:
    state = ScopeState.from_document({**FULL.to_document(), **changes})

    observe(state, WELL, T0, LIMITS)
    assert ScopeState.from_document(json.loads(json.dumps(state.to_document()))) == state


EVENTS = st.one_of(
    st.tuples(st.just("wait"), st.sampled_from([0.2, 1, 5, 10, 31, 100, 1000])),
    st.tuples(st.just("census"), st.tuples(st.integers(0, 25), st.integers(0, 25), st.integers(0, 25))),
    st.tuples(st.just("begin"), st.integers(0, 9)),
    st.tuples(st.just("end"), st.sampled_from([True, False, None])),
    st.tuples(st.just("check"), st.just(0)),
    st.tuples(st.just("answer"), st.booleans()),
    st.tuples(st.just("clock"), st.sampled_from([-86_400.0, -30.0, 7.0, 3600.0])),
    st.tuples(st.just("restart"), st.just(0)),
)


class Play:
    """A room under random events, held to the bounds by books of its own."""

    def __init__(self) -> None:
        self.room = Room()
        self.sick = (20, 0, 0)
        self.flying: list[str] = []
        self.check: str | None = None
        self.starts: deque[float] = deque()

    def do(self, what: str, value: Any) -> None:
        """Let one event happen, then look."""
        room = self.room
        if what == "wait":
            room.at += value
        elif what == "census":
            nodes, unhealthy, unreachable = value
            self.sick = (nodes, min(nodes, unhealthy), min(nodes, unhealthy, unreachable))
        elif what == "begin":
            self._begin(f"node-{value}")
        elif what == "end" and self.flying:
            room.end(self.flying.pop(0), value)
        elif what == "check":
            self._check()
        elif what == "answer" and self.check is not None:
            room.guard.checked("hall", self.check, value, room.now)
            self.check = None
        elif what == "clock":
            room.ahead += value
        elif what == "restart":
            room.restart()
            self.check = None
        nodes, unhealthy, unreachable = self.sick
        room.look(Census(nodes, unhealthy, unreachable, len(self.flying)))

    def _check(self) -> None:
        if self.room.guard.checks_wanted(self.room.now):
            assert self.room.state.canary is None or "zone:hall" not in self.room.guard.checks_wanted(self.room.now)
            self.room.guard.check_started("hall", "checked", self.room.now)
            self.check = "checked"

    def _begin(self, node: str) -> None:
        room, (nodes, unhealthy, unreachable) = self.room, self.sick
        if node in self.flying:
            return
        before = {scope: room.guard.states[scope] for scope in (FLEET, "zone:hall")}
        if not room.begin(node):
            return
        assert all(state.state is not OPEN and state.canary is None for state in before.values())
        assert not (unhealthy >= 3 and unhealthy * 10 >= nodes * 4)
        assert not (nodes >= 2 and unreachable == nodes)
        assert len(self.flying) + 1 <= max(1.0, nodes / 10)
        assert not self.starts or room.at - self.starts[-1] >= 10
        for scope, state in before.items():
            is_canary = room.guard.states[scope].canary is not None
            assert is_canary == (state.state is HALF_OPEN)
        self.starts.append(room.at)
        self.flying.append(node)


@settings(max_examples=300, deadline=None)
@given(events=st.lists(EVENTS, max_size=60))
def test_no_sequence_of_events_passes_the_budget_or_gets_stuck(events: list[tuple[str, Any]]) -> None:
    play = Play()
    for what, value in events:
        play.do(what, value)

    # All is well from here on, and nothing in flight answers any more: it closes with the next checks that pass.
    play.sick = (20, 0, 0)
    limit = 3 * LONGEST_OPEN_SECONDS
    while any(state.state is not CLOSED for state in play.room.guard.states.values()):
        play.do("check", 0)
        play.do("answer", True)
        play.do("wait", 5)
        limit -= 5
        assert limit > 0


@settings(max_examples=200, deadline=None)
@given(events=st.lists(EVENTS, max_size=40), where=st.integers(0, 40))
def test_state_survives_json_at_any_point(events: list[tuple[str, Any]], where: int) -> None:
    play = Play()
    for what, value in events[:where]:
        play.do(what, value)

    states = play.room.guard.states
    play.room.restart()

    assert play.room.guard.states == states
    assert all(replace(state) == state for state in states.values())
