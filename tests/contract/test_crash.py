# SPDX-License-Identifier: GPL-3.0-or-later
"""A manager killed in the middle of a thousand writes: what it acknowledged is there, and nothing is there by half."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from builders import make_declaration, make_settings
from node_manager.domain import Health
from node_manager.events import EventType
from node_manager.node_filters import NodeFilter
from node_manager.node_registry import NodeRegistry
from node_manager.store import Store, open_store, tables
from stored import Rows

WRITER = Path(__file__).with_name("crash_writer.py")


def write_until_killed(url: str, acknowledgements: int) -> list[tuple[str, str, int]]:
    """Run the writer, kill it in the middle of the write after that many, and give all that it acknowledged."""
    environment = {**os.environ, "PYTHONPATH": str(WRITER.parents[1])}
    with subprocess.Popen(
        [sys.executable, str(WRITER), url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        lines = [writer.stdout.readline() for _ in range(acknowledgements)]
        writer.send_signal(signal.SIGKILL)
        # What it committed and said between our last look and its end counts too.
        lines += writer.stdout.readlines()
        assert (writer.wait(10), writer.stderr.read()) == (-signal.SIGKILL, "")
    return [
        (what, node_id, int(count)) for what, node_id, count in (line.split() for line in lines if line[-1] == "\n")
    ]


@pytest.fixture(params=[1, 83, 342], ids="killed-after-{}".format)
def acknowledged(request: pytest.FixtureRequest, store_url: str) -> list[tuple[str, str, int]]:
    """Give what a killed writer had acknowledged."""
    return write_until_killed(store_url, request.param)


def test_kill_loses_nothing_acknowledged_and_leaves_nothing_half(
    acknowledged: list[tuple[str, str, int]], store_url: str
) -> None:
    with closing(open_store(store_url)) as store:
        assert_all_there(store, acknowledged)
        assert_nothing_half(store)
        assert_sound(store)
        assert_takes_writes(store)


def assert_all_there(store: Store, acknowledged: list[tuple[str, str, int]]) -> None:
    """Find each acknowledged write."""
    rows = Rows(store)
    generations = {row["node_id"]: row["generation"] for row in rows.of(tables.nodes)}
    samples = {row["node_id"]: row["sample"]["cpu"]["use_percent"] for row in rows.of(tables.node_samples)}
    for what, node_id, count in acknowledged:
        found = samples if what == "observed" else generations
        assert found[node_id] >= count, (what, node_id, count)


def assert_nothing_half(store: Store) -> None:
    """Hold each node's rows against each other."""
    rows = Rows(store)
    nodes = {row["node_id"]: row for row in rows.of(tables.nodes)}
    states = {row["node_id"]: row for row in rows.of(tables.node_states)}
    labels = {row["node_id"]: row["value"] for row in rows.of(tables.node_labels)}
    events = Counter((row["node_id"], row["type"]) for row in rows.events())
    newest = {row["node_id"]: row["data"]["to"] for row in rows.events(EventType.HEALTH_CHANGED)}
    seen = {row["node_id"]: row["samples"] for row in rows.of(tables.sample_history)}
    facts = {row["node_id"]: int(row["facts"]["hostname"]) for row in rows.of(tables.node_facts)}
    samples = {row["node_id"]: row["sample"]["cpu"]["use_percent"] for row in rows.of(tables.node_samples)}

    assert nodes.keys() == states.keys()
    assert labels == {node_id: str(node["generation"]) for node_id, node in nodes.items()}
    for node_id, node in nodes.items():
        assert events[node_id, EventType.NODE_REGISTERED] == 1
        assert events[node_id, EventType.NODE_UPDATED] == node["generation"] - 1
        assert newest.get(node_id, Health.UNKNOWN.value) == states[node_id]["health"]
    assert facts == samples == seen


def assert_sound(store: Store) -> None:
    """Ask SQLite whether its file is sound."""
    if store.dialect == "sqlite":
        with store.read() as connection:
            assert connection.execute(sa.text("PRAGMA integrity_check")).scalars().all() == ["ok"]
            assert connection.execute(sa.text("PRAGMA foreign_key_check")).all() == []


def assert_takes_writes(store: Store) -> None:
    """Go on where the killed one stopped."""
    registry = NodeRegistry(store, make_settings())
    registry.register(make_declaration("after-the-crash"))
    assert registry.page(NodeFilter(), 1, None).versions[0].node_id == "after-the-crash"
