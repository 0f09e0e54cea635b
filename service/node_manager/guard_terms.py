# SPDX-License-Identifier: GPL-3.0-or-later
"""The terms of the mass-failure guard: what is counted of a scope, and what is remembered of it, as JSON too.

Imports the vocabulary only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from node_manager.domain import GuardState


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
        if state not in list(GuardState):
            state, cause = GuardState.OPEN, "what is stored of this guard can't be read"
        kind, failed, outcomes = document.get("kind"), document.get("failed_canaries"), document.get("outcomes")
        return cls(
            state=GuardState(state),
            since=_when(document.get("since")) or datetime.fromtimestamp(0, UTC),
            kind=CauseKind(kind) if kind in list(CauseKind) else None,
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

        since = None if self.canary is None else self.canary.since
        times = (self.since, self.cause_gone_at, self.last_start_at, self.grace_since, since)
        if not by and all(time is None or time <= latest for time in times):
            return self

        def move(time: datetime) -> datetime:
            return min(time + by, latest)

        return replace(
            self,
            since=move(self.since),
            cause_gone_at=self.cause_gone_at and move(self.cause_gone_at),
            canary=self.canary and replace(self.canary, since=move(self.canary.since)),
            last_start_at=self.last_start_at and move(self.last_start_at),
            grace_since=self.grace_since and move(self.grace_since),
        )


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _when(text: Any) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo is not None else None


def _read_canary(document: Any) -> Canary | None:
    if not isinstance(document, dict) or document.get("kind") not in list(CanaryKind):
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
