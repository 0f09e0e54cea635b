# SPDX-License-Identifier: GPL-3.0-or-later
"""What is said about a node from its samples and its report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils import _thresholds
from builders import (
    MIB,
    START,
    make_container,
    make_containers,
    make_filesystem,
    make_report,
    make_sample,
    make_settings,
    seconds,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from node_manager import condition_memory, disk_trend, restart_counts, sample_readings, thresholds
from node_manager.condition_memory import is_within, key_of
from node_manager.domain import ConditionType, Severity
from node_manager.health_checker import Condition
from node_manager.node_conditions import (
    CLOCK_GRACE_SECONDS,
    HOLD_SECONDS,
    KILL_SPAN_SECONDS,
    UNDERVOLTAGE_SPAN_SECONDS,
    ConditionLimits,
    conditions_of_report,
    fold,
    limits_of,
)
from node_manager.node_types import Limit, Thresholds
from node_manager.shapes import Report, Sample
from pydantic import ValidationError

INTERVAL = 15
EDGES = {name: {"warning": 80.0, "critical": 90.0} for name in Thresholds.model_fields}
LIMITS = limits_of(make_settings({"thresholds": EDGES}), None)
LOWER = {"memory_percent": {"warning": 60.0}}
MAX_MEMORY_BYTES = 4096


class Node:
    """A node that is sampled every 15 seconds."""

    def __init__(self, limits: ConditionLimits = LIMITS, at: datetime = START) -> None:
        self.memory: Mapping[str, Any] = {}
        self.at = at
        self.limits = limits
        self.unknown: tuple[ConditionType, ...] = ()
        self.conditions: dict[ConditionType, Condition] = {}

    def see(self, after_seconds: float = INTERVAL, **changes: Any) -> dict[ConditionType, Condition]:
        """Take one more sample."""
        return self.take(Sample.model_validate(make_sample(**changes)), after_seconds)

    def take(self, sample: Sample, after_seconds: float = INTERVAL) -> dict[ConditionType, Condition]:
        """Take one more sample as it is."""
        self.at += seconds(after_seconds)
        seen = fold(self.memory, sample, self.limits, self.at)
        self.memory, conditions, self.unknown = seen.memory, seen.conditions, seen.unknown
        assert len({condition.type for condition in conditions}) == len(conditions)
        self.conditions = {condition.type: condition for condition in conditions}
        return self.conditions

    def level(self, wanted: ConditionType) -> str | None:
        """Give the level of a condition: ok, warning, critical; None where the last sample said nothing."""
        found = self.conditions.get(wanted)
        return None if found is None else "ok" if found.status else found.severity.value


def memory_part(use_percent: float = 30.0, **changes: Any) -> dict[str, Any]:
    """Give the memory part of a sample."""
    return {**make_sample()["memory"], "use_percent": use_percent, **changes}


def thermal_part(celsius: float | None = None, **bits: bool | None) -> dict[str, Any]:
    """Give the thermal part of a sample, of a board that tells all unless *bits* say otherwise."""
    names = ("undervoltage", "frequency_capped", "throttled", "soft_temperature_limit")
    names += ("undervoltage_since_boot", "throttled_since_boot")
    return {"temperature_celsius": celsius, "throttled": {**dict.fromkeys(names, False), **bits}}


def levels(
    wanted: ConditionType, samples: Iterable[dict[str, Any]], limits: ConditionLimits = LIMITS
) -> list[str | None]:
    """Give a condition's level after each of several samples in a row."""
    node = Node(limits)
    found = []
    for changes in samples:
        node.see(**changes)
        found.append(node.level(wanted))
    return found


def told(condition: Condition) -> tuple[str, str]:
    """Give a condition's reason and message."""
    return condition.reason, condition.message


# thresholds


def memory_levels(*uses: float, limits: ConditionLimits = LIMITS) -> list[str | None]:
    """Give the level of memory after each of several uses."""
    return levels(ConditionType.MEMORY_SUFFICIENT, [{"memory": memory_part(use)} for use in uses], limits)


@pytest.mark.parametrize(
    ("uses", "expected"),
    [
        pytest.param([79.9] * 4, ["ok"] * 4, id="below"),
        pytest.param([80.0] * 3, ["ok", "ok", "warning"], id="at-warning"),
        pytest.param([90.0] * 3, ["ok", "ok", "critical"], id="at-critical"),
        pytest.param([89.9] * 4, ["ok", "ok", "warning", "warning"], id="below-critical"),
        pytest.param([80, 80, 79.9, 80, 80, 80], ["ok"] * 5 + ["warning"], id="broken-row"),
        pytest.param([95, 80, 95, 95, 95], ["ok", "ok", "warning", "warning", "critical"], id="each-level-its-own-row"),
        pytest.param([85] * 3 + [72.0] * 4, ["ok", "ok"] + ["warning"] * 5, id="at-the-clear-edge"),
        pytest.param(
            [85] * 3 + [71.9] * 3, ["ok", "ok", "warning", "warning", "warning", "ok"], id="below-the-clear-edge"
        ),
        pytest.param([85] * 3 + [71, 71, 72, 71, 71], ["ok", "ok"] + ["warning"] * 6, id="broken-way-out"),
        pytest.param([95] * 3 + [81.0] * 4, ["ok", "ok"] + ["critical"] * 5, id="at-the-critical-clear-edge"),
        pytest.param([95] * 3 + [80.9] * 3, ["ok", "ok"] + ["critical"] * 3 + ["warning"], id="falls-back-to-warning"),
        pytest.param([95] * 3 + [10.0] * 3, ["ok", "ok"] + ["critical"] * 3 + ["ok"], id="falls-back-to-ok"),
    ],
)
def test_fold_counts_samples_beyond_edges(uses: list[float], expected: list[str]) -> None:
    assert memory_levels(*uses) == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        pytest.param({"warning": 80}, [(1, 80, 72)], id="warning"),
        pytest.param({"critical": 90}, [(2, 90, 81)], id="critical"),
        pytest.param({"warning": 80, "critical": 90}, [(1, 80, 72), (2, 90, 81)], id="both"),
        pytest.param({"warning": 80, "critical": 90, "clear": 60}, [(1, 80, 60), (2, 90, 81)], id="clear"),
        pytest.param({"warning": 80, "critical": 82, "clear": 79}, [(1, 80, 79), (2, 82, 79)], id="close"),
        pytest.param({"critical": 90, "clear": 60}, [(2, 90, 60)], id="clear-of-critical"),
        pytest.param({"warning": -10}, [(1, -10, -11)], id="negative"),
        pytest.param({"clear": 10}, None, id="clear-alone"),
        pytest.param({}, None, id="none"),
    ],
)
def test_edges_of_reads_a_limit(limit: dict[str, float], expected: list[tuple[int, float, float]] | None) -> None:
    edges = thresholds.edges_of(Limit.model_validate({name: float(value) for name, value in limit.items()}))

    assert (edges and [(edge.level, edge.enter, edge.clear) for edge in edges.edges]) == expected


@pytest.mark.parametrize("limit", [{"warning": 80.0, "clear": 81.0}, {"critical": 90.0, "clear": 91.0}])
def test_limit_refuses_a_clear_edge_above_the_lowest(limit: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="expected clear <= "):
        Limit.model_validate(limit)


@pytest.mark.parametrize(
    ("pause", "expected"), [(180, "warning"), (181, "ok")], ids=["at-the-longest-pause", "after-a-gap"]
)
def test_fold_counts_anew_after_a_gap(pause: float, expected: str) -> None:
    node = Node()
    for _ in range(2):
        node.see(memory=memory_part(85))

    node.see(pause, memory=memory_part(85))

    assert node.level(ConditionType.MEMORY_SUFFICIENT) == expected


def test_fold_counts_anew_on_the_way_out_after_a_gap() -> None:
    node = Node()
    for use in (85, 85, 85, 20, 20):
        node.see(memory=memory_part(use))

    node.see(181, memory=memory_part(20))

    assert node.level(ConditionType.MEMORY_SUFFICIENT) == "warning"


def test_fold_says_what_was_seen_the_limit_and_what_to_do() -> None:
    node = Node()
    for use in (91, 92, 97.04, 93):
        node.see(memory=memory_part(use))

    assert told(node.conditions[ConditionType.MEMORY_SUFFICIENT]) == (
        "MemoryLow",
        "memory use reached 97.04 % (critical limit 90 %, over below 81 %): stop or move workloads, or look for a leak",
    )


@pytest.mark.parametrize(
    ("wanted", "changes"),
    [
        (ConditionType.CPU_SUFFICIENT, {"cpu_percent": 85.0}),
        (ConditionType.LOAD_NORMAL, {"cpu": {**make_sample()["cpu"], "load_5m": 340.0}}),
        (ConditionType.SWAP_SUFFICIENT, {"memory": memory_part(swap_total_bytes=9, swap_use_percent=85.0)}),
        (ConditionType.DISK_SPACE_SUFFICIENT, {"filesystems": [make_filesystem("/", 85.0)]}),
        (ConditionType.INODES_SUFFICIENT, {"filesystems": [{**make_filesystem("/", 8.0), "inodes_use_percent": 85.0}]}),
        (ConditionType.TEMPERATURE_NORMAL, {"thermal": {"temperature_celsius": 85.0, "throttled": None}}),
    ],
    ids=lambda value: value.value if isinstance(value, ConditionType) else "",
)
def test_fold_watches_each_threshold(wanted: ConditionType, changes: dict[str, Any]) -> None:
    assert levels(wanted, [changes] * 3) == ["ok", "ok", "warning"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cpu": {**make_sample()["cpu"], "load_5m": 6.5, "count": 3}},
        {"memory": memory_part(swap_total_bytes=9, swap_use_percent=7.0)},
        {"thermal": {"temperature_celsius": 51.5, "throttled": None}},
        {"cpu": None, "memory": None, "filesystems": None},
        {
            "filesystems": [
                make_filesystem("/", 9),
                make_filesystem("/s", 9) | {"type": "squashfs"},
                make_filesystem("/", 8),
            ]
        },
        {"filesystems": [make_filesystem("/", 9) | {"inodes_total": 0, "inodes_use_percent": None}]},
    ],
    ids=["plain", "load", "swap", "heat", "nothing", "images", "btrfs"],
)
def test_readings_are_those_of_the_node(changes: dict[str, Any]) -> None:
    raw = make_sample(**changes)
    sample = Sample.model_validate(raw)
    on_the_node = {
        check["name"]: check["value"] for check in _thresholds.evaluate(raw, EDGES) if check["value"] is not None
    }

    read = {name: value for name, value in sample_readings.readings_of(sample) if value is not None}
    filesystems = sample_readings.filesystems_of(sample) or []
    for name in sample_readings.OF_FILESYSTEMS:
        read |= {f"{name} {mount}": value for mount, value in sample_readings.disk_readings(name, filesystems)}

    assert read == on_the_node


def disks(**uses: float) -> dict[str, Any]:
    """Give a sample's filesystems by their use."""
    return {"filesystems": [make_filesystem(f"/{name}", use) for name, use in uses.items()]}


def test_fold_judges_each_filesystem_by_itself() -> None:
    node = Node()
    for number in range(3):
        node.see(**disks(a=85 if number else 10, b=10 if number else 85, c=95))

    assert told(node.conditions[ConditionType.DISK_SPACE_SUFFICIENT]) == (
        "DiskSpaceLow",
        "use of /c reached 95 % (critical limit 90 %, over below 81 %): free space or extend it",
    )


def test_fold_names_three_filesystems_and_counts_the_rest() -> None:
    node = Node()
    for _ in range(3):
        node.see(**disks(a=85, b=86, c=87, d=88, e=89))

    message = node.conditions[ConditionType.DISK_SPACE_SUFFICIENT].message
    assert message.startswith("use of /a reached 85 %; use of /b reached 86 %; use of /c reached 87 % and 2 more (")


def test_fold_forgets_a_filesystem_that_is_gone() -> None:
    node = Node()
    for _ in range(3):
        node.see(**disks(a=95, b=10))

    node.see(**disks(b=10))

    assert node.level(ConditionType.DISK_SPACE_SUFFICIENT) == "ok"
    assert "/a" not in json.dumps(node.memory)


HANGS = [{"collector": "filesystems", "message": "timed out after 2.0 s at /a"}]


@pytest.mark.parametrize(("waited", "expected"), [(HOLD_SECONDS, "critical"), (HOLD_SECONDS + 1, "ok")])
def test_fold_holds_a_filesystem_that_hangs_for_a_while(waited: float, expected: str) -> None:
    node = Node()
    for _ in range(3):
        node.see(**disks(a=95, b=10))
    node.see(**disks(b=10), errors=HANGS)

    node.see(waited, **disks(b=10), errors=HANGS)

    assert node.level(ConditionType.DISK_SPACE_SUFFICIENT) == expected


def test_fold_leaves_out_what_cannot_be_written_to() -> None:
    changes = {"filesystems": [make_filesystem("/boot", 99.0, read_only=True)]}

    assert levels(ConditionType.DISK_SPACE_SUFFICIENT, [changes] * 3) == ["ok"] * 3


def test_fold_sees_the_worst_of_more_filesystems_than_it_remembers() -> None:
    node = Node()
    many = {f"d{number:02}": 85.0 for number in range(20)}
    for _ in range(3):
        node.see(**disks(**many))

    before = node.level(ConditionType.DISK_SPACE_SUFFICIENT)
    for _ in range(3):
        node.see(**disks(**many | {"d19": 99.0}))

    assert (before, node.level(ConditionType.DISK_SPACE_SUFFICIENT)) == ("warning", "critical")
    assert len(node.memory["thresholds"]["disk_percent"]) == thresholds.MAX_SUBJECTS


# what is said at once


def test_fold_says_at_once_that_the_root_is_read_only() -> None:
    found = levels(ConditionType.ROOT_WRITABLE, [{"root_read_only": value} for value in (False, True, True, False)])

    assert found == ["ok", "critical", "critical", "ok"]


def test_fold_says_nothing_of_a_root_that_is_meant_to_be_read_only() -> None:
    types = make_settings(image={"root_read_only": True})
    node = Node(limits_of(types, "image"))

    node.see(root_read_only=True)

    assert node.level(ConditionType.ROOT_WRITABLE) is None
    assert ConditionType.ROOT_WRITABLE in node.unknown


def power_levels(*parts: tuple[bool | None, bool | None, float]) -> list[str | None]:
    """Give the level of the power supply after samples of (under-voltage now, since boot, seconds waited)."""
    node = Node()
    found = []
    for now, since_boot, waited in parts:
        node.see(waited, thermal=thermal_part(undervoltage=now, undervoltage_since_boot=since_boot))
        found.append(node.level(ConditionType.POWER_SUFFICIENT))
    return found


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        pytest.param([(False, False, 15), (True, True, 15)], ["ok", "warning"], id="now"),
        pytest.param([(True, True, 15)], ["warning"], id="now-at-first-sight"),
        pytest.param([(False, True, 15), (False, True, 15)], ["ok", "ok"], id="long-ago"),
        pytest.param(
            [(False, False, 15), (False, True, 15)], ["ok", "warning"], id="has-occurred-since-the-last-sample"
        ),
        pytest.param(
            [(False, False, 15), (False, True, 15), (False, True, UNDERVOLTAGE_SPAN_SECONDS), (False, True, 1)],
            ["ok", "warning", "warning", "ok"],
            id="cleared-after-an-hour",
        ),
        pytest.param(
            [(True, True, 15), (True, True, 59), (True, True, 2), (False, True, 3600), (False, True, 1)],
            ["warning", "warning", "warning", "warning", "ok"],
            id="an-hour-after-the-last-sign",
        ),
        pytest.param([(None, None, 15)], [None], id="cannot-tell"),
        pytest.param([(True, None, 15), (False, None, 3601)], ["warning", "ok"], id="only-now"),
    ],
)
def test_fold_sees_low_voltage(parts: list[tuple[bool, bool, float]], expected: list[str]) -> None:
    assert power_levels(*parts) == expected


def test_fold_takes_the_bit_of_another_boot_for_a_new_one() -> None:
    node = Node()
    node.see(thermal=thermal_part(undervoltage_since_boot=True))

    node.see(thermal=thermal_part(undervoltage_since_boot=True), boot_id="another")

    assert node.level(ConditionType.POWER_SUFFICIENT) == "warning"


@pytest.mark.parametrize("bit", ["throttled", "frequency_capped"])
def test_fold_counts_samples_of_a_board_that_is_slowed_down(bit: str) -> None:
    found = levels(
        ConditionType.UNTHROTTLED, [{"thermal": thermal_part(**{bit: value})} for value in [True] * 3 + [False] * 3]
    )

    assert found == ["ok", "ok", "warning", "warning", "warning", "ok"]


@pytest.mark.parametrize(
    ("capped", "expected"), [(True, "warning"), (False, "ok"), (None, None)], ids=["yes", "no", "cannot-tell"]
)
def test_fold_makes_do_with_one_of_the_boards_bits(capped: bool | None, expected: str | None) -> None:
    thermal = thermal_part(throttled=None, frequency_capped=capped)

    assert levels(ConditionType.UNTHROTTLED, [{"thermal": thermal}] * 3)[-1] == expected


def test_fold_takes_no_notice_of_throttling_that_is_over() -> None:
    thermal = thermal_part(throttled_since_boot=True, soft_temperature_limit=True)

    assert levels(ConditionType.UNTHROTTLED, [{"thermal": thermal}] * 3) == ["ok"] * 3


def clock(synchronised: bool | None) -> dict[str, Any]:
    """Give the clock of a sample."""
    return {"clock": {"synchronised": synchronised, "estimated_error_seconds": None}}


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([clock(False)] * 3 + [clock(True)] * 3, ["ok", "ok", "warning", "warning", "warning", "ok"]),
        ([clock(None), {"clock": None}], [None, None]),
        ([clock(False) | {"uptime_seconds": CLOCK_GRACE_SECONDS - 1.0}] * 3, [None] * 3),
        ([clock(False) | {"uptime_seconds": float(CLOCK_GRACE_SECONDS)}] * 3, ["ok", "ok", "warning"]),
        ([clock(True) | {"uptime_seconds": 30.0}], ["ok"]),
    ],
    ids=["three", "cannot-tell", "just-booted", "long-enough-up", "already-synchronised"],
)
def test_fold_counts_samples_without_synchronisation(samples: list[dict[str, Any]], expected: list[str]) -> None:
    assert levels(ConditionType.CLOCK_SYNCHRONISED, samples) == expected


# counters


def kill_levels(*parts: tuple[int | None, float, str]) -> list[str | None]:
    """Give the level after samples of (kills since boot, seconds waited, boot)."""
    node = Node()
    found = []
    for kills, waited, boot in parts:
        node.see(waited, memory=memory_part(oom_kills=kills), boot_id=boot)
        found.append(node.level(ConditionType.NO_MEMORY_KILLS))
    return found


HOUR = KILL_SPAN_SECONDS


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        pytest.param([(7, 15, "a"), (7, 15, "a")], ["ok", "ok"], id="long-ago"),
        pytest.param([(7, 15, "a"), (8, 15, "a")], ["ok", "warning"], id="one"),
        pytest.param(
            [(0, 9, "a"), (1, 9, "a"), (1, HOUR, "a"), (1, 1, "a")], ["ok", "warning", "warning", "ok"], id="hour"
        ),
        pytest.param([(0, 9, "a"), (2, 9, "a"), (3, 9, "a")], ["ok", "warning", "critical"], id="three"),
        pytest.param([(0, 9, "a"), (99, 9, "a")], ["ok", "critical"], id="many-at-once"),
        pytest.param([(0, 9, "a"), (1, 9, "a"), (3, HOUR, "a")], ["ok", "warning", "critical"], id="three-in-the-hour"),
        pytest.param([(0, 9, "a"), (1, 9, "a"), (3, HOUR + 1, "a")], ["ok", "warning", "warning"], id="three-in-more"),
        pytest.param(
            [(0, 9, "a"), (1, 9, "a"), (3, 60, "a"), (3, HOUR - 59, "a")],
            ["ok", "warning", "critical", "warning"],
            id="fades",
        ),
        pytest.param([(0, 9, "a"), (5, 9, "b"), (6, 9, "b")], ["ok", "ok", "warning"], id="boot"),
        pytest.param([(5, 9, "a"), (0, 9, "a"), (1, 9, "a")], ["ok", "ok", "warning"], id="fell"),
        pytest.param([(0, 9, "a"), (None, 9, "a"), (1, 9, "a")], ["ok", None, "warning"], id="cannot-tell"),
    ],
)
def test_fold_counts_memory_kills(parts: list[tuple[int | None, float, str]], expected: list[str]) -> None:
    assert kill_levels(*parts) == expected


def restarted(
    containers: dict[str, int] | None = None, services: dict[str, int] | None = None, **more: Any
) -> dict[str, Any]:
    """Give a sample's containers and services by their restarts."""
    items = [{**make_container(name), "restarts": count} for name, count in (containers or {}).items()]
    return {
        "containers": None if containers is None else make_containers(*items),
        "services": None if services is None else {"failed": [], "restarts": services},
        **more,
    }


def restart_levels(*parts: tuple[dict[str, Any], float]) -> list[str | None]:
    """Give the level after samples and the seconds waited before each."""
    node = Node()
    found = []
    for changes, waited in parts:
        node.see(waited, **changes)
        found.append(node.level(ConditionType.RESTARTS_NORMAL))
    return found


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        pytest.param([(restarted({"a": 9}), 9)], ["ok"], id="long-ago"),
        pytest.param([(restarted({"a": 0}), 9), (restarted({"a": 2}), 9)], ["ok", "ok"], id="twice"),
        pytest.param([(restarted({"a": 4}), 9), (restarted({"a": 7}), 9)], ["ok", "warning"], id="three-at-once"),
        pytest.param(
            [(restarted({"a": 0}), 9), (restarted({"a": 1}), 9), (restarted({"a": 3}), 900)],
            ["ok", "ok", "warning"],
            id="within-15-minutes",
        ),
        pytest.param(
            [(restarted({"a": 0}), 9), (restarted({"a": 1}), 9), (restarted({"a": 3}), 901)],
            ["ok"] * 3,
            id="not-within",
        ),
        pytest.param(
            [(restarted({"a": 0}), 9), (restarted({"a": 3}), 9), (restarted({"a": 3}), 900), (restarted({"a": 3}), 1)],
            ["ok", "warning", "warning", "ok"],
            id="leaves-after-15-quiet-minutes",
        ),
        pytest.param(
            [
                (restarted({"a": 0}), 9),
                (restarted({"a": 3}), 9),
                (restarted({"a": 4}), 899),
                (restarted({"a": 4}), 900),
            ],
            ["ok", "warning", "warning", "warning"],
            id="goes-on-while-it-restarts",
        ),
        pytest.param(
            [(restarted({"a": 1, "b": 0}), 9), (restarted({"a": 3, "b": 1}), 9)], ["ok", "ok"], id="not-summed"
        ),
        pytest.param([(restarted({"a": 8}), 9), (restarted({"a": 3}), 9)], ["ok", "warning"], id="new-one-of-the-name"),
        pytest.param(
            [(restarted({"a": 8}), 9), (restarted({"a": 0}), 9), (restarted({"a": 9}), 9)],
            ["ok", "ok", "warning"],
            id="from-0",
        ),
        pytest.param([(restarted({}), 9), (restarted({"a": 3}), 9)], ["ok", "warning"], id="new-name"),
        pytest.param(
            [(restarted({"a": 5}), 9), (restarted({}), 9), (restarted({"a": 5}), 9)], ["ok"] * 3, id="lost-sight-of"
        ),
        pytest.param(
            [(restarted({"a": 5}), 9), (restarted(), 9), (restarted({"a": 8}), 9)], ["ok", None, "warning"], id="gap"
        ),
        pytest.param([(restarted({}), 9), (restarted({"a": 9}, boot_id="b"), 9)], ["ok", "ok"], id="boot"),
        pytest.param([(restarted(services={}), 9), (restarted(services={"a": 3}), 9)], ["ok", "warning"], id="service"),
        pytest.param([(restarted(services={}), 9), (restarted({"a": 3}, {}), 9)], ["ok", "ok"], id="source-first-seen"),
        pytest.param([(restarted({"a": 2}, {}), 9), (restarted({"a": 2}, {"a": 2}), 9)], ["ok", "ok"], id="same-name"),
        pytest.param([({"containers": make_containers(runtime=None)}, 9)], [None], id="no-runtime"),
    ],
)
def test_fold_counts_restarts(parts: list[tuple[dict[str, Any], float]], expected: list[str]) -> None:
    assert restart_levels(*parts) == expected


def test_fold_passes_over_a_container_whose_restarts_are_not_told() -> None:
    unknown = {**make_container("b"), "restarts": None}
    node = Node()

    for count in (1, 4):
        node.see(containers=make_containers({**make_container("a"), "restarts": count}, unknown))

    assert node.level(ConditionType.RESTARTS_NORMAL) == "warning"


def test_fold_names_what_restarts() -> None:
    name = "project-temperature-gateway-with-a-long-name-1"
    node = Node()
    node.see(**restarted({name: 0}, {}))

    node.see(**restarted({name: 5}, {"app.service": 3}))

    assert told(node.conditions[ConditionType.RESTARTS_NORMAL]) == (
        "RestartsOften",
        f"container {name}, service app.service restarted 3 times or more within 15 minutes: read its log; over after 15 "
        "minutes without a restart",
    )


def test_follow_restarts_makes_room_by_forgetting_what_is_gone() -> None:
    full = {f"c {number}": 1 for number in range(restart_counts.MAX_COUNTERS)}
    known = restart_counts.follow({}, {"c": full}, 1000, rebooted=False)

    after = restart_counts.follow(known, {"c": {"c new": 3}}, 1015, rebooted=False)
    crowded = restart_counts.follow(known, {"c": {**full, "c new": 3}}, 1015, rebooted=False)

    assert restart_counts.restarting(after) == ["c new"]
    assert len(after["counts"]) == restart_counts.MAX_COUNTERS
    assert restart_counts.restarting(crowded) == []


def test_follow_restarts_does_not_take_what_had_no_room_for_new() -> None:
    full = {f"c {number}": 1 for number in range(restart_counts.MAX_COUNTERS)}
    known = restart_counts.follow({}, {"c": {**full, "c old": 9}}, 1000, rebooted=False)

    seen_now = restart_counts.follow(known, {"c": {"c old": 9}}, 1015, rebooted=False)
    rising_now = restart_counts.follow(seen_now, {"c": {"c old": 12}}, 1030, rebooted=False)

    assert restart_counts.restarting(seen_now) == []
    assert restart_counts.restarting(rising_now) == ["c old"]


# disks that fill up

QUARTER = disk_trend.BUCKET_SECONDS


def trend(uses: Iterable[float | None], total_mib: int = 30000, node: Node | None = None) -> list[str | None]:
    """Give the level after each use, one per quarter of an hour; None for a quarter without a sample."""
    node = node or Node()
    found: list[str | None] = []
    waited = 0
    for use in uses:
        waited += QUARTER
        if use is None:
            continue
        node.see(waited, filesystems=[{**make_filesystem("/data", use), "total_bytes": total_mib * MIB}])
        waited = 0
        found.append(node.level(ConditionType.DISK_LASTING))
    return found


def rising(start: float, per_quarter: float, count: int) -> list[float]:
    """Give uses that rise evenly."""
    return [min(100.0, round(start + per_quarter * number, 1)) for number in range(count)]


@pytest.mark.parametrize(
    ("uses", "expected"),
    [
        # 0.6 % a quarter is 2.4 % an hour.
        pytest.param(rising(60, 0.6, 6), ["ok"] * 4 + ["warning"] * 2, id="an-hour-of-it"),
        pytest.param(rising(60, 0.4, 6), ["ok"] * 5 + ["warning"], id="24-hours-then-less"),
        pytest.param(rising(60, 0.3, 12), ["ok"] * 12, id="not-within-a-day"),
        pytest.param(rising(45, 1.0, 8), ["ok"] * 8, id="below-half"),
        pytest.param(rising(44, 1.0, 12), ["ok"] * 11 + ["warning"], id="only-what-is-above-half-counts"),
        pytest.param([90.0] * 30, ["ok"] * 30, id="flat"),
        pytest.param(rising(99, -1.0, 30), ["ok"] * 30, id="falling"),
        pytest.param([60.0] * 8 + [80.0] * 30, ["ok"] * 38, id="a-copied-file"),
        pytest.param([60, 60, None, None, 80, 80], ["ok"] * 4, id="a-copied-file-after-a-pause"),
        pytest.param([60.0] * 9 + [99.0] + [60.0] * 9, ["ok"] * 19, id="spike"),
        pytest.param([60, 61, None, None, 64, 65, 66], ["ok"] * 4 + ["warning"], id="pause"),
        pytest.param([60, 62, 64, None, 68], ["ok"] * 3 + ["warning"], id="four-readings-over-an-hour"),
        pytest.param([60, 62, 64, 66], ["ok"] * 4, id="four-readings-over-less"),
        pytest.param([60, None, 64, None, 68], ["ok"] * 3, id="three-readings"),
        pytest.param([60, 61, 62, 63, *[None] * 25, 90, 91], ["ok"] * 6, id="long-pause"),
    ],
)
def test_fold_foretells_a_full_disk(uses: list[float | None], expected: list[str]) -> None:
    assert trend(uses) == expected


def test_fold_foretells_less_than_a_day_exactly() -> None:
    # 1 % an hour: 24 h left at 76 %, which is not less than a day.
    found = trend(rising(72, 0.25, 20))

    uses = rising(72, 0.25, 20)
    first = found.index("warning")
    assert 76 <= uses[first] <= 76.8


def test_fold_names_the_disk_and_the_hours() -> None:
    node = Node()
    trend(rising(60, 2.5, 5), node=node)

    assert told(node.conditions[ConditionType.DISK_LASTING]) == (
        "DiskFillingUp",
        "/data is full to 70 % and, growing as in the last hours, has about 3 h left (limit 24 h): stop what fills it, free "
        "space or extend it",
    )


def test_fold_leaves_when_the_disk_will_last() -> None:
    found = trend([*rising(60, 0.6, 8), *[64.2] * 24])

    assert found[7] == "warning"
    changes = sum(one != other for one, other in pairwise(found))
    assert (changes, found[-1]) == (2, "ok")


def test_fold_leaves_when_use_fell() -> None:
    assert trend([*rising(60, 2, 6), 68.9])[-2:] == ["warning", "ok"]


def test_fold_stays_when_use_fell_by_a_hair() -> None:
    assert trend([*rising(60, 2, 6), 69.0])[-2:] == ["warning", "warning"]


@pytest.mark.parametrize(
    ("quarters", "per_quarter"),
    [(3, 5.0), (4, 5.0), (8, 2.0), (24, 0.8), (48, 0.5), (96, 0.3)],
    ids=str,
)
def test_fold_takes_no_saw_for_a_trend(quarters: int, per_quarter: float) -> None:
    tooth = rising(60, per_quarter, quarters)

    found = trend(tooth * 6)

    # The first tooth may be taken for a trend, for nobody knows yet that it will fall.
    assert set(found[quarters + 1 :]) == {"ok"}


@pytest.mark.parametrize(("quiet", "expected"), [(88, "ok"), (89, "warning")], ids=["26-hours", "longer"])
def test_fold_remembers_a_tooth_for_26_hours(quiet: int, expected: str) -> None:
    # It falls from 90 % and is back at 78 %, rising, when the tooth is `quiet` + 16 quarters old.
    found = trend([90, *[60.0] * quiet, *rising(62, 1, 17)])

    assert found[-1] == expected


def test_fold_tells_of_a_disk_that_outgrows_its_teeth() -> None:
    teeth = [*rising(60, 1, 8), *rising(60, 1, 8)]

    found = trend([*teeth, *rising(60, 1, 16)])

    # They reached 67 %; teeth differ by up to 5 points.
    assert found[len(teeth) :] == ["ok"] * 13 + ["warning"] * 3


def test_fold_begins_anew_with_a_resized_disk() -> None:
    node = Node()
    trend(rising(60, 2, 6), node=node)

    found = trend(rising(60, 2, 5), total_mib=31000, node=node)

    assert found == ["ok"] * 4 + ["warning"]


def test_fold_keeps_a_disk_whose_size_is_rounded() -> None:
    node = Node()
    trend(rising(60, 2, 6), node=node)

    assert trend([72], total_mib=30300, node=node) == ["warning"]


def test_fold_forgets_the_trend_of_a_disk_that_is_gone() -> None:
    node = Node()
    trend(rising(60, 2, 6), node=node)

    node.see(**disks(other=10))

    assert node.level(ConditionType.DISK_LASTING) == "ok"
    assert node.memory.get("trends", {}) == {}


def test_fold_keeps_the_trend_of_a_disk_that_hangs() -> None:
    node = Node()
    trend(rising(60, 2, 6), node=node)

    node.see(**disks(other=10), errors=HANGS)

    assert node.level(ConditionType.DISK_LASTING) == "warning"


def test_fold_writes_a_trend_once_per_quarter() -> None:
    node = Node()
    written = 0
    for number in range(240):
        before = node.memory
        node.see(filesystems=[make_filesystem("/data", 60 + number / 100)])
        written += node.memory is not before

    # Five quarters are touched, and once it is noted what can't be told.
    assert written <= 6


def test_fold_survives_a_clock_that_was_wrong() -> None:
    node = Node(at=START + timedelta(days=900))
    trend(rising(60, 2, 6), node=node)
    node.see(memory=memory_part(oom_kills=0), **restarted({"a": 0}))
    node.see(memory=memory_part(oom_kills=9), **restarted({"a": 9}), thermal=thermal_part(undervoltage=True))
    node.at = START

    node.see(memory=memory_part(oom_kills=9), **restarted({"a": 9}), thermal=thermal_part())
    found = trend(rising(60, 2, 5), node=node)

    assert node.level(ConditionType.NO_MEMORY_KILLS) is None
    assert found == ["ok"] * 4 + ["warning"]
    assert json.dumps(node.memory).find(str((START + timedelta(days=800)).timestamp())[:5]) == -1


# what can't be told


def test_fold_holds_what_a_sample_cannot_tell_for_a_while() -> None:
    node = Node()
    for _ in range(3):
        node.see(memory=memory_part(95))
    held = []
    for waited in (15, HOLD_SECONDS, 1):
        node.see(waited, memory=None)
        held.append((node.level(ConditionType.MEMORY_SUFFICIENT), ConditionType.MEMORY_SUFFICIENT in node.unknown))

    node.see(memory=memory_part(95))

    assert held == [(None, False), (None, False), (None, True)]
    assert node.level(ConditionType.MEMORY_SUFFICIENT) == "ok"
    assert ConditionType.MEMORY_SUFFICIENT not in node.unknown


def test_fold_goes_on_after_a_sample_that_could_not_tell() -> None:
    node = Node()
    for part in (memory_part(95), memory_part(95), None, memory_part(95)):
        node.see(memory=part)

    assert node.level(ConditionType.MEMORY_SUFFICIENT) == "critical"


def test_fold_does_not_judge_what_has_no_limit() -> None:
    node = Node()
    for _ in range(3):
        node.see(memory=memory_part(95))
    node.limits = limits_of(make_settings(), None)

    node.see(memory=memory_part(95))

    assert node.level(ConditionType.MEMORY_SUFFICIENT) is None
    assert ConditionType.MEMORY_SUFFICIENT in node.unknown
    assert "thresholds" not in node.memory


def test_limits_of_puts_the_types_limits_over_the_general_ones() -> None:
    types = make_settings(
        {"thresholds": {"cpu_percent": {"warning": 50.0}, "memory_percent": {"warning": 50.0, "critical": 70.0}}},
        pi={"thresholds": {"memory_percent": {"warning": 90.0}, "swap_percent": {"clear": 1.0}}},
    )

    found = {name: limits_of(types, name).edges for name in ("pi", "unheard-of")}

    assert {name: edges.lowest for name, edges in found["pi"].items()} == {"cpu_percent": 50.0, "memory_percent": 90.0}
    assert len(found["pi"]["memory_percent"].edges) == 1
    assert found["unheard-of"]["memory_percent"].lowest == 50.0


@pytest.mark.parametrize(
    ("monitoring", "expected"),
    [({}, 180), ({"stream": False}, 180), ({"stream": False, "gather_interval_seconds": 100.0}, 300)],
)
def test_limits_of_calls_three_missed_samples_a_gap(monitoring: dict[str, Any], expected: float) -> None:
    assert limits_of(make_settings({"monitoring": monitoring}), None).steps.gap_seconds == expected


# the report


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        pytest.param([], [], id="none"),
        pytest.param([("critical", "passed")], [(True, "critical")], id="passed"),
        pytest.param([("critical", "unknown")], [], id="unknown"),
        pytest.param([("critical", "unknown"), ("warning", "passed")], [(True, "critical")], id="unknown-and-passed"),
        pytest.param([("critical", "passed"), ("warning", "failed")], [(False, "warning")], id="warning"),
        pytest.param([("critical", "failed"), ("warning", "failed")], [(False, "critical")], id="critical"),
    ],
)
def test_conditions_of_report_judges_certificates(
    checks: list[tuple[str, str]], expected: list[tuple[bool, str]]
) -> None:
    raw = make_report(*checks, ("critical", "failed"))
    for check in raw["checks"][:-1]:
        check["kind"] = "certificate"

    found = conditions_of_report(Report.model_validate(raw), START)

    assert [(condition.status, condition.severity.value) for condition in found] == expected
    assert all(condition.type is ConditionType.CERTIFICATES_VALID and condition.since == START for condition in found)


def test_conditions_of_report_says_what_is_wrong_with_the_critical_ones() -> None:
    raw = make_report(("critical", "failed"), ("warning", "failed"))
    for check in raw["checks"]:
        check["kind"] = "certificate"

    (condition,) = conditions_of_report(Report.model_validate(raw), START)

    assert told(condition) == ("CertificateInvalid", "check-0: it failed")


# the memory

QUIET = Sample.model_validate(
    make_sample(
        filesystems=[make_filesystem("/", 40.0), make_filesystem("/boot", 30.0)],
        memory=memory_part(oom_kills=2),
        thermal=thermal_part(50.0),
        **restarted({"app": 1, "db": 0}, {"ssh.service": 1}),
        **clock(True),
    )
)


def test_fold_changes_nothing_through_quiet_samples() -> None:
    node = Node()
    node.take(QUIET)
    first = node.memory

    for waited in (15, 60, 86400):
        conditions = node.take(QUIET, waited)

        assert node.memory is first
        assert all(condition.status for condition in conditions.values())


def test_fold_of_a_quiet_sample_tells_of_every_type_that_samples_tell_of() -> None:
    found = Node().take(QUIET)

    first = list(ConditionType).index(ConditionType.ROOT_WRITABLE)
    others = {ConditionType.CERTIFICATES_VALID, ConditionType.WORKLOADS_OWNED}
    assert set(found) == set(list(ConditionType)[first:]) - others


@pytest.mark.parametrize("memory", [{"version": 0, "boot": 7}, {"kills": ["x"]}], ids=["older", "none"])
def test_fold_does_not_read_the_memory_of_another_version(memory: dict[str, Any]) -> None:
    seen = fold(memory, QUIET, LIMITS, START)

    assert seen.memory == fold({}, QUIET, LIMITS, START).memory
    assert all(condition.status for condition in seen.conditions)


HOSTILE = '"\\é\U0001f600' * 60


def hostile(number: int) -> Sample:
    """Give a sample as full as a node can make it; all is wrong with it."""
    names = [f"{count}{HOSTILE}"[:255] if number % 2 else f"{count:032}" for count in range(1100)]
    filesystems = [
        {
            **make_filesystem(f"/{name}", min(100.0, 60 + number / 3)),
            "inodes_use_percent": 100.0,
            "total_bytes": 2**63 - 1,
        }
        for name in names[:256]
    ]
    return Sample.model_validate(
        make_sample(
            100.0,
            boot_id=HOSTILE[:255],
            filesystems=filesystems,
            memory=memory_part(100.0, oom_kills=2**62 + number, swap_total_bytes=9, swap_use_percent=100.0),
            thermal=thermal_part(10.0**300, undervoltage=True, throttled=True),
            containers=make_containers(*[{**make_container(name), "restarts": 2**62 + number} for name in names]),
            services={"failed": [], "restarts": dict.fromkeys(names[:1024], number)},
            root_read_only=True,
            **clock(False),
        )
    )


@pytest.mark.parametrize("step", [1, 2], ids=["names-change", "names-stay"])
def test_fold_bounds_its_memory_whatever_a_node_says(step: int) -> None:
    node = Node()
    largest = 0
    for number in range(0, 28 * step, step):
        node.take(hostile(number), QUARTER if number > 3 else INTERVAL)
        largest = max(largest, len(json.dumps(node.memory)))
        assert all(len(condition.message) <= 1000 for condition in node.conditions.values())
    for _ in range(70):
        node.see(cpu=None, memory=None, filesystems=None, root_read_only=None)
        largest = max(largest, len(json.dumps(node.memory)))

    assert largest <= MAX_MEMORY_BYTES
    assert len(json.dumps(node.memory)) < 1500


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("app-1", "app-1"),
        ("/" + "a" * 31, "/" + "a" * 31),
        ("a" * 33, "a" * 23 + "~"),
        ('"\n', "~"),
        ("", "~00000000"),
        ("~", "~"),
    ],
    ids=["plain", "longest", "too-long", "odd", "empty", "tilde"],
)
def test_key_of_bounds_a_name(name: str, expected: str) -> None:
    found = key_of(name)

    assert found.startswith(expected[:24])
    assert len(found) <= 32
    assert found.isascii()


@pytest.mark.parametrize(
    ("age", "expected"), [(0, True), (100, True), (101, False), (-60, True), (-61, False)], ids=str
)
def test_is_within_takes_the_future_for_a_wrong_clock(age: float, expected: bool) -> None:
    assert is_within(1000, 1000 + age, 100) == expected
    assert condition_memory.is_within(1000, 1000 + age, 100) == expected


# what holds of all samples

percents = st.one_of(st.none(), st.sampled_from([0.0, 71.9, 72.0, 79.9, 80.0, 81.0, 89.9, 90.0, 100.0]))
bits = st.one_of(st.none(), st.booleans())
names = st.sampled_from(["a", "b", "/data", "x" * 40, "ü", HOSTILE[:200]])
counts = st.integers(0, 9)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Draw a sample, any part of which may be missing."""
    cpu, use, swap = draw(percents), draw(percents), draw(percents)
    filesystems = draw(
        st.none()
        | st.lists(
            st.builds(
                lambda mount, use, inodes, total, ro: {
                    **make_filesystem(f"/{mount}", use or 0.0, read_only=ro),
                    "inodes_use_percent": inodes,
                    "total_bytes": total,
                },
                names,
                percents,
                percents,
                st.sampled_from([0, 1, 30000 * MIB, 2**63 - 1]),
                st.booleans(),
            ),
            max_size=8,
        )
    )
    containers = draw(st.none() | st.dictionaries(names, counts, max_size=5))
    services = draw(st.none() | st.dictionaries(names, counts, max_size=5))
    board = thermal_part(
        draw(percents), **{name: draw(bits) for name in ("undervoltage", "undervoltage_since_boot", "throttled")}
    )
    return Sample.model_validate(
        make_sample(
            cpu,
            boot_id=draw(st.sampled_from([None, "a", "b"])),
            uptime_seconds=draw(st.sampled_from([None, 10.0, 1e6])),
            memory=None
            if use is None
            else memory_part(
                use, swap_total_bytes=draw(counts), swap_use_percent=swap, oom_kills=draw(st.none() | counts)
            ),
            filesystems=filesystems,
            thermal=draw(st.none() | st.just(board)),
            root_read_only=draw(bits),
            errors=draw(st.sampled_from([[], HANGS])),
            **restarted(containers, services),
            **clock(draw(bits)),
        )
    )


waits = st.sampled_from([0.5, 15, 60, 181, 900, 3600, 30000, -30, -5000])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(samples(), waits), max_size=25))
def test_fold_answers_the_same_from_what_was_stored(run: list[tuple[Sample, float]]) -> None:
    kept, stored = Node(), Node()
    for sample, waited in run:
        before = kept.memory
        kept.take(sample, waited)
        text = json.dumps(kept.memory)
        stored.memory = json.loads(json.dumps(stored.memory, sort_keys=True))
        stored.take(sample, waited)

        assert stored.conditions == kept.conditions
        assert stored.unknown == kept.unknown
        assert json.loads(text) == kept.memory == stored.memory
        assert len(text) <= MAX_MEMORY_BYTES
        # What compares equal is the same, so that nothing is written for nothing.
        assert (kept.memory is before) == (kept.memory == before)
        assert not set(kept.unknown) & set(kept.conditions)
        assert all(
            condition.status or (condition.message and condition.reason) for condition in kept.conditions.values()
        )


@given(st.lists(st.floats(0, 79.9), min_size=1, max_size=12), st.data())
def test_fold_takes_no_single_spike_for_a_state(uses: list[float], data: st.DataObject) -> None:
    spike = data.draw(st.integers(0, len(uses) - 1))
    uses[spike] = 100.0

    assert set(memory_levels(*uses)) == {"ok"}


@given(st.integers(1, 30), st.floats(72, 79.9), st.floats(80, 89.9))
def test_fold_does_not_flap_around_an_edge(count: int, low: float, high: float) -> None:
    found = memory_levels(*[low, high] * count)
    after = memory_levels(*[high] * 3, *[low, high] * count)

    assert set(found) == {"ok"}
    assert set(after[2:]) == {"warning"}


RANK = {"ok": 0, "warning": 1, "critical": 2}
steps_up = st.lists(
    st.tuples(st.floats(0, 100), st.floats(0, 100), st.sampled_from([15, 15, 15, 200])), min_size=1, max_size=25
)


@settings(max_examples=300, deadline=None)
@given(steps_up, st.integers(1, 4))
def test_follow_never_judges_higher_readings_better(run: list[tuple[float, float, int]], in_a_row: int) -> None:
    edges = thresholds.edges_of(Limit(warning=60.0, critical=80.0))
    steps = thresholds.Steps(in_a_row, 180)
    lower: thresholds.Entries = {}
    higher: thresholds.Entries = {}
    now = 0
    assert edges is not None
    for one, other, waited in run:
        now += waited
        lower = thresholds.follow(lower, [("", min(one, other))], edges, steps, now)
        higher = thresholds.follow(higher, [("", max(one, other))], edges, steps, now)

        level_of = [max(map(thresholds.level_of, entries.values()), default=0) for entries in (lower, higher)]
        assert level_of[0] <= level_of[1]


def test_fold_takes_the_number_of_samples_from_the_settings() -> None:
    limits = replace(LIMITS, steps=thresholds.Steps(1, 180))

    assert memory_levels(85, 10, limits=limits) == ["warning", "ok"]
    assert Severity.WARNING.value == memory_levels(85, limits=limits)[0]
