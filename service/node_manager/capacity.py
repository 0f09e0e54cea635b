# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node has to give: capacity, what is reserved for the system, what overcommit makes of it, what is taken.

Pure arithmetic on integers. Units stand in the resource classes' names; devices are counted in units, their shares in
thousandths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any

from node_manager.domain import Resource
from node_manager.node_types import NodeType
from node_manager.resources import COMMON, MAX_UNITS, WHOLE_MILLI, Ask

_MIB = 1024 * 1024
Units = Mapping[str, Iterable[str]]
UsedUnits = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Shortage:
    """One resource class of which a node has less left than is asked for."""

    resource: str
    requested: int
    available: int
    # Of a device: how much of each unit is asked for, in thousandths.
    share_milli: int | None = None


@dataclass(frozen=True)
class Account:
    """The books of one node, each by resource class; devices in units."""

    capacity: dict[str, int]
    reserved: dict[str, int]
    overcommit: dict[str, float]
    effective: dict[str, int]
    allocated: dict[str, int]
    available: dict[str, int]
    # More is taken than there is now: nothing is evicted for it, but nothing more fits.
    overcommitted: bool
    devices: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    # How often work was taken from the node, counted from 1.
    epoch: int = 1


def capacity_of(
    declared: Mapping[str, int], facts: Mapping[str, Any] | None, node_type: NodeType | None = None
) -> dict[str, int]:
    """Tell what a node has: what was declared, else what its facts say, else what its type has.

    Classes that nobody knows are left out.
    """
    observed: dict[str, int] = {}
    if facts is not None:
        # Devices first and never under a name of ours: the classes are words of the node's own.
        observed.update({name: len(_unit_ids(facts, name)) for name in facts["devices"] if name not in COMMON})
        if facts["cpu"]["count"] is not None:
            observed[Resource.CPU_MILLICORES.value] = facts["cpu"]["count"] * 1000
        if facts["memory_total_bytes"] is not None:
            observed[Resource.MEMORY_MIB.value] = facts["memory_total_bytes"] // _MIB
        if facts["disk_total_bytes"] is not None:
            observed[Resource.DISK_MIB.value] = facts["disk_total_bytes"] // _MIB
        if facts["network_mbps"] is not None:
            observed[Resource.NETWORK_MBPS.value] = facts["network_mbps"]
    return {**(node_type.resources if node_type else {}), **observed, **declared}


def units_of(capacity: Mapping[str, int], facts: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Name the units of each device class: as the facts name them, and by number where nobody does."""
    found = {}
    for name, count in capacity.items():
        if name in COMMON:
            continue
        seen = _unit_ids(facts, name)[:count]
        numbered = (str(number) for number in range(MAX_UNITS * 2) if str(number) not in seen)
        found[name] = seen + [next(numbered) for _ in range(min(count, MAX_UNITS) - len(seen))]
    return found


def effective_of(capacity: Mapping[str, int], node_type: NodeType | None, *, pressed: bool) -> dict[str, int]:
    """Tell what may be allocated: (capacity - reserved) x overcommit; under pressure overcommit is 1."""
    reserved, factors = reserved_of(capacity, node_type), _overcommit_of(node_type, pressed=pressed)
    return {name: _times(total - reserved[name], factors.get(name, 1.0)) for name, total in capacity.items()}


def reserved_of(capacity: Mapping[str, int], node_type: NodeType | None) -> dict[str, int]:
    """Tell what is kept for the system, never more than there is."""
    by_type: dict[str, int] = dict(node_type.reserved) if node_type else {}
    return {name: min(by_type.get(name, 0), total) for name, total in capacity.items()}


def account(
    capacity: Mapping[str, int],
    units: Units,
    node_type: NodeType | None,
    allocated: Mapping[str, int],
    used_units: UsedUnits,
    *,
    pressed: bool = False,
) -> Account:
    """Draw up a node's books.

    Shapes: *allocated* per common class; *used_units* per device class and unit, in thousandths.
    available = effective - allocated, never below 0; of a device the units that nobody uses.
    """
    effective = effective_of(capacity, node_type, pressed=pressed)
    factors = _overcommit_of(node_type, pressed=pressed)
    taken = dict.fromkeys(capacity, 0)
    taken.update(allocated)
    devices: dict[str, list[dict[str, Any]]] = {}
    for name in sorted({*units, *used_units}):
        used = {unit: milli for unit, milli in used_units.get(name, {}).items() if milli}
        known = list(units.get(name, ()))
        gone = sorted(set(used).difference(known))
        taken[name] = len(used)
        devices[name] = [
            {"unit": unit, "allocated_milli": used.get(unit, 0), "present": unit not in gone}
            for unit in [*known, *gone]
        ]
    available = {}
    for name in taken:
        if name in devices:
            available[name] = sum(unit["present"] and unit["allocated_milli"] == 0 for unit in devices[name])
        else:
            available[name] = max(0, effective.get(name, 0) - taken[name])
    return Account(
        capacity=dict(capacity),
        reserved=reserved_of(capacity, node_type),
        overcommit={name: factors.get(name, 1.0) for name in capacity},
        effective=effective,
        allocated=taken,
        available=available,
        overcommitted=any(
            not all(unit["present"] or not unit["allocated_milli"] for unit in devices[name])
            if name in devices
            else taken[name] > effective.get(name, 0)
            for name in taken
        ),
        devices=devices,
    )


def shortages(
    ask: Ask, effective: Mapping[str, int], allocated: Mapping[str, int], units: Units, used_units: UsedUnits
) -> list[Shortage]:
    """Tell what a node lacks for *ask*; empty: it fits."""
    found = []
    for name, amount in ask.amounts:
        left = max(0, effective.get(name, 0) - allocated.get(name, 0))
        if amount > left:
            found.append(Shortage(name, amount, left))
    for name, count, share in ask.devices:
        used = used_units.get(name, {})
        fitting = sum(used.get(unit, 0) + share <= WHOLE_MILLI for unit in units.get(name, ()))
        if count > fitting:
            found.append(Shortage(name, count, fitting, share))
    return found


def choose_units(ask: Ask, units: Units, used_units: UsedUnits) -> dict[str, dict[str, int]]:
    """Choose units for an ask that fits: the fullest that still have room, so that whole ones stay whole."""
    chosen = {}
    for name, count, share in ask.devices:
        used = used_units.get(name, {})
        fitting = [
            (-used.get(unit, 0), position, unit)
            for position, unit in enumerate(units.get(name, ()))
            if used.get(unit, 0) + share <= WHOLE_MILLI
        ]
        chosen[name] = {unit: share for _, _, unit in sorted(fitting)[:count]}
    return chosen


def _unit_ids(facts: Mapping[str, Any] | None, name: str) -> list[str]:
    # Each once: a node that tells one unit twice must not have it promised twice.
    return list(dict.fromkeys(unit["id"] for unit in facts["devices"].get(name, []))) if facts else []


def _times(amount: int, factor: float) -> int:
    # Exact, as the factor is written: 1.15 x 100 is 115, in floating point 114.
    if factor == 1.0:
        return amount
    numerator, denominator = _ratio(factor)
    return amount * numerator // denominator


@cache
def _ratio(factor: float) -> tuple[int, int]:
    # Kept: there are only so many node types, and a pass of placements asks for hundreds.
    return Fraction(str(factor)).as_integer_ratio()


def _overcommit_of(node_type: NodeType | None, *, pressed: bool) -> dict[str, float]:
    if node_type is None or pressed:
        return {}
    factors = node_type.overcommit
    return {
        Resource.CPU_MILLICORES.value: factors.cpu,
        Resource.MEMORY_MIB.value: factors.memory,
        Resource.DISK_MIB.value: factors.disk,
    }
