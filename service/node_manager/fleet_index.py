# SPDX-License-Identifier: GPL-3.0-or-later
"""The fleet in columns: one NumPy array per thing that selection compares, one place in it per node.

Nothing here is the truth: the store is. The index is kept current from the feed of changes, and what is chosen from it is
checked by the ledger. Not safe for threads by itself; whoever owns it locks.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from node_manager.domain import Resource
from node_manager.fleet_deployments import FleetDeployments
from node_manager.fleet_rows import (
    NOT_ACTIVE,
    QUARANTINED,
    UNHEALTHY,
    DeploymentRow,
    NodeRow,
    load_score,
    stability_score,
    with_books,
)
from node_manager.fragmentation import FreeSpace
from node_manager.geography import chords_from, nearness, position_of
from node_manager.resources import WHOLE_MILLI, Ask

Mask = NDArray[np.bool_]
T = TypeVar("T")
CLASSES = tuple(resource.value for resource in Resource)
CELL_COLUMNS = ("node_type", "zone", "site", "region")
# The codes of the column blocked; 0 is a node that takes work, 1 a place that no node has.
BLOCKS = ("", "", NOT_ACTIVE, QUARANTINED, UNHEALTHY)
_GONE = 1
_CODE_OF_BLOCK = {None: 0, NOT_ACTIVE: 2, QUARANTINED: 3, UNHEALTHY: 4}
# An array per entry, a byte to eight per node.
_MAX_KEPT = 256
# Longer lists of types or places hardly come again.
_FEW = 8


class FleetIndex:
    """All nodes in columns, and what was placed on them."""

    def __init__(self, places: int = 256) -> None:
        self.rows: list[NodeRow | None] = []
        self.place_of: dict[str, int] = {}
        self.deployments = FleetDeployments()
        # Counts every change of a row; touched says when each was changed.
        self.clock = 0
        self.deployments_touched: dict[str, int] = {}
        self.removed: dict[str, int] = {}
        self._static_clock = 0
        self._minute = 0.0
        self._free: list[int] = []
        # Nodes of one type, zone, site and region are a cell: what holds for one of them by its place holds for all.
        self._codes: dict[str, dict[str, int]] = {name: {} for name in CELL_COLUMNS}
        self._cells: dict[tuple[int, ...], int] = {}
        self.cell_codes = {name: np.zeros(0, np.intp) for name in CELL_COLUMNS}
        self._with_label: dict[tuple[str, str], set[int]] = {}
        self._with_feature: dict[str, set[int]] = {}
        self._with_image: dict[str, set[int]] = {}
        self._image_masks: dict[str, Mask] = {}
        self._space: FreeSpace | None = None
        self._kept: dict[tuple[Any, ...], tuple[int, Any]] = {}
        self._kept_cells: dict[tuple[Any, ...], tuple[int, Any]] = {}
        self._restores: list[tuple[float, str]] = []
        self._allocate(places)

    def __len__(self) -> int:
        """Give the number of nodes."""
        return len(self.place_of)

    @property
    def places(self) -> int:
        """Give the length of the columns, with places that no node has (any more)."""
        return len(self.rows)

    def put(self, row: NodeRow) -> int:
        """Add a node or replace what is known of it; give its place."""
        place = self.place_of.get(row.node_id)
        if place is None:
            place = self._new_place()
            self.place_of[row.node_id] = place
            digest = hashlib.blake2b(row.node_id.encode(), digest_size=8).digest()
            self.tie[place] = int.from_bytes(digest, "big")
            before = None
        else:
            before = self.rows[place]
        self.rows[place] = row
        if before is None or _static_of(before) != _static_of(row):
            self._put_static(place, before, row)
        if before is None or before.images is not row.images:
            self._put_images(place, before.images if before else (), row.images)
        if before is None or before.deployments is not row.deployments:
            self._put_deployments(place, before.deployments if before else {}, row.deployments)
        self.last_contact[place] = -math.inf if row.last_contact is None else row.last_contact
        self._put_books(place, row)
        self.stability[place] = stability_score(row, self._minute * 60)
        if row.pressed_until is not None:
            heapq.heappush(self._restores, (row.pressed_until, row.node_id))
        self._touch(place)
        return place

    def remove(self, node_id: str) -> None:
        """Forget a node; one that isn't known does no harm."""
        place = self.place_of.pop(node_id, None)
        if place is None:
            return
        before = self.rows[place]
        assert before is not None
        self._index_labels(place, before, None)
        self._put_images(place, before.images, ())
        self._put_deployments(place, before.deployments, {})
        self.rows[place] = None
        self.cell[place] = 0
        self.blocked[place] = _GONE
        self.available[:, place] = 0
        for name in self.devices:
            self._put_device(place, name, (), {})
        self._free.append(place)
        self._static_clock += 1
        self._touch(place)
        self.removed[node_id] = self.clock

    def reserve(self, place: int, ask: Ask, units: Mapping[str, Mapping[str, int]], deployment_id: str) -> NodeRow:
        """Count one replica as placed; give the row as it was, which put() brings back."""
        before = self.rows[place]
        assert before is not None
        allocated, unseen = dict(before.allocated), dict(before.unseen)
        for name, amount in ask.amounts:
            allocated[name] = allocated.get(name, 0) + amount
            unseen[name] = unseen.get(name, 0) + amount
        used = dict(before.used_units)
        for name, shares in units.items():
            used[name] = {
                **used.get(name, {}),
                **{unit: used.get(name, {}).get(unit, 0) + n for unit, n in shares.items()},
            }
        deployments = {**before.deployments, deployment_id: before.deployments.get(deployment_id, 0) + 1}
        row = with_books(before, allocated, used, unseen, deployments)
        self.rows[place] = row
        self.deployments.hold(deployment_id, place, int(self.cell[place]), 1)
        for name, _ in ask.amounts:
            self._put_taken(place, CLASSES.index(name), row.effective.get(name, 0), allocated[name])
        for name in units:
            self._put_device(place, name, row.units.get(name, ()), used[name])
        self.load[place] = load_score(row)
        self._touch(place)
        return before

    def put_deployment(self, row: DeploymentRow) -> None:
        """Know a deployment's labels and whom it repels."""
        self.deployments.put(row, self.cell)
        self._touch_deployment(row.deployment_id)

    def forget_deployment(self, deployment_id: str) -> None:
        """Forget what put_deployment() said."""
        if deployment_id in self.deployments.rows:
            self.deployments.forget(deployment_id, self.cell)
            self._touch_deployment(deployment_id)

    def row_of(self, node_id: str) -> NodeRow | None:
        """Give what is known of a node; None if it isn't."""
        place = self.place_of.get(node_id)
        return None if place is None else self.rows[place]

    def tick(self, now: float) -> None:
        """Let time pass for what depends on it: stability is counted in whole minutes."""
        minute = now // 60
        if minute != self._minute:
            self._minute = minute
            for place, row in enumerate(self.rows):
                if row is not None:
                    self.stability[place] = stability_score(row, self._minute * 60)

    def due(self, now: float) -> list[str]:
        """Name the nodes whose overcommit comes back by now; they must be read anew."""
        found = []
        while self._restores and self._restores[0][0] <= now:
            found.append(heapq.heappop(self._restores)[1])
        return [node_id for node_id in found if node_id in self.place_of]

    # masks

    def unblocked(self) -> Mask:
        """Mark the nodes that nothing but silence may keep work from."""
        return self._keep(("open",), lambda: self.blocked[: self.places] == 0)

    def unblocked_per_cell(self) -> NDArray[np.float64]:
        """Count the nodes of unblocked() in each cell; as floats, of which NumPy makes sums fastest."""
        return self._keep(("open per cell",), lambda: self.count_cells(self.unblocked()).astype(np.float64))

    def blocked_counts(self) -> dict[str, int]:
        """Count the nodes that something keeps work from, by what it is."""
        return self._keep(("blocked",), self._count_blocked)

    def cells_of(self, column: str, values: Sequence[str]) -> Mask:
        """Mark the cells whose node_type, zone, site or region is one of *values*."""
        if len(values) > _FEW:
            return self._cells_of(column, values)
        # Kept apart: lists that come only once must not push out masks of nodes, which take far longer to make.
        return self._keep((column, *values), lambda: self._cells_of(column, values), self._kept_cells)

    def cells_of_deployments(self, labels: Mapping[str, str]) -> Mask:
        """Mark the cells that have a replica of a deployment with all of *labels*."""
        if len(labels) == 1:
            return self.deployments.cells_of(next(iter(labels.items())), self.cell_count)
        mask = np.zeros(self.cell_count, bool)
        mask[self.cell[list(self.deployments.places_of(labels))]] = True
        return mask

    def around(self, scope: str, cells: Mask) -> Mask:
        """Mark the cells that share a zone, site or region with a marked one."""
        codes = self.cell_codes[scope]
        return self._inside(scope, codes.take(cells.nonzero()[0]))

    def around_places(self, scope: str, places: Iterable[int]) -> Mask:
        """Mark the cells that share a zone, site or region with one of these places."""
        cells = self.cell.take(np.fromiter(places, np.intp))
        return self._inside(scope, self.cell_codes[scope].take(cells))

    def around_labels(self, scope: str, labels: Mapping[str, str]) -> Mask:
        """Mark the cells that share a zone, site or region with a node that has all of *labels*."""
        return self._keep(
            ("around labels", scope, *sorted(labels.items())),
            lambda: self.around(scope, self.count_cells(self.mask_of_labels(labels)) > 0),
        )

    def count_cells(self, mask: Mask) -> NDArray[np.int64]:
        """Count the marked nodes in each cell."""
        return np.bincount(self.cell[: self.places][mask], minlength=self.cell_count)

    def mask_of_label(self, key: str, values: Sequence[str]) -> Mask:
        """Mark the nodes whose label *key* has one of *values*."""
        return self._keep(
            ("label", key, *values),
            lambda: self.mask_at({place for value in values for place in self._with_label.get((key, value), ())}),
        )

    def mask_of_labels(self, labels: Mapping[str, str]) -> Mask:
        """Mark the nodes that have all of *labels*."""
        mask: Mask = np.logical_and.reduce([self.mask_of_label(key, [value]) for key, value in labels.items()])
        return mask

    def mask_of_feature(self, feature: str) -> Mask:
        """Mark the nodes that have a feature."""
        return self._keep(("feature", feature), lambda: self.mask_at(self._with_feature.get(feature, ())))

    def mask_of_image(self, image: str) -> Mask:
        """Mark the nodes that have a container of an image."""
        kept = self._image_masks.get(image)
        if kept is None or len(kept) != self.places:
            if len(self._image_masks) >= _MAX_KEPT:
                self._image_masks.clear()
            kept = self._image_masks[image] = self.mask_at(self._with_image.get(image, ()))
        return kept

    def mask_at(self, places: Iterable[int]) -> Mask:
        """Mark these places."""
        mask = np.zeros(self.places, bool)
        mask[np.fromiter(places, np.intp)] = True
        return mask

    def chords(self, latitude: float, longitude: float) -> NDArray[np.float64]:
        """Give the squared straight distance of each node from a point, on the unit sphere; not a number where unknown."""
        return self._keep(
            ("chords", latitude, longitude), lambda: chords_from(latitude, longitude, self.position[:, : self.places])
        )

    def nearness(self, latitude: float, longitude: float) -> NDArray[np.float32]:
        """Score how near each node is to a point: 100 there, half of it at 500 km, 0 where a node's place is unknown."""
        return self._keep(("nearness", latitude, longitude), lambda: nearness(self.chords(latitude, longitude)))

    def domains(self, scope: str) -> NDArray[np.intp]:
        """Give the code of each node's zone, site or region, 0 where it has none; for nodes, each its own."""
        if scope == "node":
            return np.arange(1, self.places + 1)
        return self.cell_codes[scope].take(self.cell[: self.places])

    @property
    def cell_count(self) -> int:
        """Give the number of cells."""
        return len(self._cells)

    def space(self) -> FreeSpace:
        """Give the columns that packing is judged by; the same object as long as they are the same columns."""
        if self._space is None:
            places = self.places
            self._space = FreeSpace(
                amounts={name: self.available[number, :places] for number, name in enumerate(CLASSES)},
                totals={name: self.total[number, :places] for number, name in enumerate(CLASSES)},
                devices={name: free[:places] for name, free in self.devices.items()},
                device_counts={name: counts[:places] for name, counts in self.device_counts.items()},
                version=self.touched[:places],
            )
        return self._space

    def _cells_of(self, column: str, values: Sequence[str]) -> Mask:
        known = self._codes[column]
        # Filled item by item, a bytearray takes half the time of an array.
        inside = bytearray(len(known) + 1)
        for value in values:
            inside[known.get(value, 0)] = True
        inside[0] = False
        return np.frombuffer(inside, bool).take(self.cell_codes[column])

    def _inside(self, column: str, codes: NDArray[np.intp]) -> Mask:
        """Mark the cells that have one of these codes; code 0 is no place, so nothing is inside it."""
        inside = np.zeros(len(self._codes[column]) + 1, bool)
        inside[codes] = True
        inside[0] = False
        return inside.take(self.cell_codes[column])

    def _allocate(self, places: int) -> None:
        self.blocked = np.full(places, _GONE, np.uint8)
        self.last_contact = np.full(places, -math.inf)
        self.cell = np.zeros(places, np.intp)
        self.position = np.full((3, places), math.nan)
        self.available = np.zeros((len(CLASSES), places))
        self.total = np.zeros((len(CLASSES), places))
        self.share = np.zeros((len(CLASSES), places), np.float32)
        self.inverse = np.zeros((len(CLASSES), places), np.float32)
        self.load = np.zeros(places, np.float32)
        self.stability = np.zeros(places, np.float32)
        self.tie = np.zeros(places, np.uint64)
        self.touched = np.zeros(places, np.int64)
        self.devices: dict[str, NDArray[np.int16]] = {}
        self.device_counts: dict[str, NDArray[np.int16]] = {}
        # Of each device class: units that nobody uses, the most that is free of one unit, the share in use of all.
        self.whole_units: dict[str, NDArray[np.int16]] = {}
        self.largest_share: dict[str, NDArray[np.int16]] = {}
        self.device_share: dict[str, NDArray[np.float32]] = {}

    def _grow(self) -> None:
        more = max(256, self.blocked.shape[0])
        for name in ("blocked", "last_contact", "cell", "load", "stability", "tie", "touched"):
            column = getattr(self, name)
            fill = {"blocked": _GONE, "last_contact": -math.inf}.get(name, 0)
            setattr(self, name, np.concatenate([column, np.full(more, fill, column.dtype)]))
        for name in ("position", "available", "total", "share", "inverse"):
            column = getattr(self, name)
            fill = math.nan if name == "position" else 0
            setattr(self, name, np.concatenate([column, np.full((column.shape[0], more), fill, column.dtype)], axis=1))
        several: tuple[dict[str, NDArray[Any]], ...] = (
            self.device_counts,
            self.whole_units,
            self.largest_share,
            self.device_share,
        )
        for columns in several:
            for name, column in columns.items():
                columns[name] = np.concatenate([column, np.zeros(more, column.dtype)])
        for name, free in self.devices.items():
            self.devices[name] = np.concatenate([free, np.zeros((more, free.shape[1]), np.int16)])

    def _new_place(self) -> int:
        if self._free:
            return self._free.pop()
        if len(self.rows) == self.blocked.shape[0]:
            self._grow()
        self.rows.append(None)
        # Masks are as long as the columns.
        self._static_clock += 1
        self._space = None
        return len(self.rows) - 1

    def _put_static(self, place: int, before: NodeRow | None, row: NodeRow) -> None:
        self._static_clock += 1
        self.blocked[place] = _CODE_OF_BLOCK[row.blocked]
        codes = tuple(
            0 if value is None else known.setdefault(value, len(known) + 1)
            for known, value in zip(self._codes.values(), (row.node_type, row.zone, row.site, row.region), strict=True)
        )
        cell = self._cell_of(codes)
        self.deployments.move(before.deployments if before else (), place, int(self.cell[place]), cell)
        self.cell[place] = cell
        self.position[:, place] = position_of(row.latitude, row.longitude)
        self._index_labels(place, before, row)

    def _index_labels(self, place: int, before: NodeRow | None, row: NodeRow | None) -> None:
        _move(self._with_label, place, before.labels.items() if before else (), row.labels.items() if row else ())
        _move(self._with_feature, place, before.features if before else (), row.features if row else ())

    def _put_images(self, place: int, before: Sequence[str], after: Sequence[str]) -> None:
        for image in set(before) ^ set(after):
            self._image_masks.pop(image, None)
        _move(self._with_image, place, before, after)

    def _cell_of(self, codes: tuple[int, ...]) -> int:
        cell = self._cells.get(codes)
        if cell is None:
            cell = self._cells[codes] = len(self._cells)
            for name, code in zip(CELL_COLUMNS, codes, strict=True):
                self.cell_codes[name] = np.append(self.cell_codes[name], np.intp(code))
        return cell

    def _put_deployments(self, place: int, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        for name in {*before, *after}:
            self.deployments.hold(name, place, int(self.cell[place]), after.get(name, 0) - before.get(name, 0))

    def _put_books(self, place: int, row: NodeRow) -> None:
        for number, name in enumerate(CLASSES):
            self._put_amount(place, number, row.effective.get(name, 0), row.allocated.get(name, 0))
        for name, units in row.units.items():
            self._put_device(place, name, units, row.used_units.get(name, {}))
        for name in self.devices:
            if name not in row.units:
                self._put_device(place, name, (), {})
        self.load[place] = load_score(row)

    def _put_amount(self, place: int, number: int, total: int, taken: int) -> None:
        self.total[number, place] = total
        self.inverse[number, place] = 1 / total if total else 0
        self._put_taken(place, number, total, taken)

    def _put_taken(self, place: int, number: int, total: int, taken: int) -> None:
        self.available[number, place] = max(0, total - taken)
        self.share[number, place] = min(1.0, taken / total) if total else 1

    def _put_device(self, place: int, name: str, units: Sequence[str], used: Mapping[str, int]) -> None:
        free = self._device_column(name, len(units))
        left = [max(0, WHOLE_MILLI - used.get(unit, 0)) for unit in units]
        free[place] = 0
        free[place, : len(units)] = left
        self.device_counts[name][place] = len(units)
        self.whole_units[name][place] = left.count(WHOLE_MILLI)
        self.largest_share[name][place] = max(left, default=0)
        self.device_share[name][place] = 1 - sum(left) / (WHOLE_MILLI * len(units)) if units else 1

    def _device_column(self, name: str, units: int) -> NDArray[np.int16]:
        free, places = self.devices.get(name), self.blocked.shape[0]
        if free is not None and free.shape[1] >= units:
            return free
        self._space = None
        if free is None:
            for columns in (self.device_counts, self.whole_units, self.largest_share):
                columns[name] = np.zeros(places, np.int16)
            self.device_share[name] = np.ones(places, np.float32)
            free = np.zeros((places, max(1, units)), np.int16)
        else:
            free = np.concatenate([free, np.zeros((places, units - free.shape[1]), np.int16)], axis=1)
        self.devices[name] = free
        return free

    def _touch(self, place: int) -> None:
        self.clock += 1
        self.touched[place] = self.clock

    def _touch_deployment(self, deployment_id: str) -> None:
        self.clock += 1
        self.deployments_touched[deployment_id] = self.clock

    def _count_blocked(self) -> dict[str, int]:
        counts = np.bincount(self.blocked[: self.places], minlength=len(BLOCKS))
        return {name: int(counts[code]) for code, name in enumerate(BLOCKS) if name and counts[code]}

    def _keep(
        self, key: tuple[Any, ...], make: Callable[[], T], store: dict[tuple[Any, ...], tuple[int, Any]] | None = None
    ) -> T:
        """Make something that depends on what rarely changes, and keep it as long as that stands."""
        store = self._kept if store is None else store
        kept = store.get(key)
        if kept is not None and kept[0] == self._static_clock:
            found: T = kept[1]
            return found
        made = make()
        store.pop(key, None)
        if len(store) >= _MAX_KEPT:
            del store[next(iter(store))]
        store[key] = (self._static_clock, made)
        return made


def _static_of(row: NodeRow) -> tuple[Any, ...]:
    return (
        row.blocked, row.node_type, row.region, row.zone, row.site, row.latitude, row.longitude, row.labels, row.features,
    )  # fmt: skip


def _move(index: dict[Any, set[int]], place: int, before: Iterable[Any], after: Iterable[Any]) -> None:
    old, new = set(before), set(after)
    for key in old - new:
        index[key].discard(place)
        if not index[key]:
            del index[key]
    for key in new - old:
        index.setdefault(key, set()).add(place)
