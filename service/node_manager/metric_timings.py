# SPDX-License-Identifier: GPL-3.0-or-later
"""Hear what the parts tell of their work, and keep it as histograms and counters.

Each label is a closed vocabulary, so that the number of series is known beforehand.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from node_manager.domain import JobAction, JobState
from node_manager.timings import CommandOutcome, Timings

_QUICK = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WRITES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_JOBS = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
# Up to the hours that brokers may be away.
_RELAY = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 21600.0)


class MetricTimings(Timings):
    """Keeps in *registry* what it hears; what is about Kafka only where Kafka is configured."""

    def __init__(self, registry: CollectorRegistry, *, kafka: bool) -> None:
        def histogram(name: str, told: str, buckets: tuple[float, ...], registered: bool = True) -> Histogram:
            return Histogram(name, told, buckets=buckets, registry=registry if registered else None)

        self._job = Histogram(
            "node_manager_job_duration_seconds",
            "Time that jobs of this manager ran, by action and by the state in which they ended.",
            ["action", "state"],
            buckets=_JOBS,
            registry=registry,
        )
        self._selection = histogram(
            "node_manager_selection_duration_seconds", "Time to choose nodes for one deployment.", _QUICK
        )
        self._placement = histogram(
            "node_manager_placement_duration_seconds",
            "Time from a request to place deployments until they are reserved or refused, its wait for others included.",
            _WRITES,
        )
        self._allocation = histogram(
            "node_manager_allocation_duration_seconds",
            "Time to reserve resources on a given node, or to refuse it, the commit included.",
            _WRITES,
        )
        self._recording = histogram(
            "node_manager_recording_duration_seconds",
            "Time to take a batch of observations into the store, the commit included.",
            _WRITES,
        )
        self._observations = Counter(
            "node_manager_observations",
            "Observations handed in, by what became of them: recorded, late (something newer is known) or rejected.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("recorded", "late", "rejected"):
            self._observations.labels(outcome)
        self._stream_faults = Counter(
            "node_manager_stream_faults",
            "Attempts at nodes that say nothing about them, as the manager itself is in trouble.",
            registry=registry,
        )
        self._relay = histogram(
            "node_manager_relay_latency_seconds",
            "Time from an event's entry in the outbox until Kafka has acknowledged it.",
            _RELAY,
            kafka,
        )
        of_kafka = registry if kafka else None
        self._relayed = Counter(
            "node_manager_relay_events", "Events of the outbox that Kafka has acknowledged.", registry=of_kafka
        )
        self._dropped = Counter(
            "node_manager_relay_dropped_events",
            "Events that were given up before Kafka had them, as too many waited or one was too large for it.",
            registry=of_kafka,
        )
        self._kafka_up = Gauge(
            "node_manager_kafka_up",
            "Whether the Kafka brokers answer this manager; only the one that leads asks them.",
            registry=of_kafka,
        )
        self._commands = Counter(
            "node_manager_commands",
            "Commands taken from Kafka, by what became of them.",
            ["outcome"],
            registry=of_kafka,
        )
        for command in CommandOutcome:
            self._commands.labels(command.value)

    def observe_job(self, action: JobAction, state: JobState, seconds: float) -> None:
        """Take note of a job that ran here and ended."""
        self._job.labels(action.value, state.value).observe(seconds)

    def observe_selection(self, seconds: float) -> None:
        """Take note of a choice of nodes."""
        self._selection.observe(seconds)

    def observe_placement(self, seconds: float) -> None:
        """Take note of a call that placed deployments."""
        self._placement.observe(seconds)

    def observe_allocation(self, seconds: float) -> None:
        """Take note of a call that reserved on a given node."""
        self._allocation.observe(seconds)

    def observe_recording(self, seconds: float) -> None:
        """Take note of a batch of observations."""
        self._recording.observe(seconds)

    def count_observations(self, recorded: int, late: int, rejected: int) -> None:
        """Count what became of observations."""
        for outcome, count in (("recorded", recorded), ("late", late), ("rejected", rejected)):
            if count:
                self._observations.labels(outcome).inc(count)

    def count_stream_fault(self) -> None:
        """Count an attempt that was worthless."""
        self._stream_faults.inc()

    def observe_relay(self, seconds: float) -> None:
        """Take note of an event that Kafka has."""
        # Of a clock that was set back.
        self._relay.observe(max(0.0, seconds))

    def count_relayed(self, events: int) -> None:
        """Count events that Kafka has acknowledged."""
        self._relayed.inc(events)

    def count_dropped(self, events: int) -> None:
        """Count events that were given up."""
        self._dropped.inc(events)

    def set_kafka_up(self, up: bool) -> None:
        """Take note whether the brokers answer."""
        self._kafka_up.set(up)

    def count_command(self, outcome: CommandOutcome) -> None:
        """Count a command that was handled."""
        self._commands.labels(outcome.value).inc()
