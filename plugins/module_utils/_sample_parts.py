# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Build the parts of a sample from two readings of the counters.

Pure: imports the standard library only. Runs on nodes with Python 3.8. The shapes are those of docs/observations.md.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ._engine_parse import ContainerUsage
from ._probe_clock import ClockReading
from ._probe_parse import (
    CpuTimes,
    FilesystemSpace,
    InterfaceCounters,
    Memory,
    Mount,
    ServiceUnit,
    is_reported_interface,
)

_MAX_INTERFACES = 64
_MAX_SERVICES = 32

Pressure = Optional[Dict[str, Optional[float]]]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class CpuReading(NamedTuple):
    times: CpuTimes
    loads: Optional[Tuple[float, float, float]]
    pressure: Pressure


class MemoryReading(NamedTuple):
    memory: Memory
    pressure: Pressure
    oom_kills: Optional[int]


class TimeReading(NamedTuple):
    """How long the node is up, and what the kernel says of its clock, if it says anything."""

    uptime_seconds: float
    clock: Optional[ClockReading]


class NetworkReading(NamedTuple):
    """The counters of all reported interfaces, with the time they were read at; *links* holds (up, speed)."""

    at_seconds: float
    counters: Mapping[str, InterfaceCounters]
    links: Mapping[str, Tuple[Optional[bool], Optional[int]]] = _NOTHING


class ContainersReading(NamedTuple):
    part: Dict[str, object]
    usage: Mapping[str, ContainerUsage]
    errors: List[Dict[str, str]]


class Counters(NamedTuple):
    """What is compared between two samples; a part that could not be read is empty."""

    at_seconds: float
    cpu: Optional[CpuTimes] = None
    network: Mapping[str, InterfaceCounters] = _NOTHING
    containers: Mapping[str, ContainerUsage] = _NOTHING


def cpu_part(reading: CpuReading, before: Optional[CpuTimes]) -> Dict[str, object]:
    """Compare two readings of the CPU times.

    Shapes: the shares are null without an earlier reading, and when no time has passed. Waiting for a disk is idle
        time: another task could have run. The kernel's counters of iowait and idle may step back, which counts as no
        time.
    Units: percent of all CPUs together. *user* has nice in it, *system* both kinds of interrupts.
    Source: proc_stat(5); Linux Documentation/filesystems/proc.rst on why iowait is not reliable.
    """
    now = reading.times
    shares: Dict[str, Optional[float]] = dict.fromkeys(
        ("use_percent", "user_percent", "system_percent", "iowait_percent", "steal_percent")
    )
    if before is not None:
        user = max(0, now.user - before.user) + max(0, now.nice - before.nice)
        system = max(0, now.system - before.system)
        system += max(0, now.irq - before.irq) + max(0, now.softirq - before.softirq)
        iowait, steal = max(0, now.iowait - before.iowait), max(0, now.steal - before.steal)
        busy = user + system + steal
        total = busy + iowait + max(0, now.idle - before.idle)
        if total > 0:
            shares = {
                "use_percent": round(100.0 * busy / total, 1),
                "user_percent": round(100.0 * user / total, 1),
                "system_percent": round(100.0 * system / total, 1),
                "iowait_percent": round(100.0 * iowait / total, 1),
                "steal_percent": round(100.0 * steal / total, 1),
            }
    loads = reading.loads or (None, None, None)
    return {
        "count": now.cpu_count,
        **shares,
        "load_1m": loads[0],
        "load_5m": loads[1],
        "load_15m": loads[2],
        "pressure": reading.pressure,
    }


def memory_part(reading: MemoryReading) -> Dict[str, object]:
    """Put memory and swap into percent; a node without swap uses none of it."""
    memory = reading.memory
    swap_used = memory.swap_total_bytes - memory.swap_free_bytes
    return {
        "total_bytes": memory.total_bytes,
        "available_bytes": memory.available_bytes,
        "use_percent": round(100.0 * (memory.total_bytes - memory.available_bytes) / memory.total_bytes, 1),
        "swap_total_bytes": memory.swap_total_bytes,
        "swap_free_bytes": memory.swap_free_bytes,
        "swap_use_percent": round(100.0 * swap_used / memory.swap_total_bytes, 1) if memory.swap_total_bytes else 0.0,
        "oom_kills": reading.oom_kills,
        "pressure": reading.pressure,
    }


def clock_part(reading: Optional[ClockReading]) -> Dict[str, object]:
    """Say whether the clock is synchronised; null where the kernel may not be asked."""
    return {
        "synchronised": reading.synchronised if reading else None,
        "estimated_error_seconds": reading.estimated_error_seconds if reading else None,
    }


def services_part(units: Sequence[ServiceUnit]) -> Dict[str, object]:
    """Name the services that have failed and those that systemd had to restart, at most 32 of each, the worst first."""
    restarting = sorted((unit for unit in units if unit.restarts > 0), key=lambda unit: (-unit.restarts, unit.name))
    return {
        "failed": sorted(unit.name for unit in units if unit.failed)[:_MAX_SERVICES],
        "restarts": {unit.name: unit.restarts for unit in restarting[:_MAX_SERVICES]},
    }


def filesystem_part(mount: Mount, space: FilesystemSpace) -> Dict[str, object]:
    """Say how full a filesystem is, the way df(1) does: what is kept for root counts neither as used nor as free.

    Shapes: filesystems that make inodes as they need them (btrfs, vfat) have none to count: null.
    """
    used = space.total_bytes - space.free_bytes
    usable = used + space.available_bytes
    inodes = space.inodes_total > 0
    inodes_used = space.inodes_total - space.inodes_free
    return {
        "mount": mount.mount_point,
        "device": mount.device,
        "type": mount.filesystem_type,
        # Mounts are not read with every sample.
        "read_only": mount.read_only or space.read_only,
        "total_bytes": space.total_bytes,
        "available_bytes": space.available_bytes,
        "use_percent": round(100.0 * used / usable, 1) if usable > 0 else 0.0,
        "inodes_total": space.inodes_total if inodes else None,
        "inodes_free": space.inodes_free if inodes else None,
        "inodes_use_percent": round(100.0 * inodes_used / space.inodes_total, 1) if inodes else None,
    }


def is_root_read_only(told: object, filesystems: Sequence[object]) -> object:
    """Tell it by the mounts, or by what was seen of the root since they were read."""
    seen = [part["read_only"] for part in filesystems if isinstance(part, dict) and part["mount"] == "/"]
    return told if told is None else any((told, *seen))


def network_part(reading: NetworkReading, before: Optional[Counters]) -> List[Dict[str, object]]:
    """List the interfaces with their rates; a rate is null without an earlier reading and after a counter was reset."""
    elapsed_seconds = reading.at_seconds - before.at_seconds if before is not None else 0.0
    earlier = before.network if before is not None else {}
    part: List[Dict[str, object]] = []
    for name, now in reading.counters.items():
        up, speed_mbps = reading.links.get(name, (None, None))
        then = earlier.get(name)
        received = transmitted = None
        if then is not None and elapsed_seconds > 0:
            received = _rate(now.received_bytes - then.received_bytes, elapsed_seconds)
            transmitted = _rate(now.transmitted_bytes - then.transmitted_bytes, elapsed_seconds)
        part.append(
            {
                "interface": name,
                "up": up,
                "speed_mbps": speed_mbps,
                "received_bytes": now.received_bytes,
                "transmitted_bytes": now.transmitted_bytes,
                "received_errors": now.received_errors,
                "transmitted_errors": now.transmitted_errors,
                "received_bytes_per_second": received,
                "transmitted_bytes_per_second": transmitted,
            }
        )
    return part


def reported_interfaces(counters: Mapping[str, InterfaceCounters]) -> Dict[str, InterfaceCounters]:
    """Leave out the interfaces that belong to single containers, and the loopback; at most 64 are left."""
    names = [name for name in counters if is_reported_interface(name)][:_MAX_INTERFACES]
    return {name: counters[name] for name in names}


def _rate(change: int, elapsed_seconds: float) -> Optional[float]:
    return round(change / elapsed_seconds, 1) if change >= 0 else None
