# SPDX-License-Identifier: GPL-3.0-or-later
"""What endpoints take: the running service, paths, queries, cursors, entity tags."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from node_manager.declarations import NODE_ID_PATTERN
from node_manager.parts import Parts
from node_manager.problems import InvalidInputError, StaleGenerationError

MAX_PAGE = 1000
ModelT = TypeVar("ModelT", bound=BaseModel)


async def _parts(request: Request) -> Parts:
    # async although it waits for nothing: the framework would send a plain function through the thread pool.
    parts: Parts = request.app.state.parts
    return parts


PartsDependency = Annotated[Parts, Depends(_parts)]
NodeIdPath = Annotated[
    str, Path(max_length=253, pattern=NODE_ID_PATTERN, description="The node's id", examples=["gw-7"])
]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Largest number of items")]
Cursor = Annotated[
    str | None, Query(max_length=512, description="next_cursor of the page before; left out: the first page")
]
IfMatch = Annotated[
    str | None, Header(description="The ETag that the change is based on; another one on the node answers 412")
]
Wait = Annotated[float, Query(ge=0, le=3600, description="Seconds to wait for the job's result; 0 answers at once")]
MaxAge = Annotated[
    float | None, Query(ge=0, le=86400, description="Look afresh where the newest is older than these seconds")
]


def read_query(request: Request, model: type[ModelT]) -> ModelT:
    """Read all query parameters into *model*; one that it lists may be repeated.

    The framework would do the same, but looks at each parameter's type anew for every request, which costs more than the
    rest of a list's answer together.
    Errors: RequestValidationError.
    """
    given = request.query_params
    raw = {key: given.getlist(key) if _is_list(model, key) else given[key] for key in given}
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = [{**item, "loc": ("query", *item["loc"])} for item in error.errors(include_url=False)]
        raise RequestValidationError(found) from None


def describe_query(model: type[BaseModel]) -> dict[str, Any]:
    """Describe the fields of *model* as query parameters, for openapi_extra."""
    properties = model.model_json_schema(ref_template="#/components/schemas/{model}")["properties"]
    return {
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": schema.get("description", ""),
                "schema": {key: value for key, value in schema.items() if key != "description"},
            }
            for name, schema in properties.items()
        ]
    }


def _is_list(model: type[BaseModel], key: str) -> bool:
    field = model.model_fields.get(key)
    return field is not None and field.default_factory is list


def read_cursor(cursor: str | None) -> str | None:
    """Unwrap a cursor.

    Errors: InvalidInputError if it is not one of ours.
    """
    if cursor is None:
        return None
    try:
        text = base64.b64decode(cursor, altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        text = "\0"
    if not text.isprintable():
        raise InvalidInputError("cursor", "expected the next_cursor of an earlier page")
    return text


def read_number_cursor(cursor: str | None) -> int | None:
    """Unwrap a cursor that holds a number."""
    text = read_cursor(cursor)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise InvalidInputError("cursor", "expected the next_cursor of an earlier page")
    return int(text)


def read_if_match(value: str | None) -> int | None:
    """Read the generation that a change is based on; None for any.

    Errors: StaleGenerationError if it is no entity tag of ours: nothing can match it.
    """
    if value is None or value.strip() == "*":
        return None
    text = value.strip().removeprefix('"').removesuffix('"')
    if not text.isdecimal() or len(text) > 18:
        raise StaleGenerationError(f'If-Match: expected the node\'s ETag, such as "3", got {value[:40]!r}')
    return int(text)
