# SPDX-License-Identifier: GPL-3.0-or-later
"""Decisions on record: what was asked, what the fleet looked like, what was answered; and the same once more, from the record.

The fleet is written down whole at the start of a chain and then as what changed since the pass before, so that a decision costs
little and can still be replayed bit for bit.
"""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa

from node_manager.fleet_index import FleetIndex
from node_manager.fleet_rows import DeploymentRow, read_row, write_row
from node_manager.fragmentation import RequestMix
from node_manager.node_selector import NodeSelector, Selection
from node_manager.problems import DecisionNotFoundError
from node_manager.selection_advice import advise
from node_manager.selection_request import Mode, SelectionRequest
from node_manager.store import Store, tables
from node_manager.store.bulk import BulkInsert
from node_manager.store.documents import JsonText, write_json

_MAX_PASSES = 500
_INSERT = BulkInsert(
    tables.decisions, "decision_id", "deployment_id", "chain_id", "position", "ordinal", "at", "request", "answer"
)
# Advice takes many selections; a batch that fails as a whole must not hold up everybody.
MAX_ADVISED = 8


@dataclass(frozen=True)
class Decision:
    """One decision as it is stored."""

    decision_id: str
    request: SelectionRequest
    answer: dict[str, Any]
    ordinal: int


@dataclass(frozen=True)
class Capture:
    """The fleet before a pass, written down, and where the record goes on after it."""

    chain_id: str
    position: int
    rows: int
    clock: int
    fleet: bytes


class DecisionLog:
    """The record of one manager's decisions. One pass at a time: whoever owns the index locks."""

    def __init__(self, stale_after_seconds: float) -> None:
        self._stale_after = stale_after_seconds
        self._last: Capture | None = None
        self._written_rows = 0

    def capture(self, index: FleetIndex, mix: RequestMix | None, now: float) -> Capture:
        """Write down the fleet as it is now: whole, or what changed since the last pass that was committed.

        Shapes: *mix* None where nothing is to be packed, and so nothing depends on it.
        """
        last = self._last
        whole = last is None or last.position + 1 >= _MAX_PASSES or self._written_rows > 2 * len(index) + 1000
        since = 0 if whole or last is None else last.clock
        places = np.flatnonzero(index.touched[: index.places] > since)
        rows = [write_row(row) for place in places if (row := index.rows[place]) is not None]
        gone = [] if whole else [node_id for node_id in index.removed if node_id not in index.place_of]
        if whole:
            deployments = list(index.deployments.rows.values())
            forgotten = []
        else:
            touched = index.deployments_touched
            known = index.deployments.rows
            deployments = [known[name] for name in touched if name in known]
            forgotten = [name for name in touched if name not in known]
        document = {
            "now": now,
            "stale_after": self._stale_after,
            "mix": None if mix is None else mix.as_data(),
            "rows": rows,
            "gone": gone,
            "deployments": [[row.deployment_id, row.labels, row.repels] for row in deployments],
            "forgotten": forgotten,
        }
        # The lowest level: twice as fast as the usual one, for a tenth more bytes.
        fleet = zlib.compress(write_json(document).encode(), 1)
        if whole or last is None:
            return Capture(str(uuid.uuid4()), 0, len(rows), index.clock, fleet)
        return Capture(last.chain_id, last.position + 1, len(rows), index.clock, fleet)

    def write(self, connection: sa.Connection, capture: Capture, decisions: Sequence[Decision], at: datetime) -> None:
        """Store a pass and its decisions."""
        connection.execute(
            tables.decision_passes.insert(),
            {"chain_id": capture.chain_id, "position": capture.position, "at": at, "fleet": capture.fleet},
        )
        _INSERT(
            connection,
            [
                (
                    decision.decision_id,
                    decision.request.deployment_id,
                    capture.chain_id,
                    capture.position,
                    decision.ordinal,
                    at,
                    JsonText(decision.request.json_text),
                    decision.answer,
                )
                for decision in decisions
            ],
        )

    def committed(self, capture: Capture, index: FleetIndex) -> None:
        """Go on from *capture*: it is in the store."""
        self._written_rows = capture.rows if capture.position == 0 else self._written_rows + capture.rows
        self._last = capture
        for touched in (index.deployments_touched, index.removed):
            for name in [name for name, clock in touched.items() if clock <= capture.clock]:
                del touched[name]


def decide(
    selector: NodeSelector, request: SelectionRequest, now: float, *, advised: bool
) -> tuple[dict[str, Any], Selection]:
    """Select, and say how it came about; what was chosen stays counted as placed in the index.

    The same index, request and time give the same answer.
    """
    selection = selector.select(request, now)
    answer: dict[str, Any] = {
        "fits": selection.fits,
        "nodes": [
            {"node_id": choice.node_id, "units": choice.units, "score": choice.score, "scores": choice.scores}
            for choice in selection.choices
        ],
        "considered": selection.considered,
        "rejected": dict(sorted(selection.rejected.items(), key=lambda item: (-item[1], item[0]))),
        "candidates": [{"node_id": node_id, "score": score} for node_id, score in selection.candidates],
        "changes": [],
    }
    if not selection.fits and advised:
        answer["changes"] = advise(selector, request, now, selection)
    return answer, selection


def read(store: Store, decision_id: str) -> sa.Row[Any]:
    """Read one decision.

    Errors: DecisionNotFoundError.
    """
    with store.read() as connection:
        row = connection.execute(
            sa.select(tables.decisions).where(tables.decisions.c.decision_id == decision_id)
        ).one_or_none()
    if row is None:
        raise DecisionNotFoundError(
            f"decision {decision_id!r} is not on record; selection.keep_decisions says how many are kept",
            decision_id=decision_id,
        )
    return row


def replay(store: Store, decision_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decide once more what was decided, from the record alone; give the stored answer and the new one.

    Errors: DecisionNotFoundError.
    """
    row = read(store, decision_id)
    for found, stored, again in replay_chain(store, row.chain_id, row.position):
        if found == decision_id:
            return stored, again
    raise DecisionNotFoundError(f"what decision {decision_id!r} was based on is no longer on record")


def replay_chain(
    store: Store, chain_id: str, position: int | None = None
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Replay the decisions of one pass, or of a whole chain: (decision_id, stored answer, new answer) one by one."""
    passes, decisions = tables.decision_passes, tables.decisions
    captured = sa.select(passes).where(passes.c.chain_id == chain_id).order_by(passes.c.position)
    wanted = (
        sa.select(decisions).where(decisions.c.chain_id == chain_id).order_by(decisions.c.position, decisions.c.ordinal)
    )
    if position is not None:
        captured, wanted = captured.where(passes.c.position <= position), wanted.where(decisions.c.position == position)
    with store.read() as connection:
        fleets = connection.execute(captured).all()
        by_position: dict[int, list[Any]] = {}
        for row in connection.execute(wanted):
            by_position.setdefault(row.position, []).append(row)
    index = FleetIndex()
    for captured_pass in fleets:
        document = json.loads(zlib.decompress(captured_pass.fleet))
        _apply(index, document)
        mix = RequestMix() if document["mix"] is None else RequestMix.from_data(document["mix"])
        selector = NodeSelector(index, mix, document["stale_after"])
        for row in by_position.get(captured_pass.position, ()):
            request = SelectionRequest.model_validate(row.request)
            answer, selection = decide(selector, request, document["now"], advised=row.ordinal < MAX_ADVISED)
            keep(selector, request, selection)
            # As the store gives it back: with lists for tuples.
            yield row.decision_id, row.answer, json.loads(json.dumps(answer))


def keep(selector: NodeSelector, request: SelectionRequest, selection: Selection) -> None:
    """Let a choice stand in the index, or take it back where the request reserves nothing."""
    if not selection.fits or not request.reserve:
        selector.undo(selection)
    else:
        selector.index.put_deployment(deployment_of(request))


def prune(connection: sa.Connection, most: int) -> None:
    """Forget the oldest decisions beyond *most*, by whole chains: what is kept can be replayed."""
    decisions, passes = tables.decisions, tables.decision_passes
    oldest = connection.scalar(
        sa.select(decisions.c.sequence).order_by(decisions.c.sequence.desc()).offset(most).limit(1)
    )
    if oldest is None:
        return
    kept = sa.select(decisions.c.chain_id).where(decisions.c.sequence > oldest).distinct()
    connection.execute(decisions.delete().where(decisions.c.chain_id.not_in(kept)))
    connection.execute(passes.delete().where(passes.c.chain_id.not_in(kept)))


def _apply(index: FleetIndex, document: dict[str, Any]) -> None:
    for node_id in document["gone"]:
        index.remove(node_id)
    for values in document["rows"]:
        index.put(read_row(values))
    for name in document["forgotten"]:
        index.forget_deployment(name)
    for deployment_id, labels, repels in document["deployments"]:
        index.put_deployment(DeploymentRow(deployment_id, labels, repels))


def deployment_of(request: SelectionRequest) -> DeploymentRow:
    """Take from a request what others must respect."""
    repels = [
        term.model_dump(mode="json")
        for term in request.anti_affinity
        if term.mode is Mode.REQUIRED and term.deployment_id != request.deployment_id and not term.node_labels
    ]
    return DeploymentRow(request.deployment_id, request.labels, repels)
