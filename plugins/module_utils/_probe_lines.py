# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the loop says: JSON lines, each bounded, and at most one of a kind waiting for a reader that is slow.

Standard library only; opens and writes nothing. Runs on nodes with Python 3.8.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Deque, Dict, List, Mapping, Optional, Tuple

from ._bounds import MAX_ITEMS, MAX_STRING_BYTES
from ._probe import cleaned_sample, without_containers

_MAX_WAITING_LINES = 64
_MAX_MESSAGE_CHARACTERS = 300
_MAX_PLAIN_BYTES = 65536
# So many digits may be a number beyond 64 bits. A regular expression for them takes a tenth of all that a sample takes.
_LONG_NUMBER = b"0" * 19
_DIGITS_AS_ZEROES = bytes.maketrans(b"123456789", b"000000000")


class Outbox:
    """Lines on their way out.

    Any thread hands in; one at a time takes. While the reader doesn't read, a newer line takes the place of an older one of
    the same kind: the newest sample is the one that counts, and memory stays bounded.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._handed_in: Deque[Tuple[Tuple[str, str], bytes]] = deque()
        self._waiting: Dict[Tuple[str, str], bytes] = {}

    def say(self, kind: str, command_id: Optional[str] = None, **more: object) -> None:
        """Hand in a short line."""
        self._handed_in.append(((kind, command_id or ""), _line(kind, command_id, more)))

    def fail(self, message: str, command_id: Optional[str] = None) -> None:
        """Hand in an error line."""
        # ASCII: an escaped character takes up to 12 bytes, and error lines must fit whatever the limit is.
        text = message[:_MAX_MESSAGE_CHARACTERS].encode("ascii", "replace").decode("ascii")
        self._handed_in.append((("error", text), _line("error", command_id, {"message": text})))

    def fail_because(self, what: str, error: Exception, command_id: Optional[str] = None) -> None:
        """Hand in an error line about an exception."""
        self.fail("{}: {}: {}".format(what, type(error).__name__, error), command_id)

    def tell(self, kind: str, data: Mapping[str, object], command_id: Optional[str] = None) -> None:
        """Hand in facts, a sample or a report; what makes its line too long is left out, or all of it."""
        self._tell_line(kind, data, _line(kind, command_id, {"data": data}), command_id)

    def tell_sample(self, sample: Dict[str, object], command_id: Optional[str] = None) -> None:
        """Hand in a sample that is not cleaned. Cleaning takes as long as reading most of it, and nearly none needs it."""
        try:
            line = _line("sample", command_id, {"data": sample})
        except (ValueError, TypeError):
            line = b""
        if line and _is_plain(line):
            self._tell_line("sample", sample, line, command_id)
        else:
            self.tell("sample", cleaned_sample(sample), command_id)

    def _tell_line(self, kind: str, data: Mapping[str, object], line: bytes, command_id: Optional[str]) -> None:
        if len(line) > self._max_line_bytes and _count_containers(data):
            reason = "{} bytes, the limit is {}".format(len(line), self._max_line_bytes)
            self.fail("{}: its {} containers left out, {}".format(kind, _count_containers(data), reason), command_id)
            line = _line(kind, command_id, {"data": without_containers(data, reason)})
        if len(line) > self._max_line_bytes:
            size = "{} bytes, the limit is {}".format(len(line), self._max_line_bytes)
            self.fail("{}: not sent, its line has {}".format(kind, size), command_id)
        else:
            self._handed_in.append(((kind, command_id or ""), line))

    def take(self) -> Optional[bytes]:
        """Give the next line to write."""
        self._gather()
        for key in self._waiting:
            return self._waiting.pop(key)
        return None

    @property
    def empty(self) -> bool:
        """Tell whether nothing waits."""
        self._gather()
        return not self._waiting

    def _gather(self) -> None:
        while self._handed_in:
            key, line = self._handed_in.popleft()
            if len(self._waiting) >= _MAX_WAITING_LINES and key not in self._waiting:
                key, line = ("error", "lost"), _line("error", None, {"message": "lines were lost, nobody read them"})
            self._waiting[key] = line


def _line(kind: str, command_id: Optional[str], more: Mapping[str, object]) -> bytes:
    head = {"kind": kind} if command_id is None else {"kind": kind, "id": command_id}
    # ensure_ascii, the default, keeps every other line separator out of the line too.
    return _encode({**head, **more}).encode("ascii") + b"\n"


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _is_plain(line: bytes) -> bool:
    """Tell, for most samples, that `clean` would change nothing: no long string, no long list, nothing doubtful.

    How deep they are is not looked at: it is the same for all.
    """
    # What is escaped is no ASCII, or controls something, or would hide where a string ends.
    if len(line) > _MAX_PLAIN_BYTES or b"\\" in line or line.count(b",") >= MAX_ITEMS:
        return False
    if _LONG_NUMBER in line.translate(_DIGITS_AS_ZEROES):
        return False
    return len(line) <= MAX_STRING_BYTES or max(map(len, line.split(b'"'))) <= MAX_STRING_BYTES


def _count_containers(data: Mapping[str, object]) -> int:
    part = data.get("containers")
    items: List[object] = part["items"] if isinstance(part, dict) and isinstance(part.get("items"), list) else []
    return len(items)
