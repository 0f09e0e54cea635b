# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run programs for a repair: bounded in time and output, without a shell; and what all repairs answer.

Standard library only. Runs with Python 3.8, on nodes and on the controller.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Mapping, Optional, Sequence

# What is kept of a program's output: its end, where the reason of a failure stands.
MAX_OUTPUT_BYTES = 8192
_KILL_SECONDS = 0.5


class RepairError(Exception):
    """The repair could not be done; the text is one line that says why."""


@dataclass(frozen=True)
class Ended:
    """How a program ended; *status* is None where its time was over and it was killed with all that it had started."""

    status: Optional[int]
    output: str

    @property
    def last_line(self) -> str:
        """Give the last line that says something."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def describe(self) -> str:
        """Say in words how it ended, with its last words."""
        if self.status is None:
            ended = "was ended at its time limit"
        else:
            ended = (
                "exited {}".format(self.status) if self.status >= 0 else "was ended by signal {}".format(-self.status)
            )
        return "{}: {}".format(ended, self.last_line) if self.last_line else ended


# Given argv and a time.monotonic() deadline.
Run = Callable[[Sequence[str], float], Ended]


@dataclass(frozen=True)
class Repair:
    """What a repair found, and what it did or would do."""

    needed: bool
    message: str
    changed: bool = False
    before: Mapping[str, object] = field(default_factory=dict)
    after: Mapping[str, object] = field(default_factory=dict)
    done: List[str] = field(default_factory=list)
    freed_bytes: Optional[int] = None

    def as_answer(self, step: str) -> Dict[str, object]:
        """Shape it as node_recover returns it."""
        return {
            "step": step,
            "needed": self.needed,
            "changed": self.changed,
            "message": self.message,
            "before": dict(self.before),
            "after": dict(self.after),
            "done": list(self.done),
            "freed_bytes": self.freed_bytes,
        }


def run_program(argv: Sequence[str], deadline: float, environment: Optional[Mapping[str, str]] = None) -> Ended:
    """Run a program and keep the end of what it prints.

    Shapes: *environment* is added to the present one. A process that it leaves behind is not waited for.
    Errors: RepairError if it can't be started.
    """
    try:
        # LC_ALL: the output is parsed, or read by strangers.
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RepairError("{} can't be run: {}".format(argv[0], reason)) from None
    tail = bytearray()
    over = True
    try:
        over = not _read_until(process, tail, deadline)
    finally:
        if over:
            _kill_group(process)
        if process.stdout is not None:
            process.stdout.close()
    return Ended(None if over else process.returncode, tail.decode("utf-8", "replace"))


def wait_until(ready: Callable[[], bool], deadline: float, pause_seconds: float = 0.25) -> bool:
    """Ask *ready* until it says yes; tell whether it did before *deadline*."""
    while not ready():
        if time.monotonic() + pause_seconds >= deadline:
            return False
        time.sleep(pause_seconds)
    return True


def _read_until(process: subprocess.Popen[bytes], tail: bytearray, deadline: float) -> bool:
    """Collect output until the program has ended; tell whether it did before *deadline*."""
    if process.stdout is None:
        raise AssertionError("asked for a pipe above")
    source = process.stdout.fileno()
    is_open = True
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # What a daemon that was left behind holds open would never end: so the program itself is asked too.
            if is_open and selector.select(min(0.1, left)):
                part = os.read(source, MAX_OUTPUT_BYTES)
                tail += part
                del tail[:-MAX_OUTPUT_BYTES]
                is_open = bool(part)
            elif not is_open:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(left)
            if process.poll() is not None and not (is_open and selector.select(0)):
                return True


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_SECONDS)
