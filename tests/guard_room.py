# SPDX-License-Identifier: GPL-3.0-or-later
"""One zone in a fleet under the mass-failure guard, with clocks that a test moves."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from node_manager.domain import GuardState
from node_manager.guard_terms import Census, ScopeState
from node_manager.recovery_guard import FLEET, Guard, Permit, Refusal
from node_manager.settings import GuardSettings

T0 = datetime(2026, 7, 1, tzinfo=UTC)
LIMITS = GuardSettings()
WELL = Census(20)


class Room:
    """One zone, "hall", in a fleet of 1000, with clocks that a test moves and a census that it sets."""

    def __init__(self, census: Census = WELL) -> None:
        self.guard = Guard(LIMITS)
        self.census, self.fleet = census, Census(1000)
        self.at, self.ahead, self.booted = 0.0, 0.0, 0.0
        self.look()

    @property
    def now(self) -> datetime:
        return T0 + timedelta(seconds=self.at + self.ahead)

    @property
    def state(self) -> ScopeState:
        return self.guard.states["zone:hall"]

    def look(self, census: Census | None = None, *, after: float = 0.0) -> GuardState:
        """Let time pass and look."""
        self.at += after
        self.census = census or self.census
        counts = {FLEET: self.fleet, "zone:hall": self.census}
        self.guard.observe(counts, self.now, self.at - self.booted)
        return self.state.state

    def watch(self, census: Census, seconds: int) -> GuardState:
        """Look once a second."""
        for _ in range(seconds):
            self.look(census, after=1)
        return self.state.state

    def ask(self) -> str | None:
        """Say why not."""
        decision = self.guard.decide("hall", self.now)
        return decision.reason if isinstance(decision, Refusal) else None

    def begin(self, node_id: str) -> bool:
        """Begin a recovery if that may be; tell whether it did."""
        may = isinstance(self.guard.decide("hall", self.now), Permit)
        if may:
            self.guard.started("hall", node_id, self.now)
        return may

    def end(self, node_id: str, succeeded: bool | None) -> None:
        """End it."""
        self.guard.ended("hall", node_id, succeeded, self.now)

    def restart(self) -> None:
        """Go through JSON into a new guard."""
        stored = json.dumps({scope: state.to_document() for scope, state in self.guard.states.items()})
        states = {scope: ScopeState.from_document(document) for scope, document in json.loads(stored).items()}
        self.guard, self.booted = Guard(LIMITS, states), self.at
