# SPDX-License-Identifier: GPL-3.0-or-later
"""Carry what streams bring to the one door, in batches: one transaction for all that came in a moment.

One thread records, so that observations of a node arrive in their order. While the store does not answer, what came in
waits; where too much waits, the oldest samples are given up, the manager's verdicts never.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

import structlog

from node_manager.domain import ObservationKind
from node_manager.observations import Observation, ObservationLog
from node_manager.store import StoreUnavailableError

# More would save little, and keep everybody else's transactions waiting: that many are about 70 ms.
BATCH = 200
_MAX_WAITING = 50_000
_RETRY_SECONDS = 1.0
# A transaction costs 1.5 ms beside its samples: in a small fleet they wait for company this many pauses.
_PATIENT_PAUSES = 3
_STOP_SECONDS = 10.0
# What a node would send again anyway.
_EXPENDABLE = frozenset((ObservationKind.SAMPLE, ObservationKind.REPORT, ObservationKind.FACTS))

_Item = tuple[Observation, Future[bool] | None]


class Recorder:
    """The way from the streams to the store."""

    def __init__(self, observations: ObservationLog, pause_seconds: float = 1.0) -> None:
        self._observations = observations
        self._pause_seconds = pause_seconds
        self._log = structlog.get_logger()
        self._waiting: deque[_Item] = deque()
        self._lock = threading.Lock()
        self._hurry = threading.Event()
        self._soon = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended = False
        self.given_up = 0

    def start(self) -> None:
        """Begin to record."""
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Record what waits, and end."""
        self._stopped.set()
        self._hurry.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    @property
    def waiting(self) -> int:
        """Give how many observations wait."""
        return len(self._waiting)

    def put(self, observation: Observation, recorded: Future[bool] | None = None, *, soon: bool = True) -> None:
        """Hand in what was seen; *recorded* becomes true once it is in the store, false if it is given up.

        What is waited for, and what the manager concluded, is recorded at once; all else after a pause. What need not be
        *soon* waits three, or until a batch is full.
        """
        with self._lock:
            if ended := self._ended:
                self.given_up += 1
            else:
                if len(self._waiting) >= _MAX_WAITING:
                    self._give_up_one()
                self._waiting.append((observation, recorded))
                self._soon = self._soon or soon
        if ended:
            _settle(recorded, kept=False)
        elif recorded is not None or observation.kind not in _EXPENDABLE or len(self._waiting) == BATCH:
            self._hurry.set()

    def _give_up_one(self) -> None:
        for number, (observation, recorded) in enumerate(self._waiting):
            if observation.kind in _EXPENDABLE:
                del self._waiting[number]
                self.given_up += 1
                _settle(recorded, kept=False)
                return

    def _run(self) -> None:
        while True:
            stopping = self._stopped.is_set()
            more = self._record_batch()
            if stopping and not more:
                break
            if not more:
                self._pause()
        with self._lock:
            self._ended = True
        if self._waiting:
            self.given_up += len(self._waiting)
            self._log.warning(
                "observations are lost, the store did not answer at the end", observations=len(self._waiting)
            )
        for _, recorded in self._waiting:
            _settle(recorded, kept=False)

    def _pause(self) -> None:
        for _ in range(_PATIENT_PAUSES):
            if self._hurry.wait(self._pause_seconds) or self._soon:
                break
        self._hurry.clear()

    def _record_batch(self) -> bool:
        """Record up to a batch; tell whether more waits that can be recorded now."""
        with self._lock:
            taken = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            self._soon = self._soon and bool(self._waiting)
        if not taken:
            return False
        try:
            self._record(taken)
        except StoreUnavailableError as error:
            self._log.warning("the store does not answer, observations wait", waiting=len(taken), reason=str(error))
            with self._lock:
                self._waiting.extendleft(reversed(taken))
            return not self._stopped.wait(_RETRY_SECONDS)
        # At the end nothing is left for a later batch.
        return len(self._waiting) >= (1 if self._stopped.is_set() else BATCH)

    def _record(self, taken: list[_Item]) -> None:
        """Record all of *taken*; what the store does not answer for stays in it."""
        size = len(taken)
        while taken:
            some = taken[:size]
            try:
                outcome = self._observations.record([observation for observation, _ in some], from_manager=True)
            except StoreUnavailableError:
                raise
            except Exception:
                if size > 1:
                    # One that can't be recorded must not take the others with it.
                    size = len(some) // 2
                    continue
                self._log.exception("an observation can't be recorded", node_id=some[0][0].node_id)
                self.given_up += 1
                _settle(some[0][1], kept=False)
            else:
                for rejection in outcome.rejected:
                    self._log.info("an observation was rejected", node_id=rejection.node_id, reason=rejection.message)
                rejected = {rejection.index for rejection in outcome.rejected}
                for index, (_, recorded) in enumerate(some):
                    _settle(recorded, kept=index not in rejected)
            del taken[:size]
            size = len(taken)


def _settle(recorded: Future[bool] | None, *, kept: bool) -> None:
    # Whoever waited may have gone.
    if recorded is not None and recorded.set_running_or_notify_cancel():
        recorded.set_result(kept)
