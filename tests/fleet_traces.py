# SPDX-License-Identifier: GPL-3.0-or-later
"""Seeded traces of what befalls a fleet, and a virtual network on which the liveness core watches it.

Event-driven: a node that nothing befalls costs nothing. Knows the truth of each node; judges nothing itself.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

from node_manager.domain import ContactReason, Liveness
from node_manager.liveness import AskPeers, CloseStream, Conclude, Knock, LivenessLimits, OpenStream, Watch
from node_manager.peers import Answer, Findings, Fleet

DAY = 86_400.0
HOUR = 3_600.0
BEAT = 4.0
WAKE = 60.0
WINDOW = (6 * HOUR, 22 * HOUR)


class Kind(Enum):
    """What befalls a node."""

    CRASH = "crash"
    POWER = "site power"
    FLAP = "flap"
    NOT_WOKEN = "not woken"
    ASLEEP = "asleep"
    CUT = "site cut"
    LINK = "link flap"
    PATH = "path lost"
    LOSS = "packet loss"
    # Three packets of five, each way: one round trip of six gets through.
    JAM = "60 % packet loss"


# Nobody reaches such a node; in ASLEEP that is as declared.
DOWN = frozenset((Kind.CRASH, Kind.POWER, Kind.FLAP, Kind.NOT_WOKEN, Kind.ASLEEP))
# The node lives, and its stream outlasts it.
LINKS = frozenset((Kind.CUT, Kind.LINK, Kind.PATH))
LOSSES = frozenset((Kind.LOSS, Kind.JAM))
# While these last, "offline" is true.
OFFLINE = frozenset((Kind.CRASH, Kind.POWER, Kind.FLAP, Kind.NOT_WOKEN, Kind.CUT, Kind.LINK))


class Event(NamedTuple):
    """Something that befalls a node for a while.

    *reset* tells that its stream is reset at the start, *refused_seconds* how long its kernel then refuses before it is gone,
    *loss* how much of its packets get lost.
    """

    kind: Kind
    start: float
    end: float
    reset: bool = False
    refused_seconds: float = 0.0
    loss: float = 0.0


class Absence(NamedTuple):
    """The manager restarts, or its loop stands still."""

    start: float
    end: float
    restart: bool


@dataclass
class Trace:
    """What befalls a fleet; *sites* gives the site of each node."""

    end: float
    sites: list[str]
    sleepers: set[int]
    events: list[list[Event]]
    absences: list[Absence]


def make_trace(nodes: int, days: float, seed: int) -> Trace:
    """Roll what befalls a fleet; events of one kind never overlap on a node, others may."""
    dice = random.Random(seed)
    end = days * DAY
    sites: list[str] = []
    sleepers: set[int] = set()
    while len(sites) < nodes:
        size = min(dice.choice((1, 2, 3, 5, 10, 20, 50, 100, 200)), nodes - len(sites))
        if size < 10 and dice.random() < 0.15:
            sleepers.update(range(len(sites), len(sites) + size))
        sites += [f"site-{len(sites)}"] * size
    events = [_of_node(dice, end, sleeps=node in sleepers) for node in range(nodes)]
    members = defaultdict(list)
    for node, site in enumerate(sites):
        members[site].append(node)
    for group in members.values():
        if group[0] in sleepers:
            continue
        for start in _times(dice, end, 0.6):
            length = dice.uniform(30, 1800)
            power = dice.random() < 0.4
            for node in group:
                # Of a site that loses its power the batteries don't last alike; a cut cuts all at once.
                begin = start + dice.uniform(0, 9) if power else start
                kind, reset = (Kind.POWER, dice.random() < 0.2) if power else (Kind.CUT, False)
                events[node].append(Event(kind, begin, start + length, reset=reset))
    absences = [
        *(Absence(start, start + dice.uniform(5, 20), restart=True) for start in _times(dice, end, 2, least=1)),
        *(Absence(start, start + dice.uniform(3, 60), restart=False) for start in _times(dice, end, 10, least=2)),
    ]
    return Trace(end, sites, sleepers, events, _apart(absences))


def _times(dice: random.Random, end: float, per_week: float, least: int = 0) -> list[float]:
    """Roll times at which something happens, a while after the start and before the end."""
    number = max(least, sum(dice.random() < per_week * end / DAY / 7 / 20 for _ in range(20)))
    return sorted(dice.uniform(300, end - 3 * HOUR) for _ in range(number))


def _apart(absences: Iterable[Absence]) -> list[Absence]:
    kept: list[Absence] = []
    for absence in sorted(absences):
        if not kept or absence.start > kept[-1].end + 120:
            kept.append(absence)
    return kept


def _of_node(dice: random.Random, end: float, *, sleeps: bool) -> list[Event]:
    if sleeps:
        return list(_nights(dice, end))
    events = []
    for start in _times(dice, end, 0.4):
        length = min(2 * HOUR, dice.lognormvariate(5.5, 1.2))
        reset = dice.random() < 0.5
        refused = dice.choice((0.0, 0.0, 2.0, 6.0)) if reset else 0.0
        events.append(Event(Kind.CRASH, start, start + length, reset, refused))
    events += [Event(Kind.PATH, start, start + dice.uniform(20, 1800)) for start in _times(dice, end, 0.05)]
    if dice.random() < 0.02:
        at = dice.uniform(300, end - 3 * HOUR)
        for _ in range(20):
            length = dice.choice((dice.uniform(0.5, 8), dice.uniform(8, 25)))
            events.append(Event(dice.choice((Kind.FLAP, Kind.LINK)), at, at + length, reset=dice.random() < 0.3))
            at += length + dice.uniform(20, 200)
    for start in _times(dice, end, 2):
        loss, longest = dice.choice(((0.1, 900), (0.1, 600), (0.2, 300), (0.3, 120), (0.6, 40)))
        kind = Kind.JAM if loss > 0.5 else Kind.LOSS
        events.append(Event(kind, start, start + dice.uniform(10, longest), loss=loss))
    kept: dict[Kind, float] = {}
    apart = []
    for event in sorted(events, key=lambda event: event.start):
        if event.start > kept.get(event.kind, 0.0):
            apart.append(event)
            kept[event.kind] = event.end
    return apart


def _nights(dice: random.Random, end: float) -> Iterator[Event]:
    """Roll when a node sleeps: by its own clock, and sometimes on into the day."""
    opens, closes = WINDOW
    asleep_from = -DAY
    for day in range(int(end // DAY) + 2):
        wakes = day * DAY + opens + dice.uniform(-20, 40)
        if day > 0 or asleep_from < 0:
            yield Event(Kind.ASLEEP, max(asleep_from, 1.0), wakes, reset=dice.random() < 0.5)
        asleep_from = day * DAY + closes + dice.uniform(-30, 30)
        if dice.random() < 0.05:
            yield Event(Kind.NOT_WOKEN, day * DAY + opens - 100, wakes + 2 * HOUR)


def deliveries(dice: random.Random, start: float, end: float, every: float, loss: float) -> Iterator[float]:
    """Tell when what is sent at intervals arrives over TCP: in order, 0.3 s each way, what is lost after doubling pauses."""
    arrived = start
    at = start + every * dice.random()
    while at < end:
        took, pause = 0.3, 0.9
        while dice.random() < loss:
            took += pause
            pause *= 2
        arrived = max(arrived, at + took)
        yield arrived
        at += every


@dataclass
class Node:
    """A node on the virtual network, as peers' fleet sees it."""

    world: World
    number: int
    site: str
    phase: float
    watch: Watch
    healthy: bool = False
    active: list[Event] = field(default_factory=list)
    tick_at: float = -1.0
    # Whether the far end of the open stream still lives, and which stream it is.
    stream_lives: bool = False
    stream: int = 0

    @property
    def liveness(self) -> Liveness | None:
        """What the watch says."""
        return self.watch.liveness

    @property
    def streaming(self) -> bool:
        """What the watch says."""
        return self.watch.streaming

    @property
    def last_sign_at(self) -> float:
        """What the watch says, or would say had it been told of each beat."""
        return self.last_beat(self.world.now) if self.healthy else self.watch.last_sign_at

    def last_beat(self, now: float) -> float:
        """Tell when the last beat before *now* arrived."""
        return max(self.watch.last_sign_at, now - (now - self.phase) % BEAT)

    def is_in(self, kinds: Iterable[Kind]) -> bool:
        """Tell whether one of these befalls the node now."""
        return any(event.kind in kinds for event in self.active)

    @property
    def loss(self) -> float:
        """How much of its packets get lost now."""
        return max((event.loss for event in self.active), default=0.0)


class Told(NamedTuple):
    """A verdict, with what was true when it was given."""

    at: float
    node: int
    verdict: Conclude
    active: tuple[Kind, ...]


class World:
    """The liveness core at work on a trace."""

    def __init__(self, trace: Trace, seed: int, limits: LivenessLimits | None = None) -> None:
        self.now = 0.0
        self.told: list[Told] = []
        self.ticks = 0
        self._trace = trace
        self._dice = random.Random(seed)
        self._limits = limits or LivenessLimits()
        self._fleet = Fleet(self._limits.fresh_seconds, 3, 1)
        self._heap: list[tuple[float, int, Node | None, str, object]] = []
        self._serial = 0
        self._started_at = 0.0
        self.nodes: list[Node] = []
        for number, site in enumerate(trace.sites):
            watch = self._new_watch(number, lost=False)
            node = Node(self, number, site, self._dice.uniform(0, BEAT), watch)
            self.nodes.append(node)
            self._fleet.add(str(number), site, node)
            self._open_at(node, self._dice.uniform(0.1, 30))
            for event in trace.events[number]:
                self._push(event.start, node, "begin", event)
                self._push(event.end, node, "end", event)
        for absence in trace.absences:
            self._push(absence.end, None, "back", absence)

    def run(self) -> None:
        """Let all happen."""
        absences = iter(self._trace.absences)
        absent = next(absences, None)
        while self._heap and self._heap[0][0] < self._trace.end:
            at, _, node, what, detail = heapq.heappop(self._heap)
            while absent is not None and at > absent.end:
                absent = next(absences, None)
            # Nature goes on while the manager is absent; what reaches the manager waits.
            if absent is not None and absent.start <= at < absent.end and what not in {"begin", "end"}:
                if not absent.restart:
                    self._push(absent.end, node, what, detail)
                continue
            self.now = at
            if node is None:
                assert isinstance(detail, Absence)
                self._come_back(detail)
            else:
                self._happen(node, what, detail)

    def _push(self, at: float, node: Node | None, what: str, detail: object = None) -> None:
        self._serial += 1
        # The manager knows that it was absent before it takes in what waited.
        heapq.heappush(self._heap, (at, 0 if what == "back" else self._serial, node, what, detail))

    def _new_watch(self, number: int, *, lost: bool) -> Watch:
        window = _window if number in self._trace.sleepers else None
        weigh = partial(self._weigh, str(number))
        return Watch(self._limits, self.now, self._started_at, weigh, lost=lost, seed=number, window=window)

    def _weigh(self, name: str, answers: Mapping[str, Answer], now: float) -> Findings:
        return self._fleet.weigh(name, answers, now)

    def _come_back(self, absence: Absence) -> None:
        if not absence.restart:
            for node in self.nodes:
                node.watch.shift(absence.end - absence.start)
                self._schedule(node)
            return
        self._started_at = self.now
        self._heap = [item for item in self._heap if item[3] in {"begin", "end", "back"}]
        heapq.heapify(self._heap)
        for place, node in enumerate(self.nodes):
            node.watch = self._new_watch(node.number, lost=node.watch.liveness is Liveness.UNREACHABLE)
            node.healthy, node.stream_lives, node.stream, node.tick_at = False, False, node.stream + 1, -1.0
            if node.watch.liveness is None:
                # 32 handshakes at once, half a second each.
                self._open_at(node, self.now + place / 64)
            else:
                self._schedule(node)

    def _open_at(self, node: Node, at: float) -> None:
        actions = node.watch.tick(self.now)
        assert actions == [OpenStream()]
        self._push(at, node, "open")
        self._schedule(node)

    def _happen(self, node: Node, what: str, detail: Any) -> None:
        watch, now = node.watch, self.now
        match what:
            case "begin":
                self._begin(node, detail)
            case "end":
                self._end(node, detail)
            case "tick":
                self._tick(node, detail)
            case "heard" if detail == node.stream and watch.streaming and not node.is_in(DOWN | LINKS):
                watch.heard(now)
                node.healthy = not node.active and node.stream_lives and node.liveness is None
            case "lost" if detail == node.stream and watch.streaming:
                self._act(node, watch.stream_lost(now, ContactReason.CONNECTION_LOST, "reset"))
            case "open":
                self._open(node)
            case "opened":
                self._opened(node)
            case "open failed":
                self._act(node, watch.open_failed(now, ContactReason.TIMED_OUT, "timed out"))
            case "knocked":
                self._act(node, watch.knocked(now, detail, "knocked"))
            case "knock again":
                self._knock_again(node)
            case "answered":
                self._act(node, watch.peers_answered(now, self._heard_answers(detail)))
        self._schedule(node)

    def _tick(self, node: Node, due_at: float) -> None:
        if due_at == node.tick_at:
            node.tick_at = -1.0
            if not node.healthy:
                self.ticks += 1
                self._act(node, node.watch.tick(self.now))

    def _schedule(self, node: Node) -> None:
        at = node.watch.next_at
        if not node.healthy and at != node.tick_at and at < self._trace.end:
            node.tick_at = at
            self._push(max(at, self.now), node, "tick", at)

    def _begin(self, node: Node, event: Event) -> None:
        if node.healthy:
            node.watch.heard(node.last_beat(self.now))
            node.healthy = False
        node.active.append(event)
        if event.kind in DOWN:
            node.stream_lives = False
            if event.reset:
                self._push(self.now + 0.05, node, "lost", node.stream)
        elif event.kind in LOSSES:
            self._beat_through(node, event)

    def _beat_through(self, node: Node, event: Event) -> None:
        if node.stream_lives:
            for at in deliveries(self._dice, self.now, event.end, BEAT, event.loss):
                self._push(at, node, "heard", node.stream)

    def _end(self, node: Node, event: Event) -> None:
        node.active.remove(event)
        if node.stream_lives and not node.active:
            # TCP tries again after pauses that grow with the time it didn't get through.
            late = self._dice.uniform(0, min(60.0, event.end - event.start)) if event.kind in LINKS else 0.0
            self._push(self.now + 0.3 + late, node, "heard", node.stream)

    # what the manager does

    def _act(self, node: Node, actions: Sequence[object]) -> None:
        for action in actions:
            match action:
                case Knock():
                    self._knock(node)
                case OpenStream():
                    self._open(node)
                case CloseStream():
                    node.stream_lives = False
                    node.stream += 1
                case AskPeers():
                    self._ask_peers(node, action.attempt)
                case Conclude():
                    self.told.append(Told(self.now, node.number, action, tuple(event.kind for event in node.active)))

    def _knock(self, node: Node) -> None:
        if any(event.kind is Kind.CRASH and self.now < event.start + event.refused_seconds for event in node.active):
            self._push(self.now + 0.01, node, "knocked", ContactReason.CONNECTION_REFUSED)
        elif node.is_in(DOWN | LINKS):
            if any(self.now < event.end <= self.now + 1 for event in node.active):
                self._push(self.now + 1, node, "knock again")
            else:
                self._push(self.now + 3, node, "knocked", ContactReason.TIMED_OUT)
        elif (took := self._round_trips(node.loss, 2)) > 3:
            self._push(self.now + 3, node, "knocked", ContactReason.TIMED_OUT)
        else:
            self._push(self.now + took, node, "knocked", ContactReason.OK)

    def _knock_again(self, node: Node) -> None:
        """Have the kernel send its second SYN, a second after the first."""
        lost = node.is_in(DOWN | LINKS) or self._round_trips(node.loss, 2) > 2
        self._push(
            self.now + (2 if lost else 0.1), node, "knocked", ContactReason.TIMED_OUT if lost else ContactReason.OK
        )

    def _open(self, node: Node) -> None:
        took = self._round_trips(node.loss, 10)
        if took > 15 or node.is_in(DOWN | LINKS):
            self._push(self.now + 15, node, "open failed")
        else:
            self._push(self.now + took, node, "opened")

    def _opened(self, node: Node) -> None:
        if node.is_in(DOWN | LINKS):
            self._act(node, node.watch.open_failed(self.now, ContactReason.CONNECTION_LOST, "lost"))
            return
        self._act(node, node.watch.stream_opened(self.now))
        node.stream_lives = True
        node.stream += 1
        self._push(self.now + self._dice.uniform(0.5, 3), node, "heard", node.stream)
        for event in node.active:
            if event.kind in LOSSES:
                self._beat_through(node, event)

    def _round_trips(self, loss: float, number: int) -> float:
        """Tell how long round trips take, each way of which may lose its packet, with 0.3 s of delay where there is loss."""
        if not loss:
            return 0.02 * number
        took = 0.0
        for _ in range(number):
            pause = 1.0
            took += 0.6
            while self._dice.random() < 1 - (1 - loss) ** 2:
                took += pause
                pause *= 2
        return took

    def _ask_peers(self, node: Node, attempt: int) -> None:
        answers: dict[str, Answer] = {}
        took = 0.05
        for name in self._fleet.choose(str(node.number), self.now, attempt):
            peer = self.nodes[int(name)]
            answers[name] = self._look(peer, node)
            took = max(took, {Answer.SEEN: 0.5, Answer.BLIND: 3.1, Answer.CANNOT_TELL: 4.5}[answers[name]])
        self._push(self.now + took, node, "answered", answers)

    def _look(self, peer: Node, node: Node) -> Answer:
        if peer.is_in(DOWN | LINKS):
            return Answer.CANNOT_TELL
        if any(event.kind is Kind.CRASH and self.now < event.start + event.refused_seconds for event in node.active):
            return Answer.SEEN
        if node.is_in(DOWN | {Kind.LINK}) or (node.is_in({Kind.CUT}) and peer.site != node.site):
            return Answer.BLIND
        return Answer.SEEN if self._round_trips(node.loss, 1) <= 3 else Answer.BLIND

    def _heard_answers(self, answers: dict[str, Answer]) -> dict[str, Answer]:
        """Lose the answers of peers that went away while they looked."""
        return {
            name: Answer.CANNOT_TELL if self.nodes[int(name)].is_in(DOWN | LINKS) else answer
            for name, answer in answers.items()
        }


def _window(now: float) -> tuple[bool, float]:
    opens, closes = WINDOW
    day = now // DAY * DAY
    if now < day + opens:
        return False, day + opens
    return (True, day + closes) if now < day + closes else (False, day + DAY + opens)
