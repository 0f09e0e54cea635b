# SPDX-License-Identifier: GPL-3.0-or-later
"""The contracts of what is told of single nodes: their life cycle, their drains, their health, their state and use.

Each holds the data of one type of event, as the part of the service that writes it does. Imports words and models only.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from node_manager.domain import Admin, Evidence, Health, Severity, Status
from node_manager.event_contracts_parts import (
    AllocationRef,
    Blocker,
    Contract,
    Ghost,
    HeldAllocation,
    NodeRef,
    Replacement,
    Time,
    Workload,
    example,
)

_DECLARED = {
    "node_id": "gw-7",
    "name": "Gateway hall 7",
    "address": "192.0.2.7",
    "node_type": "edge-gateway",
    "labels": {"line": "a"},
    "region": "eu",
    "zone": "eu-1a",
    "site": "plant-2",
    "latitude": 48.2,
    "longitude": 16.37,
    "capacity": {"disk_mib": 20000},
    "admin": "active",
}
_DRAIN = {
    "reason": "new disk",
    "requested_by": "alice",
    "then": "maintenance",
    "deadline_at": "2026-11-22T19:00:00.000000Z",
    "until": None,
}
_REPLACEMENT = {
    "allocation_id": "web-1:0",
    "owner": "team-a",
    "deployment_id": "web-1",
    "resources": {"cpu_millicores": 500, "memory_mib": 256},
    "to_node": "gw-8",
    "why": "the best of 12 that would do, score 71.4",
}
_BLOCKER = {
    "kind": "workload",
    "allocation_id": "web-1:0",
    "container": "web",
    "deployment_id": "web-1",
    "owner": "team-a",
    "since": "2026-11-22T17:30:00.000000Z",
    "message": "container web still runs",
}
_LEFT_OUT = "How many more there are that the list has no room for"


class Declared(Contract):
    """What was declared about a node, less how it is reached."""

    node_id: NodeRef
    name: str = Field(description="For people; the id where none was declared")
    address: str = Field(description="IP address or host name", examples=["192.0.2.7"])
    node_type: str | None = Field(description="Its type; null: left to be recognised from facts")
    labels: dict[str, str] = Field(description="Free key-value pairs")
    region: str | None = Field(description="Largest unit of place")
    zone: str | None = Field(description="Failure domain within the region")
    site: str | None = Field(description="Building or plant: nodes that fail together")
    latitude: float | None = Field(description="Degrees north")
    longitude: float | None = Field(description="Degrees east")
    capacity: dict[str, int] = Field(description="What replaces the observed capacity, per resource class")
    admin: Admin = Field(description="Whether it takes part")


class NodeRegistered(Contract):
    """A node was registered."""

    model_config = example(node=_DECLARED, generation=1)

    node: Declared = Field(description="What was declared")
    generation: int = Field(description="Counts the changes of the declaration; 1 at first")


class NodeUpdated(Contract):
    """A node was declared anew; what is left out of the declaration is gone."""

    model_config = example(node={**_DECLARED, "labels": {"line": "b"}}, generation=2)

    node: Declared = Field(description="All that is declared now")
    generation: int = Field(description="Counts the changes of the declaration")


class NodeDeregistered(Contract):
    """A node was removed, with all that was seen on it."""

    model_config = example(forced=True, dropped_allocations=["web-1:0"])

    forced: bool = Field(description="Whether it was to go with whatever it held")
    dropped_allocations: list[str] = Field(description="The allocations that it held, which were released")


class NodeAdminChanged(Contract):
    """Whether a node takes part has changed, by an operator's word or at the end of a drain, maintenance or repair."""

    model_config = example(**{"from": "active", "to": "draining", "reason": "new disk"})

    from_: Admin = Field(alias="from", description="What it was")
    to: Admin = Field(description="What it is")
    reason: str = Field(description="Why, for people; may be empty")


class HostKeysPinned(Contract):
    """A node is trusted by other SSH host keys from now on, or by the next one that it shows."""

    model_config = example(origin="first_use", host_keys=["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExampleExampleExample"])

    origin: Literal["given", "first_use"] | None = Field(
        description="given: by an operator; first_use: the first that it showed; null: the keys were forgotten"
    )
    host_keys: list[str] = Field(description="The public keys; empty: the next that it shows is pinned")


class _Drain(Contract):
    reason: str = Field(description="Why, for people; may be empty")
    requested_by: str = Field(description="Who asked for it; empty where it was declared with the node")
    then: Admin = Field(description="What the node becomes when it is empty: maintenance or cordoned")
    deadline_at: Time | None = Field(description="When the drain ends whatever is still there; null: it waits")
    until: Time | None = Field(description="When the maintenance ends by itself; null: by an operator")


class DrainStarted(_Drain):
    """A node is to be emptied: owners are asked to move what they have there."""

    model_config = example(
        **_DRAIN,
        allocations=[{"allocation_id": "web-1:0", "owner": "team-a", "deployment_id": "web-1"}],
        deployments=["web-1"],
        workloads=[{"container": "web", "allocation_id": "web-1:0", "deployment_id": "web-1", "owner": "team-a"}],
        replacements=[_REPLACEMENT],
    )

    allocations: list[HeldAllocation] = Field(description="What is reserved there")
    deployments: list[str] = Field(description="The deployments that have something there")
    workloads: list[Workload] = Field(description="The managed containers that run there")
    replacements: list[Replacement] = Field(description="Where the allocations could go")


class DrainProgressed(_Drain):
    """What is in the way of a drain, or where it could go, has changed."""

    model_config = example(**_DRAIN, blockers=[_BLOCKER], replacements=[_REPLACEMENT])

    blockers: list[Blocker] = Field(
        description="What is still there; empty: a drain that had missed its deadline is done"
    )
    replacements: list[Replacement] = Field(description="Where the allocations could go")


class DrainEnded(_Drain):
    """A drain is over."""

    model_config = example(**_DRAIN, outcome="drained", ended_by=None, message=None, blockers=[])

    outcome: Literal["drained", "deadline", "cancelled", "skipped"] = Field(
        description="drained: the node is empty; deadline: its time was over; cancelled: the node takes part again or goes "
        "offline; skipped: maintenance began without it"
    )
    ended_by: str | None = Field(description="Who ended it; null: the manager")
    message: str | None = Field(description="Why, for people, where that isn't clear from the outcome")
    blockers: list[Blocker] = Field(description="What is still there")


class HealthChanged(Contract):
    """The verdict on a node's health has changed."""

    model_config = example(
        **{"from": "suspect", "to": "unreachable", "cause": "TimedOut: no sign of life for 12 s", "source": "manager"}
    )

    from_: Health = Field(alias="from", description="What it was")
    to: Health = Field(description="What it is")
    cause: str = Field(description="Why, for people")
    source: str = Field(description="Who saw what led to it", examples=["ansible"])


class NodeLost(Contract):
    """A node is lost: what ran there should be started elsewhere.

    Its allocations stay until `reclaim_at`; a node that is back before that keeps them.
    """

    model_config = example(
        lost_at="2026-11-22T18:00:00Z",
        reclaim_at="2026-11-22T18:10:00Z",
        evidence="peers_blind",
        cause="TimedOut: no sign of life for 12 s",
        epoch=1,
        allocations=1,
        deployments=["web-1"],
        replacements=[_REPLACEMENT],
        left_out=0,
    )

    lost_at: Time = Field(description="When it was given up")
    reclaim_at: Time = Field(description="When its allocations are taken from it unless it is back")
    evidence: Evidence | None = Field(
        description="peers_blind: its neighbours don't see it either; site_dark: its whole site is silent; nobody_to_ask: "
        "it has no neighbours; null: not known"
    )
    cause: str = Field(description="Why it is unreachable, for people")
    epoch: int | None = Field(description="How often all work was taken from it, counted from 1; null: not known")
    allocations: int = Field(description="How many allocations it holds")
    deployments: list[str] = Field(description="The deployments that have something there")
    replacements: list[Replacement] = Field(description="Where the allocations could go, the first 500")
    left_out: int = Field(description=_LEFT_OUT)


class NodeReclaimed(Contract):
    """All allocations were taken from a lost node; what it still runs when it is back are ghosts."""

    model_config = example(
        lost_at="2026-11-22T18:00:00Z", epoch=2, allocations=1, released=["web-1:0"], deployments=["web-1"]
    )

    lost_at: Time = Field(description="When it was given up")
    epoch: int | None = Field(
        description="How often all work was taken from it, counted from 1, this time included: a fence for its work"
    )
    allocations: int = Field(description="How many allocations were released")
    released: list[AllocationRef] = Field(description="Which, the first 500")
    deployments: list[str] = Field(description="The deployments that had something there")


class GhostsFound(Contract):
    """Containers run on a node that holds no allocation for them: they should be stopped there."""

    model_config = example(
        epoch=2,
        containers=[{"container": "web", "allocation_id": "web-1:0", "deployment_id": "web-1", "owner_node": "gw-8"}],
        left_out=0,
    )

    epoch: int | None = Field(description="How often all work was taken from the node, counted from 1; null: not known")
    containers: list[Ghost] = Field(description="All of them there are now, the first 100")
    left_out: int = Field(description=_LEFT_OUT)


class LocationNow(Contract):
    """Where a node stands."""

    region: str | None = Field(description="Largest unit of place")
    zone: str | None = Field(description="Failure domain within the region")
    site: str | None = Field(description="Building or plant: nodes that fail together")
    latitude: float | None = Field(description="Degrees north")
    longitude: float | None = Field(description="Degrees east")


class ConnectionNow(Contract):
    """How a node is reached."""

    kind: Literal["ssh", "local"] = Field(description="local is the manager's own machine")
    user: str | None = Field(description="Login name")
    port: int | None = Field(description="SSH port")
    become: bool = Field(description="Whether sudo is used for what needs root")
    credential: str | None = Field(description="Name of a credential in the manager's configuration")
    jump_host: str | None = Field(description="The node to connect through")


class ConditionNow(Contract):
    """One thing that can be said about a node."""

    type: str = Field(description="What it is about; new types may come", examples=["DiskSpaceSufficient"])
    status: bool = Field(description="true is good")
    reason: str = Field(description="Why, in one word", examples=["Ok"])
    message: str = Field(description="Why, for people; may be empty")
    since: Time = Field(description="Since when it is so")
    severity: Severity = Field(description="A critical one that is false keeps work off the node, a warning does not")


class NodeState(Contract):
    """All that is to be known of a node to work with it, as of `ce_time`: of several the newest counts."""

    model_config = example(
        node_id="gw-7",
        name="Gateway hall 7",
        address="192.0.2.7",
        node_type="edge-gateway",
        node_type_source="declared",
        labels={"line": "a"},
        location={"region": "eu", "zone": "eu-1a", "site": "plant-2", "latitude": None, "longitude": None},
        connection={
            "kind": "ssh",
            "user": "manager",
            "port": None,
            "become": True,
            "credential": None,
            "jump_host": None,
        },
        capacity={"cpu_millicores": 4000, "memory_mib": 3792, "disk_mib": 20000},
        declared_capacity={"disk_mib": 20000},
        admin="active",
        health="healthy",
        status="online",
        schedulable=True,
        quarantined=False,
        generation=2,
        created_at="2026-11-22T17:00:00.000000Z",
        updated_at="2026-11-22T17:30:00.000000Z",
        health_since="2026-11-22T17:01:00.000000Z",
        conditions=[
            {
                "type": "Reachable",
                "status": True,
                "reason": "Ok",
                "message": "",
                "since": "2026-11-22T17:01:00.000000Z",
                "severity": "critical",
            }
        ],
    )

    node_id: NodeRef
    name: str = Field(description="For people; the id where none was declared")
    address: str = Field(description="IP address or host name", examples=["192.0.2.7"])
    node_type: str | None = Field(description="Its type, declared or recognised; null: not known")
    node_type_source: Literal["declared", "recognised"] | None = Field(description="Where its type is known from")
    labels: dict[str, str] = Field(description="Free key-value pairs")
    location: LocationNow
    connection: ConnectionNow
    capacity: dict[str, int] = Field(description="What it has, per resource class")
    declared_capacity: dict[str, int] = Field(description="What of it was declared")
    admin: Admin = Field(description="What an operator says about it")
    health: Health = Field(description="What the manager concludes about it")
    status: Status = Field(description="Both in one word")
    schedulable: bool = Field(description="Whether new work may be placed on it")
    quarantined: bool = Field(description="Whether it showed another host key than the pinned ones")
    generation: int = Field(description="Counts the changes of the declaration")
    created_at: Time = Field(description="When it was registered")
    updated_at: Time = Field(description="When it was last declared anew or given another admin")
    health_since: Time = Field(description="Since when it has this health")
    conditions: list[ConditionNow] = Field(description="What can be said about it beside its health")


class ResourcesSampled(Contract):
    """How much of a node's resources is used; some may be left out, the newest one counts."""

    model_config = example(
        observed_at="2026-11-22T18:00:00.000000Z",
        source="stream",
        cpu_percent=12.5,
        memory_percent=48.1,
        swap_percent=0.0,
        disk_percent=61.0,
        disk_fullest_mount="/",
        load_1m=0.42,
        cpu_pressure_avg60_percent=None,
        received_bytes_per_second=1840.0,
        transmitted_bytes_per_second=920.5,
        temperature_celsius=51.0,
        containers_running=3,
    )

    observed_at: Time = Field(description="When it was seen, by the node's own news")
    source: str = Field(description="Who saw it", examples=["stream", "ansible"])
    cpu_percent: float | None = Field(description="Of all processors")
    memory_percent: float | None = Field(description="Of the memory")
    swap_percent: float | None = Field(description="Of the swap space")
    disk_percent: float | None = Field(description="Of the fullest writable file system")
    disk_fullest_mount: str | None = Field(description="Where that is mounted")
    load_1m: float | None = Field(description="Average load of a minute")
    cpu_pressure_avg60_percent: float | None = Field(
        description="Share of a minute in which some work waited for a processor"
    )
    received_bytes_per_second: float | None = Field(description="Over all interfaces")
    transmitted_bytes_per_second: float | None = Field(description="Over all interfaces")
    temperature_celsius: float | None = Field(description="Of the hottest sensor")
    containers_running: int | None = Field(description="Containers that run; null: there is no container runtime")
