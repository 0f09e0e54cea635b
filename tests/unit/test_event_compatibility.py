# SPDX-License-Identifier: GPL-3.0-or-later
"""What was published stays as it was promised: the schemas of today against those in tests/fixtures/published_events."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from node_manager import event_documents
from node_manager.command_contracts import COMMANDS
from node_manager.event_contracts import ALL
from schema_compatibility import Direction, breaks

PUBLISHED = Path(__file__).resolve().parents[1] / "fixtures" / "published_events"
SUFFIX = ".v1.schema.json"
NAMES = sorted(path.name.removesuffix(SUFFIX) for path in PUBLISHED.glob(f"*{SUFFIX}"))


def published(name: str) -> dict[str, Any]:
    """Read a schema as it was published."""
    found: dict[str, Any] = json.loads((PUBLISHED / f"{name}{SUFFIX}").read_text("utf-8"))
    return found


def schema(**properties: Any) -> dict[str, Any]:
    """Make an open schema of an object that has all these properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def test_each_type_is_published() -> None:
    assert sorted([*ALL, *COMMANDS]) == NAMES, (
        "copy a new type's schema from docs/events to tests/fixtures/published_events"
    )


@pytest.mark.parametrize("name", ALL)
def test_event_keeps_what_was_published(name: str) -> None:
    found = breaks(published(name), event_documents.schema_of(name), Direction.SENT)

    assert found == [], f"{name} needs a v2 beside v1 for that; see docs/events.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_command_keeps_what_was_published(name: str) -> None:
    found = breaks(published(name), event_documents.command_schema_of(name), Direction.TAKEN)

    assert found == [], f"{name} needs a v2 beside v1 for that; see docs/commands.md"


TEXT, NUMBER, WHOLE, NULL = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"type": "null"}
A, AB = {"type": "string", "enum": ["a"]}, {"type": "string", "enum": ["a", "b"]}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], list[str]]] = {
    # Old, new, what breaks receivers, what breaks senders.
    "same": (schema(a=TEXT), schema(a=TEXT), [], []),
    "field added": (
        schema(a=TEXT),
        schema(a=TEXT, b=TEXT),
        [],
        [".b: required now"],
    ),
    "optional field added": (
        schema(a=TEXT),
        {**schema(a=TEXT, b=TEXT), "required": ["a"]},
        [],
        [],
    ),
    "field removed": (
        schema(a=TEXT, b=TEXT),
        schema(a=TEXT),
        [".b: no longer always there", ".b: gone"],
        [],
    ),
    "field renamed": (
        schema(a=TEXT),
        schema(b=TEXT),
        [".a: no longer always there", ".a: gone"],
        [".b: required now"],
    ),
    "optional field removed": (
        {**schema(a=TEXT), "required": []},
        {**schema(), "required": []},
        [".a: gone"],
        [],
    ),
    "field removed from a closed object": (
        {**schema(a=TEXT, b=TEXT), "required": [], "additionalProperties": False},
        {**schema(a=TEXT), "required": [], "additionalProperties": False},
        [".b: gone"],
        [".b: not taken any more"],
    ),
    "object closed": (
        schema(a=TEXT),
        {**schema(a=TEXT), "additionalProperties": False},
        [],
        [": closed now"],
    ),
    "no longer required": (
        schema(a=TEXT),
        {**schema(a=TEXT), "required": []},
        [".a: no longer always there"],
        [],
    ),
    "null added": (schema(a=TEXT), schema(a={"anyOf": [TEXT, NULL]}), [".a: may be null"], []),
    "null removed": (
        schema(a={"anyOf": [TEXT, NULL]}),
        schema(a=TEXT),
        [],
        [".a: may not be any more: null"],
    ),
    "number widened": (schema(a=WHOLE), schema(a=NUMBER), [".a: may be number"], []),
    "number narrowed": (schema(a=NUMBER), schema(a=WHOLE), [], [".a: may not be any more: number"]),
    "type changed": (
        schema(a=WHOLE),
        schema(a=TEXT),
        [".a: may be string"],
        [".a: may not be any more: integer"],
    ),
    "word added": (schema(a=A), schema(a=AB), [".a: may be b"], []),
    "word removed": (schema(a=AB), schema(a=A), [], [".a: may not be any more: b"]),
    "words freed": (schema(a=A), schema(a=TEXT), [".a: may be any"], []),
    "words bound": (schema(a=TEXT), schema(a=A), [], [".a: may not be any more: any"]),
    "word instead of a constant": (
        schema(a={"type": "string", "const": "a"}),
        schema(a={"type": "string", "const": "b"}),
        [".a: may be b"],
        [".a: may not be any more: a"],
    ),
    "bound raised": (
        schema(a={"type": "integer", "maximum": 5}),
        schema(a={"type": "integer", "maximum": 6}),
        [".a: another maximum"],
        [],
    ),
    "bound set": (
        schema(a={"type": "string"}),
        schema(a={"type": "string", "maxLength": 6}),
        [],
        [".a: another maxLength"],
    ),
    "lower bound lowered": (
        schema(a={"type": "integer", "minimum": 1}),
        schema(a={"type": "integer", "minimum": 0}),
        [".a: another minimum"],
        [],
    ),
    "pattern changed": (
        schema(a={"type": "string", "pattern": "^a$"}),
        schema(a={"type": "string", "pattern": "^b$"}),
        [".a: another pattern"],
        [".a: another pattern"],
    ),
    "format gone": (
        schema(a={"type": "string", "format": "date-time"}),
        schema(a=TEXT),
        [".a: another format"],
        [],
    ),
    "default changed": (
        {**schema(a={"type": "boolean", "default": False}), "required": []},
        {**schema(a={"type": "boolean", "default": True}), "required": []},
        [],
        [".a: another default"],
    ),
    "in a list": (
        schema(a={"type": "array", "items": schema(b=TEXT)}),
        schema(a={"type": "array", "items": schema(b=WHOLE)}),
        [".a[].b: may be integer"],
        [".a[].b: may not be any more: string"],
    ),
    "in a map": (
        schema(a={"type": "object", "additionalProperties": WHOLE}),
        schema(a={"type": "object", "additionalProperties": NUMBER}),
        [".a.*: may be number"],
        [],
    ),
    "map opened": (
        schema(a={"type": "object", "additionalProperties": WHOLE}),
        schema(a={"type": "object"}),
        [".a.*: may be anything"],
        [],
    ),
    "behind a reference": (
        {**schema(a={"$ref": "#/$defs/B"}), "$defs": {"B": schema(b=TEXT)}},
        {**schema(a={"$ref": "#/$defs/C"}), "$defs": {"C": schema(c=TEXT, b=NULL)}},
        [".a.b: may be null"],
        [".a.c: required now", ".a.b: may not be any more: string"],
    ),
    "one of several objects": (
        schema(a={"anyOf": [WHOLE, schema(b=TEXT)]}),
        schema(a={"anyOf": [schema(), WHOLE]}),
        [".a.b: no longer always there", ".a.b: gone"],
        [],
    ),
}


@pytest.mark.parametrize(("old", "new", "for_receivers", "for_senders"), PAIRS.values(), ids=PAIRS)
def test_breaks_tells_what_breaks_whom(
    old: dict[str, Any], new: dict[str, Any], for_receivers: list[str], for_senders: list[str]
) -> None:
    assert breaks(old, new, Direction.SENT) == for_receivers
    assert breaks(old, new, Direction.TAKEN) == for_senders


def test_breaks_refuses_what_it_can_not_compare() -> None:
    with pytest.raises(NotImplementedError, match="if, then"):
        breaks(schema(a=TEXT), schema(a={"if": {}, "then": {}}), Direction.SENT)


@pytest.mark.parametrize("name", ALL)
def test_each_field_of_an_event_is_guarded(name: str) -> None:
    # Whatever is taken away from whatever schema is noticed.
    old = published(name)
    for field in old["properties"]:
        without, loose = copy.deepcopy(old), copy.deepcopy(old)
        del without["properties"][field]
        loose["properties"][field] = {}

        assert breaks(old, without, Direction.SENT) == [f".{field}: gone"]
        assert breaks(old, loose, Direction.SENT) != []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_field_of_a_command_is_guarded(name: str) -> None:
    old = published(name)
    for field in old["properties"]:
        without, strict = copy.deepcopy(old), copy.deepcopy(old)
        del without["properties"][field]
        strict["properties"][field] = {"enum": []}

        assert f".{field}: not taken any more" in breaks(old, without, Direction.TAKEN)
        assert breaks(old, strict, Direction.TAKEN) != []
