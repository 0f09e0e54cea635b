# SPDX-License-Identifier: GPL-3.0-or-later
"""What the clock check makes of each answer, the kernel's own and timedatectl's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_clock import (
    ClockReading,
    check_clock,
    judge_clock,
    read_kernel_clock,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_spec import ClockCheck
from ansible_collections.iot_platform.node_manager.plugins.module_utils._words import Severity

CHECK = ClockCheck("x", Severity.CRITICAL, 3.0, max_offset_seconds=0.5)


def refused() -> ClockReading:
    raise OSError(1, "Operation not permitted")


@pytest.mark.parametrize(
    ("reading", "state", "said"),
    [
        pytest.param(
            ClockReading("the kernel", True, 0.000012, 0.03),
            "passed",
            "synchronised (says the kernel, off by 0.000012 s, error at most 0.030 s)",
            id="synchronised",
        ),
        pytest.param(ClockReading("the kernel", True, 0.5, 1.02), "passed", "off by 0.500000 s", id="at-the-limit"),
        pytest.param(
            ClockReading("the kernel", True, -0.6, 1.0), "failed", "off by -0.600000 s (limit 0.5 s", id="slow"
        ),
        pytest.param(
            ClockReading("the kernel", False, 0.0, 16.0), "failed", "is not synchronised (says the kernel)", id="not"
        ),
        pytest.param(ClockReading("timedatectl", True, None, None), "passed", "(says timedatectl)", id="no-offset"),
    ],
)
def test_judge_clock_weighs_flag_and_offset(reading: ClockReading, state: str, said: str) -> None:
    finding = judge_clock(CHECK, reading)

    assert finding.state == state
    assert said in finding.message
    assert finding.value == reading.offset_seconds


def test_read_kernel_clock_answers_or_says_why_not() -> None:
    try:
        reading = read_kernel_clock()
    except OSError as error:
        pytest.skip(f"this kernel does not let us ask: {error.strerror}")

    assert reading.source == "the kernel"
    assert reading.offset_seconds is not None
    assert reading.max_error_seconds is not None
    assert abs(reading.offset_seconds) < 1
    # The kernel counts up to 16 s and a little, then calls the clock unsynchronised.
    assert 0 <= reading.max_error_seconds < 17


@pytest.mark.parametrize(
    ("script", "state", "said"),
    [
        pytest.param("echo NTPSynchronized=yes", "passed", "synchronised (says timedatectl)", id="yes"),
        pytest.param("echo NTPSynchronized=no", "failed", "is not synchronised (says timedatectl)", id="no"),
        pytest.param("echo 'no bus' >&2; exit 1", "unknown", "adjtimex: Operation not permitted", id="no-bus"),
        pytest.param(None, "unknown", "timedatectl could not be run", id="missing"),
    ],
)
def test_check_clock_asks_timedatectl_where_the_kernel_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, state: str, said: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        program = tmp_path / "timedatectl"
        program.write_text("#!/bin/sh\n" + script)
        program.chmod(0o755)

    finding = check_clock(CHECK, time.monotonic() + 5, refused)

    assert finding.state == state
    assert said in finding.message
