# SPDX-License-Identifier: GPL-3.0-or-later
"""Change nodes while broker and manager are killed, and count what arrived: `python tests/chaos/events.py`.

A real manager on SQLite, a real broker, changes over HTTP. What was committed is what the store's outbox holds; what was answered
must be in it, and all that is in it must be on the topic, in order for each node, repetitions with the same id.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kafka_cluster import KafkaCluster, kafka_cluster
from kafka_reader import Told, read_topic
from running_service import RunningService

TOPIC = "node-manager.node.lifecycle.v1"
NODES = 40
WORKERS = 4
DRAIN_SECONDS = 120.0


@dataclass
class Plan:
    """How much is changed, and what happens meanwhile."""

    changes: int = 10_000
    broker_kills: int = 3
    manager_kills: int = 3
    pauses: int = 1
    deadline_seconds: float = 420.0


@dataclass
class Report:
    """What came of it."""

    answered: int
    committed: int
    answered_not_committed: int
    messages: int
    lost: int
    strangers: int
    repetitions: int
    repetitions_that_differ: int
    out_of_order: int
    broker_kills: int
    manager_kills: int
    pauses: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Tell whether what is promised was kept."""
        return not (
            self.answered_not_committed
            or self.lost
            or self.strangers
            or self.repetitions_that_differ
            or self.out_of_order
        )

    def table(self) -> str:
        """Show it to people."""
        rows = [
            ("changes answered over HTTP", self.answered),
            ("events committed to the outbox", self.committed),
            ("answered, yet not committed", self.answered_not_committed),
            ("messages on the topic", self.messages),
            ("committed events that are lost", self.lost),
            ("messages that nobody committed", self.strangers),
            ("repetitions, all with the id of the first", self.repetitions),
            ("repetitions that differ from the first", self.repetitions_that_differ),
            ("events out of order within their node", self.out_of_order),
            ("kills of the broker", self.broker_kills),
            ("kills of the manager", self.manager_kills),
            ("pauses of the relay", self.pauses),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>7,}" for name, value in rows)


class Changer:
    """Changes nodes from several threads, again and again where the manager doesn't answer."""

    def __init__(self, service: RunningService, changes: int, deadline: float) -> None:
        self._service = service
        self._deadline = deadline
        self._shares = [changes // WORKERS] * WORKERS
        self.answered: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(WORKERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(max(0.1, self._deadline - time.monotonic()))
            assert not thread.is_alive(), "the changes did not end in time"

    @property
    def count(self) -> int:
        with self._lock:
            return len(self.answered)

    def _work(self, number: int) -> None:
        own = [f"n-{index}" for index in range(number, NODES, WORKERS)]
        done = turn = 0
        with httpx.Client(base_url=self._service.url, timeout=10) as client:
            while done < self._shares[number] and time.monotonic() < self._deadline:
                node_id = own[turn % len(own)]
                turn += 1
                headers = {"Authorization": f"Bearer {self._service.token}"}
                body = {"address": "127.9.0.1", "node_type": "server", "labels": {"turn": str(turn)}}
                try:
                    answer = client.put(f"/nodes/{node_id}", json=body, headers=headers)
                except httpx.TransportError:
                    # The manager was killed; whether this change is in, the outbox knows.
                    time.sleep(0.05)
                    continue
                if answer.status_code == 200:
                    with self._lock:
                        self.answered.add((node_id, answer.json()["generation"]))
                    done += 1


def run(plan: Plan, tell: Callable[[str], object]) -> Report:
    """Do it."""
    begun = time.monotonic()
    with kafka_cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        service = RunningService(
            home,
            {
                "NODE_MANAGER_KAFKA__BOOTSTRAP_SERVERS": json.dumps(cluster.addresses),
                "NODE_MANAGER_KAFKA__PARTITIONS": "3",
                "NODE_MANAGER_LOGGING__LEVEL": "error",
            },
        )
        service.start()
        try:
            with service.client() as client:
                for index in range(NODES):
                    body = {"node_id": f"n-{index}", "address": "127.9.0.1", "node_type": "server"}
                    client.post("/nodes?look=false", json=body).raise_for_status()
            changer = Changer(service, plan.changes, begun + plan.deadline_seconds)
            changer.start()
            _disturb(plan, cluster, service, changer, tell)
            changer.join()
            tell(f"{changer.count} changes are answered, waiting for the relay")
            _wait_for_relay(home)
        finally:
            service.kill()
        return _judge(plan, home, read_topic(cluster.addresses, TOPIC), changer, time.monotonic() - begun)


def _disturb(
    plan: Plan, cluster: KafkaCluster, service: RunningService, changer: Changer, tell: Callable[[str], None]
) -> None:
    """Spread the disturbances over the changes."""

    def kill_broker() -> None:
        cluster.kill()
        _pause(3)
        cluster.start()

    def kill_manager() -> None:
        service.kill()
        service.start()

    def pause() -> None:
        cluster.pause()
        _pause(5)
        cluster.resume()

    kinds = [(kill_broker, "broker killed"), (kill_manager, "manager killed"), (pause, "relay paused")]
    counts = [plan.broker_kills, plan.manager_kills, plan.pauses]
    acts = [kind for turn in range(max(counts)) for kind, count in zip(kinds, counts, strict=True) if turn < count]
    for number, (act, words) in enumerate(acts, 1):
        _until(lambda number=number: changer.count >= plan.changes * number / (len(acts) + 1), plan.deadline_seconds)  # type: ignore[misc]
        tell(f"{changer.count:>6} changes answered: {words}")
        act()


def _wait_for_relay(home: Path) -> None:
    def done() -> bool:
        with sqlite3.connect(f"file:{home}/node-manager.db?mode=ro", uri=True) as database:
            newest = database.execute("SELECT max(sequence) FROM outbox").fetchone()[0]
            row = database.execute("SELECT position FROM relay_positions WHERE name = 'kafka'").fetchone()
        database.close()
        return row is not None and row[0] >= newest

    _until(done, DRAIN_SECONDS)


def _judge(plan: Plan, home: Path, messages: list[Told], changer: Changer, seconds: float) -> Report:
    database = sqlite3.connect(home / "node-manager.db")
    rows = database.execute(
        "SELECT event_id, node_id, type, data FROM outbox WHERE topic = 'node.lifecycle' ORDER BY sequence"
    )
    committed = [(event_id, node_id, kind, json.loads(data)) for event_id, node_id, kind, data in rows]
    database.close()
    order = {event_id: number for number, (event_id, *_) in enumerate(committed)}
    updated = {
        (node_id, data["generation"]) for _, node_id, kind, data in committed if kind == "node.lifecycle.updated"
    }
    first: dict[str, Told] = {}
    differ = repeated = disordered = 0
    reached: dict[str, int] = {}
    for message in messages:
        known = first.setdefault(message.event_id, message)
        if known is not message:
            repeated += 1
            differ += (known.key, known.value, known.headers) != (message.key, message.value, message.headers)
            continue
        number = order.get(message.event_id, -1)
        disordered += number < reached.get(message.key, -1)
        reached[message.key] = max(number, reached.get(message.key, -1))
    return Report(
        answered=changer.count,
        committed=len(committed),
        answered_not_committed=len(changer.answered - updated),
        messages=len(messages),
        lost=len(order.keys() - first.keys()),
        strangers=len(first.keys() - order.keys()),
        repetitions=repeated,
        repetitions_that_differ=differ,
        out_of_order=disordered,
        broker_kills=plan.broker_kills,
        manager_kills=plan.manager_kills,
        pauses=plan.pauses,
        seconds=seconds,
    )


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not come to that in {seconds:.0f} s")
        _pause(0.05)


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def main() -> int:
    """Run the plan of the command line; the exit code is 1 if anything was lost, doubled or out of order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=10_000)
    arguments = parser.parse_args()
    report = run(Plan(changes=arguments.changes), lambda text: sys.stdout.write(f"{text}\n"))
    sys.stdout.write(f"{report.table()}\n{'kept' if report.holds else 'BROKEN'}\n")
    return 0 if report.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
