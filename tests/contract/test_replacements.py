# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the work of a node would go: proposals that fit together, keep the deployments' rules and change nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from builders import FakeClock, make_contact, make_request, observe
from lost_world import CAPACITY, LostWorld
from node_manager import replacements as replacements_module
from node_manager.domain import Admin
from node_manager.problems import NodeNotFoundError
from node_manager.replacements import Replacement
from node_manager.settings import Settings
from node_manager.store import Store
from stored import Rows


@pytest.fixture
def world(store: Store, settings: Settings, clock: FakeClock) -> LostWorld:
    """Give a fleet without nodes."""
    return LostWorld(store, settings, clock)


def test_of_names_a_node_for_each_allocation_and_why(world: LostWorld) -> None:
    for node_id in ("n1", "n2"):
        world.add(node_id)
    world.hold("n1", "a1", owner="shop", deployment_id="web")

    (found,) = world.replacements.of("n1")

    assert found.as_data() == {
        "allocation_id": "a1",
        "owner": "shop",
        "deployment_id": "web",
        "resources": {"memory_mib": 10},
        "to_node": "n2",
        "why": found.why,
    }
    assert found.why.startswith("the only one, score ")


def test_of_changes_nothing(world: LostWorld, rows: Rows) -> None:
    for node_id in ("n1", "n2", "n3"):
        world.add(node_id)
    world.place("web", replicas=3)
    before = rows.everything()

    first = world.replacements.of("n1")

    assert rows.everything() == before
    assert world.replacements.of("n1") == first
    # Nor does what was proposed count in the picture that others are placed by.
    assert len(world.place("next", memory_mib=90, replicas=3)) == 3


def test_of_a_node_that_holds_nothing_and_of_none(world: LostWorld) -> None:
    world.add("n1")

    assert world.replacements.of("n1") == []
    with pytest.raises(NodeNotFoundError):
        world.replacements.of("gone")


def test_proposals_fit_together(world: LostWorld) -> None:
    for node_id in ("n1", "n2", "n3"):
        world.add(node_id)
    world.hold("n1", "a1", "a2", "a3", memory_mib=30)
    world.hold("n2", "b1", memory_mib=60)
    world.hold("n3", "c1", memory_mib=60)

    found = world.replacements.of("n1")

    # There is room for one on each of the others.
    assert Counter(item.to_node for item in found) == {"n2": 1, "n3": 1, None: 1}
    (left,) = [item for item in found if item.to_node is None]
    assert left.why == "fits nowhere: of 2 other nodes were left out: 2 insufficient_memory_mib"


def test_proposals_for_devices_fit_together(world: LostWorld) -> None:
    for node_id in ("n1", "n2"):
        world.add(node_id)
    for name in ("a1", "a2", "a3"):
        share = {"gpu": {"count": 1, "share_milli": 600}}
        world.allocator.allocate("n1" if name != "a3" else "n2", make_request(name, share))

    assert Counter(world.targets("n1").values()) == {"n2": 1, None: 1}


def test_nodes_lost_together_are_no_replacement_for_each_other(world: LostWorld) -> None:
    for node_id in ("n1", "n2", "n3"):
        world.add(node_id)
    world.hold("n1", "a1", memory_mib=60)
    world.hold("n2", "b1", memory_mib=60)

    plans = world.replacements.plans(["n1", "n2"])

    targets = [item.to_node for plan in plans.values() for item in plan.items]
    assert Counter(targets) == {"n3": 1, None: 1}


def test_only_nodes_that_take_work_are_proposed(world: LostWorld) -> None:
    for node_id in ("n1", "n2", "n3", "n4"):
        world.add(node_id)
    world.hold("n1", "a1")
    world.registry.set_admin("n2", Admin.CORDONED, "test")
    world.log.record([observe("contact", make_contact(), world.clock.advance(1), "n3")])

    assert world.targets("n1") == {"a1": "n4"}


def test_filters_of_the_deployment_hold(world: LostWorld) -> None:
    world.add("n1", labels={"disk": "ssd"})
    world.add("n2")
    placed = world.place("web", constraints={"labels": {"disk": "ssd"}})

    (found,) = world.replacements.of("n1")

    assert placed == {"web:0": "n1"}
    assert (found.to_node, found.why) == (None, "fits nowhere: of 1 other nodes were left out: 1 label disk")


def test_spread_counts_the_replicas_that_stay(world: LostWorld) -> None:
    for node_id, zone in {"a1": "a", "a2": "a", "b1": "b", "c1": "c", "c2": "c"}.items():
        world.add(node_id, zone)
    # The larger node is the better one, but its zone has a replica already.
    world.add("b2", "b", capacity={**CAPACITY, "cpu_millicores": 8000, "memory_mib": 4000})
    placed = world.place("web", replicas=3, spread={"scope": "zone"})
    (lost,) = [node_id for node_id in placed.values() if node_id.startswith("c")]

    (target,) = world.targets(lost).values()

    assert target == ("c2" if lost == "c1" else "c1")


def test_spread_that_can_not_be_kept_is_the_reason(world: LostWorld) -> None:
    for node_id, zone in {"a1": "a", "a2": "a", "b1": "b"}.items():
        world.add(node_id, zone)
    placed = world.place("web", replicas=2, spread={"scope": "node"})
    (other,) = {"a1", "a2", "b1"}.difference(placed.values())
    world.registry.set_admin(other, Admin.CORDONED, "test")
    lost, stays = sorted(placed.values())

    (found,) = world.replacements.of(lost)

    assert found.to_node is None
    assert "1 spread" in found.why
    assert stays != lost


def test_a_zone_that_is_gone_does_not_count_as_empty(world: LostWorld) -> None:
    for node_id, zone in {"a1": "a", "a2": "a", "b1": "b", "b2": "b", "c1": "c"}.items():
        world.add(node_id, zone)
    world.place("web", replicas=3, spread={"scope": "zone"})

    (target,) = world.targets("c1").values()

    assert target is not None


def test_without_rules_another_node_than_the_replicas_have_is_preferred(world: LostWorld) -> None:
    for number in range(4):
        world.add(f"n{number}")
    placed = world.place("web", replicas=3)
    (idle,) = {f"n{number}" for number in range(4)}.difference(placed.values())

    for node_id in placed.values():
        assert list(world.targets(node_id).values()) == [idle]


def test_required_distance_counts_the_replicas_that_stay(world: LostWorld) -> None:
    for number in range(3):
        world.add(f"n{number}")
    placed = world.place("web", replicas=3, anti_affinity=[{"deployment_id": "web"}])

    for node_id in placed.values():
        (found,) = world.replacements.of(node_id)
        assert found.to_node is None
        assert "2 anti_affinity" in found.why


def test_nearness_follows_what_moves_with_it(world: LostWorld) -> None:
    for node_id, zone in {"n1": "a", "n2": "b"}.items():
        world.add(node_id, zone)
    # In the order of ids the one that follows comes first.
    world.place("z-base", constraints={"node_ids": ["n1"]})
    world.place("a-follower", affinity=[{"deployment_id": "z-base", "scope": "zone"}])

    found = {item.allocation_id: item for item in world.replacements.of("n1")}

    assert found["z-base:0"].to_node is None
    assert found["a-follower:0"].to_node is None
    assert "affinity" in found["a-follower:0"].why

    world.add("n3", "c")
    world.placer.delete("z-base")
    world.place("z-base")
    world.placer.delete("a-follower")
    placed = world.place("a-follower", affinity=[{"deployment_id": "z-base", "scope": "node"}])
    (home,) = set(placed.values())
    targets = world.targets(home)
    assert targets["a-follower:0"] == targets["z-base:0"]
    assert targets["z-base:0"] not in {None, home}


def test_of_is_bounded_and_says_so(world: LostWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    for node_id in ("n1", "n2"):
        world.add(node_id)
    world.hold("n1", "a1", "a2", "a3", memory_mib=1)
    monkeypatch.setattr(replacements_module, "MAX_ALLOCATIONS", 2)

    plan = world.replacements.plan("n1")

    assert [item.allocation_id for item in plan.items] == ["a1", "a2"]
    assert (plan.left_out, plan.computed_at) == (1, world.clock.now)


def test_an_allocation_of_another_size_than_its_deployment_asks_for_itself(world: LostWorld) -> None:
    for node_id in ("n1", "n2"):
        world.add(node_id)
    world.place("web", constraints={"node_ids": ["n2"]})
    world.hold("n1", "by-hand", memory_mib=95, deployment_id="web")

    (found,) = world.replacements.of("n1")

    assert isinstance(found, Replacement)
    assert (found.resources, found.to_node) == ({"memory_mib": 95}, None)
    assert "insufficient_memory_mib" in found.why
