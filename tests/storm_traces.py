# SPDX-License-Identifier: GPL-3.0-or-later
"""Seeded storms over a fleet, and a virtual manager that repairs it each second, with the mass-failure guard or without.

Knows the truth of each node and keeps the books by itself: what the guard allows is measured, not believed. What else
holds repairs back (peers that see a node, sites that are dark as a whole) is left out on purpose.
"""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count

from node_manager.domain import GuardState
from node_manager.guard_terms import Census, ScopeState
from node_manager.recovery_guard import FLEET, Guard, Permit, in_flight_limit, scope_of
from node_manager.settings import GuardSettings

START = datetime(2026, 7, 1, tzinfo=UTC)
WAIT, ATTEMPTS, BACKOFF, RETURN = 10.0, 3, 120.0, 30.0
LIMITS = GuardSettings()


@dataclass(frozen=True)
class Fault:
    """Nodes that fall silent: *cut* ones live and speak again at *until*; crashed ones need a repair, or a person then."""

    at: float
    nodes: Sequence[int]
    until: float
    cut: bool


@dataclass(frozen=True)
class Storm:
    """What befalls a fleet; *mends* is how likely a repair of a crashed node helps at a time."""

    name: str
    zones: Sequence[int]
    faults: Sequence[Fault]
    seconds: int
    mends: Callable[[float], float] = lambda now: 0.9
    # When the manager is restarted, and by how much its wall clock is set, by the second.
    restarts: frozenset[int] = frozenset()
    clock_set: tuple[tuple[int, float], ...] = ()


@dataclass
class Node:
    """The truth of a node, and what the manager knows of it."""

    zone: str
    cuts: int = 0
    crashed: bool = False
    word: str = "healthy"
    silence: int = 0
    unreachable_since: float = 0.0
    attempts: int = 0
    not_before: float = 0.0
    in_recovery: bool = False
    hit: bool = False

    @property
    def silent(self) -> bool:
        """Whether nothing is heard of it."""
        return self.crashed or self.cuts > 0

    @property
    def unhealthy(self) -> bool:
        """Whether the census counts it."""
        return self.word != "healthy" or self.in_recovery


@dataclass
class Books:
    """What was measured, by scope where it differs."""

    hit: int = 0
    started: int = 0
    repaired: int = 0
    on_living: int = 0
    started_open: int = 0
    started_while_many_unhealthy: int = 0
    over_in_flight: int = 0
    in_any_window: int = 0
    fullest: tuple[int, int] = (0, 1)
    canaries: Counter[str] = field(default_factory=Counter)
    second_canaries: int = 0
    seconds_in: Counter[GuardState] = field(default_factory=Counter)
    opened: int = 0
    last_back: float = 0.0
    closed_at: float | None = None
    still_open: list[str] = field(default_factory=list)
    healthy_at_end: int = 0

    @property
    def passed(self) -> list[str]:
        """Say which bounds were passed."""
        found = {
            "two starts within the interval": self.in_any_window > 1,
            "more in flight than may be": self.over_in_flight > 0,
            "started while open": self.started_open > 0,
            "started while too many were unhealthy": self.started_while_many_unhealthy > 0,
            "a second canary": self.second_canaries > 0,
        }
        return [text for text, is_so in found.items() if is_so]


class Manager:
    """Watches and repairs the fleet of a storm; without limits it repairs whatever is unreachable."""

    def __init__(self, storm: Storm, seed: int, limits: GuardSettings | None = LIMITS) -> None:
        self.storm, self.limits, self.books = storm, limits, Books()
        self.nodes = [Node(f"z{zone}") for zone, size in enumerate(storm.zones) for _ in range(size)]
        self.now, self._offset = 0.0, 0.0
        self._chance = random.Random(seed)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._scopes = [FLEET, *(scope_of(f"z{zone}") for zone in range(len(storm.zones)))]
        self._counts = {scope: Counter[str]() for scope in self._scopes}
        self._members = defaultdict[str, list[int]](list)
        for number, node in enumerate(self.nodes):
            self._members[scope_of(node.zone)].append(number)
        self._members[FLEET] = list(range(len(self.nodes)))
        for scope, members in self._members.items():
            self._counts[scope]["nodes"] = len(members)
        self._lost = defaultdict[str, set[int]](set)
        self._hit = defaultdict[str, set[int]](set)
        self._canaries = defaultdict[str, set[int]](set)
        self._starts: dict[str, deque[float]] = {scope: deque() for scope in self._scopes}
        self._guard = None if limits is None else Guard(limits)
        self._checks_of = 0
        self._booted = 0.0
        self._was: dict[str, GuardState] = {}

    def run(self) -> Books:
        """Let the storm pass."""
        backs = (fault.until for fault in self.storm.faults if fault.until < self.storm.seconds)
        self.books.last_back = max(backs, default=0.0)
        for fault in self.storm.faults:
            self._at(fault.at, lambda fault=fault: self._strike(fault))  # type: ignore[misc]
        clock_set = dict(self.storm.clock_set)
        for second in range(self.storm.seconds):
            while self._due and self._due[0][0] <= second:
                self.now, _, happens = heapq.heappop(self._due)
                happens()
            self.now = float(second)
            self._offset += clock_set.get(second, 0.0)
            if second in self.storm.restarts:
                self._restart()
            self._tick()
        books = self.books
        books.healthy_at_end = sum(node.word == "healthy" for node in self.nodes)
        states = {} if self._guard is None else self._guard.states
        books.still_open = [scope for scope, state in states.items() if state.state is not GuardState.CLOSED]
        return books

    # What happens to nodes

    def _at(self, time: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time, next(self._order), happens))

    def _strike(self, fault: Fault) -> None:
        for number in fault.nodes:
            node = self.nodes[number]
            if fault.cut:
                node.cuts += 1
            else:
                node.crashed = True
            if not node.hit:
                node.hit = True
                self.books.hit += 1
                for scope in (FLEET, scope_of(node.zone)):
                    self._hit[scope].add(number)
            self._fall_silent(number)
            self._at(fault.until, lambda number=number: self._mend(number, fault.cut))  # type: ignore[misc]

    def _mend(self, number: int, cut: bool) -> None:
        node = self.nodes[number]
        if cut:
            node.cuts -= 1
        else:
            node.crashed = False
        self._hear(number)

    def _fall_silent(self, number: int) -> None:
        node = self.nodes[number]
        node.silence += 1
        episode, suspect = node.silence, self._chance.uniform(1, 9)
        self._at(self.now + suspect, lambda: self._judge(number, episode, "suspect"))
        self._at(self.now + suspect + self._chance.uniform(9, 10), lambda: self._judge(number, episode, "unreachable"))

    def _hear(self, number: int) -> None:
        node = self.nodes[number]
        if node.silent or node.word == "healthy":
            return
        node.silence += 1
        episode, was_lost = node.silence, node.word in {"unreachable", "recovering"}
        self._say(number, "recovering" if was_lost else "healthy")
        self._at(self.now + RETURN, lambda: self._return(number, episode))

    def _return(self, number: int, episode: int) -> None:
        node = self.nodes[number]
        if node.silence == episode and node.word == "recovering" and not node.silent:
            node.attempts = 0
            self._say(number, "healthy")

    def _judge(self, number: int, episode: int, word: str) -> None:
        node = self.nodes[number]
        if node.silence != episode or not node.silent or (word == "suspect" and node.word == "unreachable"):
            return
        if word == "unreachable" and node.word != word:
            node.unreachable_since = self.now
        self._say(number, word)

    def _say(self, number: int, word: str, in_recovery: bool | None = None) -> None:
        node = self.nodes[number]
        before = (node.unhealthy, node.word == "unreachable", node.in_recovery)
        node.word = word
        node.in_recovery = node.in_recovery if in_recovery is None else in_recovery
        after = (node.unhealthy, node.word == "unreachable", node.in_recovery)
        for scope in (FLEET, scope_of(node.zone)):
            for name, was, is_now in zip(("unhealthy", "unreachable", "in_recovery"), before, after, strict=True):
                self._counts[scope][name] += is_now - was
        if after[1]:
            self._lost[node.zone].add(number)
        else:
            self._lost[node.zone].discard(number)

    # What the manager does

    @property
    def _wall(self) -> datetime:
        return START + timedelta(seconds=self.now + self._offset)

    def _census(self, scope: str) -> Census:
        counts = self._counts[scope]
        return Census(counts["nodes"], counts["unhealthy"], counts["unreachable"], counts["in_recovery"])

    def _restart(self) -> None:
        if self._guard is not None and self.limits is not None:
            stored = json.dumps({scope: state.to_document() for scope, state in self._guard.states.items()})
            states = {scope: ScopeState.from_document(document) for scope, document in json.loads(stored).items()}
            self._guard, self._checks_of, self._booted = Guard(self.limits, states), self._checks_of + 1, self.now

    def _tick(self) -> None:
        guard = self._guard
        if guard is None:
            for zone in sorted(self._lost):
                for number in [number for number in self._lost[zone] if self._is_due(self.nodes[number], None)]:
                    self._begin(number)
            return
        guard.observe({scope: self._census(scope) for scope in self._scopes}, self._wall, self.now - self._booted)
        for scope, state in guard.states.items():
            self.books.seconds_in[state.state] += 1
            self.books.opened += state.state is GuardState.OPEN and self._was.get(scope) is not GuardState.OPEN
            self._was[scope] = state.state
        if guard.refusal_of_fleet(self._wall) is None:
            # Zones take turns: one start in the fleet is all that a second gives.
            zones = [zone for zone, lost in self._lost.items() if lost]
            self._chance.shuffle(zones)
            for zone in zones:
                self._ask(guard, zone)
        for scope in guard.checks_wanted(self._wall):
            self._check(guard, scope)
        is_closed = all(state.state is GuardState.CLOSED for state in guard.states.values())
        if is_closed and self.books.closed_at is None and self.now >= self.books.last_back > 0:
            self.books.closed_at = self.now

    def _is_due(self, node: Node, since: float | None) -> bool:
        waited = self.now - max(node.unreachable_since, since or 0.0)
        return not node.in_recovery and node.attempts < ATTEMPTS and waited >= WAIT and self.now >= node.not_before

    def _ask(self, guard: Guard, zone: str) -> None:
        decision = guard.decide(zone, self._wall)
        if not isinstance(decision, Permit):
            return
        grace = guard.grace_since(zone)
        since = None if grace is None else (grace - START).total_seconds() - self._offset
        due = next((number for number in sorted(self._lost[zone]) if self._is_due(self.nodes[number], since)), None)
        if due is None:
            return
        self._book_start(guard, due, decision)
        self._begin(due)
        guard.started(zone, str(due), self._wall)

    def _book_start(self, guard: Guard, number: int, permit: Permit) -> None:
        """Hold a start to the bounds, by counts of its own; what a start adds itself is not in them yet."""
        assert self.limits is not None
        for scope in (FLEET, scope_of(self.nodes[number].zone)):
            counts, starts, state = self._counts[scope], self._starts[scope], guard.states[scope]
            starts.append(self.now)
            while starts[0] <= self.now - self.limits.start_interval_seconds:
                starts.popleft()
            self.books.in_any_window = max(self.books.in_any_window, len(starts))
            limit = in_flight_limit(self._census(scope), self.limits)
            self.books.fullest = max(self.books.fullest, (counts["in_recovery"] + 1, limit), key=_fullness)
            self.books.over_in_flight += counts["in_recovery"] + 1 > max(
                1.0, counts["nodes"] * self.limits.in_flight_percent / 100
            )
            many = counts["unhealthy"] >= self.limits.unhealthy_nodes
            percent = 100 * counts["unhealthy"] / counts["nodes"]
            self.books.started_while_many_unhealthy += many and percent >= self.limits.unhealthy_percent
            self.books.started_open += state.state is GuardState.OPEN
            if state.state is GuardState.HALF_OPEN:
                self.books.second_canaries += bool(state.canary)
        self.books.canaries["recovery"] += permit.canary

    def _begin(self, number: int) -> None:
        node = self.nodes[number]
        self.books.started += 1
        self.books.on_living += not node.crashed
        self._say(number, node.word, in_recovery=True)
        self._at(self.now + self._chance.uniform(30, 300), lambda: self._end(number))

    def _end(self, number: int) -> None:
        node = self.nodes[number]
        helped = not node.cuts and (not node.crashed or self._chance.random() < self.storm.mends(self.now))
        if helped:
            self.books.repaired += node.crashed
            node.crashed = False
        else:
            node.attempts += 1
            node.not_before = self.now + BACKOFF * 2.0 ** (node.attempts - 1)
        self._say(number, node.word, in_recovery=False)
        self._hear(number)
        if self._guard is not None:
            self._guard.ended(node.zone, str(number), helped, self._wall)

    def _check(self, guard: Guard, scope: str) -> None:
        """Check a node that was hit and is well again, or else any that was hit, or any."""
        if guard.states[scope].canary is not None:
            return
        hit = sorted(self._hit[scope])
        chosen = [number for number in hit if not self.nodes[number].unhealthy] or hit or self._members[scope]
        number = self._chance.choice(chosen)
        node, manager = self.nodes[number], self._checks_of
        guard.check_started(node.zone, str(number), self._wall)
        self.books.canaries["check"] += 1

        def answer() -> None:
            # A check ends with the manager that began it.
            if manager == self._checks_of and self._guard is not None:
                self._guard.checked(node.zone, str(number), not node.silent, self._wall)

        self._at(self.now + self._chance.uniform(2, 10), answer)


def _fullness(pair: tuple[int, int]) -> float:
    return pair[0] / pair[1]


# The storms


def zone_sizes(nodes: int, chance: random.Random) -> list[int]:
    """Part a fleet into zones of all sizes: single nodes, pairs, shops, halls."""
    sizes = [nodes // 10, nodes // 20, 1, 1, 2, 2, 5]
    while (left := nodes - sum(sizes)) > 0:
        sizes.append(min(left, chance.choice((1, 2, 5, 20, 50, 100, 200))))
    return sizes


def storms(nodes: int, seconds: int, seed: int) -> list[Storm]:
    """Make one storm of each kind."""
    chance = random.Random(seed)
    zones = zone_sizes(nodes, chance)
    starts = [sum(zones[:zone]) for zone in range(len(zones))]
    back = seconds / 3

    def all_of(zone: int) -> range:
        return range(starts[zone], starts[zone] + zones[zone])

    def crashes(every: float, among: Sequence[int], until: float) -> list[Fault]:
        victims = chance.sample(among, min(len(among), int((until - 60) / every)))
        return [Fault(60 + turn * every, [node], float(seconds), False) for turn, node in enumerate(victims)]

    everywhere = range(nodes)
    cut = [Fault(60, all_of(zone), back, True) for zone in (0, 4, 6)]
    rack = Fault(60, list(all_of(0))[: max(3, zones[0] // 25)], back, True)
    background = crashes(90, everywhere, seconds * 0.8)
    flaps = [Fault(60 + turn * 150, all_of(1), 120 + turn * 150, True) for turn in range(int(back / 150))]
    power = Fault(60, all_of(1), back, False)
    everything = [*cut, *background, *flaps, Fault(back / 2, list(everywhere)[nodes // 4 :], back, True)]
    restarts = frozenset(chance.sample(range(30, seconds), max(4, seconds // 400)))
    clocks = tuple((second, chance.choice((-7200.0, 3600.0, 86400.0))) for second in chance.sample(range(seconds), 8))

    def storm(name: str, faults: Iterable[Fault], mends: Callable[[float], float] = lambda now: 0.9) -> Storm:
        return Storm(name, zones, list(faults), seconds, mends)

    return [
        storm("rack cut", [rack]),
        storm("zones cut", [*cut, *background]),
        storm("fleet cut", [Fault(60, everywhere, back, True)]),
        storm("slow death of a zone", crashes(60, all_of(1), seconds * 0.8)),
        storm("flapping zone", [*flaps, *background]),
        storm("zone without power", [power, *background]),
        storm("repairs that fail", crashes(30, everywhere, back), lambda now: 0.0 if now < back else 0.9),
        storm("background crashes", background),
        Storm("all, restarts, clocks set", zones, everything, seconds, restarts=restarts, clock_set=clocks),
    ]
