# SPDX-License-Identifier: GPL-3.0-or-later
"""Find what would make a request fit that doesn't: the smallest changes first, each tried out before it is offered.

Works on the index through the selector and leaves it as it was. A change of the request is a JSON Merge Patch (RFC 7396), so that
it can be applied as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from node_manager.domain import Health
from node_manager.fleet_index import CLASSES
from node_manager.fleet_rows import NodeRow
from node_manager.geography import kilometres_of
from node_manager.node_selector import NodeSelector, Selection
from node_manager.resources import WHOLE_MILLI, as_data
from node_manager.selection_filters import STALE
from node_manager.selection_request import Mode, SelectionRequest

_MAX_TRIES = 40
_MAX_OFFERED = 6
_MAX_NEW_NODES = 50
# Leaving a rule out weighs as much as doing without all of a resource.
_WHOLE = 1.0


@dataclass(frozen=True)
class _Idea:
    """A patch of the request, how large a change it is (0 to 1, more for several), and what it is in words."""

    patch: dict[str, Any]
    size: float
    text: str
    # The item of a list that the patch is about; a merge patch replaces lists as a whole.
    item: tuple[str, int] | None = None


def merge_patch(document: Any, patch: Any) -> Any:
    """Apply a JSON Merge Patch (RFC 7396); neither argument is changed."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def advise(selector: NodeSelector, request: SelectionRequest, now: float, failed: Selection) -> list[dict[str, Any]]:
    """Give changes that make *request* fit, the smallest first: of the request, of nodes that are out, of the fleet."""
    return _Adviser(selector, request, now, failed).advise()


class _Adviser:
    def __init__(self, selector: NodeSelector, request: SelectionRequest, now: float, failed: Selection) -> None:
        self._selector = selector
        self._request = request
        self._now = now
        self._placed = failed.placed
        self._tries = 0

    def advise(self) -> list[dict[str, Any]]:
        ideas = [idea for idea in self._single_ideas() if self._fits(idea.patch)]
        if not ideas:
            ideas = list(self._combined())
        ideas.sort(key=lambda idea: (idea.size, idea.text))
        offered: list[dict[str, Any]] = [
            {"kind": "request", "text": idea.text, "patch": idea.patch} for idea in ideas[:_MAX_OFFERED]
        ]
        return [*offered, *self._open_up(), *self._add_nodes()]

    # changes of the request

    def _single_ideas(self) -> Iterator[_Idea]:
        request = self._request
        most = self._most_replicas()
        if 0 < most < request.replicas:
            yield _Idea(
                {"replicas": most}, 1 - most / request.replicas, f"ask for {most} replica{'s' if most > 1 else ''}"
            )
        yield from self._smaller_amounts()
        yield from self._farther()
        yield from self._without_rules()
        if request.spread is not None:
            yield from self._more_skew()

    def _most_replicas(self) -> int:
        slots = self._selector.slots(self._request, self._now)
        most = self._placed
        for term in self._request.affinity:
            if term.mode is Mode.REQUIRED and self._request.is_own(term) and len(slots):
                codes = self._selector.index.domains(term.scope)
                most = max(most, int(np.bincount(codes, weights=slots)[1:].max(initial=0)))
        return min(most, self._request.replicas - 1)

    def _smaller_amounts(self) -> Iterator[_Idea]:
        """Find for each resource class the largest amount with which all replicas find room, the others as they are."""
        request, index, replicas = self._request, self._selector.index, self._request.replicas
        ask = request.ask
        for name, amount in ask.amounts:
            others = {key: value for key, value in as_data(ask).items() if key != name} or {name: 1}
            slots = self._selector.slots(self._patched({"resources": {name: None} | others}), self._now)
            available = index.available[CLASSES.index(name), : index.places]
            low, high = 0, amount - 1
            while low < high:
                middle = (low + high + 1) // 2
                if np.minimum(slots, available // middle).sum() >= replicas:
                    low = middle
                else:
                    high = middle - 1
            if low > 0:
                yield _Idea({"resources": {name: low}}, 1 - low / amount, f"ask for {low} {name} instead of {amount}")
        for name, count, share in ask.devices:
            for fewer in range(count - 1, 0, -1):
                wanted: Any = fewer if share == WHOLE_MILLI else {"count": fewer, "share_milli": share}
                if self._fits({"resources": {name: wanted}}):
                    yield _Idea(
                        {"resources": {name: wanted}}, 1 - fewer / count, f"ask for {fewer} {name} instead of {count}"
                    )
                    break
            free = index.largest_share.get(name)
            most = int(free[: index.places].max(initial=0)) if free is not None else 0
            if 0 < most < share and count == 1:
                yield _Idea(
                    {"resources": {name: {"count": 1, "share_milli": most}}},
                    1 - most / share,
                    f"ask for {most} thousandths of a {name} instead of {share}",
                )
            others = {key: value for key, value in as_data(ask).items() if key != name}
            if others:
                yield _Idea({"resources": {name: None}}, _WHOLE, f"do without {name}")

    def _farther(self) -> Iterator[_Idea]:
        within = self._request.constraints.within
        if within is None:
            return
        selector, index = self._selector, self._selector.index
        slots = selector.slots(self._patched({"constraints": {"within": None}}), self._now)
        chords = index.chords(within.latitude, within.longitude)
        # Nodes of unknown place are at no distance.
        usable = np.flatnonzero((slots > 0) & ~np.isnan(chords))
        nearest = usable[np.lexsort((index.tie[usable], chords[usable]))]
        enough = np.flatnonzero(np.cumsum(slots[nearest]) >= self._request.replicas)
        if len(enough):
            kilometres = math.ceil(kilometres_of(float(chords[nearest[enough[0]]])) * 10 + 1) / 10
            if kilometres > within.max_km:
                yield _Idea(
                    {"constraints": {"within": {"max_km": kilometres}}},
                    1 - within.max_km / kilometres,
                    f"allow {kilometres} km instead of {within.max_km:g}",
                )

    def _without_rules(self) -> Iterator[_Idea]:
        """Leave out or soften one rule at a time."""
        wanted = self._request.constraints
        for name in ("node_types", "regions", "zones", "sites", "node_ids", "exclude_node_ids", "within"):
            if getattr(wanted, name):
                yield _Idea({"constraints": {name: None}}, _WHOLE, f"leave out constraints.{name}")
        for key in wanted.labels:
            yield _Idea({"constraints": {"labels": {key: None}}}, _WHOLE, f"leave out the label {key}")
        for number, feature in enumerate(wanted.features):
            patch = self._without_items("features", {number})
            yield _Idea(patch, _WHOLE, f"leave out the feature {feature}", ("features", number))
        for name in ("affinity", "anti_affinity"):
            for number, term in enumerate(getattr(self._request, name)):
                if term.mode is Mode.REQUIRED:
                    patch = self._without_items(name, {number})
                    yield _Idea(patch, _WHOLE, f"make {name}[{number}] preferred", (name, number))
        if self._request.spread is not None:
            yield _Idea({"spread": None}, _WHOLE, "leave out spread")

    def _without_items(self, name: str, numbers: set[int]) -> dict[str, Any]:
        """Leave out some of the features, or make some of the terms preferred."""
        if name == "features":
            features = self._request.constraints.features
            return {
                "constraints": {"features": [each for number, each in enumerate(features) if number not in numbers]}
            }
        return {
            name: [
                term.model_dump(mode="json", exclude_none=True) | ({"mode": "preferred"} if number in numbers else {})
                for number, term in enumerate(getattr(self._request, name))
            ]
        }

    def _more_skew(self) -> Iterator[_Idea]:
        spread, replicas = self._request.spread, self._request.replicas
        assert spread is not None
        low, high = spread.max_skew + 1, min(replicas, 1000)
        if low > high or not self._fits({"spread": {"max_skew": high}}):
            return
        while low < high:
            middle = (low + high) // 2
            if self._fits({"spread": {"max_skew": middle}}):
                high = middle
            else:
                low = middle + 1
        yield _Idea(
            {"spread": {"max_skew": low}}, 1 - spread.max_skew / low, f"allow a skew of {low} over {spread.scope}s"
        )

    def _combined(self) -> Iterator[_Idea]:
        """Where no single change suffices: change all, then take back one after the other what isn't needed."""
        # The single changes may have used up their tries.
        self._tries = 0
        ideas = [*self._without_rules()]
        smallest = self._smallest_ask(ideas)
        if smallest is not None:
            ideas.append(smallest)
        if self._request.replicas > 1:
            ideas.append(_Idea({"replicas": 1}, 1 - 1 / self._request.replicas, "ask for 1 replica"))
        if not ideas or not self._fits(self._patch_of(ideas)):
            return
        for idea in sorted(ideas, key=lambda idea: -idea.size):
            rest = [other for other in ideas if other is not idea]
            if rest and self._fits(self._patch_of(rest)):
                ideas = rest
        yield _Idea(self._patch_of(ideas), sum(idea.size for idea in ideas), " and ".join(idea.text for idea in ideas))

    def _smallest_ask(self, ideas: Sequence[_Idea]) -> _Idea | None:
        """Ask for what the roomiest node has, of those that take the request once *ideas* are followed."""
        index, ask = self._selector.index, self._request.ask
        loosest = self._patched(self._patch_of(ideas))
        willing = np.flatnonzero(self._selector.filters.apply(loosest, ask, self._now).eligible)
        if not len(willing):
            return None
        room = self._room_on(willing)
        roomiest = willing[room == room.max()]
        place = int(roomiest[index.tie[roomiest].argmin()])
        fewer: dict[str, Any] = {}
        for name, amount in ask.amounts:
            left = int(index.available[CLASSES.index(name), place])
            if left < amount:
                fewer[name] = left or None
        for name, count, share in ask.devices:
            units = index.devices[name][place] if name in index.devices else np.zeros(0, np.int16)
            fitting, most = int(np.count_nonzero(units >= share)), int(units.max(initial=0))
            if 0 < fitting < count:
                fewer[name] = fitting if share == WHOLE_MILLI else {"count": fitting, "share_milli": share}
            elif not fitting:
                fewer[name] = {"count": 1, "share_milli": most} if most else None
        dropped = {name for name, left in fewer.items() if left is None}
        if not fewer or dropped == self._request.resources.keys():
            return None
        told = ", ".join(_told(name, left) for name, left in fewer.items())
        return _Idea({"resources": fewer}, 1 - float(room.max()), told)

    def _room_on(self, places: NDArray[np.intp]) -> NDArray[np.float64]:
        """Tell what part of what a replica needs nodes have, of the scarcest resource."""
        index, ask = self._selector.index, self._request.ask
        room = np.ones(len(places))
        for name, amount in ask.amounts:
            room = np.minimum(room, index.available[CLASSES.index(name), places] / amount)
        for name, count, share in ask.devices:
            units = index.devices[name][places] if name in index.devices else np.zeros((len(places), 1), np.int16)
            fitting = np.count_nonzero(units >= share, axis=1)
            room = np.minimum(room, np.where(fitting > 0, fitting, units.max(axis=1) / share) / count)
        return room

    # changes of the fleet

    def _open_up(self) -> Iterator[dict[str, Any]]:
        """Find nodes that are out and would do."""
        selector, index = self._selector, self._selector.index
        shut = [
            row
            for place in np.flatnonzero(~selector.filters.open_nodes(self._now))
            if (row := index.rows[place]) is not None
        ]
        if not shut:
            return
        self._tries = 0
        opened = [index.put(_opened(row, self._now)) for row in shut]
        try:
            room = selector.slots(self._request, self._now)
            useful = sorted(
                (row for place, row in zip(opened, shut, strict=True) if room[place]), key=lambda row: row.node_id
            )
            needed: list[NodeRow] = []
            for row in useful:
                needed.append(row)
                if (
                    sum(int(room[index.place_of[other.node_id]]) for other in needed) + self._placed
                    >= self._request.replicas
                ):
                    break
            wanted = {row.node_id for row in needed}
            for row in shut:
                if row.node_id not in wanted:
                    index.put(row)
            fits = bool(needed) and self._fits({})
        finally:
            for row in shut:
                index.put(row)
        if fits:
            told = ", ".join(f"{row.node_id} ({row.blocked or STALE})" for row in needed[:5])
            yield {"kind": "open_nodes", "text": f"bring back {told}", "node_ids": [row.node_id for row in needed]}

    def _add_nodes(self) -> Iterator[dict[str, Any]]:
        """Find out what nodes would have to be added: as the request wants them, near its target, or each somewhere new."""
        self._tries = 0
        missing = self._request.replicas - self._placed
        for description, rows in (
            ("", self._new_rows(missing, apart=False)),
            ("", self._new_rows(missing, apart=False, near=self._target())),
            (", each in another zone, site and region", self._new_rows(missing, apart=True)),
            (", each in another zone, site and region", self._new_rows(self._request.replicas, apart=True)),
        ):
            if rows and self._fits_with(rows):
                first = rows[0]
                room = dict(first.effective)
                told = ", ".join(f"{amount} {name}" for name, amount in sorted(room.items()))
                nodes = "1 node" if len(rows) == 1 else f"{len(rows)} nodes"
                yield {
                    "kind": "add_nodes",
                    "text": f"add {nodes} that can give at least {told}{description}",
                    "nodes": [_described(row) for row in rows],
                }
                return

    def _new_rows(self, count: int, *, apart: bool, near: NodeRow | None = None) -> list[NodeRow]:
        """Make up nodes that meet the request's constraints, each with room for one replica."""
        wanted, ask = self._request.constraints, self._request.ask
        if count > _MAX_NEW_NODES or wanted.node_ids:
            return []
        room = dict(ask.amounts) | {name: units for name, units, _ in ask.devices}
        rows = []
        for number in range(count):
            place = {
                name: values[number % len(values)]
                if values
                else (f"new-{name}-{number}" if apart else getattr(near, name, None))
                for name, values in (("region", wanted.regions), ("zone", wanted.zones), ("site", wanted.sites))
            }
            within = wanted.within
            rows.append(
                NodeRow(
                    # No registered node can have such a name.
                    node_id=f"+{number}",
                    node_type=wanted.node_types[0] if wanted.node_types else None,
                    region=place["region"],
                    zone=place["zone"],
                    site=place["site"],
                    latitude=within.latitude if within else None,
                    longitude=within.longitude if within else None,
                    labels={key: values[0] for key, values in wanted.labels.items()},
                    features=list(wanted.features),
                    images=[],
                    blocked=None,
                    last_contact=self._now,
                    health=Health.HEALTHY.value,
                    health_since=self._now,
                    effective=room,
                    units={name: [str(unit) for unit in range(units)] for name, units, _ in ask.devices},
                    allocated={},
                    used_units={},
                    capacity=room,
                    cpu_percent=None,
                    memory_percent=None,
                    unseen={},
                    deployments={},
                    pressed_until=None,
                )
            )
        return rows

    def _target(self) -> NodeRow | None:
        """Give a node that has what the request must be near to."""
        for term in self._request.affinity:
            if term.mode is Mode.REQUIRED:
                places = sorted(self._selector.filters.places_of(term))
                if places:
                    return self._selector.index.rows[places[0]]
        return None

    def _fits_with(self, rows: list[NodeRow]) -> bool:
        index = self._selector.index
        for row in rows:
            index.put(row)
        try:
            return self._fits({})
        finally:
            for row in rows:
                index.remove(row.node_id)
                del index.removed[row.node_id]

    # trying out

    def _patched(self, *patches: dict[str, Any]) -> SelectionRequest:
        document: Any = self._request.document
        for patch in patches:
            document = merge_patch(document, patch)
        return SelectionRequest.model_validate(document)

    def _patch_of(self, ideas: Sequence[_Idea]) -> dict[str, Any]:
        """Put the patches of several ideas into one."""
        merged: dict[str, Any] = {}
        for idea in ideas:
            merged = _merge_patches(merged, idea.patch)
        for name in sorted({idea.item[0] for idea in ideas if idea.item}):
            numbers = {idea.item[1] for idea in ideas if idea.item and idea.item[0] == name}
            merged = _merge_patches(merged, self._without_items(name, numbers))
        return merged

    def _fits(self, *patches: dict[str, Any]) -> bool:
        self._tries += 1
        if self._tries > _MAX_TRIES:
            return False
        try:
            request = self._patched(*patches)
        except ValueError:
            return False
        selection = self._selector.select(request, self._now, observe=False)
        fits = selection.fits
        self._selector.undo(selection)
        return fits


def _merge_patches(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Put two merge patches into one: what is removed stays written down."""
    merged = dict(one)
    for key, value in other.items():
        before = merged.get(key)
        merged[key] = _merge_patches(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _told(name: str, left: Any) -> str:
    if left is None:
        return f"do without {name}"
    if isinstance(left, dict):
        return f"ask for {left['share_milli']} thousandths of {left['count']} {name}"
    return f"ask for {left} {name}"


def _opened(row: NodeRow, now: float) -> NodeRow:
    return replace(row, blocked=None, last_contact=now)


def _described(row: NodeRow) -> dict[str, Any]:
    """Say what a node must be, in the words of a declaration; what is left out doesn't matter."""
    location = {name: getattr(row, name) for name in ("region", "zone", "site", "latitude", "longitude")}
    return {
        "node_type": row.node_type,
        "labels": row.labels,
        "features": row.features,
        "location": {name: value for name, value in location.items() if value is not None},
        "effective": row.effective,
    }
