# SPDX-License-Identifier: GPL-3.0-or-later
"""What happens, followed over HTTP: in order, filtered, resumed without loss, on both engines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest
from events_client import EventReader, Message
from node_manager.events import EventType, NewEvent, emit_all
from node_manager.node_registry import utc_now
from node_manager.store import Store, open_store, tables
from running_service import RunningService

Follow = Callable[..., EventReader]
DATA: dict[EventType, dict[str, Any]] = {
    EventType.NODE_DEREGISTERED: {"forced": False, "dropped_allocations": []},
    EventType.HEALTH_CHANGED: {"from": "suspect", "to": "healthy", "cause": "no check failed", "source": "test"},
    EventType.RECOVERY_ENDED: {
        "recovery_id": "019a8f2e-0000-7000-8000-000000000000",
        "state": "succeeded",
        "message": "",
        "conditions": [],
        "attempt": 1,
        "requested_by": "manager",
        "duration_seconds": 1.0,
    },
}
ENGINES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)]


@pytest.fixture(params=ENGINES, scope="module")
def busy_service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Run a service on each engine, for tests that clear its outbox before they start."""
    running = RunningService(tmp_path_factory.mktemp("busy") / "home")
    if request.param == "postgresql":
        running.environment["NODE_MANAGER_STORAGE__URL"] = request.getfixturevalue("postgresql_shared_database")
    yield running.start()
    running.stop()


@pytest.fixture
def store(busy_service: RunningService) -> Iterator[Store]:
    """Open the service's store beside it, as another manager does, with nothing in the outbox."""
    file = f"sqlite:///{busy_service.home}/node-manager.db"
    with closing(open_store(busy_service.environment.get("NODE_MANAGER_STORAGE__URL", file), 20)) as opened:
        with opened.write() as connection:
            connection.execute(tables.outbox.delete())
        yield opened


@pytest.fixture
def follow(busy_service: RunningService) -> Iterator[Follow]:
    """Give a way to read along that ends with the test."""
    with ExitStack() as opened:

        def begin(query: dict[str, Any] | None = None, after: str | None = None) -> EventReader:
            return opened.enter_context(EventReader(busy_service, query, last_event_id=after))

        yield begin


def write(store: Store, *node_ids: str, event: EventType = EventType.NODE_DEREGISTERED) -> None:
    """Tell of nodes, in one transaction."""
    with store.write() as connection:
        emit_all(connection, [NewEvent(event, node_id, utc_now(), DATA[event]) for node_id in node_ids])


def named(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


def subjects(messages: list[Message]) -> list[str]:
    return [message.json["subject"] for message in messages if message.data]


def register(api: httpx.Client, node_id: str) -> None:
    answer = api.post("/nodes", params={"look": "false"}, json={"node_id": node_id, "address": "127.0.9.7"})
    assert answer.status_code == 201, answer.text


def test_stream_tells_what_happens_from_now_on_as_cloud_events(busy_service: RunningService) -> None:
    with busy_service.client() as api:
        register(api, "before")
        with EventReader(busy_service) as reader:
            register(api, "gw-1")
            api.put("/nodes/gw-1/status", json={"status": "maintenance"})
            api.delete("/nodes/gw-1")
            found = [message for _, message in zip(range(3), reader.events(), strict=False)]

    assert (reader.status, reader.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert [message.event for message in found] == [message.json["type"] for message in found]
    assert found[0].event == "node.lifecycle.registered"
    assert found[-1].event == "node.lifecycle.deregistered"
    first: dict[str, Any] = found[0].json
    assert set(first) == {
        "specversion", "id", "source", "type", "subject", "time", "dataschema", "datacontenttype", "sequence",
        "partitionkey", "data",
    }  # fmt: skip
    assert (first["specversion"], first["source"], first["subject"]) == ("1.0", "/node-manager", "gw-1")
    assert first["dataschema"] == "urn:node-manager:event:node.lifecycle.registered:v1"


def test_stream_gives_only_what_is_asked_for(store: Store, follow: Follow) -> None:
    filters: list[dict[str, Any]] = [
        {"type": "node.lifecycle.deregistered", "node_id": ["a", "b"]},
        {"topic": ["recovery", "node.health"]},
        {"type": ["node.health.changed", "recovery.ended"], "topic": "recovery"},
    ]
    live = [follow(wanted) for wanted in filters]

    write(store, "a", "b", "c")
    write(store, "a", "b", event=EventType.HEALTH_CHANGED)
    write(store, "b", event=EventType.RECOVERY_ENDED)
    told = [
        [(event["type"], event["subject"]) for event in reader.take(count)]
        for reader, count in zip(live, (2, 3, 1), strict=True)
    ]
    later = [follow({**wanted, "follow": "false"}) for wanted in filters]
    kept = [[(message.event, message.json["subject"]) for message in reader.rest() if message.data] for reader in later]

    assert told == kept == [
        [("node.lifecycle.deregistered", "a"), ("node.lifecycle.deregistered", "b")],
        [("node.health.changed", "a"), ("node.health.changed", "b"), ("recovery.ended", "b")],
        [("recovery.ended", "b")],
    ]  # fmt: skip


def test_reader_that_was_away_gets_what_it_missed(store: Store, follow: Follow) -> None:
    seen: list[str] = []
    reader = follow()
    reader.until(lambda message: message.last_id is not None)
    for turn in range(4):
        names = named(f"turn{turn}", 300)
        write(store, *names[:100])
        reader.close()
        reader = follow(after=reader.last_id)
        seen += [event["subject"] for event in reader.take(50)]
        write(store, *names[100:])
        seen += [event["subject"] for event in reader.take(250)]

    # Numbers are committed in their order here, so that nothing comes twice either.
    assert seen == [name for turn in range(4) for name in named(f"turn{turn}", 300)]


def test_reader_misses_nothing_while_the_service_restarts(
    busy_service: RunningService, store: Store, follow: Follow
) -> None:
    reader = follow()
    write(store, "before")
    assert reader.take(1)[0]["subject"] == "before"

    busy_service.stop()
    write(store, "meanwhile")
    busy_service.start()
    again = follow(after=reader.last_id)
    write(store, "after")

    assert [event["subject"] for event in again.take(2)] == ["meanwhile", "after"]


def test_last_event_id_is_stronger_than_after(store: Store, follow: Follow) -> None:
    write(store, "a", "b", "c")
    reader = follow({"after": 0})
    reader.take(2)

    # As a browser reconnects: with the query of the first time.
    again = follow({"after": 0}, after=reader.last_id)

    assert again.take(1)[0]["subject"] == "c"


def test_stream_without_follow_ends_when_all_is_told(store: Store, follow: Follow) -> None:
    write(store, *named("n", 600))

    assert subjects(follow({"follow": "false"}).rest()) == named("n", 600)


def test_everybody_gets_a_burst_in_one_order(store: Store, follow: Follow) -> None:
    readers = [follow() for _ in range(5)]
    found: list[list[str]] = [[] for _ in readers]

    def read(number: int) -> None:
        found[number] = [event["subject"] for event in readers[number].take(3000)]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    write(store, *named("n", 3000))
    for thread in threads:
        thread.join(60)

    assert found == [named("n", 3000)] * 5


@pytest.mark.parametrize(
    ("query", "header", "field"),
    [
        ({"after": "-1"}, None, "after"),
        ({"after": "x"}, None, "after"),
        ({"after": "9" * 19}, None, "after"),
        ({"after": "²"}, None, "after"),
        ({}, "1; drop", "Last-Event-ID"),
        ({"type": "node.lifecycle.exploded"}, None, "type.0"),
        ({"topic": "node"}, None, "topic.0"),
        ({"node_id": ["n"] * 101}, None, "node_id"),
        ({"node_id": "n" * 254}, None, "node_id.0"),
    ],
)
def test_garbage_is_refused(service: RunningService, query: dict[str, Any], header: str | None, field: str) -> None:
    with EventReader(service, query, last_event_id=header) as reader:
        assert (reader.status, reader.headers["content-type"]) == (422, "application/problem+json")
        assert f'"field": "{field}"' in reader.body()


def test_stream_needs_a_token(service: RunningService) -> None:
    with EventReader(service, token="nm_wrong") as reader:
        assert reader.status == 401


def test_gap_is_told(store: Store, follow: Follow) -> None:
    write(store, *named("n", 10))
    ids = [int(message.last_id or 0) for message in follow({"follow": "false"}).rest() if message.data]
    with store.write() as connection:
        connection.execute(tables.outbox.delete().where(tables.outbox.c.sequence <= ids[4]))

    def told(after: int) -> list[str]:
        return [message.event for message in follow({"follow": "false"}, after=str(after)).rest() if message.data]

    gone = "node.lifecycle.deregistered"
    assert told(ids[2]) == ["gap", *[gone] * 5]
    assert told(ids[4]) == [gone] * 5
    assert told(ids[9]) == []
    assert told(ids[9] + 1000) == ["gap"]
    assert told(0) == [gone] * 5
    with store.write() as connection:
        connection.execute(tables.outbox.delete())
    assert told(ids[9]) == []
    assert told(ids[8]) == ["gap"]
    assert told(ids[9] + 1000) == ["gap"]


def test_reader_with_an_id_of_another_manager_goes_on_from_now(store: Store, follow: Follow) -> None:
    reader = follow(after="123456789")
    reader.until(lambda message: message.event == "gap")
    write(store, "new")

    assert reader.take(1)[0]["subject"] == "new"


def test_events_of_several_writers_are_all_told(store: Store, follow: Follow) -> None:
    expected = sorted(
        name for number in range(6) for turn in range(40) for name in named(f"{number}-{turn}", 1 + turn % 3)
    )

    def work(number: int) -> None:
        for turn in range(40):
            write(store, *named(f"{number}-{turn}", 1 + turn % 3))

    live, comes_and_goes = follow(), follow()
    comes_and_goes.until(lambda message: message.last_id is not None)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    resumed: set[str] = set()
    while len(resumed) < len(expected):
        # So that catching up and reading along meet in all ways.
        comes_and_goes.close()
        comes_and_goes = follow(after=comes_and_goes.last_id)
        for _, message in zip(range(min(37, len(expected) - len(resumed))), comes_and_goes.events(), strict=False):
            resumed.add(message.json["subject"])
    for thread in threads:
        thread.join(60)

    assert sorted(event["subject"] for event in live.take(len(expected))) == expected
    assert resumed == set(expected)
