# SPDX-License-Identifier: GPL-3.0-or-later
"""What one node says of another: asked over a real connection, by a real Python."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from node_manager import peer_view
from node_manager.peers import Answer
from ssh_calls import TargetOf, open_on, opened
from ssh_servers import ssh_node

# peers


def test_ask_peer_tells_what_the_node_sees(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as peer, ssh_node("127.0.0.5") as other, full_backlog() as deaf_port, opened() as opener:
            stream, heard = await open_on(opener, target_of(peer))
            answers = [
                await stream.ask_peer(["127.0.0.5"], other.port, 3.0),
                # Its own address, to which the silent node's moved or which both have.
                await stream.ask_peer(["127.0.0.1"], peer.port, 3.0),
                await stream.ask_peer(["127.0.0.9"], 9, 3.0),
                await stream.ask_peer(["127.0.0.1"], deaf_port, 1.5),
                await stream.ask_peer(["127.0.0.1", "127.0.0.9"], deaf_port, 1.8),
                await stream.ask_peer(["$(touch x)"], other.port, 3.0),
                await stream.ask_peer([], other.port, 3.0),
            ]
            stream.send({"still": "there"})
            await heard.until(lambda: bool(heard.lines))
            await stream.close()
            after = await stream.ask_peer(["127.0.0.5"], other.port, 3.0)

            seen, blind, unknown = Answer.SEEN, Answer.BLIND, Answer.CANNOT_TELL
            assert answers == [seen, unknown, seen, blind, seen, unknown, unknown]
            assert after is unknown

    asyncio.run(run())


def test_ask_peer_does_not_wait_for_a_peer_that_is_stuck(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as peer, opened() as opener:
            stream, _ = await open_on(opener, target_of(peer))
            for connection in peer.connections:
                connection.get_extra_info("socket")
                connection._transport.pause_reading()  # type: ignore[union-attr]
            began = time.monotonic()
            answer = await stream.ask_peer(["127.0.0.1"], peer.port, 0.5)
            await stream.close()

            assert answer is Answer.CANNOT_TELL
            assert time.monotonic() - began < 4

    asyncio.run(run())


@asynccontextmanager
async def full_backlog() -> AsyncIterator[int]:
    """Give a port whose kernel drops what comes, as a cut link would."""
    import socket

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(listener.getsockname())
        await asyncio.sleep(0.05)
        yield listener.getsockname()[1]


def test_the_question_is_no_part_of_a_shells_language() -> None:
    command = peer_view._COMMAND

    assert command.count("'") == 2
    assert "\n" not in command
    assert "\\\\" not in command
