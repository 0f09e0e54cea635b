# SPDX-License-Identifier: GPL-3.0-or-later
"""The node types of node_types.json: how a type is recognised, what is reserved on it, what is checked.

Models only; imports the rules of health checks, so that what passes here also passes on the node.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from node_manager.domain import ConditionType, RecoveryStep, parse_check

TYPE_NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"


def _check_pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"expected a regular expression: {error}") from None
    return value


def _check_condition(value: str) -> str:
    known = [condition.value for condition in ConditionType]
    if value not in known:
        raise ValueError(f"expected a condition, one of {', '.join(known)}")
    return value


StepName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
Ladders = dict[
    Annotated[str, Field(pattern=r"^[A-Z][A-Za-z]+$"), AfterValidator(_check_condition)],
    Annotated[list[StepName], Field(max_length=20)],
]


_STEPS: dict[ConditionType, tuple[RecoveryStep, ...]] = {
    ConditionType.REACHABLE: (RecoveryStep.POWER_CYCLE, RecoveryStep.GIVE_UP),
    ConditionType.CHECKS_PASSING: (
        RecoveryStep.RESTART_SERVICE,
        RecoveryStep.RESTART_CONTAINER_RUNTIME,
        RecoveryStep.RESTART_CONTAINER,
        RecoveryStep.GIVE_UP,
    ),
    ConditionType.DISK_SPACE_SUFFICIENT: (RecoveryStep.FREE_DISK, RecoveryStep.GIVE_UP),
    ConditionType.INODES_SUFFICIENT: (RecoveryStep.FREE_DISK, RecoveryStep.GIVE_UP),
    ConditionType.CLOCK_SYNCHRONISED: (RecoveryStep.RENEW_CLOCK, RecoveryStep.GIVE_UP),
    ConditionType.ROOT_WRITABLE: (RecoveryStep.REMOUNT_ROOT, RecoveryStep.REBOOT, RecoveryStep.GIVE_UP),
}
DEFAULT_LADDERS: Ladders = {condition.value: [step.value for step in steps] for condition, steps in _STEPS.items()}


Edge = Annotated[float, Field(allow_inf_nan=False)]
Pattern = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_check_pattern)]


class Part(BaseModel):
    """One part of node_types.json: closed, frozen, and no guessing: "22" is not a port."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Limit(Part):
    """The edges of one threshold; either may be left out."""

    warning: Edge | None = Field(None, description="From this value on the node is degraded but schedulable")
    critical: Edge | None = Field(None, description="From this value on the node is not schedulable")
    clear: Edge | None = Field(
        None, description="Below this value it is over again; 10 % below the lowest edge where left out"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Limit:
        if self.warning is not None and self.critical is not None and self.warning > self.critical:
            raise ValueError("expected warning <= critical")
        lowest = self.critical if self.warning is None else self.warning
        if self.clear is not None and lowest is not None and self.clear > lowest:
            raise ValueError(f"expected clear <= {'critical' if self.warning is None else 'warning'}")
        return self


class Thresholds(Part):
    """Limits by what they watch."""

    cpu_percent: Limit = Field(Limit(), description="Use of all CPUs together")
    memory_percent: Limit = Field(Limit(), description="Memory that is not available")
    swap_percent: Limit = Field(Limit(), description="Swap in use")
    disk_percent: Limit = Field(Limit(), description="Space used, per filesystem")
    inodes_percent: Limit = Field(Limit(), description="Inodes used, per filesystem")
    temperature_celsius: Limit = Field(Limit(), description="Hottest sensor")
    load_per_cpu: Limit = Field(Limit(), description="Load average of five minutes divided by the number of CPUs")

    def as_limits(self) -> dict[str, dict[str, float]]:
        """Give only the limits that are set, as node_health takes them."""
        dumped: dict[str, dict[str, float]] = self.model_dump(
            exclude_none=True, exclude={name: {"clear"} for name in type(self).model_fields}
        )
        return {name: limit for name, limit in dumped.items() if limit}


class RecognisedBy(Part):
    """What facts must hold for a node to be of a type; all given keys together."""

    priority: int = Field(0, description="The highest priority wins where several types fit")
    any_device: list[str] | None = Field(None, description="At least one device of one of these classes")
    architectures: list[str] | None = Field(None, description="One of these machine names (uname -m)")
    board_pattern: Pattern | None = Field(None, description="Regular expression found in 'vendor model'")
    cpu_count_min: int | None = Field(None, description="At least that many CPUs")
    cpu_count_max: int | None = Field(None, description="At most that many CPUs")
    memory_mib_min: int | None = Field(None, description="At least that much memory")
    memory_mib_max: int | None = Field(None, description="At most that much memory")
    virtualization: list[str] | None = Field(None, description="One of these kinds of virtualization")
    features: list[str] | None = Field(None, description="All of these features")


class Reserved(Part):
    """What is kept for the operating system and never allocated."""

    cpu_millicores: int = Field(0, ge=0, description="Thousandths of a CPU")
    memory_mib: int = Field(0, ge=0, description="Memory")
    disk_mib: int = Field(0, ge=0, description="Disk space on the root filesystem")
    network_mbps: int = Field(0, ge=0, description="Network rate")


class Overcommit(Part):
    """How far allocations may go beyond what is there."""

    cpu: float = Field(1.0, ge=1, le=16, description="Factor for CPU")
    memory: float = Field(1.0, ge=1, le=16, description="Factor for memory")
    disk: float = Field(1.0, ge=1, le=16, description="Factor for disk space")


class ContactWindow(Part):
    """A daily time span in which a sleeping node is expected to answer."""

    start: str = Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$", description="Start of the span, UTC, HH:MM")
    end: str = Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d$", description="End of the span, UTC, HH:MM")


class CheckBase(Part):
    """What every health check has."""

    name: str = Field(min_length=1, max_length=64, description="Unique within the type")
    severity: Literal["critical", "warning"] = Field("critical", description="How much a failure weighs")
    timeout_seconds: float = Field(3.0, ge=0.01, le=60, description="Limit of this check")

    @model_validator(mode="after")
    def _passes_on_the_node(self) -> CheckBase:
        parse_check(self.model_dump(exclude_none=True))
        return self


class TcpCheck(CheckBase):
    """A connection is accepted."""

    kind: Literal["tcp"]
    host: str = Field("127.0.0.1", description="Where to connect to, seen from the node")
    port: int = Field(ge=1, le=65535, description="TCP port")


class HttpCheck(CheckBase):
    """A URL answers as expected."""

    kind: Literal["http"]
    url: str = Field(pattern=r"^https?://", description="http:// or https://, seen from the node")
    expect_status: list[Annotated[int, Field(ge=100, le=599)]] = Field(
        [200], min_length=1, description="Status codes that pass"
    )
    expect_text: str | None = Field(None, description="Text that must occur in the first 64 KiB")
    verify_tls: bool = Field(True, description="Refuse certificates that can't be verified")


class DnsCheck(CheckBase):
    """A name resolves."""

    kind: Literal["dns"]
    hostname: str = Field(min_length=1, description="Name to resolve on the node")


class ServiceCheck(CheckBase):
    """A systemd unit is active."""

    kind: Literal["service"]
    unit: str = Field(
        pattern=r"^[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]*$", description="Unit name, for example docker.service"
    )


class ProcessCheck(CheckBase):
    """A process of that name runs."""

    kind: Literal["process"]
    process: str = Field(min_length=1, description="Command name")


class ContainerCheck(CheckBase):
    """A container runs and is not unhealthy."""

    kind: Literal["container"]
    container: str = Field(min_length=1, description="Container name")


class PortCheck(CheckBase):
    """Something listens on a port."""

    kind: Literal["port"]
    port: int = Field(ge=1, le=65535, description="Port")
    protocol: Literal["tcp", "udp"] = Field("tcp", description="Transport protocol")


class FilesystemCheck(CheckBase):
    """A filesystem is writable and neither its space nor its inodes are used up."""

    kind: Literal["filesystem"]
    mount: str = Field(pattern=r"^/", description="Mount point")
    space_percent: float = Field(95, gt=0, le=100, description="Fails from this use of space on")
    inodes_percent: float = Field(95, gt=0, le=100, description="Fails from this use of inodes on")


class CertificateCheck(CheckBase):
    """A certificate stays valid for some days."""

    kind: Literal["certificate"]
    path: str | None = Field(None, pattern=r"^/", description="PEM file on the node")
    host: str | None = Field(None, description="Or the TLS server to ask")
    port: int | None = Field(None, ge=1, le=65535, description="Its port")
    server_name: str | None = Field(None, description="Name to ask it for, where it differs from host")
    days: float = Field(14, ge=0, description="Fails with fewer days left")

    @model_validator(mode="after")
    def _one_source(self) -> CertificateCheck:
        if (self.path is None) == (self.host is None or self.port is None):
            raise ValueError("expected either path, or host and port")
        return self


class ClockCheck(CheckBase):
    """The clock is synchronised."""

    kind: Literal["clock"]
    max_offset_seconds: float = Field(1.0, gt=0, description="Largest offset that passes")


class CommandCheck(CheckBase):
    """A command exits with 0. Only this file can define commands; the API can't."""

    kind: Literal["command"]
    argv: list[str] = Field(min_length=1, max_length=100, description="Program and arguments; no shell is involved")


Check = Annotated[
    TcpCheck
    | HttpCheck
    | DnsCheck
    | ServiceCheck
    | ProcessCheck
    | ContainerCheck
    | PortCheck
    | FilesystemCheck
    | CertificateCheck
    | ClockCheck
    | CommandCheck,
    Field(discriminator="kind"),
]


class NodeType(Part):
    """One type of node."""

    description: str = Field(min_length=1, description="For people: what nodes of this type are")
    recognised_by: RecognisedBy | None = Field(None, description="How facts tell the type; left out: only declared")
    reserved: Reserved = Field(default_factory=Reserved, description=Reserved.__doc__)
    overcommit: Overcommit = Field(default_factory=Overcommit, description=Overcommit.__doc__)
    resources: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")], Annotated[int, Field(ge=0, le=2**53)]] = (
        Field(
            default_factory=dict,
            max_length=32,
            description="Resources that each node of the type has where its facts don't tell, such as two cameras",
        )
    )
    thresholds: Thresholds = Field(default_factory=Thresholds, description="Limits that differ from config.json")
    root_read_only: bool = Field(
        False, description="The root filesystem is meant to be read-only, as on an image: no condition RootWritable"
    )
    checks: list[Check] = Field(default_factory=list, description="Health checks run on each node of the type")
    ladders: Ladders = Field(
        default_factory=dict,
        description="Steps of recovery that differ from config.json, by condition; an empty list: nothing is done",
    )
    contact_windows: list[ContactWindow] = Field(
        default_factory=list, description="When nodes that sleep on purpose are awake; empty: always"
    )

    @model_validator(mode="after")
    def _check_names_are_unique(self) -> NodeType:
        names = [check.name for check in self.checks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"expected unique check names, {', '.join(repeated)} occurs twice")
        return self

    def checks_as_data(self) -> list[dict[str, Any]]:
        """Give the checks as node_health takes them."""
        return [check.model_dump(exclude_none=True) for check in self.checks]


class NodeTypes(Part):
    """All of node_types.json."""

    schema_: str | None = Field(None, alias="$schema", description="Where editors find the JSON Schema of this file")
    node_types: dict[Annotated[str, Field(pattern=TYPE_NAME_PATTERN)], NodeType] = Field(
        description="The types by name (lower case letters, digits, hyphens)"
    )
