# SPDX-License-Identifier: GPL-3.0-or-later
"""Start the process of one job, follow it, and leave nothing of it behind but its log.

The manager's side of playbook_runner. Decides what the run may see: an inventory of the wanted nodes, an environment of
named variables, a folder of its own. Touches no store.
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import structlog

from node_manager.domain import JobAction, NodeResult
from node_manager.job_files import JobFiles
from node_manager.playbook_runner import (
    END_EVENT,
    ERROR_EVENT,
    HOST_EVENT,
    MAX_MESSAGE_CHARACTERS,
    STATS_EVENT,
    RunSpec,
    printable,
)
from node_manager.process_sweep import JOB_VARIABLE, kill_job
from node_manager.settings import ENVIRONMENT_PREFIX, Settings

COLLECTION = "iot_platform.node_manager"
PLAYBOOKS: Mapping[JobAction, str] = {action: f"{COLLECTION}.{action.value}" for action in JobAction}
# The module with which an action has done what it is for: a node that it answered for has its result, even if the run
# is cut short after that.
DECIDING_MODULES: Mapping[JobAction, tuple[str, ...]] = {
    JobAction.REGISTER: (f"{COLLECTION}.node_health",),
    JobAction.GATHER: (f"{COLLECTION}.node_resources",),
    JobAction.CHECK: (f"{COLLECTION}.node_health",),
    JobAction.RECOVER: (f"{COLLECTION}.node_recovery",),
}
LOG_MAX_BYTES = 4 * 1024 * 1024
STOP_GRACE_SECONDS = 5.0

_LINE_MAX_BYTES = 4 * 1024 * 1024
_POLL_SECONDS = 0.1
_TAIL_BYTES = 2000
# Results larger than this reach the registry, through the callback plugin, but not the event stream of ansible-runner.
_EVENT_MAX_CHARACTERS = 65536
_PASSED_ON = ("HOME", "USER", "LOGNAME", "SHELL", "TZ", "TMPDIR", "SSH_AUTH_SOCK")
_PASSED_ON_PREFIXES = (ENVIRONMENT_PREFIX, "PG")
# With the address of an API the callback would post there instead of recording into the store beside us.
_WITHHELD = frozenset(f"{ENVIRONMENT_PREFIX}{name}" for name in ("URL", "TOKEN", "INVENTORY_NODES"))


@dataclass(frozen=True)
class RunRequest:
    """What is to be run, on which nodes."""

    job_id: str
    action: JobAction
    node_ids: tuple[str, ...]
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeOutcome:
    """How the run went on one node."""

    result: NodeResult
    message: str | None = None


@dataclass(frozen=True)
class RunEnd:
    """How a run ended: complete if it came to its own end, with why not otherwise."""

    complete: bool
    outcomes: Mapping[str, NodeOutcome] = field(default_factory=dict)
    message: str | None = None


class Runner(Protocol):
    """Whatever can run a job."""

    def run(self, request: RunRequest, stop: threading.Event) -> RunEnd:
        """Run to the end, an early one soon after *stop* is set; nothing of the run goes on after this returns."""

    def discard(self, job_id: str) -> None:
        """End and remove what a run left behind whose manager died."""


def registry_inventory(node_ids: Sequence[str]) -> str:
    """Write the inventory: these nodes of the registry."""
    return json.dumps({"plugin": f"{COLLECTION}.registry", "node_ids": list(node_ids)})


class PlaybookProcess:
    """Runs each job's playbook in a process of its own."""

    def __init__(
        self,
        settings: Settings,
        *,
        playbooks: Mapping[JobAction, str] = PLAYBOOKS,
        deciding_modules: Mapping[JobAction, tuple[str, ...]] = DECIDING_MODULES,
        inventory: Callable[[Sequence[str]], str] = registry_inventory,
        environ: Mapping[str, str] | None = None,
        log_max_bytes: int = LOG_MAX_BYTES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._files = JobFiles(settings.home)
        self._playbooks = playbooks
        self._deciding_modules = deciding_modules
        self._inventory = inventory
        self._environ = os.environ if environ is None else environ
        self._log_max_bytes = log_max_bytes
        self._monotonic = monotonic

    def run(self, request: RunRequest, stop: threading.Event) -> RunEnd:
        """Run a playbook in a process of its own and follow it to its end."""
        try:
            private = self._files.make(request.job_id)
            spec = self._prepare(request, private)
            with (private / "stderr").open("wb") as stderr:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "node_manager.playbook_runner", str(spec)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd=private,
                    env=self._environment(request.job_id, private),
                    start_new_session=True,
                )
            with process:
                follower = _Follower(request.node_ids)
                try:
                    self._follow(process, follower, stop)
                finally:
                    _kill_group(process)
                    kill_job(request.job_id)
            return follower.end(process.returncode, self._last_lines(request.job_id, private))
        finally:
            self._files.discard_private(request.job_id)

    def discard(self, job_id: str) -> None:
        """End the processes and remove the folder of a run whose manager died."""
        killed = kill_job(job_id)
        self._files.discard_private(job_id)
        if killed:
            structlog.get_logger().warning("killed what an earlier run left behind", job_id=job_id, processes=killed)

    def _follow(self, process: subprocess.Popen[bytes], follower: _Follower, stop: threading.Event) -> None:
        assert process.stdout is not None
        asked_at: float | None = None
        for line in _lines(process.stdout, process):
            if line is not None:
                follower.take(line)
                continue
            if asked_at is None and stop.is_set():
                asked_at = self._monotonic()
                process.send_signal(signal.SIGTERM)
            if asked_at is not None and self._monotonic() - asked_at > STOP_GRACE_SECONDS:
                return

    def _prepare(self, request: RunRequest, private: Path) -> Path:
        inventory = private / "registry.yml"
        inventory.write_text(self._inventory(request.node_ids), "utf-8")
        # Its own, empty: those of the user and the system must not change what a job does.
        (private / "ansible.cfg").touch()
        for name in ("tmp", "home"):
            (private / name).mkdir(mode=0o700)
        variables = private / "variables.json"
        variables.write_text(json.dumps(_unsafe(request.variables)), "utf-8")
        spec = private / "spec.json"
        RunSpec(
            job_id=request.job_id,
            playbook=self._playbooks[request.action],
            inventory=str(inventory),
            variables=str(variables),
            private=str(private),
            control=str(self._files.control(request.job_id)),
            log=str(self._files.log(request.job_id)),
            log_max_bytes=self._log_max_bytes,
            deciding_modules=self._deciding_modules[request.action],
        ).write(spec)
        return spec

    def _environment(self, job_id: str, private: Path) -> dict[str, str]:
        configuration = self._settings.configuration
        ansible, ssh = configuration.ansible, configuration.ssh
        passed_on = {
            name: value
            for name, value in self._environ.items()
            if name not in _WITHHELD and (name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES))
        }
        path = [str(Path(sys.executable).parent), self._environ.get("PATH", os.defpath)]
        ssh_args = {
            "BatchMode": "yes",
            "ControlMaster": "auto",
            "ControlPersist": "60s",
            "ServerAliveInterval": str(ssh.keepalive_interval_seconds),
            "ServerAliveCountMax": str(ssh.keepalive_count),
        }
        return {
            **passed_on,
            JOB_VARIABLE: job_id,
            "PATH": os.pathsep.join(path),
            # Ansible insists on UTF-8, and reads what ssh says in English.
            "LC_ALL": "C.UTF-8",
            f"{ENVIRONMENT_PREFIX}HOME": str(self._settings.home),
            f"{ENVIRONMENT_PREFIX}CONFIG": str(self._settings.config_file),
            "MAX_EVENT_RES": str(_EVENT_MAX_CHARACTERS),
            "ANSIBLE_CONFIG": str(private / "ansible.cfg"),
            "ANSIBLE_HOME": str(private / "home"),
            "ANSIBLE_LOCAL_TEMP": str(private / "tmp"),
            "ANSIBLE_COLLECTIONS_PATH": str(collections_path()),
            "ANSIBLE_CALLBACKS_ENABLED": f"{COLLECTION}.registry",
            "ANSIBLE_INVENTORY_ENABLED": "auto,yaml",
            "ANSIBLE_INVENTORY_UNPARSED_FAILED": "True",
            "ANSIBLE_INVENTORY_ANY_UNPARSED_IS_FAILED": "True",
            "ANSIBLE_GATHERING": "explicit",
            "ANSIBLE_FORKS": str(ansible.forks),
            "ANSIBLE_TASK_TIMEOUT": str(ansible.task_timeout_seconds),
            "ANSIBLE_TIMEOUT": str(ssh.connect_timeout_seconds),
            "ANSIBLE_PIPELINING": "True",
            "ANSIBLE_PYTHON_INTERPRETER": "auto_silent",
            "ANSIBLE_HOST_KEY_CHECKING": "True",
            "ANSIBLE_SSH_ARGS": " ".join(f"-o {name}={value}" for name, value in ssh_args.items()),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self._files.control(job_id)),
            "ANSIBLE_NOCOLOR": "True",
        }

    def _last_lines(self, job_id: str, private: Path) -> str:
        log = self._files.tail(job_id, _TAIL_BYTES)
        with (private / "stderr").open("rb") as stderr:
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _TAIL_BYTES))
            crash = stderr.read(_TAIL_BYTES).decode("utf-8", "replace")
        return "\n".join(part for part in (printable(text).strip() for text in (log, crash)) if part)


class _Follower:
    """What the process has said so far."""

    def __init__(self, node_ids: Sequence[str]) -> None:
        self._node_ids = node_ids
        self._outcomes: dict[str, NodeOutcome] = {}
        self._stats: dict[str, Any] | None = None
        self._status: str | None = None
        self._error: str | None = None

    def take(self, line: bytes) -> None:
        """Take one line; what isn't ours is passed over."""
        try:
            said = json.loads(line)
            event = said["event"]
        except (ValueError, KeyError, TypeError):
            return
        if event == HOST_EVENT and said["node_id"] in self._node_ids:
            self._outcomes[said["node_id"]] = NodeOutcome(NodeResult(said["result"]), said["message"])
        elif event == STATS_EVENT:
            self._stats = said
        elif event == END_EVENT:
            self._status = said["status"]
        elif event == ERROR_EVENT:
            self._error = said["message"]

    def end(self, exit_code: int, last_lines: str) -> RunEnd:
        """Sum up: Ansible's own count decides where there is one, for only it knows what a rescue has mended."""
        if self._stats is not None:
            return RunEnd(True, self._counted(self._stats), last_lines[-MAX_MESSAGE_CHARACTERS:] or None)
        if self._error is not None:
            why = self._error
        elif exit_code < 0:
            why = f"the run was killed by signal {-exit_code} ({signal.Signals(-exit_code).name})"
        else:
            why = f"the run broke off ({self._status or f'exit code {exit_code}'})"
        return RunEnd(False, self._outcomes, f"{why}\n{last_lines[-MAX_MESSAGE_CHARACTERS:]}".strip())

    def _counted(self, stats: Mapping[str, Any]) -> dict[str, NodeOutcome]:
        unreachable, failed = set(stats["unreachable"]), set(stats["failed"])
        counted = {}
        for node_id in set(self._node_ids).intersection(stats["processed"]):
            last = self._outcomes.get(node_id)
            if node_id in unreachable:
                counted[node_id] = _with_message(NodeResult.UNREACHABLE, last)
            elif node_id in failed:
                counted[node_id] = _with_message(NodeResult.FAILED, last)
            else:
                counted[node_id] = NodeOutcome(NodeResult.OK)
        return counted


def collections_path() -> Path:
    """Find the folder that holds ansible_collections: of the checkout, or of the installed package."""
    spec = importlib.util.find_spec(f"ansible_collections.{COLLECTION}")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the collection {COLLECTION} is not installed beside node_manager")
    return Path(next(iter(spec.submodule_search_locations))).parents[2]


def _unsafe(value: Any) -> Any:
    """Mark all text as such that Ansible must never take for a template."""
    if isinstance(value, str):
        return {"__ansible_unsafe": value}
    if isinstance(value, Mapping):
        return {key: _unsafe(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_unsafe(item) for item in value]
    return value


def _with_message(result: NodeResult, last: NodeOutcome | None) -> NodeOutcome:
    return NodeOutcome(result, last.message if last else None)


def _lines(stream: IO[bytes], process: subprocess.Popen[bytes]) -> Iterator[bytes | None]:
    """Give each line as soon as it is there, and None whenever a moment has passed; end with the stream or process."""
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            if selector.select(_POLL_SECONDS):
                chunk = os.read(stream.fileno(), 65536)
                if not chunk:
                    return
                *lines, buffer = (buffer + chunk).split(b"\n")
                yield from lines
                if len(buffer) > _LINE_MAX_BYTES:
                    buffer = b""
            elif ended:
                return
            yield None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Give the process a moment to leave by itself, then end it and its group."""
    try:
        process.wait(_POLL_SECONDS * 10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_GRACE_SECONDS)
