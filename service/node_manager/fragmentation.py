# SPDX-License-Identifier: GPL-3.0-or-later
"""What a placement leaves behind: how far the requests seen so far could still use a node after it.

A node is worth the sum, over the mix of requests seen and over the resources each asks for, of ``sqrt(n * free)``: n is how
often that request still fits on the node (in fractions, 0 below one), free what the node has left of the resource, in mean
requests. A placement costs what the node loses of its worth; as the root is concave, the last place of a request is dearer
than the first of many. That a fragment is what the *expected* requests can't use is from "Beware of Fragmentation" (USENIX
ATC 2023); there a request that fits once can use all that is free, which leaves devices without processors beside them.

Pure: numbers in, numbers out. A row's cost depends on that row and the mix alone, bit for bit: all is done element
by element, except one matrix product whose terms are whole numbers and whose sums stay below 2**53, so that it is exact in
any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node_manager.resources import Ask

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Units = NDArray[np.int16]

WHOLE = 1000
KEPT_SHAPES = 128
USED_SHAPES = 64
# Halved there: a mix that changed is forgotten after some thousand requests.
MOST_SEEN = 4096
# A fleet without devices is judged by its amounts alone; beside devices they only part what devices leave equal. Any weight
# up to 1/30 packs within 0.5 % of the devices of any other, on six mixes.
AMOUNT_WEIGHT = 1 / 64
# Among units whose loss is the same, the fuller one, as a square grows ever faster; far below any true difference.
TIE_WEIGHT = 1e-12
# Rows worked on at once: a block of classes x rows stays in a processor's cache.
BLOCK_ROWS = 256
# Roots are rounded to 2**-20. They reach 2**12 and weights sum up to 2**12, so that sums of steps stay below 2**53. A
# replica is so many steps squared: the root then comes out in steps.
REPLICA = 2.0**40
MOST_REPLICAS = REPLICA * 2.0**24
NEVER = np.iinfo(np.int64).min


@dataclass
class FreeSpace:
    """View the columns of the fleet index: a row is a node; who changes a row makes its version grow.

    What is kept of rows is kept for one *version* array: another one stands for another fleet.
    Shapes: *amounts* and *totals* class -> (nodes,), *devices* class -> (nodes, units) free thousandths,
    *device_counts* class -> (nodes,) units there are.
    """

    amounts: dict[str, Floats]
    totals: dict[str, Floats]
    devices: dict[str, Units]
    device_counts: dict[str, Units]
    version: Rows


class RequestMix:
    """Count the shapes asked for, the recent ones more, in bounded room.

    Costs are judged by *classes*, which stand still between refreshes (each time as many requests again were seen), so
    that costs can be kept; *generation* counts the refreshes.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._classes: tuple[tuple[Ask, int], ...] = ()
        # What classes are to be made of: most refreshes pass before anything is packed, and ranking takes its time.
        self._unranked: dict[Ask, int] | None = None
        self._counts: dict[Ask, int] = {}
        self._seen = 0
        self._waiting = 0

    @property
    def classes(self) -> tuple[tuple[Ask, int], ...]:
        """Give the most frequent shapes and how often they were seen, by the last refresh."""
        if self._unranked is not None:
            ranked = sorted(self._unranked.items(), key=lambda item: (-item[1], item[0]))
            self._classes, self._unranked = tuple(ranked[:USED_SHAPES]), None
        return self._classes

    def observe(self, shape: Ask) -> None:
        """Count one request."""
        count = self._counts.get(shape, 0)
        if not count and len(self._counts) >= KEPT_SHAPES:
            self._seen -= self._counts.pop(self._rarest())
        self._counts[shape] = count + 1
        self._seen += 1
        self._waiting += 1
        if self._seen >= MOST_SEEN:
            self._counts = {known: count // 2 for known, count in self._counts.items() if count > 1}
            self._seen = sum(self._counts.values())
        if 2 * self._waiting >= self._seen:
            self._refresh()

    def copy(self) -> RequestMix:
        """Give a mix that goes on by itself from here."""
        mix = RequestMix()
        mix._classes, mix.generation = self.classes, self.generation
        mix._counts, mix._seen, mix._waiting = dict(self._counts), self._seen, self._waiting
        return mix

    def as_data(self) -> dict[str, Any]:
        """Give all that later costs depend on as JSON values."""
        counts, classes = _as_lists(self._counts.items()), _as_lists(self.classes)
        return {"counts": counts, "classes": classes, "waiting": self._waiting, "generation": self.generation}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> RequestMix:
        """Take up a mix where `as_data` left it."""
        mix = cls()
        mix._counts = dict(_from_lists(data["counts"]))
        mix._classes = tuple(_from_lists(data["classes"]))
        mix._seen = sum(mix._counts.values())
        mix._waiting = data["waiting"]
        mix.generation = data["generation"]
        return mix

    def _rarest(self) -> Ask:
        """Name the first of the rarest, which is the oldest: a dict keeps the order of arrival."""
        # Nothing is rarer than once, and a full mix mostly has such a shape near its start.
        once = next((shape for shape, count in self._counts.items() if count == 1), None)
        return once if once is not None else min(self._counts.items(), key=itemgetter(1))[0]

    def _refresh(self) -> None:
        self._unranked = dict(self._counts)
        self.generation += 1
        self._waiting = 0


class Fragmentation:
    """Judge placements by a mix; costs are kept by shape and row until the row's version or the mix's generation changes."""

    def __init__(self, mix: RequestMix) -> None:
        self._mix = mix
        self._generation = -1
        self._version: Rows = np.zeros(0, dtype=np.int64)
        self._yardstick = _Yardstick(())
        # The last asked for stands last.
        self._costs: dict[Ask, tuple[Floats, Rows]] = {}
        self._usable = np.zeros((0, 0))
        self._worth = np.zeros(0)
        self._stamp = self._version

    def growth(self, shape: Ask, space: FreeSpace, rows: Rows) -> Floats:
        """Tell what one replica costs on each of *rows*, which all have room for it; the smallest is best."""
        if not self._mix.classes:
            return _left_over(shape, space, rows)
        self._follow(space)
        fresh = (np.zeros(len(space.version)), np.full(len(space.version), NEVER))
        costs, stamp = self._costs[shape] = self._costs.pop(shape, fresh)
        if len(self._costs) > KEPT_SHAPES:
            del self._costs[next(iter(self._costs))]
        stale = rows[stamp[rows] != space.version[rows]]
        for start in range(0, len(stale), BLOCK_ROWS):
            block = stale[start : start + BLOCK_ROWS]
            costs[block] = self._cost(shape, space, block)
            stamp[block] = space.version[block]
        return costs[rows]

    def choose_units(self, shape: Ask, space: FreeSpace, row: int) -> dict[str, tuple[int, ...]]:
        """Name the units, by position, that one replica should take on a row with room for it."""
        self._follow(space)
        return {
            device: tuple(self._positions(device, count, share, space.devices[device][row : row + 1])[0].tolist())
            for device, count, share in shape.devices
        }

    def _follow(self, space: FreeSpace) -> None:
        """Forget what was judged by another mix or on another fleet."""
        if self._generation != self._mix.generation:
            self._yardstick = _Yardstick(self._mix.classes)
        elif self._version is space.version:
            return
        self._generation, self._version = self._mix.generation, space.version
        self._costs.clear()
        self._usable = np.zeros((len(self._yardstick.needs), len(space.version)))
        self._worth = np.zeros(len(space.version))
        self._stamp = np.full(len(space.version), NEVER)

    def _cost(self, shape: Ask, space: FreeSpace, rows: Rows) -> Floats:
        self._weigh(space, rows[self._stamp[rows] != space.version[rows]])
        asked = dict(shape.amounts)
        amounts = [_column(space, name, rows) - asked.get(name, 0) for name in self._yardstick.names]
        usable = self._usable[:, rows]
        for device, count, share in shape.devices:
            if device in self._yardstick.usable:
                units = space.devices[device][rows]
                chosen = np.take_along_axis(units, self._positions(device, count, share, units), axis=1)
                table = self._yardstick.usable[device]
                for free in chosen.T:
                    usable += table[:, free - share] - table[:, free]
        return self._worth[rows] - self._yardstick.worth(amounts, usable)

    def _weigh(self, space: FreeSpace, rows: Rows) -> None:
        """Renew what rows that changed are worth as they are."""
        if not len(rows):
            return
        usable = np.zeros((len(self._yardstick.needs), len(rows)))
        for device in self._yardstick.usable.keys() & space.devices.keys():
            for free in space.devices[device][rows].T:
                usable += self._yardstick.usable[device][:, free]
        self._usable[:, rows] = usable
        self._worth[rows] = self._yardstick.worth(
            [_column(space, name, rows) for name in self._yardstick.names], usable
        )
        self._stamp[rows] = space.version[rows]

    def _positions(self, device: str, count: int, share: int, units: Units) -> NDArray[np.intp]:
        loss = self._yardstick.unit_loss(device, share)[units]
        order: NDArray[np.intp] = loss.argsort(axis=1, kind="stable")
        return order[:, :count]


class _Yardstick:
    """The classes of a mix as matrices: a line for each class, a column for each row of the fleet.

    A *need* is a device class and a share: units with less free than the share are of no use to it, the others wholly.
    """

    def __init__(self, classes: Sequence[tuple[Ask, int]]) -> None:
        shapes = [shape for shape, _ in classes]
        counts = [count for _, count in classes]
        seen = sum(counts)
        self.names = sorted({name for shape in shapes for name, amount in shape.amounts if amount > 0})
        devices = sorted({name for shape in shapes for name, _, _ in shape.devices})
        uses = [(line, *use) for line, shape in enumerate(shapes) for use in shape.devices]
        # The need of share 1 is all that is free.
        self.needs = sorted({(name, 1) for name in devices} | {(name, share) for _, name, _, share in uses})
        free = np.arange(WHOLE + 1)
        self.usable = {
            device: np.array([free * (free >= share) * float(name == device) for name, share in self.needs])
            for device in devices
        }
        # By device class, what a unit with so much free is worth to the classes that take units of it.
        self._roots = {device: np.zeros(WHOLE + 1) for device in devices}
        for line, name, _, share in uses:
            self._roots[name] += counts[line] * np.sqrt(free * (free >= share) / share)
        self._losses: dict[tuple[str, int], Floats] = {}
        asked = [_asked(shape) for shape in shapes]
        needed = {(line, name): self.needs.index((name, share)) for line, name, _, share in uses}
        self._all_free = [self.needs.index((name, 1)) for name in devices]
        # For each resource: the classes that ask for it, how much, and of which need; and what its roots count.
        self._limits: list[tuple[NDArray[np.intp], Floats, NDArray[np.intp]]] = []
        self._scales: list[float] = []
        self._weights = np.zeros((len(self.names) + len(devices), len(shapes)))
        for number, name in enumerate((*self.names, *devices)):
            lines = [line for line, amounts in enumerate(asked) if amounts.get(name, 0) > 0]
            sizes = np.array([[asked[line][name] / REPLICA] for line in lines])
            self._limits.append((np.array(lines), sizes, np.array([needed.get((line, name), 0) for line in lines])))
            self._weights[number, lines] = [counts[line] for line in lines]
            mean = sum(asked[line][name] * counts[line] for line in lines) / seen
            self._scales.append((AMOUNT_WEIGHT if name in self.names else 1.0) / math.sqrt(REPLICA * mean) / seen)

    def worth(self, amounts: Sequence[Floats], usable: Floats) -> Floats:
        """Weigh nodes with these amounts free, and with this much of their units of use for each need."""
        replicas = np.full((self._weights.shape[1], usable.shape[1]), MOST_REPLICAS, dtype=np.float64)
        for number, (lines, sizes, needs) in enumerate(self._limits):
            fits = (amounts[number] if number < len(amounts) else usable[needs]) / sizes
            if len(lines) == len(replicas):
                np.minimum(replicas, fits, out=replicas)
            else:
                replicas[lines] = np.minimum(replicas[lines], fits)
        replicas *= replicas >= REPLICA
        np.sqrt(replicas, out=replicas)
        np.rint(replicas, out=replicas)
        worth = np.zeros(usable.shape[1])
        frees, sums = [*amounts, *usable[self._all_free]], self._weights @ replicas
        for free, scale, roots in zip(frees, self._scales, sums, strict=True):
            np.add(worth, np.sqrt(free) * scale * roots, out=worth)
        return worth

    def unit_loss(self, device: str, share: int) -> Floats:
        """Tell, by what a unit has free, what taking a share of it loses; infinite without room."""
        if (device, share) not in self._losses:
            roots = self._roots.get(device, np.zeros(WHOLE + 1)) + TIE_WEIGHT * np.arange(WHOLE + 1.0) ** 2
            self._losses[device, share] = np.append(np.full(share, np.inf), roots[share:] - roots[: WHOLE + 1 - share])
        return self._losses[device, share]


def _left_over(shape: Ask, space: FreeSpace, rows: Rows) -> Floats:
    """Sum what would be left of every resource, as parts of the node's own: best fit, while nothing is known."""
    asked = _asked(shape)
    left = np.zeros(len(rows))
    for name in sorted(space.amounts):
        left += (space.amounts[name][rows] - asked.get(name, 0)) / np.maximum(space.totals[name][rows], 1)
    for name in sorted(space.devices):
        free = space.devices[name][rows].sum(axis=1, dtype=np.int64) - asked.get(name, 0)
        left += free / (np.maximum(space.device_counts[name][rows], 1) * float(WHOLE))
    return left


def _asked(shape: Ask) -> dict[str, int]:
    return dict(shape.amounts) | {device: count * share for device, count, share in shape.devices}


def _column(space: FreeSpace, name: str, rows: Rows) -> Floats:
    return space.amounts[name][rows] if name in space.amounts else np.zeros(len(rows))


def _as_lists(counted: Iterable[tuple[Ask, int]]) -> list[Any]:
    return [[[*map(list, shape.amounts)], [*map(list, shape.devices)], count] for shape, count in counted]


def _from_lists(data: list[Any]) -> Iterator[tuple[Ask, int]]:
    for amounts, devices, count in data:
        yield Ask(tuple(map(tuple, amounts)), tuple(map(tuple, devices))), count
