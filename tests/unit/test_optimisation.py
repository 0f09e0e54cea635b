# SPDX-License-Identifier: GPL-3.0-or-later
"""The planner's promises: applied in order its moves fit, are allowed, lower the imbalance, and leave nothing to suggest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_manager import optimisation
from node_manager.optimisation import Advice, Limits, Movable, Move, NodeLoad, advise, imbalance

CPU, MEMORY = "cpu_millicores", "memory_mib"
WIDE = Limits(max_moves=1000)


@dataclass
class Fleet:
    """A fleet in which moves can be made, and the constraints of its deployments: replicas apart, bans kept."""

    nodes: dict[str, NodeLoad]
    allocations: dict[str, Movable]
    apart: bool = False
    banned: frozenset[tuple[str, str]] = frozenset()
    moves: list[Move] = field(default_factory=list)

    def allowed(self, allocation: Movable, to_node: str) -> bool:
        """Tell whether an allocation may stand there now."""
        there = {
            other.deployment_id
            for other in self.allocations.values()
            if other.node_id == to_node and other.allocation_id != allocation.allocation_id
        }
        return (allocation.deployment_id, to_node) not in self.banned and not (
            self.apart and allocation.deployment_id in there
        )

    def moved(self, move: Move) -> None:
        """Make a move."""
        item = self.allocations[move.allocation_id]
        assert (item.deployment_id, item.node_id) == (move.deployment_id, move.from_node)
        self.allocations[item.allocation_id] = replace(item, node_id=move.to_node)
        for node_id, sign in ((move.from_node, -1), (move.to_node, 1)):
            node = self.nodes[node_id]
            change = {name: sign * amount for name, amount in item.amounts.items()}
            self.nodes[node_id] = replace(
                node, allocated={name: amount + change.get(name, 0) for name, amount in node.allocated.items()}
            )
        self.moves.append(move)

    def copy(self) -> Fleet:
        """Give another fleet that is just so."""
        return replace(self, nodes=dict(self.nodes), allocations=dict(self.allocations), moves=[])

    def imbalance(self) -> float:
        """Measure it as it is now."""
        return imbalance(list(self.nodes.values()))

    def advise(self, limits: Limits = WIDE) -> Advice:
        """Ask for advice, and follow it at once."""
        return advise(list(self.nodes.values()), list(self.allocations.values()), self, limits)


def make_fleet(
    held: Iterable[tuple[str, str, dict[str, int]]],
    effective: dict[str, dict[str, int]],
    *,
    closed: frozenset[str] = frozenset(),
    pinned: frozenset[str] = frozenset(),
) -> Fleet:
    """Make a fleet of (deployment, node, amounts) on nodes of so much; allocations are named a000, a001, ..."""
    allocations = {
        f"a{number:03d}": Movable(f"a{number:03d}", deployment, node, amounts, f"a{number:03d}" not in pinned)
        for number, (deployment, node, amounts) in enumerate(held)
    }
    taken = {node_id: dict.fromkeys(has, 0) for node_id, has in effective.items()}
    for item in allocations.values():
        for name, amount in item.amounts.items():
            taken[item.node_id][name] += amount
    nodes = {
        node_id: NodeLoad(node_id, has, taken[node_id], node_id not in closed) for node_id, has in effective.items()
    }
    return Fleet(nodes, allocations)


def make_processors(*shares: list[int], **rest: frozenset[str]) -> Fleet:
    """Make nodes n0, n1, ... of 100 that hold allocations of such sizes, each of a deployment of its own."""
    held = [
        (f"d{place}-{row}", f"n{place}", {CPU: size})
        for place, row_ in enumerate(shares)
        for row, size in enumerate(row_)
    ]
    return make_fleet(held, {f"n{place}": {CPU: 100} for place in range(len(shares))}, **rest)


# the measure


def test_imbalance_is_nothing_where_all_are_as_full() -> None:
    fleet = make_fleet(
        [("d", "a", {CPU: 50, MEMORY: 10}), ("d", "b", {CPU: 500, MEMORY: 100})],
        {"a": {CPU: 100, MEMORY: 100}, "b": {CPU: 1000, MEMORY: 1000}},
    )

    assert fleet.imbalance() == 0


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([], 0.0),
        ([[]], 0.0),
        ([[], []], 0.0),
        ([[100], []], 0.5),
        ([[80], [20]], 0.3),
        ([[60], [40], [50], [50]], 0.005**0.5),
    ],
    ids=["no node", "one node", "nothing held", "all on one", "two", "four"],
)
def test_imbalance_is_the_distance_from_the_mean(shares: list[list[int]], expected: float) -> None:
    assert make_processors(*shares).imbalance() == pytest.approx(expected)


def test_imbalance_counts_a_class_where_it_is() -> None:
    uneven = make_processors([80], [20])
    with_others = replace(
        uneven,
        nodes={
            # Nobody uses the disk, and n1 has none.
            "n0": replace(uneven.nodes["n0"], effective={CPU: 100, "disk_mib": 9}),
            "n1": replace(uneven.nodes["n1"], effective={CPU: 100, "network_mbps": 0}),
        },
    )

    assert uneven.imbalance() == with_others.imbalance()


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=8), st.integers(2, 1000))
def test_imbalance_knows_no_scale(pairs: list[tuple[int, int]], factor: int) -> None:
    nodes = [NodeLoad(f"n{place}", {CPU: has}, {CPU: min(took, has)}, True) for place, (has, took) in enumerate(pairs)]
    scaled = [
        replace(node, effective={CPU: node.effective[CPU] * factor}, allocated={CPU: node.allocated[CPU] * factor})
        for node in nodes
    ]

    assert 0 <= imbalance(nodes) < 1
    assert imbalance(nodes) == pytest.approx(imbalance(scaled), abs=1e-12)


# what is suggested


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([[50, 50], []], [("a000", "n0", "n1")]),
        ([[40, 40], [20]], [("a000", "n0", "n1")]),
        ([[30, 20, 10], [50]], []),
        ([[60], []], []),
        (
            [[30, 30, 30], *[[10]] * 9],
            [("a000", "n0", "n1"), ("a001", "n0", "n2"), ("a003", "n1", "n3"), ("a004", "n2", "n4")],
        ),
        ([[40, 40], [85], [80]], []),
        ([[88, 2], [40]], []),
        ([[50, 45, 5], [50, 15], []], [("a000", "n0", "n2")]),
    ],
    ids=["split", "lump", "within the band", "sole tenant", "hot spot among idle", "all full", "pennies", "new node"],
)
def test_advise_suggests(shares: list[list[int]], expected: list[tuple[str, str, str]]) -> None:
    advice = make_processors(*shares).advise()

    assert [(move.allocation_id, move.from_node, move.to_node) for move in advice.moves] == expected
    assert not advice.cut


def test_advise_makes_no_hot_spot_of_a_small_node() -> None:
    held = [("a", "big", {CPU: 79}), ("b", "big", {CPU: 79}), ("c", "big", {CPU: 79}), ("d", "small", {CPU: 16})]
    fleet = make_fleet(held, {"big": {CPU: 250}, "small": {CPU: 100}})

    # Both would be nearer to the fleet's 72%, but small at 95%, where big was.
    assert fleet.advise().moves == ()


@pytest.mark.parametrize(("lower", "expected"), [(29, 1), (31, 0)], ids=["below the band", "between"])
def test_advise_gives_only_to_what_is_below_the_lower_band(lower: float, expected: int) -> None:
    assert len(make_processors([40, 40], [20]).advise(Limits(lower_points=lower)).moves) == expected


def test_advise_breaks_ties_by_name() -> None:
    fleet = make_processors([50, 50], [], [])
    backwards = (list(reversed(items.values())) for items in (fleet.nodes, fleet.allocations))

    advice = advise(*backwards, fleet, WIDE)

    assert [(move.allocation_id, move.to_node) for move in advice.moves] == [("a000", "n1")]


def test_advise_says_why() -> None:
    advice = make_processors([50, 45], [5], [50]).advise()

    assert [move.reason for move in advice.moves] == [
        "cpu_millicores: n0 from 95% to 50%, n1 from 5% to 50%, the fleet is at 50%"
    ]
    assert advice.moves[0].deployment_id == "d0-1"
    assert advice.moves[0].gain == pytest.approx(advice.imbalance_before - advice.imbalance_after)


def test_advise_brings_together_what_was_stranded() -> None:
    # One is out of processors, the other of memory; neither could take anything more.
    busy, fat = {CPU: 45, MEMORY: 5}, {CPU: 5, MEMORY: 45}
    fleet = make_fleet(
        [("a", "n0", busy), ("b", "n0", busy), ("c", "n1", fat), ("d", "n1", fat)],
        {"n0": {CPU: 100, MEMORY: 100}, "n1": {CPU: 100, MEMORY: 100}},
    )

    fleet.advise()

    assert [node.allocated for node in fleet.nodes.values()] == [{CPU: 50, MEMORY: 50}] * 2


def test_advise_takes_from_what_has_more_than_it_has_effectively() -> None:
    fleet = make_processors([50, 55], [98], [44])

    assert [move.to_node for move in fleet.advise(Limits(upper_points=50)).moves] == ["n2"]


@pytest.mark.parametrize(
    ("fleet", "expected"),
    [
        (make_processors([50, 50], [], closed=frozenset({"n1"})), 0),
        (make_processors([50, 50], [], closed=frozenset({"n0"})), 1),
        (make_processors([50, 50], [], pinned=frozenset({"a000", "a001"})), 0),
        (replace(make_processors([50, 50], []), banned=frozenset({("d0-0", "n1"), ("d0-1", "n1")})), 0),
        (replace(make_processors([50, 50], []), banned=frozenset({("d0-0", "n1")})), 1),
        (make_fleet([("d", "n0", {CPU: 5, "gpu": 1})] * 2, {"n0": {CPU: 10, "gpu": 2}, "n1": {CPU: 10}}), 0),
        (make_fleet([("d", "n0", {CPU: 5, "gpu": 0})] * 2, {"n0": {CPU: 10, "gpu": 2}, "n1": {CPU: 10}}), 1),
        (make_processors(), 0),
    ],
    ids=["taker closed", "giver closed", "pinned", "banned", "one banned", "class lacked", "none of it", "no nodes"],
)
def test_advise_moves_only_what_may(fleet: Fleet, expected: int) -> None:
    assert len(fleet.copy().advise().moves) == expected


def test_advise_ignores_what_stands_elsewhere_or_asks_for_the_unknown() -> None:
    fleet = make_processors([50, 50], [])
    strangers = [Movable("x", "d", "gone", {CPU: 50}, True), Movable("y", "d", "n0", {"licences": 1}, True)]

    advice = advise(list(fleet.nodes.values()), strangers, fleet, WIDE)

    assert advice == Advice((), 0.5, 0.5, cut=False)


class Late(Fleet):
    """Some answers change with the first move: who is named may go there only before, or only after it."""

    before: frozenset[tuple[str, str]] = frozenset()
    after: frozenset[tuple[str, str]] = frozenset()

    def allowed(self, allocation: Movable, to_node: str) -> bool:
        return (allocation.allocation_id, to_node) in (self.after if self.moves else self.before)


def make_late(fleet: Fleet, before: set[tuple[str, str]], after: set[tuple[str, str]]) -> Late:
    """Give a fleet with such answers."""
    late = Late(fleet.nodes, fleet.allocations)
    late.before, late.after = frozenset(before), frozenset(after)
    return late


def test_advise_asks_again_after_each_move() -> None:
    both = {("a000", "n2"), ("a002", "n3")}
    fleet = make_late(make_processors([50, 50], [50, 50], [], []), before=both, after=set())

    assert len(fleet.advise().moves) == 1


def test_advise_comes_back_to_what_could_not_move_before() -> None:
    fleet = make_late(make_processors([60, 40], [45, 45], [], []), before={("a002", "n2")}, after={("a001", "n3")})

    assert [move.allocation_id for move in fleet.advise().moves] == ["a002", "a001"]


def test_advise_moves_an_allocation_once_and_says_that_it_could_go_on() -> None:
    there, on = {("a000", "n1")}, {("a000", "n2")}
    fleet = make_late(make_processors([50, 50], [20], []), before=there, after=on)

    first, second = fleet.advise(), fleet.advise()

    assert [(len(advice.moves), advice.cut) for advice in (first, second)] == [(1, True), (1, False)]


# bounds


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_advise_is_bounded_and_goes_on(most: int) -> None:
    fleet = make_processors([20, 20, 20, 20, 20], [], [])

    advice = fleet.advise(Limits(max_moves=most))

    assert (len(advice.moves), advice.cut) == (most, most < 3)
    assert bool(fleet.advise().moves) == advice.cut


def test_advise_moves_so_many_of_one_deployment() -> None:
    fleet = make_fleet([("d", "n0", {CPU: 20})] * 5, {f"n{place}": {CPU: 100} for place in range(3)})

    counts = [len(fleet.advise(Limits(max_moves_per_deployment=1)).moves) for _ in range(5)]

    assert counts == [1, 1, 1, 0, 0]


def test_advise_says_that_one_deployment_bound_it() -> None:
    fleet = make_fleet([("d", "n0", {CPU: 20})] * 5, {f"n{place}": {CPU: 100} for place in range(3)})

    assert [fleet.advise(Limits(max_moves_per_deployment=2)).cut for _ in range(2)] == [True, False]


def test_advise_stops_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisation, "_QUESTIONS_PER_NODE", 7)
    asked: list[str] = []

    class Refusing(Fleet):
        def allowed(self, allocation: Movable, to_node: str) -> bool:
            asked.append(to_node)
            return False

    fleet = make_processors([50, 50], *[[]] * 20)
    advice = Refusing(fleet.nodes, fleet.allocations).advise()

    assert (len(asked), advice.moves, advice.cut) == (7, (), False)


def test_advise_stops_searching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisation, "_PAIRS", 1)
    monkeypatch.setattr(optimisation, "_LOOKAHEAD", 1)
    fleet = make_processors([50, 50], [50, 50], [], [])

    advice = fleet.advise()

    assert (len(advice.moves), advice.cut) == (1, True)


@pytest.mark.parametrize(
    "wrong", [{"min_gain": 0}, {"upper_points": -1}, {"lower_points": -1}], ids=lambda wrong: next(iter(wrong))
)
def test_limits_refuse(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Limits(**wrong)  # type: ignore[arg-type]


# promises, for any fleet

CLASSES = (CPU, MEMORY, "disk_mib")


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    """Draw nodes of different sizes, some closed, some without a disk, some with more taken than they have effectively."""
    count = draw(st.integers(1, 7))
    effective = {
        f"n{place}": {
            name: draw(st.sampled_from((20, 40, 100))) for name in CLASSES[: draw(st.sampled_from((3, 3, 3, 2)))]
        }
        for place in range(count)
    }
    held = []
    for node_id, has in effective.items():
        for _ in range(draw(st.integers(0, 5))):
            amounts = {name: draw(st.integers(0, 30)) for name in has}
            held.append((f"d{draw(st.integers(0, 5))}", node_id, amounts))
    names = st.frozensets(st.sampled_from([f"a{number:03d}" for number in range(len(held) or 1)]), max_size=3)
    fleet = make_fleet(
        held, effective, closed=draw(st.frozensets(st.sampled_from(list(effective)), max_size=2)), pinned=draw(names)
    )
    bans = st.tuples(st.sampled_from([f"d{number}" for number in range(6)]), st.sampled_from(list(effective)))
    return replace(fleet, apart=draw(st.booleans()), banned=draw(st.frozensets(bans, max_size=4)))


all_limits = st.builds(
    Limits,
    max_moves=st.sampled_from((0, 1, 3, 1000)),
    max_moves_per_deployment=st.sampled_from((None, 1, 2)),
    upper_points=st.sampled_from((0.0, 5.0, 10.0)),
    lower_points=st.sampled_from((0.0, 10.0)),
    min_gain=st.sampled_from((0.001, 0.02)),
)


@given(fleets(), all_limits)
def test_advise_keeps_its_promises_at_every_step(fleet: Fleet, limits: Limits) -> None:
    after, now = fleet.copy(), fleet.copy()

    advice = after.advise(limits)

    assert advice.imbalance_before == fleet.imbalance()
    assert list(advice.moves) == after.moves
    for move in advice.moves:
        before = now.imbalance()
        item = now.allocations[move.allocation_id]
        assert item.movable
        assert now.allowed(item, move.to_node)
        now.moved(move)
        taker = now.nodes[move.to_node]
        assert taker.accepts
        assert all(taker.allocated[name] <= taker.effective[name] for name in taker.effective)
        assert before - now.imbalance() == pytest.approx(move.gain, abs=1e-12)
        assert move.gain > 0
    assert now.imbalance() == advice.imbalance_after
    assert sum(move.gain for move in advice.moves) == pytest.approx(
        advice.imbalance_before - advice.imbalance_after, abs=1e-9
    )


@given(fleets(), all_limits)
def test_advise_is_bounded(fleet: Fleet, limits: Limits) -> None:
    advice = fleet.advise(limits)

    most = limits.max_moves_per_deployment
    moved = [move.allocation_id for move in advice.moves]
    deployments = [move.deployment_id for move in advice.moves]
    assert len(moved) <= limits.max_moves
    assert len(moved) == len(set(moved))
    assert most is None or all(deployments.count(name) <= most for name in deployments)


@given(fleets(), all_limits)
def test_advise_has_nothing_new_once_followed(fleet: Fleet, limits: Limits) -> None:
    first = fleet.advise(limits)

    second = fleet.advise(limits)

    assert first.cut or (second.moves, second.cut) == ((), False)


@given(fleets(), all_limits)
def test_advise_comes_to_rest(fleet: Fleet, limits: Limits) -> None:
    limits = replace(limits, max_moves=max(1, limits.max_moves))

    for _ in range(200):
        if not fleet.advise(limits).moves:
            break

    assert fleet.advise(limits).moves == ()


@given(fleets(), all_limits, st.randoms(use_true_random=False))
def test_advise_knows_no_order(fleet: Fleet, limits: Limits, chance: object) -> None:
    nodes, allocations = list(fleet.nodes.items()), list(fleet.allocations.items())
    chance.shuffle(nodes)  # type: ignore[attr-defined]
    chance.shuffle(allocations)  # type: ignore[attr-defined]
    shuffled = replace(fleet.copy(), nodes=dict(nodes), allocations=dict(allocations))

    again = shuffled.advise(limits)

    assert fleet.advise(limits) == again
