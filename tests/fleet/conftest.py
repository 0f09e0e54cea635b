# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes for the tests: a fleet per session with addresses of its own, a fresh node per test that breaks one."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from parts import require, skip_or_fail

from fleet.engine import FleetError, cache_directory, ensure_engine
from fleet.image import BUILD_DEADLINE_SECONDS, ensure_image, image_is_cached
from fleet.nodes import Fleet, Node

FLEET_SIZE = 3
# 127.0.1.x belongs to `make fleet-up`. Each running session holds one of these for itself.
THIRD_OCTETS = range(2, 50)
REASON = "The test fleet is real nodes in Docker"


@dataclass(frozen=True)
class RunningFleet:
    """A fleet that is up, and the image that its nodes came from."""

    fleet: Fleet
    image: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the test that will build the image the time for it."""
    users = [item for item in items if "running_fleet" in getattr(item, "fixturenames", ())]
    if users and not image_is_cached():
        users[0].add_marker(pytest.mark.timeout(BUILD_DEADLINE_SECONDS))


@pytest.fixture(scope="session")
def running_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    """Start the session's fleet, and remove it at the end."""
    for part in ("docker", "ssh"):
        require(part, REASON)
    if not image_is_cached():
        require("debootstrap", f"{REASON}, and their image isn't built yet")
    with _own_octet() as octet:
        try:
            engine = ensure_engine()
            image = ensure_image(engine)
        except FleetError as error:
            skip_or_fail(f"{REASON}: {error}")
        fleet = Fleet(
            engine,
            name=f"test-{octet}",
            address_prefix=f"127.0.{octet}",
            state_directory=tmp_path_factory.mktemp("fleet"),
        )
        # What a killed session may have left.
        fleet.down()
        try:
            fleet.up(FLEET_SIZE, image=image)
            yield RunningFleet(fleet, image)
        finally:
            fleet.down()


@pytest.fixture
def fleet(running_fleet: RunningFleet) -> Fleet:
    """Give the session's fleet: for looking only, its nodes are shared by all tests."""
    return running_fleet.fleet


@pytest.fixture
def node(running_fleet: RunningFleet) -> Iterator[Node]:
    """Give a healthy node to break in any way; a new one takes its place afterwards."""
    broken = running_fleet.fleet.nodes[-1]
    yield broken
    running_fleet.fleet.replace(broken, image=running_fleet.image)


@contextmanager
def _own_octet() -> Iterator[int]:
    """Hold a range of addresses that no other session on this machine uses now."""
    for octet in THIRD_OCTETS:
        with (cache_directory() / f"test-fleet-{octet}.lock").open("a", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield octet
            return
    raise FleetError(f"{len(THIRD_OCTETS)} test fleets run on this machine already.")
