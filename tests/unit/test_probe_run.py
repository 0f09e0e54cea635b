# SPDX-License-Identifier: GPL-3.0-or-later
"""A collector that hangs costs its own part and nothing else, once and in a loop."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe import (
    Sampler,
    collect_facts,
    collect_sample,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_clock import ClockReading
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_parse import Mount
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader, run_command
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_run import (
    Batch,
    BoundedRunner,
    MoreTasks,
    Outcome,
    Task,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._sample_parts import ContainersReading

COLLECTIONS = Path(__file__).parents[2] / "collections"
SPACE = SimpleNamespace(f_frsize=4096, f_blocks=1000, f_bfree=500, f_bavail=400, f_files=100, f_ffree=50)
ROOT_LINE = "28 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw\n"


@pytest.fixture
def runner(gate: threading.Event) -> Iterator[BoundedRunner]:
    bounded = BoundedRunner()
    yield bounded
    bounded.close()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Hold collectors until the test is over, then let every thread go."""
    event = threading.Event()
    yield event
    event.set()
    deadline = time.monotonic() + 5
    for thread in threading.enumerate():
        if thread.name == "probe":
            thread.join(max(0.0, deadline - time.monotonic()))


@pytest.fixture
def node(tmp_path: Path) -> Path:
    files = {
        "proc/stat": "cpu  1 0 1 8 0 0 0 0\ncpu0 1 0 1 8 0 0 0 0\n",
        "proc/loadavg": "0.1 0.2 0.3 1/2 3\n",
        "proc/uptime": "10.5 9.0\n",
        "proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 500 kB\n",
        "proc/net/dev": "",
        "proc/self/mountinfo": ROOT_LINE + "98 28 0:45 / /mnt/nas rw,relatime - nfs4 nas:/export rw\n",
        "proc/sys/kernel/hostname": "node\n",
        "proc/sys/kernel/random/boot_id": "0d1c\n",
        "proc/cpuinfo": "",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def test_run_returns_values_and_errors(runner: BoundedRunner) -> None:
    def fail() -> None:
        raise ValueError("no sense in it")

    outcome = runner.run([Task("good", lambda: 7, 1.0), Task("bad", fail, 1.0, "/x")], soon())

    assert outcome.values == {("good", ""): 7}
    assert outcome.errors == [{"collector": "bad", "message": "no sense in it at /x"}]


def test_run_adds_what_a_task_finds(runner: BoundedRunner) -> None:
    more = MoreTasks([Task("disk", lambda: 1, 1.0, "/"), Task("disk", lambda: 2, 1.0, "/data")], "found")

    outcome = runner.run([Task("disk", lambda: more, 1.0)], soon())

    assert outcome.values == {("disk", ""): "found", ("disk", "/"): 1, ("disk", "/data"): 2}


def test_run_lets_hanging_tasks_wait_side_by_side(runner: BoundedRunner, gate: threading.Event) -> None:
    hanging = [Task("nas", gate.wait, 0.5, f"/mnt/{number}") for number in range(5)]
    started = time.monotonic()

    outcome = runner.run([*hanging, Task("good", lambda: 7, 0.5)], soon())

    assert outcome.values == {("good", ""): 7}
    assert sorted(error["message"] for error in outcome.errors) == [
        f"timed out after 0.5 s at /mnt/{number}" for number in range(5)
    ]
    assert time.monotonic() - started < 2.0


def test_run_ends_at_deadline(runner: BoundedRunner, gate: threading.Event) -> None:
    started = time.monotonic()

    outcome = runner.run([Task("nas", gate.wait, 60.0)], soon(0.2))

    assert outcome.errors == [{"collector": "nas", "message": "timed out after 0.2 s"}]
    assert time.monotonic() - started < 2.0


def test_run_does_not_pile_up_threads_on_a_stuck_task(runner: BoundedRunner, gate: threading.Event) -> None:
    task = Task("nas", gate.wait, 0.1)
    runner.run([task], soon())
    threads = threading.active_count()

    outcomes = [runner.run([task, Task("good", lambda: 7, 1.0)], soon()) for _ in range(20)]

    assert threading.active_count() <= threads + 1
    assert all(outcome.values == {("good", ""): 7} for outcome in outcomes)
    assert outcomes[-1].errors[0]["message"].startswith("still blocked after")


def test_run_tries_again_once_the_task_came_back(runner: BoundedRunner, gate: threading.Event) -> None:
    back = threading.Event()

    def hang() -> str:
        gate.wait()
        back.set()
        return "here"

    runner.run([Task("nas", hang, 0.1)], soon())
    gate.set()
    back.wait(5)
    deadline = soon()
    outcome = runner.run([Task("nas", hang, 1.0)], soon())
    while outcome.errors and time.monotonic() < deadline:
        outcome = runner.run([Task("nas", hang, 1.0)], soon())

    assert outcome.values == {("nas", ""): "here"}


def test_start_ends_what_hangs_when_it_is_looked_at(runner: BoundedRunner, gate: threading.Event) -> None:
    ends: list[Outcome] = []
    for number in range(2):
        # The second time it is stuck from the first, and nothing is left to run.
        runner.start([Task("nas", gate.wait, 0.2)], soon(), ends.append)
        deadline = soon()
        while len(ends) == number and time.monotonic() < deadline:
            time.sleep(max(0.0, min(runner.look() - time.monotonic(), 0.05)))

    first, second = (end.errors[0]["message"] for end in ends)
    assert first == "timed out after 0.2 s"
    assert second.startswith("still blocked after")
    assert runner.look() == float("inf")


def test_start_ends_by_itself_where_nothing_hangs(runner: BoundedRunner) -> None:
    ended = threading.Event()
    ends: list[Outcome] = []

    runner.start([Task("good", lambda: 7, 1.0)], soon(), lambda outcome: (ends.append(outcome), ended.set()))

    assert ended.wait(5)
    assert runner.look() == float("inf")
    assert [end.values for end in ends] == [{("good", ""): 7}]


def test_worker_works_on_what_it_began_while_it_waited() -> None:
    ends: list[Outcome] = []
    threads: list[int] = []
    due = threading.Semaphore(2)
    done = threading.Semaphore(0)

    def end(outcome: Outcome) -> None:
        ends.append(outcome)
        done.release()

    def wait(handed_over: SimpleQueue[Batch | None]) -> Batch | None:
        if not due.acquire(timeout=0.01):
            return handed_over.get()
        return runner.begin([Task("who", lambda: threads.append(threading.get_ident()), 1.0)], soon(), end)

    runner = BoundedRunner(wait=wait)
    runner.keep_worker()
    runner.keep_worker()
    assert done.acquire(timeout=5)
    assert done.acquire(timeout=5)
    runner.close()

    assert [end.values for end in ends] == [{("who", ""): None}] * 2
    assert len(set(threads)) == 1


def test_worker_that_hangs_is_replaced_while_nothing_else_waits(gate: threading.Event) -> None:
    ends: list[Outcome] = []
    due = threading.Event()

    def wait(handed_over: SimpleQueue[Batch | None]) -> Batch | None:
        while handed_over.empty():
            if due.is_set():
                due.clear()
                return runner.begin([Task("nas", gate.wait, 0.2), Task("good", lambda: 7, 0.2)], soon(), ends.append)
            due.wait(0.01)
        return handed_over.get()

    runner = BoundedRunner(wait=wait)
    for number in range(2):
        due.set()
        deadline = soon()
        while len(ends) == number and time.monotonic() < deadline:
            runner.keep_worker()
            time.sleep(max(0.0, min(runner.look() - time.monotonic(), 0.02)))
    runner.close()

    assert [end.values for end in ends] == [{("good", ""): 7}] * 2
    assert ends[0].errors == [{"collector": "nas", "message": "timed out after 0.2 s"}]
    assert ends[1].errors[0]["message"].startswith("still blocked after")


def test_keep_worker_replaces_one_that_died() -> None:
    waited = threading.Semaphore(0)

    def wait(handed_over: SimpleQueue[Batch | None]) -> Batch | None:
        waited.release()
        return None

    runner = BoundedRunner(wait=wait)
    for _ in range(2):
        runner.keep_worker()
        assert waited.acquire(timeout=5)
        deadline = soon()
        while any(thread.name == "probe" for thread in threading.enumerate()) and time.monotonic() < deadline:
            time.sleep(0.01)
    runner.close()


def test_collect_sample_leaves_a_dead_mount_out(node: Path, gate: threading.Event) -> None:
    def statvfs(path: str) -> SimpleNamespace:
        if path == "/mnt/nas":
            gate.wait()
        return SPACE

    started = time.monotonic()

    sample = collect_sample(Reader(str(node), statvfs=statvfs), 0.1, timeout_seconds=5.0)

    assert time.monotonic() - started <= 5.0
    assert [filesystem["mount"] for filesystem in sample["filesystems"]] == ["/"]
    assert sample["errors"] == [{"collector": "filesystems", "message": "timed out after 2.0 s at /mnt/nas"}]
    assert sample["cpu"] is not None
    assert sample["memory"] is not None


@pytest.mark.parametrize(
    ("path", "lost", "collector"),
    [
        pytest.param("proc/meminfo", "memory", "memory", id="memory"),
        pytest.param("proc/stat", "cpu", "cpu", id="cpu"),
        pytest.param("proc/net/dev", "network", "network", id="network"),
        pytest.param("proc/self/mountinfo", "filesystems", "filesystems", id="filesystems"),
        pytest.param("proc/uptime", "uptime_seconds", "clock", id="clock"),
    ],
)
def test_collect_sample_leaves_a_hanging_file_out(node: Path, path: str, lost: str, collector: str) -> None:
    (node / path).unlink()
    os.mkfifo(node / path)
    parts = {"cpu", "memory", "filesystems", "network", "containers", "thermal", "uptime_seconds"}
    started = time.monotonic()

    sample = collect_sample(Reader(str(node), statvfs=lambda _: SPACE), 0.1, timeout_seconds=1.0)

    elapsed_seconds = time.monotonic() - started
    release_fifo(node / path)
    assert elapsed_seconds <= 2.0
    assert {part for part in parts if sample[part] is None} == {lost}
    assert [error["collector"] for error in sample["errors"]] == [collector]


def test_collect_facts_leaves_a_hanging_file_out(node: Path) -> None:
    (node / "proc/meminfo").unlink()
    os.mkfifo(node / "proc/meminfo")

    facts = collect_facts(Reader(str(node), statvfs=lambda _: SPACE), timeout_seconds=0.5)

    release_fifo(node / "proc/meminfo")
    assert facts["memory_total_bytes"] is None
    assert facts["hostname"] == "node"
    assert [error["collector"] for error in facts["errors"]] == ["memory_total_bytes"]


def test_collect_sample_names_what_is_missing(node: Path) -> None:
    (node / "proc/meminfo").write_text("nonsense\n")

    sample = collect_sample(Reader(str(node), statvfs=lambda _: SPACE), 0.01)

    assert sample["memory"] is None
    assert sample["errors"] == [{"collector": "memory", "message": "/proc/meminfo lacks MemTotal or MemAvailable"}]


@pytest.mark.parametrize(("interval", "timeout"), [(0.0, 5.0), (5.0, 5.0), (float("nan"), 5.0)])
def test_collect_sample_refuses_interval(node: Path, interval: float, timeout: float) -> None:
    with pytest.raises(ValueError, match="interval_seconds"):
        collect_sample(Reader(str(node)), interval, timeout_seconds=timeout)


def test_sampler_sees_a_filesystem_turn_read_only(node: Path) -> None:
    sampler = Sampler(Reader(str(node), statvfs=lambda _: SPACE))
    first = sampler.sample()
    (node / "proc/self/mountinfo").write_text(ROOT_LINE.replace("vda1 rw", "vda1 ro,errors=remount-ro"))

    second = sampler.sample()
    sampler.close()

    assert (first["root_read_only"], second["root_read_only"]) == (False, True)


def test_sampler_compares_with_the_sample_before(node: Path) -> None:
    sampler = Sampler(Reader(str(node), statvfs=lambda _: SPACE))
    first = sampler.sample()
    (node / "proc/stat").write_text("cpu  26 0 1 83 0 0 0 0\ncpu0 26 0 1 83 0 0 0 0\n")

    second = sampler.sample()
    sampler.close()

    assert first["cpu"]["use_percent"] is None
    assert second["cpu"]["use_percent"] == 25.0


def test_sampler_asks_for_services_on_their_interval_only(node: Path) -> None:
    (node / "run/systemd/system").mkdir(parents=True)
    answers = ["Id=a.service\nActiveState=failed\nNRestarts=2\n", None, "Id=a.service\nActiveState=active\n"]
    asked: list[float] = []
    clock = SimpleNamespace(now=0.0)

    def run(argv: object, limit_seconds: float) -> str | None:
        asked.append(clock.now)
        return answers[len(asked) - 1]

    sampler = Sampler(
        Reader(str(node), statvfs=lambda _: SPACE, run=run), clock=lambda: clock.now, services_interval_seconds=300
    )

    def services_at(now: float) -> object:
        clock.now = now
        return sampler.sample()["services"]

    seen = [services_at(now) for now in (0.0, 297.0, 300.0, 301.0, 600.0)]
    sampler.close()

    first, last = {"failed": ["a.service"], "restarts": {"a.service": 2}}, {"failed": [], "restarts": {}}
    assert seen == [first, first, None, None, last]
    assert asked == [0.0, 300.0, 600.0]


def test_sampler_asks_for_the_clock_every_half_minute(node: Path) -> None:
    clock = SimpleNamespace(now=0.0)
    asked: list[float] = []

    def read_clock() -> ClockReading:
        asked.append(clock.now)
        return ClockReading("the kernel", len(asked) == 1, 0.0, 0.1, 0.2)

    sampler = Sampler(Reader(str(node), statvfs=lambda _: SPACE, read_clock=read_clock), clock=lambda: clock.now)

    def told_at(now: float) -> tuple[object, object]:
        clock.now = now
        sample = sampler.sample()
        assert isinstance(sample["clock"], dict)
        return sample["clock"]["synchronised"], sample["uptime_seconds"]

    told = [told_at(now) for now in (0.0, 15.0, 27.0)]
    (node / "proc/uptime").write_text("40.75 9.0\n")
    told += [told_at(now) for now in (30.0, 45.0)]
    assert told == [(True, 10.5), (True, 25.5), (True, 37.5), (False, 40.75), (False, 55.75)]
    assert asked == [0.0, 30.0]
    sampler.close()


def test_sampler_asks_on_the_beat_although_reading_takes_its_time(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    asked: list[float] = []

    def tick() -> float:
        # Nothing happens in no time, and no two samples take the same.
        clock.now += 0.004
        return clock.now

    reader = Reader(str(node), statvfs=lambda _: SPACE, run=lambda _argv, _limit: asked.append(clock.now))  # type: ignore[arg-type]
    (node / "run/systemd/system").mkdir(parents=True)
    sampler = Sampler(
        reader, clock=tick, wall_clock=lambda: 0.0, containers_interval_seconds=15.0, services_interval_seconds=300.0
    )
    read = Sampler._read_containers
    containers: list[float] = []

    def read_containers(self: Sampler, deadline: float, now: float) -> ContainersReading:
        containers.append(now)
        return read(self, deadline, now)

    monkeypatch.setattr(Sampler, "_read_containers", read_containers)
    for beat in range(42):
        # Awakenings come a little late, each as much as it happens.
        clock.now = beat * 15.0 + (beat * 37 % 50) / 1000
        sampler.sample()
    sampler.close()

    assert len(containers) == 42
    assert [round(at / 15) for at in asked] == [0, 20, 40]


class TellingReader(Reader):
    """A reader that is told whether the mounts are others, and remembers what it read again."""

    def __init__(self, root: str) -> None:
        super().__init__(root, statvfs=lambda _: SPACE)
        self.mounts_changed = False
        self.read: list[str] = []

    def has_changed(self, path: str) -> bool:
        return self.mounts_changed

    def read_again(self, path: str, *, whole: bool = False) -> str:
        self.read.append(path)
        return super().read_again(path, whole=whole)


def test_sampler_reads_mounts_and_kills_every_half_minute(node: Path) -> None:
    clock = SimpleNamespace(now=0.0)
    reader = TellingReader(str(node))
    sampler = Sampler(reader, clock=lambda: clock.now)

    def read_at(now: float, *, changed: bool = False) -> list[str]:
        clock.now, reader.mounts_changed, reader.read = now, changed, []
        assert sampler.sample()["filesystems"]
        return [path for path in ("/proc/self/mountinfo", "/proc/vmstat") if path in reader.read]

    both, mounts = ["/proc/self/mountinfo", "/proc/vmstat"], ["/proc/self/mountinfo"]
    assert [read_at(0.0), read_at(15.0), read_at(27.0), read_at(30.0), read_at(45.0)] == [both, [], [], both, []]
    assert read_at(46.0, changed=True) == mounts
    assert read_at(73.0) == ["/proc/vmstat"]
    sampler.close()


def test_sampler_reads_mounts_again_that_it_could_not_read(node: Path) -> None:
    reader = TellingReader(str(node))
    sampler = Sampler(reader, clock=lambda: 0.0)
    mounts = node / "proc/self/mountinfo"
    sampler.sample()
    reader.let_go("/proc")
    mounts.unlink()
    reader.mounts_changed = True
    without = sampler.sample()
    reader.mounts_changed = False
    mounts.write_text(ROOT_LINE + "99 28 254:2 / /data rw,relatime - ext4 /dev/vdb1 rw\n")

    after = sampler.sample()
    sampler.close()

    assert without["filesystems"] is None
    assert [part["mount"] for part in after["filesystems"]] == ["/", "/data"]  # type: ignore[union-attr, index, call-overload]


def test_root_that_became_read_only_is_seen_before_the_mounts_are_read_again(node: Path) -> None:
    reader = TellingReader(str(node))
    sampler = Sampler(reader, clock=lambda: 0.0)
    before = sampler.sample()["root_read_only"]
    reader._statvfs = lambda _: SimpleNamespace(**vars(SPACE), f_flag=os.ST_RDONLY)  # type: ignore[assignment, return-value]

    after = sampler.sample()
    sampler.close()

    assert (before, after["root_read_only"]) == (False, True)
    assert [part["read_only"] for part in after["filesystems"] if part["mount"] == "/"] == [True]  # type: ignore[union-attr, index, call-overload]


def test_sampler_opens_links_anew_once_they_may_be_others(node: Path) -> None:
    clock = SimpleNamespace(now=0.0)
    sampler = Sampler(Reader(str(node), statvfs=lambda _: SPACE), clock=lambda: clock.now)

    def make_link(name: str, state: str) -> None:
        folder = node / "sys/class/net" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "new").write_text(state + "\n")
        (folder / "new").rename(folder / "operstate")

    def links_at(now: float, *names: str) -> dict[str, bool]:
        clock.now = now
        lines = [f"{name}: 1 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0\n" for name in names]
        (node / "proc/net/dev").write_text("Inter-|\n face |\n" + "".join(lines))
        part = sampler.sample()["network"]
        assert isinstance(part, list)
        return {link["interface"]: link["up"] for link in part}

    make_link("eth0", "up")
    make_link("eth1", "down")
    seen = [links_at(0.0, "eth0", "eth1")]
    make_link("eth0", "down")
    make_link("eth1", "up")
    seen += [links_at(57.0, "eth0", "eth1"), links_at(60.0, "eth0", "eth1")]
    make_link("eth0", "up")
    seen += [links_at(61.0, "eth0"), links_at(62.0, "eth0", "eth1")]
    sampler.close()

    first, swapped = {"eth0": True, "eth1": False}, {"eth0": False, "eth1": True}
    assert seen == [first, first, swapped, {"eth0": True}, {"eth0": True, "eth1": True}]


def test_kernel_tells_of_other_mounts(tmp_path: Path) -> None:
    script = """
import subprocess, sys
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader
reader, mounts, place = Reader(), "/proc/self/mountinfo", sys.argv[1]
reader.read_again(mounts)
seen = [reader.has_changed(mounts)]
for command in (["mount", "-t", "tmpfs", "none", place], ["umount", place]):
    subprocess.run(command, check=True)
    seen += [reader.has_changed(mounts), reader.has_changed(mounts)]
print(seen)
"""
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-c", script, str(tmp_path)]

    told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    if told.stderr.startswith("unshare:"):
        pytest.skip(f"needs mounts of its own: {told.stderr}")
    assert (told.stdout, told.stderr) == ("[False, True, False, True, False]\n", "")


@pytest.mark.parametrize("interval_seconds", [None, 60.0], ids=["not-asked-for", "no-systemd"])
def test_sampler_starts_no_process_for_services(node: Path, interval_seconds: float | None) -> None:
    asked: list[object] = []
    reader = Reader(str(node), statvfs=lambda _: SPACE, run=lambda argv, limit: asked.append(argv))
    sampler = Sampler(reader, services_interval_seconds=interval_seconds)

    sample = sampler.sample()
    sampler.close()

    assert sample["services"] is None
    assert asked == []


def test_sampler_tells_of_the_clock(node: Path) -> None:
    reading = ClockReading("the kernel", True, 0.001, 0.2, 0.004)
    sampler = Sampler(Reader(str(node), statvfs=lambda _: SPACE, read_clock=lambda: reading))

    sample = sampler.sample()
    sampler.close()

    assert sample["clock"] == {"synchronised": True, "estimated_error_seconds": 0.004}


def test_sampler_leaves_out_containers_that_are_too_large(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = ContainersReading({"runtime": "docker", "items": [{"labels": ["x" * 4000] * 400}]}, {}, [])
    monkeypatch.setattr(Sampler, "_read_containers", lambda self, deadline, now: huge)
    sampler = Sampler(Reader(str(node), statvfs=lambda _: SPACE))

    sample = sampler.sample()
    sampler.close()

    assert sample["containers"] is None
    assert [error for error in sample["errors"] if error["collector"] == "containers"] == [
        {
            "collector": "containers",
            "message": "left out, the sample is too large with them: larger than 1048576 bytes",
        }
    ]


def test_collect_facts_starts_no_stuck_collector_again(node: Path, gate: threading.Event) -> None:
    runner = BoundedRunner()

    def run(argv: object, limit_seconds: float) -> str | None:
        return None

    class Stuck(Reader):
        def read_text(self, path: str) -> str:
            if path == "/proc/meminfo":
                gate.wait()
            return super().read_text(path)

    reader = Stuck(str(node), statvfs=lambda _: SPACE, run=run)
    collect_facts(reader, timeout_seconds=0.3, runner=runner)
    again = collect_facts(reader, timeout_seconds=0.3, runner=runner)

    assert any("still blocked" in error["message"] for error in again["errors"])


def test_process_ends_although_a_collector_hangs(node: Path) -> None:
    (node / "proc/meminfo").unlink()
    os.mkfifo(node / "proc/meminfo")
    package = "ansible_collections.iot_platform.node_manager.plugins.module_utils"
    script = (
        f"import sys; sys.path.insert(0, {str(COLLECTIONS)!r})\n"
        f"from {package}._probe import collect_sample\nfrom {package}._probe_read import Reader\n"
        f"print(collect_sample(Reader({str(node)!r}), 0.1, timeout_seconds=0.5)['memory'])\n"
    )

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)

    assert result.stdout == "None\n"


def test_space_asks_a_remote_filesystem_through_a_child(tmp_path: Path) -> None:
    expected = os.statvfs(tmp_path)
    mount = Mount("0:45", "/", str(tmp_path), "nfs4", "nas:/export", read_only=False)

    space = Reader().space(mount, 5.0)

    assert space.total_bytes == expected.f_blocks * expected.f_frsize
    assert space.inodes_total == expected.f_files


def test_run_command_gives_up(tmp_path: Path) -> None:
    started = time.monotonic()

    with pytest.raises(TimeoutError, match=r"timed out after 0\.1 s"):
        run_command(["sleep", "30"], 0.1)

    assert time.monotonic() - started < 3.0


@pytest.mark.parametrize("argv", [["/nonexistent/command"], ["false"]], ids=["absent", "failing"])
def test_run_command_answers_none(argv: list[str]) -> None:
    assert run_command(argv, 5.0) is None


def release_fifo(path: Path) -> None:
    """Let the threads that wait in open() go, and wait until they are gone."""
    held: Callable[[], bool] = lambda: any(thread.name == "probe" for thread in threading.enumerate())  # noqa: E731
    deadline = soon()
    while held() and time.monotonic() < deadline:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            threading.Event().wait(0.01)


@pytest.mark.parametrize("whole", [False, True], ids=["in-pieces", "whole"])
def test_read_again_reads_what_is_there_now(tmp_path: Path, whole: bool) -> None:
    reader = Reader(str(tmp_path))
    # The third could be cut anywhere, behind a newline too.
    texts = ["short", "x" * 200_000 + "end", "cpu\n" * 50_000 + "end\n", "", "again\n"]

    seen = []
    for text in texts:
        (tmp_path / "stat").write_text(text)
        seen.append(reader.read_again("/stat", whole=whole))

    assert seen == texts


def test_read_again_opens_a_file_anew_that_failed(tmp_path: Path) -> None:
    # Reading a folder fails, opening it doesn't.
    (tmp_path / "stat").mkdir()
    reader = Reader(str(tmp_path))
    with pytest.raises(IsADirectoryError):
        reader.read_again("/stat")
    (tmp_path / "stat").rmdir()
    (tmp_path / "stat").write_text("back")

    assert reader.read_again("/stat") == "back"


def test_read_again_reads_a_device_that_came_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").write_text("up\n")
    reader = Reader(str(tmp_path))
    assert reader.read_word("/state", again=True) == "up"
    gone = [OSError(errno.ENODEV, "No such device")]

    def pread(*details: int) -> bytes:
        if gone:
            raise gone.pop()
        return os.read(details[0], details[1])

    monkeypatch.setattr(os, "pread", pread)

    assert reader.read_word("/state", again=True) == "up"


def test_sampler_keeps_few_files_open_on_a_node_with_many_links(node: Path) -> None:
    lines = [f"tun{number}: 1 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0\n" for number in range(600)]
    (node / "proc/net/dev").write_text("Inter-|\n face |\n" + "".join(lines))
    for number in range(600):
        folder = node / f"sys/class/net/tun{number}"
        folder.mkdir(parents=True)
        (folder / "operstate").write_text("unknown\n")
        (folder / "carrier").write_text("1\n")
    sampler = Sampler(Reader(str(node), statvfs=lambda _: SPACE))
    before = len(os.listdir("/proc/self/fd"))

    sample = sampler.sample()
    opened = len(os.listdir("/proc/self/fd")) - before
    sampler.close()

    assert isinstance(sample["network"], list)
    assert len(sample["network"]) == 64
    assert opened < 150


def test_let_go_closes_what_lies_below(tmp_path: Path) -> None:
    reader = Reader(str(tmp_path))
    for name in ("net/eth0", "net/eth1", "network"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
        reader.read_again("/" + name)
        (tmp_path / "new").write_text("new")
        (tmp_path / "new").rename(tmp_path / name)
    before = len(os.listdir("/proc/self/fd"))

    reader.let_go("/net")

    assert len(os.listdir("/proc/self/fd")) == before - 2
    assert [reader.read_again(path) for path in ("/net/eth0", "/net/eth1", "/network")] == ["new", "new", "old"]


def test_read_again_leaves_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("text")
    reader = Reader(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        reader.read_again("/stat")
    kept = len(os.listdir("/proc/self/fd"))
    del reader

    assert (kept, len(os.listdir("/proc/self/fd"))) == (before + 1, before)
