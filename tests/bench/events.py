# SPDX-License-Identifier: GPL-3.0-or-later
"""What events cost: how fast they go from the store to a topic, and what a write or a read costs more for it.

Real broker, real services. *Throughput*: the relay empties an outbox, and beside it the bare client library sends the same
messages from memory. *Cost*: three services that differ in nothing but Kafka (none, one that answers, one that doesn't) get the
same requests by turns, one after the other on one connection; shown are the medians as ratios to the service without Kafka.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kafka_cluster import KafkaCluster, kafka_cluster
from node_manager import outbox
from node_manager.events import EventType, NewEvent, emit_all
from node_manager.kafka_link import Message, Publisher, create_topics
from node_manager.node_registry import NodeRegistry, utc_now
from node_manager.outbox_relay import OutboxRelay
from node_manager.platform_settings import KafkaSettings
from node_manager.settings import load_settings
from node_manager.state_feed import StateFeed
from node_manager.store import open_store
from running_service import RunningService, free_port

EVENTS = int(os.environ.get("NODE_MANAGER_BENCH_EVENTS", "20000"))
ROUNDS = 5
REQUESTS = 300
NODES = 50


def main() -> None:
    """Measure both."""
    with kafka_cluster() as cluster, tempfile.TemporaryDirectory() as folder:
        _throughput(cluster, Path(folder))
        _cost(cluster, Path(folder))


def _throughput(cluster: KafkaCluster, folder: Path) -> None:
    kafka = KafkaSettings(bootstrap_servers=cluster.addresses, topic_prefix="bench", partitions=3)
    create_topics(kafka)
    relayed, bare = [], []
    for turn in range(3):
        settings = load_settings({"NODE_MANAGER_HOME": str(folder)})
        store = open_store(f"sqlite:///{folder}/throughput-{turn}.db")
        data = {"from": "healthy", "to": "suspect", "cause": "ConnectionLost: closed by the node", "source": "stream"}
        for start in range(0, EVENTS, 1000):
            with store.write() as connection:
                emit_all(
                    connection,
                    [
                        NewEvent(EventType.HEALTH_CHANGED, f"gw-{number % 1000:05d}", utc_now(), data)
                        for number in range(start, start + 1000)
                    ],
                )
        feed = StateFeed(store, settings, NodeRegistry(store, settings), utc_now)
        sent: list[Message] = []

        class Keeping(Publisher):
            """Keeps what it publishes, for the bare library to send again."""

            def publish(self, messages, goes_on):  # type: ignore[no-untyped-def]
                sent.extend(messages)  # noqa: B023
                return super().publish(messages, goes_on)

        relay = OutboxRelay(store, kafka, feed, lambda: Keeping(kafka), lambda: True, utc_now)
        begun = time.perf_counter()
        relay.start()
        while relay.status.relayed < EVENTS:
            time.sleep(0.01)
        relayed.append(EVENTS / (time.perf_counter() - begun))
        relay.stop()
        assert outbox.load_position(store, outbox.KAFKA) == outbox.newest(store)
        store.close()

        publisher = Publisher(kafka)
        messages = [message for message in sent if "health" in message.topic]
        begun = time.perf_counter()
        publisher.publish(messages, lambda: True)
        bare.append(EVENTS / (time.perf_counter() - begun))
        publisher.close()
    mine, floor = statistics.median(relayed), statistics.median(bare)
    print(
        f"store to topic: {mine:,.0f} events/s; the bare library from memory: {floor:,.0f}/s; ratio {mine / floor:.2f}"
    )


def _cost(cluster: KafkaCluster, folder: Path) -> None:
    kinds = {
        "none": {},
        "answers": {"NODE_MANAGER_KAFKA__BOOTSTRAP_SERVERS": json.dumps(cluster.addresses)},
        "unreachable": {"NODE_MANAGER_KAFKA__BOOTSTRAP_SERVERS": json.dumps([f"127.0.0.1:{free_port()}"])},
    }
    times: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        clients: dict[str, httpx.Client] = {}
        for kind, environment in kinds.items():
            service = RunningService(folder / kind, {"NODE_MANAGER_LOGGING__LEVEL": "error", **environment})
            service.start()
            stack.callback(service.stop)
            clients[kind] = client = stack.enter_context(service.client())
            for number in range(NODES):
                body = {"node_id": f"n-{number}", "address": "127.9.0.1", "node_type": "server"}
                client.post("/nodes?look=false", json=body).raise_for_status()
        for turn in range(ROUNDS):
            order = list(kinds) if turn % 2 else list(reversed(kinds))
            for kind in order:
                for what, call in (("write", _write), ("list", _list), ("health", _health)):
                    times.setdefault((what, kind), []).extend(call(clients[kind], turn))
    for what in ("write", "list", "health"):
        base = statistics.median(times[what, "none"])
        shown = []
        for kind in ("answers", "unreachable"):
            found = times[what, kind]
            worst = statistics.quantiles(found, n=100)[98] / statistics.quantiles(times[what, "none"], n=100)[98]
            shown.append(f"Kafka {kind}: median {statistics.median(found) / base:.2f}, 99th percentile {worst:.2f}")
        print(f"{what:<6} as a ratio to no Kafka: {'; '.join(shown)}")


def _write(client: httpx.Client, turn: int) -> list[float]:
    found = []
    for number in range(REQUESTS):
        body = {"address": "127.9.0.1", "node_type": "server", "labels": {"turn": f"{turn}-{number}"}}
        begun = time.perf_counter()
        client.put(f"/nodes/n-{number % NODES}", json=body).raise_for_status()
        found.append(time.perf_counter() - begun)
    return found


def _list(client: httpx.Client, _turn: int) -> list[float]:
    return _reads(client, "/nodes?limit=20")


def _health(client: httpx.Client, _turn: int) -> list[float]:
    return _reads(client, "/nodes/n-1/health")


def _reads(client: httpx.Client, path: str) -> list[float]:
    found = []
    for _ in range(REQUESTS):
        begun = time.perf_counter()
        client.get(path).raise_for_status()
        found.append(time.perf_counter() - begun)
    return found


if __name__ == "__main__":
    main()
