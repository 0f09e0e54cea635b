# SPDX-License-Identifier: GPL-3.0-or-later
"""What the API takes in and gives out, beside the declarations and the shapes of observations.

Input models refuse unknown keys; output models have no defaults: what is promised is always there.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from node_manager.api.schemas_maintenance import MaintenanceOut
from node_manager.declarations import Connection, Location, NodeId
from node_manager.domain import Admin, Evidence, Health, JobAction, JobState, NodeResult, ObservationKind, Status
from node_manager.shapes import Application, ConditionShape, Facts, Report, Sample
from node_manager.status_input import text_only


def _runnable(value: Any) -> Any:
    if value == JobAction.RECOVER:
        raise ValueError("expected register, gather or check; POST /nodes/{node_id}/recover repairs a node")
    return value


class Input(BaseModel):
    """A body that somebody sends."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Output(BaseModel):
    """A body that the API answers with."""

    model_config = ConfigDict(frozen=True)


class NodeOut(Output):
    """A node: what was declared, and the verdict on it."""

    node_id: str = Field(examples=["gw-7"])
    name: str
    address: str = Field(examples=["192.0.2.7"])
    node_type: str | None
    node_type_source: str | None
    labels: dict[str, str]
    location: Location
    connection: Connection
    capacity: dict[str, int]
    declared_capacity: dict[str, int]
    admin: Admin
    health: Health
    status: Status
    schedulable: bool
    quarantined: bool
    last_contact_at: AwareDatetime | None
    generation: int
    created_at: AwareDatetime
    updated_at: AwareDatetime


class HostKeyOut(Output):
    """One pinned host key."""

    public_key: str
    origin: str


class NodeDetailOut(NodeOut):
    """A node with its conditions, facts, applications and host keys."""

    health_since: AwareDatetime
    health_cause: str
    conditions: list[ConditionShape]
    facts: Facts | None
    facts_observed_at: AwareDatetime | None
    facts_source: str | None
    facts_age_seconds: float | None
    applications_observed_at: AwareDatetime | None
    applications_source: str | None
    applications_age_seconds: float | None
    applications: list[Application]
    host_keys: list[HostKeyOut]
    epoch: int = Field(description="How often all work was taken from the node while it was lost, counted from 1")
    maintenance: MaintenanceOut | None = Field(
        description="How it stands with a drain or maintenance; null where none is"
    )


class NodePageOut(Output):
    """One page of nodes."""

    items: list[NodeOut]
    next_cursor: str | None


class TransitionOut(Output):
    """One change of a node's health."""

    from_: Health = Field(alias="from")
    to: Health
    cause: str
    source: str
    at: AwareDatetime


class HealthOut(Output):
    """The verdict on a node and the checks behind it."""

    node_id: str
    admin: Admin
    health: Health
    health_since: AwareDatetime
    health_cause: str
    status: Status
    schedulable: bool
    quarantined: bool
    failures: int
    last_contact_at: AwareDatetime | None
    last_attempt_at: AwareDatetime | None
    evidence: Evidence | None = Field(description="Of an unreachable node: what stands behind it")
    frozen_until: AwareDatetime | None = Field(description="Until then nothing is done about a site that is dark")
    probation_until: AwareDatetime | None = Field(description="Until then a node that came back gets half the traffic")
    flap_penalty: float = Field(description="What the node's losses weigh now; it decays")
    conditions: list[ConditionShape]
    transitions: list[TransitionOut] = Field(description="The last 10 changes of health, newest first")
    report: Report | None
    observed_at: AwareDatetime | None
    source: str | None
    age_seconds: float | None


class UtilizationNumbers(Output):
    """A sample in a handful of numbers."""

    cpu_percent: float | None
    memory_percent: float | None
    swap_percent: float | None
    disk_percent: float | None
    disk_fullest_mount: str | None
    load_1m: float | None
    cpu_pressure_avg60_percent: float | None
    received_bytes_per_second: float | None
    transmitted_bytes_per_second: float | None
    temperature_celsius: float | None
    containers_running: int | None


class MinuteOut(Output):
    """The samples of one minute together."""

    start: AwareDatetime
    samples: int
    cpu_percent_average: float | None
    cpu_percent_maximum: float | None
    memory_percent_average: float | None
    memory_percent_maximum: float | None
    disk_percent_maximum: float | None
    received_bytes_per_second_average: float | None
    transmitted_bytes_per_second_average: float | None


class UtilizationOut(Output):
    """The use of a node's resources."""

    node_id: str
    observed_at: AwareDatetime
    source: str
    age_seconds: float
    utilization: UtilizationNumbers
    sample: Sample
    history: list[MinuteOut] | None


class NodeFilterQuery(Input):
    """Which nodes somebody asks for."""

    status: Status | None = Field(None, description="Only of this status")
    health: Health | None = Field(None, description="Only of this health")
    type: str | None = Field(None, max_length=63, description="Only of this type")
    zone: str | None = Field(None, max_length=63, description="Only in this zone")
    site: str | None = Field(None, max_length=63, description="Only at this site")
    region: str | None = Field(None, max_length=63, description="Only in this region")
    label: list[str] = Field(
        default_factory=list, max_length=16, description="key=value, or key for any value; all must hold"
    )


class NodeQuery(NodeFilterQuery):
    """Which nodes to list. One model, checked in one go: this is the call that everybody polls."""

    limit: int = Field(100, ge=1, le=1000, description="Largest number of items")
    cursor: str | None = Field(None, max_length=512, description="next_cursor of the page before")


class EventOut(Output):
    """Something that happened to a node."""

    sequence: int
    event_id: str
    type: str
    node_id: str
    occurred_at: AwareDatetime
    data: dict[str, Any]


class EventPageOut(Output):
    """One page of events, newest first."""

    items: list[EventOut]
    next_cursor: str | None


class JobIn(Input):
    """Work to be run through Ansible on some nodes."""

    action: Annotated[JobAction, BeforeValidator(_runnable)] = Field(
        description="register, gather or check", examples=["check"]
    )
    node_ids: list[NodeId] = Field(min_length=1, max_length=1000, examples=[["gw-7"]])


class JobNodeOut(Output):
    """How a job went for one node."""

    node_id: str
    result: NodeResult | None
    message: str | None


class JobOut(Output):
    """A job."""

    job_id: str
    action: JobAction
    state: JobState
    requested_by: str
    variables: dict[str, Any]
    message: str | None
    created_at: AwareDatetime
    started_at: AwareDatetime | None
    ended_at: AwareDatetime | None
    nodes: list[JobNodeOut]


class JobPageOut(Output):
    """One page of jobs, newest first."""

    items: list[JobOut]
    next_cursor: str | None


class ObservationIn(Input):
    """One thing seen on one node; docs/observations.md has the data of each kind."""

    node_id: str = Field(max_length=253, examples=["gw-7"])
    observed_at: Annotated[AwareDatetime, BeforeValidator(text_only)]
    source: str = Field(min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9:._-]*$", examples=["ansible"])
    kind: ObservationKind
    data: dict[str, Any] = Field(
        examples=[{"reached": False, "reason": "ConnectionRefused", "message": "port 22: Connection refused"}]
    )


class ObservationsIn(Input):
    """A batch of observations, taken in one transaction."""

    observations: list[ObservationIn] = Field(min_length=1, max_length=2000)


class RejectionOut(Output):
    """One observation that was not taken."""

    index: int
    node_id: str
    code: str
    message: str


class OutcomeOut(Output):
    """What became of a batch."""

    recorded: int
    late: int
    rejected: list[RejectionOut]
