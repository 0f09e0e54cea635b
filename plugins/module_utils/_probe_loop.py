# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Look at a node again and again, and say what was seen in JSON lines on standard output.

Standard library only. Runs on nodes with Python 3.8, over one SSH command; docs/observations.md has the lines and the
commands. Writes nothing but standard output, so that it needs neither a disk nor a place for temporary files.

The main thread reads commands, gives the signs of life and writes what can't be written at once; it waits nowhere but in
poll(2). All looking is done by threads beside it, so that whatever hangs there delays no sign of life; they write what
they have seen themselves, and put off the alarm that wakes the main thread: while samples come, it sleeps. Alarm and poll
count on the monotonic clock, while a lock with a timeout counts on the wall clock before Python 3.11: a board that gets
its time late would sleep for years.
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
from queue import SimpleQueue
from typing import Callable, Dict, List, Mapping, NoReturn, Optional, Tuple, Union

from ._probe import collect_facts
from ._probe_lines import Outbox
from ._probe_read import Reader
from ._probe_run import BoundedRunner, WakePipe
from ._probe_sampling import MAX_ASKED, Sampling, next_on_beat

SCHEMA = 1
MAX_COMMAND_BYTES = 4096
MAX_ID_CHARACTERS = 128

_STDIN, _STDOUT = 0, 1
# What a pipe or socket takes without blocking whenever poll calls it writable (pipe(7), PIPE_BUF).
_WRITE_BYTES = 4096
# The counters alone, and what is compared with them.
_FIRST_SAMPLES = 2
# How long a beat waits for a sample that is under way or due, as a share of its interval.
_BEAT_PATIENCE = 0.1
_NEVER = float("inf")
# An alarm in no time would be none.
_SOON_SECONDS = 0.001
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
        self._beat_interval = _seconds(options, "beat_interval_seconds", 5.0)
        self._check_interval = _seconds(options, "check_interval_seconds", 300.0)
        maximum = options.get("max_line_bytes")
        self._outbox = Outbox(maximum if isinstance(maximum, int) else 1024 * 1024)
        self._writer = _Writer(self._outbox)
        reader = reader or Reader()
        self._work = _Work(options, self._outbox, reader)
        self._pipe = WakePipe()
        self._sampling = Sampling(
            reader,
            self._outbox,
            self._hand_out_sample,
            interval_seconds=_seconds(options, "sample_interval_seconds", 15.0),
            offset_seconds=_seconds(options, "first_delay_seconds", 0.0, least=0.0),
            containers_interval_seconds=_seconds(options, "containers_interval_seconds", 0.0, least=0.0),
            services_interval_seconds=self._check_interval,
        )
        self._checking = _Worker("checking", self._work.check, self._hand_out)
        self._asking = _Worker("facts", self._work.facts, self._hand_out)
        self._asked: Dict[str, Union[Sampling, _Worker]] = {
            "sample": self._sampling,
            "check": self._checking,
            "facts": self._asking,
        }
        self._commands = CommandReader(self._outbox.fail)
        self._check_at = _NEVER
        self._beat_at = 0.0
        self._look_at = 0.0
        self._alarm_lock = threading.Lock()
        self._ended = False

    def run(self) -> None:
        """Go on until there is nobody left to tell."""
        # The kernel may hand a signal to any thread; this wakes the main one, which alone runs what Python does about it.
        signal.set_wakeup_fd(self._pipe.writing, warn_on_full_buffer=False)
        ends = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        for number in ends:
            signal.signal(number, self._end)
        signal.signal(signal.SIGALRM, lambda _number, _frame: None)
        # Who started this may have left them blocked; that is inherited.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*ends, signal.SIGALRM))
        version = "{}.{}.{}".format(*sys.version_info[:3])
        self._outbox.say("hello", schema=SCHEMA, python=version, pid=os.getpid())
        self._checking.start()
        self._asking.start()
        self._asking.ask(None)
        self._hand_out()
        poller = select.poll()
        poller.register(_STDIN, select.POLLIN)
        poller.register(self._pipe.reading, select.POLLIN)
        while not self._ended:
            now = time.monotonic()
            self._check_if_due(now)
            self._look_at = self._sampling.look()
            self._beat_if_due(now)
            # Asked for or not, poll tells when the reading end is gone.
            poller.register(_STDOUT, select.POLLOUT if self._writer.waits else 0)
            self._set_alarm()
            for descriptor, event in poller.poll():
                if not self._handle(descriptor, event):
                    self._ended = True

    def _check_if_due(self, now: float) -> None:
        if self._check_at == _NEVER:
            # The counters and the first sample are done.
            if self._sampling.done >= _FIRST_SAMPLES:
                self._checking.ask(None)
                self._check_at = now + self._check_interval
        elif now >= self._check_at:
            # One that still runs has missed this turn; the next one comes on its beat.
            if self._checking.idle:
                self._checking.ask(None)
            self._check_at = next_on_beat(self._check_at, self._check_interval, now)

    def _beat_if_due(self, now: float) -> None:
        if now >= self._beat_due():
            self._beat_at = now + self._beat_interval
            if not self._writer.waits:
                self._outbox.say("beat")
                self._hand_out()

    def _beat_due(self) -> float:
        """Give the time to say that this lives: when no line has said so lately, and no sample is about to."""
        due = max(self._beat_at, self._writer.wrote_at + self._beat_interval)
        patience = self._beat_interval * _BEAT_PATIENCE
        return due if self._sampling.idle and self._sampling.due > due + patience else due + patience

    def _set_alarm(self) -> None:
        """Have the main thread woken once it has something to do; not by its own poll, so that other threads may move it."""
        with self._alarm_lock:
            wake_at = min(self._look_at, self._beat_due(), self._check_at)
            signal.setitimer(signal.ITIMER_REAL, max(_SOON_SECONDS, wake_at - time.monotonic()))

    def _handle(self, descriptor: int, event: int) -> bool:
        """React to what poll saw; false if it is the end."""
        try:
            if descriptor == self._pipe.reading:
                self._pipe.drain()
            elif descriptor == _STDIN:
                data = os.read(_STDIN, 65536)
                for action, command_id in self._commands.feed(data):
                    if not self._asked[action].ask(command_id):
                        self._outbox.fail("{}: too many are waiting already".format(action), command_id)
                return bool(data)
            elif event & _BROKEN:
                return False
            else:
                self._writer.write()
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def _hand_out_sample(self) -> None:
        self._look_at = self._sampling.look_at
        self._hand_out()

    def _hand_out(self) -> None:
        """Write what was handed in, on whichever thread; the main one does it once that would mean to wait."""
        try:
            is_written = self._writer.write()
        except OSError:
            self._ended, is_written = True, False
        if is_written and self._check_at != _NEVER:
            self._set_alarm()
        else:
            self._pipe.wake()

    def _end(self, _number: int, _frame: object) -> None:
        self._ended = True


class _Writer:
    """Standard output, for whichever thread has something to say; nobody waits for who reads it."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._lock = threading.Lock()
        self._sending = memoryview(b"")
        self._poller = select.poll()
        self._poller.register(_STDOUT, select.POLLOUT)
        self.wrote_at = 0.0

    @property
    def waits(self) -> bool:
        """Tell whether something waits to be written."""
        with self._lock:
            return not self._outbox.empty or bool(self._sending)

    def write(self) -> bool:
        """Write as much as is taken at once; false if something is left.

        Errors: OSError if nobody reads any more.
        """
        with self._lock:
            # The outbox first: only by being asked does it replace what is older, however long the reader is slow.
            while not self._outbox.empty or self._sending:
                if not self._poller.poll(0):
                    return False
                self._sending = self._sending or memoryview(self._outbox.take() or b"")
                try:
                    self._sending = self._sending[os.write(_STDOUT, self._sending[:_WRITE_BYTES]) :]
                except BlockingIOError:
                    return False
                self.wrote_at = time.monotonic()
        return True


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
        if self._asked - self.done > MAX_ASKED:
            return False
        self._asked += 1
        self._queue.put(command_id)
        return True

    def run(self) -> None:
        while True:
            self._work(self._queue.get())
            self.done += 1
            self._finished()


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
            self._outbox.fail_because(kind, error, command_id)

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
