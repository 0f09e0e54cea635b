# SPDX-License-Identifier: GPL-3.0-or-later
"""What placing deployments promises, on either engine: all or none, once, never more than there is."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from books import assert_books_add_up, assert_nothing_is_left
from builders import FakeClock, make_declaration, make_request, make_settings
from fleet_rows_builder import make_selection_request
from fleet_world import World
from node_manager import deployments
from node_manager.deployments import DeploymentPlacer, Placed
from node_manager.events import EventType
from node_manager.ledger import Ledger
from node_manager.problems import (
    ConflictError,
    DeploymentExistsError,
    DeploymentNotFoundError,
    InvalidInputError,
    NothingFitsError,
    ProblemError,
    QuotaExceededError,
)
from node_manager.quotas import Quotas
from node_manager.selection_request import SelectionRequest
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError, open_store, tables
from stored import Rows

CAPACITY = {"cpu_millicores": 1000, "memory_mib": 100, "gpu": 2}
ZONES = {"n1": "a", "n2": "a", "n3": "b"}


@pytest.fixture
def settings() -> Settings:
    """Give settings that allow an hour to confirm, and ten replicas."""
    return make_settings({"allocation": {"max_ttl_seconds": 3600}, "selection": {"max_replicas": 10}})


@pytest.fixture
def world(store: Store, settings: Settings, clock: FakeClock) -> World:
    """Give three nodes of 100 MiB and 2 GPUs each in two zones."""
    return populated(World(store, settings, clock, random.Random(1)))


@pytest.fixture
def placer(world: World) -> DeploymentPlacer:
    """Give the placer."""
    return world.placer


@pytest.fixture
def other_store(store: Store, store_url: str) -> Iterator[Store]:
    """Open the same database once more, as a second manager does."""
    with closing(open_store(store_url, busy_timeout_seconds=10)) as opened:
        yield opened


def populated(world: World) -> World:
    """Register the nodes and see them."""
    for node_id, zone in ZONES.items():
        world.registry.register(
            make_declaration(node_id, capacity=CAPACITY, location={"region": "r", "zone": zone, "site": zone})
        )
        world.see(node_id)
    return world


def wanted(deployment_id: str = "web", memory_mib: int = 10, **more: Any) -> SelectionRequest:
    """Ask for memory."""
    return make_selection_request(deployment_id, {"memory_mib": memory_mib}, **more)


def placed(placer: DeploymentPlacer, *requests: SelectionRequest) -> list[Placed]:
    """Place what fits."""
    outcomes = placer.place(requests)
    assert all(isinstance(outcome, Placed) for outcome in outcomes), outcomes
    return outcomes  # type: ignore[return-value]


def refused(outcome: Placed | ProblemError, kind: type[ProblemError]) -> ProblemError:
    """Expect a problem."""
    assert type(outcome) is kind, outcome
    return outcome


# place


def test_place_reserves_every_replica(placer: DeploymentPlacer, rows: Rows, clock: FakeClock) -> None:
    (outcome,) = placed(placer, wanted(replicas=3))

    assert [item.allocation_id for item in outcome.allocations] == ["web:0", "web:1", "web:2"]
    assert sorted(item.node_id for item in outcome.allocations) == ["n1", "n2", "n3"]
    assert {(item.owner, item.deployment_id, item.expires_at) for item in outcome.allocations} == {
        ("shop", "web", None)
    }
    assert (outcome.created, outcome.at) == (True, clock.now)
    assert len(rows.events(EventType.ALLOCATION_RESERVED)) == 3
    assert_books_add_up(rows)


def test_place_reserves_the_units_it_says(placer: DeploymentPlacer, rows: Rows) -> None:
    request = make_selection_request(resources={"gpu": {"count": 2, "share_milli": 400}}, replicas=5)

    (outcome,) = placed(placer, request)

    assert [item.units for item in outcome.allocations] == [node["units"] for node in outcome.answer["nodes"]]
    assert_books_add_up(rows)


def test_place_the_same_again_gives_what_is_there(placer: DeploymentPlacer, rows: Rows, clock: FakeClock) -> None:
    (first,) = placed(placer, wanted(replicas=2, explain=True))
    clock.advance(5)
    before = rows.everything()

    (again,) = placed(placer, wanted(replicas=2))

    assert (again.created, again.allocations, again.at) == (False, first.allocations, first.at)
    assert (again.decision_id, again.answer) == (first.decision_id, first.answer)
    assert rows.everything() == before


def test_place_the_same_again_by_another_manager_gives_what_is_there(
    placer: DeploymentPlacer, other_store: Store, settings: Settings, clock: FakeClock
) -> None:
    other = World(other_store, settings, clock, random.Random(1)).placer
    (first,) = placed(placer, wanted())

    (again,) = placed(other, wanted())

    assert (again.created, again.allocations) == (False, first.allocations)


def test_place_another_request_under_the_same_id_is_refused(placer: DeploymentPlacer, rows: Rows) -> None:
    (first,) = placed(placer, wanted())
    before = rows.of(tables.allocations)

    problem = refused(placer.place([wanted(memory_mib=11)])[0], DeploymentExistsError)

    assert (problem.status, problem.code) == (409, "deployment_exists")
    assert "DELETE /deployment/web" in problem.detail
    assert problem.extra["decision_id"] == first.decision_id
    assert rows.of(tables.allocations) == before


def test_place_all_or_none_of_the_replicas(placer: DeploymentPlacer, rows: Rows) -> None:
    problem = refused(placer.place([wanted(memory_mib=60, replicas=4)])[0], NothingFitsError)

    assert {"kind": "request", "text": "ask for 3 replicas", "patch": {"replicas": 3}} in problem.extra["changes"]
    assert problem.extra["rejected"] == {"taken_by_other_replicas": 3}
    assert_nothing_is_left(rows)
    assert len(placed(placer, wanted(memory_mib=60, replicas=3))[0].allocations) == 3


@pytest.mark.parametrize("change", [{"dry_run": True}, {"reserve": False}])
def test_place_without_reserving_leaves_nothing_reserved(
    placer: DeploymentPlacer, rows: Rows, change: dict[str, bool]
) -> None:
    (outcome,) = placed(placer, wanted(memory_mib=60, replicas=3, **change))

    assert (outcome.allocations, len(outcome.answer["nodes"])) == ((), 3)
    assert (outcome.decision_id is None) is change.get("dry_run", False)
    assert rows.of(tables.deployments) == []
    assert_nothing_is_left(rows)
    assert [each.allocations != () for each in placed(placer, wanted(memory_mib=60, replicas=3))] == [True]


def test_place_a_dry_run_says_what_would_be_chosen(placer: DeploymentPlacer) -> None:
    (dry,) = placed(placer, wanted(dry_run=True))
    (real,) = placed(placer, wanted())

    assert dry.answer == real.answer


# batches


def test_place_a_batch_each_for_itself_and_in_order(placer: DeploymentPlacer, rows: Rows) -> None:
    outcomes = placer.place([wanted("d1", 80, replicas=3), wanted("d2", 80), wanted("d3", 20, replicas=3)])

    assert [type(outcome) for outcome in outcomes] == [Placed, NothingFitsError, Placed]
    assert len(rows.of(tables.allocations)) == 6
    assert_books_add_up(rows)


def test_place_the_same_twice_in_a_batch_places_it_once(placer: DeploymentPlacer, rows: Rows) -> None:
    first, again = placed(placer, wanted(), wanted(explain=True))

    assert (first.created, again.created) == (True, False)
    assert again.allocations == first.allocations != ()
    assert len(rows.of(tables.allocations)) == 1


def test_place_two_requests_of_one_id_in_a_batch_refuses_the_second(placer: DeploymentPlacer, rows: Rows) -> None:
    first, second = placer.place([wanted(memory_mib=10), wanted(memory_mib=20)])

    assert isinstance(first, Placed)
    assert "at the same time" in refused(second, DeploymentExistsError).detail
    assert_books_add_up(rows)


@pytest.mark.parametrize("change", [{"dry_run": True}, {"reserve": False}])
def test_place_in_a_batch_reserves_what_was_only_tried_before(
    placer: DeploymentPlacer, rows: Rows, change: dict[str, bool]
) -> None:
    tried, real = placed(placer, wanted(**change), wanted())

    assert (tried.allocations, len(real.allocations)) == ((), 1)
    assert [row["allocation_id"] for row in rows.of(tables.allocations)] == ["web:0"]


def test_place_a_batch_respects_what_came_earlier_in_it(placer: DeploymentPlacer) -> None:
    first, second = placed(
        placer,
        wanted("db", anti_affinity=[{"scope": "zone", "deployment_labels": {"app": "web"}}]),
        wanted("web", labels={"app": "web"}, replicas=2),
    )

    zones = [{ZONES[item.node_id] for item in outcome.allocations} for outcome in (first, second)]
    assert zones[0].isdisjoint(zones[1])


def test_place_a_batch_finds_a_neighbour_that_came_earlier_in_it(placer: DeploymentPlacer) -> None:
    first, second = placed(placer, wanted("db"), wanted("web", affinity=[{"deployment_id": "db"}]))

    assert second.allocations[0].node_id == first.allocations[0].node_id


# quota


def test_place_counts_earlier_ones_of_the_batch_against_the_quota(
    placer: DeploymentPlacer, quotas: Quotas, rows: Rows
) -> None:
    quotas.put("shop", {"memory_mib": 50})

    outcomes = placer.place([wanted("d1", 20, replicas=2), wanted("d2", 20), wanted("d3", 10)])

    assert [type(outcome) for outcome in outcomes] == [Placed, QuotaExceededError, Placed]
    problem = refused(outcomes[1], QuotaExceededError)
    assert problem.status == 403
    assert problem.extra["exceeded"] == [{"resource": "memory_mib", "hard": 50, "used": 40, "requested": 20}]
    assert_books_add_up(rows)


def test_place_counts_all_replicas_and_shares_against_the_quota(placer: DeploymentPlacer, quotas: Quotas) -> None:
    quotas.put("shop", {"gpu": 1})
    request = make_selection_request(resources={"gpu": {"count": 1, "share_milli": 400}}, replicas=3)

    problem = refused(placer.place([request])[0], QuotaExceededError)

    assert problem.extra["exceeded"] == [{"resource": "gpu", "hard": 1, "used": 0, "requested": 1.2}]


@pytest.mark.parametrize("change", [{"dry_run": True}, {"reserve": False}])
def test_place_without_reserving_needs_no_quota(
    placer: DeploymentPlacer, quotas: Quotas, change: dict[str, bool]
) -> None:
    quotas.put("shop", {"memory_mib": 0})

    placed(placer, wanted(**change))


# what can't be asked


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "more replicas than are allowed": ({"replicas": 11}, "replicas"),
    "a time too long": ({"ttl_seconds": 3601}, "ttl_seconds"),
    "an unknown type": ({"constraints": {"node_types": ["server", "toaster"]}}, "constraints.node_types.1"),
    "an unknown class": ({"resources": {"memory_mb": 1}}, "resources.memory_mb"),
    "near a deployment that isn't there": (
        {"affinity": [{"mode": "preferred", "deployment_id": "db"}, {"deployment_id": "db"}]},
        "affinity.1.deployment_id",
    ),
}


@pytest.mark.parametrize(("change", "field"), BAD.values(), ids=BAD)
def test_place_refuses_what_can_never_be_and_names_the_field(
    placer: DeploymentPlacer, rows: Rows, change: dict[str, Any], field: str
) -> None:
    problem, fine = placer.place([make_selection_request(**{"resources": {"memory_mib": 1}, **change}), wanted("d2")])

    assert refused(problem, InvalidInputError).extra["errors"][0]["field"] == field
    assert isinstance(fine, Placed)
    assert len(rows.of(tables.decisions)) == 1


def test_place_over_an_allocation_made_by_hand_is_refused(placer: DeploymentPlacer, world: World, rows: Rows) -> None:
    world.allocator.allocate("n1", make_request("web:1"))
    before = rows.of(tables.allocations)

    problem = refused(placer.place([wanted(replicas=2)])[0], ConflictError)

    assert problem.status == 409
    assert "choose another deployment_id" in problem.detail
    assert rows.of(tables.allocations) == before


# the end of a deployment


def test_delete_releases_everything(placer: DeploymentPlacer, rows: Rows) -> None:
    placed(placer, wanted(replicas=3))

    released = placer.delete("web")

    assert released == 3
    assert rows.of(tables.deployments) == []
    assert {event["data"]["reason"] for event in rows.events(EventType.ALLOCATION_RELEASED)} == {"deployment_deleted"}
    assert_nothing_is_left(rows)
    with pytest.raises(DeploymentNotFoundError, match="nothing is reserved"):
        placer.delete("web")


def test_delete_makes_room_for_others_at_once(placer: DeploymentPlacer) -> None:
    for number in range(5):
        placed(placer, wanted(f"d{number}", 90, replicas=3))
        placer.delete(f"d{number}")


def test_place_what_was_deleted_places_it_anew(placer: DeploymentPlacer) -> None:
    placed(placer, wanted())
    placer.delete("web")

    (again,) = placed(placer, wanted(memory_mib=20))

    assert again.created


def test_place_with_ttl_expires_unless_confirmed(placer: DeploymentPlacer, rows: Rows, clock: FakeClock) -> None:
    placed(placer, wanted("kept", 60, replicas=2, ttl_seconds=60), wanted("lost", 60, ttl_seconds=60))

    confirmed = placer.confirm("kept")
    clock.advance(60)
    (later,) = placed(placer, wanted("next", 60))

    assert [item.expires_at for item in confirmed] == [None, None]
    assert {row["deployment_id"] for row in rows.of(tables.allocations)} == {"kept", "next"}
    assert [row["deployment_id"] for row in rows.of(tables.deployments)] == ["kept", "next"]
    assert later.created
    with pytest.raises(DeploymentNotFoundError):
        placer.confirm("lost")
    assert_books_add_up(rows)


def test_confirm_twice_does_no_harm(placer: DeploymentPlacer, rows: Rows) -> None:
    placed(placer, wanted(ttl_seconds=60))

    first, again = placer.confirm("web"), placer.confirm("web")

    assert first == again
    assert len(rows.events(EventType.ALLOCATION_CONFIRMED)) == 1


def test_deallocate_of_the_last_replica_ends_the_deployment(placer: DeploymentPlacer, world: World, rows: Rows) -> None:
    (outcome,) = placed(placer, wanted(replicas=2))
    first, last = outcome.allocations

    world.allocator.deallocate(first.node_id, first.allocation_id)
    after_one = len(rows.of(tables.deployments))
    world.allocator.deallocate(last.node_id, last.allocation_id)

    assert (after_one, rows.of(tables.deployments)) == (1, [])
    with pytest.raises(DeploymentNotFoundError):
        placer.nodes_of("web")
    assert placed(placer, wanted(memory_mib=30))[0].created


def test_nodes_of_gives_request_and_allocations(placer: DeploymentPlacer, world: World) -> None:
    (outcome,) = placed(placer, wanted(replicas=2))
    world.allocator.allocate("n1", make_request("a1", deployment_id="by-hand"))

    request, held = placer.nodes_of("web")
    by_hand = placer.nodes_of("by-hand")

    assert (request or {})["resources"] == {"memory_mib": 10}
    assert held == list(outcome.allocations)
    assert (by_hand[0], len(by_hand[1])) == (None, 1)


# other writers


def test_place_is_not_fooled_by_what_others_reserved(
    placer: DeploymentPlacer, other_store: Store, settings: Settings, clock: FakeClock, rows: Rows
) -> None:
    other = World(other_store, settings, clock, random.Random(1))
    placed(placer, wanted("d0", 1))
    placed(other.placer, wanted("d1", 90, constraints={"node_ids": ["n1"]}))
    other.allocator.allocate("n2", make_request("a1", {"memory_mib": 90}))

    (outcome,) = placed(placer, wanted("d2", 50))

    assert outcome.allocations[0].node_id == "n3"
    assert_books_add_up(rows)


@pytest.mark.timeout(120)
def test_place_by_two_managers_at_once_fills_the_fleet_and_oversells_nothing(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock, rows: Rows
) -> None:
    worlds = [
        populated(World(store, settings, clock, random.Random(1))),
        World(other_store, settings, clock, random.Random(2)),
    ]

    def fill(number: int) -> int:
        done = 0
        for turn in range(60):
            batch = [wanted(f"d{number}-{turn}-{each}", 5) for each in range(2)]
            outcomes = worlds[number].placer.place(batch)
            done += sum(isinstance(outcome, Placed) for outcome in outcomes)
            if not any(isinstance(outcome, Placed) for outcome in outcomes):
                break
        return done

    # Both have a picture from before the other's writes, whoever is faster then.
    for number, world in enumerate(worlds):
        placed(world.placer, wanted(f"first-{number}", 5))
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(fill, range(2)))

    # Three nodes of 100 MiB, 5 each.
    assert 2 + sum(done) == 60
    assert [row["allocated"]["memory_mib"] for row in rows.of(tables.node_accounts)] == [100, 100, 100]
    assert_books_add_up(rows)


@pytest.mark.timeout(120)
def test_place_beside_an_allocator_at_once_oversells_nothing(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock, rows: Rows
) -> None:
    world = populated(World(store, settings, clock, random.Random(1)))
    other = World(other_store, settings, clock, random.Random(2))

    def allocate() -> int:
        done = 0
        for number in range(60):
            try:
                other.allocator.allocate(
                    f"n{number % 3 + 1}", make_request(f"a{number}", {"memory_mib": 5}, owner="lab")
                )
            except ProblemError:
                continue
            done += 1
        return done

    def place() -> int:
        return sum(isinstance(world.placer.place([wanted(f"d{number}", 5)])[0], Placed) for number in range(60))

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(allocate), pool.submit(place)]
        done = [future.result() for future in futures]

    assert sum(done) == 60
    assert_books_add_up(rows)


def test_place_keeps_zones_apart_whoever_places(
    placer: DeploymentPlacer, other_store: Store, settings: Settings, clock: FakeClock
) -> None:
    other = World(other_store, settings, clock, random.Random(1)).placer
    labelled = {"labels": {"app": "web"}, "anti_affinity": [{"scope": "zone", "deployment_labels": {"app": "web"}}]}

    outcomes = [
        (placer, other)[number % 2].place([wanted(f"d{number}", **labelled)])[0]  # type: ignore[arg-type]
        for number in range(3)
    ]

    assert [type(outcome) for outcome in outcomes] == [Placed, Placed, NothingFitsError]
    zones = {ZONES[outcome.allocations[0].node_id] for outcome in outcomes if isinstance(outcome, Placed)}
    assert zones == {"a", "b"}


# what goes wrong in between


class PowerCutError(Exception):
    """The end of everything, at a bad moment."""


@pytest.mark.parametrize("strategy", ["balanced", "binpack"])
def test_place_that_breaks_off_leaves_index_and_store_agreeing(
    placer: DeploymentPlacer, rows: Rows, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    placed(placer, wanted("d0", 10, strategy=strategy))
    before = rows.everything()

    with monkeypatch.context() as broken:
        write = Ledger.write

        def break_off(ledger: Ledger) -> None:
            write(ledger)
            raise PowerCutError

        broken.setattr(Ledger, "write", break_off)
        with pytest.raises(PowerCutError):
            placer.place([wanted("d1", 80, replicas=3, labels={"app": "web"}, strategy=strategy), wanted("d2", 5)])

    assert rows.everything() == before
    with placer.picture() as (index, _):
        assert {row.node_id: row.allocated for row in index.rows if row} == {
            row["node_id"]: row["allocated"] for row in rows.of(tables.node_accounts)
        }
        assert set(index.deployments.rows) == {"d0"}
    # All of the room is there still.
    assert len(placed(placer, wanted("d3", 80, replicas=3))[0].allocations) == 3
    assert_books_add_up(rows)


def test_place_on_a_closed_store_places_nothing_and_recovers(
    placer: DeploymentPlacer, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*_: Any) -> None:
        raise StoreUnavailableError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(deployments.decisions.DecisionLog, "write", unavailable)
        with pytest.raises(StoreUnavailableError):
            placer.place([wanted("d1", 80, replicas=3)])

    assert_nothing_is_left(rows)
    placed(placer, wanted("d1", 80, replicas=3))


def test_place_starts_over_where_the_picture_was_wrong(
    placer: DeploymentPlacer, world: World, rows: Rows, store: Store
) -> None:
    placed(placer, wanted("d0", 1))
    world.allocator.allocate("n1", make_request("a1", {"memory_mib": 95}))
    # Somebody restored a backup, say: the feed doesn't tell.
    with store.write() as connection:
        connection.execute(tables.node_changes.delete())

    outcomes = [placer.place([wanted(f"d{number}", 30)])[0] for number in range(1, 7)]

    assert [type(outcome) for outcome in outcomes] == [Placed] * 6
    assert_books_add_up(rows)


def test_place_forgets_a_node_that_is_gone(placer: DeploymentPlacer, world: World) -> None:
    placed(placer, wanted("d0", 10, replicas=3))

    world.registry.deregister("n3", force=True)
    (problem,) = placer.place([wanted("d1", 80, replicas=3)])

    assert refused(problem, NothingFitsError).extra["considered"] == 2
    assert placer.nodes_of("d0")[1] != []


def test_keep_fresh_follows_the_fleet_only_once_somebody_asked(
    placer: DeploymentPlacer, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[None] = []
    monkeypatch.setattr(placer, "warm", lambda: followed.append(None))

    placer.keep_fresh()
    before = len(followed)
    placer.place([make_selection_request()])
    placer.keep_fresh()

    assert (before, len(followed)) == (0, 1)
