# SPDX-License-Identifier: GPL-3.0-or-later
"""The monitor on its own thread: it watches while it leads, takes new nodes in, and lets all go at the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from builders import make_report, make_sample
from job_parts import wait_until
from node_manager import fleet_watch
from node_manager.domain import ObservationKind
from node_manager.node_registry import NodeRegistry, utc_now
from node_manager.recorder import Recorder
from node_manager.resource_monitor import ResourceMonitor
from node_manager.settings import Settings
from node_manager.store import Store, open_store, tables
from watched_nodes import WatchedNode, data_line, recording, register, row_of, watch_settings

SECONDS = 20.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(f"sqlite:///{tmp_path}/node-manager.db", busy_timeout_seconds=2)) as opened:
        yield opened


@pytest.fixture
def settings(key_file: Path) -> Settings:
    return watch_settings(key_file)


@pytest.fixture
def recorder(store: Store, settings: Settings) -> Iterator[Recorder]:
    with recording(store, settings) as found:
        yield found


class Site:
    """Nodes on a thread of their own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._nodes: list[WatchedNode] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_details: object) -> None:
        for node in self._nodes:
            self.call(node.stop())
        self.call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS)
        self._loop.close()

    def add(self, node: WatchedNode) -> WatchedNode:
        """Serve a node."""
        self._nodes.append(node)
        self.call(node.start())
        return node

    def add_answering(self) -> WatchedNode:
        """Serve a node that looks at itself when it is asked."""
        node = self.add(WatchedNode())
        node.first_words = [data_line("report", make_report())]
        node.answer = lambda command: [data_line("sample", make_sample(), command)]
        return node

    def call(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done there."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)

    @staticmethod
    async def _end() -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as found:
        yield found


class Lead:
    """Whether this manager leads."""

    def __init__(self, leads: bool = True) -> None:
        self.leads = leads

    def __call__(self) -> bool:
        return self.leads


@contextmanager
def monitoring(
    store: Store, settings: Settings, recorder: Recorder, lead: Lead | None = None
) -> Iterator[ResourceMonitor]:
    """Run a monitor."""
    monitor = ResourceMonitor(store, settings, recorder, utc_now)
    monitor.start(lead or Lead())
    try:
        yield monitor
    finally:
        monitor.stop()


def streaming(monitor: ResourceMonitor) -> int:
    """Count the streams that are open."""
    return int(monitor.overview()["states"].get("streaming", 0))


def monitor_threads() -> list[threading.Thread]:
    """List the threads of monitors."""
    return [thread for thread in threading.enumerate() if thread.name == "monitor"]


# who watches


def test_monitor_watches_nothing_while_another_manager_leads(
    store: Store, settings: Settings, recorder: Recorder, site: Site
) -> None:
    node = site.add(WatchedNode())
    register(store, settings, node)
    lead = Lead(False)

    with monitoring(store, settings, recorder, lead) as monitor:
        time.sleep(0.5)
        before = (monitor.overview()["watching"], node.logins)
        fetched = monitor.fetch("gw-1", ObservationKind.SAMPLE)
        lead.leads = True
        wait_until(lambda: streaming(monitor) == 1, SECONDS)

    assert (before, fetched) == ((False, 0), None)


def test_monitor_closes_all_streams_with_the_lead_and_opens_them_with_it(
    store: Store, settings: Settings, recorder: Recorder, site: Site
) -> None:
    nodes = [site.add(WatchedNode(f"gw-{number}")) for number in range(3)]
    for node in nodes:
        register(store, settings, node)
    lead = Lead()

    with monitoring(store, settings, recorder, lead) as monitor:
        wait_until(lambda: streaming(monitor) == 3, SECONDS)

        lead.leads = False
        wait_until(lambda: not any(node.open_connections for node in nodes), SECONDS)
        lost = (monitor.overview()["watching"], monitor.overview()["states"])

        lead.leads = True
        wait_until(lambda: streaming(monitor) == 3, SECONDS)

    assert lost == (False, {})
    assert [node.logins for node in nodes] == [2, 2, 2]


@pytest.mark.parametrize("off", ["stream", "scheduled"])
def test_monitor_that_is_switched_off_never_starts(
    store: Store, key_file: Path, recorder: Recorder, site: Site, off: str
) -> None:
    settings = watch_settings(key_file, {off: False})
    node = site.add(WatchedNode())
    register(store, settings, node)

    with monitoring(store, settings, recorder) as monitor:
        assert monitor_threads() == []
        assert (monitor.overview()["watching"], monitor.has_in_hand("gw-1")) == (False, False)
        assert monitor.fetch("gw-1", ObservationKind.SAMPLE) is None
    assert node.logins == 0


# the list


def test_monitor_takes_new_nodes_in_and_lets_removed_ones_go(
    store: Store, settings: Settings, recorder: Recorder, site: Site
) -> None:
    nodes = [site.add(WatchedNode(f"gw-{number}")) for number in range(2)]
    with monitoring(store, settings, recorder) as monitor:
        wait_until(lambda: monitor.overview()["watching"], SECONDS)

        begun = time.monotonic()
        register(store, settings, nodes[0])
        wait_until(lambda: streaming(monitor) == 1, SECONDS)
        took = time.monotonic() - begun
        register(store, settings, nodes[1])
        NodeRegistry(store, settings).deregister("gw-0")
        wait_until(lambda: nodes[1].logins == 1 and streaming(monitor) == 1, SECONDS)

        # A list every two seconds; the rest is room for a busy machine.
        assert took < 2 + 5
        wait_until(lambda: [node.open_connections for node in nodes] == [0, 1], SECONDS)


def test_monitor_keeps_its_list_while_the_store_does_not_answer(
    tmp_path: Path, key_file: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node_manager.resource_monitor._LIST_SECONDS", 0.1)
    settings = watch_settings(key_file)
    node = site.add(WatchedNode())
    url = f"sqlite:///{tmp_path}/node-manager.db"
    with (
        closing(open_store(url, busy_timeout_seconds=0.1, pool_size=1)) as store,
        recording(store, settings) as recorder,
    ):
        register(store, settings, node)
        with monitoring(store, settings, recorder) as monitor:
            wait_until(lambda: streaming(monitor) == 1, SECONDS)
            with store.read():
                time.sleep(0.6)
                during = streaming(monitor)
            register(store, settings, site.add(WatchedNode("gw-2")))
            wait_until(lambda: streaming(monitor) == 2, SECONDS)

    assert during == 1
    assert node.logins == 1


def test_monitor_begins_anew_after_a_fault_of_its_own(
    store: Store, settings: Settings, recorder: Recorder, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node_manager.resource_monitor._LIST_SECONDS", 0.1)
    node = site.add(WatchedNode())
    register(store, settings, node)
    with monitoring(store, settings, recorder) as monitor:
        wait_until(lambda: streaming(monitor) == 1, SECONDS)

        with monkeypatch.context() as patch:
            patch.setattr("node_manager.watch_list.read_nodes", lambda _store: 1 / 0)
            wait_until(lambda: node.open_connections == 0, SECONDS)
            # Until it is right again, Ansible looks.
            wait_until(lambda: not monitor.has_in_hand("gw-1"), SECONDS)
        wait_until(lambda: streaming(monitor) == 1, SECONDS)

    assert node.logins == 2


# asking


def test_fetch_has_a_node_look_at_itself(store: Store, settings: Settings, recorder: Recorder, site: Site) -> None:
    register(store, settings, site.add_answering())

    with monitoring(store, settings, recorder) as monitor:
        wait_until(lambda: streaming(monitor) == 1, SECONDS)
        fetched = monitor.fetch("gw-1", ObservationKind.SAMPLE)

        assert fetched is not None
        assert fetched.result(SECONDS) is True
        assert (row_of(store, tables.node_samples) or {})["source"] == "stream"
        assert monitor.fetch("unknown", ObservationKind.SAMPLE) is None


def test_fetch_wakes_a_loop_that_stands_still(
    store: Store, settings: Settings, recorder: Recorder, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(store, settings, site.add_answering())

    with monitoring(store, settings, recorder) as monitor:
        wait_until(lambda: streaming(monitor) == 1, SECONDS)
        monkeypatch.setattr(fleet_watch, "_SWEEP_SECONDS", 3 * SECONDS)
        # For what may be under way, and the last short rest.
        time.sleep(1.0)
        fetched = monitor.fetch("gw-1", ObservationKind.SAMPLE)
        assert fetched is not None
        assert fetched.result(SECONDS)


def test_fetch_that_waits_is_let_go_with_the_monitor(
    store: Store, settings: Settings, recorder: Recorder, site: Site
) -> None:
    register(store, settings, site.add(WatchedNode()))
    with monitoring(store, settings, recorder) as monitor:
        wait_until(lambda: streaming(monitor) == 1, SECONDS)
        fetched = monitor.fetch("gw-1", ObservationKind.SAMPLE)

    assert fetched is not None
    assert fetched.result(SECONDS) is False
    assert monitor.fetch("gw-1", ObservationKind.SAMPLE) is None


# what it tells


def test_overview_tells_of_states_and_of_who_is_left_to_ansible(
    store: Store, settings: Settings, recorder: Recorder, site: Site
) -> None:
    register(store, settings, site.add(WatchedNode()))
    other = site.add(WatchedNode("gw-2"))
    other.first_words = [b"Welcome!"]
    register(store, settings, other)

    with monitoring(store, settings, recorder) as monitor:
        wait_until(lambda: monitor.overview()["states"] == {"left_to_ansible": 1, "streaming": 1}, SECONDS)
        wait_until(lambda: not monitor.has_in_hand("gw-2") and monitor.has_in_hand("gw-1"), SECONDS)
        shown = monitor.overview()

    (left,) = shown.pop("left_to_ansible")
    assert (left["node_id"], "Welcome!" in left["reason"]) == ("gw-2", True)
    assert shown == {
        "watching": True,
        "states": {"left_to_ansible": 1, "streaming": 1},
        "faults": [],
        "observations_given_up": 0,
    }


def test_overview_shows_the_newest_fault_first_and_bounds_who_is_left(
    store: Store, recorder: Recorder, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node_manager.resource_monitor._MAX_SHOWN", 2)
    settings = watch_settings(tmp_path / "no-key")
    for number in range(3):
        node = WatchedNode(f"gw-{number}")
        node.port = 2000 + number
        register(store, settings, node)

    with monitoring(store, settings, recorder) as monitor:
        wait_until(lambda: monitor.overview()["states"] == {"left_to_ansible": 3}, SECONDS)
        shown = monitor.overview()

    times = [fault["last_at"] for fault in shown["faults"]]
    assert [left["node_id"] for left in shown["left_to_ansible"]] == ["gw-0", "gw-1"]
    assert ([fault["count"] for fault in shown["faults"]], times) == ([1, 1, 1], sorted(times, reverse=True))
    assert all("private key" in fault["message"] for fault in shown["faults"])


# the end


def test_stop_is_quick_and_leaves_nothing(store: Store, settings: Settings, recorder: Recorder, site: Site) -> None:
    nodes = [site.add(WatchedNode(f"gw-{number}")) for number in range(3)]
    for node in nodes:
        register(store, settings, node)
    monitor = ResourceMonitor(store, settings, recorder, utc_now)
    monitor.stop()
    monitor.start(Lead())
    wait_until(lambda: streaming(monitor) == 3, SECONDS)

    begun = time.monotonic()
    monitor.stop()
    took = time.monotonic() - begun

    assert took < 5
    assert monitor_threads() == []
    wait_until(lambda: not any(node.open_connections for node in nodes), SECONDS)
    assert not monitor.overview()["watching"]
    monitor.stop()
