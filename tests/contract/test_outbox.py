# SPDX-License-Identifier: GPL-3.0-or-later
"""The outbox as a stream: nothing missed and nothing twice, also where transactions commit out of order."""

from __future__ import annotations

import random
import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from node_manager import outbox
from node_manager.events import EventType, NewEvent, caused_by, emit, emit_all
from node_manager.outbox import OutboxReader
from node_manager.store import Store, open_store, tables

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Monotonic:
    """A clock that the test moves."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def write(store: Store, *node_ids: str) -> None:
    with store.write() as connection:
        emit_all(connection, [event(node_id) for node_id in node_ids])


def event(node_id: str) -> NewEvent:
    return NewEvent(EventType.NODE_DEREGISTERED, node_id, NOW, {"forced": False, "dropped_allocations": []})


def read_all(reader: OutboxReader, size: int = 100) -> list[str]:
    found: list[str] = []
    while events := reader.read(size):
        found += [event.node_id for event in events]
    return found


def begin(store: Store) -> sa.Connection:
    """Open a transaction beside the others, which only PostgreSQL allows."""
    connection = store._writer.connect()
    connection.begin()
    return connection


def test_read_gives_each_event_once_in_order(store: Store) -> None:
    reader = OutboxReader(store, 0)
    write(store, "a", "b")
    write(store, "c")

    assert [event.node_id for event in reader.read(2)] == ["a", "b"]
    assert read_all(reader) == ["c"]
    write(store, "d")
    assert read_all(reader) == ["d"]
    assert reader.read(10) == []


def test_read_goes_on_from_a_saved_position(store: Store) -> None:
    reader = OutboxReader(store, 0)
    write(store, "a", "b")
    reader.read(1)
    with store.write() as connection:
        outbox.save_position(connection, "test", reader.position, NOW)
        outbox.save_position(connection, "other", 77, NOW)
    with store.write() as connection:
        outbox.save_position(connection, "test", reader.position, NOW)

    assert "b" in read_all(OutboxReader(store, outbox.load_position(store, "test")))
    assert outbox.load_position(store, "other") == 77
    assert outbox.load_position(store, "unknown") == 0


def test_events_name_their_cause(store: Store) -> None:
    with caused_by("command-1"), store.write() as connection:
        emit(connection, *event("a"))
    write(store, "b")

    assert [event.causation_id for event in OutboxReader(store, 0).read(10)] == ["command-1", None]


@pytest.mark.postgresql
def test_read_meets_an_event_that_commits_late(postgresql_database: str) -> None:
    store = open_store(postgresql_database, pool_size=12)
    clock = Monotonic()
    reader = OutboxReader(store, 0, clock)
    slow = begin(store)
    emit(slow, *event("slow"))
    write(store, "quick", "quick")

    assert read_all(reader) == ["quick", "quick"]
    clock.seconds += 1000
    assert read_all(reader) == []
    assert reader.position == 0
    slow.commit()
    slow.close()
    assert read_all(reader) == ["slow"]
    assert reader.position == outbox.newest(store)
    store.close()


@pytest.mark.postgresql
def test_read_forgets_numbers_that_never_come(postgresql_database: str) -> None:
    store = open_store(postgresql_database, pool_size=12)
    clock = Monotonic()
    reader = OutboxReader(store, 0, clock)
    given_up = begin(store)
    emit(given_up, *event("never"))
    write(store, "a")

    assert read_all(reader) == ["a"]
    given_up.rollback()
    given_up.close()
    assert read_all(reader) == []
    assert reader.position == 0
    clock.seconds += 6
    assert read_all(reader) == []
    assert reader.position == outbox.newest(store)
    store.close()


@pytest.mark.postgresql
@pytest.mark.parametrize("seed", range(3))
def test_read_misses_nothing_of_many_writers(postgresql_database: str, seed: int) -> None:
    store = open_store(postgresql_database, pool_size=12)
    clock = Monotonic()
    written: list[str] = []
    done = threading.Event()

    def work(number: int) -> None:
        chance = random.Random(f"{seed}-{number}")
        for turn in range(60):
            connection = begin(store)
            names = [f"{number}-{turn}-{part}" for part in range(chance.randint(1, 4))]
            for name in names:
                emit(connection, *event(name))
            if chance.random() < 0.2:
                connection.rollback()
            else:
                connection.commit()
                written.extend(names)
            connection.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    threading.Thread(target=lambda: [thread.join() for thread in threads] and done.set()).start()
    reader = OutboxReader(store, 0, clock)
    found: list[str] = []
    restarted: list[str] = []
    chance = random.Random(seed)
    second = OutboxReader(store, 0, clock)
    while not done.is_set():
        clock.seconds += 1
        found += [event.node_id for event in reader.read(chance.randint(1, 30))]
        restarted += [event.node_id for event in second.read(chance.randint(1, 30))]
        if chance.random() < 0.2:
            second = OutboxReader(store, second.position, clock)
    clock.seconds += 100
    found += read_all(reader)
    restarted += read_all(second)

    assert sorted(found) == sorted(written)
    assert set(restarted) == set(written)
    for number in range(5):
        own = [name for name in found if name.startswith(f"{number}-")]
        assert own == sorted(own, key=lambda name: [int(part) for part in name.split("-")])
    store.close()


def test_prune_keeps_what_was_not_relayed(store: Store) -> None:
    write(store, "a", "b", "c")
    second = OutboxReader(store, 0).read(2)[1].sequence

    outbox.prune(store, NOW + timedelta(days=2), timedelta(days=1), up_to=second)
    assert read_all(OutboxReader(store, 0)) == ["c"]
    outbox.prune(store, NOW + timedelta(hours=2), timedelta(days=1), up_to=None)
    assert read_all(OutboxReader(store, 0)) == ["c"]
    outbox.prune(store, NOW + timedelta(days=2), timedelta(days=1), up_to=None)
    assert read_all(OutboxReader(store, 0)) == []


def test_newest_tells_the_highest_number(store: Store) -> None:
    with store.write() as connection:
        connection.execute(tables.outbox.delete())

    assert outbox.newest(store) == 0
    write(store, "a")
    assert outbox.newest(store) == OutboxReader(store, 0).read(1)[0].sequence
