# SPDX-License-Identifier: GPL-3.0-or-later
"""The job queue, with a runner that runs nothing, on both engines of the store."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from job_parts import (
    DEADLINE_SECONDS,
    FakeClock,
    FakeRunner,
    FakeTime,
    RunnerContract,
    add_nodes,
    ended,
    make_settings,
    wait_until,
)
from node_manager.domain import JobAction, JobState, NodeResult
from node_manager.job_files import JobFiles
from node_manager.job_store import JobStore
from node_manager.jobs import LEASE_SECONDS, Job, JobQueue
from node_manager.node_registry import NodeRegistry
from node_manager.problems import (
    ConflictError,
    InvalidInputError,
    JobNotFoundError,
    NodeNotFoundError,
    QueueFullError,
)
from node_manager.settings import Settings
from node_manager.store import StoreUnavailableError, open_store, tables


@pytest.fixture
def settings(tmp_path):
    return make_settings(tmp_path, SERVER__SHUTDOWN_SECONDS="0.2", ANSIBLE__MAX_QUEUED_JOBS="60")


@pytest.fixture
def runner(settings):
    return FakeRunner(settings)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, settings):
    url = settings.storage_url if request.param == "sqlite" else request.getfixturevalue("postgresql_database")
    store = open_store(url)
    add_nodes(store, settings, "fine", "fine-2", "broken", "gone", "slow", "slow-2")
    yield store
    store.close()


@pytest.fixture
def make_queue(store, settings, runner):
    queues = []

    def make(instance_id="one", **options) -> JobQueue:
        queue = JobQueue(
            store, options.pop("settings", settings), **{"runner": runner, **options}, instance_id=instance_id
        )
        queues.append(queue)
        return queue

    yield make
    for queue in queues:
        queue.stop()


@pytest.fixture
def queue(make_queue):
    queue = make_queue()
    queue.start()
    return queue


def quick(settings: Settings, **overrides: str) -> Settings:
    """Change some values; a stop never waits long."""
    return make_settings(settings.home, SERVER__SHUTDOWN_SECONDS="0.2", **overrides)


def results(job) -> dict[str, NodeResult | None]:
    return {node.node_id: node.result for node in job.nodes}


def wait_for_record(queue: JobQueue, job: Job) -> Job:
    """Wait for the end by reading: futures have a bound on the queue's own clock, which a test may move."""
    wait_until(lambda: queue.get(job.job_id).ended)
    return queue.get(job.job_id)


class TestFakeRunner(RunnerContract):
    pass


def test_submit_runs_a_job_in_which_a_bad_node_is_data(queue):
    job = ended(queue, queue.submit(JobAction.CHECK, ["gone", "fine", "broken"], "somebody"))

    assert job.state is JobState.SUCCEEDED
    assert job.requested_by == "somebody"
    wanted = {"broken": NodeResult.FAILED, "fine": NodeResult.OK, "gone": NodeResult.UNREACHABLE}
    assert wanted == results(job)
    assert job.created_at <= job.started_at <= job.ended_at


def test_submit_gives_nodes_no_result_before_the_end(queue, runner):
    job = queue.submit(JobAction.CHECK, ["slow"], "test")
    wait_until(lambda: runner.running)

    assert results(queue.get(job.job_id)) == {"slow": None}


@pytest.mark.parametrize(
    ("node_ids", "error"),
    [
        pytest.param([], InvalidInputError, id="none"),
        pytest.param([f"n{number}" for number in range(1001)], InvalidInputError, id="too many"),
        pytest.param(["fine", "unknown"], NodeNotFoundError, id="not registered"),
    ],
)
def test_submit_refuses_nodes(queue, node_ids, error):
    with pytest.raises(error):
        queue.submit(JobAction.CHECK, node_ids, "test")


def test_submit_refuses_what_is_beyond_the_bound(make_queue, settings):
    waiting = make_queue(settings=quick(settings, ANSIBLE__MAX_QUEUED_JOBS="2"))
    waiting.submit(JobAction.CHECK, ["fine"], "test")
    waiting.submit(JobAction.GATHER, ["fine"], "test")

    with pytest.raises(QueueFullError, match="2 jobs wait already"):
        waiting.submit(JobAction.REGISTER, ["fine"], "test")

    assert waiting.submit(JobAction.CHECK, ["fine"], "test").action is JobAction.CHECK


def test_submit_joins_fifty_callers_into_one_run(queue, runner):
    with ThreadPoolExecutor(50) as callers:
        asked = [callers.submit(queue.submit, JobAction.CHECK, ["slow"], f"caller-{number}") for number in range(50)]
        jobs = [ask.result(DEADLINE_SECONDS) for ask in asked]
    futures = [queue.future(job.job_id) for job in jobs]

    runner.let_go.set()

    assert {future.result(DEADLINE_SECONDS).job_id for future in futures} == {jobs[0].job_id}
    assert len(runner.started) == 1


def test_submit_joins_a_larger_job_that_covers_the_node(make_queue):
    waiting = make_queue()
    larger = waiting.submit(JobAction.CHECK, ["fine", "gone"], "test")

    assert waiting.submit(JobAction.CHECK, ["gone"], "test").job_id == larger.job_id
    assert waiting.submit(JobAction.CHECK, ["gone", "broken"], "test").job_id != larger.job_id
    assert waiting.submit(JobAction.GATHER, ["gone"], "test").job_id != larger.job_id


def test_queue_runs_no_more_jobs_at_once_than_allowed(queue, runner):
    jobs = [queue.submit(action, [node], "test") for action in JobAction for node in ("slow", "slow-2", "fine", "gone")]
    wait_until(lambda: len(runner.running) == 2)

    runner.let_go.set()
    for job in jobs:
        ended(queue, job)

    assert runner.most_running == 2


def test_queue_lets_no_later_job_overtake_one_that_waits_for_a_node(make_queue, runner, settings):
    queue = make_queue(settings=quick(settings, ANSIBLE__MAX_RUNNING_JOBS="4"))
    queue.start()
    queue.submit(JobAction.CHECK, ["slow"], "test")
    waits = queue.submit(JobAction.CHECK, ["slow", "fine"], "test")
    later = queue.submit(JobAction.GATHER, ["fine"], "test")
    free = queue.submit(JobAction.GATHER, ["fine-2"], "test")
    ended(queue, free)
    assert queue.get(later.job_id).state is JobState.QUEUED

    runner.let_go.set()
    ended(queue, later)

    order = [request.job_id for request in runner.started]
    assert order.index(waits.job_id) < order.index(later.job_id)


def test_two_queues_never_run_two_jobs_on_one_node(store, settings, runner, make_queue):
    nodes = [f"node-{number}" for number in range(6)]
    add_nodes(store, settings, *nodes)
    many = quick(settings, ANSIBLE__MAX_RUNNING_JOBS="4", ANSIBLE__MAX_QUEUED_JOBS="1000")
    queues = [make_queue(name, settings=many) for name in ("one", "two")]
    for queue in queues:
        queue.start()
    runner.pause_seconds = 0.005

    def ask(seed: int) -> list[str]:
        chance = random.Random(seed)
        return [
            chance.choice(queues)
            .submit(chance.choice(list(JobAction)), chance.sample(nodes, chance.randint(1, 3)), "test")
            .job_id
            for _ in range(25)
        ]

    with ThreadPoolExecutor(4) as callers:
        asked = {job_id for future in [callers.submit(ask, seed) for seed in range(4)] for job_id in future.result(60)}
    wait_until(lambda: all(job.ended for job in JobStore(store).load(asked).values()), 60)

    assert runner.overlaps == []
    assert {job.state for job in JobStore(store).load(asked).values()} == {JobState.SUCCEEDED}
    assert {job.holder for job in JobStore(store).load(asked).values()} == {"one", "two"}
    assert len(runner.started) == len(asked)


def test_claim_next_gives_one_job_to_one_of_many_threads(store, make_queue):
    job = make_queue().submit(JobAction.CHECK, ["fine"], "test")
    start = threading.Barrier(8)

    def claim(number: int):
        start.wait(DEADLINE_SECONDS)
        return JobStore(store).claim_next(f"holder-{number}", job.created_at, lambda _: 10)

    with ThreadPoolExecutor(8) as claimers:
        claimed = [job for job in claimers.map(claim, range(8)) if job is not None]

    assert len(claimed) == 1


def test_cancel_ends_a_waiting_job_at_once(queue, runner):
    queue.submit(JobAction.GATHER, ["slow"], "test")
    job = queue.submit(JobAction.CHECK, ["slow"], "test")

    cancelled = queue.cancel(job.job_id)

    assert cancelled.state is JobState.CANCELLED
    assert results(cancelled) == {"slow": NodeResult.NOT_RUN}
    assert ended(queue, job).state is JobState.CANCELLED


def test_cancel_ends_a_job_that_another_manager_runs(queue, make_queue, runner):
    job = queue.submit(JobAction.CHECK, ["slow"], "test")
    wait_until(lambda: runner.running)

    make_queue("other").cancel(job.job_id)

    assert ended(queue, job).state is JobState.CANCELLED
    assert queue.cancel(job.job_id).state is JobState.CANCELLED


def test_cancel_refuses_what_has_ended_and_what_is_unknown(queue):
    job = ended(queue, queue.submit(JobAction.CHECK, ["fine"], "test"))

    with pytest.raises(ConflictError, match="succeeded"):
        queue.cancel(job.job_id)
    with pytest.raises(JobNotFoundError):
        queue.cancel("00000000-0000-0000-0000-000000000000")


def test_submit_does_not_join_a_job_that_is_being_cancelled(make_queue, runner):
    queue = make_queue()
    job = queue.submit(JobAction.CHECK, ["slow"], "test")
    queue.start()
    wait_until(lambda: runner.running)

    queue.cancel(job.job_id)
    again = queue.submit(JobAction.CHECK, ["slow"], "test")

    assert again.job_id != job.job_id


def test_queue_ends_a_job_at_its_deadline(make_queue, settings, runner):
    time = FakeTime()
    queue = make_queue(monotonic=time, settings=quick(settings, ANSIBLE__JOB_TIMEOUT_SECONDS="10"))
    queue.start()
    job = queue.submit(JobAction.CHECK, ["slow"], "test")
    wait_until(lambda: runner.running)

    time.seconds += 11
    job = wait_for_record(queue, job)

    assert job.state is JobState.TIMED_OUT
    assert "10 s" in job.message
    assert job.deadline_at - job.started_at == timedelta(seconds=10)


def test_queue_fails_a_job_whose_runner_breaks_and_goes_on(queue, runner):
    runner.crash = OSError("no space left on device")
    job = ended(queue, queue.submit(JobAction.CHECK, ["fine"], "test"))
    runner.crash = None

    assert job.state is JobState.FAILED
    assert "no space left" in job.message
    assert results(job) == {"fine": NodeResult.NOT_RUN}
    assert ended(queue, queue.submit(JobAction.CHECK, ["fine"], "test")).state is JobState.SUCCEEDED


def test_future_is_of_a_job_that_another_manager_runs(make_queue, runner):
    asks, runs = make_queue("asks"), make_queue("runs")
    job = asks.submit(JobAction.CHECK, ["slow"], "test")
    runs.start()
    wait_until(lambda: runner.running)
    asks.start()
    future = asks.future(job.job_id)

    runner.let_go.set()

    assert future.result(DEADLINE_SECONDS).holder == "runs"


def test_future_of_an_unknown_job_says_so(queue):
    with pytest.raises(JobNotFoundError):
        queue.future("00000000-0000-0000-0000-000000000000").result(DEADLINE_SECONDS)


def test_future_has_a_bound(make_queue, settings, runner):
    queue = make_queue(settings=quick(settings, SERVER__MAX_WAIT_SECONDS="0.1"))
    queue.start()

    with pytest.raises(TimeoutError, match="still goes on"):
        queue.future(queue.submit(JobAction.CHECK, ["slow"], "test").job_id).result(DEADLINE_SECONDS)


def test_stop_interrupts_what_does_not_end_in_time_and_has_the_nodes_checked_later(make_queue, runner):
    queue = make_queue()
    queue.start()
    job = queue.submit(JobAction.GATHER, ["slow"], "test")
    future = queue.future(job.job_id)
    wait_until(lambda: runner.running)

    queue.stop()

    assert queue.get(job.job_id).state is JobState.INTERRUPTED
    assert future.done()
    waiting = queue.page(10, state=JobState.QUEUED).jobs
    assert [(again.action, again.node_ids) for again in waiting] == [(JobAction.CHECK, ("slow",))]


def test_start_refuses_a_second_manager_of_the_same_id(queue, make_queue):
    with pytest.raises(BlockingIOError):
        make_queue("one").start()


def test_recover_takes_over_from_a_manager_of_this_machine_at_once(store, settings, make_queue, runner):
    job = make_queue("dead").submit(JobAction.GATHER, ["fine", "gone"], "test")
    waiting = make_queue("dead").submit(JobAction.GATHER, ["fine-2"], "test")
    JobStore(store).hold("dead", job.created_at, 3600)
    JobStore(store).claim_next("dead", job.created_at, lambda _: 300)
    NodeRegistry(store, settings).deregister("gone")
    lock = JobFiles(settings.home).lock_instance("dead", lambda _: None)
    alive = make_queue("alive")
    assert alive.recover() == []

    os.close(lock)  # as the kernel does when the manager is killed

    assert alive.recover() == [job.job_id]
    assert alive.get(job.job_id).state is JobState.INTERRUPTED
    assert runner.discarded == [job.job_id]
    again = alive.page(1).jobs[0]
    assert (again.action, again.node_ids, again.state) == (JobAction.CHECK, ("fine",), JobState.QUEUED)
    alive.start()
    assert ended(alive, waiting).state is JobState.SUCCEEDED
    assert ended(alive, again).state is JobState.SUCCEEDED


def test_recover_takes_over_from_another_machine_when_its_lease_has_run_out(store, make_queue, settings):
    clock = FakeClock()
    far_away = JobStore(store)
    alive = make_queue("alive", clock=clock)
    job = alive.submit(JobAction.CHECK, ["fine"], "test")
    far_away.hold("far-away", clock(), LEASE_SECONDS)
    far_away.claim_next("far-away", clock(), lambda _: 300)
    clock.advance(LEASE_SECONDS - 1)
    assert alive.recover() == []

    clock.advance(2)

    assert alive.recover() == [job.job_id]
    assert far_away.renew("far-away", clock(), LEASE_SECONDS) is True


def test_finish_leaves_the_word_of_the_manager_that_took_over(store, make_queue):
    queue = make_queue()
    queue.submit(JobAction.CHECK, ["fine"], "test")
    jobs = JobStore(store)
    job = jobs.claim_next("slow-manager", queue.page(1).jobs[0].created_at, lambda _: 300)
    jobs.interrupt_jobs_of_dead({"slow-manager"}, job.created_at, timedelta(hours=1))

    final = jobs.finish(job, JobState.SUCCEEDED, None, {"fine": (NodeResult.OK, None)}, job.created_at)

    assert final.state is JobState.INTERRUPTED
    assert results(final) == {"fine": NodeResult.NOT_RUN}


def test_queue_stops_its_jobs_when_it_could_not_renew_its_lease(make_queue, runner, store, monkeypatch):
    time = FakeTime()
    queue = make_queue(monotonic=time)
    queue.start()
    job = queue.submit(JobAction.CHECK, ["slow"], "test")
    wait_until(lambda: runner.running)

    def unavailable(*_):
        raise StoreUnavailableError("the store is gone")

    monkeypatch.setattr(queue._jobs, "renew", unavailable)
    time.seconds += 21
    wait_until(lambda: not runner.running)

    assert wait_for_record(queue, job).state is JobState.INTERRUPTED


def test_queue_writes_the_end_of_a_job_when_the_store_is_back(queue, runner, monkeypatch):
    job = queue.submit(JobAction.CHECK, ["slow"], "test")
    wait_until(lambda: runner.running)
    finish, tries = queue._jobs.finish, []

    def sometimes(*arguments):
        tries.append(1)
        if len(tries) == 1:
            raise StoreUnavailableError("the store is gone")
        return finish(*arguments)

    monkeypatch.setattr(queue._jobs, "finish", sometimes)
    runner.let_go.set()

    assert ended(queue, job).state is JobState.SUCCEEDED
    assert len(tries) == 2


def test_page_lists_newest_first_with_cursor_and_filters(make_queue):
    queue = make_queue()
    jobs = [queue.submit(action, ["fine"], "test") for action in JobAction] + [
        queue.submit(JobAction.CHECK, ["gone", "broken"], "test")
    ]
    queue.cancel(jobs[0].job_id)

    first = queue.page(3)
    second = queue.page(3, str(first.next_cursor))

    assert [*first.jobs, *second.jobs] == [queue.get(job.job_id) for job in reversed(jobs)]
    assert second.next_cursor is None
    assert [job.job_id for job in queue.page(9, state=JobState.CANCELLED).jobs] == [jobs[0].job_id]
    assert [job.job_id for job in queue.page(9, node_id="gone").jobs] == [jobs[-1].job_id]
    assert [job.job_id for job in queue.page(9, action=JobAction.GATHER).jobs] == [jobs[1].job_id]


@pytest.mark.parametrize("cursor", ["x", "-1", "", "9" * 19, "\u0661"])
def test_page_refuses_a_cursor_that_is_none(make_queue, cursor):
    with pytest.raises(InvalidInputError):
        make_queue().page(10, cursor)


def test_prune_keeps_the_newest_ended_jobs_and_those_on_their_way(make_queue, settings, runner, store):
    queue = make_queue(settings=quick(settings, ANSIBLE__KEEP_JOBS="2"))
    queue.start()
    old = [ended(queue, queue.submit(JobAction.CHECK, ["fine"], "test")) for _ in range(4)]
    active = queue.submit(JobAction.CHECK, ["slow"], "test")
    wait_until(lambda: runner.running)

    queue.prune()

    kept = {job.job_id for job in queue.page(10).jobs}
    assert {active.job_id, old[2].job_id, old[3].job_id} == kept
    assert set(JobFiles(settings.home).job_ids()) == kept
    with pytest.raises(JobNotFoundError):
        queue.log(old[0].job_id)


def test_log_reads_from_an_offset_while_the_job_runs(queue, runner):
    job = queue.submit(JobAction.CHECK, ["slow"], "test")
    wait_until(lambda: queue.log(job.job_id))

    assert queue.log(job.job_id).startswith(b"PLAY [check]")
    assert queue.log(job.job_id, 5).startswith(b"[check]")
    assert queue.log(job.job_id, 10_000) == b""


def test_claims_end_with_the_job(store, queue):
    ended(queue, queue.submit(JobAction.CHECK, ["fine"], "test"))

    with store.read() as connection:
        assert connection.execute(tables.node_claims.select()).all() == []
