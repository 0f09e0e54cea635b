# SPDX-License-Identifier: GPL-3.0-or-later
"""Which thresholds a sample has passed, and what hostile samples come to."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_spec import CheckFormatError
from ansible_collections.iot_platform.node_manager.plugins.module_utils._thresholds import evaluate, parse_thresholds
from hypothesis import given, settings
from hypothesis import strategies as st

EDGES = {"warning": 80.0, "critical": 90.0}
ALL_NAMES = [
    "cpu_percent",
    "load_per_cpu",
    "memory_percent",
    "swap_percent",
    "disk_percent",
    "inodes_percent",
    "temperature_celsius",
]


def filesystem(mount: str, **values: object) -> dict[str, object]:
    return {
        "mount": mount,
        "type": "ext4",
        "use_percent": 10.0,
        "inodes_total": 100,
        "inodes_use_percent": 5.0,
        **values,
    }


def outcome(check: dict[str, Any]) -> tuple[str, str, str, float | None]:
    return check["name"], check["state"], check["severity"], check["value"]


@pytest.mark.parametrize(
    ("value", "edges", "expected"),
    [
        pytest.param(79.9, EDGES, ("passed", "warning"), id="below-both"),
        pytest.param(80, EDGES, ("failed", "warning"), id="at-warning"),
        pytest.param(89.9, EDGES, ("failed", "warning"), id="between"),
        pytest.param(90.0, EDGES, ("failed", "critical"), id="at-critical"),
        pytest.param(50.0, {"critical": 90.0}, ("passed", "critical"), id="only-critical"),
        pytest.param(99.0, {"warning": 80.0}, ("failed", "warning"), id="only-warning"),
        pytest.param(None, EDGES, ("unknown", "warning"), id="missing"),
        pytest.param("99", EDGES, ("unknown", "warning"), id="text"),
        pytest.param(True, EDGES, ("unknown", "warning"), id="boolean"),
        pytest.param(float("nan"), EDGES, ("unknown", "warning"), id="nan"),
        pytest.param(10**400, EDGES, ("unknown", "warning"), id="too-long-for-a-float"),
    ],
)
def test_evaluate_places_value_between_edges(value: object, edges: dict[str, float], expected: tuple[str, str]) -> None:
    (check,) = evaluate({"cpu": {"use_percent": value}}, {"cpu_percent": edges})

    assert (check["state"], check["severity"]) == expected


def test_evaluate_says_value_limit_and_what_to_do() -> None:
    (check,) = evaluate({"memory": {"use_percent": 97.04}}, {"memory_percent": EDGES})

    assert check == {
        "name": "memory_percent",
        "kind": "threshold",
        "severity": "critical",
        "state": "failed",
        "message": "memory is used to 97.04 % (critical limit 90 %): stop or move workloads, or look for a leak",
        "latency_seconds": 0.0,
        "value": 97.04,
        "unit": "percent",
    }


@pytest.mark.parametrize(
    ("sample", "name", "expected"),
    [
        pytest.param({"cpu": {"load_5m": 6.0, "count": 4}}, "load_per_cpu", 1.5, id="load"),
        pytest.param({"memory": {"swap_total_bytes": 0, "swap_use_percent": None}}, "swap_percent", 0.0, id="no-swap"),
        pytest.param({"memory": {"swap_total_bytes": 9, "swap_use_percent": 7.0}}, "swap_percent", 7.0, id="swap"),
        pytest.param({"thermal": {"temperature_celsius": 51.5}}, "temperature_celsius", 51.5, id="temperature"),
        pytest.param({"cpu": {"load_5m": 6.0, "count": 0}}, "load_per_cpu", None, id="no-cpus"),
        pytest.param({"cpu": {"load_5m": 6.0}}, "load_per_cpu", None, id="no-cpu-count"),
    ],
)
def test_evaluate_reads_each_value(sample: dict[str, Any], name: str, expected: float | None) -> None:
    (check,) = evaluate(sample, {name: EDGES})

    assert check["value"] == expected


def test_evaluate_checks_each_filesystem() -> None:
    sample = {
        "filesystems": [
            filesystem("/", use_percent=95.0),
            filesystem("/data", inodes_use_percent=85.0),
            filesystem("/snap/core", type="squashfs", use_percent=100.0, inodes_use_percent=100.0),
            filesystem("/mnt/cd", type="iso9660", use_percent=100.0),
            filesystem("/srv", type="btrfs", inodes_total=0, inodes_use_percent=None),
            filesystem("/data", use_percent=99.0),
        ]
    }

    checks = evaluate(sample, {"disk_percent": EDGES, "inodes_percent": EDGES})

    assert [outcome(check) for check in checks] == [
        ("disk_percent /", "failed", "critical", 95.0),
        ("disk_percent /data", "passed", "warning", 10.0),
        ("disk_percent /srv", "passed", "warning", 10.0),
        ("inodes_percent /", "passed", "warning", 5.0),
        ("inodes_percent /data", "failed", "warning", 85.0),
    ]


def test_evaluate_says_which_filesystem_hangs() -> None:
    errors = [{"collector": "filesystems", "message": "timed out after 2.0 s at /mnt/nas"}]

    checks = evaluate({"filesystems": [filesystem("/")], "errors": errors}, {"disk_percent": EDGES})

    assert [outcome(check)[:2] for check in checks] == [("disk_percent /", "passed"), ("disk_percent", "unknown")]
    assert checks[1]["message"] == "filesystems could not be read: timed out after 2.0 s at /mnt/nas"


def test_evaluate_gives_the_collectors_reason() -> None:
    sample = {"cpu": None, "errors": [{"collector": "cpu", "message": "timed out"}]}

    (check,) = evaluate(sample, {"cpu_percent": EDGES})

    assert check["message"] == "cpu could not be read: timed out"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "cpu": st.fixed_dictionaries({}, optional={"use_percent": JSON, "load_5m": JSON, "count": JSON}) | JSON,
        "memory": st.fixed_dictionaries({}, optional={"use_percent": JSON, "swap_total_bytes": JSON}) | JSON,
        "filesystems": st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "mount": JSON,
                    "type": JSON,
                    "use_percent": JSON,
                    "inodes_total": JSON,
                    "inodes_use_percent": JSON,
                },
            )
            | JSON,
            max_size=4,
        )
        | JSON,
        "thermal": JSON,
        "errors": st.lists(st.fixed_dictionaries({"collector": JSON, "message": JSON}) | JSON, max_size=3) | JSON,
    },
)


@settings(max_examples=150, deadline=None)
@given(sample=PARTS)
def test_evaluate_answers_for_any_sample(sample: dict[str, Any]) -> None:
    checks = evaluate(sample, dict.fromkeys(ALL_NAMES, EDGES))

    names = [check["name"] for check in checks]
    assert len(set(names)) == len(names)
    assert all(check["message"] for check in checks)
    assert all((check["value"] is None) == (check["state"] == "unknown") for check in checks)


def test_evaluate_bounds_names_from_the_node() -> None:
    (check,) = evaluate({"filesystems": [filesystem("/" + "x\n" * 100_000)]}, {"disk_percent": EDGES})

    assert len(str(check["name"])) < 200
    assert "\n" not in str(check["name"])


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        pytest.param({"cpu": {"warning": 1}}, "threshold 'cpu': expected one of cpu_percent", id="unknown"),
        pytest.param(
            {"cpu_percent": 90}, "threshold 'cpu_percent': expected warning, critical or both, got 90", id="bare"
        ),
        pytest.param({"cpu_percent": {}}, "expected warning, critical or both", id="empty"),
        pytest.param({"cpu_percent": {"fatal": 1}}, "'fatal': expected warning or critical", id="edge"),
        pytest.param({"cpu_percent": {"warning": "80"}}, "warning: expected a number, got 80", id="text"),
        pytest.param(
            {"cpu_percent": {"warning": 95, "critical": 90}},
            "warning: expected at most critical (90), got 95",
            id="order",
        ),
        pytest.param([], "thresholds: expected a mapping", id="list"),
    ],
)
def test_parse_thresholds_refuses_and_names_the_place(raw: Any, said: str) -> None:
    with pytest.raises(CheckFormatError) as refusal:
        parse_thresholds(raw)

    assert said in str(refusal.value)


def test_parse_thresholds_reads_edges_as_numbers() -> None:
    thresholds = parse_thresholds({"cpu_percent": {"warning": 85, "critical": 95}, "disk_percent": {"critical": 95.5}})

    assert thresholds == {"cpu_percent": {"warning": 85.0, "critical": 95.0}, "disk_percent": {"critical": 95.5}}
