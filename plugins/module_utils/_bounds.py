# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Cap what a node says before anything else looks at it.

Pure: imports the standard library only. Runs on nodes with Python 3.8, and at the service's door.
"""

from __future__ import annotations

import math
import re
from typing import Dict, List, Union

JsonValue = Union[None, bool, int, float, str, List["JsonValue"], Dict[str, "JsonValue"]]

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 12
MAX_ITEMS = 1024
MAX_STRING_BYTES = 4096

# Integers beyond 64 bits overflow every column and most JSON readers; Python even refuses to print very long ones.
_INTEGER_LIMIT = 2**63
_NUMBERS = frozenset((float, int))
# Lone surrogates can't be encoded as UTF-8, and PostgreSQL stores no NUL in text.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class TooLargeError(ValueError):
    """The value is larger than the total byte cap, after its strings, lists and depth were cut."""


def clean(
    value: object,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_items: int = MAX_ITEMS,
    max_string_bytes: int = MAX_STRING_BYTES,
) -> JsonValue:
    """Return a copy of *value* that every JSON writer and every database accepts.

    Shapes: bytes become text; bytes that are not UTF-8, lone surrogates and NUL become U+FFFD; NaN, infinities and
        integers beyond 64 bits become null; strings are cut at *max_string_bytes* of UTF-8, lists and objects at
        *max_items*, and what lies deeper than *max_depth* becomes null, so a cycle ends there too. Anything unknown
        becomes null.
    Units: *max_bytes* bounds about the size of the compact JSON text, taking 8 bytes for any number and 4 around a
        string.
    Errors: TooLargeError as soon as that count passes *max_bytes*.
    """
    return _Cleaner(max_bytes, max_items, max_string_bytes).clean(value, max_depth)


class _Cleaner:
    def __init__(self, max_bytes: int, max_items: int, max_string_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_items = max_items
        self._max_string_bytes = max_string_bytes
        self._used_bytes = 0

    def clean(self, value: object, depth: int) -> JsonValue:
        # Exact types first: this and the loop of _object run over every number of every sample, on small boards.
        kind = type(value)
        if kind is float or kind is int or kind is bool or value is None:
            self._charge(8)
            return self._number(value)
        if isinstance(value, (str, bytes, bytearray)):
            return self._text(value)
        if isinstance(value, dict) and depth > 0:
            return self._object(value, depth)
        if isinstance(value, (list, tuple, set, frozenset)) and depth > 0:
            self._charge(2)
            items: List[JsonValue] = []
            for item in value:
                if len(items) >= self._max_items:
                    break
                self._charge(1)
                items.append(self.clean(item, depth - 1))
            return items
        self._charge(8)
        return self._number(value)

    def _object(self, value: Dict[object, object], depth: int) -> JsonValue:
        self._charge(2)
        cleaned: Dict[str, JsonValue] = {}
        for key, item in value.items():
            if len(cleaned) >= self._max_items:
                break
            if key.__class__ is str and key.isidentifier() and key.isascii() and len(key) <= self._max_string_bytes:
                name = key
                self._used_bytes += len(key) + 4
            elif isinstance(key, (str, bytes)):
                name = self._text(key)
            elif isinstance(key, int) and -_INTEGER_LIMIT <= key < _INTEGER_LIMIT:
                name = self._text(str(int(key)))
            else:
                continue
            # NaN and the infinities fail this comparison, as they should; so do huge floats, which go the long way.
            if type(item) in _NUMBERS and -_INTEGER_LIMIT <= item < _INTEGER_LIMIT:  # type: ignore[operator]
                self._used_bytes += 8
                cleaned[name] = item  # type: ignore[assignment]
            else:
                cleaned[name] = self.clean(item, depth - 1)
        self._charge(0)
        return cleaned

    def _number(self, value: object) -> JsonValue:
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else None
        if isinstance(value, bool):
            return value
        if isinstance(value, int) and -_INTEGER_LIMIT <= value < _INTEGER_LIMIT:
            return int(value)
        return None

    def _text(self, value: Union[str, bytes, bytearray]) -> str:
        if value.__class__ is str and len(value) <= self._max_string_bytes and value.isascii() and "\x00" not in value:
            self._charge(len(value) + 4)
            return value
        # A character takes at least one byte, so this cut bounds the work on a huge string before any copy of it.
        if isinstance(value, str):
            text = str.__str__(value[: self._max_string_bytes])
        else:
            text = bytes(value[: self._max_string_bytes + 4]).decode("utf-8", "replace")
        text = _UNSTORABLE.sub("\ufffd", text)
        encoded = text.encode("utf-8")
        if len(encoded) > self._max_string_bytes:
            encoded = encoded[: self._max_string_bytes]
            text = encoded.decode("utf-8", "ignore")
        self._charge(len(encoded) + 4)
        return text

    def _charge(self, size_bytes: int) -> None:
        self._used_bytes += size_bytes
        if self._used_bytes > self._max_bytes:
            raise TooLargeError("larger than {} bytes".format(self._max_bytes))
