# SPDX-License-Identifier: GPL-3.0-or-later
"""Advice on what to move: it pays, it breaks no constraint, it ends."""

from __future__ import annotations

import random
from typing import Any

import pytest
from builders import FakeClock, make_declaration, make_facts, make_report, make_sample, observe
from node_manager.advice import Optimiser, Suggestions
from node_manager.deployments import DeploymentPlacer, Placed
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.resource_allocator import AllocationRequest, ResourceAllocator
from node_manager.selection_request import SelectionRequest
from node_manager.settings import Settings
from node_manager.store import Store, tables

NODES = 8


class World:
    """A fleet of eight equal nodes in two zones, four of which came late."""

    def __init__(self, store: Store, settings: Settings, clock: FakeClock) -> None:
        self.store, self.settings, self.clock = store, settings, clock
        self.registry = NodeRegistry(store, settings, clock)
        self.log = ObservationLog(store, settings, clock)
        self.allocator = ResourceAllocator(store, settings, clock)
        self.placer = DeploymentPlacer(store, settings, self.allocator, clock)
        self.optimiser = Optimiser(store, settings, self.placer, clock)

    def add_nodes(self, numbers: range) -> None:
        """Register nodes and have them seen."""
        for number in numbers:
            node_id = f"n{number}"
            self.registry.register(make_declaration(node_id, location={"zone": f"z{number % 2}"}))
            at = self.clock.now
            documents = (("facts", make_facts()), ("sample", make_sample()), ("report", make_report()))
            self.log.record([observe(kind, data, at, node_id) for kind, data in documents])

    def place(self, name: str, cpu: int = 500, **changes: Any) -> Placed:
        """Place a deployment that must fit."""
        body = {"deployment_id": name, "owner": "team", "resources": {"cpu_millicores": cpu}, **changes}
        (outcome,) = self.placer.place([SelectionRequest.model_validate(body)])
        assert isinstance(outcome, Placed), outcome
        return outcome

    def follow(self, found: Suggestions) -> None:
        """Make the moves, in order, as a mover would: reserve there, release here."""
        for move in found.moves:
            old = self.allocator.get(move.allocation_id)
            request = AllocationRequest(f"{old.allocation_id}-moved", old.owner, old.ask, old.deployment_id)
            self.allocator.allocate(move.to_node, request)
            self.allocator.deallocate(move.from_node, move.allocation_id)


@pytest.fixture
def world(store: Store, settings: Settings, clock: FakeClock) -> World:
    """Give a fleet of which half is full and half is new."""
    found = World(store, settings, clock)
    found.add_nodes(range(4))
    return found


def crowd(world: World) -> None:
    """Fill the old nodes, then add new ones."""
    for number in range(24):
        world.place(f"d{number}", 400 + 50 * (number % 4))
    world.add_nodes(range(4, NODES))


def test_advice_lowers_the_imbalance_and_then_ends(world: World) -> None:
    crowd(world)

    found = world.optimiser.advice()
    world.follow(found)
    after = world.optimiser.advice()

    assert found.moves != ()
    assert not found.more
    assert after.moves == ()
    assert after.imbalance_before == pytest.approx(found.imbalance_after)
    assert found.imbalance_after < found.imbalance_before
    assert sum(move.gain for move in found.moves) == pytest.approx(found.imbalance_before - found.imbalance_after)


def test_advice_is_the_same_until_it_is_followed_and_remembers_since_when(world: World) -> None:
    crowd(world)
    first = world.optimiser.advice()

    world.clock.advance(60)
    second = world.optimiser.advice()

    assert second.moves == first.moves
    assert {move.since for move in second.moves} == {first.at}


def test_advice_changes_nothing(world: World) -> None:
    crowd(world)
    before = [world.placer.nodes_of(f"d{number}") for number in range(24)]

    world.optimiser.advice()

    assert [world.placer.nodes_of(f"d{number}") for number in range(24)] == before


@pytest.mark.parametrize(
    "constraint",
    [
        {"constraints": {"node_ids": ["n0", "n1", "n2", "n3"]}},
        {"ttl_seconds": 600},
        {"resources": {"cpu_millicores": 900, "gpu": 1}},
    ],
    ids=["listed-nodes", "unconfirmed", "device"],
)
def test_advice_leaves_what_may_not_move(world: World, constraint: dict[str, Any]) -> None:
    for number in range(4):
        world.registry.update(
            f"n{number}",
            make_declaration(f"n{number}", location={"zone": f"z{number % 2}"}, capacity={"gpu": 8}),
        )
    for number in range(12):
        world.place(f"d{number}", 900, **constraint)
    world.add_nodes(range(4, NODES))

    assert world.optimiser.advice().moves == ()


def test_advice_leaves_what_others_must_be_near_to(world: World) -> None:
    world.place("database", 3600, constraints={"node_ids": ["n0"]})
    with world.store.write() as connection:
        # Free to go as far as its own request says.
        request = world.placer.nodes_of("database")[0]
        assert request is not None
        request["constraints"]["node_ids"] = []
        connection.execute(tables.deployments.update().values(request=request))
    world.place("web", 100, affinity=[{"deployment_id": "database", "scope": "zone"}])
    world.add_nodes(range(4, NODES))

    assert "database" not in {move.deployment_id for move in world.optimiser.advice().moves}


@pytest.mark.parametrize("seed", range(6))
def test_advice_keeps_every_constraint_when_followed(world: World, seed: int) -> None:
    dice, refused = random.Random(seed), set[int]()
    for number in range(10):
        name = f"d{number}"
        rules: list[dict[str, Any]] = [
            {},
            {"anti_affinity": [{"deployment_id": name}]},
            {"spread": {"scope": "zone", "max_skew": 1}},
            {"affinity": [{"deployment_id": name, "scope": "zone"}]},
            {"constraints": {"zones": ["z0"]}},
            {"labels": {"app": "noisy"}, "anti_affinity": [{"deployment_labels": {"app": "noisy"}}]},
        ]
        body = {"deployment_id": name, "owner": "team", "resources": {"cpu_millicores": dice.randrange(200, 900)}}
        extra = {**dice.choice(rules), "replicas": dice.randrange(1, 4)}
        (outcome,) = world.placer.place([SelectionRequest.model_validate({**body, **extra})])
        if not isinstance(outcome, Placed):
            refused.add(number)
    world.add_nodes(range(4, NODES))

    found = world.optimiser.advice()
    world.follow(found)

    noisy: list[str] = []
    for number in range(10):
        if number in refused:
            continue
        request, allocations = world.placer.nodes_of(f"d{number}")
        assert request is not None
        where = [allocation.node_id for allocation in allocations]
        zones = [f"z{int(node_id[1:]) % 2}" for node_id in where]
        if request["anti_affinity"] and request["anti_affinity"][0]["deployment_id"]:
            assert len(set(where)) == len(where)
        if request["spread"]:
            assert abs(zones.count("z0") - zones.count("z1")) <= 1
        if request["affinity"]:
            assert len(set(zones)) == 1
        if request["constraints"]["zones"]:
            assert set(zones) == {"z0"}
        if request["labels"]:
            noisy += where
    assert len(set(noisy)) == len(noisy)
    for number in range(NODES):
        assert not world.allocator.books(f"n{number}")[0].overcommitted
    assert not found.moves or found.imbalance_after < found.imbalance_before
