# SPDX-License-Identifier: GPL-3.0-or-later
"""What the API gives out around nodes that are lost."""

from __future__ import annotations

from typing import Any

from pydantic import AwareDatetime, Field

from node_manager.api.schemas import Output


class ReplacementOut(Output):
    """Where one allocation would go."""

    allocation_id: str
    owner: str
    deployment_id: str | None
    resources: dict[str, Any]
    to_node: str | None = Field(description="The node that selection would choose; null where none fits")
    why: str


class ReplacementsOut(Output):
    """Where all that is allocated on a node would go if it were lost; all of it together fits."""

    node_id: str
    computed_at: AwareDatetime
    items: list[ReplacementOut]
    left_out: int = Field(description="Allocations that were too many to look at")
