# SPDX-License-Identifier: GPL-3.0-or-later
"""What node_recover decides, and that as root in a folder of everybody it removes nothing that it shouldn't."""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.iot_platform.node_manager.plugins.action import node_power
from ansible_collections.iot_platform.node_manager.plugins.module_utils import _recover_disk
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_parse import FilesystemSpace
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_containers import (
    ask_engines,
    find_containers,
    prune,
    restart_containers,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_disk import (
    Limits,
    Order,
    free_disk,
    is_rotated,
    judge_disk,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_files import (
    MAX_DEPTH,
    Sweep,
    older_than,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_host import (
    is_read_only,
    read_boot,
    wants_read_only,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_run import (
    Ended,
    RepairError,
    run_program,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_units import (
    Unit,
    parse_unit,
    plan_clock,
    plan_runtime,
    renew_clock,
    restart_services,
)
from ansible_collections.iot_platform.node_manager.plugins.modules.node_recover import check_params
from parts import skip_or_fail

DAYS_20 = 20 * 86400.0
SOON = 20.0


def deadline() -> float:
    return time.monotonic() + SOON


def old_file(path: Path, size: int = 4096) -> Path:
    """Write a file that counts as old for a limit of nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def sweep(top: Path, **changed: Any) -> Sweep:
    # Nobody can make a change time old, so the clock is put forward.
    suits = older_than(DAYS_20, time.time() + DAYS_20 + 60)
    return Sweep(**{"suits": suits, "deadline": deadline(), **changed}).run(str(top))


# what is removed


def test_sweep_removes_old_files_and_empty_folders(tmp_path: Path) -> None:
    kept = old_file(tmp_path / "top" / "systemd-private-1" / "tmp" / "file")
    gone = [old_file(tmp_path / "top" / "a" / "b" / "file"), old_file(tmp_path / "top" / "file", 8192)]

    done = sweep(tmp_path / "top", skipped_prefixes=("systemd-private-",), remove_folders_before=time.time() + 60)

    assert [path.exists() for path in [kept, *gone]] == [True, False, False]
    assert not (tmp_path / "top" / "a").exists()
    assert (tmp_path / "top").exists()
    assert done.freed_bytes == 4096 + 8192


def test_sweep_leaves_what_is_young(tmp_path: Path) -> None:
    path = old_file(tmp_path / "file")
    os.utime(path, (1, 1))

    done = Sweep(older_than(DAYS_20, time.time()), deadline()).run(str(tmp_path))

    # Its times of reading and writing are old, but not that of its last change, which nobody can set.
    assert path.exists()
    assert done.removed == 0


def test_sweep_removes_a_link_and_nothing_behind_it(tmp_path: Path) -> None:
    data = old_file(tmp_path / "home" / "data")
    top = tmp_path / "top"
    top.mkdir()
    (top / "folder").symlink_to(tmp_path / "home")
    (top / "file").symlink_to(data)
    (top / "root").symlink_to("/")

    sweep(top, remove_folders_before=time.time() + 60)

    assert data.exists()
    assert list(top.iterdir()) == []


def test_sweep_does_not_start_at_a_link(tmp_path: Path) -> None:
    data = old_file(tmp_path / "home" / "data")
    (tmp_path / "top").symlink_to(tmp_path / "home")

    done = sweep(tmp_path / "top")

    assert (data.exists(), done.removed) == (True, 0)


def test_sweep_is_not_led_out_by_a_folder_that_becomes_a_link(tmp_path: Path) -> None:
    data = [old_file(tmp_path / "home" / str(number)) for number in range(50)]
    top, trap, over = tmp_path / "top", tmp_path / "top" / "trap", threading.Event()
    trap.mkdir(parents=True)

    def swap() -> None:
        while not over.is_set():
            trap.rename(top / "aside")
            trap.symlink_to(tmp_path / "home")
            trap.unlink()
            (top / "aside").rename(trap)

    attacker = threading.Thread(target=swap)
    attacker.start()
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            # Folders alone: a link may be removed by itself, which would end the attack.
            sweep(top, suits=lambda _name, entry, depth: depth > 0)
    finally:
        over.set()
        attacker.join()

    assert [path for path in data if not path.exists()] == []


def test_sweep_stays_on_its_filesystem_and_out_of_mounts(tmp_path: Path) -> None:
    here = old_file(tmp_path / "top" / "mounted" / "file")
    other = old_file(tmp_path / "top" / "file")

    sweep(tmp_path / "top", mount_points=frozenset([str(tmp_path / "top" / "mounted")]))

    assert (here.exists(), other.exists()) == (True, False)


MOUNTED = """
import pathlib, subprocess, sys, time
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_files import Sweep
top = pathlib.Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(top / "other")], check=True)
(top / "other" / "file").write_text("x")
(top / "file").write_text("x")
Sweep(lambda *_: True, time.monotonic() + 20).run(str(top))
print((top / "other" / "file").exists(), (top / "file").exists())
"""


def test_sweep_leaves_another_filesystem_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()

    assert in_own_mounts(MOUNTED, str(tmp_path)) == ["True False"]


def in_own_mounts(script: str, *arguments: str) -> list[str]:
    """Run a script whose mounts nobody else sees; give the lines that it prints."""
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", script, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2] / "collections"),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "Operation not permitted" in done.stderr or "permission denied" in done.stderr:
        skip_or_fail("mounting needs root")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_sweep_only_counts_in_check_mode(tmp_path: Path) -> None:
    path = old_file(tmp_path / "file")

    done = sweep(tmp_path, check_mode=True)

    assert (path.exists(), done.removed, done.freed_bytes) == (True, 1, 4096)


def test_sweep_stops_once_enough_is_free(tmp_path: Path) -> None:
    files = [old_file(tmp_path / str(number)) for number in range(10)]
    counted = iter(range(100))

    sweep(tmp_path, is_enough=lambda: next(counted) >= 2)

    assert sum(path.exists() for path in files) == 7


def test_sweep_stops_at_its_deadline(tmp_path: Path) -> None:
    path = old_file(tmp_path / "file")

    done = sweep(tmp_path, deadline=time.monotonic() - 1)

    assert (path.exists(), done.over) == (True, True)


def test_sweep_survives_a_tree_that_is_too_deep(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(MAX_DEPTH + 10):
        folder = folder / "d"
    bottom = old_file(folder / "file")

    done = sweep(tmp_path)

    assert (bottom.exists(), done.removed) == (True, 0)


def test_a_file_with_another_name_frees_nothing(tmp_path: Path) -> None:
    kept = old_file(tmp_path / "home" / "data")
    (tmp_path / "top").mkdir()
    os.link(kept, tmp_path / "top" / "data")

    done = sweep(tmp_path / "top")

    assert (kept.exists(), done.removed, done.freed_bytes) == (True, 1, 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("syslog.1", True),
        ("syslog.12.gz", True),
        ("messages-20261123", True),
        ("app.log.old", True),
        ("syslog", False),
        ("app.log", False),
        ("version-2", False),
        ("system.journal", False),
        (".1", False),
    ],
)
def test_is_rotated_knows_logs_that_were_put_aside(name: str, expected: bool) -> None:
    assert is_rotated(name) is expected


# which filesystems


def space(used: int, *, inodes_free: int = 50) -> FilesystemSpace:
    return FilesystemSpace(100, 100 - used, 100 - used, 100, inodes_free)


@pytest.mark.parametrize(
    ("found", "full", "enough"),
    [
        (space(84), False, False),
        (space(85), True, False),
        (space(76), False, True),
        (space(10, inodes_free=10), True, False),
        (FilesystemSpace(100, 90, 90, 0, 0), False, True),
    ],
    ids=["below", "at", "a-tenth-below", "inodes", "without-inodes"],
)
def test_judge_disk_is_full_at_its_limit_and_well_a_tenth_below(
    found: FilesystemSpace, full: bool, enough: bool
) -> None:
    disk = judge_disk("/", 1, found, Limits(85, 85))

    assert (disk.is_full, disk.has_enough) == (full, enough)


def order(**changed: Any) -> Order:
    given = {
        "sources": _recover_disk.SOURCES,
        "general": Limits(100, 100),
        "own": {},
        "older_than_days": 10.0,
        "journal_mib": 64,
        "deadline": deadline(),
        "check_mode": True,
    }
    return Order(**{**given, **changed})


def test_free_disk_does_nothing_where_nothing_is_full() -> None:
    found = free_disk(order(check_mode=False, sources=(), general=Limits(100.1, 100.1)))

    assert (found.needed, found.changed, found.freed_bytes) == (False, False, 0)


def test_free_disk_says_where_nothing_may_be_removed() -> None:
    own = {"/dev/shm": Limits(0, 0)}

    with pytest.raises(RepairError, match=r"/dev/shm is .* nothing that may be removed is there"):
        free_disk(order(check_mode=False, sources=(), general=Limits(100.1, 100.1), own=own))


# services and the clock


class Systemctl:
    """A systemctl that answers from a list of states, one after the other."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)
        self.told: list[tuple[str, ...]] = []

    def __call__(self, argv: Sequence[str], _deadline: float) -> Ended:
        if "show" in argv:
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            return Ended(0, f"LoadState=loaded\nActiveState={state}\nSubState=x\nMainPID=7\n")
        self.told.append(tuple(argv))
        return Ended(0, "")


def test_restart_services_leaves_those_that_work() -> None:
    systemctl = Systemctl("active")

    found = restart_services(["a.service"], deadline(), check_mode=False, run=systemctl)

    assert (found.needed, found.changed, systemctl.told) == (False, False, [])


def test_restart_services_clears_the_failure_and_restarts_without_waiting_in_systemctl() -> None:
    systemctl = Systemctl("failed", "activating", "active")

    found = restart_services(["a.service"], deadline(), check_mode=False, run=systemctl)

    assert (found.changed, found.message) == (True, "restarted a.service")
    assert systemctl.told == [
        ("systemctl", "reset-failed", "--", "a.service"),
        ("systemctl", "--no-block", "restart", "--", "a.service"),
    ]


def test_restart_services_tells_nothing_in_check_mode() -> None:
    systemctl = Systemctl("failed")

    found = restart_services(["a.service"], deadline(), check_mode=True, run=systemctl)

    assert (found.needed, found.changed, systemctl.told) == (True, True, [])
    assert found.after == {"a.service": "active"}


def test_restart_services_fails_where_there_is_no_such_unit() -> None:
    with pytest.raises(RepairError, match=r"a\.service is not-found"):
        restart_services(["a.service"], deadline(), check_mode=False, run=lambda *_: Ended(0, "LoadState=not-found\n"))


def docker(active: str, enabled: str = "disabled") -> Unit:
    return Unit("docker.service", "loaded", active, enabled=enabled)


@pytest.mark.parametrize(
    ("unit", "units", "engines", "unjudged", "expected"),
    [
        (docker("active"), [], {"docker": None}, False, False),
        (docker("active"), [], {"docker": "timed out"}, False, True),
        (docker("inactive"), [], {"docker": None}, True, False),
        (docker("inactive"), [], {}, False, False),
        (docker("failed", "enabled"), [], {}, False, True),
        (docker("inactive"), ["docker.service"], {}, False, True),
        (docker("inactive"), [], {}, True, True),
    ],
    ids=["works", "hangs", "by-socket", "switched-off", "enabled", "checked", "unjudged"],
)
def test_plan_runtime_restarts_what_should_work(
    unit: Unit, units: list[str], engines: dict[str, str | None], unjudged: bool, expected: bool
) -> None:
    assert ("docker.service" in plan_runtime([unit], units, engines, unjudged)) is expected


def test_plan_clock_prefers_the_daemon_that_runs() -> None:
    units = [
        Unit("chrony.service", "loaded", "inactive", enabled="enabled"),
        Unit("systemd-timesyncd.service", "loaded", "active"),
        Unit("ntp.service", "not-found"),
    ]

    chosen = [plan_clock(units), plan_clock(units[:1]), plan_clock(units[2:])]

    assert [unit and unit.name for unit in chosen] == ["systemd-timesyncd.service", "chrony.service", None]


@pytest.mark.parametrize("synchronised", [True, None])
def test_renew_clock_leaves_a_clock_that_is_kept_or_unknown(synchronised: bool | None) -> None:
    systemctl = Systemctl("active")

    found = renew_clock(lambda: synchronised, deadline(), check_mode=False, run=systemctl)

    assert (found.needed, systemctl.told) == (False, [])


def test_renew_clock_steps_a_clock_that_chrony_keeps() -> None:
    systemctl = Systemctl("active")

    found = renew_clock(lambda: False, deadline(), check_mode=False, run=systemctl)

    assert found.message == "restarted chrony.service"
    assert systemctl.told[-1] == ("chronyc", "-a", "makestep")


def test_parse_unit_survives_any_answer() -> None:
    unit = parse_unit("a.service", "Job=77\nActiveState=\x1b[31mactive" + "x" * 1000 + "\nnonsense")

    assert unit.job == "77"
    assert len(unit.active) <= 60
    assert "\x1b" not in unit.active


# containers


@contextmanager
def engine(path: Path, answers: Callable[[str, str], tuple[int, Any]]) -> Iterator[list[tuple[str, str]]]:
    """Serve the engine's API on a socket; gives the requests."""
    asked: list[tuple[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            asked.append((self.command, self.path))
            status, value = answers(self.command, self.path)
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer  # noqa: N815  named so by http.server

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    with Server(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


def located(path: Path) -> Callable[[str], str]:
    return lambda name: str(path) if name in {"/var/run/docker.sock", "/run/docker.sock"} else "/nonexistent"


def test_restart_containers_restarts_by_id_and_leaves_others(tmp_path: Path) -> None:
    rows = [
        {"Id": "a1", "Names": ["/app"], "State": "exited", "Status": "Exited (137)"},
        {"Id": "b2", "Names": ["/db"], "State": "running", "Status": "Up (healthy)"},
        {"Id": "c3", "Names": ["/app2"], "State": "exited", "Status": "Exited (1)"},
    ]

    def answers(method: str, path: str) -> tuple[int, Any]:
        if method == "POST":
            rows[0]["State"] = "running"
        return 200, {"Version": "20.10", "ApiVersion": "1.41"} if path == "/version" else rows

    with engine(tmp_path / "s", answers) as asked:
        done = restart_containers(["app", "db"], deadline(), locate=located(tmp_path / "s"), check_mode=False)

    assert [path for method, path in asked if method == "POST"] == ["/containers/a1/restart?t=10"]
    assert (done.changed, done.message) == (True, "restarted container app")


def test_restart_containers_says_why_the_engine_refuses(tmp_path: Path) -> None:
    row = {"Id": "a1", "Names": ["/app"], "State": "exited", "Status": ""}

    def answers(method: str, path: str) -> tuple[int, Any]:
        if method == "POST":
            return 500, {"message": "no space left on device"}
        return 200, {"Version": "20.10", "ApiVersion": "1.41"} if path == "/version" else [row]

    with engine(tmp_path / "s", answers), pytest.raises(RepairError, match=r"container app: .*no space left"):
        restart_containers(["app"], deadline(), locate=located(tmp_path / "s"), check_mode=False)


@pytest.mark.parametrize("rows", [None, {}, [None], [{"Id": "../x", "Names": ["/app"]}], [{"Id": "a", "Names": 7}]])
def test_find_containers_survives_any_answer(rows: object) -> None:
    assert [container.key for container in find_containers(rows, ["app"])] == [""]


def test_prune_asks_for_dangling_images_only(tmp_path: Path) -> None:
    def answers(_method: str, path: str) -> tuple[int, Any]:
        return 200, {"Version": "20.10", "ApiVersion": "1.41"} if path == "/version" else {"SpaceReclaimed": 7}

    with engine(tmp_path / "s", answers) as asked:
        freed = prune(located(tmp_path / "s"), deadline(), images=True, build_cache=False)

    posts = [path for method, path in asked if method == "POST"]
    assert freed == 7
    assert posts == ["/images/prune?filters=%7B%22dangling%22%3A%20%5B%22true%22%5D%7D"]


def test_ask_engines_tells_silent_from_absent(tmp_path: Path) -> None:
    socket_path = tmp_path / "s"
    with socketserver.UnixStreamServer(str(socket_path), socketserver.BaseRequestHandler):
        silent = ask_engines(located(socket_path), time.monotonic() + 0.5)

    assert list(silent) == ["docker"]
    assert silent["docker"] is not None
    assert ask_engines(lambda _name: "/nonexistent", deadline()) == {}


# the host


@pytest.mark.parametrize(
    ("options", "expected"), [("rw,relatime - ext4 /dev/a rw", False), ("rw - ext4 /dev/a ro,x", True)]
)
def test_is_read_only_looks_at_the_root(options: str, expected: bool) -> None:
    assert is_read_only(f"25 1 259:2 / / {options}\n26 25 0:26 / /run ro - tmpfs tmpfs ro\n") is expected


@pytest.mark.parametrize(
    ("fstab", "expected"),
    [("UUID=1 / ext4 ro,noatime 0 1\n", True), ("UUID=1 / ext4 errors=remount-ro 0 1\n#x / ext4 ro 0 1\n", False)],
)
def test_wants_read_only_reads_fstab(fstab: str, expected: bool) -> None:
    assert wants_read_only(fstab) is expected


REMOUNT = """
import subprocess, sys, time
subprocess.run(["mount", "-o", "remount,bind,ro", "/"], check=True)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_host import remount_root
for check_mode in (True, False, False):
    found = remount_root(time.monotonic() + 20, check_mode=check_mode)
    print(found.needed, found.changed)
"""


def test_remount_root_makes_the_root_writable_once() -> None:
    assert in_own_mounts(REMOUNT) == ["True True", "True True", "False False"]


def test_read_boot_stays_the_same_and_differs_by_first_process(tmp_path: Path) -> None:
    (tmp_path / "proc/sys/kernel/random").mkdir(parents=True)
    (tmp_path / "proc/1").mkdir()
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text("b-1\n")
    after_the_state = " ".join(str(number) for number in range(4, 30))
    (tmp_path / "proc/1/stat").write_text(f"1 (init (x) y) S {after_the_state}\n")

    assert read_boot() == read_boot()
    assert read_boot(Reader(str(tmp_path))) == "b-1.22"


# programs


def test_run_program_kills_all_that_was_started_at_its_deadline(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )

    started = time.monotonic()
    ended = run_program([sys.executable, "-c", script], time.monotonic() + 1.0)

    assert ended.status is None
    assert time.monotonic() - started < 5
    child = int(ended.last_line)
    until = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_run_program_keeps_the_end_of_a_flood_and_its_status() -> None:
    ended = run_program(["sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo last; exit 3"], deadline())

    assert (ended.status, ended.last_line) == (3, "last")
    assert len(ended.output) <= 8192
    assert ended.describe() == "exited 3: last"


def test_run_program_does_not_wait_for_what_is_left_behind() -> None:
    started = time.monotonic()

    ended = run_program(["sh", "-c", "sleep 5 & echo done"], deadline())

    assert (ended.status, ended.last_line) == (0, "done")
    assert time.monotonic() - started < 4


def test_run_program_says_what_is_missing() -> None:
    with pytest.raises(RepairError, match="/nonexistent can't be run: No such file"):
        run_program(["/nonexistent"], deadline())


# switching off and on

WORDS = {"node_id": "gw-7", "address": "192.0.2.7", "recovery_id": "r-1"}


@contextmanager
def power_switch(status: int, answer: bytes) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve an operator's URL; gives it and the calls."""
    calls: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            calls.append({"path": self.path, "token": self.headers["Authorization"], "body": json.loads(body)})
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/cycle/{{node_id}}?at={{address}}", calls
        finally:
            server.shutdown()
            thread.join()


def test_call_sends_who_and_the_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")

    with power_switch(202, b"outlet 7\ncycled") as (url, calls):
        said = node_power._call({"url": url, "token_file": str(token)}, {**WORDS, "node_id": "a/b?c"}, deadline())

    assert said == "outlet 7 cycled"
    assert calls == [
        {
            "path": "/cycle/a%2Fb%3Fc?at=192.0.2.7",
            "token": "Bearer secret",
            "body": {**WORDS, "node_id": "a/b?c"},
        }
    ]


@pytest.mark.parametrize("status", [302, 409, 500])
def test_call_fails_unless_answered_well(status: int) -> None:
    with (
        power_switch(status, b"no such outlet") as (url, calls),
        pytest.raises(RepairError, match=f"{status}: no such"),
    ):
        node_power._call({"url": url, "token_file": None}, WORDS, deadline())

    assert len(calls) == 1


@pytest.mark.parametrize("content", ["", "two words", "line\nX-Header: 1"])
def test_token_is_one_word(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)

    with pytest.raises(RepairError, match="doesn't hold one token"):
        node_power._token(str(tmp_path / "token"))


def test_run_fills_arguments_once_and_sets_the_environment(tmp_path: Path) -> None:
    script = tmp_path / "pdu"
    script.write_text('#!/bin/sh\nprintf "%s," "$@" "$NODE_ID" "$NODE_ADDRESS" "$RECOVERY_ID"\n')
    script.chmod(0o755)
    power = {"command": [str(script), "--at={address}", "{node_id}", "{recovery_id}", "$(id)"]}

    said = node_power._run(power, {**WORDS, "node_id": "{address}"}, deadline())

    assert said == "--at=192.0.2.7,{address},{recovery_id},$(id),{address},192.0.2.7,r-1,"


def test_run_fails_with_the_last_words() -> None:
    with pytest.raises(RepairError, match="the command exited 4: no such outlet"):
        node_power._run({"command": ["sh", "-c", "echo no such outlet; exit 4"]}, WORDS, deadline())


@pytest.mark.parametrize("odd", ["-oProxyCommand=x", "a b", "a;b", "", "$(id)", "a\nb", "{{ 1 }}", "../x"])
def test_refuse_odd_takes_names_and_addresses_only(odd: str) -> None:
    node_power._refuse_odd({**WORDS, "address": "fe80::1%eth0"})

    with pytest.raises(AnsibleActionFail):
        node_power._refuse_odd({**WORDS, "address": odd})


# arguments

GOOD = {
    "timeout_seconds": 50.0,
    "older_than_days": 10.0,
    "journal_mib": 64,
    "space_percent": 85.0,
    "inodes_percent": 85.0,
    "filesystems": [],
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"filesystems": [{"mount": "/", "space_percent": 90, "name": "disk", "kind": "filesystem"}]}, None),
        ({"timeout_seconds": float("nan")}, "timeout_seconds"),
        ({"older_than_days": -1.0}, "older_than_days"),
        ({"journal_mib": 0}, "journal_mib"),
        ({"space_percent": 101.0}, "space_percent"),
        ({"filesystems": [{"mount": "tmp"}]}, "filesystems"),
        ({"filesystems": [{"mount": "/", "space_percent": "90"}]}, "space_percent"),
    ],
)
def test_check_params_names_what_is_wrong(changed: dict[str, Any], expected: str | None) -> None:
    said = check_params({**GOOD, **changed})

    assert said is None if expected is None else expected in str(said)
