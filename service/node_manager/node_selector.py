# SPDX-License-Identifier: GPL-3.0-or-later
"""Choose nodes: score every node that the filters leave, for one replica after the other.

Pure but for the index, in which chosen replicas are counted as placed at once, so that the next choice sees them. The same rows,
request and time give the same choice bit for bit: scores are made element by element, and ties break by a seeded hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node_manager.capacity import choose_units
from node_manager.fleet_index import CLASSES, FleetIndex, Mask
from node_manager.fleet_rows import NodeRow
from node_manager.fragmentation import Fragmentation, RequestMix
from node_manager.resources import WHOLE_MILLI, Ask
from node_manager.selection_filters import AFFINITY, ANTI_AFFINITY, SPREAD, Filtered, Filters, Sieve
from node_manager.selection_request import Mode, Scope, SelectionRequest, Strategy, Term

Scores = NDArray[Any]
Parts = dict[str, Scores]

TAKEN = "taken_by_other_replicas"
# What counts how much; the strategies differ in nothing else. Packing is a score of binpack alone.
WEIGHTS: dict[Strategy, dict[str, float]] = {
    Strategy.BALANCED: {
        "spread": 2, "affinity": 2, "load": 2, "stability": 2, "fit": 1, "balance": 1, "geography": 1, "images": 1,
    },
    Strategy.SPREAD: {
        "spread": 4, "affinity": 2, "load": 2, "stability": 1, "fit": 2, "balance": 1, "geography": 1, "images": 1,
    },
    Strategy.BINPACK: {"packing": 8, "affinity": 2, "stability": 1, "geography": 1, "images": 1},
}  # fmt: skip
# The same as parts of one, so that what is summed up is the score.
_SHARES = {
    strategy: {name: np.float32(weight / sum(weights.values())) for name, weight in weights.items()}
    for strategy, weights in WEIGHTS.items()
}
_CANDIDATES = 5
# Where more of the nodes are left, all are scored and those that are not left are dropped at the end: to gather values from
# a column takes as long as three operations on the whole of it.
_MANY = 0.25
_MIX = np.uint64(0x9E3779B97F4A7C15)
_WORD = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Choice:
    """One replica's node, the units of devices taken there, and why it was the best: scores from 0 to 100."""

    node_id: str
    units: Mapping[str, Mapping[str, int]]
    score: float
    scores: Mapping[str, float]


@dataclass
class Selection:
    """What came of one request."""

    choices: list[Choice]
    fits: bool
    considered: int
    # Why nodes were left out, each counted once, by the first reason; for the replica that was looked at last.
    rejected: dict[str, int]
    # The best nodes that were not chosen for the first replica, with their scores.
    candidates: list[tuple[str, float]] = field(default_factory=list)
    # Where not all fit: how many did.
    placed: int = 0
    # The rows as they were before, to be put back where the choice is not kept.
    undo: list[NodeRow] = field(default_factory=list)


@dataclass
class _Look:
    """What holds for all replicas of one request."""

    request: SelectionRequest
    ask: Ask
    # How many resource classes that are.
    classes: int
    filtered: Filtered
    # The nodes that are left.
    rows: NDArray[np.intp]
    # What is taken of columns: these rows, or whole columns where that is faster; see of_rows().
    at: NDArray[np.intp] | slice
    # Scores that no replica of the request changes: by place, and by row (affinity: before the first replica).
    columns: Parts
    parts: Parts
    # What they come to, weighted, with all that is as good everywhere: by *at*, and what is added to that by row.
    base: Scores
    added: list[Scores]
    # Preferred terms about the request's own replicas, whether nearness is what is preferred, and what is near without them.
    own_preferred: list[tuple[Term, bool, Mask]]
    # The codes of the domains that spread is about, once they are needed.
    domains: NDArray[np.intp] | None = None
    placed: list[int] = field(default_factory=list)

    def of_rows(self, scores: Scores) -> Scores:
        """Turn scores by *at* into scores by row."""
        return scores.take(self.rows) if isinstance(self.at, slice) else scores


@dataclass
class _Scored:
    """The scores of one replica, by row; *parts* are not weighted."""

    total: Scores
    parts: Parts
    # What fit and balance are made of, by the look's *at*.
    use: tuple[Scores, Scores] | None


class NodeSelector:
    """Selection over one index."""

    def __init__(self, index: FleetIndex, mix: RequestMix, stale_after_seconds: float) -> None:
        self.index = index
        self.mix = mix
        self.filters = Filters(index, stale_after_seconds)
        self._fragmentation = Fragmentation(mix)

    def select(self, request: SelectionRequest, now: float, *, observe: bool = True) -> Selection:
        """Choose a node for each replica, and count them as placed in the index; all or none.

        Shapes: *observe* counts the request among those that packing is judged by.
        """
        self.index.tick(now)
        ask = request.ask
        if observe:
            self.mix.observe(ask)
        filtered = self.filters.apply(request, ask, now)
        homes = self._homes(request, ask, filtered)
        if homes is not None:
            filtered.keep(homes, AFFINITY)
        selection = self._greedy(request, ask, filtered)
        # The best node's zone (site, region) may be too small for all that must stay together: then the next best.
        while not selection.fits and selection.choices and filtered.together:
            first = self.index.place_of[selection.choices[0].node_id]
            self.undo(selection)
            # Of several terms the narrowest: another site of the zone may have the room.
            near = [self.filters.near(term.scope, [first]) for term in filtered.together]
            filtered.keep(~np.logical_and.reduce(near), AFFINITY)
            selection = self._greedy(request, ask, filtered)
        if not selection.fits:
            selection.placed = len(selection.choices)
            self.undo(selection)
            selection.choices.clear()
        return selection

    def undo(self, selection: Selection) -> None:
        """Take back what select() counted as placed."""
        for row in reversed(selection.undo):
            self.index.put(row)
        selection.undo.clear()

    def slots(self, request: SelectionRequest, now: float) -> NDArray[np.int64]:
        """Count for each node how many replicas it has room for, 0 where a filter leaves it out."""
        alive = self.filters.apply(request, request.ask, now).alive
        return np.where(alive, self.filters.slots(request.ask, request.replicas), 0)

    def _homes(self, request: SelectionRequest, ask: Ask, filtered: Filtered) -> Mask | None:
        """Mark the nodes in domains with room for all replicas, where they must stay together; None: they need not."""
        if not filtered.together:
            return None
        slots = np.where(filtered.alive, self.filters.slots(ask, request.replicas), 0)
        homes = np.ones(self.index.places, bool)
        for term in filtered.together:
            codes = self.index.domains(term.scope)
            room = np.bincount(codes, weights=slots, minlength=1)
            room[0] = 0
            homes &= (room >= request.replicas)[codes]
        return homes

    # one replica after the other

    def _greedy(self, request: SelectionRequest, ask: Ask, filtered: Filtered) -> Selection:
        selection = Selection([], True, len(self.index), filtered.rejected)
        if not filtered.left:
            selection.fits = False
            return selection
        look = self._look(request, ask, filtered)
        for number in range(request.replicas):
            open_ = None
            if number:
                sieve = self._open(look)
                selection.rejected = sieve.rejected
                if not sieve.left:
                    selection.fits = False
                    break
                open_ = sieve.alive.take(look.rows)
            scored = self._score(look, open_)
            best = self._best(look, scored.total, number)
            if number == 0 and request.explain:
                selection.candidates = self._runners_up(look, scored.total, best)
            place = int(look.rows[best])
            row = self.index.rows[place]
            assert row is not None
            units = self._units(look, row, place)
            scores = self._scores_at(look, scored, best)
            selection.choices.append(Choice(row.node_id, units, float(scored.total[best]), scores))
            selection.undo.append(self.index.reserve(place, ask, units, request.deployment_id))
            look.placed.append(place)
        return selection

    def _look(self, request: SelectionRequest, ask: Ask, filtered: Filtered) -> _Look:
        index, shares = self.index, _SHARES[request.strategy]
        rows = filtered.alive.nonzero()[0]
        at = slice(index.places) if len(rows) > _MANY * index.places else rows
        columns: Parts = {"stability": index.stability}
        if "load" in shares:
            # What is placed changes this column, and the scores of later replicas are told as they were.
            columns["load"] = index.load.copy() if request.replicas > 1 else index.load
        if request.near is not None:
            columns["geography"] = index.nearness(request.near.latitude, request.near.longitude)
        parts, own = Parts(), []
        preferred = _preferred_of(request)
        if preferred:
            parts["affinity"] = self._preferred(preferred, rows)
            # A single replica has no others to be near to.
            if request.replicas > 1:
                own = [
                    (term, wanted, self._near_before(term).take(rows))
                    for term, wanted in preferred
                    if request.is_own(term)
                ]
        if request.images:
            worth = np.float32(100 / len(request.images))
            present = [index.mask_of_image(image).take(rows) * worth for image in request.images]
            parts["images"] = present[0] if len(present) == 1 else np.add.reduce(present)
        # What nobody asked about is as good everywhere, and what fit and packing score less is taken off this.
        constant = 100 * sum([share for name, share in shares.items() if name not in columns and name not in parts])
        base: Scores = columns["stability"][at] * shares["stability"]
        base += constant
        for name, column in columns.items():
            if name != "stability":
                base += column[at] * shares[name]
        added = [part * shares[name] for name, part in parts.items()]
        classes = len(ask.amounts) + len(ask.devices)
        return _Look(request, ask, classes, filtered, rows, at, columns, parts, base, added, own)

    def _near_before(self, term: Term) -> Mask:
        """Mark the nodes that are near a preferred term's target before any replica of the request is placed."""
        if term.scope is Scope.NODE:
            return self.index.mask_at(self.filters.places_of(term))
        return self.filters.cells_near(term).take(self.index.cell[: self.index.places])

    def _open(self, look: _Look) -> Sieve:
        """Leave the nodes that what depends on the replicas placed before leaves."""
        filtered = look.filtered
        left = Sieve(filtered.alive, filtered.left, dict(filtered.rejected))
        for _, room in self.filters.room(look.ask):
            left.keep(room, TAKEN)
        for term in filtered.together:
            left.keep(self.filters.near(term.scope, look.placed), AFFINITY)
        for term in filtered.apart:
            left.keep(~self.filters.near(term.scope, look.placed), ANTI_AFFINITY)
        if look.request.spread is not None:
            left.keep(self._even(look), SPREAD)
        return left

    def _even(self, look: _Look) -> Mask:
        """Mark the nodes on which one more replica leaves the distribution even enough."""
        spread, index = look.request.spread, self.index
        assert spread is not None
        codes = index.domains(spread.scope)
        counts = np.bincount(codes[look.placed], minlength=int(codes.max(initial=0)) + 1)
        if look.domains is None:
            found = np.unique(codes[look.filtered.eligible])
            look.domains = found[found != 0].astype(np.intp)
        # Evenness takes two: with a single domain the other one is empty.
        emptiest = int(counts[look.domains].min()) if len(look.domains) > 1 else 0
        even: Mask = (counts < spread.max_skew + emptiest)[codes]
        return even

    # scores

    def _score(self, look: _Look, open_: Mask | None) -> _Scored:
        """Score the look's rows for one replica; those that are not open get -1."""
        shares, parts = _SHARES[look.request.strategy], dict(look.parts)
        use = None
        if "packing" in shares:
            parts["packing"] = self._packing(look, open_)
            # In doubles: costs differ by less than a float32 can tell.
            total = look.of_rows(look.base) - (100 - parts["packing"]) * shares["packing"]
        else:
            use = whole, gap = self._use(look)
            total = look.base - whole * (100 * shares["fit"] / look.classes)
            total -= gap * (100 * shares["balance"])
            total = look.of_rows(total)
        for part in look.added:
            total += part
        if look.placed and "spread" in shares:
            parts["spread"] = self._spread(look)
            total -= (100 - parts["spread"]) * shares["spread"]
        if look.placed and look.own_preferred:
            parts["affinity"] = self._own_affinity(look)
            total += (parts["affinity"] - look.parts["affinity"]) * shares["affinity"]
        if open_ is not None:
            total[~open_] = -1
        return _Scored(total, parts, use)

    def _scores_at(self, look: _Look, scored: _Scored, row: int) -> dict[str, float]:
        """Give the single scores of one row; for all of them they would cost more than the choice."""
        place = int(look.rows[row])
        scores = dict.fromkeys(WEIGHTS[look.request.strategy], 100.0)
        for name, column in look.columns.items():
            scores[name] = float(column[place])
        for name, part in scored.parts.items():
            scores[name] = float(part[row])
        if scored.use is not None:
            at = place if isinstance(look.at, slice) else row
            whole, gap = scored.use
            scores["fit"] = 100 - 100 * float(whole[at]) / look.classes
            scores["balance"] = 100 - 100 * float(gap[at])
        return scores

    def _use(self, look: _Look) -> tuple[Scores, Scores]:
        """Tell, by *at*, which part of each resource asked for would be in use: the sum, and the most less the least."""
        index, at = self.index, look.at
        used: list[Scores] = []
        for name, amount in look.ask.amounts:
            number = CLASSES.index(name)
            part: Scores = index.inverse[number][at] * np.float32(amount)
            part += index.share[number][at]
            used.append(part)
        for name, count, share in look.ask.devices:
            counts = np.maximum(index.device_counts[name][at], 1).astype(np.float32)
            used.append(index.device_share[name][at] + np.float32(count * share / WHOLE_MILLI) / counts)
        if len(used) == 1:
            return used[0], np.zeros_like(used[0])
        total, most, least = used[0] + used[1], np.maximum(used[0], used[1]), np.minimum(used[0], used[1])
        for each in used[2:]:
            total += each
            np.maximum(most, each, out=most)
            np.minimum(least, each, out=least)
        most -= least
        return total, most

    def _packing(self, look: _Look, open_: Mask | None) -> Scores:
        """Score how little the replica breaks up of what others could use."""
        chosen = slice(None) if open_ is None else open_
        growth = self._fragmentation.growth(look.ask, self.index.space(), look.rows[chosen])
        least, most = growth.min(), growth.max()
        scores = np.zeros(len(look.rows))
        scores[chosen] = 100.0 if most == least else 100.0 - (growth - least) * (100.0 / (most - least))
        return scores

    def _preferred(self, preferred: list[tuple[Term, bool]], rows: NDArray[np.intp]) -> Scores:
        """Score how much of what is preferred nodes meet, before any replica of the request is placed."""
        total = sum([term.weight for term, _ in preferred])
        per_cell = np.zeros(self.index.cell_count, np.float32)
        single: list[tuple[Mask, np.float32]] = []
        for term, wanted in preferred:
            worth = np.float32(100 * term.weight / total)
            if term.scope is Scope.NODE:
                near = self.index.mask_at(self.filters.places_of(term)).take(rows)
                single.append((near if wanted else ~near, worth))
            else:
                near = self.filters.cells_near(term)
                per_cell += (near if wanted else ~near) * worth
        scores: Scores = per_cell.take(self.index.cell.take(rows))
        for met, worth in single:
            scores += met * worth
        return scores

    def _own_affinity(self, look: _Look) -> Scores:
        """Score preferred terms anew where the replicas placed so far are what they are about."""
        total = sum(term.weight for term, _ in _preferred_of(look.request))
        scores = look.parts["affinity"]
        for term, wanted, before in look.own_preferred:
            now = self.filters.near(term.scope, look.placed).take(look.rows) | before
            gained = (now == wanted).astype(np.float32) - (before == wanted)
            scores = scores + gained * np.float32(100 * term.weight / total)
        return scores

    def _spread(self, look: _Look) -> Scores:
        """Score how few of the deployment's replicas are on the node, and in its zone."""
        index = self.index
        codes = index.cell_codes[Scope.ZONE]
        per_zone = np.bincount(codes[index.cell[look.placed]], minlength=int(codes.max(initial=0)) + 1)
        # Nodes of no zone are no zone.
        per_zone[0] = 0
        half = (100 - 50 * per_zone / max(1, per_zone.max())).astype(np.float32)
        scores: Scores = half[codes].take(index.cell.take(look.rows))
        places, counts = np.unique(look.placed, return_counts=True)
        # Rows ascend, and what was chosen is among them.
        scores[np.searchsorted(look.rows, places)] -= (50 * counts / counts.max()).astype(np.float32)
        return scores

    # the best

    def _best(self, look: _Look, total: Scores, number: int) -> int:
        """Find the best row; of several a hash of node, deployment and replica takes one."""
        best = (total == total[total.argmax()]).nonzero()[0]
        if len(best) == 1:
            return int(best[0])
        digest = hashlib.blake2b(look.request.deployment_id.encode(), digest_size=8).digest()
        seed = np.uint64((int.from_bytes(digest, "big") + number) & _WORD)
        return int(best[((self.index.tie[look.rows[best]] ^ seed) * _MIX).argmin()])

    def _runners_up(self, look: _Look, total: Scores, best: int) -> list[tuple[str, float]]:
        """Name the best nodes that were not chosen, best first."""
        last = max(0, len(total) - _CANDIDATES - 1)
        top = np.flatnonzero(total >= max(0, np.partition(total, last)[last]))
        # By score, then by what doesn't depend on the order in which nodes came.
        ordered = top[np.lexsort((self.index.tie[look.rows[top]], -total[top]))]
        rows = [(self.index.rows[look.rows[at]], float(total[at])) for at in ordered[: _CANDIDATES + 1] if at != best]
        return [(row.node_id, score) for row, score in rows if row is not None][:_CANDIDATES]

    def _units(self, look: _Look, row: NodeRow, place: int) -> dict[str, dict[str, int]]:
        if not look.ask.devices:
            return {}
        shares = {name: share for name, _, share in look.ask.devices}
        if look.request.strategy is Strategy.BINPACK:
            chosen = self._fragmentation.choose_units(look.ask, self.index.space(), place)
            units = {
                name: {row.units[name][position]: shares[name] for position in positions}
                for name, positions in chosen.items()
            }
        else:
            units = choose_units(look.ask, row.units, row.used_units)
        if look.request.replicas > 1:
            for name, count, share in look.ask.devices:
                if count > 1 and 2 * share <= WHOLE_MILLI:
                    units[name] = _leave_most(units[name], row.units[name], row.used_units.get(name, {}), share)
        return units


def _preferred_of(request: SelectionRequest) -> list[tuple[Term, bool]]:
    """Give the preferred terms, each with whether nearness is what is preferred."""
    return [
        (term, wanted)
        for terms, wanted in ((request.affinity, True), (request.anti_affinity, False))
        for term in terms
        if term.mode is Mode.PREFERRED
    ]


def _leave_most(units: dict[str, int], known: Sequence[str], used: Mapping[str, int], share: int) -> dict[str, int]:
    """Take other units where *units* would leave room for fewer replicas: several units of a replica must differ."""
    count = len(units)
    left = {unit: max(0, WHOLE_MILLI - used.get(unit, 0)) // share for unit in known}
    # Those that can serve most replicas first; of these, what was chosen.
    others = sorted(known, key=lambda unit: (-left[unit], unit not in units))[:count]
    if _replicas(left, units, count) >= _replicas(left, others, count):
        return units
    return dict.fromkeys(others, share)


def _replicas(left: Mapping[str, int], taken: Iterable[str], count: int) -> int:
    """Count the replicas, each of *count* different units, that units have room for once some were taken."""
    after = [turns - (unit in taken) for unit, turns in left.items()]
    replicas = sum(after) // count
    while sum(min(turns, replicas) for turns in after) < replicas * count:
        replicas -= 1
    return replicas
