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
from node_manager.command_consumer import CommandConsumer
from node_manager.commands import DeadLetter
from node_manager.kafka_link import LinkError, Message
from node_manager.platform_settings import KafkaSettings
from node_manager.store import StoreUnavailableError

DEADLINE_SECONDS = 10.0


class Topic:
    """One partition with its group: gives what follows the place that was sought."""

    def __init__(self, count: int) -> None:
        self.records = [
            SimpleNamespace(
                topic="t", partition=0, offset=number, key=None, value=b"%d" % number, headers=[("ce_id", b"1")]
            )
            for number in range(count)
        ]
        self.place = 0
        self.committed = 0
        self.breaks = 0

    def poll(self, timeout_ms: int) -> dict[str, list[Any]]:
        if self.breaks:
            self.breaks -= 1
            raise RuntimeError("the group is rebalancing")
        found = self.records[self.place : self.place + 3]
        self.place += len(found)
        if not found:
            threading.Event().wait(0.005)
        return {"p": found} if found else {}

    def seek(self, _partition: str, offset: int) -> None:
        self.place = offset

    def commit(self, offsets: dict[str, Any]) -> None:
        self.committed = offsets["p"].offset

    def close(self) -> None:
        self.place = self.committed


class Letters:
    """Takes dead letters, unless it is broken."""

    def __init__(self, broken: int = 0, largest: int = 1000) -> None:
        self.taken: list[Message] = []
        self.broken = broken
        self.largest = largest

    def publish(self, messages: Sequence[Message], _goes_on: Callable[[], bool]) -> list[int]:
        if self.broken:
            self.broken -= 1
            raise LinkError("gone")
        if len(messages[0].value or b"") > self.largest:
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
    consumer = CommandConsumer(KafkaSettings(), handler, lambda: topic, lambda: kept, FakeClock())  # type: ignore[arg-type, return-value]
    consumer.start()
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while topic.committed < len(topic.records):
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


def test_a_dead_letter_that_is_too_large_is_told_without_its_value() -> None:
    letters = Letters(largest=0)
    consume(Topic(1), Handler(n0=[DeadLetter("too_large", "no")]), letters)

    assert [letter.value for letter in letters.taken] == [b""]


def test_trouble_of_the_group_costs_nothing() -> None:
    topic, handler = Topic(6), Handler()
    topic.breaks = 3
    consume(topic, handler)

    assert handler.handled == [str(number) for number in range(6)]
