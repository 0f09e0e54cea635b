# SPDX-License-Identifier: GPL-3.0-or-later
"""The registry as Ansible's inventory: real ansible-inventory runs against a real store."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from ansible_runs import Controller, make_controller
from node_manager.domain import Admin
from node_manager.inventory import build, group_name
from node_manager.node_registry import NodeRegistry

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEFRRiPFqWGRjUL68wUkkelgJzlnl/qrKINv2vH5ycal"
SSH = {"kind": "ssh"}


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return make_controller(tmp_path / "home")


def arguments_of(listing: dict, node_id: str) -> str:
    return str(listing["_meta"]["hostvars"][node_id]["ansible_ssh_common_args"]["__ansible_unsafe"])


def test_inventory_groups_nodes_by_state_type_place_and_label(controller: Controller) -> None:
    controller.register(
        "gw-7",
        address="192.0.2.7",
        connection={"kind": "ssh", "user": "manager", "port": 2222, "become": True},
        node_type="edge-gateway",
        labels={"line": "a", "example.com/tier": "x y"},
        location={"region": "eu", "zone": "eu-1a", "site": "plant-2"},
    )

    listing = controller.inventory()

    groups = {name for name, group in listing.items() if "gw-7" in group.get("hosts", [])}
    assert groups == {
        "online", "type_edge_gateway", "zone_eu_1a", "region_eu", "site_plant_2", "label_line_a", "label_example_com_tier_x_y",
    }  # fmt: skip
    children = set(listing["all"]["children"])
    assert {"online", "offline", "maintenance", "schedulable", "quarantined"} <= children
    variables = listing["_meta"]["hostvars"]["gw-7"]
    assert variables["ansible_port"] == 2222
    assert variables["ansible_become"] is True
    assert variables["ansible_user"] == {"__ansible_unsafe": "manager"}


def test_inventory_follows_what_an_operator_says(controller: Controller) -> None:
    controller.register("gw-7", address="192.0.2.7", connection=SSH)
    with controller.store() as store:
        NodeRegistry(store, controller.settings).set_admin("gw-7", Admin.MAINTENANCE, "test")

        answer = build(store, controller.settings)

    assert [node["groups"] for node in answer["nodes"]] == [["maintenance"]]


def test_inventory_narrows_to_some_nodes(controller: Controller) -> None:
    for number in range(3):
        controller.register(f"gw-{number}", address="192.0.2.7", connection=SSH, host_keys=[KEY])
    controller.inventory()

    listing = controller.inventory(NODE_MANAGER_INVENTORY_NODES="gw-1,gw-9")

    assert set(listing["_meta"]["hostvars"]) == {"gw-1"}
    known = (controller.home / "known_hosts").read_text().splitlines()
    assert known == [f"gw-{number} {KEY}" for number in range(3)]


def test_inventory_pins_host_keys_in_a_private_file(controller: Controller) -> None:
    controller.register("gw-7", address="192.0.2.7", connection=SSH, host_keys=[KEY])
    controller.register("gw-8", address="192.0.2.8", connection=SSH)

    listing = controller.inventory()

    known_hosts = controller.home / "known_hosts"
    assert known_hosts.read_text() == f"gw-7 {KEY}\n"
    assert stat.S_IMODE(known_hosts.stat().st_mode) == 0o600
    assert "HostKeyAlias=gw-7 " in arguments_of(listing, "gw-7")
    assert "StrictHostKeyChecking=yes" in arguments_of(listing, "gw-7")
    assert "StrictHostKeyChecking=accept-new" in arguments_of(listing, "gw-8")


def test_inventory_leaves_an_unchanged_known_hosts_alone(controller: Controller) -> None:
    controller.register("gw-7", address="192.0.2.7", connection=SSH, host_keys=[KEY])
    controller.inventory()
    before = (controller.home / "known_hosts").stat()

    controller.inventory()

    after = (controller.home / "known_hosts").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_inventory_leads_through_jump_hosts(controller: Controller) -> None:
    controller.register("edge", address="192.0.2.1", connection={"kind": "ssh", "user": "jump"}, host_keys=[KEY])
    controller.register("inner", address="10.0.0.1", connection={"kind": "ssh", "jump_host": "edge"}, host_keys=[KEY])
    controller.register("leaf", address="10.0.0.9", connection={"kind": "ssh", "jump_host": "inner"})

    listing = controller.inventory(NODE_MANAGER_INVENTORY_NODES="leaf")

    assert f"ProxyCommand=ssh -F {controller.home}/jump_hosts/inner" in arguments_of(listing, "leaf")
    config = (controller.home / "jump_hosts" / "inner").read_text()
    assert "Host inner\n  HostName 10.0.0.1\n" in config
    assert "  ProxyJump edge\n" in config
    assert "Host edge\n  HostName 192.0.2.1\n  User jump\n" in config


def test_inventory_forgets_a_first_key_with_the_declaration(controller: Controller) -> None:
    controller.register("gw-7", address="192.0.2.7", connection=SSH)
    first = arguments_of(controller.inventory(), "gw-7")
    with controller.store() as store:
        NodeRegistry(store, controller.settings).forget_host_keys("gw-7")

    second = arguments_of(controller.inventory(), "gw-7")

    assert first.split()[1] != second.split()[1]


def test_inventory_runs_the_manager_itself_with_its_own_python(controller: Controller) -> None:
    controller.register("manager-host")

    variables = controller.inventory()["_meta"]["hostvars"]["manager-host"]

    assert variables["ansible_connection"] == {"__ansible_unsafe": "local"}
    assert Path(variables["ansible_python_interpreter"]["__ansible_unsafe"]).exists()
    assert "ansible_ssh_common_args" not in variables


def test_inventory_that_cannot_be_read_is_an_error(controller: Controller, tmp_path: Path) -> None:
    done = controller.run("ansible-inventory", "--graph", NODE_MANAGER_CONFIG=str(tmp_path / "none.json"))

    assert done.returncode != 0
    assert "none.json: no such file" in done.stderr


def test_inventory_goes_on_from_its_cache_through_an_outage(controller: Controller, tmp_path: Path) -> None:
    config = tmp_path / "registry.yml"
    config.write_text(
        f"plugin: iot_platform.node_manager.registry\ncache: true\ncache_connection: {tmp_path / 'cache'}\n"
    )
    hostile = "{{ lookup('pipe', 'touch " + str(tmp_path / "executed") + "') }}"
    controller.register("gw-7", name=hostile)
    fresh = controller.inventory("-i", str(config))

    done = controller.run(
        "ansible-inventory", "--list", "-i", str(config), NODE_MANAGER_CONFIG=str(tmp_path / "none.json")
    )

    assert done.returncode == 0, done.stderr
    assert "going on with its last answer" in done.stderr
    assert json.loads(done.stdout) == fresh
    assert json.loads(done.stdout)["_meta"]["hostvars"]["gw-7"]["node_manager_name"] == {"__ansible_unsafe": hostile}


def test_inventory_export_reads_the_same_when_it_comes_back(controller: Controller, tmp_path: Path) -> None:
    controller.register("gw-7", name="{{ 7 * 7 }}", labels={"line": "{% raw %}"})
    listing = controller.inventory()
    script = tmp_path / "exported.sh"
    (tmp_path / "exported.json").write_text(json.dumps(listing))
    script.write_text(f"#!/bin/sh\nexec cat {tmp_path / 'exported.json'}\n")
    script.chmod(0o755)

    again = controller.inventory("-i", str(script))

    assert again["_meta"]["hostvars"]["gw-7"]["node_manager_name"] == {"__ansible_unsafe": "{{ 7 * 7 }}"}


def test_inventory_writes_no_deprecation_and_no_warning(controller: Controller) -> None:
    controller.register("gw-7")

    done = controller.run("ansible-inventory", "--graph")

    assert done.stderr == ""


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        pytest.param(("zone", "eu-1a"), "zone_eu_1a", id="hyphen"),
        pytest.param(("site", "Zürich 1"), "site_Zürich_1", id="letters-stay"),
        pytest.param(("label", "a/b", "{{ x }}"), "label_a_b____x___", id="jinja"),
        pytest.param(("label", "a", ""), "label_a_", id="empty"),
        pytest.param(("label", "a", "x" * 500), "label_a_" + "x" * 72, id="long"),
    ],
)
def test_group_name_is_one_that_ansible_takes(parts: tuple[str, ...], expected: str) -> None:
    assert expected == group_name(*parts)
