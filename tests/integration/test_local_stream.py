# SPDX-License-Identifier: GPL-3.0-or-later
"""The stream of the manager's own machine, with real processes."""

from __future__ import annotations

import asyncio
import errno
import json
import sys

import pytest
from node_manager.domain import ContactReason
from node_manager.local_stream import open_local
from node_manager.peers import Answer
from node_manager.ssh_targets import StreamError
from ssh_calls import LOCAL, Heard, open_on, opened

# the manager's own machine

ECHO = "python3 -S -E -c 'import sys\nfor line in sys.stdin: print(line.strip(), sys.executable, flush=True)'"


def test_local_stream_is_the_same_thing() -> None:
    async def run() -> None:
        async with opened() as opener:
            stream, heard = await open_on(opener, LOCAL, ECHO, (b"one\n",))
            stream.send({"two": 2})
            await heard.until(lambda: len(heard.lines) == 2)
            peer = await stream.ask_peer(["127.0.0.1"], 22, 1.0)
            await stream.close()

            python = sys.executable.encode()
            assert heard.lines == [
                b"one " + python,
                json.dumps({"two": 2}, separators=(",", ":")).encode() + b" " + python,
            ]
            assert (await heard.end()).reason is ContactReason.OK
            assert peer is Answer.CANNOT_TELL

    asyncio.run(run())


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        pytest.param("echo '{}'; echo why >&2; exit 4", ContactReason.MODULE_FAILED, id="failed"),
        pytest.param("exit 3", ContactReason.PYTHON_MISSING, id="python-too-old"),
        pytest.param("yes", ContactReason.OUTPUT_UNUSABLE, id="flood"),
        pytest.param("head -c 300000 /dev/zero; sleep 60", ContactReason.OUTPUT_UNUSABLE, id="giant-line"),
    ],
)
def test_local_stream_says_why_it_ended(command: str, reason: ContactReason) -> None:
    async def run() -> None:
        async with opened(flood_seconds=0.3) as opener:
            _, heard = await open_on(opener, LOCAL, command)

            assert (await heard.end()).reason is reason

    asyncio.run(run())


def test_open_local_says_that_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async def no_process(*arguments: object, **more: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(asyncio.get_running_loop(), "subprocess_exec", no_process)
        heard = Heard()
        with pytest.raises(StreamError) as raised:
            await open_local(LOCAL, "true", (), heard.lines.append, heard.ends.append, 4096)

        assert raised.value.reason is ContactReason.MANAGER_FAULT

    asyncio.run(run())
