# SPDX-License-Identifier: GPL-3.0-or-later
"""The metrics of one manager, for Prometheus: the state in its store, how long its work takes, and its process.

A registry of its own, nothing global. What is in the store is read anew for a scrape, in one transaction, but not twice within a
second, whoever asks how often and in what form.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Look:
    """What the store said, and when; or why it said nothing."""

    at: float
    families: Sequence[Metric] = ()
    # The gauges of each node, as lines.
    nodes: bytes = b""
    failure: str | None = None


class Metrics:
    """What a scrape is answered with, and the timings that the parts are given."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._monotonic = monotonic
        self._log = structlog.get_logger()
        self._lock = threading.Lock()
        self._look: Future[_Look] | None = None
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.timings = MetricTimings(self.registry, kafka=settings.configuration.kafka.enabled)

    def watching(self, monitor: ResourceMonitor, recorder: Recorder, leads: Callable[[], bool]) -> Metrics:
        """Tell of the lead, the streams and what waits to be recorded, too; give the metrics."""
        self.registry.register(_WatchCollector(monitor, recorder, leads))
        return self

    def exposition(self, accept: str, *, asks_store: bool = True) -> tuple[bytes, str]:
        """Write all metrics in the form that an Accept header asks for; give the form's content type too.

        Where the store doesn't answer soon, or isn't asked, they are those of the process.
        """
        encode, content_type = choose_encoder(accept)
        look = self._shared_look() if asks_store else _Look(0.0, failure="it didn't know the token in time")
        if look.failure is not None:
            self._log.warning("a scrape goes without the store", reason=look.failure)
        body = encode(_Shown(self.registry, look))
        rest = body.removesuffix(_END)
        return b"".join((rest, look.nodes, body[len(rest) :])), content_type

    def _shared_look(self) -> _Look:
        """Give the look of the last second, or the one that is under way, or begin one."""
        with self._lock:
            look = self._look
            if look is None or (look.done() and not self._is_fresh(look)):
                look = self._look = Future()
                # A thread of its own: whoever scrapes waits no longer than it must, however long the store takes.
                threading.Thread(target=self._fill, args=(look,), name="metrics", daemon=True).start()
        try:
            return look.result(_WAIT_SECONDS)
        except TimeoutError:
            return _Look(0.0, failure=f"it has said nothing for {_WAIT_SECONDS:g} s")

    def _is_fresh(self, look: Future[_Look]) -> bool:
        return look.exception() is None and self._monotonic() - look.result().at < _SHARED_SECONDS

    def _fill(self, look: Future[_Look]) -> None:
        try:
            families, nodes = self._read()
            look.set_result(_Look(self._monotonic(), families, nodes.encode()))
        except StoreUnavailableError as error:
            look.set_result(_Look(self._monotonic(), failure=str(error)))
        except Exception as error:  # whoever waits gets it
            look.set_exception(error)

    def _read(self) -> tuple[list[GaugeMetricFamily], str]:
        limits, now = self._settings.configuration.metrics, self._clock()
        with self._store.read() as connection:
            families, nodes = metrics_of_state.read(connection, self._settings, now)
            each = limits.per_node and nodes <= limits.max_nodes
            of_nodes = metrics_of_nodes.read(connection, self._settings, now) if each else ""
        told = "Whether there are gauges for each node: metrics.per_node, and no more nodes than metrics.max_nodes."
        return [*families, single("per_node_gauges", told, each)], of_nodes


class _Shown(Collector):
    """What one scrape shows: the process as it is now, and the store as it was looked at."""

    def __init__(self, registry: CollectorRegistry, look: _Look) -> None:
        self._registry = registry
        self._look = look

    def collect(self) -> Iterator[Metric]:
        """Put it together."""
        yield from self._registry.collect()
        build = gauge("build_info", "Always 1: the version of this manager.", ("version",))
        build.add_metric((__version__,), 1)
        yield build
        told = "Whether the store answered this scrape; if not, what is kept in it is left out."
        yield single("store_up", told, self._look.failure is None)
        yield from self._look.families


class _WatchCollector(Collector):
    """Whether and how this manager watches the fleet, and what it has seen and not stored yet."""

    def __init__(self, monitor: ResourceMonitor, recorder: Recorder, leads: Callable[[], bool]) -> None:
        self._monitor = monitor
        self._recorder = recorder
        self._leads = leads

    def collect(self) -> Iterator[Metric]:
        """Ask for it."""
        yield single(
            "leads", "Whether this manager does the periodic work; of all managers of a store one does.", self._leads()
        )
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
