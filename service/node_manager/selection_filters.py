# SPDX-License-Identifier: GPL-3.0-or-later
"""Leave out the nodes on which a request can't or mustn't run, and count why.

What holds for all nodes of one type, zone, site and region is judged per cell, of which there are far fewer; then single nodes.
Pure but for reading the index.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from node_manager.fleet_index import CLASSES, FleetIndex, Mask
from node_manager.geography import chord_of
from node_manager.resources import WHOLE_MILLI, Ask
from node_manager.selection_request import Constraints, Mode, Scope, SelectionRequest, Term

STALE = "stale"
DISTANCE = "distance"
AFFINITY = "affinity"
ANTI_AFFINITY = "anti_affinity"
SPREAD = "spread"
EXCLUDED = "excluded"
NOT_LISTED = "not_listed"
INSUFFICIENT = "insufficient_"
# Whose replicas, and what term of theirs.
_Repulsion = tuple[str, Term]


@dataclass
class Sieve:
    """The nodes that are left so far; each of the others is counted once, by the first reason."""

    alive: Mask
    left: int
    rejected: dict[str, int]

    def keep(self, mask: Mask, reason: str) -> None:
        """Leave only the nodes that *mask* marks."""
        # Never in place: the index keeps masks, and the first one here is such a mask.
        self.alive = self.alive & mask
        left = int(np.count_nonzero(self.alive))
        if left < self.left:
            self.rejected[reason] = self.rejected.get(reason, 0) + self.left - left
            self.left = left

    def drop(self, places: Collection[int], reason: str) -> None:
        """Leave out single places, which all differ."""
        out = [place for place in places if self.alive[place]]
        if out:
            self.alive = self.alive.copy()
            self.alive[out] = False
            self.rejected[reason] = self.rejected.get(reason, 0) + len(out)
            self.left -= len(out)


@dataclass
class Filtered(Sieve):
    """What is left for the first replica, and the rules that the others must keep to."""

    # All filters hold but room.
    eligible: Mask
    # Required terms about the replicas of the request itself.
    together: list[Term] = field(default_factory=list)
    apart: list[Term] = field(default_factory=list)


class Filters:
    """The filters over one index."""

    def __init__(self, index: FleetIndex, stale_after_seconds: float) -> None:
        self._index = index
        self._stale_after = stale_after_seconds

    def open_nodes(self, now: float) -> Mask:
        """Mark the nodes that take new work now."""
        return self._index.unblocked() & self._fresh(now)

    def apply(self, request: SelectionRequest, ask: Ask, now: float) -> Filtered:
        """Filter all nodes for the first replica of a request."""
        index = self._index
        rejected = dict(index.blocked_counts())
        unblocked = index.unblocked()
        found = Filtered(unblocked, len(index) - sum(rejected.values()), rejected, unblocked)
        repelled = self._repelled_by(request)
        self._narrow_by_cells(request, repelled, found)
        for reason, mask in self._node_masks(request.constraints, now):
            found.keep(mask, reason)
        self._leave_out(request, repelled, found)
        found.eligible = found.alive
        for name, mask in self.room(ask):
            found.keep(mask, f"{INSUFFICIENT}{name}")
        return found

    def room(self, ask: Ask) -> Iterable[tuple[str, Mask]]:
        """Mark, per resource class, the nodes with room for one replica."""
        index, places = self._index, self._index.places
        for name, amount in ask.amounts:
            yield name, index.available[CLASSES.index(name), :places] >= amount
        for name, count, share in ask.devices:
            if name not in index.devices:
                mask = np.zeros(places, bool)
            elif share == WHOLE_MILLI:
                mask = index.whole_units[name][:places] >= count
            elif count == 1:
                mask = index.largest_share[name][:places] >= share
            else:
                mask = np.count_nonzero(index.devices[name][:places] >= share, axis=1) >= count
            yield name, mask

    def slots(self, ask: Ask, most: int) -> NDArray[np.int64]:
        """Count how many replicas each node has room for, no further than *most*."""
        index, places = self._index, self._index.places
        slots = np.full(places, most, np.int64)
        for name, amount in ask.amounts:
            slots = np.minimum(slots, (index.available[CLASSES.index(name), :places] // amount).astype(np.int64))
        for name, count, share in ask.devices:
            if name not in index.devices:
                return np.zeros(places, np.int64)
            per_unit = index.devices[name][:places].astype(np.int64) // share
            fitting = per_unit.sum(axis=1) // count
            # The units of one replica differ: no unit serves more often than there are replicas.
            while count > 1:
                fewer = np.minimum(per_unit, fitting[:, None]).sum(axis=1) // count
                if (fewer >= fitting).all():
                    break
                fitting = np.minimum(fitting, fewer)
            slots = np.minimum(slots, fitting)
        return slots

    def near(self, scope: Scope, places: Iterable[int]) -> Mask:
        """Mark the nodes that share a domain with one of *places*; on a node that has none, nothing is near."""
        index = self._index
        if scope is Scope.NODE:
            return index.mask_at(places)
        return index.around_places(scope, places).take(index.cell[: index.places])

    def cells_near(self, term: Term) -> Mask:
        """Mark the cells in a zone, site or region that has the term's target."""
        index = self._index
        if term.deployment_id is not None:
            return index.around_places(term.scope, index.deployments.holders.get(term.deployment_id, ()))
        if term.deployment_labels is not None:
            return index.around(term.scope, index.cells_of_deployments(term.deployment_labels))
        return index.around_labels(term.scope, term.node_labels or {})

    def places_of(self, term: Term) -> Collection[int]:
        """Give the nodes that have the term's target."""
        index = self._index
        if term.deployment_id is not None:
            return index.deployments.holders.get(term.deployment_id, ())
        if term.deployment_labels is not None:
            return index.deployments.places_of(term.deployment_labels)
        found: list[int] = np.flatnonzero(index.mask_of_labels(term.node_labels or {})).tolist()
        return found

    def _fresh(self, now: float) -> Mask:
        fresh: Mask = self._index.last_contact[: self._index.places] >= now - self._stale_after
        return fresh

    def _narrow_by_cells(self, request: SelectionRequest, repelled: list[_Repulsion], found: Filtered) -> None:
        index, rejected = self._index, found.rejected
        per_cell, left = index.unblocked_per_cell(), found.left
        cells: Mask | None = None
        for reason, mask in self._cell_masks(request, repelled, found):
            cells = mask if cells is None else cells & mask
            still = int(per_cell.dot(cells))
            if still < left:
                rejected[reason] = rejected.get(reason, 0) + left - still
                left = still
        if cells is not None and left < found.left:
            found.alive, found.left = found.alive & cells.take(index.cell[: index.places]), left

    def _cell_masks(
        self, request: SelectionRequest, repelled: list[_Repulsion], found: Filtered
    ) -> Iterable[tuple[str, Mask]]:
        index, wanted = self._index, request.constraints
        for column, values in (
            ("node_type", wanted.node_types),
            ("region", wanted.regions),
            ("zone", wanted.zones),
            ("site", wanted.sites),
        ):
            if values:
                yield column, index.cells_of(column, values)
        if request.spread is not None and request.spread.scope is not Scope.NODE:
            # What is in no zone can't be spread over zones.
            yield SPREAD, index.cell_codes[request.spread.scope] != 0
        for term in request.affinity:
            if term.mode is Mode.REQUIRED and term.scope is not Scope.NODE:
                near = self.cells_near(term)
                if request.is_own(term) and not near.any():
                    # The first replica may go anywhere, the others must go with it.
                    found.together.append(term)
                else:
                    yield AFFINITY, near
        for term in request.anti_affinity:
            if term.mode is Mode.REQUIRED and term.scope is not Scope.NODE:
                yield ANTI_AFFINITY, ~self.cells_near(term)
                if request.is_own(term):
                    found.apart.append(term)
        for deployment_id, term in repelled:
            if term.scope is not Scope.NODE:
                holders = index.deployments.holders.get(deployment_id, ())
                yield ANTI_AFFINITY, ~index.around_places(term.scope, holders)

    def _node_masks(self, wanted: Constraints, now: float) -> Iterable[tuple[str, Mask]]:
        index = self._index
        for key, values in wanted.labels.items():
            yield f"label {key}", index.mask_of_label(key, values)
        for feature in wanted.features:
            yield f"feature {feature}", index.mask_of_feature(feature)
        if wanted.node_ids:
            yield NOT_LISTED, index.mask_at(self._known(wanted.node_ids))
        if wanted.within is not None:
            chords = index.chords(wanted.within.latitude, wanted.within.longitude)
            yield DISTANCE, chords <= chord_of(wanted.within.max_km)
        yield STALE, self._fresh(now)

    def _leave_out(self, request: SelectionRequest, repelled: list[_Repulsion], found: Filtered) -> None:
        """Take out single nodes, and for a required nearness to some node all others."""
        found.drop(self._known(request.constraints.exclude_node_ids), EXCLUDED)
        for term in request.affinity:
            if term.mode is Mode.REQUIRED and term.scope is Scope.NODE:
                places = list(self.places_of(term))
                if request.is_own(term) and not places:
                    found.together.append(term)
                else:
                    found.keep(self._index.mask_at(places), AFFINITY)
        for term in request.anti_affinity:
            if term.mode is Mode.REQUIRED and term.scope is Scope.NODE:
                found.drop(self.places_of(term), ANTI_AFFINITY)
                if request.is_own(term):
                    found.apart.append(term)
        for deployment_id, term in repelled:
            if term.scope is Scope.NODE:
                found.drop(self._index.deployments.holders.get(deployment_id, ()), ANTI_AFFINITY)

    def _known(self, node_ids: Iterable[str]) -> set[int]:
        place_of = self._index.place_of
        return {place_of[node_id] for node_id in node_ids if node_id in place_of}

    def _repelled_by(self, request: SelectionRequest) -> list[_Repulsion]:
        """Find the terms of others that keep this deployment away from their replicas."""
        others = self._index.deployments.repellers_of(request.deployment_id, request.labels)
        if not others:
            return []
        found = [(other.deployment_id, Term.model_validate(values)) for other in others for values in other.repels]
        return [(deployment_id, term) for deployment_id, term in found if request.is_own(term)]
