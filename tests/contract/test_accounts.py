# SPDX-License-Identifier: GPL-3.0-or-later
"""Accounts stay in step with what nodes have, on either engine."""

from __future__ import annotations

from typing import Any

import pytest
from books import assert_books_add_up
from builders import make_declaration, make_facts, make_request, make_settings, observe
from node_manager import accounts
from node_manager.declarations import NodeChange
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.resource_allocator import ResourceAllocator
from node_manager.store import Store, tables
from stored import Rows


@pytest.fixture(autouse=True)
def _nodes(registry: NodeRegistry) -> None:
    """Register a gateway, and a node of no type."""
    registry.register(make_declaration("gw-7", node_type="gateway", capacity={"memory_mib": 100}))
    registry.register(make_declaration("gw-8", capacity={"memory_mib": 100}))


def capacities(rows: Rows) -> dict[str, dict[str, int]]:
    """Give the capacity of each account."""
    return {row["node_id"]: row["capacity"] for row in rows.of(tables.node_accounts)}


def test_fit_opens_an_account_with_the_node(rows: Rows) -> None:
    first = rows.of(tables.node_accounts)[0]

    assert first == {
        "node_id": "gw-7",
        "node_type": "gateway",
        "capacity": {"memory_mib": 100},
        "units": {},
        "allocated": {},
        "used_units": {},
        "version": 1,
        "epoch": 1,
    }


def test_fit_takes_what_facts_say_and_keeps_what_is_allocated(
    log: ObservationLog, allocator: ResourceAllocator, rows: Rows
) -> None:
    allocator.allocate("gw-8", make_request("a1", {"memory_mib": 60}))

    log.record([observe("facts", make_facts(devices={"gpu": [{"id": "b"}, {"id": "a"}]}), node_id="gw-8")])

    account = rows.of(tables.node_accounts)[1]
    assert (account["capacity"]["memory_mib"], account["capacity"]["gpu"]) == (100, 2)
    assert account["units"] == {"gpu": ["b", "a"]}
    assert_books_add_up(rows)


def test_fit_of_the_same_changes_nothing(log: ObservationLog, rows: Rows) -> None:
    for number in range(2):
        log.record([observe("facts", make_facts(hostname=str(number)), node_id="gw-8")])
    before = rows.of(tables.node_accounts)

    log.record([observe("facts", make_facts(hostname="2"), node_id="gw-8")])

    assert rows.of(tables.node_accounts) == before


@pytest.mark.parametrize(
    ("gateway", "capacity"),
    [
        ({"resources": {"camera": 2}}, {"camera": 2, "memory_mib": 100}),
        ({"resources": {"memory_mib": 5}}, {"memory_mib": 100}),
    ],
    ids=["new-class", "declared-counts-more"],
)
def test_fit_all_takes_over_changed_node_types(
    store: Store, rows: Rows, gateway: dict[str, Any], capacity: dict[str, int]
) -> None:
    changed = make_settings(gateway=gateway)

    count = accounts.fit_all(store, changed)

    assert count == (capacity != {"memory_mib": 100})
    assert capacities(rows) == {"gw-7": capacity, "gw-8": {"memory_mib": 100}}
    assert accounts.fit_all(store, changed) == 0


def test_fit_all_opens_accounts_of_nodes_from_before_there_were_any(store: Store, rows: Rows) -> None:
    with store.write() as connection:
        connection.execute(tables.node_accounts.delete())

    count = accounts.fit_all(store, make_settings())

    assert count == 2
    assert capacities(rows) == {"gw-7": {"memory_mib": 100}, "gw-8": {"memory_mib": 100}}


def test_fit_all_keeps_what_is_allocated_and_notes_the_change(
    store: Store, allocator: ResourceAllocator, rows: Rows
) -> None:
    allocator.allocate("gw-7", make_request("a1", {"memory_mib": 60}))
    before = {row["node_id"]: row["mark"] for row in rows.of(tables.node_changes)}

    accounts.fit_all(store, make_settings(gateway={"resources": {"camera": 2}}))

    after = {row["node_id"]: row["mark"] for row in rows.of(tables.node_changes)}
    assert [node_id for node_id in after if after[node_id] != before[node_id]] == ["gw-7"]
    assert_books_add_up(rows)


def test_fit_all_with_nothing_to_do_writes_nothing(store: Store, rows: Rows) -> None:
    before = rows.everything()

    assert accounts.fit_all(store, make_settings()) == 0

    assert rows.everything() == before


def test_move_on_begins_an_epoch_and_counts_the_version(store: Store, rows: Rows) -> None:
    before, other = rows.of(tables.node_accounts)

    with store.write() as connection:
        epochs = [accounts.move_on(connection, "gw-7"), accounts.move_on(connection, "nobody")]

    assert epochs == [2, None]
    assert [accounts.epoch_of(store, node_id) for node_id in ("gw-7", "nobody")] == [2, None]
    assert rows.of(tables.node_accounts) == [{**before, "version": before["version"] + 1, "epoch": 2}, other]


def test_an_epoch_outlasts_what_the_account_is_fitted_to(store: Store, registry: NodeRegistry) -> None:
    with store.write() as connection:
        accounts.move_on(connection, "gw-7")

    registry.update("gw-7", NodeChange.model_validate({"address": "192.0.2.7", "capacity": {"memory_mib": 7}}))

    assert accounts.epoch_of(store, "gw-7") == registry.get("gw-7").epoch == 2
