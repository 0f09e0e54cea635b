# SPDX-License-Identifier: GPL-3.0-or-later
"""What tests hand to the service: a clock to move, settings, declarations, and things seen on a node."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from node_manager.declarations import NodeDeclaration
from node_manager.domain import ContactReason, ObservationKind
from node_manager.node_types import NodeTypes
from node_manager.observations import Observation
from node_manager.resource_allocator import AllocationRequest
from node_manager.resources import ask_of
from node_manager.settings import Configuration, Settings

START = datetime(2026, 11, 22, 18, 0, tzinfo=UTC)
MIB = 1024 * 1024


class FakeClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        """Give the time."""
        return self.now

    def advance(self, seconds: float) -> datetime:
        """Move on and give the new time."""
        self.now += timedelta(seconds=seconds)
        return self.now


def seconds(count: float) -> timedelta:
    """Spell a time span."""
    return timedelta(seconds=count)


def make_settings(
    configuration: dict[str, Any] | None = None, home: Path = Path("/nonexistent"), **more_types: dict[str, Any]
) -> Settings:
    """Give settings with two node types: server by its memory, and gateway, which is only declared; and *more_types*."""
    node_types = NodeTypes.model_validate(
        {
            "node_types": {
                "server": {"description": "Server", "recognised_by": {"memory_mib_min": 7500}},
                "gateway": {"description": "Gateway"},
                **{name: {"description": name, **definition} for name, definition in more_types.items()},
            }
        }
    )
    return Settings(
        home, home / "config.json", Configuration.model_validate(configuration or {}), node_types.node_types
    )


def make_host_key(seed: int = 1) -> str:
    """Give a well-formed ed25519 public key that nobody has the other half of."""
    kind = b"ssh-ed25519"
    blob = len(kind).to_bytes(4, "big") + kind + (32).to_bytes(4, "big") + bytes([seed]) * 32
    return f"ssh-ed25519 {base64.b64encode(blob).decode()}"


def make_declaration(node_id: str = "gw-7", **changes: Any) -> NodeDeclaration:
    """Declare a node."""
    return NodeDeclaration.model_validate({"node_id": node_id, "address": "192.0.2.7", **changes})


def make_request(
    allocation_id: str = "a1", resources: dict[str, Any] | None = None, owner: str = "shop", **more: Any
) -> AllocationRequest:
    """Ask for 10 MiB of memory, or for *resources*."""
    return AllocationRequest(allocation_id, owner, ask_of(resources or {"memory_mib": 10}), **more)


def make_facts(**changes: Any) -> dict[str, Any]:
    """Give the facts of a node with 4 CPUs and 4 GiB."""
    facts: dict[str, Any] = {
        "schema": 1,
        "hostname": "gw-7",
        "machine_id": "8e5c",
        "boot_id": "0d1c",
        "os": {"id": "debian", "version": "12", "name": "Debian GNU/Linux 12 (bookworm)"},
        "kernel": "6.1.0-18-arm64",
        "architecture": "aarch64",
        "board": {"vendor": "Raspberry Pi", "model": "Raspberry Pi 4 Model B Rev 1.4"},
        "virtualization": "none",
        "python_version": "3.11.2",
        "service_manager": "systemd",
        "cpu": {"count": 4, "model": "Cortex-A72"},
        "memory_total_bytes": 4096 * MIB,
        "disk_total_bytes": 30000 * MIB,
        "network_mbps": 1000,
        "devices": {},
        "container_runtime": None,
        "features": ["systemd"],
        "addresses": ["192.0.2.7"],
        "ssh_host_keys": [],
        "errors": [],
    }
    return {**facts, **changes}


def make_sample(cpu_percent: float | None = 10.0, **changes: Any) -> dict[str, Any]:
    """Give a sample with CPU use *cpu_percent*, memory at 30 % and the root filesystem at 40 %."""
    cpu = {"count": 4, "use_percent": cpu_percent, "load_1m": 0.4, "load_5m": 0.4, "load_15m": 0.3, "pressure": None}
    cpu.update(dict.fromkeys(("user_percent", "system_percent", "iowait_percent", "steal_percent"), 0.0))
    memory = {"total_bytes": 4096 * MIB, "available_bytes": 2867 * MIB, "use_percent": 30.0, "pressure": None}
    memory.update({"swap_total_bytes": 0, "swap_free_bytes": 0, "swap_use_percent": None})
    sample: dict[str, Any] = {
        "schema": 1,
        "boot_id": "0d1c",
        "uptime_seconds": 93784.2,
        "clock_unix_seconds": 1795363200.1,
        "interval_seconds": 1.0,
        "cpu": cpu,
        "memory": memory,
        "io": None,
        "filesystems": [make_filesystem("/", 40.0)],
        "network": [make_interface("eth0", 1200.0, 800.0)],
        "containers": None,
        "thermal": None,
        "root_read_only": False,
        "errors": [],
    }
    return {**sample, **changes}


def make_filesystem(mount: str, use_percent: float, *, read_only: bool = False) -> dict[str, Any]:
    """Give one filesystem of a sample."""
    return {
        "mount": mount,
        "device": "/dev/mmcblk0p2",
        "type": "ext4",
        "read_only": read_only,
        "total_bytes": 30000 * MIB,
        "available_bytes": 18000 * MIB,
        "use_percent": use_percent,
        "inodes_total": 1933312,
        "inodes_free": 1800000,
        "inodes_use_percent": 6.9,
    }


def make_interface(name: str, received: float | None, transmitted: float | None) -> dict[str, Any]:
    """Give one network interface of a sample."""
    return {
        "interface": name,
        "up": True,
        "speed_mbps": 1000,
        "received_bytes": 1000000,
        "transmitted_bytes": 900000,
        "received_errors": 0,
        "transmitted_errors": 0,
        "received_bytes_per_second": received,
        "transmitted_bytes_per_second": transmitted,
    }


def make_container(name: str, *, state: str = "running", labels: dict[str, str] | None = None) -> dict[str, Any]:
    """Give one container of a sample."""
    return {
        "id": f"id-{name}",
        "name": name,
        "image": "app:1.2",
        "state": state,
        "health": None,
        "restarts": 0,
        "started_at": "2026-11-22T17:00:00Z",
        "exit_code": 0,
        "labels": labels or {},
        "cpu_percent": 1.5,
        "memory_bytes": 52428800,
        "memory_limit_bytes": None,
    }


def make_containers(*items: dict[str, Any], runtime: str | None = "docker") -> dict[str, Any]:
    """Give the containers of a sample."""
    return {"runtime": runtime, "version": "24.0.7", "message": None, "items": list(items)}


def make_report(*checks: tuple[str, str]) -> dict[str, Any]:
    """Give a report of one check per (severity, state); none given: one that passed."""
    return {
        "schema": 1,
        "duration_seconds": 0.2,
        "checks": [
            {
                "name": f"check-{number}",
                "kind": "tcp",
                "severity": severity,
                "state": state,
                "message": f"it {state}",
                "latency_seconds": 0.001,
                "value": None,
                "unit": None,
            }
            for number, (severity, state) in enumerate(checks or [("critical", "passed")])
        ],
    }


def make_contact(reason: ContactReason = ContactReason.TIMED_OUT) -> dict[str, Any]:
    """Give an attempt that ended for *reason*."""
    return {"reached": reason is ContactReason.OK, "reason": reason.value, "message": f"it was {reason.value}"}


def observe(kind: str, data: Any, at: datetime = START, node_id: str = "gw-7", source: str = "ansible") -> Observation:
    """Give one observation."""
    return Observation(node_id, at, source, ObservationKind(kind), data)
