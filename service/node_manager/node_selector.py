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
from node_manager.selection_filters import AFFINITY, ANTI_AFFINITY, SPREAD, Filtered, Filters, narrow
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
_CANDIDATES = 5
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
    """What holds for all replicas of one request. Scores are of the nodes in *rows* only."""

    request: SelectionRequest
    ask: Ask
    filtered: Filtered
    seed: int
    rows: NDArray[np.intp]
    # The same as an index of columns: a slice where no node is left out, which costs no copy.
    at: NDArray[np.intp] | slice
    # Scores that no replica of the request changes, and their weighted sum.
    parts: Parts
    fixed: Scores
    # Preferred terms about the request's own replicas, whether nearness is what is preferred, and what is near without them.
    own_preferred: list[tuple[Term, bool, Mask]]
    # The codes of the domains that spread is about, once they are needed.
    domains: NDArray[np.intp] | None = None
    placed: list[int] = field(default_factory=list)


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
            filtered.alive = narrow(filtered.alive, homes, AFFINITY, filtered.rejected)
        selection = self._greedy(request, ask, filtered)
        # The best node's zone (site, region) may be too small for all that must stay together: then the next best.
        while not selection.fits and selection.choices and filtered.together:
            first = self.index.place_of[selection.choices[0].node_id]
            self.undo(selection)
            # Of several terms the narrowest: another site of the zone may have the room.
            near = [self.filters.near(term.scope, [first]) for term in filtered.together]
            elsewhere = ~np.logical_and.reduce(near)
            filtered.alive = narrow(filtered.alive, elsewhere, AFFINITY, filtered.rejected)
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
        look = self._look(request, ask, filtered)
        selection = Selection([], True, len(self.index), filtered.rejected)
        for number in range(request.replicas):
            open_, rejected = self._open(look)
            selection.rejected = {
                reason: filtered.rejected.get(reason, 0) + rejected.get(reason, 0)
                for reason in (filtered.rejected | rejected)
            }
            if not (len(look.rows) if open_ is None else open_.any()):
                selection.fits = False
                break
            total, parts = self._score(look, open_)
            best = self._best(look, total, look.seed + number)
            if number == 0 and request.explain:
                selection.candidates = self._runners_up(look, total, best)
            place = int(look.rows[best])
            row = self.index.rows[place]
            assert row is not None
            units = self._units(look, row, place)
            scores = {name: float(parts[name][best]) if name in parts else 100.0 for name in WEIGHTS[request.strategy]}
            selection.choices.append(Choice(row.node_id, units, float(total[best]), scores))
            selection.undo.append(self.index.reserve(place, ask, units, request.deployment_id))
            look.placed.append(place)
        return selection

    def _look(self, request: SelectionRequest, ask: Ask, filtered: Filtered) -> _Look:
        index, weights = self.index, WEIGHTS[request.strategy]
        rows = np.flatnonzero(filtered.alive)
        terms = [(term, True) for term in request.affinity] + [(term, False) for term in request.anti_affinity]
        preferred = [(term, wanted) for term, wanted in terms if term.mode is Mode.PREFERRED]
        at = rows if len(rows) < index.places else slice(index.places)
        # A single replica has no others to be near to.
        own = [
            (term, wanted, self._near_before(term)[at])
            for term, wanted in preferred
            if request.replicas > 1 and request.is_own(term)
        ]
        # Copies: what is placed changes these columns, and the scores are told as they were.
        parts: Parts = {"load": index.load[at].copy(), "stability": index.stability[at].copy()}
        if preferred:
            parts["affinity"] = self._preferred(preferred, at)
        if request.near is not None:
            parts["geography"] = index.nearness(request.near.latitude, request.near.longitude)[at]
        if request.images:
            present = [index.mask_of_image(image)[at] for image in request.images]
            parts["images"] = np.add.reduce(present, dtype=np.float32) * np.float32(100 / len(present))
        fixed: Scores = np.zeros(len(rows), np.float32)
        for name, part in parts.items():
            if name in weights and not (name == "affinity" and own):
                fixed += part * np.float32(weights[name])
        seed = int.from_bytes(hashlib.blake2b(request.deployment_id.encode(), digest_size=8).digest(), "big")
        return _Look(request, ask, filtered, seed, rows, at, parts, fixed, own)

    def _near_before(self, term: Term) -> Mask:
        """Mark the nodes that are near a preferred term's target before any replica of the request is placed."""
        if term.scope is Scope.NODE:
            return self.index.mask_at(self.filters.places_of(term))
        return self.filters.cells_near(term).take(self.index.cell[: self.index.places])

    def _open(self, look: _Look) -> tuple[Mask | None, dict[str, int]]:
        """Mark which of the look's rows are left by what depends on the replicas placed before; None: all of them."""
        rejected: dict[str, int] = {}
        if not look.placed:
            return None, rejected
        alive = look.filtered.alive
        for _, room in self.filters.room(look.ask):
            alive = narrow(alive, room, TAKEN, rejected)
        for term in look.filtered.together:
            alive = narrow(alive, self.filters.near(term.scope, look.placed), AFFINITY, rejected)
        for term in look.filtered.apart:
            alive = narrow(alive, ~self.filters.near(term.scope, look.placed), ANTI_AFFINITY, rejected)
        if look.request.spread is not None:
            alive = narrow(alive, self._even(look), SPREAD, rejected)
        return alive[look.at], rejected

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

    def _score(self, look: _Look, open_: Mask | None) -> tuple[Scores, Parts]:
        """Score the look's rows; those that are not open get -1."""
        weights, parts = WEIGHTS[look.request.strategy], dict(look.parts)
        changing: Parts = {}
        if "packing" in weights:
            changing["packing"] = self._packing(look, open_)
        else:
            changing |= self._fit(look)
        if "spread" in weights and look.placed:
            changing["spread"] = self._spread(look)
        if look.own_preferred:
            changing["affinity"] = self._own_affinity(look) if look.placed else look.parts["affinity"]
        parts |= changing
        # What nobody asked about is as good everywhere.
        constant = 100.0 * sum(weight for name, weight in weights.items() if name not in parts)
        total = look.fixed + constant
        for name, part in changing.items():
            total = total + part * np.float32(weights[name])
        scores: Scores = np.multiply(total, 1 / sum(weights.values()))
        if open_ is not None:
            scores[~open_] = -1
        return scores, parts

    def _fit(self, look: _Look) -> Parts:
        """Score how much is left after the replica, and how evenly its resources would be used."""
        index, at = self.index, look.at
        used: list[Scores] = []
        for name, amount in look.ask.amounts:
            number = CLASSES.index(name)
            part = index.inverse[number][at] * np.float32(amount)
            part += index.share[number][at]
            used.append(part)
        for name, count, share in look.ask.devices:
            counts = np.maximum(index.device_counts[name][at], 1).astype(np.float32)
            used.append(index.device_share[name][at] + np.float32(count * share / WHOLE_MILLI) / counts)
        total = most = least = used[0]
        for each in used[1:]:
            total, most, least = total + each, np.maximum(most, each), np.minimum(least, each)
        fit = np.float32(100) - total * np.float32(100 / len(used))
        if len(used) == 1:
            return {"fit": fit}
        return {"fit": fit, "balance": np.float32(100) - (most - least) * np.float32(100)}

    def _packing(self, look: _Look, open_: Mask | None) -> Scores:
        """Score how little the replica breaks up of what others could use."""
        chosen = slice(None) if open_ is None else open_
        growth = self._fragmentation.growth(look.ask, self.index.space(), look.rows[chosen])
        least, most = growth.min(), growth.max()
        scores = np.zeros(len(look.rows))
        scores[chosen] = 100.0 if most == least else 100.0 - (growth - least) * (100.0 / (most - least))
        return scores

    def _preferred(self, preferred: list[tuple[Term, bool]], at: NDArray[np.intp] | slice) -> Scores:
        """Score how much of what is preferred nodes meet, before any replica of the request is placed."""
        index = self.index
        total = sum(term.weight for term, _ in preferred)
        cells = np.zeros(index.cell_count, np.float32)
        single: list[tuple[Mask, np.float32]] = []
        for term, wanted in preferred:
            worth = np.float32(100 * term.weight / total)
            if term.scope is Scope.NODE:
                single.append((index.mask_at(self.filters.places_of(term)) == wanted, worth))
            else:
                cells += (self.filters.cells_near(term) == wanted) * worth
        scores: Scores = cells.take(index.cell[at])
        for mask, worth in single:
            scores += mask[at] * worth
        return scores

    def _own_affinity(self, look: _Look) -> Scores:
        """Score preferred terms anew where the replicas placed so far are what they are about."""
        terms = (*look.request.affinity, *look.request.anti_affinity)
        total = sum(term.weight for term in terms if term.mode is Mode.PREFERRED)
        scores = look.parts["affinity"]
        for term, wanted, before in look.own_preferred:
            now = self.filters.near(term.scope, look.placed)[look.at] | before
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
        scores: Scores = half[codes].take(index.cell[: index.places])
        places, counts = np.unique(look.placed, return_counts=True)
        scores[places] -= (50 * counts / counts.max()).astype(np.float32)
        return scores[look.at]

    # the best

    def _best(self, look: _Look, total: Scores, seed: int) -> int:
        best = np.flatnonzero(total == total.max())
        if len(best) == 1:
            return int(best[0])
        mixed = (self.index.tie[look.rows[best]] ^ np.uint64(seed & _WORD)) * _MIX
        return int(best[mixed.argmin()])

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
