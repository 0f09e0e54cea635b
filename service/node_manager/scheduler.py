# SPDX-License-Identifier: GPL-3.0-or-later
"""Periodic work: have nodes looked at when what is known of them grows old, and forget what is too old.

Of all managers of one store one leads, by a lease. Decides which nodes are due and submits jobs for them; runs nothing
itself.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa
import structlog

from node_manager import leases, outbox, samples
from node_manager.domain import Admin, Health, JobAction
from node_manager.jobs import JobQueue
from node_manager.node_registry import Clock, utc_now
from node_manager.problems import ProblemError
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError, tables

LEASE = "scheduler"
LEASE_SECONDS = 15.0
NODES_PER_JOB = 200

_RENEW_SECONDS = 5.0
_TICK_SECONDS = 1.0
_PRUNE_SECONDS = 3600.0
# Between two looks at a node that is back, or silent for long.
_RETURN_SECONDS = 10.0
_REQUESTED_BY = "schedule"
# A check reads the resources too, and a registration does both: a node that waits for the larger needs no smaller one.
_COVERED_BY = {
    JobAction.GATHER: (JobAction.GATHER, JobAction.CHECK, JobAction.REGISTER),
    JobAction.CHECK: (JobAction.CHECK, JobAction.REGISTER),
}


def _nobody(_node_id: str) -> bool:
    return False


class Scheduler:
    """What happens by itself."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        queue: JobQueue,
        clock: Clock = utc_now,
        instance_id: str = "manager",
        chores: Sequence[Callable[[], object]] = (),
        hourly_chores: Sequence[Callable[[], object]] = (),
        is_in_hand: Callable[[str], bool] = _nobody,
    ) -> None:
        self._store = store
        self._settings = settings
        self._queue = queue
        self._clock = clock
        # What the parts want done every round (a second), and every hour, by one manager.
        self._chores = chores
        self._hourly_chores = hourly_chores
        # Whether a node is looked at without jobs.
        self._is_in_hand = is_in_hand
        self._instance_id = instance_id
        self._log = structlog.get_logger().bind(instance_id=instance_id)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        # Of the monotonic clock: a wall clock that is set must not cost the lead.
        self._leads_until: float | None = None
        self._renew_at: datetime | None = None
        self._pruned_at: datetime | None = None
        self._scanned_at: datetime | None = None
        # When a node was last had looked at, by what: a look that fails leaves no observation, and must not be repeated
        # at once.
        self._tried: dict[str, dict[str, datetime]] = {}

    def start(self) -> None:
        """Begin; the first round follows at once."""
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the round that is under way, and let another manager lead."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(LEASE_SECONDS)
        try:
            with self._store.write() as connection:
                leases.release(connection, LEASE, self._instance_id)
        except StoreUnavailableError as error:
            self._log.warning("the lead was not given back", reason=str(error))
        self._leads_until = None

    def leads(self) -> bool:
        """Tell whether this manager does the periodic work now."""
        return self._leads_until is not None and time.monotonic() < self._leads_until

    def round(self) -> bool:
        """Do what is due now; False if another manager leads.

        Errors: StoreUnavailableError.
        """
        now = self._clock()
        if not self._lead(now):
            return False
        self._do(self._chores)
        if self._settings.configuration.monitoring.scheduled:
            self._look_at_nodes(now)
        if _is_due(self._pruned_at, now, _PRUNE_SECONDS):
            self._pruned_at = now
            keep = timedelta(days=self._settings.configuration.storage.history_days)
            samples.prune(self._store, now, keep)
            relays = self._settings.configuration.kafka.enabled
            outbox.prune(self._store, now, keep, outbox.load_position(self._store, outbox.KAFKA) if relays else None)
            self._queue.prune()
            self._do(self._hourly_chores)
        return True

    def _do(self, chores: Iterable[Callable[[], object]]) -> None:
        for chore in chores:
            try:
                chore()
            except StoreUnavailableError:
                raise
            except Exception:  # one that stumbles must not keep the others from their work
                self._log.exception("periodic work stumbled", chore=getattr(chore, "__qualname__", str(chore)))

    def _look_at_nodes(self, now: datetime) -> None:
        followed_up = self._follow_up(now)
        monitoring = self._settings.configuration.monitoring
        shortest = min(monitoring.gather_interval_seconds, monitoring.check_interval_seconds)
        if _is_due(self._scanned_at, now, min(10.0, shortest / 10)):
            self._scanned_at = now
            checked = self._look(JobAction.CHECK, monitoring.check_interval_seconds, now, followed_up)
            self._look(JobAction.GATHER, monitoring.gather_interval_seconds, now, followed_up | checked)

    def _run(self) -> None:
        while True:
            try:
                self.round()
            except StoreUnavailableError as error:
                self._log.warning("the store does not answer, periodic work waits", reason=str(error))
            except Exception:  # without this thread no node would be looked at any more
                self._log.exception("periodic work stumbled")
            if self._stopped.wait(_TICK_SECONDS):
                return

    def _lead(self, now: datetime) -> bool:
        if _is_due(self._renew_at, now, 0.0):
            begun = time.monotonic()
            with self._store.write() as connection:
                leads = leases.acquire(connection, LEASE, self._instance_id, now, LEASE_SECONDS)
            if leads != (self._leads_until is not None):
                self._log.info("this manager leads the periodic work" if leads else "another manager leads")
            self._leads_until = begun + LEASE_SECONDS if leads else None
            self._renew_at = now + timedelta(seconds=_RENEW_SECONDS)
        return self.leads()

    def _follow_up(self, now: datetime) -> set[str]:
        """Check the nodes that may be lost, and those that are back, without waiting for their turn."""
        health = self._settings.configuration.health
        states, reports = tables.node_states.c, tables.node_reports.c
        lately = states.failures < health.failures_before_unreachable
        suspect = states.health == Health.SUSPECT.value
        unchecked = sa.and_(
            states.health == Health.UNKNOWN.value,
            states.last_contact_at.is_not(None),
            sa.or_(reports.observed_at.is_(None), reports.observed_at < states.health_since),
        )
        # What has failed often enough waits for time alone; what is back must answer for a while.
        lingering = sa.or_(sa.and_(suspect, sa.not_(lately)), states.health == Health.RECOVERING.value)
        soon = self._follow(sa.or_(sa.and_(suspect, lately), unchecked), "follow-up", health.reprobe_seconds, now)
        return soon | self._follow(lingering, "return", max(_RETURN_SECONDS, health.reprobe_seconds), now)

    def _follow(self, which: sa.ColumnElement[bool], why: str, pause: float, now: datetime) -> set[str]:
        states = tables.node_states.c
        query = (
            sa.select(states.node_id)
            .join(tables.nodes, tables.nodes.c.node_id == states.node_id)
            .join(tables.node_reports, tables.node_reports.c.node_id == states.node_id, isouter=True)
            .where(
                which,
                states.last_attempt_at <= now - timedelta(seconds=pause),
                tables.nodes.c.admin != Admin.OFFLINE.value,
            )
        )
        with self._store.read() as connection:
            found = set(connection.scalars(query))
        self._forget_tries(why, found)
        return self._submit(JobAction.CHECK, why, found, pause, now)

    def _look(self, action: JobAction, seconds: float, now: datetime, but: Collection[str]) -> set[str]:
        """Submit jobs for the nodes whose newest observation is older than the interval."""
        newest = tables.node_reports if action is JobAction.CHECK else tables.node_samples
        query = (
            sa.select(tables.nodes.c.node_id)
            .join(newest, newest.c.node_id == tables.nodes.c.node_id, isouter=True)
            .where(
                tables.nodes.c.admin != Admin.OFFLINE.value,
                sa.or_(newest.c.observed_at.is_(None), newest.c.observed_at <= now - timedelta(seconds=seconds)),
            )
        )
        with self._store.read() as connection:
            found = set(connection.scalars(query))
        self._forget_tries(action.value, found)
        return self._submit(action, action.value, found.difference(but), seconds, now)

    def _submit(self, action: JobAction, why: str, found: set[str], seconds: float, now: datetime) -> set[str]:
        """Submit jobs for those nodes that were not tried lately and that no job is on its way to; give these nodes."""
        tried = self._tried.setdefault(why, {})
        due = {
            node_id for node_id in found if _is_due(tried.get(node_id), now, seconds) and not self._is_in_hand(node_id)
        }
        if due:
            due -= self._queue.active_nodes(*_COVERED_BY[action])
        for chunk in _chunks(sorted(due)):
            try:
                self._queue.submit(action, chunk, _REQUESTED_BY)
            except ProblemError as error:
                # The queue is full, or a node was deregistered just now: the next look tries again.
                self._log.warning("nodes are not looked at this time", action=action.value, reason=error.detail)
            else:
                tried.update(dict.fromkeys(chunk, now))
        return due

    def _forget_tries(self, why: str, found: set[str]) -> None:
        """Keep no more than the nodes that are due: those seen since then are judged by what was seen."""
        self._tried[why] = {node_id: at for node_id, at in self._tried.get(why, {}).items() if node_id in found}


def _is_due(last: datetime | None, now: datetime, seconds: float) -> bool:
    # A clock that was set back must not stop everything until it has caught up.
    return last is None or now >= last + timedelta(seconds=seconds) or now < last - timedelta(hours=1)


def _chunks(node_ids: Iterable[str]) -> Iterable[list[str]]:
    remaining = iter(node_ids)
    while chunk := list(itertools.islice(remaining, NODES_PER_JOB)):
        yield chunk
