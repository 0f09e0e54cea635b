# SPDX-License-Identifier: GPL-3.0-or-later
"""Events read page by page, on both engines."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from node_manager import event_history, outbox
from node_manager.event_history import EventFilter, read_page
from node_manager.events import EventType, NewEvent, emit_all
from node_manager.store import Store, open_store

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def write(store: Store, *node_ids: str, at: datetime = NOW) -> int:
    """Tell of nodes; give the number of the first."""
    with store.write() as connection:
        emit_all(connection, [event(node_id, at) for node_id in node_ids])
    return outbox.newest(store) - len(node_ids) + 1


def event(node_id: str, at: datetime = NOW) -> NewEvent:
    return NewEvent(EventType.NODE_DEREGISTERED, node_id, at, {"forced": False, "dropped_allocations": []})


def test_read_page_goes_through_all_wanted(store: Store) -> None:
    first = write(store, *["a", "b"] * 5)
    last = first + 9
    wanted = EventFilter(node_ids=frozenset({"b"}))

    one = read_page(store, wanted, first - 1, last, 3)
    two = read_page(store, wanted, one.reached, last, 3)
    none = read_page(store, EventFilter(topics=frozenset({"recovery"})), first - 1, last, 3)

    assert [found.node_id for found in (*one.events, *two.events)] == ["b"] * 5
    assert (one.reached, two.reached) == (first + 5, last)
    assert (list(none.events), none.reached) == ([], last)


def test_read_page_looks_through_no_more_than_it_may(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_history, "_MAX_SCANNED", 4)
    first = write(store, *["common"] * 9, "rare")
    wanted = EventFilter(node_ids=frozenset({"rare"}))

    steps = []
    reached = first - 1
    while reached < first + 9:
        page = read_page(store, wanted, reached, first + 9, 100)
        steps.append((page.reached - first, [found.node_id for found in page.events]))
        reached = page.reached

    assert steps == [(3, []), (7, []), (9, ["rare"])]


def test_read_page_jumps_over_what_was_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_history, "_MAX_SCANNED", 4)
    write(store, *["old"] * 30, at=NOW - timedelta(days=9))
    first = write(store, "new")
    outbox.prune(store, NOW, timedelta(days=1), up_to=None)

    page = read_page(store, EventFilter(), first - 31, first, 10)

    assert ([found.node_id for found in page.events], page.reached) == (["new"], first)
    assert event_history.oldest(store) == first
    assert read_page(store, EventFilter(), first, first + 100, 10).reached == first + 100


def test_settled_position_is_the_last_where_nobody_writes(store: Store) -> None:
    last = write(store, "a", "b") + 1

    assert event_history.settled_position(store, NOW) == last
    outbox.prune(store, NOW + timedelta(days=2), timedelta(days=1), up_to=None)
    if store.dialect == "postgresql":
        assert event_history.settled_position(store, NOW) == last


@pytest.mark.postgresql
def test_settled_position_stays_before_what_is_under_way(postgresql_database: str) -> None:
    store = open_store(postgresql_database, pool_size=12)
    write(store, "long-ago", at=NOW - timedelta(seconds=61))
    slow = store._writer.connect()
    slow.begin()
    emit_all(slow, [event("slow")])
    quick = write(store, "quick")

    position = event_history.settled_position(store, NOW)
    slow.commit()
    slow.close()

    assert quick > outbox.newest(store) - 1
    late = read_page(store, EventFilter(), position, quick, 10)
    assert [found.node_id for found in late.events] == ["slow", "quick"]
    store.close()
