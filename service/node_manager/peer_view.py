# SPDX-License-Identifier: GPL-3.0-or-later
"""Does another node get an answer at a node's SSH port? Asked over a second channel of its open connection.

A small Python program on the node looks, rather than a forwarded port: sshd waits two minutes for a silent host, says
nothing meanwhile, and is often forbidden to forward.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import asyncssh

from node_manager.peers import Answer
from node_manager.ssh_wire import finish_or_abandon

_MAX_ANSWER_BYTES = 64
_MAX_ADDRESSES = 4
# For starting Python on a small board, beside the looking itself.
_START_SECONDS = 1.0
_PROGRAM = """\
import errno, json, socket, sys
ask = json.loads(sys.stdin.readline())
answers = set()
for address in ask["addresses"]:
    try:
        found = socket.create_connection((address, ask["port"]), ask["seconds"] / 2)
        # An address of the silent node may be one of our own too, such as that of a container bridge.
        own = found.getsockname()[0] == found.getpeername()[0]
        own or found.recv(4)
        answers.add("cannot_tell" if own else "seen")
    except ConnectionError:
        answers.add("seen")
    except socket.timeout:
        answers.add("blind")
    except OSError as error:
        found = error.errno in (errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT)
        answers.add("blind" if found else "cannot_tell")
    if "seen" in answers:
        break
print("seen" if "seen" in answers else "blind" if "blind" in answers else "cannot_tell")
"""
# One line and one kind of quotes, as any login shell reads it: sh, csh, fish.
_COMMAND = f"python3 -S -E -c 'exec({json.dumps(_PROGRAM)})'"


async def ask(
    connection: asyncssh.SSHClientConnection, addresses: Sequence[str], port: int, timeout_seconds: float
) -> Answer:
    """Ask the node at the other end of *connection* whether one of *addresses* greets, hangs up, or refuses a connection.

    A connection that is accepted and then met with silence is a hung node: its kernel takes connections for a frozen sshd.
    What it is asked goes to the program's standard input: nothing of it becomes part of a command line.
    """
    some = list(addresses[:_MAX_ADDRESSES])
    if not some:
        return Answer.CANNOT_TELL
    # The program must have given up before we do, or a blind peer couldn't be told from a dead one.
    limit = max(timeout_seconds - _START_SECONDS, timeout_seconds / 2)
    question = {"addresses": some, "port": port, "seconds": limit / len(some)}
    session = _AnswerSession()
    try:
        async with asyncio.timeout(timeout_seconds):
            await finish_or_abandon(
                connection.create_session(
                    lambda: session, _COMMAND, encoding=None, window=_MAX_ANSWER_BYTES * 64, request_pty=False
                )
            )
            session.ask(json.dumps(question).encode() + b"\n")
            answer = await session.answer
    except (TimeoutError, OSError, asyncssh.Error):
        return Answer.CANNOT_TELL
    finally:
        session.drop()
    try:
        return Answer(answer.decode("ascii", "replace").strip())
    except ValueError:
        return Answer.CANNOT_TELL


class _AnswerSession(asyncssh.SSHClientSession[bytes]):
    """What asyncssh calls for the channel of one question."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._channel: asyncssh.SSHClientChannel[bytes] | None = None
        self._said = b""

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        self._channel = chan

    def ask(self, question: bytes) -> None:
        """Write the question."""
        if self._channel is not None and not self._channel.is_closing():
            self._channel.write(question)
            self._channel.write_eof()

    def drop(self) -> None:
        """Close the channel."""
        self.answer.cancel()
        if self._channel is not None:
            self._channel.abort()

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype is None:
            self._said = (self._said + data)[:_MAX_ANSWER_BYTES]

    def eof_received(self) -> bool:
        self._conclude()
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._conclude()

    def _conclude(self) -> None:
        if not self.answer.done():
            self.answer.set_result(self._said)
