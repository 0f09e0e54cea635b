# SPDX-License-Identifier: GPL-3.0-or-later
"""The managed workloads of nodes: known where a sample changes them, free of cost where it doesn't; and ghosts among them."""

from __future__ import annotations

from typing import Any

import pytest
from builders import FakeClock, make_container, make_containers, make_report, make_sample, observe, seconds
from lost_world import LostWorld, counted
from node_manager.domain import ConditionType, Health, Severity
from node_manager.events import EventType
from node_manager.ghosts import GRACE_SECONDS, LOOK_SECONDS
from node_manager.health_checker import Condition
from node_manager.samples import DEPLOYMENT_LABEL
from node_manager.settings import Settings
from node_manager.store import Store, tables
from node_manager.workloads import ALLOCATION_LABEL, MAX_WORKLOADS
from stored import Rows


@pytest.fixture
def world(store: Store, settings: Settings, clock: FakeClock) -> LostWorld:
    """Give two nodes, of which n1 holds two allocations."""
    found = LostWorld(store, settings, clock)
    for node_id in ("n1", "n2"):
        found.add(node_id)
    found.hold("n1", "a1", "a2")
    return found


def managed(rows: Rows) -> list[tuple[str, str, str, str | None]]:
    """Tell which managed workloads are stored."""
    return [
        (row["node_id"], row["container"], row["allocation_id"], row["deployment_id"])
        for row in rows.of(tables.node_workloads)
    ]


def owned(world: LostWorld, node_id: str = "n1") -> Condition | None:
    """Read the condition that is about ghosts."""
    return world.registry.get(node_id).state.condition(ConditionType.WORKLOADS_OWNED)


def look_for(world: LostWorld, duration: float) -> None:
    """Let time pass, with a round every five seconds; nodes send what they sent."""
    while duration > 0:
        world.pass_time(5)
        world.ghosts.round()
        duration -= 5


# what is stored


def test_a_sample_brings_the_managed_workloads(world: LostWorld, rows: Rows) -> None:
    containers = make_containers(
        make_container("web", labels={ALLOCATION_LABEL: "a1", DEPLOYMENT_LABEL: "shop"}),
        make_container("db", labels={ALLOCATION_LABEL: "a2"}),
        make_container("by-hand", labels={DEPLOYMENT_LABEL: "shop"}),
        make_container("other"),
    )

    world.see("n1", containers=containers)

    assert managed(rows) == [("n1", "db", "a2", None), ("n1", "web", "a1", "shop")]


def test_a_sample_that_lists_others_replaces_them_and_keeps_the_time_of_what_stays(
    world: LostWorld, rows: Rows
) -> None:
    world.see("n1", "a1", "a2")
    first = {row["container"]: row["seen_at"] for row in rows.of(tables.node_workloads)}

    world.see("n1", "a2", "a3")

    assert managed(rows) == [("n1", "c-a2", "a2", None), ("n1", "c-a3", "a3", None)]
    after = {row["container"]: row["seen_at"] for row in rows.of(tables.node_workloads)}
    assert after["c-a2"] == first["c-a2"]
    assert after["c-a3"] > first["c-a2"]


def test_a_container_with_another_allocation_is_another_workload(world: LostWorld, rows: Rows) -> None:
    for name in ("a1", "a2"):
        world.see("n1", containers=make_containers(make_container("web", labels={ALLOCATION_LABEL: name})))

    assert managed(rows) == [("n1", "web", "a2", None)]


def test_a_node_on_which_nothing_runs_any_more_has_no_workloads(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "a1")

    world.see("n1")

    assert managed(rows) == []


@pytest.mark.parametrize("state", ["exited", "created", "dead"])
def test_what_does_not_run_is_no_workload(world: LostWorld, rows: Rows, state: str) -> None:
    labels = {ALLOCATION_LABEL: "a1"}

    world.see("n1", containers=make_containers(make_container("web", state=state, labels=labels)))

    assert managed(rows) == []


@pytest.mark.parametrize("containers", [None, make_containers(runtime=None)], ids=["not-read", "no-runtime"])
def test_a_sample_that_can_not_tell_changes_nothing(
    world: LostWorld, rows: Rows, containers: dict[str, Any] | None
) -> None:
    world.see("n1", "a1")

    world.pass_time(1)
    world.log.record([observe("sample", make_sample(containers=containers), world.clock.now, "n1")])
    world.see("n1", "a1")

    assert managed(rows) == [("n1", "c-a1", "a1", None)]


def test_of_several_samples_in_a_batch_the_last_one_counts(world: LostWorld, rows: Rows) -> None:
    batch = []
    for name in ("a1", "a2"):
        world.pass_time(1)
        listed = make_containers(make_container(f"c-{name}", labels={ALLOCATION_LABEL: name}))
        batch.append(observe("sample", make_sample(containers=listed), world.clock.now, "n1"))

    world.log.record(batch)

    assert managed(rows) == [("n1", "c-a2", "a2", None)]


def test_a_late_sample_changes_nothing(world: LostWorld, rows: Rows) -> None:
    at = world.clock.now
    world.see("n1", "a1")

    world.log.record([observe("sample", make_sample(containers=make_containers()), at, "n1")])

    assert managed(rows) == [("n1", "c-a1", "a1", None)]


def test_what_a_node_lists_is_bounded_and_told_apart(world: LostWorld, rows: Rows) -> None:
    many = [make_container(f"c{number:04d}", labels={ALLOCATION_LABEL: "a1"}) for number in range(MAX_WORKLOADS + 50)]
    world.see("n1", containers=make_containers(*many))
    bounded = len(managed(rows))
    long = [make_container("x" * 250 + end, labels={ALLOCATION_LABEL: "é\ud800" * 200 + end}) for end in "ab"]

    world.see("n2", containers=make_containers(*long))

    assert bounded == MAX_WORKLOADS
    found = [row for row in managed(rows) if row[0] == "n2"]
    assert len({row[1] for row in found}) == len({row[2] for row in found}) == 2
    assert all(len(row[1]) <= 128 and len(row[2] or "") <= 128 for row in found)


def test_a_sample_without_change_costs_no_statement_more(world: LostWorld) -> None:
    for node_id in ("n1", "n2"):
        world.see(node_id, "a1", "a2")
        world.see(node_id)
    world.see("n1", "a1", "a2")

    def statements(node_id: str, *names: str) -> list[str]:
        world.pass_time(15)
        items = [make_container(f"c-{name}", labels={ALLOCATION_LABEL: name}) for name in names]
        sample = observe("sample", make_sample(containers=make_containers(*items)), world.clock.now, node_id)
        with counted(world.store) as found:
            world.log.record([sample])
        return found

    unmanaged = statements("n2")
    unchanged = statements("n1", "a1", "a2")
    changed = statements("n1", "a1")

    assert len(unchanged) == len(unmanaged)
    assert not [text for text in unchanged if "node_workloads" in text]
    assert [text for text in changed if "node_workloads" in text]


def test_workloads_are_written_with_their_sample_or_not_at_all(
    world: LostWorld, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows.everything()

    def fail(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr("node_manager.observations.add_to_history", fail)
        with pytest.raises(OSError, match="killed"):
            world.log.record(
                [
                    observe(
                        "sample",
                        make_sample(containers=make_containers(make_container("web", labels={ALLOCATION_LABEL: "a1"}))),
                        world.clock.advance(1),
                        "n1",
                    )
                ]
            )

    assert rows.everything() == before
    world.see("n1", "a1")
    assert len(managed(rows)) == 1


# ghosts


def test_workloads_with_their_allocation_are_no_ghosts(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "a1", "a2")

    look_for(world, 200)

    assert owned(world) is None
    assert rows.events(EventType.GHOSTS_FOUND) == []


def test_a_workload_without_allocation_is_a_ghost_after_its_grace(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "a1", "stray")
    world.ghosts.look()

    look_for(world, GRACE_SECONDS - 5)
    early = owned(world)
    look_for(world, LOOK_SECONDS + 5)
    found = owned(world)

    assert early is None
    assert found is not None
    assert (found.status, found.severity, found.reason, found.message) == (
        False,
        Severity.WARNING,
        "NotOwned",
        "1 container without an allocation on this node, to be stopped: c-stray (allocation stray is gone)",
    )
    (event,) = rows.events(EventType.GHOSTS_FOUND)
    assert (event["node_id"], event["data"]) == (
        "n1",
        {
            "epoch": 1,
            "containers": [
                {"container": "c-stray", "allocation_id": "stray", "deployment_id": None, "owner_node": None}
            ],
            "left_out": 0,
        },
    )


def test_a_ghost_weighs_as_a_warning_and_the_node_takes_work(world: LostWorld) -> None:
    world.see("n1", "stray")
    look_for(world, 100)

    world.see("n1", "stray")

    node = world.registry.get("n1")
    assert node.state.health is Health.DEGRADED
    assert node.schedulable(world.clock.now, seconds(180))
    assert owned(world) is not None


def test_a_workload_whose_allocation_is_on_another_node_is_a_ghost(world: LostWorld, rows: Rows) -> None:
    world.see("n2", "a1")

    look_for(world, 100)

    found = owned(world, "n2")
    assert found is not None
    assert found.message.endswith("c-a1 (allocation a1 is on n1)")
    assert owned(world, "n1") is None


def test_work_whose_allocation_comes_in_time_was_never_a_ghost(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "soon")
    look_for(world, GRACE_SECONDS - 20)

    world.hold("n1", "soon")
    look_for(world, 200)

    assert owned(world) is None


def test_work_that_ends_soon_after_its_release_was_never_a_ghost(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "a1", "a2")
    look_for(world, 100)

    world.allocator.deallocate("n1", "a1")
    look_for(world, GRACE_SECONDS - 20)
    world.see("n1", "a2")
    look_for(world, 200)

    assert owned(world) is None


def test_ghosts_are_told_once_per_change_and_cleared(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "stray")
    look_for(world, 100)
    look_for(world, 100)
    since = owned(world)
    world.see("n1", "stray", "other")
    look_for(world, GRACE_SECONDS - 20)
    meanwhile = owned(world)
    look_for(world, 60)
    both = owned(world)

    world.see("n1", "a1")
    look_for(world, LOOK_SECONDS)
    cleared = owned(world)
    world.see("n1", "a1")

    assert since == meanwhile
    assert since is not None
    assert both is not None
    assert (both.since, both.status) == (since.since, False)
    assert [len(event["data"]["containers"]) for event in rows.events(EventType.GHOSTS_FOUND)] == [1, 2]
    assert cleared is not None
    assert (cleared.status, cleared.message) == (True, "")
    assert world.registry.get("n1").state.health is Health.HEALTHY


def test_ghosts_that_get_an_allocation_are_cleared(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "stray")
    look_for(world, 100)

    world.hold("n1", "stray")
    look_for(world, LOOK_SECONDS)

    found = owned(world)
    assert found is not None
    assert found.status


def test_a_manager_that_starts_again_neither_forgets_ghosts_nor_tells_them_twice(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "stray")
    look_for(world, 100)
    before = owned(world)

    world.begin_anew()
    world.ghosts.look()
    soon = owned(world)
    look_for(world, 200)

    assert before == soon == owned(world)
    assert len(rows.events(EventType.GHOSTS_FOUND)) == 1


def test_a_look_after_a_pause_begins_the_grace_anew(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "stray")
    world.ghosts.look()

    world.pass_time(2 * GRACE_SECONDS)
    world.ghosts.look()

    assert owned(world) is None


def test_the_workloads_of_a_node_that_is_out_of_reach_are_not_judged(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "a1", "stray")
    look_for(world, 100)
    before = owned(world)
    world.lose("n1")
    world.allocator.deallocate("n1", "a1")

    look_for(world, 200)

    assert owned(world) == before
    assert len(rows.events(EventType.GHOSTS_FOUND)) == 1


def test_a_node_that_is_back_after_its_work_was_taken_has_ghosts(world: LostWorld, rows: Rows) -> None:
    world.see("n1", "a1", "a2")
    world.lose("n1")
    world.lost.round()
    world.pass_time(world.settings.configuration.recovery.reclaim_after_seconds + 1)
    world.lost.round()
    world.see("n1", "a1", "a2")

    look_for(world, 100)

    (event,) = rows.events(EventType.GHOSTS_FOUND)
    assert event["data"]["epoch"] == 2
    assert [item["allocation_id"] for item in event["data"]["containers"]] == ["a1", "a2"]


def test_a_look_without_ghosts_writes_nothing(world: LostWorld) -> None:
    world.see("n1", "a1")

    with counted(world.store) as statements:
        world.ghosts.look()

    assert len([text for text in statements if text.startswith("SELECT")]) == 2
    assert not [text for text in statements if not text.startswith(("SELECT", "BEGIN"))]


def test_a_look_at_ghosts_that_are_told_writes_nothing(world: LostWorld) -> None:
    world.see("n1", "stray")
    look_for(world, 100)

    with counted(world.store) as statements:
        world.ghosts.look()

    # Nor does it hold up who writes.
    assert len([text for text in statements if text.startswith("SELECT")]) == 2
    assert not [text for text in statements if not text.startswith(("SELECT", "BEGIN"))]


def test_many_ghosts_are_named_by_number(world: LostWorld) -> None:
    world.see("n1", *(f"s{number:03d}" for number in range(120)))

    look_for(world, 100)

    found = owned(world)
    assert found is not None
    assert found.message.startswith("120 containers without")
    assert found.message.endswith("and 115 more")


def test_a_check_leaves_the_condition_standing(world: LostWorld) -> None:
    world.see("n1", "stray")
    look_for(world, 100)

    world.log.record([observe("report", make_report(), world.clock.advance(1), "n1")])

    found = owned(world)
    assert found is not None
    assert not found.status
