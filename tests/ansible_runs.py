# SPDX-License-Identifier: GPL-3.0-or-later
"""Real runs of Ansible against a registry of their own, for the tests of plugins, roles and playbooks."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node_manager.declarations import NodeDeclaration
from node_manager.node_registry import Node, NodeRegistry
from node_manager.settings import Settings, load_settings
from node_manager.store import Store, open_store

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
_RECAP = re.compile(r"^(\S+)\s+: (ok=.*)$", re.MULTILINE)
# What the developer's shell may have set must not reach the runs.
_FOREIGN = ("NODE_MANAGER_", "ANSIBLE_")


@dataclass(frozen=True)
class Controller:
    """A machine with the checkout, the collection and a registry."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """Read the settings as the runs do."""
        return load_settings(self.environment)

    @contextmanager
    def store(self) -> Iterator[Store]:
        """Open the registry's store."""
        store = open_store(self.settings.storage_url)
        try:
            yield store
        finally:
            store.close()

    def register(self, node_id: str, **declared: Any) -> Node:
        """Declare a node; the manager's own machine where nothing else is said."""
        declaration = {"address": "127.0.0.1", "connection": {"kind": "local"}, **declared, "node_id": node_id}
        with self.store() as store:
            registry = NodeRegistry(store, self.settings)
            return registry.register(NodeDeclaration.model_validate(declaration), allow_local=True)[0]

    def node(self, node_id: str) -> Node:
        """Read a node."""
        with self.store() as store:
            return NodeRegistry(store, self.settings).get(node_id)

    def run(self, program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the checkout."""
        return subprocess.run(
            [str(BIN / program), *arguments],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )

    def playbook(self, name: str, *arguments: str, **environment: str) -> PlaybookRun:
        """Run one of the playbooks."""
        done = self.run("ansible-playbook", f"playbooks/{name}.yml", *arguments, **environment)
        return PlaybookRun(done.returncode, done.stdout, done.stderr)

    def inventory(self, *arguments: str, **environment: str) -> dict[str, Any]:
        """List the inventory as Ansible has it."""
        done = self.run("ansible-inventory", "--list", *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))


@dataclass(frozen=True)
class PlaybookRun:
    """How a run ended."""

    return_code: int
    output: str
    errors: str

    @property
    def recap(self) -> Mapping[str, dict[str, int]]:
        """Read the recap: counts by host."""
        return {
            host: {key: int(count) for key, count in (pair.split("=") for pair in counts.split())}
            for host, counts in _RECAP.findall(self.output)
        }

    def count(self, key: str) -> dict[str, int]:
        """Give one count of the recap by host."""
        return {host: counts[key] for host, counts in self.recap.items()}


def make_controller(home: Path, **environment: str) -> Controller:
    """Set up a controller whose state is in *home*."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    # A path below 100 bytes, and connections that no other test opened.
    sockets = tempfile.mkdtemp(prefix="nm-cp-")
    atexit.register(shutil.rmtree, sockets, ignore_errors=True)
    return Controller(
        home,
        {
            **inherited,
            "PATH": f"{BIN}{os.pathsep}{inherited.get('PATH', os.defpath)}",
            "NODE_MANAGER_HOME": str(home),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": sockets,
            **environment,
        },
    )
