# SPDX-License-Identifier: GPL-3.0-or-later
"""The mass-failure guard: whether the manager may begin a recovery, in a zone and in the fleet.

Pure: what is counted and what time it is come in, states come out. Imports its terms, the
vocabulary and the settings only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final, assert_never

from node_manager.domain import GuardState
from node_manager.guard_terms import (
    Canary,
    CanaryKind,
    CauseKind,
    Census,
    Outcome,
    ScopeState,
)
from node_manager.settings import GuardSettings

FLEET: Final = "fleet"
_ZONE: Final = "zone:"
# Each canary that fails doubles the time that the guard stays open, up to this or to what is configured, whichever is more.
LONGEST_OPEN_SECONDS: Final = 3600.0
_MOST_DOUBLINGS: Final = 12
# A check proves nothing about repairs: where these failed, one that is wanted is waited for this long, longer than a
# node's pause between two climbs, before a check may do.
REPAIR_FIRST_SECONDS: Final = 600.0
# Elsewhere a repair that is wanted gets as many turns before a check is made.
_TURNS_BEFORE_CHECK: Final = 2
# What reads the wall clock and the steady one does so a moment apart.
_DRIFT_SECONDS: Final = 0.5
# How long a canary may take to answer; then it counts as failed.
ANSWER_SECONDS: Final[Mapping[CanaryKind, float]] = {CanaryKind.RECOVERY: 1800.0, CanaryKind.CHECK: 300.0}
# These are seen in the census, and go by themselves.
_SEEN: Final = frozenset((CauseKind.DARK, CauseKind.UNHEALTHY))


def scope_of(zone: str | None) -> str:
    """Name the scope of a zone; nodes without one share a scope."""
    return f"{_ZONE}{zone or ''}"


def name_of(scope: str) -> str:
    """Name a scope for people."""
    zone = scope.removeprefix(_ZONE)
    return "the fleet" if scope == FLEET else f"zone {zone}" if zone else "the nodes without a zone"


def in_flight_limit(census: Census, limits: GuardSettings) -> int:
    """Tell how many recoveries a scope may have at once."""
    return max(1, math.floor(census.nodes * limits.in_flight_percent / 100))


def open_seconds(state: ScopeState, limits: GuardSettings) -> float:
    """Tell how long a scope stays open at least."""
    longest = max(limits.open_seconds, LONGEST_OPEN_SECONDS)
    return min(limits.open_seconds * 2.0 ** min(state.failed_canaries, _MOST_DOUBLINGS), longest)


def observe(state: ScopeState, census: Census, now: datetime, limits: GuardSettings) -> ScopeState:
    """Judge a scope anew: open it, let it try a canary, or open it again; the same object where nothing changed."""
    state = state.shifted(timedelta(), now)
    found = _cause_seen(census, limits)
    match state.state:
        case GuardState.CLOSED:
            cause = found or _recoveries_failed(state, limits)
            return state if cause is None else _opened(state, cause, now)
        case GuardState.OPEN:
            return _observe_open(state, census, found, now, limits)
        case GuardState.HALF_OPEN:
            return _observe_half_open(state, census, found, now)
        case _:
            assert_never(state.state)


def may_start(scope: str, state: ScopeState, census: Census, now: datetime, limits: GuardSettings) -> str | None:
    """Say why no recovery may begin in a scope now; None where one may, in a half-open scope as its canary."""
    name, limit = name_of(scope), in_flight_limit(census, limits)
    if state.state is GuardState.OPEN:
        return f"{name}: the guard is open since {_clock(state.since)}: {state.cause}"
    if state.canary is not None:
        return f"{name}: the guard is half-open and waits for {_describe(state.canary)}"
    if state.last_start_at is not None and _left(state.last_start_at, limits.start_interval_seconds, now) > 0:
        ago = max(0.0, (now - state.last_start_at).total_seconds())
        return f"{name}: a recovery began {ago:.0f} s ago; one may every {limits.start_interval_seconds:g} s"
    if census.in_recovery >= limit:
        return f"{name}: {census.in_recovery} of {census.nodes} nodes are in recovery; {limit} may be at once"
    return None


def started(state: ScopeState, node_id: str, now: datetime) -> ScopeState:
    """Note that a recovery begins; in a half-open scope without a canary it is the canary."""
    begun = replace(state, last_start_at=now)
    if state.state is not GuardState.HALF_OPEN or state.canary is not None:
        return begun
    return replace(begun, canary=Canary(node_id, CanaryKind.RECOVERY, now))


def ended(state: ScopeState, node_id: str, succeeded: bool | None, now: datetime, limits: GuardSettings) -> ScopeState:
    """Note how an automatic recovery ended; None: it was broken off and says nothing, and another may be the canary."""
    is_canary = _is_canary(state, node_id, CanaryKind.RECOVERY)
    if succeeded is None:
        return replace(state, canary=None) if is_canary else state
    # A node counts with its last one: climbs that fail on one broken node are no mass failure.
    others = [outcome for outcome in state.outcomes if outcome.node_id != node_id]
    state = replace(state, outcomes=(*others, Outcome(node_id, succeeded))[-limits.last_recoveries :])
    if is_canary:
        return _closed(state, now) if succeeded else _failed(state, f"the recovery of {node_id} failed", now)
    cause = _recoveries_failed(state, limits) if state.state is GuardState.CLOSED else None
    return state if cause is None else _opened(state, cause, now)


def needs_canary_check(state: ScopeState, now: datetime, limits: GuardSettings) -> bool:
    """Tell whether no recovery was wanted for long enough in a half-open scope, so that a node's check is its canary."""
    patience = _TURNS_BEFORE_CHECK * limits.start_interval_seconds
    if state.kind is CauseKind.RECOVERIES_FAILED:
        patience = max(patience, REPAIR_FIRST_SECONDS)
    return state.state is GuardState.HALF_OPEN and state.canary is None and _left(state.since, patience, now) <= 0


def check_started(state: ScopeState, node_id: str, now: datetime) -> ScopeState:
    """Note that a full check of a node begins, as the canary."""
    return replace(state, canary=Canary(node_id, CanaryKind.CHECK, now))


def canary_checked(state: ScopeState, node_id: str, passed: bool, now: datetime) -> ScopeState:
    """Note how a node's check ended; one that is not the canary, or no longer, changes nothing."""
    if not _is_canary(state, node_id, CanaryKind.CHECK):
        return state
    return _closed(state, now) if passed else _failed(state, f"the check of {node_id} failed", now)


def exit_of(state: ScopeState, census: Census, now: datetime, limits: GuardSettings) -> str | None:
    """Say what it takes until the scope is closed; None where it is."""
    if state.state is GuardState.CLOSED:
        return None
    if state.canary is not None:
        until = state.canary.since + timedelta(seconds=ANSWER_SECONDS[state.canary.kind])
        return f"{_describe(state.canary)} succeeds; it counts as failed at {_clock(until)}"
    if state.state is GuardState.HALF_OPEN:
        return "the next recovery in it, tried alone, succeeds; where none is due, a full check of one node"
    earliest = _clock(max(now, state.since + timedelta(seconds=open_seconds(state, limits))))
    then = f"then one recovery or check that succeeds, from {earliest} on"
    found = _cause_seen(census, limits)
    if found is not None and found[0] is CauseKind.DARK:
        return (
            f"nodes answer again: fewer than {_edge(census, limits)} unhealthy for {limits.settle_seconds:g} s; {then}"
        )
    if found is not None:
        return f"fewer than {_edge(census, limits)} unhealthy for {limits.settle_seconds:g} s; {then}"
    if state.kind in _SEEN:
        return f"it stays so for {limits.settle_seconds:g} s; {then}"
    return then


@dataclass(frozen=True, slots=True)
class Pause:
    """An operator's word that nothing is repaired by itself: in a zone ("": nodes without one), or None: in the fleet."""

    name: str
    zone: str | None
    reason: str
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Permit:
    """A recovery may begin now; it is the *canary* where the zone or the fleet is half-open."""

    canary: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """No recovery may begin now, in one line for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be stored of a scope; no *before*: it is new, no *after*: it is gone."""

    scope: str
    before: ScopeState | None
    after: ScopeState | None

    @property
    def turned(self) -> bool:
        """Whether it opened, went half-open or closed, which is worth an event."""
        before, after = (state.state if state else GuardState.CLOSED for state in (self.before, self.after))
        return before is not after


class Guard:
    """The guards of the fleet and of its zones together.

    One look at all scopes, then questions at the same *now*. What changes is given back to be stored; `undo` takes it
    back where that fails.
    """

    def __init__(self, limits: GuardSettings, states: Mapping[str, ScopeState] | None = None) -> None:
        self._limits = limits
        self.states: dict[str, ScopeState] = dict(states or {})
        self.censuses: dict[str, Census] = {}
        self.pauses: tuple[Pause, ...] = ()
        self._looked: tuple[datetime, float] | None = None

    def observe(self, censuses: Mapping[str, Census], now: datetime, steady_seconds: float) -> list[Change]:
        """Take a new count of every scope, and judge all of them.

        Shapes: *censuses* by scope, the fleet's among them; *steady_seconds* from a clock that can't be set.
        """
        before, self.censuses = dict(self.states), {FLEET: Census(), **censuses}
        drift = timedelta()
        if self._looked is None:
            self.states = {scope: _after_restart(state, now) for scope, state in self.states.items()}
        else:
            then, steady_then = self._looked
            drift = now - then - timedelta(seconds=steady_seconds - steady_then)
        if abs(drift.total_seconds()) > _DRIFT_SECONDS:
            self.states = {scope: state.shifted(drift, now) for scope, state in self.states.items()}
        self._looked = (now, steady_seconds)
        for scope in {**self.states, **self.censuses}:
            state = self.states.get(scope) or ScopeState(GuardState.CLOSED, now)
            state = observe(state, self.censuses.get(scope, Census()), now, self._limits)
            if scope in self.censuses or state.state is not GuardState.CLOSED:
                self.states[scope] = state
            else:
                del self.states[scope]
        return self._changes(before)

    def decide(self, zone: str | None, now: datetime) -> Permit | Refusal:
        """Tell whether a recovery may begin in a zone."""
        refusal = self.refusal_of_fleet(now) or self._paused(scope_of(zone), now) or self._why_not(scope_of(zone), now)
        if refusal is not None:
            return Refusal(refusal)
        scopes = (FLEET, scope_of(zone))
        return Permit(canary=any(self.states[scope].state is GuardState.HALF_OPEN for scope in scopes))

    def refusal_of_fleet(self, now: datetime) -> str | None:
        """Say why no recovery may begin anywhere; None where the fleet as a whole refuses none."""
        return self._paused(FLEET, now) or self._why_not(FLEET, now)

    def started(self, zone: str | None, node_id: str, now: datetime) -> list[Change]:
        """Note that an automatic recovery begins, as decided."""
        before = dict(self.states)
        for scope in self._scopes(zone):
            self.states[scope] = started(self.states[scope], node_id, self._latest(now))
            census = self.censuses.get(scope, Census())
            self.censuses[scope] = replace(census, in_recovery=census.in_recovery + 1)
        return self._changes(before)

    def ended(self, zone: str | None, node_id: str, succeeded: bool | None, now: datetime) -> list[Change]:
        """Note how an automatic recovery ended, in the zone where it began; None: it was broken off."""
        before = dict(self.states)
        for scope in self._scopes(zone):
            self.states[scope] = ended(self.states[scope], node_id, succeeded, self._latest(now), self._limits)
        return self._changes(before)

    def checks_wanted(self, now: datetime) -> list[str]:
        """Name the scopes that want a full check of one of their nodes as their canary."""
        return [scope for scope, state in self.states.items() if needs_canary_check(state, now, self._limits)]

    def check_started(self, zone: str | None, node_id: str, now: datetime) -> list[Change]:
        """Note that a node's check begins: the canary of its zone and of the fleet, of each that wants one."""
        before = dict(self.states)
        for scope in set(self._scopes(zone)).intersection(self.checks_wanted(now)):
            self.states[scope] = check_started(self.states[scope], node_id, self._latest(now))
        return self._changes(before)

    def checked(self, zone: str | None, node_id: str, passed: bool, now: datetime) -> list[Change]:
        """Note how that check ended."""
        before = dict(self.states)
        for scope in self._scopes(zone):
            self.states[scope] = canary_checked(self.states[scope], node_id, passed, self._latest(now))
        return self._changes(before)

    def undo(self, changes: Iterable[Change]) -> None:
        """Take back what could not be stored."""
        for change in changes:
            if change.before is None:
                self.states.pop(change.scope, None)
            else:
                self.states[change.scope] = change.before

    def grace_since(self, zone: str | None) -> datetime | None:
        """Tell from when on the nodes of a zone wait anew; None where nothing was ever open."""
        times = (self.states[scope].grace_since for scope in self._scopes(zone))
        return max((time for time in times if time is not None), default=None)

    def exit_of(self, scope: str, now: datetime) -> str | None:
        """Say what it takes until a scope is closed; None where it is."""
        return exit_of(self.states[scope], self.censuses.get(scope, Census()), now, self._limits)

    def _scopes(self, zone: str | None) -> list[str]:
        return [scope for scope in (FLEET, scope_of(zone)) if scope in self.states]

    def _why_not(self, scope: str, now: datetime) -> str | None:
        if scope not in self.states or scope not in self.censuses:
            return f"{name_of(scope)}: its nodes are not counted yet"
        return may_start(scope, self.states[scope], self.censuses[scope], now, self._limits)

    def _paused(self, scope: str, now: datetime) -> str | None:
        for pause in self.pauses:
            of = FLEET if pause.zone is None else scope_of(pause.zone)
            if of == scope and (pause.until is None or now < pause.until):
                until = f" until {_clock(pause.until)}" if pause.until else ""
                return f"{name_of(scope)}: paused by {pause.name}{until}: {pause.reason}"
        return None

    def _latest(self, now: datetime) -> datetime:
        """Take a clock that was set back since the last look as not set: the next look moves all times."""
        return now if self._looked is None else max(now, self._looked[0])

    def _changes(self, before: Mapping[str, ScopeState]) -> list[Change]:
        pairs = ((scope, before.get(scope), self.states.get(scope)) for scope in {**before, **self.states})
        return [Change(scope, old, new) for scope, old, new in pairs if old is not new and old != new]


def _after_restart(state: ScopeState, now: datetime) -> ScopeState:
    """Trust nothing that a clock set meanwhile would falsify, and no check that ended with the manager."""
    checked = state.canary is not None and state.canary.kind is CanaryKind.CHECK
    return replace(
        state,
        canary=None if checked else state.canary,
        last_start_at=None if state.last_start_at is None else now,
    )


def _observe_open(
    state: ScopeState, census: Census, found: tuple[CauseKind, str] | None, now: datetime, limits: GuardSettings
) -> ScopeState:
    if found is not None:
        # The text keeps the numbers of when it opened: a guard isn't written to the store with every count.
        if state.kind in _SEEN:
            return state if state.cause_gone_at is None else replace(state, cause_gone_at=None)
        return replace(state, kind=found[0], cause=found[1], cause_gone_at=None)
    if state.kind in _SEEN and state.cause_gone_at is None:
        state = replace(state, cause_gone_at=now)
    if _left(state.since, open_seconds(state, limits), now) > 0:
        return state
    if state.cause_gone_at is not None and _left(state.cause_gone_at, limits.settle_seconds, now) > 0:
        return state
    # Without nodes there is nothing to try.
    return replace(state, state=GuardState.HALF_OPEN, since=now) if census.nodes else _closed(state, now)


def _observe_half_open(
    state: ScopeState, census: Census, found: tuple[CauseKind, str] | None, now: datetime
) -> ScopeState:
    if found is not None:
        return _opened(state, found, now)
    if state.canary is None:
        return state if census.nodes else _closed(state, now)
    seconds = ANSWER_SECONDS[state.canary.kind]
    if _left(state.canary.since, seconds, now) > 0:
        return state
    return _failed(state, f"{_describe(state.canary)} had no result within {seconds / 60:g} minutes", now)


def _cause_seen(census: Census, limits: GuardSettings) -> tuple[CauseKind, str] | None:
    if census.nodes >= limits.dark_nodes and census.unreachable >= census.nodes:
        return CauseKind.DARK, f"all its nodes, {census.nodes}, are unreachable"
    # As in _edge: what people are told is what is compared.
    if census.unhealthy < _edge(census, limits):
        return None
    percent = 100 * census.unhealthy / max(1, census.nodes)
    return CauseKind.UNHEALTHY, f"{census.unhealthy} of {census.nodes} nodes are unhealthy ({percent:.0f} %)"


def _edge(census: Census, limits: GuardSettings) -> int:
    """Tell how many unhealthy nodes open the guard."""
    return max(limits.unhealthy_nodes, math.ceil(census.nodes * limits.unhealthy_percent / 100))


def _recoveries_failed(state: ScopeState, limits: GuardSettings) -> tuple[CauseKind, str] | None:
    last = state.outcomes[-limits.last_recoveries :]
    failed = sum(not outcome.succeeded for outcome in last)
    if failed < limits.failed_recoveries:
        return None
    return CauseKind.RECOVERIES_FAILED, f"{failed} of the last {len(last)} recoveries failed"


def _opened(state: ScopeState, cause: tuple[CauseKind, str], now: datetime) -> ScopeState:
    kind, text = cause
    return replace(state, state=GuardState.OPEN, since=now, kind=kind, cause=text, cause_gone_at=None, canary=None)


def _failed(state: ScopeState, text: str, now: datetime) -> ScopeState:
    """Open after a canary that failed, for longer than the last time."""
    checked = state.canary is not None and state.canary.kind is CanaryKind.CHECK
    kind = CauseKind.CHECK_FAILED if checked else CauseKind.RECOVERIES_FAILED
    return replace(_opened(state, (kind, text), now), failed_canaries=state.failed_canaries + 1)


def _closed(state: ScopeState, now: datetime) -> ScopeState:
    return ScopeState(GuardState.CLOSED, now, last_start_at=state.last_start_at, grace_since=now)


def _is_canary(state: ScopeState, node_id: str, kind: CanaryKind) -> bool:
    return state.canary is not None and (state.canary.node_id, state.canary.kind) == (node_id, kind)


def _describe(canary: Canary) -> str:
    return f"the {canary.kind} of {canary.node_id}, begun at {_clock(canary.since)}"


def _left(since: datetime, seconds: float, now: datetime) -> float:
    """Tell how many of the seconds are left; all where *since* is ahead."""
    return seconds - max(0.0, (now - since).total_seconds())


def _clock(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
