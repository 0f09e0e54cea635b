# SPDX-License-Identifier: GPL-3.0-or-later
"""A private key, and targets that log in with it."""

from __future__ import annotations

import dataclasses
import getpass
from pathlib import Path

import asyncssh
import pytest
from node_manager.ssh_stream import Target
from ssh_calls import TargetOf
from ssh_servers import Node


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "id"
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(path)
    key.write_public_key(path.with_suffix(".pub"))
    return path


@pytest.fixture
def target_of(key_file: Path) -> TargetOf:
    def make(node: Node, **more: object) -> Target:
        target = Target(
            node_id=f"node-{node.port}",
            address=node.address,
            port=node.port,
            user=getpass.getuser(),
            private_key_file=str(key_file),
            host_keys=node.host_keys,
            strict=True,
            become=False,
            local=False,
            jump=None,
        )
        return dataclasses.replace(target, **more)  # type: ignore[arg-type]

    return make
