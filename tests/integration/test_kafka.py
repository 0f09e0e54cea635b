# SPDX-License-Identifier: GPL-3.0-or-later
"""The real service and a real Kafka: what arrives there, what is taken from there, and what trouble does to both.

That is kafka_handler with all below it: outbox_relay and kafka_link, command_consumer and commands.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from builders import make_facts, make_report, make_sample
from chaos.events import Plan, run
from kafka import KafkaProducer
from kafka_cluster import KafkaCluster, kafka_cluster
from kafka_reader import Sender, Told, fleet_of, read_topic, read_until
from node_manager.kafka_link import LinkError, Message, Publisher, create_topics
from node_manager.platform_settings import KafkaSettings
from parts import require
from running_service import RunningService, free_port

DEADLINE_SECONDS = 40.0
LIFECYCLE, STATES = "node-manager.node.lifecycle.v1", "node-manager.node.state.v1"
ANSWERS, DEAD_LETTERS = "node-manager.commands.answer.v1", "node-manager.commands.dead-letter.v1"


@pytest.fixture(scope="module")
def cluster() -> Iterator[KafkaCluster]:
    require("kafka", "events go to a real Kafka")
    with kafka_cluster() as running:
        yield running


@contextmanager
def managing(home: Path, cluster: KafkaCluster, prefix: str = "node-manager", **more: str) -> Iterator[RunningService]:
    environment = {
        "NODE_MANAGER_KAFKA__BOOTSTRAP_SERVERS": json.dumps(cluster.addresses),
        "NODE_MANAGER_KAFKA__TOPIC_PREFIX": prefix,
        "NODE_MANAGER_KAFKA__GROUP_ID": prefix,
        "NODE_MANAGER_KAFKA__PARTITIONS": "3",
        **more,
    }
    service = RunningService(home, environment)
    service.start()
    try:
        yield service
    finally:
        service.kill()


def register(client: httpx.Client, *node_ids: str, **more: Any) -> None:
    for node_id in node_ids:
        body = {"node_id": node_id, "address": "127.9.0.1", "node_type": "server", **more}
        client.post("/nodes?look=false", json=body).raise_for_status()


def see(client: httpx.Client, node_id: str) -> None:
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = [("facts", make_facts()), ("report", make_report()), ("sample", make_sample(37.5))]
    told = [
        {"node_id": node_id, "observed_at": at, "source": "test", "kind": kind, "data": data} for kind, data in found
    ]
    client.post("/observations", json={"observations": told}).raise_for_status()


def named(prefix: str, topic: str) -> str:
    return topic.replace("node-manager", prefix, 1)


def ids(messages: list[Told]) -> set[str]:
    return {message.event_id for message in messages}


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


def test_a_reader_of_the_topics_sees_the_fleet(tmp_path: Path, cluster: KafkaCluster) -> None:
    with managing(tmp_path / "home", cluster, "fleet") as service, service.client() as client:
        wait(lambda: "events go to Kafka" in service.log)
        register(client, *[f"n-{number}" for number in range(30)], labels={"line": "a"})
        for number in range(0, 30, 3):
            see(client, f"n-{number}")
        client.put("/nodes/n-1/status", json={"status": "cordoned"}).raise_for_status()
        client.delete("/nodes/n-2").raise_for_status()

        def agrees(messages: list[Told]) -> bool:
            listed = {node["node_id"]: node for node in client.get("/nodes?limit=1000").json()["items"]}
            rebuilt = fleet_of(messages)
            # Contacts come every few seconds and are not told one by one.
            shown = {
                node_id: {key: value for key, value in node.items() if key in listed.get(node_id, {})}
                for node_id, node in rebuilt.items()
            }
            expected = {
                node_id: {key: value for key, value in node.items() if key != "last_contact_at"}
                for node_id, node in listed.items()
            }
            return shown == expected

        states = read_until(cluster.addresses, named("fleet", STATES), agrees)
        told = read_until(cluster.addresses, named("fleet", LIFECYCLE), lambda found: len(found) >= 32)
        uses = read_until(cluster.addresses, "fleet.node.resources.v1", lambda found: len(found) >= 10)

    assert any(message.key == "n-2" and message.value is None for message in states)
    assert all(message.headers["ce_type"] == "node.state.snapshot" for message in states)
    (gone,) = [message for message in told if message.headers["ce_type"] == "node.lifecycle.deregistered"]
    assert gone.key == gone.headers["ce_subject"] == "n-2"
    assert gone.headers["ce_specversion"] == "1.0"
    assert gone.headers["content-type"] == "application/json"
    assert Counter(message.key for message in uses) == {f"n-{number}": 1 for number in range(0, 30, 3)}
    assert uses[0].data["cpu_percent"] == 37.5


def test_what_was_committed_before_a_crash_is_published_after_it(tmp_path: Path, cluster: KafkaCluster) -> None:
    with managing(tmp_path / "home", cluster, "crash") as service:
        with service.client() as client:
            register(client, "before")
            read_until(cluster.addresses, named("crash", LIFECYCLE), lambda found: len(found) == 1)
            cluster.pause()
            try:
                begun = time.monotonic()
                register(client, *[f"n-{number}" for number in range(10)])
                elapsed = time.monotonic() - begun
                service.kill()
            finally:
                cluster.resume()
        assert elapsed < 10
        service.start()
        told = read_until(cluster.addresses, named("crash", LIFECYCLE), lambda found: len(ids(found)) == 11)

    assert list(dict.fromkeys(message.key for message in told if message.key != "before")) != []
    assert {message.key for message in told} == {"before", *[f"n-{number}" for number in range(10)]}


def test_a_broker_that_comes_late_gets_all(tmp_path: Path) -> None:
    require("kafka", "events go to a real Kafka")
    with kafka_cluster() as late:
        late.stop()
        with managing(tmp_path / "home", late) as service, service.client() as client:
            register(client, "a", "b")
            wait(lambda: "Kafka can't be reached" in service.log)
            begun = time.monotonic()
            register(client, "c")
            assert client.get("/nodes").status_code == 200
            assert time.monotonic() - begun < 5
            late.start()
            told = read_until(late.addresses, LIFECYCLE, lambda found: len(found) == 3, 60)
            begun = time.monotonic()
            assert service.stop() == 0
            assert time.monotonic() - begun < 15

    assert {message.key for message in told} == {"a", "b", "c"}


@pytest.mark.timeout(240)
def test_leaders_may_change(tmp_path: Path) -> None:
    require("kafka", "events go to a real Kafka")
    with (
        kafka_cluster(brokers=2) as two,
        managing(tmp_path / "home", two, NODE_MANAGER_KAFKA__REPLICATION_FACTOR="2") as service,
        service.client() as client,
    ):
        register(client, *[f"n-{number}" for number in range(12)])
        read_until(two.addresses, LIFECYCLE, lambda found: len(found) == 12)
        two.kill(1)
        for number in range(12):
            client.put(f"/nodes/n-{number}/status", json={"status": "cordoned"}).raise_for_status()
        told = read_until(two.addresses[:1], LIFECYCLE, lambda found: len(ids(found)) == 24, 90)

    types = Counter(message.headers["ce_type"] for message in {message.event_id: message for message in told}.values())
    assert types == {"node.lifecycle.registered": 12, "node.lifecycle.admin_changed": 12}


def test_commands_are_carried_out_and_poison_stops_nothing(tmp_path: Path, cluster: KafkaCluster) -> None:
    with managing(tmp_path / "home", cluster, "orders") as service, service.client() as client:
        register(client, "gw-1")
        wait(lambda: "topics were created" in service.log)
        sender = Sender(cluster.addresses, "orders.commands.v1")
        poison = [b"\xff\xfe", b"", b"{" * 5000, b"x" * 900_000, b'"a text"']
        for number, value in enumerate(poison):
            sender.send(f"bad-{number}", "node.register", value)
        sender.send("c-1", "node.register", {"node_id": "gw-2", "address": "127.9.0.2", "node_type": "server"})
        sender.send("c-2", "node.set_status", {"node_id": "gw-1", "status": "cordoned"})
        sender.send("c-3", "node.set_status", {"node_id": "nobody", "status": "cordoned"})
        sender.send("c-2", "node.set_status", {"node_id": "gw-1", "status": "cordoned"})
        sender.send("c-4", "deployment.release", {"deployment_id": "none"})
        sender.flush()

        answers = read_until(
            cluster.addresses,
            named("orders", ANSWERS),
            lambda found: {"c-1", "c-2", "c-3", "c-4"} <= {message.headers.get("ce_causationid") for message in found},
        )
        letters = read_until(cluster.addresses, named("orders", DEAD_LETTERS), lambda found: len(found) == len(poison))
        assert client.get("/nodes/gw-2").status_code == 200
        assert client.get("/nodes/gw-1").json()["admin"] == "cordoned"

    by_command = {message.data["command_id"]: message for message in answers}
    assert by_command["c-1"].headers["ce_type"] == "commands.answer.done"
    assert by_command["c-3"].data["code"] == "node_not_found"
    assert Counter(message.data["command_id"] for message in answers)["c-2"] == 1
    assert [letter.value for letter in letters] == poison
    assert {letter.headers["dlq_code"] for letter in letters} == {"not_json", "invalid_data"}
    assert letters[0].headers["ce_id"] == "bad-0"
    assert letters[0].headers["dlq_topic"] == "orders.commands.v1"


def test_commands_may_be_compressed(tmp_path: Path, cluster: KafkaCluster) -> None:
    ways = ["gzip", "snappy", "lz4", "zstd"]
    with managing(tmp_path / "home", cluster, "packed") as service:
        wait(lambda: "topics were created" in service.log)
        for way in ways:
            sender = Sender(cluster.addresses, "packed.commands.v1", way)
            # A sender leaves as it is what doesn't become smaller.
            node = {"node_id": way, "address": "127.9.0.1", "node_type": "server", "labels": {"line": "a" * 60}}
            for number in range(20):
                sender.send(f"{way}-{number}", "node.register", node)
            sender.flush()
        answers = read_until(cluster.addresses, named("packed", ANSWERS), lambda found: len(found) == 20 * len(ways))

    assert Counter(message.headers["ce_subject"] for message in answers) == dict.fromkeys(ways, 20)
    assert {message.headers["ce_type"] for message in answers} == {"commands.answer.done"}


class NoText(str):
    """The name of a header that is no UTF-8, which brokers take and some libraries can't read."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """Give bytes that are none."""
        return b"\xff\xfe"


def send_batch(brokers: Sequence[str], topic: str, values: Sequence[tuple[str, bytes]]) -> None:
    """Send messages in one batch, each with the name of its one header."""
    producer = KafkaProducer(bootstrap_servers=list(brokers), linger_ms=10_000, batch_size=2**20)
    for name, value in values:
        producer.send(topic, value=value, key=b"any", headers=[(name, b"x")])
    producer.flush(30)
    producer.close()


def test_batches_that_cant_be_read_are_passed_by(tmp_path: Path, cluster: KafkaCluster) -> None:
    topic, home = "broken.commands.v1", tmp_path / "home"
    with managing(home, cluster, "broken", NODE_MANAGER_KAFKA__PARTITIONS="1") as service:
        wait(lambda: "topics were created" in service.log)
    sender = Sender(cluster.addresses, topic)
    node = {"address": "127.9.0.1", "node_type": "server"}
    sender.send("c-0", "node.register", {"node_id": "first", **node})
    sender.flush()
    send_batch(cluster.addresses, topic, [("a", b"readable"), (NoText("b"), b"no text"), ("c", b"behind it")])
    sender.send("c-4", "node.register", {"node_id": "between", **node})
    sender.flush()
    sender.send("c-5", "node.register", {"node_id": "rotten", **node})
    sender.flush()
    file = cluster.log_file(topic)
    with file.open("r+b") as log:
        log.seek(-1, 2)
        (last,) = log.read()
        log.seek(-1, 2)
        log.write(bytes([last ^ 1]))
    sender.send("c-6", "node.register", {"node_id": "last", **node})
    sender.flush()

    with managing(home, cluster, "broken", NODE_MANAGER_KAFKA__PARTITIONS="1") as service:
        answers = read_until(cluster.addresses, named("broken", ANSWERS), lambda found: len(found) == 3)
        letters = read_until(cluster.addresses, named("broken", DEAD_LETTERS), lambda found: len(found) == 4)
        log_text = service.log

    assert [message.headers["ce_subject"] for message in answers] == ["first", "between", "last"]
    assert [(letter.headers["dlq_offset"], letter.headers["dlq_code"]) for letter in letters] == [
        ("1", "not_json"), ("2", "unreadable"), ("3", "unreadable"), ("5", "unreadable"),
    ]  # fmt: skip
    assert [letter.value for letter in letters] == [b"readable", None, None, None]
    assert "crc" in letters[3].headers["dlq_reason"]
    assert "can't be reached" not in log_text


@pytest.mark.timeout(240)
@pytest.mark.postgresql
def test_two_managers_share_the_commands(tmp_path: Path, cluster: KafkaCluster, postgresql_database: str) -> None:
    """Managers join and are killed while commands come: none is lost, none done twice."""
    store = {"NODE_MANAGER_STORAGE__URL": postgresql_database}
    with ExitStack() as stack:
        first = stack.enter_context(managing(tmp_path / "one", cluster, "pair", **store))
        wait(lambda: "topics were created" in first.log)
        sender = Sender(cluster.addresses, "pair.commands.v1")

        sent = 0

        def send(count: int) -> None:
            nonlocal sent
            for number in range(sent, sent + count):
                body = {"node_id": f"n-{number}", "address": "127.9.0.1", "node_type": "server", "labels": {"by": "k"}}
                sender.send(f"r-{number}", "node.register", {**body, "admin": "offline"}, key=f"n-{number}")
            sender.flush()
            sent += count

        def second_takes_part() -> bool:
            send(3)
            return "a command was carried out" in second.log

        send(40)
        second = stack.enter_context(managing(tmp_path / "two", cluster, "pair", **store))
        wait(second_takes_part)
        first.kill()
        send(40)
        answers = read_until(
            cluster.addresses,
            named("pair", ANSWERS),
            lambda found: len({message.data["command_id"] for message in found}) == sent,
            120,
        )

    unique = {message.event_id: message for message in answers}.values()
    assert Counter(message.data["command_id"] for message in unique) == {f"r-{number}": 1 for number in range(sent)}
    assert {message.headers["ce_type"] for message in unique} == {"commands.answer.done"}


@pytest.mark.timeout(300)
def test_nothing_is_lost_in_chaos() -> None:
    require("kafka", "events go to a real Kafka")

    report = run(Plan(changes=1500, broker_kills=1, manager_kills=2, pauses=1, deadline_seconds=240), lambda _: None)

    assert report.holds, report.table()
    assert report.committed >= report.answered >= 1496


# the link by itself


def messages(topic: str, count: int, size: int = 100) -> list[Message]:
    return [Message(topic, b"key", b"%06d" % number + b"x" * size, [("ce_id", b"1")]) for number in range(count)]


@pytest.fixture
def link(cluster: KafkaCluster) -> KafkaSettings:
    settings = KafkaSettings(bootstrap_servers=cluster.addresses, topic_prefix="link", partitions=2)
    create_topics(settings)
    return settings


def test_publisher_keeps_the_order_and_tells_what_is_too_large(cluster: KafkaCluster, link: KafkaSettings) -> None:
    publisher = Publisher(link)
    sent = messages("link.node.health.v1", 2000)
    sent[700] = sent[700]._replace(value=b"y" * 1_500_000)
    try:
        assert publisher.publish(sent, lambda: True) == [700]
    finally:
        publisher.close()

    found = [message.value for message in read_topic(cluster.addresses, "link.node.health.v1")]
    assert found == [message.value for number, message in enumerate(sent) if number != 700]


def test_publisher_ends_when_it_may_not_go_on(cluster: KafkaCluster, link: KafkaSettings) -> None:
    publisher = Publisher(link)
    publisher.publish(messages("link.recovery.v1", 1), lambda: True)
    cluster.pause()
    begun = time.monotonic()
    try:
        with pytest.raises(LinkError, match="ended before"):
            publisher.publish(messages("link.recovery.v1", 10), lambda: False)
        publisher.close()
        assert time.monotonic() - begun < 6
        assert not [thread.name for thread in threading.enumerate() if "producer" in thread.name.lower()]
    finally:
        cluster.resume()


def test_publisher_says_that_a_topic_is_missing(
    cluster: KafkaCluster, link: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node_manager.kafka_link._METADATA_SECONDS", 1)
    monkeypatch.setattr("node_manager.kafka_link._STUCK_SECONDS", 2.0)
    publisher = Publisher(link)
    try:
        with pytest.raises(LinkError, match=r"link\.nothing"):
            publisher.publish(messages("link.nothing", 1), lambda: True)
    finally:
        publisher.close()


def test_nobody_there_is_said_soon() -> None:
    begun = time.monotonic()
    with pytest.raises(LinkError):
        Publisher(KafkaSettings(bootstrap_servers=[f"127.0.0.1:{free_port()}"]))
    assert time.monotonic() - begun < 8


def test_a_password_that_cant_be_read_is_said(tmp_path: Path, cluster: KafkaCluster) -> None:
    settings = KafkaSettings(
        bootstrap_servers=cluster.addresses,
        security_protocol="SASL_PLAINTEXT",
        sasl_username="me",
        sasl_password_file=tmp_path / "none",
    )
    with pytest.raises(LinkError, match="No such file"):
        Publisher(settings)


def test_without_brokers_nothing_of_kafka_is_loaded(tmp_path: Path) -> None:
    program = """
import sys, threading
from fastapi.testclient import TestClient
from node_manager.main import create_app
with TestClient(create_app()) as client:
    assert client.get("/healthz").status_code == 200
    names = {thread.name for thread in threading.enumerate()}
    print("kafka" in sys.modules, names & {"outbox-relay", "commands"})
"""
    environment = RunningService(tmp_path / "home").variables()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.stdout.split("\n")[-2] == "False set()", done.stderr[-2000:]


def test_all_topics_are_there_as_documented(cluster: KafkaCluster) -> None:
    from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

    admin = AdminClient({"bootstrap.servers": ",".join(cluster.addresses)})
    found = {name for name in admin.list_topics(timeout=10).topics if name.startswith("fleet.")}
    resource = ConfigResource(ResourceType.TOPIC, named("fleet", STATES))
    configuration = admin.describe_configs([resource])[resource].result(10)

    assert found == {
        f"fleet.{topic}.v1"
        for topic in (
            "node.lifecycle",
            "node.health",
            "allocation",
            "recovery",
            "node.state",
            "node.resources",
            "commands",
            "commands.answer",
            "commands.dead-letter",
        )
    }
    assert configuration["cleanup.policy"].value == "compact"
    assert read_topic(cluster.addresses, "fleet.commands.v1") == []
