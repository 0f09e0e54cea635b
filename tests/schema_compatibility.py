# SPDX-License-Identifier: GPL-3.0-or-later
"""Tell what of a new JSON Schema breaks those who hold to the old one; docs/events.md has the rules in words.

What is sent must stay within what receivers were promised, what is taken must go on including what senders were allowed. Both
ask whether all that one schema lets through is let through by the other. Knows the keywords that our schemas use; one that it
doesn't know is an error, so that nothing passes unseen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

Schema = Mapping[str, Any]

_SILENT = {"$schema", "$id", "$defs", "title", "description", "examples", "default"}
_LOWEST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_HIGHEST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_SAME = ("pattern", "format", "uniqueItems", "propertyNames", "patternProperties", "discriminator", "contentEncoding")
_KNOWN = {
    *_SILENT,
    *_LOWEST,
    *_HIGHEST,
    *_SAME,
    "$ref",
    "additionalProperties",
    "anyOf",
    "const",
    "enum",
    "items",
    "oneOf",
    "properties",
    "required",
    "type",
}


class Direction(Enum):
    """Who holds to a schema: those who receive what we send, or those who send what we take."""

    SENT = "sent"
    TAKEN = "taken"


def breaks(old: Schema, new: Schema, direction: Direction) -> list[str]:
    """List what of *new* breaks those who know *old*; empty: nothing does."""
    if direction is Direction.SENT:
        return list(_Comparison(new, old, direction).schemas(new, old, ""))
    return list(_Comparison(old, new, direction).schemas(old, new, ""))


class _Comparison:
    """Looks for what *inner* lets through and *outer* does not."""

    def __init__(self, inner: Schema, outer: Schema, direction: Direction) -> None:
        self._inner = inner
        self._outer = outer
        self._direction = direction

    def schemas(self, inner: Schema, outer: Schema, path: str) -> Iterator[str]:
        """Compare two schemas that stand in the same place."""
        if self._direction is Direction.TAKEN and inner.get("default") != outer.get("default"):
            yield f"{path}: another default"
        choices = list(_alternatives(outer, self._outer))
        for option in _alternatives(inner, self._inner):
            found = [list(self._one(option, choice, path)) for choice in choices if _fits(option, choice)]
            if not found:
                yield f"{path}: {self._words()} {option.get('type', option.get('const', 'anything'))}"
            else:
                yield from min(found, key=len)

    def _one(self, inner: Schema, outer: Schema, path: str) -> Iterator[str]:
        """Compare two schemas without alternatives, of types that fit."""
        allowed, given = _values(outer), _values(inner)
        if allowed is not None and (given is None or not given <= allowed):
            more = "any" if given is None else ", ".join(sorted(map(str, given - allowed)))
            yield f"{path}: {self._words()} {more}"
        if given is None:
            yield from self._bounds(inner, outer, path)
        yield from self._objects(inner, outer, path)
        if "items" in outer:
            yield from self.schemas(inner.get("items", {}), outer["items"], f"{path}[]")

    def _bounds(self, inner: Schema, outer: Schema, path: str) -> Iterator[str]:
        for keyword in _LOWEST:
            if keyword in outer and inner.get(keyword, float("-inf")) < outer[keyword]:
                yield f"{path}: another {keyword}"
        for keyword in _HIGHEST:
            if keyword in outer and inner.get(keyword, float("inf")) > outer[keyword]:
                yield f"{path}: another {keyword}"
        for keyword in _SAME:
            if keyword in outer and inner.get(keyword) != outer[keyword]:
                yield f"{path}: another {keyword}"

    def _objects(self, inner: Schema, outer: Schema, path: str) -> Iterator[str]:
        ours, theirs = inner.get("properties", {}), outer.get("properties", {})
        for name in sorted(set(outer.get("required", ())) - set(inner.get("required", ()))):
            yield f"{path}.{name}: {'no longer always there' if self._direction is Direction.SENT else 'required now'}"
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            if name in ours and name in theirs:
                yield from self.schemas(ours[name], theirs[name], f"{path}.{name}")
            elif name in ours and outer.get("additionalProperties") is False:
                yield f"{path}.{name}: not taken any more"
            elif name in theirs and self._direction is Direction.SENT:
                yield f"{path}.{name}: gone"
        rest, bound = inner.get("additionalProperties", True), outer.get("additionalProperties", True)
        if isinstance(bound, dict):
            # An open object is not one whose values are bound.
            yield from self.schemas({} if rest is True else rest or {"enum": []}, bound, f"{path}.*")
        elif bound is False and rest is not False and _is_object(inner):
            yield f"{path}: closed now"

    def _words(self) -> str:
        return "may be" if self._direction is Direction.SENT else "may not be any more:"


def _alternatives(schema: Schema, root: Schema) -> Iterator[Schema]:
    """Give the alternatives that a schema consists of, references followed."""
    unknown = set(schema) - _KNOWN
    if unknown:
        raise NotImplementedError(f"not known how to compare {', '.join(sorted(unknown))}")
    if "$ref" in schema:
        yield from _alternatives(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    elif "anyOf" in schema or "oneOf" in schema:
        for option in schema.get("anyOf") or schema["oneOf"]:
            yield from _alternatives(option, root)
    else:
        yield schema


def _fits(inner: Schema, outer: Schema) -> bool:
    """Tell whether what is of one type is of the other too."""
    ours, theirs = inner.get("type"), outer.get("type")
    if theirs is None:
        return _values(outer) is None or ours is None or _values(inner) is not None
    return ours == theirs or (ours, theirs) == ("integer", "number")


def _is_object(schema: Schema) -> bool:
    return schema.get("type") in {None, "object"}


def _values(schema: Schema) -> set[Any] | None:
    """Give the values that are let through one by one; None: they are not listed."""
    if "const" in schema:
        return {schema["const"]}
    return set(schema["enum"]) if "enum" in schema else None
