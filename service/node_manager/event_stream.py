# SPDX-License-Identifier: GPL-3.0-or-later
"""What one reader of the events gets, from what it missed up to the reason why the stream ends.

Text of server-sent events, bit by bit, at the pace at which it is taken. Knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import structlog
from fastapi.sse import format_sse_event

from node_manager.event_hub import EventHub, LeftBehindError, Reader
from node_manager.store import StoreUnavailableError
from node_manager.store.documents import write_json

# What is written at once; the server keeps about as much again for a client that doesn't take it.
_MAX_BYTES = 64 * 1024
_RETRY_MILLISECONDS = 2000
_UNAVAILABLE_SECONDS = 1.0
_log = structlog.get_logger()


@dataclass(frozen=True)
class Terms:
    """What a reader asked for, and how long it may go on."""

    # The number to resume from, 0 for the oldest there is; None: from now on.
    after: int | None
    # False: end once all is told that there is.
    follow: bool
    keepalive_seconds: float
    # Asked once per keepalive_seconds; False ends the stream.
    is_allowed: Callable[[], Awaitable[bool]]


class _EndOfStream(Exception):  # noqa: N818  # no error, as StopIteration is none
    def __init__(self, last: bytes) -> None:
        super().__init__()
        self.last = last


class EventStream:
    """One reader's stream; the caller lets the reader leave afterwards."""

    def __init__(self, hub: EventHub, reader: Reader, terms: Terms, lowest: int | None, newest: int) -> None:
        """Shapes: *lowest* and *newest* are the numbers of the first and the last event in the store, None and 0 for none."""
        self._hub = hub
        self._reader = reader
        self._terms = terms
        tail = reader.attached
        self._newest = max(newest, tail.top)
        self._gap = None if terms.after is None else _gap(terms.after, lowest, tail.position, self._newest)
        self._resume = tail.position if terms.after is None else min(terms.after, self._newest)
        self._told_at = self._asked_at = time.monotonic()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Give what is to be sent."""
        if self._terms.after is None:
            # Before anything is told: from the first id on nothing may be missed.
            self._hub.attach(self._reader)
            self._resume = self._reader.attached.position
        yield format_sse_event(comment="connected", id=str(self._resume), retry=_RETRY_MILLISECONDS)
        if self._gap is not None:
            yield _message("gap", self._resume, message=self._gap, after=str(self._terms.after))
        try:
            if self._terms.after is not None:
                async for chunk in self._caught_up():
                    yield chunk
            if self._terms.follow:
                async for chunk in self._live():
                    yield chunk
        except _EndOfStream as end:
            yield end.last

    async def _caught_up(self) -> AsyncGenerator[bytes, None]:
        """Read from the store up to where the tail is, and have the tail keep what follows."""
        tail = self._reader.attached
        # Nothing can appear any more up to the tail's position. While that is far ahead, nothing is kept for this reader.
        while self._resume < tail.position:
            async for chunk in self._read(tail.position, tail.position, set()):
                yield chunk
        # Above the position there may be events that the tail has yet to come to: those are not taken from it again.
        known: set[int] = set()
        up_to = max(tail.top, 0 if self._terms.follow else self._newest)
        position = up_to if self._hub.commits_in_order else tail.position
        if self._terms.follow:
            self._hub.attach(self._reader, known)
        async for chunk in self._read(up_to, position, known):
            yield chunk

    async def _read(self, up_to: int, position: int, known: set[int]) -> AsyncGenerator[bytes, None]:
        reached = self._resume
        while reached < up_to:
            await self._check()
            try:
                page = await self._hub.read_page(self._reader.wanted, reached, up_to)
            except StoreUnavailableError as error:
                _log.warning("the store does not answer, a reader of events waits", reason=str(error))
                await self._reader.wait(_UNAVAILABLE_SECONDS)
            else:
                reached = page.reached
                known.update(event.sequence for event in page.events if event.sequence > position)
                entries = [
                    self._hub.render(event, max(self._resume, min(event.sequence, position))) for event in page.events
                ]
                # What was looked at and not wanted need not be looked at again.
                self._resume = max(self._resume, min(reached, position))
                for chunk in _joined([entry.wire for entry in entries]):
                    self._told_at = time.monotonic()
                    yield chunk
            if self._until_keepalive() <= 0:
                yield self._keepalive()

    async def _live(self) -> AsyncGenerator[bytes, None]:
        while True:
            await self._check()
            try:
                taken = self._reader.take(self._resume, _MAX_BYTES)
            except LeftBehindError:
                self._hub.left_behind += 1
                raise _EndOfStream(self._dropped()) from None
            self._resume = taken.resume
            if taken.wire:
                self._told_at = time.monotonic()
                yield taken.wire
            elif (left := self._until_keepalive()) > 0:
                await self._reader.wait(left)
            else:
                yield self._keepalive()

    async def _check(self) -> None:
        if self._hub.closing:
            raise _EndOfStream(self._bye("shutdown", "the manager stops; reconnect with the id that you have"))
        if time.monotonic() < self._asked_at + self._terms.keepalive_seconds:
            return
        self._asked_at = time.monotonic()
        try:
            allowed = await self._terms.is_allowed()
        except StoreUnavailableError:
            # Whoever was let in stays until somebody can tell otherwise.
            return
        if not allowed:
            raise _EndOfStream(self._bye("unauthenticated", "the token is unknown or revoked"))

    def _until_keepalive(self) -> float:
        return self._told_at + self._terms.keepalive_seconds - time.monotonic()

    def _keepalive(self) -> bytes:
        self._told_at = time.monotonic()
        # With the id, so that whoever waits for something rare needn't go through all the rest when it comes back.
        return format_sse_event(comment="keepalive", id=str(self._resume))

    def _bye(self, reason: str, message: str) -> bytes:
        return _message("bye", self._resume, reason=reason, message=message, resume_from=str(self._resume))

    def _dropped(self) -> bytes:
        message = (
            f"this reader was slower than the events came and lost its place in the buffer (event_stream.buffer_events); "
            f"reconnect with Last-Event-ID {self._resume}, or ask for less with type, topic and node_id"
        )
        return _message("dropped", self._resume, reason="too_slow", message=message, resume_from=str(self._resume))


def _gap(after: int, lowest: int | None, position: int, newest: int) -> str | None:
    """Tell what can't be told any more to one who resumes; None if nothing is missing.

    Above *position* nothing can be gone: what isn't there may still be under way.
    """
    if after == 0:
        return None
    if after < (position if lowest is None else min(lowest - 1, position)):
        return (
            f"events after {after} are gone, they are kept for storage.history_days; "
            "read the state from the API, events go on with the oldest there is"
        )
    if after > newest:
        return (
            f"no event has the id {after}, is it of another manager? Read the state from the API, events go on from now"
        )
    return None


def _message(event: str, resume: int, **data: str) -> bytes:
    return format_sse_event(data_str=write_json(data), event=event, id=str(resume))


def _joined(frames: list[bytes]) -> Iterator[bytes]:
    """Join frames to chunks that are written at once."""
    part: list[bytes] = []
    size = 0
    for frame in frames:
        part.append(frame)
        size += len(frame)
        if size >= _MAX_BYTES:
            yield b"".join(part)
            part, size = [], 0
    if part:
        yield b"".join(part)
