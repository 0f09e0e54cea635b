# SPDX-License-Identifier: GPL-3.0-or-later
"""Thousands of nodes that cost next to nothing: one SSH server, on loopback, that plays a node to each of its callers.

Instead of running the probe it takes the bundle in and says what a probe says, when a probe would: hello, facts, a sample
at once and then on its beat, signs of life, reports. What is said was recorded on a board (tests/fixtures/platforms); its
numbers move, yet no line is written twice: there are some dozens, made at the start. Whoever has the key may log in under
any name, as any node.

    python tests/simulated_nodes.py --authorized-key id.pub

prints its port and its host key, and serves until its standard input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

try:
    import uvloop
except ImportError:  # it isn't for every platform
    _run = asyncio.run
else:
    _run = uvloop.run

BOARD = Path(__file__).parent / "fixtures" / "platforms" / "aarch64-gateway" / "expected.json"
HELLO = b'{"kind":"hello","schema":1,"python":"3.11.2","pid":4711}\n'
BEAT = b'{"kind":"beat"}\n'
VARIANTS = 64
PRIME_SECONDS = 1.0
# The options stand at the bundle's end, behind what is packed.
OPTIONS_START = b'{"sample_interval_seconds":'
TAIL_BYTES = 64 * 1024
MSG_IGNORE = 2
# As many as may wait to be accepted while all of a fleet dials at once.
BACKLOG = 1024


@dataclass(frozen=True)
class Script:
    """The lines that nodes say, whole."""

    facts: bytes
    samples: list[bytes]
    report: bytes

    @classmethod
    def of_board(cls, board: Path = BOARD) -> Script:
        """Make lines of what was recorded on a board."""
        seen = json.loads(board.read_text("utf-8"))
        check = {"name": "app", "kind": "service", "severity": "critical", "state": "passed", "message": "it is active"}
        check |= {"latency_seconds": 0.001, "value": None, "unit": None}
        report = {"schema": 1, "duration_seconds": 0.02, "checks": [check]}
        samples = [_line("sample", _moved(seen["sample"], number)) for number in range(VARIANTS)]
        return cls(_line("facts", seen["facts"]), samples, _line("report", report))


def _line(kind: str, data: dict[str, Any]) -> bytes:
    return json.dumps({"kind": kind, "data": data}, separators=(",", ":")).encode("ascii") + b"\n"


def _moved(sample: dict[str, Any], number: int) -> dict[str, Any]:
    """Give a sample with other numbers, far from every threshold."""
    moved = deepcopy(sample)
    moved["uptime_seconds"] += 15 * number
    moved["cpu"]["use_percent"] = round(20 + number / 7, 1)
    moved["cpu"]["load_1m"] = round(0.5 + number / 50, 2)
    moved["memory"]["available_bytes"] -= number * 1_048_576
    for filesystem in moved["filesystems"]:
        filesystem["available_bytes"] -= number * 4096
    for interface in moved["network"]:
        interface["received_bytes"] += number * 150_000
    return moved


class _Node(asyncssh.SSHServerSession[bytes]):
    """One caller's node."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._loop = asyncio.get_running_loop()
        self._channel: asyncssh.SSHServerChannel[bytes] | None = None
        self._head = b""
        self._missing: int | None = None
        self._tail = b""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._said = 0

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self._channel = chan
        self._said = zlib.crc32(str(chan.get_extra_info("username")).encode())

    def exec_requested(self, command: str) -> bool:
        return True

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        if self._missing is None:
            self._head += data
            size, newline, data = self._head.partition(b"\n")
            if not newline:
                return
            self._missing = int(size)
        if self._missing > 0:
            self._missing -= len(data)
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            if self._missing <= 0:
                self._begin(json.loads(self._tail[self._tail.rindex(OPTIONS_START) :]))
                self._tail = b""
            return
        for line in data.splitlines():
            self._answer(json.loads(line))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._channel = None
        for timer in self._timers.values():
            timer.cancel()

    def _begin(self, options: dict[str, Any]) -> None:
        self._write(HELLO + self._script.facts)
        first = self._loop.time() + PRIME_SECONDS
        interval, pause = options["sample_interval_seconds"], options["check_interval_seconds"]
        self._at(first, "first", self._first)
        self._at(first, "beat", self._repeat, BEAT, options["beat_interval_seconds"])
        delay = options["first_delay_seconds"]
        # As the probe has it: rates over less than half an interval say nothing.
        self._at(first + delay + (interval if delay < interval / 2 else 0), "sample", self._repeat, None, interval)
        self._at(first + pause, "check", self._repeat, self._script.report, pause)

    def _first(self, _name: str, _at: float) -> None:
        self._write(self._script.samples[self._said % VARIANTS] + self._script.report)

    def _repeat(self, name: str, at: float, line: bytes | None, interval: float) -> None:
        """Say a line, or the next sample, and plan the next one."""
        if line is None:
            self._said += 1
            line = self._script.samples[self._said % VARIANTS]
        self._write(line)
        self._at(at + interval, name, self._repeat, None if name == "sample" else line, interval)

    def _at(self, at: float, name: str, what: Callable[..., None], *more: Any) -> None:
        self._timers[name] = self._loop.call_at(at, what, name, at, *more)

    def _answer(self, command: dict[str, Any]) -> None:
        said = {"sample": self._script.samples[0], "facts": self._script.facts, "check": self._script.report}
        line = said[command["do"]]
        self._write(line.replace(b',"data":', b',"id":"%s","data":' % command["id"].encode("ascii"), 1))

    def _write(self, data: bytes) -> None:
        if self._channel is not None and not self._channel.is_closing():
            self._channel.write(data)


class _Server(asyncssh.SSHServer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        # asyncssh sends an empty packet before each one, which OpenSSH doesn't: they would cost the manager as much again.
        send: Callable[..., None] = conn.send_packet

        def send_packet(kind: int, *parts: bytes, **more: Any) -> None:
            if kind != MSG_IGNORE:
                send(kind, *parts, **more)

        conn.send_packet = send_packet  # type: ignore[method-assign]

    def session_requested(self) -> asyncssh.SSHServerSession[bytes]:
        return _Node(self._script)


async def _serve(address: str, authorized_key: Path) -> None:
    script = Script.of_board()
    key = asyncssh.generate_private_key("ssh-ed25519")
    listener = await asyncssh.listen(
        address,
        0,
        server_host_keys=[key],
        server_factory=lambda: _Server(script),
        authorized_client_keys=str(authorized_key),
        encryption_algs=["aes128-gcm@openssh.com"],
        compression_algs=["none"],
        encoding=None,
        backlog=BACKLOG,
        login_timeout=0,
        rekey_seconds=0,
    )
    print(  # noqa: T201
        json.dumps(
            {
                "port": listener.get_port(),
                "host_key": " ".join(key.export_public_key().decode().split()[:2]),
                "sample_bytes": len(script.samples[0]),
            }
        ),
        flush=True,
    )
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    listener.close()


def main() -> None:
    """Serve until nobody holds our standard input any more."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--authorized-key", type=Path, required=True)
    arguments = parser.parse_args()
    _run(_serve(arguments.address, arguments.authorized_key))


if __name__ == "__main__":
    main()
