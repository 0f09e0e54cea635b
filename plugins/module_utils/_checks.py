# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run health checks side by side, each in its own time, and report on all of them.

Touches nothing itself; the looking is in `_checks_net`, `_checks_host`, `_checks_certificate` and `_checks_clock`. Runs
on nodes with Python 3.8, in a module that ends after one run and in a loop that does not.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections import deque
from datetime import datetime, timezone
from functools import partial
from typing import Callable, Deque, Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple

from ._checks_certificate import check_certificate
from ._checks_clock import check_clock
from ._checks_deadline import OutOfTimeError
from ._checks_host import (
    Host,
    check_command,
    check_filesystem,
    check_port,
    check_process,
    check_service,
    judge_container,
)
from ._checks_host import list_containers as ask_runtime
from ._checks_net import check_dns, check_http, check_tcp, format_place, without_query
from ._checks_spec import (
    CertificateCheck,
    Check,
    CheckFormatError,
    ClockCheck,
    CommandCheck,
    ContainerCheck,
    DnsCheck,
    FilesystemCheck,
    Finding,
    HttpCheck,
    PortCheck,
    ProcessCheck,
    ServiceCheck,
    TcpCheck,
    one_line,
    parse_check,
)
from ._thresholds import Edges, evaluate, parse_thresholds
from ._words import CheckKind, CheckState

__all__ = ["Check", "CheckFormatError", "Host", "parse_check", "parse_thresholds", "run_checks"]

AT_ONCE = 8
DEFAULT_DEADLINE_SECONDS = 20.0
# A check ends itself at its deadline (closes its socket, kills its command); one that does not is given up this much
# later.
GRACE_SECONDS = 0.5

# For these, no answer in time is the failure that they look for; for the others it means that nobody could look.
_TIMEOUT_FAILS = {
    CheckKind.TCP: "see whether a firewall drops the packets or the node is overloaded",
    CheckKind.HTTP: "see whether the service is overloaded or stuck",
    CheckKind.DNS: "see /etc/resolv.conf and the name servers",
    CheckKind.COMMAND: "it was killed; run it by hand, or allow it more time",
    CheckKind.FILESYSTEM: "the device or its server does not answer, see dmesg",
}

# Given a time.monotonic() deadline, it returns the containers part of a sample.
ListContainers = Callable[[float], Mapping[str, object]]


def run_checks(
    checks: Sequence[Check],
    sample: Optional[Mapping[str, object]] = None,
    *,
    thresholds: Optional[Mapping[str, Edges]] = None,
    list_containers: Optional[ListContainers] = None,
    now: Optional[Callable[[], datetime]] = None,
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS,
    host: Optional[Host] = None,
) -> Dict[str, object]:
    """Run checks and hold the sample against thresholds, as a report.

    Shapes: *sample* and the result as in docs/observations.md, the checks in the order given, then the thresholds.
    *list_containers* is asked once, and only if *sample* has no containers; by default it asks the node's runtime.
    *now* dates certificates.
    Errors: none; a check that hangs or breaks costs its own line, and the whole run ends within *deadline_seconds*.
    """
    started = time.monotonic()
    place = host or Host()
    look = _Look(sample, list_containers or partial(ask_runtime, place.reader), now or _utc_now, place)
    found = _Run(checks, look, started, deadline_seconds).finish()
    lines: List[Dict[str, object]] = [_line(check, *found[index]) for index, check in enumerate(checks)]
    if thresholds:
        lines.extend(evaluate(sample if isinstance(sample, Mapping) else {}, thresholds))
    return {"schema": 1, "duration_seconds": round(time.monotonic() - started, 6), "checks": lines}


class _Look:
    """What all checks of one run share, and which function looks for which check."""

    def __init__(
        self,
        sample: Optional[Mapping[str, object]],
        list_containers: ListContainers,
        now: Callable[[], datetime],
        host: Host,
    ) -> None:
        self._list_containers = list_containers
        self._listing = threading.Lock()
        self._listed: object = sample.get("containers") if isinstance(sample, Mapping) else None
        self._now = now
        self._host = host

    def at(self, check: Check, deadline: float) -> Finding:
        if isinstance(check, TcpCheck):
            return check_tcp(check, deadline)
        if isinstance(check, HttpCheck):
            return check_http(check, deadline)
        if isinstance(check, DnsCheck):
            return check_dns(check)
        if isinstance(check, ServiceCheck):
            return check_service(check, self._host, deadline)
        if isinstance(check, ProcessCheck):
            return check_process(check, self._host)
        if isinstance(check, ContainerCheck):
            return judge_container(check, self._containers(deadline))
        if isinstance(check, PortCheck):
            return check_port(check, self._host)
        if isinstance(check, FilesystemCheck):
            return check_filesystem(check, self._host, deadline)
        if isinstance(check, CertificateCheck):
            return check_certificate(check, deadline, self._now())
        if isinstance(check, ClockCheck):
            return check_clock(check, deadline)
        if isinstance(check, CommandCheck):
            return check_command(check, deadline)
        return _assert_never(check)

    def _containers(self, deadline: float) -> object:
        # Ten container checks are one question to the engine: the first asks, the others wait for its answer.
        with self._listing:
            if not isinstance(self._listed, Mapping):
                self._listed = self._list_containers(deadline)
            return self._listed


class _Worker(threading.Thread):
    """One check on its way.

    A daemon, so that one stuck in a system call (name resolution, a dead mount) can't keep the process from ending.
    """

    def __init__(self, index: int, check: Check, look: _Look, done: queue.SimpleQueue[_Answer], end: float) -> None:
        super().__init__(name=f"check {check.name}", daemon=True)
        self.check = check
        self.given_up = False
        self.started = time.monotonic()
        self.deadline = min(self.started + check.timeout_seconds, end)
        self.curtailed = self.deadline == end
        self._index = index
        self._look = look
        self._done = done

    def run(self) -> None:
        finding: Optional[Finding] = None
        try:
            finding = self._look.at(self.check, self.deadline)
        except (OutOfTimeError, TimeoutError, socket.timeout):
            pass
        except Exception as error:  # a fault in one check must not cost the others their report
            finding = Finding(CheckState.UNKNOWN, f"the check itself failed: {type(error).__name__}: {error}")
        self._done.put((self._index, finding, time.monotonic() - self.started))


# Which check, what it found (None: its time was over), after how many seconds.
_Answer = Tuple[int, Optional[Finding], float]


class _Run:
    """One pass over a list of checks, at most AT_ONCE of them at a time."""

    def __init__(self, checks: Sequence[Check], look: _Look, started: float, deadline_seconds: float) -> None:
        self._grace = min(GRACE_SECONDS, deadline_seconds / 10)
        self._end = started + deadline_seconds - self._grace
        self._over = f"the run's {deadline_seconds:g} s were over: allow it more time, or see what hangs"
        self._look = look
        self._waiting: Deque[Tuple[int, Check]] = deque(enumerate(checks))
        self._running: Dict[int, _Worker] = {}
        self._found: Dict[int, Tuple[Finding, float]] = {}
        self._done: queue.SimpleQueue[_Answer] = queue.SimpleQueue()

    def finish(self) -> Dict[int, Tuple[Finding, float]]:
        """Run them all: what each found, by its place in the list, and after how many seconds."""
        while self._waiting or self._running:
            while self._waiting and len(self._running) < AT_ONCE:
                self._start(*self._waiting.popleft())
            if self._running:
                self._collect()
        return self._found

    def _start(self, index: int, check: Check) -> None:
        if time.monotonic() >= self._end:
            self._found[index] = (Finding(CheckState.UNKNOWN, f"not looked at, {self._over}"), 0.0)
            return
        if any(
            isinstance(thread, _Worker) and thread.given_up and thread.check == check
            for thread in threading.enumerate()
        ):
            # In a loop, a dead mount would otherwise keep one more thread with every run.
            message = "an earlier run of this check still hangs in a system call, see dmesg and the kernel's mounts"
            self._found[index] = (Finding(_timeout_state(check), message), 0.0)
            return
        worker = _Worker(index, check, self._look, self._done, self._end)
        try:
            worker.start()
        except RuntimeError as error:
            self._found[index] = (Finding(CheckState.UNKNOWN, f"no thread could be started: {error}"), 0.0)
        else:
            self._running[index] = worker

    def _collect(self) -> None:
        """Wait for the next answer, or until the time of the first worker is over."""
        patience = min(worker.deadline for worker in self._running.values()) + self._grace - time.monotonic()
        try:
            index, finding, latency_seconds = self._done.get(timeout=max(0.0, patience))
        except queue.Empty:
            late = [
                index for index, worker in self._running.items() if worker.deadline + self._grace <= time.monotonic()
            ]
            for index in late:
                worker = self._running.pop(index)
                worker.given_up = True
                self._found[index] = (self._time_over(worker), time.monotonic() - worker.started)
            return
        # One that was given up may still answer, too late to be heard.
        if index in self._running:
            worker = self._running.pop(index)
            self._found[index] = (finding or self._time_over(worker), latency_seconds)

    def _time_over(self, worker: _Worker) -> Finding:
        if worker.curtailed:
            # It had less than its own time, so it proves nothing.
            return Finding(CheckState.UNKNOWN, f"not finished, {self._over}")
        advice = _TIMEOUT_FAILS.get(worker.check.kind, "so nobody could look; see whether the node is overloaded")
        message = f"{_subject(worker.check)} timed out after {worker.check.timeout_seconds:g} s: {advice}"
        return Finding(_timeout_state(worker.check), message)


def _timeout_state(check: Check) -> CheckState:
    return CheckState.FAILED if check.kind in _TIMEOUT_FAILS else CheckState.UNKNOWN


def _subject(check: Check) -> str:
    if isinstance(check, TcpCheck):
        return format_place(check.host, check.port)
    if isinstance(check, HttpCheck):
        return without_query(check.url)
    if isinstance(check, DnsCheck):
        return f"resolving {check.hostname}"
    if isinstance(check, FilesystemCheck):
        return check.mount
    if isinstance(check, CommandCheck):
        return check.argv[0]
    return f"this {check.kind} check"


def _line(check: Check, finding: Finding, latency_seconds: float) -> Dict[str, object]:
    return {
        "name": check.name,
        "kind": check.kind.value,
        "severity": check.severity.value,
        "state": finding.state.value,
        "message": one_line(finding.message),
        "latency_seconds": round(latency_seconds, 6),
        "value": finding.value,
        "unit": finding.unit,
    }


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


def _assert_never(check: NoReturn) -> NoReturn:
    raise AssertionError(f"a kind of check that nobody looks for: {check!r}")
