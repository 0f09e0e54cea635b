# SPDX-License-Identifier: GPL-3.0-or-later
"""Metrics and targets over HTTP, with the store and without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx
import psycopg
import pytest
from job_parts import wait_until
from metrics_scrape import read
from running_service import RunningService
from silent_peer import silent_peer
from sqlalchemy import make_url

# What Prometheus waits for a scrape, unless it is told otherwise.
PROMETHEUS_SECONDS = 10
CALLERS = 60
REFUSED = [
    ({"port": "0"}, "port"),
    ({"port": "65536"}, "port"),
    ({"port": "x"}, "port"),
    ({"limit": "10"}, "limit"),
    ({"status": "broken"}, "status"),
    ({"label": "=x"}, "label"),
    ({"zone": "a\x00"}, "zone"),
]


@pytest.fixture
def postgresql_service(tmp_path: Path, postgresql_database: str) -> Iterator[RunningService]:
    """Run a service on a PostgreSQL that a test may take away."""
    variables = {"NODE_MANAGER_STORAGE__URL": postgresql_database, "NODE_MANAGER_AUTH__CACHE_SECONDS": "0.01"}
    running = RunningService(tmp_path / "home", variables).start()
    yield running
    running.kill()


def register(api: httpx.Client, node_id: str, **more: object) -> None:
    """Register a node that nobody looks at."""
    answer = api.post("/nodes", params={"look": "false"}, json={"node_id": node_id, "address": "127.0.9.7", **more})
    assert answer.status_code == 201


def make_token(service: RunningService, role: str) -> dict[str, str]:
    """Make a token as an operator does, past the running service."""
    command = [sys.executable, "-m", "node_manager", "token", "create", f"test {role}", "--role", role, "-o", "json"]
    made = subprocess.run(command, env=service.variables(), capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, str] = json.loads(made.stdout)
    return found


def test_metrics_come_in_the_form_that_is_asked_for(api: httpx.Client) -> None:
    plain = api.get("/metrics")
    opened = api.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})

    assert (plain.status_code, opened.status_code) == (200, 200)
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert opened.text.endswith("# EOF\n")
    assert read(plain.text).value("node_manager_store_up") == 1


def test_a_manager_leads_also_where_it_looks_at_nodes_by_request_only(service: RunningService) -> None:
    with service.client() as api:
        wait_until(lambda: read(api.get("/metrics").text).value("node_manager_leads") == 1)

        assert service.variables()["NODE_MANAGER_MONITORING__SCHEDULED"] == "false"


@pytest.mark.parametrize("path", ["/metrics", "/prometheus/targets"])
def test_scrapes_need_a_token_that_may_read(service: RunningService, path: str) -> None:
    answers = [
        httpx.get(f"{service.url}{path}", headers=headers, timeout=30) for headers in ({}, {"Authorization": "x"})
    ]

    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(401, "unauthenticated")] * 2


@pytest.mark.parametrize(("role", "status"), [("viewer", 200), ("operator", 200), ("agent", 403)])
def test_a_viewer_is_enough(service: RunningService, role: str, status: int) -> None:
    with service.client(make_token(service, role)["token"]) as api:
        answers = [api.get(path).status_code for path in ("/metrics", "/prometheus/targets")]

    assert answers == [status, status]


def test_targets_are_as_service_discovery_wants_them(api: httpx.Client, node_id: str) -> None:
    register(api, node_id, labels={"test": node_id, "a.b": "1"}, location={"zone": "eu-1a"})

    answer = api.get("/prometheus/targets", params={"label": f"test={node_id}", "port": 9200, "zone": "eu-1a"})

    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    (target,) = answer.json()
    assert target["targets"] == ["127.0.9.7:9200"]
    assert target["labels"]["__meta_node_manager_label_a_b"] == "1"


def test_targets_are_not_paged(own_service: RunningService) -> None:
    own_service.start()
    with own_service.client() as api:
        for number in range(130):
            register(api, f"gw-{number}")
        found = api.get("/prometheus/targets").json()

    assert len(found) == 130


@pytest.mark.parametrize(("query", "field"), REFUSED, ids=[str(query) for query, _ in REFUSED])
def test_targets_refuse_what_they_do_not_know(api: httpx.Client, query: dict[str, str], field: str) -> None:
    answer = api.get("/prometheus/targets", params=query)

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input")
    assert field in answer.json()["detail"]


def test_gauges_of_nodes_are_left_out_of_a_larger_fleet(own_service: RunningService) -> None:
    own_service.environment["NODE_MANAGER_METRICS__MAX_NODES"] = "1"
    own_service.start()
    with own_service.client() as api:
        register(api, "gw-1")
        small = read(api.get("/metrics").text)
        register(api, "gw-2")
        wait_until(lambda: sum(read(api.get("/metrics").text).values("node_manager_nodes")) == 2)
        large = read(api.get("/metrics").text)

    assert (bool(small.of_nodes()), large.of_nodes()) == (True, [])
    assert (small.value("node_manager_per_node_gauges"), large.value("node_manager_per_node_gauges")) == (1, 0)


def test_a_dead_store_leaves_the_metrics_of_the_process(
    postgresql_service: RunningService, postgresql_database: str
) -> None:
    with postgresql_service.client() as api, postgresql_service.client("nm_nobody") as stranger:
        before = read(api.get("/metrics").text)
        take_away(postgresql_database, allow=False)
        wait_until(lambda: read(api.get("/metrics").text).value("node_manager_store_up") == 0)
        without = api.get("/metrics")
        others = [
            api.get("/nodes").status_code,
            api.get("/prometheus/targets").status_code,
            stranger.get("/metrics").status_code,
        ]
        take_away(postgresql_database, allow=True)
        wait_until(lambda: read(api.get("/metrics").text).value("node_manager_store_up") == 1)
        after = stranger.get("/metrics").status_code

    found = read(without.text)
    assert before.value("node_manager_store_up") == 1
    assert (without.status_code, found.value("process_open_fds") > 0) == (200, True)
    assert "node_manager_nodes" not in found.samples
    assert others == [503, 503, 503]
    assert after == 401


def test_a_store_that_says_nothing_holds_up_no_scrape(tmp_path: Path, postgresql_database: str) -> None:
    with silent_peer(postgresql_database) as peer, ThreadPoolExecutor(CALLERS) as callers:
        variables = {"NODE_MANAGER_STORAGE__URL": peer.url, "NODE_MANAGER_AUTH__CACHE_SECONDS": "0.01"}
        service = RunningService(tmp_path / "home", variables).start()
        try:
            with service.client() as api, service.client("nm_nobody") as stranger:
                before = read(api.get("/metrics").text)
                peer.fall_silent()
                # More than there are threads for calls, all of which wait for the store.
                over = Event()
                waiting = [callers.submit(call_until, over, api) for _ in range(CALLERS)]
                scrapes = [api.get("/metrics", timeout=PROMETHEUS_SECONDS) for _ in range(4)]
                refused = stranger.get("/metrics", timeout=PROMETHEUS_SECONDS).status_code
                peer.speak()
                over.set()
                answers = {status for found in waiting for status in found.result(60)}
                wait_until(lambda: read(api.get("/metrics").text).value("node_manager_store_up") == 1)
        finally:
            service.kill()

    assert before.value("node_manager_store_up") == 1
    assert [read(scrape.text).value("node_manager_store_up") for scrape in scrapes] == [0] * 4
    assert max(scrape.elapsed.total_seconds() for scrape in scrapes) < PROMETHEUS_SECONDS / 2
    assert refused == 503
    assert {503} <= answers <= {200, 503}


def call_until(over: Event, api: httpx.Client) -> list[int]:
    """Ask for nodes over and over; give the statuses."""
    found = []
    while not over.is_set():
        found.append(api.get("/nodes").status_code)
    return found


def test_a_token_that_is_revoked_is_not_remembered(
    postgresql_service: RunningService, postgresql_database: str
) -> None:
    token = make_token(postgresql_service, "viewer")
    with postgresql_service.client(token["token"]) as api:
        good = api.get("/metrics").status_code
        revoke(postgresql_database, token["token_id"])
        wait_until(lambda: api.get("/metrics").status_code == 401)
        take_away(postgresql_database, allow=False)
        wait_until(lambda: api.get("/metrics").status_code == 503)

    assert good == 200


def take_away(url: str, *, allow: bool) -> None:
    """Let nobody into a database, and put out who is in; or let them in again."""
    parsed = make_url(url)
    name = parsed.database
    plain = parsed.set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS {str(allow).lower()}'.encode())
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])


def revoke(url: str, token_id: str) -> None:
    """Revoke a token as another manager does."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute("UPDATE tokens SET revoked_at = 1 WHERE token_id = %s", [token_id])
