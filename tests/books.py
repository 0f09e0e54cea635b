# SPDX-License-Identifier: GPL-3.0-or-later
"""Hold all that is written about allocations against each other: rows, accounts, owners, outbox."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from node_manager.events import EventType
from node_manager.resources import COMMON, WHOLE_MILLI
from node_manager.store import tables
from stored import Rows


def assert_books_add_up(rows: Rows) -> None:
    """Sum the allocations up, simply, and find the same sums in every account and the same story in the outbox."""
    allocations = rows.of(tables.allocations)
    amounts: dict[str, Counter[str]] = defaultdict(Counter)
    units: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    used: dict[str, Counter[str]] = defaultdict(Counter)
    for row in allocations:
        for name, wanted in row["resources"].items():
            if name in COMMON:
                amounts[row["node_id"]][name] += wanted
                used[row["owner"]][name] += wanted
                continue
            count, share = (
                (wanted, WHOLE_MILLI) if isinstance(wanted, int) else (wanted["count"], wanted["share_milli"])
            )
            assert list(row["units"][name].values()) == [share] * count, row
            units[row["node_id"]][name].update(row["units"][name])
            used[row["owner"]][name] += count * share

    for account in rows.of(tables.node_accounts):
        assert account["allocated"] == amounts[account["node_id"]], account
        assert account["used_units"] == units[account["node_id"]], account
        assert all(milli <= WHOLE_MILLI for each in account["used_units"].values() for milli in each.values()), account
    for owner in rows.of(tables.owners):
        assert owner["used"] == used[owner["owner"]], owner
    assert {row["node_id"] for row in allocations} <= {row["node_id"] for row in rows.of(tables.node_accounts)}
    assert {row["owner"] for row in allocations} <= {row["owner"] for row in rows.of(tables.owners)}
    assert held_by_the_outbox(rows) == {row["allocation_id"]: row["node_id"] for row in allocations}


def held_by_the_outbox(rows: Rows) -> dict[str, str]:
    """Tell from the events alone what is reserved where; each must follow from the one before it."""
    held: dict[str, str] = {}
    for event in rows.events():
        allocation_id = event["data"].get("allocation_id")
        if event["type"] == EventType.ALLOCATION_RESERVED:
            assert allocation_id not in held, event
            held[allocation_id] = event["node_id"]
        elif event["type"] == EventType.ALLOCATION_CONFIRMED:
            assert held[allocation_id] == event["node_id"], event
        elif event["type"] == EventType.ALLOCATION_RELEASED:
            assert held.pop(allocation_id) == event["node_id"], event
    return held


def assert_nothing_is_left(rows: Rows) -> None:
    """Find no trace of any allocation but its events."""
    assert_books_add_up(rows)
    assert rows.of(tables.allocations) == []
    left: list[Any] = [row["allocated"] or row["used_units"] for row in rows.of(tables.node_accounts)]
    left += [row["used"] for row in rows.of(tables.owners)]
    assert not any(left), left
