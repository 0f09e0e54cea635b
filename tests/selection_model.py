# SPDX-License-Identifier: GPL-3.0-or-later
"""What selection must do, said a second time: filters node by node in plain Python, placement as a program for a solver (HiGHS).

Semantics:
- Replicas may share a node, unless the request keeps away from itself.
- A region, zone or site that a node doesn't have is no domain: nothing is near the node there, neither wanted nor unwanted; what
  must be near something can't run there, and under a spread over zones nothing can.
- Required affinity to the request's own replicas, of which none is anywhere, keeps all of them in one domain. Where targets
  are placed already, each replica must be near any of them.
- Skew is the replicas in a domain less those in the emptiest domain that has a node which passes all filters but room. With a
  single such domain the emptiest has none.
- Whom a placed deployment keeps away by its required anti-affinity stays away.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import highspy
import numpy as np
from fleet_rows_builder import NOW, STALE_AFTER_SECONDS, make_row
from node_manager.fleet_rows import DeploymentRow, NodeRow
from node_manager.resources import WHOLE_MILLI
from node_manager.selection_request import Mode, Scope, SelectionRequest, Term

EARTH_RADIUS_KM = 6371.0088
SCOPES = ("node", "site", "zone", "region")


@dataclass(frozen=True)
class Fleet:
    """Nodes, and the deployments that are on them."""

    rows: Sequence[NodeRow]
    deployments: Mapping[str, DeploymentRow]


@dataclass(frozen=True)
class Rules:
    """What is left of a request after the filters: who may be chosen but for room, and what replicas owe each other."""

    eligible: list[NodeRow]
    together: list[Scope]
    apart: list[Scope]


def rules_of(fleet: Fleet, request: SelectionRequest) -> Rules:
    """Apply the filters."""
    eligible = [row for row in fleet.rows if _is_open(row) and _meets(row, request)]
    if request.spread is not None:
        eligible = [row for row in eligible if domain(row, request.spread.scope) is not None]
    together, apart = [], []
    for term in request.affinity:
        if term.mode is not Mode.REQUIRED:
            continue
        near = domains_of(fleet, term)
        if request.is_own(term) and not near:
            together.append(term.scope)
        else:
            eligible = [row for row in eligible if domain(row, term.scope) in near]
    for term in request.anti_affinity:
        if term.mode is not Mode.REQUIRED:
            continue
        far = domains_of(fleet, term)
        eligible = [row for row in eligible if domain(row, term.scope) not in far]
        if request.is_own(term):
            apart.append(term.scope)
    for other in fleet.deployments.values():
        for values in other.repels if other.deployment_id != request.deployment_id else ():
            term = Term.model_validate(values)
            if request.is_own(term):
                held = {domain(row, term.scope) for row in fleet.rows if other.deployment_id in row.deployments}
                eligible = [row for row in eligible if domain(row, term.scope) not in held - {None}]
    return Rules(eligible, together, apart)


def domain(row: NodeRow, scope: str) -> str | None:
    """Name the domain that a node is in."""
    return row.node_id if scope == "node" else getattr(row, scope)


def domains_of(fleet: Fleet, term: Term) -> set[str]:
    """Name the domains that have a term's target."""
    targets = []
    for row in fleet.rows:
        if term.deployment_id is not None:
            found = term.deployment_id in row.deployments
        elif term.deployment_labels is not None:
            wanted = term.deployment_labels.items()
            known = (fleet.deployments.get(name) for name in row.deployments)
            found = any(each is not None and wanted <= each.labels.items() for each in known)
        else:
            found = (term.node_labels or {}).items() <= row.labels.items()
        if found:
            targets.append(row)
    return {name for row in targets if (name := domain(row, term.scope)) is not None}


def kilometres(row: NodeRow, latitude: float, longitude: float) -> float:
    """Measure along the ground (haversine); infinite where the node's place is unknown."""
    if row.latitude is None or row.longitude is None:
        return math.inf
    one, other = math.radians(row.latitude), math.radians(latitude)
    turn = math.radians(longitude - row.longitude)
    part = math.sin((other - one) / 2) ** 2 + math.cos(one) * math.cos(other) * math.sin(turn / 2) ** 2
    return 2 * EARTH_RADIUS_KM * math.asin(min(1, math.sqrt(part)))


def solve(
    fleet: Fleet, request: SelectionRequest, worth: Mapping[str, float] | None = None
) -> tuple[float, list[str]] | None:
    """Place all replicas with the largest sum of *worth*; None if that can't be done."""
    rules, replicas = rules_of(fleet, request), request.replicas
    program = _Program()
    of_node: dict[str, int] = {}
    for row in rules.eligible:
        most = min(
            [replicas]
            + [
                max(0, row.effective.get(name, 0) - row.allocated.get(name, 0)) // amount
                for name, amount in request.ask.amounts
            ]
        )
        of_node[row.node_id] = program.variable(most, (worth or {}).get(row.node_id, 0.0))
        for name, count, share in request.ask.devices:
            # How many replicas take each unit: no unit serves one replica twice.
            used = row.used_units.get(name, {})
            free = [max(0, WHOLE_MILLI - used.get(unit, 0)) // share for unit in row.units.get(name, ())]
            takes = [program.variable(left) for left in free]
            for each in takes:
                program.row(-math.inf, 0, {each: 1, of_node[row.node_id]: -1})
            program.row(0, 0, {**dict.fromkeys(takes, 1), of_node[row.node_id]: -count})
    program.row(replicas, replicas, dict.fromkeys(of_node.values(), 1))
    for scope in rules.apart:
        for inside in _by_domain(rules.eligible, scope).values():
            program.row(-math.inf, 1, dict.fromkeys((of_node[node_id] for node_id in inside), 1))
    for scope in rules.together:
        homes = {name: program.variable(1) for name in _by_domain(rules.eligible, scope)}
        program.row(-math.inf, 1, dict.fromkeys(homes.values(), 1))
        for row in rules.eligible:
            name = domain(row, scope)
            program.row(-math.inf, 0, {of_node[row.node_id]: 1} | ({homes[name]: -replicas} if name else {}))
    if request.spread is not None:
        inside_of = _by_domain(rules.eligible, request.spread.scope)
        emptiest = program.variable(replicas if len(inside_of) > 1 else 0)
        for inside in inside_of.values():
            counted = dict.fromkeys((of_node[node_id] for node_id in inside), 1)
            program.row(0, math.inf, {**counted, emptiest: -1})
            program.row(-math.inf, request.spread.max_skew, {**counted, emptiest: -1})
    found = program.solve()
    if found is None:
        return None
    return found[0], sorted(node_id for node_id, column in of_node.items() for _ in range(round(found[1][column])))


class _Program:
    """An integer program, written down column by column and row by row."""

    def __init__(self) -> None:
        self._highs = highspy.Highs()
        self._highs.silent()
        self._columns = 0

    def variable(self, most: int, worth: float = 0.0) -> int:
        self._highs.addVar(0, most)
        self._highs.changeColIntegrality(self._columns, highspy.HighsVarType.kInteger)
        self._highs.changeColCost(self._columns, worth)
        self._columns += 1
        return self._columns - 1

    def row(self, least: float, most: float, parts: Mapping[int, float]) -> None:
        self._highs.addRow(
            least, most, len(parts), np.array(list(parts), np.int32), np.array(list(parts.values()), np.float64)
        )

    def solve(self) -> tuple[float, Sequence[float]] | None:
        self._highs.changeObjectiveSense(highspy.ObjSense.kMaximize)
        self._highs.run()
        status = self._highs.getModelStatus()
        if status == highspy.HighsModelStatus.kOptimal:
            return self._highs.getObjectiveValue(), list(self._highs.getSolution().col_value)
        assert status in {highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kModelEmpty}, status
        return None


def breaches(fleet: Fleet, request: SelectionRequest, node_ids: Sequence[str]) -> list[str]:
    """Say which rules a choice of nodes breaks, without any solver: what was chosen, held to the rules one by one."""
    rules = rules_of(fleet, request)
    eligible = {row.node_id: row for row in rules.eligible}
    found = [f"{node_id} is not eligible" for node_id in node_ids if node_id not in eligible]
    if found:
        return found
    counts = {node_id: list(node_ids).count(node_id) for node_id in node_ids}
    for node_id, count in counts.items():
        row = eligible[node_id]
        found += [
            f"{node_id} lacks {name}"
            for name, amount in request.ask.amounts
            if count * amount > row.effective.get(name, 0) - row.allocated.get(name, 0)
        ]
    for scope in rules.apart:
        per_domain = _count(eligible, node_ids, scope)
        found += [f"{count} replicas in {name}" for name, count in per_domain.items() if count > 1]
    for scope in rules.together:
        names = {domain(eligible[node_id], scope) for node_id in node_ids}
        if len(names) != 1 or None in names:
            found.append(f"not together: {names}")
    if request.spread is not None:
        per_domain = _count(eligible, node_ids, request.spread.scope)
        all_domains = _by_domain(rules.eligible, request.spread.scope)
        least = min(per_domain.get(name, 0) for name in all_domains) if len(all_domains) > 1 else 0
        if max(per_domain.values()) - least > request.spread.max_skew:
            found.append(f"uneven: {per_domain} of {sorted(all_domains)}")
    return found


def _is_open(row: NodeRow) -> bool:
    return row.blocked is None and row.last_contact is not None and row.last_contact >= NOW - STALE_AFTER_SECONDS


def _meets(row: NodeRow, request: SelectionRequest) -> bool:
    wanted = request.constraints
    return (
        (not wanted.node_types or row.node_type in wanted.node_types)
        and (not wanted.regions or row.region in wanted.regions)
        and (not wanted.zones or row.zone in wanted.zones)
        and (not wanted.sites or row.site in wanted.sites)
        and all(row.labels.get(key) in values for key, values in wanted.labels.items())
        and set(wanted.features) <= set(row.features)
        and (not wanted.node_ids or row.node_id in wanted.node_ids)
        and row.node_id not in wanted.exclude_node_ids
        and (
            wanted.within is None
            or kilometres(row, wanted.within.latitude, wanted.within.longitude) <= wanted.within.max_km
        )
    )


def _by_domain(rows: Sequence[NodeRow], scope: str) -> dict[str, list[str]]:
    found = defaultdict(list)
    for row in rows:
        name = domain(row, scope)
        if name is not None:
            found[name].append(row.node_id)
    return dict(found)


def _count(rows: Mapping[str, NodeRow], node_ids: Sequence[str], scope: str) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for node_id in node_ids:
        name = domain(rows[node_id], scope)
        if name is not None:
            found[name] += 1
    return dict(found)


# what is thrown at it


def random_fleet(dice: random.Random) -> Fleet:
    """Make up to 12 nodes in 2 regions, 3 zones and 6 sites, with some deployments on them."""
    # Site 1 to 6, zone a to c, region r or s: each site in one zone, each zone in one region.
    sites = [
        (f"{zone}{number}", zone, region) for zone, region in (("a", "r"), ("b", "r"), ("c", "s")) for number in (1, 2)
    ]
    deployments = {
        name: DeploymentRow(name, labels, [term | {"mode": "required"} for term in repels])
        for name, labels, repels in (
            ("db", {"app": "db", "tier": "back"}, []),
            ("cache", {"app": "cache", "tier": "back"}, [{"scope": dice.choice(SCOPES), "deployment_id": "web"}]),
            ("batch", {"app": "batch"}, [{"scope": dice.choice(SCOPES), "deployment_labels": {"app": "web"}}]),
        )
        if dice.random() < 0.5
    }
    return Fleet(
        [
            _random_row(dice, number, sites, deployments)
            for number in range(dice.choice([1, 2, 3, 5, 7, 9, 10, 11, 12, 12, 12, 12]))
        ],
        deployments,
    )


def _random_row(
    dice: random.Random, number: int, sites: Sequence[tuple[str, str, str]], deployments: Mapping[str, Any]
) -> NodeRow:
    site, zone, region = dice.choice(sites) if dice.random() < 0.93 else (None, None, dice.choice(["r", None]))
    gpus = [str(unit) for unit in range(dice.choice([0, 0, 1, 2, 3]))]
    used = {unit: dice.choice([250, 460, 500, 1000]) for unit in gpus if dice.random() < 0.2}
    cpu, memory = dice.choice([(1000, 1000), (2000, 1500), (4000, 4000)])
    capacity = {"cpu_millicores": cpu, "memory_mib": memory} | ({"gpu": len(gpus)} if gpus else {})
    placed = dice.random() < 0.8
    return make_row(
        f"n{number:02d}",
        node_type=dice.choice(["server", "server", "edge", None]),
        region=region,
        zone=zone,
        site=site,
        latitude=dice.choice([48.0, 50.0, -17.0]) if placed else None,
        longitude=dice.choice([11.0, 179.9, -179.9]) if placed else None,
        labels={key: dice.choice("xy") for key in ("line", "disk") if dice.random() < 0.7},
        features=[name for name in ("docker", "systemd") if dice.random() < 0.8],
        images=["app:1"] if dice.random() < 0.3 else [],
        blocked=dice.choice([None] * 30 + ["not_active", "unhealthy", "quarantined"]),
        last_contact=dice.choice([NOW] * 30 + [NOW - STALE_AFTER_SECONDS, NOW - STALE_AFTER_SECONDS - 1, None]),
        health=dice.choice(["healthy", "degraded"]),
        health_since=NOW - dice.randrange(10_000),
        effective=capacity,
        capacity=capacity,
        units={"gpu": gpus} if gpus else {},
        allocated={
            "cpu_millicores": dice.randrange(0, cpu, 100) // dice.choice([1, 4]),
            "memory_mib": dice.randrange(0, memory, 100),
        },
        used_units={"gpu": used} if used else {},
        cpu_percent=dice.choice([None, dice.random() * 100]),
        memory_percent=dice.choice([None, dice.random() * 100]),
        deployments={name: dice.randint(1, 2) for name in deployments if dice.random() < 0.12},
    )


def random_request(dice: random.Random, fleet: Fleet, deployment_id: str = "web") -> SelectionRequest:
    """Make a request that doesn't contradict itself."""
    while True:
        try:
            return SelectionRequest.model_validate(_random_body(dice, fleet, deployment_id))
        except ValueError:
            continue


def _random_body(dice: random.Random, fleet: Fleet, deployment_id: str) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if dice.random() < 0.9:
        resources["cpu_millicores"] = dice.choice([100, 300, 500, 900])
    if dice.random() < 0.6:
        resources["memory_mib"] = dice.choice([100, 300, 700])
    if dice.random() < 0.3 or not resources:
        share = dice.choice([200, 250, 460, 500, 600])
        resources["gpu"] = dice.choice([1, 1, 2, *[{"count": dice.choice([1, 1, 2, 3]), "share_milli": share}] * 3])
    node_ids = [row.node_id for row in fleet.rows]
    constraints: dict[str, Any] = {}
    for name, values in (
        ("node_types", ["server", "edge"]),
        ("regions", ["r", "s"]),
        ("zones", ["a", "b", "c"]),
        ("sites", ["a1", "a2", "b1", "b2", "c1", "c2"]),
        ("features", ["docker", "systemd"]),
        ("node_ids", node_ids),
        ("exclude_node_ids", node_ids),
    ):
        if dice.random() < 0.05:
            constraints[name] = dice.sample(values, dice.randint(1, len(values)))
    if dice.random() < 0.08:
        constraints["labels"] = {"line": dice.sample("xy", dice.randint(1, 2))}
    if dice.random() < 0.1:
        constraints["within"] = {"latitude": -17.0, "longitude": 180.0, "max_km": dice.choice([20, 8000, 20_100])}
    body = {
        "deployment_id": deployment_id,
        "owner": "shop",
        "replicas": dice.randint(1, 6),
        "resources": resources,
        "labels": {"app": "web"} if dice.random() < 0.7 else {},
        "constraints": constraints,
        "affinity": [_random_term(dice, deployment_id) for _ in range(dice.choice([0, 0, 0, 0, 1, 1, 2]))],
        "anti_affinity": [_random_term(dice, deployment_id) for _ in range(dice.choice([0, 0, 0, 1, 1, 2]))],
        "images": ["app:1"] if dice.random() < 0.3 else [],
        "strategy": dice.choice(["balanced", "spread", "binpack"]),
    }
    if dice.random() < 0.4:
        body["spread"] = {"scope": dice.choice(SCOPES), "max_skew": dice.choice([1, 1, 2, 3])}
    if dice.random() < 0.3:
        body["near"] = {"latitude": 49.0, "longitude": 12.0}
    return body


def _random_term(dice: random.Random, deployment_id: str) -> dict[str, Any]:
    target: dict[str, Any] = dice.choice(
        [
            *[{"deployment_id": deployment_id}] * 5,
            {"deployment_id": "db"},
            {"deployment_labels": {"app": "web"}},
            {"deployment_labels": {"tier": "back"}},
            {"deployment_labels": {"app": "db", "tier": "back"}},
            {"node_labels": {"line": "x"}},
            {"node_labels": {"line": "x", "disk": "y"}},
        ]
    )
    return {
        "scope": dice.choice(SCOPES),
        "mode": dice.choice(["required", "required", "preferred"]),
        "weight": dice.randint(1, 5),
        **target,
    }


def shuffled(dice: random.Random, fleet: Fleet) -> Fleet:
    """Give the same fleet with its nodes and deployments in another order."""
    names = dice.sample(sorted(fleet.deployments), len(fleet.deployments))
    return replace(
        fleet,
        rows=dice.sample(list(fleet.rows), len(fleet.rows)),
        deployments={name: fleet.deployments[name] for name in names},
    )
