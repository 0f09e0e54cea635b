# SPDX-License-Identifier: GPL-3.0-or-later
"""What readers of GET /events may not do: hold up others, the manager or its end, or hold memory or a place for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest
from events_client import WAIT_SECONDS, EventReader
from node_manager.access import Tokens
from node_manager.domain import Role
from node_manager.events import EventType, NewEvent, emit_all
from node_manager.node_registry import utc_now
from node_manager.store import Store, open_store
from running_service import RunningService

Follow = Callable[..., EventReader]
STOP_SECONDS = 3
# So much that the buffers of the kernel don't hide a client that doesn't read.
LARGE = {"forced": False, "dropped_allocations": ["x" * 1000] * 20}
SMALL: dict[str, Any] = {"forced": False, "dropped_allocations": []}


@pytest.fixture
def tight_service(own_service: RunningService) -> RunningService:
    """Start a service with little room."""
    own_service.environment |= {
        "NODE_MANAGER_EVENT_STREAM__MAX_READERS": "4",
        "NODE_MANAGER_EVENT_STREAM__BUFFER_EVENTS": "20",
        "NODE_MANAGER_EVENT_STREAM__KEEPALIVE_SECONDS": "0.5",
        "NODE_MANAGER_AUTH__CACHE_SECONDS": "0.1",
    }
    return own_service.start()


@pytest.fixture
def store(tight_service: RunningService) -> Iterator[Store]:
    """Open the service's store beside it."""
    with closing(open_store(f"sqlite:///{tight_service.home}/node-manager.db", 20)) as opened:
        yield opened


@pytest.fixture
def follow(tight_service: RunningService) -> Iterator[Follow]:
    """Give a way to read along that ends with the test."""
    with ExitStack() as opened:

        def begin(query: dict[str, Any] | None = None, after: str | None = None, **options: Any) -> EventReader:
            return opened.enter_context(EventReader(tight_service, query, last_event_id=after, **options))

        yield begin


def write(store: Store, data: dict[str, Any], *node_ids: str) -> None:
    with store.write() as connection:
        emit_all(connection, [NewEvent(EventType.NODE_DEREGISTERED, node_id, utc_now(), data) for node_id in node_ids])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_slow_reader_is_dropped_and_told_where_to_go_on(
    store: Store, follow: Follow, tight_service: RunningService
) -> None:
    names = [f"n-{number}" for number in range(800)]
    slow, fast = follow(receive_buffer=4096), follow()
    seen: list[str] = []
    reading = threading.Thread(target=lambda: seen.extend(event["subject"] for event in fast.take(len(names))))
    reading.start()

    with tight_service.client() as api:
        for first in range(0, len(names), 10):
            write(store, LARGE, *names[first : first + 10])
            assert api.get("/healthz").status_code == 200
    reading.join(WAIT_SECONDS)
    told = [message for message in slow.rest() if message.data]

    assert seen == names
    assert told[-1].event == "dropped"
    assert told[-1].json["resume_from"] == told[-1].last_id == told[-2].last_id
    assert "event_stream.buffer_events" in told[-1].json["message"]
    before = [message.json["subject"] for message in told[:-1]]
    assert len(before) < len(names)
    after = follow({"follow": "false"}, after=told[-1].last_id)
    assert [*before, *(message.json["subject"] for message in after.rest() if message.data)] == names


def test_reader_beyond_max_readers_is_refused_until_one_leaves(follow: Follow) -> None:
    readers = [follow() for _ in range(4)]

    refused = follow()

    assert (refused.status, refused.headers["retry-after"]) == (503, "2")
    assert '"code": "too_many_readers"' in refused.body()
    readers[0].close()
    wait_until(lambda: follow().status == 200)


def test_place_of_a_refused_or_ended_reader_is_free_again(follow: Follow) -> None:
    for _ in range(10):
        assert follow({"after": "x"}).status == 422
        assert follow({"follow": "false"}).rest() != []

    assert [follow().status for _ in range(4)] == [200] * 4


def test_idle_reader_gets_comments_with_the_id_to_go_on_from(store: Store, follow: Follow) -> None:
    reader = follow({"node_id": "rare"})
    write(store, SMALL, *["common"] * 5)

    found = reader.until(lambda message: message.comments == ["keepalive"] and message.last_id == "5")

    assert all(not message.data for message in found)
    write(store, SMALL, "common", "rare")
    reader.close()
    assert [event["sequence"] for event in follow({"node_id": "rare"}, after=reader.last_id).take(1)] == ["7"]


def test_reader_whose_token_is_revoked_is_shown_out(store: Store, follow: Follow) -> None:
    text, record = Tokens(store).create("guest", Role.VIEWER)
    guest, owner = follow(token=text), follow()
    next(guest.messages())

    Tokens(store).revoke(record.token_id)

    last = [message for message in guest.rest() if message.data][-1]
    assert (last.event, last.json["reason"]) == ("bye", "unauthenticated")
    write(store, SMALL, "gw-1")
    assert owner.take(1)[0]["subject"] == "gw-1"


def test_reader_stays_however_the_door_let_it_in(follow: Follow, tight_service: RunningService) -> None:
    reader = follow(token=f"  {tight_service.token}")

    found = [message for _, message in zip(range(4), reader.messages(), strict=False)]

    assert [message.comments for message in found] == [["connected"], *[["keepalive"]] * 3]


@pytest.mark.parametrize("role", [Role.AGENT])
def test_reader_needs_to_be_a_viewer(store: Store, follow: Follow, role: Role) -> None:
    text, _ = Tokens(store).create("probe", role)

    assert follow(token=text).status == 403


def test_stop_waits_for_no_reader(store: Store, follow: Follow, tight_service: RunningService) -> None:
    readers = [follow() for _ in range(3)]
    stuck = follow(receive_buffer=4096)
    for number in range(80):
        write(store, LARGE, *[f"n-{number}"] * 10)
    threads = [threading.Thread(target=reader.take, args=(800,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    begun = time.monotonic()

    tight_service.stop()

    assert time.monotonic() - begun < STOP_SECONDS
    for reader in readers:
        last = [message for message in reader.rest() if message.data][-1]
        assert (last.event, last.json["reason"], last.json["resume_from"]) == ("bye", "shutdown", "800")
    assert stuck.status == 200
    assert "error" not in tight_service.log.lower()


def test_readers_stay_while_the_store_does_not_answer(
    store: Store, follow: Follow, tight_service: RunningService
) -> None:
    reader = follow()
    with store.write() as connection:
        connection.exec_driver_sql("ALTER TABLE outbox RENAME TO outbox_away")
    wait_until(lambda: "reading events stumbled" in tight_service.log)

    with store.write() as connection:
        connection.exec_driver_sql("ALTER TABLE outbox_away RENAME TO outbox")
    write(store, SMALL, "gw-1")

    assert reader.take(1)[0]["subject"] == "gw-1"


def test_garbage_of_a_client_harms_nobody(follow: Follow, store: Store, tight_service: RunningService) -> None:
    owner = follow()
    for _ in range(20):
        leaving = follow()
        leaving.close()
    post = httpx.post(f"{tight_service.url}/events", headers={"Authorization": f"Bearer {tight_service.token}"})
    write(store, SMALL, "gw-1")

    assert post.status_code == 405
    assert owner.take(1)[0]["subject"] == "gw-1"
