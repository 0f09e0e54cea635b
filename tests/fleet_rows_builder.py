# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes as selection sees them, made quickly: rows, indexes, requests; and one selection over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from node_manager.fleet_index import FleetIndex
from node_manager.fleet_rows import DeploymentRow, NodeRow
from node_manager.fragmentation import RequestMix
from node_manager.node_selector import NodeSelector, Selection
from node_manager.selection_request import SelectionRequest

NOW = 1_795_370_400.0
STALE_AFTER_SECONDS = 180.0
CAPACITY = {"cpu_millicores": 4000, "memory_mib": 8000, "disk_mib": 100_000, "network_mbps": 1000}


def make_row(node_id: str = "n1", **changes: Any) -> NodeRow:
    """Give an idle node with 4 CPUs and 8000 MiB in zone a, at no known place; *units* alone make devices."""
    values: dict[str, Any] = {
        "node_id": node_id,
        "node_type": "server",
        "region": "r",
        "zone": "a",
        "site": "a1",
        "latitude": None,
        "longitude": None,
        "labels": {},
        "features": [],
        "images": [],
        "blocked": None,
        "last_contact": NOW,
        "health": "healthy",
        "health_since": NOW - 3600,
        "effective": CAPACITY,
        "units": {},
        "allocated": {},
        "used_units": {},
        "capacity": CAPACITY,
        "cpu_percent": 10.0,
        "memory_percent": 10.0,
        "unseen": {},
        "deployments": {},
        "pressed_until": None,
    }
    return NodeRow(**{**values, **changes})


def make_rows(count: int, **changes: Any) -> list[NodeRow]:
    """Give equal nodes n00, n01 and so on."""
    return [make_row(f"n{number:02d}", **changes) for number in range(count)]


def in_places(places: Mapping[str, tuple[str | None, str | None, str | None]], **changes: Any) -> list[NodeRow]:
    """Give nodes by id, each in its region, zone and site."""
    return [
        make_row(node_id, region=region, zone=zone, site=site, **changes)
        for node_id, (region, zone, site) in places.items()
    ]


def make_index(rows: Iterable[NodeRow], deployments: Iterable[DeploymentRow] = ()) -> FleetIndex:
    """Build an index."""
    index = FleetIndex()
    for row in rows:
        index.put(row)
    for deployment in deployments:
        index.put_deployment(deployment)
    return index


def make_deployment(
    deployment_id: str, labels: Mapping[str, str] | None = None, *repels: Mapping[str, Any]
) -> DeploymentRow:
    """Give a placed deployment; *repels* are its required anti-affinity terms."""
    return DeploymentRow(
        deployment_id, labels or {}, [{"mode": "required", "scope": "node", **term} for term in repels]
    )


def make_selection_request(
    deployment_id: str = "web", resources: dict[str, Any] | None = None, **more: Any
) -> SelectionRequest:
    """Ask for one replica of 100 millicores, or for what is given."""
    return SelectionRequest.model_validate(
        {
            "deployment_id": deployment_id,
            "owner": "shop",
            "resources": resources or {"cpu_millicores": 100},
            **more,
        }
    )


def make_selector(index: FleetIndex) -> NodeSelector:
    """Give a selector that has seen no requests."""
    return NodeSelector(index, RequestMix(), STALE_AFTER_SECONDS)


def select(index: FleetIndex, request: SelectionRequest | None = None, **more: Any) -> Selection:
    """Select over an index; what is chosen stays counted as placed."""
    return make_selector(index).select(request or make_selection_request(**more), NOW)


def chosen(selection: Selection) -> list[str]:
    """Name the nodes of a selection, in order of their ids."""
    return sorted(choice.node_id for choice in selection.choices)
