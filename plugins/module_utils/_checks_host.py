# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks that look at the node itself: services, processes, listening ports, filesystems, the clock, commands.

Touches /proc, systemctl, filesystems and the commands that checks name; `Host` may point it elsewhere. Reading and
judging are apart: the functions that parse and judge are pure. Runs on nodes with Python 3.8.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from dataclasses import dataclass, field
from typing import Dict, Iterable, Mapping, Sequence, Set, Tuple

from ._checks_deadline import OutOfTimeError, time_left
from ._checks_spec import (
    CommandCheck,
    ContainerCheck,
    FilesystemCheck,
    Finding,
    PortCheck,
    ProcessCheck,
    ServiceCheck,
    one_line,
)
from ._engine import EngineError, cannot_list_message, find_runtime, no_runtime_message, read_containers
from ._probe_parse import FilesystemSpace, Mount, parse_mountinfo
from ._probe_read import Reader
from ._words import CheckState

# What a check keeps of a command's output: its end, where the reason of a failure stands.
MAX_OUTPUT_BYTES = 8192
# The test of sd_booted(3).
_SYSTEMD_RUNS = "/run/systemd/system"


@dataclass(frozen=True)
class Host:
    """Where the checks of this file look; a recorded directory may stand for the node."""

    reader: Reader = field(default_factory=Reader)
    systemctl: Tuple[str, ...] = ("systemctl",)


def check_service(check: ServiceCheck, host: Host, deadline: float) -> Finding:
    """See whether a systemd unit is active."""
    if not host.reader.exists(_SYSTEMD_RUNS):
        message = f"systemd does not run on this node ({_SYSTEMD_RUNS} is missing): use a process or port check instead"
        return Finding(CheckState.UNKNOWN, message)
    properties = "LoadState,ActiveState,SubState,Result"
    argv = [*host.systemctl, "show", "--property", properties, "--", check.unit]
    try:
        status, output = run_command(argv, deadline)
    except OSError as error:
        return Finding(CheckState.UNKNOWN, f"systemctl could not be run: {error.strerror}")
    if status != 0:
        return Finding(CheckState.UNKNOWN, f"systemctl could not tell: {_last_line(output) or f'it exited {status}'}")
    return judge_service(check.unit, parse_systemctl_show(output))


# LoadState=loaded
# ActiveState=active
def parse_systemctl_show(text: str) -> Dict[str, str]:
    """Read what `systemctl show --property` prints.

    Shapes: one `Key=value` a line; other lines are skipped.
    Source: systemctl(1).
    """
    pairs = (line.partition("=") for line in text.splitlines())
    return {key: value for key, equals, value in pairs if equals}


def judge_service(unit: str, properties: Mapping[str, str]) -> Finding:
    """Decide from a unit's properties whether the service does its work."""
    load = properties.get("LoadState", "")
    active = properties.get("ActiveState", "")
    detail = properties.get("SubState", "")
    result = properties.get("Result", "")
    if load == "not-found":
        return Finding(CheckState.FAILED, f"unit {unit} not found: install it or correct its name")
    if load == "masked":
        return Finding(CheckState.FAILED, f"{unit} is masked: systemctl unmask {unit}, then start it")
    if not active:
        return Finding(CheckState.UNKNOWN, f"systemctl said nothing about {unit}")
    # A reload is not an outage: the old process answers until the new configuration stands.
    if active in ("active", "reloading", "refreshing"):
        return Finding(CheckState.PASSED, f"{unit} is {active} ({detail})")
    if load not in ("loaded", ""):
        return Finding(CheckState.FAILED, f"{unit} could not be loaded ({one_line(load, 40)}): systemctl status {unit}")
    why = f", result {result}" if result not in ("", "success") else ""
    return Finding(CheckState.FAILED, f"{unit} is {active} ({detail}{why}): see journalctl -u {unit}, then start it")


def check_process(check: ProcessCheck, host: Host) -> Finding:
    """See whether a process of that name runs."""
    proc = host.reader.path("/proc")
    pids = [entry for entry in os.listdir(proc) if entry.isdecimal()]
    count = sum(_runs_as(proc, pid, check.process) for pid in pids)
    if count:
        return Finding(CheckState.PASSED, f"{count} process(es) named {check.process} run", count, "processes")
    if "1" not in pids:
        message = "the processes of other users are hidden from this one (hidepid): run with become"
        return Finding(CheckState.UNKNOWN, message)
    return Finding(CheckState.FAILED, f"no process named {check.process} runs: start it", 0, "processes")


# 1234 (nginx) S 1 1234 1234 0 -1 4194624 ...
# 77 (tricky) R) name) Z 1 77 77 0 -1 4228044 ...
def parse_process_stat(text: str) -> Tuple[str, str]:
    """Read a process's name and state.

    Shapes: *text* is all of /proc/PID/stat; the name, at most 15 bytes, may hold blanks and parentheses itself.
    Errors: ValueError if there is no name.
    Source: proc_pid_stat(5).
    """
    start, end = text.index("("), text.rindex(")")
    return text[start + 1 : end], text[end + 1 :].strip()[:1]


def check_port(check: PortCheck, host: Host) -> Finding:
    """See whether something listens on a port, on any local address, IPv4 or IPv6."""
    name = f"{check.protocol} port {check.port}"
    readable = False
    for table in (check.protocol, check.protocol + "6"):
        try:
            with open(host.reader.path(f"/proc/net/{table}"), encoding="ascii", errors="replace") as lines:
                readable = True
                if check.port in parse_listening_ports(lines, check.protocol):
                    return Finding(CheckState.PASSED, f"something listens on {name}")
        except OSError:
            # A node without IPv6 has no second table.
            continue
    if not readable:
        return Finding(CheckState.UNKNOWN, f"/proc/net/{check.protocol} could not be read")
    return Finding(CheckState.FAILED, f"nothing listens on {name}: start the service that should")


#   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
#    0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1683 1 00000000da5eaaa4 ...
def parse_listening_ports(lines: Iterable[str], protocol: str) -> Set[int]:
    """Read the local ports that accept something.

    Shapes: *lines* are those of /proc/net/tcp, tcp6, udp or udp6; lines of another form are skipped.
    Units: ports and states are hexadecimal in the file; 0A is a TCP socket that listens, 07 a UDP one without a peer.
    Source: proc_pid_net(5); include/net/tcp_states.h, Linux 6.1.
    """
    wanted = "0A" if protocol == "tcp" else "07"
    ports = set()
    for line in lines:
        fields = line.split()
        if len(fields) < 4 or fields[3] != wanted:
            continue
        try:
            ports.add(int(fields[1].rpartition(":")[2], 16))
        except ValueError:
            continue
    return ports


def check_filesystem(check: FilesystemCheck, host: Host, deadline: float) -> Finding:
    """See whether a filesystem is mounted, writable and has room."""
    mount_point = os.path.normpath(check.mount)
    try:
        mounts = parse_mountinfo(host.reader.read_text("/proc/self/mountinfo"))
    except OSError as error:
        return Finding(CheckState.UNKNOWN, f"the mount table could not be read: {error.strerror}")
    found = [mount for mount in mounts if mount.mount_point == mount_point]
    if not found:
        # Without this, an empty mount point would show the free space of the disk below it and pass.
        return Finding(CheckState.FAILED, f"{check.mount} is not mounted: see /etc/fstab and the device, then mount it")
    try:
        # Of several mounts on one place the last one is what programs see.
        return judge_filesystem(check, found[-1], host.reader.space(found[-1], time_left(deadline)))
    except TimeoutError:
        raise OutOfTimeError from None
    except OSError as error:
        return Finding(CheckState.FAILED, f"{check.mount} does not answer ({error.strerror}): see the device and dmesg")


def judge_filesystem(check: FilesystemCheck, mount: Mount, space: FilesystemSpace) -> Finding:
    """Decide whether a filesystem is fit for use; the value is the use of what failed, of space if all is well."""
    # As df counts: blocks kept for root are neither used nor free.
    used_bytes = space.total_bytes - space.free_bytes
    full = _percent(used_bytes, used_bytes + space.available_bytes)
    if mount.read_only:
        message = f"{check.mount} is read-only: see dmesg for disk errors, then remount it"
        return Finding(CheckState.FAILED, message, full, "percent")
    if full >= check.space_percent:
        message = f"{check.mount} is {full} % full (limit {check.space_percent:g} %): free space or extend it"
        return Finding(CheckState.FAILED, message, full, "percent")
    # btrfs and vfat have no fixed number of inodes and report 0.
    inodes = _percent(space.inodes_total - space.inodes_free, space.inodes_total)
    if space.inodes_total and inodes >= check.inodes_percent:
        message = (
            f"{check.mount} has {inodes} % of its inodes used (limit {check.inodes_percent:g} %): remove small files"
        )
        return Finding(CheckState.FAILED, message, inodes, "percent")
    return Finding(CheckState.PASSED, f"{check.mount} is writable and {full} % full", full, "percent")


def list_containers(reader: Reader, deadline: float) -> Dict[str, object]:
    """Ask the node's container runtime, as the containers part of a sample."""
    try:
        runtime = find_runtime(reader.path, deadline)
        if runtime is None:
            return {"runtime": None, "message": no_runtime_message()}
        if not runtime.listable:
            return {"runtime": None, "message": cannot_list_message(runtime)}
        # No earlier counters and one CPU: what the containers use is not judged here.
        items = read_containers(runtime, reader.path(runtime.socket), deadline, {}, 1).items
    except EngineError as error:
        return {"runtime": None, "message": str(error)}
    return {"runtime": runtime.name, "version": runtime.version, "message": None, "items": items}


def judge_container(check: ContainerCheck, containers: object) -> Finding:
    """Decide from the containers part of a sample whether one container does its work.

    Shapes: *containers* as in docs/observations.md; anything else is state unknown.
    """
    name = check.container
    if not isinstance(containers, Mapping):
        return Finding(CheckState.UNKNOWN, f"container {name}: the containers of this node could not be read")
    items = containers.get("items")
    if not containers.get("runtime") or not isinstance(items, list):
        said = one_line(containers.get("message") or "no container runtime was found", 150)
        return Finding(CheckState.UNKNOWN, f"container {name}: {said}")
    named = [item for item in items if isinstance(item, Mapping) and str(item.get("name")).lstrip("/") == name]
    if not named:
        return Finding(CheckState.FAILED, f"container {name} does not exist: deploy it or correct its name")
    state = one_line(named[0].get("state"), 40)
    health = one_line(named[0].get("health"), 40)
    if state != "running":
        code = named[0].get("exit_code")
        why = f" (exit code {code})" if state == "exited" and isinstance(code, int) else ""
        return Finding(CheckState.FAILED, f"container {name} is {state}{why}: see its log, then start it")
    if health == "unhealthy":
        return Finding(CheckState.FAILED, f"container {name} runs but is unhealthy: see its log and its health check")
    said = f", {health}" if health in ("healthy", "starting") else ""
    return Finding(CheckState.PASSED, f"container {name} runs{said}")


def check_command(check: CommandCheck, deadline: float) -> Finding:
    """Run a command, without a shell, and see whether it exits 0."""
    program = one_line(check.argv[0], 80)
    try:
        status, output = run_command(check.argv, deadline)
    except FileNotFoundError:
        return Finding(CheckState.FAILED, f"{program} not found: install it or correct argv")
    except OSError as error:
        return Finding(CheckState.FAILED, f"{program} could not be run ({error.strerror}): correct its mode or argv")
    said = one_line(_last_line(output), 200)
    if status == 0:
        return Finding(CheckState.PASSED, said or f"{program} exited 0")
    ended = f"exited {status}" if status > 0 else f"was ended by signal {-status}"
    return Finding(CheckState.FAILED, f"{program} {ended}: {said or 'it printed nothing, run it by hand'}")


def run_command(argv: Sequence[str], deadline: float) -> Tuple[int, str]:
    """Run a program and keep the end of what it prints.

    Errors: OSError if it can't be started; OutOfTimeError, its process group killed, if *deadline* passes first.
    """
    # LC_ALL: the output is parsed here or read by strangers, and a localised systemctl would say it in other words.
    process = subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C"},
        start_new_session=True,
    )
    if process.stdout is None:
        raise AssertionError("asked for a pipe above")
    try:
        with process.stdout:
            output = _read_tail(process, process.stdout.fileno(), deadline)
        return process.wait(time_left(deadline)), output.decode("utf-8", "replace")
    except (subprocess.TimeoutExpired, OutOfTimeError):
        _kill_group(process)
        raise OutOfTimeError from None
    except BaseException:
        _kill_group(process)
        raise


def _read_tail(process: subprocess.Popen[bytes], source: int, deadline: float) -> bytes:
    tail = b""
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        while True:
            # A daemon that the command left behind may hold the pipe open for ever: once the command itself is gone,
            # what it wrote is there already. Looked at 10 times a second, and only while nothing comes.
            if selector.select(min(0.1, time_left(deadline))):
                part = os.read(source, MAX_OUTPUT_BYTES)
                if not part:
                    return tail
                tail = (tail + part)[-MAX_OUTPUT_BYTES:]
            elif process.poll() is not None:
                return tail


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        # Killed processes go within milliseconds, except from an uninterruptible wait, which nothing ends.
        process.wait(0.2)


def _runs_as(proc: str, pid: str, name: str) -> bool:
    try:
        with open(os.path.join(proc, pid, "stat"), "rb") as file:
            comm, state = parse_process_stat(os.fsdecode(file.read(4096)))
        # A zombie keeps its name but does no work.
        if state in ("Z", "X"):
            return False
        if comm == name:
            return True
        with open(os.path.join(proc, pid, "cmdline"), "rb") as file:
            program = os.fsdecode(file.read(4096).partition(b"\0")[0])
    except (OSError, ValueError):
        # It ended while we looked.
        return False
    return os.path.basename(program) == name


def _percent(part: int, whole: int) -> float:
    return round(100.0 * part / whole, 1) if whole > 0 else 0.0


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else ""
