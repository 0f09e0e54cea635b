# SPDX-License-Identifier: GPL-3.0-or-later
"""The SSH stream against real servers on loopback: what it carries, how it ends, and what it leaves behind."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Awaitable
from pathlib import Path

import asyncssh
import pytest
import ssh_servers
from node_manager.domain import ContactReason
from node_manager.peers import Answer
from node_manager.probe_bundle import LoopOptions, bootstrap_command, bundle_parts
from node_manager.ssh_stream import StreamEnd, StreamError, StreamOpener, Target
from parts import require
from ssh_calls import LOCAL, Heard, TargetOf, knock, open_on, opened, refusal, settle
from ssh_servers import Node, real_sshd, ssh_node, tcp_node

# what is sent and heard


def test_stream_carries_lines_both_ways(target_of: TargetOf, key_file: Path) -> None:
    async def run() -> None:
        async with ssh_node(authorized_key=key_file.with_suffix(".pub")) as node, opened() as opener:
            stream, heard = await open_on(opener, target_of(node), stdin=(b"first\n", b"x" * 50_000, b"\n"))
            stream.send({"interval": 5})
            await heard.until(lambda: len(heard.lines) == 3)
            await stream.close()
            await stream.close()

            assert heard.lines == [b"first", b"x" * 50_000, b'{"interval":5}']
            assert await heard.end() == StreamEnd(ContactReason.OK, "closed")
            assert stream.host_key == node.host_keys[0]
            assert node.ciphers == {"aes128-gcm@openssh.com"}

    asyncio.run(run())


def test_stream_hands_on_nothing_before_it_is_given_back(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as node, opened() as opener:
            given_back = False
            early: list[bytes] = []

            def on_line(line: bytes) -> None:
                if not given_back:
                    early.append(line)

            heard = Heard()
            await opener.open(target_of(node), "lines 3 0", (), on_line, heard.ends.append)
            given_back = True
            await heard.end()

            assert early == []

    asyncio.run(run())


def test_stream_of_slow_bytes_is_one_line(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as node, opened() as opener:
            stream, heard = await open_on(opener, target_of(node), "slow")
            await heard.until(lambda: bool(heard.lines))
            await stream.close()

            assert heard.lines == [b'{"slow":1}']

    asyncio.run(run())


# how it ends


@pytest.mark.parametrize(
    ("command", "reason", "words"),
    [
        pytest.param("lines 3 drop", ContactReason.CONNECTION_LOST, "", id="dropped"),
        pytest.param("lines 3 0", ContactReason.MODULE_FAILED, "exit code 0", id="ended"),
        pytest.param("lines 3 1", ContactReason.MODULE_FAILED, "(exit code 1): last words", id="failed"),
        pytest.param("lines 3 3", ContactReason.PYTHON_MISSING, "exit code 3", id="python-too-old"),
        pytest.param("no-such-python -c x", ContactReason.PYTHON_MISSING, "not found", id="python-missing"),
        pytest.param("printf 'sudo: no\\n' >&2; exit 1", ContactReason.AUTHENTICATION_FAILED, "sudo", id="no-root"),
        pytest.param("kill -9 $$", ContactReason.MODULE_FAILED, "exit code", id="killed"),
        pytest.param("flood stdout giant", ContactReason.OUTPUT_UNUSABLE, "a line longer than 100000", id="giant-line"),
        pytest.param("flood stdout lines", ContactReason.OUTPUT_UNUSABLE, "more than 10 lines", id="flood-of-lines"),
        pytest.param("flood stderr bytes", ContactReason.OUTPUT_UNUSABLE, "131072 bytes", id="flood-of-errors"),
    ],
)
def test_stream_says_why_it_ended(target_of: TargetOf, command: str, reason: ContactReason, words: str) -> None:
    async def run() -> None:
        async with ssh_node() as node, opened(flood_seconds=0.3) as opener:
            try:
                _, heard = await open_on(opener, target_of(node), command)
                end = await heard.end()
            except StreamError as error:
                end = StreamEnd(error.reason, error.message)

            assert end.reason is reason
            assert words in end.message
            assert f"127.0.0.1:{node.port}" in end.message
            assert end.message.isprintable()

    asyncio.run(run())


def test_stream_slows_a_flood_down(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as node, opened() as opener:
            stream, heard = await open_on(opener, target_of(node), "flood stdout lines")
            await heard.until(lambda: len(heard.lines) >= 52)
            began = asyncio.get_running_loop().time()
            so_far = len(heard.lines)
            await heard.until(lambda: len(heard.lines) >= so_far + 5)
            waited = asyncio.get_running_loop().time() - began
            await stream.close()

            assert waited >= 0.3

    asyncio.run(run())


def test_stream_ends_when_its_lines_can_not_be_taken(target_of: TargetOf) -> None:
    async def run() -> None:
        def on_line(line: bytes) -> None:
            raise RuntimeError("no room")

        async with ssh_node() as node, opened() as opener:
            heard = Heard()
            await opener.open(target_of(node), "lines 5", (), on_line, heard.ends.append)

            assert (await heard.end()).reason is ContactReason.MANAGER_FAULT

    asyncio.run(run())


def test_send_ends_the_stream_of_a_probe_that_does_not_read(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node(window=4096) as node, opened() as opener:
            stream, heard = await open_on(opener, target_of(node), "deaf")
            for _ in range(100):
                stream.send({"filler": "x" * 2000})

            assert (await heard.end()).reason is ContactReason.MODULE_FAILED

    asyncio.run(run())


def test_open_gives_up_on_a_probe_that_does_not_read_its_program(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node(window=4096) as node, opened(handshake_timeout_seconds=0.5) as opener:
            with pytest.raises(StreamError) as raised:
                await open_on(opener, target_of(node), "deaf", (b"x" * 100_000,))

            assert raised.value.reason is ContactReason.TIMED_OUT

    asyncio.run(run())


# many at once, and what is left behind


def test_open_bounds_the_handshakes_at_once(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as node, opened(max_handshakes=20, handshake_timeout_seconds=30) as opener:
            opening = [open_on(opener, target_of(node)) for _ in range(200)]
            streams = [stream for stream, _ in await asyncio.gather(*opening)]
            most = node.most_handshakes
            await asyncio.gather(*(stream.close() for stream in streams))

            assert node.logins == 200
            assert 2 <= most <= 20

    asyncio.run(run())


def test_open_does_not_count_the_time_in_the_queue(target_of: TargetOf) -> None:
    async def run() -> None:
        async with (
            tcp_node(ssh_servers.silent) as dead,
            ssh_node() as node,
            opened(max_handshakes=1, handshake_timeout_seconds=0.5) as opener,
        ):
            first = [asyncio.create_task(refusal(opener, target_of(dead))) for _ in range(3)]
            await asyncio.sleep(0)
            stream, _ = await open_on(opener, target_of(node))
            await stream.close()
            reasons = {(await task).reason for task in first}

            assert reasons == {ContactReason.TIMED_OUT}

    asyncio.run(run())


def sockets() -> int:
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(link) and os.readlink(link).startswith("socket:") for link in links)


@pytest.mark.parametrize("through", [False, True], ids=["direct", "jump-host"])
def test_a_cancelled_open_leaves_nothing_behind(target_of: TargetOf, tmp_path: Path, through: bool) -> None:
    # OpenSSH for the jump host: asyncssh, serving, forgets what it was about to connect to when its caller goes.
    require("sshd", "the jump host runs OpenSSH")

    async def run() -> None:
        async with (
            ssh_node() as node,
            real_sshd(tmp_path) as gate,
            tcp_node(ssh_servers.silent) as dead,
            opened() as opener,
        ):
            jump = target_of(gate, private_key_file=str(tmp_path / "id")) if through else None
            await open_and_close(opener, target_of(node, jump=jump))
            await settle(lambda: node.open_connections == 0)
            sockets_before = sockets()
            tasks_before = len(asyncio.all_tasks())
            for delay in (0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12):
                opening = [
                    asyncio.create_task(open_on(opener, target_of(node, jump=jump))),
                    asyncio.create_task(open_on(opener, target_of(dead, jump=jump))),
                ]
                await asyncio.sleep(delay)
                for task in opening:
                    task.cancel()
                for result in await asyncio.gather(*opening, return_exceptions=True):
                    if isinstance(result, tuple):
                        await result[0].close()

            await settle(lambda: sockets() <= sockets_before)
            await settle(lambda: len(asyncio.all_tasks()) <= tasks_before)
            gc.collect()

    asyncio.run(run())


async def open_and_close(opener: StreamOpener, target: Target) -> None:
    stream, _ = await open_on(opener, target)
    await stream.close()


def test_too_few_files_are_the_managers_fault(target_of: TargetOf) -> None:
    program = """
        import asyncio, contextlib, resource, sys
        from node_manager.ssh_stream import StreamError, StreamOpener, Target

        async def main():
            target = Target("n", "127.0.0.1", int(sys.argv[1]), "root", sys.argv[2], (), False, False, False, None)
            opener = StreamOpener(max_handshakes=4, handshake_timeout_seconds=3, max_line_bytes=4096)
            streams, reasons = [], []
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
            for _ in range(40):
                try:
                    streams.append(await opener.open(target, "echo", (), print, lambda end: None))
                except StreamError as error:
                    reasons.append(error.reason.value)
            spare = [open("/dev/null") for _ in range(3)]
            with contextlib.suppress(OSError):
                while True:
                    spare.append(open("/dev/null"))
            reasons.append((await opener.knock(target, 2))[0].value)
            print(len(streams) > 10, set(reasons))

        asyncio.run(main())
    """

    async def run() -> str:
        async with ssh_node() as node:
            arguments = [str(node.port), str(target_of(node).private_key_file)]
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", textwrap.dedent(program), *arguments, stdout=subprocess.PIPE
            )
            said, _ = await child.communicate()
            return said.decode().strip()

    assert asyncio.run(run()) == "True {'ManagerFault'}"


# jump hosts


def test_streams_share_the_connection_to_their_jump_host(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as outer, ssh_node() as inner, ssh_node() as node, opened(max_handshakes=2) as opener:
            way = target_of(inner, jump=target_of(outer))
            opening = (open_on(opener, target_of(node, jump=way), stdin=(b"hello\n",)) for _ in range(10))
            found = await asyncio.gather(*opening)
            for _, heard in found:
                await heard.until(lambda heard=heard: heard.lines == [b"hello"])  # type: ignore[misc]
            logins = (outer.logins, inner.logins, node.logins)
            knocked = await opener.knock(target_of(node, jump=way), 2.0)
            for stream, _ in found:
                await stream.close()
            await settle(lambda: outer.open_connections == inner.open_connections == 0)

            assert logins == (1, 1, 10)
            assert knocked == (ContactReason.OK, "")

    asyncio.run(run())


def test_a_lost_jump_host_ends_the_streams_behind_it(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as gate, ssh_node() as node, opened() as opener:
            target = target_of(node, jump=target_of(gate))
            _, heard = await open_on(opener, target)
            for connection in gate.connections:
                connection.abort()
            end = await heard.end()
            stream, _ = await open_on(opener, target)
            await stream.close()

            assert end.reason is ContactReason.CONNECTION_LOST
            assert gate.logins == 2

    asyncio.run(run())


def test_a_failing_jump_host_is_not_the_nodes_fault(target_of: TargetOf, tmp_path: Path) -> None:
    async def run() -> None:
        other = tmp_path / "other.pub"
        asyncssh.generate_private_key("ssh-ed25519").write_public_key(other)
        async with (
            ssh_node() as node,
            ssh_node(authorized_key=other) as locked,
            ssh_node(forwards=False) as closed,
            ssh_node() as gate,
            opened() as opener,
        ):
            gone = Node("127.0.0.9", 9)
            cases = {
                "locked": target_of(node, jump=target_of(locked)),
                "changed": target_of(node, jump=target_of(locked, host_keys=gate.host_keys)),
                "no-forwarding": target_of(node, jump=target_of(closed)),
                "gone": target_of(node, jump=target_of(gone)),
                "node-gone": target_of(gone, jump=target_of(gate)),
            }
            reasons = {name: (await refusal(opener, target)).reason for name, target in cases.items()}
            knocks = {name: (await knock(target, 2.0))[0] for name, target in cases.items()}

            assert reasons == {
                "locked": ContactReason.MANAGER_FAULT,
                "changed": ContactReason.MANAGER_FAULT,
                "no-forwarding": ContactReason.MANAGER_FAULT,
                "gone": ContactReason.CONNECTION_REFUSED,
                # OpenSSH says why; this one doesn't.
                "node-gone": ContactReason.CONNECTION_LOST,
            }
            assert knocks == reasons

    asyncio.run(run())


def test_a_dead_jump_host_keeps_no_handshake_from_others(target_of: TargetOf) -> None:
    async def run() -> None:
        async with (
            tcp_node(ssh_servers.silent) as dead,
            ssh_node() as node,
            opened(max_handshakes=2, handshake_timeout_seconds=0.6) as opener,
        ):
            behind = target_of(node, jump=target_of(dead))
            waiting = [asyncio.create_task(refusal(opener, behind)) for _ in range(10)]
            await asyncio.sleep(0)
            stream, _ = await open_on(opener, target_of(node))
            still_waiting = not any(task.done() for task in waiting)
            await stream.close()
            reasons = {(await task).reason for task in waiting}

            assert still_waiting
            assert reasons == {ContactReason.TIMED_OUT}

    asyncio.run(run())


# OpenSSH's own server


def test_open_works_with_openssh(target_of: TargetOf, tmp_path: Path) -> None:
    require("sshd", "the nodes run OpenSSH")

    async def run() -> None:
        async with real_sshd(tmp_path) as node, opened() as opener:
            target = target_of(node, private_key_file=str(tmp_path / "id"), become=os.geteuid() == 0)
            stream, heard = await open_on(opener, target, "cat", (b"x" * 90_000 + b"\n",))
            stream.send({"a": 1})
            await heard.until(lambda: len(heard.lines) == 2)
            asked = stream.ask_peer(["127.0.0.1"], node.port, 4.0), stream.ask_peer(["127.0.0.9"], 9, 4.0)
            answers: list[Awaitable[Answer]] = list(asked)
            peers = await asyncio.gather(*answers)
            await stream.close()
            behind = dataclasses.replace(target, node_id="behind", jump=target)
            second, heard_behind = await open_on(opener, behind, "cat", (b"y\n",))
            await heard_behind.until(lambda: heard_behind.lines == [b"y"])
            gone = await refusal(opener, dataclasses.replace(target, address="127.0.0.9", port=9, jump=target))
            await second.close()
            missing, heard_missing = await open_on(opener, target, "no-such-python")
            end = await heard_missing.end()
            locked = await refusal(opener, target_of(node))

            assert heard.lines[1] == b'{"a":1}'
            # The first address is its own.
            assert peers == [Answer.CANNOT_TELL, Answer.SEEN]
            assert gone.reason is ContactReason.CONNECTION_REFUSED
            assert end.reason is ContactReason.PYTHON_MISSING
            assert locked.reason is ContactReason.AUTHENTICATION_FAILED
            assert (await knock(target, 2.0))[0] is ContactReason.OK
            await missing.close()

    asyncio.run(run())


def test_the_probe_itself_answers_over_openssh_and_here(target_of: TargetOf, tmp_path: Path) -> None:
    require("sshd", "the nodes run OpenSSH")

    async def run() -> None:
        async with real_sshd(tmp_path) as node, opened(max_line_bytes=1_048_576) as opener:
            parts = bundle_parts(LoopOptions(sample_interval_seconds=0.5, beat_interval_seconds=0.5))
            for target in (target_of(node, private_key_file=str(tmp_path / "id")), LOCAL):
                stream, heard = await open_on(opener, target, bootstrap_command(), parts)
                await heard.until(lambda heard=heard: len(heard.lines) >= 3)  # type: ignore[misc]
                await stream.close()

                assert all(isinstance(json.loads(line), dict) for line in heard.lines)
                assert (await heard.end()).reason is ContactReason.OK

    asyncio.run(run())
