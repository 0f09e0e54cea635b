# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Turn answers of the Docker Engine API into the container items of a sample.

Pure: imports the standard library only, opens nothing. Runs on nodes with Python 3.8. Any shape of answer is survived.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Dict, Mapping, Optional, Tuple

_UNLIMITED_BYTES = 2**60
_HEALTH_IN_STATUS = re.compile(r"\((healthy|unhealthy|health: starting)\)")
_EXIT_IN_STATUS = re.compile(r"Exited \((\d+)\)")
_MAX_LABELS = 64


@dataclass(frozen=True)
class ContainerUsage:
    """One reading of a container's counters; *own_percent* is what an engine compared by itself."""

    at_seconds: float
    cpu_nanoseconds: Optional[int]
    memory_bytes: Optional[int]
    memory_limit_bytes: Optional[int]
    own_percent: Optional[float] = None


# {"Components": [{"Name": "Engine", "Version": "20.10.24"}], "Version": "20.10.24", "ApiVersion": "1.41"}
# {"Components": [{"Name": "Podman Engine", "Version": "4.3.1"}], "Version": "4.3.1", "ApiVersion": "1.41"}
def parse_version(answer: object) -> Tuple[str, Optional[str], Tuple[int, int]]:
    """Read the runtime's name, version and API version.

    Source: Docker Engine API, GET /version.
    """
    version = _mapping(answer)
    components = version.get("Components")
    names = [str(_mapping(part).get("Name")) for part in components] if isinstance(components, list) else []
    name = "podman" if any(part.startswith("Podman") for part in names) else "docker"
    number = version.get("Version")
    match = re.match(r"(\d{1,4})\.(\d{1,4})", str(version.get("ApiVersion")))
    api_version = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    return name, number if isinstance(number, str) else None, api_version


# {"cpu_stats": {"cpu_usage": {"total_usage": 41000000}}, "memory_stats": {"usage": 4096, "limit": 8192}}
# {"cpu_stats": {"cpu_usage": {"total_usage": 51000000}}, "memory_stats": {}}
def parse_usage(answer: object, at_seconds: float) -> ContainerUsage:
    """Read a container's CPU and memory counters.

    Shapes: memory is null where the kernel's memory controller is off, as on Raspberry Pi OS. File cache that can be
        dropped at once is not counted, as in ``docker stats``. *own_percent* needs ``precpu_stats``, which a one-shot
        answer lacks.
    Source: Docker Engine API, GET /containers/{id}/stats, cgroup v1 and v2.
    """
    stats = _mapping(answer)
    cpu, before = _mapping(stats.get("cpu_stats")), _mapping(stats.get("precpu_stats"))
    memory = _mapping(stats.get("memory_stats"))
    details = _mapping(memory.get("stats"))
    used = _count(memory.get("usage"))
    if used is not None:
        inactive = _count(details.get("total_inactive_file"))
        if inactive is None:
            inactive = _count(details.get("inactive_file"))
        used = max(0, used - (inactive or 0))
    limit = _count(memory.get("limit"))
    total, total_before = _cpu_total(cpu), _cpu_total(before)
    system, system_before = _count(cpu.get("system_cpu_usage")), _count(before.get("system_cpu_usage"))
    own_percent = None
    if total is not None and total_before and system is not None and system_before and system > system_before:
        own_percent = _percent(total - total_before, system - system_before)
    return ContainerUsage(at_seconds, total, used, limit if limit and limit < _UNLIMITED_BYTES else None, own_percent)


def build_item(
    row: Mapping[str, object],
    details: object,
    usage: Optional[ContainerUsage],
    previous: Optional[ContainerUsage],
    cpu_count: int,
) -> Dict[str, object]:
    """Merge a row of the list, its inspection and its counters into one item of a sample.

    Shapes: without an inspection, health and exit code are read from the row's status line, and restarts are null.
    Units: the CPU share is of the whole machine, of *cpu_count* CPUs.
    """
    inspected = _mapping(details)
    state = _mapping(inspected.get("State"))
    status = str(row.get("Status"))
    health = _mapping(state.get("Health")).get("Status")
    if health is None:
        match = _HEALTH_IN_STATUS.search(status)
        health = match.group(1).replace("health: ", "") if match else None
    exit_code = state.get("ExitCode")
    if not isinstance(exit_code, int):
        ended = _EXIT_IN_STATUS.search(status)
        exit_code = int(ended.group(1)) if ended else None
    names = row.get("Names")
    name = names[0] if isinstance(names, list) and names else row.get("Id")
    labels = list(_mapping(row.get("Labels")).items())
    labels.sort(key=lambda label: str(label[0]))
    return {
        "id": str(row.get("Id"))[:12],
        "name": str(name).lstrip("/"),
        "image": str(row.get("Image")),
        "state": str(row.get("State")),
        "health": None if health in (None, "", "none") else str(health),
        "restarts": _count(inspected.get("RestartCount")),
        "started_at": _utc_text(state.get("StartedAt")),
        "exit_code": exit_code,
        "labels": {str(key): str(value) for key, value in labels[:_MAX_LABELS]},
        "cpu_percent": _cpu_percent(usage, previous, cpu_count),
        "memory_bytes": usage.memory_bytes if usage else None,
        "memory_limit_bytes": usage.memory_limit_bytes if usage else None,
    }


def _cpu_percent(
    usage: Optional[ContainerUsage], previous: Optional[ContainerUsage], cpu_count: int
) -> Optional[float]:
    if usage is None:
        return None
    if usage.cpu_nanoseconds is None or previous is None or previous.cpu_nanoseconds is None:
        return usage.own_percent
    elapsed_nanoseconds = (usage.at_seconds - previous.at_seconds) * 1e9 * cpu_count
    return _percent(usage.cpu_nanoseconds - previous.cpu_nanoseconds, elapsed_nanoseconds)


def _percent(part: float, whole: float) -> Optional[float]:
    # A restarted container counts from zero again.
    return round(min(100.0, 100.0 * part / whole), 1) if whole > 0 and part >= 0 else None


def _cpu_total(stats: Mapping[str, object]) -> Optional[int]:
    return _count(_mapping(stats.get("cpu_usage")).get("total_usage"))


# 2026-11-22T17:00:00.123456789Z
# 2026-11-22T18:00:00.5+01:00
def _utc_text(value: object) -> Optional[str]:
    """Read a time of Docker (nanoseconds, UTC) or podman (local offset); the year 1 means never."""
    match = _TIME.match(value) if isinstance(value, str) else None
    if match is None or match.group(1).startswith("0001"):
        return None
    try:
        moment = datetime.strptime(match.group(1), "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
        if match.group(2) != "Z":
            sign = -1 if match.group(2)[0] == "-" else 1
            moment -= sign * timedelta(hours=int(match.group(2)[1:3]), minutes=int(match.group(2)[4:6]))
    except (ValueError, OverflowError):
        return None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)$")


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> Optional[int]:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
