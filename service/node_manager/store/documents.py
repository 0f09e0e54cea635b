# SPDX-License-Identifier: GPL-3.0-or-later
"""JSON columns: how documents become text and are read again.

Pure. Written and read outside of the standard library, which takes three times as long: a tenth of what placing costs.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json


class JsonText(str):
    """A document that is JSON already: a column takes it over as it is."""

    __slots__ = ()


def write_json(value: Any) -> str:
    """Write a document."""
    if isinstance(value, JsonText):
        return str(value)
    try:
        return to_json(value).decode()
    except PydanticSerializationError:
        # Half a surrogate is text to the one and not to the other.
        return json.dumps(value)


def read_json(text: str | bytes) -> Any:
    """Read a document.

    Errors: ValueError if it isn't JSON; RecursionError if it is too deep.
    """
    try:
        return from_json(text)
    except ValueError:
        return json.loads(text)
