# SPDX-License-Identifier: GPL-3.0-or-later
"""Hold all that the code under test writes into the outbox to the contracts of its events, in every test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from node_manager import events
from node_manager.event_contracts import CONTRACTS
from node_manager.events import EventType
from node_manager.store.documents import write_json
from pydantic import ValidationError

# Where emit_all puts them in a row.
_TYPE, _DATA = 2, 5
_MAX_TOLD = 5


class EventWatch:
    """Stands before the outbox, passes everything on and remembers what breaks its contract."""

    def __init__(self, insert: Any) -> None:
        self._insert = insert
        self.violations: list[str] = []

    def __call__(self, connection: sa.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
        """Write the events, as the outbox does."""
        self._insert(connection, rows)
        for row in rows:
            why = violation(row[_TYPE], row[_DATA])
            if why is not None:
                self.violations.append(why)


def violation(event_type: str, data: Any) -> str | None:
    """Say how data differ from the contract of their event; None where they keep to it."""
    try:
        contract = CONTRACTS[EventType(event_type)]
    except (KeyError, ValueError):
        return f"{event_type} has no contract in event_contracts.py"
    document = write_json(data)
    try:
        contract.model_validate_json(document)
    except ValidationError as error:
        differences = [
            f"{'.'.join(map(str, item['loc'])) or 'all'}: {item['msg']}" for item in error.errors(include_url=False)
        ]
        return f"{event_type} breaks its contract {contract.__name__}: {'; '.join(differences)}\n  {document[:2000]}"
    return None


@pytest.fixture(autouse=True)
def event_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[EventWatch]:
    """Fail a test that has had an event written which is not as its contract promises."""
    watch = EventWatch(events._INSERT)
    monkeypatch.setattr(events, "_INSERT", watch)
    yield watch
    if watch.violations:
        more = len(watch.violations) - _MAX_TOLD
        told = [*watch.violations[:_MAX_TOLD], *([f"and {more} more"] if more > 0 else [])]
        pytest.fail("\n".join(told), pytrace=False)
