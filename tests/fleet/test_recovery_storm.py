# SPDX-License-Identifier: GPL-3.0-or-later
"""The storm on real nodes: a whole zone is cut off at once, and nobody makes it worse by repairing it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fleet.conftest import RunningFleet
from fleet.nodes import Fleet
from fleet.repair import Repairing, boot_of, repairing, write_power_hook

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(600)]
NODES = 40
CUT = 20
ZONE_A, ZONE_B = "storm-a", "storm-b"
# Longer than it takes to confirm that a node is lost, to wait for it to mend itself, and to begin a repair.
HOLD_SECONDS = 25
CONFIG: dict[str, Any] = {"recovery": {"guard": {"open_seconds": 20, "settle_seconds": 10}}}


@pytest.fixture
def large_fleet(running_fleet: RunningFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Run a fleet of 40 beside that of the session."""
    session = running_fleet.fleet
    own = Fleet(
        session.engine,
        name=f"{session.name}-storm",
        # The session holds the third octet of 127.0 for itself, and so of every other network.
        address_prefix=session.address_prefix.replace("127.0.", "127.2."),
        state_directory=tmp_path_factory.mktemp("storm"),
    )
    own.down()
    try:
        own.up(NODES, image=running_fleet.image)
        yield own
    finally:
        own.down()


def guard_of(bed: Repairing, zone: str) -> dict[str, Any]:
    """Read the guard of a zone."""
    scopes = bed.read("/guard")["scopes"]
    return next((scope for scope in scopes if scope["scope"] == f"zone:{zone}"), {"state": "none"})


def test_zone_that_is_cut_off_is_left_alone_until_it_is_back(large_fleet: Fleet, tmp_path: Path) -> None:
    nodes = large_fleet.nodes
    cut, there = nodes[:CUT], nodes[CUT:]
    hook = write_power_hook(large_fleet, tmp_path)
    config = {"recovery": {**CONFIG["recovery"], "power": hook.setting}}
    # How long a node must be lost, and how fast repairs may follow each other, is as it comes.
    with repairing(
        large_fleet,
        tmp_path,
        config=config,
        NODE_MANAGER_MONITORING__CHECK_INTERVAL_SECONDS="60",
        NODE_MANAGER_RECOVERY__WAIT_SECONDS="10",
        NODE_MANAGER_RECOVERY__GUARD__START_INTERVAL_SECONDS="10",
    ) as bed:
        # In one site, so that each lost node has others that would see it: only the guard keeps the power on.
        bed.register(*cut, zone=ZONE_A)
        bed.register(*there, zone=ZONE_B)
        boots = [boot_of(node) for node in nodes]
        states: list[tuple[str, float]] = []
        begun = time.monotonic()

        def follow() -> str:
            state = str(guard_of(bed, ZONE_A)["state"])
            if not states or states[-1][0] != state:
                states.append((state, round(time.monotonic() - begun, 1)))
            return state

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda node: node.cut(), cut))
        bed.wait_until(lambda: follow() == "open", 90, "the breaker to open")
        opened = guard_of(bed, ZONE_A)
        for node in cut:
            bed.wait_for(node, "unreachable", seconds=90)

        def evidence() -> set[str]:
            return {bed.health(node)["evidence"] for node in cut}

        # They were seen to be dead, and would be switched off and on one by one. On a busy machine some peers answer late.
        bed.wait_until(lambda: evidence() == {"peers_blind"}, 60, "the peers of all to answer")
        lost = [bed.health(node) for node in cut]
        held_until = time.monotonic() + HOLD_SECONDS
        bed.wait_until(lambda: follow() and time.monotonic() > held_until, HOLD_SECONDS + 30, "the storm to last")
        still = guard_of(bed, ZONE_A)
        during = bed.recoveries()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda node: node.mend(), cut))
        mended = round(time.monotonic() - begun, 1)
        bed.wait_until(lambda: follow() == "closed", 240, "the breaker to close", pause=0.1)
        for node in nodes:
            bed.wait_for(node, "healthy", seconds=90)
        told = bed.service.log
        after = bed.recoveries()
    print(f"\nstorm: {CUT} of {NODES} nodes cut at 0 s, mended at {mended} s; zone guard: {states}")  # noqa: T201

    assert [state for state, _ in states][-3:] == ["open", "half_open", "closed"], (states, told[-3000:])
    assert (opened["state"], still["state"], still["unhealthy"]) == ("open", "open", CUT)
    assert opened["cause"]
    assert opened["exit"]
    assert all("power_cycle" in item["recovery"]["steps"] for item in lost)
    assert all(item["recovery"]["not_now"] for item in lost)
    assert (during, [item for item in after if "Reachable" in item["conditions"]], hook.calls) == ([], [], [])
    assert [boot_of(node) for node in nodes] == boots
