# SPDX-License-Identifier: GPL-3.0-or-later
"""Write what the contracts say about events and commands: a JSON Schema of each, and an AsyncAPI document of all.

Reads the models and nothing else. What we send is open in its schema, for a receiver must bear new fields; what we take is
closed, as its model is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from node_manager.cloud_events import CONTENT_TYPE, SPEC_VERSION, data_schema
from node_manager.command_contracts import COMMANDS
from node_manager.event_contracts import ALL, CONTRACTS, RESOURCES_SAMPLED, STATE_SNAPSHOT
from node_manager.kafka_link import Topic, topic_configurations, topic_name
from node_manager.platform_settings import KafkaSettings

Schema = dict[str, Any]

FOLDER = "docs/events"
ASYNCAPI = "docs/asyncapi.json"

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_BINDING = "0.5.0"
_TEXT = {"type": "string"}
_TOPICS = {
    "node.lifecycle": "Nodes come and go, are declared anew, drained and taken out of service",
    "node.health": "The verdict on a node's health, lost nodes, and work that runs where it shouldn't",
    "node.state": "The newest state of each node; compacted, and without a value once a node is gone",
    "node.resources": "How much of each node's resources is used; some messages may be left out",
    "recovery": "Repairs, and the guard that holds them back",
    "allocation": "Resources are reserved, kept and released",
    "commands": "What the manager is told to do",
    "commands.answer": "What became of each command",
    "commands.dead-letter": "What came as a command and was none, as it came",
}


def documents() -> dict[str, str]:
    """Give each document's text by its path in the checkout."""
    schemas = {**{name: schema_of(name) for name in ALL}, **{name: command_schema_of(name) for name in COMMANDS}}
    return {
        **{path_of(name): _as_json(schema) for name, schema in schemas.items()},
        ASYNCAPI: _as_json(asyncapi()),
    }


def path_of(name: str) -> str:
    """Name the file of the schema of a type of event or command."""
    return f"{FOLDER}/{name}.v1.schema.json"


def schema_of(name: str) -> Schema:
    """Give the schema of the data of a type of event."""
    return _published(name, data_schema(name), ALL[name], is_open=True)


def command_schema_of(name: str) -> Schema:
    """Give the schema of the data of a type of command."""
    return _published(name, f"urn:node-manager:command:{name}:v1", COMMANDS[name], is_open=False)


def asyncapi() -> Schema:
    """Describe all topics in one document.

    Source: AsyncAPI 3.0.0; its bindings for Kafka 0.5.0.
    """
    events = _by_topic()
    return {
        "asyncapi": "3.0.0",
        "id": "urn:node-manager",
        "info": {
            "title": "Node Manager: events and commands",
            "version": "1",
            "description": "CloudEvents 1.0 in binary mode on Kafka. docs/events.md and docs/commands.md say it in words.",
            "license": {"name": "GPL-3.0-or-later", "url": "https://www.gnu.org/licenses/gpl-3.0.html"},
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {
            "kafka": {
                "host": "{broker}",
                "protocol": "kafka",
                "description": "The brokers of kafka.bootstrap_servers",
                "variables": {"broker": {"default": "localhost:9092", "description": "One broker, as host:port"}},
            }
        },
        "channels": {
            **{topic: _channel(topic, names) for topic, names in events.items()},
            Topic.COMMANDS.value: _channel(Topic.COMMANDS, list(COMMANDS)),
            Topic.DEAD_LETTERS.value: _channel(Topic.DEAD_LETTERS, [Topic.DEAD_LETTERS]),
        },
        "operations": {
            **{_operation("send", topic): _send(topic, names) for topic, names in events.items()},
            _operation("send", Topic.DEAD_LETTERS): _send(Topic.DEAD_LETTERS, [Topic.DEAD_LETTERS]),
            _operation("receive", Topic.COMMANDS): {
                "action": "receive",
                "channel": _channel_ref(Topic.COMMANDS),
                "summary": _TOPICS[Topic.COMMANDS],
                "messages": _message_refs(Topic.COMMANDS, list(COMMANDS)),
                "reply": {
                    "channel": _channel_ref("commands.answer"),
                    "messages": _message_refs("commands.answer", events["commands.answer"]),
                },
            },
        },
        "components": {
            "messages": {
                **{name: _event_message(name) for name in ALL},
                _tombstone_name(): _tombstone(),
                **{name: _command_message(name) for name in COMMANDS},
                Topic.DEAD_LETTERS.value: _dead_letter(),
            },
        },
    }


def _by_topic() -> dict[str, list[str]]:
    """Give the types of what is sent on each topic but that of dead letters."""
    found: dict[str, list[str]] = {}
    for event in CONTRACTS:
        found.setdefault(event.topic, []).append(event.value)
    found[Topic.STATE.value] = [STATE_SNAPSHOT, _tombstone_name()]
    found[Topic.RESOURCES.value] = [RESOURCES_SAMPLED]
    return found


def _tombstone_name() -> str:
    return f"{Topic.STATE}.tombstone"


def _published(name: str, identity: str, model: type[BaseModel], *, is_open: bool) -> Schema:
    found = model.model_json_schema(by_alias=True)
    _tidy(found, is_open=is_open)
    description, examples = " ".join(found.pop("description").split()), found.pop("examples")
    return {
        "$schema": _DIALECT,
        "$id": identity,
        "title": name,
        "description": description,
        **found,
        "examples": examples,
    }


def _tidy(found: Any, *, is_open: bool) -> None:
    """Take out the titles that only repeat the names, and what closes an object where it is to be open."""
    if isinstance(found, list):
        for item in found:
            _tidy(item, is_open=is_open)
    if isinstance(found, dict):
        if isinstance(found.get("title"), str):
            del found["title"]
        if is_open and found.get("additionalProperties") is False:
            del found["additionalProperties"]
        for key, item in found.items():
            if key not in {"examples", "default"}:
                _tidy(item, is_open=is_open)


def _channel(topic: str, names: list[str]) -> Schema:
    defaults = KafkaSettings()
    name = topic_name(defaults, topic)
    configured = topic_configurations(defaults)[name]
    configuration: Schema = {"cleanup.policy": configured["cleanup.policy"].split(",")}
    if "retention.ms" in configured:
        configuration["retention.ms"] = int(configured["retention.ms"])
    return {
        "address": "{prefix}" + name.removeprefix(defaults.topic_prefix),
        "description": _TOPICS[topic],
        "parameters": {"prefix": {"default": defaults.topic_prefix, "description": "kafka.topic_prefix"}},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
        "bindings": {"kafka": {"topicConfiguration": configuration, "bindingVersion": _BINDING}},
    }


def _operation(action: str, topic: str) -> str:
    return f"{action}-{topic}"


def _send(topic: str, names: list[str]) -> Schema:
    return {
        "action": "send",
        "channel": _channel_ref(topic),
        "summary": _TOPICS[topic],
        "messages": _message_refs(topic, names),
    }


def _channel_ref(topic: str) -> Schema:
    return {"$ref": f"#/channels/{topic}"}


def _message_refs(topic: str, names: list[str]) -> list[Schema]:
    return [{"$ref": f"#/channels/{topic}/messages/{name}"} for name in names]


def _event_message(name: str) -> Schema:
    return _message(name, schema_of(name), _event_headers(name), "The node, or what else the event is about")


def _event_headers(name: str) -> Schema:
    headers: Schema = {
        "ce_specversion": {"const": SPEC_VERSION},
        "ce_id": {**_TEXT, "description": "The same each time that the event is sent again"},
        "ce_source": {**_TEXT, "description": "kafka.source"},
        "ce_type": {"const": name},
        "ce_subject": {**_TEXT, "description": "The node, or what else the event is about"},
        "ce_time": {**_TEXT, "format": "date-time", "description": "When it happened"},
        "ce_dataschema": {"const": data_schema(name)},
        "ce_partitionkey": {**_TEXT, "description": "The key of the message"},
        "content-type": {"const": CONTENT_TYPE},
    }
    optional = {"ce_causationid": {**_TEXT, "description": "The ce_id of the command that it follows from"}}
    if name not in list(CONTRACTS):
        return _headers(headers)
    headers["ce_sequence"] = {
        **_TEXT,
        "pattern": "^[0-9]+$",
        "description": "The number of the event in the manager's outbox",
    }
    return _headers(headers, optional)


def _tombstone() -> Schema:
    return {
        "name": _tombstone_name(),
        "title": "A node is gone",
        "summary": "The node that the key names was removed: forget its state. A message without a value.",
        "headers": _event_headers(STATE_SNAPSHOT),
        "payload": {"type": "null"},
        "bindings": _key("The node"),
    }


def _command_message(name: str) -> Schema:
    headers: Schema = {
        "ce_specversion": {"const": SPEC_VERSION},
        "ce_id": {**_TEXT, "description": "Of your choice; with ce_source it makes repeated commands harmless"},
        "ce_source": {**_TEXT, "description": "Who you are"},
        "ce_type": {"const": name},
        "content-type": {"const": CONTENT_TYPE},
    }
    key = "The node or deployment: commands of one key keep their order"
    return _message(name, command_schema_of(name), _headers(headers), key)


def _dead_letter() -> Schema:
    headers = {
        "dlq_reason": {**_TEXT, "description": "Why, for people"},
        "dlq_code": {**_TEXT, "description": "Why, in one word"},
        "dlq_topic": {**_TEXT, "description": "Where it came from"},
        "dlq_partition": {**_TEXT, "pattern": "^[0-9]+$", "description": "Of that topic"},
        "dlq_offset": {**_TEXT, "pattern": "^[0-9]+$", "description": "In that partition"},
        "dlq_at": {**_TEXT, "format": "date-time", "description": "When it was put here"},
    }
    return {
        "name": Topic.DEAD_LETTERS.value,
        "title": "What was no command",
        "summary": "Key, value and headers as they came, and why they are here.",
        "headers": _headers(headers),
        "payload": {"description": "As it came: any bytes, or none"},
    }


def _headers(required: Schema, optional: Schema | None = None) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _message(name: str, schema: Schema, headers: Schema, key: str) -> Schema:
    return {
        "name": name,
        "title": name,
        "summary": schema["description"],
        "contentType": CONTENT_TYPE,
        "headers": headers,
        # Relative to this document.
        "payload": {"$ref": path_of(name).removeprefix("docs/")},
        "bindings": _key(key),
        "examples": [{"payload": schema["examples"][0]}],
    }


def _key(description: str) -> Schema:
    return {"kafka": {"key": {**_TEXT, "description": description}, "bindingVersion": _BINDING}}


def _as_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
