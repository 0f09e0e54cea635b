# SPDX-License-Identifier: GPL-3.0-or-later
"""The shape of what the manager tells about its own watching."""

from __future__ import annotations

from pydantic import AwareDatetime, BaseModel, Field


class LeftToAnsible(BaseModel):
    """One node whose stream can't be had as configured."""

    node_id: str
    reason: str


class FaultOut(BaseModel):
    """Trouble of the manager's own, for which no node was blamed."""

    message: str
    count: int
    last_at: AwareDatetime


class MonitoringOut(BaseModel):
    """How the fleet is watched."""

    watching: bool = Field(description="Whether this manager watches; of several managers the leading one does")
    states: dict[str, int] = Field(
        description="Nodes by how they are heard: streaming, opening, suspect, unreachable, path_lost, asleep, left_to_ansible"
    )
    left_to_ansible: list[LeftToAnsible] = Field(description="The first hundred of them")
    faults: list[FaultOut] = Field(description="The newest first")
    observations_given_up: int = Field(
        description="Samples that were dropped because the store did not answer for too long"
    )
