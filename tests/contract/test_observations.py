# SPDX-License-Identifier: GPL-3.0-or-later
"""What the one door promises about things seen on nodes, on either engine."""

from __future__ import annotations

import json
import threading
import time
from datetime import datetime, timedelta
from itertools import pairwise
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
    make_host_key,
    make_report,
    make_sample,
    make_settings,
    observe,
    seconds,
)
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from node_manager.domain import Admin, ConditionType, ContactReason, Evidence, Health, Severity
from node_manager.events import EventType
from node_manager.health_checker import Return
from node_manager.node_registry import NodeRegistry
from node_manager.observations import Observation, ObservationLog, Outcome
from node_manager.samples import history, newest_report, newest_sample, prune
from node_manager.shapes import Sample
from node_manager.store import Store, tables
from stored import Rows

QUICK = hypothesis_settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
JINJA = "{{ lookup('pipe', 'touch /tmp/owned') }}"


@pytest.fixture(autouse=True)
def _gateway(registry: NodeRegistry, clock: FakeClock) -> None:
    """Register gw-7 an hour ago."""
    registry.register(make_declaration())
    clock.advance(3600)


def counts(outcome: Outcome) -> tuple[int, int, list[tuple[int, str]]]:
    """Give what was recorded, late and rejected."""
    return outcome.recorded, outcome.late, [(rejection.index, rejection.code) for rejection in outcome.rejected]


# what is kept


def test_record_keeps_the_newest_of_each_kind(registry: NodeRegistry, log: ObservationLog, store: Store) -> None:
    batch = [
        observe("facts", make_facts(), START),
        observe("sample", make_sample(42.0), START + seconds(1)),
        observe("report", make_report(), START + seconds(2)),
    ]

    outcome = log.record(batch)

    sample, report = newest_sample(store, "gw-7"), newest_report(store, "gw-7")
    assert counts(outcome) == (3, 0, [])
    assert registry.get("gw-7").facts == make_facts()
    assert sample is not None
    assert Sample.model_validate(sample.data) == Sample.model_validate(make_sample(42.0))
    assert (sample.observed_at, sample.source) == (START + seconds(1), "ansible")
    assert report is not None
    assert report.data == make_report()


def test_record_of_nothing_does_nothing(log: ObservationLog, rows: Rows) -> None:
    before = rows.everything()

    outcome = log.record([])

    assert counts(outcome) == (0, 0, [])
    assert rows.everything() == before


def test_record_keeps_jinja_verbatim(registry: NodeRegistry, log: ObservationLog) -> None:
    log.record([observe("facts", make_facts(hostname=JINJA, features=[JINJA]))])

    facts = registry.get("gw-7").facts
    assert facts is not None
    assert (facts["hostname"], facts["features"]) == (JINJA, [JINJA])


def test_record_recognises_the_type(registry: NodeRegistry, log: ObservationLog) -> None:
    log.record([observe("facts", make_facts(memory_total_bytes=2**34))])

    node = registry.get("gw-7")
    assert (node.declared_type, node.recognised_type, node.node_type) == (None, "server", "server")


def test_record_drops_what_a_newer_probe_adds(log: ObservationLog, store: Store) -> None:
    log.record([observe("sample", make_sample(novelty={"x": 1}))])

    sample = newest_sample(store, "gw-7")
    assert sample is not None
    assert "novelty" not in sample.data


def test_record_takes_a_batch_in_the_order_of_time(log: ObservationLog, store: Store) -> None:
    outcome = log.record(
        [observe("sample", make_sample(20.0), START + seconds(2)), observe("sample", make_sample(10.0), START)]
    )

    sample = newest_sample(store, "gw-7")
    assert counts(outcome) == (2, 0, [])
    assert sample is not None
    assert sample.data["cpu"]["use_percent"] == 20.0


# late and replayed


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("facts", make_facts(hostname="older")),
        ("sample", make_sample(99.0)),
        ("report", make_report(("critical", "failed"))),
        ("contact", make_contact()),
    ],
    ids=["facts", "sample", "report", "contact"],
)
def test_record_of_something_late_changes_nothing(
    log: ObservationLog, rows: Rows, kind: str, data: dict[str, Any]
) -> None:
    log.record([observe("facts", make_facts()), observe("sample", make_sample()), observe("report", make_report())])
    before = rows.everything()

    outcome = log.record([observe(kind, data, START - seconds(1))])

    assert counts(outcome) == (0, 1, [])
    assert rows.everything() == before


observations = st.builds(
    lambda offset, what: observe(what[0], what[1], START + timedelta(milliseconds=offset)),
    st.integers(-120_000, 0),
    st.sampled_from(
        [
            ("facts", make_facts()),
            ("facts", make_facts(memory_total_bytes=2**34, ssh_host_keys=[make_host_key()])),
            ("sample", make_sample(10.0)),
            ("sample", make_sample(90.0)),
            ("report", make_report()),
            ("report", make_report(("critical", "failed"))),
            ("report", make_report(("warning", "failed"))),
            ("sample", {"schema": 1}),
            *(("contact", make_contact(reason)) for reason in ContactReason),
        ]
    ),
)
batches = st.lists(st.lists(observations, min_size=1, max_size=5), min_size=1, max_size=5)


@QUICK
@given(batches=batches)
def test_record_replayed_changes_nothing(
    registry: NodeRegistry, log: ObservationLog, rows: Rows, batches: list[list[Observation]]
) -> None:
    registry.deregister("gw-7")
    registry.register(make_declaration())
    for batch in batches:
        log.record(batch)
    before = rows.everything()

    for batch in batches:
        log.record(batch)

    assert rows.everything() == before


@QUICK
@given(batches=batches)
def test_record_never_changes_what_is_declared(
    registry: NodeRegistry, log: ObservationLog, rows: Rows, batches: list[list[Observation]]
) -> None:
    registry.deregister("gw-7")
    registry.register(make_declaration(labels={"a": "1"}, node_type="gateway", host_keys=[make_host_key(9)]))
    declared = (tables.nodes, tables.node_labels, tables.host_keys)
    before = [rows.of(table) for table in declared]

    for batch in batches:
        log.record(batch)

    assert [rows.of(table) for table in declared] == before


@QUICK
@given(batches=batches)
def test_record_tells_of_each_change_of_health_once(
    registry: NodeRegistry, log: ObservationLog, rows: Rows, batches: list[list[Observation]]
) -> None:
    registry.deregister("gw-7")
    registry.register(make_declaration())
    told = len(rows.events(EventType.HEALTH_CHANGED))

    for batch in batches:
        log.record(batch)

    changes = [(row["data"]["from"], row["data"]["to"]) for row in rows.events(EventType.HEALTH_CHANGED)[told:]]
    path = [Health.UNKNOWN.value, *(to for _, to in changes)]
    assert changes == list(pairwise(path))
    assert all(before != after for before, after in changes)
    assert path[-1] == registry.get("gw-7").state.health.value


def test_record_counts_a_replay_as_late(log: ObservationLog) -> None:
    batch = [observe("facts", make_facts()), observe("sample", make_sample(), START + seconds(1))]
    log.record(batch)

    assert counts(log.record(batch)) == (0, 2, [])


def test_record_of_a_report_that_a_sample_has_overtaken_still_judges_the_checks(
    registry: NodeRegistry, log: ObservationLog
) -> None:
    log.record([observe("sample", make_sample(), START)])

    log.record([observe("report", make_report(), START - seconds(1))])

    state = registry.get("gw-7").state
    assert (state.health, state.last_contact_at) == (Health.HEALTHY, START)


# rejected


def test_record_rejects_an_unknown_node_and_takes_the_rest(log: ObservationLog, store: Store) -> None:
    outcome = log.record(
        [
            observe("sample", make_sample(), node_id="nobody"),
            observe("sample", make_sample()),
            observe("sample", {}, node_id="nobody"),
        ]
    )

    assert counts(outcome) == (1, 0, [(0, "node_not_found"), (2, "unusable")])
    assert newest_sample(store, "gw-7") is not None


@pytest.mark.parametrize(
    "node_id", ["", "gw-7\x00", "\ud800", "../../etc", "x" * 300_000], ids=["empty", "nul", "surrogate", "path", "huge"]
)
def test_record_rejects_an_impossible_node_and_takes_the_rest(log: ObservationLog, node_id: str) -> None:
    outcome = log.record([observe("sample", make_sample(), node_id=node_id), observe("sample", make_sample())])

    assert counts(outcome) == (1, 0, [(0, "node_not_found")])
    assert len(outcome.rejected[0].message) < 4096


def nested(depth: int) -> Any:
    """Give a list in a list in a list."""
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "data",
    [
        {},
        None,
        [],
        "text",
        b"\xff\xfe",
        nested(50_000),
        {"schema": 2},
        make_sample() | {"schema": 2},
        make_sample(101.0),
        make_sample(-1.0),
        make_sample(filesystems=nested(100)),
        make_sample(filesystems=[make_filesystem("/", float("nan"))]),
        make_sample(filesystems=[make_filesystem("/" + "m" * 4000, 1.0) for _ in range(1000)]),
        make_sample(errors=["x" * 50_000] * 1000),
        make_sample(memory={"total_bytes": 10**400}),
        make_sample(cpu={"\ud800": "\x00"}),
    ],
    ids=[
        "empty",
        "nothing",
        "list",
        "text",
        "bytes",
        "deep",
        "only-a-schema",
        "later-schema",
        "above-100",
        "negative",
        "deep-inside",
        "nan-inside",
        "4-mb",
        "50-mb",
        "huge-number",
        "surrogate-and-nul",
    ],
)
def test_record_of_unusable_data_is_a_condition_of_the_node(
    registry: NodeRegistry, log: ObservationLog, rows: Rows, data: Any
) -> None:
    outcome = log.record([observe("sample", data)])

    state = registry.get("gw-7").state
    condition = state.condition(ConditionType.PROBE_WORKING)
    assert counts(outcome) == (0, 0, [(0, "unusable")])
    assert condition is not None
    assert (condition.status, condition.reason) == (False, ContactReason.OUTPUT_UNUSABLE.value)
    assert (state.health, state.last_contact_at) == (Health.DEGRADED, START)
    assert rows.of(tables.node_samples) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400], ids=["nan", "infinity", "huge"])
def test_record_takes_no_number_for_what_is_none(log: ObservationLog, store: Store, value: float) -> None:
    outcome = log.record([observe("sample", make_sample(value))])

    sample = newest_sample(store, "gw-7")
    assert counts(outcome) == (1, 0, [])
    assert sample is not None
    assert sample.data["cpu"]["use_percent"] is None


def test_record_takes_the_usable_nodes_of_a_batch_with_an_unusable_one(
    registry: NodeRegistry, log: ObservationLog, store: Store
) -> None:
    registry.register(make_declaration("other"))

    outcome = log.record(
        [observe("sample", {"x": "y" * 50_000_000}), observe("sample", make_sample(), node_id="other")]
    )

    assert counts(outcome) == (1, 0, [(0, "unusable")])
    assert newest_sample(store, "other") is not None


def test_record_of_something_late_and_unusable_counts_it_once(log: ObservationLog) -> None:
    log.record([observe("sample", make_sample())])

    outcome = log.record([observe("sample", {}, START - seconds(1))])

    assert counts(outcome) == (0, 0, [(0, "unusable")])


@pytest.mark.parametrize(
    "data",
    [
        {"reached": False, "reason": "Sulking", "message": ""},
        {"reached": True, "reason": "TimedOut", "message": ""},
        {"reached": False, "reason": "Ok", "message": ""},
        {},
    ],
    ids=["unknown-reason", "reached-yet-failed", "failed-yet-ok", "empty"],
)
def test_record_blames_no_node_for_an_unusable_contact(log: ObservationLog, rows: Rows, data: dict[str, Any]) -> None:
    before = rows.everything()

    outcome = log.record([observe("contact", data)])

    assert counts(outcome) == (0, 0, [(0, "unusable")])
    assert rows.everything() == before


@pytest.mark.parametrize(
    "source", ["", "s" * 5000, "\x00", "\ud800", JINJA], ids=["empty", "long", "nul", "lone", "jinja"]
)
def test_record_caps_the_name_of_the_source(log: ObservationLog, store: Store, source: str) -> None:
    outcome = log.record([observe("sample", make_sample(), source=source)])

    sample = newest_sample(store, "gw-7")
    assert counts(outcome) == (1, 0, [])
    assert sample is not None
    assert len(sample.source) <= 64


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@QUICK
@given(
    kind=st.sampled_from(["facts", "sample", "report", "contact"]),
    changes=st.dictionaries(
        st.sampled_from([*make_facts(), *make_sample(), *make_report(), *make_contact()]), json_values, max_size=3
    ),
)
def test_record_of_anything_is_counted_exactly_once(log: ObservationLog, kind: str, changes: dict[str, Any]) -> None:
    whole = {"facts": make_facts, "sample": make_sample, "report": make_report, "contact": make_contact}[kind]()

    outcome = log.record([observe(kind, {**whole, **changes})])

    assert outcome.recorded + outcome.late + len(outcome.rejected) == 1


# one transaction


def test_record_that_fails_half_way_leaves_nothing(
    registry: NodeRegistry, log: ObservationLog, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(make_declaration("other"))
    before = rows.everything()

    @sa.event.listens_for(sa.Engine, "before_cursor_execute")
    def fail_at_the_history(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("INSERT INTO sample_history"):
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            log.record(
                [
                    observe("facts", make_facts(ssh_host_keys=[make_host_key()])),
                    observe("report", make_report(), node_id="other"),
                    observe("sample", make_sample()),
                ]
            )
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", fail_at_the_history)

    assert rows.everything() == before


@pytest.mark.postgresql
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_record_that_waits_for_another_batch_does_not_overwrite_what_is_newer(
    registry: NodeRegistry, log: ObservationLog, store: Store
) -> None:
    outcomes: list[Outcome] = []
    late = threading.Thread(target=lambda: outcomes.append(log.record([observe("sample", make_sample(1.0), START)])))

    with store.write() as connection:
        connection.execute(sa.select(tables.node_states).with_for_update()).all()
        late.start()
        wait_until_blocked(store)
        values = {"observed_at": START + seconds(1), "source": "stream", "sample": make_sample(2.0)}
        connection.execute(tables.node_samples.insert(), {"node_id": "gw-7", **values})
    late.join(10)

    sample = newest_sample(store, "gw-7")
    assert [counts(outcome) for outcome in outcomes] == [(0, 1, [])]
    assert sample is not None
    assert sample.source == "stream"


def wait_until_blocked(store: Store) -> None:
    """Wait until some backend waits for a lock."""
    waiting = sa.text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with store.read() as connection:
            if connection.scalar(waiting):
                return
        threading.Event().wait(0.005)
    pytest.fail("nothing waits for a lock")


def test_record_of_many_threads_loses_no_sample(log: ObservationLog, store: Store) -> None:
    def watch(first: int) -> None:
        for number in range(first, 40, 4):
            log.record([observe("sample", make_sample(), START + timedelta(milliseconds=number))])

    threads = [threading.Thread(target=watch, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    sample = newest_sample(store, "gw-7")
    assert sample is not None
    assert sample.observed_at == START + timedelta(milliseconds=39)


# health


def test_record_of_a_failed_check_changes_health_and_tells_why(
    registry: NodeRegistry, log: ObservationLog, rows: Rows
) -> None:
    log.record([observe("report", make_report(("critical", "failed")), source="stream")])

    assert registry.get("gw-7").state.health is Health.DEGRADED
    assert [(row["occurred_at"], row["data"]) for row in rows.events(EventType.HEALTH_CHANGED)] == [
        (
            START,
            {
                "from": "unknown",
                "to": "degraded",
                "cause": "CriticalCheckFailed: check-0: it failed",
                "source": "stream",
            },
        )
    ]


def test_record_of_a_manager_fault_changes_nothing(log: ObservationLog, rows: Rows) -> None:
    log.record([observe("report", make_report())])
    before = rows.everything()

    log.record([observe("contact", make_contact(ContactReason.MANAGER_FAULT), START + seconds(1))])

    assert rows.everything() == before


def test_record_in_maintenance_keeps_the_health_and_what_was_seen(
    registry: NodeRegistry, log: ObservationLog, rows: Rows
) -> None:
    log.record([observe("report", make_report())])
    registry.set_admin("gw-7", Admin.MAINTENANCE, "fan")
    before = len(rows.events())

    log.record([observe("report", make_report(("critical", "failed")), START + seconds(1))])
    log.record([observe("contact", make_contact(), START + seconds(60 * n)) for n in range(1, 5)])

    state = registry.get("gw-7").state
    assert (state.health, state.failures) == (Health.HEALTHY, 4)
    assert len(rows.events()) == before


def test_record_after_maintenance_trusts_no_health_of_before(
    registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    log.record([observe("report", make_report())])
    registry.set_admin("gw-7", Admin.MAINTENANCE, "fan")
    log.record([observe("report", make_report(("critical", "failed")), START + seconds(1))])
    registry.set_admin("gw-7", Admin.ACTIVE, "done")
    schedulable = registry.get("gw-7").schedulable(START + seconds(1), seconds(180))

    log.record([observe("sample", make_sample(), START + seconds(2))])

    assert not schedulable
    assert registry.get("gw-7").state.health is Health.DEGRADED


def test_record_of_something_from_the_future_does_not_shut_out_what_follows(
    log: ObservationLog, store: Store, clock: FakeClock
) -> None:
    log.record([observe("sample", make_sample(1.0), clock.now + timedelta(days=365))])
    clock.advance(6)

    outcome = log.record([observe("sample", make_sample(2.0), clock.now)])

    sample = newest_sample(store, "gw-7")
    assert counts(outcome) == (1, 0, [])
    assert sample is not None
    assert sample.data["cpu"]["use_percent"] == 2.0


# what the manager concludes


def conclude(log: ObservationLog, at: datetime, liveness: str, **more: Any) -> Outcome:
    """Hand in what the manager concludes."""
    verdict = {"liveness": liveness, "reason": "TimedOut", "message": "two beats missed", **more}
    return log.record([observe("verdict", verdict, at, source="stream")], from_manager=True)


def test_record_takes_verdicts_from_the_manager_only(log: ObservationLog, rows: Rows) -> None:
    log.record([observe("report", make_report())])
    before = rows.everything()
    verdict = {"liveness": "unreachable", "reason": "TimedOut", "message": ""}

    outcome = log.record([observe("verdict", verdict, START + seconds(1))])

    assert counts(outcome) == (0, 0, [(0, "unusable")])
    assert rows.everything() == before


def test_record_of_a_verdict_is_stored_with_its_evidence_and_told(
    registry: NodeRegistry, log: ObservationLog, rows: Rows
) -> None:
    log.record([observe("report", make_report())])

    outcome = conclude(log, START + seconds(20), "unreachable", evidence="site_dark", frozen_seconds=60)

    state = registry.get("gw-7").state
    assert counts(outcome) == (1, 0, [])
    assert (state.health, state.evidence, state.frozen_until, state.flap_penalty, state.returning) == (
        Health.UNREACHABLE,
        Evidence.SITE_DARK,
        START + seconds(80),
        1000,
        Return(),
    )
    assert rows.events(EventType.HEALTH_CHANGED)[-1]["data"] == {
        "from": "healthy",
        "to": "unreachable",
        "cause": "TimedOut: two beats missed",
        "source": "stream",
    }


def test_record_of_a_verdict_that_a_sample_has_overtaken_is_late(registry: NodeRegistry, log: ObservationLog) -> None:
    log.record([observe("report", make_report()), observe("sample", make_sample(), START + seconds(30))])

    outcome = conclude(log, START + seconds(29), "suspect")

    assert counts(outcome) == (0, 1, [])
    assert registry.get("gw-7").state.health is Health.HEALTHY


def test_record_remembers_how_far_a_node_is_on_its_way_back(
    registry: NodeRegistry, log: ObservationLog, rows: Rows
) -> None:
    log.record([observe("report", make_report())])
    conclude(log, START + seconds(20), "unreachable")

    for kind, offset in [("sample", 60), ("report", 61), ("sample", 75), ("sample", 90)]:
        data = make_sample() if kind == "sample" else make_report()
        log.record([observe(kind, data, START + seconds(offset))])

    state = registry.get("gw-7").state
    assert [row["data"]["to"] for row in rows.events(EventType.HEALTH_CHANGED)] == [
        "healthy", "unreachable", "recovering", "healthy",
    ]  # fmt: skip
    assert (state.returning, state.probation_until) == (None, START + seconds(210))


def test_record_in_maintenance_takes_a_verdict_for_no_loss(registry: NodeRegistry, log: ObservationLog) -> None:
    log.record([observe("report", make_report())])
    registry.set_admin("gw-7", Admin.MAINTENANCE, "fan")

    conclude(log, START + seconds(20), "unreachable")

    state = registry.get("gw-7").state
    assert (state.health, state.flap_penalty) == (Health.HEALTHY, 0)


@pytest.mark.parametrize(("hour", "health"), [(6, Health.UNKNOWN), (18, Health.SUSPECT)], ids=["outside", "within"])
def test_record_of_a_silence_outside_the_contact_windows_is_no_failure(
    store: Store, registry: NodeRegistry, hour: int, health: Health
) -> None:
    windows = [{"start": "17:00", "end": "19:00"}]
    settings = make_settings(sleeper={"contact_windows": windows})
    NodeRegistry(store, settings, FakeClock()).register(make_declaration("s1", node_type="sleeper"))
    log = ObservationLog(store, settings, FakeClock(START + timedelta(days=2)))
    log.record([observe("report", make_report(), START, "s1")])

    log.record([observe("contact", make_contact(), START.replace(hour=hour) + timedelta(days=1), "s1")])

    assert registry.get("s1").state.health is health


def test_record_takes_samples_for_thresholds_and_not_the_checks_of_a_report(
    store: Store, registry: NodeRegistry, clock: FakeClock
) -> None:
    settings = make_settings({"thresholds": {"cpu_percent": {"warning": 80, "critical": 95}}})
    log = ObservationLog(store, settings, clock)
    passed = make_report()
    threshold = {**passed["checks"][0], "name": "cpu_percent", "kind": "threshold", "state": "failed"}
    log.record([observe("report", {**passed, "checks": [*passed["checks"], threshold]})])
    seen = [registry.get("gw-7").state.health]

    for number in range(3):
        log.record([observe("sample", make_sample(99.0), START + seconds(15 * (number + 1)))])
        seen.append(registry.get("gw-7").state.health)

    state = registry.get("gw-7").state
    condition = state.condition(ConditionType.CPU_SUFFICIENT)
    assert seen == [Health.HEALTHY, Health.HEALTHY, Health.HEALTHY, Health.DEGRADED]
    assert condition is not None
    assert (condition.status, condition.severity) == (False, Severity.CRITICAL)
    assert not state.quarantined
    assert not registry.get("gw-7").schedulable(START + seconds(46), seconds(180))


# a clock that was set


def test_record_goes_on_after_the_clock_was_set_back_by_a_day(
    registry: NodeRegistry, log: ObservationLog, store: Store, clock: FakeClock
) -> None:
    clock.advance(86_400)
    ahead = clock.now
    log.record([observe("report", make_report(), ahead), observe("sample", make_sample(1.0), ahead)])
    clock.advance(-86_400)

    outcome = log.record([observe("sample", make_sample(2.0), clock.now)])

    sample = newest_sample(store, "gw-7")
    assert counts(outcome) == (1, 0, [])
    assert sample is not None
    assert sample.data["cpu"]["use_percent"] == 2.0
    assert registry.get("gw-7").state.last_contact_at == clock.now
    assert registry.get("gw-7").state.health is Health.HEALTHY


def test_record_finds_a_lost_node_though_the_clock_was_set_back_by_a_day(
    registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    clock.advance(86_400)
    log.record([observe("report", make_report(), clock.now)])
    clock.advance(-86_400)

    for _ in range(5):
        log.record([observe("contact", make_contact(), clock.now)])
        clock.advance(60)

    assert registry.get("gw-7").state.health is Health.UNREACHABLE


def test_record_calls_nothing_lost_because_the_clock_was_set_forward_by_a_day(
    registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    log.record([observe("report", make_report(), clock.now)])
    clock.advance(86_400)

    log.record([observe("contact", make_contact(), clock.now)])

    assert registry.get("gw-7").state.health is Health.SUSPECT


# many at once, and as JSON


def register_as_long_ago(registry: NodeRegistry, clock: FakeClock, node_id: str) -> None:
    """Register a node as if it had been with gw-7."""
    clock.advance(-3600)
    registry.register(make_declaration(node_id))
    clock.advance(3600)


def test_record_of_json_is_that_of_what_it_says(
    log: ObservationLog, registry: NodeRegistry, rows: Rows, clock: FakeClock
) -> None:
    register_as_long_ago(registry, clock, "other")
    found = {}

    for node_id, data in [("gw-7", make_sample(novelty=1)), ("other", json.dumps(make_sample(novelty=1)).encode())]:
        log.record([observe("report", make_report(), START, node_id), observe("sample", data, START, node_id)])
        (state,) = (row for row in rows.of(tables.node_states) if row["node_id"] == node_id)
        (sample,) = (row for row in rows.of(tables.node_samples) if row["node_id"] == node_id)
        found[node_id] = {**state, "revision": 0, "node_id": ""}, sample["sample"]

    assert found["gw-7"] == found["other"]


def test_record_of_a_large_batch_takes_few_statements(
    registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    node_ids = [f"n{number}" for number in range(50)]
    for node_id in node_ids:
        registry.register(make_declaration(node_id))
    log.record([observe("report", make_report(), clock.now, node_id) for node_id in node_ids])
    statements: list[str] = []

    def count(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", count)
    try:
        log.record([observe("sample", make_sample(), clock.advance(1), node_id) for node_id in node_ids])
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", count)

    assert len(statements) <= 12


def test_record_of_one_node_many_times_in_a_batch_is_as_one_by_one(
    registry: NodeRegistry, log: ObservationLog, rows: Rows, clock: FakeClock
) -> None:
    register_as_long_ago(registry, clock, "other")
    steps = [
        ("report", make_report()), ("sample", make_sample(1.0)), ("sample", make_sample(2.0)),
        ("contact", make_contact()), ("sample", make_sample(3.0)), ("report", make_report(("warning", "failed"))),
    ]  # fmt: skip

    log.record([observe(kind, data, START + seconds(number)) for number, (kind, data) in enumerate(steps)])
    for number, (kind, data) in enumerate(steps):
        log.record([observe(kind, data, START + seconds(number), "other")])

    one, other = ({**row, "node_id": "", "revision": 0} for row in rows.of(tables.node_states))
    assert one == other
    assert [(row["data"]["from"], row["data"]["to"]) for row in rows.events(EventType.HEALTH_CHANGED)][:4] == [
        ("unknown", "healthy"), ("healthy", "suspect"), ("suspect", "healthy"), ("healthy", "degraded"),
    ]  # fmt: skip


# history


def test_history_sums_each_minute(log: ObservationLog, store: Store) -> None:
    moments = [(0, 10.0), (20, 20.0), (40, 60.0), (60, 5.0)]
    log.record([observe("sample", make_sample(cpu), START + seconds(offset)) for offset, cpu in moments])

    minutes = history(store, "gw-7", START)

    assert [(minute.start, minute.samples) for minute in minutes] == [(START, 3), (START + seconds(60), 1)]
    assert (minutes[0].cpu_percent_average, minutes[0].cpu_percent_maximum) == (30.0, 60.0)
    assert (minutes[0].memory_percent_average, minutes[0].disk_percent_maximum) == (30.0, 40.0)
    assert minutes[0].received_bytes_per_second_average == 1200.0


def test_history_adds_up_over_batches(log: ObservationLog, store: Store) -> None:
    for offset, cpu in [(0, 10.0), (20, 20.0)]:
        log.record([observe("sample", make_sample(cpu), START + seconds(offset))])

    assert [(minute.samples, minute.cpu_percent_average) for minute in history(store, "gw-7", START)] == [(2, 15.0)]


def test_history_does_not_count_what_a_node_cannot_tell(log: ObservationLog, store: Store) -> None:
    unknown = {**make_sample(), "cpu": None}
    log.record([observe("sample", make_sample(20.0), START), observe("sample", unknown, START + seconds(20))])

    minutes = history(store, "gw-7", START)

    assert [(minute.samples, minute.cpu_percent_average, minute.cpu_percent_maximum) for minute in minutes] == [
        (2, 20.0, 20.0)
    ]


def test_history_starts_at_the_minute_asked_for(log: ObservationLog, store: Store) -> None:
    log.record([observe("sample", make_sample(), START + seconds(60 * n)) for n in range(3)])

    minutes = history(store, "gw-7", START + seconds(119))

    assert [minute.start for minute in minutes] == [START + seconds(60), START + seconds(120)]


def test_prune_forgets_what_is_older(log: ObservationLog, store: Store, rows: Rows) -> None:
    def age(at: datetime) -> None:
        log.record([observe("sample", make_sample(), at)])

    age(START - timedelta(days=8))
    age(START)
    told = len(rows.events())

    prune(store, START, timedelta(days=7))

    assert [minute.start for minute in history(store, "gw-7", START - timedelta(days=30))] == [START]
    assert len(rows.events()) == told
