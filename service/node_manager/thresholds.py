# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide when a reading has passed an edge for good, and when it is over.

Pure: what was known and the readings of one sample in, what is known out. Two edges each, and several samples in a row:
netdata's alarms have the two edges, Prometheus' rules the time ("for").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from node_manager.condition_memory import is_within, key_of
from node_manager.node_types import Limit

WARNING = 1
CRITICAL = 2
# Subjects (filesystems) of one threshold that are remembered: the worst that count already, and the next to count.
MAX_SETTLED = 3
MAX_SUBJECTS = 6
# How long what can't be read any more counts as it was.
HOLD_SECONDS = 900
_MISSED = -1

# By subject: [levels that count, samples beyond warning, beyond critical, time of the last such sample, reading].
Entry = Sequence[Any]
Entries = Mapping[str, Entry]


@dataclass(frozen=True)
class Edge:
    """One level's way in (at or above) and its way out (below)."""

    level: int
    enter: float
    clear: float


@dataclass(frozen=True)
class Edges:
    """The edges of one threshold, the lowest first."""

    edges: tuple[Edge, ...]
    lowest: float

    def edge(self, level: int) -> Edge:
        """Find the edge of a level, or the nearest that there is."""
        return next((edge for edge in self.edges if edge.level == level), self.edges[-1])


@dataclass(frozen=True)
class Steps:
    """How many samples in a row count, and after which pause none is in a row any more."""

    samples: int
    gap_seconds: float


def edges_of(limit: Limit) -> Edges | None:
    """Read the edges of a threshold; None where none is set.

    The clear edge is that of the lowest level; a higher one falls back a tenth below itself, and never later.
    """
    levels = [(WARNING, limit.warning), (CRITICAL, limit.critical)]
    enters = [(level, enter) for level, enter in levels if enter is not None]
    if not enters:
        return None
    lowest = enters[0][1]
    clear = _tenth_below(lowest) if limit.clear is None else limit.clear
    edges = [Edge(enters[0][0], lowest, clear)]
    edges += [Edge(level, enter, max(clear, _tenth_below(enter))) for level, enter in enters[1:]]
    return Edges(tuple(edges), lowest)


def follow(
    before: Entries, readings: Sequence[tuple[str, float]], edges: Edges, steps: Steps, now: int, *, hangs: bool = False
) -> Entries:
    """Count one sample's readings, each with its subject; the same object where nothing changed.

    Subjects that are all well aren't in the result, nor are those that are gone; *hangs* says that some could not be read
    this time: those count as they did, for a while.
    """
    # Nearly always.
    if not before and all(value < edges.lowest for _, value in readings):
        return before
    after: dict[str, Entry] = {}
    seen = set()
    for subject, value in readings:
        key = key_of(subject)
        seen.add(key)
        entry = _step(before.get(key), value, edges, steps, now)
        if entry is not None:
            after[key] = entry
    if hangs:
        missing = {key: _held(entry, now) for key, entry in before.items() if key not in seen}
        after |= {key: entry for key, entry in missing.items() if entry is not None}
    if len(after) > MAX_SUBJECTS:
        after = _most_telling(after)
    return before if after == before else after


def level_of(entry: Entry) -> int:
    """Tell the highest level that counts: WARNING, CRITICAL or 0."""
    return CRITICAL if entry[0] & CRITICAL else int(entry[0])


def _step(before: Entry | None, value: float, edges: Edges, steps: Steps, now: int) -> Entry | None:
    settled, warning_count, critical_count, last, reading = before or (0, 0, 0, 0, 0)
    counts = {WARNING: warning_count, CRITICAL: critical_count}
    if not is_within(last, now, steps.gap_seconds):
        counts = {WARNING: 0, CRITICAL: 0}
    # Levels that are no longer configured don't count.
    after = 0
    found = {WARNING: 0, CRITICAL: 0}
    for edge in edges.edges:
        counted = settled & edge.level
        contrary = value < edge.clear if counted else value >= edge.enter
        count = max(counts[edge.level], 0) + 1 if contrary else 0
        if count >= steps.samples:
            count = 0
            reading = reading if counted else round(value, 2)
            counted ^= edge.level
        after |= counted
        found[edge.level] = count
    counting = any(found.values())
    if not after and not counting:
        return None
    return [after, found[WARNING], found[CRITICAL], now if counting else 0, reading if after else 0]


def _held(entry: Entry, now: int) -> Entry | None:
    """Let a subject that can't be read count as it did; its clock starts with the first sample that misses it."""
    if entry[0] and entry[1] != _MISSED:
        return [entry[0], _MISSED, 0, now, entry[4]]
    return entry if is_within(entry[3], now, HOLD_SECONDS) else None


def _most_telling(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Keep the worst that count, for they make the condition; then those that are nearest to counting."""
    ranked = sorted(entries, key=lambda key: (-level_of(entries[key]), key))
    settled, rest = ranked[:MAX_SETTLED], ranked[MAX_SETTLED:]
    rest.sort(key=lambda key: (-entries[key][2], -entries[key][1], -level_of(entries[key]), key))
    return {key: entries[key] for key in [*settled, *rest[: MAX_SUBJECTS - MAX_SETTLED]]}


def _tenth_below(edge: float) -> float:
    return edge - abs(edge) / 10
