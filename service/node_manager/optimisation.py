# SPDX-License-Identifier: GPL-3.0-or-later
"""Which allocations had better stand on another node: few moves, each for a gain that pays for the disturbance.

The measure is the root mean square distance, over all nodes and resource classes, of a node's share taken from the
fleet's: 0 when each node is as full as the fleet in every class. A node that is full in one class and empty in another is
far off in both: where that is what ails a fleet, advice also frees what was stranded; elsewhere it leaves that as it is, or a
little worse (tests/bench/optimization.py). Moving whole nodes empty would raise the measure: that is a drain.

The rule has two bands, as the Kubernetes descheduler's LowNodeUtilization with deviation thresholds: a node above the upper
band in a class gives, one below the lower band in that class takes, what is between is left alone. On top of that no move
makes a new hot spot, and each has to pay: the two nodes' own distance must fall by Limits.min_gain.

Pure: numbers in, moves out. Imports numpy and the standard library only.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Bounds on what a fleet costs in which little may move: answers asked of the caller for one node, pairs of an allocation and
# a node weighed in all (0.4 to 1.1 s a call on busy cores; a node among 10,000 with five allocations weighs 25,000).
_QUESTIONS_PER_NODE = 100
_PAIRS = 10_000_000
# Among so many of the fullest nodes the best move is chosen, once for each move; one alone leaves up to 4 % more imbalance.
_LOOKAHEAD = 8


@dataclass(frozen=True)
class NodeLoad:
    """A node's books, whole amounts by resource class; a class that the node lacks is left out.

    A node that doesn't accept may give, never take. Nodes that take no part at all (drained, retired, out of reach) are
    best left out: they count in the fleet's shares.
    """

    node_id: str
    effective: dict[str, int]
    allocated: dict[str, int]
    accepts: bool


@dataclass(frozen=True)
class Movable:
    """One allocation, which is part of what its node has allocated."""

    allocation_id: str
    deployment_id: str
    node_id: str
    amounts: dict[str, int]
    movable: bool


@dataclass(frozen=True)
class Move:
    """One suggestion; the gain is how far the fleet's imbalance falls by it, after the moves before it."""

    allocation_id: str
    deployment_id: str
    from_node: str
    to_node: str
    gain: float
    reason: str


@dataclass(frozen=True)
class Limits:
    """How far advice goes.

    Units: the bands are percentage points around the fleet's share of a class; min_gain is a part of 1, of the imbalance of
    the two nodes by themselves, so that it asks the same in a fleet of ten and of ten thousand.
    Source of the bands: OpenShift's descheduler, profile LifecycleAndUtilization, AsymmetricLow (0 below, 10 above). With
    10 below, one full node among a hundred idle ones finds nobody to take: the mean is near the idle ones.
    """

    max_moves: int = 20
    max_moves_per_deployment: int | None = None
    upper_points: float = 10.0
    lower_points: float = 0.0
    min_gain: float = 0.02

    def __post_init__(self) -> None:
        """Refuse what would let moves go to and fro."""
        if not (self.min_gain > 0 and self.upper_points >= 0 and self.lower_points >= 0):
            raise ValueError("min_gain must be above 0, the bands not below it")


@dataclass(frozen=True)
class Advice:
    """Moves to make one after the other, in this order.

    *cut* says that a bound held back a move that pays (most moves, most of one deployment, each allocation once) or ended the
    search: the next call may go on from there. Otherwise a call after these moves suggests nothing.
    """

    moves: tuple[Move, ...]
    imbalance_before: float
    imbalance_after: float
    cut: bool


class Constraints(Protocol):
    """What a caller knows of where an allocation may stand."""

    def allowed(self, allocation: Movable, to_node: str) -> bool:
        """Tell whether the allocation's constraints hold there, all moves so far made."""

    def moved(self, move: Move) -> None:
        """Take a move as made."""


def imbalance(nodes: Sequence[NodeLoad]) -> float:
    """Measure how unevenly a fleet is taken: 0 is even, 1 can't be reached while nobody holds more than it has.

    A class counts on the nodes that have some of it, if anybody uses it. The fleet's share of a class is all that is
    allocated by all that is effective: no move changes it.
    """
    return _Board(nodes, Limits()).imbalance()


def advise(
    nodes: Sequence[NodeLoad], allocations: Sequence[Movable], constraints: Constraints, limits: Limits
) -> Advice:
    """Suggest moves that lower the imbalance, the same whatever the order of what is given.

    After each move its taker is within its effective capacity. Amounts are exact below 2**53.
    """
    return _Planner(_Board(nodes, limits), allocations, constraints, limits).plan()


_Numbers = NDArray[np.float64]
_Places = NDArray[np.intp]


class _Board:
    """The fleet as arrays, classes by nodes, both in the order of their names."""

    def __init__(self, nodes: Sequence[NodeLoad], limits: Limits) -> None:
        ordered = sorted(nodes, key=lambda node: node.node_id)
        self.ids = [node.node_id for node in ordered]
        self.classes = sorted({name for node in ordered for name in node.effective})
        self.effective = _table(self.classes, [node.effective for node in ordered])
        self.allocated = _table(self.classes, [node.allocated for node in ordered])
        self.accepts = np.array([node.accepts for node in ordered], bool)
        taken, had = self.allocated.sum(axis=1, keepdims=True), self.effective.sum(axis=1, keepdims=True)
        self.mean = np.divide(taken, had, out=np.zeros_like(taken), where=had > 0)
        self.counted = (self.effective > 0) & (self.mean > 0)
        self.counts = self.counted.sum(axis=0)
        self.per_unit = np.divide(1.0, self.effective, out=np.zeros_like(self.effective), where=self.counted)
        # What has more than it has effectively (its overcommit fell) gives in the fullest of fleets too.
        self.high = np.minimum(self.mean + limits.upper_points / 100, 1.0)
        self.low = self.mean - limits.lower_points / 100
        self.settle()

    def settle(self) -> None:
        """Work out anew all that follows from what is allocated, from whole numbers: a second call sees the same."""
        self.free = self.effective - self.allocated
        self.level = np.divide(
            self.allocated, self.effective, out=np.zeros_like(self.effective), where=self.effective > 0
        )
        self.deviation = np.where(self.counted, self.level - self.mean, 0.0)
        squares = self.deviation * self.deviation
        self.distance = squares.sum(axis=0)
        self.gives = self.counted & (self.level > self.high)
        self.takes = self.counted & self.accepts & (self.level < self.low)
        self.heat = np.where(self.gives, squares, 0.0).sum(axis=0)

    def imbalance(self) -> float:
        # fsum is exact, so that the order of nodes can't show in the last digit.
        return math.sqrt(math.fsum(self.distance.tolist()) / max(1, int(self.counts.sum())))

    def move(self, amounts: _Numbers, giver: int, taker: int) -> None:
        self.allocated[:, giver] -= amounts
        self.allocated[:, taker] += amounts
        self.settle()

    def falls(self, amounts: _Numbers, giver: int, min_gain: float) -> tuple[_Places, _Numbers]:
        """Find who could take, and by how much the sum of squares falls with each.

        Class by class and without a matrix product: its last digits may differ from call to call, and ties with them.
        """
        used = np.flatnonzero(amounts)
        wanted = used[self.gives[used, giver]]
        if not wanted.size:
            return np.empty(0, np.intp), np.empty(0)
        fits = self.takes[wanted].any(axis=0)
        for free, amount in zip(self.free, amounts, strict=True):
            fits &= free >= amount
        for index in wanted:
            # No hot spot is cured by making another: the taker ends within the band, or at most midway of the giver's fall.
            midway = (self.allocated[index, giver] - amounts[index] / 2) / self.effective[index, giver]
            most = self.effective[index] * max(self.high[index, 0], midway)
            fits &= amounts[index] <= most - self.allocated[index]
        takers = np.flatnonzero(fits)
        share = amounts * self.per_unit[:, giver]
        fall = np.full(takers.size, float((share * (2 * self.deviation[:, giver] - share)).sum()))
        for index in used:
            more = amounts[index] * self.per_unit[index, takers]
            fall -= more * (2 * self.deviation[index, takers] + more)
        counts = self.counts[giver] + self.counts[takers]
        before = (self.distance[giver] + self.distance[takers]) / counts
        pays = np.sqrt(before) - np.sqrt(np.maximum(before - fall / counts, 0)) >= min_gain
        return takers[pays], fall[pays]


@dataclass(frozen=True)
class _Option:
    """A move that pays: how far the sum of squares falls, and what moves, by its place in the arrays."""

    fall: float
    allocation: int
    giver: int
    taker: int


class _Planner:
    """The search: again and again the best move of some of the fullest nodes, until a round over all finds none."""

    def __init__(self, board: _Board, allocations: Sequence[Movable], constraints: Constraints, limits: Limits) -> None:
        self.board, self.constraints, self.limits = board, constraints, limits
        self.places = {node_id: place for place, node_id in enumerate(board.ids)}
        known = set(board.classes)
        standing = (item for item in allocations if item.movable and item.node_id in self.places)
        self.allocations = sorted(
            (item for item in standing if known.issuperset(name for name, amount in item.amounts.items() if amount)),
            key=lambda item: item.allocation_id,
        )
        self.amounts = _table(board.classes, [item.amounts for item in self.allocations])
        self.tenants: list[list[int]] = [[] for _ in board.ids]
        for index, item in enumerate(self.allocations):
            self.tenants[self.places[item.node_id]].append(index)
        self.moved: set[int] = set()
        self.by_deployment: Counter[str] = Counter()
        self.bounded = True
        self.pairs = 0
        self.options: dict[int, _Option] = {}
        self.fruitless: set[int] = set()
        self.outdated = False

    def plan(self) -> Advice:
        before = after = self.board.imbalance()
        moves: list[Move] = []
        while (option := self.best()) is not None and len(moves) < self.limits.max_moves:
            moves.append(self.make(option, after))
            after = self.board.imbalance()
        if option is None and moves:
            # Does one of those pay that only a bound holds? All others have just been asked.
            self.bounded = False
            self.fruitless.clear()
            option = self.best()
        return Advice(tuple(moves), before, after, cut=option is not None or self.pairs >= _PAIRS)

    def best(self) -> _Option | None:
        """Choose the next move; nodes that had none are asked again only when nobody else has one."""
        option = self.best_of_the_fullest()
        if option is None and self.outdated:
            self.fruitless.clear()
            self.outdated = False
            option = self.best_of_the_fullest()
        return option

    def best_of_the_fullest(self) -> _Option | None:
        chosen: list[_Option] = []
        heat = self.board.heat
        for giver in np.argsort(-heat, kind="stable").tolist():
            if heat[giver] == 0 or len(chosen) == _LOOKAHEAD or self.pairs >= _PAIRS:
                break
            if giver in self.fruitless:
                continue
            option = self.options.get(giver)
            if option is None or not self.allowed(option):
                option = next(filter(self.allowed, self.options_of(giver)), None)
            if option is None:
                self.fruitless.add(giver)
            else:
                self.options[giver] = option
                chosen.append(option)
        return max(chosen, key=lambda option: option.fall, default=None)

    def allowed(self, option: _Option) -> bool:
        return self.may_move(option.allocation) and self.constraints.allowed(
            self.allocations[option.allocation], self.board.ids[option.taker]
        )

    def options_of(self, giver: int) -> Iterator[_Option]:
        """Give what could move where, the greatest fall first, not without end; ties in the order of the names."""
        found = [
            (index, *self.board.falls(self.amounts[:, index], giver, self.limits.min_gain))
            for index in self.tenants[giver]
            if self.may_move(index)
        ]
        if not found:
            return
        self.pairs += len(found) * len(self.board.ids)
        indices = np.repeat([index for index, _, _ in found], [fall.size for _, _, fall in found])
        takers, falls = (np.concatenate([item[part] for item in found]) for part in (1, 2))
        first = np.arange(falls.size)
        if falls.size > _QUESTIONS_PER_NODE:
            first = np.sort(np.argpartition(-falls, _QUESTIONS_PER_NODE)[:_QUESTIONS_PER_NODE])
        for place in first[np.argsort(-falls[first], kind="stable")].tolist():
            yield _Option(float(falls[place]), int(indices[place]), giver, int(takers[place]))

    def may_move(self, index: int) -> bool:
        most = self.limits.max_moves_per_deployment
        held = index in self.moved or (
            most is not None and self.by_deployment[self.allocations[index].deployment_id] >= most
        )
        return held is not self.bounded

    def make(self, option: _Option, before: float) -> Move:
        """Make a move: in the arrays, in the lists, and known to the caller."""
        board, item, amounts = self.board, self.allocations[option.allocation], self.amounts[:, option.allocation]
        pair = [option.giver, option.taker]
        wanted = (amounts > 0) & board.gives[:, option.giver] & board.takes[:, option.taker]
        first = int(np.argmax(np.where(wanted, board.deviation[:, option.giver], -1.0)))
        shares = board.level[first, pair].tolist()
        board.move(amounts, option.giver, option.taker)
        shares += board.level[first, pair].tolist()
        to_node = board.ids[option.taker]
        reason = (
            f"{board.classes[first]}: {item.node_id} from {shares[0]:.0%} to {shares[2]:.0%}, "
            f"{to_node} from {shares[1]:.0%} to {shares[3]:.0%}, the fleet is at {board.mean[first, 0]:.0%}"
        )
        gain = before - board.imbalance()
        move = Move(item.allocation_id, item.deployment_id, item.node_id, to_node, gain, reason)
        self.tenants[option.giver].remove(option.allocation)
        insort(self.tenants[option.taker], option.allocation)
        self.allocations[option.allocation] = replace(item, node_id=to_node)
        self.moved.add(option.allocation)
        self.by_deployment[item.deployment_id] += 1
        self.outdated = True
        self.options = {giver: other for giver, other in self.options.items() if not {giver, other.taker} & set(pair)}
        self.constraints.moved(move)
        return move


def _table(classes: Sequence[str], rows: Sequence[Mapping[str, int]]) -> _Numbers:
    """Lay out amounts as classes by rows."""
    return np.array([[row.get(name, 0) for row in rows] for name in classes], np.float64).reshape(
        len(classes), len(rows)
    )
