# SPDX-License-Identifier: GPL-3.0-or-later
"""The terms of the liveness core: the limits that it keeps to, and the actions that it asks for.

Imports the vocabulary and the settings only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from node_manager.domain import ContactReason, Evidence, Liveness
from node_manager.settings import HealthSettings, MonitoringSettings

NEVER: Final = math.inf
# All other reasons tell of a node that answers, or of the manager itself.
SILENT_REASONS: Final = frozenset(
    (
        ContactReason.CONNECTION_REFUSED,
        ContactReason.TIMED_OUT,
        ContactReason.NO_ROUTE,
        ContactReason.NAME_NOT_RESOLVED,
        ContactReason.CONNECTION_LOST,
    )
)
# Beats come late by what the network and a busy node take; 300 ms each way and a retransmission fit in.
_SLACK_SECONDS = 1.0
# Two retransmissions in a row over a slow link take 3 s, the third 7 s.
_LATE_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class LivenessLimits:
    """The numbers of the configuration that count here."""

    beat_interval_seconds: float = 5.0
    failures_before_unreachable: int = 3
    silence_before_unreachable_seconds: float = 10.0
    grace_seconds: float = 30.0
    autonomy_seconds: float = 3600.0
    reconnect_max_seconds: float = 60.0
    # From a stream's opening to its first word: an old board takes seconds to start Python.
    first_word_seconds: float = 15.0

    @classmethod
    def of(cls, monitoring: MonitoringSettings, health: HealthSettings) -> LivenessLimits:
        """Take them from the settings."""
        return cls(
            monitoring.beat_interval_seconds,
            health.failures_before_unreachable,
            health.silence_before_unreachable_seconds,
            health.grace_seconds,
            health.autonomy_seconds,
            monitoring.reconnect_max_seconds,
            monitoring.handshake_timeout_seconds,
        )

    @property
    def fresh_seconds(self) -> float:
        """How long after its last sign a node counts as heard."""
        return self.beat_interval_seconds + _SLACK_SECONDS

    @property
    def silence_seconds(self) -> float:
        """After how long without a sign a streaming node is suspect: a beat is 4 s late, or two frequent ones are missed."""
        interval = self.beat_interval_seconds
        return min(interval + _LATE_SECONDS, 2 * interval + _SLACK_SECONDS)


@dataclass(frozen=True, slots=True)
class Knock:
    """Look whether the SSH port answers, on a fresh connection."""


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Open the stream; nothing to do where that is under way."""


@dataclass(frozen=True, slots=True)
class CloseStream:
    """Close the stream; its end is no event any more."""


@dataclass(frozen=True, slots=True)
class AskPeers:
    """Have peers look; *attempt* numbers the times, so that other peers are chosen."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Conclude:
    """Record a verdict."""

    liveness: Liveness
    reason: ContactReason
    message: str
    evidence: Evidence | None = None
    frozen_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RecordFailure:
    """Record a failed contact: the node answers, yet no stream can be had."""

    reason: ContactReason
    message: str


Action = Knock | OpenStream | CloseStream | AskPeers | Conclude | RecordFailure
