# SPDX-License-Identifier: GPL-3.0-or-later
"""The shapes of what is seen on a node, as docs/observations.md gives them.

Nodes are hostile: what doesn't fit here never reaches the store. Unknown keys are dropped, so that a newer probe still
talks to an older manager. Imports the vocabulary only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from node_manager.domain import CheckState, ContactReason, Evidence, Liveness, Severity

Text = Annotated[str, Field(max_length=4096)]
Name = Annotated[str, Field(max_length=255)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Integer = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class Shape(BaseModel):
    """One part of an observation."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class CollectorError(Shape):
    """What one part of the probe could not tell."""

    collector: Name
    message: Text


class OperatingSystem(Shape):
    """What os-release says."""

    id: Name | None
    version: Name | None
    name: Name | None


class Board(Shape):
    """What the firmware or the device tree says."""

    vendor: Name | None
    model: Name | None


class CpuFacts(Shape):
    """The processors."""

    count: Annotated[int, Field(ge=1, le=65536)] | None
    model: Name | None


class Device(Shape):
    """One accelerator, camera or port."""

    id: Name
    model: Name | None = None
    memory_bytes: Count | None = None


class ContainerRuntime(Shape):
    """The container engine."""

    name: Name
    version: Name | None
    socket: Text | None


class Facts(Shape):
    """What a node is."""

    schema_: Literal[1] = Field(alias="schema")
    hostname: Name | None
    machine_id: Name | None
    boot_id: Name | None
    os: OperatingSystem
    kernel: Name | None
    architecture: Name | None
    board: Board
    virtualization: Name | None
    python_version: Name | None
    service_manager: Name | None
    cpu: CpuFacts
    memory_total_bytes: Count | None
    disk_total_bytes: Count | None
    network_mbps: Count | None
    devices: Annotated[dict[Name, Annotated[list[Device], Field(max_length=256)]], Field(max_length=64)]
    container_runtime: ContainerRuntime | None
    features: Annotated[list[Name], Field(max_length=256)]
    addresses: Annotated[list[Name], Field(max_length=256)]
    ssh_host_keys: Annotated[list[Text], Field(max_length=16)]
    errors: Annotated[list[CollectorError], Field(max_length=64)]


class Pressure(Shape):
    """Share of time that work waited for a resource (PSI)."""

    some_avg10_percent: Percent | None = None
    some_avg60_percent: Percent | None = None
    some_avg300_percent: Percent | None = None
    full_avg10_percent: Percent | None = None
    full_avg60_percent: Percent | None = None
    full_avg300_percent: Percent | None = None


class CpuSample(Shape):
    """Use of the processors over the interval."""

    count: Annotated[int, Field(ge=1, le=65536)]
    use_percent: Percent | None
    user_percent: Percent | None
    system_percent: Percent | None
    iowait_percent: Percent | None
    steal_percent: Percent | None
    load_1m: Number | None
    load_5m: Number | None
    load_15m: Number | None
    pressure: Pressure | None


class MemorySample(Shape):
    """Use of memory and swap."""

    total_bytes: Count
    available_bytes: Count
    use_percent: Percent
    swap_total_bytes: Count | None
    swap_free_bytes: Count | None
    swap_use_percent: Percent | None
    oom_kills: Count | None = None
    pressure: Pressure | None


class ClockSample(Shape):
    """What the kernel says of its clock."""

    synchronised: bool | None
    estimated_error_seconds: Number | None


class ServicesSample(Shape):
    """Services that have failed or had to be restarted."""

    failed: Annotated[list[Name], Field(max_length=1024)]
    restarts: Annotated[dict[Name, Count], Field(max_length=1024)]


class IoSample(Shape):
    """Waiting for disks."""

    pressure: Pressure | None


class FilesystemSample(Shape):
    """Use of one filesystem."""

    mount: Text
    device: Text | None
    type: Name | None
    read_only: bool
    total_bytes: Count
    available_bytes: Count
    use_percent: Percent
    inodes_total: Count | None
    inodes_free: Count | None
    inodes_use_percent: Percent | None


class InterfaceSample(Shape):
    """Traffic of one network interface."""

    interface: Name
    up: bool | None
    speed_mbps: Count | None
    received_bytes: Count
    transmitted_bytes: Count
    received_errors: Count | None
    transmitted_errors: Count | None
    received_bytes_per_second: Number | None
    transmitted_bytes_per_second: Number | None


class ContainerSample(Shape):
    """One container."""

    id: Name
    name: Name
    image: Text | None
    state: Name
    health: Name | None
    restarts: Count | None
    started_at: Name | None
    exit_code: Integer | None
    labels: Annotated[dict[Text, Text], Field(max_length=256)]
    cpu_percent: Number | None
    memory_bytes: Count | None
    memory_limit_bytes: Count | None


class ContainersSample(Shape):
    """All containers, or why there are none."""

    runtime: Name | None
    version: Name | None
    message: Text | None
    items: Annotated[list[ContainerSample], Field(max_length=4096)]


class Throttling(Shape):
    """What a board says of its power and heat."""

    undervoltage: bool | None
    frequency_capped: bool | None
    throttled: bool | None
    soft_temperature_limit: bool | None
    undervoltage_since_boot: bool | None
    throttled_since_boot: bool | None


class ThermalSample(Shape):
    """Heat."""

    temperature_celsius: Number | None
    throttled: Throttling | None


class Sample(Shape):
    """One reading of a node's resources."""

    schema_: Literal[1] = Field(alias="schema")
    boot_id: Name | None
    uptime_seconds: Number | None
    clock_unix_seconds: Number | None
    clock: ClockSample | None = None
    interval_seconds: Number | None
    cpu: CpuSample | None
    memory: MemorySample | None
    io: IoSample | None
    filesystems: Annotated[list[FilesystemSample], Field(max_length=1024)] | None
    network: Annotated[list[InterfaceSample], Field(max_length=1024)] | None
    containers: ContainersSample | None
    thermal: ThermalSample | None
    services: ServicesSample | None = None
    root_read_only: bool | None
    errors: Annotated[list[CollectorError], Field(max_length=64)]


class CheckResult(Shape):
    """The outcome of one health check."""

    name: Name
    kind: Name
    severity: Severity
    state: CheckState
    message: Text
    latency_seconds: Number | None
    value: Number | None
    unit: Name | None


class Report(Shape):
    """One run of a node's health checks."""

    schema_: Literal[1] = Field(alias="schema")
    duration_seconds: Number
    checks: Annotated[list[CheckResult], Field(max_length=1024)]


class Contact(Shape):
    """One attempt to reach a node."""

    reached: bool
    reason: ContactReason
    message: Text

    @model_validator(mode="after")
    def _reason_tells_of_failure(self) -> Contact:
        if self.reached != (self.reason is ContactReason.OK):
            raise ValueError("expected reason Ok where reached is true, and another where it is false")
        return self


class Application(Shape):
    """One application deployed on a node, as its containers show it."""

    name: Name
    deployment_id: Name | None
    containers: list[Name]
    running: int


class ConditionShape(Shape):
    """One thing that can be said about a node; status true is good."""

    type: Name
    status: bool
    reason: Name
    message: Text
    since: AwareDatetime
    severity: Severity


class Verdict(Shape):
    """What the manager itself concludes from a node's silence."""

    liveness: Liveness
    reason: ContactReason
    message: Text
    # Of an unreachable node: what stands behind it, and until when nothing is done about a site that is dark.
    evidence: Evidence | None = None
    frozen_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
