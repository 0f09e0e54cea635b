# SPDX-License-Identifier: GPL-3.0-or-later
"""Repair on real nodes, unattended: each way to break one, and what the manager does about it until it is well again.

The times from fault to healthy are printed (pytest -s).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fleet.conftest import RunningFleet
from fleet.image import DATA_DIRECTORY, SERVICE
from fleet.nodes import Fleet, Node
from fleet.repair import (
    DEMO_TYPES,
    acted,
    boot_of,
    put_engine_behind_unit,
    repairing,
    write_file,
    write_power_hook,
)
from fleet.waiting import wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]
MILD_STEPS = [
    "free_disk",
    "restart_container_runtime",
    "restart_container",
    "restart_service",
    "renew_clock",
    "remount_root",
]
BROKEN_UNIT = f"/etc/systemd/system/{SERVICE}.d/broken.conf"


def test_stopped_service_is_restarted(fleet: Fleet, tmp_path: Path) -> None:
    node = fleet.nodes[0]
    with repairing(fleet, tmp_path) as bed:
        bed.register(node)

        fault = time.monotonic()
        node.stop_service()
        done = bed.repaired(node, fault, "a stopped service")

        assert acted(done) == ["restart_service"]
        assert (done["requested_by"], done["attempt"], done["conditions"]) == ("recovery", 1, ["ChecksPassing"])
        assert node.service_state() == "active"
        assert [event["state"] for event in bed.events(node, "recovery.ended")] == ["succeeded"]


@pytest.fixture(scope="module")
def engine_node(running_fleet: RunningFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Node]]:
    """Run a node with a container engine of which it can lose the unit, and one container there."""
    session = running_fleet.fleet
    # The session holds the third octet of 127.0 for itself, and so of every other network.
    prefix = session.address_prefix.replace("127.0.", "127.1.")
    folder = tmp_path_factory.mktemp("engine")
    own = Fleet(session.engine, name=f"{session.name}-engine", address_prefix=prefix, state_directory=folder)
    name = container_of(own)
    own.down()
    session.engine.attempt("rm", "--force", name)
    try:
        (node,) = own.up(1, image=running_fleet.image, docker_socket=True)
        put_engine_behind_unit(node)
        own.engine.run(
            "run", "--detach", "--name", name, "--network", "none", running_fleet.image, "/bin/sleep", "infinity"
        )
        yield own, node
    finally:
        session.engine.attempt("rm", "--force", name)
        own.down()


def container_of(fleet: Fleet) -> str:
    """Name the container that is watched; the engine is the same for all who test here."""
    return f"node-manager-{fleet.name}-app"


def engine_types(fleet: Fleet) -> dict[str, Any]:
    """Give the type of a node that has this fleet's container."""
    checks = [
        {"name": "engine", "kind": "service", "unit": "docker.service", "severity": "critical"},
        {"name": "app", "kind": "container", "container": container_of(fleet), "severity": "critical"},
    ]
    # Without restart_service, which would bring the unit back as well.
    ladder = ["restart_container_runtime", "restart_container", "give_up"]
    return {"engine": {"description": "A node with containers", "checks": checks, "ladders": {"ChecksPassing": ladder}}}


def test_crashed_container_is_restarted(engine_node: tuple[Fleet, Node], tmp_path: Path) -> None:
    fleet, node = engine_node
    with repairing(fleet, tmp_path, engine_types(fleet)) as bed:
        bed.register(node, node_type="engine")

        fault = time.monotonic()
        fleet.engine.run("kill", container_of(fleet))
        done = bed.repaired(node, fault, "a crashed container")

    assert acted(done) == ["restart_container"]
    assert fleet.engine.run("inspect", "--format", "{{.State.Status}}", container_of(fleet)) == "running"


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_dead_container_runtime_is_restarted(engine_node: tuple[Fleet, Node], tmp_path: Path, fault: str) -> None:
    fleet, node = engine_node
    with repairing(fleet, tmp_path, engine_types(fleet)) as bed:
        bed.register(node, node_type="engine")

        broken_at = time.monotonic()
        node.crash_service("docker.service") if fault == "killed" else node.stop_service("docker.service")
        done = bed.repaired(node, broken_at, f"a container runtime that was {fault}")

    assert acted(done) == ["restart_container_runtime"]
    assert node.service_state("docker.service") == "active"


def test_full_disk_is_freed_of_rotated_logs_and_of_nothing_else(fleet: Fleet, node: Node, tmp_path: Path) -> None:
    # The logs lie on the small disk, beside what users keep there.
    node.exec("sh", "-ec", f"mkdir {DATA_DIRECTORY}/log; mount --bind {DATA_DIRECTORY}/log /var/log")
    for place in (f"{DATA_DIRECTORY}/records.db", f"{DATA_DIRECTORY}/2026/records.log.1", "/var/log/app.log"):
        write_file(node, place, f"worth keeping at {place}\n" * 4000)
    kept = ["sh", "-c", f"find {DATA_DIRECTORY} -type f ! -name 'app.log.*' -exec sha256sum {{}} + | sort"]
    before = node.exec(*kept)
    with repairing(fleet, tmp_path, config={"thresholds": {"disk_percent": {"warning": 85, "critical": 95}}}) as bed:
        bed.register(node)

        fault = time.monotonic()
        node.exec(
            "sh",
            "-c",
            "cd /var/log; for n in 1 2 3; do head -c 4500000 /dev/zero > app.log.$n; touch -d '3 days ago' app.log.$n; done",
        )
        full = node.disk_used_percent()
        bed.wait_for(node, "degraded", seconds=60)
        done = bed.repaired(node, fault, "a full disk")

    assert full >= 85
    assert (acted(done), done["conditions"]) == (["free_disk"], ["DiskSpaceSufficient"])
    assert node.disk_used_percent() < 77
    assert node.exec(*kept) == before


def test_hung_node_is_switched_off_and_on(fleet: Fleet, node: Node, tmp_path: Path) -> None:
    hook = write_power_hook(fleet, tmp_path)
    with repairing(fleet, tmp_path, config={"recovery": {"power": hook.setting}}) as bed:
        bed.register(*fleet.nodes)
        boot, address = boot_of(node), node.bridge_address

        fault = time.monotonic()
        node.pause()
        bed.wait_for(node, "unreachable", seconds=60)
        evidence = bed.health(node)["evidence"]
        done = bed.repaired(node, fault, "a hung node")

    assert evidence == "peers_blind"
    assert (acted(done), done["conditions"], hook.calls) == (["power_cycle"], ["Reachable"], [node.node_id])
    assert boot_of(node) != boot
    assert node.bridge_address == address


def test_node_that_cannot_be_repaired_is_given_up_until_somebody_looks(
    fleet: Fleet, node: Node, tmp_path: Path
) -> None:
    types = {"demo": {**DEMO_TYPES["demo"], "ladders": {"ChecksPassing": ["restart_service", "give_up"]}}}
    with repairing(
        fleet, tmp_path, types, NODE_MANAGER_RECOVERY__ATTEMPTS="2", NODE_MANAGER_RECOVERY__BACKOFF_SECONDS="1"
    ) as bed:
        bed.register(node)

        fault = time.monotonic()
        write_file(node, BROKEN_UNIT, "[Service]\nExecStart=\nExecStart=/bin/false\n")
        node.exec("systemctl", "daemon-reload")
        node.stop_service()
        first, second = bed.wait_ended(node, 2)
        print(f"\na node that can't be repaired: given up after {time.monotonic() - fault:.1f} s")  # noqa: T201
        shown = bed.read(f"/nodes/{node.node_id}")
        # Now a restart would help, and nobody tries one.
        node.exec("sh", "-ec", f"rm {BROKEN_UNIT}; systemctl daemon-reload")
        time.sleep(8)
        left_alone = bed.health(node)["recovery"]
        count = len(bed.recoveries(node))
        bed.set_active(node)
        anew = bed.wait_ended(node, 3)[-1]
        bed.wait_for(node, "healthy")

        ends = [(event["state"], event["attempt"]) for event in bed.events(node, "recovery.ended")]
    assert (first["state"], second["state"], acted(first)) == ("failed", "gave_up", ["restart_service"])
    assert [step["step"] for step in second["steps"]][-1] == "give_up"
    assert (shown["admin"], shown["schedulable"]) == ("cordoned", False)
    assert left_alone["gave_up_at"] is not None
    assert "given up after 2 tries" in left_alone["not_now"]
    assert count == 2
    assert ends == [("failed", 1), ("gave_up", 2), ("succeeded", 1)]
    assert (anew["attempt"], acted(anew)) == (1, ["restart_service"])


def test_nobody_is_repaired_before_anything_is_wrong(fleet: Fleet, tmp_path: Path) -> None:
    with repairing(fleet, tmp_path) as bed:
        bed.register(*fleet.nodes)
        boots = [boot_of(node) for node in fleet.nodes]

        wait_until(lambda: len(bed.read("/guard")["scopes"]) > 0, deadline_seconds=20, what="the guard's first look")
        time.sleep(5)

        assert bed.recoveries() == []
        assert [boot_of(node) for node in fleet.nodes] == boots


def state_of(node: Node) -> set[str]:
    """Describe all of a node that a repair could change: files with their times, and each start of a unit."""
    files = "find /etc /home /opt /root /srv /usr /var -xdev ( -type f -o -type l )"
    # Each login is noted there.
    unkept = "! -name wtmp ! -name btmp ! -name lastlog ! -name *.journal"
    listed = node.exec(*f"{files} {unkept} -printf".split(), r"%p %T@ %s\n")
    units = node.exec("systemctl", "show", "*.service", "--property=Id,InvocationID,ActiveState")
    return {*listed.splitlines(), *(" ".join(unit.split()) for unit in units.split("\n\n"))}


def test_dry_run_changes_nothing_and_what_is_done_then_was_planned(fleet: Fleet, tmp_path: Path) -> None:
    broken = fleet.nodes[0]
    with repairing(fleet, tmp_path, NODE_MANAGER_RECOVERY__AUTOMATIC="false") as bed:
        bed.register(*fleet.nodes)
        broken.stop_service()
        bed.wait_for(broken, "degraded")
        before = [state_of(node) for node in fleet.nodes]

        # All mild steps on the one that is broken; on the others what it needs.
        asked = [MILD_STEPS, *[["restart_service"] for _ in fleet.nodes[1:]]]
        with ThreadPoolExecutor(len(fleet.nodes)) as pool:
            answers = list(
                pool.map(lambda node, steps: bed.recover(node, dry_run=True, wait=60, steps=steps), fleet.nodes, asked)
            )
        bed.wait_until(
            lambda: all(item["ended_at"] for item in bed.recoveries(dry_runs=True)), 150, "the dry runs", broken
        )
        plans = [bed.read(f"/recoveries/{answer.json()['recovery_id']}") for answer in answers]
        after = [state_of(node) for node in fleet.nodes]
        logs = [bed.job_logs(plan) for plan in plans]
        real = bed.recover(broken, wait=110, steps=MILD_STEPS).json()
        bed.wait_for(broken, "healthy")

    assert [(plan["state"], plan["dry_run"]) for plan in plans] == [("planned", True)] * len(plans), plans
    assert all(
        len(re.findall(r"changed=0\b", log)) == len(plan["steps"]) for log, plan in zip(logs, plans, strict=True)
    )
    assert [re.findall(r"^changed: .*", log, re.MULTILINE) for log in logs] == [[]] * len(logs)
    assert [now ^ then for now, then in zip(after, before, strict=True)] == [set()] * len(before)
    planned = [[step["step"] for step in plan["steps"] if step["state"] == "planned"] for plan in plans]
    # Whether the clock is synchronised is this machine's matter.
    planned_but_clock = [[step for step in steps if step != "renew_clock"] for steps in planned]
    assert planned_but_clock == [["restart_service"], *[[] for _ in plans[1:]]]
    assert real["state"] == "succeeded"
    assert acted(real) == ["restart_service"]
    assert {step["step"] for step in real["steps"] if step["state"] not in {"skipped", "waiting"}} <= set(planned[0])
