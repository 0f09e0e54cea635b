# SPDX-License-Identifier: GPL-3.0-or-later
"""Monitor the resources of the fleet: one stream per node, on a thread with an event loop of its own.

Of all managers of one store the leading one watches. What other threads ask for comes in here; fleet_watch does the watching.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import structlog

from node_manager import watch_list
from node_manager.domain import ObservationKind
from node_manager.fleet_watch import FleetWatch
from node_manager.node_registry import Clock
from node_manager.recorder import Recorder
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError
from node_manager.timings import NO_TIMINGS, Timings

try:
    import uvloop
except ImportError:  # it isn't for every platform
    _new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    _new_loop = uvloop.new_event_loop

_LIST_SECONDS = 2.0
_STOP_SECONDS = 10.0
_MAX_SHOWN = 100
_NOBODY: frozenset[str] = frozenset()


class ResourceMonitor:
    """The streams of this manager, while it leads."""

    def __init__(
        self, store: Store, settings: Settings, recorder: Recorder, clock: Clock, timings: Timings = NO_TIMINGS
    ) -> None:
        self._store = store
        self._settings = settings
        self._recorder = recorder
        self._clock = clock
        self._timings = timings
        self._leads: Callable[[], bool] = _never
        self._log = structlog.get_logger()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._watch: FleetWatch | None = None
        self._fetching: dict[tuple[str, ObservationKind], Future[bool]] = {}
        self._fetching_lock = threading.Lock()
        monitoring = settings.configuration.monitoring
        self._streams = monitoring.scheduled and monitoring.stream
        # None: all, as nothing is watched by stream. Read by other threads: replaced whole, never changed.
        self._left_to_ansible: frozenset[str] | None = _NOBODY if self._streams else None

    def start(self, leads: Callable[[], bool]) -> None:
        """Begin to watch as soon as this manager leads; do nothing where monitoring is not ours, or not by streams."""
        self._leads = leads
        if not self._streams:
            return
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="monitor", daemon=True)
        self._thread.start()
        started.wait(_STOP_SECONDS)

    def stop(self) -> None:
        """Close all streams and end."""
        if self._loop is None or self._stopping is None or self._thread is None:
            return
        with suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._stopping.set)
        if self._watch is not None:
            self._watch.rest.hurry()
        self._thread.join(_STOP_SECONDS)

    def has_in_hand(self, node_id: str) -> bool:
        """Tell whether nobody else needs to look at a node.

        One that isn't watched yet counts too: else a manager that starts would have Ansible look at the whole fleet, 10,000
        nodes for most of an hour.
        """
        left = self._left_to_ansible
        return left is not None and node_id not in left

    def fetch(self, node_id: str, kind: ObservationKind) -> Future[bool] | None:
        """Have a node look at itself now: true once that is recorded; None where no stream is open.

        Callers at the same time share one look.
        """
        watch, loop = self._watch, self._loop
        if watch is None or loop is None or not watch.has_stream(node_id):
            return None
        with self._fetching_lock:
            waiter = self._fetching.get((node_id, kind))
            if waiter is None:
                waiter = self._fetching[node_id, kind] = Future()
                waiter.add_done_callback(lambda _: self._fetching.pop((node_id, kind), None))
                try:
                    loop.call_soon_threadsafe(watch.ask, node_id, kind, waiter)
                    watch.rest.hurry()
                except RuntimeError:  # it has ended meanwhile
                    waiter.cancel()
                    return None
        return waiter

    def streams(self) -> tuple[bool, Counter[str], int]:
        """Tell whether this manager watches, count the nodes by how they are watched, and the streams that are open."""
        watch = self._watch
        states = watch.states() if watch is not None else []
        opened = sum(watch.has_stream(node_id) for node_id, _, _ in states) if watch is not None else 0
        return watch is not None, Counter(state for _, state, _ in states), opened

    def overview(self) -> dict[str, Any]:
        """Tell how many nodes are watched how, which ones are left to Ansible and why, and what went wrong with us.

        Shapes: {watching, states: {state: count}, left_to_ansible: [{node_id, reason}], faults: [{message, count, last_at}],
        observations_given_up}; of nodes and faults the first hundred.
        """
        watch = self._watch
        states = watch.states() if watch is not None else []
        faults = list(watch.faults.values()) if watch is not None else []
        return {
            "watching": watch is not None,
            "states": dict(sorted(Counter(state for _, state, _ in states).items())),
            "left_to_ansible": [
                {"node_id": node_id, "reason": reason}
                for node_id, state, reason in sorted(states)
                if state == "left_to_ansible"
            ][:_MAX_SHOWN],
            "faults": [
                {"message": fault.message, "count": fault.count, "last_at": fault.last_at} for fault in reversed(faults)
            ],
            "observations_given_up": self._recorder.given_up,
        }

    def _run(self, started: threading.Event) -> None:
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            runner.run(self._main(started))

    async def _main(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        started.set()
        while not self._stopping.is_set():
            if self._leads():
                try:
                    await self._watch_fleet()
                except Exception:  # without this thread no node would be watched any more
                    self._log.exception("watching stumbled, it begins anew")
                    self._left_to_ansible = None
            await self._pause()

    async def _watch_fleet(self) -> None:
        """Watch until another manager leads, or this one stops."""
        assert self._stopping is not None
        watch = self._watch = FleetWatch(self._store, self._settings, self._recorder, self._clock)
        watch.on_fault = self._timings.count_stream_fault
        try:
            while self._leads() and not self._stopping.is_set():
                try:
                    await self._keep_list(watch)
                except StoreUnavailableError as error:
                    self._log.warning("the store does not answer, the list of nodes stays as it is", reason=str(error))
                await self._pause()
        finally:
            self._watch = None
            self._left_to_ansible = _NOBODY
            await watch.close()

    async def _keep_list(self, watch: FleetWatch) -> None:
        found = await asyncio.to_thread(watch_list.read_nodes, self._store)
        wanted = watch.wanted(found)
        if wanted:
            targets = await asyncio.to_thread(watch_list.read_targets, self._store, self._settings, wanted)
            for node_id, target in targets.items():
                watch.add(*found[node_id], target)
        self._left_to_ansible = watch.left_to_ansible()

    async def _pause(self) -> None:
        assert self._stopping is not None
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), _LIST_SECONDS)


def _never() -> bool:
    return False
