# SPDX-License-Identifier: GPL-3.0-or-later
"""The contracts of events: one for each type, with an example; and the watch that holds every test's events to them."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from builders import START, make_contact, make_declaration, make_facts, make_sample, make_settings, observe
from event_watch import EventWatch, violation
from node_manager import event_contracts_nodes, event_contracts_parts, events
from node_manager.event_contracts import ALL, CONTRACTS, RESOURCES_SAMPLED, STATE_SNAPSHOT
from node_manager.events import EventType, emit
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.samples import summarise
from node_manager.shapes import Sample
from node_manager.store import open_store
from node_manager.store.documents import write_json
from node_manager.views import render_node_state, render_time
from pydantic import BaseModel

NOW = datetime(2026, 11, 22, 18, tzinfo=UTC)
HEALTH = {"from": "suspect", "to": "unreachable", "cause": "", "source": "manager"}


def example_of(contract: type[BaseModel]) -> dict[str, Any]:
    """Give the example of a contract."""
    (found,) = contract.model_json_schema()["examples"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("event", EventType)
def test_each_type_has_a_contract(event: EventType) -> None:
    assert issubclass(CONTRACTS[event], event_contracts_parts.Contract)


@pytest.mark.parametrize("name", ALL)
def test_each_contract_takes_its_example(name: str) -> None:
    found = ALL[name].model_validate_json(json.dumps(example_of(ALL[name])))

    assert json.loads(found.model_dump_json(by_alias=True, exclude_unset=True)).keys() == example_of(ALL[name]).keys()


@pytest.mark.parametrize("event", EventType)
def test_each_field_must_be_there_and_no_other(event: EventType) -> None:
    example = example_of(CONTRACTS[event])

    assert violation(event, example) is None
    assert "another: Extra inputs" in str(violation(event, {**example, "another": 1}))
    for field in example:
        without = {key: value for key, value in example.items() if key != field}
        assert f"{field}: Field required" in str(violation(event, without))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({**HEALTH, "to": "unwell"}, "to: Input should be"),
        ({**HEALTH, "to": None}, "to: Input should be"),
        ({**HEALTH, "cause": 5}, "cause: Input should be a valid string"),
        ({**HEALTH, "cause": NOW, "at": NOW}, "at: Extra inputs"),
        ([], "all: Input should be an object"),
        (None, "all: Input should be an object"),
    ],
    ids=["word", "null", "number", "extra", "list", "nothing"],
)
def test_violation_tells_the_difference_and_the_event(data: Any, told: str) -> None:
    found = str(violation("node.health.changed", data))

    assert found.startswith("node.health.changed breaks its contract HealthChanged: ")
    assert told in found


def test_violation_tells_that_a_type_has_no_contract() -> None:
    assert violation("node.health.praised", {}) == "node.health.praised has no contract in event_contracts.py"


def test_violation_takes_times_only_as_texts_with_a_zone() -> None:
    data = example_of(CONTRACTS[EventType.NODE_RECLAIMED])

    assert violation("node.health.reclaimed", {**data, "lost_at": "2026-11-22T18:00:00+00:00"}) is None
    assert "lost_at" in str(violation("node.health.reclaimed", {**data, "lost_at": "2026-11-22T18:00:00"}))
    assert "lost_at" in str(violation("node.health.reclaimed", {**data, "lost_at": 1795370400}))


def test_watch_looks_at_each_row_after_it_was_written() -> None:
    written: list[Any] = []
    watch = EventWatch(lambda connection, rows: written.extend(rows))
    rows = [
        (f"id-{number}", "node.health", "node.health.changed", "gw-7", NOW, data, None)
        for number, data in enumerate([HEALTH, {}])
    ]

    watch(None, rows)  # type: ignore[arg-type]  # nothing is written

    assert (written, len(watch.violations)) == (rows, 1)


def test_every_test_is_watched(event_watch: EventWatch, tmp_path: Path) -> None:
    with (
        closing(open_store(f"sqlite:///{tmp_path / 'node-manager.db'}")) as store,
        store.write() as connection,
    ):
        emit(connection, EventType.HEALTH_CHANGED, "gw-7", NOW, {"too": "bad"})

    assert events._INSERT is event_watch
    assert len(event_watch.violations) == 1
    # As it should be here.
    event_watch.violations.clear()


def test_a_node_may_be_registered_with_or_without_admin() -> None:
    declared = example_of(event_contracts_nodes.NodeRegistered)["node"]

    assert violation("node.lifecycle.registered", {"node": {**declared, "admin": "cordoned"}, "generation": 1}) is None
    assert "node.admin" in str(
        violation("node.lifecycle.registered", {"node": {**declared, "admin": "gone"}, "generation": 1})
    )


# what has no row in the outbox


@pytest.mark.parametrize("known", [True, False], ids=["looked at", "new"])
def test_snapshot_of_a_node_keeps_to_its_contract(tmp_path: Path, *, known: bool) -> None:
    settings = make_settings()
    with closing(open_store(f"sqlite:///{tmp_path / 'node-manager.db'}")) as store:
        registry = NodeRegistry(store, settings, lambda: START)
        registry.register(make_declaration(labels={"line": "a"}))
        if known:
            seen = [
                observe("facts", make_facts()),
                observe("sample", make_sample(99.0)),
                observe("contact", make_contact()),
            ]
            ObservationLog(store, settings, lambda: START).record(seen)
        document = write_json(render_node_state(registry.get("gw-7"), settings, START))

    found = ALL[STATE_SNAPSHOT].model_validate_json(document)

    assert found.model_dump()["node_id"] == "gw-7"
    assert bool(found.model_dump()["conditions"]) is known


@pytest.mark.parametrize(
    "sample",
    [make_sample(10.0), {"cpu": None, "memory": None, "filesystems": None, "network": None}],
    ids=["whole", "empty"],
)
def test_summary_of_a_sample_keeps_to_its_contract(sample: dict[str, Any]) -> None:
    numbers = asdict(summarise(Sample.model_validate({**make_sample(10.0), **sample})))

    ALL[RESOURCES_SAMPLED].model_validate_json(
        write_json({"observed_at": render_time(START), "source": "stream", **numbers})
    )

    assert set(ALL[RESOURCES_SAMPLED].model_fields) == {"observed_at", "source", *numbers}
