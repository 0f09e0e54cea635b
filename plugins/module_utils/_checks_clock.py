# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether the node's clock is synchronised.

Asks the kernel through `_probe_clock` and, where that is not permitted, timedatectl. Runs on nodes with Python 3.8.
"""

from __future__ import annotations

from typing import Callable, Optional

from ._checks_host import parse_systemctl_show, run_command
from ._checks_spec import ClockCheck, Finding
from ._probe_clock import ClockReading, read_kernel_clock
from ._words import CheckState

__all__ = ["ClockReading", "check_clock", "judge_clock", "read_kernel_clock"]


def check_clock(
    check: ClockCheck, deadline: float, read_kernel: Optional[Callable[[], ClockReading]] = None
) -> Finding:
    """See whether the clock is synchronised and near enough."""
    try:
        return judge_clock(check, (read_kernel or read_kernel_clock)())
    except OSError as error:
        refused = f"the kernel does not tell (adjtimex: {error.strerror})"
    try:
        status, output = run_command(["timedatectl", "show", "--property", "NTPSynchronized"], deadline)
    except OSError as error:
        return Finding(CheckState.UNKNOWN, f"{refused}, and timedatectl could not be run ({error.strerror})")
    answer = parse_systemctl_show(output).get("NTPSynchronized")
    if status != 0 or answer not in ("yes", "no"):
        return Finding(
            CheckState.UNKNOWN, f"{refused}, nor does timedatectl: normal in a container, drop the check there"
        )
    return judge_clock(check, ClockReading("timedatectl", answer == "yes", None, None))


def judge_clock(check: ClockCheck, reading: ClockReading) -> Finding:
    """Decide whether the clock can be relied on; the value is its offset.

    The kernel's bound on the error is told but not judged: systemd-timesyncd lets it grow past 1 s between two polls
    (2048 s at 500 ppm) while all is well.
    """
    offset = reading.offset_seconds
    if not reading.synchronised:
        message = (
            f"the clock is not synchronised (says {reading.source}): start chrony or systemd-timesyncd, see its servers"
        )
        return Finding(CheckState.FAILED, message, offset, "seconds")
    if offset is not None and abs(offset) > check.max_offset_seconds:
        message = (
            f"the clock is off by {offset:.6f} s (limit {check.max_offset_seconds:g} s, says {reading.source}): "
            "see the time servers of chrony or systemd-timesyncd"
        )
        return Finding(CheckState.FAILED, message, offset, "seconds")
    known = "" if offset is None else f", off by {offset:.6f} s"
    bound = "" if reading.max_error_seconds is None else f", error at most {reading.max_error_seconds:.3f} s"
    return Finding(
        CheckState.PASSED, f"the clock is synchronised (says {reading.source}{known}{bound})", offset, "seconds"
    )
