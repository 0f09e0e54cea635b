# SPDX-License-Identifier: GPL-3.0-or-later
"""What a request may say, and what contradicts itself in it."""

from __future__ import annotations

from typing import Any

import pytest
from fleet_rows_builder import make_selection_request
from node_manager.selection_request import Scope, SelectionRequest
from pydantic import ValidationError

DB = {"deployment_id": "db"}
OWN = {"deployment_id": "web"}
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "near and away": ({"affinity": [DB], "anti_affinity": [DB]}, r"affinity\[0\] and anti_affinity\[0\]"),
    "near and away by labels": (
        {
            "affinity": [DB, {"node_labels": {"a": "1", "b": "2"}}],
            "anti_affinity": [{"node_labels": {"b": "2", "a": "1"}}],
        },
        r"affinity\[1\] and anti_affinity\[0\]",
    ),
    "together in a zone, spread over zones": (
        {"replicas": 2, "affinity": [{**OWN, "scope": "zone"}], "spread": {"scope": "zone"}},
        "spread forbids more than 1",
    ),
    "all listed are excluded": (
        {"constraints": {"node_ids": ["n1", "n2"], "exclude_node_ids": ["n2", "n1", "n3"]}},
        "all of node_ids are in exclude_node_ids",
    ),
    "no target": ({"affinity": [{"scope": "zone"}]}, "exactly one of"),
    "two targets": ({"affinity": [{**DB, "node_labels": {"a": "b"}}]}, "exactly one of"),
}
FINE: dict[str, dict[str, Any]] = {
    "preferred against required": {"affinity": [{**DB, "mode": "preferred"}], "anti_affinity": [DB]},
    "near in the zone, away from the node": {"affinity": [{**DB, "scope": "zone"}], "anti_affinity": [DB]},
    "together and spread, one replica": {"affinity": [{**OWN, "scope": "zone"}], "spread": {"scope": "zone"}},
    "together in a zone, spread over nodes": {
        "replicas": 2,
        "affinity": [{**OWN, "scope": "zone"}],
        "spread": {"scope": "node"},
    },
    "as many together as the skew allows": {
        "replicas": 2,
        "affinity": [{**OWN, "scope": "zone"}],
        "spread": {"scope": "zone", "max_skew": 2},
    },
    "some listed are excluded": {"constraints": {"node_ids": ["n1", "n2"], "exclude_node_ids": ["n1"]}},
}


@pytest.mark.parametrize(("change", "told"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_selection_request_refuses_what_contradicts_itself(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        make_selection_request(**change)


@pytest.mark.parametrize("change", FINE.values(), ids=FINE)
def test_selection_request_takes_what_can_be_met(change: dict[str, Any]) -> None:
    make_selection_request(**change)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["latitude", "longitude", "max_km"])
def test_selection_request_refuses_places_that_are_no_numbers(name: str, number: float) -> None:
    within = {"latitude": 0.0, "longitude": 0.0, "max_km": 1.0, name: number}

    with pytest.raises(ValidationError, match=name):
        make_selection_request(constraints={"within": within})


def test_selection_request_takes_one_value_for_a_list_of_one() -> None:
    request = make_selection_request(constraints={"labels": {"line": "x"}})

    assert request == make_selection_request(constraints={"labels": {"line": ["x"]}})


@pytest.mark.parametrize(
    ("term", "own"),
    [
        (OWN, True),
        (DB, False),
        ({"deployment_labels": {"app": "web"}}, True),
        ({"deployment_labels": {"app": "web", "tier": "front"}}, True),
        ({"deployment_labels": {"app": "web", "tier": "back"}}, False),
        ({"node_labels": {"app": "web"}}, False),
    ],
    ids=str,
)
def test_is_own_tells_terms_about_the_deployment_itself(term: dict[str, Any], *, own: bool) -> None:
    request = make_selection_request(labels={"app": "web", "tier": "front"}, affinity=[term])

    assert request.is_own(request.affinity[0]) is own


@pytest.mark.parametrize(
    ("mode", "scope", "expected"),
    [("required", "zone", True), ("preferred", "zone", False), ("required", "site", False)],
)
def test_keeps_together_is_about_one_scope(mode: str, scope: str, *, expected: bool) -> None:
    request = make_selection_request(affinity=[{**OWN, "mode": mode, "scope": scope}])

    assert request.keeps_together(request.affinity[0], Scope.ZONE) is expected


def test_document_says_all_that_is_needed_to_ask_again() -> None:
    request = make_selection_request(
        resources={"gpu": {"count": 2, "share_milli": 300}, "memory_mib": 5},
        constraints={"within": {"latitude": 1.5, "longitude": -2.25, "max_km": 7}},
        affinity=[{"mode": "preferred", "scope": "site", "weight": 7, "deployment_labels": {"a": "b"}}],
        spread={"scope": "zone", "max_skew": 3},
        ttl_seconds=5,
    )

    assert SelectionRequest.model_validate(request.document) == request
