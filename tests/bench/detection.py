# SPDX-License-Identifier: GPL-3.0-or-later
"""How soon a lost node is called offline, and how often a living one is, beside the rules of Kubernetes and Nomad.

All judge the same seeded traces of tests/fleet_traces.py: crashes (silent, or with a reset and refusals first), sites that
lose their power within nine seconds or are cut off at once, lost management paths, flaps, nodes that sleep at night, bursts
of 10 to 60 % packet loss with 0.3 s of delay each way, restarts and stalls of the manager. Ours runs the real core on a
virtual network.

The truth. A node is offline while it is down, other than asleep as declared, or cut off from the manager with its whole
site (then the verdict must be frozen: evidence site_dark) or alone from everybody. It is not while its packets get lost,
while it sleeps, or while only the manager's path to it is lost and its neighbours see it. "Offline" is false if the node
wasn't offline at any time of the five seconds before: as long as one look and its answer take, the same for all. Recall
counts spells of a minute and more; saying so of a shorter one while it lasts is no false alarm. Times are counted from the
start of a spell, but for those at whose start the manager was away, or came or went within a minute, and those of nodes
that were already silent or only just back.

Kubernetes: status every 10 s, offline after 50 s without, looked at every 5 s. Nomad: heartbeats due within a TTL of 10 s
(its least; it grows to a second for each 50 nodes), and 10 s of grace. Both are favoured: a manager that returns owes every
node its whole time anew, and nothing is lost on the way but to the bursts. Neither knows of nodes that sleep, or of paths;
what that costs them is shown by cause.

``python tests/bench/detection.py [--nodes N] [--days D] [--seed S]``
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import math
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fleet_traces import LOSSES, OFFLINE, Event, Kind, Trace, World, deliveries, make_trace
from node_manager.domain import Evidence, Liveness

TOLERANCE_SECONDS = 5.0
SPELL_SECONDS = 60.0


class Spell(NamedTuple):
    """A time in which a node was truly offline."""

    start: float
    end: float
    kinds: frozenset[Kind]
    timed: bool


@dataclass
class Score:
    """How one judge did."""

    name: str
    verdicts: int = 0
    false: Counter[str] = field(default_factory=Counter)
    spells: int = 0
    found: int = 0
    suspect: list[float] = field(default_factory=list)
    offline: list[float] = field(default_factory=list)
    by_kind: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def line(self) -> str:
        """Give the score as a row of the table."""
        false = sum(self.false.values())
        precision = 1 - false / self.verdicts if self.verdicts else 1.0
        recall = self.found / self.spells if self.spells else 1.0
        return (
            f"{self.name:22} {self.verdicts:8} {false:7} {precision:10.4%} {recall:9.3%}"
            f"  {_ranks(self.suspect)}  {_ranks(self.offline)}"
        )


def main() -> None:
    """Make a trace, have it judged, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--days", type=float, default=7)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    start = time.perf_counter()
    trace = make_trace(arguments.nodes, arguments.days, arguments.seed)
    world = World(trace, arguments.seed)
    world.run()
    took = time.perf_counter() - start
    ours = judge_ours(trace, world)
    befell = Counter(event.kind.value for events in trace.events for event in events)
    print(f"{arguments.nodes} nodes, {arguments.days:g} days, seed {arguments.seed}: {dict(befell)}")
    print(f"manager: {sum(each.restart for each in trace.absences)} restarts of {len(trace.absences)} absences")
    print(f"simulated in {took:.1f} s, {world.ticks} ticks\n")
    print(
        f"{'':22} {'offline':>8} {'false':>7} {'precision':>10} {'recall':>9}  {'suspect p50/p99/max s':>22}  {'offline s':>22}"
    )
    ttl = max(10.0, arguments.nodes / 50)
    for score in (
        ours,
        judge_timeout(trace, "Kubernetes 50 s", 10, 50, 5, arguments.seed),
        judge_timeout(trace, "Nomad 10 + 10 s", 10, 20, 0, arguments.seed),
        judge_timeout(trace, f"Nomad {ttl:g} + 10 s", ttl, ttl + 10, 0, arguments.seed),
    ):
        print(score.line())
        if score.false:
            print(f"{'':22} false by cause: {dict(score.false)}")
    print("\nours by cause, p50/p99/max s: offline")
    for kind, times in sorted(ours.by_kind.items()):
        print(f"  {kind:20} {len(times):6} {_ranks(times)}")
    evidence = Counter(
        (
            str(told.verdict.evidence),
            " ".join(sorted({kind.value for kind in told.active} & {"crash", "site cut", "site power"})),
        )
        for told in world.told
        if told.verdict.liveness is Liveness.UNREACHABLE
    )
    print(f"evidence: {dict(evidence)}")
    print(f"living neighbours called single losses while their site was cut: {unfrozen(world)}")


def spells_of(trace: Trace, node: int) -> list[Spell]:
    """Merge what befell a node into the times in which it was offline."""
    spells: list[Spell] = []
    for event in sorted(
        (event for event in trace.events[node] if event.kind in OFFLINE), key=lambda event: event.start
    ):
        if spells and event.start <= spells[-1].end:
            last = spells.pop()
            spells.append(Spell(last.start, max(last.end, event.end), last.kinds | {event.kind}, last.timed))
        else:
            # A node that was to wake up is expected a minute later.
            start = event.start + 160 if event.kind is Kind.NOT_WOKEN else event.start
            timed = all(abs(start - at) > SPELL_SECONDS for absence in trace.absences for at in absence[:2])
            timed = timed and not _is_hidden(trace, node, start)
            spells.append(Spell(start, event.end, frozenset((event.kind,)), timed))
    return spells


def _is_hidden(trace: Trace, node: int, at: float) -> bool:
    """Tell whether the node was already silent for another reason, or only just back."""
    return any(
        event.start <= at < event.end + 120
        for event in trace.events[node]
        if event.start != at and not (event.kind is Kind.NOT_WOKEN and event.start + 160 == at)
    )


def judge_ours(trace: Trace, world: World) -> Score:
    """Score what the core told."""
    score = Score("ours")
    offline: defaultdict[int, list[float]] = defaultdict(list)
    suspect: defaultdict[int, list[float]] = defaultdict(list)
    for told in world.told:
        if told.verdict.liveness is Liveness.UNREACHABLE:
            offline[told.node].append(told.at)
        elif told.verdict.liveness is Liveness.SUSPECT:
            suspect[told.node].append(told.at)
    for node in range(len(trace.sites)):
        _score(score, trace, node, offline[node], suspect[node])
    return score


def _score(score: Score, trace: Trace, node: int, offline: list[float], suspect: list[float]) -> None:
    spells = spells_of(trace, node)
    starts = [spell.start for spell in spells]
    for at in offline:
        score.verdicts += 1
        place = bisect.bisect_right(starts, at) - 1
        if place < 0 or at > spells[place].end + TOLERANCE_SECONDS:
            score.false[_cause(trace.events[node], at)] += 1
    for spell in spells:
        if spell.end - spell.start < SPELL_SECONDS or spell.end > trace.end:
            continue
        score.spells += 1
        first = next((at for at in offline if spell.start <= at <= spell.end), None)
        # A node that was lost already, and stays so, needs no second verdict.
        known = first is None and _is_hidden(trace, node, spell.start)
        score.found += first is not None or known
        if first is not None and spell.timed:
            score.offline.append(first - spell.start)
            for kind in spell.kinds:
                score.by_kind[kind.value].append(first - spell.start)
            doubted = next((at for at in suspect if spell.start <= at <= spell.end), None)
            if doubted is not None:
                score.suspect.append(doubted - spell.start)


def _cause(events: Iterable[Event], at: float) -> str:
    near = [event for event in events if event.start <= at <= event.end + 60]
    return " + ".join(sorted({event.kind.value for event in near})) or "none"


def judge_timeout(trace: Trace, name: str, every: float, patience: float, looks_every: float, seed: int) -> Score:
    """Score a rule that calls a node offline after so long without contact."""
    score = Score(name)
    dice = random.Random(seed)
    for node in range(len(trace.sites)):
        verdicts = _timeouts(dice, trace, node, every, patience, looks_every) if trace.events[node] else ()
        _score(score, trace, node, list(verdicts), [])
    return score


def _timeouts(
    dice: random.Random, trace: Trace, node: int, every: float, patience: float, looks_every: float
) -> Iterator[float]:
    phase = dice.uniform(0, every)
    for before, after in _gaps(dice, trace.events[node], every, phase):
        at = before + patience
        for absence in trace.absences:
            if absence.restart and before <= absence.end and absence.start <= at:
                at = absence.end + patience
            elif absence.start <= at < absence.end:
                at = absence.end
        if looks_every:
            at = math.ceil(at / looks_every) * looks_every
        if at < min(after, trace.end):
            yield at


def _gaps(dice: random.Random, events: list[Event], every: float, phase: float) -> Iterator[tuple[float, float]]:
    """Tell between which contacts none came, where something befell the node."""
    merged: list[list[float]] = []
    for event in sorted(events, key=lambda event: event.start):
        if event.kind in LOSSES:
            arrived = [event.start, *deliveries(dice, event.start, event.end, every, event.loss)]
            yield from itertools.pairwise(arrived)
        elif merged and event.start <= merged[-1][1] + every:
            merged[-1][1] = max(merged[-1][1], event.end)
        else:
            merged.append([event.start, event.end])
    for start, end in merged:
        yield start - (start - phase) % every, end + (phase - end) % every


def unfrozen(world: World) -> int:
    """Count nodes that live in a site that is cut off, yet were called lost for themselves."""
    return sum(
        told.verdict.evidence is Evidence.PEERS_BLIND and Kind.CUT in told.active and not set(told.active) & _SINGLE
        for told in world.told
    )


_SINGLE = frozenset((Kind.CRASH, Kind.FLAP, Kind.LINK, Kind.POWER, Kind.NOT_WOKEN))


def _ranks(times: list[float]) -> str:
    if not times:
        return f"{'-':>22}"
    ranked = sorted(times)
    return f"{ranked[len(ranked) // 2]:6.1f} {ranked[int(len(ranked) * 0.99)]:7.1f} {ranked[-1]:7.1f}"


if __name__ == "__main__":
    main()
