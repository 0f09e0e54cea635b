# SPDX-License-Identifier: GPL-3.0-or-later
"""What a scrape says of the state in the store, on either engine."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from builders import (
    START,
    FakeClock,
    make_contact,
    make_declaration,
    make_facts,
    make_filesystem,
    make_report,
    make_request,
    make_sample,
    make_settings,
    observe,
)
from job_parts import FakeRunner, wait_until
from metrics_scrape import Scrape, read
from node_manager import metrics_of_state, outbox
from node_manager.domain import Admin, ContactReason, GuardState, JobAction
from node_manager.job_store import JobStore
from node_manager.jobs import JobQueue
from node_manager.metrics import Metrics
from node_manager.metrics_of_state import MAX_ZONES
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.recorder import Recorder
from node_manager.recoveries import NewRecovery, Recoveries
from node_manager.recovery_rows import read_patient
from node_manager.resource_allocator import ResourceAllocator
from node_manager.resource_monitor import ResourceMonitor
from node_manager.scheduler import Scheduler
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError, tables

KAFKA = {"kafka": {"bootstrap_servers": ["127.0.0.1:9092"]}}


class Seconds:
    """A steady clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Give the time."""
        return self.now


def scrape(store: Store, settings: Settings, clock: FakeClock) -> Scrape:
    """Scrape a manager that has just started."""
    body, _ = Metrics(store, settings, clock).exposition("")
    return read(body.decode())


def register(registry: NodeRegistry, *node_ids: str, **changes: Any) -> None:
    """Register nodes."""
    for node_id in node_ids:
        registry.register(make_declaration(node_id, **changes))


def test_nodes_are_counted_by_status_health_type_and_admin(
    store: Store, settings: Settings, registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    register(registry, "a", "b", "c", node_type="gateway")
    register(registry, "d", "e")
    registry.set_admin("c", Admin.MAINTENANCE, "a new disk")
    now = clock.advance(1)
    log.record([observe("sample", make_sample(), now, "a"), observe("contact", make_contact(), now, "b")])
    log.record([observe("contact", make_contact(ContactReason.CONNECTION_REFUSED), now, "d")])
    with store.write() as connection:
        connection.execute(sa.update(tables.nodes).where(tables.nodes.c.node_id == "e").values(node_type="of-old"))
        connection.execute(sa.update(tables.node_states).values(health="suspect").where(_is("b")))
        connection.execute(sa.update(tables.node_states).values(health="unreachable").where(_is("d")))

    found = scrape(store, settings, clock)

    assert found.value("node_manager_nodes", status="offline", health="unreachable") == 1
    assert found.value("node_manager_nodes", status="maintenance", health="unknown") == 1
    assert found.value("node_manager_nodes", status="online", health="suspect") == 1
    assert sum(found.values("node_manager_nodes")) == sum(found.values("node_manager_type_nodes")) == 5
    by_type = {
        name: sum(found.values("node_manager_type_nodes", node_type=name)) for name in ("gateway", "other", "none")
    }
    assert by_type == {"gateway": 3, "other": 1, "none": 1}
    assert found.value("node_manager_admin_nodes", admin="maintenance") == 1
    assert found.label("node_manager_type_nodes", "node_type") == {"gateway", "server", "other", "none"}


def test_schedulable_is_what_the_registry_says(
    store: Store, settings: Settings, registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    register(registry, "well", "warned", "failed", "cordoned", "stale", "unseen", "distrusted", "lost")
    log.record([observe("report", make_report(), clock.advance(1), "stale")])
    now = clock.advance(1000)
    seen = ("well", "warned", "failed", "cordoned", "distrusted", "lost")
    reports = {"warned": make_report(("warning", "failed")), "failed": make_report(("critical", "failed"))}
    log.record([observe("report", reports.get(node_id, make_report()), now, node_id) for node_id in seen])
    registry.set_admin("cordoned", Admin.CORDONED, "for a while")
    with store.write() as connection:
        connection.execute(sa.update(tables.node_states).values(quarantined=True).where(_is("distrusted")))
        connection.execute(sa.update(tables.node_states).values(health="unreachable").where(_is("lost")))
    clock.advance(60)

    found = scrape(store, settings, clock)

    stale_after = settings.configuration.monitoring.stale_after_seconds
    expected = {
        node_id
        for node_id, node in registry.load([*seen, "stale", "unseen"]).items()
        if node.schedulable(clock(), timedelta(seconds=stale_after))
    }
    assert expected == {"well", "warned"}
    assert found.value("node_manager_schedulable_nodes") == 2
    assert found.value("node_manager_quarantined_nodes") == 1
    own = {
        node_id
        for node_id in (*seen, "stale", "unseen")
        if found.value("node_manager_node_schedulable", node_id=node_id)
    }
    assert own == expected


def test_a_node_has_gauges_in_base_units(
    store: Store,
    settings: Settings,
    registry: NodeRegistry,
    log: ObservationLog,
    allocator: ResourceAllocator,
    clock: FakeClock,
) -> None:
    register(registry, "gw-7", name="Gateway 7", location={"zone": "eu-1a", "site": "plant-2"}, node_type="gateway")
    now = clock.advance(1)
    sample = make_sample(
        50.0,
        filesystems=[
            make_filesystem("/", 40.0),
            make_filesystem("/data", 90.0),
            make_filesystem("/mnt/image", 100.0, read_only=True),
        ],
    )
    seen = (("facts", make_facts()), ("sample", sample), ("report", make_report()))
    log.record([observe(kind, data, now) for kind, data in seen])
    allocator.allocate("gw-7", make_request(resources={"cpu_millicores": 1500, "memory_mib": 1024}))

    found = scrape(store, settings, clock)

    assert found.value("node_manager_node_cpu_used_ratio", node_id="gw-7") == 0.5
    assert found.value("node_manager_node_memory_used_ratio", node_id="gw-7") == pytest.approx(0.3)
    assert found.value("node_manager_node_disk_used_ratio", node_id="gw-7") == 0.9
    assert found.value("node_manager_node_up", node_id="gw-7") == 1
    assert found.value("node_manager_node_last_contact_timestamp_seconds", node_id="gw-7") == now.timestamp()
    books = {
        resource: found.value("node_manager_node_allocatable", resource=resource, unit=unit) for resource, unit in UNITS
    }
    assert books == {"cpu": 4.0, "memory": 4096 * 2**20, "disk": 30000 * 2**20, "network": 125e6}
    assert found.value("node_manager_node_allocated", resource="cpu") == 1.5
    assert found.value("node_manager_node_allocated", resource="memory") == 2**30
    info = {"name": "Gateway 7", "node_type": "gateway", "zone": "eu-1a", "site": "plant-2", "region": ""}
    assert found.value("node_manager_node_info", node_id="gw-7", **info) == 1
    state = {"status": "online", "health": "healthy", "admin": "active"}
    assert found.value("node_manager_node_state", node_id="gw-7", **state) == 1


UNITS = (("cpu", "core"), ("memory", "byte"), ("disk", "byte"), ("network", "byte_per_second"))


def test_only_device_classes_that_are_configured_become_labels(store: Store, clock: FakeClock) -> None:
    settings = make_settings(robot={"resources": {"gpu": 2}})
    registry, allocator = NodeRegistry(store, settings, clock), ResourceAllocator(store, settings, clock)
    register(registry, "gw-7", node_type="robot", capacity={"memory_mib": 100, "gpu": 2, "lidar": 1})
    allocator.allocate("gw-7", make_request(resources={"gpu": {"count": 1, "share_milli": 250}}))

    found = scrape(store, settings, clock)

    assert found.label("node_manager_node_allocatable", "resource") == {"memory", "gpu"}
    assert found.value("node_manager_node_allocatable", resource="gpu", unit="unit") == 2
    assert found.value("node_manager_node_allocated", resource="gpu", unit="unit") == 0.25


def test_what_is_stale_is_left_out_and_when_it_was_seen_is_not(
    store: Store, settings: Settings, registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    register(registry, "gw-7", "gw-8")
    log.record([observe("sample", make_sample(), clock.advance(1))])
    clock.advance(settings.configuration.monitoring.stale_after_seconds + 1)

    found = scrape(store, settings, clock)

    assert found.values("node_manager_node_cpu_used_ratio") == []
    assert len(found.values("node_manager_node_sample_timestamp_seconds")) == 1
    assert len(found.values("node_manager_node_up")) == 2


@pytest.mark.parametrize("metrics", [{}, {"per_node": False}], ids=["gauges_of_nodes", "counts_only"])
def test_nodes_whose_disk_is_nearly_full_are_counted(
    store: Store, registry: NodeRegistry, log: ObservationLog, clock: FakeClock, metrics: dict[str, Any]
) -> None:
    settings = make_settings({"metrics": metrics})
    full, image = make_filesystem("/data", 90.1), make_filesystem("/image", 100.0, read_only=True)
    disks = {
        "a": [make_filesystem("/", 10.0), full],
        "b": [make_filesystem("/", 90.0), image],
        "c": None,
        "relieved": [make_filesystem("/", 50.0)],
        "stale": [full],
        "unseen": [],
    }
    register(registry, *disks)
    now = clock.advance(1)
    log.record([observe("sample", make_sample(filesystems=[full]), now, node_id) for node_id in ("relieved", "stale")])
    now = clock.advance(settings.configuration.monitoring.stale_after_seconds + 1)
    seen = ("a", "b", "c", "relieved")
    log.record([observe("sample", make_sample(filesystems=disks[node_id]), now, node_id) for node_id in seen])

    found = scrape(store, settings, clock)

    assert found.value("node_manager_disk_nearly_full_nodes") == 1
    if metrics == {}:
        own = {
            node_id
            for node_id in disks
            if [*found.values("node_manager_node_disk_used_ratio", node_id=node_id), 0][0] > 0.9
        }
        assert own == {"a"}


@pytest.mark.parametrize(
    ("metrics", "each"),
    [
        ({}, True),
        ({"max_nodes": 3}, True),
        ({"max_nodes": 2}, False),
        ({"per_node": False}, False),
        ({"max_nodes": 0}, False),
    ],
    ids=["default", "as_many", "too_many", "switched_off", "none"],
)
def test_gauges_of_nodes_can_be_switched_off_and_are_off_in_large_fleets(
    store: Store, registry: NodeRegistry, clock: FakeClock, metrics: dict[str, Any], each: bool
) -> None:
    register(registry, "a", "b", "c")

    found = scrape(store, make_settings({"metrics": metrics}), clock)

    assert bool(found.of_nodes()) is each
    assert found.value("node_manager_per_node_gauges") == each
    assert sum(found.values("node_manager_nodes")) == 3


def test_an_empty_store_has_its_gauges_too(store: Store, clock: FakeClock) -> None:
    found = scrape(store, make_settings(KAFKA), clock)

    assert (sum(found.values("node_manager_nodes")), found.value("node_manager_schedulable_nodes")) == (0, 0)
    assert found.value("node_manager_outbox_pending_events") == 0
    assert found.value("node_manager_outbox_oldest_pending_age_seconds") == 0
    assert found.value("node_manager_guard_state", scope="fleet", state="closed") == 1


def test_jobs_and_recoveries_are_counted(
    store: Store, settings: Settings, registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    register(registry, "a", "b")
    jobs = JobStore(store)
    jobs.submit(JobAction.CHECK, ["a"], "somebody", clock(), 10)
    jobs.submit(JobAction.GATHER, ["b"], "somebody", clock(), 10)
    jobs.claim_next("manager", clock(), lambda action: 60.0)
    recoveries = Recoveries(store, settings, clock)
    for node_id, dry_run in (("a", False), ("b", True)):
        with store.write() as connection:
            patient = read_patient(connection, settings, node_id)
            recoveries.begin(connection, patient, NewRecovery(["free_disk"], "somebody", dry_run=dry_run))
    with store.write() as connection:
        connection.execute(tables.lost_nodes.insert(), [_lost("a", None), _lost("b", clock())])

    found = scrape(store, settings, clock)

    assert found.value("node_manager_jobs", action="check", state="running") == 1
    assert found.value("node_manager_jobs", action="gather", state="queued") == 1
    assert (found.value("node_manager_job_queue_length"), found.value("node_manager_job_queue_limit")) == (1, 1000)
    assert found.value("node_manager_recoveries", state="running") == 1
    assert sum(found.values("node_manager_recoveries")) == 1
    assert (found.value("node_manager_lost_nodes"), found.value("node_manager_reclaimed_nodes")) == (2, 1)
    assert found.value("node_manager_node_lost", node_id="a") == 1


def test_a_lost_node_that_an_operator_has_in_hand_is_no_longer_told_of(
    store: Store, settings: Settings, registry: NodeRegistry, clock: FakeClock
) -> None:
    hands = {"a": Admin.ACTIVE, "b": Admin.CORDONED, "c": Admin.MAINTENANCE, "d": Admin.OFFLINE}
    register(registry, *hands)
    with store.write() as connection:
        connection.execute(tables.lost_nodes.insert(), [_lost(node_id, clock()) for node_id in hands])
    for node_id, admin in hands.items():
        registry.set_admin(node_id, admin, "it is on the bench")

    found = scrape(store, settings, clock)

    own = {node_id: found.value("node_manager_node_lost", node_id=node_id) for node_id in hands}
    assert own == {"a": 1, "b": 1, "c": 0, "d": 0}
    assert (found.value("node_manager_lost_nodes"), found.value("node_manager_reclaimed_nodes")) == (2, 2)


def test_guards_are_told_of_up_to_a_number_of_zones(
    store: Store, settings: Settings, registry: NodeRegistry, clock: FakeClock
) -> None:
    for number in range(MAX_ZONES + 5):
        register(registry, f"gw-{number}", location={"zone": f"z-{number:03}"})
    with store.write() as connection:
        rows = [("zone:z-054", GuardState.OPEN), ("zone:gone", GuardState.HALF_OPEN), ("fleet", GuardState.CLOSED)]
        connection.execute(tables.guards.insert(), [_guard(scope, state, clock()) for scope, state in rows])

    found = scrape(store, settings, clock)

    scopes = found.label("node_manager_guard_state", "scope")
    assert (len(scopes), found.value("node_manager_scopes_left_out")) == (MAX_ZONES + 1, 6)
    # The open ones are among them although they are last by name.
    assert found.value("node_manager_guard_state", scope="zone:z-054", state="open") == 1
    assert found.value("node_manager_guard_state", scope="zone:gone", state="half_open") == 1
    assert found.value("node_manager_scope_nodes", scope="fleet") == MAX_ZONES + 5
    assert found.label("node_manager_scope_unhealthy_nodes", "scope") == scopes


def test_series_of_a_large_fleet_are_bounded_whatever_nodes_say_of_themselves(
    store: Store, registry: NodeRegistry, clock: FakeClock
) -> None:
    settings = make_settings({**KAFKA, "metrics": {"max_nodes": 100}})
    for number in range(300):
        register(registry, f"gw-{number}", location={"zone": f"zone {number}"}, labels={f"k{number}": "v"})
    with store.write() as connection:
        names = sa.func.coalesce("type ", "") + tables.nodes.c.node_id
        connection.execute(sa.update(tables.nodes).values(node_type=names))

    found = scrape(store, settings, clock)

    assert sum(len(samples) for samples in found.samples.values()) < 1000


def test_what_waits_for_kafka_is_counted_from_its_position(
    store: Store, registry: NodeRegistry, clock: FakeClock
) -> None:
    register(registry, "a", "b", "c")
    clock.advance(90)
    settings = make_settings({"kafka": {**KAFKA["kafka"], "alarm_pending_events": 7}})
    newest = outbox.newest(store)

    before = scrape(store, settings, clock)
    with store.write() as connection:
        outbox.save_position(connection, outbox.KAFKA, newest, clock())
    after = scrape(store, settings, clock)

    assert before.value("node_manager_outbox_pending_events") == 3
    assert before.value("node_manager_outbox_oldest_pending_age_seconds") == 90
    assert before.value("node_manager_outbox_alarm_events") == 7
    assert after.value("node_manager_outbox_pending_events") == 0
    assert after.value("node_manager_outbox_oldest_pending_age_seconds") == 0


def test_events_that_were_forgotten_wait_no_more(store: Store, registry: NodeRegistry, clock: FakeClock) -> None:
    register(registry, "a", "b", "c")
    with store.write() as connection:
        connection.execute(tables.outbox.delete().where(tables.outbox.c.node_id != "c"))

    found = scrape(store, make_settings(KAFKA), clock)

    assert found.value("node_manager_outbox_pending_events") == 1


def test_without_kafka_nothing_waits_for_it(
    store: Store, settings: Settings, registry: NodeRegistry, clock: FakeClock
) -> None:
    register(registry, "a")

    found = scrape(store, settings, clock)

    assert [name for name in found.samples if "outbox" in name or "kafka" in name] == []


def test_hostile_names_are_escaped(store: Store, settings: Settings, registry: NodeRegistry, clock: FakeClock) -> None:
    name = 'a "b" \\ {c="d"} 1\N{GRINNING FACE}'
    register(registry, "gw-7", name=name, location={"zone": 'z"}\\'})

    found = scrape(store, settings, clock)

    assert found.value("node_manager_node_info", node_id="gw-7", name=name, zone='z"}\\') == 1
    assert found.value("node_manager_scope_nodes", scope='zone:z"}\\') == 1


class DeadStore(Store):
    """A store that doesn't answer."""

    def __init__(self) -> None:
        self.asked = 0

    def read(self) -> Any:
        """Fail."""
        self.asked += 1
        raise StoreUnavailableError("gone")


def test_a_dead_store_gives_what_is_known_without_it() -> None:
    settings = make_settings(KAFKA)

    found = scrape(DeadStore(), settings, FakeClock())

    assert found.value("node_manager_store_up") == 0
    assert found.value("process_start_time_seconds") > 0
    assert found.value("node_manager_kafka_up") == 0
    assert "node_manager_nodes" not in found.samples


OPEN_METRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


@pytest.mark.parametrize("forms", [("",), ("", OPEN_METRICS)], ids=["one_form", "two_forms"])
def test_scrapes_at_the_same_time_share_one_look(forms: tuple[str, ...]) -> None:
    dead, seconds = DeadStore(), Seconds()
    metrics = Metrics(dead, make_settings(), FakeClock(), seconds)

    for now in (0.0, 0.5, 0.99, 1.0, 1.5):
        seconds.now = now
        for form in forms:
            metrics.exposition(form)

    assert dead.asked == 2


def test_a_look_that_takes_long_is_shared_from_its_end_on() -> None:
    seconds = Seconds()

    class SlowStore(DeadStore):
        def read(self) -> Any:
            seconds.now += 3
            return super().read()

    slow = SlowStore()
    metrics = Metrics(slow, make_settings(), FakeClock(), seconds)

    for _ in range(3):
        metrics.exposition("")
        seconds.now += 0.3

    assert slow.asked == 1


def test_a_scrape_that_must_not_ask_the_store_does_not() -> None:
    dead = DeadStore()

    body, _ = Metrics(dead, make_settings(), FakeClock()).exposition("", asks_store=False)

    assert (dead.asked, read(body.decode()).value("node_manager_store_up")) == (0, 0)


def test_each_form_is_what_was_asked_for(store: Store, settings: Settings, clock: FakeClock) -> None:
    metrics = Metrics(store, settings, clock)

    plain, plain_type = metrics.exposition("")
    opened, open_type = metrics.exposition(OPEN_METRICS)
    _, again_type = metrics.exposition("text/html,*/*")

    assert (plain_type.partition(";")[0], again_type) == ("text/plain", plain_type)
    assert open_type.partition(";")[0] == "application/openmetrics-text"
    assert opened.endswith(b"# EOF\n")
    assert not plain.endswith(b"# EOF\n")


def test_a_look_that_hangs_leaves_what_is_known_without_it(
    store: Store, settings: Settings, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()
    original = metrics_of_state.read

    def hang(*arguments: Any) -> Any:
        reading.set()
        assert go_on.wait(30)
        return original(*arguments)

    monkeypatch.setattr(metrics_of_state, "read", hang)
    monkeypatch.setattr("node_manager.metrics._WAIT_SECONDS", 0.05)
    metrics = Metrics(store, settings, clock)

    try:
        hung = [read(metrics.exposition(form)[0].decode()) for form in ("", "", "text/html")]
    finally:
        assert reading.is_set()
        go_on.set()

    assert [found.value("node_manager_store_up") for found in hung] == [0, 0, 0]
    assert [found.value("process_start_time_seconds") > 0 for found in hung] == [True] * 3
    assert [name for name in hung[0].samples if name == "node_manager_nodes"] == []
    wait_until(lambda: b"node_manager_store_up 1.0" in metrics.exposition("")[0])


def test_a_look_that_stumbles_is_told_and_not_kept(
    store: Store, settings: Settings, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(store, settings, clock)
    with monkeypatch.context() as patched:
        patched.setattr(metrics_of_state, "read", lambda *_arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            metrics.exposition("")

    assert b"node_manager_store_up 1.0" in metrics.exposition("")[0]


def test_what_the_manager_does_itself_is_told_too(
    store: Store, settings: Settings, clock: FakeClock, log: ObservationLog
) -> None:
    recorder = Recorder(log)
    monitor = ResourceMonitor(store, settings, recorder, clock)
    metrics = Metrics(store, settings, clock).watching(monitor, recorder, lambda: True)
    for _ in range(3):
        recorder.put(observe("sample", make_sample()))
    recorder.given_up = 5

    found = read(metrics.exposition("")[0].decode())

    assert found.value("node_manager_recorder_waiting_observations") == 3
    assert found.value("node_manager_recorder_given_up_observations_total") == 5
    assert found.value("node_manager_leads") == 1
    assert (found.value("node_manager_watching"), found.value("node_manager_streams_open")) == (0, 0)
    assert found.label("node_manager_watched_nodes", "state") == {
        "streaming", "opening", "left_to_ansible", "suspect", "unreachable", "path_lost", "asleep",
    }  # fmt: skip


def test_a_store_that_takes_no_writes_is_up_and_nobody_leads(
    store: Store, settings: Settings, clock: FakeClock, log: ObservationLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node_manager.scheduler.LEASE_SECONDS", 0.2)
    recorder = Recorder(log)
    queue = JobQueue(store, settings, clock, "one", runner=FakeRunner(settings))
    scheduler = Scheduler(store, settings, queue, clock, "one")
    monitor = ResourceMonitor(store, settings, recorder, clock)
    metrics = Metrics(store, settings, clock).watching(monitor, recorder, scheduler.leads)
    scheduler.round()
    before = read(metrics.exposition("")[0].decode())

    def refuse() -> Any:
        raise StoreUnavailableError("database or disk is full")

    monkeypatch.setattr(store, "write", refuse)
    clock.advance(10)
    with pytest.raises(StoreUnavailableError):
        scheduler.round()
    wait_until(lambda: not scheduler.leads())
    found = read(metrics.exposition("")[0].decode())

    assert (before.value("node_manager_leads"), before.value("node_manager_store_up")) == (1, 1)
    assert (found.value("node_manager_leads"), found.value("node_manager_store_up")) == (0, 1)


def test_parts_tell_how_long_they_took(store: Store, settings: Settings, clock: FakeClock) -> None:
    metrics = Metrics(store, settings, clock)
    registry = NodeRegistry(store, settings, clock)
    log = ObservationLog(store, settings, clock, metrics.timings)
    allocator = ResourceAllocator(store, settings, clock, metrics.timings)
    register(registry, "gw-7", capacity={"memory_mib": 10})
    log.record(
        [observe("sample", make_sample(), clock.advance(1)), observe("sample", {"no": "sample"}, node_id="gw-8")]
    )
    log.record([observe("sample", make_sample(), node_id="No Node")])
    allocator.allocate("gw-7", make_request())
    with pytest.raises(Exception, match="lacks memory_mib"):
        allocator.allocate("gw-7", make_request("a2"))

    found = read(metrics.exposition("")[0].decode())

    assert found.value("node_manager_allocation_duration_seconds_count") == 2
    assert found.value("node_manager_recording_duration_seconds_count") == 1
    assert found.value("node_manager_observations_total", outcome="recorded") == 1
    assert found.value("node_manager_observations_total", outcome="rejected") == 2


def _is(node_id: str) -> sa.ColumnElement[bool]:
    return tables.node_states.c.node_id == node_id


def _lost(node_id: str, reclaimed_at: datetime | None) -> dict[str, Any]:
    return {"node_id": node_id, "lost_at": START, "reclaim_at": START, "reclaimed_at": reclaimed_at}


def _guard(scope: str, state: GuardState, since: datetime) -> dict[str, Any]:
    return {"scope": scope, "state": state.value, "since": since, "document": {"state": state.value}}
