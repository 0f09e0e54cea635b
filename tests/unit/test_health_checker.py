# SPDX-License-Identifier: GPL-3.0-or-later
"""How health follows from what was seen: single steps, and what holds whatever was seen."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from functools import reduce
from itertools import pairwise

import pytest
from builders import START, make_contact, make_report, seconds
from hypothesis import given
from hypothesis import strategies as st
from node_manager.domain import Admin, ConditionType, ContactReason, Evidence, Health, Liveness, Status
from node_manager.health_checker import (
    NodeState,
    Return,
    after_failure,
    after_report,
    after_success,
    after_verdict,
    derive_status,
    in_maintenance,
    is_schedulable,
    is_settled,
    new_state,
    penalty_at,
    without_future,
)
from node_manager.settings import HealthSettings
from node_manager.shapes import Contact, Report, Verdict

LIMITS = HealthSettings.model_validate({})
SILENCE = seconds(10)
SILENT = [
    ContactReason.CONNECTION_REFUSED,
    ContactReason.TIMED_OUT,
    ContactReason.NO_ROUTE,
    ContactReason.NAME_NOT_RESOLVED,
    ContactReason.CONNECTION_LOST,
]
BROKEN = {
    ContactReason.AUTHENTICATION_FAILED: ConditionType.AUTHENTICATED,
    ContactReason.HOST_KEY_CHANGED: ConditionType.HOST_KEY_TRUSTED,
    ContactReason.PYTHON_MISSING: ConditionType.PYTHON_AVAILABLE,
    ContactReason.MODULE_FAILED: ConditionType.PROBE_WORKING,
    ContactReason.OUTPUT_UNUSABLE: ConditionType.PROBE_WORKING,
}
STALE_AFTER = seconds(180)


def fail(state: NodeState, at: datetime, reason: ContactReason = ContactReason.TIMED_OUT) -> NodeState:
    """Let one contact fail."""
    return after_failure(state, Contact.model_validate(make_contact(reason)), at, LIMITS, SILENCE)


def report(state: NodeState, at: datetime, *checks: tuple[str, str]) -> NodeState:
    """Let one report come in; without checks, one that passes."""
    return after_report(state, Report.model_validate(make_report(*checks)), at, LIMITS)


def succeed(state: NodeState, at: datetime) -> NodeState:
    """Let a node answer."""
    return after_success(state, at, LIMITS)


def conclude(state: NodeState, at: datetime, liveness: str, **more: object) -> NodeState:
    """Let the manager conclude something."""
    verdict = {"liveness": liveness, "reason": "TimedOut", "message": "two beats missed", **more}
    return after_verdict(state, Verdict.model_validate(verdict), at, LIMITS)


def come_back(state: NodeState, at: datetime) -> NodeState:
    """Let a node prove that it is back; the last sample comes 31 seconds later."""
    state = report(succeed(state, at), at + seconds(1))
    return succeed(succeed(state, at + seconds(15)), at + seconds(31))


def broken_conditions(state: NodeState) -> list[ConditionType]:
    """List what is not well."""
    return [condition.type for condition in state.conditions if not condition.status]


@pytest.fixture
def healthy() -> NodeState:
    """Give a node whose checks passed at START."""
    return report(new_state(START - seconds(60)), START)


@pytest.fixture
def unreachable(healthy: NodeState) -> NodeState:
    """Give a node that was healthy and then silent three times."""
    return reduce(lambda state, at: fail(state, START + seconds(at)), (8, 9, 10), healthy)


# success and reports


def test_new_state_knows_nothing() -> None:
    assert new_state(START) == NodeState(Health.UNKNOWN, START, "not looked at yet")


def test_after_success_of_a_new_node_waits_for_checks() -> None:
    state = succeed(new_state(START), START + seconds(1))

    assert (state.health, state.health_cause) == (Health.UNKNOWN, "answers; waits for a full health check")
    assert (state.health_since, state.last_contact_at, state.last_attempt_at) == (
        START,
        START + seconds(1),
        START + seconds(1),
    )


def test_after_report_of_passing_checks_is_healthy(healthy: NodeState) -> None:
    assert (healthy.health, healthy.health_since, healthy.health_cause) == (Health.HEALTHY, START, "no check failed")
    assert broken_conditions(healthy) == []


@pytest.mark.parametrize(
    ("checks", "health", "cause"),
    [
        ([("critical", "failed")], Health.DEGRADED, "CriticalCheckFailed: check-0: it failed"),
        ([("warning", "failed")], Health.DEGRADED, "WarningCheckFailed: check-0: it failed"),
        ([("warning", "failed"), ("critical", "failed")], Health.DEGRADED, "CriticalCheckFailed: check-1: it failed"),
        ([("critical", "unknown")], Health.HEALTHY, "no check failed"),
        ([("critical", "passed"), ("warning", "unknown")], Health.HEALTHY, "no check failed"),
    ],
    ids=["critical", "warning", "both", "could-not-look", "passed-and-unknown"],
)
def test_after_report_weighs_failed_checks(checks: list[tuple[str, str]], health: Health, cause: str) -> None:
    state = report(new_state(START), START, *checks)

    assert (state.health, state.health_cause) == (health, cause)


@pytest.mark.parametrize(
    ("then", "health"),
    [
        ([("critical", "unknown"), ("critical", "passed")], Health.DEGRADED),
        ([("critical", "passed"), ("critical", "unknown")], Health.HEALTHY),
        ([("critical", "passed"), ("critical", "passed")], Health.HEALTHY),
    ],
    ids=["what-failed-is-unknown", "another-is-unknown", "all-passed"],
)
def test_after_report_a_check_that_failed_is_not_well_because_nobody_can_tell(
    healthy: NodeState, then: list[tuple[str, str]], health: Health
) -> None:
    broken = report(healthy, START + seconds(100), ("critical", "failed"), ("critical", "unknown"))

    after = report(broken, START + seconds(110), *then)

    assert (broken.health, after.health) == (Health.DEGRADED, health)
    if health is Health.DEGRADED:
        assert after.condition(ConditionType.CHECKS_PASSING) == broken.condition(ConditionType.CHECKS_PASSING)


def test_after_report_caps_what_it_keeps_of_messages() -> None:
    data = make_report(*[("critical", "failed")] * 100)
    for check in data["checks"]:
        check["message"] = "m" * 4000

    state = after_report(new_state(START), Report.model_validate(data), START, LIMITS)

    assert len(state.health_cause) <= 4000
    assert all(len(condition.message) <= 4000 for condition in state.conditions)


def test_after_report_keeps_the_time_since_when(healthy: NodeState) -> None:
    state = report(healthy, START + seconds(300))

    condition = state.condition(ConditionType.CHECKS_PASSING)
    assert state.health_since == START
    assert condition is not None
    assert condition.since == START


def test_after_report_overtaken_by_a_success_judges_the_checks(healthy: NodeState) -> None:
    state = succeed(healthy, START + seconds(10))

    state = report(state, START + seconds(9), ("critical", "failed"))

    assert (state.health, state.last_contact_at) == (Health.DEGRADED, START + seconds(10))


def test_after_report_overtaken_by_a_silence_leaves_the_node_suspect(healthy: NodeState) -> None:
    state = fail(healthy, START + seconds(10))

    state = report(state, START + seconds(9), ("critical", "failed"))

    assert (state.health, state.failures) == (Health.SUSPECT, 1)
    assert succeed(state, START + seconds(11)).health is Health.DEGRADED


def test_after_report_overtaken_by_unreachability_changes_nothing(unreachable: NodeState) -> None:
    assert report(unreachable, START + seconds(5)) == unreachable


# silence


@pytest.mark.parametrize("reason", SILENT)
def test_after_failure_by_silence_is_suspect_at_once(healthy: NodeState, reason: ContactReason) -> None:
    state = fail(healthy, START + seconds(60), reason)

    assert (state.health, state.failures, state.last_contact_at) == (Health.SUSPECT, 1, START)
    assert broken_conditions(state) == [ConditionType.REACHABLE]


@pytest.mark.parametrize(
    ("moments", "health"),
    [
        ([60], Health.SUSPECT),
        ([60, 61], Health.SUSPECT),
        ([60, 61, 62], Health.UNREACHABLE),
        ([1, 2, 3], Health.SUSPECT),
        ([1, 2, 3, 9.9], Health.SUSPECT),
        ([1, 2, 3, 10], Health.UNREACHABLE),
        ([8, 9, 10], Health.UNREACHABLE),
    ],
    ids=["one", "two", "three", "three-too-soon", "four-too-soon", "four-at-the-limit", "three-at-the-limit"],
)
def test_after_failure_needs_failures_and_silence(healthy: NodeState, moments: list[float], health: Health) -> None:
    state = reduce(lambda state, at: fail(state, START + seconds(at)), moments, healthy)

    assert state.health is health


def test_after_failure_of_a_node_never_seen_is_unreachable_at_once() -> None:
    assert fail(new_state(START), START + seconds(1)).health is Health.UNREACHABLE


def test_after_failure_counts_from_the_last_contact(healthy: NodeState) -> None:
    state = fail(fail(healthy, START + seconds(20)), START + seconds(21))
    state = succeed(state, START + seconds(22))

    state = fail(state, START + seconds(60))

    assert (state.health, state.failures) == (Health.SUSPECT, 1)


def test_after_failure_keeps_since_when_it_is_unreachable(unreachable: NodeState) -> None:
    state = fail(unreachable, START + seconds(500), ContactReason.NO_ROUTE)

    assert (state.health, state.health_since, state.failures) == (Health.UNREACHABLE, START + seconds(10), 4)


def test_after_success_of_a_suspect_is_what_it_was(healthy: NodeState) -> None:
    state = succeed(fail(healthy, START + seconds(60)), START + seconds(62))

    assert (state.health, broken_conditions(state)) == (Health.HEALTHY, [])


@pytest.mark.parametrize(
    "way_back",
    [
        lambda state: succeed(state, START + seconds(70)),
        lambda state: succeed(fail(succeed(state, START + seconds(70)), START + seconds(71)), START + seconds(72)),
        lambda state: succeed(
            fail(state, START + seconds(70), ContactReason.AUTHENTICATION_FAILED), START + seconds(71)
        ),
    ],
    ids=["at-once", "over-suspect", "over-a-refused-login"],
)
def test_after_success_of_an_unreachable_node_is_recovering(unreachable: NodeState, way_back: object) -> None:
    assert callable(way_back)

    state = way_back(unreachable)

    assert state.health is Health.RECOVERING
    assert state.health_cause.endswith("; waits for a full health check")


def test_after_success_while_recovering_says_what_is_missing(unreachable: NodeState) -> None:
    state = succeed(succeed(unreachable, START + seconds(60)), START + seconds(75))

    assert state.health_cause == "is back: 2 of 3 good samples over 15 of 30 s; waits for a full health check"


@pytest.mark.parametrize(
    ("samples", "checked", "health"),
    [
        ([0, 15, 30], True, Health.HEALTHY),
        ([0, 15, 30], False, Health.RECOVERING),
        ([0, 15, 29], True, Health.RECOVERING),
        ([0, 30], True, Health.RECOVERING),
        ([0, 1, 2, 30], True, Health.HEALTHY),
    ],
    ids=["through", "no-report", "too-soon", "too-few", "many"],
)
def test_after_success_lets_a_node_back_that_has_proven_itself(
    unreachable: NodeState, samples: list[float], checked: bool, health: Health
) -> None:
    state = succeed(unreachable, START + seconds(60 + samples[0]))
    if checked:
        state = report(state, START + seconds(60.5))

    state = reduce(lambda state, at: succeed(state, START + seconds(60 + at)), samples[1:], state)

    assert state.health is health


def test_after_report_that_was_the_last_thing_missing_lets_a_node_back(unreachable: NodeState) -> None:
    state = reduce(lambda state, at: succeed(state, START + seconds(at)), (60, 75, 90), unreachable)

    assert report(state, START + seconds(91), ("warning", "failed")).health is Health.DEGRADED


def test_after_report_from_before_the_return_does_not_count(unreachable: NodeState) -> None:
    state = reduce(lambda state, at: succeed(state, START + seconds(at)), (60, 75, 90), unreachable)

    assert report(state, START + seconds(59)) == state


def test_after_failure_while_recovering_begins_anew(unreachable: NodeState) -> None:
    state = report(succeed(unreachable, START + seconds(60)), START + seconds(61))

    state = reduce(lambda state, at: succeed(state, START + seconds(at)), (80, 91), fail(state, START + seconds(70)))

    assert (state.health, state.returning) == (Health.RECOVERING, Return(2, START + seconds(80)))


def test_after_success_of_one_that_is_back_begins_and_ends_its_probation(unreachable: NodeState) -> None:
    state = come_back(unreachable, START + seconds(60))
    during = succeed(state, START + seconds(200))
    after = succeed(state, START + seconds(211))

    assert state.probation_until == during.probation_until == START + seconds(60 + 31 + 120)
    assert after.probation_until is None


# losing a node again and again


def test_a_third_loss_in_short_time_is_flapping_until_the_penalty_has_decayed(healthy: NodeState) -> None:
    state, at = healthy, START
    seen = []
    for _ in range(3):
        state = reduce(lambda state, number: fail(state, at + seconds(20 + number)), range(3), state)
        at += seconds(60)
        state = come_back(state, at)
        seen.append(state.health)
        at += seconds(40)

    assert seen == [Health.HEALTHY, Health.HEALTHY, Health.FLAPPING]
    assert not is_schedulable(Admin.ACTIVE, state, at, STALE_AFTER)
    assert succeed(state, at + seconds(1200)).health is Health.FLAPPING
    calm = succeed(state, at + seconds(1800))
    assert calm.health is Health.HEALTHY
    assert calm.probation_until == at + seconds(1920)


def test_a_flapping_node_that_was_suspect_is_flapping_again(healthy: NodeState) -> None:
    state = replace(healthy, suppressed=True, flap_penalty=2500.0, flap_at=START)

    state = succeed(fail(succeed(state, START + seconds(1)), START + seconds(2)), START + seconds(3))

    assert state.health is Health.FLAPPING


def test_penalty_at_halves_with_its_half_life(unreachable: NodeState) -> None:
    assert penalty_at(unreachable, START + seconds(10), LIMITS) == 1000
    assert penalty_at(unreachable, START + seconds(910), LIMITS) == 500
    assert penalty_at(unreachable, START - seconds(86_400), LIMITS) == 1000


def test_after_failure_of_a_node_never_seen_costs_no_penalty() -> None:
    assert fail(new_state(START), START + seconds(1)).flap_penalty == 0


def test_in_maintenance_nothing_follows(healthy: NodeState) -> None:
    lost = conclude(fail(healthy, START + seconds(20)), START + seconds(30), "unreachable")

    state = in_maintenance(healthy, lost)

    assert (state.health, state.health_cause, state.flap_penalty, state.returning) == (
        Health.HEALTHY,
        "no check failed",
        0.0,
        None,
    )
    assert broken_conditions(state) == [ConditionType.REACHABLE]


# what the manager concludes


def test_after_verdict_suspect_is_suspect_with_its_cause(healthy: NodeState) -> None:
    state = conclude(healthy, START + seconds(8), "suspect")

    assert (state.health, state.health_cause) == (Health.SUSPECT, "TimedOut: two beats missed")
    assert broken_conditions(state) == [ConditionType.REACHABLE]
    assert succeed(state, START + seconds(9)).health is Health.HEALTHY


def test_after_verdict_suspect_of_an_unreachable_node_leaves_it_so(unreachable: NodeState) -> None:
    state = conclude(unreachable, START + seconds(60), "suspect")

    assert state == replace(unreachable, last_attempt_at=START + seconds(60))


def test_after_verdict_unreachable_tells_on_what_evidence_and_what_is_frozen(healthy: NodeState) -> None:
    state = conclude(healthy, START + seconds(20), "unreachable", evidence="site_dark", frozen_seconds=3600)

    assert (state.health, state.evidence, state.frozen_until) == (
        Health.UNREACHABLE,
        Evidence.SITE_DARK,
        START + seconds(3620),
    )
    assert broken_conditions(state) == [ConditionType.REACHABLE]
    again = conclude(state, START + seconds(60), "unreachable", evidence="peers_blind")
    assert (again.evidence, again.frozen_until, again.health_since, again.flap_penalty) == (
        Evidence.PEERS_BLIND,
        None,
        START + seconds(20),
        1000,
    )
    back = succeed(again, START + seconds(70))
    assert (back.evidence, back.frozen_until) == (None, None)


def test_after_verdict_path_lost_keeps_work_away_and_lets_it_live(healthy: NodeState) -> None:
    state = conclude(conclude(healthy, START + seconds(8), "suspect"), START + seconds(20), "path_lost")

    assert (state.health, broken_conditions(state)) == (Health.DEGRADED, [ConditionType.MANAGEMENT_PATH])
    assert not is_schedulable(Admin.ACTIVE, state, START + seconds(20), STALE_AFTER)
    silent = reduce(lambda state, at: fail(state, START + seconds(at)), (60, 120, 300), state)
    assert silent.health is Health.DEGRADED
    assert succeed(silent, START + seconds(301)).health is Health.HEALTHY


def test_after_verdict_asleep_is_no_failure(healthy: NodeState) -> None:
    state = conclude(conclude(healthy, START + seconds(8), "suspect"), START + seconds(20), "asleep")

    assert (state.health, state.health_cause, state.failures) == (Health.UNKNOWN, "two beats missed", 0)
    assert (broken_conditions(state), penalty_at(state, START + seconds(20), LIMITS)) == ([], 0)
    assert report(state, START + seconds(7)).health is Health.UNKNOWN
    assert succeed(state, START + seconds(3600)).health is Health.HEALTHY


def test_after_failure_of_one_that_sleeps_is_no_failure(healthy: NodeState) -> None:
    contact = Contact.model_validate(make_contact(ContactReason.NO_ROUTE))

    state = after_failure(healthy, contact, START + seconds(60), LIMITS, SILENCE, asleep=True)

    assert (state.health, state.failures, state.flap_penalty) == (Health.UNKNOWN, 0, 0)


# a clock that was set


def test_without_future_lets_nothing_wait_for_the_clock(healthy: NodeState) -> None:
    ahead = START + timedelta(days=1)
    state = conclude(report(healthy, ahead), ahead, "unreachable", evidence="site_dark", frozen_seconds=3600)

    mended = without_future(state, START, LIMITS)

    assert {mended.last_contact_at, mended.last_attempt_at, mended.health_since, mended.flap_at} == {START}
    assert mended.frozen_until == START + seconds(3600)


def test_is_settled_only_where_an_answer_changes_nothing_but_times(healthy: NodeState, unreachable: NodeState) -> None:
    assert is_settled(healthy)
    # A standing warning, too, is said again and again.
    assert is_settled(report(healthy, START + seconds(1), ("warning", "failed")))
    assert is_settled(succeed(new_state(START), START))
    assert not is_settled(new_state(START))
    assert not is_settled(fail(healthy, START + seconds(1)))
    assert not is_settled(come_back(unreachable, START + seconds(60)))


# what is broken, and whose fault it is


@pytest.mark.parametrize(("reason", "condition"), BROKEN.items(), ids=[reason.value for reason in BROKEN])
def test_after_failure_in_use_is_degraded_and_a_contact(
    healthy: NodeState, reason: ContactReason, condition: ConditionType
) -> None:
    state = fail(healthy, START + seconds(60), reason)

    assert (state.health, state.failures, state.last_contact_at) == (Health.DEGRADED, 0, START + seconds(60))
    assert broken_conditions(state) == [condition]
    assert state.health_cause == f"{reason.value}: it was {reason.value}"


@pytest.mark.parametrize("reason", BROKEN)
def test_after_failure_in_use_never_leads_to_unreachable(healthy: NodeState, reason: ContactReason) -> None:
    state = reduce(lambda state, n: fail(state, START + seconds(60 * n), reason), range(1, 20), healthy)

    assert state.health is Health.DEGRADED


def test_after_failure_proves_the_steps_before_it(unreachable: NodeState) -> None:
    state = fail(unreachable, START + seconds(60), ContactReason.PYTHON_MISSING)

    assert broken_conditions(state) == [ConditionType.PYTHON_AVAILABLE]


def test_after_failure_by_a_changed_key_is_quarantine_that_success_does_not_end(healthy: NodeState) -> None:
    state = succeed(fail(healthy, START + seconds(1), ContactReason.HOST_KEY_CHANGED), START + seconds(2))

    assert (state.health, state.quarantined) == (Health.HEALTHY, True)
    assert not is_schedulable(Admin.ACTIVE, state, START + seconds(2), STALE_AFTER)


def test_after_failure_of_the_manager_changes_nothing(healthy: NodeState, unreachable: NodeState) -> None:
    for state in (new_state(START), healthy, unreachable):
        assert fail(state, START + seconds(60), ContactReason.MANAGER_FAULT) == state


# status and schedulable


@pytest.mark.parametrize("health", Health)
@pytest.mark.parametrize("admin", Admin)
def test_derive_status_folds_both_axes(admin: Admin, health: Health) -> None:
    if admin is Admin.MAINTENANCE:
        expected = Status.MAINTENANCE
    elif admin is Admin.OFFLINE or health is Health.UNREACHABLE:
        expected = Status.OFFLINE
    else:
        expected = Status.ONLINE

    assert derive_status(admin, health) is expected


@pytest.mark.parametrize("admin", Admin)
def test_is_schedulable_only_where_active(healthy: NodeState, admin: Admin) -> None:
    assert is_schedulable(admin, healthy, START, STALE_AFTER) == (admin is Admin.ACTIVE)


@pytest.mark.parametrize(("age", "expected"), [(180, True), (180.001, False)], ids=["fresh", "stale"])
def test_is_schedulable_only_where_fresh(healthy: NodeState, age: float, expected: bool) -> None:
    assert is_schedulable(Admin.ACTIVE, healthy, START + seconds(age), STALE_AFTER) == expected


@pytest.mark.parametrize(("severity", "expected"), [("warning", True), ("critical", False)])
def test_is_schedulable_with_warnings_only(healthy: NodeState, severity: str, expected: bool) -> None:
    state = report(healthy, START + seconds(1), (severity, "failed"))

    assert is_schedulable(Admin.ACTIVE, state, START + seconds(1), STALE_AFTER) == expected


def test_is_schedulable_not_with_another_thing_broken(healthy: NodeState) -> None:
    state = fail(healthy, START + seconds(1), ContactReason.MODULE_FAILED)

    assert not is_schedulable(Admin.ACTIVE, state, START + seconds(1), STALE_AFTER)


def test_is_schedulable_not_with_a_health_that_maintenance_kept(healthy: NodeState) -> None:
    state = replace(report(healthy, START + seconds(1), ("critical", "failed")), health=Health.HEALTHY)

    assert not is_schedulable(Admin.ACTIVE, state, START + seconds(1), STALE_AFTER)


# whatever was seen


steps = st.lists(
    st.tuples(
        st.floats(0.001, 30),
        st.sampled_from(["success", "passed", "warning", "critical", *ContactReason, *Liveness]),
    ),
    max_size=30,
)


def walk(history: list[tuple[float, str]]) -> list[tuple[str, NodeState, datetime]]:
    """Go through a history; give each step with the state after it and its time."""
    state, at = new_state(START), START
    trace: list[tuple[str, NodeState, datetime]] = [("new", state, at)]
    for pause, what in history:
        at += seconds(pause)
        if what in {"warning", "critical"}:
            state = report(state, at, (what, "failed"))
        elif what == "passed":
            state = report(state, at)
        elif what in set(Liveness):
            state = conclude(state, at, what)
        elif what in {"success", ContactReason.OK}:
            state = succeed(state, at)
        else:
            state = fail(state, at, ContactReason(what))
        trace.append((what, state, at))
    return trace


@given(steps)
def test_unreachable_takes_failures_and_silence_unless_never_seen(history: list[tuple[float, str]]) -> None:
    for (_, before, _), (what, after, at) in pairwise(walk(history)):
        if after.health is Health.UNREACHABLE and before.health is not Health.UNREACHABLE:
            assert (
                what is Liveness.UNREACHABLE
                or after.last_contact_at is None
                or (
                    after.failures >= LIMITS.failures_before_unreachable
                    and (at - after.last_contact_at).total_seconds() >= SILENCE.total_seconds()
                )
            )


@given(steps)
def test_manager_faults_change_nothing_wherever_they_come(history: list[tuple[float, str]]) -> None:
    for (_, before, _), (what, after, _) in pairwise(walk(history)):
        assert what is not ContactReason.MANAGER_FAULT or after == before


@given(steps)
def test_healthy_takes_checks_that_passed_since_it_was_last_unreachable(history: list[tuple[float, str]]) -> None:
    checked = False
    for what, state, _ in walk(history):
        if state.health is Health.UNREACHABLE:
            checked = False
        elif what in {"passed", "warning", "critical"}:
            checked = what == "passed"
        if state.health is Health.HEALTHY:
            assert checked


@given(steps)
def test_healthy_means_that_nothing_is_broken(history: list[tuple[float, str]]) -> None:
    for _, state, _ in walk(history):
        assert state.health is not Health.HEALTHY or broken_conditions(state) == []


@given(steps)
def test_settled_means_that_a_good_answer_changes_times_only(history: list[tuple[float, str]]) -> None:
    for _, state, at in walk(history):
        after = succeed(state, at + seconds(1))
        times = {"last_contact_at": at + seconds(1), "last_attempt_at": at + seconds(1)}
        assert not is_settled(state) or after == replace(state, **times)


@given(steps)
def test_a_lost_node_is_not_schedulable_before_it_has_proven_itself(history: list[tuple[float, str]]) -> None:
    back_since: datetime | None = None
    lost = False
    for _, state, at in walk(history):
        if state.health is Health.UNREACHABLE:
            lost, back_since = True, None
        elif lost and state.last_contact_at == at and back_since is None:
            back_since = at
        if lost and is_schedulable(Admin.ACTIVE, state, at, STALE_AFTER):
            assert back_since is not None
            assert at - back_since >= seconds(LIMITS.return_seconds)
            lost = False


@given(steps)
def test_conditions_are_sorted_and_single(history: list[tuple[float, str]]) -> None:
    order = list(ConditionType)
    for _, state, _ in walk(history):
        places = [order.index(condition.type) for condition in state.conditions]
        assert places == sorted(set(places))


@given(steps)
def test_times_never_run_back(history: list[tuple[float, str]]) -> None:
    for (_, before, _), (_, after, at) in pairwise(walk(history)):
        assert before.health_since <= after.health_since <= at
        assert (after.health is before.health) == (after.health_since == before.health_since)
        assert all(condition.since <= at for condition in after.conditions)
