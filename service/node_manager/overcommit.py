# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide when a node is under real pressure, so that nothing more than its true capacity is promised on it.

Pure: what was known and one sample in, what is known out. Pressure is the share of time that work waits for a CPU (PSI), or
a CPU that is nearly always in use; a single busy reading among many is neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from node_manager.settings import AllocationSettings

# With 20 readings the 95th percentile is the second largest: two busy ones are enough, one is not.
READINGS = 20


@dataclass(frozen=True)
class Pressure:
    """The last CPU readings, in percent, oldest first; and when pressure was last seen."""

    readings: tuple[int, ...] = ()
    pressed_at: datetime | None = None


def after_sample(
    before: Pressure,
    cpu_percent: float | None,
    cpu_pressure_percent: float | None,
    at: datetime,
    limits: AllocationSettings,
) -> Pressure:
    """Judge one sample.

    Units: *cpu_percent* of all CPUs together; *cpu_pressure_percent* is PSI cpu some avg60. None where the node can't tell.
    """
    readings = before.readings
    if cpu_percent is not None:
        readings = (*readings, round(cpu_percent))[-READINGS:]
    waits = cpu_pressure_percent is not None and cpu_pressure_percent > limits.pressure_percent
    # The newest must be busy itself: old readings alone would keep up a pressure that is over.
    busy = cpu_percent is not None and round(cpu_percent) > limits.busy_percent < _second_largest(readings)
    pressed_at = max(at, before.pressed_at or at) if waits or busy else before.pressed_at
    return Pressure(readings, pressed_at)


def is_pressed(pressed_at: datetime | None, now: datetime, limits: AllocationSettings) -> bool:
    """Tell whether overcommit is off: pressure was seen within the hold time."""
    return pressed_at is not None and now < pressed_at + timedelta(seconds=limits.pressure_hold_seconds)


def _second_largest(readings: tuple[int, ...]) -> int:
    """Give the 95th percentile of 20 readings by nearest rank; of fewer too, so that one alone never counts."""
    return sorted(readings)[-2] if len(readings) > 1 else 0
