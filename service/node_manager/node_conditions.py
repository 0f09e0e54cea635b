# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide what can be said about a node from its samples and its report, beside whether it answers.

Pure: what was known and one sample in, what is known and what follows out; nothing is read or written here, and the time is
the observer's. What is known is small and JSON, and stays the same object through a quiet sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from node_manager import disk_trend, restart_counts, thresholds
from node_manager.condition_memory import is_within, key_of
from node_manager.domain import (
    CheckKind,
    CheckState,
    ConditionType,
    ContactReason,
    Severity,
    one_line,
)
from node_manager.health_checker import Condition
from node_manager.sample_readings import OF_FILESYSTEMS, counters_of, disk_readings, filesystems_of, readings_of
from node_manager.settings import Settings
from node_manager.shapes import FilesystemSample, Report, Sample, Throttling
from node_manager.thresholds import Edge, Edges, Steps, edges_of
from node_manager.workloads import mark_of

# Written into the memory: another version's is not read.
VERSION = 1
KILL_SPAN_SECONDS = 3600
CRITICAL_KILLS = 3
UNDERVOLTAGE_SPAN_SECONDS = 3600
# ntpd may take that long to choose a server (netdata waits for it too); a board without its own clock needs a while as well.
CLOCK_GRACE_SECONDS = 1020
# What the memory calls the mark of the managed workloads.
WORKLOADS = "workloads"
# How long a condition outlives a sample that can't tell: a collector that hangs once is no news.
HOLD_SECONDS = thresholds.HOLD_SECONDS
_UNDERVOLTAGE_STAMP_SECONDS = 60
_NAMED = 3
_MAX_MESSAGE_CHARACTERS = 1000


@dataclass(frozen=True)
class _Rule:
    """What a threshold makes of its readings."""

    type: ConditionType
    reason: str
    # With the subject's name where the threshold watches several.
    seen: str
    unit: str
    advice: str


_RULES = {
    "cpu_percent": _Rule(
        ConditionType.CPU_SUFFICIENT,
        "CpuBusy",
        "CPU use reached",
        " %",
        "find what keeps the CPUs busy, or move work to another node",
    ),
    "load_per_cpu": _Rule(
        ConditionType.LOAD_NORMAL,
        "LoadHigh",
        "the 5 minute load per CPU reached",
        "",
        "more work waits than the CPUs or disks can do: move some of it away",
    ),
    "memory_percent": _Rule(
        ConditionType.MEMORY_SUFFICIENT,
        "MemoryLow",
        "memory use reached",
        " %",
        "stop or move workloads, or look for a leak",
    ),
    "swap_percent": _Rule(
        ConditionType.SWAP_SUFFICIENT,
        "SwapLow",
        "swap use reached",
        " %",
        "memory has run short: stop or move workloads",
    ),
    "disk_percent": _Rule(
        ConditionType.DISK_SPACE_SUFFICIENT, "DiskSpaceLow", "use of {} reached", " %", "free space or extend it"
    ),
    "inodes_percent": _Rule(
        ConditionType.INODES_SUFFICIENT,
        "InodesLow",
        "inode use of {} reached",
        " %",
        "remove small files, often caches or sessions",
    ),
    "temperature_celsius": _Rule(
        ConditionType.TEMPERATURE_NORMAL, "TooHot", "the temperature reached", " °C", "check fan, dust and surroundings"
    ),
}
# Of what is true or false: 1 is bad.
_IS_BAD = Edges((Edge(thresholds.WARNING, 1.0, 1.0),), 1.0)
_SEVERITIES = {thresholds.WARNING: Severity.WARNING, thresholds.CRITICAL: Severity.CRITICAL}
_SOURCES = {"c": "container", "s": "service"}


class Judgement(NamedTuple):
    """What follows from one sample."""

    memory: Mapping[str, Any]
    # What is well, most of the time all; what isn't.
    good: list[ConditionType]
    bad: list[Condition]
    # What nothing can be said about any more: a stored condition of these types is to be dropped.
    unknown: tuple[ConditionType, ...]
    at: datetime

    @property
    def conditions(self) -> list[Condition]:
        """Give all that the sample says."""
        return [*(_good(told, self.at) for told in self.good), *self.bad]


@dataclass(frozen=True)
class ConditionLimits:
    """The limits of one node type."""

    edges: Mapping[str, Edges]
    steps: Steps
    root_read_only: bool
    judges_clock: bool
    # What the type doesn't ask about.
    unjudged: tuple[ConditionType, ...]


def limits_of(settings: Settings, node_type: str | None) -> ConditionLimits:
    """Put together the limits of a node type; those of no type for None or one that isn't configured."""
    configuration = settings.configuration
    definition = settings.node_types.get(node_type) if node_type is not None else None
    edges = {}
    for name in _RULES:
        own = edges_of(getattr(definition.thresholds, name)) if definition else None
        found = own or edges_of(getattr(configuration.thresholds, name))
        if found is not None:
            edges[name] = found
    monitoring = configuration.monitoring
    interval = monitoring.sample_interval_seconds if monitoring.stream else monitoring.gather_interval_seconds
    steps = Steps(configuration.health.threshold_samples, max(monitoring.stale_after_seconds, 3 * interval))
    root_read_only = definition is not None and definition.root_read_only
    unjudged = [rule.type for name, rule in _RULES.items() if name not in edges]
    if root_read_only:
        unjudged.append(ConditionType.ROOT_WRITABLE)
    # Virtual machines often say that their clock isn't synchronised when their host keeps it.
    judges_clock = definition is None or any(check.kind == CheckKind.CLOCK.value for check in definition.checks)
    if not judges_clock:
        unjudged.append(ConditionType.CLOCK_SYNCHRONISED)
    return ConditionLimits(edges, steps, root_read_only, judges_clock, tuple(unjudged))


def fold(memory: Mapping[str, Any], sample: Sample, limits: ConditionLimits, at: datetime) -> Judgement:
    """Judge one sample.

    Shapes: *memory* is what the fold before returned, or {}; it is returned itself where nothing changed. Of each type that
        the sample tells about there is one condition; of one it doesn't, what is stored holds until it is in `unknown`.
    """
    known = memory if memory.get("version") == VERSION else {}
    judging = _Judging(known, sample, limits, at)
    judging.judge()
    after = memory
    if judging.changes or known is not memory:
        changed = {**known, **judging.changes, "version": VERSION}
        after = {key: value for key, value in changed.items() if value}
    return Judgement(after, judging.good, judging.bad, judging.unknown, at)


def conditions_of_report(report: Report, at: datetime) -> list[Condition]:
    """Judge the certificates that a run of the checks looked at; none where it looked at none, or couldn't.

    A report is whole: where it gives none, a stored condition is to be dropped.
    """
    checks = [check for check in report.checks if check.kind == CheckKind.CERTIFICATE.value]
    failed = [check for check in checks if check.state is CheckState.FAILED]
    if failed:
        critical = [check for check in failed if check.severity is Severity.CRITICAL]
        message = "; ".join(f"{check.name}: {check.message}" for check in critical or failed)
        severity = Severity.CRITICAL if critical else Severity.WARNING
        return [_bad(ConditionType.CERTIFICATES_VALID, "CertificateInvalid", message, at, severity)]
    if any(check.state is CheckState.PASSED for check in checks):
        return [_good(ConditionType.CERTIFICATES_VALID, at)]
    return []


class _Judging:
    """One sample on its way through the rules."""

    def __init__(self, known: Mapping[str, Any], sample: Sample, limits: ConditionLimits, at: datetime) -> None:
        self.good: list[ConditionType] = []
        self.bad: list[Condition] = []
        self.changes: dict[str, Any] = {}
        self.unknown: tuple[ConditionType, ...] = limits.unjudged
        self._known = known
        self._sample = sample
        self._limits = limits
        self._at = at
        self._now = int(at.timestamp())
        self._untold: list[ConditionType] = []
        self._entries: dict[str, thresholds.Entries] = known.get("thresholds", _NOTHING)
        # A disk that hangs, not a disk that is gone.
        self._hangs = any(error.collector == "filesystems" for error in sample.errors)
        self._rebooted = False

    def judge(self) -> None:
        """Go through all rules."""
        filesystems = filesystems_of(self._sample)
        self._judge_boot()
        self._judge_root()
        self._judge_readings()
        self._judge_filesystems(filesystems)
        self._judge_trend(filesystems)
        self._judge_board()
        self._judge_clock()
        self._judge_kills()
        self._judge_restarts()
        self._mark_workloads()
        self._forget()

    def _judge_boot(self) -> None:
        if self._sample.boot_id is None:
            return
        boot, before = key_of(self._sample.boot_id), self._known.get("boot")
        self._rebooted = before is not None and before != boot
        if boot != before:
            self.changes["boot"] = boot

    def _judge_root(self) -> None:
        read_only = self._sample.root_read_only
        if self._limits.root_read_only:
            return
        if read_only is None:
            self._untold.append(ConditionType.ROOT_WRITABLE)
        elif read_only:
            message = (
                "the root filesystem is read-only: look for disk errors in the kernel log, check or replace the disk or card, "
                "and reboot; where it is meant to be so, set root_read_only of the node type"
            )
            self._say_bad(ConditionType.ROOT_WRITABLE, "RootReadOnly", message, Severity.CRITICAL)
        else:
            self.good.append(ConditionType.ROOT_WRITABLE)

    def _judge_readings(self) -> None:
        for name, value in readings_of(self._sample):
            edges = self._limits.edges.get(name)
            if edges is None:
                self._set_entries(name, _NOTHING)
            elif value is None:
                self._untold.append(_RULES[name].type)
            else:
                self._follow(name, [("", value)], edges)

    def _judge_filesystems(self, filesystems: Sequence[FilesystemSample] | None) -> None:
        for name in OF_FILESYSTEMS:
            edges = self._limits.edges.get(name)
            if edges is None:
                self._set_entries(name, _NOTHING)
            elif filesystems is None:
                self._untold.append(_RULES[name].type)
            else:
                self._follow(name, disk_readings(name, filesystems), edges)

    def _follow(self, name: str, readings: Sequence[tuple[str, float]], edges: Edges) -> None:
        rule = _RULES[name]
        before = self._entries.get(name, _NOTHING)
        after = thresholds.follow(before, readings, edges, self._limits.steps, self._now, hangs=self._hangs)
        self._set_entries(name, after)
        level = max(map(thresholds.level_of, after.values()), default=0) if after else 0
        if not level:
            self.good.append(rule.type)
            return
        edge = edges.edge(level)
        names = {key_of(subject): subject for subject, _ in readings}
        worst = sorted(key for key, entry in after.items() if thresholds.level_of(entry) == level)
        seen = "; ".join(
            f"{rule.seen.format(_shown(names.get(key, key)))} {after[key][4]:g}{rule.unit}" for key in worst[:_NAMED]
        )
        more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
        severity = _SEVERITIES[level]
        limit = f"{severity} limit {edge.enter:g}{rule.unit}, over below {edge.clear:g}{rule.unit}"
        self._say_bad(rule.type, rule.reason, f"{seen}{more} ({limit}): {rule.advice}", severity)

    def _judge_trend(self, filesystems: Sequence[FilesystemSample] | None) -> None:
        if filesystems is None:
            self._untold.append(ConditionType.DISK_LASTING)
            return
        before = self._known.get("trends", _NOTHING)
        after = disk_trend.follow(before, filesystems, self._now, hangs=self._hangs)
        self._set("trends", before, after)
        filling = disk_trend.filling(after) if after else {}
        if not filling:
            self.good.append(ConditionType.DISK_LASTING)
            return
        names = {key_of(disk.mount): disk.mount for disk in filesystems}
        told = "; ".join(
            f"{_shown(names.get(key, key))} is full to {use:g} % and, growing as in the last hours, has about {hours} h left"
            for key, (use, hours) in sorted(filling.items())
        )
        advice = f"(limit {disk_trend.ENTER_HOURS} h): stop what fills it, free space or extend it"
        self._say_bad(ConditionType.DISK_LASTING, "DiskFillingUp", f"{told} {advice}", Severity.WARNING)

    def _judge_board(self) -> None:
        thermal = self._sample.thermal
        board = thermal.throttled if thermal is not None else None
        self._judge_power(board)
        throttled = _either(board.throttled, board.frequency_capped) if board is not None else None
        message = (
            "the board slows its CPUs down, because of heat or weak power: check cooling and power supply "
            f"(over after {self._limits.steps.samples} samples at full speed)"
        )
        self._follow_flag(ConditionType.UNTHROTTLED, throttled, "Throttled", message)

    def _judge_power(self, board: Throttling | None) -> None:
        low, low_since_boot = (board.undervoltage, board.undervoltage_since_boot) if board is not None else (None, None)
        if low is None and low_since_boot is None:
            self._untold.append(ConditionType.POWER_SUFFICIENT)
            return
        # [the bit that says it has happened since the boot, time of the last sign]
        before = self._known.get("power", _NO_POWER)
        bit, stamp = before
        if self._rebooted:
            bit = 0
        appeared = bool(low_since_boot) and bit == 0
        if low_since_boot is not None:
            bit = int(low_since_boot)
        if appeared or (low and not is_within(stamp, self._now, _UNDERVOLTAGE_STAMP_SECONDS)):
            stamp = self._now
        counts = is_within(stamp, self._now, UNDERVOLTAGE_SPAN_SECONDS)
        self._set("power", before, [bit, stamp if counts else 0])
        if counts:
            message = (
                "the board's supply voltage was too low within the last hour: use a stronger power supply, a shorter "
                "or thicker cable, or unplug USB devices"
            )
            self._say_bad(ConditionType.POWER_SUFFICIENT, "UnderVoltage", message, Severity.WARNING)
        else:
            self.good.append(ConditionType.POWER_SUFFICIENT)

    def _judge_clock(self) -> None:
        if not self._limits.judges_clock:
            return
        clock, uptime = self._sample.clock, self._sample.uptime_seconds
        synchronised = clock.synchronised if clock is not None else None
        starting = not synchronised and uptime is not None and uptime < CLOCK_GRACE_SECONDS
        unsynchronised = None if synchronised is None or starting else not synchronised
        message = (
            "the kernel says that the clock isn't synchronised: see whether the time service (chrony, systemd-timesyncd "
            "or ntpd) runs and reaches its servers"
        )
        self._follow_flag(ConditionType.CLOCK_SYNCHRONISED, unsynchronised, "ClockUnsynchronised", message)

    def _follow_flag(self, told: ConditionType, bad: bool | None, reason: str, message: str) -> None:
        if bad is None:
            self._untold.append(told)
            return
        before = self._entries.get(told.value, _NOTHING)
        after = thresholds.follow(before, [("", float(bad))], _IS_BAD, self._limits.steps, self._now)
        self._set_entries(told.value, after)
        if any(map(thresholds.level_of, after.values())):
            self._say_bad(told, reason, message, Severity.WARNING)
        else:
            self.good.append(told)

    def _judge_kills(self) -> None:
        memory = self._sample.memory
        count = memory.oom_kills if memory is not None else None
        if count is None:
            self._untold.append(ConditionType.NO_MEMORY_KILLS)
            return
        # [the counter, times of the newest kills]
        before: list[int] = self._known.get("kills", _NOTHING)
        last, stamps = (before[0], before[1:]) if before else (count, [])
        killed = 0 if self._rebooted else count - last
        stamps = ([self._now] * min(killed, CRITICAL_KILLS) + stamps)[:CRITICAL_KILLS]
        stamps = [stamp for stamp in stamps if is_within(stamp, self._now, KILL_SPAN_SECONDS)]
        self._set("kills", before, [count, *stamps])
        if not stamps:
            self.good.append(ConditionType.NO_MEMORY_KILLS)
            return
        often = len(stamps) >= CRITICAL_KILLS
        message = (
            f"memory ran out; processes that the kernel killed within an hour: {len(stamps)}{' or more' if often else ''} "
            f"(critical from {CRITICAL_KILLS} on): give workloads memory limits, move some away, or look for a leak"
        )
        severity = Severity.CRITICAL if often else Severity.WARNING
        self._say_bad(ConditionType.NO_MEMORY_KILLS, "ProcessesKilled", message, severity)

    def _judge_restarts(self) -> None:
        before = self._known.get("restarts", _NOTHING)
        counters, names = counters_of(self._sample, before)
        after = restart_counts.follow(before, counters, self._now, rebooted=self._rebooted)
        self._set("restarts", before, after)
        if all(counts is None for counts in counters.values()):
            self._untold.append(ConditionType.RESTARTS_NORMAL)
            return
        restarting = restart_counts.restarting(after)
        if not restarting:
            self.good.append(ConditionType.RESTARTS_NORMAL)
            return
        told = ", ".join(
            f"{_SOURCES[key[0]]} {_shown(names.get(key, key[2:]))}" for key in restarting[: restart_counts.MAX_HOT]
        )
        message = (
            f"{told} restarted {restart_counts.RESTARTS} times or more within 15 minutes: read its log; over after 15 minutes "
            "without a restart"
        )
        self._say_bad(ConditionType.RESTARTS_NORMAL, "RestartsOften", message, Severity.WARNING)

    def _mark_workloads(self) -> None:
        mark = mark_of(self._sample)
        if mark is not None:
            self._set(WORKLOADS, self._known.get(WORKLOADS, ""), mark)

    def _forget(self) -> None:
        """Let what can't be told any more be unknown after a while, and forget what it was."""
        before: Mapping[str, int] = self._known.get("untold", _NOTHING)
        if self._untold or before:
            after = {told.value: self._untold_since(before.get(told.value)) for told in self._untold}
            self._set("untold", before, after)
            unknown = [told for told in self._untold if after[told.value] == _LONG_AGO]
            self.unknown = (*self._limits.unjudged, *unknown)
            for told in unknown:
                self._set_entries(_THRESHOLD_OF.get(told, told.value), _NOTHING)
                if told is ConditionType.DISK_LASTING:
                    self._set("trends", self._known.get("trends", _NOTHING), {})
        self._set("thresholds", self._known.get("thresholds", _NOTHING), self._entries)

    def _untold_since(self, since: int | None) -> int:
        if since is None:
            return self._now
        return since if since != _LONG_AGO and is_within(since, self._now, HOLD_SECONDS) else _LONG_AGO

    def _set_entries(self, name: str, after: thresholds.Entries) -> None:
        if after is self._entries.get(name, _NOTHING):
            return
        self._entries = {key: entries for key, entries in {**self._entries, name: after}.items() if entries}

    def _set(self, section: str, before: object, after: Any) -> None:
        if after is not before and after != before:
            self.changes[section] = after

    def _say_bad(self, told: ConditionType, reason: str, message: str, severity: Severity) -> None:
        self.bad.append(_bad(told, reason, message, self._at, severity))


_NOTHING: dict[str, Any] = {}
_NO_POWER = [-1, 0]
# In place of a time: so long ago that nothing is held any more.
_LONG_AGO = 0
_THRESHOLD_OF = {rule.type: name for name, rule in _RULES.items()}


def _good(told: ConditionType, at: datetime) -> Condition:
    return Condition(told, True, ContactReason.OK.value, "", at)


def _bad(told: ConditionType, reason: str, message: str, at: datetime, severity: Severity) -> Condition:
    return Condition(told, False, reason, message[:_MAX_MESSAGE_CHARACTERS], at, severity)


def _shown(name: str) -> str:
    return one_line(name, 150)


def _either(one: bool | None, other: bool | None) -> bool | None:
    return None if one is None and other is None else bool(one or other)
