# SPDX-License-Identifier: GPL-3.0-or-later
"""What the parts tell of how long their work took and of what went wrong in it, for whoever measures.

Here is who doesn't, which costs a call that does nothing; metric_timings has who does. Must not import anything of the service
but the vocabulary, nor what metrics are made with.
"""

from __future__ import annotations

from enum import StrEnum

from node_manager.domain import JobAction, JobState


class CommandOutcome(StrEnum):
    """What became of a command from Kafka."""

    DONE = "done"
    FAILED = "failed"
    # It came before: the answer of then stands.
    REPEATED = "repeated"
    DEAD_LETTER = "dead_letter"


class Timings:
    """Hears what the parts tell, and makes nothing of it. Safe from any thread; never raises."""

    def observe_job(self, action: JobAction, state: JobState, seconds: float) -> None:
        """Take note of a job that ran here and ended."""

    def observe_selection(self, seconds: float) -> None:
        """Take note of a choice of nodes for one deployment, or of finding that nothing fits."""

    def observe_placement(self, seconds: float) -> None:
        """Take note of a call that placed deployments, from its arrival to its answer."""

    def observe_allocation(self, seconds: float) -> None:
        """Take note of a call that reserved on a given node, whatever its outcome."""

    def observe_recording(self, seconds: float) -> None:
        """Take note of a batch of observations that is in the store."""

    def count_observations(self, recorded: int, late: int, rejected: int) -> None:
        """Count what became of the observations of a batch."""

    def count_stream_fault(self) -> None:
        """Count an attempt at a node that was worthless because the manager itself is in trouble."""

    def observe_relay(self, seconds: float) -> None:
        """Take note of an event that Kafka has: the time since it was written to the outbox."""

    def count_relayed(self, events: int) -> None:
        """Count events that Kafka has acknowledged."""

    def count_dropped(self, events: int) -> None:
        """Count events that were given up before Kafka had them."""

    def set_kafka_up(self, up: bool) -> None:
        """Take note whether the brokers answer."""

    def count_command(self, outcome: CommandOutcome) -> None:
        """Count a command from Kafka that was handled."""


NO_TIMINGS = Timings()
