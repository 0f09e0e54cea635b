# SPDX-License-Identifier: GPL-3.0-or-later
"""Tell where the allocations of a node would go if it were gone: the selector's choice, one after the other.

Works on a picture of the fleet of its own, so that nobody who places waits for it. Reserves nothing and changes nothing; whoever
follows a proposal allocates there, and the ledger decides then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa

from node_manager.deployments import DeploymentPlacer
from node_manager.fleet_index import FleetIndex
from node_manager.fragmentation import RequestMix
from node_manager.ledger import Allocation, allocation_of_row
from node_manager.node_registry import Clock, utc_now
from node_manager.node_selector import NodeSelector, Selection
from node_manager.problems import NodeNotFoundError
from node_manager.resources import as_data, ask_of
from node_manager.selection_filters import AFFINITY, SPREAD, Filtered
from node_manager.selection_request import Mode, Scope, SelectionRequest, Spread, Strategy, Term
from node_manager.settings import Settings
from node_manager.store import Store, tables

# Of one node; each takes a selection, about a millisecond in a fleet of 10,000.
MAX_ALLOCATIONS = 1000
_REASONS = 5
# How long a chain of deployments that must be near to each other may be, listed in the worst order.
_PASSES = 5


@dataclass(frozen=True)
class Replacement:
    """Where one allocation would go; without *to_node*, *why* says what was in the way."""

    allocation_id: str
    owner: str
    deployment_id: str | None
    resources: dict[str, Any]
    to_node: str | None
    why: str

    def as_data(self) -> dict[str, Any]:
        """Write it as events and answers have it."""
        return {
            "allocation_id": self.allocation_id,
            "owner": self.owner,
            "deployment_id": self.deployment_id,
            "resources": self.resources,
            "to_node": self.to_node,
            "why": self.why,
        }


@dataclass(frozen=True)
class Plan:
    """The replacements of one node's allocations, in the order of their ids; *left_out* were too many to look at."""

    computed_at: datetime
    items: tuple[Replacement, ...]
    left_out: int


class Replacements:
    """Proposals for the work of nodes of one store."""

    def __init__(self, store: Store, settings: Settings, placer: DeploymentPlacer, clock: Clock = utc_now) -> None:
        self._store = store
        self._placer = placer
        self._clock = clock
        self._stale_after = settings.configuration.monitoring.stale_after_seconds

    def of(self, node_id: str) -> list[Replacement]:
        """Propose a node for each allocation of *node_id*, the first MAX_ALLOCATIONS of them, as if that node were gone.

        Errors: NodeNotFoundError.
        """
        return list(self.plan(node_id).items)

    def plan(self, node_id: str) -> Plan:
        """Give what of() gives, with how many allocations it left out.

        Errors: NodeNotFoundError.
        """
        with self._store.read() as connection:
            known = connection.scalar(sa.select(tables.nodes.c.node_id).where(tables.nodes.c.node_id == node_id))
        if known is None:
            raise NodeNotFoundError(node_id)
        return self.plans([node_id])[node_id]

    def plans(self, node_ids: Sequence[str]) -> dict[str, Plan]:
        """Propose nodes as if all of *node_ids* were gone; all proposals together fit."""
        now = self._clock()
        counts, held, requests = self._read(node_ids)
        found: dict[str, Replacement] = {}
        if held:
            found = self._moves(node_ids, requests, now).propose(held)
        return {
            node_id: Plan(
                now,
                tuple(found[item.allocation_id] for item in held if item.node_id == node_id),
                max(0, counts.get(node_id, 0) - MAX_ALLOCATIONS),
            )
            for node_id in node_ids
        }

    def _moves(self, gone: Iterable[str], requests: dict[str, SelectionRequest], now: datetime) -> _Moves:
        with self._placer.picture() as (index, _):
            rows = [row for row in index.rows if row is not None]
            deployments = list(index.deployments.rows.values())
        picture, left = FleetIndex(len(rows) or 1), set(gone)
        for row in rows:
            if row.node_id not in left:
                picture.put(row)
        for deployment in deployments:
            picture.put_deployment(deployment)
        return _Moves(NodeSelector(picture, RequestMix(), self._stale_after), requests, now.timestamp())

    def _read(self, node_ids: Sequence[str]) -> tuple[dict[str, int], list[Allocation], dict[str, SelectionRequest]]:
        table, known = tables.allocations, tables.deployments.c
        on_nodes = table.c.node_id.in_(node_ids)
        numbered = sa.select(
            table,
            sa.func.row_number().over(partition_by=table.c.node_id, order_by=table.c.allocation_id).label("number"),
        ).where(on_nodes)
        first = numbered.subquery()
        with self._store.read() as connection:
            counted = (
                sa.select(table.c.node_id, sa.func.count().label("held")).where(on_nodes).group_by(table.c.node_id)
            )
            counts = {row.node_id: row.held for row in connection.execute(counted)}
            query = (
                sa.select(first)
                .where(first.c.number <= MAX_ALLOCATIONS)
                .order_by(first.c.node_id, first.c.allocation_id)
            )
            held = [allocation_of_row(row) for row in connection.execute(query)]
            names = sorted({item.deployment_id for item in held if item.deployment_id is not None})
            asked = sa.select(known.deployment_id, known.request).where(known.deployment_id.in_(names))
            requests = {
                row.deployment_id: SelectionRequest.model_validate(row.request) for row in connection.execute(asked)
            }
        return counts, held, requests


class _Moves:
    """Selections one after the other, each counted as placed before the next."""

    def __init__(self, selector: NodeSelector, requests: dict[str, SelectionRequest], now: float) -> None:
        self._selector = selector
        self._requests = requests
        self._now = now

    def propose(self, held: Sequence[Allocation]) -> dict[str, Replacement]:
        """Find a node for each; one that must be near to another that has no new node yet is asked about again."""
        found: dict[str, Replacement] = {}
        waiting = list(held)
        for _ in range(_PASSES):
            again = []
            for allocation in waiting:
                replacement, waits = self._replace(allocation)
                found[allocation.allocation_id] = replacement
                if waits:
                    again.append(allocation)
            if len(again) in {0, len(waiting)}:
                break
            waiting = again
        return found

    def _replace(self, allocation: Allocation) -> tuple[Replacement, bool]:
        request = self._request_of(allocation)
        filtered = self._selector.filters.apply(request, request.ask, self._now)
        rejected = dict(filtered.rejected)
        if request.spread is not None:
            request = self._evenly(request, request.spread, filtered, rejected)
        selection = self._selector.select(request, self._now)
        if selection.fits:
            (choice,) = selection.choices
            to_node, why = choice.node_id, _told_choice(selection, choice.score, rejected)
        else:
            to_node, why = None, _told_refusal(selection.considered, rejected)
        replacement = Replacement(
            allocation.allocation_id,
            allocation.owner,
            allocation.deployment_id,
            as_data(allocation.ask),
            to_node,
            why,
        )
        return replacement, to_node is None and AFFINITY in rejected

    def _request_of(self, allocation: Allocation) -> SelectionRequest:
        """Ask for one replica as the deployment did, or for the resources alone where nothing else is known."""
        resources = as_data(allocation.ask)
        stored = self._requests.get(allocation.deployment_id or "")
        if stored is None:
            # Not validated: hand-made allocations may have ids that deployments can't.
            return SelectionRequest.model_construct(
                deployment_id=allocation.deployment_id or allocation.allocation_id,
                owner=allocation.owner,
                resources=resources,
            )
        changes: dict[str, Any] = {"replicas": 1, "explain": False}
        if allocation.ask != ask_of(stored.resources):
            changes["resources"] = resources
        if stored.strategy is not Strategy.BINPACK:
            # The selector scores evenness among the replicas that it places itself; of those placed before it knows this way.
            changes["anti_affinity"] = [*stored.anti_affinity, *_apart(stored.deployment_id)]
        # Without what a model keeps once it was computed.
        return SelectionRequest.model_construct(**{**dict(stored), **changes})

    def _evenly(
        self, request: SelectionRequest, spread: Spread, filtered: Filtered, rejected: dict[str, int]
    ) -> SelectionRequest:
        """Leave out the nodes where one more replica, beside those that stay, is more than spread allows."""
        index = self._selector.index
        codes = index.domains(spread.scope)
        counts = np.zeros(int(codes.max(initial=0)) + 1, np.int64)
        for place, count in index.deployments.holders.get(request.deployment_id, {}).items():
            counts[codes[place]] += count
        domains = np.unique(codes[filtered.eligible])
        domains = domains[domains != 0]
        # As the selector has it: with a single domain the other one is empty.
        emptiest = int(counts[domains].min()) if len(domains) > 1 else 0
        uneven = filtered.alive & ~(counts < spread.max_skew + emptiest)[codes]
        if not uneven.any():
            return request
        rejected[SPREAD] = rejected.get(SPREAD, 0) + int(np.count_nonzero(uneven))
        left_out = [row.node_id for place in uneven.nonzero()[0] if (row := index.rows[place]) is not None]
        constraints = request.constraints.model_copy(
            update={"exclude_node_ids": [*request.constraints.exclude_node_ids, *left_out]}
        )
        return SelectionRequest.model_construct(**{**dict(request), "constraints": constraints})


def _apart(deployment_id: str) -> list[Term]:
    """Prefer nodes and zones without a replica, each as much as the other."""
    return [
        Term(mode=Mode.PREFERRED, scope=scope, deployment_id=deployment_id, weight=1)
        for scope in (Scope.NODE, Scope.ZONE)
    ]


def _told_choice(selection: Selection, score: float, rejected: dict[str, int]) -> str:
    left = selection.considered - sum(rejected.values())
    return f"the best of {left} that would do, score {score:.1f}" if left > 1 else f"the only one, score {score:.1f}"


def _told_refusal(considered: int, rejected: dict[str, int]) -> str:
    ordered = sorted(rejected.items(), key=lambda item: (-item[1], item[0]))[:_REASONS]
    told = ", ".join(f"{count} {reason}" for reason, count in ordered) or "there is no other node"
    return f"fits nowhere: of {considered} other nodes were left out: {told}"
