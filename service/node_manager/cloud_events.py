# SPDX-License-Identifier: GPL-3.0-or-later
"""Write an event of the outbox as a CloudEvent 1.0, for Kafka's headers and for the event stream.

Pure; the same event gives the same attributes each time, so that receivers know a repetition by its id.
"""

from __future__ import annotations

from typing import Any

from node_manager.outbox import StoredEvent
from node_manager.views import render_time

SPEC_VERSION = "1.0"
CONTENT_TYPE = "application/json"
# Of the schema that the data keep to; a breaking change of it would be a new one.
_SCHEMA_VERSION = 1


def attributes(event: StoredEvent, source: str) -> dict[str, str]:
    """Give the context attributes, those of the specification first, then its documented extensions.

    Source: CloudEvents 1.0.2, and its extensions `sequence` and `partitioning`; causationid is ours, and only there if a command
    was the cause.
    """
    found = {
        "specversion": SPEC_VERSION,
        "id": event.event_id,
        "source": source,
        "type": event.type,
        "subject": event.node_id,
        "time": render_time(event.occurred_at) or "",
        "dataschema": data_schema(event.type),
        "datacontenttype": CONTENT_TYPE,
        "sequence": str(event.sequence),
        "partitionkey": event.node_id,
    }
    if event.causation_id is not None:
        found["causationid"] = event.causation_id
    return found


def structured(event: StoredEvent, source: str) -> dict[str, Any]:
    """Give the event as one JSON object, as in structured mode."""
    return {**attributes(event, source), "data": event.data}


def data_schema(event_type: str) -> str:
    """Name the schema that the data of a type of event keep to."""
    return f"urn:node-manager:event:{event_type}:v{_SCHEMA_VERSION}"
