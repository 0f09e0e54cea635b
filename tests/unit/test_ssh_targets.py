# SPDX-License-Identifier: GPL-3.0-or-later
"""Errors of all sorts, in the words of ContactReason."""

from __future__ import annotations

import dataclasses
import errno
import socket

import asyncssh
import pytest
from node_manager.domain import ContactReason
from node_manager.ssh_targets import Target, as_user_of, end_of, end_of_probe, error_behind, error_of, one_line

TARGET = Target("gw-1", "fe80::1", 22, "root", None, (), True, False, False, None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        *(
            (OSError(number, "x"), ContactReason.MANAGER_FAULT)
            for number in (
                errno.EMFILE,
                errno.ENFILE,
                errno.ENOMEM,
                errno.ENOBUFS,
                errno.EADDRNOTAVAIL,
                errno.ENETUNREACH,
                errno.ENETDOWN,
            )
        ),
        (OSError(errno.ECONNREFUSED, "x"), ContactReason.CONNECTION_REFUSED),
        (OSError(errno.ETIMEDOUT, "x"), ContactReason.TIMED_OUT),
        (OSError(errno.EHOSTUNREACH, "x"), ContactReason.NO_ROUTE),
        (OSError(errno.ECONNRESET, "x"), ContactReason.CONNECTION_LOST),
        (TimeoutError(), ContactReason.TIMED_OUT),
        (socket.gaierror(socket.EAI_NONAME, "x"), ContactReason.NAME_NOT_RESOLVED),
        (MemoryError(), ContactReason.MANAGER_FAULT),
        (asyncssh.PermissionDenied("x"), ContactReason.AUTHENTICATION_FAILED),
        (asyncssh.ProtocolError("Too many authentication failures"), ContactReason.AUTHENTICATION_FAILED),
        (asyncssh.KeyExchangeFailed("x"), ContactReason.AUTHENTICATION_FAILED),
        (asyncssh.ConnectionLost("x"), ContactReason.CONNECTION_LOST),
        (asyncssh.ProtocolError("x"), ContactReason.OUTPUT_UNUSABLE),
        (UnicodeDecodeError("ascii", b"x", 0, 1, "y"), ContactReason.OUTPUT_UNUSABLE),
    ],
    ids=repr,
)
def test_error_of_gives_the_reason(error: Exception, reason: ContactReason) -> None:
    found = error_of(error, TARGET)

    assert found.reason is reason
    assert found.message.startswith("[fe80::1]:22: ")


@pytest.mark.parametrize("error", [OSError(errno.ETIMEDOUT, "x"), OSError(errno.EHOSTUNREACH, "x")])
def test_end_of_an_open_stream_is_a_lost_connection(error: Exception) -> None:
    assert end_of(error, TARGET).reason is ContactReason.CONNECTION_LOST


@pytest.mark.parametrize(
    ("exit_code", "words", "reason"),
    [
        (127, "", ContactReason.PYTHON_MISSING),
        (1, "sh: 1: python3: not found", ContactReason.PYTHON_MISSING),
        (3, "needs Python 3.8", ContactReason.PYTHON_MISSING),
        (1, "sudo: a password is required", ContactReason.AUTHENTICATION_FAILED),
        (127, "sudo: not found", ContactReason.AUTHENTICATION_FAILED),
        (1, "KeyError: 'x'", ContactReason.MODULE_FAILED),
        (0, "", ContactReason.MODULE_FAILED),
        (None, "", ContactReason.MODULE_FAILED),
    ],
)
def test_end_of_probe_reads_code_and_last_words(exit_code: int | None, words: str, reason: ContactReason) -> None:
    assert end_of_probe(TARGET, exit_code, "", words).reason is reason


def test_error_behind_a_jump_host_never_blames_the_nodes_key() -> None:
    changed = error_of(asyncssh.PermissionDenied("x"), TARGET)
    lost = error_of(asyncssh.ConnectionLost("x"), TARGET)

    assert error_behind(changed, TARGET).reason is ContactReason.MANAGER_FAULT
    assert error_behind(lost, TARGET).reason is ContactReason.CONNECTION_LOST


def test_one_line_bounds_a_nodes_words() -> None:
    assert one_line("a\r\nb\x1b[0m\u2028c") == "a b [0m c"
    assert len(one_line("x" * 10_000)) == 500


@pytest.mark.parametrize(
    ("user", "become", "command"), [("root", True, "x y"), ("pi", False, "x y"), ("pi", True, "sudo -n x y")]
)
def test_as_user_of_asks_for_root_only_where_it_must(user: str, become: bool, command: str) -> None:
    assert as_user_of(dataclasses.replace(TARGET, user=user, become=become), "x y") == command
