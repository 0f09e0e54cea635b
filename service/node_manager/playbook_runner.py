# SPDX-License-Identifier: GPL-3.0-or-later
"""Run one playbook through ansible-runner and say on standard output, one JSON object a line, what became of each node.

The program of one job's process: `python -m node_manager.playbook_runner SPEC.json`. A process of its own, because
ansible-runner is not thread-safe and a slow event handler times it out. Its standard input only tells whether the
manager lives: at its end the run is killed (a parent-death signal wouldn't do, it comes when the thread that started us
ends).
Imports no part of the service but the vocabulary: it starts for every job.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from node_manager.domain import NodeResult, clean
from node_manager.process_sweep import kill_job

HOST_EVENT = "host"
STATS_EVENT = "stats"
END_EVENT = "end"
ERROR_EVENT = "error"

MAX_MESSAGE_CHARACTERS = 1000
# How often ansible-runner looks whether it should stop; its own 5 s would be the latency of each cancel.
_RUNNER_POLL_SECONDS = 1
_KILL_AGAIN_SECONDS = 0.2
_ORPHAN_EXIT_SECONDS = 10.0
# Terminals obey these: what a node answered must not reach one.
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


@dataclass(frozen=True)
class RunSpec:
    """One run, as its process is told of it."""

    job_id: str
    playbook: str
    inventory: str
    variables: str
    private: str
    control: str
    log: str
    log_max_bytes: int
    deciding_modules: tuple[str, ...]

    def write(self, path: Path) -> None:
        """Write it where the process will read it."""
        path.write_text(json.dumps(asdict(self)), "utf-8")

    @classmethod
    def read(cls, path: Path) -> RunSpec:
        """Read what write() wrote."""
        raw = json.loads(path.read_text("utf-8"))
        return cls(**{**raw, "deciding_modules": tuple(raw["deciding_modules"])})


class CappedLog:
    """What Ansible prints, for people, up to a number of bytes; readable while it grows."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._file = path.open("ab", buffering=0)
        self._left = max_bytes
        self._max_bytes = max_bytes

    def write(self, text: str) -> None:
        """Add text; what is beyond the cap is left out, and the log says so."""
        if self._left <= 0:
            return
        data = printable(text).encode("utf-8", "replace")
        self._file.write(data[: self._left])
        self._left -= len(data)
        if self._left <= 0:
            self._file.write(f"\n[more than {self._max_bytes} bytes, the rest was left out]\n".encode())


class EventReader:
    """Turn ansible-runner's events into ours."""

    def __init__(self, log: CappedLog, output: TextIO, deciding_modules: tuple[str, ...]) -> None:
        self._log = log
        self._output = output
        self._deciding_modules = deciding_modules

    def handle(self, event: Mapping[str, Any]) -> bool:
        """Take one event; False, so that ansible-runner keeps no file of it."""
        if printed := event.get("stdout"):
            self._log.write(f"{printed}\n")
        data = event.get("event_data") or {}
        match event.get("event"):
            case "runner_on_failed" if not data.get("ignore_errors"):
                self._emit_host(data, NodeResult.FAILED)
            case "runner_on_unreachable":
                self._emit_host(data, NodeResult.UNREACHABLE)
            case "runner_on_ok" if data.get("resolved_action", data.get("task_action")) in self._deciding_modules:
                self._emit_host(data, NodeResult.OK)
            case "playbook_on_stats":
                named = {"processed": "processed", "failed": "failures", "unreachable": "dark"}
                self.emit(STATS_EVENT, **{ours: sorted(data.get(theirs) or ()) for ours, theirs in named.items()})
            case _:
                pass
        return False

    def emit(self, event: str, **fields: Any) -> None:
        """Write one line for the manager."""
        self._output.write(json.dumps({"event": event, **fields}) + "\n")
        self._output.flush()

    def _emit_host(self, data: Mapping[str, Any], result: NodeResult) -> None:
        message = None if result is NodeResult.OK else describe(data.get("res"))
        self.emit(HOST_EVENT, node_id=data.get("host"), result=result.value, message=message)


def describe(answer: object) -> str:
    """Say in one short line why a task failed, from what the module or the connection answered."""
    if not isinstance(answer, Mapping) or not answer:
        return "the task failed; its answer is missing or too large to keep"
    parts = [answer.get(key) for key in ("msg", "module_stderr", "module_stdout", "stderr")]
    text = ": ".join(" ".join(printable(part[:10_000]).split()) for part in parts if isinstance(part, str) and part)
    return str(clean(text or "the task failed without a message"))[:MAX_MESSAGE_CHARACTERS]


def printable(text: str) -> str:
    """Drop control characters but line breaks and tabs."""
    return text.translate(_CONTROL)


class _Ending:
    """Ends the run when the manager asks for it or is gone."""

    def __init__(self, spec: RunSpec) -> None:
        self._job_id = spec.job_id
        self._folders = (spec.control, spec.private)
        self._orphaned = threading.Event()
        self._asked = threading.Event()
        self._over = threading.Event()

    def start(self) -> None:
        """Listen to signals and to standard input."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._asked.set())
        threading.Thread(target=self._watch_manager, name="watch-manager", daemon=True).start()
        threading.Thread(target=self._kill_when_asked, name="kill-when-asked", daemon=True).start()

    def is_asked(self) -> bool:
        """Tell whether the run is to end."""
        return self._asked.is_set()

    def finish(self) -> None:
        """End what the run has left behind, above all ssh keeping connections open."""
        self._over.set()
        kill_job(self._job_id)
        if self._orphaned.is_set():
            # Else the manager does it, when it has read what it wants of them.
            for folder in self._folders:
                shutil.rmtree(folder, ignore_errors=True)

    def _watch_manager(self) -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        self._orphaned.set()
        self._asked.set()
        if not self._over.wait(_ORPHAN_EXIT_SECONDS):
            self.finish()
            os._exit(1)

    def _kill_when_asked(self) -> None:
        self._asked.wait()
        # Again and again: ansible-playbook may be about to start.
        while not self._over.wait(_KILL_AGAIN_SECONDS):
            kill_job(self._job_id)


def run(spec: RunSpec, output: TextIO) -> None:
    """Run the playbook to its end, or until we are told to stop."""
    import ansible_runner  # noqa: PLC0415  # the manager imports this file for RunSpec and runs no playbook itself

    ending = _Ending(spec)
    ending.start()
    reader = EventReader(CappedLog(Path(spec.log), spec.log_max_bytes), output, spec.deciding_modules)
    try:
        ended = ansible_runner.run(
            private_data_dir=spec.private,
            ident="run",
            playbook=spec.playbook,
            inventory=spec.inventory,
            cmdline=f"--extra-vars @{shlex.quote(spec.variables)}",
            settings={
                "pexpect_timeout": _RUNNER_POLL_SECONDS,
                "suppress_ansible_output": True,
                "suppress_output_file": True,
            },
            event_handler=reader.handle,
            cancel_callback=ending.is_asked,
        )
        reader.emit(END_EVENT, status=ended.status, exit_code=ended.rc)
    except Exception as error:  # whatever breaks in there, the manager is to hear of it
        reader.emit(ERROR_EVENT, message=str(clean(f"{type(error).__name__}: {error}"))[:MAX_MESSAGE_CHARACTERS])
        raise
    finally:
        ending.finish()


def main() -> None:
    """Run the job that the first argument describes."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    # Whatever else prints (libraries, a child) must not get between our lines.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    run(RunSpec.read(Path(sys.argv[1])), output)


if __name__ == "__main__":
    main()
