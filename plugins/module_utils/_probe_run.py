# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run collectors under time limits, and leave behind those that hang.

Standard library only. Runs on nodes with Python 3.8. Knows nothing of what a collector reads.

A thread that waits in the kernel can't be ended, so the workers are daemon threads that may be left behind. The
caller needs only to print its answer, flush and return: an interpreter that ends doesn't join daemon threads. What
may hang beyond the reach of SIGKILL is asked through a child process instead (see _probe_read), because such a thread
would keep its whole process from being reaped.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from typing import Callable, Deque, Dict, List, NamedTuple, Optional, Sequence, Tuple

# In the good case one worker runs all collectors in a row. Whoever looks and finds it held up for this long has another
# take over the rest, so any number of hanging collectors wait side by side.
_TAKEOVER_SECONDS = 0.05
# A left-behind thread costs 8 MiB of address space; a node with more dead mounts than this has told enough.
_MAX_LEFT_BEHIND = 32

Key = Tuple[str, str]


class Task:
    """One call of a collector: *where* tells several calls of one collector apart, and appears in its message."""

    def __init__(self, collector: str, call: Callable[[], object], limit_seconds: float, where: str = "") -> None:
        self.collector = collector
        self.call = call
        self.limit_seconds = limit_seconds
        self.where = where
        self.key: Key = (collector, where)

    def error(self, message: str) -> Dict[str, str]:
        return {"collector": self.collector, "message": message + (" at " + self.where if self.where else "")}


class MoreTasks(NamedTuple):
    """What a task returns that finds out what else there is to collect; *value* is its own result."""

    tasks: Sequence[Task]
    value: object


class Outcome(NamedTuple):
    """What the tasks brought: *values* has those that came back in time, *errors* a line for each of the others."""

    values: Dict[Key, object]
    errors: List[Dict[str, str]]


class BoundedRunner:
    """Run tasks on daemon threads, one set of them at a time.

    A task that is still stuck from an earlier run is not started again, so a loop never piles up threads on one dead
    mount. *wait* is what an idle worker does: it gets the worker's queue, and gives what came out of that, or else what it
    began by itself (`begin`).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wait: Optional[Wait] = None) -> None:
        self._clock = clock
        self._wait: Wait = wait or _wait_for_work
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._stuck: Dict[Key, float] = {}
        self._worker: Optional[_Worker] = None
        self._batch: Optional[Batch] = None

    def run(self, tasks: Sequence[Task], deadline_seconds: float) -> Outcome:
        """Run all *tasks*, each within its own limit; return by the time the clock shows *deadline_seconds*."""
        outcomes: List[Outcome] = []

        def end(outcome: Outcome) -> None:
            with self._changed:
                outcomes.append(outcome)
                self._changed.notify_all()

        self.start(tasks, deadline_seconds, end)
        while not outcomes:
            wake_at = self.look()
            with self._changed:
                if not outcomes:
                    self._changed.wait(max(0.0, min(wake_at, deadline_seconds) - self._clock()))
        return outcomes[0]

    def start(self, tasks: Sequence[Task], deadline_seconds: float, then: Callable[[Outcome], None]) -> None:
        """Begin to run *tasks*; *then* is called once with what they brought, on whichever thread ends them.

        The caller must `look` until then; nothing else may run meanwhile.
        Errors: RuntimeError if no thread can be had; *then* is not called.
        """
        batch = self.begin(tasks, deadline_seconds, then)
        with self._lock:
            try:
                self._hand_over(batch)
            except RuntimeError:
                self._batch = None
                raise

    def begin(self, tasks: Sequence[Task], deadline_seconds: float, then: Callable[[Outcome], None]) -> Batch:
        """Do as `start` does, for the worker that calls this while it waits: what it gets is its work."""
        batch = Batch(self._clock, self._lock, self._stuck, deadline_seconds, then)
        with self._lock:
            for task in tasks:
                batch.add(task)
            batch.last_start = self._clock()
            self._batch = batch
        return batch

    def keep_worker(self) -> None:
        """See that there is a worker, busy or not.

        Errors: RuntimeError if no thread can be had.
        """
        with self._lock:
            self._ensure_worker()

    def look(self) -> float:
        """Give up what is overdue, and have others take over from a held-up worker; give the time to look again."""
        with self._lock:
            batch = self._batch
            if batch is None or batch.ended:
                self._batch = None
                return float("inf")
            now = self._clock()
            wake_at = self._give_up_overdue(batch, now)
            if now >= batch.deadline_seconds:
                batch.errors.extend(task.error("not started in time") for task in batch.pending)
                batch.pending.clear()
            elif batch.pending:
                if now - batch.last_start >= _TAKEOVER_SECONDS:
                    self._release_held_up()
                    # No thread to be had now: perhaps the next time.
                    batch.last_start = now
                    with suppress(RuntimeError):
                        self._hand_over(batch)
                wake_at = min(wake_at, batch.last_start + _TAKEOVER_SECONDS)
            if not batch.end():
                return wake_at
            self._release_held_up()
            self._batch = None
        batch.then(batch.outcome())
        return float("inf")

    def close(self) -> None:
        """End the idle worker; stuck ones end when the kernel lets them go."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.batches.put(None)
            worker.join(timeout=1.0)

    def _give_up_overdue(self, batch: Batch, now: float) -> float:
        """Move the tasks past their limit to the errors; return when to look again."""
        deadline_seconds = wake_at = batch.deadline_seconds
        for key, (task, started) in list(batch.running.items()):
            until = min(started + task.limit_seconds, deadline_seconds)
            if now < until:
                wake_at = min(wake_at, until)
                continue
            del batch.running[key]
            self._stuck[key] = started
            batch.errors.append(task.error("timed out after {:.1f} s".format(max(0.0, until - started))))
        return wake_at

    def _hand_over(self, batch: Batch) -> None:
        worker = self._ensure_worker()
        batch.last_start = self._clock()
        worker.batches.put(batch)

    def _ensure_worker(self) -> _Worker:
        if self._worker is None or not self._worker.is_alive():
            worker = _Worker(self._wait)
            worker.start()
            self._worker = worker
        return self._worker

    def _release_held_up(self) -> None:
        """Let a worker that is held up end by itself, whenever that is; one that has nothing to do goes on."""
        if self._worker is not None and self._worker.task is not None:
            self._worker.batches.put(None)
            self._worker = None


class Batch:
    """The tasks of one run, shared by its workers; *lock* guards everything here and *stuck*."""

    def __init__(
        self,
        clock: Callable[[], float],
        lock: threading.Lock,
        stuck: Dict[Key, float],
        deadline_seconds: float,
        then: Callable[[Outcome], None],
    ) -> None:
        self.deadline_seconds = deadline_seconds
        self.then = then
        self.ended = False
        self.pending: Deque[Task] = deque()
        self.running: Dict[Key, Tuple[Task, float]] = {}
        self.values: Dict[Key, object] = {}
        self.errors: List[Dict[str, str]] = []
        self.last_start = 0.0
        self._clock = clock
        self._lock = lock
        self._stuck = stuck

    def add(self, task: Task) -> None:
        """Queue a task, unless an earlier call of it is still stuck."""
        since = self._stuck.get(task.key)
        if since is not None:
            self.errors.append(task.error("still blocked after {:.0f} s".format(self._clock() - since)))
        elif len(self._stuck) >= _MAX_LEFT_BEHIND:
            self.errors.append(task.error("not tried, {} collectors are blocked".format(len(self._stuck))))
        else:
            self.pending.append(task)

    def end(self) -> bool:
        """Tell, to the first who asks, that nothing is left to run."""
        if self.pending or self.running or self.ended:
            return False
        self.ended = True
        return True

    def outcome(self) -> Outcome:
        return Outcome(self.values, self.errors)

    def work(self, worker: _Worker) -> None:
        """Run pending tasks until there are none, or until one of them came back after it was given up."""
        with self._lock:
            task = self._next(worker)
        while task is not None:
            failure = None
            value: object = None
            try:
                value = task.call()
            except Exception as error:
                # Whatever a collector raises costs only its own part.
                failure = task.error(_describe(error))
            with self._lock:
                worker.task = None
                if self.running.pop(task.key, None) is None:
                    self._stuck.pop(task.key, None)
                    return
                if failure is not None:
                    self.errors.append(failure)
                elif isinstance(value, MoreTasks):
                    for more in value.tasks:
                        self.add(more)
                    self.values[task.key] = value.value
                else:
                    self.values[task.key] = value
                task = self._next(worker)
        with self._lock:
            ended = self.end()
        if ended:
            self.then(self.outcome())

    def _next(self, worker: _Worker) -> Optional[Task]:
        if not self.pending:
            return None
        task = self.pending.popleft()
        self.last_start = self._clock()
        self.running[task.key] = (task, self.last_start)
        worker.task = task
        return task


class _Worker(threading.Thread):
    def __init__(self, wait: Wait) -> None:
        super().__init__(name="probe", daemon=True)
        self.batches: SimpleQueue[Optional[Batch]] = SimpleQueue()
        self.task: Optional[Task] = None
        self._wait = wait

    def run(self) -> None:
        while True:
            batch = self._wait(self.batches)
            if batch is None:
                return
            batch.work(self)


Wait = Callable[["SimpleQueue[Optional[Batch]]"], Optional[Batch]]


class WakePipe:
    """Wakes a thread that waits in poll(2) for *reading*; *writing* is for signal.set_wakeup_fd."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        os.set_blocking(self.writing, False)

    def wake(self) -> None:
        # A full pipe wakes as well as one more byte would.
        with suppress(BlockingIOError):
            os.write(self.writing, b"\0")

    def drain(self) -> None:
        """Take what has woken; only one thread may wait."""
        with suppress(BlockingIOError):
            os.read(self.reading, 4096)


def _wait_for_work(batches: SimpleQueue[Optional[Batch]]) -> Optional[Batch]:
    return batches.get()


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (": {}".format(error.filename) if error.filename else "")
    return str(error) or type(error).__name__
