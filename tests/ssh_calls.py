# SPDX-License-Identifier: GPL-3.0-or-later
"""What tests of the SSH stream share: a key to log in with, targets made of served nodes, and an ear for one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from node_manager.domain import ContactReason
from node_manager.ssh_stream import NodeStream, StreamEnd, StreamError, StreamOpener, Target

DEADLINE_SECONDS = 8.0

TargetOf = Callable[..., Target]


class Heard:
    """What a stream said; callable as on_line and on_end."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.ends: list[StreamEnd] = []

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():
                await asyncio.sleep(0.01)

    async def end(self) -> StreamEnd:
        await self.until(lambda: bool(self.ends))
        assert len(self.ends) == 1
        return self.ends[0]


@asynccontextmanager
async def opened(**more: float) -> AsyncIterator[StreamOpener]:
    settings = {"max_handshakes": 20, "handshake_timeout_seconds": 5.0, "max_line_bytes": 100_000, **more}
    opener = StreamOpener(**settings)  # type: ignore[arg-type]
    try:
        yield opener
    finally:
        await opener.close()


LOCAL = Target("here", "", 22, "", None, (), True, False, True, None)


async def open_on(
    opener: StreamOpener, target: Target, command: str = "echo", stdin: tuple[bytes, ...] = ()
) -> tuple[NodeStream, Heard]:
    heard = Heard()
    return await opener.open(target, command, stdin, heard.lines.append, heard.ends.append), heard


async def refusal(opener: StreamOpener, target: Target, command: str = "echo") -> StreamError:
    with pytest.raises(StreamError) as raised:
        await open_on(opener, target, command)
    message = raised.value.message
    assert len(message) <= 500
    assert message.isprintable()
    return raised.value


async def settle(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():
            await asyncio.sleep(0.02)


async def knock(target: Target, timeout_seconds: float) -> tuple[ContactReason, str]:
    """Knock by an opener of its own, which logs in to jump hosts afresh."""
    async with opened(handshake_timeout_seconds=timeout_seconds) as opener:
        return await opener.knock(target, timeout_seconds)
