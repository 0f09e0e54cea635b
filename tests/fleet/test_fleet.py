# SPDX-License-Identifier: GPL-3.0-or-later
"""The test bed itself: a fault that it claims to make is seen from outside as just that fault."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fleet.nodes import Fleet, Node
from fleet.waiting import wait_until

pytestmark = pytest.mark.fleet

# Two keepalives, two seconds apart, and what a loaded machine adds.
KEEPALIVE_DEADLINE_SECONDS = 20.0


def can_connect(address: str, port: int) -> bool:
    """Say whether TCP alone succeeds."""
    try:
        with socket.create_connection((address, port), timeout=2):
            return True
    except OSError:
        return False


def connection_error(node: Node) -> str:
    """Name the error that a connection to the node's address ends with, "" for none."""
    try:
        with socket.create_connection((node.address, node.port), timeout=5):
            return ""
    except OSError as error:
        return type(error).__name__


def open_stream(node: Node) -> subprocess.Popen[str]:
    """Open an SSH session that says one word and then waits."""
    stream = subprocess.Popen(
        node.ssh_command("sh", "-c", "echo open; sleep 100"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert stream.stdout is not None
    assert stream.stdout.readline() == "open\n"
    return stream


def seconds_until_end(stream: subprocess.Popen[str]) -> tuple[float, str]:
    """Wait for a stream to end; return how long that took and its last words."""
    began = time.monotonic()
    try:
        words, _ = stream.communicate(timeout=KEEPALIVE_DEADLINE_SECONDS)
    finally:
        stream.kill()
        stream.communicate()
    return time.monotonic() - began, words


def test_up_gives_nodes_that_answer_over_ssh_with_a_pinned_key(fleet: Fleet) -> None:
    answers = [node.ssh("hostname").stdout.strip() for node in fleet.nodes]

    assert [node.node_id for node in fleet.nodes] == answers
    assert answers


def test_up_gives_nodes_whose_systemd_has_no_failed_unit(fleet: Fleet) -> None:
    states = {node.ssh("systemctl", "is-system-running").stdout.strip() for node in fleet.nodes}

    assert {"running"} == states


def test_up_gives_every_node_its_own_identity(fleet: Fleet) -> None:
    host_keys = {node.host_key() for node in fleet.nodes}
    machine_ids = {node.exec("cat", "/etc/machine-id") for node in fleet.nodes}

    assert len(fleet.nodes) == len(host_keys) == len(machine_ids)


def test_up_gives_the_user_root_without_a_password(fleet: Fleet) -> None:
    done = fleet.nodes[0].ssh("sudo", "--non-interactive", "id", "--user")

    assert done.stdout == "0\n"


def test_up_keeps_the_private_key_private(fleet: Fleet) -> None:
    assert fleet.state_directory.stat().st_mode & 0o777 == 0o700
    assert fleet.nodes[0].private_key.stat().st_mode & 0o777 == 0o600


def test_inventory_works_with_ansible(fleet: Fleet) -> None:
    ansible = Path(sys.executable).with_name("ansible")

    done = subprocess.run(
        [str(ansible), "all", "-i", str(fleet.inventory), "-m", "ansible.builtin.ping"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(fleet.nodes) == done.stdout.count("pong")


def test_registry_list_pins_the_host_keys(fleet: Fleet) -> None:
    listed = yaml.safe_load((fleet.state_directory / "nodes.yml").read_text(encoding="utf-8"))["nodes"]

    expected = [(node.node_id, node.address, [node.host_key()]) for node in fleet.nodes]
    assert expected == [(row["node_id"], row["address"], row["host_keys"]) for row in listed]


def test_pause_hangs_an_open_session_until_its_keepalives_fail(node: Node) -> None:
    stream = open_stream(node)

    node.pause()
    seconds, words = seconds_until_end(stream)

    # At once would be a refusal and not a silence.
    assert seconds > 1
    assert "not responding" in words


def test_pause_accepts_a_connection_and_says_nothing(node: Node) -> None:
    node.pause()

    assert can_connect(node.address, node.port)
    assert not node.answers()


def test_unpause_brings_the_node_back(node: Node) -> None:
    node.pause()

    node.unpause()

    assert wait_until(node.answers, deadline_seconds=20, what="the thawed node")


def test_kill_makes_the_address_refuse(node: Node) -> None:
    node.kill()

    assert connection_error(node) == "ConnectionRefusedError"


def test_start_brings_a_killed_node_back_as_itself(node: Node) -> None:
    host_key = node.host_key()
    node.kill()

    node.start()

    assert host_key == node.host_key()
    assert node.ssh("true").returncode == 0


def test_stop_makes_the_address_refuse(node: Node) -> None:
    node.stop()

    assert node.state == "exited"
    assert connection_error(node) == "ConnectionRefusedError"


def test_disconnect_and_connect_unplug_and_plug_in(node: Node) -> None:
    node.disconnect()
    refused = connection_error(node)

    node.connect()

    assert refused == "ConnectionRefusedError"
    assert node.ssh("true").returncode == 0


def test_cut_hangs_an_open_session_and_mend_undoes_it(node: Node) -> None:
    stream = open_stream(node)

    node.cut()
    seconds, _ = seconds_until_end(stream)
    reachable = can_connect(node.bridge_address, 22)
    node.mend()

    assert seconds > 1
    assert not reachable
    assert wait_until(node.answers, deadline_seconds=20, what="the mended node")


def test_cut_of_the_management_path_leaves_the_node_to_its_peers(fleet: Fleet, node: Node) -> None:
    node.cut(management_only=True)

    look = f"import socket; socket.create_connection(({node.bridge_address!r}, 22), timeout=5)"
    assert fleet.nodes[0].ssh("python3", "-c", look).returncode == 0
    assert not can_connect(node.bridge_address, 22)


def test_lose_packets_loses_some_and_not_all(node: Node) -> None:
    node.lose_packets(10)

    assert wait_until(lambda: node.ssh("true").returncode == 0, deadline_seconds=60, what="an answer in spite of loss")


def test_fill_disk_reaches_full_and_empty_disk_undoes_it(node: Node) -> None:
    node.fill_disk()
    full = node.disk_used_percent()

    node.empty_disk()

    assert full == 100
    assert node.disk_used_percent() < 10


def test_fill_disk_stops_at_the_share_it_was_given(node: Node) -> None:
    node.fill_disk(80)

    assert 78 <= node.disk_used_percent() <= 84


def test_stop_service_makes_it_inactive_and_start_service_active(node: Node) -> None:
    before = node.service_state()
    node.stop_service()
    stopped = node.service_state()

    node.start_service()

    assert (before, stopped, node.service_state()) == ("active", "inactive", "active")


def test_crash_service_makes_it_failed(node: Node) -> None:
    node.crash_service()

    assert node.service_state() == "failed"
    assert node.ssh("systemctl", "is-system-running").stdout == "degraded\n"


def test_remove_python_leaves_ssh_and_takes_python(node: Node) -> None:
    node.remove_python()
    shell, python = node.ssh("true"), node.ssh("python3", "-V")

    node.restore_python()

    assert (shell.returncode, python.returncode) == (0, 127)
    assert node.ssh("python3", "-V").returncode == 0


def test_regenerate_host_key_is_noticed_by_a_pinned_client(node: Node) -> None:
    old_key = node.host_key()

    node.regenerate_host_key()

    refused = node.ssh("true")
    assert old_key != node.host_key()
    assert refused.returncode == 255
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in refused.stderr


def test_up_again_keeps_what_runs_and_revives_the_rest(fleet: Fleet, node: Node) -> None:
    keys = [each.host_key() for each in fleet.nodes]
    node.kill()

    again = fleet.up(len(keys), image="not-needed:as-no-node-is-new")

    assert keys == [each.host_key() for each in again]
