# SPDX-License-Identifier: GPL-3.0-or-later
"""What the data of each event are: one contract per type, for those who receive them.

Here are those of work, repair and commands, and the tables of all. event_documents.py writes the published schemas from these,
and the tests hold all that the service writes to them. Imports words and models only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, Field

from node_manager.domain import GuardState, RecoveryState, StepState
from node_manager.event_contracts_nodes import (
    DrainEnded,
    DrainProgressed,
    DrainStarted,
    GhostsFound,
    HealthChanged,
    HostKeysPinned,
    NodeAdminChanged,
    NodeDeregistered,
    NodeLost,
    NodeReclaimed,
    NodeRegistered,
    NodeState,
    NodeUpdated,
    ResourcesSampled,
)
from node_manager.event_contracts_parts import AllocationRef, Amounts, Contract, DeploymentRef, OwnerRef, example
from node_manager.events import EventType

# Not of the outbox: made from the state there is when they are sent.
STATE_SNAPSHOT = "node.state.snapshot"
RESOURCES_SAMPLED = "node.resources.sampled"

_ALLOCATION = {"allocation_id": "web-1:0", "owner": "team-a", "deployment_id": "web-1"}
_RESOURCES = {"cpu_millicores": 500, "memory_mib": 256, "gpu": 1}
_RECOVERY_ID = "8a0c1f5e-6a67-4e0e-9d0b-1d2b6f3a9c11"
_JOB_ID = "0193d6a0-7a4e-7c3e-8f7e-0c2f5a9b1e77"


class RecoveryStarted(Contract):
    """The repair of a node has begun: steps are tried in their order until it is well. Dry runs are not told of."""

    model_config = example(
        recovery_id=_RECOVERY_ID,
        conditions=["ChecksPassing"],
        attempt=1,
        requested_by="manager",
        reason="",
        steps=["restart_service", "reboot"],
    )

    recovery_id: str = Field(description="The repair's id; GET /recoveries/{recovery_id} shows it")
    conditions: list[str] = Field(description="The types of the conditions that are false and led to it; may be empty")
    attempt: int = Field(description="Which attempt of the manager's own it is; 0: somebody asked for it")
    requested_by: str = Field(description="Who began it")
    reason: str = Field(description="Why, for people; may be empty")
    steps: list[str] = Field(description="What is tried, in this order; operators may add steps of their own")


class RecoveryStepEnded(Contract):
    """A step of a repair has ended."""

    model_config = example(
        recovery_id=_RECOVERY_ID,
        step="restart_service",
        position=0,
        state="succeeded",
        message="web.service restarted",
        job_ids=[_JOB_ID],
    )

    recovery_id: str = Field(description="The repair's id")
    step: str = Field(description="What was tried")
    position: int = Field(description="Its place among the repair's steps, from 0")
    state: Literal[StepState.SKIPPED, StepState.SUCCEEDED, StepState.FAILED, StepState.PLANNED] = Field(
        description="skipped: there was nothing to do; succeeded: it helped; failed: it didn't; planned: it was not to act"
    )
    message: str | None = Field(description="How it went, for people")
    job_ids: list[str] = Field(description="The jobs that did it; GET /jobs/{job_id} shows them")


class RecoveryEnded(Contract):
    """The repair of a node has ended."""

    model_config = example(
        recovery_id=_RECOVERY_ID,
        state="succeeded",
        message="restart_service succeeded (web.service restarted)",
        conditions=["ChecksPassing"],
        attempt=1,
        requested_by="manager",
        duration_seconds=41.207,
    )

    recovery_id: str = Field(description="The repair's id")
    state: Literal[RecoveryState.SUCCEEDED, RecoveryState.FAILED, RecoveryState.GAVE_UP, RecoveryState.CANCELLED] = (
        Field(
            description="succeeded: the node is well; failed: no step helped, a later repair may; gave_up: somebody has to "
            "look at it; cancelled: it was stopped"
        )
    )
    message: str = Field(description="How it went, for people")
    conditions: list[str] = Field(description="The types of the conditions that led to it; may be empty")
    attempt: int = Field(description="Which attempt of the manager's own it was; 0: somebody asked for it")
    requested_by: str = Field(description="Who began it")
    duration_seconds: float = Field(description="How long it took")


class GuardChanged(Contract):
    """The guard of a zone or of the fleet has turned: while it is open no repair begins there by itself."""

    model_config = example(
        **{"scope": "zone:eu-1a", "from": "closed", "to": "open", "cause": "6 of 10 nodes are unhealthy at once"}
    )

    scope: str = Field(description="fleet, or zone: and the zone's name; nodes without a zone share `zone:`")
    from_: GuardState = Field(alias="from", description="What it was")
    to: GuardState = Field(description="closed: repairs begin; open: none does; half_open: one node is tried first")
    cause: str | None = Field(description="Why, for people; null: the zone has no nodes any more")


class AllocationReserved(Contract):
    """Resources were reserved on a node."""

    model_config = example(**_ALLOCATION, resources=_RESOURCES, units={"gpu": {"GPU-0": 1000}}, ttl_seconds=300)

    allocation_id: AllocationRef
    owner: OwnerRef
    deployment_id: DeploymentRef
    resources: Amounts
    units: dict[str, dict[str, int]] = Field(
        description="Thousandths of each unit that is used, per class of devices; empty without devices"
    )
    ttl_seconds: int | None = Field(description="Released after this time unless confirmed; null: kept")


class AllocationConfirmed(Contract):
    """An allocation is kept for good."""

    model_config = example(**_ALLOCATION)

    allocation_id: AllocationRef
    owner: OwnerRef
    deployment_id: DeploymentRef


class AllocationReleased(Contract):
    """Resources on a node are free again."""

    model_config = example(**_ALLOCATION, resources=_RESOURCES, reason="deallocated")

    allocation_id: AllocationRef
    owner: OwnerRef
    deployment_id: DeploymentRef
    resources: Amounts
    reason: str = Field(
        description="Why; today: deallocated, deployment_deleted, expired, node_deregistered, node_lost. New ones may come",
        examples=["deallocated"],
    )


class CommandDone(Contract):
    """A command was carried out; `ce_causationid` is its id too."""

    model_config = example(
        command_id="order-4711",
        command_source="/orders",
        command_type="node.set_status",
        result={"node_id": "gw-7"},
    )

    command_id: str = Field(description="The `ce_id` of the command")
    command_source: str = Field(description="The `ce_source` of the command")
    command_type: str = Field(description="The `ce_type` of the command")
    result: dict[str, Any] = Field(description="What came of it, by the type of the command; see docs/commands.md")


class CommandFailed(Contract):
    """A command was refused and changed nothing; `ce_causationid` is its id too."""

    model_config = example(
        command_id="order-4712",
        command_source="/orders",
        command_type="node.set_status",
        code="node_not_found",
        status=404,
        message="node 'gw-9' is not registered",
    )

    command_id: str = Field(description="The `ce_id` of the command")
    command_source: str = Field(description="The `ce_source` of the command")
    command_type: str | None = Field(description="The `ce_type` of the command; null: it had none")
    code: str = Field(description="Why, as the API has it in `code`; stable", examples=["node_not_found"])
    status: int = Field(description="What the API would have answered", examples=[404])
    message: str = Field(description="Why, for people")


CONTRACTS: Mapping[EventType, type[BaseModel]] = MappingProxyType(
    {
        EventType.NODE_REGISTERED: NodeRegistered,
        EventType.NODE_UPDATED: NodeUpdated,
        EventType.NODE_DEREGISTERED: NodeDeregistered,
        EventType.NODE_ADMIN_CHANGED: NodeAdminChanged,
        EventType.HOST_KEYS_PINNED: HostKeysPinned,
        EventType.DRAIN_STARTED: DrainStarted,
        EventType.DRAIN_PROGRESSED: DrainProgressed,
        EventType.DRAIN_ENDED: DrainEnded,
        EventType.HEALTH_CHANGED: HealthChanged,
        EventType.NODE_LOST: NodeLost,
        EventType.NODE_RECLAIMED: NodeReclaimed,
        EventType.GHOSTS_FOUND: GhostsFound,
        EventType.RECOVERY_STARTED: RecoveryStarted,
        EventType.RECOVERY_STEP_ENDED: RecoveryStepEnded,
        EventType.RECOVERY_ENDED: RecoveryEnded,
        EventType.GUARD_CHANGED: GuardChanged,
        EventType.ALLOCATION_RESERVED: AllocationReserved,
        EventType.ALLOCATION_CONFIRMED: AllocationConfirmed,
        EventType.ALLOCATION_RELEASED: AllocationReleased,
        EventType.COMMAND_DONE: CommandDone,
        EventType.COMMAND_FAILED: CommandFailed,
    }
)
# Of all that is sent, by `ce_type`.
ALL: Mapping[str, type[BaseModel]] = MappingProxyType(
    {
        **{event.value: contract for event, contract in CONTRACTS.items()},
        STATE_SNAPSHOT: NodeState,
        RESOURCES_SAMPLED: ResourcesSampled,
    }
)
