# SPDX-License-Identifier: GPL-3.0-or-later
"""The published schemas, the AsyncAPI document and the pages about them: valid, whole, and true to what is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from node_manager import event_documents
from node_manager.cloud_events import CONTENT_TYPE, attributes
from node_manager.command_contracts import COMMANDS
from node_manager.event_contracts import ALL, CONTRACTS, STATE_SNAPSHOT
from node_manager.events import EventType
from node_manager.kafka_link import Topic, topic_configurations
from node_manager.outbox import StoredEvent
from node_manager.platform_settings import KafkaSettings

CHECKOUT = Path(__file__).resolve().parents[2]
DOCS = CHECKOUT / "docs"
NOW = datetime(2026, 11, 22, 18, tzinfo=UTC)
SCHEMAS = {
    **{name: event_documents.schema_of(name) for name in ALL},
    **{name: event_documents.command_schema_of(name) for name in COMMANDS},
}
ASYNCAPI = event_documents.asyncapi()
MESSAGES: dict[str, Any] = ASYNCAPI["components"]["messages"]


def walk(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Give all objects of a document, with where they stand; not what is in examples."""
    if isinstance(node, dict):
        yield path, node
        for key, item in node.items():
            if key not in {"examples", "default"}:
                yield from walk(item, f"{path}/{key}")
    if isinstance(node, list):
        for number, item in enumerate(node):
            yield from walk(item, f"{path}/{number}")


def resolve(reference: str) -> Any:
    """Find what a reference of the AsyncAPI document names, there or in a file beside it."""
    file, _, pointer = reference.partition("#")
    found = json.loads((DOCS / file).read_text("utf-8")) if file else ASYNCAPI
    for part in pointer.split("/")[1:]:
        found = found[part]
    return found


def headers_of(event: EventType, causation_id: str | None = None) -> dict[str, str]:
    """Give the headers of an event as they are sent."""
    stored = StoredEvent(4711, "0193", event.topic, event.value, "gw-7", NOW, {}, causation_id)
    found = attributes(stored, "/node-manager")
    named = {f"ce_{name}": text for name, text in found.items() if name != "datacontenttype"}
    return {**named, "content-type": found["datacontenttype"]}


# schemas


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_valid_and_takes_its_example(name: str) -> None:
    schema = SCHEMAS[name]

    jsonschema.Draft202012Validator.check_schema(schema)
    (example,) = schema["examples"]
    jsonschema.Draft202012Validator(schema).validate(example)

    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == name
    assert schema["$id"] == f"urn:node-manager:{'command' if name in COMMANDS else 'event'}:{name}:v1"


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_describes_all_there_is(name: str) -> None:
    schema = SCHEMAS[name]
    fields = [
        (f"{path}/{key}", field)
        for path, node in walk(schema)
        if isinstance(node.get("properties"), dict)
        for key, field in node["properties"].items()
    ]
    undescribed = [
        path
        for path, field in fields
        if "description" not in field
        and "description" not in schema.get("$defs", {}).get(field.get("$ref", "").rpartition("/")[2], {})
    ]

    assert len(schema["description"]) > 15
    assert undescribed == []


@pytest.mark.parametrize("name", ALL)
def test_schema_of_an_event_is_open_and_asks_for_each_field(name: str) -> None:
    schema = SCHEMAS[name]
    (example,) = schema["examples"]
    validator = jsonschema.Draft202012Validator(schema)

    assert [path for path, node in walk(schema) if node.get("additionalProperties") is False] == []
    assert validator.is_valid({**example, "something_new": [1]})
    assert [
        field for field in example if validator.is_valid({key: example[key] for key in example if key != field})
    ] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_schema_of_a_command_is_closed(name: str) -> None:
    (example,) = SCHEMAS[name]["examples"]

    assert not jsonschema.Draft202012Validator(SCHEMAS[name]).is_valid({**example, "something_new": 1})


def test_each_schema_is_in_its_file_and_there_is_no_other() -> None:
    found = {path.name: json.loads(path.read_text("utf-8")) for path in (DOCS / "events").iterdir()}

    assert found == {f"{name}.v1.schema.json": schema for name, schema in SCHEMAS.items()}, "run: make schemas"


# AsyncAPI


def test_asyncapi_has_what_the_specification_asks_for() -> None:
    # The document was valid by the specification's own JSON Schema of 3.0.0, too large to be kept here, when this was written.
    assert set(ASYNCAPI) == {
        "asyncapi",
        "id",
        "info",
        "defaultContentType",
        "servers",
        "channels",
        "operations",
        "components",
    }
    assert ASYNCAPI["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= set(ASYNCAPI["info"])
    assert all({"host", "protocol"} <= set(server) for server in ASYNCAPI["servers"].values())
    assert {
        name for name, operation in ASYNCAPI["operations"].items() if operation["action"] not in {"send", "receive"}
    } == set()
    assert {name for name, channel in ASYNCAPI["channels"].items() if not channel["messages"]} == set()


def test_asyncapi_refers_to_what_is_there() -> None:
    references = [node["$ref"] for _, node in walk(ASYNCAPI) if "$ref" in node]

    assert len(references) > 90
    for reference in references:
        assert isinstance(resolve(reference), dict), reference


def test_asyncapi_operations_use_messages_of_their_channel() -> None:
    for operation in ASYNCAPI["operations"].values():
        for part in (operation, *([operation["reply"]] if "reply" in operation else [])):
            used = {reference["$ref"] for reference in part["messages"]}
            there = {
                f"{part['channel']['$ref']}/messages/{name}" for name in resolve(part["channel"]["$ref"])["messages"]
            }
            assert used == there


def test_asyncapi_has_each_topic_as_it_is_made() -> None:
    settings = KafkaSettings()
    found = {
        channel["address"].replace("{prefix}", channel["parameters"]["prefix"]["default"]): {
            key: ",".join(value) if isinstance(value, list) else str(value)
            for key, value in channel["bindings"]["kafka"]["topicConfiguration"].items()
        }
        for channel in ASYNCAPI["channels"].values()
    }

    assert found == topic_configurations(settings)


def test_asyncapi_has_each_type_once_on_its_topic() -> None:
    found = {name: topic for topic, channel in ASYNCAPI["channels"].items() for name in channel["messages"]}
    sent = {event.value: event.topic for event in EventType}

    assert {name: found[name] for name in sent} == sent
    assert {name: found[name] for name in COMMANDS} == dict.fromkeys(COMMANDS, Topic.COMMANDS.value)
    assert sorted(found) == sorted(MESSAGES)


@pytest.mark.parametrize("name", SCHEMAS)
def test_asyncapi_payload_is_the_schema(name: str) -> None:
    (example,) = MESSAGES[name]["examples"]

    assert resolve(MESSAGES[name]["payload"]["$ref"]) == SCHEMAS[name]
    assert [example["payload"]] == SCHEMAS[name]["examples"]
    assert MESSAGES[name]["bindings"]["kafka"]["key"]["type"] == "string"


@pytest.mark.parametrize("event", CONTRACTS)
def test_asyncapi_headers_are_those_of_the_events(event: EventType) -> None:
    validator = jsonschema.Draft202012Validator(MESSAGES[event]["headers"])
    sent = headers_of(event)

    assert validator.is_valid(sent)
    assert validator.is_valid(headers_of(event, "order-1"))
    assert set(headers_of(event, "order-1")) == set(MESSAGES[event]["headers"]["properties"])
    assert set(sent) == set(MESSAGES[event]["headers"]["required"])
    assert not validator.is_valid({**sent, "ce_type": "another"})
    assert not validator.is_valid({**sent, "ce_sequence": "x"})


def test_asyncapi_knows_the_tombstone() -> None:
    tombstone = MESSAGES["node.state.tombstone"]

    assert tombstone["payload"] == {"type": "null"}
    assert tombstone["headers"] == MESSAGES[STATE_SNAPSHOT]["headers"]
    assert tombstone["headers"]["properties"]["content-type"] == {"const": CONTENT_TYPE}


# pages


@pytest.mark.parametrize("name", ALL)
def test_events_page_has_each_type(name: str) -> None:
    page = (DOCS / "events.md").read_text("utf-8")

    assert f"| [`{name}`](events/{name}.v1.schema.json) | {SCHEMAS[name]['description']} |" in page


@pytest.mark.parametrize("topic", topic_configurations(KafkaSettings()))
def test_events_page_has_each_topic(topic: str) -> None:
    page = (DOCS / "events.md").read_text("utf-8")

    assert f"`<prefix>{topic.removeprefix(KafkaSettings().topic_prefix)}`" in page


@pytest.mark.parametrize("header", headers_of(EventType.HEALTH_CHANGED, "order-1"))
def test_events_page_has_each_header(header: str) -> None:
    assert f"`{header}`" in (DOCS / "events.md").read_text("utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_page_has_each_command_with_an_example(name: str) -> None:
    page = (DOCS / "commands.md").read_text("utf-8")

    assert f"| [`{name}`](events/{name}.v1.schema.json) |" in page
    assert f"-H ce_type={name} " in page


@pytest.mark.parametrize("header", MESSAGES[Topic.DEAD_LETTERS]["headers"]["properties"])
def test_commands_page_has_each_header_of_a_dead_letter(header: str) -> None:
    assert f"`{header}`" in (DOCS / "commands.md").read_text("utf-8")


def test_commands_page_has_examples_that_are_taken() -> None:
    lines = (DOCS / "commands.md").read_text("utf-8").splitlines()
    bodies = [json.loads(line.split("'")[1]) for line in lines if line.startswith("echo '")]
    types = [line.partition("ce_type=")[2].split()[0] for line in lines if "-H ce_type=" in line]
    (structured,) = [json.loads(line.split("'")[1]) for line in lines if line.startswith("  '{")]

    for name, data in [*zip(types, bodies, strict=True), (structured["type"], structured["data"])]:
        COMMANDS[name].model_validate_json(json.dumps(data))

    assert sorted(types) == sorted(COMMANDS)
