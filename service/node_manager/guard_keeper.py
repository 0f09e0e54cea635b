# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep the guard of repairs: look at the fleet for it, store what it concludes, and hold the pauses that people ask for.

The rules are in recovery_guard; here is what they need of the world. The leading manager looks and writes; any manager can tell
how things stand.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime

import sqlalchemy as sa
import structlog

from node_manager import events, fleet_census, recovery_guard
from node_manager.domain import Admin, GuardState, Health, JobAction, NodeResult, RecoveryState
from node_manager.events import EventType
from node_manager.jobs import JobQueue
from node_manager.node_registry import Clock, utc_now
from node_manager.problems import InvalidInputError, JobNotFoundError, PauseNotFoundError, ProblemError
from node_manager.recovery_guard import FLEET, Census, ScopeState, scope_of_zone
from node_manager.recovery_rows import Recovery
from node_manager.settings import Settings
from node_manager.store import Store, tables

# What the leading manager saw so lately is not read again.
_FRESH_SECONDS = 5.0
_REQUESTED_BY = "guard"
_NEVER = float("-inf")
_EMPTY = Census(0, 0, 0, 0)
_guards, _pauses = tables.guards, tables.recovery_pauses


@dataclass(frozen=True)
class Pause:
    """A pause of automatic repair: of a zone, or everywhere."""

    name: str
    zone: str | None
    reason: str
    until: datetime | None
    created_by: str
    created_at: datetime


@dataclass(frozen=True)
class ScopeReport:
    """How the guard of a scope stands, what it sees, and what it takes to leave the state it is in."""

    scope: str
    state: ScopeState
    census: Census
    in_recovery_limit: int
    exit: str


@dataclass
class _View:
    """What was known at one look; *at* is of the monotonic clock."""

    at: float = _NEVER
    states: dict[str, ScopeState] = field(default_factory=dict)
    census: Mapping[str, Census] = field(default_factory=dict)
    pauses: tuple[Pause, ...] = ()


class GuardKeeper:
    """The guard of a fleet, seen from one manager."""

    def __init__(self, store: Store, settings: Settings, jobs: JobQueue, clock: Clock = utc_now) -> None:
        self._store = store
        self._settings = settings
        self._limits = settings.configuration.recovery.guard
        self._jobs = jobs
        self._clock = clock
        self._log = structlog.get_logger()
        self._view = _View()
        # Of half-open scopes in which nothing is to be repaired: the check that stands in for a repair.
        self._checks: dict[str, str] = {}

    # For the leading manager

    def look(self, now: datetime) -> None:
        """Look at the fleet, and store where the guard changes its mind.

        Errors: StoreUnavailableError.
        """
        view = self._read(now)
        concluded = {}
        for scope, census in view.census.items():
            before = view.states.get(scope) or ScopeState.new(now)
            after = recovery_guard.observe(before, census, now, self._limits)
            concluded[scope] = self._check_canary(scope, after, now)
        gone = [scope for scope in view.states if scope not in view.census]
        changed = {scope: state for scope, state in concluded.items() if state != view.states.get(scope)}
        if changed or gone:
            with self._store.write() as connection:
                for scope, state in changed.items():
                    self._write(connection, scope, view.states.get(scope), state, now)
                connection.execute(_guards.delete().where(_guards.c.scope.in_(gone)))
        view.states = concluded
        self._view = view

    def refusal(self, zone: str | None, now: datetime, *, everywhere_only: bool = False) -> str | None:
        """Say why no automatic repair may start in a zone now; None where one may."""
        view = self._current(now)
        for pause in view.pauses:
            if pause.zone is None or (pause.zone == zone and not everywhere_only):
                until = "" if pause.until is None else f" until {pause.until:%Y-%m-%d %H:%M} UTC"
                return f"paused{until} by {pause.created_by} ({pause.name}): {pause.reason}"
        for scope in (FLEET,) if everywhere_only else (scope_of_zone(zone), FLEET):
            state = view.states.get(scope)
            if state is None:
                return f"the guard of {scope} has not looked yet"
            why = recovery_guard.may_start(state, view.census.get(scope, _EMPTY), now, self._limits)
            if why is not None:
                return f"{scope}: {why}"
        return None

    def is_canary(self, zone: str | None) -> bool:
        """Tell whether the next repair in a zone is the one that a half-open guard tries."""
        states = self._view.states
        return any(
            scope in states and states[scope].state is GuardState.HALF_OPEN for scope in (scope_of_zone(zone), FLEET)
        )

    def waiting_since(self, zone: str | None) -> datetime:
        """Tell when all waiting in a zone began anew."""
        states = self._current(self._clock()).states
        known = [states[scope].grace_since for scope in (scope_of_zone(zone), FLEET) if scope in states]
        return max(known, default=self._clock())

    def note_start(self, connection: sa.Connection, recovery: Recovery, now: datetime) -> None:
        """Count an automatic repair that starts, in its transaction."""
        for scope in (scope_of_zone(recovery.zone), FLEET):
            before = self._view.states.get(scope) or ScopeState.new(now)
            after = recovery_guard.started(before, recovery.node_id, now)
            self._write(connection, scope, before, after, now)
            self._view.states[scope] = after

    def note_end(self, connection: sa.Connection, recovery: Recovery) -> None:
        """Count how an automatic repair ended, in its transaction."""
        if not recovery.attempt or recovery.state is RecoveryState.CANCELLED:
            succeeded = None
        else:
            succeeded = recovery.state is RecoveryState.SUCCEEDED
        now = self._clock()
        states = _load_states(connection)
        for scope in (scope_of_zone(recovery.zone), FLEET):
            before = states.get(scope)
            if before is not None and recovery.attempt:
                after = recovery_guard.ended(before, recovery.node_id, succeeded, now, self._limits)
                self._write(connection, scope, before, after, now)
                self._view.states[scope] = after

    # For everybody

    def scopes(self) -> list[ScopeReport]:
        """Tell how the guard of each scope stands, the fleet first."""
        view = self._current(self._clock())
        return [self._report(view, scope) for scope in sorted(view.states, key=lambda scope: (scope != FLEET, scope))]

    def scopes_of(self, zone: str | None) -> list[ScopeReport]:
        """Tell how the guards stand that a node of the zone depends on."""
        view = self._current(self._clock())
        return [self._report(view, scope) for scope in (scope_of_zone(zone), FLEET) if scope in view.states]

    def pauses(self) -> tuple[Pause, ...]:
        """List the pauses in force, by name."""
        with self._store.read() as connection:
            return _load_pauses(connection, self._clock())

    def pause(self, name: str, zone: str | None, reason: str, until: datetime | None, created_by: str) -> Pause:
        """Begin a pause, or replace the one of that name.

        Errors: InvalidInputError.
        """
        now = self._clock()
        if until is not None and until <= now:
            raise InvalidInputError("until", "expected a time to come")
        pause = Pause(name, zone, reason, until, created_by[:64], now)
        with self._store.write() as connection:
            connection.execute(_pauses.delete().where(_pauses.c.name == name))
            connection.execute(_pauses.insert(), asdict(pause))
        self._view.at = _NEVER
        return pause

    def end_pause(self, name: str) -> None:
        """End a pause.

        Errors: PauseNotFoundError.
        """
        with self._store.write() as connection:
            if connection.execute(_pauses.delete().where(_pauses.c.name == name)).rowcount == 0:
                raise PauseNotFoundError(f"no pause {name!r} is in force; GET /guard lists those that are", name=name)
        self._view.at = _NEVER

    def prune(self) -> None:
        """Forget pauses whose time is over."""
        with self._store.write() as connection:
            connection.execute(_pauses.delete().where(_pauses.c.until < self._clock()))

    def _current(self, now: datetime) -> _View:
        if time.monotonic() - self._view.at > _FRESH_SECONDS:
            self._view = self._read(now)
        return self._view

    def _read(self, now: datetime) -> _View:
        with self._store.read() as connection:
            return _View(
                time.monotonic(),
                _load_states(connection),
                fleet_census.take(connection),
                _load_pauses(connection, now),
            )

    def _write(
        self, connection: sa.Connection, scope: str, before: ScopeState | None, after: ScopeState, now: datetime
    ) -> None:
        if after == before:
            return
        row = {"state": after.state.value, "since": after.since, "document": after.to_document()}
        if connection.execute(_guards.update().where(_guards.c.scope == scope), row).rowcount == 0:
            connection.execute(_guards.insert(), {"scope": scope, **row})
        if before is not None and before.state is not after.state:
            told = {"scope": scope, "from": before.state.value, "to": after.state.value, "cause": after.cause}
            events.emit(connection, EventType.GUARD_CHANGED, scope, now, told)
            self._log.warning("the guard of repairs changed", **told)

    def _report(self, view: _View, scope: str) -> ScopeReport:
        state = view.states[scope]
        census = view.census.get(scope, _EMPTY)
        return ScopeReport(
            scope,
            state,
            census,
            recovery_guard.in_flight_limit(census, self._limits),
            recovery_guard.exit_of(state, self._clock(), self._limits),
        )

    def _check_canary(self, scope: str, state: ScopeState, now: datetime) -> ScopeState:
        """Where a half-open guard finds nothing to repair, have a node checked in its stead, and tell how that went."""
        if not recovery_guard.needs_canary_check(state, now, self._limits):
            self._checks.pop(scope, None)
            return state
        job_id = self._checks.get(scope)
        if job_id is None:
            self._ask_for_check(scope)
            return state
        try:
            job = self._jobs.get(job_id)
        except JobNotFoundError:
            del self._checks[scope]
            return state
        if not job.ended:
            return state
        del self._checks[scope]
        passed = all(node.result is NodeResult.OK for node in job.nodes)
        return recovery_guard.canary_checked(state, passed, now)

    def _ask_for_check(self, scope: str) -> None:
        """Check a node that answers; where none does there is nothing to show that things are better."""
        nodes, states = tables.nodes.c, tables.node_states.c
        query = (
            sa.select(nodes.node_id)
            .join(tables.node_states, states.node_id == nodes.node_id)
            .where(
                nodes.admin.in_((Admin.ACTIVE.value, Admin.CORDONED.value)),
                states.health.in_((Health.HEALTHY.value, Health.DEGRADED.value, Health.RECOVERING.value)),
            )
            # One that was unwell until now says more than one that always was well.
            .order_by(states.health_since.desc(), nodes.node_id)
            .limit(1)
        )
        if scope != FLEET:
            zone = recovery_guard.zone_of_scope(scope)
            query = query.where(nodes.zone.is_(None) if zone is None else nodes.zone == zone)
        with self._store.read() as connection:
            node_id = connection.scalar(query)
        if node_id is None:
            return
        try:
            self._checks[scope] = self._jobs.submit(JobAction.CHECK, [node_id], _REQUESTED_BY).job_id
        except ProblemError as error:
            self._log.info("the guard's check waits", scope=scope, reason=error.detail)


def _load_states(connection: sa.Connection) -> dict[str, ScopeState]:
    return {
        row.scope: ScopeState.from_document(GuardState(row.state), row.since, row.document)
        for row in connection.execute(sa.select(_guards))
    }


def _load_pauses(connection: sa.Connection, now: datetime) -> tuple[Pause, ...]:
    in_force = sa.or_(_pauses.c.until.is_(None), _pauses.c.until > now)
    rows = connection.execute(sa.select(_pauses).where(in_force).order_by(_pauses.c.name))
    return tuple(Pause(**row._mapping) for row in rows)
