# SPDX-License-Identifier: GPL-3.0-or-later
"""Each playbook, twice and in check mode, on this machine; tests/fleet has the same on real nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ansible_runs import BIN, Controller, make_controller
from node_manager.node_filters import NodeFilter
from node_manager.node_registry import NodeRegistry
from node_manager.samples import newest_sample

LOOKING = ["register", "gather", "check", "site"]
QUICK = ("-e", "node_check_interval_seconds=0.1", "-e", "node_gather_interval_seconds=0.1")


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return make_controller(tmp_path / "home")


def node_ids(controller: Controller) -> list[str]:
    with controller.store() as store:
        page = NodeRegistry(store, controller.settings).page(NodeFilter(), 100, None)
    return [version.node_id for version in page.versions]


def static_inventory(path: Path, *hosts: str) -> str:
    lines = [f"    {host}: {{ansible_host: 127.0.0.1, ansible_port: 9, ansible_user: manager}}" for host in hosts]
    path.write_text("all:\n  hosts:\n" + "\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("name", LOOKING)
def test_playbook_records_and_changes_nothing_twice(controller: Controller, name: str) -> None:
    before = controller.register("local-1")

    first = controller.playbook(name, *QUICK)
    second = controller.playbook(name, *QUICK)

    assert (first.return_code, second.return_code) == (0, 0), first.output + first.errors
    assert first.count("changed") == second.count("changed") == {"local-1": 0}
    assert first.errors == ""
    node = controller.node("local-1")
    assert node.generation == before.generation
    assert node.facts is not None
    with controller.store() as store:
        assert newest_sample(store, "local-1") is not None


@pytest.mark.parametrize("name", LOOKING)
def test_playbook_in_check_mode_records_nothing(controller: Controller, name: str) -> None:
    before = controller.register("local-1")

    run = controller.playbook(name, *QUICK, "--check")

    assert run.return_code == 0, run.output + run.errors
    after = controller.node("local-1")
    assert (after.generation, after.revision) == (before.generation, before.revision)


def test_check_judges_the_node(controller: Controller) -> None:
    controller.register("local-1", node_type="constrained")

    check = {"name": "closed", "kind": "tcp", "port": 9, "severity": "critical", "timeout_seconds": 1}
    controller.playbook("check", *QUICK, "-e", json.dumps({"node_check_more_checks": [check]}))

    state = controller.node("local-1").state
    assert state.health.value == "degraded"
    assert "closed" in state.health_cause


def test_register_adopts_a_static_inventory(controller: Controller, tmp_path: Path) -> None:
    inventory = static_inventory(tmp_path / "hosts.yml", "gw-7")
    declared = {"type": "edge-gateway", "labels": {"line": "a", "spare": True}, "location": {"zone": "eu-1a"}}
    extra = json.dumps({f"node_register_{key}": value for key, value in declared.items()})

    rehearsal = controller.playbook("register", "-i", inventory, "-e", extra, "--check", "--diff")
    assert node_ids(controller) == []
    first = controller.playbook("register", "-i", inventory, "-e", extra)
    second = controller.playbook("register", "-i", inventory, "-e", extra)

    assert "gw-7 (wanted)" in rehearsal.output
    assert first.count("changed") == {"gw-7": 1}
    assert second.count("changed") == {"gw-7": 0}
    node = controller.node("gw-7")
    assert (node.address, node.declared_type, node.location["zone"]) == ("127.0.0.1", "edge-gateway", "eu-1a")
    assert (node.connection["user"], node.connection["port"]) == ("manager", 9)
    assert node.labels == {"line": "a", "spare": "true"}
    assert node.state.health.value == "unreachable"


def test_register_refuses_what_the_registry_does(controller: Controller, tmp_path: Path) -> None:
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("all:\n  hosts:\n    gw-7: {ansible_host: 127.0.0.1, ansible_user: '-oProxyCommand=x'}\n")

    run = controller.playbook("register", "-i", str(inventory))

    assert run.return_code == 2
    assert "connection.user" in run.output + run.errors
    assert node_ids(controller) == []


def test_deregister_removes_a_dead_node_and_is_content_when_it_is_gone(controller: Controller, tmp_path: Path) -> None:
    inventory = static_inventory(tmp_path / "hosts.yml", "gw-7")
    controller.register("gw-7", connection={"kind": "ssh", "port": 9})
    controller.register("gw-8", connection={"kind": "ssh", "port": 9})

    rehearsal = controller.playbook("deregister", "-l", "gw-7", "--check")
    assert node_ids(controller) == ["gw-7", "gw-8"]
    first = controller.playbook("deregister", "-l", "gw-7")
    second = controller.playbook("deregister", "-i", inventory)

    assert rehearsal.count("changed") == first.count("changed") == {"gw-7": 1}
    assert (second.return_code, second.count("changed")) == (0, {"gw-7": 0})
    assert node_ids(controller) == ["gw-8"]


def test_deregister_does_not_empty_the_registry_by_accident(controller: Controller) -> None:
    controller.register("gw-7", connection={"kind": "ssh"})

    run = controller.playbook("deregister")

    assert run.return_code == 2
    assert "This would empty the registry" in run.output + run.errors
    assert node_ids(controller) == ["gw-7"]


HOSTILE = {
    "fifty-megabytes": "head -c 50000000 /dev/zero | tr '\\0' x",
    "deep-json": 'printf \'{"sample": \'; head -c 200000 /dev/zero | tr "\\0" "["',
    "not-utf-8": "printf '\\377\\376\\200garbage'",
    "nothing": "true",
    "crash": "echo 'Traceback (most recent call last):' >&2; echo 'RuntimeError: boom' >&2; exit 1",
    "other-answer": 'printf \'{"changed": true, "stolen": 1}\'',
    "too-large": "cat $(dirname $0)/large.json",
}


@pytest.mark.parametrize("answer", HOSTILE)
def test_a_node_that_answers_nonsense_fails_alone(controller: Controller, tmp_path: Path, answer: str) -> None:
    controller.register("local-1")
    controller.register("local-2")
    hostile = tmp_path / "python"
    hostile.write_text(f"#!/bin/sh\ncat >/dev/null\n{HOSTILE[answer]}\n")
    hostile.chmod(0o755)
    (tmp_path / "large.json").write_text(json.dumps({"sample": {"items": ["x" * 4000] * 800}}))
    play = tmp_path / "play.yml"
    play.write_text(
        "- hosts: all\n  gather_facts: false\n  strategy: free\n  tasks:\n"
        "    - iot_platform.node_manager.node_resources: {interval_seconds: 0.1}\n"
        "      vars:\n"
        f"        ansible_python_interpreter: \"{{{{ '{hostile}' if inventory_hostname == 'local-1' else '{BIN}/python' }}}}\"\n"
    )

    done = controller.run("ansible-playbook", str(play))

    assert len(done.stdout) < 20_000
    state = controller.node("local-1").state
    expected = "ModuleFailed: " if answer == "crash" else "OutputUnusable: "
    assert state.health_cause.startswith(expected)
    with controller.store() as store:
        assert newest_sample(store, "local-1") is None
        assert newest_sample(store, "local-2") is not None
