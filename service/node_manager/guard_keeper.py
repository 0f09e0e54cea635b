# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep the guard of repairs: look at the fleet for it, store what it concludes, and hold the pauses that people ask for.

The rules are in recovery_guard; here is what they need of the world. The leading manager looks and writes; any manager can tell
how things stand.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import postgresql, sqlite

from node_manager import events, fleet_census, recovery_guard
from node_manager.domain import Admin, GuardState, Health, JobAction, NodeResult, RecoveryState
from node_manager.events import EventType
from node_manager.guard_terms import Census, ScopeState
from node_manager.jobs import JobQueue
from node_manager.node_registry import Clock, utc_now
from node_manager.problems import InvalidInputError, JobNotFoundError, PauseNotFoundError, ProblemError
from node_manager.recovery_guard import FLEET, Change, Guard, Refusal, scope_of
from node_manager.recovery_rows import Recovery
from node_manager.settings import Settings
from node_manager.store import Store, tables

# A manager that has not looked for so long may have led, lost the lead, and lead again.
_FORGET_SECONDS = 10.0
# What was read for people a moment ago is not read again.
_FRESH_SECONDS = 2.0
_REQUESTED_BY = "guard"
_LONG_AGO = datetime.fromtimestamp(0, UTC)
_guards, _pauses = tables.guards, tables.recovery_pauses


@dataclass(frozen=True)
class Pause:
    """A pause of automatic repair: of a zone ("": of the nodes without one), or everywhere."""

    name: str
    zone: str | None
    reason: str
    until: datetime | None
    created_by: str
    created_at: datetime


@dataclass(frozen=True)
class ScopeReport:
    """How the guard of a scope stands, what it sees, and what it takes until it is closed."""

    scope: str
    state: ScopeState
    census: Census
    in_recovery_limit: int
    exit: str | None


@dataclass(frozen=True)
class _Check:
    """A node's check that a half-open guard waits for."""

    zone: str | None
    node_id: str


class GuardKeeper:
    """The guard of a fleet, seen from one manager."""

    def __init__(self, store: Store, settings: Settings, jobs: JobQueue, clock: Clock = utc_now) -> None:
        self._store = store
        self._limits = settings.configuration.recovery.guard
        self._jobs = jobs
        self._clock = clock
        self._log = structlog.get_logger()
        # Of the leading manager; touched by the thread of periodic work only.
        self._guard: Guard | None = None
        self._looked_at = float("-inf")
        self._unsaved: list[Change] = []
        self._checks: dict[str, _Check] = {}
        # For everybody else: as read from the store.
        self._shown: tuple[float, Guard] | None = None

    # For the leading manager

    def look(self, now: datetime) -> None:
        """Count the fleet, and store where the guard changes its mind.

        Errors: StoreUnavailableError.
        """
        if time.monotonic() - self._looked_at > _FORGET_SECONDS:
            self._guard, self._checks = None, {}
        with self._store.read() as connection:
            guard = self._ready(connection)
            census = fleet_census.take(connection)
            guard.pauses = _rules(_load_pauses(connection, now))
        self._save(guard.observe(census, now, time.monotonic()), now)
        self._looked_at = time.monotonic()
        self._follow_checks(guard, now)

    def refusal(self, zone: str | None, now: datetime) -> str | None:
        """Say why no automatic repair may begin in a zone now; None where one may."""
        decision = self._current(now).decide(zone, now)
        return decision.reason if isinstance(decision, Refusal) else None

    def refusal_everywhere(self, now: datetime) -> str | None:
        """Say why no automatic repair may begin anywhere; None where the fleet as a whole refuses none."""
        return self._current(now).refusal_of_fleet(now)

    def is_canary(self, zone: str | None) -> bool:
        """Tell whether the next repair in a zone is the one that a half-open guard tries."""
        states = self._current(self._clock()).states
        return any(scope in states and states[scope].state is GuardState.HALF_OPEN for scope in (scope_of(zone), FLEET))

    def waiting_since(self, zone: str | None) -> datetime:
        """Tell since when the nodes of a zone wait, at the least: all waiting begins anew when a guard closes."""
        return self._current(self._clock()).grace_since(zone) or _LONG_AGO

    @contextmanager
    def undone_on_failure(self) -> Iterator[None]:
        """Take back what is noted inside if it can't be stored."""
        self._unsaved = []
        try:
            yield
        except BaseException:
            if self._guard is not None:
                self._guard.undo(reversed(self._unsaved))
            raise
        finally:
            self._unsaved = []

    def note_start(self, connection: sa.Connection, recovery: Recovery) -> None:
        """Count an automatic repair that begins, in its transaction."""
        now = self._clock()
        self._note(connection, self._ready(connection).started(recovery.zone, recovery.node_id, now), now)

    def note_end(self, connection: sa.Connection, recovery: Recovery) -> None:
        """Count how an automatic repair ended, in its transaction; one that was cancelled says nothing."""
        if not recovery.attempt:
            return
        cancelled = recovery.state is RecoveryState.CANCELLED
        succeeded = None if cancelled else recovery.state is RecoveryState.SUCCEEDED
        now = self._clock()
        guard = self._ready(connection)
        self._note(connection, guard.ended(recovery.zone, recovery.node_id, succeeded, now), now)

    # For everybody

    def scopes(self) -> list[ScopeReport]:
        """Tell how the guard of each scope stands, the fleet first."""
        guard = self._fresh()
        return [self._report(guard, scope) for scope in sorted(guard.states, key=_fleet_first)]

    def scopes_of(self, zone: str | None) -> list[ScopeReport]:
        """Tell how the guards stand that a node of the zone depends on."""
        guard = self._fresh()
        return [self._report(guard, scope) for scope in (scope_of(zone), FLEET) if scope in guard.states]

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
        self._shown = None
        return pause

    def end_pause(self, name: str) -> None:
        """End a pause.

        Errors: PauseNotFoundError.
        """
        with self._store.write() as connection:
            if connection.execute(_pauses.delete().where(_pauses.c.name == name)).rowcount == 0:
                raise PauseNotFoundError(f"no pause {name!r} is in force; GET /guard lists those that are", name=name)
        self._shown = None

    def prune(self) -> None:
        """Forget pauses whose time is over."""
        with self._store.write() as connection:
            connection.execute(_pauses.delete().where(_pauses.c.until < self._clock()))

    def _ready(self, connection: sa.Connection) -> Guard:
        if self._guard is None:
            self._guard = Guard(self._limits, _load_states(connection))
        return self._guard

    def _current(self, now: datetime) -> Guard:
        leads = self._guard is not None and time.monotonic() - self._looked_at <= _FORGET_SECONDS
        if leads and self._guard is not None:
            return self._guard
        return self._fresh(now)

    def _fresh(self, now: datetime | None = None) -> Guard:
        """Read how things stand, as any manager can."""
        if self._shown is not None and time.monotonic() - self._shown[0] < _FRESH_SECONDS:
            return self._shown[1]
        with self._store.read() as connection:
            guard = Guard(self._limits, _load_states(connection))
            guard.censuses = {FLEET: Census(), **fleet_census.take(connection)}
            guard.pauses = _rules(_load_pauses(connection, now or self._clock()))
        self._shown = (time.monotonic(), guard)
        return guard

    def _save(self, changes: Sequence[Change], now: datetime) -> None:
        if not changes:
            return
        with self.undone_on_failure():
            # Before the store is asked: it may not even begin.
            self._unsaved += changes
            with self._store.write() as connection:
                self._write(connection, changes, now)

    def _note(self, connection: sa.Connection, changes: Sequence[Change], now: datetime) -> None:
        self._unsaved += changes
        self._write(connection, changes, now)

    def _write(self, connection: sa.Connection, changes: Sequence[Change], now: datetime) -> None:
        for change in changes:
            if change.after is None:
                connection.execute(_guards.delete().where(_guards.c.scope == change.scope))
            else:
                after = change.after
                row = {"state": after.state.value, "since": after.since, "document": after.to_document()}
                insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
                statement = insert(_guards).values(scope=change.scope, **row)
                connection.execute(statement.on_conflict_do_update(index_elements=[_guards.c.scope], set_=row))
            if change.turned:
                before, after_state = (
                    state.state if state else GuardState.CLOSED for state in (change.before, change.after)
                )
                told = {
                    "scope": change.scope,
                    "from": before.value,
                    "to": after_state.value,
                    "cause": change.after.cause if change.after else None,
                }
                events.emit(connection, EventType.GUARD_CHANGED, change.scope, now, told)
                self._log.warning("the guard of repairs turned", **told)

    def _follow_checks(self, guard: Guard, now: datetime) -> None:
        """Where a half-open guard finds nothing to repair, have a node checked in its stead, and tell how that went."""
        for job_id, check in list(self._checks.items()):
            try:
                job = self._jobs.get(job_id)
            except JobNotFoundError:
                del self._checks[job_id]
                continue
            if job.ended:
                del self._checks[job_id]
                passed = all(node.result is NodeResult.OK for node in job.nodes)
                self._save(guard.checked(check.zone, check.node_id, passed, now), now)
        for scope in guard.checks_wanted(now):
            # A check that was begun for its zone is that of the fleet too.
            if not recovery_guard.needs_canary_check(guard.states[scope], now, self._limits):
                continue
            chosen = self._choose(scope)
            if chosen is None:
                continue
            try:
                job = self._jobs.submit(JobAction.CHECK, [chosen.node_id], _REQUESTED_BY)
            except ProblemError as error:
                self._log.info("the guard's check waits", scope=scope, reason=error.detail)
                continue
            self._checks[job.job_id] = chosen
            self._save(guard.check_started(chosen.zone, chosen.node_id, now), now)

    def _choose(self, scope: str) -> _Check | None:
        """Choose a node that answers; where none does there is nothing to show that things are better."""
        nodes, states = tables.nodes.c, tables.node_states.c
        query = (
            sa.select(nodes.node_id, nodes.zone)
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
            zone = scope.removeprefix(scope_of(None))
            query = query.where(nodes.zone == zone if zone else sa.or_(nodes.zone.is_(None), nodes.zone == ""))
        with self._store.read() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _Check(row.zone, row.node_id)

    def _report(self, guard: Guard, scope: str) -> ScopeReport:
        """Tell how the guard of a scope stands."""
        state, census = guard.states[scope], guard.censuses.get(scope, Census())
        return ScopeReport(
            scope,
            state,
            census,
            recovery_guard.in_flight_limit(census, self._limits),
            recovery_guard.exit_of(state, census, self._clock(), self._limits),
        )


def _fleet_first(scope: str) -> tuple[bool, str]:
    return scope != FLEET, scope


def _load_states(connection: sa.Connection) -> dict[str, ScopeState]:
    return {row.scope: ScopeState.from_document(row.document) for row in connection.execute(sa.select(_guards))}


def _load_pauses(connection: sa.Connection, now: datetime) -> tuple[Pause, ...]:
    in_force = sa.or_(_pauses.c.until.is_(None), _pauses.c.until > now)
    rows = connection.execute(sa.select(_pauses).where(in_force).order_by(_pauses.c.name))
    return tuple(Pause(**row._mapping) for row in rows)


def _rules(pauses: Sequence[Pause]) -> tuple[recovery_guard.Pause, ...]:
    return tuple(recovery_guard.Pause(pause.name, pause.zone, pause.reason, pause.until) for pause in pauses)
