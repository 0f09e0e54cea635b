# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel says of its clock.

Standard library only. Runs on nodes with Python 3.8. Asks adjtimex(2), which changes nothing and starts no process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, Optional

# linux/timex.h, Linux 6.1: the kernel sets UNSYNC once an undisciplined clock may be 16 s off.
STA_UNSYNC = 0x0040
STA_NANO = 0x2000


@dataclass(frozen=True)
class ClockReading:
    """What is known about the clock; the numbers are unknown where only timedatectl answers."""

    source: str
    synchronised: bool
    offset_seconds: Optional[float]
    max_error_seconds: Optional[float]
    estimated_error_seconds: Optional[float] = None


def read_kernel_clock() -> ClockReading:
    """Ask the kernel about its clock, changing nothing.

    Units: offset in microseconds, or nanoseconds with STA_NANO; maxerror and esterror in microseconds.
    Errors: OSError where adjtimex is refused (many containers) or missing.
    Source: adjtimex(2); struct timex in linux/timex.h, whose C longs are 4 or 8 bytes as on the machine.
    """
    return _load_adjtimex()()


# Every new ctypes structure is a class that lives for ever: one is enough for a loop of samples.
@lru_cache(maxsize=1)
def _load_adjtimex() -> Callable[[], ClockReading]:
    try:
        import ctypes  # noqa: PLC0415  absent from some minimal Python builds, which may still run all the rest
    except (ImportError, MemoryError) as error:
        # MemoryError: what libffi answers where no page may be both written and run (SELinux).
        raise OSError(38, "this Python has no ctypes") from error

    class Timex(ctypes.Structure):
        _fields_ = (
            ("modes", ctypes.c_uint),
            ("offset", ctypes.c_long),
            ("freq", ctypes.c_long),
            ("maxerror", ctypes.c_long),
            ("esterror", ctypes.c_long),
            ("status", ctypes.c_int),
            # All that follows, with room to spare: 208 bytes are the whole structure on 64-bit machines.
            ("rest", ctypes.c_byte * 256),
        )

    try:
        adjtimex = ctypes.CDLL(None, use_errno=True).adjtimex
    except AttributeError as error:
        raise OSError(38, "this C library has no adjtimex") from error

    def read() -> ClockReading:
        timex = Timex()
        if adjtimex(ctypes.byref(timex)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return ClockReading(
            source="the kernel",
            synchronised=not timex.status & STA_UNSYNC,
            offset_seconds=timex.offset / (1e9 if timex.status & STA_NANO else 1e6),
            max_error_seconds=timex.maxerror / 1e6,
            estimated_error_seconds=timex.esterror / 1e6,
        )

    return read
