# SPDX-License-Identifier: GPL-3.0-or-later
"""A picture of the fleet kept by the feed of changes is the one that is read anew, whoever wrote what, on either engine."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from builders import FakeClock, make_declaration, make_request, make_sample, observe
from fleet_rows_builder import make_selection_request
from fleet_world import World, make_world_settings
from node_manager.declarations import NodeChange
from node_manager.deployments import Placed
from node_manager.fleet_follower import follow
from node_manager.fleet_index import CELL_COLUMNS, CLASSES, FleetIndex
from node_manager.fleet_rows import NodeRow
from node_manager.ledger import Ledger
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.settings import Settings
from node_manager.store import Store, open_store

COLUMNS = ("blocked", "last_contact", "load", "stability", "tie")
PER_CLASS = ("available", "total", "share", "inverse")
PER_DEVICE = ("device_counts", "whole_units", "largest_share", "device_share")
LABELS = [{"app": "web"}, {"tier": "back"}, {"app": "web", "tier": "back"}, {"app": "db"}]


@pytest.fixture
def settings() -> Settings:
    """Give settings with a type that is overcommitted."""
    return make_world_settings()


@pytest.fixture
def other_store(store: Store, store_url: str) -> Iterator[Store]:
    """Open the same database once more, as a second manager does."""
    with closing(open_store(store_url, busy_timeout_seconds=5)) as opened:
        yield opened


class Follower:
    """An index that is kept current."""

    def __init__(self, store: Store, settings: Settings, clock: FakeClock) -> None:
        self.index = FleetIndex()
        self._store, self._settings, self._clock = store, settings, clock
        self._mark = 0

    def follow(self) -> FleetIndex:
        """Take over what changed."""
        with self._store.read() as connection:
            self._mark = follow(self.index, connection, self._settings, self._clock.now, self._mark, "nobody")
        self.index.tick(self._clock.now.timestamp())
        return self.index


def fresh(store: Store, settings: Settings, clock: FakeClock) -> FleetIndex:
    """Build an index from all there is."""
    return Follower(store, settings, clock).follow()


def seen(index: FleetIndex) -> dict[str, Any]:
    """Write down all that selection can see in an index, by node, without the order in which nodes came."""
    found: dict[str, Any] = {"rows": {row.node_id: as_values(row) for row in index.rows if row is not None}}
    cells = {name: {code: value for value, code in codes.items()} for name, codes in index._codes.items()}
    for node_id, place in index.place_of.items():
        assert index.rows[place] is not None
        cell = index.cell[place]
        found[node_id] = {
            **{name: getattr(index, name)[place].item() for name in COLUMNS},
            **{name: dict(zip(CLASSES, getattr(index, name)[:, place].tolist(), strict=True)) for name in PER_CLASS},
            **{name: cells[name].get(index.cell_codes[name][cell]) for name in CELL_COLUMNS},
            "position": str(index.position[:, place].tolist()),
            "devices": {name: free[place][free[place] > 0].tolist() for name, free in index.devices.items()},
        }
        for name in PER_DEVICE:
            columns = getattr(index, name)
            # A class that no node has (any more) may have a column or none.
            found[node_id][name] = {
                key: columns[key][place].item() for key in columns if index.device_counts[key][place]
            }
        found[node_id]["devices"] = {key: free for key, free in found[node_id]["devices"].items() if free}
    node_at = {place: node_id for node_id, place in index.place_of.items()}
    deployments = index.deployments
    found["holders"] = {
        name: {node_at[place]: count for place, count in held.items()} for name, held in deployments.holders.items()
    }
    found["deployments"] = dict(deployments.rows)
    found["labelled"] = [sorted(deployments.labelled(labels)) for labels in LABELS]
    cell_of = index.cell[: index.places]
    there = index.blocked[: index.places] != 1
    found["label nodes"] = [
        sorted(node_at[place] for place in np.flatnonzero(index.cells_of_deployments(labels)[cell_of] & there))
        for labels in LABELS
    ]
    found["repelling"] = [
        sorted(row.deployment_id for row in deployments.repellers_of(name, {"app": "web"}))
        for name in ("d1", "d2", "x")
    ]
    found["masks"] = [
        sorted(node_at[place] for place in np.flatnonzero(mask))
        for mask in (
            index.unblocked(),
            *(index.mask_of_label(key, ["x"]) for key in ("line", "disk")),
            *(index.mask_of_feature(name) for name in ("docker", "systemd")),
            index.mask_of_image("app:1"),
            *(index.cells_of("zone", [zone])[cell_of] & there for zone in "abc"),
        )
    ]
    found["blocked"] = index.blocked_counts()
    return found


def as_values(row: NodeRow) -> dict[str, Any]:
    """Turn a row into values to compare: nothing counted is the same as not counted."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    values["used_units"] = {name: dict(used) for name, used in row.used_units.items() if used}
    return values


def assert_same(one: FleetIndex, other: FleetIndex) -> None:
    """Compare two indexes part by part."""
    found, expected = seen(one), seen(other)
    assert found.keys() == expected.keys()
    for key in found:
        assert found[key] == expected[key], key


@pytest.mark.parametrize("seed", range(3))
def test_follow_gives_what_a_fresh_index_has(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock, seed: int
) -> None:
    dice = random.Random(seed)
    worlds = [World(each, settings, clock, dice) for each in (store, other_store)]
    follower = Follower(store, settings, clock)
    worlds[0].populate(8)

    for number in range(100):
        dice.choice(worlds).step()
        if dice.random() < 0.6:
            follower.follow()
        if number % 10 == 9:
            assert_same(follower.follow(), fresh(store, settings, clock))


@pytest.mark.parametrize("seed", range(10, 13))
def test_place_keeps_its_own_picture_as_a_fresh_one(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock, seed: int
) -> None:
    # What the placer counted itself is never read back, so it must have counted as the store did.
    dice = random.Random(seed)
    worlds = [World(each, settings, clock, dice) for each in (store, other_store)]
    worlds[0].populate(8)

    for number in range(80):
        dice.choice(worlds).step()
        if number % 8 == 7:
            for world in worlds:
                with world.placer.picture() as (index, now):
                    index.tick(now.timestamp())
                    assert_same(index, fresh(store, settings, clock))


def test_follow_reads_overcommit_back_when_pressure_is_over(
    store: Store, registry: NodeRegistry, log: ObservationLog, settings: Settings, clock: FakeClock
) -> None:
    registry.register(make_declaration("n1", node_type="edge", capacity={"cpu_millicores": 1000}))
    pressed = make_sample(10.0)
    pressed["cpu"]["pressure"] = {"some_avg60_percent": 60.0}
    log.record([observe("sample", pressed, clock.now, "n1")])
    follower = Follower(store, settings, clock)

    found = []
    for wait in (0, 599, 1):
        clock.advance(wait)
        found.append(follower.follow().row_of("n1").effective["cpu_millicores"])  # type: ignore[union-attr]

    assert found == [1000, 1000, 2000]


def test_follow_learns_that_a_node_left_and_came_back_under_the_same_name(
    store: Store, registry: NodeRegistry, settings: Settings, clock: FakeClock
) -> None:
    registry.register(make_declaration("n1", labels={"line": "x"}, capacity={"gpu": 2}))
    follower = Follower(store, settings, clock)
    follower.follow()

    registry.deregister("n1")
    gone = len(follower.follow())
    registry.register(make_declaration("n2", labels={"line": "y"}))
    registry.register(make_declaration("n1", labels={"line": "y"}))

    assert gone == 0
    assert_same(follower.follow(), fresh(store, settings, clock))


def test_follow_forgets_the_labels_of_a_deployment_that_lives_on_by_hand(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock
) -> None:
    world = World(store, settings, clock, random.Random(1))
    world.registry.register(make_declaration("n1", capacity={"memory_mib": 100}))
    world.see("n1")
    wanted = make_selection_request("web", {"memory_mib": 10}, labels={"app": "web"})
    (placed,) = world.placer.place([wanted])
    assert isinstance(placed, Placed)
    follower = Follower(other_store, settings, clock)
    follower.follow()

    world.placer.delete("web")
    world.allocator.allocate("n1", make_request("by-hand", deployment_id="web"))

    index = follower.follow()
    assert (dict(index.deployments.rows), index.deployments.labelled({"app": "web"})) == ({}, set())
    assert_same(index, fresh(store, settings, clock))


@pytest.mark.postgresql
def test_place_hears_of_what_was_committed_while_it_chose(
    postgresql_database: str, settings: Settings, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other writer began earlier and commits between the placer's look and its own write to the same node.
    with closing(open_store(postgresql_database)) as store, closing(open_store(postgresql_database)) as other_store:
        world, other = (World(each, settings, clock, random.Random(1)) for each in (store, other_store))
        world.registry.register(make_declaration("n1", node_type="server", capacity={"memory_mib": 100}))
        world.see("n1")
        with world.placer.picture():
            pass
        hold, wrote = Ledger.hold, []

        def hold_after_another(ledger: Ledger, owners: Any, node_ids: Any) -> None:
            if list(node_ids) and not wrote:
                wrote.append(True)
                thread = threading.Thread(target=other.allocator.allocate, args=("n1", make_request("a1", owner="lab")))
                thread.start()
                thread.join(30)
            hold(ledger, owners, node_ids)

        monkeypatch.setattr(Ledger, "hold", hold_after_another)
        # Only the placer's own: the allocator's hold comes with nodes too.
        (placed,) = world.placer.place([make_selection_request("web", {"memory_mib": 10})])

        assert isinstance(placed, Placed)
        with world.placer.picture() as (index, _):
            assert index.row_of("n1").allocated == {"memory_mib": 20}  # type: ignore[union-attr]
            assert_same(index, fresh(store, settings, clock))


def test_place_meets_a_change_of_labels_by_another_manager(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock
) -> None:
    world, other = (World(each, settings, clock, random.Random(1)) for each in (store, other_store))
    for node_id in ("n1", "n2"):
        world.registry.register(make_declaration(node_id, labels={"line": "x"}, capacity={"memory_mib": 100}))
        world.see(node_id)
    wanted = {"resources": {"memory_mib": 10}, "constraints": {"labels": {"line": "x"}}}
    first = world.placer.place([make_selection_request("d1", **wanted)])

    other.registry.update("n1", NodeChange.model_validate({"address": "192.0.2.7", "capacity": {"memory_mib": 100}}))
    clock.advance(1)
    later = [world.placer.place([make_selection_request(f"d{number}", **wanted)])[0] for number in range(2, 8)]

    assert isinstance(first[0], Placed)
    assert {item.node_id for placed in later if isinstance(placed, Placed) for item in placed.allocations} == {"n2"}
