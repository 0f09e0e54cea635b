# SPDX-License-Identifier: GPL-3.0-or-later
"""A decision is replayed from its record bit for bit, whatever happened around it, on either engine."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa
from builders import FakeClock, make_request
from fleet_rows_builder import make_selection_request
from fleet_world import World, decision_ids, make_world_settings
from node_manager import decisions
from node_manager.deployments import DeploymentPlacer, Placed
from node_manager.problems import DecisionNotFoundError, NothingFitsError, ProblemError
from node_manager.selection_request import SelectionRequest
from node_manager.settings import Settings
from node_manager.store import Store, open_store, tables
from stored import Rows

# Of both placers together; fewer on PostgreSQL, where each step waits for a server.
DECISIONS = {"sqlite": 1000, "postgresql": 250}


@pytest.fixture
def settings() -> Settings:
    """Give settings with a type that is overcommitted."""
    return make_world_settings()


@pytest.fixture
def other_store(store: Store, store_url: str) -> Iterator[Store]:
    """Open the same database once more, as a second manager does."""
    with closing(open_store(store_url, busy_timeout_seconds=5)) as opened:
        yield opened


@pytest.fixture
def world(store: Store, settings: Settings, clock: FakeClock) -> World:
    """Give a fleet of eight nodes that were seen."""
    found = World(store, settings, clock, random.Random(7))
    found.populate(8)
    return found


def place(world: World, *requests: SelectionRequest) -> list[Placed | ProblemError]:
    """Place requests in one pass."""
    return world.placer.place(requests)


def chains(store: Store) -> list[str]:
    """Name the chains on record."""
    with store.read() as connection:
        return list(connection.scalars(sa.select(tables.decision_passes.c.chain_id).distinct()))


def replayed(store: Store) -> dict[str, tuple[Any, Any]]:
    """Replay all that is on record; give the stored and the new answer by decision."""
    return {
        decision_id: (stored, again)
        for chain in chains(store)
        for decision_id, stored, again in decisions.replay_chain(store, chain)
    }


def test_replay_chain_gives_a_thousand_decisions_again(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several chains, though no chain of a test is as long as one in production.
    monkeypatch.setattr(decisions, "_MAX_PASSES", 40)
    dice = random.Random(11)
    worlds = [World(each, settings, clock, dice) for each in (store, other_store)]
    worlds[0].populate(9)
    wanted, made = DECISIONS[store.dialect], set[str]()

    while len(made) < wanted:
        world = dice.choice(worlds)
        world.step()
        requests = [world.request() for _ in range(dice.choice([1, 1, 1, 2, 5, 12]))]
        made.update(decision_ids(world.placer.place(requests)))

    found = replayed(store)
    differing = [decision_id for decision_id, (stored, again) in found.items() if stored != again]
    assert differing == []
    assert made <= found.keys()
    assert len(chains(store)) > 2
    kinds = Counter((stored["fits"], bool(stored["changes"])) for stored, _ in found.values())
    assert min(kinds[True, False], kinds[False, True]) > wanted / 10, kinds
    some = dice.sample(sorted(found), 12)
    assert [decisions.replay(store, decision_id) for decision_id in some] == [found[each] for each in some]


@pytest.mark.parametrize("strategy", ["balanced", "binpack"])
def test_replay_chain_does_not_depend_on_dry_runs_in_between(store: Store, world: World, strategy: str) -> None:
    # A dry run leaves no record: had it moved what packing is judged by, what came after could not be replayed.
    for number in range(30):
        memory = {"memory_mib": 10 + 7 * number}
        place(
            world,
            make_selection_request(f"a{number}", {"cpu_millicores": 20}, strategy=strategy),
            make_selection_request(f"dry{number}", memory, strategy="binpack", dry_run=True),
            make_selection_request(f"b{number}", {"cpu_millicores": 10, "memory_mib": 5}, strategy=strategy),
        )

    found = replayed(store)

    assert len(found) == 60
    assert [each for each, (stored, again) in found.items() if stored != again] == []


def test_replay_chain_goes_on_after_a_pass_that_failed(
    store: Store, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(world, make_selection_request("d1"))
    with monkeypatch.context() as broken:
        broken.setattr(decisions.DecisionLog, "write", _fail)
        with pytest.raises(RuntimeError, match="power cut"):
            place(world, make_selection_request("d2", strategy="binpack"))

    place(world, make_selection_request("d2"), make_selection_request("d3", strategy="binpack"))

    found = replayed(store)
    assert len(found) == 3
    assert all(stored == again for stored, again in found.values())


def test_replay_chain_forgets_the_labels_of_what_was_deleted(store: Store, world: World) -> None:
    (placed,) = place(world, make_selection_request("web", labels={"app": "web"}))
    assert isinstance(placed, Placed)
    node_id = placed.allocations[0].node_id
    world.placer.delete("web")
    # It lives on, but by hand, and so without labels.
    world.allocator.allocate(node_id, make_request("by-hand", {"cpu_millicores": 1}, deployment_id="web"))
    away = [{"deployment_labels": {"app": "web"}}]

    (other,) = place(world, make_selection_request("other", constraints={"node_ids": [node_id]}, anti_affinity=away))

    assert isinstance(other, Placed)
    found = replayed(store)
    assert len(found) == 2
    assert all(stored == again for stored, again in found.values())


def test_replay_of_an_unknown_decision_says_so(store: Store) -> None:
    with pytest.raises(DecisionNotFoundError, match="keep_decisions"):
        decisions.replay(store, "00000000-0000-0000-0000-000000000000")


def test_replay_tells_a_difference(store: Store, world: World, rows: Rows) -> None:
    # That stored and new are equal above must not be because both come from the same place.
    (placed,) = place(world, make_selection_request("d1"))
    assert isinstance(placed, Placed)
    assert placed.decision_id is not None
    with store.write() as connection:
        answer = rows.of(tables.decisions)[0]["answer"]
        connection.execute(tables.decisions.update().values(answer={**answer, "considered": 99}))

    stored, again = decisions.replay(store, placed.decision_id)

    assert (stored["considered"], again["considered"]) == (99, 8)


def test_read_gives_request_and_answer(store: Store, world: World) -> None:
    request = make_selection_request("d1", explain=True)
    (placed,) = place(world, request)
    assert isinstance(placed, Placed)

    row = decisions.read(store, placed.decision_id or "")

    assert (row.deployment_id, row.at) == ("d1", world.clock.now)
    assert SelectionRequest.model_validate(row.request) == request
    assert row.answer["nodes"][0]["node_id"] == placed.allocations[0].node_id
    assert row.answer["nodes"][0]["scores"].keys() >= {"spread", "affinity", "load", "stability"}


def test_decide_that_fails_is_on_record_with_what_would_help(store: Store, world: World) -> None:
    (problem,) = place(world, make_selection_request("d1", {"memory_mib": 10**6}))
    assert isinstance(problem, NothingFitsError)

    row = decisions.read(store, problem.extra["decision_id"])

    assert row.answer["fits"] is False
    assert row.answer["changes"] == problem.extra["changes"] != []


def test_decide_of_a_dry_run_leaves_no_record(world: World, rows: Rows) -> None:
    (placed,) = place(world, make_selection_request("d1", dry_run=True))

    assert isinstance(placed, Placed)
    assert placed.decision_id is None
    assert (rows.of(tables.decisions), rows.of(tables.decision_passes)) == ([], [])


def test_capture_writes_what_changed_and_no_more(world: World, rows: Rows) -> None:
    for number in range(3):
        place(world, make_selection_request(f"d{number}", constraints={"node_ids": ["n00"]}))

    sizes = [len(row["fleet"]) for row in rows.of(tables.decision_passes)]

    assert [row["position"] for row in rows.of(tables.decision_passes)] == [0, 1, 2]
    assert max(sizes[1:]) < sizes[0] * 0.7


def test_capture_starts_a_chain_of_its_own_for_each_placer(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock, world: World
) -> None:
    other = DeploymentPlacer(other_store, settings, World(other_store, settings, clock, world.dice).allocator, clock)

    for number in range(6):
        (world.placer if number % 2 else other).place([make_selection_request(f"d{number}")])

    found = replayed(store)
    assert len(chains(store)) == 2
    assert len(found) == 6
    assert all(stored == again for stored, again in found.values())


def test_prune_keeps_the_newest_and_all_that_their_replay_needs(
    store: Store, world: World, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "_MAX_PASSES", 5)
    for number in range(23):
        place(world, make_selection_request(f"d{number}"))

    with store.write() as connection:
        decisions.prune(connection, 7)

    left = [row["deployment_id"] for row in sorted(rows.of(tables.decisions), key=lambda row: row["sequence"])]
    assert left[-7:] == [f"d{number}" for number in range(16, 23)]
    assert 7 <= len(left) < 7 + 5
    found = replayed(store)
    assert len(found) == len(left)
    assert all(stored == again for stored, again in found.values())


def _fail(*_: Any) -> None:
    raise RuntimeError("power cut")
