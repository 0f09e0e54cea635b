# SPDX-License-Identifier: GPL-3.0-or-later
"""Logging in to real servers on loopback: whom it trusts, and what it says of those that answer wrongly."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import asyncssh
import pytest
import ssh_servers
from node_manager.domain import ContactReason
from node_manager.ssh_wire import Logins
from ssh_calls import LOCAL, TargetOf, knock, open_on, opened, refusal
from ssh_servers import Node, ssh_node, tcp_node

# whom it trusts


def test_open_refuses_a_changed_key_and_names_both(target_of: TargetOf) -> None:
    async def run() -> None:
        other = asyncssh.generate_private_key("ssh-ed25519")
        async with ssh_node() as node, opened() as opener:
            text = " ".join(other.export_public_key().decode().split()[:2])
            error = await refusal(opener, target_of(node, host_keys=(text,)))

            assert error.reason is ContactReason.HOST_KEY_CHANGED
            assert other.get_fingerprint() in error.message
            assert asyncssh.import_public_key(node.host_keys[0]).get_fingerprint() in error.message
            assert node.logins == 0

    asyncio.run(run())


def test_open_refuses_a_key_of_a_new_kind(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as old, ssh_node(kinds=("ecdsa-sha2-nistp256",)) as node, opened() as opener:
            error = await refusal(opener, target_of(node, host_keys=old.host_keys))

            assert error.reason is ContactReason.HOST_KEY_CHANGED

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"])
def test_open_asks_for_the_kind_of_key_that_is_pinned(target_of: TargetOf, kind: str) -> None:
    async def run() -> None:
        async with ssh_node(kinds=("ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa")) as node, opened() as opener:
            pinned = tuple(key for key in node.host_keys if key.startswith(kind))
            stream, _ = await open_on(opener, target_of(node, host_keys=pinned))
            await stream.close()

            assert (stream.host_key,) == pinned

    asyncio.run(run())


def test_open_takes_the_first_key_where_it_may(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as node, opened() as opener:
            stream, _ = await open_on(opener, target_of(node, host_keys=(), strict=False))
            await stream.close()

            assert stream.host_key == node.host_keys[0]

    asyncio.run(run())


def test_open_refuses_an_unknown_key_where_it_must(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as node, opened() as opener:
            error = await refusal(opener, target_of(node, host_keys=()))

            assert error.reason is ContactReason.MANAGER_FAULT
            assert "no host key is given" in error.message
            assert node.logins == 0

    asyncio.run(run())


def test_open_says_that_the_login_failed(target_of: TargetOf, tmp_path: Path) -> None:
    async def run() -> None:
        other = tmp_path / "other.pub"
        asyncssh.generate_private_key("ssh-ed25519").write_public_key(other)
        async with ssh_node(authorized_key=other) as node, opened() as opener:
            assert (await refusal(opener, target_of(node))).reason is ContactReason.AUTHENTICATION_FAILED

    asyncio.run(run())


def test_open_reads_a_private_key_again_when_it_changed(target_of: TargetOf, tmp_path: Path) -> None:
    async def run() -> None:
        mine = tmp_path / "mine"
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(mine)
        right = asyncssh.generate_private_key("ssh-rsa")
        right.write_public_key(tmp_path / "right.pub")
        async with ssh_node(authorized_key=tmp_path / "right.pub") as node, opened() as opener:
            target = target_of(node, private_key_file=str(mine))
            assert (await refusal(opener, target)).reason is ContactReason.AUTHENTICATION_FAILED
            right.write_private_key(mine)
            stream, _ = await open_on(opener, target)
            await stream.close()

            assert node.logins == 1

    asyncio.run(run())


@pytest.mark.parametrize("content", [None, b"nonsense"], ids=["missing", "unusable"])
def test_open_blames_the_manager_for_its_key_file(target_of: TargetOf, tmp_path: Path, content: bytes | None) -> None:
    async def run() -> None:
        path = tmp_path / "key"
        if content is not None:
            path.write_bytes(content)
        async with ssh_node() as node, opened() as opener:
            error = await refusal(opener, target_of(node, private_key_file=str(path)))

            assert error.reason is ContactReason.MANAGER_FAULT
            assert str(path) in error.message

    asyncio.run(run())


# nodes that answer wrongly, or not at all

Server = Callable[[], contextlib.AbstractAsyncContextManager[Node]]
WRONG = {
    "silent": (ssh_servers.silent, ContactReason.TIMED_OUT, ContactReason.TIMED_OUT),
    "hang-up": (ssh_servers.hang_up, ContactReason.CONNECTION_LOST, ContactReason.CONNECTION_LOST),
    "http": (ssh_servers.http, ContactReason.CONNECTION_LOST, ContactReason.OUTPUT_UNUSABLE),
    "babble": (ssh_servers.babble, ContactReason.OUTPUT_UNUSABLE, ContactReason.OUTPUT_UNUSABLE),
    "garbage": (ssh_servers.garbage, ContactReason.OUTPUT_UNUSABLE, ContactReason.OK),
    "unfinished": (ssh_servers.unfinished, ContactReason.TIMED_OUT, ContactReason.OK),
    "dripping": (ssh_servers.dripping, ContactReason.TIMED_OUT, ContactReason.TIMED_OUT),
}


@pytest.mark.parametrize(("talk", "reason", "knocked"), WRONG.values(), ids=WRONG)
def test_a_wrong_server_is_told_apart(
    target_of: TargetOf, talk: ssh_servers.Talk, reason: ContactReason, knocked: ContactReason
) -> None:
    async def run() -> None:
        async with tcp_node(talk) as node, opened(handshake_timeout_seconds=0.4) as opener:
            assert (await refusal(opener, target_of(node))).reason is reason
            assert (await knock(target_of(node), 0.4))[0] is knocked

    asyncio.run(run())


def test_open_bounds_what_comes_before_the_login(target_of: TargetOf, key_file: Path) -> None:
    async def run() -> None:
        banner = "x" * 3_000_000
        async with (
            ssh_node(authorized_key=key_file.with_suffix(".pub"), banner=banner) as node,
            opened() as opener,
        ):
            error = await refusal(opener, target_of(node))

            assert error.reason is ContactReason.OUTPUT_UNUSABLE
            assert "before the login" in error.message

    asyncio.run(run())


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        pytest.param("127.0.0.9", ContactReason.CONNECTION_REFUSED, id="refused"),
        pytest.param("no-such-host.invalid", ContactReason.NAME_NOT_RESOLVED, id="name"),
        pytest.param("255.255.255.255", ContactReason.MANAGER_FAULT, id="not-ours"),
    ],
)
def test_no_way_to_a_node_has_its_reason(target_of: TargetOf, address: str, reason: ContactReason) -> None:
    async def run() -> None:
        target = target_of(Node(address, 9))
        async with opened() as opener:
            error = await refusal(opener, target)

            assert error.reason is reason
            assert address in error.message
            assert (await knock(target, 2.0))[0] is reason

    asyncio.run(run())


def test_knock_hears_a_real_server(target_of: TargetOf) -> None:
    async def run() -> None:
        async with ssh_node() as node:
            assert await knock(target_of(node), 2.0) == (ContactReason.OK, "")
            assert await knock(LOCAL, 2.0) == (ContactReason.OK, "")
            assert node.logins == 0

    asyncio.run(run())


def test_logins_to_servers_of_different_ages_do_not_meet(target_of: TargetOf, tmp_path: Path) -> None:
    """Both log in with one RSA key, and each server takes another signature."""

    async def run() -> None:
        key = asyncssh.generate_private_key("ssh-rsa")
        key.write_private_key(tmp_path / "rsa")
        key.write_public_key(tmp_path / "rsa.pub")
        authorized = tmp_path / "rsa.pub"
        logins = Logins()
        async with (
            ssh_node(authorized_key=authorized, signature_algs=["rsa-sha2-256"]) as old,
            ssh_node(authorized_key=authorized, signature_algs=["rsa-sha2-512"]) as new,
        ):
            targets = [target_of(node, private_key_file=str(tmp_path / "rsa")) for node in (old, new) * 8]
            made = await asyncio.gather(*(logins.log_in(target, None) for target in targets))
            for login in made:
                login.connection.abort()

            assert (old.logins, new.logins) == (8, 8)
        logins.close()

    asyncio.run(run())
