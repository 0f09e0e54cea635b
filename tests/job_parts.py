# SPDX-License-Identifier: GPL-3.0-or-later
"""What the tests of jobs share: a clock, a runner without Ansible, the contract of all runners, nodes to run on.

Run as a program (`python job_parts.py HOME NODE_ID`) it is a manager that starts one job and waits to be killed.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from node_manager.declarations import NodeDeclaration
from node_manager.domain import JobAction, NodeResult
from node_manager.job_files import JobFiles
from node_manager.jobs import Job, JobQueue
from node_manager.node_registry import NodeRegistry
from node_manager.playbook_process import NodeOutcome, PlaybookProcess, RunEnd, RunRequest
from node_manager.settings import Settings, load_settings
from node_manager.store import Store, open_store

DEADLINE_SECONDS = 30.0
PLAYBOOK = """
- hosts: all
  gather_facts: false
  strategy: free
  tasks:
    - ansible.builtin.fail:
        msg: broken on purpose
      when: inventory_hostname.startswith('broken')
    - ansible.builtin.fail:
        msg: "{{ 'x' * 3000000 }}"
      when: inventory_hostname.startswith('huge')
    - ansible.builtin.fail:
        msg: "\\x1b[31mred\\x1b[0m {{ '{{' }} lookup('pipe', 'id') }}"
      when: inventory_hostname.startswith('hostile')
    - block:
        - ansible.builtin.fail:
            msg: mended below
      rescue:
        - ansible.builtin.meta: noop
      when: inventory_hostname.startswith('rescued')
    - ansible.builtin.ping:
    - ansible.builtin.command: sleep 300
      changed_when: false
      when: inventory_hostname.startswith('slow')
"""


class FakeClock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class FakeTime:
    """A monotonic clock that stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class FakeRunner:
    """Runs nothing: nodes answer by their names, "slow" ones when they are let go."""

    def __init__(self, settings: Settings) -> None:
        self._files = JobFiles(settings.home)
        self._guard = threading.Lock()
        self._busy: dict[str, str] = {}
        self.overlaps: list[tuple[str, str, str]] = []
        self.started: list[RunRequest] = []
        self.running: set[str] = set()
        self.most_running = 0
        self.discarded: list[str] = []
        self.let_go = threading.Event()
        self.pause_seconds = 0.0
        self.crash: Exception | None = None

    def run(self, request: RunRequest, stop: threading.Event) -> RunEnd:
        self._files.make(request.job_id)
        with self._guard:
            self.started.append(request)
            self.running.add(request.job_id)
            self.most_running = max(self.most_running, len(self.running))
            for node_id in request.node_ids:
                if node_id in self._busy:
                    self.overlaps.append((node_id, self._busy[node_id], request.job_id))
                self._busy[node_id] = request.job_id
        try:
            return self._answer(request, stop)
        finally:
            with self._guard:
                for node_id in request.node_ids:
                    self._busy.pop(node_id, None)
                self.running.discard(request.job_id)
            self._files.discard_private(request.job_id)

    def discard(self, job_id: str) -> None:
        self.discarded.append(job_id)
        self._files.discard_private(job_id)

    def _answer(self, request: RunRequest, stop: threading.Event) -> RunEnd:
        if self.crash is not None:
            raise self.crash
        self._files.log(request.job_id).write_text(f"PLAY [{request.action}]\n{request.node_ids}\n", "utf-8")
        outcomes = {node_id: _fake_outcome(node_id) for node_id in request.node_ids}
        slow = any(node_id.startswith("slow") for node_id in request.node_ids)
        stop.wait(self.pause_seconds)
        while slow and not stop.is_set() and not self.let_go.wait(0.01):
            pass
        if stop.is_set():
            return RunEnd(complete=False, outcomes=outcomes, message="the run broke off (canceled)")
        return RunEnd(complete=True, outcomes=outcomes)


def _fake_outcome(node_id: str) -> NodeOutcome:
    if node_id.startswith("broken"):
        return NodeOutcome(NodeResult.FAILED, "broken on purpose")
    if node_id.startswith("gone"):
        return NodeOutcome(NodeResult.UNREACHABLE, "Connection refused")
    return NodeOutcome(NodeResult.OK)


class RunnerContract:
    """What every runner promises; subclasses give the fixtures `runner` and `settings`."""

    def test_run_gives_each_node_its_own_result(self, runner, settings):
        end = runner.run(request("fine", "broken", "gone"), threading.Event())

        assert end.complete
        results = {node_id: outcome.result for node_id, outcome in end.outcomes.items()}
        assert results == {"fine": NodeResult.OK, "broken": NodeResult.FAILED, "gone": NodeResult.UNREACHABLE}
        assert "broken on purpose" in end.outcomes["broken"].message
        assert "refused" in end.outcomes["gone"].message

    def test_run_keeps_the_log_and_nothing_else(self, runner, settings):
        wanted = request("fine")

        runner.run(wanted, threading.Event())

        assert [path.name for path in JobFiles(settings.home).log(wanted.job_id).parent.iterdir()] == ["log"]
        assert b"PLAY [" in JobFiles(settings.home).read_log(wanted.job_id, 0, 100_000)

    def test_run_ends_early_when_stopped_and_keeps_what_is_known(self, runner, settings):
        wanted, stop = request("slow", "fine"), threading.Event()
        ends: list[RunEnd] = []
        thread = threading.Thread(target=lambda: ends.append(runner.run(wanted, stop)))
        thread.start()
        wait_until(lambda: b"PLAY [" in JobFiles(settings.home).read_log(wanted.job_id, 0, 100_000))

        stop.set()
        thread.join(DEADLINE_SECONDS)

        assert not thread.is_alive()
        assert not ends[0].complete
        assert ends[0].message

    def test_discard_takes_a_job_that_left_nothing(self, runner, settings):
        runner.discard(str(uuid.uuid4()))


def request(*node_ids: str, action: JobAction = JobAction.CHECK) -> RunRequest:
    """Ask for a run outside any queue."""
    return RunRequest(str(uuid.uuid4()), action, node_ids)


def wait_until(condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> None:
    """Wait for a condition, with a deadline."""
    pause = threading.Event()
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"after {seconds} s it is still not so"
        pause.wait(0.02)


def ended(queue: JobQueue, job: Job) -> Job:
    """Wait for a job's end."""
    return queue.future(job.job_id).result(DEADLINE_SECONDS)


def make_settings(home: Path, **overrides: str) -> Settings:
    """Read the shipped configuration with some values changed, SECTION__KEY=value."""
    return load_settings(
        {"NODE_MANAGER_HOME": str(home), **{f"NODE_MANAGER_{key}": value for key, value in overrides.items()}}
    )


def add_nodes(store: Store, settings: Settings, *node_ids: str) -> None:
    """Register nodes, as far as a job cares."""
    registry = NodeRegistry(store, settings)
    for node_id in node_ids:
        registry.register(NodeDeclaration(node_id=node_id, address="192.0.2.1"))


def real_runner(settings: Settings, playbook: str = PLAYBOOK, **options) -> PlaybookProcess:
    """Make a runner of a small playbook on this machine: nodes behave by their names."""
    file = settings.home / "playbook.yml"
    file.write_text(playbook, "utf-8")
    return PlaybookProcess(
        settings,
        playbooks=dict.fromkeys(JobAction, str(file)),
        deciding_modules=dict.fromkeys(JobAction, ("ansible.builtin.ping",)),
        inventory=local_inventory,
        **options,
    )


def local_inventory(node_ids: Sequence[str]) -> str:
    """Write an inventory of hosts that are this machine, but for those that are "gone"."""
    here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    away = {"ansible_host": "127.0.0.1", "ansible_port": 1}
    hosts = {node_id: away if node_id.startswith("gone") else here for node_id in node_ids}
    return yaml.safe_dump({"all": {"hosts": hosts}})


def main() -> None:
    """Be a manager that runs one job."""
    settings = make_settings(Path(sys.argv[1]))
    queue = JobQueue(open_store(settings.storage_url), settings, instance_id="doomed", runner=real_runner(settings))
    queue.start()
    sys.stdout.write(queue.submit(JobAction.GATHER, [sys.argv[2]], "test").job_id + "\n")
    sys.stdout.flush()
    threading.Event().wait(120)


if __name__ == "__main__":
    main()
