# SPDX-License-Identifier: GPL-3.0-or-later
"""The feed of changed nodes: whoever follows it misses nothing, on either engine."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from builders import FakeClock, make_declaration, make_request, make_sample, observe
from node_manager import changes
from node_manager.declarations import NodeChange
from node_manager.domain import Admin
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.resource_allocator import ResourceAllocator
from node_manager.store import Store, open_store, tables
from stored import Rows


class Follower:
    """Reads the feed on and on."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.since = 0

    def read(self) -> dict[str, str | None]:
        """Give the nodes that are new in the feed, and who wrote them."""
        with self._store.read() as connection:
            found, self.since = changes.read(connection, self.since)
        return {change.node_id: change.writer for change in found}


@pytest.fixture
def follower(store: Store) -> Follower:
    """Follow the feed from its start."""
    return Follower(store)


def note(store: Store, *node_ids: str, writer: str | None = None, seen: int = 0) -> int | None:
    """Note changes in a transaction of their own."""
    with store.write() as connection:
        return changes.note(connection, node_ids, writer, seen)


def test_read_gives_each_change_once_to_a_reader_that_goes_on(store: Store, follower: Follower) -> None:
    note(store, "a", "b")
    first = follower.read()
    note(store, "b")
    second = follower.read()

    assert first == {"a": None, "b": None}
    assert second == {"b": None}
    assert follower.read() == {}


def test_read_from_the_start_gives_each_node_once(store: Store, rows: Rows) -> None:
    for _ in range(3):
        note(store, "a", "b", "a")

    with store.read() as connection:
        found, following = changes.read(connection, 0)

    assert sorted(change.node_id for change in found) == ["a", "b"]
    assert all(change.mark < following for change in found)
    assert len(rows.of(tables.node_changes)) == 2


def test_note_of_nothing_writes_nothing(store: Store, rows: Rows) -> None:
    assert note(store) is None
    assert rows.of(tables.node_changes) == []


def test_note_that_is_rolled_back_is_not_read(store: Store, follower: Follower) -> None:
    def fail() -> None:
        with store.write() as connection:
            changes.note(connection, ["a"])
            raise LookupError

    with pytest.raises(LookupError):
        fail()

    assert follower.read() == {}


@pytest.mark.parametrize("what", ["update", "admin", "sample", "allocate", "confirm", "deallocate", "expire", "forget"])
def test_every_change_that_selection_looks_at_is_noted(
    follower: Follower,
    registry: NodeRegistry,
    log: ObservationLog,
    allocator: ResourceAllocator,
    clock: FakeClock,
    what: str,
) -> None:
    registry.register(make_declaration(capacity={"memory_mib": 100}))
    registry.register(make_declaration("gw-8", capacity={"memory_mib": 100}))
    allocator.allocate("gw-7", make_request("a1", ttl_seconds=60))
    follower.read()

    match what:
        case "update":
            registry.update("gw-7", NodeChange.model_validate({"address": "192.0.2.8"}))
        case "admin":
            registry.set_admin("gw-7", Admin.CORDONED, "new disk")
        case "sample":
            log.record([observe("sample", make_sample())])
        case "allocate":
            allocator.allocate("gw-7", make_request("a2"))
        case "confirm":
            allocator.confirm("a1")
        case "deallocate":
            allocator.deallocate("gw-7", "a1")
        case "expire":
            clock.advance(60)
            allocator.expire()
        case "forget":
            registry.forget_host_keys("gw-7")

    assert set(follower.read()) == {"gw-7"}


def test_read_tells_of_a_node_that_is_gone_and_of_one_that_came_back(
    follower: Follower, registry: NodeRegistry
) -> None:
    registry.register(make_declaration())
    follower.read()

    registry.deregister("gw-7")
    gone = follower.read()
    registry.register(make_declaration())
    back = follower.read()

    assert (gone, back) == ({"gw-7": None}, {"gw-7": None})


# own marks


def test_note_names_the_writer(store: Store, follower: Follower) -> None:
    mark = note(store, "a", writer="me")

    with store.read() as connection:
        assert changes.read(connection, 0)[0] == [changes.Change("a", mark or 0, "me")]
    assert follower.read() == {"a": "me"}


def test_note_names_the_writer_again_once_all_others_were_seen(store: Store, follower: Follower) -> None:
    note(store, "a")
    follower.read()

    note(store, "a", writer="me", seen=follower.since)
    note(store, "a", writer="me", seen=follower.since)

    assert follower.read() == {"a": "me"}


@pytest.mark.parametrize("other", [None, "you"])
def test_note_over_what_the_writer_has_not_seen_names_nobody(
    store: Store, follower: Follower, other: str | None
) -> None:
    follower.read()
    seen = follower.since
    note(store, "a", writer=other)

    note(store, "a", writer="me", seen=seen)
    note(store, "a", writer="me", seen=seen)

    assert follower.read() == {"a": None}


def test_note_of_another_takes_the_writers_name_away(store: Store, follower: Follower) -> None:
    note(store, "a", writer="me")

    note(store, "a", writer="you")

    assert follower.read() == {"a": None}


# two transactions


@pytest.fixture
def other_store(store: Store, store_url: str) -> Iterator[Store]:
    """Open the same database once more."""
    with closing(open_store(store_url, busy_timeout_seconds=5)) as opened:
        yield opened


@pytest.mark.postgresql
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_read_misses_no_change_that_is_committed_out_of_order(
    store: Store, other_store: Store, follower: Follower
) -> None:
    with store.write() as first:
        early = changes.note(first, ["a"])
        late = note(other_store, "b")
        before = follower.read()
    after = follower.read()

    assert (early or 0) < (late or 0)
    assert before == {"b": None}
    assert "a" in after
    assert follower.read() == {}


@pytest.mark.postgresql
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_read_misses_no_change_of_one_node_whose_mark_went_down(
    store: Store, other_store: Store, follower: Follower
) -> None:
    with store.write() as first:
        # Takes its mark now, notes later.
        changes.note(first, ["b"])
        note(other_store, "a")
        before = follower.read()
        changes.note(first, ["a"])
    after = follower.read()

    assert before == {"a": None}
    assert after == {"a": None, "b": None}


@pytest.mark.postgresql
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_note_over_what_was_committed_since_the_writer_looked_names_nobody(
    store: Store, other_store: Store, follower: Follower
) -> None:
    note(store, "a")
    with store.write() as mine:
        # Its mark is below mine, and it commits after I looked.
        with other_store.write() as others:
            changes.note(others, ["a"])
            _, seen = changes.read(mine, 0)
        changes.note(mine, ["a"], "me", seen)

    assert follower.read() == {"a": None}


def test_followers_meet_every_change_of_many_writers(store: Store, other_store: Store, rows: Rows) -> None:
    follower, stop = Follower(other_store), threading.Event()
    newest: dict[str, int] = {}

    def take() -> None:
        with other_store.read() as connection:
            found, follower.since = changes.read(connection, follower.since)
        newest.update({change.node_id: change.mark for change in found})

    def follow() -> None:
        while not stop.is_set():
            take()

    def write(number: int) -> None:
        chance = random.Random(number)
        for _ in range(50):
            note(store if number % 2 else other_store, *chance.sample("abcdefgh", chance.randint(1, 3)))

    with ThreadPoolExecutor(5) as pool:
        following = pool.submit(follow)
        list(pool.map(write, range(4)))
        stop.set()
        following.result(10)
    take()

    assert newest == {row["node_id"]: row["mark"] for row in rows.of(tables.node_changes)}
