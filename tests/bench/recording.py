# SPDX-License-Identifier: GPL-3.0-or-later
"""What the manager's CPU pays for a sample: validated, judged, stored as the newest, counted into the history.

Samples of healthy nodes as a stream brings them, JSON of about 2 KB, one each of many nodes: one sample per call beside
batches, on SQLite and PostgreSQL in turns. CPU of this process only; a PostgreSQL server works on another one's.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from builders import (
    FakeClock,
    make_container,
    make_containers,
    make_declaration,
    make_filesystem,
    make_interface,
    make_report,
    make_sample,
    make_settings,
    observe,
)
from conftest import fresh_database, postgresql_cluster
from node_manager.domain import ObservationKind
from node_manager.node_registry import NodeRegistry
from node_manager.observations import Observation, ObservationLog
from node_manager.store import Store, open_store

NODES = 1000
BATCHES = (200, 500)
ROUNDS = 5
INTERVAL_SECONDS = 15.0
THRESHOLDS = {
    "cpu_percent": {"warning": 85, "critical": 97},
    "memory_percent": {"warning": 85, "critical": 95},
    "disk_percent": {"warning": 85, "critical": 95},
    "inodes_percent": {"warning": 85, "critical": 95},
}


class Fleet:
    """Healthy nodes in a store, which send samples."""

    def __init__(self, store: Store) -> None:
        self._clock = FakeClock(datetime.now(UTC))
        settings = make_settings({"thresholds": THRESHOLDS})
        registry = NodeRegistry(store, settings, self._clock)
        self._node_ids = [f"gw-{number:05d}" for number in range(NODES)]
        for node_id in self._node_ids:
            registry.register(make_declaration(node_id, capacity={"cpu_millicores": 4000}))
        self._log = ObservationLog(store, settings, self._clock)
        self._clock.advance(1)
        self._log.record([observe("report", make_report(), self._clock.now, node_id) for node_id in self._node_ids])
        self._round = 0

    def measure(self, batch: int, calls: int) -> float:
        """Record a round of samples; give the milliseconds of CPU for each."""
        samples = list(self._samples())[: batch * calls]
        begun = time.process_time()
        for start in range(0, len(samples), batch):
            outcome = self._log.record(samples[start : start + batch], from_manager=True)
            assert outcome.recorded == batch
        return (time.process_time() - begun) / len(samples) * 1000

    def _samples(self) -> Iterator[Observation]:
        self._round += 1
        now = self._clock.advance(INTERVAL_SECONDS)
        for number, node_id in enumerate(self._node_ids):
            data = json.dumps(realistic_sample(number, self._round)).encode()
            yield Observation(node_id, now - timedelta(milliseconds=number), "stream", ObservationKind.SAMPLE, data)


def realistic_sample(number: int, round_: int) -> dict[str, Any]:
    """Give a sample of about 2 KB whose counters and percentages move."""
    noise = (number * 7919 + round_ * 104_729) % 1000 / 100
    pressure = dict.fromkeys(("some_avg10_percent", "some_avg60_percent", "some_avg300_percent"), round(noise / 10, 2))
    sample = make_sample(
        20 + noise,
        io={"pressure": pressure},
        filesystems=[make_filesystem("/", 40.0), make_filesystem("/data", 20.0 + round(noise / 10, 1))],
        network=[make_interface("eth0", 1200.0 + noise, 800.0), make_interface("lo", 10.0, 10.0)],
        containers=make_containers(
            *(make_container(f"app-{n}", labels={"com.docker.compose.project": "shop"}) for n in (1, 2))
        ),
        thermal={
            "temperature_celsius": 50 + noise,
            "throttled": dict.fromkeys(
                (
                    "undervoltage",
                    "frequency_capped",
                    "throttled",
                    "soft_temperature_limit",
                    "undervoltage_since_boot",
                    "throttled_since_boot",
                ),
                False,
            ),
        },
    )
    sample["cpu"]["pressure"] = pressure
    return sample


def main() -> None:
    """Measure and print."""
    size = len(json.dumps(realistic_sample(1, 1)))
    print(f"{NODES} nodes, samples of {size} bytes, median of {ROUNDS} rounds")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        urls = {
            "sqlite": f"sqlite:///{folder}/node-manager.db",
            "postgresql": stack.enter_context(fresh_database(stack.enter_context(postgresql_cluster({})))),
        }
        fleets = {name: Fleet(stack.enter_context(closing(open_store(url)))) for name, url in urls.items()}
        ways = [(1, 200), *((batch, NODES // batch) for batch in BATCHES)]
        found: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in fleets for batch, _ in ways}
        for fleet in fleets.values():
            # The first sample of a node brings conditions that the later ones only confirm.
            fleet.measure(200, NODES // 200)
        for _ in range(ROUNDS):
            for name, fleet in fleets.items():
                for batch, calls in ways:
                    found[name, batch].append(fleet.measure(batch, calls))
    for (name, batch), costs in found.items():
        cost = statistics.median(costs)
        alone = statistics.median(found[name, 1])
        print(
            f"{name:10} batches of {batch:3}: {cost:6.3f} ms of CPU per sample ({alone / cost:4.1f} times less than alone)"
        )


if __name__ == "__main__":
    main()
