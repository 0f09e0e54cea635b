# SPDX-License-Identifier: GPL-3.0-or-later
"""Ids that grow with time, so that an index of them grows at its end: random ones rewrite a page of it for each row."""

from __future__ import annotations

import os
import time

_VERSION = 7 << 76
_VARIANT = 2 << 62
_RANDOM_BYTES = 10


def ordered_ids(count: int) -> list[str]:
    """Make UUIDs of this millisecond, 74 bits of each random.

    Source: RFC 9562, version 7.
    """
    milliseconds = (time.time_ns() // 1_000_000) << 80
    random = os.urandom(_RANDOM_BYTES * count)
    return [
        _text(milliseconds | _VERSION | _spread(int.from_bytes(random[at : at + _RANDOM_BYTES], "big")))
        for at in range(0, len(random), _RANDOM_BYTES)
    ]


def _spread(random: int) -> int:
    """Lay 12 and 62 bits of 80 to both sides of the variant."""
    return (random >> 68 << 64) | _VARIANT | (random & ((1 << 62) - 1))


def _text(number: int) -> str:
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
