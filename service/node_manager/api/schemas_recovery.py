# SPDX-License-Identifier: GPL-3.0-or-later
"""What the API takes in and gives out about repair: climbs of the ladder, the guard, pauses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field

from node_manager.api.schemas import HealthOut, Input, Output
from node_manager.domain import GuardState, RecoveryState, StepState
from node_manager.node_types import StepName
from node_manager.recoveries import MAX_STEPS
from node_manager.status_input import storable, text_only

PAUSE_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class RecoverIn(Input):
    """A repair that somebody asks for."""

    steps: list[StepName] | None = Field(
        None,
        min_length=1,
        max_length=MAX_STEPS,
        description="The steps to try, in this order; left out: what the ladders have for what is wrong",
        examples=[["restart_service"]],
    )
    reason: Annotated[str, AfterValidator(storable)] = Field("", max_length=255, description="Why, for the record")
    driver: Literal["manager", "playbook"] = Field(
        "manager", description="playbook: the caller's own run of recover.yml climbs, and reports each step"
    )


class StepOut(Output):
    """One step of a climb."""

    position: int
    step: str
    state: StepState
    job_ids: list[str]
    message: str | None
    started_at: AwareDatetime | None
    acted_at: AwareDatetime | None
    ended_at: AwareDatetime | None


class RecoveryOut(Output):
    """One climb of the recovery ladder."""

    recovery_id: str
    node_id: str
    state: RecoveryState
    dry_run: bool
    conditions: list[str]
    critical: bool = Field(description="Whether one of them keeps work off the node; giving up then cordons it")
    attempt: int
    canary: bool
    driver: str
    requested_by: str
    reason: str
    message: str | None
    started_at: AwareDatetime
    cancel_requested_at: AwareDatetime | None
    ended_at: AwareDatetime | None
    steps: list[StepOut]


class RecoveryPageOut(Output):
    """One page of climbs, newest first."""

    items: list[RecoveryOut]
    next_cursor: str | None


class ClaimOut(Output):
    """Whether the act of a step may begin."""

    act: bool
    message: str


class StepEndIn(Input):
    """How a step ended, as the playbook that carried it out says."""

    state: Literal["skipped", "succeeded", "failed", "planned"]
    message: str | None = Field(None, max_length=4000)


class MessageIn(Input):
    """A word for the record."""

    message: str | None = Field(None, max_length=4000)


class PauseIn(Input):
    """A pause of automatic repair."""

    reason: Annotated[str, AfterValidator(storable)] = Field(
        min_length=1, max_length=255, description="Why, for those who find repairs paused"
    )
    zone: str | None = Field(None, max_length=253, description="Only in this zone; left out: everywhere")
    until: Annotated[AwareDatetime | None, BeforeValidator(lambda value: value and text_only(value))] = Field(
        None, description="When it ends by itself; left out: when it is deleted"
    )


class PauseOut(Output):
    """A pause of automatic repair that is in force."""

    name: str
    zone: str | None
    reason: str
    until: AwareDatetime | None
    created_by: str
    created_at: AwareDatetime


class ScopeOut(Output):
    """The guard of a zone, or of the fleet."""

    scope: str = Field(examples=["zone:eu-1a"])
    state: GuardState
    since: AwareDatetime
    cause: str | None
    exit: str | None = Field(description="What it takes until it is closed; null where it is")
    nodes: int
    unhealthy: int
    unreachable: int
    in_recovery: int
    in_recovery_limit: int
    last_start_at: AwareDatetime | None
    canary: str | None


class LeftOutOut(Output):
    """A step that is not tried, and why."""

    step: str
    why: str


class RepairOut(Output):
    """How it stands with a node's repair."""

    active: RecoveryOut | None = Field(description="The climb that goes on now")
    last: RecoveryOut | None = Field(description="The newest climb that has ended")
    attempts: int = Field(description="Climbs since the node was last well")
    gave_up_at: AwareDatetime | None
    conditions: list[str] = Field(description="What asks for repair")
    steps: list[str] = Field(description="What would be tried next, in this order")
    left_out: list[LeftOutOut]
    not_now: str | None = Field(description="Why nothing is done by itself now; null: it is next, or nothing is wrong")
    guard: list[ScopeOut] = Field(description="The guard of its zone and of the fleet")


class RepairableHealthOut(HealthOut):
    """The verdict on a node, the checks behind it, and how it stands with its repair."""

    recovery: RepairOut


class GuardOut(Output):
    """Whether nodes are repaired by themselves now."""

    automatic: bool
    scopes: list[ScopeOut]
    pauses: list[PauseOut]
