# SPDX-License-Identifier: GPL-3.0-or-later
"""What of a sample the rules of node conditions look at.

Pure, and bounded: a node decides how much it lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from node_manager.condition_memory import key_of
from node_manager.domain import IMAGE_FILESYSTEMS
from node_manager.restart_counts import Counters
from node_manager.shapes import FilesystemSample, Sample

# What a node wrote is read up to here.
MAX_FILESYSTEMS = 256
OF_FILESYSTEMS = ("disk_percent", "inodes_percent")


def readings_of(sample: Sample) -> Iterator[tuple[str, float | None]]:
    """Read what thresholds watch, as the node does for its report, see _thresholds.py of the collection."""
    cpu, memory, thermal = sample.cpu, sample.memory, sample.thermal
    yield "cpu_percent", cpu.use_percent if cpu is not None else None
    load = cpu.load_5m if cpu is not None else None
    yield "load_per_cpu", round(load / cpu.count, 3) if cpu is not None and load is not None else None
    yield "memory_percent", memory.use_percent if memory is not None else None
    swap_percent = memory.swap_use_percent if memory is not None else None
    yield "swap_percent", 0.0 if memory is not None and memory.swap_total_bytes == 0 else swap_percent
    yield "temperature_celsius", thermal.temperature_celsius if thermal is not None else None


def filesystems_of(sample: Sample) -> list[FilesystemSample] | None:
    """Give the filesystems that can run full, the first of several mounts on one place."""
    if sample.filesystems is None:
        return None
    found: dict[str, FilesystemSample] = {}
    for filesystem in sample.filesystems[:MAX_FILESYSTEMS]:
        # What can't be written to grows no fuller; Prometheus' node mixin leaves it out as well.
        if not filesystem.read_only and filesystem.type not in IMAGE_FILESYSTEMS:
            found.setdefault(filesystem.mount, filesystem)
    return list(found.values())


def disk_readings(name: str, filesystems: Sequence[FilesystemSample]) -> list[tuple[str, float]]:
    """Read what one of the thresholds of filesystems watches, by mount."""
    if name == "disk_percent":
        return [(filesystem.mount, filesystem.use_percent) for filesystem in filesystems]
    # btrfs and vfat have no fixed number of inodes and report 0: there is nothing to run out of.
    return [
        (filesystem.mount, filesystem.inodes_use_percent)
        for filesystem in filesystems
        if filesystem.inodes_total and filesystem.inodes_use_percent is not None
    ]


def counters_of(sample: Sample, known: Mapping[str, Any]) -> tuple[Counters, dict[str, str]]:
    """Read the restart counters by source, and the names that stand behind the keys."""
    counted = known.get("counts", {})
    found: dict[str, dict[str, int] | None] = {"c": None, "s": None}
    names: dict[str, str] = {}
    containers, services = sample.containers, sample.services
    if containers is not None and containers.runtime is not None:
        found["c"] = _by_key("c", ((item.name, item.restarts) for item in containers.items), counted, names)
    if services is not None:
        found["s"] = _by_key("s", services.restarts.items(), counted, names)
    return found, names


def _by_key(
    source: str, counters: Iterable[tuple[str, int | None]], counted: Mapping[str, int], names: dict[str, str]
) -> dict[str, int]:
    """Name counters for the memory; one that never counted is left out as long as nothing is known of any."""
    found = {}
    for name, count in counters:
        if count is not None and (count or counted):
            key = f"{source} {key_of(name)}"
            found[key] = count
            names[key] = name
    return found
