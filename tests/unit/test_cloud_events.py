# SPDX-License-Identifier: GPL-3.0-or-later
"""Events of the outbox as CloudEvents."""

from __future__ import annotations

from datetime import UTC, datetime

from node_manager.cloud_events import attributes, structured
from node_manager.outbox import StoredEvent

EVENT = StoredEvent(
    7,
    "01a2",
    "node.health",
    "node.health.changed",
    "gw-1",
    datetime(2026, 3, 1, 12, tzinfo=UTC),
    {"to": "healthy"},
    None,
)
EXPECTED = {
    "specversion": "1.0",
    "id": "01a2",
    "source": "/plant",
    "type": "node.health.changed",
    "subject": "gw-1",
    "time": "2026-03-01T12:00:00.000000Z",
    "dataschema": "urn:node-manager:event:node.health.changed:v1",
    "datacontenttype": "application/json",
    "sequence": "7",
    "partitionkey": "gw-1",
}


def test_attributes_are_those_of_the_specification_in_its_order() -> None:
    assert list(attributes(EVENT, "/plant").items()) == list(EXPECTED.items())


def test_attributes_name_the_cause_where_there_is_one() -> None:
    assert attributes(EVENT._replace(causation_id="c-1"), "/plant") == {**EXPECTED, "causationid": "c-1"}


def test_attribute_names_are_lower_case_letters_and_digits() -> None:
    # CloudEvents 1.0.2, section "Naming conventions".
    assert all(name.isalnum() and name == name.lower() for name in attributes(EVENT._replace(causation_id="c"), "/"))


def test_structured_has_the_data_beside_the_attributes() -> None:
    assert structured(EVENT, "/plant") == {**EXPECTED, "data": {"to": "healthy"}}
