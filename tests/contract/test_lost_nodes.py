# SPDX-License-Identifier: GPL-3.0-or-later
"""What becomes of a lost node's work: told once, kept for a while, taken once; whatever happens in between."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from books import assert_books_add_up, assert_nothing_is_left
from builders import FakeClock, make_settings, seconds
from lost_world import LostWorld, counted
from node_manager import events as events_module
from node_manager import lost_nodes as lost_nodes_module
from node_manager.accounts import epoch_of
from node_manager.domain import Admin
from node_manager.events import EventType
from node_manager.lost_nodes import SETTLING_SECONDS
from node_manager.quotas import Quotas
from node_manager.settings import Settings
from node_manager.store import Store, open_store, tables
from node_manager.views import render_time
from stored import Rows

RECLAIM_AFTER = 3600.0


@pytest.fixture
def settings() -> Settings:
    """Give settings by which a lost node keeps its work for an hour, and a dark site is left alone for two."""
    return make_settings(
        {"recovery": {"reclaim_after_seconds": RECLAIM_AFTER}, "health": {"autonomy_seconds": 2 * RECLAIM_AFTER}}
    )


@pytest.fixture
def world(store: Store, settings: Settings, clock: FakeClock) -> LostWorld:
    """Give two nodes, of which n1 holds a replica and a hand-made allocation."""
    found = LostWorld(store, settings, clock)
    for node_id in ("n1", "n2"):
        found.add(node_id)
    found.place("web", constraints={"node_ids": ["n1"]})
    found.hold("n1", "by-hand", memory_mib=20, owner="other")
    return found


def lost_rows(rows: Rows) -> list[tuple[str, bool]]:
    """Tell which nodes are lost, and whether their work was taken."""
    return [(row["node_id"], row["reclaimed_at"] is not None) for row in rows.of(tables.lost_nodes)]


def wait(world: LostWorld, seconds: float, step: float = 60.0) -> None:
    """Let time pass on both clocks, a round every minute."""
    while seconds > 0:
        world.pass_time(min(step, seconds))
        world.lost.round()
        seconds -= step


# lost


def test_a_loss_is_told_once_with_what_is_affected(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")

    world.lost.round()
    world.pass_time(1)
    world.lost.round()

    (event,) = rows.events(EventType.NODE_LOST)
    (row,) = rows.of(tables.lost_nodes)
    assert (row["lost_at"], row["reclaim_at"]) == (event["occurred_at"], event["occurred_at"] + seconds(RECLAIM_AFTER))
    data = event["data"]
    proposals = data.pop("replacements")
    assert data == {
        "lost_at": render_time(row["lost_at"]),
        "reclaim_at": render_time(row["reclaim_at"]),
        "evidence": "peers_blind",
        "cause": "TimedOut: silent",
        "epoch": 1,
        "allocations": 2,
        "deployments": ["web"],
        "left_out": 0,
    }
    assert {item["allocation_id"]: item["to_node"] for item in proposals} == {"by-hand": "n2", "web:0": None}
    assert (event["node_id"], event["topic"]) == ("n1", "node.health")


def test_a_loss_changes_no_allocation(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    before = rows.of(tables.allocations)

    world.lost.round()

    assert rows.of(tables.allocations) == before
    assert epoch_of(world.store, "n1") == 1
    assert_books_add_up(rows)


def test_a_round_costs_one_small_read_where_nothing_happens(world: LostWorld) -> None:
    with counted(world.store) as statements:
        world.lost.round()

    assert len([text for text in statements if text.startswith("SELECT")]) == 1
    assert not [text for text in statements if not text.startswith(("SELECT", "BEGIN"))]


def test_a_round_reads_no_node_that_is_well(tmp_path: Path, settings: Settings, clock: FakeClock) -> None:
    # PostgreSQL plans by what is in the tables; SQLite as it is told.
    with closing(open_store(f"sqlite:///{tmp_path}/planned.db")) as store:
        with counted(store) as statements:
            LostWorld(store, settings, clock).lost.round()
        (query,) = [text for text in statements if text.startswith("SELECT")]
        with store.read() as connection:
            marks = ("x",) * query.count("?")
            plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", marks)]

    assert [step for step in plan if step.startswith("SCAN")] == ["SCAN lost_nodes"]


def test_an_event_that_can_not_be_written_leaves_no_row(
    world: LostWorld, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.lose("n1")
    before = rows.everything()

    def fail(connection: sa.Connection, found: Any) -> None:
        events_module.emit_all(connection, found)
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(lost_nodes_module, "emit_all", fail)
        with pytest.raises(OSError, match="killed"):
            world.lost.round()

    assert rows.everything() == before
    world.begin_anew()
    world.lost.round()
    assert len(rows.events(EventType.NODE_LOST)) == 1


def test_a_manager_that_starts_again_tells_nothing_twice(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    world.lost.round()

    world.begin_anew()
    world.lost.round()

    assert len(rows.events(EventType.NODE_LOST)) == 1


def test_a_frozen_node_is_not_lost_before_its_freeze_is_over(world: LostWorld, rows: Rows) -> None:
    world.lose("n1", evidence="site_dark", frozen_seconds=600)

    wait(world, 590)
    early = lost_rows(rows)
    wait(world, 20)

    assert early == []
    assert lost_rows(rows) == [("n1", False)]


def test_a_freeze_lasts_though_the_clock_is_set_forward_or_back(world: LostWorld, rows: Rows) -> None:
    world.lose("n1", evidence="site_dark", frozen_seconds=600)
    world.lost.round()

    world.clock.advance(86400)
    wait(world, 300)
    early = lost_rows(rows)
    world.clock.advance(-2 * 86400)
    wait(world, 310)

    assert early == []
    assert lost_rows(rows) == [("n1", False)]


def test_a_manager_whose_clock_is_behind_freezes_no_longer_than_a_dark_site_is_left_alone(
    world: LostWorld, rows: Rows
) -> None:
    world.lose("n1", evidence="site_dark", frozen_seconds=600)
    world.clock.advance(-86400)
    world.lost.round()

    wait(world, 2 * RECLAIM_AFTER - 60)
    early = lost_rows(rows)
    wait(world, 61)

    assert early == []
    assert lost_rows(rows) == [("n1", False)]


@pytest.mark.parametrize("admin", [Admin.MAINTENANCE, Admin.OFFLINE])
def test_a_node_that_an_operator_has_in_hand_is_not_lost(world: LostWorld, rows: Rows, admin: Admin) -> None:
    world.lose("n1")
    world.lost.round()

    world.registry.set_admin("n1", admin, "test")
    wait(world, 2 * RECLAIM_AFTER)

    assert lost_rows(rows) == []
    assert len(rows.of(tables.allocations)) == 2

    world.registry.set_admin("n1", Admin.ACTIVE, "test")
    wait(world, RECLAIM_AFTER - 60)
    assert lost_rows(rows) == [("n1", False)]
    assert len(rows.events(EventType.NODE_LOST)) == 2


def test_a_node_that_is_taken_in_hand_after_its_work_was_taken_is_told_of_once(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    wait(world, RECLAIM_AFTER + 120)

    for admin in (Admin.MAINTENANCE, Admin.ACTIVE):
        world.registry.set_admin("n1", admin, "test")
        wait(world, 120)

    assert lost_rows(rows) == [("n1", True)]
    assert len(rows.events(EventType.NODE_LOST)) == 1


def test_many_that_are_lost_at_once_are_told_over_several_rounds(
    world: LostWorld, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_nodes_module, "NODES_PER_ROUND", 1)
    world.lose("n1", "n2")

    world.lost.round()
    first = lost_rows(rows)
    world.lost.round()

    assert len(first) == 1
    assert lost_rows(rows) == [("n1", False), ("n2", False)]


def test_no_more_proposals_than_fit_into_a_round(world: LostWorld, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    world.hold("n2", "b1")
    monkeypatch.setattr(lost_nodes_module, "MAX_ALLOCATIONS", 2)
    world.lose("n1", "n2")

    world.lost.round()

    assert len(lost_rows(rows)) == 1


# reclaim


def test_reclaim_takes_all_at_its_time_and_frees_the_quota(world: LostWorld, rows: Rows) -> None:
    Quotas(world.store, world.settings, world.clock).put("other", {"memory_mib": 20})
    world.lose("n1")
    world.lost.round()

    wait(world, RECLAIM_AFTER - 60)
    early = len(rows.of(tables.allocations))
    wait(world, 61)

    assert early == 2
    assert lost_rows(rows) == [("n1", True)]
    assert_nothing_is_left(rows)
    assert {row["data"]["reason"] for row in rows.events(EventType.ALLOCATION_RELEASED)[-2:]} == {"node_lost"}
    assert epoch_of(world.store, "n1") == 2
    (event,) = rows.events(EventType.NODE_RECLAIMED)
    (row,) = rows.of(tables.lost_nodes)
    assert event["data"] == {
        "lost_at": render_time(row["lost_at"]),
        "epoch": 2,
        "allocations": 2,
        "released": ["by-hand", "web:0"],
        "deployments": ["web"],
    }
    # What was taken can be had elsewhere; the deployment ended with its last allocation.
    world.see("n2")
    world.hold("n2", "by-hand", memory_mib=20, owner="other")
    world.place("web")


def test_reclaim_keeps_a_deployment_that_has_replicas_elsewhere(world: LostWorld, rows: Rows) -> None:
    world.place("pair", replicas=2, anti_affinity=[{"deployment_id": "pair"}])
    world.lose("n1")

    wait(world, RECLAIM_AFTER + 120)

    assert [row["deployment_id"] for row in rows.of(tables.deployments)] == ["pair"]
    assert [row["node_id"] for row in rows.of(tables.allocations)] == ["n2"]
    assert_books_add_up(rows)


def test_many_that_are_due_at_once_are_reclaimed_over_several_rounds(
    world: LostWorld, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_nodes_module, "RECLAIMS_PER_ROUND", 1)
    world.lose("n1", "n2")
    world.lost.round()
    world.pass_time(RECLAIM_AFTER + 1)

    world.lost.round()
    first = lost_rows(rows)
    world.lost.round()

    assert sorted(taken for _, taken in first) == [False, True]
    assert lost_rows(rows) == [("n1", True), ("n2", True)]


def test_reclaim_happens_once(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")

    wait(world, 3 * RECLAIM_AFTER)
    world.begin_anew()
    wait(world, 3 * RECLAIM_AFTER)

    assert len(rows.events(EventType.NODE_RECLAIMED)) == 1
    assert epoch_of(world.store, "n1") == 2


def test_a_reclaim_that_is_cut_off_leaves_all_as_it_was(
    world: LostWorld, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.lose("n1")
    world.lost.round()
    wait(world, RECLAIM_AFTER - 60)
    world.pass_time(120)
    before = rows.everything()

    def fail(connection: sa.Connection, found: Any) -> None:
        events_module.emit_all(connection, found)
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(lost_nodes_module, "emit_all", fail)
        with pytest.raises(OSError, match="killed"):
            world.lost.round()

    assert rows.everything() == before
    world.lost.round()
    assert_nothing_is_left(rows)


def test_a_node_that_is_back_in_time_keeps_all(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    wait(world, RECLAIM_AFTER / 2)
    before = rows.of(tables.allocations)

    world.see("n1")
    wait(world, 2 * RECLAIM_AFTER)

    assert lost_rows(rows) == []
    assert rows.of(tables.allocations) == before
    assert (epoch_of(world.store, "n1"), rows.events(EventType.NODE_RECLAIMED)) == (1, [])


def test_a_node_that_is_back_late_starts_empty(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    wait(world, RECLAIM_AFTER + 120)

    world.see("n1")
    world.lost.round()

    assert lost_rows(rows) == []
    assert epoch_of(world.store, "n1") == 2
    world.hold("n1", "new")
    assert_books_add_up(rows)


@pytest.mark.parametrize("seen_back", [True, False], ids=["seen", "between-two-rounds"])
def test_a_node_that_is_lost_again_has_all_its_time_again(world: LostWorld, rows: Rows, seen_back: bool) -> None:
    world.lose("n1")
    world.lost.round()
    wait(world, RECLAIM_AFTER - 60)
    world.see("n1")
    if seen_back:
        world.lost.round()
    world.lose("n1")
    # What is over is forgotten in one round, what is new is told in the next.
    world.lost.round()
    world.lost.round()

    wait(world, RECLAIM_AFTER - 60)
    early = lost_rows(rows)
    wait(world, 61)

    assert early == [("n1", False)]
    assert lost_rows(rows) == [("n1", True)]
    assert len(rows.events(EventType.NODE_LOST)) == 2


def test_a_node_that_was_back_between_two_rounds_is_told_of_again_after_its_work_was_taken(
    world: LostWorld, rows: Rows
) -> None:
    world.lose("n1")
    world.lost.round()
    wait(world, RECLAIM_AFTER + 60)
    world.see("n1")
    world.hold("n1", "again")
    world.lose("n1")

    world.lost.round()
    world.lost.round()

    assert lost_rows(rows) == [("n1", False)]
    assert [event["data"]["allocations"] for event in rows.events(EventType.NODE_LOST)] == [2, 1]


def test_a_node_dies_twice_and_both_times_its_work_is_taken(world: LostWorld, rows: Rows) -> None:
    for turn in (1, 2):
        world.lose("n1")
        wait(world, RECLAIM_AFTER + 120)
        world.see("n1")
        world.lost.round()
        world.hold("n1", f"again-{turn}")

    assert epoch_of(world.store, "n1") == 3
    assert [event["data"]["released"] for event in rows.events(EventType.NODE_RECLAIMED)] == [
        ["by-hand", "web:0"],
        ["again-1"],
    ]
    assert len(rows.events(EventType.NODE_LOST)) == 2


# clocks


def test_a_clock_that_jumps_ahead_reclaims_nothing_early(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    world.lost.round()

    world.clock.advance(86400)
    wait(world, RECLAIM_AFTER - 60)
    early = lost_rows(rows)
    wait(world, 61)

    assert early == [("n1", False)]
    assert lost_rows(rows) == [("n1", True)]


def test_a_clock_that_is_set_back_does_not_keep_work_on_a_lost_node(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    world.lost.round()

    world.clock.advance(-86400)
    wait(world, RECLAIM_AFTER + 60)

    assert lost_rows(rows) == [("n1", True)]


def test_a_manager_that_starts_again_goes_on_where_the_last_one_was(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    world.lost.round()
    wait(world, RECLAIM_AFTER - 600)

    world.begin_anew()
    world.lost.round()
    wait(world, 590)
    early = lost_rows(rows)
    wait(world, 60)

    assert early == [("n1", False)]
    assert lost_rows(rows) == [("n1", True)]


def test_a_manager_that_starts_late_or_with_a_wrong_clock_looks_for_a_while_first(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    world.lost.round()

    world.clock.advance(86400)
    world.begin_anew()
    world.lost.round()
    wait(world, SETTLING_SECONDS - 1)
    early = lost_rows(rows)
    # Time servers have put it right.
    world.clock.advance(-86400)
    wait(world, 60)
    corrected = lost_rows(rows)
    world.clock.advance(86400)
    wait(world, 60)

    assert early == corrected == [("n1", False)]
    assert lost_rows(rows) == [("n1", True)]


# two managers


@pytest.fixture
def other(store_url: str, settings: Settings, clock: FakeClock, world: LostWorld) -> Iterator[LostWorld]:
    """Give a second manager of the same store."""
    with closing(open_store(store_url, busy_timeout_seconds=10)) as opened:
        found = LostWorld(opened, settings, clock)
        found.monotonic = world.monotonic
        found.begin_anew()
        yield found


def together(*worlds: LostWorld) -> None:
    """Have both do a round at the same time."""
    ready = threading.Barrier(len(worlds))
    failures: list[BaseException] = []

    def run(world: LostWorld) -> None:
        ready.wait(10)
        try:
            world.lost.round()
        except BaseException as error:  # told below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(world,)) for world in worlds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []


def test_two_managers_at_once_tell_once_and_take_once(world: LostWorld, other: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    together(world, other)
    together(world, other)
    world.pass_time(RECLAIM_AFTER + 1)
    together(world, other)
    together(world, other)

    assert len(rows.events(EventType.NODE_LOST)) == 1
    assert len(rows.events(EventType.NODE_RECLAIMED)) == 1
    assert epoch_of(world.store, "n1") == 2
    assert_nothing_is_left(rows)


def test_a_manager_with_old_news_takes_nothing_from_a_node_that_is_back(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    wait(world, RECLAIM_AFTER - 60)
    (row,) = rows.of(tables.lost_nodes)
    world.see("n1")
    before = rows.everything()

    # As if it had read all this before the node was back.
    world.lost._reclaim("n1", row["lost_at"])

    assert rows.everything() == before


def test_a_manager_with_old_news_takes_nothing_from_a_node_that_is_lost_anew(world: LostWorld, rows: Rows) -> None:
    world.lose("n1")
    world.lost.round()
    (row,) = rows.of(tables.lost_nodes)
    world.see("n1")
    world.lost.round()
    world.lose("n1")
    world.lost.round()
    before = rows.everything()

    world.lost._reclaim("n1", row["lost_at"])

    assert rows.everything() == before


@pytest.mark.parametrize("in_hand", [True, False], ids=["in-hand", "back"])
def test_a_manager_with_old_news_tells_of_no_node_that_is_back(world: LostWorld, rows: Rows, in_hand: bool) -> None:
    world.lose("n1")
    if in_hand:
        world.registry.set_admin("n1", Admin.MAINTENANCE, "test")
    else:
        world.see("n1")
    before = rows.everything()

    world.lost._tell(["n1"])

    assert rows.everything() == before
