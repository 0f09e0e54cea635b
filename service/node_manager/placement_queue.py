# SPDX-License-Identifier: GPL-3.0-or-later
"""Let callers who place deployments at the same time share a transaction."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

from node_manager.coalescer import Coalescer, CoalescerFullError
from node_manager.deployments import DeploymentPlacer, Placed
from node_manager.problems import PlacementQueueFullError, ProblemError
from node_manager.selection_request import SelectionRequest
from node_manager.timings import NO_TIMINGS, Timings

# So many deployments share a transaction at most: enough to make the disk's part small, few enough to answer soon.
_MAX_SHARED = 128

Outcomes = list[Placed | ProblemError]


class PlacementQueue:
    """The way to the placer for many callers at once."""

    def __init__(self, placer: DeploymentPlacer, timings: Timings = NO_TIMINGS) -> None:
        self._placer = placer
        self._timings = timings
        self._coalescer: Coalescer[Sequence[SelectionRequest], Outcomes] = Coalescer(
            "placement", self._place, _MAX_SHARED, len
        )

    def start(self) -> None:
        """Begin to place."""
        self._coalescer.start()

    def stop(self) -> None:
        """Place what waits, and end."""
        self._coalescer.stop()

    def submit(self, requests: Sequence[SelectionRequest]) -> Future[Outcomes]:
        """Have deployments placed; the future gives one outcome per request, or raises StoreUnavailableError.

        Errors: PlacementQueueFullError.
        """
        began = time.perf_counter()
        try:
            future = self._coalescer.submit(requests)
        except CoalescerFullError as error:
            raise PlacementQueueFullError(f"{error}; repeat the request after the time in Retry-After") from None
        future.add_done_callback(lambda _: self._timings.observe_placement(time.perf_counter() - began))
        return future

    def _place(self, together: Sequence[Sequence[SelectionRequest]]) -> list[Outcomes]:
        outcomes = iter(self._placer.place([request for requests in together for request in requests]))
        return [[next(outcomes) for _ in requests] for requests in together]
