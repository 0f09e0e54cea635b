# SPDX-License-Identifier: GPL-3.0-or-later
"""How much of a fleet `binpack` fills, beside the policies it is compared with, on a production trace and on mixes drawn from it.

The protocol is that of "Beware of Fragmentation" (Weng et al., USENIX ATC 2023): the tasks are shuffled with a seed and
repeated until they ask for 130 % of the fleet's GPUs, arrive one at a time and never leave; what fits nowhere is dropped.
`binpack` goes through the node selector and learns the mix while it places; FGD is told the trace's distribution, as in the
paper.

``python tests/bench/packing.py [--seeds N] [--mix NAME ... | --mix all] [--policy NAME ...]``. NODE_MANAGER_TRACES names a
folder with `openb_node_list_gpu_node.csv` and `openb_pod_list_default.csv` of the Alibaba trace `cluster-trace-gpu-v2023`.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from node_manager.fleet_index import FleetIndex
from node_manager.fleet_rows import NodeRow
from node_manager.fragmentation import Floats, FreeSpace, RequestMix, Rows, Units
from node_manager.node_selector import NodeSelector
from node_manager.selection_request import SelectionRequest, Strategy

CPU, MEMORY, GPU = "cpu_millicores", "memory_mib", "gpu"
WHOLE = 1000
FIRST_SEED = 42
NOW = 1_795_363_200.0
ARRIVED = 1.3
PUBLISHED = {"random": 87.5, "dot_product": 90.9, "gpu_packing": 92.0, "best_fit": 93.1, "fgd": 95.4}
TRACE_FILES = ("openb_node_list_gpu_node.csv", "openb_pod_list_default.csv")


@dataclass(frozen=True)
class Node:
    """What one machine has."""

    cpu: int
    memory: int
    gpus: int


@dataclass(frozen=True)
class Task:
    """What one task asks for: some whole GPUs, or a share of one."""

    cpu: int
    memory: int
    gpus: int
    share: int

    @property
    def gpu_milli(self) -> int:
        """Give the GPUs asked for in thousandths."""
        return self.gpus * self.share


Workload = tuple[list[Node], list[Task]]


def read_trace(folder: Path) -> Workload:
    """Read the trace's nodes and tasks."""
    with (folder / TRACE_FILES[0]).open() as file:
        nodes = [Node(int(row["cpu_milli"]), int(row["memory_mib"]), int(row["gpu"])) for row in csv.DictReader(file)]
    with (folder / TRACE_FILES[1]).open() as file:
        asked = [
            tuple(int(row[key]) for key in ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli"))
            for row in csv.DictReader(file)
        ]
    return nodes, [Task(cpu, memory, gpus, share if gpus else 0) for cpu, memory, gpus, share in asked]


# What other fleets ask for and have, drawn from the trace: (nodes, tasks, chance) -> (nodes, tasks)


def _multi_gpu(nodes: list[Node], tasks: list[Task], chance: random.Random) -> Workload:
    several = chance.choices([task for task in tasks if task.gpus > 1], k=1500)
    return nodes, several + chance.choices([task for task in tasks if task.gpu_milli == WHOLE], k=1500)


def _shared_gpu(nodes: list[Node], tasks: list[Task], chance: random.Random) -> Workload:
    return nodes, chance.choices([task for task in tasks if 0 < task.gpu_milli < WHOLE], k=6000)


def _one_gpu(nodes: list[Node], tasks: list[Task], chance: random.Random) -> Workload:
    return nodes, chance.choices([task for task in tasks if task.gpu_milli == WHOLE], k=6000)


def _more_cpu_only(nodes: list[Node], tasks: list[Task], chance: random.Random) -> Workload:
    return nodes, tasks + chance.choices([task for task in tasks if not task.gpus], k=2000)


def _fewer_cpus(nodes: list[Node], tasks: list[Task], chance: random.Random) -> Workload:
    return [Node(node.cpu * 3 // 4, node.memory, node.gpus) for node in nodes], tasks


def _quarter(nodes: list[Node], tasks: list[Task], chance: random.Random) -> Workload:
    return chance.sample(nodes, len(nodes) // 4), tasks


def _no_devices(nodes: list[Node], tasks: list[Task], chance: random.Random) -> Workload:
    return [Node(node.cpu, node.memory, 0) for node in nodes], [
        Task(task.cpu, min(task.memory * chance.choice((1, 1, 2, 4)), 500_000), 0, 0) for task in tasks
    ]


def _some_devices(nodes: list[Node], tasks: list[Task], chance: random.Random) -> Workload:
    return [Node(node.cpu, node.memory, node.gpus * chance.choice((0, 1))) for node in nodes], tasks


MIXES: dict[str, Callable[[list[Node], list[Task], random.Random], Workload]] = {
    "trace": lambda nodes, tasks, _: (nodes, list(tasks)),
    "multi_gpu": _multi_gpu,
    "shared_gpu": _shared_gpu,
    "one_gpu": _one_gpu,
    "more_cpu_only": _more_cpu_only,
    "fewer_cpus": _fewer_cpus,
    "quarter": _quarter,
    "some_devices": _some_devices,
    "no_devices": _no_devices,
}


def arrivals(nodes: Sequence[Node], tasks: list[Task], chance: random.Random) -> list[Task]:
    """Shuffle the tasks and repeat them to 130 % of the fleet's GPUs, or of its processors if it has none."""
    chance.shuffle(tasks)
    goal = ARRIVED * (sum(node.gpus for node in nodes) * WHOLE or sum(node.cpu for node in nodes))
    devices = any(node.gpus for node in nodes)
    arrived: list[Task] = []
    while goal > 0:
        arrived.append(tasks[len(arrived) % len(tasks)])
        goal -= arrived[-1].gpu_milli if devices else arrived[-1].cpu
    return arrived


class SelectedFleet:
    """Place tasks through the node selector, strategy binpack: every request as a sister service would make it."""

    def __init__(self, nodes: Sequence[Node], seed: int) -> None:
        self._index = FleetIndex(len(nodes))
        self._selector = NodeSelector(self._index, RequestMix(), stale_after_seconds=60)
        self._seed = seed
        self.arrived = self.placed = 0
        for number, node in enumerate(nodes):
            self._index.put(row_of(f"node-{number}", node))

    def place(self, task: Task) -> None:
        """Take the room for a task where the selector wants it, if there is any."""
        self.arrived += 1
        resources: dict[str, Any] = {CPU: task.cpu, MEMORY: task.memory}
        if task.gpus:
            resources[GPU] = {"count": task.gpus, "share_milli": task.share}
        body = {"deployment_id": f"task-{self._seed}-{self.arrived}", "owner": "trace", "strategy": Strategy.BINPACK}
        wanted = {name: amount for name, amount in resources.items() if amount}
        request = SelectionRequest.model_validate({**body, "resources": wanted})
        self.placed += self._selector.select(request, NOW).fits

    def allocated(self) -> tuple[float, float, float]:
        """Tell which parts of GPUs, processors and memory are taken."""
        rows = [row for row in self._index.rows if row is not None]
        gpus = sum(len(row.units.get(GPU, ())) for row in rows)
        taken = sum(sum(row.used_units.get(GPU, {}).values()) for row in rows)
        cpu, memory = (
            sum(row.allocated.get(name, 0) for row in rows) / sum(row.effective[name] for row in rows)
            for name in (CPU, MEMORY)
        )
        return taken / (gpus * WHOLE) if gpus else float("nan"), cpu, memory


def row_of(node_id: str, node: Node) -> NodeRow:
    """Describe a machine as the index knows nodes."""
    capacity = {CPU: node.cpu, MEMORY: node.memory} | ({GPU: node.gpus} if node.gpus else {})
    return NodeRow(
        node_id=node_id,
        node_type=None,
        region=None,
        zone=None,
        site=None,
        latitude=None,
        longitude=None,
        labels={},
        features=[],
        images=[],
        blocked=None,
        last_contact=NOW,
        health="healthy",
        health_since=0.0,
        effective=capacity,
        units={GPU: [str(unit) for unit in range(node.gpus)]} if node.gpus else {},
        allocated={},
        used_units={},
        capacity=capacity,
        cpu_percent=None,
        memory_percent=None,
        unseen={},
        deployments={},
        pressed_until=None,
    )


class Policy(Protocol):
    """Cost of a task on each row with room, and the units to take there; every task is shown when it arrives."""

    def observe(self, task: Task) -> None: ...

    def costs(self, task: Task, fleet: Fleet, rows: Rows) -> Floats: ...

    def units(self, task: Task, fleet: Fleet, row: int) -> Sequence[int]: ...


class Fleet:
    """Place tasks one at a time: rows with room, the cheapest of them, ties by a seeded order of the rows."""

    def __init__(self, nodes: Sequence[Node], seed: int) -> None:
        gpus = np.array([node.gpus for node in nodes], dtype=np.int16)
        columns = {
            CPU: np.array([node.cpu for node in nodes], dtype=np.float64),
            MEMORY: np.array([node.memory for node in nodes], dtype=np.float64),
        }
        units = np.where(np.arange(max(gpus.max(), 1)) < gpus[:, np.newaxis], WHOLE, 0).astype(np.int16)
        self.space = FreeSpace(
            amounts={name: column.copy() for name, column in columns.items()},
            totals=columns,
            devices={GPU: units},
            device_counts={GPU: gpus},
            version=np.zeros(len(nodes), dtype=np.int64),
        )
        self.cpu, self.memory, self.gpu = self.space.amounts[CPU], self.space.amounts[MEMORY], units
        self.total_gpu_milli = int(gpus.sum()) * WHOLE
        self.placed = 0
        self._rank = np.random.default_rng(seed).permutation(len(nodes))

    def place(self, task: Task, policy: Policy) -> None:
        """Take the room for a task where the policy wants it, if there is any."""
        policy.observe(task)
        room = (self.cpu >= task.cpu) & (self.memory >= task.memory)
        if task.gpus:
            room &= (self.gpu >= task.share).sum(axis=1) >= task.gpus
        rows = np.flatnonzero(room)
        if not len(rows):
            return
        costs = policy.costs(task, self, rows)
        best = rows[costs == costs.min()]
        row = int(best[self._rank[best].argmin()])
        units = list(policy.units(task, self, row)) if task.gpus else []
        self.cpu[row] -= task.cpu
        self.memory[row] -= task.memory
        self.gpu[row, units] -= task.share
        self.space.version[row] += 1
        self.placed += 1

    def allocated(self) -> tuple[float, float, float]:
        """Tell which parts of GPUs, processors and memory are taken."""
        totals = self.space.totals
        return (
            1 - float(self.gpu.sum(dtype=np.int64)) / self.total_gpu_milli if self.total_gpu_milli else float("nan"),
            1 - float(self.cpu.sum() / totals[CPU].sum()),
            1 - float(self.memory.sum() / totals[MEMORY].sum()),
        )


class BestFit:
    """The least processors and GPUs left, each as a part of the largest node's."""

    def __init__(self, known: Sequence[Task], seed: int) -> None:
        self._chance = np.random.default_rng(seed)

    def observe(self, task: Task) -> None:
        """Learn nothing."""

    def costs(self, task: Task, fleet: Fleet, rows: Rows) -> Floats:
        cpu, gpu = fleet.space.totals[CPU].max(), max(fleet.gpu.shape[1], 1) * WHOLE
        return fleet.cpu[rows] / cpu + fleet.gpu[rows].sum(axis=1) / gpu

    def units(self, task: Task, fleet: Fleet, row: int) -> Sequence[int]:
        """Take the units with the least free that have room."""
        free = np.where(fleet.gpu[row] >= task.share, fleet.gpu[row], WHOLE + 1)
        return [int(unit) for unit in np.argsort(free, kind="stable")[: task.gpus]]


class Random(BestFit):
    """Any row with room."""

    def costs(self, task: Task, fleet: Fleet, rows: Rows) -> Floats:
        return self._chance.random(len(rows))


class DotProduct(BestFit):
    """The smallest product of what is asked and what is free."""

    def costs(self, task: Task, fleet: Fleet, rows: Rows) -> Floats:
        cpu, gpu = fleet.space.totals[CPU].max(), max(fleet.gpu.shape[1], 1) * WHOLE
        return fleet.cpu[rows] * task.cpu / cpu**2 + fleet.gpu[rows].sum(axis=1) * task.gpu_milli / gpu**2


class GpuPacking(BestFit):
    """Shared GPUs first, then free ones of a node in use, then a node all free."""

    def costs(self, task: Task, fleet: Fleet, rows: Rows) -> Floats:
        if not task.gpus:
            return np.zeros(len(rows))
        units = fleet.gpu[rows]
        whole = (units == WHOLE).sum(axis=1)
        tightest = np.sort(np.where(units >= task.share, units, WHOLE + 1), axis=1)[:, : task.gpus]
        fresh = (tightest == WHOLE).sum(axis=1)
        costs = np.where(fresh > 0, 2.0 * WHOLE + fresh, tightest.sum(axis=1))
        return np.where(whole == fleet.space.device_counts[GPU][rows], 3.0 * WHOLE + whole, costs)


class Fgd(BestFit):
    """The paper's own: what the free GPUs lose of their expected use, by the trace's distribution, known beforehand.

    A class that fits once can use every unit with room for its share; costs are kept until a row changes.
    """

    def __init__(self, known: Sequence[Task], seed: int) -> None:
        counts = Counter(task for task in known if task.gpus)
        self._needs = sorted({(task.gpus, task.share) for task in counts})
        self._need = np.array([self._needs.index((task.gpus, task.share)) for task in counts], dtype=np.int64)
        self._cpu = np.array([task.cpu for task in counts]).reshape(-1, 1)
        self._memory = np.array([task.memory for task in counts]).reshape(-1, 1)
        self._weights = np.array([count / len(known) for count in counts.values()])
        self._kept: dict[Task, tuple[Rows, Floats, Rows]] = {}

    def costs(self, task: Task, fleet: Fleet, rows: Rows) -> Floats:
        count = len(fleet.cpu)
        if task not in self._kept:
            self._kept[task] = np.full(count, -1), np.zeros(count), np.zeros(count, dtype=np.int64)
        stamp, costs, units = self._kept[task]
        stale = rows[stamp[rows] != fleet.space.version[rows]]
        if len(stale):
            growth, units[stale] = self._growth(task, fleet, stale)
            # So that what is equal ties, whatever the sums were.
            costs[stale] = growth.round(6)
            stamp[stale] = fleet.space.version[stale]
        return costs[rows]

    def units(self, task: Task, fleet: Fleet, row: int) -> Sequence[int]:
        if task.share < WHOLE:
            return [int(self._kept[task][2][row])]
        return [int(unit) for unit in np.flatnonzero(fleet.gpu[row] == WHOLE)[: task.gpus]]

    def _growth(self, task: Task, fleet: Fleet, rows: Rows) -> tuple[Floats, Rows]:
        cpu, memory, units = fleet.cpu[rows], fleet.memory[rows], fleet.gpu[rows]
        before = self._usable(cpu, memory, units)
        if not task.gpus or task.share == WHOLE:
            whole = units == WHOLE
            after = np.where(whole & (whole.cumsum(axis=1) <= task.gpus), 0, units) if task.gpus else units
            return before - self._usable(cpu - task.cpu, memory - task.memory, after), np.zeros(
                len(rows), dtype=np.int64
            )
        losses = np.full(units.shape, np.inf)
        line, unit = np.nonzero(units >= task.share)
        after = units[line]
        after[np.arange(len(line)), unit] -= task.share
        losses[line, unit] = before[line] - self._usable(cpu[line] - task.cpu, memory[line] - task.memory, after)
        return losses.min(axis=1), losses.round(6).argmin(axis=1)

    def _usable(self, cpu: Floats, memory: Floats, units: Units) -> Floats:
        by_need = np.zeros((len(self._needs), len(cpu)))
        for line, (gpus, share) in enumerate(self._needs):
            room = units >= share
            by_need[line] = (units * room).sum(axis=1) * (room.sum(axis=1) >= gpus)
        fits = (cpu >= self._cpu) & (memory >= self._memory)
        return self._weights @ (by_need[self._need] * fits)


POLICIES: dict[str, Callable[[Sequence[Task], int], Policy]] = {
    "random": Random,
    "dot_product": DotProduct,
    "gpu_packing": GpuPacking,
    "best_fit": BestFit,
    "fgd": Fgd,
}
OURS = "binpack"


def run(name: str, policy: str, trace: Workload, seed: int) -> tuple[float, float, float, float, float]:
    """Fill one fleet; give the parts of GPUs, processors, memory and tasks placed, and the seconds it took."""
    chance = random.Random(seed)
    nodes, tasks = MIXES[name](trace[0], trace[1], chance)
    order = arrivals(nodes, list(tasks), chance)
    fleet: Fleet | SelectedFleet
    start = time.perf_counter()
    if policy == OURS:
        fleet = SelectedFleet(nodes, seed)
        for task in order:
            fleet.place(task)
    else:
        fleet, placer = Fleet(nodes, seed), POLICIES[policy](tasks, seed)
        for task in order:
            fleet.place(task, placer)
    seconds = time.perf_counter() - start
    return (*fleet.allocated(), fleet.placed / len(order), seconds)


def main() -> None:
    """Print a table for each mix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 42 on")
    parser.add_argument("--mix", nargs="+", choices=[*MIXES, "all"], default=["trace"])
    parser.add_argument("--policy", nargs="+", choices=[*POLICIES, OURS], default=[*POLICIES, OURS])
    arguments = parser.parse_args()
    folder = os.environ.get("NODE_MANAGER_TRACES")
    if not folder:
        print(
            f"Set NODE_MANAGER_TRACES to a folder with {' and '.join(TRACE_FILES)} (Alibaba cluster-trace-gpu-v2023)."
        )
        sys.exit(0)
    trace = read_trace(Path(folder))
    for name in MIXES if "all" in arguments.mix else arguments.mix:
        print(f"{name}: mean of {arguments.seeds} seeds, {ARRIVED:.0%} arrived")
        print(
            f"  {'policy':12} {'GPU %':>7} {'lowest':>7} {'paper':>6} {'CPU %':>6} {'mem %':>6} {'placed %':>8} {'s/run':>6}"
        )
        for policy in arguments.policy:
            runs = [run(name, policy, trace, FIRST_SEED + number) for number in range(arguments.seeds)]
            gpu, cpu, memory, placed, seconds = (statistics.mean(column) for column in zip(*runs, strict=True))
            paper = f"{PUBLISHED[policy]:.1f}" if name == "trace" and policy in PUBLISHED else ""
            print(
                f"  {policy:12} {100 * gpu:7.2f} {100 * min(one[0] for one in runs):7.2f} {paper:>6} {100 * cpu:6.2f}"
                f" {100 * memory:6.2f} {100 * placed:8.2f} {seconds:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
