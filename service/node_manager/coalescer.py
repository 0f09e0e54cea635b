# SPDX-License-Identifier: GPL-3.0-or-later
"""Let callers who come at the same time share one piece of work, such as a transaction: the disk is waited for once for all.

One thread works; whoever waits holds none. Knows nothing of what the work is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import structlog

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_WAITING = 4096
_STOP_SECONDS = 30.0


class CoalescerFullError(Exception):
    """Too many wait already."""


class Coalescer(Generic[Item, Result]):
    """A queue in front of work that is done for many at once."""

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[Item]], Sequence[Result]],
        most: int,
        size_of: Callable[[Item], int] = lambda _: 1,
    ) -> None:
        """Describe the work.

        Shapes: *work* gives one result per item, in their order. About *most* are done at once, as *size_of* counts them.
        """
        self._name = name
        self._work = work
        self._most = most
        self._size_of = size_of
        self._queue: queue.Queue[tuple[Item, Future[Result]] | None] = queue.Queue(_MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._log = structlog.get_logger()

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Do what waits, and end."""
        self._stopped = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_STOP_SECONDS)
            self._thread = None

    def submit(self, item: Item) -> Future[Result]:
        """Have something done; the future gives its result, or raises what the work raised.

        Errors: CoalescerFullError, also once it was stopped: nobody would come for it.
        """
        future: Future[Result] = Future()
        if self._stopped:
            raise CoalescerFullError(f"{self._name} has ended")
        try:
            self._queue.put_nowait((item, future))
        except queue.Full:
            raise CoalescerFullError(f"{_MAX_WAITING} wait for {self._name} already") from None
        return future

    def _run(self) -> None:
        last = False
        while not last:
            together, last = self._take()
            if together:
                self._do(together)

    def _take(self) -> tuple[list[tuple[Item, Future[Result]]], bool]:
        """Wait for somebody, and take all who are there by then; True at the end."""
        found: list[tuple[Item, Future[Result]]] = []
        size = 0
        waiting = self._queue.get()
        while waiting is not None:
            # From here on nobody can call it off: what is done must be told.
            if waiting[1].set_running_or_notify_cancel():
                found.append(waiting)
                size += self._size_of(waiting[0])
            if size >= self._most:
                return found, False
            try:
                waiting = self._queue.get_nowait()
            except queue.Empty:
                return found, False
        return found, True

    def _do(self, together: Sequence[tuple[Item, Future[Result]]]) -> None:
        try:
            results = self._work([item for item, _ in together])
        except Exception as error:  # whatever it is, those who wait must hear of it
            self._log.warning("work for several failed", work=self._name, waiting=len(together), reason=str(error))
            for _, future in together:
                future.set_exception(error)
            return
        for (_, future), result in zip(together, results, strict=True):
            future.set_result(result)
