# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node has to give: capacity, what is reserved for the system, what overcommit makes of it, what is taken.

Pure arithmetic on integers. Units stand in the resource classes' names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from node_manager.domain import Resource
from node_manager.node_types import NodeType

_MIB = 1024 * 1024


@dataclass(frozen=True)
class Account:
    """The books of one node, each by resource class."""

    capacity: dict[str, int]
    reserved: dict[str, int]
    effective: dict[str, int]
    allocated: dict[str, int]
    available: dict[str, int]


def capacity_of(declared: Mapping[str, int], facts: Mapping[str, Any] | None) -> dict[str, int]:
    """Tell what a node has: what was declared, else what its facts say; classes that nobody knows are left out."""
    observed: dict[str, int] = {}
    if facts is not None:
        # Devices first and never under a name of ours: the classes are words of the node's own.
        common = {resource.value for resource in Resource}
        observed.update({name: len(units) for name, units in facts["devices"].items() if name not in common})
        if facts["cpu"]["count"] is not None:
            observed[Resource.CPU_MILLICORES.value] = facts["cpu"]["count"] * 1000
        if facts["memory_total_bytes"] is not None:
            observed[Resource.MEMORY_MIB.value] = facts["memory_total_bytes"] // _MIB
        if facts["disk_total_bytes"] is not None:
            observed[Resource.DISK_MIB.value] = facts["disk_total_bytes"] // _MIB
        if facts["network_mbps"] is not None:
            observed[Resource.NETWORK_MBPS.value] = facts["network_mbps"]
    return {**observed, **declared}


def account(
    capacity: Mapping[str, int], node_type: NodeType | None, allocations: Iterable[Mapping[str, int]]
) -> Account:
    """Draw up a node's books.

    effective = (capacity - reserved) x overcommit; available = effective - allocated, never below 0.
    """
    reserved_by_type = node_type.reserved.model_dump() if node_type else {}
    overcommit = _overcommit_of(node_type)
    reserved = {name: min(reserved_by_type.get(name, 0), total) for name, total in capacity.items()}
    # Exact, as the factor is written: 1.15 x 100 is 115, in floating point 114.
    factors = {name: Fraction(str(overcommit.get(name, 1.0))) for name in capacity}
    effective = {name: int((total - reserved[name]) * factors[name]) for name, total in capacity.items()}
    allocated = dict.fromkeys(capacity, 0)
    for resources in allocations:
        for name, amount in resources.items():
            allocated[name] = allocated.get(name, 0) + amount
    available = {name: max(0, effective.get(name, 0) - taken) for name, taken in allocated.items()}
    return Account(dict(capacity), reserved, effective, allocated, available)


def _overcommit_of(node_type: NodeType | None) -> dict[str, float]:
    if node_type is None:
        return {}
    factors = node_type.overcommit
    return {
        Resource.CPU_MILLICORES.value: factors.cpu,
        Resource.MEMORY_MIB.value: factors.memory,
        Resource.DISK_MIB.value: factors.disk,
    }
