# SPDX-License-Identifier: GPL-3.0-or-later
"""Read what is said to have been seen: from data that nobody vouches for to a shape, and to the JSON that is stored.

Pure. Text in JSON goes straight through the validator of the shapes, which bounds all that it lets pass; what that refuses
is cut to size value by value, as data is that comes in parts, before it is refused for good.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from node_manager.domain import ObservationKind, TooLargeError, clean
from node_manager.shapes import Contact, Facts, Report, Sample, Verdict
from node_manager.store.documents import JsonText

# The bound of clean(), for text that isn't taken apart.
MAX_BYTES = 1024 * 1024
_SHAPES: dict[ObservationKind, type[BaseModel]] = {
    ObservationKind.FACTS: Facts,
    ObservationKind.SAMPLE: Sample,
    ObservationKind.REPORT: Report,
    ObservationKind.CONTACT: Contact,
    ObservationKind.VERDICT: Verdict,
}
# No text column of PostgreSQL holds it; the validator lets it pass.
_ESCAPED_NUL = b"\\u0000"
_MAX_MESSAGE_CHARACTERS = 4000


class UnusableError(ValueError):
    """The data fits no shape; the text says where and why."""


class Content(NamedTuple):
    """What was seen, and the same as it is stored: without what no shape knows."""

    shape: BaseModel
    document: JsonText


def parse(kind: ObservationKind, data: Any) -> Content:
    """Read the data of one observation, as values or as bytes of JSON.

    Errors: UnusableError.
    """
    shape = _SHAPES[kind]
    if isinstance(data, bytes):
        if len(data) > MAX_BYTES:
            raise UnusableError(f"larger than {MAX_BYTES} bytes")
        if _ESCAPED_NUL not in data:
            try:
                return _content(shape, shape.__pydantic_validator__.validate_json(data))
            except ValidationError:
                # Too long a text or NaN may be all that is wrong with it.
                pass
        data = _read(data)
    try:
        return _content(shape, shape.__pydantic_validator__.validate_python(clean(data)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UnusableError(f"{place}: {first['msg']}"[:_MAX_MESSAGE_CHARACTERS]) from None
    except TooLargeError as error:
        raise UnusableError(str(error)) from None


def _content(shape: type[BaseModel], found: BaseModel) -> Content:
    return Content(found, JsonText(shape.__pydantic_serializer__.to_json(found, by_alias=True).decode()))


def _read(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        # A node's own bytes may be in the text, and any length.
        raise UnusableError(f"not JSON: {type(error).__name__}") from None
