# SPDX-License-Identifier: GPL-3.0-or-later
"""Make anything fit for the log: no secrets, no control characters, bounded, and such that JSON can hold it.

Pure. What is no plain data is shown as its repr().
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus

REDACTED = "[redacted]"
MAX_TEXT = 8_000
_MAX_KEY = 100
_MAX_ITEMS = 100
_MAX_REMEMBERED = 1000
_MAX_DEPTH = 6
# Of one line, over all its values.
_MAX_LINE = 32_000
# What is longer is cut before it is searched; what the cut halves is never shown.
_MAX_SEARCHED = 100_000
_MAX_INT_BITS = 256
_FIRST = ("timestamp", "level", "event")
# Shorter ones stand by chance in any text.
_MIN_KNOWN = 4

_WORDS = (
    "password|passwd|passphrase|pwd|secret|token(?!izer)|api[_-]?key|access[_-]?key|private[_-]?key|authorization|cookie"
    "|sasl_"
)
# Names that end so say where a secret is or who has it, and not what it is.
_HARMLESS_ENDS = (
    "file", "path", "_id", "_ids", "_name", "_names", "_count", "_type", "_seconds", "credential", "credentials",
)  # fmt: skip
_SECRET_KEY = re.compile(_WORDS, re.IGNORECASE)
_HARMLESS_KEY = re.compile(rf"(?:{'|'.join(_HARMLESS_ENDS)})$", re.IGNORECASE)
_REST_OF_NAME = r"[\w-]{0,40}+" + "".join(f"(?<!{end})" for end in _HARMLESS_ENDS)
_EQUALS = r"(?P<quoted>\\{0,31}[\"'])?\s{0,4}[=:]\s{0,4}"
# In JSON within JSON quotes have backslashes, as many at the end as at the beginning. An unfinished one goes to the end.
_QUOTED = r"b?(?P<slashes>\\{0,31})(?P<quote>[\"']).*?(?:(?<!\\)(?P=slashes)(?P=quote)|\Z)"
# What a colon follows that is not before a port.
_USER = re.compile(r"://[^:/@\[]*:(?!\d{1,5}[/?#\"'\\])")

_Replacement = str | Callable[[re.Match[str]], str]


def _pattern(text: str, replacement: _Replacement) -> tuple[re.Pattern[str], _Replacement]:
    return re.compile(text, re.IGNORECASE | re.DOTALL), replacement


def _without_password(word: re.Match[str]) -> str:
    """Hide the password of a URL, up to the last @ of the word: it may have one that nobody escaped."""
    text = word.group()
    end = text.rfind("@")
    user = _USER.search(text) if end > 0 else None
    return text if user is None or user.end() > end else f"{text[: user.end()]}{REDACTED}{text[end:]}"


def _without_credentials(found: re.Match[str]) -> str:
    """Hide what stands behind the word Basic where it is a name and a password, and no word of a sentence."""
    text = found["word"].rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    text = text[: len(text) - (len(text) % 4 == 1)]
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return found.group()
    is_text = sum(32 <= byte < 127 for byte in raw) >= len(raw) * 0.75
    return f"{found['name']} {REDACTED}" if is_text and b":" in raw else found.group()


# The time that each takes grows with the text and no faster: repetitions are bounded, or take all that they have looked at.
_PATTERNS = (
    # An unfinished one too: texts are cut.
    _pattern(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]{0,40}-----|\Z)", REDACTED),
    _pattern(r"://\S+", _without_password),
    _pattern(r"\bnm_[A-Z0-9_-]{16,}", REDACTED),
    _pattern(r"\b(bearer)\s{1,8}[^\s\"',]+", rf"\1 {REDACTED}"),
    _pattern(r"\b(?P<name>basic)\s{1,8}(?P<word>[A-Z0-9+/=_-]{8,})", _without_credentials),
    # Several values in one, parted by spaces.
    _pattern(
        rf"(?P<key>(?:authorization|cookie){_REST_OF_NAME}{_EQUALS})"
        rf"(?:{_QUOTED}(?(quoted)|[^\r\n]*)|[^\r\n]+)",
        rf"\g<key>{REDACTED}",
    ),
    _pattern(rf"(?P<key>(?:{_WORDS}){_REST_OF_NAME}{_EQUALS})(?:{_QUOTED}|\S+)", rf"\g<key>{REDACTED}"),
)
# What each of the patterns has in it: nearly all texts are let through after one search instead of seven.
_SUSPICIOUS = re.compile(rf"://|-----BEGIN|nm_|bearer|basic|{_WORDS}", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_CONTROL_BUT_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Redactor:
    """Cleans the values of log lines; *known* are secrets that must not appear wherever they stand."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        spelled = {form for text in known for form in _spellings(text)}
        longest_first = sorted((text for text in spelled if len(text) >= _MIN_KNOWN), key=len, reverse=True)
        # Nearly all lines have the same few keys.
        self._keys: dict[str, str] = {}
        self._known = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def line(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """Clean all values of a line."""
        left = _Room(_MAX_LINE)
        # Whatever else there is, what it is about must fit.
        values = {**{key: values[key] for key in _FIRST if key in values}, **values}
        return {self._key(key): self._value(key, value, left, 0) for key, value in list(values.items())[:_MAX_ITEMS]}

    def text(self, text: str, limit: int = MAX_TEXT, *, lines: bool = False) -> str:
        """Clean one text; *lines* lets it keep its line breaks."""
        if len(text) > _MAX_SEARCHED:
            head = text[:_MAX_SEARCHED].rsplit(None, 1)[0]
            text = f"{head} ... ({len(text) - len(head)} characters left out)"
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        if _SUSPICIOUS.search(text) is not None:
            for pattern, replacement in _PATTERNS:
                text = pattern.sub(replacement, text)
        if len(text) > limit:
            # The end of a traceback says what happened, the beginning of a message what it is about.
            kept = max(0, limit // 2 - 20)
            text = f"{text[:kept]} ... ({len(text) - 2 * kept} characters left out) ... {text[len(text) - kept :]}"
        if text.isascii() and text.isprintable():
            return text
        return (_CONTROL_BUT_LINES if lines else _CONTROL).sub(_escape, text)

    def _key(self, key: Any) -> str:
        if not isinstance(key, str) or len(key) > _MAX_KEY:
            return self.text(_shown(key), _MAX_KEY)
        found = self._keys.get(key)
        if found is None:
            if len(self._keys) >= _MAX_REMEMBERED:
                self._keys.clear()
            found = self._keys[key] = self.text(key, _MAX_KEY)
        return found

    def _value(self, key: Any, value: Any, left: _Room, depth: int) -> Any:
        if isinstance(key, str) and value is not None and not isinstance(value, bool) and _names_secret(key[:_MAX_KEY]):
            return REDACTED
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int) and not isinstance(value, str):
            return int(value) if value.bit_length() <= _MAX_INT_BITS else f"an integer of {value.bit_length()} bits"
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else repr(float(value))
        if isinstance(value, str):
            return left.take(self.text(str.__str__(value), left.limit, lines=key in {"exception", "stack"}))
        if depth >= _MAX_DEPTH:
            return "..."
        if isinstance(value, Mapping):
            return _safely(value, lambda: self._mapping(value, left, depth))
        if isinstance(value, list | tuple | set | frozenset):
            return _safely(value, lambda: self._items(value, left, depth))
        return left.take(self.text(_shown(value), left.limit))

    def _mapping(self, value: Mapping[Any, Any], left: _Room, depth: int) -> dict[str, Any]:
        found = {}
        for number, (key, item) in enumerate(value.items()):
            if number == _MAX_ITEMS or left.limit == 0:
                found["..."] = f"{len(value) - number} more"
                break
            found[left.take(self._key(key))] = self._value(key, item, left, depth + 1)
        return found

    def _items(self, value: Iterable[Any], left: _Room, depth: int) -> list[Any]:
        items = list(value)
        found = []
        for number, item in enumerate(items):
            if number == _MAX_ITEMS or left.limit == 0:
                found.append(f"... {len(items) - number} more")
                break
            found.append(self._value(None, item, left, depth + 1))
        return found


class _Room:
    """What a line may still take."""

    def __init__(self, characters: int) -> None:
        self._left = characters

    @property
    def limit(self) -> int:
        return min(MAX_TEXT, max(0, self._left))

    def take(self, text: str) -> str:
        self._left -= len(text) + 1
        return text


def _spellings(text: str) -> Iterable[str]:
    """Give what a text may look like within URLs, within repr() of texts and bytes, and within JSON, also twice."""
    yield text
    raw = text.encode("utf-8", "backslashreplace")
    for safe in ("", "/", " +"):
        yield quote(raw, safe=safe)
    yield quote_plus(raw)
    # Which quotes are escaped depends on what else is in the text.
    for beside in ("", '"', "'\""):
        yield repr(beside + text)[1:-1].removeprefix(repr(beside)[1:-1])
        yield repr(beside.encode() + raw)[2:-1].removeprefix(repr(beside.encode())[2:-1])
    for plain in (False, True):
        once = json.dumps(text, ensure_ascii=plain)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=plain)[1:-1]


@lru_cache(maxsize=_MAX_REMEMBERED)
def _names_secret(key: str) -> bool:
    return _SECRET_KEY.search(key) is not None and _HARMLESS_KEY.search(key) is None


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)[:_MAX_SEARCHED].decode("utf-8", "backslashreplace")
    return str(_safely(value, lambda: repr(value)))


def _safely(value: Any, show: Callable[[], Any]) -> Any:
    try:
        return show()
    except Exception as error:  # whatever it is, the line it stands in must be written
        return f"<{type(value).__name__} that can't be shown: {type(error).__name__}>"


def _escape(found: re.Match[str]) -> str:
    character = found.group()
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character) or (
        f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
    )
