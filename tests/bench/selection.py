# SPDX-License-Identifier: GPL-3.0-or-later
"""How many selections a second one process makes, and how the cost grows with the fleet.

Every request has all filters on: type, labels, feature, region, zones, distance, required and preferred affinity and
anti-affinity, spread, resources; every node is filtered and scored for every replica, none is sampled. What is chosen is
counted as placed in the index, so that the next request meets a changed fleet. The anchor is kube-scheduler's own gate at
5,000 nodes, 810 pods a second (kubernetes/test/integration/scheduler_perf), which samples nodes; it can't be run here, so the
floor beside ours is a part of the same work in plain Python, node by node.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from node_manager.decisions import deployment_of
from node_manager.fleet_index import FleetIndex
from node_manager.fleet_rows import NodeRow
from node_manager.fragmentation import RequestMix
from node_manager.node_selector import NodeSelector, Selection
from node_manager.selection_request import SelectionRequest

NOW = 1_795_363_200.0
TYPES = ("server", "edge-compute", "edge-gateway", "gpu-edge")
SIZES = ((4000, 8192), (8000, 16384), (16000, 32768), (32000, 65536))


def main() -> None:
    """Measure fleets of each size, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    print("nodes     selections/s   replicas/s (3 each)   nodes scored/s   plain Python, 1 request   placed")
    for nodes in arguments.nodes:
        single, _, placed = measure(nodes, 1, arguments.seconds)
        triple, _, _ = measure(nodes, 3, arguments.seconds)
        plain = measure_plain(nodes)
        print(
            f"{nodes:7}   {single:12.0f}   {3 * triple:19.0f}   {single * nodes:14.3g}   {plain * single:10.0f} x as long"
            f"   {placed:.0%}",
            flush=True,
        )


def measure(nodes: int, replicas: int, seconds: float) -> tuple[float, int, float]:
    """Run selections for a while; give selections per second, how many, and the share that found a place."""
    index = build(nodes)
    selector = NodeSelector(index, RequestMix(), stale_after_seconds=180)
    wanted = list(requests(20_000, replicas))
    for request in wanted[:50]:
        keep(index, request, selector.select(request, NOW))
    done = found = 0
    start = time.perf_counter()
    for request in wanted[50:]:
        selection = selector.select(request, NOW)
        keep(index, request, selection)
        done += 1
        found += selection.fits
        if time.perf_counter() - start > seconds:
            break
    return done / (time.perf_counter() - start), done, found / done


def keep(index: FleetIndex, request: SelectionRequest, selection: Selection) -> None:
    """Let others see the deployment, as the service does."""
    if selection.fits:
        index.put_deployment(deployment_of(request))


def build(nodes: int, seed: int = 1) -> FleetIndex:
    """Make a fleet of 20 zones in 4 regions and 200 sites, half of it in use."""
    index = FleetIndex(nodes)
    for row in rows(nodes, seed):
        index.put(row)
    return index


def rows(nodes: int, seed: int = 1) -> Iterator[NodeRow]:
    """Make the nodes of the fleet."""
    dice = random.Random(seed)
    for number in range(nodes):
        cpu, memory = dice.choice(SIZES)
        site = dice.randrange(200)
        zone = site % 20
        node_type = dice.choice(TYPES)
        has_gpu = node_type == "gpu-edge"
        capacity = {"cpu_millicores": cpu, "memory_mib": memory, "disk_mib": 200_000, "network_mbps": 1000}
        yield NodeRow(
            node_id=f"node-{number:06d}",
            node_type=node_type,
            region=f"region-{zone % 4}",
            zone=f"zone-{zone}",
            site=f"site-{site}",
            latitude=40 + (site % 50) * 0.3 + dice.random() * 0.01,
            longitude=(site // 50) * 4 + dice.random() * 0.01,
            labels={"line": "abcd"[number % 4], "owner": f"team-{number % 11}", "serial": f"s{number}"},
            features=["docker", "systemd"] if number % 5 else ["systemd"],
            images=[f"app-{dice.randrange(30)}:1"],
            blocked=None if number % 50 else "not_active",
            last_contact=NOW - dice.random() * 60,
            health="healthy" if number % 20 else "degraded",
            health_since=NOW - dice.random() * 100_000,
            effective=capacity | ({"gpu": 2} if has_gpu else {}),
            units={"gpu": ["0", "1"]} if has_gpu else {},
            allocated={"cpu_millicores": dice.randrange(cpu // 2), "memory_mib": dice.randrange(memory // 2)},
            used_units={},
            capacity=capacity,
            cpu_percent=dice.random() * 70,
            memory_percent=dice.random() * 70,
            unseen={},
            deployments={},
            pressed_until=None,
        )


def requests(count: int, replicas: int, seed: int = 2) -> Iterator[SelectionRequest]:
    """Make requests with every filter on, of values that differ from one to the next."""
    dice = random.Random(seed)
    for number in range(count):
        zones = [f"zone-{zone}" for zone in range(20) if dice.random() < 0.8]
        plant = dice.randrange(50)
        before = f"app-{dice.randrange(number)}" if number else "none"
        body: dict[str, Any] = {
            "deployment_id": f"app-{number}",
            "owner": f"team-{number % 7}",
            "replicas": replicas,
            "resources": {
                "cpu_millicores": dice.randrange(10, 200),
                "memory_mib": dice.randrange(16, 256),
                "disk_mib": dice.randrange(10, 500),
            },
            "labels": {"app": f"kind-{number % 5}"},
            "constraints": {
                "node_types": dice.sample(TYPES, 3),
                "labels": {"line": dice.sample("abcd", 3)},
                "features": ["docker"],
                "zones": zones,
                "regions": ["region-0", "region-1", "region-2", "region-3"],
                "exclude_node_ids": [f"node-{dice.randrange(1000):06d}"],
                "within": {"latitude": 45.0 + plant % 5, "longitude": 2.0 + plant % 10, "max_km": 1500},
            },
            "affinity": [
                {"mode": "preferred", "scope": "zone", "node_labels": {"owner": f"team-{dice.randrange(11)}"}}
            ],
            "anti_affinity": [
                {"mode": "required", "scope": "node", "deployment_id": before},
                {"mode": "preferred", "scope": "site", "deployment_labels": {"app": f"kind-{number % 5}"}},
            ],
            "spread": {"scope": "zone", "max_skew": 2},
            "near": {"latitude": 45.0 + plant % 7, "longitude": 2.0 + plant % 10},
            "images": [f"app-{dice.randrange(30)}:1"],
        }
        yield SelectionRequest.model_validate(body)


def measure_plain(nodes: int) -> float:
    """Give the seconds that one request takes node by node, with a part of the filters and the plainest score."""
    fleet = list(rows(nodes))
    wanted = next(requests(1, 1))
    resources = dict(wanted.ask.amounts)
    start = time.perf_counter()
    best, chosen = -1.0, None
    for row in fleet:
        if row.blocked or row.last_contact is None or row.last_contact < NOW - 180:
            continue
        if row.node_type not in wanted.constraints.node_types or row.zone not in wanted.constraints.zones:
            continue
        if any(row.labels.get(key) not in values for key, values in wanted.constraints.labels.items()):
            continue
        left = {name: row.effective[name] - row.allocated.get(name, 0) - amount for name, amount in resources.items()}
        if min(left.values()) < 0:
            continue
        score = sum(left[name] / row.effective[name] for name in left)
        if score > best:
            best, chosen = score, row
    assert chosen is not None
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
