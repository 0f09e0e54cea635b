# SPDX-License-Identifier: GPL-3.0-or-later
"""The playbooks on real nodes over SSH: each fault is told apart, and leaves the other nodes of the run alone."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ansible_runs import BIN, ROOT, Controller, make_controller
from node_manager.domain import ConditionType, ContactReason, Health

from fleet.conftest import RunningFleet
from fleet.nodes import Fleet, Node
from fleet.waiting import wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]
QUICK = ("-e", "node_check_interval_seconds=0.1", "-e", "node_gather_interval_seconds=0.1")


@pytest.fixture
def controller(tmp_path: Path, running_fleet: RunningFleet) -> Controller:
    credential = {"private_key_file": str(running_fleet.fleet.state_directory / "id_ed25519"), "user": "manager"}
    return make_controller(
        tmp_path / "home",
        NODE_MANAGER_SSH__CREDENTIALS=json.dumps({"fleet": credential}),
        NODE_MANAGER_SSH__DEFAULT_CREDENTIAL="fleet",
    )


def declare(controller: Controller, *nodes: Node, pinned: bool = True) -> None:
    for node in nodes:
        controller.register(
            node.node_id,
            address=node.address,
            connection={"kind": "ssh", "port": node.port},
            host_keys=[node.host_key()] if pinned else [],
        )


def reason_of(controller: Controller, node_id: str) -> ContactReason | None:
    broken = [condition for condition in controller.node(node_id).state.conditions if not condition.status]
    paths = [condition for condition in broken if condition.type is not ConditionType.CHECKS_PASSING]
    return ContactReason(paths[0].reason) if paths else None


def test_register_adopts_the_inventory_of_the_fleet(controller: Controller, fleet: Fleet) -> None:
    first = controller.playbook("register", "-i", str(fleet.inventory), *QUICK)
    second = controller.playbook("register", "-i", str(fleet.inventory), *QUICK)

    assert set(first.count("changed").values()) == {1}, first.output + first.errors
    assert set(second.count("changed").values()) == {0}
    for node in fleet.nodes:
        seen = controller.node(node.node_id)
        assert seen.facts is not None
        assert seen.state.health in {Health.HEALTHY, Health.DEGRADED}
        # The node's own key is pinned, as it was seen over the connection that was trusted first.
        assert node.host_key() in {key for key, _ in seen.host_keys}


@pytest.mark.parametrize("name", ["register", "gather", "check", "site"])
def test_playbook_changes_nothing_on_nodes_of_the_registry(controller: Controller, fleet: Fleet, name: str) -> None:
    declare(controller, *fleet.nodes)

    rehearsal = controller.playbook(name, *QUICK, "--check")
    unseen = [controller.node(node.node_id).facts for node in fleet.nodes]
    first = controller.playbook(name, *QUICK)
    second = controller.playbook(name, *QUICK)

    assert (rehearsal.return_code, first.return_code, second.return_code) == (0, 0, 0), first.output + first.errors
    assert unseen == [None] * len(fleet.nodes)
    assert {*rehearsal.count("changed").values(), *second.count("changed").values()} == {0}
    assert all(controller.node(node.node_id).facts is not None for node in fleet.nodes)


def test_first_contact_pins_the_key_that_was_seen(controller: Controller, fleet: Fleet) -> None:
    node = fleet.nodes[0]
    declare(controller, node, pinned=False)

    run = controller.playbook("gather", *QUICK)

    assert run.return_code == 0, run.output + run.errors
    assert [(key, origin) for key, origin in controller.node(node.node_id).host_keys] == [
        (node.host_key(), "first_use")
    ]


FAULTS: dict[str, tuple[Callable[[Node], object], ContactReason]] = {
    "killed": (Node.kill, ContactReason.CONNECTION_REFUSED),
    "frozen": (Node.pause, ContactReason.TIMED_OUT),
    "other-host-key": (Node.regenerate_host_key, ContactReason.HOST_KEY_CHANGED),
    "no-python": (Node.remove_python, ContactReason.PYTHON_MISSING),
    "other-login-key": (
        lambda node: node.authorize(f"ssh-ed25519 {'A' * 67}B nobody\n"),
        ContactReason.AUTHENTICATION_FAILED,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_tells_faults_apart(controller: Controller, fleet: Fleet, node: Node, fault: str) -> None:
    breaks, expected = FAULTS[fault]
    well = fleet.nodes[0]
    declare(controller, well, node)
    breaks(node)

    run = controller.playbook("check", *QUICK)

    assert expected is reason_of(controller, node.node_id), run.output + run.errors
    assert run.recap[well.node_id]["failed"] == run.recap[well.node_id]["unreachable"] == 0
    assert reason_of(controller, well.node_id) is None
    quarantined = expected is ContactReason.HOST_KEY_CHANGED
    assert quarantined is controller.node(node.node_id).state.quarantined


def test_link_cut_in_the_middle_of_a_task_is_noticed_within_the_keepalive(controller: Controller, node: Node) -> None:
    controller.register(
        node.node_id,
        address=node.bridge_address,
        connection={"kind": "ssh", "port": 22},
        host_keys=[node.host_key()],
    )
    run = subprocess.Popen(
        [
            str(BIN / "ansible-playbook"), "playbooks/gather.yml",
            "-e", "node_gather_interval_seconds=50", "-e", "node_gather_timeout_seconds=55",
        ],
        cwd=ROOT, env=controller.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(
            lambda: (
                "node_resources" in node.exec("sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")
                or "python3" in node.exec("sh", "-c", "cat /proc/[0-9]*/comm 2>/dev/null")
            ),
            deadline_seconds=60,
            what="the module on the node",
        )
        started = time.monotonic()
        node.cut()
        run.communicate(timeout=60)
        seconds = time.monotonic() - started
    finally:
        run.kill()
        run.wait(10)

    assert reason_of(controller, node.node_id) in {ContactReason.CONNECTION_LOST, ContactReason.TIMED_OUT}
    # Two keepalives 2 s apart, and what the run takes to end; without them this is minutes.
    assert seconds < 30


def test_a_dead_node_is_deregistered(controller: Controller, node: Node) -> None:
    declare(controller, node)
    node.kill()

    run = controller.playbook("deregister", "-l", node.node_id)

    assert (run.return_code, run.count("changed")) == (0, {node.node_id: 1})


def test_a_hostile_host_name_is_stored_as_it_is(controller: Controller, node: Node) -> None:
    # The kernel takes any 64 bytes; the tool hostname is stricter.
    trap = Path("/tmp/nm-trap")
    name = "{{ lookup('pipe','touch " + str(trap) + "') }}"
    node.exec("python3", "-c", "import socket, sys; socket.sethostname(sys.argv[1])", name)
    declare(controller, node)

    run = controller.playbook("check", *QUICK, "-v")

    facts = controller.node(node.node_id).facts
    assert run.return_code == 0, run.output + run.errors
    assert facts is not None
    assert facts["hostname"] == name
    assert not trap.exists()


def test_nodes_behind_a_jump_host_are_reached(controller: Controller, fleet: Fleet) -> None:
    edge, inner = fleet.nodes[:2]
    declare(controller, edge)
    controller.register(
        inner.node_id,
        address=inner.bridge_address,
        connection={"kind": "ssh", "jump_host": edge.node_id},
        host_keys=[inner.host_key()],
    )

    run = controller.playbook("gather", "-l", inner.node_id, *QUICK)

    assert run.return_code == 0, run.output + run.errors
    assert controller.node(inner.node_id).facts is not None
