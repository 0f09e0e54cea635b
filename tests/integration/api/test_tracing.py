# SPDX-License-Identifier: GPL-3.0-or-later
"""Traces of requests, as a collector gets them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from otlp_receiver import OtlpReceiver, otlp_receiver
from running_service import RunningService, free_port

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    """Run a collector."""
    with otlp_receiver() as running:
        yield running


@pytest.fixture
def traced_service(own_service: RunningService, receiver: OtlpReceiver) -> RunningService:
    """Start a service that traces."""
    own_service.environment |= {
        "NODE_MANAGER_TRACING__ENABLED": "true",
        "NODE_MANAGER_LOGGING__FORMAT": "json",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    return own_service.start()


def test_request_becomes_a_span_of_the_callers_trace(traced_service: RunningService, receiver: OtlpReceiver) -> None:
    with traced_service.client() as api:
        api.get("/nodes/gw-1", headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
        api.post("/nodes", params={"look": "false"}, json={"node_id": "gw-1", "address": "127.0.9.7"})
        api.get("/healthz")

    read = receiver.wait_for(lambda span: span.name == "GET /nodes/{node_id}")
    written = receiver.wait_for(lambda span: span.name == "POST /nodes")
    assert (read.trace_id, read.parent_id, read.service) == (TRACE_ID, PARENT_ID, "node-manager")
    assert (read.attributes["http.route"], read.attributes["http.response.status_code"]) == ("/nodes/{node_id}", 404)
    assert (written.attributes["http.response.status_code"], written.parent_id) == (201, "")
    traced_service.stop()
    lines = [json.loads(line) for line in traced_service.log.splitlines() if line.startswith("{")]
    told = {line["path"]: line["trace_id"] for line in lines if line["event"] == "request"}
    assert told == {"/nodes/gw-1": TRACE_ID, "/nodes": written.trace_id}
    assert set(receiver.names) == {"GET /nodes/{node_id}", "POST /nodes"}


def test_service_runs_and_ends_without_its_collector(own_service: RunningService) -> None:
    own_service.environment |= {
        "NODE_MANAGER_TRACING__ENABLED": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
    }
    own_service.start()
    with own_service.client() as api:
        assert api.get("/nodes").status_code == 200
    begun = time.monotonic()

    own_service.stop()

    assert time.monotonic() - begun < 8


def test_service_that_does_not_trace_sends_nothing(own_service: RunningService, receiver: OtlpReceiver) -> None:
    own_service.environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    own_service.start()
    with own_service.client() as api:
        assert api.get("/nodes").status_code == 200

    own_service.stop()

    assert receiver.names == []
