# SPDX-License-Identifier: GPL-3.0-or-later
"""A manager that is killed in the middle of a repair, and several who would repair one node: no act is done twice.

The steps are an operator's own, whose parts leave words on the node, and wait where a test wants to be quick enough.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ansible_runs import Controller, make_controller
from node_manager.domain import StepState
from node_manager.recoveries import Recoveries
from node_manager.recovery_rows import ENDS, Recovery

from fleet.conftest import RunningFleet
from fleet.image import SERVICE
from fleet.nodes import Fleet, Node
from fleet.repair import (
    DEMO_CHECK,
    TRACE,
    Repairing,
    acted,
    clear_trace,
    invocation_of,
    noting,
    repairing,
    traced,
    write_file,
    write_step,
)
from fleet.waiting import wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]
STEPS = ("first", "second")
# Read without a program, so that it can be told however busy the machine is.
PORT_CHECK = {"name": "demo-app", "kind": "port", "port": 8000, "severity": "critical"}
TYPES = {
    "laddered": {
        "description": "A node with a ladder of the operator's own steps",
        "checks": [PORT_CHECK],
        "ladders": {"ChecksPassing": list(STEPS)},
    },
    "served": {
        "description": "A node with a ladder of one of our steps",
        "checks": [DEMO_CHECK],
        "ladders": {"ChecksPassing": ["restart_service"]},
    },
}
RELEASE = "/run/released"
# Until the test lets it go on; bounded.
HOLD = f"n=0; while [ ! -e {RELEASE} ] && [ $n -lt 200 ]; do sleep 0.2; n=$((n+1)); done"


@dataclass(frozen=True)
class Ladder:
    """A service, its store, its node, and the folder with its steps."""

    bed: Repairing
    climbs: Recoveries
    node: Node
    steps: Path

    def write(self, pauses: Mapping[str, float]) -> None:
        """Write a first step that doesn't help and a second that does, which wait in the parts that *pauses* names."""

        def pause(part: str) -> str:
            return f"sleep {pauses.get(part, 0)}"

        hold = {"name": "Wait", "ansible.builtin.wait_for": {"timeout": pauses.get("claimed", 0)}}
        write_step(
            self.steps,
            "first",
            precheck=[noting("first-precheck", then=pause("precheck"), changes=False)],
            act=[hold, noting("first-act", then=pause("act"))],
            postcheck=[noting("first-postcheck", then=f"{pause('postcheck')}; false", changes=False)],
        )
        write_step(
            self.steps,
            "second",
            act=[noting("second-act", then=f"systemctl start {SERVICE}")],
            postcheck=[noting("second-postcheck", then=f"systemctl is-active {SERVICE}", changes=False)],
        )

    def active(self) -> Recovery | None:
        """Read the climb that goes on, from the store."""
        return self.climbs.latest_of(self.node.node_id)[0]

    def begin_anew(self) -> None:
        """Forget the repairs and words of before, once the last of them has ended.

        One may have begun after the test before was satisfied: what it had repaired was not known to be well yet.
        """
        self.bed.wait_for(self.node, "healthy")
        self.bed.wait_until(lambda: self.active() is None, 60, "no repair to go on", self.node)
        self.bed.set_active(self.node)
        clear_trace(self.node)
        self.node.exec("rm", "-f", RELEASE)


@pytest.fixture(scope="module")
def ladder(running_fleet: RunningFleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ladder]:
    """Run a service with steps of an operator, for all tests of this file: each leaves its node well."""
    folder = tmp_path_factory.mktemp("ladder")
    node = running_fleet.fleet.nodes[0]
    for name in STEPS:
        write_step(folder / "steps", name, act=[noting("nothing")], postcheck=[noting("nothing", changes=False)])
    config = {"recovery": {"steps_directory": str(folder / "steps")}}
    with repairing(
        running_fleet.fleet, folder, TYPES, config, NODE_MANAGER_MONITORING__CHECK_INTERVAL_SECONDS="2"
    ) as bed:
        bed.register(node, node_type="laddered")
        with bed.stored() as climbs:
            yield Ladder(bed, climbs, node, folder / "steps")


@dataclass(frozen=True)
class Boundary:
    """A moment at which the manager dies: how long the step waits there, and how often its act may then be done."""

    pause: Mapping[str, float]
    acts: tuple[int, ...]


BOUNDARIES = {
    "planned": Boundary({}, (1,)),
    "started": Boundary({}, (1,)),
    "precheck": Boundary({"precheck": 3}, (1,)),
    # Begun for sure, done perhaps: not again.
    "claimed": Boundary({"claimed": 3}, (0, 1)),
    "act": Boundary({"act": 3}, (1,)),
    "postcheck": Boundary({"postcheck": 3}, (1,)),
    "between": Boundary({"postcheck": 3}, (1,)),
}


def is_at(ladder: Ladder, boundary: str, climb: Recovery) -> bool:
    """Tell whether a climb has come to a moment."""
    first = climb.steps[0]
    if boundary == "planned":
        return first.state is StepState.WAITING
    if boundary == "started":
        return first.state is StepState.RUNNING
    if boundary == "claimed":
        return first.acted_at is not None
    return f"first-{'postcheck' if boundary == 'between' else boundary}" in traced(ladder.node)


def die_at(ladder: Ladder, boundary: str) -> Recovery:
    """Kill the manager at a moment of its climb; give the climb as it was left."""
    climb = wait_until(ladder.active, deadline_seconds=60, what="a climb", interval_seconds=0.02)
    wait_until(
        lambda: is_at(ladder, boundary, ladder.climbs.get(climb.recovery_id)),
        deadline_seconds=60,
        what=boundary,
        interval_seconds=0.02,
    )
    if boundary == "between":
        freeze_until_step_ended(ladder, climb.recovery_id)
    ladder.bed.service.kill()
    return ladder.climbs.get(climb.recovery_id)


def freeze_until_step_ended(ladder: Ladder, recovery_id: str) -> None:
    """Keep the manager from seeing that the first step ends, which the playbook writes into the store by itself."""
    process = ladder.bed.service.process
    assert process is not None
    for _ in range(10):
        os.kill(process.pid, signal.SIGSTOP)
        try:
            wait_until(
                lambda: ladder.climbs.get(recovery_id).steps[0].state in ENDS,
                deadline_seconds=6,
                what="the first step's end",
                interval_seconds=0.05,
            )
        except TimeoutError:
            # It may have been stopped while it held the store.
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the first step never ended")


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_killed_manager_goes_on_where_it_was_and_repeats_nothing(ladder: Ladder, boundary: str) -> None:
    expected = BOUNDARIES[boundary]
    ladder.begin_anew()
    ladder.write(expected.pause)
    before = len(ladder.bed.recoveries(ladder.node))

    ladder.node.stop_service()
    left = die_at(ladder, boundary)
    killed = time.monotonic()
    words = traced(ladder.node)
    ladder.bed.service.start()
    found = ladder.bed.wait_ended(ladder.node, before + 1)
    print(f"\nkilled {boundary}: ended {time.monotonic() - killed:.1f} s later")  # noqa: T201
    ladder.bed.wait_for(ladder.node, "healthy")
    active = ladder.bed.health(ladder.node)["recovery"]["active"]

    assert_left_at(boundary, left, words)
    trace = traced(ladder.node)
    assert trace.count("first-act") in expected.acts, trace
    assert trace.count("second-act") == 1, trace
    assert [item["recovery_id"] for item in found[before:]] == [left.recovery_id]
    assert (found[-1]["state"], [step["state"] for step in found[-1]["steps"]]) == (
        "succeeded",
        ["failed", "succeeded"],
    )
    assert active is None


def assert_left_at(boundary: str, left: Recovery, words: list[str]) -> None:
    """Make sure that the manager died where it was to."""
    first, second = left.steps
    assert left.ended_at is None
    assert second.state is StepState.WAITING
    if boundary == "planned":
        assert (first.state, first.job_ids, words) == (StepState.WAITING, (), [])
    elif boundary == "between":
        assert first.state is StepState.FAILED
    else:
        assert first.state is StepState.RUNNING
        assert (first.acted_at is not None) is (boundary in {"claimed", "act", "postcheck"})


def test_service_whose_restart_was_begun_is_not_restarted_again(ladder: Ladder, fleet: Fleet) -> None:
    bed, node = ladder.bed, fleet.nodes[1]
    # Each start is counted, and takes long enough to be killed in.
    drop_in = f"/etc/systemd/system/{SERVICE}.d/slow.conf"
    slow = f"[Service]\nExecStartPre=+/bin/sh -c 'echo start >> {TRACE}; sleep 4'\n"
    clear_trace(node)
    bed.register(node, node_type="served")
    try:
        node.stop_service()
        write_file(node, drop_in, slow)
        node.exec("systemctl", "daemon-reload")
        wait_until(lambda: "start" in traced(node), deadline_seconds=60, what="the restart", interval_seconds=0.05)
        bed.service.kill()
        left = ladder.climbs.latest_of(node.node_id)[0]
        bed.service.start()
        found = bed.wait_ended(node)
        bed.wait_for(node, "healthy")
        invocation = invocation_of(node)
        time.sleep(5)
        found = bed.recoveries(node)
    finally:
        node.exec("sh", "-ec", f"rm -f {drop_in}; systemctl daemon-reload")

    assert left is not None
    assert left.steps[0].acted_at is not None
    assert traced(node) == ["start"]
    assert [(item["recovery_id"], item["state"]) for item in found] == [(left.recovery_id, "succeeded")]
    assert (invocation_of(node), acted(found[-1])) == (invocation, ["restart_service"])


def controller_of(bed: Repairing, folder: Path) -> Controller:
    """Set up the command line of an operator on the manager's machine."""
    return make_controller(
        bed.service.home,
        **{key: value for key, value in bed.service.variables().items() if key.startswith("NODE_MANAGER_")},
        ANSIBLE_HOME=str(folder / "ansible"),
    )


def test_one_repairs_and_the_others_are_told_who(ladder: Ladder, tmp_path: Path) -> None:
    node, bed = ladder.node, ladder.bed
    ladder.begin_anew()
    for name in STEPS:
        write_step(
            ladder.steps,
            name,
            act=[noting(f"{name}-act", then=f"{HOLD}; systemctl start {SERVICE}")],
            postcheck=[noting(f"{name}-postcheck", then=f"systemctl is-active {SERVICE}", changes=False)],
        )
    before = len(bed.recoveries(node))
    barrier = threading.Barrier(2)

    def ask(_number: int) -> Any:
        barrier.wait(30)
        return bed.recover(node, reason="it looks odd", steps=["first"])

    # Two at once; then the automatic one has a reason as well, and somebody runs the playbook.
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, range(2)))
    node.stop_service()
    bed.wait_for(node, "degraded", seconds=40)
    run = controller_of(bed, tmp_path).playbook("recover", "-l", node.node_id)
    time.sleep(5)
    during = bed.recoveries(node)[before:]
    late = bed.recover(node)
    node.exec("touch", RELEASE)
    bed.wait_ended(node, before + 1)
    bed.wait_for(node, "healthy")

    (won,) = [answer.json() for answer in answers if answer.status_code == 202]
    lost = [answer for answer in [*answers, late] if answer.status_code != 202]
    assert [answer.status_code for answer in lost] == [409, 409]
    for answer in lost:
        told = answer.json()
        assert told["code"] == "recovery_in_progress"
        assert (told["recovery_id"], told["requested_by"], told["started_at"]) == (
            won["recovery_id"],
            won["requested_by"],
            won["started_at"],
        )
    assert run.return_code != 0
    assert "is being repaired by" in run.output, run.output + run.errors
    assert [item["recovery_id"] for item in during] == [won["recovery_id"]]
    assert traced(node).count("first-act") == 1


def test_automatic_repair_keeps_others_away_until_it_ends(ladder: Ladder, tmp_path: Path) -> None:
    node, bed = ladder.node, ladder.bed
    ladder.begin_anew()
    for name in STEPS:
        write_step(
            ladder.steps,
            name,
            act=[noting(f"{name}-act", then=f"{HOLD}; systemctl start {SERVICE}")],
            postcheck=[noting(f"{name}-postcheck", then=f"systemctl is-active {SERVICE}", changes=False)],
        )
    before = len(bed.recoveries(node))

    node.stop_service()
    held = bed.wait_until(ladder.active, 60, "the automatic repair", node)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _number: bed.recover(node), range(2)))
    run = controller_of(bed, tmp_path).playbook("recover", "-l", node.node_id)
    node.exec("touch", RELEASE)
    found = bed.wait_ended(node, before + 1)
    bed.wait_for(node, "healthy")

    assert [answer.status_code for answer in answers] == [409, 409]
    assert {(answer.json()["requested_by"], answer.json()["recovery_id"]) for answer in answers} == {
        ("recovery", held.recovery_id)
    }
    assert run.return_code != 0
    assert f"is being repaired by recovery since {held.started_at:%Y-%m-%d %H:%M:%S} UTC" in " ".join(
        run.output.split()
    ), run.output + run.errors
    assert [item["recovery_id"] for item in found[before:]] == [held.recovery_id]
    assert traced(node).count("first-act") == 1
