# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How much time a check has left.

Imports the standard library only. Runs on nodes with Python 3.8.
"""

from __future__ import annotations

import time


class OutOfTimeError(Exception):
    """The deadline passed before the answer came.

    Not an OSError, as socket.timeout is: a clause that explains failed system calls would catch it too.
    """


def time_left(deadline: float) -> float:
    """Tell the seconds until *deadline*, a time.monotonic() value.

    Errors: OutOfTimeError if none are left.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise OutOfTimeError
    return left
