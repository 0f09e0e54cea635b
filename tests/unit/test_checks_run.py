# SPDX-License-Identifier: GPL-3.0-or-later
"""Running checks side by side: bounds in time and number, and that nothing one check does costs another."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks import (
    AT_ONCE,
    Host,
    parse_check,
    run_checks,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader

COLLECTIONS = Path(__file__).parents[2] / "collections"


def check(name: str, **raw: Any) -> Any:
    return parse_check({"name": name, **raw})


def run(checks: list[Any], *args: Any, **options: Any) -> list[dict[str, Any]]:
    found: Any = run_checks(checks, *args, **options)["checks"]
    return list(found)


@pytest.fixture
def hanging_path(tmp_path: Path) -> Iterator[Path]:
    """Give a file that hangs whoever opens it: a FIFO without a writer. They are let go when the test is over."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    yield path
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("check hang") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        # Readers that are past open() keep the writer from failing; once there are none, ENXIO.
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_run_checks_reports_in_the_order_given() -> None:
    checks = [check(str(index), kind="command", argv=["sh", "-c", f"exit {index % 2}"]) for index in range(20)]

    report = run_checks(checks, {"cpu": {"use_percent": 99.0}}, thresholds={"cpu_percent": {"critical": 90.0}})

    found: Any = report["checks"]
    assert [line["name"] for line in found] == [str(index) for index in range(20)] + ["cpu_percent"]
    assert [line["state"] for line in found] == ["passed", "failed"] * 10 + ["failed"]
    assert report["schema"] == 1
    assert set(found[0]) == {"name", "kind", "severity", "state", "message", "latency_seconds", "value", "unit"}


def test_run_checks_of_nothing_is_an_empty_report() -> None:
    assert run_checks([])["checks"] == []


def test_run_checks_runs_them_at_once() -> None:
    checks = [check(str(index), kind="command", argv=["sleep", "0.5"]) for index in range(AT_ONCE)]

    report = run_checks(checks)

    assert {line["state"] for line in report["checks"]} == {"passed"}  # type: ignore[attr-defined]
    assert float(str(report["duration_seconds"])) < 0.5 * AT_ONCE / 2


def test_run_checks_bounds_how_many_run_at_once(tmp_path: Path) -> None:
    lock = threading.Lock()
    together: list[int] = [0, 0]
    all_there = threading.Event()
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("22 1 8:1 / /data rw - ext4 /dev/sda1 rw\n")

    def statvfs(_path: str) -> os.statvfs_result:
        with lock:
            together[0] += 1
            together[1] = max(together)
            if together[0] >= AT_ONCE:
                all_there.set()
        all_there.wait(5)
        with lock:
            together[0] -= 1
        return os.statvfs("/")

    checks = [check(str(index), kind="filesystem", mount="/data", timeout_seconds=10) for index in range(3 * AT_ONCE)]

    found = run(checks, host=Host(Reader(str(tmp_path), statvfs=statvfs)))

    assert {line["state"] for line in found} == {"passed"}
    assert together[1] == AT_ONCE


def test_run_checks_gives_up_a_check_that_hangs_in_the_kernel(hanging_path: Path) -> None:
    hang = check("hang", kind="certificate", path=str(hanging_path), timeout_seconds=0.2)

    found = run([hang, check("echo", kind="command", argv=["echo", "fine"])])

    assert [line["state"] for line in found] == ["unknown", "passed"]
    assert "timed out after 0.2 s" in found[0]["message"]
    assert 0.2 <= found[0]["latency_seconds"] < 2


def test_run_checks_frees_the_places_of_checks_that_hang(hanging_path: Path) -> None:
    hanging = [
        check(f"hang {index}", kind="certificate", path=str(hanging_path), timeout_seconds=0.1)
        for index in range(2 * AT_ONCE)
    ]

    found = run([*hanging, check("echo", kind="command", argv=["echo", "fine"])])

    assert [line["state"] for line in found] == ["unknown"] * 2 * AT_ONCE + ["passed"]


def test_run_checks_does_not_start_again_what_still_hangs(hanging_path: Path) -> None:
    hang = check("hang", kind="certificate", path=str(hanging_path), timeout_seconds=0.1)
    run([hang])
    before = threading.active_count()

    found = run([hang])

    assert "an earlier run of this check still hangs" in found[0]["message"]
    assert found[0]["state"] == "unknown"
    assert threading.active_count() == before


def test_run_checks_fails_a_filesystem_that_hangs(tmp_path: Path) -> None:
    let_go = threading.Event()
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("22 1 8:1 / /mnt/nas rw - ext4 /dev/sda1 rw\n")

    def statvfs(_path: str) -> os.statvfs_result:
        let_go.wait(20)
        return os.statvfs("/")

    hang = check("nas", kind="filesystem", mount="/mnt/nas", timeout_seconds=0.1)
    try:
        found = run([hang], host=Host(Reader(str(tmp_path), statvfs=statvfs)))
    finally:
        let_go.set()

    assert (found[0]["state"], found[0]["message"]) == (
        "failed",
        "/mnt/nas timed out after 0.1 s: the device or its server does not answer, see dmesg",
    )


def test_run_checks_ends_by_its_deadline(hanging_path: Path) -> None:
    checks = [
        check("hang", kind="certificate", path=str(hanging_path), timeout_seconds=60),
        *[check(str(index), kind="command", argv=["sleep", "60"], timeout_seconds=60) for index in range(AT_ONCE + 3)],
    ]
    started = time.monotonic()

    found = run(checks, deadline_seconds=1.0)

    # Half a second for a busy machine; without the bound it would be a minute.
    assert time.monotonic() - started < 1.5
    # Cut short by the run, so nothing is proven against the node.
    assert {line["state"] for line in found} == {"unknown"}
    assert found[1]["message"].startswith("not finished, the run's 1 s were over")
    assert found[-1]["message"].startswith("not looked at, the run's 1 s were over")


def test_run_checks_survives_a_check_that_breaks() -> None:
    def broken(_deadline: float) -> Mapping[str, object]:
        raise RuntimeError("engine\nfault")

    found = run(
        [check("app", kind="container", container="app"), check("echo", kind="command", argv=["echo", "fine"])],
        list_containers=broken,
    )

    assert (found[0]["state"], found[0]["message"]) == (
        "unknown",
        "the check itself failed: RuntimeError: engine fault",
    )
    assert found[1]["state"] == "passed"


def test_run_checks_asks_for_containers_once() -> None:
    asked: list[float] = []

    def list_containers(deadline: float) -> Mapping[str, object]:
        asked.append(deadline)
        return {"runtime": "docker", "items": [{"name": "a", "state": "running"}]}

    found = run(
        [check(str(index), kind="container", container="a") for index in range(5)], list_containers=list_containers
    )

    assert {line["state"] for line in found} == {"passed"}
    assert len(asked) == 1


def test_run_checks_takes_containers_from_the_sample() -> None:
    def unwanted(_deadline: float) -> Mapping[str, object]:
        raise AssertionError

    sample = {"containers": {"runtime": "docker", "items": [{"name": "a", "state": "running"}]}}

    found = run([check("a", kind="container", container="a")], sample, list_containers=unwanted)

    assert found[0]["state"] == "passed"


def test_run_checks_says_why_containers_are_unknown_without_a_runtime(tmp_path: Path) -> None:
    found = run([check("a", kind="container", container="a")], host=Host(Reader(str(tmp_path))))

    assert found[0]["state"] == "unknown"
    assert "no container runtime" in found[0]["message"]


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param({"containers": "x", "cpu": [], "filesystems": {}, "errors": 3}, id="wrong-types"),
        pytest.param({"containers": {"runtime": [], "items": {}}}, id="wrong-containers"),
        pytest.param([], id="list"),
        pytest.param("x", id="text"),
    ],
)
def test_run_checks_survives_hostile_samples(tmp_path: Path, sample: Any) -> None:
    thresholds = {"cpu_percent": {"warning": 1.0}, "disk_percent": {"warning": 1.0}}

    found = run(
        [check("a", kind="container", container="a")], sample, thresholds=thresholds, host=Host(Reader(str(tmp_path)))
    )

    assert [line["state"] for line in found] == ["unknown"] * 3


def test_process_ends_while_a_check_still_hangs(hanging_path: Path) -> None:
    program = (
        f"from {run_checks.__module__} import parse_check, run_checks\n"
        f"check = parse_check(dict(name='x', kind='certificate', path={str(hanging_path)!r}, timeout_seconds=0.1))\n"
        "print(run_checks([check])['checks'][0]['state'])\n"
    )

    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(COLLECTIONS)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )

    assert (ended.stdout, ended.stderr) == ("unknown\n", "")
