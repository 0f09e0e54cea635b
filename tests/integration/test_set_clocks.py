# SPDX-License-Identifier: GPL-3.0-or-later
"""Clocks that are set while nodes are watched, the manager's by a day and the node's own: nothing follows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from builders import make_report, make_sample
from node_manager import watch_list
from node_manager.fleet_watch import FleetWatch
from node_manager.node_registry import utc_now
from node_manager.observations import ObservationLog
from node_manager.recorder import Recorder
from node_manager.store import Store, open_store, tables
from watched_nodes import WatchedNode, data_line, register, row_of, until, watch_settings

BEAT_INTERVAL_SECONDS = 1.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(f"sqlite:///{tmp_path}/node-manager.db", busy_timeout_seconds=2)) as opened:
        yield opened


class SetClock:
    """The manager's wall clock, which somebody sets."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        """Give the time."""
        return utc_now() + self.ahead


def test_nothing_follows_from_clocks_that_are_set(store: Store, key_file: Path) -> None:
    settings = watch_settings(key_file, {"beat_interval_seconds": BEAT_INTERVAL_SECONDS})
    clock = SetClock()
    recorder = Recorder(ObservationLog(store, settings, clock), pause_seconds=0.05)

    def last_contact() -> datetime:
        row = row_of(store, tables.node_states) or {}
        found = row["last_contact_at"]
        assert isinstance(found, datetime)
        return found

    async def test() -> None:
        node = WatchedNode()
        node.first_words, node.beat_seconds = [data_line("report", make_report())], 0.2
        async with node.served():
            register(store, settings, node)
            watch = FleetWatch(store, settings, recorder, clock)
            listed, health = watch_list.read_nodes(store)["gw-1"]
            watch.add(listed, health, watch_list.read_targets(store, settings, ["gw-1"])["gw-1"])
            await until(lambda: (row_of(store, tables.node_states) or {})["health"] == "healthy", "its health")

            for own_days, node_days in ((1, 0), (0, 0), (-1, 0), (0, 1), (0, -1)):
                clock.ahead = timedelta(days=own_days)
                node_clock = (utc_now() + timedelta(days=node_days)).timestamp()
                await node.say(data_line("sample", make_sample(clock_unix_seconds=node_clock)))
                await until(lambda: abs(last_contact() - clock()) < timedelta(seconds=10), "a sample of that time")
                # Longer than a silence takes to be noticed.
                await asyncio.sleep(2 * BEAT_INTERVAL_SECONDS + 1.5)

                row = row_of(store, tables.node_states) or {}
                assert (row["health"], [state for _, state, _ in watch.states()]) == ("healthy", ["streaming"])
            assert node.logins == 1
            await watch.close()

    recorder.start()
    try:
        asyncio.run(test())
    finally:
        recorder.stop()
