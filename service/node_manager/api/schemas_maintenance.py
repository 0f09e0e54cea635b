# SPDX-License-Identifier: GPL-3.0-or-later
"""What the API gives out about drains and maintenance. Imports none of its other schemas: the node's own are made with these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from node_manager.domain import Admin
from node_manager.drain_blockers import BlockerKind


class BlockerOut(BaseModel):
    """One thing that keeps a node from being drained."""

    model_config = ConfigDict(frozen=True)

    kind: BlockerKind
    allocation_id: str | None
    container: str | None
    deployment_id: str | None
    owner: str | None
    since: AwareDatetime
    message: str


class ProposalOut(BaseModel):
    """Where one of its allocations could go."""

    model_config = ConfigDict(frozen=True)

    allocation_id: str
    owner: str
    deployment_id: str | None
    resources: dict[str, Any]
    to_node: str | None = Field(description="null: it fits nowhere; why says so")
    why: str


class MaintenanceOut(BaseModel):
    """How it stands with a node's drain or maintenance."""

    model_config = ConfigDict(frozen=True)

    phase: Literal["draining", "maintenance", "leaving"]
    reason: str
    requested_by: str = Field(description="Empty where it was declared with the node")
    started_at: AwareDatetime
    then: Admin = Field(description="What the node becomes when it is drained: maintenance or cordoned")
    deadline_at: AwareDatetime | None
    drained_at: AwareDatetime | None = Field(description="When it was seen to be empty")
    until: AwareDatetime | None
    keep_cordon: bool
    leaving_at: AwareDatetime | None = Field(description="A check after this time must pass before it leaves")
    message: str = Field(description="Why it did not leave when it was last to; empty where there is nothing to tell")
    blockers: list[BlockerOut] = Field(description="What is still there of what is to be drained")
    proposals: list[ProposalOut] = Field(description="Where its allocations could go, as of a minute ago at most")
