# SPDX-License-Identifier: GPL-3.0-or-later
"""What the contracts of events have in common: their base, and the parts that several of them are made of.

Imports words and models only.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from node_manager.drain_blockers import BlockerKind

NodeRef = Annotated[str, Field(description="The node's id", examples=["gw-7"])]
Time = Annotated[AwareDatetime, Field(examples=["2026-11-22T18:00:00Z"])]
AllocationRef = Annotated[str, Field(description="The allocation's id", examples=["web-1:0"])]
DeploymentRef = Annotated[str | None, Field(description="The deployment that it is for; null: for none")]
OwnerRef = Annotated[str, Field(description="Whose quota counts", examples=["team-a"])]


class Contract(BaseModel):
    """Data of an event, or a part of them.

    No field has a default: what is promised is always there. Closed here, so that the tests notice what is sent without
    being promised; the published schemas are open, for new fields may come at any time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def example(**data: Any) -> ConfigDict:
    """Give a contract an example of its data."""
    return ConfigDict(json_schema_extra={"examples": [data]})


class DeviceAmount(Contract):
    """Units of a device class of which only a share is used."""

    count: int = Field(description="Units")
    share_milli: int = Field(description="Thousandths of each unit")


Amounts = Annotated[
    dict[str, int | DeviceAmount],
    Field(
        description="Amount per resource class; of devices a number of units, or {count, share_milli}",
        examples=[{"cpu_millicores": 500, "memory_mib": 256}],
    ),
]


class Blocker(Contract):
    """One thing that keeps a node from being drained."""

    kind: BlockerKind = Field(
        description="allocation: reserved there; workload: a container that runs there; unseen: nobody could look yet"
    )
    allocation_id: str | None = Field(description="The allocation; null for what is unseen")
    container: str | None = Field(description="The container's name; null unless it is a workload")
    deployment_id: DeploymentRef
    owner: str | None = Field(description="Whose it is; null where that isn't known")
    since: Time = Field(description="Since when it stands in the way")
    message: str = Field(description="The same for people")


class Replacement(Contract):
    """Where one allocation could go; whoever follows the proposal allocates there, nothing is reserved yet."""

    allocation_id: AllocationRef
    owner: OwnerRef
    deployment_id: DeploymentRef
    resources: Amounts
    to_node: str | None = Field(description="The node that it fits on; null: on none, and why says so")
    why: str = Field(description="Why there, or what was in the way")


class Workload(Contract):
    """A managed container that runs on a node."""

    container: str = Field(description="The container's name")
    allocation_id: str = Field(description="The allocation that its label names")
    deployment_id: DeploymentRef
    owner: str | None = Field(description="Whose it is; null where the allocation is gone")


class HeldAllocation(Contract):
    """An allocation that a node holds."""

    allocation_id: AllocationRef
    owner: OwnerRef
    deployment_id: DeploymentRef


class Ghost(Contract):
    """A container without an allocation on the node that it runs on."""

    container: str = Field(description="The container's name")
    allocation_id: str = Field(description="The allocation that its label names")
    deployment_id: DeploymentRef
    owner_node: str | None = Field(description="The node that holds the allocation now; null: it is gone")
