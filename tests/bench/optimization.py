# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure how good the advised moves are, and what they cost: the planner side by side with a solver (HiGHS) that may
choose any moves of the same number, and the planner alone from 1,000 to 10,000 nodes.

``python tests/bench/optimization.py [SECONDS] [SEEDS]`` gives the solver 1 second, then twice SECONDS (20) for each fleet.

The solver is favoured: no bands, no least gain per move, and no order in which every step must fit.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace

import highspy
import numpy as np
from node_manager.optimisation import Advice, Limits, Movable, Move, NodeLoad, advise, imbalance

SIZES = {"server": (64_000, 131_072, 900_000), "edge": (12_000, 15_360, 120_000), "constrained": (4_000, 3_584, 28_000)}
CLASSES = ("cpu_millicores", "memory_mib", "disk_mib")
ZONES = 4
# How full the nodes of a fleet are, per class, and what part of the fleet is so.
SKEWS = {
    "hot spots": [(0.1, (0.95, 0.9, 0.5)), (0.9, (0.4, 0.35, 0.2))],
    "new nodes": [(0.2, (0.0, 0.0, 0.0)), (0.8, (0.75, 0.7, 0.3))],
    "two shapes": [(0.5, (0.85, 0.25, 0.2)), (0.5, (0.2, 0.8, 0.3))],
    "random": [(0.2, (share, share, share / 2)) for share in (0.15, 0.35, 0.55, 0.75, 0.95)],
}
Fleet = tuple[list[NodeLoad], list[Movable], dict[str, int]]


class Apart:
    """Replicas stand on nodes of their own; every third deployment keeps to its zone."""

    def __init__(self, allocations: list[Movable], zones: dict[str, int]) -> None:
        self.zones = zones
        self.zone_of = {
            item.deployment_id: zones[item.node_id] for item in allocations if int(item.deployment_id[1:]) % 3 == 0
        }
        self.held = {(item.deployment_id, item.node_id) for item in allocations}
        self.questions = 0

    def in_zone(self, allocation: Movable, to_node: str) -> bool:
        """Tell what no move changes."""
        return self.zone_of.get(allocation.deployment_id, self.zones[to_node]) == self.zones[to_node]

    def allowed(self, allocation: Movable, to_node: str) -> bool:
        """Tell whether an allocation may stand there now."""
        self.questions += 1
        return (allocation.deployment_id, to_node) not in self.held and self.in_zone(allocation, to_node)

    def moved(self, move: Move) -> None:
        """Take a move as made."""
        self.held.remove((move.deployment_id, move.from_node))
        self.held.add((move.deployment_id, move.to_node))


def make_fleet(count: int, skew: str, seed: int, per_node: int = 5) -> Fleet:
    """Make a fleet of three types of nodes, filled as the skew says."""
    chance = random.Random(f"{count} {skew} {seed}")
    zones = {f"node-{number:05d}": number % ZONES for number in range(count)}
    parts, shares = zip(*SKEWS[skew], strict=True)
    nodes, held = [], []
    for node_id in zones:
        size = SIZES[chance.choices(list(SIZES), (1, 3, 1))[0]]
        share = chance.choices(shares, parts)[0]
        taken = [0, 0, 0]
        # What is given out is made for the node: one of six, between a half and one and a half of an even part.
        for _ in range(per_node if any(share) else 0):
            amounts = [
                min(int(chance.uniform(0.5, 1.5) * part * total / per_node), total - used)
                for part, total, used in zip(share, size, taken, strict=True)
            ]
            taken = [used + amount for used, amount in zip(taken, amounts, strict=True)]
            held.append((node_id, amounts))
        books = (dict(zip(CLASSES, amounts, strict=True)) for amounts in (size, taken))
        nodes.append(NodeLoad(node_id, *books, accepts=True))
    return nodes, deploy(held, zones, chance), zones


def deploy(held: list[tuple[str, list[int]]], zones: dict[str, int], chance: random.Random) -> list[Movable]:
    """Share allocations out to deployments of up to four replicas, each on nodes of its own; a third within a zone."""
    chance.shuffle(held)
    open_by_kind: dict[int, tuple[str, set[str], int]] = {}
    found, deployments = [], 0
    for number, (node_id, amounts) in enumerate(held):
        kind = zones[node_id] if chance.random() < 1 / 3 else -1
        name, there, room = open_by_kind.get(kind, ("", set(), 0))
        if not room or node_id in there:
            deployments += 1
            name = f"d{3 * deployments if kind >= 0 else 3 * deployments + 1}"
            there, room = set(), chance.randint(1, 4)
        open_by_kind[kind] = (name, there | {node_id}, room - 1)
        found.append(Movable(f"a{number:06d}", name, node_id, dict(zip(CLASSES, amounts, strict=True)), movable=True))
    return found


def apply(nodes: list[NodeLoad], allocations: list[Movable], pairs: list[tuple[str, str]]) -> list[NodeLoad]:
    """Give the fleet after moves of (allocation, to node)."""
    held = {item.allocation_id: item for item in allocations}
    change: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for allocation_id, to_node in pairs:
        item = held[allocation_id]
        for name, amount in item.amounts.items():
            change[item.node_id][name] -= amount
            change[to_node][name] += amount
    return [
        replace(node, allocated={name: amount + change[node.node_id][name] for name, amount in node.allocated.items()})
        for node in nodes
    ]


def stranded(nodes: list[NodeLoad]) -> float:
    """Measure the part of the fleet's processors and memory that is free on nodes which are fuller in the other."""
    gaps = []
    for node in nodes:
        cpu, memory = (node.allocated[name] / node.effective[name] for name in CLASSES[:2])
        gaps.append(abs(cpu - memory) / 2)
    return statistics.mean(gaps)


def plan(fleet: Fleet, limits: Limits) -> tuple[Advice, float]:
    """Ask the planner once, and time it."""
    nodes, allocations, zones = fleet
    constraints = Apart(allocations, zones)
    started = time.perf_counter()
    advice = advise(nodes, allocations, constraints, limits)
    return advice, time.perf_counter() - started


class Rows:
    """Rows of a linear programme, as HiGHS takes them."""

    def __init__(self) -> None:
        self.low: list[float] = []
        self.high: list[float] = []
        self.starts: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []

    def add(self, low: float, high: float, terms: list[tuple[int, float]]) -> None:
        """Bound a sum of (column, factor)."""
        self.starts.append(len(self.columns))
        self.low.append(low)
        self.high.append(high)
        self.columns.extend(column for column, _ in terms)
        self.values.extend(value for _, value in terms)


def solve(fleet: Fleet, limits: Limits, seconds: float) -> tuple[list[tuple[str, str]], float, str]:
    """Let HiGHS choose at most so many moves, the squares as the highest of their tangents, 2.5 points apart."""
    nodes, allocations, zones = fleet
    started = time.perf_counter()
    constraints = Apart(allocations, zones)
    choices = [
        (item, node)
        for item in allocations
        for node in nodes
        if node.node_id != item.node_id and constraints.in_zone(item, node.node_id)
    ]
    cells = [(node, name) for node in nodes for name in CLASSES]
    rows, count, infinity = Rows(), len(choices), highspy.kHighsInf
    arriving: dict[str, list[tuple[int, Movable]]] = defaultdict(list)
    leaving: dict[str, list[tuple[int, Movable]]] = defaultdict(list)
    once: dict[str, list[tuple[int, float]]] = defaultdict(list)
    apart: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for column, (item, node) in enumerate(choices):
        arriving[node.node_id].append((column, item))
        leaving[item.node_id].append((column, item))
        once[item.allocation_id].append((column, 1.0))
        apart[item.deployment_id, node.node_id].append((column, 1.0))
        if (item.deployment_id, item.node_id) in constraints.held:
            apart[item.deployment_id, item.node_id].append((column, -1.0))
    rows.add(-infinity, limits.max_moves, [(column, 1.0) for column in range(count)])
    for terms in once.values():
        rows.add(-infinity, 1.0, terms)
    for key, terms in apart.items():
        rows.add(-infinity, 0.0 if key in constraints.held else 1.0, terms)
    for place, (node, name) in enumerate(cells):
        mean = sum(other.allocated[name] for other in nodes) / sum(other.effective[name] for other in nodes)
        total, distance, square = node.effective[name], count + place, count + len(cells) + place
        terms = [(column, item.amounts[name] / total) for column, item in arriving[node.node_id]]
        terms += [(column, -item.amounts[name] / total) for column, item in leaving[node.node_id]]
        now = node.allocated[name] / total
        rows.add(now - mean, now - mean, [(distance, 1.0), *((column, -value) for column, value in terms)])
        rows.add(-infinity, 1.0 - mean, [(distance, 1.0)])
        for step in range(-40, 41):
            touch = step / 40
            rows.add(-touch * touch, infinity, [(square, 1.0), (distance, -2 * touch)])
    width = count + 2 * len(cells)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = width, len(rows.low)
    model.col_cost_ = np.array([0.0] * (count + len(cells)) + [1.0] * len(cells))
    model.col_lower_ = np.array([0.0] * count + [-infinity] * len(cells) + [0.0] * len(cells))
    model.col_upper_ = np.array([1.0] * count + [infinity] * 2 * len(cells))
    model.row_lower_, model.row_upper_ = np.array(rows.low), np.array(rows.high)
    model.integrality_ = [highspy.HighsVarType.kInteger] * count + [highspy.HighsVarType.kContinuous] * (width - count)
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.array([*rows.starts, len(rows.columns)])
    model.a_matrix_.index_, model.a_matrix_.value_ = np.array(rows.columns), np.array(rows.values)
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("time_limit", seconds)
    highs.setOptionValue("threads", 1)
    highs.passModel(model)
    # To begin with nobody moves: without this it may come back with less than it was given.
    still = highspy.HighsSolution()
    distances = [row for row, low in enumerate(rows.low) if low == rows.high[row]]
    at_first = [rows.low[row] for row in distances]
    highest = [max(2 * touch * x - touch * touch for touch in (step / 40 for step in range(-40, 41))) for x in at_first]
    still.col_value = [0.0] * count + at_first + highest
    highs.setSolution(still)
    highs.run()
    solution = highs.getSolution().col_value if highs.getInfo().primal_solution_status == 2 else []
    chosen = [
        (item.allocation_id, node.node_id)
        for (item, node), value in zip(choices, solution[:count], strict=False)
        if value > 0.5
    ]
    return chosen, time.perf_counter() - started, highs.modelStatusToString(highs.getModelStatus())


def compare(seconds: float, seeds: int) -> None:
    """Print the planner beside the solver, fleet by fleet."""
    limits = Limits()
    print(
        f"the planner at its defaults; the solver with as many moves in 1 s and in {seconds:g} s, then with {limits.max_moves}"
    )
    print("fleet                    before  planner (moves, s)     1 s, as many  longer, as many  longer, more (moves)")
    ahead = 0
    fleets = [(count, skew, seed) for count in (10, 20, 40) for skew in SKEWS for seed in range(seeds)]
    for count, skew, seed in fleets:
        fleet = make_fleet(count, skew, seed)
        nodes, allocations, _ = fleet
        advice, took = plan(fleet, limits)
        as_many = replace(limits, max_moves=len(advice.moves))
        found = [solve(fleet, as_many, 1.0), solve(fleet, as_many, seconds), solve(fleet, limits, seconds)]
        quick, same, more = (imbalance(apply(nodes, allocations, moves)) for moves, _, _ in found)
        ahead += quick < advice.imbalance_after - 1e-9
        print(
            f"{count:4d} nodes {skew:<12s} {advice.imbalance_before:8.4f} {advice.imbalance_after:8.4f}"
            f" ({len(advice.moves):2d}, {took:6.3f}) {quick:16.4f}"
            f" {same:16.4f}{'*' if found[1][2] == 'Optimal' else ' '} {more:13.4f} ({len(found[2][0])})"
            f"   x{found[1][1] / took:.0f} the time",
            flush=True,
        )
    print(f"* proven best; within 1 s the solver is ahead in {ahead} of {len(fleets)} fleets")


def scale() -> None:
    """Print what the planner costs by the size of the fleet, and what its advice does for stranded resources."""
    print(
        "nodes  allocations  skew            before    after  moves  cut  stranded before/after  questions  median of 5"
    )
    for skew in SKEWS:
        costs = []
        for count in (1_000, 10_000):
            nodes, allocations, zones = make_fleet(count, skew, 0)
            times = []
            for _ in range(5):
                constraints = Apart(allocations, zones)
                started = time.perf_counter()
                advice = advise(nodes, allocations, constraints, Limits())
                times.append(time.perf_counter() - started)
            after = apply(nodes, allocations, [(move.allocation_id, move.to_node) for move in advice.moves])
            costs.append(statistics.median(times))
            print(
                f"{count:6d} {len(allocations):10d}   {skew:<12s} {advice.imbalance_before:8.5f} {advice.imbalance_after:8.5f}"
                f" {len(advice.moves):6d}  {advice.cut!s:5s} {stranded(nodes):8.4f} {stranded(after):8.4f}"
                f" {constraints.questions:12d} {costs[-1]:10.3f} s"
            )
        print(f"  10 times the fleet costs {costs[1] / costs[0]:.1f} times as much")


def main() -> int:
    """Compare, then scale."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    scale()
    compare(seconds, seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
