# SPDX-License-Identifier: GPL-3.0-or-later
"""What the guard of repairs counts, on either engine."""

from __future__ import annotations

import sqlalchemy as sa
from builders import FakeClock, make_contact, make_declaration, make_report, make_sample, make_settings, observe
from node_manager import fleet_census
from node_manager.domain import Admin, ContactReason
from node_manager.guard_terms import Census
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.recoveries import NewRecovery, Recoveries
from node_manager.recovery_rows import read_patient
from node_manager.store import Store, repair_tables

FAILED = make_report(("critical", "failed"))
WARNED = make_report(("warning", "failed"))


def take(store: Store) -> dict[str, Census]:
    """Count the fleet."""
    with store.read() as connection:
        return fleet_census.take(connection)


def test_each_node_counts_once_in_its_zone_and_in_the_fleet(
    store: Store, registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    for node_id, zone in (("a-1", "a"), ("a-2", "a"), ("a-3", "a"), ("b-1", "b"), ("n-1", None), ("out", "a")):
        registry.register(make_declaration(node_id, location={"zone": zone}))
    registry.set_admin("out", Admin.MAINTENANCE, "a new disk")
    lost = make_contact(ContactReason.CONNECTION_REFUSED)
    now = clock.advance(10)
    log.record(
        [
            observe("sample", make_sample(), at=now, node_id="a-1"),
            observe("report", FAILED, at=now, node_id="a-2"),
            observe("report", WARNED, at=now, node_id="a-3"),
            observe("contact", lost, at=now, node_id="b-1"),
            observe("contact", lost, at=now, node_id="out"),
        ]
    )

    assert take(store) == {
        "fleet": Census(5, 2, 1, 0),
        "zone:a": Census(3, 1, 0, 0),
        "zone:b": Census(1, 1, 1, 0),
        "zone:": Census(1, 0, 0, 0),
    }


def test_a_node_in_recovery_is_unhealthy_and_counts_once(
    store: Store, registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    for node_id in ("a-1", "a-2", "a-3"):
        registry.register(make_declaration(node_id, location={"zone": "a"}))
    log.record([observe("report", FAILED, at=clock.advance(10), node_id="a-1")])
    settings = make_settings()
    recoveries = Recoveries(store, settings, clock)
    for node_id, dry_run in (("a-1", False), ("a-2", False), ("a-3", True)):
        with store.write() as connection:
            patient = read_patient(connection, settings, node_id)
            recoveries.begin(connection, patient, NewRecovery(["free_disk"], "somebody", dry_run=dry_run))
    before = take(store)["zone:a"]
    with store.write() as connection:
        connection.execute(sa.update(repair_tables.recoveries).values(ended_at=clock()))

    assert (before, take(store)["zone:a"]) == (Census(3, 2, 0, 2), Census(3, 1, 0, 0))
