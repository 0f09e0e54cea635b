# SPDX-License-Identifier: GPL-3.0-or-later
"""Place deployments: select and reserve in one transaction, so that concurrent callers can never oversell.

The index proposes, inside the transaction and brought up to date there; the ledger checks each proposal against the store and
decides. Many deployments share one transaction where they come together.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from node_manager import decisions
from node_manager.decisions import MAX_ADVISED, Capture, Decision, DecisionLog, decide
from node_manager.fleet_follower import follow
from node_manager.fleet_index import FleetIndex
from node_manager.fragmentation import RequestMix
from node_manager.ids import ordered_ids
from node_manager.ledger import Allocation, Ledger, StaleAccountError, allocation_of_row, excesses, select_held
from node_manager.node_registry import Clock, utc_now
from node_manager.node_selector import NodeSelector, Selection
from node_manager.problems import (
    ConflictError,
    DeploymentExistsError,
    DeploymentNotFoundError,
    InvalidInputError,
    NothingFitsError,
    ProblemError,
)
from node_manager.resource_allocator import ResourceAllocator, check_classes, check_ttl, keep_for_good, quota_error
from node_manager.resources import add_to, in_thousandths
from node_manager.selection_request import Mode, SelectionRequest, Strategy
from node_manager.settings import Settings
from node_manager.store import Also, Store, StoreUnavailableError, tables
from node_manager.store.bulk import BulkInsert, is_one_of
from node_manager.store.documents import JsonText
from node_manager.timings import NO_TIMINGS, Timings

_ATTEMPTS = 5
_FRESH_SECONDS = 300.0
# Any number that nothing else in the database uses: "plac".
_LOCK_KEY = 0x706C6163
# How much is to be told about a request: two that differ in nothing else are the same.
_TOLD = frozenset({"explain", "dry_run", "reserve"})


@dataclass(frozen=True)
class Placed:
    """What was chosen for one deployment, and what of it is reserved."""

    request: SelectionRequest
    # None for a dry run, which leaves no record.
    decision_id: str | None
    answer: dict[str, Any]
    allocations: tuple[Allocation, ...]
    # False: it was there already.
    created: bool
    at: datetime


@dataclass
class _Pass:
    """One attempt at a batch, in one transaction."""

    connection: sa.Connection
    now: datetime
    ledger: Ledger
    capture: Capture
    outcomes: list[Placed | ProblemError] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    reserved: list[tuple[int, SelectionRequest, Selection, str]] = field(default_factory=list)
    used: dict[str, dict[str, int]] = field(default_factory=dict)
    # Where a deployment stands in the batch, and who asks for the same once more.
    seen: dict[str, int] = field(default_factory=dict)
    again: dict[int, int] = field(default_factory=dict)


_KNOWN = sa.select(tables.deployments).where(is_one_of(tables.deployments.c.deployment_id, "ids"))
_TAKEN = sa.select(tables.allocations.c.allocation_id).where(is_one_of(tables.allocations.c.allocation_id, "ids"))
_INSERT = BulkInsert(tables.deployments, "deployment_id", "owner", "request", "decision_id", "weights", "created_at")


class DeploymentPlacer:
    """Deployments of one store, with this process's picture of the fleet."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        allocator: ResourceAllocator,
        clock: Clock = utc_now,
        timings: Timings = NO_TIMINGS,
    ) -> None:
        self._timings = timings
        self._store = store
        self._settings = settings
        self._allocator = allocator
        self._clock = clock
        self._lock = threading.Lock()
        self._asked_at = -math.inf
        self._stale_after = settings.configuration.monitoring.stale_after_seconds
        self._forget_index(RequestMix())

    def place(self, requests: Sequence[SelectionRequest]) -> list[Placed | ProblemError]:
        """Place each deployment or say why not, in the given order; each is all or none, whatever becomes of the others.

        Shapes: one outcome per request. Problems: DeploymentExistsError if the id is taken by another request;
            QuotaExceededError; NothingFitsError with reasons and changes that help; InvalidInputError.
        Errors: StoreUnavailableError; then nothing of the batch was placed.
        """
        self._asked_at = time.monotonic()
        self._allocator.expire()
        for attempt in range(_ATTEMPTS):
            try:
                with self._lock:
                    return self._attempt(requests)
            except (StaleAccountError, IntegrityError) as error:
                # Somebody else was faster; what the fleet is now is read anew.
                if attempt == _ATTEMPTS - 1:
                    raise StoreUnavailableError("the fleet changes too fast to place anything") from error
        raise AssertionError("unreachable")

    def nodes_of(self, deployment_id: str) -> tuple[dict[str, Any] | None, list[Allocation]]:
        """Give a deployment's request (None if it was not placed by selection) and its allocations.

        Errors: DeploymentNotFoundError if there are neither.
        """
        with self._store.read() as connection:
            request = connection.scalar(
                sa.select(tables.deployments.c.request).where(tables.deployments.c.deployment_id == deployment_id)
            )
            allocations = _allocations_of(connection, deployment_id)
        if request is None and not allocations:
            raise DeploymentNotFoundError(deployment_id)
        return None if request is None else _comparable(request), allocations

    def confirm(self, deployment_id: str) -> list[Allocation]:
        """Keep all of a deployment's allocations for good.

        Errors: DeploymentNotFoundError if they expired or never were.
        """
        self._allocator.expire()
        table, now = tables.allocations, self._clock()
        with self._store.write() as connection:
            held = connection.execute(
                sa.select(table)
                .where(table.c.deployment_id == deployment_id)
                .order_by(table.c.allocation_id)
                .with_for_update()
            ).all()
            if not held:
                raise DeploymentNotFoundError(deployment_id)
            waiting = [allocation_of_row(row) for row in held if row.expires_at is not None]
            if waiting:
                keep_for_good(connection, waiting, now)
            return _allocations_of(connection, deployment_id)

    def delete(self, deployment_id: str, *, also: Also | None = None) -> int:
        """Release all that is reserved for a deployment and forget it; give how many allocations that were.

        Shapes: *also* is done in the same transaction.
        Errors: DeploymentNotFoundError.
        """
        with self._store.write() as connection:
            ledger = Ledger(connection, self._settings, self._clock())
            held = select_held(connection, ledger, tables.allocations.c.deployment_id == deployment_id)
            for allocation in held:
                ledger.drop(allocation, "deployment_deleted")
            ledger.write()
            known = connection.execute(
                tables.deployments.delete().where(tables.deployments.c.deployment_id == deployment_id)
            )
            if not held and not known.rowcount:
                raise DeploymentNotFoundError(deployment_id)
            if also is not None:
                also(connection)
        return len(held)

    @contextmanager
    def picture(self) -> Iterator[tuple[FleetIndex, datetime]]:
        """Lend the index, brought up to date, to whoever only looks at it."""
        now = self._clock()
        with self._lock:
            with self._store.read() as connection:
                self._follow(connection, now)
            yield self._index, now

    def warm(self) -> None:
        """Read the fleet, so that the first who asks need not wait for it."""
        with self.picture():
            pass

    def keep_fresh(self) -> None:
        """Follow the fleet between requests, so that they find little to read; not where nobody has asked for a while."""
        if time.monotonic() - self._asked_at < _FRESH_SECONDS:
            self.warm()

    def prune(self) -> None:
        """Forget old decisions."""
        with self._store.write() as connection:
            decisions.prune(connection, self._settings.configuration.selection.keep_decisions)

    def _forget_index(self, mix: RequestMix) -> None:
        """Begin a new picture of the fleet, and a new chain of decisions, under a name that nothing was written by."""
        self._writer = uuid.uuid4().hex
        self._index = FleetIndex()
        self._use_mix(mix)
        self._log = DecisionLog(self._stale_after)
        self._mark = 0

    def _use_mix(self, mix: RequestMix) -> None:
        self._mix = mix
        self._selector = NodeSelector(self._index, mix, self._stale_after)

    def _follow(self, connection: sa.Connection, now: datetime) -> None:
        self._mark = follow(self._index, connection, self._settings, now, self._mark, self._writer)

    def _attempt(self, requests: Sequence[SelectionRequest]) -> list[Placed | ProblemError]:
        now = self._clock()
        mix = self._mix.copy()
        done: _Pass | None = None
        try:
            with self._store.write() as connection:
                if self._store.dialect == "postgresql":
                    # What holds between nodes (spread, affinity) is true only if nobody else places meanwhile.
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
                self._follow(connection, now)
                packs = any(request.strategy is Strategy.BINPACK for request in requests)
                capture = self._log.capture(self._index, self._mix if packs else None, now.timestamp())
                done = _Pass(
                    connection, now, Ledger(connection, self._settings, now, self._writer, self._mark), capture
                )
                self._decide(done, requests)
                self._reserve(done)
        except BaseException:
            if done is not None:
                # Some of it is counted as placed in the index, and it may even be in the store: neither is worth guessing.
                self._forget_index(mix)
            raise
        if done.decisions:
            self._log.committed(done.capture, self._index)
        return done.outcomes

    def _decide(self, work: _Pass, requests: Sequence[SelectionRequest]) -> None:
        """Choose for each request in turn; nothing is written yet."""
        wanted = {request.deployment_id for request in requests}
        known = {row.deployment_id: row for row in work.connection.execute(_KNOWN, {"ids": wanted})}
        most = self._settings.configuration.selection.max_replicas
        taken = _taken_ids(work.connection, [request for request in requests if request.replicas <= most])
        work.ledger.hold({request.owner for request in requests}, ())
        ids = ordered_ids(len(requests))
        for number, request in enumerate(requests):
            try:
                if request.deployment_id in work.seen:
                    first = work.seen[request.deployment_id]
                    outcome = _same_in_batch(requests[first], request, work.outcomes[first])
                    work.again[number] = first
                elif request.deployment_id in known:
                    outcome = self._same_or_conflict(work, known[request.deployment_id], request)
                else:
                    if request.reserve and not request.dry_run:
                        work.seen[request.deployment_id] = number
                    if request.deployment_id in taken:
                        raise ConflictError(
                            f"allocations named {request.deployment_id}:0 and so on are there already; release them, or choose "
                            "another deployment_id",
                            deployment_id=request.deployment_id,
                        )
                    outcome = self._choose(work, request, ids[number])
            except ProblemError as error:
                work.outcomes.append(error)
            else:
                work.outcomes.append(outcome)

    def _choose(self, work: _Pass, request: SelectionRequest, new_id: str) -> Placed:
        self._check(work.connection, request)
        reserves = request.reserve and not request.dry_run
        if reserves:
            self._check_quota(work, request)
        mix = self._mix.copy() if request.dry_run else None
        began = time.perf_counter()
        answer, selection = decide(
            self._selector, request, work.now.timestamp(), advised=len(work.decisions) < MAX_ADVISED
        )
        self._timings.observe_selection(time.perf_counter() - began)
        if mix is not None:
            # No record tells of it, so what is decided later must not depend on it.
            self._use_mix(mix)
        decision_id = None
        if not request.dry_run:
            decision_id = new_id
            work.decisions.append(Decision(decision_id, request, answer, len(work.decisions)))
        if not selection.fits:
            raise _nothing_fits(request, decision_id, answer)
        if not reserves:
            self._selector.undo(selection)
            return Placed(request, decision_id, answer, (), True, work.now)
        assert decision_id is not None
        decisions.keep(self._selector, request, selection)
        add_to(work.used[request.owner], in_thousandths(request.ask, request.replicas))
        work.reserved.append((len(work.outcomes), request, selection, decision_id))
        return Placed(request, decision_id, answer, (), True, work.now)

    def _check(self, connection: sa.Connection, request: SelectionRequest) -> None:
        limits = self._settings.configuration.selection
        if request.replicas > limits.max_replicas:
            raise InvalidInputError("replicas", f"expected at most {limits.max_replicas} (selection.max_replicas)")
        check_ttl(request.ttl_seconds, self._settings)
        for number, name in enumerate(request.constraints.node_types):
            if name not in self._settings.node_types:
                known = ", ".join(sorted(self._settings.node_types))
                raise InvalidInputError(f"constraints.node_types.{number}", f"expected one of {known}, got {name!r}")
        for number, term in enumerate(request.affinity):
            target = term.deployment_id
            if term.mode is not Mode.REQUIRED or target in {None, request.deployment_id}:
                continue
            if target not in self._index.deployments.holders:
                raise InvalidInputError(
                    f"affinity.{number}.deployment_id",
                    f"no replica of deployment {target!r} is placed; place it first, or make the term preferred",
                )
        check_classes(connection, request.ask, self._settings, self._index.devices.keys())

    def _check_quota(self, work: _Pass, request: SelectionRequest) -> None:
        account = work.ledger.owner(request.owner)
        used = work.used.setdefault(request.owner, dict(account.used))
        excess = excesses(account.hard, used, request.ask, request.replicas)
        if excess:
            raise quota_error(request.owner, excess)

    def _same_or_conflict(self, work: _Pass, row: Any, request: SelectionRequest) -> Placed:
        if _comparable(row.request) != _comparable(request.document):
            raise DeploymentExistsError(
                f"deployment {request.deployment_id!r} is placed already, for another request; DELETE "
                f"/deployment/{request.deployment_id} releases it, or choose another deployment_id",
                deployment_id=request.deployment_id,
                decision_id=row.decision_id,
            )
        answer = work.connection.scalar(
            sa.select(tables.decisions.c.answer).where(tables.decisions.c.decision_id == row.decision_id)
        )
        allocations = tuple(_allocations_of(work.connection, request.deployment_id))
        return Placed(request, row.decision_id, answer or _bare(allocations), allocations, False, row.created_at)

    def _reserve(self, work: _Pass) -> None:
        """Write what was chosen, if the store agrees that it fits."""
        work.ledger.hold((), {choice.node_id for _, _, selection, _ in work.reserved for choice in selection.choices})
        for number, request, selection, decision_id in work.reserved:
            expires_at = None if request.ttl_seconds is None else work.now + timedelta(seconds=request.ttl_seconds)
            made = []
            for replica, choice in enumerate(selection.choices):
                if work.ledger.node(choice.node_id) is None or work.ledger.shortages(choice.node_id, request.ask):
                    raise StaleAccountError(f"node {choice.node_id!r} has less room than was thought")
                made.append(
                    work.ledger.add(
                        Allocation(
                            _allocation_id(request, replica),
                            choice.node_id,
                            request.owner,
                            request.deployment_id,
                            request.ask,
                            choice.units,
                            request.ttl_seconds,
                            expires_at,
                            work.now,
                        )
                    )
                )
            outcome = work.outcomes[number]
            assert isinstance(outcome, Placed)
            work.outcomes[number] = Placed(request, decision_id, outcome.answer, tuple(made), True, work.now)
        for number, first in work.again.items():
            found = work.outcomes[first]
            work.outcomes[number] = replace(found, created=False) if isinstance(found, Placed) else found
        _INSERT(
            work.connection,
            [
                (request.deployment_id, request.owner, JsonText(request.json_text), decision_id, {}, work.now)
                for _, request, _, decision_id in work.reserved
            ],
        )
        work.ledger.write()
        if work.decisions:
            self._log.write(work.connection, work.capture, work.decisions, work.now)


def _taken_ids(connection: sa.Connection, requests: Sequence[SelectionRequest]) -> set[str]:
    """Find the deployments for whose replicas somebody has made allocations by hand, under their names."""
    ids = [_allocation_id(request, replica) for request in requests for replica in range(request.replicas)]
    return {row.allocation_id.rpartition(":")[0] for row in connection.execute(_TAKEN, {"ids": ids})}


def _allocation_id(request: SelectionRequest, replica: int) -> str:
    return f"{request.deployment_id}:{replica}"


def _same_in_batch(first: SelectionRequest, again: SelectionRequest, outcome: Placed | ProblemError) -> Placed:
    if _comparable(first.document) != _comparable(again.document):
        raise DeploymentExistsError(
            f"deployment {again.deployment_id!r} is asked for twice at the same time, with different requests",
            deployment_id=again.deployment_id,
        )
    if isinstance(outcome, ProblemError):
        raise outcome
    return outcome


def _comparable(document: dict[str, Any]) -> dict[str, Any]:
    """Give what makes two requests the same: how much is to be told about it does not."""
    return {name: value for name, value in document.items() if name not in _TOLD}


def _bare(allocations: Iterable[Allocation]) -> dict[str, Any]:
    """Answer for a deployment whose decision is no longer on record."""
    nodes = [{"node_id": item.node_id, "units": item.units, "score": None, "scores": {}} for item in allocations]
    return {"fits": True, "nodes": nodes, "considered": None, "rejected": {}, "candidates": [], "changes": []}


def _allocations_of(connection: sa.Connection, deployment_id: str) -> list[Allocation]:
    table = tables.allocations
    query = (
        sa.select(table)
        .where(table.c.deployment_id == deployment_id)
        .order_by(table.c.created_at, table.c.allocation_id)
    )
    return [allocation_of_row(row) for row in connection.execute(query)]


def _nothing_fits(request: SelectionRequest, decision_id: str | None, answer: dict[str, Any]) -> NothingFitsError:
    told = (
        ", ".join(f"{count} {reason}" for reason, count in list(answer["rejected"].items())[:5]) or "there are no nodes"
    )
    way_out = answer["changes"][0]["text"] if answer["changes"] else "ask for it alone to be told what would help"
    return NothingFitsError(
        f"deployment {request.deployment_id!r} fits nowhere: of {answer['considered']} nodes were left out: {told}; {way_out}",
        deployment_id=request.deployment_id,
        decision_id=decision_id,
        considered=answer["considered"],
        rejected=answer["rejected"],
        changes=answer["changes"],
    )
