# SPDX-License-Identifier: GPL-3.0-or-later
"""playbooks/maintain.yml on real nodes: work on empty nodes, one after the other; who does not come back stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ansible_runs import BIN, ROOT, Controller, PlaybookRun, make_controller
from node_manager.domain import Admin
from node_manager.drain_blockers import load_situation
from node_manager.node_registry import Node as Registered
from node_manager.views import render_maintenance
from running_service import RunningService

from fleet.conftest import RunningFleet
from fleet.nodes import Fleet, Node
from fleet.waiting import wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(900)]
QUICK = ("-e", "node_check_interval_seconds=0.1", "-e", "node_gather_interval_seconds=0.1")
WORK = """
- name: Leave a trace
  ansible.builtin.copy: {content: x, dest: /var/tmp/worked, mode: "0644"}
"""


@pytest.fixture
def controller(tmp_path: Path, running_fleet: RunningFleet) -> Controller:
    credential = {"private_key_file": str(running_fleet.fleet.state_directory / "id_ed25519"), "user": "manager"}
    return make_controller(
        tmp_path / "home",
        NODE_MANAGER_SSH__CREDENTIALS=json.dumps({"fleet": credential}),
        NODE_MANAGER_SSH__DEFAULT_CREDENTIAL="fleet",
    )


def declare(controller: Controller, *nodes: Node) -> None:
    for node in nodes:
        controller.register(
            node.node_id,
            address=node.address,
            connection={"kind": "ssh", "port": node.port},
            host_keys=[node.host_key()],
        )


def maintain(controller: Controller, tmp_path: Path, work: str, *arguments: str, **environment: str) -> PlaybookRun:
    """Run the playbook: many tasks, one node after the other, which takes its time on a busy machine."""
    (tmp_path / "work.yml").write_text(work)
    said = json.dumps({"node_maintain_tasks": str(tmp_path / "work.yml"), "node_maintain_reason": "new kernel"})
    done = subprocess.run(
        [str(BIN / "ansible-playbook"), "playbooks/maintain.yml", *QUICK, "-e", said, *arguments],
        cwd=ROOT, env={**controller.environment, **environment}, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=400, check=False,
    )  # fmt: skip
    return PlaybookRun(done.returncode, done.stdout, done.stderr)


def admin(controller: Controller, node: Node) -> Admin:
    found: Registered = controller.node(node.node_id)
    return found.admin


def maintenance(controller: Controller, node: Node) -> dict[str, Any]:
    with controller.store() as store:
        situation = load_situation(store, controller.settings, node.node_id)
    assert situation is not None
    return render_maintenance(situation)


def worked(node: Node) -> bool:
    return "worked" in node.exec("ls", "/var/tmp")


def test_check_mode_changes_nothing(controller: Controller, fleet: Fleet, tmp_path: Path) -> None:
    node = fleet.nodes[0]
    declare(controller, node)

    run = maintain(controller, tmp_path, WORK, "--check")

    assert run.return_code == 0, run.output + run.errors
    assert (admin(controller, node), worked(node)) == (Admin.ACTIVE, False)


def test_nodes_are_worked_on_and_taken_back_without_the_service(
    controller: Controller, fleet: Fleet, tmp_path: Path
) -> None:
    nodes = fleet.nodes[:2]
    declare(controller, *nodes)

    first = maintain(controller, tmp_path, WORK)
    second = maintain(controller, tmp_path, WORK, "-l", nodes[0].node_id)

    assert (first.return_code, second.return_code) == (0, 0), first.output + first.errors
    assert [admin(controller, node) for node in nodes] == [Admin.ACTIVE] * 2
    assert second.count("changed") == {nodes[0].node_id: 0}
    for node in nodes:
        assert worked(node)
        node.exec("rm", "/var/tmp/worked")


FAULTS: dict[str, tuple[str, str]] = {
    "work-fails": (
        "- name: Flash it\n  ansible.builtin.fail: {msg: no such image}\n",
        "failed at 'Flash it': no such image",
    ),
    "stays-away": ("- name: Pull it\n  ansible.builtin.command: /bin/true\n  vars: {ansible_port: 9}\n", "new kernel"),
    "check-fails": (
        "- name: Break it\n  ansible.builtin.set_fact:\n    node_check_more_checks:\n"
        "      - {name: app, kind: tcp, port: 9, severity: critical, timeout_seconds: 1}\n",
        "did not leave maintenance",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_node_that_does_not_come_back_stops_the_run(
    controller: Controller, fleet: Fleet, tmp_path: Path, fault: str
) -> None:
    lost, next_one = fleet.nodes[:2]
    declare(controller, lost, next_one)
    work, told = FAULTS[fault]

    run = maintain(controller, tmp_path, work, "-e", "node_maintain_check_seconds=20")

    assert run.return_code != 0
    assert (admin(controller, lost), admin(controller, next_one)) == (Admin.MAINTENANCE, Admin.ACTIVE), run.output
    assert told in maintenance(controller, lost)["reason"], run.output
    assert next_one.node_id not in run.recap, run.output


def test_unreachable_node_stops_the_run_also_among_several_at_once(
    controller: Controller, fleet: Fleet, tmp_path: Path
) -> None:
    lost, beside, later = fleet.nodes[:3]
    declare(controller, lost, beside, later)
    work = (
        "- name: Pull it\n  ansible.builtin.command: /bin/true\n"
        f"  vars:\n    ansible_port: \"{{{{ 9 if inventory_hostname == '{lost.node_id}' else {beside.port} }}}}\"\n"
    )

    run = maintain(controller, tmp_path, work, "-e", "node_maintain_serial=2")

    assert run.return_code != 0
    found = [admin(controller, node) for node in (lost, beside, later)]
    assert found == [Admin.MAINTENANCE, Admin.ACTIVE, Admin.ACTIVE], run.output
    assert run.recap.get(later.node_id, {}).get("changed", 0) == 0, run.output
    assert "Pull it" not in run.output.partition(later.node_id)[2]


@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_node_stays_in_maintenance_with_a_reason_when_the_run_is_ended(
    controller: Controller, fleet: Fleet, tmp_path: Path, ends: signal.Signals
) -> None:
    node = fleet.nodes[0]
    declare(controller, node)
    begun = tmp_path / "begun"
    work = tmp_path / "work.yml"
    work.write_text(
        f"- name: Begin\n  ansible.builtin.file: {{path: {begun}, state: touch}}\n  delegate_to: localhost\n"
        "- name: Go on\n  ansible.builtin.command: sleep 50\n"
    )
    said = json.dumps({"node_maintain_tasks": str(work), "node_maintain_reason": "new kernel"})
    run = subprocess.Popen(
        [str(BIN / "ansible-playbook"), "playbooks/maintain.yml", *QUICK, "-e", said],
        cwd=ROOT, env=controller.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_until(begun.exists, deadline_seconds=120, what="the work")
        run.send_signal(ends)
        run.wait(60)
    finally:
        # All of its session, which we made: its workers would go on.
        if run.poll() is None or ends is signal.SIGKILL:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
        run.wait(10)

    assert admin(controller, node) is Admin.MAINTENANCE
    assert maintenance(controller, node)["reason"] == "new kernel"


def test_a_node_that_somebody_else_holds_is_left_alone(controller: Controller, fleet: Fleet, tmp_path: Path) -> None:
    node = fleet.nodes[0]
    declare(controller, node)
    make_service: Callable[[], RunningService] = lambda: RunningService(controller.home, controller.environment).start()  # noqa: E731
    service = make_service()
    try:
        with service.client() as api:
            body = {"status": "maintenance", "reason": "mine"}
            api.put(f"/nodes/{node.node_id}/status", json=body)

        run = maintain(controller, tmp_path, WORK)

        with service.client() as api:
            found = api.get(f"/nodes/{node.node_id}").json()["maintenance"]
    finally:
        service.kill()
    assert run.return_code != 0
    assert "is held by" in run.output + run.errors
    assert (found["reason"], worked(node)) == ("mine", False)


def test_nodes_are_worked_on_over_http(controller: Controller, fleet: Fleet, tmp_path: Path) -> None:
    nodes = fleet.nodes[:2]
    declare(controller, *nodes)
    service = RunningService(controller.home, controller.environment).start()
    elsewhere = {"NODE_MANAGER_URL": service.url, "NODE_MANAGER_TOKEN": service.token}
    try:
        run = maintain(controller, tmp_path, WORK, NODE_MANAGER_HOME=str(tmp_path / "elsewhere"), **elsewhere)
        with service.client() as api:
            found = [api.get(f"/nodes/{node.node_id}").json() for node in nodes]
    finally:
        service.kill()

    assert run.return_code == 0, run.output + run.errors
    assert [(node["admin"], node["maintenance"]) for node in found] == [("active", None)] * 2
    for node in nodes:
        node.exec("rm", "/var/tmp/worked")
