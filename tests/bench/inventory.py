# SPDX-License-Identifier: GPL-3.0-or-later
"""Measure what the registry costs as an inventory: ``ansible-inventory --graph`` with 10,000 nodes from the store, side by
side with the same hosts, groups and variables from a plain JSON inventory script.

``python tests/bench/inventory.py [NODES] [RUNS]`` prints both medians and their ratio.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from node_manager.declarations import NodeDeclaration
from node_manager.domain import Health
from node_manager.health_checker import NodeState
from node_manager.node_states import insert_state
from node_manager.settings import load_settings
from node_manager.store import Store, open_store, tables

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE_INVENTORY = Path(sys.executable).with_name("ansible-inventory")
AIM = 1.15
TYPES = ("server", "edge-gateway", "edge-compute", "gpu-edge", "constrained")


def declarations(count: int) -> list[NodeDeclaration]:
    """Make a fleet of plants with gateways: zones, sites and labels as uneven as real ones."""
    chance = random.Random(42)
    return [
        NodeDeclaration.model_validate(
            {
                "node_id": f"gw-{number:05d}",
                "name": f"Gateway {number}",
                "address": f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}",
                "node_type": chance.choice(TYPES),
                "labels": {"line": chance.choice("abcdef"), "tier": chance.choice(("prod", "test"))},
                "location": {
                    "region": chance.choice(("eu", "us", "ap")),
                    "zone": f"zone-{number % 30}",
                    "site": f"plant-{number % 200}",
                },
                "connection": {"user": "manager", "become": True},
            }
        )
        for number in range(count)
    ]


def fill(store: Store, nodes: list[NodeDeclaration]) -> None:
    """Write a fleet that was seen just now in one transaction; through the registry it would take minutes."""
    now = datetime.now(UTC)
    with store.write() as connection:
        connection.execute(
            tables.nodes.insert(),
            [
                {
                    "node_id": node.node_id,
                    "name": node.name,
                    "address": node.address,
                    "node_type": node.node_type,
                    "labels": node.labels,
                    **node.location.model_dump(),
                    "connection": node.connection.model_dump(),
                    "capacity": {},
                    "admin": "active",
                    "generation": 1,
                    "created_at": now,
                    "updated_at": now,
                }
                for node in nodes
            ],
        )
        for node in nodes:
            insert_state(
                connection, node.node_id, NodeState(Health.HEALTHY, now, "no check failed", last_contact_at=now)
            )
        connection.execute(
            tables.host_keys.insert(),
            [
                {
                    "node_id": node.node_id,
                    "public_key": f"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA{number:044d}",
                    "origin": "given",
                    "pinned_at": now,
                }
                for number, node in enumerate(nodes)
            ],
        )


def write_script(directory: Path, environment: dict[str, str]) -> Path:
    """Write an inventory script that prints what our plugin made, from a file."""
    listed = run(environment, ROOT / "inventory" / "registry.yml", "--list")
    listing = json.loads(listed, object_hook=lambda item: item.get("__ansible_unsafe", item))
    listing["_meta"].pop("profile")
    for group in listing.values():
        group.setdefault("hosts", []) if "hostvars" not in group else None
    data = directory / "plain.json"
    data.write_text(json.dumps(listing))
    script = directory / "plain.sh"
    script.write_text(f"#!/bin/sh\nexec cat {data}\n")
    script.chmod(0o755)
    return script


def run(environment: dict[str, str], source: Path, action: str) -> str:
    """Run ansible-inventory once and give what it prints."""
    return subprocess.run(
        [str(ANSIBLE_INVENTORY), "-i", str(source), action],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


def measure(environment: dict[str, str], source: Path) -> float:
    """Time one run in seconds."""
    started = time.perf_counter()
    run(environment, source, "--graph")
    return time.perf_counter() - started


def main() -> int:
    """Measure in turns, so that both get the same weather."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    runs = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    with tempfile.TemporaryDirectory(prefix="node-manager-bench-") as folder:
        directory = Path(folder)
        environment = {**os.environ, "NODE_MANAGER_HOME": folder, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}
        environment.pop("NODE_MANAGER_URL", None)
        store = open_store(load_settings(environment).storage_url)
        fill(store, declarations(count))
        store.close()
        registry, plain = ROOT / "inventory" / "registry.yml", write_script(directory, environment)
        # Which groups come first differs; who is in them must not.
        assert sorted(run(environment, registry, "--graph").splitlines()) == sorted(
            run(environment, plain, "--graph").splitlines()
        ), "the two inventories differ"
        times: dict[Path, list[float]] = {registry: [], plain: []}
        for _ in range(runs):
            for source, found in times.items():
                found.append(measure(environment, source))
    ours, theirs = statistics.median(times[registry]), statistics.median(times[plain])
    print(f"ansible-inventory --graph, {count} nodes, median of {runs} runs in turns")
    print(f"  registry plugin    {ours:6.2f} s")
    print(f"  plain JSON script  {theirs:6.2f} s")
    print(f"  ratio              {ours / theirs:6.2f}   (aim: at most {AIM})")
    return 0 if ours / theirs <= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
