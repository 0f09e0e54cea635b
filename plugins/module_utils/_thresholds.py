# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which thresholds a sample has passed.

Pure: imports the standard library and the other pure files; the sample may hold anything, a node wrote it. Decides
about one sample only: two edges and "for 3 samples" are the service's business. Runs on nodes with Python 3.8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Optional, Tuple

from ._checks_spec import CheckFormatError, one_line
from ._probe_parse import IMAGE_FILESYSTEMS
from ._words import CheckKind, CheckState, Severity

# A node decides how many filesystems it lists; the report stays readable whatever it says.
MAX_FILESYSTEMS = 256

Edges = Mapping[str, float]


def parse_thresholds(raw: Mapping[str, object]) -> Dict[str, Dict[str, float]]:
    """Read thresholds as they are written in a node type.

    Errors: CheckFormatError naming the threshold, the edge and what was expected.
    Source: "How checks are written" in docs/observations.md.
    """
    if not isinstance(raw, Mapping):
        raise CheckFormatError(f"thresholds: expected a mapping, got {one_line(repr(raw), 60)}")
    thresholds: Dict[str, Dict[str, float]] = {}
    for name, edges in raw.items():
        where = f"threshold {one_line(repr(name), 60)}"
        if name not in _WATCHED:
            raise CheckFormatError(f"{where}: expected one of {', '.join(sorted(_WATCHED))}")
        if not isinstance(edges, Mapping) or not edges:
            raise CheckFormatError(f"{where}: expected warning, critical or both, got {one_line(repr(edges), 60)}")
        thresholds[name] = {edge: _parse_edge(where, edge, limit) for edge, limit in edges.items()}
        both = thresholds[name]
        if len(both) == len(Severity) and both["warning"] > both["critical"]:
            raise CheckFormatError(
                f"{where}: warning: expected at most critical ({both['critical']:g}), got {both['warning']:g}"
            )
    return thresholds


def evaluate(sample: Mapping[str, object], thresholds: Mapping[str, Edges]) -> List[Dict[str, object]]:
    """Hold a sample against thresholds, as the checks of a report.

    Shapes: *sample* and the result as in docs/observations.md; *thresholds* as `parse_thresholds` returns them. One
    check per threshold, and one per filesystem for those that watch filesystems.
    Errors: none; what the sample lacks, or holds in another shape, is a check of state unknown.
    """
    checks: List[Dict[str, object]] = []
    for name, edges in thresholds.items():
        watched = _WATCHED.get(name)
        if watched is None or not edges:
            continue
        checks.extend(_judge(reading, watched, edges) for reading in watched.read(sample, name))
    return checks


@dataclass(frozen=True)
class _Reading:
    """One value that a threshold watches, or the reason why there is none."""

    name: str
    value: Optional[float]
    subject: str
    reason: str = ""


@dataclass(frozen=True)
class _Watched:
    """How a threshold reads the sample, and how it speaks."""

    read: Callable[[Mapping[str, object], str], List[_Reading]]
    unit: Optional[str]
    suffix: str
    advice: str


def _judge(reading: _Reading, watched: _Watched, edges: Edges) -> Dict[str, object]:
    lowest = Severity.WARNING if Severity.WARNING in edges else Severity.CRITICAL
    severity, state, message = lowest, CheckState.UNKNOWN, reading.reason
    if reading.value is not None:
        severity, state = _place(reading.value, edges, lowest)
        limit = _amount(edges[severity.value], watched)
        message = f"{reading.subject} {_amount(reading.value, watched)} ({severity.value} limit {limit})"
        if state == CheckState.FAILED:
            message += f": {watched.advice}"
    return {
        "name": reading.name,
        "kind": CheckKind.THRESHOLD.value,
        "severity": severity.value,
        "state": state.value,
        "message": message,
        # Reading a sample takes no time worth telling; whoever took the sample paid for it.
        "latency_seconds": 0.0,
        "value": reading.value,
        "unit": watched.unit,
    }


def _place(value: float, edges: Edges, lowest: Severity) -> Tuple[Severity, CheckState]:
    for severity in (Severity.CRITICAL, Severity.WARNING):
        if severity in edges and value >= edges[severity.value]:
            return severity, CheckState.FAILED
    return lowest, CheckState.PASSED


def _amount(value: float, watched: _Watched) -> str:
    return f"{round(value, 2):g}{watched.suffix}"


def _read_cpu(sample: Mapping[str, object], name: str) -> List[_Reading]:
    return [_read_path(sample, name, "cpu", "use_percent", "the CPUs are used to")]


def _read_load(sample: Mapping[str, object], name: str) -> List[_Reading]:
    load = _read_path(sample, name, "cpu", "load_5m", "the load of the last 5 minutes, per CPU, is")
    count = _read_path(sample, name, "cpu", "count", load.subject)
    if load.value is None or count.value is None:
        return [load if load.value is None else count]
    if count.value < 1:
        return [_Reading(name, None, load.subject, f"the sample says that there are {count.value:g} CPUs")]
    return [_Reading(name, round(load.value / count.value, 3), load.subject)]


def _read_memory(sample: Mapping[str, object], name: str) -> List[_Reading]:
    return [_read_path(sample, name, "memory", "use_percent", "memory is used to")]


def _read_swap(sample: Mapping[str, object], name: str) -> List[_Reading]:
    total = _read_path(sample, name, "memory", "swap_total_bytes", "swap is used to")
    if total.value == 0:
        return [_Reading(name, 0.0, "this node has no swap; it is used to")]
    return [_read_path(sample, name, "memory", "swap_use_percent", total.subject)]


def _read_temperature(sample: Mapping[str, object], name: str) -> List[_Reading]:
    return [_read_path(sample, name, "thermal", "temperature_celsius", "the temperature is")]


def _read_disk(sample: Mapping[str, object], name: str) -> List[_Reading]:
    return [
        _read_number(filesystem, "use_percent", f"{name} {mount}", f"{mount} is full to", "filesystems")
        for mount, filesystem in _filesystems(sample)
    ] + _unread_filesystems(sample, name)


def _read_inodes(sample: Mapping[str, object], name: str) -> List[_Reading]:
    # btrfs and vfat have no fixed number of inodes and report 0: there is nothing to run out of.
    return [
        _read_number(
            filesystem, "inodes_use_percent", f"{name} {mount}", f"the inodes of {mount} are used to", "filesystems"
        )
        for mount, filesystem in _filesystems(sample)
        if filesystem.get("inodes_total")
    ] + _unread_filesystems(sample, name)


def _filesystems(sample: Mapping[str, object]) -> List[Tuple[str, Mapping[str, object]]]:
    items = sample.get("filesystems")
    found: Dict[str, Mapping[str, object]] = {}
    for item in items[:MAX_FILESYSTEMS] if isinstance(items, list) else ():
        if (
            not isinstance(item, Mapping)
            or not isinstance(item.get("mount"), str)
            or item.get("type") in IMAGE_FILESYSTEMS
        ):
            continue
        # The first of several mounts on one place: they share the numbers, and check names are unique.
        found.setdefault(one_line(item["mount"], 150), item)
    return list(found.items())


def _unread_filesystems(sample: Mapping[str, object], name: str) -> List[_Reading]:
    """Say under the threshold's own name what could not be read: all filesystems, or one that hangs."""
    reason = _collector_error(sample, "filesystems")
    if reason is None and not isinstance(sample.get("filesystems"), list):
        reason = "the sample has no filesystems"
    return [] if reason is None else [_Reading(name, None, "", reason)]


def _read_path(sample: Mapping[str, object], name: str, part: str, key: str, subject: str) -> _Reading:
    values = sample.get(part)
    if not isinstance(values, Mapping):
        reason = _collector_error(sample, part) or f"the sample has no {part} part"
        return _Reading(name, None, subject, reason)
    return _read_number(values, key, name, subject, part)


def _read_number(values: Mapping[str, object], key: str, name: str, subject: str, part: str) -> _Reading:
    value = values.get(key)
    if value is None:
        return _Reading(name, None, subject, f"this node can't tell: {part} {key} is not in the sample")
    number = _finite(value)
    if number is None:
        return _Reading(
            name, None, subject, f"{part} {key} is not a number in the sample: {one_line(_short(value), 60)}"
        )
    return _Reading(name, number, subject)


def _collector_error(sample: Mapping[str, object], collector: str) -> Optional[str]:
    errors = sample.get("errors")
    for error in errors[:MAX_FILESYSTEMS] if isinstance(errors, list) else ():
        if isinstance(error, Mapping) and error.get("collector") == collector:
            return one_line(f"{collector} could not be read: {_short(error.get('message'))}")
    return None


def _finite(value: object) -> Optional[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(value: object) -> str:
    """Show a value without going through all of it: it may be huge, or nested too deeply for repr."""
    if isinstance(value, str):
        return value[:200]
    return repr(value) if isinstance(value, (bool, float)) else f"a value of type {type(value).__name__}"


def _parse_edge(where: str, edge: object, limit: object) -> float:
    if edge not in [severity.value for severity in Severity]:
        raise CheckFormatError(f"{where}: {one_line(repr(edge), 60)}: expected warning or critical")
    number = _finite(limit)
    if number is None:
        raise CheckFormatError(f"{where}: {edge}: expected a number, got {one_line(_short(limit), 60)}")
    return number


_WATCHED: Dict[str, _Watched] = {
    "cpu_percent": _Watched(_read_cpu, "percent", " %", "find what keeps the CPUs busy, or move work to another node"),
    "load_per_cpu": _Watched(
        _read_load, None, "", "more work waits than the CPUs or disks can do: move some of it away"
    ),
    "memory_percent": _Watched(_read_memory, "percent", " %", "stop or move workloads, or look for a leak"),
    "swap_percent": _Watched(_read_swap, "percent", " %", "memory has run short: stop or move workloads"),
    "disk_percent": _Watched(_read_disk, "percent", " %", "free space or extend it"),
    "inodes_percent": _Watched(_read_inodes, "percent", " %", "remove small files, often caches or sessions"),
    "temperature_celsius": _Watched(_read_temperature, "celsius", " °C", "check fan, dust and surroundings"),
}
