# SPDX-License-Identifier: GPL-3.0-or-later
"""Jobs through the real ansible-runner, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import job_parts
import pytest
from job_parts import DEADLINE_SECONDS, RunnerContract, add_nodes, ended, real_runner, request, wait_until
from node_manager.domain import JobAction, JobState, NodeResult
from node_manager.job_files import JobFiles
from node_manager.jobs import JobQueue
from node_manager.process_sweep import find_job
from node_manager.store import open_store
from parts import require

SHOW_ENVIRONMENT = """
- hosts: all
  gather_facts: false
  vars:
    url: "{{ lookup('env', 'NODE_MANAGER_URL') }}"
    callbacks: "{{ lookup('env', 'ANSIBLE_CALLBACKS_ENABLED') }}"
    keys: "{{ lookup('env', 'ANSIBLE_HOST_KEY_CHECKING') }}"
  tasks:
    - ansible.builtin.debug:
        msg: "URL={{ url }}, CALLBACKS={{ callbacks }}, KEYS={{ keys }}."
"""


@pytest.fixture
def settings(tmp_path):
    return job_parts.make_settings(tmp_path)


@pytest.fixture
def runner(settings):
    require("ssh", "unreachable nodes are reached for with ssh")
    return real_runner(settings)


@pytest.fixture
def store(settings):
    store = open_store(settings.storage_url)
    yield store
    store.close()


@pytest.fixture
def queue(store, settings, runner):
    queue = JobQueue(store, settings, instance_id="real", runner=runner)
    queue.start()
    yield queue
    queue.stop()


def log_of(settings, job_id: str) -> bytes:
    return JobFiles(settings.home).read_log(job_id, 0, 10_000_000)


def is_in_slow_task(job_id: str) -> bool:
    """Tell whether the job has come to its `sleep 300`, with all the processes around it."""
    commands = []
    for pid in find_job(job_id):
        try:
            commands.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        except FileNotFoundError:
            continue
    return any(command.startswith(b"sleep\x00300") for command in commands)


class TestPlaybookProcess(RunnerContract):
    def test_run_leaves_no_process_behind_when_stopped(self, runner, settings):
        wanted, stop = request("slow"), threading.Event()
        thread = threading.Thread(target=runner.run, args=(wanted, stop))
        thread.start()
        wait_until(lambda: is_in_slow_task(wanted.job_id))

        stop.set()
        thread.join(DEADLINE_SECONDS)

        assert not thread.is_alive()
        assert frozenset() == find_job(wanted.job_id)

    def test_run_counts_a_rescued_node_as_ok(self, runner):
        end = runner.run(request("rescued"), threading.Event())

        assert NodeResult.OK is end.outcomes["rescued"].result

    def test_run_caps_huge_output_and_the_others_go_on(self, settings):
        capped = real_runner(settings, log_max_bytes=10_000)
        wanted = request("huge", "fine")

        end = capped.run(wanted, threading.Event())

        assert NodeResult.FAILED is end.outcomes["huge"].result
        assert "too large" in end.outcomes["huge"].message
        assert NodeResult.OK is end.outcomes["fine"].result
        assert len(log_of(settings, wanted.job_id)) < 10_200
        assert b"the rest was left out" in log_of(settings, wanted.job_id)

    def test_run_shows_what_nodes_answer_verbatim_but_for_control_characters(self, runner, settings):
        wanted = request("hostile")

        end = runner.run(wanted, threading.Event())

        assert "lookup('pipe', 'id')" in end.outcomes["hostile"].message
        assert "\x1b" not in end.outcomes["hostile"].message
        assert b"\x1b" not in log_of(settings, wanted.job_id)

    def test_run_says_why_a_playbook_cannot_start(self, settings):
        end = real_runner(settings, playbook="- hosts: [").run(request("fine"), threading.Event())

        assert not end.complete
        assert "playbook.yml" in end.message

    def test_run_lets_only_named_variables_of_the_manager_in(self, settings, monkeypatch):
        monkeypatch.setenv("ANSIBLE_CALLBACKS_ENABLED", "nonsense")
        monkeypatch.setenv("NODE_MANAGER_URL", "http://127.0.0.1:1")
        wanted = request("fine")

        real_runner(settings, playbook=SHOW_ENVIRONMENT).run(wanted, threading.Event())

        shown = log_of(settings, wanted.job_id).decode()
        assert "URL=, CALLBACKS=iot_platform.node_manager.registry, KEYS=True." in shown


def test_queue_runs_a_job_and_gives_its_log(store, settings, queue):
    add_nodes(store, settings, "fine", "gone")

    job = ended(queue, queue.submit(JobAction.CHECK, ["fine", "gone"], "test"))

    assert JobState.SUCCEEDED is job.state
    assert [(node.node_id, node.result) for node in job.nodes] == [("fine", "ok"), ("gone", "unreachable")]
    whole = queue.log(job.job_id)
    assert b"PLAY RECAP" in whole
    assert whole[5:] == queue.log(job.job_id, 5)


def test_queue_cancels_a_running_job_and_its_processes(store, settings, queue):
    add_nodes(store, settings, "slow")
    job = queue.submit(JobAction.CHECK, ["slow"], "test")
    wait_until(lambda: is_in_slow_task(job.job_id))

    queue.cancel(job.job_id)

    assert JobState.CANCELLED is ended(queue, job).state
    assert frozenset() == find_job(job.job_id)


def test_queue_ends_a_job_at_its_deadline_and_keeps_what_nodes_reported(store, tmp_path):
    settings = job_parts.make_settings(tmp_path, ANSIBLE__JOB_TIMEOUT_SECONDS="8")
    add_nodes(store, settings, "fine", "slow")
    queue = JobQueue(store, settings, instance_id="hasty", runner=real_runner(settings))
    queue.start()

    job = ended(queue, queue.submit(JobAction.CHECK, ["fine", "slow"], "test"))
    queue.stop()

    assert JobState.TIMED_OUT is job.state
    assert "deadline of 8 s" in job.message
    assert NodeResult.OK is job.nodes[0].result
    assert frozenset() == find_job(job.job_id)


def test_queue_fails_a_job_whose_runner_was_killed(store, settings, queue):
    add_nodes(store, settings, "slow")
    job = queue.submit(JobAction.CHECK, ["slow"], "test")
    wait_until(lambda: is_in_slow_task(job.job_id))
    runner_pid = next(
        pid
        for pid in find_job(job.job_id)
        if b"node_manager.playbook_runner" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )

    os.kill(runner_pid, signal.SIGKILL)

    job = ended(queue, job)
    assert JobState.FAILED is job.state
    assert "killed by signal 9 (SIGKILL)" in job.message
    assert frozenset() == find_job(job.job_id)


def test_recover_interrupts_the_jobs_of_a_killed_manager_whose_processes_die(store, settings, runner):
    add_nodes(store, settings, "slow")
    arguments = [sys.executable, job_parts.__file__, str(settings.home), "slow"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as manager:
        job_id = manager.stdout.readline().strip()
        wait_until(lambda: is_in_slow_task(job_id))

        manager.kill()

        wait_until(lambda: not find_job(job_id), 15)
    assert not JobFiles(settings.home).private(job_id).exists()
    assert not JobFiles(settings.home).control(job_id).exists()
    settings_of_next = job_parts.make_settings(settings.home, ANSIBLE__MAX_RUNNING_JOBS="1")
    after = JobQueue(store, settings_of_next, instance_id="after", runner=runner)
    assert [job_id] == after.recover()
    job = after.get(job_id)
    assert JobState.INTERRUPTED is job.state
    assert [node.result for node in job.nodes] == [NodeResult.NOT_RUN]
    assert [path.name for path in JobFiles(settings.home).log(job_id).parent.iterdir()] == ["log"]
    again = after.page(10, state=JobState.QUEUED).jobs
    assert [(job.action, job.node_ids) for job in again] == [(JobAction.CHECK, ("slow",))]
