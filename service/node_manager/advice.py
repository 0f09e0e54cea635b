# SPDX-License-Identifier: GPL-3.0-or-later
"""Advise which replicas to move: the planner's moves, held to the constraints of the deployments they belong to.

Works on a picture of the fleet of its own, so that nobody who places waits for it. Changes nothing; whoever follows the advice
allocates on the one node and releases on the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from threading import Lock

import sqlalchemy as sa

from node_manager.deployments import DeploymentPlacer
from node_manager.fleet_index import CLASSES, FleetIndex, Mask
from node_manager.fleet_rows import DeploymentRow, NodeRow
from node_manager.ledger import Allocation, allocation_of_row
from node_manager.node_registry import Clock, utc_now
from node_manager.optimisation import Limits, Movable, Move, NodeLoad, advise
from node_manager.resources import add_to
from node_manager.selection_filters import Filters
from node_manager.selection_request import Mode, SelectionRequest
from node_manager.settings import Settings
from node_manager.store import Store, tables


@dataclass(frozen=True)
class SuggestedMove:
    """One replica that had better be elsewhere, and since when that is suggested."""

    allocation_id: str
    deployment_id: str
    from_node: str
    to_node: str
    gain: float
    reason: str
    since: datetime


@dataclass(frozen=True)
class Suggestions:
    """Moves to make one after the other; *more* says that a bound held back others."""

    at: datetime
    imbalance_before: float
    imbalance_after: float
    moves: tuple[SuggestedMove, ...]
    more: bool


class Optimiser:
    """Advice on the fleet of one store."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        placer: DeploymentPlacer,
        clock: Clock = utc_now,
        limits: Limits | None = None,
    ) -> None:
        self._store = store
        self._placer = placer
        self._clock = clock
        self._limits = limits or Limits()
        self._stale_after = settings.configuration.monitoring.stale_after_seconds
        # When each move that still stands was first suggested.
        self._since: dict[tuple[str, str], datetime] = {}
        self._lock = Lock()

    def advice(self) -> Suggestions:
        """Suggest moves; nothing is changed, and the same fleet gets the same advice."""
        now = self._clock()
        with self._placer.picture() as (index, _):
            rows = [row for row in index.rows if row is not None]
            known = list(index.deployments.rows.values())
        allocations, requests = self._read()
        constraints = PlacedConstraints(rows, known, allocations, requests, self._stale_after, now.timestamp())
        found = advise(constraints.loads(), constraints.movables(), constraints, self._limits)
        with self._lock:
            self._since = {
                (move.allocation_id, move.to_node): self._since.get((move.allocation_id, move.to_node), now)
                for move in found.moves
            }
            moves = tuple(
                SuggestedMove(**asdict(move), since=self._since[move.allocation_id, move.to_node])
                for move in found.moves
            )
        return Suggestions(now, found.imbalance_before, found.imbalance_after, moves, found.cut)

    def _read(self) -> tuple[list[Allocation], dict[str, SelectionRequest]]:
        with self._store.read() as connection:
            allocations = [allocation_of_row(row) for row in connection.execute(sa.select(tables.allocations))]
            requests = {
                row.deployment_id: SelectionRequest.model_validate(row.request)
                for row in connection.execute(
                    sa.select(tables.deployments.c.deployment_id, tables.deployments.c.request)
                )
            }
        return allocations, requests


class PlacedConstraints:
    """What the deployments' requests still demand when their replicas move, one move after the other."""

    def __init__(
        self,
        rows: Iterable[NodeRow],
        deployments: Iterable[DeploymentRow],
        allocations: Sequence[Allocation],
        requests: Mapping[str, SelectionRequest],
        stale_after_seconds: float,
        now: float,
    ) -> None:
        self._index = FleetIndex()
        for row in rows:
            self._index.put(row)
        for deployment in deployments:
            self._index.put_deployment(deployment)
        self._filters = Filters(self._index, stale_after_seconds)
        self._now = now
        self._allocations = {allocation.allocation_id: allocation for allocation in allocations}
        self._requests = requests
        self._sought = _sought(requests.values())
        self._masks: dict[tuple[str, str], Mask] = {}

    def loads(self) -> list[NodeLoad]:
        """Give the books of the nodes that take new work."""
        open_ = self._filters.open_nodes(self._now)
        return [
            NodeLoad(
                row.node_id,
                {name: row.effective[name] for name in CLASSES if row.effective.get(name)},
                {name: row.allocated.get(name, 0) for name in CLASSES if row.effective.get(name)},
                True,
            )
            for place, row in enumerate(self._index.rows)
            if row is not None and open_[place]
        ]

    def movables(self) -> list[Movable]:
        """Give all allocations, and whether there is a way to move them."""
        return [
            Movable(
                allocation.allocation_id,
                allocation.deployment_id or "",
                allocation.node_id,
                dict(allocation.ask.amounts),
                self._is_movable(allocation),
            )
            for allocation in self._allocations.values()
        ]

    def allowed(self, allocation: Movable, to_node: str) -> bool:
        """Tell whether the deployment's request, and those of others, let this replica be there."""
        key = (allocation.deployment_id, allocation.node_id)
        mask = self._masks.get(key)
        if mask is None:
            mask = self._masks[key] = self._mask(allocation)
        return bool(mask[self._index.place_of[to_node]])

    def moved(self, move: Move) -> None:
        """Count the replica on its new node."""
        allocation = self._allocations[move.allocation_id]
        source, target = self._index.row_of(move.from_node), self._index.row_of(move.to_node)
        assert source is not None
        assert target is not None
        self._index.put(_changed(source, allocation, -1))
        self._index.put(_changed(target, allocation, 1))
        self._masks.clear()

    def _is_movable(self, allocation: Allocation) -> bool:
        """Leave alone what wasn't placed by selection, is not confirmed, has devices, or is what others want to be near."""
        request = self._requests.get(allocation.deployment_id or "")
        if request is None or allocation.expires_at is not None or allocation.ask.devices:
            return False
        return not any(
            target == request.deployment_id or (isinstance(target, frozenset) and target <= set(request.labels.items()))
            for target in self._sought
        )

    def _mask(self, allocation: Movable) -> Mask:
        """Mark the nodes where the replica may be while all others stay."""
        request = self._requests[allocation.deployment_id]
        moving = self._allocations[allocation.allocation_id]
        row = self._index.row_of(allocation.node_id)
        assert row is not None
        self._index.put(_changed(row, moving, -1))
        try:
            filtered = self._filters.apply(request, request.ask, self._now)
            return filtered.alive & self._even(request, filtered.eligible)
        finally:
            self._index.put(row)

    def _even(self, request: SelectionRequest, eligible: Mask) -> Mask:
        """Mark the nodes that keep the distribution as even as is demanded, the replica being taken away from its node."""
        index, spread = self._index, request.spread
        if spread is None:
            return eligible
        codes = index.domains(spread.scope)
        counts: Counter[int] = Counter()
        for place, count in index.deployments.holders.get(request.deployment_id, {}).items():
            counts[int(codes[place])] += count
        domains = {int(code) for code in set(codes[eligible].tolist()) | set(counts)} - {0}
        even = index.mask_at(())
        for target in domains:
            after = {code: counts[code] + (code == target) for code in domains}
            emptiest = min(after.values()) if len(domains) > 1 else 0
            if max(after.values()) - emptiest <= spread.max_skew:
                even |= codes == target
        return even


def _sought(requests: Iterable[SelectionRequest]) -> set[str | frozenset[tuple[str, str]]]:
    """Name what other deployments must be near to: ids, and sets of labels."""
    found: set[str | frozenset[tuple[str, str]]] = set()
    for request in requests:
        for term in request.affinity:
            if term.mode is Mode.REQUIRED and not request.is_own(term):
                if term.deployment_id is not None:
                    found.add(term.deployment_id)
                elif term.deployment_labels is not None:
                    found.add(frozenset(term.deployment_labels.items()))
    return found


def _changed(row: NodeRow, allocation: Allocation, sign: int) -> NodeRow:
    """Give a row with one replica more or less."""
    allocated, deployments = dict(row.allocated), dict(row.deployments)
    add_to(allocated, dict(allocation.ask.amounts), sign)
    add_to(deployments, {allocation.deployment_id or "": 1}, sign)
    return replace(row, allocated=allocated, deployments=deployments)
