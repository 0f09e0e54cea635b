# SPDX-License-Identifier: GPL-3.0-or-later
"""What selection reads of a node is what registry, observations and allocator wrote of it, on either engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders import (
    START,
    FakeClock,
    make_container,
    make_containers,
    make_declaration,
    make_facts,
    make_report,
    make_request,
    make_sample,
    make_settings,
    observe,
    seconds,
)
from fleet_rows_builder import make_deployment, make_row, make_selection_request
from node_manager.decisions import deployment_of
from node_manager.domain import Admin
from node_manager.fleet_rows import NodeRow, deployment_row, load_deployments, load_rows, read_row, write_row
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.resource_allocator import ResourceAllocator
from node_manager.settings import Settings
from node_manager.store import Store


@pytest.fixture
def settings() -> Settings:
    """Give settings with a type that is overcommitted."""
    return make_settings(None, packed={"reserved": {"cpu_millicores": 1000}, "overcommit": {"cpu": 2.0}})


def load(store: Store, settings: Settings, now: Any = START, node_ids: list[str] | None = None) -> dict[str, NodeRow]:
    """Read rows by node."""
    with store.read() as connection:
        return {row.node_id: row for row in load_rows(connection, settings, now, node_ids)}


def test_load_rows_reads_all_that_is_known_of_a_node(
    store: Store, settings: Settings, registry: NodeRegistry, log: ObservationLog, allocator: ResourceAllocator, clock: FakeClock
) -> None:  # fmt: skip
    registry.register(
        make_declaration(
            "n1",
            node_type="packed",
            labels={"line": "x"},
            location={"region": "r", "zone": "a", "site": "a1", "latitude": 48.5, "longitude": -11.0},
            capacity={"cpu_millicores": 4000, "gpu": 2},
        )
    )
    sample = make_sample(12.5, containers=make_containers(make_container("b"), {**make_container("a"), "image": "z:9"}))
    told = [("facts", make_facts(features=["systemd", "docker"])), ("report", make_report()), ("sample", sample)]
    log.record([observe(kind, data, START, "n1") for kind, data in told])
    clock.advance(5)
    resources = {"cpu_millicores": 300, "gpu": {"count": 1, "share_milli": 250}}
    allocator.allocate("n1", make_request("a1", resources, deployment_id="web"))

    row = load(store, settings)["n1"]

    assert row == NodeRow(
        node_id="n1",
        node_type="packed",
        region="r",
        zone="a",
        site="a1",
        latitude=48.5,
        longitude=-11.0,
        labels={"line": "x"},
        features=["docker", "systemd"],
        images=["app:1.2", "z:9"],
        blocked=None,
        last_contact=START.timestamp(),
        health="healthy",
        health_since=START.timestamp(),
        effective={**row.capacity, "cpu_millicores": 6000},
        units={"gpu": ["0", "1"]},
        allocated={"cpu_millicores": 300},
        used_units={"gpu": {"0": 250}},
        capacity={"cpu_millicores": 4000, "gpu": 2, "memory_mib": 4096, "disk_mib": 30000, "network_mbps": 1000},
        cpu_percent=12.5,
        memory_percent=30.0,
        unseen={"cpu_millicores": 300},
        deployments={"web": 1},
        pressed_until=None,
    )
    assert read_row(json.loads(json.dumps(write_row(row)))) == row


def test_load_rows_of_a_node_that_nobody_has_seen(store: Store, settings: Settings, registry: NodeRegistry) -> None:
    registry.register(make_declaration("n1"))

    row = load(store, settings)["n1"]

    assert (row.blocked, row.last_contact, row.health, row.effective) == ("unhealthy", None, "unknown", {})
    assert (row.node_type, row.features, row.images, row.cpu_percent) == (None, [], [], None)


def test_load_rows_counts_as_unseen_what_came_since_the_sample(
    store: Store, settings: Settings, registry: NodeRegistry, log: ObservationLog, allocator: ResourceAllocator, clock: FakeClock
) -> None:  # fmt: skip
    registry.register(make_declaration("n1", capacity={"memory_mib": 100, "gpu": 2}))
    found = []

    allocator.allocate("n1", make_request("a1", {"memory_mib": 10, "gpu": 1}))
    found.append(load(store, settings)["n1"].unseen)
    # Reserved in the very moment of the sample it can't be in it yet.
    log.record([observe("sample", make_sample(), clock.now, "n1")])
    found.append(load(store, settings)["n1"].unseen)
    log.record([observe("sample", make_sample(), clock.advance(1), "n1")])
    found.append(load(store, settings)["n1"].unseen)
    clock.advance(1)
    allocator.allocate("n1", make_request("a2", {"memory_mib": 7}))
    found.append(load(store, settings)["n1"].unseen)

    assert found == [{"memory_mib": 10}, {"memory_mib": 10}, {}, {"memory_mib": 7}]


BLOCKS: dict[str, tuple[Admin, tuple[str, str] | None, str | None]] = {
    "well": (Admin.ACTIVE, ("critical", "passed"), None),
    "a warning": (Admin.ACTIVE, ("warning", "failed"), None),
    "a critical failure": (Admin.ACTIVE, ("critical", "failed"), "unhealthy"),
    "never checked": (Admin.ACTIVE, None, "unhealthy"),
    "cordoned": (Admin.CORDONED, ("critical", "passed"), "not_active"),
    "in maintenance and ill": (Admin.MAINTENANCE, ("critical", "failed"), "not_active"),
}


@pytest.mark.parametrize(("admin", "check", "expected"), BLOCKS.values(), ids=BLOCKS)
def test_load_rows_tells_what_keeps_work_away(
    store: Store,
    settings: Settings,
    registry: NodeRegistry,
    log: ObservationLog,
    admin: Admin,
    check: tuple[str, str] | None,
    expected: str | None,
) -> None:
    registry.register(make_declaration("n1"))
    registry.set_admin("n1", admin, "test")
    if check is not None:
        log.record([observe("report", make_report(check), START, "n1")])

    found = load(store, settings)["n1"].blocked

    assert found == expected
    # The same rule by another way: what the API calls schedulable.
    assert (found is None) is registry.get("n1").schedulable(START, seconds(180))


def test_load_rows_takes_overcommit_away_under_pressure_until_it_is_over(
    store: Store, settings: Settings, registry: NodeRegistry, log: ObservationLog
) -> None:
    registry.register(make_declaration("n1", node_type="packed", capacity={"cpu_millicores": 2000}))
    sample = make_sample()
    sample["cpu"]["pressure"] = {"some_avg60_percent": 60.0}
    log.record([observe("sample", sample, START, "n1")])

    found = [load(store, settings, START + seconds(wait))["n1"] for wait in (0, 599, 600)]

    assert [row.effective["cpu_millicores"] for row in found] == [1000, 1000, 2000]
    assert [row.pressed_until for row in found] == [START.timestamp() + 600] * 2 + [None]


def test_load_rows_reads_the_nodes_that_are_asked_for(store: Store, settings: Settings, registry: NodeRegistry) -> None:
    for node_id in ("n1", "n2", "n3"):
        registry.register(make_declaration(node_id))

    found = load(store, settings, START, ["n1", "n3", "gone"])

    assert sorted(found) == ["n1", "n3"]


def test_load_deployments_without_any(store: Store) -> None:
    with store.read() as connection:
        assert load_deployments(connection) == load_deployments(connection, ["web"]) == []


def test_deployment_row_keeps_what_others_must_respect() -> None:
    request = make_selection_request(
        labels={"app": "web"},
        anti_affinity=[
            {"deployment_id": "web"},
            {"deployment_id": "db", "scope": "zone"},
            {"deployment_labels": {"app": "web"}, "scope": "site"},
            {"deployment_id": "cache", "mode": "preferred"},
            {"node_labels": {"disk": "hdd"}},
        ],
    )

    row = deployment_row("web", json.loads(json.dumps(request.document)))

    assert (row.deployment_id, row.labels) == ("web", {"app": "web"})
    assert [(term["deployment_id"], term["deployment_labels"], term["scope"]) for term in row.repels] == [
        ("db", None, "zone"),
        (None, {"app": "web"}, "site"),
    ]
    assert row == deployment_of(request)
    assert deployment_row("old", {}) == make_deployment("old")


def test_write_row_keeps_every_value() -> None:
    row = make_row(latitude=0.1 + 0.2, units={"gpu": ["0"]}, used_units={"gpu": {"0": 460}}, pressed_until=1 / 3)

    assert read_row(json.loads(json.dumps(write_row(row)))) == row
