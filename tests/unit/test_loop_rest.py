# SPDX-License-Identifier: GPL-3.0-or-later
"""A loop stands still while nothing is under way, goes on where something is, and is woken at once."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

from node_manager.loop_rest import LoopRest

LONG = 30.0


async def turns_during(rest: LoopRest, seconds: float) -> int:
    """Count how often the loop turns while it rests."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    turning = asyncio.create_task(turn())
    await asyncio.sleep(0.02)
    before = turns
    await rest.pause(seconds)
    turning.cancel()
    return turns - before


def test_loop_stands_still_while_nothing_is_under_way() -> None:
    assert asyncio.run(turns_during(LoopRest(), 0.5)) <= 2


def test_loop_goes_on_while_something_is_under_way() -> None:
    async def work() -> int:
        rest = LoopRest()
        rest.busy.add(asyncio.create_task(asyncio.sleep(LONG)))
        return await turns_during(rest, 0.5)

    assert asyncio.run(work()) > 5


def test_loop_goes_on_while_an_answer_is_expected() -> None:
    async def work() -> int:
        rest = LoopRest()
        rest.expect_answer()
        return await turns_during(rest, 0.5)

    assert asyncio.run(work()) > 5


def test_hurry_ends_the_rest() -> None:
    rest = LoopRest()
    threading.Timer(0.1, rest.hurry).start()

    begun = time.monotonic()
    asyncio.run(rest.pause(LONG))

    assert time.monotonic() - begun < LONG / 2


def test_hurry_before_the_rest_is_not_lost() -> None:
    rest = LoopRest()
    rest.hurry()

    begun = time.monotonic()
    asyncio.run(rest.pause(LONG))

    assert time.monotonic() - begun < LONG / 2


def test_what_came_while_the_loop_stood_still_is_read_in_one_go() -> None:
    async def work() -> list[bytes]:
        heard: list[bytes] = []
        reader, writer = await asyncio.open_connection(sock=ours)
        listening = asyncio.create_task(reader.readexactly(3))
        listening.add_done_callback(lambda done: heard.append(done.result()))
        await asyncio.sleep(0)
        theirs.sendall(b"abc")
        rest = LoopRest()
        await rest.pause(0.05)
        # The data is in; who waits for it has its turn next.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        writer.close()
        return heard

    ours, theirs = socket.socketpair()
    with theirs:
        assert asyncio.run(work()) == [b"abc"]
