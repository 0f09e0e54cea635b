# SPDX-License-Identifier: GPL-3.0-or-later
"""Where the replicas of deployments are, by deployment and by label, in places and cells of the fleet index.

A part of the index; knows places and cells as numbers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node_manager.fleet_rows import DeploymentRow

_ROOM = 64


class FleetDeployments:
    """The replicas of all deployments."""

    def __init__(self) -> None:
        self.rows: dict[str, DeploymentRow] = {}
        # Where each deployment has how many replicas, by place.
        self.holders: dict[str, dict[int, int]] = {}
        self._labelled: dict[tuple[str, str], set[str]] = {}
        # How many replicas of deployments with a label are in each cell.
        self._label_cells: dict[tuple[str, str], NDArray[np.int64]] = {}
        self._repelling: dict[str, set[str]] = {}

    def put(self, row: DeploymentRow, cell_of: NDArray[np.intp]) -> None:
        """Know a deployment's labels and whom it repels."""
        self.forget(row.deployment_id, cell_of)
        self.rows[row.deployment_id] = row
        for pair in row.labels.items():
            self._labelled.setdefault(pair, set()).add(row.deployment_id)
            for place, count in self.holders.get(row.deployment_id, {}).items():
                self._count(pair, int(cell_of[place]), count)
        for term in row.repels:
            for key in _keys_of_target(term):
                self._repelling.setdefault(key, set()).add(row.deployment_id)

    def forget(self, deployment_id: str, cell_of: NDArray[np.intp]) -> None:
        """Forget what put() said; where the replicas are stays known."""
        row = self.rows.pop(deployment_id, None)
        if row is None:
            return
        for pair in row.labels.items():
            self._labelled[pair].discard(deployment_id)
            for place, count in self.holders.get(deployment_id, {}).items():
                self._count(pair, int(cell_of[place]), -count)
        for term in row.repels:
            for key in _keys_of_target(term):
                self._repelling[key].discard(deployment_id)

    def hold(self, deployment_id: str, place: int, cell: int, change: int) -> None:
        """Count more or fewer replicas at a place."""
        if not change:
            return
        holders = self.holders.setdefault(deployment_id, {})
        holders[place] = holders.get(place, 0) + change
        if not holders[place]:
            del holders[place]
        if not holders:
            del self.holders[deployment_id]
        row = self.rows.get(deployment_id)
        for pair in row.labels.items() if row is not None else ():
            self._count(pair, cell, change)

    def move(self, deployment_ids: Iterable[str], place: int, before: int, after: int) -> None:
        """Count the replicas at a place in another cell."""
        for name in deployment_ids:
            count = self.holders.get(name, {}).get(place, 0)
            row = self.rows.get(name)
            for pair in row.labels.items() if row is not None and count else ():
                self._count(pair, before, -count)
                self._count(pair, after, count)

    def labelled(self, labels: Mapping[str, str]) -> set[str]:
        """Name the deployments that have all of *labels*."""
        found = [self._labelled.get(pair, set()) for pair in labels.items()]
        return set.intersection(*found) if found else set()

    def places_of(self, labels: Mapping[str, str]) -> set[int]:
        """Give the places with a replica of a deployment that has all of *labels*."""
        return {place for name in self.labelled(labels) for place in self.holders.get(name, ())}

    def cells_of(self, pair: tuple[str, str], cells: int) -> NDArray[np.bool_]:
        """Mark the cells with a replica of a deployment that has one label."""
        counts = self._label_cells.get(pair)
        if counts is None:
            return np.zeros(cells, bool)
        mask = counts[:cells] > 0
        return mask if len(mask) == cells else np.append(mask, np.zeros(cells - len(mask), bool))

    def repellers_of(self, deployment_id: str, labels: Mapping[str, str]) -> list[DeploymentRow]:
        """Find the deployments that may keep this one at a distance, in a fixed order."""
        if not self._repelling:
            return []
        found = set(self._repelling.get(f"id:{deployment_id}", ()))
        for key, value in labels.items():
            found.update(self._repelling.get(f"label:{key}={value}", ()))
        return [self.rows[name] for name in sorted(found) if name != deployment_id]

    def _count(self, pair: tuple[str, str], cell: int, change: int) -> None:
        counts = self._label_cells.get(pair)
        if counts is None or len(counts) <= cell:
            more = np.zeros(cell + _ROOM, np.int64)
            if counts is not None:
                more[: len(counts)] = counts
            counts = self._label_cells[pair] = more
        counts[cell] += change


def _keys_of_target(term: Mapping[str, Any]) -> list[str]:
    """Name what a term's target can be found by: an id, or one of the labels (the rest is compared later)."""
    if term.get("deployment_id"):
        return [f"id:{term['deployment_id']}"]
    return [f"label:{key}={value}" for key, value in sorted((term.get("deployment_labels") or {}).items())[:1]]
