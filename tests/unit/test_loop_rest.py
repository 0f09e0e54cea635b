# SPDX-License-Identifier: GPL-3.0-or-later
"""A loop stands still while nothing is under way, goes on where something is, and is woken at once."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import pytest
import uvloop
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


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_what_came_while_the_loop_stood_still_is_read_once_it_goes_on(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def work() -> bytes:
        heard = b""

        def read() -> None:
            nonlocal heard
            heard += ours.recv(16)

        loop = asyncio.get_running_loop()
        loop.add_reader(ours, read)
        # The loop has it under watch.
        await asyncio.sleep(0.05)
        theirs.sendall(b"abc")
        await LoopRest().pause(0.05)
        read_by_then = heard
        loop.remove_reader(ours)
        return read_by_then

    ours, theirs = socket.socketpair()
    with ours, theirs, asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(work()) == b"abc"
