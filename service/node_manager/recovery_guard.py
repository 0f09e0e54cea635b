# SPDX-License-Identifier: GPL-3.0-or-later
"""The mass-failure guard: whether the manager may begin a recovery, in a zone and in the fleet.

Pure: what is counted and what time it is come in, states come out. Imports the vocabulary and the settings only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, assert_never

from node_manager.domain import GuardState
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


class CauseKind(StrEnum):
    """Why a guard is open."""

    DARK = "dark"
    UNHEALTHY = "unhealthy"
    RECOVERIES_FAILED = "recoveries_failed"
    CHECK_FAILED = "check_failed"


class CanaryKind(StrEnum):
    """What a half-open guard tries."""

    RECOVERY = "recovery"
    CHECK = "check"


# How long a canary may take to answer; then it counts as failed.
ANSWER_SECONDS: Final[Mapping[CanaryKind, float]] = {CanaryKind.RECOVERY: 1800.0, CanaryKind.CHECK: 300.0}
# These are seen in the census, and go by themselves.
_SEEN: Final = frozenset((CauseKind.DARK, CauseKind.UNHEALTHY))


@dataclass(frozen=True, slots=True)
class Census:
    """What is counted of a scope's nodes, without those in maintenance and those declared offline.

    *unhealthy*: suspect, unreachable, flapping, recovering, degraded by something critical, or in an active recovery;
    each node once. *in_recovery* counts active recoveries, whoever began them.
    """

    nodes: int = 0
    unhealthy: int = 0
    unreachable: int = 0
    in_recovery: int = 0


@dataclass(frozen=True, slots=True)
class Canary:
    """The one repair or check that a half-open guard waits for."""

    node_id: str
    kind: CanaryKind
    since: datetime


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the last automatic recovery of a node ended."""

    node_id: str
    succeeded: bool


@dataclass(frozen=True, slots=True)
class ScopeState:
    """What a guard remembers of one scope.

    *cause_gone_at* is when the census stopped showing the cause. *grace_since* is when it last closed: nodes wait anew
    from there before they are repaired.
    """

    state: GuardState
    since: datetime
    kind: CauseKind | None = None
    cause: str | None = None
    cause_gone_at: datetime | None = None
    canary: Canary | None = None
    failed_canaries: int = 0
    outcomes: tuple[Outcome, ...] = ()
    last_start_at: datetime | None = None
    grace_since: datetime | None = None

    def to_document(self) -> dict[str, Any]:
        """Give all of it as JSON."""
        canary = self.canary
        return {
            "state": self.state.value,
            "since": self.since.isoformat(),
            "kind": self.kind,
            "cause": self.cause,
            "cause_gone_at": _text(self.cause_gone_at),
            "canary": canary and {"node_id": canary.node_id, "kind": canary.kind, "since": _text(canary.since)},
            "failed_canaries": self.failed_canaries,
            "outcomes": [[outcome.node_id, outcome.succeeded] for outcome in self.outcomes],
            "last_start_at": _text(self.last_start_at),
            "grace_since": _text(self.grace_since),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> ScopeState:
        """Read what to_document gave, or an older version did.

        What is missing or unusable is as if it had never been; a state that can't be read is open, which leads through
        a canary.
        """
        state, cause = document.get("state", GuardState.CLOSED.value), document.get("cause")
        if state not in {word.value for word in GuardState}:
            state, cause = GuardState.OPEN, "what is stored of this guard can't be read"
        kind, failed, outcomes = document.get("kind"), document.get("failed_canaries"), document.get("outcomes")
        return cls(
            state=GuardState(state),
            since=_when(document.get("since")) or datetime.fromtimestamp(0, UTC),
            kind=CauseKind(kind) if kind in set(CauseKind) else None,
            cause=cause if isinstance(cause, str) else None,
            cause_gone_at=_when(document.get("cause_gone_at")),
            canary=_read_canary(document.get("canary")),
            failed_canaries=failed if isinstance(failed, int) and failed > 0 else 0,
            outcomes=tuple(_read_outcomes(outcomes)) if isinstance(outcomes, list) else (),
            last_start_at=_when(document.get("last_start_at")),
            grace_since=_when(document.get("grace_since")),
        )

    def shifted(self, by: timedelta, latest: datetime) -> ScopeState:
        """Move all its times, as the clock was, and none past *latest*; the same object where that changes nothing."""

        def move(time: datetime) -> datetime:
            return min(time + by, latest)

        canary = self.canary and replace(self.canary, since=move(self.canary.since))
        moved = replace(
            self,
            since=move(self.since),
            cause_gone_at=self.cause_gone_at and move(self.cause_gone_at),
            canary=canary,
            last_start_at=self.last_start_at and move(self.last_start_at),
            grace_since=self.grace_since and move(self.grace_since),
        )
        return self if moved == self else moved


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


def ended(
    state: ScopeState, node_id: str, succeeded: bool | None, now: datetime, limits: GuardSettings
) -> ScopeState:
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
        return f"nodes answer again: fewer than {_edge(census, limits)} unhealthy for {limits.settle_seconds:g} s; {then}"
    if found is not None:
        return f"fewer than {_edge(census, limits)} unhealthy for {limits.settle_seconds:g} s; {then}"
    if state.kind in _SEEN:
        return f"it stays so for {limits.settle_seconds:g} s; {then}"
    return then


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
    return replace(
        state, state=GuardState.OPEN, since=now, kind=kind, cause=text, cause_gone_at=None, canary=None
    )


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


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _when(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo is not None else None


def _read_canary(document: Any) -> Canary | None:
    if not isinstance(document, dict) or document.get("kind") not in set(CanaryKind):
        return None
    node_id, since = document.get("node_id"), _when(document.get("since"))
    if not isinstance(node_id, str) or since is None:
        return None
    return Canary(node_id, CanaryKind(document["kind"]), since)


def _read_outcomes(items: list[Any]) -> Iterable[Outcome]:
    for item in items:
        match item:
            case [str(node_id), bool(succeeded)]:
                yield Outcome(node_id, succeeded)
            case _:
                pass
