# SPDX-License-Identifier: GPL-3.0-or-later
"""The files that tell other tools about the fleet: known_hosts, an Ansible inventory, a list for the registry.

Touches the state directory only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .image import USER

CREDENTIAL = "fleet"

Row = tuple[str, str, int, str]  # node_id, address, port, public host key ("" where it couldn't be read)


def write_listing(directory: Path, rows: list[Row], options: Iterable[str]) -> None:
    """Write hosts.yml, nodes.yml and known_hosts, each in full or not at all."""
    key = str(directory / "id_ed25519")
    pinned = [f"{_known_host(address, port)} {public}\n" for _, address, port, public in rows if public]
    _write(directory / "known_hosts", "".join(pinned))
    hosts = {node_id: {"ansible_host": address, "ansible_port": port} for node_id, address, port, _ in rows}
    variables = {
        "ansible_user": USER,
        "ansible_ssh_private_key_file": key,
        "ansible_ssh_common_args": " ".join(f"-o {option}" for option in options),
        "ansible_python_interpreter": "/usr/bin/python3",
    }
    _write(directory / "hosts.yml", _yaml({"all": {"vars": variables, "hosts": hosts}}))
    _write(directory / "nodes.yml", _yaml({"nodes": [_declared(*row) for row in rows]}))


def credential_environment(directory: Path) -> dict[str, str]:
    """Give the settings with which the service finds the key that nodes.yml names."""
    credentials = {CREDENTIAL: {"private_key_file": str(directory / "id_ed25519"), "user": USER}}
    return {"NODE_MANAGER_SSH__CREDENTIALS": json.dumps(credentials)}


def _declared(node_id: str, address: str, port: int, public_key: str) -> dict[str, Any]:
    """Shape a node as the registry takes it; the key file itself belongs to the credential."""
    node: dict[str, Any] = {
        "node_id": node_id,
        "address": address,
        "connection": {"user": USER, "port": port, "become": True, "credential": CREDENTIAL},
    }
    if public_key:
        node["host_keys"] = [public_key]
    return node


def _known_host(address: str, port: int) -> str:
    """Write an address the way known_hosts looks it up."""
    return address if port == 22 else f"[{address}]:{port}"


def _yaml(value: object) -> str:
    return str(yaml.safe_dump(value, sort_keys=False))


def _write(path: Path, content: str) -> None:
    """Replace a file that others may be reading."""
    partial = path.with_suffix(".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
