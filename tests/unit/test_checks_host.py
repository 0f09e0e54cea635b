# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks that look at the node itself, against recorded text and against this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks import Host, parse_check, run_checks
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_host import (
    judge_container,
    judge_filesystem,
    judge_service,
    parse_listening_ports,
    parse_process_stat,
    parse_systemctl_show,
    run_command,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_spec import (
    ContainerCheck,
    FilesystemCheck,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_parse import FilesystemSpace, Mount
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader
from ansible_collections.iot_platform.node_manager.plugins.module_utils._words import Severity


def look(host: Host | None = None, **raw: Any) -> dict[str, Any]:
    checks: Any = run_checks([parse_check({"name": "x", **raw})], host=host)["checks"]
    return dict(checks[0])


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():
            return True
        os.sched_yield()
    return False


# What `systemctl show --property LoadState,ActiveState,SubState,Result` of systemd 252 printed.
RUNNING = "Result=success\nLoadState=loaded\nActiveState=active\nSubState=running\n"
MISSING = "Result=success\nLoadState=not-found\nActiveState=inactive\nSubState=dead\n"
CRASHED = "Result=exit-code\nLoadState=loaded\nActiveState=failed\nSubState=failed\n"


@pytest.mark.parametrize(
    ("output", "state", "said"),
    [
        pytest.param(RUNNING, "passed", "ssh.service is active (running)", id="running"),
        pytest.param(RUNNING.replace("running", "exited"), "passed", "is active (exited)", id="oneshot"),
        pytest.param(RUNNING.replace("=active", "=reloading"), "passed", "is reloading", id="reloading"),
        pytest.param(MISSING, "failed", "unit ssh.service not found: install it", id="not-found"),
        pytest.param(MISSING.replace("not-found", "masked"), "failed", "is masked: systemctl unmask", id="masked"),
        pytest.param(
            MISSING.replace("not-found", "bad-setting"), "failed", "could not be loaded (bad-setting)", id="bad"
        ),
        pytest.param(CRASHED, "failed", "is failed (failed, result exit-code): see journalctl -u", id="crashed"),
        pytest.param(
            "LoadState=loaded\nActiveState=activating\nSubState=auto-restart\nResult=exit-code\n",
            "failed",
            "is activating (auto-restart, result exit-code)",
            id="crash-loop",
        ),
        pytest.param(MISSING.replace("not-found", "loaded"), "failed", "is inactive (dead)", id="stopped"),
        pytest.param("", "unknown", "said nothing about", id="silence"),
        pytest.param("garbage\n=\n\x00", "unknown", "said nothing about", id="garbage"),
    ],
)
def test_judge_service_reads_recorded_answers(output: str, state: str, said: str) -> None:
    finding = judge_service("ssh.service", parse_systemctl_show(output))

    assert finding.state == state
    assert said in finding.message


def fake_systemd(folder: Path, script: str) -> Host:
    (folder / "run/systemd/system").mkdir(parents=True)
    program = folder / "systemctl"
    program.write_text("#!/bin/sh\n" + script)
    program.chmod(0o755)
    return Host(Reader(str(folder)), systemctl=(str(program),))


def test_check_service_asks_for_one_unit_by_name(tmp_path: Path) -> None:
    host = fake_systemd(tmp_path, f'[ "$1 $4 $5" = "show -- ssh" ] && printf "{RUNNING}"')

    check = look(host, kind="service", unit="ssh")

    assert (check["state"], check["message"]) == ("passed", "ssh is active (running)")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param(
            "echo 'Failed to connect to bus: No such file' >&2; exit 1", "Failed to connect to bus", id="no-bus"
        ),
        pytest.param("exit 4", "it exited 4", id="silent"),
        pytest.param("exec sleep 20", "timed out after 0.3 s", id="hanging"),
    ],
)
def test_check_service_is_unknown_where_systemctl_does_not_answer(tmp_path: Path, script: str, said: str) -> None:
    check = look(fake_systemd(tmp_path, script), kind="service", unit="ssh", timeout_seconds=0.3)

    assert check["state"] == "unknown"
    assert said in check["message"]


def test_check_service_is_unknown_without_systemd(tmp_path: Path) -> None:
    check = look(Host(Reader(str(tmp_path))), kind="service", unit="ssh")

    assert check["state"] == "unknown"
    assert "systemd does not run on this node" in check["message"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("1234 (nginx) S 1 1234 1234 0 -1 4194624", ("nginx", "S"), id="plain"),
        pytest.param("77 (tricky) R) name) Z 1 77 77 0", ("tricky) R) name", "Z"), id="parentheses"),
        pytest.param("9 (cut)", ("cut", ""), id="cut"),
    ],
)
def test_parse_process_stat_reads_name_and_state(text: str, expected: tuple[str, str]) -> None:
    assert parse_process_stat(text) == expected


@pytest.fixture
def odd_program(tmp_path: Path) -> Iterator[str]:
    """Run a program whose name is longer than the 15 bytes that the kernel keeps."""
    path = tmp_path / "node-manager-test-sleeper"
    shutil.copy("/bin/sleep", path)
    with subprocess.Popen([path, "60"]) as process:
        yield path.name
        process.kill()


def test_check_process_finds_long_names_by_argv(odd_program: str) -> None:
    check = look(kind="process", process=odd_program)

    assert (check["state"], check["value"], check["unit"]) == ("passed", 1, "processes")


def test_check_process_fails_where_none_runs() -> None:
    check = look(kind="process", process="no-such-program-here")

    assert (check["state"], check["value"]) == ("failed", 0)


def recorded_process(folder: Path, pid: int, stat: str, cmdline: bytes) -> None:
    (folder / f"proc/{pid}").mkdir(parents=True)
    (folder / f"proc/{pid}/stat").write_text(stat)
    (folder / f"proc/{pid}/cmdline").write_bytes(cmdline)


def test_check_process_does_not_count_zombies(tmp_path: Path) -> None:
    recorded_process(tmp_path, 1, "1 (init) S 0", b"/sbin/init\0")
    recorded_process(tmp_path, 20, "20 (app) Z 1", b"")

    check = look(Host(Reader(str(tmp_path))), kind="process", process="app")

    assert check["state"] == "failed"


def test_check_process_is_unknown_where_others_are_hidden(tmp_path: Path) -> None:
    recorded_process(tmp_path, 20, "20 (app) S 1", b"app\0")

    check = look(Host(Reader(str(tmp_path))), kind="process", process="nginx")

    assert check["state"] == "unknown"
    assert "hidepid" in check["message"]


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1683 1 00000000da5eaaa4 100 0
   1: 0F02000A:0016 0202000A:CC7E 01 00000000:00000000 02:000A7A5C 00000000     0        0 1784 2 00000000ab21cd55 20 4
   2: garbage
   3: 00000000:zzzz 00000000:0000 0A
"""
TCP6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when
   0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000
"""
UDP = """\
   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  123: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000   101        0 1501 2 00000000da5eaaa4 0
  124: 0F02000A:9C41 08080808:0035 01 00000000:00000000 00:00000000 00000000   101        0 1502 2 00000000da5eaaa5 0
"""


@pytest.mark.parametrize(
    ("text", "protocol", "expected"),
    [
        pytest.param(TCP, "tcp", {8080}, id="tcp-listens-not-connected"),
        pytest.param(TCP6, "tcp", {22}, id="tcp6"),
        pytest.param(UDP, "udp", {53}, id="udp-bound-not-connected"),
        pytest.param("", "tcp", set(), id="empty"),
    ],
)
def test_parse_listening_ports_reads_recorded_tables(text: str, protocol: str, expected: set[int]) -> None:
    assert parse_listening_ports(text.splitlines(), protocol) == expected


@pytest.mark.parametrize(
    ("family", "kind", "address", "protocol"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1", "tcp"),
        (socket.AF_INET6, socket.SOCK_STREAM, "::1", "tcp"),
        (socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1", "udp"),
        (socket.AF_INET6, socket.SOCK_DGRAM, "::1", "udp"),
    ],
    ids=["tcp", "tcp6", "udp", "udp6"],
)
def test_check_port_sees_a_listener(family: int, kind: int, address: str, protocol: str) -> None:
    with socket.socket(family, kind) as listener:
        listener.bind((address, 0))
        port = listener.getsockname()[1]
        if protocol == "tcp":
            before = look(kind="port", port=port)["state"]
            listener.listen()
            assert before == "failed"

        check = look(kind="port", port=port, protocol=protocol)

    assert (check["state"], check["message"]) == ("passed", f"something listens on {protocol} port {port}")


def test_check_port_is_unknown_without_a_table(tmp_path: Path) -> None:
    check = look(Host(Reader(str(tmp_path))), kind="port", port=22)

    assert (check["state"], check["message"]) == ("unknown", "/proc/net/tcp could not be read")


SPACE = FilesystemSpace(total_bytes=1000, free_bytes=300, available_bytes=200, inodes_total=100, inodes_free=90)
MOUNT = Mount("8:1", "/", "/data", "ext4", "/dev/sda1", read_only=False)


@pytest.mark.parametrize(
    ("limits", "mount", "space", "expected"),
    [
        pytest.param((95, 95), MOUNT, SPACE, ("passed", "/data is writable and 77.8 % full", 77.8), id="fine"),
        pytest.param(
            (77, 95),
            MOUNT,
            SPACE,
            ("failed", "/data is 77.8 % full (limit 77 %): free space or extend it", 77.8),
            id="full",
        ),
        pytest.param(
            (95, 10),
            MOUNT,
            SPACE,
            ("failed", "/data has 10.0 % of its inodes used (limit 10 %): remove small files", 10.0),
            id="inodes",
        ),
        pytest.param(
            (95, 95),
            Mount("8:1", "/", "/data", "ext4", "/dev/sda1", read_only=True),
            SPACE,
            ("failed", "/data is read-only: see dmesg for disk errors, then remount it", 77.8),
            id="read-only",
        ),
        pytest.param(
            (95, 0),
            MOUNT,
            FilesystemSpace(1000, 900, 900, 0, 0),
            ("passed", "/data is writable and 10.0 % full", 10.0),
            id="no-inodes",
        ),
        pytest.param(
            (95, 95),
            MOUNT,
            FilesystemSpace(0, 0, 0, 0, 0),
            ("passed", "/data is writable and 0.0 % full", 0.0),
            id="no-size",
        ),
    ],
)
def test_judge_filesystem_places_use_below_limits(
    limits: tuple[float, float], mount: Mount, space: FilesystemSpace, expected: tuple[str, str, float]
) -> None:
    check = FilesystemCheck(
        "x", Severity.CRITICAL, 3.0, mount="/data", space_percent=limits[0], inodes_percent=limits[1]
    )

    finding = judge_filesystem(check, mount, space)

    assert (finding.state, finding.message, finding.value) == expected


def test_check_filesystem_looks_at_the_real_root() -> None:
    check = look(kind="filesystem", mount="/", space_percent=100, inodes_percent=100)

    assert check["state"] == "passed"
    assert 0 < check["value"] <= 100


def test_check_filesystem_fails_for_a_folder_that_is_not_mounted(tmp_path: Path) -> None:
    check = look(kind="filesystem", mount=str(tmp_path))

    assert check["state"] == "failed"
    assert "is not mounted" in check["message"]


def test_check_filesystem_takes_the_last_of_several_mounts(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "22 1 8:1 / /my\\040data rw,noatime - ext4 /dev/sda1 rw\n"
        "30 22 8:2 / /my\\040data rw,noatime - ext4 /dev/sdb1 ro\n"
    )
    host = Host(Reader(str(tmp_path), statvfs=lambda _path: os.statvfs("/")))

    check = look(host, kind="filesystem", mount="/my data/")

    assert check["state"] == "failed"
    assert "is read-only" in check["message"]


def test_check_filesystem_says_what_the_device_answers(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("22 1 8:1 / /data rw - ext4 /dev/sda1 rw\n")

    def broken(_path: str) -> os.statvfs_result:
        raise OSError(5, "Input/output error")

    check = look(Host(Reader(str(tmp_path), statvfs=broken)), kind="filesystem", mount="/data")

    assert check["state"] == "failed"
    assert "/data does not answer (Input/output error)" in check["message"]


def containers(**item: object) -> dict[str, object]:
    return {"runtime": "docker", "message": None, "items": [{"name": "other"}, {"name": "app", **item}]}


@pytest.mark.parametrize(
    ("given", "state", "said"),
    [
        pytest.param(
            containers(state="running", health="healthy"), "passed", "container app runs, healthy", id="healthy"
        ),
        pytest.param(containers(state="running", health=None), "passed", "container app runs", id="no-health-check"),
        pytest.param(containers(state="running", health="starting"), "passed", "runs, starting", id="starting"),
        pytest.param(
            containers(state="running", health="unhealthy"), "failed", "runs but is unhealthy", id="unhealthy"
        ),
        pytest.param(containers(state="exited", exit_code=137), "failed", "is exited (exit code 137)", id="exited"),
        pytest.param(containers(state="paused"), "failed", "is paused", id="paused"),
        pytest.param(containers(state="restarting"), "failed", "is restarting", id="restarting"),
        pytest.param(containers(), "failed", "is None", id="no-state"),
        pytest.param({"runtime": "docker", "items": []}, "failed", "does not exist", id="none-of-that-name"),
        pytest.param({"runtime": None, "message": "no socket"}, "unknown", "no socket", id="no-runtime"),
        pytest.param({"runtime": "docker", "items": None}, "unknown", "no container runtime", id="no-items"),
        pytest.param({"runtime": "docker", "items": [3, None, "app", []]}, "failed", "does not exist", id="odd-items"),
        pytest.param(None, "unknown", "could not be read", id="nothing"),
        pytest.param("docker", "unknown", "could not be read", id="text"),
        pytest.param(
            containers(state=["running"], health={}, exit_code="x" * 999), "failed", "is ['running']", id="odd-state"
        ),
    ],
)
def test_judge_container_reads_the_sample(given: object, state: str, said: str) -> None:
    finding = judge_container(ContainerCheck("x", Severity.CRITICAL, 3.0, container="app"), given)

    assert finding.state == state
    assert said in finding.message


@pytest.mark.parametrize(
    ("argv", "state", "message"),
    [
        pytest.param(["echo", "all well"], "passed", "all well", id="last-line"),
        pytest.param(["true"], "passed", "true exited 0", id="silent"),
        pytest.param(["sh", "-c", "echo one; echo two >&2; echo; exit 3"], "failed", "sh exited 3: two", id="failing"),
        pytest.param(["false"], "failed", "false exited 1: it printed nothing, run it by hand", id="failing-silently"),
        pytest.param(
            ["sh", "-c", "kill -9 $$"],
            "failed",
            "sh was ended by signal 9: it printed nothing, run it by hand",
            id="killed",
        ),
        pytest.param(["/no/such"], "failed", "/no/such not found: install it or correct argv", id="missing"),
        pytest.param(
            ["/etc"], "failed", "/etc could not be run (Permission denied): correct its mode or argv", id="folder"
        ),
        pytest.param(["echo", "$(id); `id` | *"], "passed", "$(id); `id` | *", id="no-shell"),
        pytest.param(["printf", "\\033[31mred\\377"], "passed", "[31mred\ufffd", id="control"),
        pytest.param(["cat"], "passed", "cat exited 0", id="no-input"),
    ],
)
def test_check_command_judges_the_exit(argv: list[str], state: str, message: str) -> None:
    check = look(kind="command", argv=argv)

    assert (check["state"], check["message"]) == (state, message)


def test_check_command_keeps_the_end_of_a_long_output() -> None:
    status, output = run_command(["sh", "-c", "yes | head -c 5000000; echo; echo the end"], time.monotonic() + 20)

    assert status == 0
    assert len(output) <= 8192
    assert output.endswith("the end\n")


@pytest.mark.parametrize(
    "script", ["sleep 60 & wait", "trap '' TERM; while :; do sleep 60; done", "yes"], ids=["child", "stubborn", "loud"]
)
def test_check_command_is_killed_with_its_children(tmp_path: Path, script: str) -> None:
    note = tmp_path / "pid"

    check = look(kind="command", argv=["sh", "-c", f"echo $$ > {note}; {script}"], timeout_seconds=0.5)

    group = int(note.read_text())
    assert check["state"] == "failed"
    assert "sh timed out after 0.5 s: it was killed" in check["message"]
    assert wait_for(lambda: not members(group))


def members(group: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[2] == str(group) and fields[0] != "Z":
            found.append(path.parent.name)
    return found


def test_check_command_does_not_wait_for_a_daemon_that_it_leaves_behind(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    daemon = (
        f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); print('up', flush=True); time.sleep(60)"
    )
    script = f'setsid {sys.executable} -c "$0" & while ! [ -s {note} ]; do :; done; echo done'

    check = look(kind="command", argv=["sh", "-c", script, daemon], timeout_seconds=20)

    os.kill(int(note.read_text()), signal.SIGKILL)
    assert check["state"] == "passed"
    assert check["latency_seconds"] < 10


def test_check_command_may_close_its_output_early() -> None:
    check = look(kind="command", argv=["sh", "-c", "exec >&- 2>&-; exec sleep 60"], timeout_seconds=0.3)

    assert "timed out after 0.3 s" in check["message"]
