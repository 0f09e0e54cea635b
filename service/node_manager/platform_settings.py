# SPDX-License-Identifier: GPL-3.0-or-later
"""The sections of config.json about what the manager tells the platform, and is told by it.

Must not import anything of the service but sections.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from node_manager.sections import FilePath, PositiveSeconds, Section

Broker = Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[^\s:/,]+):[0-9]{1,5}$")]


class KafkaSettings(Section):
    """Events to Kafka and commands from it; nothing of it runs while no broker is named."""

    bootstrap_servers: list[Broker] = Field(
        default_factory=list, max_length=100, description="Brokers to begin with, each as host:port; none: no Kafka"
    )
    topic_prefix: str = Field(
        "node-manager",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="What the names of all topics begin with; several managers of one store share it",
    )
    source: str = Field(
        "/node-manager", min_length=1, max_length=255, pattern=r"^\S+$", description="The `source` of our CloudEvents"
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="How the brokers are spoken to"
    )
    ca_file: FilePath | None = Field(None, description="Certificates to trust, PEM; without it the system's")
    certificate_file: FilePath | None = Field(None, description="The manager's own certificate, PEM")
    key_file: FilePath | None = Field(None, description="The key of that certificate, PEM")
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="How the manager proves who it is, with SASL"
    )
    sasl_username: str | None = Field(None, description="Who it is, with SASL")
    sasl_password_file: FilePath | None = Field(None, description="File with the password, with SASL")
    create_topics: bool = Field(True, description="Create the topics that are missing")
    partitions: int = Field(6, ge=1, le=10_000, description="Partitions of a topic that is created")
    replication_factor: int = Field(
        -1, ge=-1, le=32_767, description="Copies of a topic that is created; -1: what the brokers default to"
    )
    commands: bool = Field(True, description="Take commands from the topic <topic_prefix>.commands.v1")
    group_id: str = Field(
        "node-manager", min_length=1, max_length=249, description="Consumer group that all managers of a store share"
    )
    resources_interval_seconds: float = Field(
        60,
        ge=0,
        allow_inf_nan=False,
        description="Least time between two messages on a node's use of resources; 0: none",
    )
    alarm_pending_events: int = Field(
        10_000, ge=1, description="Events waiting for Kafka from which on the alarm is raised"
    )
    max_pending_events: int = Field(
        1_000_000, ge=1000, description="Events that may wait for Kafka; beyond it the oldest are given up"
    )

    @property
    def enabled(self) -> bool:
        """Tell whether Kafka is configured."""
        return bool(self.bootstrap_servers)

    @model_validator(mode="after")
    def _whole(self) -> KafkaSettings:
        if self.security_protocol.startswith("SASL") and (
            self.sasl_username is None or self.sasl_password_file is None
        ):
            raise ValueError("expected sasl_username and sasl_password_file with SASL")
        if self.alarm_pending_events > self.max_pending_events:
            raise ValueError("expected alarm_pending_events <= max_pending_events")
        return self


class EventStreamSettings(Section):
    """GET /events."""

    max_readers: int = Field(100, ge=1, le=10_000, description="Readers at once; further ones get 503")
    buffer_events: int = Field(
        1000, ge=10, le=100_000, description="Events that may wait for a slow reader before it is dropped"
    )
    keepalive_seconds: PositiveSeconds = Field(15, description="Pause after which an idle reader gets a comment")


class MetricsSettings(Section):
    """GET /metrics."""

    per_node: bool = Field(True, description="Whether there are gauges for each node")
    max_nodes: int = Field(1000, ge=0, description="In a larger fleet there are none for single nodes")


class TracingSettings(Section):
    """OpenTelemetry traces of requests; needs the `tracing` extra."""

    enabled: bool = Field(False, description="Send traces; where to is set by the OTEL_* variables")
