# SPDX-License-Identifier: GPL-3.0-or-later
"""What the API takes in and gives out around allocations and quotas."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, Field

from node_manager.api.schemas import Input, Output
from node_manager.resources import COMMON, MAX_AMOUNT, MAX_UNITS, ResourceName, Resources

ALLOCATION_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"
OWNER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$"

AllocationId = Annotated[str, Field(pattern=ALLOCATION_ID_PATTERN, max_length=128, examples=["web-1.a"])]
Owner = Annotated[str, Field(pattern=OWNER_PATTERN, max_length=253, examples=["team-a"])]
DeploymentId = Annotated[str, Field(pattern=OWNER_PATTERN, max_length=253, examples=["web-1"])]


def _check_limits(hard: dict[str, int]) -> dict[str, int]:
    for name, limit in hard.items():
        if name not in COMMON and limit > MAX_UNITS * 10_000:
            raise ValueError(f"{name}: expected at most {MAX_UNITS * 10_000} units")
    return hard


class AllocateIn(Input):
    """Resources to be reserved on a node."""

    allocation_id: AllocationId = Field(description="Chosen by the caller; makes repeated calls harmless")
    owner: Owner = Field(description="Whose quota counts")
    deployment_id: DeploymentId | None = Field(None, description="What it is for")
    resources: Resources
    ttl_seconds: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        None, description="Release after this time unless confirmed; left out: keep until deallocated"
    )


class DeallocateIn(Input):
    """An allocation to be released."""

    allocation_id: AllocationId


class ReleasedOut(Output):
    """What became of a release."""

    allocation_id: str
    released: bool


class AllocationOut(Output):
    """Resources reserved on a node; of devices, which units."""

    allocation_id: str
    node_id: str
    owner: str
    deployment_id: str | None
    resources: dict[str, Any]
    units: dict[str, dict[str, int]]
    ttl_seconds: int | None
    expires_at: AwareDatetime | None
    created_at: AwareDatetime


class AllocationPageOut(Output):
    """One page of allocations."""

    items: list[AllocationOut]
    next_cursor: str | None


class DeviceUnitOut(Output):
    """One unit of a device class."""

    unit: str
    allocated_milli: int
    present: bool


class ResourcesOut(Output):
    """A node's books, each by resource class; devices in units."""

    node_id: str
    capacity: dict[str, int]
    reserved: dict[str, int]
    overcommit: dict[str, float]
    effective: dict[str, int]
    allocated: dict[str, int]
    available: dict[str, int]
    overcommitted: bool
    devices: dict[str, list[DeviceUnitOut]]
    epoch: int = Field(description="How often all work was taken from the node while it was lost, counted from 1")
    allocations: list[AllocationOut]


class QuotaIn(Input):
    """Limits per resource class; devices in units."""

    hard: Annotated[
        dict[ResourceName, Annotated[int, Field(strict=True, ge=0, le=MAX_AMOUNT)]],
        Field(min_length=1, max_length=32),
        AfterValidator(_check_limits),
    ] = Field(examples=[{"cpu_millicores": 8000, "gpu": 2}])


class QuotaOut(Output):
    """An owner's limits and use; devices in units, with decimals where shared."""

    owner: str
    hard: dict[str, float]
    used: dict[str, float]


class QuotaPageOut(Output):
    """One page of quotas."""

    items: list[QuotaOut]
    next_cursor: str | None
