# SPDX-License-Identifier: GPL-3.0-or-later
"""The job queue of one manager: starts jobs, ends them in time, and tells who waits for them.

One thread decides what may start and who is still alive, one ends runs that are late, and one per running job follows
its run and writes how it ended. What must survive is in the store, see job_store; here is only what dies with us.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import structlog

from node_manager.domain import JobAction, JobState
from node_manager.job_files import JobFiles
from node_manager.job_store import ACTIVE, MAX_NODES_PER_JOB, Job, JobFilter, JobNode, JobPage, JobStore
from node_manager.node_registry import Clock, utc_now
from node_manager.playbook_process import PlaybookProcess, RunEnd, Runner, RunRequest
from node_manager.problems import InvalidInputError, JobNotFoundError
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError
from node_manager.timings import NO_TIMINGS, Timings

__all__ = ["ACTIVE", "MAX_NODES_PER_JOB", "Job", "JobNode", "JobPage", "JobQueue"]

LEASE_SECONDS = 30.0
LOG_READ_BYTES = 1024 * 1024

_RENEW_SECONDS = 5.0
# A manager that couldn't renew for this long ends its jobs: others will free their nodes soon.
_FENCE_SECONDS = 20.0
_TICK_SECONDS = 0.2
_POLL_SECONDS = 1.0
_RECOVER_SECONDS = 5.0
_PRUNE_SECONDS = 60.0
_RETRY_SECONDS = 1.0
_MAX_LOGGED_NODES = 5
_KILL_SECONDS = 15.0
_KEEP_LEASES = timedelta(hours=1)
_MAX_CURSOR_DIGITS = 18


@dataclass
class _Run:
    """One job that runs here."""

    job: Job
    deadline: float
    stop: threading.Event = field(default_factory=threading.Event)
    stop_as: JobState | None = None
    why: str | None = None
    thread: threading.Thread | None = None


@dataclass(frozen=True)
class _Waiter:
    """Somebody who waits for a job's end."""

    future: Future[Job]
    give_up: float


class JobQueue:
    """The jobs, seen from one manager."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        clock: Clock = utc_now,
        instance_id: str = "manager",
        *,
        runner: Runner | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        timings: Timings = NO_TIMINGS,
    ) -> None:
        self._jobs = JobStore(store)
        self._files = JobFiles(settings.home)
        self._settings = settings
        self._clock = clock
        self._instance_id = instance_id
        self._runner: Runner = runner or PlaybookProcess(settings)
        self._monotonic = monotonic
        self._timings = timings
        self._log = structlog.get_logger().bind(instance_id=instance_id)
        self._guard = threading.Lock()
        self._runs: dict[str, _Run] = {}
        self._waiters: dict[str, list[_Waiter]] = {}
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock: int | None = None
        self._renewed_at = 0.0
        self._due: dict[str, float] = {}

    def submit(
        self,
        action: JobAction,
        node_ids: Collection[str],
        requested_by: str,
        variables: Mapping[str, Any] | None = None,
    ) -> Job:
        """Ask for a job; one that waits or runs already and does the same on these nodes is joined.

        Shapes: *variables* are told to the playbook as they are, templates in them too; such a job joins none.
        Errors: InvalidInputError, NodeNotFoundError, QueueFullError, StoreUnavailableError.
        """
        limit = self._settings.configuration.ansible.max_queued_jobs
        job = self._jobs.submit(action, node_ids, requested_by, self._clock(), limit, variables)
        self._hurry()
        return job

    def get(self, job_id: str) -> Job:
        """Read a job.

        Errors: JobNotFoundError.
        """
        return self._jobs.get(job_id)

    def page(
        self,
        limit: int,
        cursor: str | None = None,
        *,
        state: JobState | None = None,
        action: JobAction | None = None,
        node_id: str | None = None,
    ) -> JobPage:
        """List jobs, newest first.

        Errors: InvalidInputError if *cursor* is not the next_cursor of an earlier page.
        """
        if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) <= _MAX_CURSOR_DIGITS):
            raise InvalidInputError("cursor", "expected the next_cursor of an earlier page")
        wanted = JobFilter(state=state, action=action, node_id=node_id)
        return self._jobs.page(wanted, limit, None if cursor is None else int(cursor))

    def active_nodes(self, *actions: JobAction) -> set[str]:
        """Tell which nodes a job of one of *actions* waits for or works on."""
        return self._jobs.active_nodes(actions)

    def cancel(self, job_id: str) -> Job:
        """End a job: at once if it waits, soon if it runs; all who joined it lose it.

        Errors: JobNotFoundError; ConflictError if it ended otherwise already.
        """
        job = self._jobs.cancel(job_id, self._clock())
        self._hurry()
        return job

    def future(self, job_id: str) -> Future[Job]:
        """Give a future of the ended job; it does no I/O itself, so that it may be called from an event loop.

        Errors: the future's own are JobNotFoundError, and TimeoutError if the job still goes on after
            server.max_wait_seconds, or when the manager stops.
        """
        future: Future[Job] = Future()
        give_up = self._monotonic() + self._settings.server.max_wait_seconds + _POLL_SECONDS
        with self._guard:
            if not self._stopped.is_set():
                self._waiters.setdefault(job_id, []).append(_Waiter(future, give_up))
                self._hurry()
                return future
        _resolve(future, TimeoutError("the manager stopped"))
        return future

    def log(self, job_id: str, offset: int = 0) -> bytes:
        """Read what Ansible has printed so far, from *offset* on, a part at a time; empty where there is no more.

        Errors: JobNotFoundError.
        """
        self._jobs.get(job_id)
        return self._files.read_log(job_id, offset, LOG_READ_BYTES)

    def start(self) -> None:
        """Take over from managers that died, then run jobs.

        Errors: StoreUnavailableError; BlockingIOError if a manager of this id runs already.
        """
        self._lock = self._files.lock_instance(self._instance_id, self._stopped.wait)
        try:
            # Whatever runs under our name is of an earlier life.
            self.recover({self._instance_id})
            self._jobs.hold(self._instance_id, self._clock(), LEASE_SECONDS)
        except BaseException:
            self._unlock()
            raise
        self._renewed_at = self._monotonic()
        self._threads = [
            threading.Thread(target=self._dispatch, name="jobs", daemon=True),
            threading.Thread(target=self._watch, name="job-deadlines", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Start no more, let running jobs end for server.shutdown_seconds, interrupt the rest."""
        self._closing.set()
        self._hurry()
        self._join_runs(self._settings.server.shutdown_seconds)
        self._stop_runs(JobState.INTERRUPTED, "the manager was stopped")
        self._join_runs(_KILL_SECONDS)
        self._stopped.set()
        self._hurry()
        for thread in self._threads:
            thread.join(_KILL_SECONDS)
        with self._guard:
            waiters = [waiter for waiting in self._waiters.values() for waiter in waiting]
            self._waiters.clear()
        for waiter in waiters:
            _resolve(waiter.future, TimeoutError("the manager stopped"))
        try:
            self._jobs.leave(self._instance_id)
        except StoreUnavailableError as error:
            self._log.warning("the store was not told that this manager stopped", reason=str(error))
        self._unlock()

    def recover(self, known_dead: Collection[str] = ()) -> list[str]:
        """Interrupt the jobs of managers that died, and have their nodes checked; jobs that wait just wait on.

        Shapes: *known_dead* are managers that are dead for sure; gives the ids of the interrupted jobs.
        """
        dead_here = set(self._files.dead_instances()) - {self._instance_id}
        interrupted = self._jobs.interrupt_jobs_of_dead(dead_here | set(known_dead), self._clock(), _KEEP_LEASES)
        for job_id in interrupted:
            self._runner.discard(job_id)
            self._log.warning("a job was interrupted, its nodes are checked again", job_id=job_id)
        self._files.forget_instances(dead_here)
        return interrupted

    def prune(self) -> None:
        """Forget the oldest ended jobs beyond ansible.keep_jobs, with their logs."""
        self._jobs.prune(self._settings.configuration.ansible.keep_jobs)
        here = self._files.job_ids()
        self._files.remove(set(here) - set(self._jobs.load(here)))

    # The threads that decide

    def _watch(self) -> None:
        # Not in the thread below: a store that hangs must not keep a job from its deadline.
        while not self._stopped.wait(_TICK_SECONDS):
            self._stop_late_runs()

    def _dispatch(self) -> None:
        while not self._stopped.is_set():
            try:
                self._step()
            except StoreUnavailableError as error:
                self._log.warning("the store does not answer, jobs wait", reason=str(error))
                self._stopped.wait(_RETRY_SECONDS)
            except Exception:  # without this thread nothing would ever run again
                self._log.exception("the job queue stumbled")
                self._stopped.wait(_RETRY_SECONDS)
            if self._wake.wait(_TICK_SECONDS):
                self._wake.clear()
                self._due["poll"] = 0.0

    def _step(self) -> None:
        if self._every("renew", _RENEW_SECONDS):
            self._renew()
        if self._every("poll", _POLL_SECONDS):
            self._start_waiting()
            self._stop_cancelled()
            self._answer_waiters()
        if self._every("recover", _RECOVER_SECONDS):
            self.recover()
        if self._every("prune", _PRUNE_SECONDS):
            self.prune()

    def _every(self, what: str, seconds: float) -> bool:
        now = self._monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + seconds
        return True

    def _stop_late_runs(self) -> None:
        now = self._monotonic()
        if now - self._renewed_at > _FENCE_SECONDS:
            self._stop_runs(JobState.INTERRUPTED, "the store did not answer for too long")
        for run in self._running():
            if now >= run.deadline:
                seconds = self._timeout_of(run.job.action)
                self._stop_run(run, JobState.TIMED_OUT, f"stopped at its deadline of {seconds:g} s")

    def _timeout_of(self, action: JobAction) -> float:
        configuration = self._settings.configuration
        if action is JobAction.RECOVER:
            return configuration.recovery.step_timeout_seconds
        return configuration.ansible.job_timeout_seconds

    def _renew(self) -> None:
        began = self._monotonic()
        if not self._jobs.renew(self._instance_id, self._clock(), LEASE_SECONDS):
            self._stop_runs(JobState.INTERRUPTED, "another manager took this one for dead")
            self._jobs.hold(self._instance_id, self._clock(), LEASE_SECONDS)
        self._renewed_at = began

    def _start_waiting(self) -> None:
        limit = self._settings.configuration.ansible.max_running_jobs
        while not self._closing.is_set() and len(self._running()) < limit:
            if self._monotonic() - self._renewed_at > _FENCE_SECONDS:
                return
            job = self._jobs.claim_next(self._instance_id, self._clock(), self._timeout_of)
            if job is None:
                return
            run = _Run(job, self._monotonic() + self._timeout_of(job.action))
            run.thread = threading.Thread(target=self._follow, args=(run,), name=f"job-{job.job_id}", daemon=True)
            with self._guard:
                self._runs[job.job_id] = run
            run.thread.start()

    def _stop_cancelled(self) -> None:
        running = self._running()
        wanted = self._jobs.cancel_requests(self._instance_id) if running else set()
        for run in running:
            if run.job.job_id in wanted:
                self._stop_run(run, JobState.CANCELLED, "cancelled while it ran")

    def _answer_waiters(self) -> None:
        """Answer those whose job has ended, here or elsewhere, and those who have waited long enough."""
        now = self._monotonic()
        with self._guard:
            late = [waiter for waiting in self._waiters.values() for waiter in waiting if now >= waiter.give_up]
            for job_id, waiting in list(self._waiters.items()):
                self._waiters[job_id] = [waiter for waiter in waiting if now < waiter.give_up]
                if all(waiter.future.cancelled() for waiter in waiting):
                    del self._waiters[job_id]
            asked = set(self._waiters) - set(self._runs)
        for waiter in late:
            _resolve(waiter.future, TimeoutError("the job still goes on"))
        if not asked:
            return
        known = self._jobs.load(asked)
        for job_id in asked:
            if job_id not in known:
                self._answer(job_id, JobNotFoundError(f"no job {job_id!r} is on record", job_id=job_id))
            elif known[job_id].ended:
                self._answer(job_id, known[job_id])

    # The threads that follow runs

    def _follow(self, run: _Run) -> None:
        job = run.job
        # For every line of this thread, whoever writes it.
        structlog.contextvars.bind_contextvars(job_id=job.job_id, node_ids=job.node_ids[:_MAX_LOGGED_NODES])
        log = self._log.bind(action=job.action.value)
        log.info("job started", nodes=len(job.nodes))
        began = self._monotonic()
        try:
            end = self._runner.run(RunRequest(job.job_id, job.action, job.node_ids, job.variables), run.stop)
        except Exception as error:  # the job fails with it, and the thread goes on to say so
            log.exception("the job could not be run")
            end = RunEnd(complete=False, message=f"the job could not be run: {error}")
        state, message = _judge(run, end)
        seconds = self._monotonic() - began
        ended = self._finish(run, end, state, message)
        with self._guard:
            del self._runs[job.job_id]
        if ended is not None:
            self._timings.observe_job(job.action, ended.state, seconds)
            log.info("job ended", state=ended.state.value, message=ended.message)
            self._answer(job.job_id, ended)
        self._hurry()

    def _finish(self, run: _Run, end: RunEnd, state: JobState, message: str | None) -> Job | None:
        outcomes = {node_id: (outcome.result, outcome.message) for node_id, outcome in end.outcomes.items()}
        while True:
            try:
                return self._jobs.finish(run.job, state, message, outcomes, self._clock())
            except StoreUnavailableError as error:
                self._log.warning("how a job ended is not on record yet", job_id=run.job.job_id, reason=str(error))
            if self._stopped.wait(_RETRY_SECONDS):
                # The next start finds it running and interrupts it.
                return None

    # What both use

    def _running(self) -> list[_Run]:
        with self._guard:
            return list(self._runs.values())

    def _stop_run(self, run: _Run, state: JobState, why: str) -> None:
        if not run.stop.is_set():
            run.stop_as, run.why = state, why
            run.stop.set()

    def _stop_runs(self, state: JobState, why: str) -> None:
        for run in self._running():
            self._stop_run(run, state, why)

    def _join_runs(self, seconds: float) -> None:
        until = self._monotonic() + seconds
        for run in self._running():
            if run.thread is not None:
                run.thread.join(max(0.0, until - self._monotonic()))

    def _answer(self, job_id: str, answer: Job | Exception) -> None:
        with self._guard:
            waiting = self._waiters.pop(job_id, [])
        for waiter in waiting:
            _resolve(waiter.future, answer)

    def _hurry(self) -> None:
        self._wake.set()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _judge(run: _Run, end: RunEnd) -> tuple[JobState, str | None]:
    """Name the state of a job whose run has ended; an unreachable node is a result, a missing one is a failure."""
    missing = [node_id for node_id in run.job.node_ids if node_id not in end.outcomes]
    if end.complete and not missing:
        return JobState.SUCCEEDED, None
    if run.stop_as is not None:
        return run.stop_as, run.why
    if end.complete:
        shown = ", ".join(missing[:5]) + (" and more" if len(missing) > 5 else "")
        return JobState.FAILED, f"no result for {shown}\n{end.message or ''}".strip()
    return JobState.FAILED, end.message


def _resolve(future: Future[Job], answer: Job | Exception) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
