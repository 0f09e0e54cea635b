# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide how a deployment's traffic is shared among its nodes.

Pure: what is known of the nodes and the last weights in, weights out. Imports the standard library and the domain only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isnan
from typing import assert_never

from node_manager.domain import Admin, Health

POINTS = 100
HOLD_BELOW_POINTS = 5

_PROBATION_FACTOR = 0.5
# A busy but healthy node keeps this much of an idle one's share: without traffic it could only look idle, take all, and
# be busy again. A tenth is about what one point in ten nodes is worth.
_HEADROOM_FLOOR = 0.1
# Unknown CPU counts as half used: a node that can't tell is trusted less than an idle one and more than a busy one. A
# constant and not the mean of its peers, with which one node's load could move the weights of others against each other.
_UNKNOWN_CPU_USE = 0.5
# Memory is held, not spent per request: up to 70 % says nothing about room for one more; at 100 % there is none.
_MEMORY_NORMAL_PERCENT = 70.0
# PSI cpu "some" of 10 % is usual on a machine in good use. Overcommit ends at 25 %, which takes three eighths here.
_PRESSURE_NORMAL_PERCENT = 10.0
_PRESSURE_FULL_PERCENT = 50.0
# Factors and headroom are counted in millionths, so that the apportionment is exact.
_SCALE = 1_000_000


class TrafficState(StrEnum):
    """What a load balancer is to do with a node: send to it, only finish what runs there, or leave it alone."""

    READY = "ready"
    DRAIN = "drain"
    DOWN = "down"


@dataclass(frozen=True)
class Target:
    """One node of a deployment as it is now; a percentage is the newest sample's, None where unknown."""

    node_id: str
    address: str
    replicas: int
    admin: Admin
    health: Health
    answering: bool
    cpu_percent: float | None
    memory_percent: float | None
    cpu_pressure_percent: float | None
    probation: bool = False


@dataclass(frozen=True)
class Weight:
    """One node's share of the traffic in points; the reason is empty for a healthy node that takes its full share."""

    node_id: str
    address: str
    weight: int
    state: TrafficState
    reason: str


@dataclass(frozen=True)
class _Verdict:
    """What health and administration say about a node's share, load and replicas aside."""

    factor: float
    state: TrafficState
    reason: str
    last_resort: bool = False


def distribute(targets: Sequence[Target], previous: Mapping[str, int]) -> list[Weight]:
    """Share 100 points among the nodes by health x headroom x replicas, sorted by node_id.

    The weights add up to 100, or to 0 if no node may take traffic; up to 100 nodes, each that may take traffic gets at
    least one point. The nodes' order means nothing, and a node that gets busier never gains.
    Panic: if no node is fit, those that are suspect or coming back and answer share the traffic, whatever their health.
    Envoy does so by default where less than half are fit; here only where none is, since weights follow headroom and
    health already, and a fit node gives way as it fills up. What an operator took out stays out even then.
    Hold: if the nodes with traffic are those of *previous* (node_id to weight) and none would change by 5 points or more,
    the previous weights stay, all of them. Where a node loses or gets traffic, nothing is held.
    Errors: ValueError if two targets have the same node_id.
    """
    verdicts = {target.node_id: _judge(target) for target in targets}
    if len(verdicts) != len(targets):
        raise ValueError("expected each node once")
    panic = not any(verdict.factor for verdict in verdicts.values())
    if panic:
        verdicts = {node_id: _in_panic(verdict) for node_id, verdict in verdicts.items()}
    raw = {target.node_id: _raw_weight(target, verdicts[target.node_id]) for target in targets}
    points = _held(_apportion({node_id: value for node_id, value in raw.items() if value}), previous)
    return [
        _weigh(target, verdicts[target.node_id], points.get(target.node_id, 0))
        for target in sorted(targets, key=lambda target: target.node_id)
    ]


def headroom(target: Target) -> float:
    """Tell how much room a node has, from a tenth to 1: what its scarcest resource leaves.

    The maximum and not a product: one exhausted resource is enough to be slow, and two half used ones are no worse than one.
    """
    cpu, memory, pressure = map(_percent, (target.cpu_percent, target.memory_percent, target.cpu_pressure_percent))
    used = max(
        _UNKNOWN_CPU_USE if cpu is None else cpu / 100,
        _between(memory, _MEMORY_NORMAL_PERCENT, 100.0),
        _between(pressure, _PRESSURE_NORMAL_PERCENT, _PRESSURE_FULL_PERCENT),
    )
    return max(_HEADROOM_FLOOR, 1 - used)


def _judge(target: Target) -> _Verdict:
    """Judge a node: the operator's word first, then whether anything can answer there, then its health."""
    match target.admin:
        case Admin.DRAINING:
            return _Verdict(0, TrafficState.DRAIN, "draining")
        case Admin.MAINTENANCE:
            return _Verdict(0, TrafficState.DOWN, "in maintenance")
        case Admin.OFFLINE:
            return _Verdict(0, TrafficState.DOWN, "taken offline by an operator")
        case Admin.ACTIVE | Admin.CORDONED:
            # Cordon is about new placements: what runs there goes on serving.
            pass
        case _:
            assert_never(target.admin)
    if target.replicas <= 0:
        return _Verdict(0, TrafficState.DOWN, "no replica runs there")
    if target.health is Health.UNREACHABLE:
        return _Verdict(0, TrafficState.DOWN, "unreachable")
    if not target.answering:
        return _Verdict(0, TrafficState.DOWN, "not seen lately")
    return _judge_health(target)


def _judge_health(target: Target) -> _Verdict:
    """Give the factor of a node's health.

    Degraded counts half: it serves, but a check failed or the manager can't get in; which, health doesn't say. Unknown and
    flapping count a quarter: enough to be seen failing, little enough to bear it. Suspect and recovering get nothing
    while others can serve: the one just went silent, the other hasn't yet proven that it is back.
    """
    half = "; came back lately, at half weight" if target.probation else ""
    slow = _PROBATION_FACTOR if target.probation else 1.0
    match target.health:
        case Health.HEALTHY:
            return _Verdict(slow, TrafficState.READY, half.removeprefix("; "))
        case Health.DEGRADED:
            return _Verdict(0.5 * slow, TrafficState.READY, f"degraded, at half weight{half}")
        case Health.UNKNOWN:
            return _Verdict(0.25 * slow, TrafficState.READY, f"not fully checked yet, at a quarter of its weight{half}")
        case Health.FLAPPING:
            return _Verdict(0.25 * slow, TrafficState.READY, f"comes and goes, at a quarter of its weight{half}")
        case Health.SUSPECT:
            return _Verdict(0, TrafficState.DOWN, "suspect: went silent a moment ago", last_resort=True)
        case Health.RECOVERING:
            return _Verdict(0, TrafficState.DOWN, "recovering: not proven yet", last_resort=True)
        case Health.UNREACHABLE:
            return _Verdict(0, TrafficState.DOWN, "unreachable")
        case _:
            assert_never(target.health)


def _in_panic(verdict: _Verdict) -> _Verdict:
    if not verdict.last_resort:
        return verdict
    return _Verdict(1, TrafficState.READY, f"panic, no node is fit: {verdict.reason}", last_resort=True)


def _raw_weight(target: Target, verdict: _Verdict) -> int:
    return round(verdict.factor * headroom(target) * _SCALE) * max(0, target.replicas)


def _apportion(raw: Mapping[str, int]) -> dict[str, int]:
    """Share the points by largest remainder, ties to the smaller node_id, at least one each while there are enough.

    Exact in whole numbers. Who loses raw weight while the others keep theirs never gains a point: its remainder shrinks,
    and those of the others grow or turn into whole points.
    """
    points, total = POINTS, sum(raw.values())
    shared: dict[str, int] = {}
    if len(raw) <= points:
        for node_id, value in sorted(raw.items(), key=lambda item: (item[1], item[0])):
            if value * points >= total:
                break
            shared[node_id] = 1
            points, total = points - 1, total - value
    parts = {node_id: divmod(value * points, total) for node_id, value in raw.items() if node_id not in shared}
    left = points - sum(whole for whole, _ in parts.values()) if parts else 0
    favoured = set(sorted(parts, key=lambda node_id: (-parts[node_id][1], node_id))[:left])
    shared |= {node_id: whole + (node_id in favoured) for node_id, (whole, _) in parts.items()}
    return shared


def _held(points: dict[str, int], previous: Mapping[str, int]) -> dict[str, int]:
    """Keep *previous* if it is a whole distribution over the same nodes and close enough to *points*."""
    now = {node_id: weight for node_id, weight in points.items() if weight > 0}
    before = {node_id: weight for node_id, weight in previous.items() if weight != 0}
    if now.keys() != before.keys() or sum(before.values()) != POINTS or min(before.values()) < 0:
        return points
    if any(abs(now[node_id] - before[node_id]) >= HOLD_BELOW_POINTS for node_id in now):
        return points
    return before


def _weigh(target: Target, verdict: _Verdict, points: int) -> Weight:
    reason = verdict.reason
    if verdict.state is TrafficState.READY and not points:
        reason = "; ".join(filter(None, [reason, "its share is less than a point"]))
    return Weight(target.node_id, target.address, points, verdict.state, reason)


def _percent(value: float | None) -> float | None:
    """Bring a measured percentage into its range; what is no number is unknown."""
    return None if value is None or isnan(value) else min(100.0, max(0.0, value))


def _between(value: float | None, normal: float, full: float) -> float:
    """Tell how far *value* is from *normal* (0) to *full* (1); unknown counts as normal."""
    return 0.0 if value is None else min(1.0, max(0.0, (value - normal) / (full - normal)))
