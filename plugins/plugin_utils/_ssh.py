# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How OpenSSH is told which key a node must show and through which nodes it is reached.

All that comes from the registry is checked here once more before it becomes part of a command line: the answer may have
come over the network or from a cache.
"""

from __future__ import annotations

import hashlib
import re
import shlex

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,300}[a-z0-9])?")
_ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:%-]{0,252}")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")

KNOWN_HOSTS = "known_hosts"
FIRST_USE_KNOWN_HOSTS = "known_hosts.first_use"
JUMP_HOSTS = "jump_hosts"


class UnsafeValueError(ValueError):
    """A value can't become part of an ssh command line."""


class SshArguments:
    """Make the arguments of ansible_ssh_common_args for the nodes of one inventory."""

    def __init__(self, directory):
        self._pinned = f"{_trust(directory / KNOWN_HOSTS)} -o StrictHostKeyChecking=yes"
        self._first_use = f"{_trust(directory / FIRST_USE_KNOWN_HOSTS)} -o StrictHostKeyChecking=accept-new"
        self._jump_hosts = directory / JUMP_HOSTS

    def variables(self, ssh):
        """Give the variables with which Ansible's ssh connection reaches a node of the inventory.

        Errors: UnsafeValueError.
        """
        _check(ssh)
        trust = self._pinned if ssh["strict"] else self._first_use
        arguments = f"-o HostKeyAlias={ssh['host_key_alias']} {trust}"
        hop = ssh["jump_host"]
        if hop is None:
            return {"ansible_ssh_common_args": arguments}
        config = _for_ssh(shlex.quote(str(self._jump_hosts / hop)))
        through = f"ssh -F {config} -W '[%h]:%p' {hop}"
        # Sites reuse private addresses: without a path of its own, a node behind one jump host would share the open
        # connection of another node with the same address behind another.
        way = hashlib.sha256(f"{ssh['host_key_alias']} {hop}".encode()).hexdigest()[:16]
        return {
            "ansible_ssh_common_args": f"{arguments} -o {shlex.quote(f'ProxyCommand={through}')}",
            "ansible_control_path": f"%(directory)s/{way}",
        }


def jump_host_configs(directory, jump_hosts):
    """Write, for each node that others are reached through, the ssh_config of the way to it, by file name.

    Jump hosts, too, must show the right key. One file each, so that inventories of different nodes agree on them.
    Errors: UnsafeValueError.
    """
    blocks = {node_id: _block(directory, node_id, ssh) for node_id, ssh in jump_hosts.items() if ssh is not None}
    configs = {}
    for node_id in blocks:
        way, hop = [], node_id
        while hop in blocks and hop not in way:
            way.append(hop)
            hop = jump_hosts[hop]["jump_host"]
        configs[node_id] = "".join([*(blocks[hop] for hop in way), _COMMON])
    return configs


_COMMON = """\
Host *
  GlobalKnownHostsFile none
  BatchMode yes
  ConnectTimeout 5
  ServerAliveInterval 2
  ServerAliveCountMax 2
"""


def _block(directory, node_id, ssh):
    _expect(_NAME, node_id, "node_id")
    _check(ssh)
    known = directory / (KNOWN_HOSTS if ssh["strict"] else FIRST_USE_KNOWN_HOSTS)
    lines = [
        f"HostName {ssh['address']}",
        f"User {ssh['user']}",
        f"HostKeyAlias {ssh['host_key_alias']}",
        f"UserKnownHostsFile {_quoted(known)}",
        f"StrictHostKeyChecking {'yes' if ssh['strict'] else 'accept-new'}",
    ]
    if ssh["port"] is not None:
        lines.append(f"Port {int(ssh['port'])}")
    if ssh["private_key_file"] is not None:
        lines.append(f"IdentityFile {_quoted(ssh['private_key_file'])}")
    if ssh["jump_host"] is not None:
        lines.append(f"ProxyJump {ssh['jump_host']}")
    return f"Host {node_id}\n" + "".join(f"  {line}\n" for line in lines)


def _check(ssh):
    _expect(_NAME, ssh["host_key_alias"], "host_key_alias")
    _expect(_ADDRESS, ssh["address"], "address")
    _expect(_USER, ssh["user"], "user")
    if ssh["jump_host"] is not None:
        _expect(_NAME, ssh["jump_host"], "jump_host")


def _expect(pattern, value, name):
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise UnsafeValueError(f"{name}: {str(value)[:80]!r} can't be used for ssh")


def _trust(known_hosts):
    return f"-o {shlex.quote('UserKnownHostsFile=' + _quoted(known_hosts))} -o GlobalKnownHostsFile=none"


def _quoted(path):
    """Write a path as a value of ssh_config: it may have spaces, and % starts a token there."""
    text = str(path)
    if '"' in text or "\n" in text or "\\" in text:
        raise UnsafeValueError(f"{text[:80]!r}: ssh takes no path with quotes, backslashes or line breaks")
    return f'"{_for_ssh(text)}"'


def _for_ssh(text):
    return text.replace("%", "%%")
