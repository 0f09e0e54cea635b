# SPDX-License-Identifier: GPL-3.0-or-later
"""What the guard concludes is in the store, also where the store was away for a moment; on either engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from builders import FakeClock, make_contact, make_declaration, make_settings, observe
from node_manager.domain import ContactReason, GuardState
from node_manager.events import EventType
from node_manager.guard_keeper import GuardKeeper
from node_manager.jobs import JobQueue
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.store import Store, StoreUnavailableError
from stored import Rows


def test_what_could_not_be_stored_is_stored_and_told_by_the_next_look(
    store: Store,
    registry: NodeRegistry,
    log: ObservationLog,
    clock: FakeClock,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings(home=tmp_path)
    keeper = GuardKeeper(store, settings, JobQueue(store, settings, clock), clock)
    for node_id in ("a-1", "a-2"):
        registry.register(make_declaration(node_id, location={"zone": "a"}))
    keeper.look(clock())
    lost = make_contact(ContactReason.CONNECTION_REFUSED)
    log.record([observe("contact", lost, at=clock.advance(10), node_id=node_id) for node_id in ("a-1", "a-2")])

    @contextmanager
    def away() -> Iterator[sa.Connection]:
        raise StoreUnavailableError("away")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(store, "write", away)
        with pytest.raises(StoreUnavailableError):
            keeper.look(clock())
    before = rows.events(EventType.GUARD_CHANGED)
    keeper.look(clock())

    told = {event["data"]["scope"]: event["data"]["to"] for event in rows.events(EventType.GUARD_CHANGED)}
    assert (before, told) == ([], {"fleet": "open", "zone:a": "open"})
    assert {report.state.state for report in keeper.scopes()} == {GuardState.OPEN}
