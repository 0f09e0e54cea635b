# SPDX-License-Identifier: GPL-3.0-or-later
"""The queue of jobs as the store keeps it: shared by all managers of one store, each change one transaction.

Decides who runs what: a job starts only together with a claim on each of its nodes, and only if no earlier job waits
for one of them. Starts no process and no thread.
"""

from __future__ import annotations

import itertools
import operator
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from node_manager import leases
from node_manager.domain import JobAction, JobState, NodeResult
from node_manager.problems import ConflictError, InvalidInputError, JobNotFoundError, NodeNotFoundError, QueueFullError
from node_manager.store import Store, tables

ACTIVE = frozenset({JobState.QUEUED, JobState.RUNNING})
LEASE_PREFIX = "jobs:"
MAX_NODES_PER_JOB = 1000

_ACTIVE = sorted(state.value for state in ACTIVE)
_LOCK_KEY = 0x6A6F6273  # "jobs"; any number that nothing else in the database uses
_RECHECK_BY = "recovery"
_NOT_REPORTED = "the run ended before this node was done"


@dataclass(frozen=True)
class JobNode:
    """How a job went on one node; result is None until the job has ended."""

    node_id: str
    result: NodeResult | None
    message: str | None


@dataclass(frozen=True)
class Job:
    """One run of a playbook, wanted, on its way or done."""

    job_id: str
    sequence: int
    action: JobAction
    state: JobState
    requested_by: str
    variables: Mapping[str, Any]
    message: str | None
    holder: str | None
    created_at: datetime
    started_at: datetime | None
    deadline_at: datetime | None
    ended_at: datetime | None
    nodes: tuple[JobNode, ...]

    @property
    def ended(self) -> bool:
        """Tell whether nothing more will happen to it."""
        return self.state not in ACTIVE

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Name the nodes, sorted."""
        return tuple(node.node_id for node in self.nodes)


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list; an empty field lets all pass."""

    state: JobState | None = None
    action: JobAction | None = None
    node_id: str | None = None


@dataclass(frozen=True)
class JobPage:
    """One page of a list, newest first; next_cursor is None at the end."""

    jobs: list[Job]
    next_cursor: int | None


class JobStore:
    """The jobs on record."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def submit(
        self,
        action: JobAction,
        node_ids: Collection[str],
        requested_by: str,
        now: datetime,
        max_queued: int,
        variables: Mapping[str, Any] | None = None,
    ) -> Job:
        """Put a job on record, or join one that waits or runs already and covers it; one with *variables* joins none.

        Errors: InvalidInputError, NodeNotFoundError, QueueFullError.
        """
        wanted = sorted(set(node_ids))
        if not 1 <= len(wanted) <= MAX_NODES_PER_JOB:
            raise InvalidInputError("node_ids", f"expected 1 to {MAX_NODES_PER_JOB} nodes, got {len(wanted)}")
        with self._store.write() as connection:
            _serialize(connection)
            missing = set(wanted) - _registered(connection, wanted)
            if missing:
                raise NodeNotFoundError(min(missing))
            job_id = _find_covering(connection, action, wanted) if variables is None else None
            if job_id is None:
                _check_bound(connection, max_queued)
                job_id = _insert(connection, action, wanted, requested_by, now, variables)
            return _load(connection, [job_id])[0]

    def claim_next(self, holder: str, now: datetime, timeout_of: Callable[[JobAction], float]) -> Job | None:
        """Take the first job whose nodes are all free and not waited for by an earlier one; None if there is none.

        Shapes: *timeout_of* an action is in seconds.
        """
        if not self._any_queued():
            return None
        with self._store.write() as connection:
            _serialize(connection)
            blocked = set(connection.scalars(sa.select(tables.node_claims.c.node_id)))
            chosen = _first_free(connection, blocked)
            if chosen is None:
                return None
            job_id, action, node_ids = chosen
            connection.execute(
                tables.jobs.update().where(tables.jobs.c.job_id == job_id),
                {
                    "state": JobState.RUNNING.value,
                    "holder": holder,
                    "started_at": now,
                    "deadline_at": now + timedelta(seconds=timeout_of(action)),
                },
            )
            connection.execute(
                tables.node_claims.insert(), [{"node_id": node_id, "job_id": job_id} for node_id in node_ids]
            )
            return _load(connection, [job_id])[0]

    def finish(
        self,
        job: Job,
        state: JobState,
        message: str | None,
        outcomes: Mapping[str, tuple[NodeResult, str | None]],
        now: datetime,
    ) -> Job:
        """Write how a job that we ran has ended and free its nodes.

        If another manager has taken us for dead in the meantime, its word stands; gives the job as it is on record.
        """
        with self._store.write() as connection:
            if state is JobState.INTERRUPTED:
                _serialize(connection)
            if _end(connection, job, state, message, now):
                _write_outcomes(connection, job, outcomes)
                if state is JobState.INTERRUPTED:
                    _recheck(connection, job.node_ids, now)
            return next(iter(_load(connection, [job.job_id])), job)

    def cancel(self, job_id: str, now: datetime) -> Job:
        """End a job that waits; ask for the end of one that runs.

        Errors: JobNotFoundError; ConflictError if it ended otherwise already.
        """
        with self._store.write() as connection:
            _serialize(connection)
            job = _known(connection, job_id)
            if job.state is JobState.CANCELLED:
                return job
            if job.ended:
                raise ConflictError(f"job {job_id} has already ended: {job.state}", job_id=job_id)
            row = tables.jobs.update().where(tables.jobs.c.job_id == job_id)
            connection.execute(row, {"cancel_requested_at": now})
            if job.state is JobState.QUEUED:
                message = "cancelled before it started"
                connection.execute(row, {"state": JobState.CANCELLED.value, "message": message, "ended_at": now})
                _write_outcomes(connection, job, {})
            return _known(connection, job_id)

    def cancel_requests(self, holder: str) -> set[str]:
        """Tell which running jobs of *holder* somebody wants to end."""
        query = sa.select(tables.jobs.c.job_id).where(
            tables.jobs.c.state == JobState.RUNNING.value,
            tables.jobs.c.holder == holder,
            tables.jobs.c.cancel_requested_at.is_not(None),
        )
        with self._store.read() as connection:
            return set(connection.scalars(query))

    def get(self, job_id: str) -> Job:
        """Read one job.

        Errors: JobNotFoundError.
        """
        with self._store.read() as connection:
            return _known(connection, job_id)

    def load(self, job_ids: Collection[str]) -> dict[str, Job]:
        """Read several jobs; ids that are gone are left out."""
        with self._store.read() as connection:
            return {job.job_id: job for job in _load(connection, job_ids)}

    def page(self, wanted: JobFilter, limit: int, before: int | None) -> JobPage:
        """List jobs, newest first, those with a sequence below *before*."""
        query = sa.select(tables.jobs.c.job_id).order_by(tables.jobs.c.sequence.desc()).limit(limit + 1)
        if before is not None:
            query = query.where(tables.jobs.c.sequence < before)
        if wanted.state is not None:
            query = query.where(tables.jobs.c.state == wanted.state.value)
        if wanted.action is not None:
            query = query.where(tables.jobs.c.action == wanted.action.value)
        if wanted.node_id is not None:
            touching = sa.select(tables.job_nodes.c.job_id).where(tables.job_nodes.c.node_id == wanted.node_id)
            query = query.where(tables.jobs.c.job_id.in_(touching))
        with self._store.read() as connection:
            found = list(connection.scalars(query))
            jobs = _load(connection, found[:limit])[::-1]
        return JobPage(jobs, jobs[-1].sequence if jobs and len(found) > limit else None)

    def active_nodes(self, actions: Collection[JobAction]) -> set[str]:
        """Tell which nodes a job of one of *actions* waits for or works on."""
        query = (
            sa.select(tables.job_nodes.c.node_id)
            .join(tables.jobs, tables.jobs.c.job_id == tables.job_nodes.c.job_id)
            .where(tables.jobs.c.state.in_(_ACTIVE), tables.jobs.c.action.in_([action.value for action in actions]))
        )
        with self._store.read() as connection:
            return set(connection.scalars(query))

    def hold(self, holder: str, now: datetime, seconds: float) -> None:
        """Say that a manager starts and lives."""
        with self._store.write() as connection:
            leases.acquire(connection, LEASE_PREFIX + holder, holder, now, seconds)

    def renew(self, holder: str, now: datetime, seconds: float) -> bool:
        """Say that a manager still lives; False if another one has taken it for dead and freed its nodes."""
        with self._store.write() as connection:
            return leases.renew(connection, LEASE_PREFIX + holder, holder, now, seconds)

    def leave(self, holder: str) -> None:
        """Say that a manager stops by itself."""
        with self._store.write() as connection:
            leases.release(connection, LEASE_PREFIX + holder, holder)

    def interrupt_jobs_of_dead(self, known_dead: Collection[str], now: datetime, keep_leases: timedelta) -> list[str]:
        """Mark the running jobs of managers that died as interrupted, free their nodes and queue a check of them.

        Shapes: *known_dead* are dead for sure, whatever their lease says; gives the ids of the jobs.
        """
        with self._store.read() as connection:
            if not known_dead and not _orphans(connection, known_dead, now):
                return []
        with self._store.write() as connection:
            _serialize(connection)
            orphaned = _orphans(connection, known_dead, now)
            for job in _load(connection, orphaned):
                message = f"the manager that ran it ({job.holder}) ended in the middle"
                if _end(connection, job, JobState.INTERRUPTED, message, now):
                    _write_outcomes(connection, job, {})
                    _recheck(connection, job.node_ids, now)
            for holder in known_dead:
                leases.release(connection, LEASE_PREFIX + holder, holder)
            leases.sweep(connection, LEASE_PREFIX, now - keep_leases)
        return orphaned

    def prune(self, keep: int) -> int:
        """Forget all ended jobs but the newest *keep*; give how many."""
        ended = tables.jobs.c.state.not_in(_ACTIVE)
        oldest_kept = (
            sa.select(tables.jobs.c.sequence).where(ended).order_by(tables.jobs.c.sequence.desc()).limit(1).offset(keep)
        )
        with self._store.write() as connection:
            limit = connection.scalar(oldest_kept)
            if limit is None:
                return 0
            return connection.execute(tables.jobs.delete().where(ended, tables.jobs.c.sequence <= limit)).rowcount

    def _any_queued(self) -> bool:
        query = sa.select(tables.jobs.c.job_id).where(tables.jobs.c.state == JobState.QUEUED.value).limit(1)
        with self._store.read() as connection:
            return connection.scalar(query) is not None


def _serialize(connection: sa.Connection) -> None:
    """Let one transaction at a time decide about the queue; SQLite does so anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))


def _orphans(connection: sa.Connection, known_dead: Collection[str], now: datetime) -> list[str]:
    alive = leases.live(connection, LEASE_PREFIX, now) - set(known_dead)
    query = sa.select(tables.jobs.c.job_id, tables.jobs.c.holder).where(tables.jobs.c.state == JobState.RUNNING.value)
    return [job_id for job_id, holder in connection.execute(query) if holder not in alive]


def _registered(connection: sa.Connection, node_ids: Sequence[str]) -> set[str]:
    query = sa.select(tables.nodes.c.node_id).where(tables.nodes.c.node_id.in_(node_ids))
    return set(connection.scalars(query))


def _find_covering(connection: sa.Connection, action: JobAction, node_ids: Sequence[str]) -> str | None:
    """Find the first job, waiting or running, that does *action* on all these nodes: another would only wait for it."""
    query = (
        sa.select(tables.jobs.c.job_id)
        .join(tables.job_nodes, tables.job_nodes.c.job_id == tables.jobs.c.job_id)
        .where(
            tables.jobs.c.state.in_(_ACTIVE),
            tables.jobs.c.action == action.value,
            tables.jobs.c.cancel_requested_at.is_(None),
            tables.job_nodes.c.node_id.in_(node_ids),
        )
        .group_by(tables.jobs.c.job_id, tables.jobs.c.sequence)
        .having(sa.func.count() == len(node_ids))
        .order_by(tables.jobs.c.sequence)
        .limit(1)
    )
    found: str | None = connection.scalar(query)
    return found


def _check_bound(connection: sa.Connection, max_queued: int) -> None:
    queued = sa.select(sa.func.count()).where(tables.jobs.c.state == JobState.QUEUED.value)
    waiting = connection.scalar(queued) or 0
    if waiting >= max_queued:
        raise QueueFullError(f"{waiting} jobs wait already (ansible.max_queued_jobs); try again later")


def _insert(
    connection: sa.Connection,
    action: JobAction,
    node_ids: Iterable[str],
    requested_by: str,
    now: datetime,
    variables: Mapping[str, Any] | None = None,
) -> str:
    job_id = str(uuid.uuid4())
    connection.execute(
        tables.jobs.insert(),
        {
            "job_id": job_id,
            "action": action.value,
            "state": JobState.QUEUED.value,
            "requested_by": requested_by[:64],
            "variables": dict(variables or {}),
            "created_at": now,
        },
    )
    connection.execute(tables.job_nodes.insert(), [{"job_id": job_id, "node_id": node_id} for node_id in node_ids])
    return job_id


def _recheck(connection: sa.Connection, node_ids: Sequence[str], now: datetime) -> None:
    """Queue a check of the nodes that a run has left in an unknown state, even beyond the bound of the queue."""
    there = sorted(_registered(connection, node_ids))
    if there and _find_covering(connection, JobAction.CHECK, there) is None:
        _insert(connection, JobAction.CHECK, there, _RECHECK_BY, now)


def _first_free(connection: sa.Connection, blocked: set[str]) -> tuple[str, JobAction, list[str]] | None:
    query = (
        sa.select(tables.jobs.c.job_id, tables.jobs.c.action, tables.job_nodes.c.node_id)
        .join(tables.job_nodes, tables.job_nodes.c.job_id == tables.jobs.c.job_id)
        .where(tables.jobs.c.state == JobState.QUEUED.value)
        .order_by(tables.jobs.c.sequence, tables.job_nodes.c.node_id)
    )
    by_job = operator.attrgetter("job_id", "action")
    for (job_id, action), rows in itertools.groupby(connection.execute(query), by_job):
        node_ids = [row.node_id for row in rows]
        if blocked.isdisjoint(node_ids):
            return job_id, JobAction(action), node_ids
        # Later jobs don't overtake it on the nodes that it waits for.
        blocked.update(node_ids)
    return None


def _end(connection: sa.Connection, job: Job, state: JobState, message: str | None, now: datetime) -> bool:
    """End a running job and free its nodes; False if it has ended in the meantime."""
    ended = connection.execute(
        tables.jobs.update().where(
            tables.jobs.c.job_id == job.job_id,
            tables.jobs.c.state == JobState.RUNNING.value,
            tables.jobs.c.holder == job.holder,
        ),
        {"state": state.value, "message": message, "ended_at": now},
    )
    if ended.rowcount == 0:
        return False
    connection.execute(tables.node_claims.delete().where(tables.node_claims.c.job_id == job.job_id))
    return True


def _write_outcomes(connection: sa.Connection, job: Job, outcomes: Mapping[str, tuple[NodeResult, str | None]]) -> None:
    missing = (NodeResult.NOT_RUN, _NOT_REPORTED)
    statement = (
        tables.job_nodes.update()
        .where(tables.job_nodes.c.job_id == job.job_id, tables.job_nodes.c.node_id == sa.bindparam("of_node"))
        .values(result=sa.bindparam("its_result"), message=sa.bindparam("its_message"))
    )
    rows = []
    for node_id in job.node_ids:
        result, message = outcomes.get(node_id, missing)
        rows.append({"of_node": node_id, "its_result": result.value, "its_message": message})
    connection.execute(statement, rows)


def _known(connection: sa.Connection, job_id: str) -> Job:
    found = _load(connection, [job_id])
    if not found:
        raise JobNotFoundError(f"no job {job_id!r} is on record; GET /jobs lists those that are", job_id=job_id)
    return found[0]


def _load(connection: sa.Connection, job_ids: Collection[str]) -> list[Job]:
    """Read jobs with their nodes, in the order of arrival."""
    # The jobs first: one that reads as ended then has all its results beside it.
    jobs = connection.execute(
        sa.select(tables.jobs).where(tables.jobs.c.job_id.in_(job_ids)).order_by(tables.jobs.c.sequence)
    ).all()
    query = sa.select(tables.job_nodes).where(tables.job_nodes.c.job_id.in_(job_ids))
    nodes: dict[str, list[JobNode]] = {}
    for row in connection.execute(query.order_by(tables.job_nodes.c.node_id)):
        result = NodeResult(row.result) if row.result is not None else None
        nodes.setdefault(row.job_id, []).append(JobNode(row.node_id, result, row.message))
    return [
        Job(
            job_id=row.job_id,
            sequence=row.sequence,
            action=JobAction(row.action),
            state=JobState(row.state),
            requested_by=row.requested_by,
            variables=row.variables,
            message=row.message,
            holder=row.holder,
            created_at=row.created_at,
            started_at=row.started_at,
            deadline_at=row.deadline_at,
            ended_at=row.ended_at,
            nodes=tuple(nodes.get(row.job_id, ())),
        )
        for row in jobs
    ]
