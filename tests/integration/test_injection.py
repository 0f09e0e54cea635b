# SPDX-License-Identifier: GPL-3.0-or-later
"""Templates in what people declare and in what nodes say: stored and shown as they are, executed nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_runs import BIN, Controller, make_controller

QUICK = ("-e", "node_check_interval_seconds=0.1")


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return make_controller(tmp_path / "home")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """Name a file that only an executed template makes."""
    return tmp_path / "executed"


def bait(trap: Path) -> str:
    return "{{ lookup('pipe', 'touch " + str(trap) + "') }}"


SHOW = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.debug:
        msg:
          - "{{ node_manager_name }}"
          - "{{ node_manager_labels }}"
          - "{{ node_manager_location.site }}"
    - ansible.builtin.set_fact:
        again: "{{ node_manager_name }}"
    - ansible.builtin.debug:
        var: again
    - ansible.builtin.command: echo {{ node_manager_name | quote }} {{ hostvars[inventory_hostname].again | quote }}
      changed_when: false
    - ansible.builtin.copy:
        content: "{{ node_manager_labels | to_json }}"
        dest: "{{ dest }}"
        mode: "0600"
"""


def test_declared_templates_are_shown_verbatim(controller: Controller, tmp_path: Path, trap: Path) -> None:
    text = bait(trap)
    site = "{{ lookup('pipe', 'touch x') }}"
    controller.register("local-1", name=text, labels={"line": text}, location={"site": site, "zone": "{% raw %}"})
    play = tmp_path / "show.yml"
    play.write_text(SHOW)

    done = controller.run("ansible-playbook", str(play), "-e", f"dest={tmp_path / 'labels.json'}")

    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "labels.json").read_text()) == {"line": text}
    assert site in done.stdout.replace("''", "'")
    assert not trap.exists()
    assert not (Path.cwd() / "x").exists()


@pytest.mark.parametrize("name", ["register", "gather", "check", "deregister"])
def test_playbooks_never_execute_what_is_declared(controller: Controller, trap: Path, name: str) -> None:
    text = bait(trap)
    controller.register("local-1", name=text, labels={"line": text}, location={"zone": text[:63]})

    run = controller.playbook(name, "-l", "local-1", *QUICK, "--diff", "-v")

    assert run.return_code == 0, run.output + run.errors
    assert not trap.exists()


def test_adopted_templates_are_stored_verbatim(controller: Controller, tmp_path: Path, trap: Path) -> None:
    text = bait(trap)
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(
        "all:\n  hosts:\n    gw-7:\n      ansible_host: 127.0.0.1\n      ansible_port: 9\n"
        f"      node_register_labels: {{line: !unsafe {json.dumps(text)}}}\n"
    )

    run = controller.playbook("register", "-i", str(inventory), "--diff")

    assert run.count("changed") == {"gw-7": 1}
    assert controller.node("gw-7").labels == {"line": text}
    assert not trap.exists()


def test_templates_in_facts_are_stored_verbatim(controller: Controller, tmp_path: Path, trap: Path) -> None:
    text = bait(trap)
    controller.register("local-1")
    facts = {
        "schema": 1, "hostname": text, "machine_id": None, "boot_id": None, "kernel": text, "architecture": None,
        "os": {"id": text, "version": None, "name": None}, "board": {"vendor": text, "model": None},
        "virtualization": None, "python_version": None, "service_manager": None, "cpu": {"count": 1, "model": text},
        "memory_total_bytes": 8 * 1024**3, "disk_total_bytes": None, "network_mbps": None, "devices": {},
        "container_runtime": None, "features": [text], "addresses": [], "ssh_host_keys": [], "errors": [],
    }  # fmt: skip
    # A node that says more than it was asked for: these must not become variables of the play.
    stolen = {
        "ansible_host": text,
        "ansible_ssh_common_args": text,
        "node_check_type": text,
        "inventory_hostname": text,
    }
    (tmp_path / "answer.json").write_text(json.dumps({"ansible_facts": {"node_manager": facts, **stolen}}))
    hostile = tmp_path / "python"
    hostile.write_text(
        "#!/bin/sh\ninput=$(mktemp); cat >$input\n"
        f"if grep -q node_facts $input; then cat {tmp_path / 'answer.json'}; else {BIN}/python <$input; fi\n"
    )
    hostile.chmod(0o755)
    play = tmp_path / "play.yml"
    play.write_text(
        "- hosts: all\n  gather_facts: false\n  vars:\n"
        f"    ansible_python_interpreter: {hostile}\n"
        "  tasks:\n"
        "    - iot_platform.node_manager.node_facts:\n"
        "    - ansible.builtin.debug:\n"
        '        msg: "{{ ansible_facts.node_manager.hostname }} {{ ansible_facts.keys() | list }}"\n'
        "    - ansible.builtin.debug:\n        msg: \"{{ node_check_type | default('clean') }}\"\n"
    )

    done = controller.run("ansible-playbook", str(play))

    assert done.returncode == 0, done.stdout + done.stderr
    stored = controller.node("local-1").facts
    assert stored is not None
    assert (stored["hostname"], stored["features"]) == (text, [text])
    assert "msg: clean" in done.stdout
    assert not trap.exists()
