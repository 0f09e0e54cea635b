# SPDX-License-Identifier: GPL-3.0-or-later
"""What the API takes in and gives out around deployments, decisions and traffic."""

from __future__ import annotations

from typing import Any

from pydantic import AwareDatetime, Field

from node_manager.api.schemas import Input, Output
from node_manager.api.schemas_allocation import AllocationOut
from node_manager.domain import Health, Status
from node_manager.load_distribution import TrafficState
from node_manager.selection_request import SelectionRequest, Strategy


class SelectionBatch(Input):
    """Many deployments, placed in one pass."""

    deployments: list[SelectionRequest] = Field(min_length=1, max_length=5000)


class ChosenNodeOut(Output):
    """One replica's node: scores are from 0 to 100; null where the decision is no longer on record."""

    node_id: str
    allocation_id: str | None
    units: dict[str, dict[str, int]]
    score: float | None
    scores: dict[str, float]


class CandidateOut(Output):
    """A good node that was not chosen."""

    node_id: str
    score: float


class PlacementOut(Output):
    """What was chosen for a deployment."""

    deployment_id: str
    owner: str
    decision_id: str | None
    strategy: Strategy
    reserved: bool
    nodes: list[ChosenNodeOut]
    considered: int | None
    rejected: dict[str, int]
    candidates: list[CandidateOut]
    expires_at: AwareDatetime | None
    created_at: AwareDatetime


class BatchItemOut(Output):
    """What became of one deployment of a batch: a placement, or a problem as a single request would get it."""

    status: int
    placement: PlacementOut | None
    problem: dict[str, Any] | None


class BatchOut(Output):
    """What became of a batch, in its order."""

    results: list[BatchItemOut]


class DeploymentNodeOut(AllocationOut):
    """One replica and the node that it is on."""

    address: str
    status: Status
    health: Health


class DeploymentNodesOut(Output):
    """Where a deployment's replicas are; request is null where they were allocated one by one."""

    deployment_id: str
    request: dict[str, Any] | None
    nodes: list[DeploymentNodeOut]


class ReleasedDeploymentOut(Output):
    """What was released."""

    deployment_id: str
    released: int


class DecisionOut(Output):
    """A decision on record."""

    decision_id: str
    deployment_id: str
    at: AwareDatetime
    request: dict[str, Any]
    fits: bool
    nodes: list[dict[str, Any]]
    considered: int
    rejected: dict[str, int]
    candidates: list[CandidateOut]
    changes: list[dict[str, Any]]


class ReplayOut(Output):
    """A decision, made once more."""

    decision_id: str
    identical: bool
    stored: dict[str, Any]
    replayed: dict[str, Any]


class TrafficNodeOut(Output):
    """One node's share of the traffic, in points of 100."""

    node_id: str
    address: str
    weight: int
    state: TrafficState
    reason: str


class TrafficOut(Output):
    """How traffic is to be shared among a deployment's nodes."""

    deployment_id: str
    at: AwareDatetime
    nodes: list[TrafficNodeOut]


class LoadItemOut(Output):
    """How busy a node is, and whether it takes new work."""

    node_id: str
    region: str | None
    zone: str | None
    site: str | None
    health: Health
    schedulable: bool
    reason: str | None
    cpu_percent: float | None
    memory_percent: float | None
    idle_percent: float
    deployments: int
    last_contact_at: AwareDatetime | None


class LoadOut(Output):
    """The load and health of nodes."""

    at: AwareDatetime
    items: list[LoadItemOut]


class MoveOut(Output):
    """One replica that had better be elsewhere; the gain is how far the imbalance falls."""

    allocation_id: str
    deployment_id: str
    from_node: str
    to_node: str
    gain: float
    reason: str
    since: AwareDatetime


class OptimizationOut(Output):
    """Advice; more says that a bound held back other moves. Imbalance is 0 where all nodes are equally full."""

    at: AwareDatetime
    imbalance_before: float
    imbalance_after: float
    moves: list[MoveOut]
    more: bool
