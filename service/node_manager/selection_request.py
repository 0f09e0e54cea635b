# SPDX-License-Identifier: GPL-3.0-or-later
"""What somebody asks of node selection: the body of POST /deployment/node-selection, and what contradicts itself in it.

Models only. What depends on the fleet is the selector's business.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from node_manager.declarations import NodeId, PlaceName
from node_manager.node_types import TYPE_NAME_PATTERN
from node_manager.resources import Ask, Resources, ask_of

# Allocations of a deployment are named after it, which a colon keeps apart from other ids.
DEPLOYMENT_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
OWNER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$"

DeploymentId = Annotated[str, Field(pattern=DEPLOYMENT_ID_PATTERN, examples=["web-1"])]
Owner = Annotated[str, Field(pattern=OWNER_PATTERN, examples=["team-a"])]
LabelKey = Annotated[str, Field(min_length=1, max_length=63)]
LabelValue = Annotated[str, Field(max_length=255)]


class Strategy(StrEnum):
    """What a good choice is."""

    BALANCED = "balanced"
    BINPACK = "binpack"
    SPREAD = "spread"


class Scope(StrEnum):
    """How far a rule reaches."""

    NODE = "node"
    ZONE = "zone"
    SITE = "site"
    REGION = "region"


class Mode(StrEnum):
    """Whether a rule must hold."""

    REQUIRED = "required"
    PREFERRED = "preferred"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Part(BaseModel):
    """One part of a request: closed, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Point(Part):
    """A place on the earth."""

    latitude: float = Field(strict=True, ge=-90, le=90, description="Degrees north")
    longitude: float = Field(strict=True, ge=-180, le=180, description="Degrees east")


class Within(Point):
    """A circle on the earth."""

    max_km: float = Field(strict=True, gt=0, le=20_100, description="Largest distance, great circle")


class Constraints(Part):
    """What each chosen node must be."""

    node_types: list[Annotated[str, Field(pattern=TYPE_NAME_PATTERN)]] = Field(
        default_factory=list, max_length=32, description="One of these types"
    )
    labels: dict[
        LabelKey, Annotated[list[LabelValue], BeforeValidator(_as_list), Field(min_length=1, max_length=32)]
    ] = Field(default_factory=dict, max_length=32, description="All of these labels; of several values, one")
    features: list[Annotated[str, Field(min_length=1, max_length=255)]] = Field(
        default_factory=list, max_length=32, description="All of these features"
    )
    regions: list[PlaceName] = Field(default_factory=list, max_length=64, description="In one of these regions")
    zones: list[PlaceName] = Field(default_factory=list, max_length=64, description="In one of these zones")
    sites: list[PlaceName] = Field(default_factory=list, max_length=64, description="At one of these sites")
    node_ids: list[NodeId] = Field(default_factory=list, max_length=1000, description="One of these nodes")
    exclude_node_ids: list[NodeId] = Field(default_factory=list, max_length=1000, description="None of these nodes")
    within: Within | None = Field(None, description="No further away than this")

    @model_validator(mode="after")
    def _some_node_is_left(self) -> Constraints:
        if self.node_ids and not set(self.node_ids).difference(self.exclude_node_ids):
            raise ValueError("all of node_ids are in exclude_node_ids; take some out of one of the lists")
        return self


class Term(Part):
    """Nearness to something, or distance from it: one target, one scope."""

    mode: Mode = Field(Mode.REQUIRED, description="required: must hold; preferred: counts in the score")
    scope: Scope = Field(Scope.NODE, description="On the same node, or in the same zone, site or region")
    weight: int = Field(1, strict=True, ge=1, le=100, description="Of a preferred term, against the others")
    deployment_id: DeploymentId | None = Field(None, description="Target: the replicas of this deployment")
    deployment_labels: dict[LabelKey, LabelValue] | None = Field(
        None, min_length=1, max_length=16, description="Target: the replicas of deployments with all of these labels"
    )
    node_labels: dict[LabelKey, LabelValue] | None = Field(
        None, min_length=1, max_length=16, description="Target: nodes with all of these labels"
    )

    @model_validator(mode="after")
    def _has_one_target(self) -> Term:
        if sum(target is not None for target in (self.deployment_id, self.deployment_labels, self.node_labels)) != 1:
            raise ValueError("expected exactly one of deployment_id, deployment_labels and node_labels")
        return self


class Spread(Part):
    """An even distribution of the replicas."""

    scope: Scope = Field(Scope.ZONE, description="Over nodes, zones, sites or regions")
    max_skew: int = Field(
        1, strict=True, ge=1, le=1000, description="Largest difference between the fullest and the emptiest"
    )


class SelectionRequest(Part):
    """A deployment that needs nodes."""

    deployment_id: DeploymentId = Field(description="Chosen by the caller; makes repeated calls harmless")
    owner: Owner = Field(description="Whose quota counts")
    replicas: int = Field(
        1, strict=True, ge=1, le=10_000, description="How many nodes' worth; several may share a node"
    )
    resources: Resources
    labels: dict[LabelKey, LabelValue] = Field(
        default_factory=dict, max_length=16, description="The deployment's own labels, for others' affinities"
    )
    constraints: Constraints = Field(default_factory=Constraints, description=Constraints.__doc__)
    affinity: list[Term] = Field(default_factory=list, max_length=16, description="What to be near to")
    anti_affinity: list[Term] = Field(default_factory=list, max_length=16, description="What to be away from")
    spread: Spread | None = Field(None, description="How evenly the replicas must be distributed")
    near: Point | None = Field(None, description="The nearer to this point the better")
    images: list[Annotated[str, Field(min_length=1, max_length=255)]] = Field(
        default_factory=list, max_length=16, description="Container images; nodes that have them score higher"
    )
    strategy: Strategy = Field(Strategy.BALANCED, description="What a good choice is")
    ttl_seconds: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        None, description="Release after this time unless confirmed; left out: keep until deleted"
    )
    reserve: bool = Field(
        True, strict=True, description="Reserve what is chosen; false: only say what would be chosen, on record"
    )
    dry_run: bool = Field(False, strict=True, description="Like reserve false, and leave no record")
    explain: bool = Field(False, strict=True, description="Also show the best nodes that were not chosen")

    @model_validator(mode="after")
    def _does_not_contradict_itself(self) -> SelectionRequest:
        near = {_target(term): number for number, term in enumerate(self.affinity) if term.mode is Mode.REQUIRED}
        for number, term in enumerate(self.anti_affinity):
            if term.mode is Mode.REQUIRED and _target(term) in near:
                raise ValueError(
                    f"affinity[{near[_target(term)]}] and anti_affinity[{number}] require the opposite of each other; "
                    "leave one of them out or make it preferred"
                )
        if self.spread is not None and self.replicas > self.spread.max_skew:
            together = next(
                (n for n, term in enumerate(self.affinity) if self.keeps_together(term, self.spread.scope)), None
            )
            if together is not None:
                raise ValueError(
                    f"affinity[{together}] keeps all replicas in one {self.spread.scope}, spread forbids more than "
                    f"{self.spread.max_skew} there; leave one of them out"
                )
        return self

    @cached_property
    def ask(self) -> Ask:
        """Give what one replica needs."""
        return ask_of(self.resources)

    @cached_property
    def document(self) -> dict[str, Any]:
        """Give the request as JSON has it, everything spelled out."""
        return self.model_dump(mode="json")

    @cached_property
    def json_text(self) -> str:
        """Give the document as it is stored."""
        return self.model_dump_json()

    def is_own(self, term: Term) -> bool:
        """Tell whether a term's target includes the replicas of this very deployment."""
        if term.deployment_id is not None:
            return term.deployment_id == self.deployment_id
        return term.deployment_labels is not None and term.deployment_labels.items() <= self.labels.items()

    def keeps_together(self, term: Term, scope: Scope) -> bool:
        """Tell whether a required affinity forces all replicas into one domain of *scope*."""
        return term.mode is Mode.REQUIRED and term.scope is scope and term.deployment_id == self.deployment_id


def _target(term: Term) -> tuple[Any, ...]:
    return (
        term.scope,
        term.deployment_id,
        *(tuple(sorted((labels or {}).items())) for labels in (term.deployment_labels, term.node_labels)),
    )
