# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Look at a node again and again, and say what was seen in JSON lines on standard output.

Standard library only. Runs on nodes with Python 3.8, over one SSH command; docs/observations.md has the lines and the
commands. Writes nothing but standard output, so that it needs neither a disk nor a place for temporary files.

The main thread keeps the time, reads commands and writes; it waits nowhere but in poll(2). All looking is done by
threads beside it, so that whatever hangs there delays no sign of life. poll counts on the monotonic clock, while a lock
with a timeout counts on the wall clock before Python 3.11: a board that gets its time late would sleep for years.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import Callable, Deque, Dict, List, Mapping, NoReturn, Optional, Tuple, Union

from ._probe import Sampler, collect_facts
from ._probe_lines import Outbox
from ._probe_read import Reader
from ._probe_run import BoundedRunner

SCHEMA = 1
MAX_COMMAND_BYTES = 4096
MAX_ID_CHARACTERS = 128

_STDIN, _STDOUT = 0, 1
# What a pipe or socket takes without blocking whenever poll calls it writable (pipe(7), PIPE_BUF).
_WRITE_BYTES = 4096
_MAX_ASKED = 8
_PRIME_SECONDS = 1.0
# How long a beat waits for a sample that is under way or due, as a share of its interval.
_BEAT_PATIENCE = 0.1
_NEVER = float("inf")
_NICENESS = 5
_BROKEN = select.POLLERR | select.POLLHUP | select.POLLNVAL


def main(options: Mapping[str, object]) -> NoReturn:
    """Run until standard input ends, standard output breaks or a signal comes, then end the process at once.

    Exit codes: 0; 1 with a traceback if the loop itself has a fault.
    """
    for call in (lambda: os.nice(_NICENESS), lambda: os.chdir("/")):
        # The folder: a working directory would keep its filesystem from being unmounted for as long as this runs.
        with contextlib.suppress(OSError):
            call()
    status = 0
    try:
        Loop(options).run()
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    kill_children()
    # No waiting for threads: one may hang in the kernel.
    os._exit(status)


class Loop:
    """The timetable, the commands and the lines."""

    def __init__(self, options: Mapping[str, object], reader: Optional[Reader] = None) -> None:
        self._sample_interval = _seconds(options, "sample_interval_seconds", 15.0)
        self._beat_interval = _seconds(options, "beat_interval_seconds", 5.0)
        self._check_interval = _seconds(options, "check_interval_seconds", 300.0)
        self._offset = _seconds(options, "first_delay_seconds", 0.0, least=0.0)
        maximum = options.get("max_line_bytes")
        self._outbox = Outbox(maximum if isinstance(maximum, int) else 1024 * 1024)
        reader = reader or Reader()
        self._work = _Work(options, self._outbox, reader)
        self._woken, self._wake_end = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake_end, False)
        self._sampling = _Sampling(options, self._outbox, reader, self._check_interval, self._wake)
        self._checking = _Worker("checking", self._work.check, self._wake)
        self._asking = _Worker("facts", self._work.facts, self._wake)
        self._asked: Dict[str, Union[_Sampling, _Worker]] = {
            "sample": self._sampling,
            "check": self._checking,
            "facts": self._asking,
        }
        self._commands = CommandReader(self._outbox.fail)
        self._sending = memoryview(b"")
        self._due: Dict[str, float] = {}
        self._beat_waited = False
        self._ended = False

    def run(self) -> None:
        """Go on until there is nobody left to tell."""
        # The kernel may hand a signal to any thread; this wakes the main one, which alone runs what Python does about it.
        signal.set_wakeup_fd(self._wake_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._end)
        version = "{}.{}.{}".format(*sys.version_info[:3])
        self._outbox.say("hello", schema=SCHEMA, python=version, pid=os.getpid())
        self._checking.start()
        self._asking.start()
        self._asking.ask(None)
        self._sampling.ask(None)
        first_at = time.monotonic() + _PRIME_SECONDS
        self._due = {"first": first_at, "beat": first_at}
        poller = select.poll()
        poller.register(_STDIN, select.POLLIN)
        poller.register(self._woken, select.POLLIN)
        while not self._ended:
            now = time.monotonic()
            self._start_due(now)
            look_at = self._sampling.look()
            # Asked for or not, poll tells when the reading end is gone.
            poller.register(_STDOUT, select.POLLOUT if self._has_output() else 0)
            wait_seconds = max(0.0, min(look_at, *self._due.values()) - time.monotonic())
            # Rounded up: a beat that is not quite due would be looked for again and again.
            for descriptor, event in poller.poll(int(wait_seconds * 1000) + 1):
                if not self._handle(descriptor, event):
                    self._ended = True

    def _start_due(self, now: float) -> None:
        for name in [name for name, at in self._due.items() if at <= now]:
            if name == "beat":
                self._due["beat"] = now + self._beat(now)
            elif name == "first":
                # Even while the counters are still being read for the first time: it waits behind them.
                self._sampling.ask(None)
                # The others begin half an interval later at the earliest: rates over an instant say nothing.
                origin, interval = self._due.pop("first") + self._offset, self._sample_interval
                self._due["sample"] = next_on_beat(origin, interval, now + interval / 2)
            elif name == "sample":
                self._ask_if_idle(self._sampling)
                self._due["sample"] = next_on_beat(self._due["sample"], self._sample_interval, now)
            else:
                self._ask_if_idle(self._checking)
                self._due["check"] = next_on_beat(self._due["check"], self._check_interval, now)
        # The two that were asked for at the start are done: the counters, and the first sample.
        if "check" not in self._due and self._sampling.done >= 2:
            self._checking.ask(None)
            self._due["check"] = now + self._check_interval

    def _beat(self, now: float) -> float:
        """Say that this lives, unless a sample is about to say so; give the seconds until the next look."""
        patience = self._beat_interval * _BEAT_PATIENCE
        if not self._beat_waited and (not self._sampling.idle or self._due.get("sample", _NEVER) <= now + patience):
            self._beat_waited = True
            return patience
        if not self._has_output():
            self._outbox.say("beat")
        return self._beat_interval

    @staticmethod
    def _ask_if_idle(worker: Union[_Sampling, _Worker]) -> None:
        # One that still runs has missed this turn; the next one comes on its beat.
        if worker.idle:
            worker.ask(None)

    def _has_output(self) -> bool:
        return bool(self._sending) or not self._outbox.empty

    def _handle(self, descriptor: int, event: int) -> bool:
        """React to what poll saw; false if it is the end."""
        try:
            if descriptor == self._woken:
                os.read(self._woken, 4096)
            elif descriptor == _STDIN:
                data = os.read(_STDIN, 65536)
                for action, command_id in self._commands.feed(data):
                    if not self._asked[action].ask(command_id):
                        self._outbox.fail("{}: too many are waiting already".format(action), command_id)
                return bool(data)
            elif event & _BROKEN:
                return False
            else:
                self._write()
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def _write(self) -> None:
        if not self._sending:
            self._sending = memoryview(self._outbox.take() or b"")
        self._sending = self._sending[os.write(_STDOUT, self._sending[:_WRITE_BYTES]) :]
        if not self._sending:
            self._due["beat"], self._beat_waited = time.monotonic() + self._beat_interval, False

    def _wake(self) -> None:
        # A full pipe wakes as well as one more byte would.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_end, b"\0")

    def _end(self, _number: int, _frame: object) -> None:
        self._ended = True


class _Worker(threading.Thread):
    """One kind of work on a thread of its own; only the main thread asks."""

    def __init__(self, name: str, work: Callable[[Optional[str]], None], finished: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._finished = finished
        self._queue: SimpleQueue[Optional[str]] = SimpleQueue()
        self._asked = 0
        self.done = 0

    @property
    def idle(self) -> bool:
        return self._asked == self.done

    def ask(self, command_id: Optional[str]) -> bool:
        """Have the work done once; false if too much of it waits."""
        if self._asked - self.done > _MAX_ASKED:
            return False
        self._asked += 1
        self._queue.put(command_id)
        return True

    def run(self) -> None:
        while True:
            self._work(self._queue.get())
            self.done += 1
            self._finished()


class _Sampling:
    """Samples, one after another: the main thread asks and looks, a thread of the sampler hands in what it read."""

    def __init__(
        self,
        options: Mapping[str, object],
        outbox: Outbox,
        reader: Reader,
        services_interval: float,
        finished: Callable[[], None],
    ) -> None:
        self._outbox = outbox
        self._finished = finished
        self._sampler = Sampler(
            reader,
            containers_interval_seconds=_seconds(options, "containers_interval_seconds", 0.0, least=0.0),
            services_interval_seconds=services_interval,
        )
        self._waiting: Deque[Optional[str]] = deque()
        self._begun = 0
        self.done = 0

    @property
    def idle(self) -> bool:
        return not self._waiting and self._begun == self.done

    def ask(self, command_id: Optional[str]) -> bool:
        """Have a sample taken; false if too many wait."""
        if len(self._waiting) >= _MAX_ASKED:
            return False
        self._waiting.append(command_id)
        return True

    def look(self) -> float:
        """Begin what is asked for, one at a time, and give up what hangs; give the time to look again."""
        if self._waiting and self._begun == self.done:
            self._begun += 1
            self._begin(self._waiting.popleft())
        return self._sampler.look()

    def _begin(self, command_id: Optional[str]) -> None:
        def hand_in(take: Callable[[], Optional[Dict[str, object]]]) -> None:
            try:
                sample = take()
                if sample is not None:
                    self._outbox.tell_sample(sample, command_id)
            except Exception as error:
                # Whatever it was, the loop goes on: the next turn may do better.
                self._outbox.fail("sample: {}".format(_describe(error)), command_id)
            self.done += 1
            self._finished()

        try:
            if self._begun == 1:
                # The very first time only the counters, which the first sample compares with.
                self._sampler.start_priming(_PRIME_SECONDS * 2, hand_in)
            else:
                self._sampler.start(hand_in)
        except RuntimeError as error:
            self._outbox.fail("sample: {}".format(_describe(error)), command_id)
            self.done += 1


class _Work:
    """What the threads do; each method belongs to one thread."""

    def __init__(self, options: Mapping[str, object], outbox: Outbox, reader: Reader) -> None:
        self._outbox = outbox
        self._reader = reader
        self._facts_runner = BoundedRunner()
        checks = options.get("checks")
        self._raw_checks = checks if isinstance(checks, list) else []
        self._checks_timeout = _seconds(options, "checks_timeout_seconds", 20.0)
        self._run_checks: Optional[Callable[[], Dict[str, object]]] = None

    def facts(self, command_id: Optional[str]) -> None:
        self._tell("facts", command_id, lambda: collect_facts(self._reader, runner=self._facts_runner))

    def check(self, command_id: Optional[str]) -> None:
        self._tell("report", command_id, self._report)

    def _tell(self, kind: str, command_id: Optional[str], look: Callable[[], Mapping[str, object]]) -> None:
        try:
            self._outbox.tell(kind, look(), command_id)
        except Exception as error:
            # Whatever it was, the loop goes on: the next turn may do better.
            self._outbox.fail("{}: {}".format(kind, _describe(error)), command_id)

    def _report(self) -> Mapping[str, object]:
        if not self._raw_checks:
            return {"schema": SCHEMA, "duration_seconds": 0.0, "checks": []}
        if self._run_checks is None:
            self._run_checks = self._prepare_checks()
        return self._run_checks()

    def _prepare_checks(self) -> Callable[[], Dict[str, object]]:
        # Here and not above: compiling them takes longer than all the rest, and not every node has checks.
        from ._checks import CheckFormatError, Host, parse_check, run_checks  # noqa: PLC0415

        checks = []
        for position, raw in enumerate(self._raw_checks):
            try:
                checks.append(parse_check(raw))
            except CheckFormatError as error:
                self._outbox.fail("checks[{}]: {}".format(position, error))
        host = Host(self._reader)
        return lambda: run_checks(checks, deadline_seconds=self._checks_timeout, host=host)


class CommandReader:
    """Cut standard input into commands: JSON lines with what to do and an id for the answer."""

    def __init__(self, refuse: Callable[[str, Optional[str]], None]) -> None:
        self._refuse = refuse
        self._line = b""
        self._skipping = False

    def feed(self, data: bytes) -> List[Tuple[str, str]]:
        """Take what came and return the commands that are complete; the others are refused."""
        commands: List[Tuple[str, str]] = []
        *complete, rest = data.split(b"\n")
        for end in complete:
            line, skipped = self._line + end, self._skipping
            self._line, self._skipping = b"", False
            if len(line) > MAX_COMMAND_BYTES:
                self._refuse_long()
            elif not skipped and line.strip():
                command = self._read(line)
                commands.extend([command] if command else [])
        self._line += b"" if self._skipping else rest
        if len(self._line) > MAX_COMMAND_BYTES:
            self._line, self._skipping = b"", True
            self._refuse_long()
        return commands

    def _read(self, line: bytes) -> Optional[Tuple[str, str]]:
        try:
            command = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            self._refuse("a command is not a JSON line", None)
            return None
        if not isinstance(command, dict):
            self._refuse("a command is not a JSON object", None)
            return None
        action, command_id = command.get("do"), command.get("id")
        if not isinstance(command_id, str) or not 0 < len(command_id) <= MAX_ID_CHARACTERS:
            self._refuse("a command has no id of 1 to {} characters".format(MAX_ID_CHARACTERS), None)
            return None
        if action not in ("sample", "check", "facts"):
            self._refuse("a command is none of sample, check, facts", command_id)
            return None
        return action, command_id

    def _refuse_long(self) -> None:
        self._refuse("a command is longer than {} bytes".format(MAX_COMMAND_BYTES), None)


def next_on_beat(origin: float, interval: float, after: float) -> float:
    """Give the first of the moments *origin* + n x *interval* that lies later than *after*."""
    if after < origin:
        return origin
    return origin + (int((after - origin) / interval) + 1) * interval


def kill_children() -> None:
    """Kill what checks and collectors have started: their time limits end with this process."""
    own = str(os.getpid())
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if not name.isdecimal():
            continue
        # It may end while we look; not being able to look must not keep this process from ending.
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open("/proc/{}/stat".format(name), "rb") as file:
                # The name may hold blanks and parentheses; then come state, parent and process group.
                fields = file.read(4096).rpartition(b")")[2].split()
            if fields[1] == own.encode():
                if fields[2] == name.encode():
                    os.killpg(int(name), signal.SIGKILL)
                else:
                    os.kill(int(name), signal.SIGKILL)


def _seconds(options: Mapping[str, object], name: str, default: float, *, least: float = 0.05) -> float:
    value = options.get(name)
    return max(least, float(value)) if isinstance(value, (int, float)) else default


def _describe(error: Exception) -> str:
    return "{}: {}".format(type(error).__name__, error)
