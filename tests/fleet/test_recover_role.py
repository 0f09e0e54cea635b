# SPDX-License-Identifier: GPL-3.0-or-later
"""The role node_recover by hand on real nodes: each step repairs what it is for, is on record, and does nothing elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ansible_runs import Controller, PlaybookRun, make_controller
from node_manager.domain import Admin, RecoveryState, StepState
from node_manager.recoveries import PLAYBOOK, Recoveries, Recovery

from fleet.conftest import RunningFleet
from fleet.nodes import Fleet, Node
from fleet.waiting import wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(300)]

APPLICATION = {"name": "app", "kind": "service", "unit": "demo-app.service"}
QUICK = {"node_recover_settle_seconds": 6, "node_recover_restart_within_seconds": 20}
TRAP = Path("/tmp/nm-recover-trap")
JINJA = "{{ lookup('pipe', 'touch " + str(TRAP) + "') }}"
# What docker.service of a node without Docker may be: it answers on the engine's socket as Docker does.
ENGINE = """
import http.server, os, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"Version": "20.10.24", "ApiVersion": "1.41", "Components": []}' if 'version' in self.path else b'[]'
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def address_string(self): return 'local'
path = '/run/docker.sock'
if os.path.exists(path): os.unlink(path)
socketserver.UnixStreamServer(path, Handler).serve_forever()
"""


@pytest.fixture
def controller(tmp_path: Path, running_fleet: RunningFleet) -> Controller:
    return make_own(tmp_path, running_fleet.fleet, [APPLICATION])


def make_own(
    tmp_path: Path, fleet: Fleet, checks: list[dict[str, Any]], thresholds: Any = None, **environment: str
) -> Controller:
    """Set up a controller whose nodes are of one type, with these checks."""
    kind = {"description": "To break", "checks": checks, "thresholds": thresholds or {}}
    (tmp_path / "node_types.json").write_text(json.dumps({"node_types": {"demo": kind}}), "utf-8")
    (tmp_path / "config.json").write_text('{"node_types_file": "node_types.json"}', "utf-8")
    credential = {"private_key_file": str(fleet.state_directory / "id_ed25519"), "user": "manager"}
    return make_controller(
        tmp_path / "home",
        NODE_MANAGER_CONFIG=str(tmp_path / "config.json"),
        NODE_MANAGER_SSH__CREDENTIALS=json.dumps({"fleet": credential}),
        NODE_MANAGER_SSH__DEFAULT_CREDENTIAL="fleet",
        **environment,
    )


def declare(controller: Controller, node: Node) -> None:
    controller.register(
        node.node_id,
        address=node.address,
        node_type="demo",
        connection={"kind": "ssh", "port": node.port, "become": True},
        host_keys=[node.host_key()],
    )


def recover(
    controller: Controller, node_id: str, *steps: str, arguments: tuple[str, ...] = (), **variables: Any
) -> PlaybookRun:
    told = {**QUICK, "node_recover_steps": list(steps), **variables}
    return controller.playbook("recover", "-l", node_id, "-e", json.dumps(told), *arguments)


@contextmanager
def recoveries(controller: Controller) -> Iterator[Recoveries]:
    with controller.store() as store:
        yield Recoveries(store, controller.settings)


def newest(controller: Controller, node_id: str) -> Recovery:
    with recoveries(controller) as climbs:
        return climbs.page(1, None, node_id=node_id).recoveries[0]


def states(recovery: Recovery) -> Mapping[str, StepState]:
    return {step.step: step.state for step in recovery.steps}


def test_a_stopped_service_is_restarted_and_a_second_run_finds_nothing(controller: Controller, node: Node) -> None:
    declare(controller, node)
    node.stop_service()

    first = recover(controller, node.node_id, "restart_container", "restart_service", "reboot")
    climb = newest(controller, node.node_id)
    second = recover(controller, node.node_id, "restart_service", "give_up")
    again = newest(controller, node.node_id)

    assert first.return_code == 0, first.output + first.errors
    assert node.service_state() == "active"
    assert first.count("changed") == {node.node_id: 1}
    assert climb.state is RecoveryState.SUCCEEDED
    assert states(climb) == {
        "restart_container": StepState.SKIPPED,
        "restart_service": StepState.SUCCEEDED,
        "reboot": StepState.WAITING,
    }
    assert "restarted demo-app.service" in (climb.steps[1].message or "")
    assert (second.return_code, second.count("changed")) == (0, {node.node_id: 0}), second.output + second.errors
    assert states(again) == {"restart_service": StepState.SKIPPED, "give_up": StepState.WAITING}
    assert controller.node(node.node_id).admin is Admin.ACTIVE


def test_check_mode_shows_the_change_and_neither_does_nor_records_it(controller: Controller, node: Node) -> None:
    declare(controller, node)
    node.stop_service()

    run = recover(controller, node.node_id, arguments=("--check", "--diff"))

    assert run.return_code == 0, run.output + run.errors
    assert run.count("changed") == {node.node_id: 1}
    assert "-    demo-app.service: inactive (dead)" in run.output.replace('"', "").replace("-demo", "-    demo")
    assert node.service_state() == "inactive"
    with recoveries(controller) as climbs:
        assert climbs.page(10, None).recoveries == []


def test_dry_run_reports_no_change_and_records_the_plan(controller: Controller, node: Node) -> None:
    declare(controller, node)
    node.stop_service()

    run = recover(
        controller, node.node_id, "restart_service", "restart_container", "give_up", node_recover_dry_run=True
    )

    climb = newest(controller, node.node_id)
    assert (run.return_code, run.count("changed")) == (0, {node.node_id: 0}), run.output + run.errors
    assert node.service_state() == "inactive"
    assert climb.state is RecoveryState.PLANNED
    assert states(climb) == {
        "restart_service": StepState.PLANNED,
        "restart_container": StepState.SKIPPED,
        "give_up": StepState.PLANNED,
    }
    assert [step.acted_at for step in climb.steps] == [None, None, None]


def test_nobody_repairs_the_whole_registry_by_accident(controller: Controller, node: Node) -> None:
    declare(controller, node)
    node.stop_service()

    run = controller.playbook("recover")

    assert run.return_code == 2
    assert "Say which: -l gw-7, or -l all" in run.output
    assert node.service_state() == "inactive"


def test_a_node_that_somebody_repairs_is_left_alone(controller: Controller, node: Node) -> None:
    declare(controller, node)
    node.stop_service()
    with recoveries(controller) as climbs:
        climbs.begin_by_hand(node.node_id, ["restart_service"], "alice", "mine", dry_run=False, driver=PLAYBOOK)

    run = recover(controller, node.node_id, "restart_service")

    assert run.return_code == 2
    assert "is being repaired by alice" in run.output
    assert node.service_state() == "inactive"
    assert newest(controller, node.node_id).ended_at is None


def test_an_act_that_was_given_before_is_not_repeated(controller: Controller, node: Node) -> None:
    declare(controller, node)
    node.stop_service()
    with recoveries(controller) as climbs:
        climb = climbs.begin_by_hand(
            node.node_id, ["free_disk", "restart_service"], "alice", "", dry_run=False, driver=PLAYBOOK
        )
        climbs.claim_act(climb.recovery_id, 1)

    run = recover(
        controller,
        node.node_id,
        "restart_service",
        node_recover_recovery_id=climb.recovery_id,
        node_recover_position=1,
        node_recover_settle_seconds=1,
    )

    after = newest(controller, node.node_id)
    assert run.return_code == 0, run.output + run.errors
    assert node.service_state() == "inactive"
    assert states(after) == {"free_disk": StepState.WAITING, "restart_service": StepState.FAILED}
    assert "Still wrong: demo-app.service is inactive" in (after.steps[1].message or "")
    assert after.ended_at is None


def test_a_silent_node_has_its_steps_told_and_is_given_up(controller: Controller, node: Node) -> None:
    declare(controller, node)
    node.pause()

    run = recover(controller, node.node_id, "restart_service", "give_up")

    climb = newest(controller, node.node_id)
    assert run.return_code == 2, run.output + run.errors
    assert climb.state is RecoveryState.GAVE_UP
    assert states(climb) == {"restart_service": StepState.FAILED, "give_up": StepState.SUCCEEDED}
    assert (climb.steps[0].message or "").startswith("The node can't be reached")
    assert climb.ended_at is not None


def test_a_node_that_goes_away_under_its_act_has_that_told(controller: Controller, node: Node, tmp_path: Path) -> None:
    declare(controller, node)
    step = own_step(tmp_path / "steps" / "freeze")
    controller = with_steps(controller, tmp_path / "steps")
    step.joinpath("act.yml").write_text(
        "- name: Freeze it\n  ansible.builtin.command: "
        f"{node.engine.client} pause {node.container}\n  delegate_to: localhost\n  become: false\n",
        "utf-8",
    )

    run = recover(controller, node.node_id, "freeze", node_recover_steps_directory=str(tmp_path / "steps"))

    climb = newest(controller, node.node_id)
    assert run.return_code == 2, run.output + run.errors
    assert states(climb) == {"freeze": StepState.FAILED}
    assert climb.state is RecoveryState.FAILED


def with_steps(controller: Controller, folder: Path) -> Controller:
    """Tell the manager of an operator's steps too."""
    return Controller(
        controller.home, {**controller.environment, "NODE_MANAGER_RECOVERY__STEPS_DIRECTORY": str(folder)}
    )


def own_step(folder: Path) -> Path:
    """Write a step of an operator, whose act does nothing yet."""
    folder.mkdir(parents=True)
    needed = {"node_recover_needed": True, "node_recover_why": "says the operator"}
    (folder / "precheck.yml").write_text(json.dumps([{"name": "Say so", "ansible.builtin.set_fact": needed}]), "utf-8")
    (folder / "act.yml").write_text('[{"name": "Do", "ansible.builtin.command": "true"}]', "utf-8")
    (folder / "postcheck.yml").write_text('[{"name": "See", "ansible.builtin.command": "true"}]', "utf-8")
    return folder


def test_an_operators_step_comes_before_ours(controller: Controller, node: Node, tmp_path: Path) -> None:
    own_step(tmp_path / "steps" / "restart_service")
    controller = with_steps(controller, tmp_path / "steps")
    declare(controller, node)
    node.stop_service()

    run = recover(controller, node.node_id, "restart_service", node_recover_steps_directory=str(tmp_path / "steps"))

    assert run.return_code == 0, run.output + run.errors
    assert newest(controller, node.node_id).steps[0].message == "says the operator"
    assert node.service_state() == "inactive"


def test_a_service_that_does_not_stay_up_is_no_success(controller: Controller, node: Node) -> None:
    declare(controller, node)
    drop_in = "[Service]\nExecStart=\nExecStart=/bin/sh -c 'sleep 0.5; exit 3'\n"
    node.exec("install", "-d", "/etc/systemd/system/demo-app.service.d")
    node.exec("tee", "/etc/systemd/system/demo-app.service.d/broken.conf", text=drop_in)
    node.exec("systemctl", "daemon-reload")
    node.stop_service()

    run = recover(controller, node.node_id, "restart_service")

    climb = newest(controller, node.node_id)
    assert run.return_code == 2
    assert states(climb) == {"restart_service": StepState.FAILED}
    assert "demo-app.service was restarted and is failed" in (climb.steps[0].message or "")


def test_a_start_that_hangs_is_cut_short(controller: Controller, node: Node) -> None:
    declare(controller, node)
    drop_in = "[Service]\nType=notify\nTimeoutStartSec=infinity\nExecStart=\nExecStart=/bin/sleep 1000\n"
    node.exec("install", "-d", "/etc/systemd/system/demo-app.service.d")
    node.exec("tee", "/etc/systemd/system/demo-app.service.d/broken.conf", text=drop_in)
    node.exec("systemctl", "daemon-reload")
    node.stop_service()

    run = recover(controller, node.node_id, "restart_service", node_recover_restart_within_seconds=4)

    climb = newest(controller, node.node_id)
    assert run.return_code == 2
    assert "demo-app.service was restarted and is activating" in (climb.steps[0].message or "")
    assert node.exec("systemctl", "list-jobs", "--no-legend").strip() == "No jobs running." or not node.exec(
        "systemctl", "list-jobs", "--no-legend"
    )


def test_a_dead_container_runtime_is_restarted(tmp_path: Path, running_fleet: RunningFleet, node: Node) -> None:
    controller = make_own(tmp_path, running_fleet.fleet, [])
    declare(controller, node)
    unit = "[Service]\nExecStart=/usr/bin/python3 /opt/engine.py\nKillMode=process\n[Install]\nWantedBy=multi-user.target\n"
    node.exec("tee", "/opt/engine.py", text=ENGINE)
    node.exec("tee", "/etc/systemd/system/docker.service", text=unit)
    node.exec("systemctl", "enable", "--now", "docker.service")
    wait_until(
        lambda: node.exec("sh", "-c", "test -S /run/docker.sock && echo there || true"), deadline_seconds=10, what="it"
    )
    well = recover(controller, node.node_id, "restart_container_runtime")
    # Frozen: its socket accepts and never answers.
    node.exec("systemctl", "kill", "--signal=STOP", "docker.service")

    hung = recover(controller, node.node_id, "restart_container_runtime")
    node.crash_service("docker.service")
    dead = recover(controller, node.node_id, "restart_container_runtime")

    assert (well.return_code, well.count("changed")) == (0, {node.node_id: 0}), well.output
    assert (hung.return_code, hung.count("changed")) == (0, {node.node_id: 1}), hung.output
    assert (dead.return_code, dead.count("changed")) == (0, {node.node_id: 1}), dead.output
    assert "docker.service does not answer" in hung.output or "restarted docker.service" in hung.output
    assert node.service_state("docker.service") == "active"


def test_a_full_disk_is_freed_from_the_safe_set_alone(tmp_path: Path, running_fleet: RunningFleet, node: Node) -> None:
    disk = {"name": "tmp", "kind": "filesystem", "mount": "/var/tmp", "space_percent": 80}
    controller = make_own(tmp_path, running_fleet.fleet, [disk])
    declare(controller, node)
    node.exec("mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", "/var/tmp")
    node.exec(
        "sh", "-c",
        "cd /var/tmp; mkdir old; for n in 1 2 3 4 5 6; do head -c 1000000 /dev/zero > old/$n; done; "
        "head -c 3000000 /dev/zero > new; mkdir /srv/precious; echo mine > /srv/precious/data; ln -s /srv/precious out; "
        "touch -h -d '20 days ago' old/* out /srv/precious/data; touch -d '20 days ago' old; "
        # Nothing but the clock can make a change time old.
        "true",
    )  # fmt: skip

    # The change time of what was just written is now: so age is nothing here.
    young = recover(controller, node.node_id, "free_disk", node_recover_older_than_days=10)
    rehearsal = recover(
        controller, node.node_id, "free_disk", node_recover_older_than_days=0, arguments=("--check", "--diff")
    )
    kept = node.exec("ls", "/var/tmp/old").split()
    freed = recover(
        controller,
        node.node_id,
        "free_disk",
        node_recover_older_than_days=0,
        node_recover_disk_sources=["temporary_files"],
    )
    again = recover(controller, node.node_id, "free_disk", node_recover_older_than_days=0)

    assert young.return_code == 2
    assert "nothing that may be removed is there" in young.output
    assert (rehearsal.return_code, rehearsal.count("changed")) == (0, {node.node_id: 1}), rehearsal.output
    assert kept == ["1", "2", "3", "4", "5", "6"]
    assert (freed.return_code, freed.count("changed")) == (0, {node.node_id: 1}), freed.output
    assert "temporary_files of /var/tmp" in freed.output
    # It stops once enough is free.
    assert node.exec("ls", "/var/tmp/old", "/var/tmp").split()
    assert node.exec("cat", "/srv/precious/data") == "mine"
    assert (again.return_code, again.count("changed")) == (0, {node.node_id: 0})


def test_a_reboot_is_waited_for(tmp_path: Path, running_fleet: RunningFleet, node: Node) -> None:
    # A file that is gone with the boot.
    check = {"name": "stuck", "kind": "command", "argv": ["/usr/bin/test", "!", "-e", "/run/stuck"]}
    controller = make_own(tmp_path, running_fleet.fleet, [check])
    declare(controller, node)
    node.engine.run("update", "--restart", "always", node.container)
    idle = recover(controller, node.node_id, "reboot")
    started = node.process_id
    node.exec("touch", "/run/stuck")

    run = recover(controller, node.node_id, "reboot", node_recover_back_within_seconds=90)

    climb = newest(controller, node.node_id)
    node.engine.run("update", "--restart", "no", node.container)
    assert (idle.return_code, idle.count("changed")) == (0, {node.node_id: 0}), idle.output
    assert run.return_code == 0, run.output + run.errors
    assert states(climb) == {"reboot": StepState.SUCCEEDED}
    assert node.process_id != started


def power_script(folder: Path, node: Node) -> list[str]:
    script = folder / "power"
    script.write_text(
        f'#!/bin/sh\nprintf "%s|%s|%s|%s\\n" "$1" "$2" "$NODE_ID" "$RECOVERY_ID" >> {folder}/calls\n'
        f"{node.engine.client} kill {node.container} && {node.engine.client} start {node.container}\n"
    )
    script.chmod(0o755)
    return [str(script), "{node_id}", "at={address}"]


def test_a_hung_node_is_switched_off_and_on(tmp_path: Path, running_fleet: RunningFleet, node: Node) -> None:
    power = {"command": power_script(tmp_path, node)}
    controller = make_own(tmp_path, running_fleet.fleet, [APPLICATION], NODE_MANAGER_RECOVERY__POWER=json.dumps(power))
    declare(controller, node)
    idle = recover(controller, node.node_id, "power_cycle")
    rehearsed = recover(controller, node.node_id, "power_cycle", arguments=("--check",))
    node.pause()

    run = recover(controller, node.node_id, "power_cycle", node_recover_back_within_seconds=90)

    climb = newest(controller, node.node_id)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (idle.return_code, idle.count("changed")) == (0, {node.node_id: 0}), idle.output
    assert rehearsed.count("changed") == {node.node_id: 0}
    assert run.return_code == 0, run.output + run.errors
    assert states(climb) == {"power_cycle": StepState.SUCCEEDED}
    assert calls == [f"{node.node_id}|at={node.address}|{node.node_id}|{climb.recovery_id}"]


def test_a_node_that_refuses_the_manager_is_not_switched_off(
    tmp_path: Path, running_fleet: RunningFleet, node: Node
) -> None:
    power = {"command": power_script(tmp_path, node)}
    controller = make_own(tmp_path, running_fleet.fleet, [APPLICATION], NODE_MANAGER_RECOVERY__POWER=json.dumps(power))
    declare(controller, node)
    node.authorize(f"ssh-ed25519 {'A' * 67}B nobody\n")

    run = recover(controller, node.node_id, "power_cycle")

    assert run.return_code == 0, run.output + run.errors
    assert states(newest(controller, node.node_id)) == {"power_cycle": StepState.SKIPPED}
    assert "refuses the manager" in run.output
    assert not (tmp_path / "calls").exists()


def test_words_of_a_node_are_never_templated(tmp_path: Path, running_fleet: RunningFleet, node: Node) -> None:
    check = {"name": "says", "kind": "command", "argv": ["/usr/bin/sh", "/opt/says"]}
    controller = make_own(tmp_path, running_fleet.fleet, [check])
    declare(controller, node)
    node.exec("tee", "/opt/says", text=f"cat <<'X'\n{JINJA}\nX\nexit 1\n")
    TRAP.unlink(missing_ok=True)

    run = recover(controller, node.node_id, "reboot", node_recover_dry_run=True)

    climb = newest(controller, node.node_id)
    assert run.return_code == 0, run.output + run.errors
    assert JINJA in (climb.steps[0].message or "")
    assert not TRAP.exists()


def test_a_crashed_container_is_restarted(tmp_path: Path, running_fleet: RunningFleet) -> None:
    name = f"nm-recover-{tmp_path.parent.name}-{running_fleet.fleet.name}"
    engine = running_fleet.fleet.engine
    controller = make_own(tmp_path, running_fleet.fleet, [{"name": "c", "kind": "container", "container": name}])
    controller.register("manager", node_type="demo")
    engine.attempt("rm", "--force", name)
    engine.run("run", "--detach", "--name", name, "--network", "none", running_fleet.image, "sleep", "1000")
    try:
        engine.run("kill", name)
        first = recover(controller, "manager", "restart_service", "restart_container")
        engine.run("pause", name)
        second = recover(controller, "manager", "restart_container")
        state = engine.run("inspect", "--format", "{{.State.Status}}", name)
    finally:
        engine.attempt("rm", "--force", name)

    assert (first.return_code, first.count("changed")) == (0, {"manager": 1}), first.output + first.errors
    assert (second.return_code, second.count("changed")) == (0, {"manager": 1}), second.output + second.errors
    assert "thawed container" in second.output
    assert state == "running"


def test_the_managers_own_machine_is_neither_rebooted_nor_switched_off(
    tmp_path: Path, running_fleet: RunningFleet
) -> None:
    check = {"name": "never", "kind": "command", "argv": ["/bin/false"]}
    controller = make_own(tmp_path, running_fleet.fleet, [check])
    controller.register("manager", node_type="demo")

    runs = [recover(controller, "manager", step, node_recover_force=True) for step in ("reboot", "power_cycle")]

    assert [run.return_code for run in runs] == [2, 2], [run.output for run in runs]
    assert "it is the manager's own machine" in runs[0].output.replace("\n", " ")
    assert "recovery.power is not configured" in runs[1].output.replace("\n", " ")
