# SPDX-License-Identifier: GPL-3.0-or-later
"""The loop as nodes run it: real processes, fed over pipes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils import _probe_loop
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe import cleaned_sample
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_lines import Outbox
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_loop import (
    MAX_COMMAND_BYTES,
    CommandReader,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_sampling import Sampling, next_on_beat
from loop_process import LoopProcess, find_pythons
from node_manager.probe_bundle import LoopOptions, bootstrap_command, bundle
from node_manager.shapes import Facts, Report, Sample

COLLECTIONS = Path(__file__).parents[2] / "collections"
PACKAGE = "ansible_collections.iot_platform.node_manager.plugins.module_utils"
PYTHONS = [sys.executable, *find_pythons("3.8")[:1], *find_pythons("3.13")[:1]]
SLEEPER = {"name": "stuck", "kind": "command", "argv": ["sleep", "4321"], "timeout_seconds": 60}


def is_running(argument: str) -> bool:
    """Tell whether some process has this argument."""

    def read(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError:
            return b""

    wanted = argument.encode()
    return any(wanted in read(path).split(b"\0") for path in Path("/proc").glob("[0-9]*/cmdline"))


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def count_sleeps(pid: int) -> int:
    """Count how often the main thread of a process gave up the processor by itself."""
    status = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


def make_hanging_node(folder: Path) -> Path:
    """Make what a node tells below a folder; its memory hangs."""
    for path in ("proc/net/dev", "proc/stat", "proc/uptime"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("")
    # Opening a pipe that nobody writes to waits for ever.
    os.mkfifo(folder / "proc/meminfo")
    return folder


def make_sampling(folder: Path, outbox: Outbox) -> Sampling:
    return Sampling(
        Reader(str(folder)),
        outbox,
        lambda: None,
        interval_seconds=5.0,
        offset_seconds=0.0,
        containers_interval_seconds=0.0,
        services_interval_seconds=300.0,
    )


def unread(descriptor: int) -> int:
    """Tell how much waits in a pipe."""
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


def run_below(folder: Path, options: dict[str, float]) -> str:
    """Give the command of a loop that looks below a folder."""
    script = (
        f"import sys; sys.path.insert(0, {str(COLLECTIONS)!r})\n"
        f"from {PACKAGE}._probe_loop import Loop\nfrom {PACKAGE}._probe_read import Reader\nimport os\n"
        f"Loop({options!r}, Reader({str(folder)!r})).run()\n"
        "os._exit(0)"
    )
    (folder / "run.py").write_text(script)
    return f"{sys.executable} {folder}/run.py"


@pytest.mark.skipif(
    len(PYTHONS) < 2 and not os.environ.get("NODE_MANAGER_REQUIRE_ALL"), reason="needs a Python 3.8 in pyenv"
)
def test_loop_has_a_python38_to_run_under() -> None:
    assert len(PYTHONS) > 1, "no Python 3.8 in pyenv"


@pytest.mark.parametrize("python", PYTHONS, ids=lambda path: Path(path).parents[1].name)
def test_loop_says_all_that_it_sees(python: str) -> None:
    checks = [{"name": "shell", "kind": "command", "argv": ["true"]}, {"name": "bad", "kind": "no such"}]

    with LoopProcess.start(python, checks=checks, sample_interval_seconds=5, beat_interval_seconds=0.2) as loop:
        hello, facts = loop.wait_for("hello"), loop.wait_for("facts")
        sample, report = loop.wait_for("sample"), loop.wait_for("report")
        error = loop.wait_for("error")
        loop.wait_for("beat")
        loop.stdin.close()
        status = loop.wait_for_end(3.0)

    assert status == 0
    assert loop.lines[0][1] == hello
    assert hello == {"kind": "hello", "schema": 1, "python": facts["data"]["python_version"], "pid": loop.pid}
    assert Facts.model_validate(facts["data"]).cpu is not None
    seen = Sample.model_validate(sample["data"])
    assert seen.cpu is not None
    assert seen.cpu.use_percent is not None
    assert seen.interval_seconds == pytest.approx(1.0, abs=0.5)
    assert [check.state for check in Report.model_validate(report["data"]).checks] == ["passed"]
    assert error["message"].startswith("checks[1]: ")


def test_sample_is_sign_of_life_enough() -> None:
    with LoopProcess.start(sys.executable, sample_interval_seconds=1, beat_interval_seconds=1) as loop:
        loop.wait_for_count("sample", 6)

    # A machine that is busy may make one late.
    assert len(loop.times("beat")) <= 2


def test_loop_answers_commands_with_their_id() -> None:
    with LoopProcess.start(sys.executable, sample_interval_seconds=60, check_interval_seconds=60) as loop:
        loop.wait_for("report")
        for action in ("sample", "check", "facts"):
            loop.send(json.dumps({"do": action, "id": f"a-{action}"}).encode() + b"\n")
        answers = [
            loop.wait_for("sample", lambda line: line.get("id") == "a-sample"),
            loop.wait_for("report", lambda line: line.get("id") == "a-check"),
            loop.wait_for("facts", lambda line: line.get("id") == "a-facts"),
        ]

    assert all("data" in answer for answer in answers)


def test_loop_survives_garbage_on_its_input() -> None:
    with LoopProcess.start(sys.executable, sample_interval_seconds=60) as loop:
        for garbage in (b"\xff\xfe\n", b"[" * 4000 + b"\n", b"x" * 200_000 + b"\n", b'{"do":"reboot","id":"7"}\n'):
            loop.send(garbage)
        loop.send(b'{"do":"facts","id":"after"}\n')
        loop.wait_for("facts", lambda line: line.get("id") == "after")
        refused = loop.wait_for("error", lambda line: line.get("id") == "7")

    assert refused["message"] == "a command is none of sample, check, facts"
    assert {line["message"] for _at, line in loop.lines if line["kind"] == "error"} == {
        "a command is not a JSON line",
        "a command is longer than 4096 bytes",
        "a command is none of sample, check, facts",
    }


def test_loop_bounds_what_is_asked() -> None:
    with LoopProcess.start(sys.executable, checks=[SLEEPER], sample_interval_seconds=60) as loop:
        loop.send(b"".join(b'{"do":"check","id":"%d"}\n' % number for number in range(12)))
        refused = loop.wait_for("error")

    assert refused["message"] == "check: too many are waiting already"


def test_loop_catches_up_on_nothing_after_it_was_stopped() -> None:
    with LoopProcess.start(sys.executable, sample_interval_seconds=0.2, beat_interval_seconds=0.1) as loop:
        loop.wait_for_count("sample", 2)
        os.kill(loop.pid, signal.SIGSTOP)
        try:
            time.sleep(5)  # what is tested is the time in which it does not run
        finally:
            resumed = time.monotonic()
            os.kill(loop.pid, signal.SIGCONT)
        before = len([at for at in loop.times("sample") if at < resumed])
        loop.wait_for_count("sample", before + 6)

    times = [at for at in loop.times("sample") if at >= resumed][:6]
    assert times[-1] - times[0] > 0.7


def test_main_thread_sleeps_while_samples_come() -> None:
    with LoopProcess.start(
        sys.executable, sample_interval_seconds=1.0, beat_interval_seconds=30.0, containers_interval_seconds=3600.0
    ) as loop:
        loop.wait_for("report")
        loop.wait_for_count("sample", 2)
        before = len(loop.times("sample")), count_sleeps(loop.pid)
        loop.wait_for_count("sample", before[0] + 8)
        after = len(loop.times("sample")), count_sleeps(loop.pid)

    # A look may come first where the machine is so busy that a sample is half a second late.
    assert after[1] - before[1] <= (after[0] - before[0]) // 2


def test_loop_gives_signs_of_life_although_its_alarm_was_blocked() -> None:
    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM})

    options = LoopOptions(sample_interval_seconds=60, beat_interval_seconds=0.2)
    with LoopProcess(bootstrap_command(sys.executable), bundle(options), preexec_fn=block) as loop:
        loop.listen()
        loop.wait_for("report")
        loop.wait_for_count("beat", len(loop.times("beat")) + 5)
        os.kill(loop.pid, signal.SIGTERM)

        assert loop.wait_for_end(3.0) == 0


def test_writer_is_bounded_and_keeps_lines_whole_while_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    monkeypatch.setattr(_probe_loop, "_STDOUT", writing)
    outbox = Outbox(1024 * 1024)
    writer = _probe_loop._Writer(outbox)
    for number in range(300):
        outbox.tell("sample", {"number": number, "long": "x" * 4000, "more": ["y" * 4000] * 3})
        assert not writer.write()
    waiting = len(outbox._handed_in) + len(outbox._waiting)

    said = b""
    while not writer.write() or unread(reading):
        said += os.read(reading, 65536)
    os.close(reading)
    os.close(writing)

    assert waiting <= 2
    assert [json.loads(line)["data"]["number"] for line in said.splitlines()] == [0, 299]


def test_sampling_says_once_an_interval_that_there_is_no_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    outbox = Outbox(1024 * 1024)
    sampling = make_sampling(tmp_path, outbox)
    looks = [sampling.look() - time.monotonic() for _ in range(100)]

    (line,) = take_all(outbox)
    assert "can't start new thread" in line["message"]
    assert min(looks) > 4


def test_sampling_goes_on_after_a_sample_that_could_not_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faults = [MemoryError("no memory"), MemoryError("none again")]

    def begin(*_details: object) -> None:
        raise faults.pop(0)

    outbox = Outbox(1024 * 1024)
    sampling = make_sampling(tmp_path, outbox)
    with monkeypatch.context() as patched:
        patched.setattr(sampling._sampler, "begin_priming", begin)
        patched.setattr(sampling._sampler, "begin", begin)
        sampling.look()
        assert wait_until(lambda: not faults)
    sampling.ask("asked")
    assert wait_until(lambda: sampling.look() > 0 and sampling.idle)
    sampling._sampler.close()

    lines = take_all(outbox)
    assert [line["message"].split(":")[1].strip() for line in lines if line["kind"] == "error"] == ["MemoryError"] * 2
    assert [line.get("id") for line in lines if line["kind"] == "sample"] == ["asked"]


def test_sampling_looks_soon_while_somebody_waits(tmp_path: Path) -> None:
    sampling = make_sampling(tmp_path, Outbox(4096))
    assert sampling.look_at - time.monotonic() > 0.3

    sampling.ask("asked")

    assert sampling.look_at - time.monotonic() < 0.1


def test_lines_stay_whole_for_a_slow_reader() -> None:
    options = LoopOptions(sample_interval_seconds=0.05, beat_interval_seconds=0.05, check_interval_seconds=0.1)
    with LoopProcess(bootstrap_command(sys.executable), b"") as loop:
        fcntl.fcntl(loop.stdout.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        loop.send(bundle(options))
        said = b""
        deadline = time.monotonic() + 20
        while said.count(b"\n") < 150 and time.monotonic() < deadline:
            said += os.read(loop.stdout.fileno(), 500)
            time.sleep(0.001)

    kinds = [json.loads(line)["kind"] for line in said.splitlines()[:-1]]
    assert len(kinds) >= 149
    assert set(kinds) <= {"hello", "facts", "sample", "beat", "report"}
    assert {"sample", "report"} <= set(kinds)


def test_sample_asked_for_while_one_hangs_is_answered_after_it(tmp_path: Path) -> None:
    node = make_hanging_node(tmp_path)
    with LoopProcess(run_below(node, {"sample_interval_seconds": 60, "beat_interval_seconds": 5}), b"") as loop:
        loop.listen()
        loop.wait_for("hello")
        loop.send(b'{"do":"sample","id":"hangs"}\n{"do":"sample","id":"asked"}\n')

        answer = loop.wait_for("sample", lambda line: line.get("id") == "asked")

    assert any(error["message"].startswith("still blocked") for error in answer["data"]["errors"])


def test_loop_ends_when_nobody_can_hear_it() -> None:
    with LoopProcess(bootstrap_command(sys.executable), bundle(LoopOptions(sample_interval_seconds=60))) as loop:
        assert b"hello" in loop.stdout.readline()
        loop.stdout.close()

        # A pipe that broke is noticed without anything to say.
        assert loop.wait_for_end(3.0) == 0
        assert loop.stderr.read() == b""


def test_loop_ends_with_its_input_while_nobody_reads() -> None:
    options = LoopOptions(sample_interval_seconds=0.05, beat_interval_seconds=0.05)
    with LoopProcess(bootstrap_command(sys.executable), b"") as loop:
        fcntl.fcntl(loop.stdout.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        loop.send(bundle(options))
        assert wait_until(lambda: unread(loop.stdout.fileno()) > 0)
        time.sleep(1)  # a pipe of one page is full by now, and stays so
        loop.stdin.close()

        assert loop.wait_for_end(3.0) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_loop_ends_on_a_signal(number: signal.Signals) -> None:
    with LoopProcess.start(sys.executable) as loop:
        loop.wait_for("hello")
        loop.wait_for("facts")
        os.kill(loop.pid, number)

        assert loop.wait_for_end(3.0) == 0


def test_loop_leaves_no_command_behind() -> None:
    # An argument of its own, so that no other process is taken for it.
    argument = f"4321.{os.getpid()}"
    stuck = {**SLEEPER, "argv": ["sleep", argument]}
    with LoopProcess.start(sys.executable, checks=[stuck]) as loop:
        assert wait_until(lambda: is_running(argument), 20)
        loop.stdin.close()
        loop.wait_for_end(3.0)

    assert wait_until(lambda: not is_running(argument))


def test_hanging_check_delays_neither_samples_nor_beats() -> None:
    with LoopProcess.start(
        sys.executable, checks=[SLEEPER], sample_interval_seconds=1.0, beat_interval_seconds=0.2
    ) as loop:
        samples = loop.wait_for_count("sample", 5)

    gaps = [later - earlier for earlier, later in pairwise(samples)]
    assert max(gaps) < 1.5
    assert loop.times("report") == []
    assert len(loop.times("beat")) >= 8


def test_hanging_collector_delays_no_beat(tmp_path: Path) -> None:
    node = make_hanging_node(tmp_path)

    with LoopProcess(run_below(node, {"sample_interval_seconds": 0.5, "beat_interval_seconds": 0.2}), b"") as loop:
        loop.listen()
        samples = loop.wait_for_count("sample", 2)
        loop.stdin.close()
        loop.wait_for_end(3.0)

    first, second = [line["data"]["errors"] for _at, line in loop.lines if line["kind"] == "sample"][:2]
    assert {"collector": "memory", "message": "timed out after 2.0 s"} in first
    assert any(error["message"].startswith("still blocked") for error in second)
    beats = [at for at in loop.times("beat") if at < samples[0]]
    assert len(beats) >= 7
    assert max(later - earlier for earlier, later in pairwise(beats)) < 0.6


@pytest.mark.parametrize(
    ("after", "expected"),
    [(5.0, 10.0), (10.0, 12.0), (11.9, 12.0), (12.0, 14.0), (1000.5, 1002.0)],
    ids=["before", "on", "within", "next", "much-later"],
)
def test_next_on_beat_keeps_the_beat(after: float, expected: float) -> None:
    assert next_on_beat(10.0, 2.0, after) == expected


@pytest.mark.parametrize(
    ("pieces", "commands", "refusals"),
    [
        ([b'{"do":"check","id":"1"}\n{"do":"facts","id":"2"}\n'], [("check", "1"), ("facts", "2")], 0),
        ([b'{"do":"che', b'ck","id":"1"}', b"\n"], [("check", "1")], 0),
        ([b"\n \n"], [], 0),
        ([b"[1]\n"], [], 1),
        ([b'{"do":"check"}\n'], [], 1),
        ([b'{"do":"check","id":7}\n'], [], 1),
        ([b'{"do":["check"],"id":"7"}\n'], [], 1),
        ([b'{"do":"check","id":"' + b"x" * 129 + b'"}\n'], [], 1),
        ([b"x" * 3000, b"x" * 3000, b"x" * 3000, b'\n{"do":"check","id":"1"}\n'], [("check", "1")], 1),
        ([b"x" * (MAX_COMMAND_BYTES + 1) + b'\n{"do":"check","id":"1"}\n'], [("check", "1")], 1),
    ],
    ids=["two", "pieces", "blank", "list", "no-id", "number", "odd-action", "long-id", "long-pieces", "long"],
)
def test_feed_cuts_commands(pieces: list[bytes], commands: list[tuple[str, str]], refusals: int) -> None:
    refused: list[str] = []
    reader = CommandReader(lambda message, command_id: refused.append(message))

    found = [command for piece in pieces for command in reader.feed(piece)]

    assert found == commands
    assert len(refused) == refusals


def take_all(outbox: Outbox) -> list[dict[str, Any]]:
    lines = []
    while not outbox.empty:
        lines.append(outbox.take() or b"")
    return [{"bytes": len(line), **json.loads(line)} for line in lines]


def test_tell_leaves_out_the_containers_of_a_long_sample() -> None:
    outbox = Outbox(4096)
    items = [{"name": "a" * 100} for _number in range(100)]

    outbox.tell("sample", {"cpu": None, "containers": {"runtime": "docker", "items": items}, "errors": []}, "7")

    error, sample = take_all(outbox)
    assert error["kind"] == "error"
    assert "its 100 containers left out" in error["message"]
    assert sample["bytes"] <= 4096
    assert sample["id"] == "7"
    assert sample["data"]["containers"] is None
    assert [error["collector"] for error in sample["data"]["errors"]] == ["containers"]


@pytest.mark.parametrize(
    "value",
    [
        1.5, -(2**62), 2**63, -(2**63) - 1, 10**30, float("nan"), float("inf"), 1e300, "eth0", "a\0b", "\udcff", "\u00fc",
        "\x7f\n", "x" * 5000, b"\xffbytes", {"a": [None, True]}, {1, 2}, {7: "a"}, list(range(2000)), object(),
        "x" * 4096, "x" * 4097, 'quoted"' * 1000, "back\\" * 1000, [1.5] * 1024, [1.5] * 1025, ["x" * 100] * 500,
        {f"key-{number}": number for number in range(1025)}, ["y" * 4000] * 20,
    ],
    ids=lambda value: ascii(value)[:20],
)  # fmt: skip
def test_tell_sample_says_the_same_as_if_it_were_cleaned(value: object) -> None:
    outbox = Outbox(1024 * 1024)
    sample = {"schema": 1, "memory": {"total_bytes": value}, "containers": None, "errors": []}

    outbox.tell("sample", cleaned_sample(sample), "7")
    cleaned = take_all(outbox)
    outbox.tell_sample(sample, "7")

    assert take_all(outbox) == cleaned


def test_tell_sample_leaves_out_containers_that_are_too_large() -> None:
    outbox = Outbox(1024 * 1024)

    outbox.tell_sample({"containers": {"items": [{"labels": ["x" * 4000] * 400}]}, "errors": []})

    (sample,) = take_all(outbox)
    assert sample["data"]["containers"] is None
    assert [error["collector"] for error in sample["data"]["errors"]] == ["containers"]


def test_tell_never_gives_a_line_that_is_too_long() -> None:
    outbox = Outbox(4096)

    outbox.tell("report", {"checks": ["x" * 5000]}, "7")

    (error,) = take_all(outbox)
    assert (error["kind"], error["id"]) == ("error", "7")
    assert error["message"].startswith("report: not sent, its line has 50")


def test_fail_is_short_whatever_it_says() -> None:
    outbox = Outbox(4096)

    outbox.fail("\0\U0001f600" * 5000)

    assert take_all(outbox)[0]["bytes"] < 4096


def test_outbox_keeps_the_newest_of_a_kind() -> None:
    outbox = Outbox(4096)

    for number in range(5):
        outbox.tell("sample", {"number": number})
    outbox.tell("sample", {"number": 9}, "asked")

    assert [line["data"]["number"] for line in take_all(outbox)] == [4, 9]


def test_outbox_is_bounded_while_nobody_reads() -> None:
    outbox = Outbox(4096)

    for number in range(1000):
        outbox.fail(f"fault {number}")
        assert not outbox.empty

    lines = take_all(outbox)
    assert len(lines) == 65
    assert lines[-1]["message"] == "lines were lost, nobody read them"
