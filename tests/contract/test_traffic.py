# SPDX-License-Identifier: GPL-3.0-or-later
"""Weights and load as load balancers are told them, from what is stored, on either engine."""

from __future__ import annotations

import random

import pytest
from builders import FakeClock, make_declaration, make_report, make_request, make_sample, make_settings, observe
from fleet_rows_builder import make_selection_request
from fleet_world import World
from node_manager.domain import Admin
from node_manager.load_distribution import TrafficState
from node_manager.problems import DeploymentNotFoundError
from node_manager.settings import Settings
from node_manager.store import Store, tables
from node_manager.traffic import Traffic
from stored import Rows


@pytest.fixture
def settings() -> Settings:
    """Give settings."""
    return make_settings()


@pytest.fixture
def world(store: Store, settings: Settings, clock: FakeClock) -> World:
    """Give three nodes of 100 MiB, on each a replica of web."""
    found = World(store, settings, clock, random.Random(1))
    for node_id in ("n1", "n2", "n3"):
        found.registry.register(make_declaration(node_id, capacity={"memory_mib": 100}, location={"zone": "a"}))
        found.see(node_id)
    found.placer.place(
        [make_selection_request("web", {"memory_mib": 10}, replicas=3, anti_affinity=[{"deployment_id": "web"}])]
    )
    return found


@pytest.fixture
def traffic(world: World, store: Store, settings: Settings, clock: FakeClock) -> Traffic:
    """Give the advice."""
    return Traffic(store, settings, world.placer, clock)


def weights(traffic: Traffic, deployment_id: str = "web") -> dict[str, int]:
    """Give the weights by node."""
    return {weight.node_id: weight.weight for weight in traffic.weights_of(deployment_id)}


def busy(world: World, node_id: str, cpu_percent: float) -> None:
    """See a node, so busy."""
    world.log.record([observe("sample", make_sample(cpu_percent), world.clock.advance(1), node_id)])


def test_weights_of_equal_nodes_are_equal(traffic: Traffic) -> None:
    assert sorted(weights(traffic).values()) == [33, 33, 34]


def test_weights_of_follow_load(world: World, traffic: Traffic) -> None:
    busy(world, "n1", 90.0)

    found = weights(traffic)

    assert sum(found.values()) == 100
    assert found["n1"] < 10 < found["n2"]


def test_weights_of_hold_small_changes_and_remember_large_ones(world: World, traffic: Traffic, rows: Rows) -> None:
    first = weights(traffic)
    busy(world, "n1", 14.0)
    held = weights(traffic)
    busy(world, "n1", 80.0)
    changed = weights(traffic)

    assert held == first != changed
    assert rows.of(tables.deployments)[0]["weights"] == changed


def test_weights_of_writes_nothing_where_nothing_changed(traffic: Traffic, rows: Rows) -> None:
    weights(traffic)
    before = rows.everything()

    weights(traffic)

    assert rows.everything() == before


def test_weights_of_takes_nodes_out_that_are_out(world: World, traffic: Traffic) -> None:
    world.registry.set_admin("n1", Admin.MAINTENANCE, "new disk")
    world.clock.advance(1)
    world.log.record([observe("report", make_report(("critical", "failed")), world.clock.now, "n2")])

    found = {weight.node_id: weight for weight in traffic.weights_of("web")}

    assert found["n1"].weight == 0
    assert found["n1"].state is not TrafficState.READY
    assert found["n2"].weight < found["n3"].weight
    assert sum(weight.weight for weight in found.values()) == 100


def test_weights_of_gives_a_node_that_came_back_half(world: World, traffic: Traffic) -> None:
    verdict = {"liveness": "unreachable", "reason": "TimedOut", "message": ""}
    world.log.record([observe("verdict", verdict, world.clock.advance(20), "n1")], from_manager=True)
    for pause in (1, 15, 15):
        world.clock.advance(pause)
        for node_id in ("n1", "n2", "n3"):
            world.see(node_id)

    during = weights(traffic)
    world.clock.advance(121)
    for node_id in ("n1", "n2", "n3"):
        world.see(node_id)

    assert during["n1"] == 20
    assert weights(traffic)["n1"] > 30


def test_weights_of_counts_replicas(world: World, traffic: Traffic) -> None:
    for number in range(3):
        node_id = "n1" if number else "n2"
        world.allocator.allocate(node_id, make_request(f"a{number}", {"memory_mib": 1}, deployment_id="by-hand"))

    assert weights(traffic, "by-hand") == {"n1": 67, "n2": 33}


def test_weights_of_an_unknown_deployment_says_so(traffic: Traffic) -> None:
    with pytest.raises(DeploymentNotFoundError):
        traffic.weights_of("nobody")


def test_load_tells_of_every_node_in_order(world: World, traffic: Traffic) -> None:
    world.registry.set_admin("n2", Admin.CORDONED, "test")
    busy(world, "n3", 55.0)
    world.registry.register(make_declaration("n0"))

    found = {load.node_id: load for load in traffic.load()}

    assert list(found) == ["n0", "n1", "n2", "n3"]
    assert {name: (load.schedulable, load.reason) for name, load in found.items()} == {
        "n0": (False, "unhealthy"),
        "n1": (True, None),
        "n2": (False, "not_active"),
        "n3": (True, None),
    }
    # 30 % of memory in use, and 10 of 100 MiB reserved in the moment of the sample.
    assert (found["n1"].idle_percent, found["n3"].idle_percent) == (60, 45)
    assert (found["n1"].deployments, found["n0"].deployments) == (1, 0)


def test_load_tells_of_silence(world: World, traffic: Traffic) -> None:
    world.clock.advance(10_000)
    world.see("n1")

    assert [(load.node_id, load.reason) for load in traffic.load()] == [("n1", None), ("n2", "stale"), ("n3", "stale")]
