# SPDX-License-Identifier: GPL-3.0-or-later
"""Hand what is new in the outbox to all who read along: one thread tails it while anybody does, and none otherwise.

All readers share one buffer of the newest events. Each goes through it at its own pace, so that a slow one holds no memory of its
own; whom the buffer has left behind has lost its place and is told so. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

import structlog
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from node_manager import cloud_events, event_history, outbox
from node_manager.event_history import EventFilter, Page
from node_manager.node_registry import Clock, utc_now
from node_manager.outbox import OutboxReader, StoredEvent
from node_manager.platform_settings import EventStreamSettings
from node_manager.problems import TooManyReadersError
from node_manager.store import Store, StoreUnavailableError
from node_manager.store.documents import write_json

_POLL_SECONDS = 0.15
# Also without a commit: numbers that never came are given up by time.
_READ_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_BATCH = 250
# How long the tail waits for readers that are about to be left behind, so that a burst costs nobody its place who reads on.
# Only once for each, until it is level again: one that has stopped reading holds up nobody.
_PATIENCE_SECONDS = 0.5
_STOP_SECONDS = 10.0
# Readers who catch up share the threads and connections that requests need.
_MAX_CATCHING_UP = 2


class Entry(NamedTuple):
    """An event, the number to resume from once it was received, and how it goes over the wire."""

    event: StoredEvent
    resume: int
    wire: bytes


class Taken(NamedTuple):
    """What a reader gets next."""

    wire: bytes
    resume: int


class LeftBehindError(Exception):
    """The reader was too slow: events that it has not got are no longer in the buffer."""


class Reader:
    """One who reads along; all methods for the event loop."""

    def __init__(self, wanted: EventFilter) -> None:
        self.wanted = wanted
        self.tail: _Tail | None = None
        self.next = 0
        self.not_waited_for = False
        # What it got from the store although the tail had yet to come to it.
        self.known: Set[int] = frozenset()
        # Called when the service ends, for one who doesn't get to hear of it because nothing is taken.
        self.on_close: Callable[[], None] | None = None
        self._woken = asyncio.Event()

    @property
    def attached(self) -> _Tail:
        """Give the tail that it reads along with."""
        assert self.tail is not None
        return self.tail

    async def wait(self, seconds: float) -> None:
        """Return once there may be something to take, or the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return
        self._woken.clear()

    def wake(self) -> None:
        """Let wait() return."""
        self._woken.set()

    def take(self, resume: int, max_bytes: int) -> Taken:
        """Take the next wanted events, *max_bytes* and one event at most; empty if there are none.

        Shapes: *resume* is what is given back if there is nothing at all.
        Errors: LeftBehindError.
        """
        tail = self.attached
        if self.next < tail.first:
            raise LeftBehindError
        parts: list[bytes] = []
        size = 0
        while self.next < tail.end and size < max_bytes:
            entry = tail.entries[self.next - tail.first]
            self.next += 1
            resume = entry.resume
            if self.wanted.matches(entry.event) and entry.event.sequence not in self.known:
                parts.append(entry.wire)
                size += len(entry.wire)
        if self.next == tail.end:
            resume = max(resume, tail.position)
            self.not_waited_for = False
        tail.note_room()
        return Taken(b"".join(parts), resume)


class EventHub:
    """The readers of one process; all methods but stop() for the event loop."""

    def __init__(self, store: Store, settings: EventStreamSettings, source: str, clock: Clock = utc_now) -> None:
        self._store = store
        self._settings = settings
        self._source = source
        self._clock = clock
        self._readers: set[Reader] = set()
        self._tail: _Tail | None = None
        self._starting = asyncio.Lock()
        self._catching_up = asyncio.Semaphore(_MAX_CATCHING_UP)
        self._threads: list[threading.Thread] = []
        self.closing = False
        self.left_behind = 0

    @property
    def readers(self) -> int:
        """Tell how many read along."""
        return len(self._readers)

    @property
    def commits_in_order(self) -> bool:
        """Tell whether no event can appear any more below one that is there."""
        return self._store.dialect == "sqlite"

    async def join(self, wanted: EventFilter) -> Reader:
        """Let one more in; leave() must follow. It reads along once it is attached.

        Errors: TooManyReadersError, StoreUnavailableError.
        """
        if len(self._readers) >= self._settings.max_readers:
            raise TooManyReadersError(
                f"{self._settings.max_readers} readers follow the events already (event_stream.max_readers); "
                "repeat the request after the time in Retry-After"
            )
        reader = Reader(wanted)
        self._readers.add(reader)
        try:
            async with self._starting:
                if self._tail is None:
                    self._tail = await self._start()
        except BaseException:
            self.leave(reader)
            raise
        reader.tail = self._tail
        return reader

    def attach(self, reader: Reader, known: Set[int] = frozenset()) -> None:
        """Let it read along from now on, without the events numbered as *known*."""
        tail = reader.attached
        reader.next, reader.known = tail.end, known
        tail.readers.add(reader)

    def leave(self, reader: Reader) -> None:
        """Let one go; the last one ends the thread."""
        self._readers.discard(reader)
        if reader.tail is not None:
            reader.tail.readers.discard(reader)
            reader.tail.note_room()
        if not self._readers and self._tail is not None:
            self._tail.stop()
            self._tail = None

    async def read_page(self, wanted: EventFilter, after: int, up_to: int) -> Page:
        """Read events from the store for one who catches up.

        Errors: StoreUnavailableError.
        """
        async with self._catching_up:
            return await run_in_threadpool(event_history.read_page, self._store, wanted, after, up_to, _BATCH)

    async def kept(self) -> tuple[int | None, int]:
        """Give the lowest and the highest number in the store; None and 0 if it has none.

        Errors: StoreUnavailableError.
        """
        lowest = await run_in_threadpool(event_history.oldest, self._store)
        return lowest, await run_in_threadpool(outbox.newest, self._store)

    def render(self, event: StoredEvent, resume: int) -> Entry:
        """Bring an event into the shape of the wire."""
        return _render(event, resume, self._source)

    def close(self) -> None:
        """Have all readers hear that the service ends."""
        self.closing = True
        for reader in self._readers:
            reader.wake()
            if reader.on_close is not None:
                reader.on_close()

    def stop(self) -> None:
        """Wait for the thread's end; for any thread but the event loop's."""
        self.closing = True
        tail = self._tail
        if tail is not None:
            tail.stop()
        for thread in self._threads:
            thread.join(_STOP_SECONDS)

    async def _start(self) -> _Tail:
        loop = asyncio.get_running_loop()
        position = await run_in_threadpool(event_history.settled_position, self._store, self._clock())
        source = OutboxReader(self._store, position)
        tail = _Tail(self._store, source, self._settings.buffer_events, self._source, loop)
        await run_in_threadpool(tail.skip, position)
        thread = threading.Thread(target=tail.run, name="event-hub", daemon=True)
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        thread.start()
        return tail


class _Tail:
    """The thread that reads on, and the buffer that it fills; the buffer is for the event loop alone."""

    def __init__(
        self, store: Store, source: OutboxReader, limit: int, name: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.readers: set[Reader] = set()
        self.entries: list[Entry] = []
        # The numbers, counted by this tail, of the first entry in the buffer and of the one that comes next.
        self.first = 0
        self.end = 0
        # The highest event number that was read, and the one up to which all were.
        self.top = 0
        self.position = 0
        self._store = store
        self._source = source
        self._limit = limit
        self._size = min(_BATCH, max(1, limit // 2))
        self._name = name
        self._loop = loop
        self._stopped = threading.Event()
        self._handed_over = threading.Event()
        self._room = threading.Event()
        self._log = structlog.get_logger()

    def skip(self, position: int) -> None:
        """Pass over what is there already, noting which numbers may still come.

        Errors: StoreUnavailableError.
        """
        self.top = position
        while events := self._source.read(_BATCH):
            self.top = max(self.top, events[-1].sequence)
        self.position = self._source.position

    def stop(self) -> None:
        """Let the thread end; for any thread."""
        self._stopped.set()
        self._handed_over.set()

    def run(self) -> None:
        """Hand over what is new until stopped."""
        mark = ""
        read_again_at = 0.0
        while not (self._stopped.is_set() or self._loop.is_closed()):
            pause = _POLL_SECONDS
            try:
                newest = self._store.change_mark()
                if newest != mark or time.monotonic() >= read_again_at:
                    self._read_on()
                    mark, read_again_at = newest, time.monotonic() + _READ_SECONDS
            except StoreUnavailableError as error:
                self._log.warning("the store does not answer, readers of events wait", reason=str(error))
                pause = _RETRY_SECONDS
            except Exception:  # without this thread all readers would wait for ever
                self._log.exception("reading events stumbled")
                pause = _RETRY_SECONDS
            self._stopped.wait(pause)

    def _read_on(self) -> None:
        while not self._stopped.is_set():
            events = self._source.read(self._size)
            position = self._source.position
            # One who has got all of these has got all up to the position; before that, all up to its own number at most.
            entries = [_render(event, min(position, event.sequence), self._name) for event in events]
            if events:
                entries[-1] = _render(events[-1], position, self._name)
            self._hand_over(entries, position)
            if len(events) < self._size:
                return

    def _hand_over(self, entries: Sequence[Entry], position: int) -> None:
        self._handed_over.clear()
        # One call for all events and readers: each wakes the loop through a socket.
        self._loop.call_soon_threadsafe(self._take_over, entries, position)
        while not self._handed_over.wait(_RETRY_SECONDS):
            if self._stopped.is_set() or self._loop.is_closed():
                return
        if not self._room.wait(_PATIENCE_SECONDS) and not self._stopped.is_set():
            self._loop.call_soon_threadsafe(self._lose_patience)

    def _take_over(self, entries: Sequence[Entry], position: int) -> None:
        self._room.clear()
        self.position = position
        if entries:
            self.top = max(self.top, *(entry.event.sequence for entry in entries))
            self.entries.extend(entries)
            self.end += len(entries)
            surplus = len(self.entries) - self._limit
            if surplus > 0:
                del self.entries[:surplus]
                self.first += surplus
            for reader in self.readers:
                reader.wake()
        self.note_room()
        self._handed_over.set()

    def note_room(self) -> None:
        """Let the thread go on if nobody whom it waits for would be left behind."""
        if self._room.is_set():
            # Until the next events come; it is asked after each take of each reader.
            return
        needed = self.end - self._limit + self._size
        if all(reader.next >= needed or reader.not_waited_for for reader in self.readers):
            self._room.set()

    def _lose_patience(self) -> None:
        needed = self.end - self._limit + self._size
        for reader in self.readers:
            if reader.next < needed:
                reader.not_waited_for = True


def _render(event: StoredEvent, resume: int, source: str) -> Entry:
    text = write_json(cloud_events.structured(event, source))
    return Entry(event, resume, format_sse_event(data_str=text, event=event.type, id=str(resume)))
