# SPDX-License-Identifier: GPL-3.0-or-later
"""End every process of a job, wherever it went.

Neither a process group nor a session holds a job together: ansible-runner, each worker of ansible-playbook and each ssh
that keeps a connection open start sessions of their own. What all of them share is a variable in their environment.
Reads /proc; imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

JOB_VARIABLE = "NODE_MANAGER_JOB_ID"
_LIMIT_SCANS = 100
_PAUSE_SECONDS = 0.02
_GONE = frozenset("ZX")


def kill_job(job_id: str, spare: frozenset[int] = frozenset()) -> int:
    """Kill all processes of a job and their descendants but those in *spare*; give how many there were.

    A process can hide from one look between its fork and its exec: only two looks in a row that find nothing count.
    """
    killed: set[int] = set()
    clean = 0
    pause = threading.Event()
    for _ in range(_LIMIT_SCANS):
        found = find_job(job_id) - spare - {os.getpid()}
        clean = 0 if found else clean + 1
        if clean == 2:
            break
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        pause.wait(_PAUSE_SECONDS)
    return len(killed)


def find_job(job_id: str) -> frozenset[int]:
    """Find the living processes of a job: those marked with it, and all that they started."""
    marker = f"{JOB_VARIABLE}={job_id}".encode()
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        state, parent = _status(entry)
        if state in _GONE:
            continue
        pid = int(entry)
        parents[pid] = parent
        if marker in _environment(entry):
            found.add(pid)
    # A process that changed its user (become) has a fresh environment, but still its parent.
    grew = bool(found)
    while grew:
        children = {pid for pid, parent in parents.items() if parent in found and pid not in found}
        found |= children
        grew = bool(children)
    return frozenset(found)


def _status(pid: str) -> tuple[str, int]:
    try:
        # 4711 (ansible-playboo) S 4242 4711 ...: the name may hold spaces and brackets itself
        fields = Path("/proc", pid, "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return fields[0], int(fields[1])
    except (OSError, IndexError, ValueError):
        return "X", 0


def _environment(pid: str) -> list[bytes]:
    try:
        return Path("/proc", pid, "environ").read_bytes().split(b"\0")
    except OSError:
        return []
