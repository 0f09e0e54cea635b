# SPDX-License-Identifier: GPL-3.0-or-later
"""The consumer of commands: what is committed when, and what is tried again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from builders import FakeClock
from kafka import TopicPartition
from kafka.errors import KafkaConnectionError
from node_manager.command_consumer import CommandConsumer
from node_manager.commands import DeadLetter
from node_manager.kafka_link import LinkError, Message, UnreadableError
from node_manager.platform_settings import KafkaSettings
from node_manager.store import StoreUnavailableError

DEADLINE_SECONDS = 10.0


class Topic:
    """Its partitions with their group: gives what follows the place that was sought."""

    def __init__(self, count: int, partitions: int = 1) -> None:
        self.records = {
            TopicPartition("t", partition): [
                SimpleNamespace(
                    topic="t",
                    partition=partition,
                    offset=number,
                    key=b"k",
                    value=b"%d" % number,
                    headers=[("ce_id", b"1"), ("big", b"x" * 100)],
                )
                for number in range(count)
            ]
            for partition in range(partitions)
        }
        self.places = dict.fromkeys(self.records, 0)
        self.committed = dict(self.places)
        self.breaks: list[Exception] = []
        # Batches that can't be read, as ranges of offsets in the first partition, and why.
        self.unreadable: dict[range, str] = {}
        self.corrupt = True
        self.opened = 0

    @property
    def is_done(self) -> bool:
        return all(self.committed[partition] == len(records) for partition, records in self.records.items())

    def open(self) -> Topic:
        self.opened += 1
        return self

    def poll(self, timeout_ms: int) -> dict[TopicPartition, list[Any]]:
        if self.breaks:
            raise self.breaks.pop(0)
        found = {}
        for partition, records in self.records.items():
            place = self.places[partition]
            batches = self.unreadable if partition.partition == 0 else {}
            for batch, words in batches.items():
                if place in batch:
                    raise UnreadableError(partition, place, words, corrupt=self.corrupt)
            end = min([place + 3, *(batch[0] for batch in batches if batch[0] > place)])
            if some := records[place:end]:
                found[partition] = some
                self.places[partition] += len(some)
        if not found:
            threading.Event().wait(0.005)
        return found

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.places[partition] = offset

    def commit(self, offsets: dict[TopicPartition, Any]) -> None:
        self.committed |= {partition: committed.offset for partition, committed in offsets.items()}

    def close(self) -> None:
        self.places = dict(self.committed)


class Letters:
    """Takes dead letters, unless it is broken or they are too large."""

    def __init__(self, broken: int = 0, largest: int = 1000) -> None:
        self.taken: list[Message] = []
        self.broken = broken
        self.largest = largest
        self.offered = 0

    def publish(self, messages: Sequence[Message], _goes_on: Callable[[], bool]) -> list[int]:
        if self.broken:
            self.broken -= 1
            raise LinkError("gone")
        (message,) = messages
        size = len(message.key) + len(message.value or b"") + sum(len(value) for _, value in message.headers)
        self.offered += 1
        if size > self.largest:
            return [0]
        self.taken += messages
        return []

    def close(self) -> None:
        pass


class Handler:
    """Does with each message what was set for it, once per entry."""

    def __init__(self, **by_value: list[Exception | DeadLetter | None]) -> None:
        self.by_value = by_value
        self.handled: list[str] = []

    def handle(self, _headers: Sequence[tuple[str, bytes]], value: bytes | None) -> DeadLetter | None:
        name = (value or b"").decode()
        self.handled.append(name)
        results = self.by_value.get(f"n{name}", [])
        result = results.pop(0) if results else None
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node_manager.command_consumer._RETRY_SECONDS", (0.001,))


def consume(topic: Topic, handler: Handler, letters: Letters | None = None) -> None:
    """Let it run until all is committed."""
    kept = letters or Letters()
    consumer = CommandConsumer(KafkaSettings(), handler, topic.open, lambda: kept, FakeClock())  # type: ignore[arg-type]
    consumer.start()
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while not topic.is_done:
            assert time.monotonic() < deadline, (topic.committed, handler.handled)
            threading.Event().wait(0.005)
    finally:
        consumer.stop()


def test_commands_are_handled_in_order_and_once() -> None:
    handler = Handler()
    consume(Topic(8), handler)

    assert handler.handled == [str(number) for number in range(8)]


def test_a_store_that_does_not_answer_keeps_its_command() -> None:
    handler = Handler(n1=[StoreUnavailableError("locked")] * 5)
    consume(Topic(4), handler)

    assert handler.handled == ["0", *["1"] * 6, "2", "3"]


def test_a_command_that_it_stumbles_over_becomes_a_dead_letter() -> None:
    handler, letters = Handler(n1=[KeyError("x")] * 3), Letters()
    consume(Topic(3), handler, letters)

    assert handler.handled == ["0", "1", "1", "1", "2"]
    (letter,) = letters.taken
    assert dict(letter.headers)["dlq_code"] == b"internal_error"
    assert (letter.topic, letter.value) == ("node-manager.commands.dead-letter.v1", b"1")


def test_a_dead_letter_waits_until_it_is_there() -> None:
    letters = Letters(broken=3)
    consume(Topic(3), Handler(n1=[DeadLetter("not_json", "no")] * 4), letters)

    (letter,) = letters.taken
    told = dict(letter.headers)
    assert told["ce_id"] == b"1"
    assert (told["dlq_code"], told["dlq_offset"]) == (b"not_json", b"1")


@pytest.mark.parametrize(
    ("largest", "told"),
    [(300, (b"k", b"0" * 100, True)), (200, (b"k", b"", True)), (100, (b"", b"", False)), (1, None)],
    ids=["whole", "without its value", "only why", "lost"],
)
def test_a_dead_letter_that_is_too_large_says_as_much_as_it_may(
    largest: int, told: tuple[bytes, bytes, bool] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    letters, topic, value = Letters(largest=largest), Topic(1), b"0" * 100
    for records in topic.records.values():
        records[0].value = value
    consume(topic, Handler(**{f"n{value.decode()}": [DeadLetter("too_large", "no")]}), letters)

    found = [(letter.key, letter.value, "big" in dict(letter.headers)) for letter in letters.taken]
    assert found == ([] if told is None else [told])
    assert all(dict(letter.headers)["dlq_code"] == b"too_large" for letter in letters.taken)
    assert ("a dead letter is lost" in capsys.readouterr().out) == (told is None)


def test_two_partitions_with_poison_hold_each_other_up_in_nothing() -> None:
    letters = Letters()
    consume(Topic(2, partitions=2), Handler(n0=[KeyError("x")] * 6), letters)

    assert [dict(letter.headers)["dlq_partition"] for letter in letters.taken] == [b"0", b"1"]


def test_trouble_of_the_group_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    topic, handler = Topic(6), Handler()
    topic.breaks = [RuntimeError("the group is rebalancing")] * 3
    consume(topic, handler)

    assert handler.handled == [str(number) for number in range(6)]
    written = capsys.readouterr().out
    assert "taking commands stumbled" in written
    assert "can't be reached" not in written


@pytest.mark.parametrize("error", [LinkError("gone"), ConnectionResetError("gone"), KafkaConnectionError("gone")])
def test_a_lost_link_is_called_that(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    topic = Topic(1)
    topic.breaks = [error]
    consume(topic, Handler())

    assert "Kafka can't be reached" in capsys.readouterr().out


def test_a_batch_that_cant_be_read_becomes_dead_letters(capsys: pytest.CaptureFixture[str]) -> None:
    topic, handler, letters = Topic(20), Handler(), Letters(broken=1)
    topic.unreadable = {range(2, 12): "bad sum of batch 2", range(12, 13): "bad sum of batch 12"}
    consume(topic, handler, letters)

    assert handler.handled == [str(number) for number in [0, 1, *range(13, 20)]]
    told = [dict(letter.headers) for letter in letters.taken]
    assert [found["dlq_offset"] for found in told] == [b"%d" % number for number in range(2, 13)]
    assert {(found["dlq_code"], found["dlq_topic"], found["dlq_partition"]) for found in told} == {
        (b"unreadable", b"t", b"0")
    }
    assert {letter.value for letter in letters.taken} == {None}
    # Three times each batch, once more for the dead letter that had to wait; and not again for all that is in it.
    assert topic.opened == 1 + 3 + 2
    written = capsys.readouterr().out
    assert "a message can't be read, it is passed by" in written
    assert "can't be reached" not in written


def test_a_batch_that_only_lacks_a_library_waits(capsys: pytest.CaptureFixture[str]) -> None:
    topic, letters = Topic(4), Letters()
    topic.unreadable = {range(2, 4): "no library for zstd"}
    topic.corrupt = False
    consumer = CommandConsumer(KafkaSettings(), Handler(), topic.open, lambda: letters, FakeClock())  # type: ignore[arg-type]
    consumer.start()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while topic.opened < 10:
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
    consumer.stop()

    assert (list(topic.committed.values()), letters.taken) == ([2], [])
    written = capsys.readouterr().out
    assert "commands wait, a message can't be read" in written
    assert "no library for zstd" in written
