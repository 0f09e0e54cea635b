# SPDX-License-Identifier: GPL-3.0-or-later
"""What a monitor takes off the scheduler's hands, and when; and how targets are read for many nodes at once."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from builders import make_declaration, make_settings
from fleet.waiting import wait_until
from node_manager import watch_list
from node_manager.node_registry import NodeRegistry, utc_now
from node_manager.observations import ObservationLog
from node_manager.recorder import Recorder
from node_manager.resource_monitor import ResourceMonitor
from node_manager.settings import Settings
from node_manager.ssh_targets import Target
from node_manager.store import Store, StoreUnavailableError
from node_manager.watch_list import TargetReader

DEADLINE_SECONDS = 10.0


@contextmanager
def monitoring(store: Store, settings: Settings, *, leads: bool) -> Iterator[ResourceMonitor]:
    """Run a monitor that keeps what it hears."""
    monitor = ResourceMonitor(store, settings, Recorder(ObservationLog(store, settings)), utc_now)
    monitor.start(lambda: leads)
    try:
        yield monitor
    finally:
        monitor.stop()


# in hand


def test_in_hand_is_everybody_until_the_list_is_read(store: Store) -> None:
    with monitoring(store, make_settings(), leads=False) as monitor:
        assert monitor.has_in_hand("gw-7")


@pytest.mark.parametrize("off", ["scheduled", "stream"])
def test_in_hand_is_nobody_where_nothing_is_watched_by_stream(store: Store, off: str) -> None:
    with monitoring(store, make_settings({"monitoring": {off: False}}), leads=True) as monitor:
        assert not monitor.has_in_hand("gw-7")


def test_in_hand_are_all_but_the_nodes_that_are_left_to_ansible(store: Store, registry: NodeRegistry) -> None:
    registry.register(make_declaration("gw-7"))

    # No node says who it is, and none is to be believed at first sight.
    settings = make_settings(
        {"ssh": {"credentials": {"k": {"private_key_file": "/nowhere"}}, "default_credential": "k"}}
    )
    with monitoring(store, settings, leads=True) as monitor:
        wait_until(lambda: not monitor.has_in_hand("gw-7"), deadline_seconds=DEADLINE_SECONDS, what="the fallback")

        assert monitor.has_in_hand("registered-just-now")


def test_in_hand_is_nobody_while_watching_stumbles(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(_store: Store) -> Any:
        raise RuntimeError("a fault of the monitor")

    monkeypatch.setattr(watch_list, "read_nodes", stumble)
    with monitoring(store, make_settings(), leads=True) as monitor:
        wait_until(lambda: not monitor.has_in_hand("gw-7"), deadline_seconds=DEADLINE_SECONDS, what="to be let go")


# targets


class Reads:
    """Stands in for reading targets, and notes for whom it was asked."""

    def __init__(self, fails: bool = False) -> None:
        self.asked: list[list[str]] = []
        self._fails = fails
        self._really = watch_list.read_targets

    def __call__(self, store: Store, settings: Settings, node_ids: Collection[str]) -> dict[str, Target]:
        self.asked.append(sorted(node_ids))
        if self._fails:
            raise StoreUnavailableError("away")
        return self._really(store, settings, node_ids)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Note what is read."""
    noted = Reads()
    monkeypatch.setattr(watch_list, "read_targets", noted)
    return noted


def test_targets_that_are_asked_for_at_once_are_read_at_once(
    store: Store, registry: NodeRegistry, reads: Reads
) -> None:
    registry.register(make_declaration("gw-7"))
    registry.register(make_declaration("gw-8", address="192.0.2.8"))

    async def ask() -> list[Target | None]:
        reader = TargetReader(store, make_settings())
        return await asyncio.gather(*(reader.read(name) for name in ("gw-7", "gw-8", "gone")))

    first, second, gone = asyncio.run(ask())

    assert (first and first.address, second and second.address, gone) == ("192.0.2.7", "192.0.2.8", None)
    assert reads.asked == [["gone", "gw-7", "gw-8"]]


def test_target_is_read_anew_each_time(store: Store, registry: NodeRegistry, reads: Reads) -> None:
    registry.register(make_declaration("gw-7"))

    async def ask() -> None:
        reader = TargetReader(store, make_settings())
        await reader.read("gw-7")
        await reader.read("gw-7")

    asyncio.run(ask())

    assert reads.asked == [["gw-7"], ["gw-7"]]


def test_one_that_is_cancelled_leaves_the_target_to_the_others(
    store: Store, registry: NodeRegistry, reads: Reads
) -> None:
    registry.register(make_declaration("gw-7"))

    async def ask() -> Target | None:
        reader = TargetReader(store, make_settings())
        given_up, other = (asyncio.create_task(reader.read("gw-7")) for _ in range(2))
        await asyncio.sleep(0)
        given_up.cancel()
        return await other

    assert asyncio.run(ask()) is not None


def test_store_that_is_away_is_told_to_all_that_asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_list, "read_targets", Reads(fails=True))

    async def ask() -> list[Target | BaseException | None]:
        reader = TargetReader(store, make_settings())
        return await asyncio.gather(*(reader.read(name) for name in ("gw-7", "gw-8")), return_exceptions=True)

    assert [type(end) for end in asyncio.run(ask())] == [StoreUnavailableError] * 2
