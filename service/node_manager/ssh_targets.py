# SPDX-License-Identifier: GPL-3.0-or-later
"""What a watched node's stream is: how the node is reached, what the stream can do, and why one failed.

Opens nothing; turns errors of the system, of asyncssh and of the far side's shell into the words of ContactReason.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import asyncssh

from node_manager.domain import ContactReason
from node_manager.peers import Answer

MAX_MESSAGE_CHARACTERS = 500
# A bootstrap that finds no usable Python ends with this code.
EXIT_PYTHON_TOO_OLD = 3
_EXIT_NOT_FOUND = 127

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_BECOME_REFUSED = re.compile(r"^sudo: |not in the sudoers file|not allowed to execute")
# What a jump host says when it can't reach the node; sshd sends its strerror, dropbear nothing.
_SAID_BY_JUMP_HOST = (
    (re.compile(r"refused", re.IGNORECASE), ContactReason.CONNECTION_REFUSED),
    (re.compile(r"no route|host is (?:down|unreachable)", re.IGNORECASE), ContactReason.NO_ROUTE),
    (re.compile(r"timed? ?out", re.IGNORECASE), ContactReason.TIMED_OUT),
    (re.compile(r"unknown host|not known|resol", re.IGNORECASE), ContactReason.NAME_NOT_RESOLVED),
)
_OWN_SIDE = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOBUFS,
    errno.EADDRNOTAVAIL,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EACCES,
    errno.EPERM,
    errno.EAFNOSUPPORT,
    errno.EINVAL,
}
_REASON_OF_ERRNO = {
    errno.ECONNREFUSED: ContactReason.CONNECTION_REFUSED,
    errno.ETIMEDOUT: ContactReason.TIMED_OUT,
    errno.EHOSTUNREACH: ContactReason.NO_ROUTE,
    errno.EHOSTDOWN: ContactReason.NO_ROUTE,
}
_ADVICE_OF_ERRNO = {
    errno.EMFILE: "raise the limit of open files of the Node Manager (LimitNOFILE)",
    errno.ENFILE: "raise fs.file-max of the Node Manager's machine",
    errno.EADDRNOTAVAIL: "widen net.ipv4.ip_local_port_range of the Node Manager's machine",
    errno.ENETUNREACH: "look at the network of the Node Manager's machine",
    errno.ENETDOWN: "look at the network of the Node Manager's machine",
}
_ABOUT_THE_WAY = {
    ContactReason.CONNECTION_REFUSED,
    ContactReason.TIMED_OUT,
    ContactReason.NO_ROUTE,
    ContactReason.NAME_NOT_RESOLVED,
    ContactReason.CONNECTION_LOST,
}


@dataclass(frozen=True)
class Target:
    """How one node is reached.

    Shapes: *address* is empty for the manager's own machine; *private_key_file* None means the user's default keys and agent;
    *host_keys* are "ssh-ed25519 AAAA...", none while no key is pinned: then *strict* refuses and otherwise the first is taken.
    """

    node_id: str
    address: str
    port: int
    user: str
    private_key_file: str | None
    host_keys: tuple[str, ...]
    strict: bool
    become: bool
    local: bool
    jump: Target | None

    def __str__(self) -> str:
        if self.local:
            return "this machine"
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class StreamEnd(NamedTuple):
    """Why a stream ended; the reason is OK when we closed it."""

    reason: ContactReason
    message: str


class StreamError(Exception):
    """A stream could not be opened."""

    def __init__(self, reason: ContactReason, message: str) -> None:
        self.reason = reason
        self.message = one_line(message)
        super().__init__(f"{reason.value}: {self.message}")


class UnsuitedError(StreamError):
    """What is configured is no way for a stream; Ansible may know another, such as an agent that holds the key."""

    def __init__(self, message: str) -> None:
        super().__init__(ContactReason.MANAGER_FAULT, message)


class NodeStream(ABC):
    """One open stream.

    Shapes: *host_key* is the public key that the node showed, "" for the manager's own machine.
    """

    host_key: str = ""

    @abstractmethod
    def send(self, command: Mapping[str, object]) -> None:
        """Write one JSON line to the probe; never waits, and ends the stream of a probe that doesn't read."""

    @abstractmethod
    async def ask_peer(self, addresses: Sequence[str], port: int, timeout_seconds: float) -> Answer:
        """Ask this node whether one of *addresses* answers by TCP; never raises for what the node does."""

    @abstractmethod
    async def close(self) -> None:
        """End the stream within two seconds; does nothing to an ended one."""


def one_line(text: str) -> str:
    """Make words of a node fit to show: one line, bounded, no control characters."""
    line = _CONTROL.sub(" ", text[: 4 * MAX_MESSAGE_CHARACTERS]).strip()
    return line if len(line) <= MAX_MESSAGE_CHARACTERS else f"{line[: MAX_MESSAGE_CHARACTERS - 1]}…"


def as_user_of(target: Target, command: str) -> str:
    """Give *command*, a single one, as it must be run on the node: with sudo where it must be root and the login isn't.

    No more of a shell's language than words: the login's shell may be csh or fish.
    """
    return f"sudo -n {command}" if target.become and target.user != "root" else command


def error_of(error: BaseException, target: Target) -> StreamError:
    """Say why no stream could be opened to *target*."""
    if isinstance(error, StreamError):
        return error
    if isinstance(error, asyncssh.ChannelOpenError):
        return _error_of_channel(error, target)
    reason, words = _reason_of(error)
    return StreamError(reason, f"{target}: {words}")


def end_of(error: BaseException, target: Target) -> StreamEnd:
    """Say why an open stream to *target* broke."""
    reason, words = _reason_of(error)
    if reason in _ABOUT_THE_WAY:
        reason = ContactReason.CONNECTION_LOST
    return StreamEnd(reason, one_line(f"{target}: {words}"))


def end_of_probe(target: Target, exit_code: int | None, signal: str, error_line: str) -> StreamEnd:
    """Say why the probe ended by itself; *error_line* is the last that it wrote on standard error."""
    words = f"killed by signal {signal}" if signal else f"exit code {exit_code}"
    message = one_line(f"{target}: the probe ended by itself ({words}): {error_line or 'no error output'}")
    if _BECOME_REFUSED.search(error_line):
        return StreamEnd(ContactReason.AUTHENTICATION_FAILED, message)
    missing = exit_code not in {0, None} and error_line.endswith("not found")
    if missing or exit_code in {_EXIT_NOT_FOUND, EXIT_PYTHON_TOO_OLD}:
        return StreamEnd(ContactReason.PYTHON_MISSING, message)
    return StreamEnd(ContactReason.MODULE_FAILED, message)


def error_behind(error: StreamError, jump: Target) -> StreamError:
    """Say what a jump host's failure means for the nodes behind it.

    A login that fails there teaches nothing of them: a jump host's new key must not quarantine its whole site.
    """
    words = f"jump host {jump.node_id}: {error.message}"
    return StreamError(error.reason, words) if error.reason in _ABOUT_THE_WAY else UnsuitedError(words)


def own_shortage(words: str) -> StreamError:
    """Say that the manager itself lacks something."""
    return StreamError(ContactReason.MANAGER_FAULT, words)


def _reason_of(error: BaseException) -> tuple[ContactReason, str]:
    words = str(error) or type(error).__name__
    if isinstance(error, socket.gaierror):
        if error.errno in {socket.EAI_SYSTEM, socket.EAI_MEMORY}:
            return ContactReason.MANAGER_FAULT, words
        return ContactReason.NAME_NOT_RESOLVED, f"the name can't be resolved: {error.strerror}"
    if isinstance(error, MemoryError):
        return ContactReason.MANAGER_FAULT, "out of memory"
    if isinstance(error, TimeoutError) and error.errno is None:
        return ContactReason.TIMED_OUT, "no answer in time"
    if isinstance(error, OSError):
        return _reason_of_system_error(error)
    if isinstance(error, asyncssh.PermissionDenied):
        return ContactReason.AUTHENTICATION_FAILED, f"{words}; look at the user, the key file and authorized_keys"
    if isinstance(error, asyncssh.KeyExchangeFailed):
        return ContactReason.AUTHENTICATION_FAILED, f"no secure algorithm in common: {words}"
    if isinstance(error, (asyncssh.ConnectionLost, asyncssh.ServiceNotAvailable)):
        return ContactReason.CONNECTION_LOST, words
    if isinstance(error, asyncssh.DisconnectError) and "authentication failures" in words.lower():
        # sshd ends a login with too many keys tried as a protocol error.
        return ContactReason.AUTHENTICATION_FAILED, words
    # Whatever else asyncssh raises came out of reading what the node sent.
    return ContactReason.OUTPUT_UNUSABLE, f"doesn't speak SSH 2 as it should: {words}"


def _reason_of_system_error(error: OSError) -> tuple[ContactReason, str]:
    number = error.errno or 0
    words = os.strerror(number) if number else str(error)
    if number in _OWN_SIDE:
        advice = _ADVICE_OF_ERRNO.get(number)
        return ContactReason.MANAGER_FAULT, f"{words}; {advice}" if advice else words
    return _REASON_OF_ERRNO.get(number, ContactReason.CONNECTION_LOST), words


def _error_of_channel(error: asyncssh.ChannelOpenError, target: Target) -> StreamError:
    if error.reason == "SSH connection closed":
        return StreamError(ContactReason.CONNECTION_LOST, f"{target}: the connection was lost while logging in")
    return StreamError(ContactReason.MODULE_FAILED, f"{target}: the node refuses to run a command: {error.reason}")


def error_of_way(error: asyncssh.ChannelOpenError, target: Target) -> StreamError:
    """Say why a jump host made no way to *target*."""
    words = f"{target}: jump host {target.jump.node_id if target.jump else ''} says: {error.reason}"
    if error.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED:
        return StreamError(ContactReason.MANAGER_FAULT, f"{words}; allow TCP forwarding there")
    for pattern, reason in _SAID_BY_JUMP_HOST:
        if pattern.search(error.reason[:MAX_MESSAGE_CHARACTERS]):
            return StreamError(reason, words)
    return StreamError(ContactReason.CONNECTION_LOST, words)
