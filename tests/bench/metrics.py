# SPDX-License-Identifier: GPL-3.0-or-later
"""What metrics cost: a scrape and the targets of a fleet, on SQLite and PostgreSQL; and what a part pays to be measured.

CPU of this process only; a PostgreSQL server works on another one's. The nodes have samples of some KB, accounts and labels.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from builders import (
    FakeClock,
    make_container,
    make_containers,
    make_declaration,
    make_facts,
    make_filesystem,
    make_report,
    make_sample,
    make_settings,
    observe,
)
from conftest import fresh_database, postgresql_cluster
from node_manager import prometheus_targets
from node_manager.metric_timings import MetricTimings
from node_manager.metrics import Metrics
from node_manager.node_filters import NodeFilter
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.store import Store, open_store
from node_manager.store.documents import write_json
from node_manager.timings import NO_TIMINGS, Timings
from prometheus_client import CollectorRegistry

FLEETS = (1000, 10_000)
ROUNDS = 7
CALLS = 200_000


def fill(store: Store, nodes: int, clock: FakeClock) -> None:
    """Register nodes and tell what was seen on them."""
    settings = make_settings()
    registry, log = NodeRegistry(store, settings, clock), ObservationLog(store, settings, clock)
    for number in range(nodes):
        place = {"zone": f"z-{number % 20}", "site": f"s-{number % 500}"}
        declared = make_declaration(f"gw-{number:05}", location=place, labels={"line": "a", "team": f"t-{number % 9}"})
        registry.register(declared)
    containers = make_containers(*(make_container(f"app-{number}") for number in range(5)))
    filesystems = [make_filesystem("/", 40.0), make_filesystem("/data", 60.0), make_filesystem("/boot", 20.0)]
    now = clock.advance(1)
    for start in range(0, nodes, 500):
        names = [f"gw-{number:05}" for number in range(start, min(start + 500, nodes))]
        sample = write_json(make_sample(containers=containers, filesystems=filesystems)).encode()
        log.record([observe("facts", make_facts(), now, name) for name in names])
        log.record([observe("sample", sample, now, name) for name in names])
        ill = make_report(("warning", "failed"))
        log.record([observe("report", ill if name.endswith("00") else make_report(), now, name) for name in names])


def milliseconds(work: Callable[[], object]) -> float:
    """Give the median CPU time of some calls, in this process."""
    found = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        work()
        found.append((time.process_time() - begun) * 1000)
    return statistics.median(found)


def scrapes(store: Store, nodes: int, clock: FakeClock) -> Iterator[tuple[str, float, int]]:
    """Measure scrapes and targets; give what, milliseconds, bytes."""
    for what, most in (("scrape, gauges of each node", nodes), ("scrape, counts only", 0)):
        # By this clock each scrape comes two seconds after the one before: none shares another's look.
        metrics = Metrics(store, make_settings({"metrics": {"max_nodes": most}}), clock, count(0, 2).__next__)
        yield what, milliseconds(partial(metrics.exposition, "")), len(metrics.exposition("")[0])

    def targets() -> bytes:
        return write_json(prometheus_targets.read(store, make_settings(), NodeFilter(), 9100, clock())).encode()

    yield "targets", milliseconds(targets), len(targets())


def nanoseconds(timings: Timings) -> float:
    """Give what a measured part pays for each call: two readings of the clock and one telling."""
    begun = time.process_time()
    for _ in range(CALLS):
        began = time.perf_counter()
        timings.observe_selection(time.perf_counter() - began)
    return (time.process_time() - begun) / CALLS * 1e9


def main() -> None:
    """Measure and print."""
    registry = CollectorRegistry()
    print(f"a part pays for each call: {nanoseconds(NO_TIMINGS):.0f} ns where nobody measures,", end=" ")
    print(f"{nanoseconds(MetricTimings(registry, kafka=True)):.0f} ns with metrics")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        cluster = stack.enter_context(postgresql_cluster({"fsync": "off"}))
        print(f"{'engine':<12}{'nodes':>7}  {'what':<30}{'CPU ms':>8}{'KB':>8}")
        for nodes in FLEETS:
            with fresh_database(cluster) as url:
                for engine, at in (("sqlite", f"sqlite:///{folder}/{nodes}.db"), ("postgresql", url)):
                    clock = FakeClock(datetime.now(UTC))
                    with closing(open_store(at)) as store:
                        fill(store, nodes, clock)
                        for what, took, size in scrapes(store, nodes, clock):
                            print(f"{engine:<12}{nodes:>7}  {what:<30}{took:>8.1f}{size / 1000:>8.0f}")


if __name__ == "__main__":
    main()
