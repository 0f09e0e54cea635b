# SPDX-License-Identifier: GPL-3.0-or-later
"""The metrics of one manager, for Prometheus: the state in its store, how long its work takes, and its process.

A registry of its own, nothing global. What is in the store is read anew for a scrape, in one transaction, but not twice within a
second, whoever asks how often.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import structlog
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from node_manager import __version__, metrics_of_nodes, metrics_of_state
from node_manager.domain import Liveness
from node_manager.metric_timings import MetricTimings
from node_manager.metrics_of_state import gauge, single
from node_manager.node_registry import Clock, utc_now
from node_manager.recorder import Recorder
from node_manager.resource_monitor import ResourceMonitor
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError

# Two Prometheus servers that look at the same time share one look.
_SHARED_SECONDS = 1.0
_WAIT_SECONDS = 5.0
# Of the OpenMetrics form.
_END = b"# EOF\n"
_WATCHED_HOW = ("streaming", "opening", "left_to_ansible", *(liveness.value for liveness in Liveness))


class Metrics:
    """What a scrape is answered with, and the timings that the parts are given."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._shown: dict[str, tuple[float, bytes]] = {}
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.timings = MetricTimings(self.registry, kafka=settings.configuration.kafka.enabled)
        self._of_store = _StoreCollector(store, settings, clock)
        self.registry.register(self._of_store)

    def watching(self, monitor: ResourceMonitor, recorder: Recorder) -> Metrics:
        """Tell of the streams and of what waits to be recorded, too; give the metrics."""
        self.registry.register(_StreamCollector(monitor, recorder))
        return self

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Write all metrics in the form that an Accept header asks for; give the form's content type too.

        Errors: StoreUnavailableError if another scrape goes on for too long; never for want of the store itself.
        """
        encode, content_type = choose_encoder(accept)
        if not self._lock.acquire(timeout=_WAIT_SECONDS):
            raise StoreUnavailableError("another scrape has been waiting for the store for too long")
        try:
            shown = self._shown.get(content_type)
            if shown is None or self._monotonic() - shown[0] >= _SHARED_SECONDS:
                # What somebody may ask for is no reason to keep more than the one form.
                shown = self._monotonic(), self._with_nodes(encode(self.registry))
                self._shown = {content_type: shown}
            return shown[1], content_type
        finally:
            self._lock.release()

    def _with_nodes(self, body: bytes) -> bytes:
        """Add the gauges of each node, which were read with the rest."""
        rest = body.removesuffix(_END)
        return b"".join((rest, self._of_store.of_nodes.encode(), body[len(rest) :]))


class _StoreCollector(Collector):
    """What is in the store, and whether it answers."""

    def __init__(self, store: Store, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._log = structlog.get_logger()
        # Of the last look.
        self.of_nodes = ""

    def collect(self) -> Iterator[Metric]:
        """Read it."""
        build = gauge("build_info", "Always 1: the version of this manager.", ("version",))
        build.add_metric((__version__,), 1)
        yield build
        try:
            found, up = self._read(), 1
        except StoreUnavailableError as error:
            self._log.warning("a scrape goes without the store", reason=str(error))
            found, up, self.of_nodes = [], 0, ""
        yield single("store_up", "Whether the store answered this scrape; if not, what is kept in it is left out.", up)
        yield from found

    def _read(self) -> list[GaugeMetricFamily]:
        limits, now = self._settings.configuration.metrics, self._clock()
        with self._store.read() as connection:
            families, nodes = metrics_of_state.read(connection, self._settings, now)
            each = limits.per_node and nodes <= limits.max_nodes
            self.of_nodes = metrics_of_nodes.read(connection, self._settings, now) if each else ""
        told = "Whether there are gauges for each node: metrics.per_node, and no more nodes than metrics.max_nodes."
        return [*families, single("per_node_gauges", told, each)]


class _StreamCollector(Collector):
    """How this manager watches the fleet, and what it has seen and not stored yet."""

    def __init__(self, monitor: ResourceMonitor, recorder: Recorder) -> None:
        self._monitor = monitor
        self._recorder = recorder

    def collect(self) -> Iterator[Metric]:
        """Ask for it."""
        watching, states, opened = self._monitor.streams()
        yield single(
            "watching", "Whether this manager watches the fleet; of all managers of a store one does.", watching
        )
        how = gauge("watched_nodes", "Nodes that this manager watches, by how that goes.", ("state",))
        for state in _WATCHED_HOW:
            how.add_metric((state,), states[state])
        yield how
        yield single("streams_open", "Streams to nodes that are open.", opened)
        yield single(
            "streams_wanted",
            "Nodes that this manager watches, each of which should have a stream.",
            sum(states.values()),
        )
        yield single(
            "recorder_waiting_observations", "Observations of streams that wait to be stored.", self._recorder.waiting
        )
        yield CounterMetricFamily(
            "node_manager_recorder_given_up_observations",
            "Observations of streams that were given up, as too many waited or the store refused them.",
            value=self._recorder.given_up,
        )
