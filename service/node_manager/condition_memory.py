# SPDX-License-Identifier: GPL-3.0-or-later
"""What the rules of node conditions share: short names for a bounded memory, and ages on a clock that may be set back.

Pure: standard library only.
"""

from __future__ import annotations

import re
import zlib

_PLAIN_NAME = re.compile(r"[\w./@:+-]{1,32}", re.ASCII)
_NOT_PLAIN = re.compile(r"[^\w./@:+-]", re.ASCII)
_HEAD_CHARACTERS = 23
# Managers with clocks a little apart take turns; what lies further ahead was stamped by a clock that was wrong.
_CLOCK_TOLERANCE_SECONDS = 60


def key_of(name: str) -> str:
    """Give a name of at most 32 plain characters; a longer or odd one is cut and ends in its checksum."""
    if _PLAIN_NAME.fullmatch(name):
        return name
    return f"{_NOT_PLAIN.sub('', name[:48])[:_HEAD_CHARACTERS]}~{zlib.crc32(name.encode('utf-8', 'replace')):08x}"


def is_within(stamp: float, now: float, span_seconds: float) -> bool:
    """Tell whether *stamp* lies at most *span_seconds* back; what lies in the future doesn't."""
    return -_CLOCK_TOLERANCE_SECONDS <= now - stamp <= span_seconds
