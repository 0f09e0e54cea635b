# SPDX-License-Identifier: GPL-3.0-or-later
"""A consumer of the manager's topics, written from docs/events.md alone and with another client library than the manager's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

READ_SECONDS = 60.0


@dataclass(frozen=True)
class Told:
    """One message of a topic."""

    topic: str
    partition: int
    offset: int
    key: str
    headers: dict[str, str]
    value: bytes | None

    @property
    def data(self) -> Any:
        """Read the value."""
        return None if self.value is None else json.loads(self.value)

    @property
    def event_id(self) -> str:
        """Give what repetitions have in common."""
        return self.headers["ce_id"]


def read_topic(brokers: Sequence[str], topic: str) -> list[Told]:
    """Read all that a topic holds now, partition by partition."""
    consumer = _consumer(brokers)
    try:
        ends = _ends(consumer, topic)
        consumer.assign([TopicPartition(topic, partition, 0) for partition in ends])
        left = {partition for partition, end in ends.items() if end > 0}
        found: list[Told] = []
        deadline = time.monotonic() + READ_SECONDS
        while left:
            assert time.monotonic() < deadline, f"{topic} was not read in {READ_SECONDS} s"
            for message in consumer.consume(500, 1.0):
                told = _told(message)
                if told is None:
                    continue
                found.append(told)
                if told.offset + 1 >= ends[told.partition]:
                    left.discard(told.partition)
        return found
    finally:
        consumer.close()


def read_until(
    brokers: Sequence[str], topic: str, enough: Callable[[list[Told]], bool], seconds: float = READ_SECONDS
) -> list[Told]:
    """Read a topic from its beginning until there is *enough*."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = read_topic(brokers, topic)
        except KafkaException:
            found = []
        if enough(found):
            return found
        assert time.monotonic() < deadline, (
            f"{topic}: {len(found)} messages are not enough after {seconds} s: {found[-3:]}"
        )


def fleet_of(messages: Sequence[Told]) -> dict[str, Any]:
    """Rebuild the fleet from the compacted topic: the last of each key counts, none means that the node is gone."""
    last = {message.key: message.data for message in messages}
    return {node_id: state for node_id, state in last.items() if state is not None}


class Sender:
    """Sends commands as a sister service would."""

    def __init__(
        self, brokers: Sequence[str], topic: str = "node-manager.commands.v1", compression: str = "none"
    ) -> None:
        self._producer = Producer({"bootstrap.servers": ",".join(brokers), "compression.type": compression})
        self._topic = topic

    def send(self, command_id: str, command_type: str, data: object, key: str = "any") -> None:
        """Send one command, or *data* as it is where it is bytes."""
        headers = {"ce_specversion": "1.0", "ce_id": command_id, "ce_source": "/deployer", "ce_type": command_type}
        value = data if isinstance(data, bytes) else json.dumps(data).encode()
        self._producer.produce(self._topic, key=key, value=value, headers=headers)

    def flush(self) -> None:
        """Wait until all are there."""
        assert self._producer.flush(30) == 0


def _consumer(brokers: Sequence[str]) -> Consumer:
    return Consumer(
        {"bootstrap.servers": ",".join(brokers), "group.id": "reader", "enable.auto.commit": False, "log_level": 0}
    )


def _ends(consumer: Consumer, topic: str) -> dict[int, int]:
    described = consumer.list_topics(topic, timeout=10).topics[topic]
    if described.error is not None:
        raise KafkaException(described.error)
    return {
        partition: consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)[1]
        for partition in described.partitions
    }


def _told(message: Message) -> Told | None:
    error = message.error()
    if error is not None:
        if error.code() == KafkaError._PARTITION_EOF:
            return None
        raise KafkaException(error)
    key = message.key() or b""
    headers = {name: (value or b"").decode("utf-8", "replace") for name, value in message.headers() or ()}
    return Told(message.topic(), message.partition(), message.offset(), key.decode(), headers, message.value())
