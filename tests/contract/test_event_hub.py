# SPDX-License-Identifier: GPL-3.0-or-later
"""One tail for all readers: what each gets of an outbox that is written meanwhile, and what the hub does not do."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from node_manager import event_hub, outbox
from node_manager.api import events as events_api
from node_manager.event_history import EventFilter
from node_manager.event_hub import EventHub, LeftBehindError, Reader
from node_manager.event_stream import EventStream, Terms
from node_manager.events import EventType, NewEvent, emit_all
from node_manager.http_server import ABORT
from node_manager.platform_settings import EventStreamSettings
from node_manager.problems import TooManyReadersError
from node_manager.store import Store, StoreUnavailableError, open_store

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
WAIT_SECONDS = 30
ALL = EventFilter()


def event(node_id: str) -> NewEvent:
    return NewEvent(EventType.NODE_DEREGISTERED, node_id, NOW, {"forced": False, "dropped_allocations": []})


def write(store: Store, *node_ids: str) -> None:
    with store.write() as connection:
        emit_all(connection, [event(node_id) for node_id in node_ids])


def make_hub(store: Store, **settings: Any) -> EventHub:
    return EventHub(store, EventStreamSettings(**settings), "/test")


async def allowed() -> bool:
    return True


def terms(
    after: int | None = None, *, follow: bool = True, is_allowed: Callable[[], Awaitable[bool]] = allowed
) -> Terms:
    return Terms(after, follow, 0.1, is_allowed)


@asynccontextmanager
async def joined(hub: EventHub, wanted: EventFilter = ALL) -> AsyncIterator[Reader]:
    reader = await hub.join(wanted)
    try:
        yield reader
    finally:
        hub.leave(reader)


async def stream_of(hub: EventHub, reader: Reader, asked: Terms) -> EventStream:
    lowest, newest = await hub.kept()
    return EventStream(hub, reader, asked, lowest, newest)


def messages(chunk: bytes) -> list[tuple[str, str, str]]:
    """Give event, subject and id of each message that carries data."""
    found = []
    for block in chunk.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "data" in fields:
            found.append((fields["event"], json.loads(fields["data"]).get("subject", ""), fields["id"]))
    return found


async def read(hub: EventHub, reader: Reader, asked: Terms, count: int) -> list[tuple[str, str, str]]:
    """Read so many messages."""
    found: list[tuple[str, str, str]] = []
    stream = await stream_of(hub, reader, asked)
    async with asyncio.timeout(WAIT_SECONDS):
        async for chunk in stream.chunks():
            found += messages(chunk)
            if len(found) >= count:
                break
    return found


async def attached(reader: Reader) -> None:
    """Wait until it reads along."""
    async with asyncio.timeout(WAIT_SECONDS):
        while reader not in reader.attached.readers:
            await asyncio.sleep(0.001)


def hub_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "event-hub"]


def test_hub_without_readers_does_nothing(store: Store) -> None:
    async def main() -> list[int]:
        hub = make_hub(store)
        counts = [len(hub_threads())]
        for _ in range(2):
            async with joined(hub), joined(hub):
                counts.append(len(hub_threads()))
            await asyncio.to_thread(hub.stop)
            counts.append(len(hub_threads()))
            hub.closing = False
        return counts

    assert asyncio.run(main()) == [0, 1, 0, 1, 0]


def test_hub_takes_no_more_readers_than_it_may(store: Store) -> None:
    async def main() -> None:
        hub = make_hub(store, max_readers=2)
        async with joined(hub):
            async with joined(hub):
                with pytest.raises(TooManyReadersError, match=r"event_stream\.max_readers"):
                    await hub.join(ALL)
                assert hub.readers == 2
            async with joined(hub):
                assert hub.readers == 2
        await asyncio.to_thread(hub.stop)

    asyncio.run(main())


def test_hub_keeps_no_place_for_one_that_could_not_join(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise StoreUnavailableError("locked")

    async def main() -> int:
        hub = make_hub(store)
        with monkeypatch.context() as patch:
            patch.setattr(event_hub.event_history, "settled_position", fail)
            with pytest.raises(StoreUnavailableError):
                await hub.join(ALL)
        return hub.readers + len(hub_threads())

    assert asyncio.run(main()) == 0


def test_reader_that_takes_nothing_is_left_behind_and_holds_up_nobody(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Waited for with each batch, it would hold up the other for longer than the test takes.
    monkeypatch.setattr(event_hub, "_PATIENCE_SECONDS", 2)

    async def main() -> tuple[int, int]:
        hub = make_hub(store, buffer_events=10)
        async with joined(hub) as slow, joined(hub) as fast:
            hub.attach(slow)
            reading = asyncio.ensure_future(read(hub, fast, terms(), 100))
            await attached(fast)
            for number in range(10):
                await asyncio.to_thread(write, store, *[f"{number}-{part}" for part in range(10)])
            found = await reading
            with pytest.raises(LeftBehindError):
                slow.take(0, 1000)
            kept = len(fast.attached.entries)
        await asyncio.to_thread(hub.stop)
        return len(found), kept

    found, kept = asyncio.run(main())
    assert (found, kept <= 10) == (100, True)


def test_burst_leaves_no_reader_behind_that_goes_on_reading(store: Store) -> None:
    async def read_slowly(hub: EventHub, reader: Reader) -> list[str]:
        found: list[str] = []
        hub.attach(reader)
        while len(found) < 200:
            await reader.wait(1)
            # Slower than the tail, which could have read all of it by the time of the third event.
            while wire := reader.take(0, 1).wire:
                found += [subject for _, subject, _ in messages(wire)]
                await asyncio.sleep(0.005)
        return found

    async def main() -> list[list[str]]:
        hub = make_hub(store, buffer_events=10)
        async with joined(hub) as one, joined(hub) as two:
            reading = [asyncio.ensure_future(read_slowly(hub, reader)) for reader in (one, two)]
            await asyncio.sleep(0)
            await asyncio.to_thread(write, store, *[f"n-{number}" for number in range(200)])
            found = await asyncio.wait_for(asyncio.gather(*reading), WAIT_SECONDS)
        await asyncio.to_thread(hub.stop)
        return found

    assert asyncio.run(main()) == [[f"n-{number}" for number in range(200)]] * 2


class Counted(set[Reader]):
    """Readers that count how often somebody goes through all of them."""

    walks = 0

    def __iter__(self) -> Iterator[Reader]:
        self.walks += 1
        return super().__iter__()


def test_readers_who_take_do_not_look_at_all_others(store: Store) -> None:
    async def main() -> int:
        hub = make_hub(store)
        async with AsyncExitStack() as stack:
            readers = [await stack.enter_async_context(joined(hub)) for _ in range(50)]
            for reader in readers:
                hub.attach(reader)
            tail = readers[0].attached
            tail.readers = counted = Counted(tail.readers)
            await asyncio.to_thread(write, store, "a")
            for reader in readers:
                await reader.wait(WAIT_SECONDS)
                assert reader.take(0, 1000).wire
            walks = counted.walks
        await asyncio.to_thread(hub.stop)
        return walks

    # To wake them, and to see that nobody lags behind.
    assert asyncio.run(main()) <= 4


def test_readers_stay_while_the_store_does_not_answer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_hub, "_RETRY_SECONDS", 0.05)
    failures = 0
    change_mark = store.change_mark

    def fail() -> str:
        nonlocal failures
        failures += 1
        if failures < 5:
            raise StoreUnavailableError("locked")
        return change_mark()

    async def main() -> list[str]:
        hub = make_hub(store)
        async with joined(hub) as reader:
            monkeypatch.setattr(store, "change_mark", fail)
            reading = asyncio.ensure_future(read(hub, reader, terms(), 1))
            await attached(reader)
            while failures == 0:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(write, store, "a")
            found = await reading
        await asyncio.to_thread(hub.stop)
        return [subject for _, subject, _ in found]

    assert asyncio.run(main()) == ["a"]
    assert failures >= 5


def test_catching_up_waits_while_the_store_does_not_answer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "a", "b")
    first = outbox.newest(store) - 1
    failures = 0
    read_page = event_hub.event_history.read_page

    def fail(*arguments: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise StoreUnavailableError("locked")
        return read_page(*arguments)

    async def main() -> list[str]:
        hub = make_hub(store)
        async with joined(hub) as reader:
            monkeypatch.setattr(event_hub.event_history, "read_page", fail)
            found = await read(hub, reader, terms(first - 1), 2)
        await asyncio.to_thread(hub.stop)
        return [subject for _, subject, _ in found]

    assert asyncio.run(main()) == ["a", "b"]


def test_stream_that_ends_gives_ids_ahead_of_the_tail_where_commits_are_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"sqlite:///{tmp_path}/nodes.db")

    async def main() -> tuple[list[int], list[str]]:
        hub = make_hub(store)
        async with joined(hub) as reader:
            # The tail sees nothing of what comes.
            monkeypatch.setattr(event_hub, "_READ_SECONDS", WAIT_SECONDS)
            mark = store.change_mark()
            monkeypatch.setattr(store, "change_mark", lambda: mark)
            await asyncio.to_thread(write, store, "a", "b", "c")
            first = await read(hub, reader, terms(0, follow=False), 99)
            again = await read(hub, reader, terms(int(first[-1][2]), follow=False), 99)
        await asyncio.to_thread(hub.stop)
        return [int(position) for _, _, position in first], [subject for _, subject, _ in again]

    assert asyncio.run(main()) == ([1, 2, 3], [])
    store.close()


@pytest.mark.postgresql
def test_stream_misses_nothing_that_commits_late_and_gives_it_once(postgresql_database: str) -> None:
    store = open_store(postgresql_database, pool_size=12)
    write(store, "before")
    expected = {"late", "later", "quick", "quicker", "end", "very-end"}

    def begin(node_id: str) -> Any:
        connection = store._writer.connect()
        connection.begin()
        emit_all(connection, [event(node_id)])
        return connection

    async def main() -> tuple[list[Any], list[Any], list[Any]]:
        hub = make_hub(store)
        async with joined(hub) as witness:
            watching = asyncio.ensure_future(read(hub, witness, terms(), 6))
            await attached(witness)
            late, later = begin("late"), begin("later")
            await asyncio.to_thread(write, store, "quick", "quicker")
            deadline = time.monotonic() + WAIT_SECONDS
            while witness.tail is None or witness.attached.end < 1:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            # One comes while two numbers are missing, and gets one of them from the store before the tail sees it.
            late.commit()
            late.close()
            async with joined(hub) as reader:
                reading = asyncio.ensure_future(read(hub, reader, terms(0), 6))
                await asyncio.to_thread(write, store, "end")
                later.commit()
                later.close()
                await asyncio.to_thread(write, store, "very-end")
                found = await reading
                watched = await watching
                # With the id of any message that it got, whoever comes back gets all that it had not got.
                lost = []
                for got in (found, watched):
                    for number, (_, _, position) in enumerate(got):
                        async with joined(hub) as again:
                            seen = await read(hub, again, terms(int(position), follow=False), 100)
                        known = {subject for _, subject, _ in [*got[: number + 1], *seen]}
                        lost += list(expected - known)
            return watched, found, lost
        raise AssertionError

    watched, found, lost = asyncio.run(main())
    assert sorted(subject for _, subject, _ in found) == sorted({subject for _, subject, _ in found})
    assert {subject for _, subject, _ in watched} == expected
    assert lost == []
    ids = [int(position) for _, _, position in found]
    assert ids == sorted(ids)
    store.close()


class Client:
    """The other end of an ASGI response."""

    def __init__(self, takes: int) -> None:
        self.takes = takes
        self.sent: list[Any] = []
        self.aborted = False
        self.gone = asyncio.Event()

    async def send(self, message: Any) -> None:
        """Take a message, or never return."""
        if len(self.sent) == self.takes:
            await self.gone.wait()
        self.sent.append(message)

    async def receive(self) -> Any:
        """Tell when it has gone."""
        await self.gone.wait()
        return {"type": "http.disconnect"}

    def abort(self) -> None:
        """Cut the connection off."""
        self.aborted = True
        self.gone.set()


async def respond(hub: EventHub, client: Client, asked: Terms) -> None:
    reader = await hub.join(ALL)
    response = events_api.EventStreamResponse(hub, reader, await stream_of(hub, reader, asked))
    async with asyncio.timeout(WAIT_SECONDS):
        await response({"type": "http", "extensions": {ABORT: client.abort}}, client.receive, client.send)


@pytest.mark.parametrize("takes", [0, 1, 2])
def test_client_that_takes_nothing_is_cut_off(store: Store, monkeypatch: pytest.MonkeyPatch, takes: int) -> None:
    monkeypatch.setattr(events_api, "SEND_SECONDS", 0.05)

    async def main() -> tuple[bool, int]:
        hub = make_hub(store)
        client = Client(takes)
        await respond(hub, client, terms())
        readers = hub.readers
        await asyncio.to_thread(hub.stop)
        return client.aborted, readers

    assert asyncio.run(main()) == (True, 0)


def test_place_of_a_client_that_left_is_free_at_once(store: Store) -> None:
    async def main() -> tuple[bool, int]:
        hub = make_hub(store)
        client = Client(1000)
        responding = asyncio.ensure_future(respond(hub, client, terms()))
        while not client.sent:
            await asyncio.sleep(0)
        client.gone.set()
        await responding
        readers = hub.readers
        await asyncio.to_thread(hub.stop)
        return client.aborted, readers

    assert asyncio.run(main()) == (False, 0)


def test_end_of_the_service_is_told_and_waits_for_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_api, "_LAST_SEND_SECONDS", 0.05)

    async def main() -> tuple[bytes, bool, int]:
        hub = make_hub(store)
        polite, stuck = Client(1000), Client(1)
        responding = [asyncio.ensure_future(respond(hub, client, terms())) for client in (polite, stuck)]
        while not (len(polite.sent) >= 2 and len(stuck.sent) == 1):
            await asyncio.sleep(0)
        hub.close()
        await asyncio.gather(*responding)
        readers = hub.readers
        await asyncio.to_thread(hub.stop)
        return polite.sent[-2]["body"], stuck.aborted, readers

    last, aborted, readers = asyncio.run(main())
    assert messages(last)[0][0] == "bye"
    assert (aborted, readers) == (True, 0)


def test_stream_ends_when_its_token_does_and_not_when_nobody_can_tell(store: Store) -> None:
    answers = iter([True, None, None, False])

    async def is_allowed() -> bool:
        answer = next(answers)
        if answer is None:
            raise StoreUnavailableError("locked")
        return answer

    async def main() -> list[tuple[str, str, str]]:
        hub = make_hub(store)
        async with joined(hub) as reader:
            found = await read(hub, reader, terms(is_allowed=is_allowed), 100)
        await asyncio.to_thread(hub.stop)
        return found

    assert [kind for kind, _, _ in asyncio.run(main())] == ["bye"]
    assert next(answers, "used up") == "used up"
