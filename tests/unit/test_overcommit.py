# SPDX-License-Identifier: GPL-3.0-or-later
"""When a node is under pressure."""

from __future__ import annotations

from datetime import datetime

import pytest
from builders import START, seconds
from hypothesis import given
from hypothesis import strategies as st
from node_manager.overcommit import READINGS, Pressure, after_sample, is_pressed
from node_manager.settings import AllocationSettings

LIMITS = AllocationSettings()


def after(*cpu: float | None, waiting: float | None = None, before: Pressure = Pressure()) -> Pressure:  # noqa: B008
    """Judge samples, one each second from START on."""
    pressure = before
    for number, use in enumerate(cpu):
        pressure = after_sample(pressure, use, waiting, START + seconds(number), LIMITS)
    return pressure


@pytest.mark.parametrize("quiet", [0, 1, 5, 19, 20, 100])
def test_after_sample_sees_pressure_within_two_busy_samples(quiet: int) -> None:
    pressure = after(*[10.0] * quiet, 99.0, 99.0)

    assert pressure.pressed_at == START + seconds(quiet + 1)


@pytest.mark.parametrize("quiet", [0, 1, 5, 19, 20, 100])
def test_after_sample_takes_one_spike_for_nothing(quiet: int) -> None:
    pressure = after(*[10.0] * quiet, 100.0, *[10.0] * 5)

    assert pressure.pressed_at is None


def test_after_sample_forgets_a_spike_after_twenty_samples() -> None:
    pressure = after(100.0, *[10.0] * READINGS, 100.0)

    assert pressure.pressed_at is None


@pytest.mark.parametrize(("percent", "pressed"), [(25.0, False), (25.1, True)], ids=["at-the-limit", "above"])
def test_after_sample_takes_waiting_alone_for_pressure(percent: float, pressed: bool) -> None:
    pressure = after(10.0, waiting=percent)

    assert (pressure.pressed_at is not None) == pressed


def test_after_sample_takes_waiting_for_pressure_where_use_is_unknown() -> None:
    pressure = after(None, waiting=90.0)

    assert pressure == Pressure((), START)


@pytest.mark.parametrize(("percent", "pressed"), [(85.0, False), (86.0, True)], ids=["at-the-limit", "above"])
def test_after_sample_takes_use_above_the_limit_for_pressure(percent: float, pressed: bool) -> None:
    pressure = after(*[percent] * READINGS)

    assert (pressure.pressed_at is not None) == pressed


def test_after_sample_of_nothing_known_changes_nothing() -> None:
    before = Pressure((90, 90), START)

    assert after_sample(before, None, None, START + seconds(9), LIMITS) == before


def test_after_sample_keeps_the_newest_sign_when_samples_come_late() -> None:
    before = Pressure((), START + seconds(60))

    assert after(10.0, waiting=90.0, before=before).pressed_at == START + seconds(60)


def test_after_sample_of_a_quiet_node_does_not_renew_old_pressure() -> None:
    pressure = after(*[99.0] * READINGS, 10.0, 10.0)

    assert pressure.pressed_at == START + seconds(READINGS - 1)


@given(st.lists(st.floats(0, 100) | st.none(), max_size=60))
def test_after_sample_keeps_no_more_than_the_last_readings(cpu: list[float | None]) -> None:
    pressure = after(*cpu)

    assert pressure.readings == tuple(round(use) for use in cpu if use is not None)[-READINGS:]


@pytest.mark.parametrize(
    ("pressed_at", "pressed"),
    [(None, False), (START, True), (START - seconds(599.9), True), (START - seconds(600), False)],
    ids=["never", "now", "within-ten-minutes", "after-ten-minutes"],
)
def test_is_pressed_for_ten_minutes_after_the_last_sign(pressed_at: datetime | None, pressed: bool) -> None:
    assert is_pressed(pressed_at, START, LIMITS) == pressed
