# SPDX-License-Identifier: GPL-3.0-or-later
"""What watching costs one manager as its fleet grows: simulated nodes, each with an SSH stream of its own.

The service is the real one, a process of its own with a SQLite store; the nodes are tests/simulated_nodes.py, in other
processes: real SSH with a key, a sample of about 2 KB each interval, beats and reports when a probe sends them. All that is
said of CPU is the manager's alone (/proc, children included), so other work on the machine moves it little. It is a steady
state: all stream, all that came at the start is recorded, then a window is measured. "age" is that of the newest stored
sample of each node by the manager's clock, over all nodes at several moments of the window: with samples spread over the
interval and no delay at all it is half an interval at p50 and 99 % of one at p99. The row of 0 nodes is the idle service.

``python tests/bench/streams.py [--sizes 100 1000 ...] [--window SECONDS] [--interval SECONDS]``
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncssh
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from node_manager.declarations import NodeDeclaration
from node_manager.node_registry import NodeRegistry
from node_manager.settings import load_settings
from node_manager.store import Store, open_store, tables
from process_load import Load
from running_service import RunningService

TESTS = Path(__file__).resolve().parents[1]
SIZES = (100, 1000, 3000, 10_000)
# A simulator's sockets, and its CPU while a fleet logs in.
NODES_PER_SIMULATOR = 5000
OPEN_SECONDS = 600.0
LOOKS = 12


@dataclass(frozen=True)
class Row:
    """What one size of fleet cost."""

    nodes: int
    open_seconds: float
    open_cpu_seconds: float
    cores: float
    resident_bytes: int
    threads: int
    samples_per_second: float
    ages: list[float]

    def line(self, idle: Row) -> str:
        """Give the row of the table; memory and CPU of streams are those above the *idle* service."""
        size = f"{self.nodes:6} {self.open_seconds:7.1f} {self.open_cpu_seconds:8.1f} {self.cores:7.3f}"
        memory = f"{self.resident_bytes / 2**20:8.0f}"
        if not self.nodes:
            return f"{size} {'-':>10} {memory} {'-':>10} {self.threads:8}"
        each = (self.resident_bytes - idle.resident_bytes) / self.nodes / 1024
        cost = (self.cores - idle.cores) / self.samples_per_second * 1000 if self.samples_per_second else float("nan")
        ages = f"{_rank(self.ages, 0.5):8.1f} {_rank(self.ages, 0.99):8.1f} {self.ages[-1]:8.1f}"
        return f"{size} {cost:10.3f} {memory} {each:10.1f} {self.threads:8} {self.samples_per_second:10.1f} {ages}"


def main() -> None:
    """Measure each size and print its row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--window", type=float, default=60, help="seconds of steady state")
    parser.add_argument("--interval", type=float, default=15, help="seconds between two samples of a node")
    parser.add_argument("--wait", action="store_true", help="say the service's process id, for a profiler")
    arguments = parser.parse_args()
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(
        f"{'nodes':>6} {'open s':>7} {'CPU s':>8} {'cores':>7} {'ms/sample':>10} {'RSS MiB':>8} {'KiB/stream':>10}"
        f" {'threads':>8} {'samples/s':>10} {'age p50':>8} {'p99':>8} {'max s':>8}"
    )
    idle: Row | None = None
    for size in dict.fromkeys((0, *arguments.sizes)):
        try:
            row = measure(size, arguments)
        except TimeoutError as error:
            print(f"{size:6} nodes are too many for this machine: {error}")
            break
        idle = idle or row
        print(row.line(idle), f"  load {os.getloadavg()[0]:.1f}", flush=True)


def measure(size: int, arguments: argparse.Namespace) -> Row:
    """Watch a fleet of *size* and give what it cost.

    Errors: TimeoutError if not all nodes stream in time.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streams-", ignore_cleanup_errors=True)))
        service = RunningService(folder / "home", settings_of(folder, arguments.interval))
        servers = [
            stack.enter_context(simulator(folder / "id.pub"))
            for _ in range((size + NODES_PER_SIMULATOR - 1) // NODES_PER_SIMULATOR)
        ]
        store = stack.enter_context(closing(register(service, servers, size)))
        begun = time.monotonic()
        service.start()
        stack.callback(service.kill)
        assert service.process is not None
        process_id = service.process.pid
        if arguments.wait:
            print(f"the service is process {process_id}", flush=True)
        wait_for_streams(service, store, size)
        opened = time.monotonic() - begun
        after_opening = Load.of(process_id)
        # By then each node is on its beat: its second sample comes after half an interval to one and a half.
        time.sleep(1.5 * arguments.interval + 3)
        before, start = Load.of(process_id), time.monotonic()
        known = newest_samples(store)
        ages: list[float] = []
        recorded = 0
        for look in range(LOOKS):
            time.sleep(max(0.0, start + (look + 1) * arguments.window / LOOKS - time.monotonic()))
            now = datetime.now(UTC)
            times = newest_samples(store)
            ages += [(now - at).total_seconds() for at in times.values()]
            # Looks are closer together than samples: each shows those that came since the one before.
            recorded += sum(known.get(node_id) != at for node_id, at in times.items())
            known = times
        after, took = Load.of(process_id), time.monotonic() - start
        return Row(
            size,
            opened,
            after_opening.cpu_seconds,
            (after.cpu_seconds - before.cpu_seconds) / took,
            after.resident_bytes,
            after.threads,
            recorded / took,
            sorted(ages),
        )


def settings_of(folder: Path, interval: float) -> dict[str, str]:
    """Write a configuration and a key for the fleet; give the environment that names them."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(folder / "id")
    key.write_public_key(folder / "id.pub")
    (folder / "id").chmod(0o600)
    types = {"node_types": {"gateway": {"description": "A simulated node"}}}
    (folder / "node_types.json").write_text(json.dumps(types), "utf-8")
    (folder / "config.json").write_text('{"node_types_file": "node_types.json"}', "utf-8")
    return {
        "NODE_MANAGER_CONFIG": str(folder / "config.json"),
        "NODE_MANAGER_SSH__CREDENTIALS": json.dumps({"fleet": {"private_key_file": str(folder / "id")}}),
        "NODE_MANAGER_MONITORING__SCHEDULED": "true",
        "NODE_MANAGER_MONITORING__SAMPLE_INTERVAL_SECONDS": str(interval),
        # By stream, or not at all.
        "NODE_MANAGER_MONITORING__GATHER_INTERVAL_SECONDS": "86400",
    }


@contextmanager
def simulator(authorized_key: Path) -> Iterator[dict[str, Any]]:
    """Run a simulator; give its port and host key."""
    command = [sys.executable, str(TESTS / "simulated_nodes.py"), "--authorized-key", str(authorized_key)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.kill()
        process.wait(10)
        process.stdout.close()


def register(service: RunningService, servers: list[dict[str, Any]], size: int) -> Store:
    """Declare the nodes, straight in the service's store; give the store."""
    settings = load_settings(service.variables())
    settings.home.mkdir(mode=0o700, parents=True)
    store = open_store(settings.storage_url)
    registry = NodeRegistry(store, settings)
    for number in range(size):
        server = servers[number % len(servers)]
        node_id = f"gw-{number:05d}"
        declared = {
            "node_id": node_id,
            "address": "127.0.0.1",
            "node_type": "gateway",
            "location": {"site": f"site-{number % 100}"},
            "connection": {"port": server["port"], "user": node_id, "credential": "fleet"},
            "host_keys": [server["host_key"]],
            "capacity": {"cpu_millicores": 4000},
        }
        registry.register(NodeDeclaration.model_validate(declared))
    return store


def wait_for_streams(service: RunningService, store: Store, size: int) -> None:
    """Wait until all nodes stream, and each has a sample in the store."""
    deadline = time.monotonic() + OPEN_SECONDS
    states: dict[str, int] = {}
    with service.client() as api:
        while time.monotonic() < deadline:
            time.sleep(2 if size > 1000 else 0.5)
            states = api.get("/monitoring").json()["states"]
            if states.get("streaming", 0) == size and len(newest_samples(store)) == size:
                return
    raise TimeoutError(f"after {OPEN_SECONDS:g} s nodes are {states}")


def newest_samples(store: Store) -> dict[str, datetime]:
    """Read when each node's newest sample was seen."""
    samples = tables.node_samples.c
    with store.read() as connection:
        rows = connection.execute(sa.select(samples.node_id, samples.observed_at))
        return {row.node_id: row.observed_at for row in rows}


def _rank(ranked: list[float], share: float) -> float:
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))]


if __name__ == "__main__":
    main()
