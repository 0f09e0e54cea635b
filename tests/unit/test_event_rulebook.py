# SPDX-License-Identifier: GPL-3.0-or-later
"""The rulebook for Event-Driven Ansible: what it looks for is in our events, and what it hands on is safe.

The shape of an event is made here as ansible.eda 2.13.0 makes it (extensions/eda/plugins/event_source/kafka.py, receive_msg): the
headers and the value of a message, both read as UTF-8, the value as JSON. When this was written, that plugin and
ansible-rulebook's engine gave the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from node_manager.cloud_events import attributes
from node_manager.event_documents import schema_of
from node_manager.events import EventType
from node_manager.kafka_link import Topic, topic_name
from node_manager.outbox import StoredEvent
from node_manager.platform_settings import KafkaSettings

CHECKOUT = Path(__file__).resolve().parents[2]
FILE = CHECKOUT / "extensions" / "eda" / "rulebooks" / "node_manager.yml"
PAGE = (CHECKOUT / "docs" / "event-driven-ansible.md").read_text("utf-8")
(RULESET,) = yaml.safe_load(FILE.read_text("utf-8"))
(SOURCE,) = RULESET["sources"]
RULES = {rule["name"]: rule for rule in RULESET["rules"]}
TOPICS = {topic_name(KafkaSettings(), event.topic) for event in EventType}

_PATH = re.compile(r"event((?:\.[A-Za-z_]+)+)")
_COMPARISON = re.compile(r'event((?:\.[A-Za-z_]+)+) == "([^"]*)"')
# What no node chose the words of.
_SAFE_HEADERS = {"ce_subject", "ce_time", "ce_id", "ce_type"}
_SAFE_FIELDS = {"deployments", "recovery_id", "job_ids", "released"}


def sent(event: EventType) -> tuple[list[tuple[str, bytes]], bytes]:
    """Give headers and value of a message as they are sent, of the event of the contract's example."""
    data = schema_of(event)["examples"][0]
    stored = StoredEvent(
        4711, "0193d6a0", event.topic, event.value, "gw-7", datetime(2026, 11, 22, 18, tzinfo=UTC), data, None
    )
    found = attributes(stored, "/node-manager")
    headers = [(f"ce_{name}", text.encode()) for name, text in found.items() if name != "datacontenttype"]
    return [*headers, ("content-type", found["datacontenttype"].encode())], json.dumps(data).encode()


def as_the_source_has_it(headers: list[tuple[str, bytes]], value: bytes) -> dict[str, Any]:
    """Make the event that rules see of a message."""
    return {
        "meta": {"headers": {name: raw.decode("utf-8") for name, raw in headers}},
        "body": json.loads(value.decode("utf-8")),
    }


def type_of(rule: dict[str, Any]) -> EventType:
    """Tell which type of event a rule is about."""
    (found,) = [word for path, word in _COMPARISON.findall(rule["condition"]) if path == ".meta.headers.ce_type"]
    return EventType(found)


def texts_of(node: Any) -> Iterator[str]:
    """Give all texts of a part of the rulebook."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for item in node.values():
            yield from texts_of(item)
    elif isinstance(node, list):
        for item in node:
            yield from texts_of(item)


def look_up(event: dict[str, Any], path: str) -> Any:
    """Find what a path of a rule names in an event."""
    found: Any = event
    for part in path.strip(".").split("."):
        found = found[part]
    return found


@pytest.mark.parametrize("name", RULES)
def test_each_path_of_a_rule_is_in_the_event(name: str) -> None:
    rule = RULES[name]
    event = as_the_source_has_it(*sent(type_of(rule)))
    paths = [path for text in texts_of(rule) for path in _PATH.findall(text)]

    assert len(paths) >= 2
    for path in paths:
        assert look_up(event, path) is not None


@pytest.mark.parametrize("name", RULES)
def test_each_field_of_a_rule_is_promised(name: str) -> None:
    rule = RULES[name]
    schema = schema_of(type_of(rule))
    fields = {
        path.split(".")[2] for text in texts_of(rule) for path in _PATH.findall(text) if path.startswith(".body.")
    }

    assert fields <= set(schema["required"])


@pytest.mark.parametrize("name", RULES)
def test_each_word_that_a_rule_waits_for_may_come(name: str) -> None:
    rule = RULES[name]
    schema = schema_of(type_of(rule))
    for path, word in _COMPARISON.findall(rule["condition"]):
        if not path.startswith(".body."):
            continue
        field = schema["properties"][path.removeprefix(".body.")]
        field = schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else field

        assert word in field["enum"]


@pytest.mark.parametrize("name", RULES)
def test_rule_hands_on_nothing_that_a_node_says_of_itself(name: str) -> None:
    # An extra variable is a template on the controller.
    rule = RULES[name]
    schema = schema_of(type_of(rule))
    for text in texts_of(rule["action"]):
        for path in _PATH.findall(text):
            where, field = path.strip(".").split(".")[0], path.rpartition(".")[2]
            found = schema["properties"].get(field, {})
            safe = found.get("format") == "date-time" or "enum" in found or field in _SAFE_FIELDS

            assert field in _SAFE_HEADERS if where == "meta" else safe, path


@pytest.mark.parametrize("name", RULES)
def test_rule_runs_nothing_twice_for_one_event(name: str) -> None:
    assert RULES[name]["throttle"]["group_by_attributes"] == ["event.meta.headers.ce_id"]
    assert RULES[name]["throttle"]["once_within"] == "1 hour"


@pytest.mark.parametrize("name", RULES)
def test_rule_is_explained(name: str) -> None:
    assert f"| {name} | `{type_of(RULES[name])}`" in PAGE


def test_source_reads_the_topics_of_the_rules_and_no_compacted_one() -> None:
    topics = SOURCE["ansible.eda.kafka"]["topics"]

    assert set(topics) == {topic_name(KafkaSettings(), type_of(rule).topic) for rule in RULES.values()}
    assert topic_name(KafkaSettings(), Topic.STATE) not in topics
    assert set(topics) <= TOPICS


def test_playbooks_are_limited_to_the_node_of_the_event() -> None:
    ((limit,),) = [item.values() for item in SOURCE["filters"] if "ansible.eda.insert_hosts_to_meta" in item]
    event = as_the_source_has_it(*sent(EventType.HEALTH_CHANGED))

    assert look_up(event, limit["host_path"]) == "gw-7"


def test_playbooks_that_are_run_are_there() -> None:
    named = [rule["action"]["run_playbook"]["name"] for rule in RULES.values() if "run_playbook" in rule["action"]]

    assert named != []
    for name in named:
        assert (CHECKOUT / "playbooks" / f"{name.removeprefix('iot_platform.node_manager.')}.yml").is_file()


def test_example_of_the_page_is_an_event() -> None:
    example = json.loads(PAGE.split("```json\n")[1].split("```")[0])
    event = as_the_source_has_it(*sent(EventType.HEALTH_CHANGED))

    assert set(example["body"]) == set(event["body"])
    assert set(example["meta"]["headers"]) - {"..."} <= set(event["meta"]["headers"])


def test_rulebook_comes_with_the_collection() -> None:
    manifest = yaml.safe_load((CHECKOUT / "galaxy.yml").read_text("utf-8"))["manifest"]["directives"]

    assert "recursive-include extensions/eda *.yml" in manifest
